"""Labels of a training in NequIP: finite, and forces in the unit and with the sign of the base's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from nequip.data import AtomicDataDict

__all__ = ["require_finite", "require_units"]

_KEYS = (AtomicDataDict.TOTAL_ENERGY_KEY, AtomicDataDict.FORCE_KEY, AtomicDataDict.STRESS_KEY)
# factors of mixed-up units: Hartree/Bohr 0.019, Ry/Bohr 0.039, kcal/mol 23, kJ/mol 96, meV 1000; weak bases reach 4
SLOPES = (0.1, 10.0)
CORRELATED, LEAST = 0.8, 30


def require_finite(batch: Mapping[str, Any], loss: Any, where: str) -> None:
    """Refuse NaN and infinite labels, which make every weight NaN.

    Args:
        batch: frames.
        loss: NequIP's MetricsManager; fields with ``ignore_nan`` may be NaN.
        where: of the batch, for the message.

    Raises:
        ValueError: the label, and the frames of the batch that have it.
    """
    for key in _KEYS:
        entries = [e for e in loss.entries.values() if getattr(e.field, "field", None) == key]
        if key not in batch or not entries or any(e.ignore_nan for e in entries):
            continue
        bad = ~torch.isfinite(batch[key]).reshape(len(batch[key]), -1).all(1)
        if bad.any():
            frames = batch[AtomicDataDict.BATCH_KEY][bad].unique() if key == AtomicDataDict.FORCE_KEY else bad.nonzero()
            which = frames.reshape(-1).tolist()
            raise ValueError(
                f"data: {where}: label {key!r} is NaN or infinite in frames {which} of this batch; "
                "remove or relabel them, or set ignore_nan for it in loss and metrics"
            )


def require_units(batch: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> None:
    """Refuse forces that are the base's times a factor, or the opposite of them.

    Args:
        batch: frames with labels.
        base: what the base predicts for them.

    Raises:
        ValueError: slope and correlation of the labels against the base.
    """
    key = AtomicDataDict.FORCE_KEY
    if key not in batch or key not in base:
        return
    pairs = torch.stack([batch[key].reshape(-1), base[key].reshape(-1)]).double()
    label, model = pairs[:, torch.isfinite(pairs).all(0)]
    if len(label) < LEAST:
        return
    size = float(label.norm() * model.norm())
    correlation = float(label @ model) / size if size else 0.0
    slope = float(label @ model / (model @ model)) if size else math.nan
    if correlation < -CORRELATED:
        problem = "they have the wrong sign (gradients?)"
    elif correlation > CORRELATED and not SLOPES[0] < slope < SLOPES[1]:
        problem = "they are in other units than the base's"
    else:
        return
    raise ValueError(
        f"data: label {key!r}: {problem}: slope {slope:.4g} against the base's forces, correlation {correlation:.3f}; "
        "expected a slope near 1: convert energies and forces, or set check_units: false of the callback"
    )
