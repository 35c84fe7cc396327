"""Errors of parts of a data set: by size of the force, by temperature or any other key of the frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .metrics import Predictions, errors

__all__ = ["by_force", "by_key"]


def by_force(p: Predictions, bins: int = 5) -> list[dict[str, float]]:
    """Force errors of atoms grouped by the size of their reference force, in bins of equal numbers of atoms.

    Args:
        p: predictions.
        bins: number of groups.

    Returns:
        for each bin: ``low`` and ``high`` of |F| in eV/Å, ``atoms``, ``mae`` and ``rmse`` of the components in meV/Å,
        and ``relative``: the length of the error over the length of the force, both summed.
    """
    if bins < 1:
        raise ValueError(f"bins: expected at least 1, got {bins}")
    known = np.isfinite(p.forces_label).all(axis=1)
    label, df = p.forces_label[known], 1e3 * (p.forces - p.forces_label)[known]  # (atoms, 3)
    size = np.linalg.norm(label, axis=1)
    rows = []
    for part in np.array_split(np.argsort(size, kind="stable"), min(bins, len(size))) if len(size) else []:
        total = size[part].sum()
        rows.append({
            "low": float(size[part].min()), "high": float(size[part].max()), "atoms": len(part),
            "mae": float(np.abs(df[part]).mean()), "rmse": float(np.sqrt((df[part] ** 2).mean())),
            "relative": float(1e-3 * np.linalg.norm(df[part], axis=1).sum() / total) if total > 0 else float("nan"),
        })  # fmt: skip
    return rows


def by_key(p: Predictions, values: Sequence[Any]) -> dict[str, dict[str, float]]:
    """Errors of the frames of each value of a key, e.g. their temperature.

    Args:
        p: predictions.
        values: one for each frame.

    Returns:
        value -> ``frames``, ``mae_e``, ``rmse_e`` (meV/atom), ``mae_f``, ``rmse_f`` (meV/Å).
    """
    if len(values) != len(p.atoms):
        raise ValueError(f"values: expected one for each of {len(p.atoms)} frames, got {len(values)}")
    kinds = [str(v) for v in values]
    owner = np.repeat(np.arange(len(p.atoms)), p.atoms)
    out = {}
    for kind in sorted(set(kinds), key=_numbers_first):
        frames = np.array([k == kind for k in kinds])
        atoms = frames[owner]
        e = errors(
            Predictions(
                p.atoms[frames], p.energy_label[frames], p.energy[frames], p.forces_label[atoms], p.forces[atoms],
                p.numbers[atoms],
            )
        )  # fmt: skip
        out[kind] = {
            "frames": int(frames.sum()), "mae_e": e.mae_e, "rmse_e": e.rmse_e, "mae_f": e.mae_f, "rmse_f": e.rmse_f,
        }  # fmt: skip
    return out


def _numbers_first(text: str) -> tuple[int, float, str]:
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text
