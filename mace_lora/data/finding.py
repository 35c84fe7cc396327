"""What a look at a data set finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Finding", "listed"]

Severity = Literal["error", "warning", "info"]
_SHOWN = 10


@dataclass(frozen=True)
class Finding:
    """Something about a data set.

    Attributes:
        severity: error (training on it is wrong), warning (look at it), info.
        what: one sentence with numbers and units.
        frames: indices concerned, the first few.
        remedy: what to do; "" for infos.
    """

    severity: Severity
    what: str
    frames: tuple[int, ...] = ()
    remedy: str = ""


def listed(indices: Sequence[int] | NDArray[np.int64]) -> tuple[int, ...]:
    """The first few of many frames."""
    return tuple(int(i) for i in indices[:_SHOWN])
