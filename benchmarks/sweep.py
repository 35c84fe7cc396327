"""Learning-rate sweeps: both methods of a benchmark get theirs, widened where the best rate is at the edge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["next_rate"]


def next_rate(rows: Sequence[dict[str, Any]], score: Callable[[dict[str, Any]], float]) -> float | None:
    """The rate by which a sweep goes on: twice or half the best one while that is at the edge, for 6 rates at most.

    Args:
        rows: results of one method with their ``lr``, at three rates or more; fewer are no sweep.
        score: what is to be small, of validation frames.
    """
    rates, best = sorted(r["lr"] for r in rows), min(rows, key=score)["lr"]
    if not 3 <= len(rates) < 6 or best not in (rates[0], rates[-1]):
        return None
    return float(2 * best if best == rates[-1] else best / 2)
