"""Sample, select and label frames: the data side of every recipe."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "LabelReport": "labelling",
    "Schedule": "dynamics",
    "cluster": "perturb",
    "committee_deviation": "selection",
    "farthest": "selection",
    "features": "selection",
    "frame_key": "journal",
    "keep_sound": "perturb",
    "label": "labelling",
    "molecule": "packing",
    "open_labeler": "labelers",
    "pack": "packing",
    "rattle": "perturb",
    "sample_md": "dynamics",
    "strain": "perturb",
    "stretch_bond": "perturb",
}
__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
