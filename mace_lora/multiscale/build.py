"""Build the long path of MultiScaleMACE, and put it beside a stock MACE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from e3nn import o3
from mace.modules import interaction_classes

from mace_lora.mace_plugin.model_parts import LinearReadoutBlock, ScaleShiftMACE

from .model import MultiScaleMACE, last_linear
from .split import split_ranges

__all__ = ["LongPath", "build_long", "to_multiscale", "zero_long"]


# first blocks of the same kind in which a lone atom has no message and no residual
_WITHOUT_RESIDUAL = {
    "RealAgnosticResidualInteractionBlock": "RealAgnosticInteractionBlock",
    "RealAgnosticAttResidualInteractionBlock": "RealAgnosticInteractionBlock",
    "RealAgnosticDensityResidualInteractionBlock": "RealAgnosticDensityInteractionBlock",
    "RealAgnosticResidualNonLinearInteractionBlock": "RealAgnosticDensityInteractionBlock",
}


@dataclass(frozen=True)
class LongPath:
    """Sizes of the long path; the flags of ``mace_run_train`` have the same names.

    Attributes:
        num_channels_long: features of every degree.
        max_L_long: highest degree of the features.
        max_ell_long: highest degree of the spherical harmonics.
        correlation_long: body order of the update minus one; 1 is linear.
        num_radial_basis_long: Bessel functions on (0, r_max).
        radial_hidden_long: width of the radial network's hidden layer; 0 for none.
    """

    num_channels_long: int = 16
    max_L_long: int = 1
    max_ell_long: int = 1
    correlation_long: int = 1
    num_radial_basis_long: int = 8
    radial_hidden_long: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("num_channels_long", 1), ("max_L_long", 0), ("max_ell_long", 1), ("correlation_long", 1),
            ("num_radial_basis_long", 1), ("radial_hidden_long", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
        if self.max_L_long > self.max_ell_long * self.correlation_long:
            raise ValueError(
                f"max_L_long: expected at most {self.max_ell_long * self.correlation_long} with max_ell_long "
                f"{self.max_ell_long} and correlation_long {self.correlation_long}, got {self.max_L_long}"
            )


def build_long(short: ScaleShiftMACE, r_max: float, sizes: LongPath, avg_num_neighbors: float) -> ScaleShiftMACE:
    """A small stock MACE with the elements, heads and layers of another, on long edges.

    Its first block has no residual connection, so that it gives a lone atom no energy.

    Args:
        short: model that it will stand beside.
        r_max: long cutoff, Å.
        sizes: of the path.
        avg_num_neighbors: within r_max; messages are divided by it.
    """
    hidden = o3.Irreps([(sizes.num_channels_long, (ell, (-1) ** ell)) for ell in range(sizes.max_L_long + 1)])
    last = short.readouts[-1]
    nonlinear: dict[str, Any] = {"MLP_irreps": o3.Irreps("16x0e"), "gate": torch.nn.functional.silu}
    if not isinstance(last, LinearReadoutBlock):
        width = o3.Irreps(last.hidden_irreps)[0].mul // len(short.heads)
        nonlinear = {"MLP_irreps": o3.Irreps(f"{width}x0e"), "gate": last.non_linearity.acts[0].f}
    later, first = type(short.interactions[-1]), type(short.interactions[0])
    first = interaction_classes.get(_WITHOUT_RESIDUAL.get(first.__name__, ""), first)
    heads = list(short.heads)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # random numbers of one seed depend on their precision
    try:
        return ScaleShiftMACE(
            r_max=r_max, num_bessel=sizes.num_radial_basis_long,
            num_polynomial_cutoff=int(short.radial_embedding.cutoff_fn.p), max_ell=sizes.max_ell_long,
            interaction_cls=later, interaction_cls_first=first,
            num_interactions=len(short.interactions), num_elements=len(short.atomic_numbers), hidden_irreps=hidden,
            atomic_energies=torch.zeros(len(heads), len(short.atomic_numbers)).numpy(),
            avg_num_neighbors=avg_num_neighbors, atomic_numbers=short.atomic_numbers.tolist(),
            correlation=sizes.correlation_long, radial_MLP=[sizes.radial_hidden_long] * bool(sizes.radial_hidden_long),
            heads=heads, atomic_inter_scale=1.0, atomic_inter_shift=0.0, apply_cutoff=short.apply_cutoff,
            use_last_readout_only=len(short.readouts) == 1 and len(short.interactions) > 1, **nonlinear,
        ).to(next(short.parameters()).dtype)  # fmt: skip
    finally:
        torch.set_default_dtype(before)


def to_multiscale(
    short: ScaleShiftMACE, r_max: float, sizes: LongPath | None = None, *, coupling: str = "sum",
    avg_num_neighbors: float | None = None, zero: bool = True, long_range: str = "none",
    pme_smearing: float | None = None, split: bool = False, seed: int | None = None,
) -> MultiScaleMACE:  # fmt: skip
    """Put a long path beside a MACE, which keeps its weights and becomes the short path.

    Args:
        short: stock model; its cutoff becomes ``r_short``.
        r_max: long cutoff, Å.
        sizes: of the long path; default :class:`LongPath`.
        coupling: "sum" or "fused".
        avg_num_neighbors: within r_max; default the short path's, scaled with the volume.
        zero: start with a long path that contributes nothing, so that the model predicts what ``short`` predicts (with
            ``pme``: nearly so, since charges of zero would never grow).
        long_range: "none", or "pme" for learned charges and their Coulomb energy beyond r_max.
        pme_smearing: Å, see :class:`mace_lora.multiscale.pme.MultiScaleMACEPME`.
        split: the long path leaves near neighbours to the short one, see ``SplitCutoff``.
        seed: of the long path's first weights; default torch's generator as it is. The same seed gives the same path.

    Raises:
        ValueError: a cutoff or size that does not fit.
    """
    if seed is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return to_multiscale(
                short, r_max, sizes, coupling=coupling, avg_num_neighbors=avg_num_neighbors, zero=zero,
                long_range=long_range, pme_smearing=pme_smearing, split=split,
            )  # fmt: skip
    r_short = float(short.r_max)
    if not r_max > 0:
        raise ValueError(f"r_max: expected a length > 0 in Å, got {r_max}")
    if avg_num_neighbors is None:
        avg_num_neighbors = float(short.interactions[0].avg_num_neighbors) * (r_max / r_short) ** 3
    long = build_long(short, r_max, sizes or LongPath(), avg_num_neighbors)
    long = long.to(next(short.parameters()).device)
    if split:
        split_ranges(long, r_short)
    if long_range == "pme":
        from .pme import MultiScaleMACEPME

        model: MultiScaleMACE = MultiScaleMACEPME(short, long, coupling, pme_smearing, 1e-3 if zero else 0.1)
    elif long_range == "none":
        model = MultiScaleMACE(short, long, coupling)
    else:
        raise ValueError(f"long_range: expected none or pme, got {long_range!r}")
    if zero:
        zero_long(model)
    return model


@torch.no_grad()
def zero_long(model: MultiScaleMACE) -> None:
    """Make the long path's contribution exactly zero, with gradients that are not."""
    if model.fused:
        return  # fused readouts start with zero weights for the long features
    for readout in model.long.readouts:
        last_linear(readout).weight.zero_()
