"""A long path that leaves what is near to the short one."""

import torch
from e3nn.util.jit import compile_mode
from torch import nn

from mace_lora.mace_plugin.model_parts import PolynomialCutoff, ScaleShiftMACE

__all__ = ["SplitCutoff", "is_split", "split_ranges"]


@compile_mode("script")
class SplitCutoff(PolynomialCutoff):  # type: ignore[misc, unused-ignore]
    """u(r) (1 - S(r)): up to ``r_max`` as MACE's cutoff, but rising from 0 at 0 to all of it at the short cutoff.

    S is the short path's own cutoff function, so that the two share every distance smoothly.

    Args:
        r_max: long cutoff, Å.
        r_inner: short cutoff, Å.
        p: order of both polynomials.
    """

    r_inner: torch.Tensor

    def __init__(self, r_max: float, r_inner: float, p: int = 6) -> None:
        super().__init__(r_max, p)
        self.register_buffer("r_inner", torch.tensor(r_inner, dtype=torch.get_default_dtype()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Weight of distances x (edges, 1) in Å."""
        p = self.p.to(torch.int)
        return self.calculate_envelope(x, self.r_max, p) * (1.0 - self.calculate_envelope(x, self.r_inner, p))


def is_split(long: nn.Module) -> bool:
    """Whether a long path leaves out what the short one sees."""
    embedding: nn.Module = long.radial_embedding  # type: ignore[assignment]
    return hasattr(embedding.cutoff_fn, "r_inner")


def split_ranges(long: ScaleShiftMACE, r_short: float) -> None:
    """Give a long path the split cutoff, in place."""
    old = long.radial_embedding.cutoff_fn
    long.radial_embedding.cutoff_fn = SplitCutoff(float(long.r_max), r_short, int(old.p)).to(old.r_max)
