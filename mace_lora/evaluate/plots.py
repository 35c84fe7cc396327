"""Parity and learning-curve plots."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np

from mace_lora.atomic import atomic_path

from .metrics import Predictions

__all__ = ["learning_curve", "parity"]


def parity(predictions: Mapping[str, Predictions], path: str | os.PathLike[str]) -> None:
    """Predicted against reference energies (per atom, mean removed) and forces, a row per model.

    Args:
        predictions: title -> predictions on the same frames.
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4 * len(predictions)), layout="constrained")
    axes = figure.subplots(len(predictions), 2, squeeze=False)
    for row, (title, p) in zip(axes, predictions.items(), strict=True):
        known = np.isfinite(p.energy_label)
        energy, label = (p.energy / p.atoms)[known], (p.energy_label / p.atoms)[known]
        middle = label.mean() if label.size else 0.0
        forces_known = np.isfinite(p.forces_label)
        pairs = [
            (1e3 * (label - middle), 1e3 * (energy - middle), "energy − mean (meV/atom)"),
            (p.forces_label[forces_known], p.forces[forces_known], "force component (eV/Å)"),
        ]
        for axis, (x, y, name) in zip(row, pairs, strict=True):
            axis.set(xlabel=f"reference {name}", ylabel=f"model {name}", title=title)
            if not x.size:
                continue
            axis.scatter(x, y, s=6, alpha=0.5, linewidths=0)
            low, high = min(x.min(), y.min()), max(x.max(), y.max())
            axis.plot([low, high], [low, high], color="0.4", linewidth=0.8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def learning_curve(curves: Mapping[str, Sequence[tuple[int, float]]], path: str | os.PathLike[str]) -> None:
    """Validation force error against epoch.

    Args:
        curves: label -> (epoch, force MAE in meV/Å) pairs.
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for label, points in curves.items():
        axis.plot([e for e, _ in points], [v for _, v in points], label=label)
    axis.set(xlabel="epoch", ylabel="validation force MAE (meV/Å)", yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
