"""Take a MultiScaleMACE apart into stock models, and put one together for other elements or heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from e3nn import o3
from torch import nn

from mace_lora.mace_plugin.model_parts import ScaleShiftMACE

from .model import MultiScaleMACE, adopt, readout_like
from .split import is_split, split_ranges

__all__ = ["attach_long", "stock_paths"]


def stock_paths(model: Any) -> tuple[ScaleShiftMACE, ScaleShiftMACE]:
    """The two paths as stock models that share the modules; fused readouts are cut down to the short features."""
    if not model.fused:
        return model.short_model(), model.long
    plain = MultiScaleMACE.__new__(MultiScaleMACE)
    adopt(plain, model)
    layers = [len(model.products) - 1] if len(model.readouts) == 1 else range(len(model.readouts))
    plain.readouts = nn.ModuleList(
        readout_like(wide, o3.Irreps(model.products[at].linear.irreps_out))
        for wide, at in zip(model.readouts, layers, strict=True)
    )
    plain.fused, plain.coupling = False, "sum"
    return plain.short_model(), model.long


def attach_long(short: Any, source: Any, elements: Sequence[int]) -> MultiScaleMACE:
    """Put the long path (and fused readouts) of a trained model beside a short path for other elements.

    Args:
        short: stock model, prepared from the source's short path.
        source: trained MultiScaleMACE; not changed.
        elements: atomic numbers, a subset of the source's.

    Raises:
        ValueError: other heads than the source's, beyond copies of its only head.
    """
    from mace.tools.finetuning_utils import load_foundations_elements
    from mace.tools.scripts_utils import extract_config_mace_model
    from mace.tools.utils import AtomicNumberTable

    if list(short.heads) != list(source.heads) and (len(source.heads) > 1 or (source.fused and len(short.heads) > 1)):
        raise ValueError(
            f"heads: expected those of the multiscale foundation ({', '.join(source.heads)}), got "
            f"{', '.join(short.heads)}; heads are added to a foundation with one head and coupling sum only"
        )
    dtype = next(short.parameters()).dtype
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        config = extract_config_mace_model(source.long)
        heads = len(short.heads)
        config |= {
            "atomic_energies": torch.zeros(heads, len(elements)).numpy(), "atomic_numbers": list(elements),
            "num_elements": len(elements), "heads": list(short.heads), "atomic_inter_scale": [1.0] * heads,
            "atomic_inter_shift": [0.0] * heads,
        }  # fmt: skip
        with torch.no_grad():
            long = load_foundations_elements(
                ScaleShiftMACE(**config), source.long, AtomicNumberTable(list(elements)), load_readout=True,
                max_L=config["hidden_irreps"].lmax, default_dtype=dtype,
            )  # fmt: skip
            _check_scale(short, source)
        long = long.to(next(short.parameters()).device)
        if is_split(source.long):
            split_ranges(long, float(source.r_short))
        model = _same_kind(short, long, source, elements)
        if model.fused:
            model.readouts.load_state_dict(source.readouts.state_dict())
    finally:
        torch.set_default_dtype(before)
    return model


def _same_kind(short: Any, long: Any, source: Any, elements: Sequence[int]) -> MultiScaleMACE:
    """The source's class, with its charges where it has them."""
    if not hasattr(source, "charges"):
        return MultiScaleMACE(short, long, source.coupling)
    from .pme import MultiScaleMACEPME

    model = MultiScaleMACEPME(short, long, source.coupling, source.smearing)
    rows = [source.atomic_numbers.tolist().index(z) for z in elements]
    with torch.no_grad():
        model.charges.element.copy_(source.charges.element[rows])
        model.charges.weight.copy_(source.charges.weight)
    return model


def _check_scale(short: Any, source: Any) -> None:
    """Upstream carries scale and shift over; checked, since a lost scale would be silent."""
    got, expected = torch.atleast_1d(short.scale_shift.scale), torch.atleast_1d(source.scale_shift.scale)
    if not torch.allclose(got.to(expected), expected):
        raise ValueError(
            f"scale: expected the foundation's {expected.tolist()}, got {got.tolist()}; give --scaling=no_scaling"
        )
