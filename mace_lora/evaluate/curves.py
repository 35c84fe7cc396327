"""Error against number of labels, from the ``errors.json`` of several evaluations."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mace_lora.atomic import atomic_path

__all__ = ["data_curve", "read_points"]

_KEYS = {"mae_e": "energy MAE (meV/atom)", "mae_f": "force MAE (meV/Å)"}


def read_points(specs: Iterable[str]) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """Evaluations given as ``NAME:N=FILE``, e.g. ``lora:50=eval50/errors.json``; several of one N are seeds.

    Returns:
        name -> number of labels -> contents of the files.

    Raises:
        ValueError: a text of another form, or a file that is none of ours.
    """
    curves: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for spec in specs:
        left, _, file = spec.partition("=")
        name, _, count = left.rpartition(":")
        if not name or not count.isdecimal() or not file:
            raise ValueError(f"expected NAME:N=errors.json, e.g. lora:50=evaluation/errors.json, got {spec!r}")
        path = Path(file)
        if path.is_dir():
            path = path / "errors.json"
        if not path.is_file():
            raise FileNotFoundError(f"{spec}: no file {path}")
        try:
            content = json.loads(path.read_text())
            values = [v for key in _KEYS for v in (content["errors"][key], *content["intervals"][key])]
            if not all(v is None or isinstance(v, int | float) for v in values):
                raise TypeError(f"not numbers: {values}")
        except (ValueError, KeyError, TypeError) as err:
            raise ValueError(f"{path}: expected an errors.json of equitune evaluate, got something else") from err
        curves.setdefault(name, {}).setdefault(int(count), []).append(content)
    return curves


def data_curve(curves: dict[str, dict[int, list[dict[str, Any]]]], path: str | os.PathLike[str]) -> None:
    """Log-log plot: medians over seeds, bars from lowest to highest (one seed: its bootstrap interval).

    Args:
        curves: as from :func:`read_points`.
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axis, (key, label) in zip(figure.subplots(1, 2), _KEYS.items(), strict=True):
        for name, every in curves.items():
            # an evaluation without labels of a kind has no error of that kind
            points = {n: [c for c in every[n] if c["errors"][key] is not None] for n in every}
            counts = sorted(n for n in points if points[n])
            if not counts:
                continue
            middle = [float(np.median([c["errors"][key] for c in points[n]])) for n in counts]
            ranges = [_range(points[n], key) for n in counts]
            bars = np.array([[m - low, high - m] for m, (low, high) in zip(middle, ranges, strict=True)]).T
            axis.errorbar(counts, middle, yerr=np.clip(bars, 0, None), marker="o", capsize=3, label=name)
        axis.set(xscale="log", yscale="log", xlabel="labels", ylabel=label)
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def _range(contents: list[dict[str, Any]], key: str) -> tuple[float, float]:
    if len(contents) > 1:
        values = [c["errors"][key] for c in contents]
        return min(values), max(values)
    low, high = contents[0]["intervals"][key]
    value = contents[0]["errors"][key]
    return (value if low is None else low), (value if high is None else high)
