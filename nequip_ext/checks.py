"""Checks of a builder's arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["is_number", "require_sizes"]


def is_number(value: Any) -> bool:
    """A finite int or float; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def require_sizes(sizes: Mapping[str, Any], least: int = 1) -> None:
    """Refuse sizes that are no whole numbers of at least ``least``.

    Raises:
        ValueError: the first of them.
    """
    what = "positive whole number" if least == 1 else f"whole number of at least {least}"
    for name, value in sizes.items():
        if not (is_number(value) and int(value) == value and value >= least):
            raise ValueError(f"{name}: expected a {what}, got {value!r}")
