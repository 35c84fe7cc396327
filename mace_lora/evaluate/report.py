"""The report of ``equitune evaluate``: table, JSON and parity plot."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from rich.table import Table

from mace_lora.atomic import write_text

from .groups import by_force, by_key
from .metrics import Predictions, errors, intervals, per_element, stress_errors
from .plots import parity

__all__ = ["report", "tables", "write_report"]

_ROWS = {
    "mae_e": ("E MAE", "meV/atom"), "rmse_e": ("E RMSE", "meV/atom"),
    "mae_f": ("F MAE", "meV/Å"), "rmse_f": ("F RMSE", "meV/Å"),
}  # fmt: skip


def report(
    p: Predictions, level: float = 0.95, groups: Mapping[str, Sequence[Any]] | None = None, **source: Any
) -> dict[str, Any]:
    """All figures of an evaluation as plain values.

    Args:
        p: predictions.
        level: confidence level of the bootstrap intervals over frames.
        groups: key -> its value in every frame; errors are also given for each value.
        source: what was evaluated (model, file, …); copied into the result.
    """
    de = 1e3 * (p.energy - p.energy_label) / p.atoms
    stress = stress_errors(p)
    return {
        **source,
        "frames": len(p.atoms),
        "atoms": int(p.atoms.sum()),
        "units": {"energy": "meV/atom", "forces": "meV/A", "stress": "meV/A^3"},
        "errors": {k: _plain(v) for k, v in asdict(errors(p)).items()},
        "interval_level": level,
        "intervals": {k: [_plain(x) for x in v] for k, v in intervals(p, level).items()},
        "mean_energy_error": _plain(np.nanmean(de)) if np.isfinite(de).any() else None,
        "mae_e_without_mean_error": _plain(np.nanmean(np.abs(de - np.nanmean(de)))) if np.isfinite(de).any() else None,
        "force_errors_by_element": {
            chemical_symbols[z]: {"atoms": n, "mae": mae, "rmse": rmse} for z, (n, mae, rmse) in per_element(p).items()
        },
        "force_errors_by_size": [{k: _plain(v) for k, v in row.items()} for row in by_force(p)],
        "errors_by": {
            key: {value: {k: _plain(v) for k, v in row.items()} for value, row in by_key(p, values).items()}
            for key, values in (groups or {}).items()
        },
        "stress_errors": None if stress is None else {"mae": stress[0], "rmse": stress[1]},
    }


def _plain(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None  # JSON has no NaN


def tables(content: dict[str, Any]) -> list[Table]:
    """The figures as tables for the terminal."""
    percent = f"{100 * content['interval_level']:g} %"
    main = Table("error", "value", f"{percent} interval", "unit", title=f"{content['frames']} frames")
    for key, (name, unit) in _ROWS.items():
        value, (low, high) = content["errors"][key], content["intervals"][key]
        if value is not None:
            main.add_row(name, f"{value:.2f}", "–" if low is None else f"{low:.2f}–{high:.2f}", unit)
    if content["mean_energy_error"] is not None:
        main.add_row("E mean error", f"{content['mean_energy_error']:+.2f}", "–", "meV/atom")
        main.add_row("E MAE, mean error removed", f"{content['mae_e_without_mean_error']:.2f}", "–", "meV/atom")
    if content["stress_errors"]:
        for kind in ("mae", "rmse"):
            low, high = content["intervals"][f"{kind}_s"]
            shown = "–" if low is None else f"{low:.3f}–{high:.3f}"
            main.add_row(f"stress {kind.upper()}", f"{content['stress_errors'][kind]:.3f}", shown, "meV/Å³")
    elements = Table("element", "atoms", "F MAE (meV/Å)", "F RMSE (meV/Å)")
    for symbol, row in content["force_errors_by_element"].items():
        elements.add_row(symbol, f"{row['atoms']:,}", f"{row['mae']:.2f}", f"{row['rmse']:.2f}")
    sizes = Table("|F| (eV/Å)", "atoms", "F MAE (meV/Å)", "F RMSE (meV/Å)", "relative")
    for row in content["force_errors_by_size"]:
        relative = "–" if row["relative"] is None else f"{100 * row['relative']:.1f} %"
        bounds = f"{row['low']:.2f}–{row['high']:.2f}"
        sizes.add_row(bounds, f"{row['atoms']:,.0f}", f"{row['mae']:.2f}", f"{row['rmse']:.2f}", relative)
    parts = []
    for key, rows in content["errors_by"].items():
        parts.append(Table(key, "frames", "E MAE (meV/atom)", "F MAE (meV/Å)"))
        for value, row in rows.items():
            errors_of = [("–" if row[k] is None else f"{row[k]:.2f}") for k in ("mae_e", "mae_f")]
            parts[-1].add_row(value, f"{row['frames']:,.0f}", *errors_of)
    return [main, elements, sizes, *parts]


def write_report(p: Predictions, content: dict[str, Any], folder: str | os.PathLike[str], title: str) -> list[Path]:
    """Write ``errors.json`` and ``parity.png``.

    Returns:
        the files.
    """
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "errors.json", json.dumps(content, indent=1) + "\n")
    parity({title: p}, out / "parity.png")
    return [out / "errors.json", out / "parity.png"]
