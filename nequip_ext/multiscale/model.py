"""Builder of MultiScaleNequIP for NequIP configs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from e3nn.o3._irreps import Irreps
from nequip.data import AtomicDataDict
from nequip.model.utils import model_builder
from nequip.nn import (
    ApplyFactor,
    AtomwiseReduce,
    ConvNetLayer,
    ForceStressOutput,
    GraphModel,
    PerTypeScaleShift,
    ScalarMLP,
    SequentialGraphNetwork,
)
from nequip.nn.embedding import (
    BesselEdgeLengthEncoding,
    EdgeLengthNormalizer,
    NodeTypeEmbed,
    PolynomialCutoff,
    SphericalHarmonicEdgeAttrs,
)

from nequip_ext.checks import is_number, require_energies, require_sizes, require_types
from nequip_ext.upstream.build import append_energy_modules

from .modules import (
    ATOMS_LONG,
    ENERGY_LONG,
    LONG_ENERGY,
    LONG_FEATURES,
    AllEdges,
    EnergyShares,
    FusedReadout,
    ShortEdges,
    ShortShare,
)

__all__ = ["MultiScaleNequIP", "append_path", "check_path", "feature_irreps"]

_COUPLINGS = ("sum", "fused")


@model_builder
def MultiScaleNequIP(
    r_max: float,
    r_short: float,
    type_names: Sequence[str],
    num_layers: int = 3,
    l_max: int = 1,
    parity: bool = True,
    num_features: int = 32,
    radial_mlp_depth: int = 1,
    radial_mlp_width: int = 64,
    num_bessels: int = 8,
    polynomial_cutoff_p: int = 6,
    num_layers_long: int = 2,
    num_channels_long: int = 8,
    max_L_long: int = 1,
    max_ell_long: int | None = None,
    num_radial_basis_long: int = 8,
    radial_hidden_long: int = 0,
    multiscale_coupling: str = "sum",
    avg_num_neighbors: float | dict[str, float] | None = None,
    avg_num_neighbors_short: float | dict[str, float] | None = None,
    per_type_energy_scales: float | dict[str, float] | None = None,
    per_type_energy_shifts: float | dict[str, float] | None = None,
    per_type_energy_scales_trainable: bool = False,
    per_type_energy_shifts_trainable: bool = False,
    pair_potential: dict[str, Any] | None = None,
    do_derivatives: bool = True,
) -> GraphModel:
    """NequIP within ``r_short`` beside a light NequIP within ``r_max`` (arXiv 2312.09490).

    One neighbour list of ``r_max`` serves both, so that training, packaging, ASE and LAMMPS work as for NequIP; the
    short path gets the short edges as an index subset. Beyond NequIP's outputs there are ``energy_short`` and
    ``energy_long`` (frames, 1) in eV, which add up to the total energy.

    Args:
        r_max: long cutoff, Å; that of the neighbour list.
        r_short: short cutoff, Å.
        type_names: atom types.
        num_layers, l_max, parity, num_features: of the short path, as for NequIP.
        radial_mlp_depth, radial_mlp_width, num_bessels, polynomial_cutoff_p: of the short path, as for NequIP.
        num_layers_long: interactions of the long path.
        num_channels_long: features of every degree of the long path.
        max_L_long: highest degree of the long path's features.
        max_ell_long: highest degree of its spherical harmonics; default max_L_long.
        num_radial_basis_long: radial functions of the long path.
        radial_hidden_long: hidden width of its radial network; 0 for none.
        multiscale_coupling: "sum" of two readouts, or one "fused" readout of both feature sets.
        avg_num_neighbors: mean number of neighbours within r_max, of all atoms or of each type.
        avg_num_neighbors_short: within r_short; default: scaled with the volume.
        per_type_energy_scales, per_type_energy_shifts: energy scale and isolated-atom energy of each type, eV.
        per_type_energy_scales_trainable, per_type_energy_shifts_trainable: train them.
        pair_potential: config of an additional pair potential.
        do_derivatives: predict forces and stress.

    Also taken by every NequIP builder: ``seed``, ``model_dtype``, ``compile_mode``.

    Raises:
        ValueError: cutoffs, sizes or coupling out of range.
    """
    if multiscale_coupling not in _COUPLINGS:
        raise ValueError(f"multiscale_coupling: expected one of {', '.join(_COUPLINGS)}, got {multiscale_coupling!r}")
    degree_long = max_L_long if max_ell_long is None else max_ell_long
    check_path(
        r_max, r_short,
        {"avg_num_neighbors": avg_num_neighbors}
        | ({} if avg_num_neighbors_short is None else {"avg_num_neighbors_short": avg_num_neighbors_short}),
        {"l_max": l_max, "radial_mlp_depth": radial_mlp_depth, "max_L_long": max_L_long,
         "max_ell_long": degree_long, "radial_hidden_long": radial_hidden_long},
        {"num_layers": num_layers, "num_features": num_features, "radial_mlp_width": radial_mlp_width,
         "num_bessels": num_bessels, "polynomial_cutoff_p": polynomial_cutoff_p, "num_layers_long": num_layers_long,
         "num_channels_long": num_channels_long, "num_radial_basis_long": num_radial_basis_long},
    )  # fmt: skip
    types = require_types(type_names)
    require_energies(
        {"per_type_energy_scales": per_type_energy_scales, "per_type_energy_shifts": per_type_energy_shifts}, types
    )
    short_neighbors = avg_num_neighbors_short
    if short_neighbors is None:
        volumes = (r_short / r_max) ** 3
        if isinstance(avg_num_neighbors, Mapping):
            short_neighbors = {t: volumes * n for t, n in avg_num_neighbors.items()}
        elif avg_num_neighbors is not None:
            short_neighbors = volumes * avg_num_neighbors
    modules: dict[str, Any] = {}
    last = append_path(
        modules, "long_", types, r_max, polynomial_cutoff_p, num_radial_basis_long,
        feature_irreps(num_layers_long, max_L_long, False, num_channels_long), degree_long, bool(radial_hidden_long),
        radial_hidden_long, avg_num_neighbors, {},
    )  # fmt: skip
    short: Any = ShortEdges(r_short, last.irreps_out)
    modules["short_edges"] = short
    last = append_path(
        modules, "", types, r_short, polynomial_cutoff_p, num_bessels,
        feature_irreps(num_layers, l_max, parity, num_features), l_max, radial_mlp_depth, radial_mlp_width,
        short_neighbors, short.irreps_out,
    )  # fmt: skip
    modules["all_edges"] = AllEdges(last.irreps_out)
    last = _readouts(modules, multiscale_coupling, num_features, modules["all_edges"].irreps_out)
    scale_shift = PerTypeScaleShift(
        type_names=types, field=AtomicDataDict.PER_ATOM_ENERGY_KEY, out_field=AtomicDataDict.PER_ATOM_ENERGY_KEY,
        scales=per_type_energy_scales, shifts=per_type_energy_shifts, scales_trainable=per_type_energy_scales_trainable,
        shifts_trainable=per_type_energy_shifts_trainable, irreps_in=last.irreps_out,
    )  # fmt: skip
    modules["energy_shares"] = EnergyShares(scale_shift, last.irreps_out)
    network = append_energy_modules(
        model=SequentialGraphNetwork(modules), type_names=types, pair_potential=pair_potential
    )
    far = AtomwiseReduce(field=ATOMS_LONG, out_field=ENERGY_LONG, reduce="sum", irreps_in=network.irreps_out)
    network.append("long_energy_sum", far)
    network.append("short_share", ShortShare(far.irreps_out))
    return ForceStressOutput(network, do_derivatives)


def check_path(
    r_max: float, r_short: float, neighbors: dict[str, Any], at_least_0: dict[str, Any], at_least_1: dict[str, Any]
) -> None:
    """Cutoffs, numbers of neighbours and sizes.

    Raises:
        ValueError: the first that is out of range, by its name.
    """
    if not (is_number(r_max) and r_max > 0):
        raise ValueError(f"r_max: expected a finite length > 0 in Å, got {r_max!r}")
    if not (is_number(r_short) and 0 < r_short < r_max):
        raise ValueError(f"r_short: expected a length between 0 and r_max ({r_max} Å), got {r_short}")
    require_sizes(at_least_0, least=0)
    require_sizes(at_least_1)
    for name, given in neighbors.items():
        for value in given.values() if isinstance(given, Mapping) else (given,):  # one value, or one of each type
            if not (is_number(value) and value > 0):
                raise ValueError(f"{name}: expected a finite number > 0, got {given!r}")


def feature_irreps(layers: int, degree: int, parity: bool, features: int) -> list[Irreps]:
    """Feature irreps of every layer; the last has scalars only."""
    inner = Irreps([
        (features, (ell, p)) for ell in range(degree + 1) for p in ((1, -1) if parity else ((-1) ** ell,))
    ])  # fmt: skip
    return [inner] * (layers - 1) + [Irreps([(features, (0, 1))])]


def append_path(
    modules: dict[str, Any], prefix: str, types: list[str], r_max: float, cutoff: int, bessels: int,
    hidden: list[Irreps], degree: int, depth: int, width: int, neighbors: float | dict[str, float] | None,
    irreps_in: dict[str, Any],
) -> Any:  # fmt: skip
    """Append NequIP's embeddings and interactions for one range; returns the last module."""
    embed = NodeTypeEmbed(type_names=types, num_features=hidden[0].count("0e"), irreps_in=irreps_in)
    irreps = {**irreps_in, **embed.irreps_out}
    spharm = SphericalHarmonicEdgeAttrs(irreps_edge_sh=repr(Irreps.spherical_harmonics(degree)), irreps_in=irreps)
    norm = EdgeLengthNormalizer(r_max=r_max, type_names=types, irreps_in=spharm.irreps_out)
    bessel = BesselEdgeLengthEncoding(
        num_bessels=bessels, cutoff=PolynomialCutoff(cutoff),
        edge_invariant_field=AtomicDataDict.EDGE_EMBEDDING_KEY, irreps_in=norm.irreps_out,
    )  # fmt: skip
    factor = ApplyFactor(
        in_field=AtomicDataDict.EDGE_EMBEDDING_KEY, factor=2 * math.pi / r_max**2, irreps_in=bessel.irreps_out
    )
    names = ("type_embed", "spharm", "edge_norm", "bessel_encode", "factor")
    modules |= {f"{prefix}{n}": m for n, m in zip(names, (embed, spharm, norm, bessel, factor), strict=True)}
    last: Any = factor
    for i, irreps_hidden in enumerate(hidden):
        last = ConvNetLayer(
            irreps_in=last.irreps_out, feature_irreps_hidden=repr(irreps_hidden),
            convolution_kwargs={
                "radial_mlp_depth": int(depth), "radial_mlp_width": width, "use_sc": i != 0, "is_first_layer": i == 0,
                "avg_num_neighbors": neighbors, "type_names": types,
            },
            resnet=False, nonlinearity_type="gate", nonlinearity_scalars={"e": "silu", "o": "tanh"},
            nonlinearity_gates={"e": "silu", "o": "tanh"},
        )  # fmt: skip
        modules[f"{prefix}layer{i}_convnet"] = last
    return last


def _readouts(modules: dict[str, Any], coupling: str, features: int, irreps_in: dict[str, Any]) -> Any:
    """Append what turns the two feature sets into atomic energies; returns the last module."""
    options = {
        "output_dim": 1, "hidden_layers_width": features, "nonlinearity": "silu", "bias": False,
        "forward_weight_init": True,
    }  # fmt: skip
    if coupling == "fused":
        both = sum(Irreps(irreps_in[k]).dim for k in (AtomicDataDict.NODE_FEATURES_KEY, LONG_FEATURES))
        irreps = {**irreps_in, AtomicDataDict.NODE_FEATURES_KEY: Irreps(f"{both}x0e")}
        readout = ScalarMLP(
            hidden_layers_depth=1, field=AtomicDataDict.NODE_FEATURES_KEY, irreps_in=irreps,
            out_field=AtomicDataDict.PER_ATOM_ENERGY_KEY, **options,
        )  # fmt: skip
        modules["fused_readout"] = fused = FusedReadout(readout, irreps_in)
        return fused
    modules["per_atom_energy_readout"] = readout = ScalarMLP(
        hidden_layers_depth=0, field=AtomicDataDict.NODE_FEATURES_KEY, irreps_in=irreps_in,
        out_field=AtomicDataDict.PER_ATOM_ENERGY_KEY, **options,
    )  # fmt: skip
    modules["long_energy_readout"] = far = ScalarMLP(
        hidden_layers_depth=0, field=LONG_FEATURES, out_field=LONG_ENERGY, irreps_in=readout.irreps_out, **options
    )
    with torch.no_grad():  # starts as a correction
        for parameter in far.parameters():
            parameter.mul_(0.1)
    return far
