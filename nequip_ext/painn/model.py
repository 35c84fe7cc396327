"""Builder of PaiNN for NequIP configs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nequip.data import AtomicDataDict
from nequip.model.utils import model_builder
from nequip.nn import ForceStressOutput, GraphModel, PerTypeScaleShift, SequentialGraphNetwork
from nequip.nn.embedding import (
    BesselEdgeLengthEncoding,
    EdgeLengthNormalizer,
    PolynomialCutoff,
    SphericalHarmonicEdgeAttrs,
)

from nequip_ext.checks import is_number, require_energies, require_pair_cutoffs, require_sizes, require_types
from nequip_ext.upstream.build import append_energy_modules

from .layers import PaiNNLayer, PaiNNReadout, PaiNNTypeEmbed

__all__ = ["PaiNN"]


@model_builder
def PaiNN(
    r_max: float,
    type_names: Sequence[str],
    num_layers: int = 3,
    num_features: int = 64,
    num_bessels: int = 20,
    bessel_trainable: bool = False,
    polynomial_cutoff_p: int = 6,
    per_edge_type_cutoff: dict[str, float | dict[str, float]] | None = None,
    avg_num_neighbors: float = 1.0,
    per_type_energy_scales: float | dict[str, float] | None = None,
    per_type_energy_shifts: float | dict[str, float] | None = None,
    per_type_energy_scales_trainable: bool = False,
    per_type_energy_shifts_trainable: bool = False,
    pair_potential: dict[str, Any] | None = None,
    do_derivatives: bool = True,
) -> GraphModel:
    """PaiNN with NequIP's embeddings, energy references, forces and stress (arXiv 2102.03150).

    Differences from the paper: NequIP's polynomial cutoff instead of a cosine, sums over neighbours divided
    by sqrt(``avg_num_neighbors``), and atomic energies relative to an isolated atom of the type.

    Args:
        r_max: cutoff radius, Å.
        type_names: atom types.
        num_layers: number of interactions.
        num_features: F, number of scalar and of vector features.
        num_bessels: number of radial functions.
        bessel_trainable: train the radial frequencies.
        polynomial_cutoff_p: exponent of the cutoff.
        per_edge_type_cutoff: shorter cutoffs by pair of types, Å.
        avg_num_neighbors: mean number of neighbours in the training data.
        per_type_energy_scales: energy scale of each type, eV.
        per_type_energy_shifts: energy of an isolated atom of each type, eV.
        per_type_energy_scales_trainable: train the scales.
        per_type_energy_shifts_trainable: train the shifts.
        pair_potential: config of an additional pair potential.
        do_derivatives: predict forces and stress.

    Also taken by every NequIP builder: ``seed``, ``model_dtype``, ``compile_mode``.

    Raises:
        ValueError: sizes, cutoff or neighbours that are not positive, or energies of other types.
    """
    types = require_types(type_names)
    require_sizes(
        {"num_layers": num_layers, "num_features": num_features, "num_bessels": num_bessels,
         "polynomial_cutoff_p": polynomial_cutoff_p}
    )  # fmt: skip
    for name, value in {"r_max": r_max, "avg_num_neighbors": avg_num_neighbors}.items():
        if not (is_number(value) and value > 0):
            raise ValueError(f"{name}: expected one positive number for PaiNN, got {value!r}")
    require_pair_cutoffs(per_edge_type_cutoff, r_max, types)
    require_energies(
        {"per_type_energy_scales": per_type_energy_scales, "per_type_energy_shifts": per_type_energy_shifts}, types
    )
    embed = PaiNNTypeEmbed(type_names=types, num_features=num_features)
    direction = SphericalHarmonicEdgeAttrs(
        irreps_edge_sh="1x1o", edge_sh_normalization="norm", irreps_in=embed.irreps_out
    )
    length = EdgeLengthNormalizer(
        r_max=r_max, type_names=types, per_edge_type_cutoff=per_edge_type_cutoff,
        irreps_in=direction.irreps_out,
    )  # fmt: skip
    bessel = BesselEdgeLengthEncoding(
        num_bessels=num_bessels, trainable=bessel_trainable, cutoff=PolynomialCutoff(polynomial_cutoff_p),
        edge_invariant_field=AtomicDataDict.EDGE_EMBEDDING_KEY, irreps_in=length.irreps_out,
    )  # fmt: skip
    modules = {"type_embed": embed, "direction": direction, "edge_norm": length, "bessel": bessel}
    previous: Any = bessel
    for i in range(num_layers):
        previous = PaiNNLayer(num_features, i == 0, float(avg_num_neighbors), previous.irreps_out)
        modules[f"layer{i}_painn"] = previous
    readout = PaiNNReadout(num_features, previous.irreps_out)
    scale_shift = PerTypeScaleShift(
        type_names=types, field=AtomicDataDict.PER_ATOM_ENERGY_KEY,
        out_field=AtomicDataDict.PER_ATOM_ENERGY_KEY, scales=per_type_energy_scales, shifts=per_type_energy_shifts,
        scales_trainable=per_type_energy_scales_trainable, shifts_trainable=per_type_energy_shifts_trainable,
        irreps_in=readout.irreps_out,
    )  # fmt: skip
    modules |= {"per_atom_energy_readout": readout, "per_type_energy_scale_shift": scale_shift}
    network = append_energy_modules(
        model=SequentialGraphNetwork(modules), type_names=types, pair_potential=pair_potential
    )
    return ForceStressOutput(network, do_derivatives)
