"""Multiscale long-range block for MACE: a costly short path and a cheap long path side by side."""

from __future__ import annotations

import importlib
from typing import Any

import mace  # noqa: F401  before e3nn, whose constants need what MACE sets

_WHERE = {"LongPath": "build", "MultiScaleMACE": "model", "build_long": "build", "to_multiscale": "build"}
__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
