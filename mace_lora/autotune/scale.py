"""Scale between two levels of theory, by their forces."""

from __future__ import annotations

__all__ = ["scale_between"]

_RATIOS, _CORRELATION = (1 / 3, 3.0), 0.3  # beyond these the levels have nothing in common that a scale could mend


def scale_between(product: float, label: float, model: float) -> tuple[float, float]:
    """Correlation of labels and predictions, and the ratio of their root mean squares.

    The slope would be the same for perfectly correlated levels, and shrink the model where they are not.

    Args:
        product: sum of label times prediction, over all force components.
        label, model: sums of their squares.

    Returns:
        the correlation, and the ratio; 1 where it is out of bounds, or the correlation too low.
    """
    if not label * model > 0.0:
        return 0.0, 1.0
    correlation, ratio = product / (label * model) ** 0.5, (label / model) ** 0.5
    return correlation, ratio if correlation > _CORRELATION and _RATIOS[0] < ratio < _RATIOS[1] else 1.0
