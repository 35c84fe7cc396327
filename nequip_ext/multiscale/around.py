"""``_target_: nequip_ext.AddLongPath``: a trained short-range model with a light long path beside it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from e3nn.o3._irreps import Irreps
from nequip.data import AtomicDataDict
from nequip.model.utils import model_builder
from nequip.nn import AtomwiseReduce, ForceStressOutput, GraphModel, ScalarMLP, SequentialGraphNetwork
from torch import nn

from nequip_ext.checks import is_number
from nequip_ext.lora.builder import build_model, with_keys
from nequip_ext.lora.metadata import holds_adapter
from nequip_ext.upstream.build import energy_network

from .model import append_path, check_path, feature_irreps
from .modules import ATOMS_LONG, ENERGY_LONG, LONG_ENERGY, LONG_FEATURES, AddedEnergy, AllEdges, ShortEdges

__all__ = ["AddLongPath", "restore_long_path"]

_LOG = logging.getLogger("equitune")


def AddLongPath(
    model: Mapping[str, Any] | nn.Module,
    r_max: float,
    avg_num_neighbors: float,
    num_layers_long: int = 2,
    num_channels_long: int = 8,
    max_L_long: int = 1,
    max_ell_long: int | None = None,
    num_radial_basis_long: int = 8,
    radial_hidden_long: int = 0,
    polynomial_cutoff_p: int = 6,
    freeze_short: bool = False,
    type_names: Sequence[str] | None = None,
    seed: int = 0,
    model_dtype: str | None = None,
    compile_mode: str | None = None,
) -> GraphModel:
    """Put a light NequIP within ``r_max`` beside a model of a shorter cutoff (arXiv 2312.09490).

    The long path's readout starts at zero, so that energies and forces are the model's own at first. The model may be
    NequIP, Allegro or PaiNN; it keeps its modules, and sees the edges within its own cutoff. Around a package,
    package the trained model before NequIP's modifiers (LAMMPS ML-IAP, accelerations) are applied to it.

    Args:
        model: config of the short-range model (``ModelFromCheckpoint``, ``ModelFromPackage``, a builder), or a
            built one.
        r_max: long cutoff, Å; that of the neighbour list from now on.
        avg_num_neighbors: mean number of neighbours within r_max.
        num_layers_long: interactions of the long path.
        num_channels_long: features of every degree of the long path.
        max_L_long: highest degree of the long path's features.
        max_ell_long: highest degree of its spherical harmonics; default max_L_long.
        num_radial_basis_long: radial functions of the long path.
        radial_hidden_long: hidden width of its radial network; 0 for none.
        polynomial_cutoff_p: of the long cutoff.
        freeze_short: train the long path only.
        type_names: to be checked against the model's.
        seed: of the long path.
        model_dtype, compile_mode: as for every NequIP builder; a model from a file brings its own precision.

    Returns:
        a model with ``energy_short`` and ``energy_long`` (frames, 1) in eV among its outputs.

    Raises:
        ValueError: cutoffs or sizes out of range, other types, or a model that has two paths or an adapter already.
    """
    if not isinstance(model, nn.Module | Mapping):
        raise ValueError(f"model: expected the config of a model or a built one, got {model!r}")
    if not isinstance(freeze_short, bool):
        raise ValueError(f"freeze_short: expected true or false, got {freeze_short!r}")
    if isinstance(model, nn.Module) and model_dtype is not None:
        raise ValueError(f"model_dtype: a built model brings its own; drop {model_dtype!r}")
    if isinstance(model, Mapping) and _compiled_inside(model):
        raise ValueError("model: compile_mode: give it to nequip_ext.AddLongPath, which makes one model of the two")
    built: Any = model if isinstance(model, nn.Module) else build_model(with_keys(model, model_dtype, None))
    if isinstance(built, nn.ModuleDict):  # a checkpoint's models by name
        if len(built) != 1:
            raise ValueError(f"model: nequip_ext.AddLongPath takes one model, got {list(built)}")
        built = next(iter(built.values()))
    if any(name.rpartition(".")[2] == "short_edges" for name, _ in built.named_modules()):
        raise ValueError("model: expected a short-range model, got one that has a long path already")
    if holds_adapter(built):
        raise ValueError(
            "model: it has a LoRA adapter; merge it (equitune merge), or wrap AddLongPath in nequip_ext.LoRA"
        )
    network = energy_network(built)
    if type_names is not None and list(type_names) != list(built.type_names):
        raise ValueError(f"type_names: expected the model's {list(built.type_names)}, got {list(type_names)}")
    metadata = dict(built.metadata)
    r_short = float(metadata["r_max"])
    if is_number(r_max) and r_max <= r_short:
        raise ValueError(f"r_max: expected more than the model's own cutoff ({r_short:g} Å), got {r_max:g}")
    if not is_number(avg_num_neighbors):
        raise ValueError(f"avg_num_neighbors: expected a finite number > 0, got {avg_num_neighbors!r}")
    degree = max_L_long if max_ell_long is None else max_ell_long
    check_path(
        r_max, r_short, {"avg_num_neighbors": avg_num_neighbors},
        {"max_L_long": max_L_long, "max_ell_long": degree, "radial_hidden_long": radial_hidden_long},
        {"num_layers_long": num_layers_long, "num_channels_long": num_channels_long,
         "num_radial_basis_long": num_radial_basis_long, "polynomial_cutoff_p": polynomial_cutoff_p},
    )  # fmt: skip
    if freeze_short:
        built.requires_grad_(False)
    options = {} if compile_mode is None else {"compile_mode": compile_mode}
    out: GraphModel = _around(
        network=network, derivatives=bool(built.model.do_derivatives), r_short=r_short, r_max=r_max,
        neighbors=avg_num_neighbors, hidden=feature_irreps(num_layers_long, max_L_long, False, num_channels_long),
        degree=degree, width=radial_hidden_long, bessels=num_radial_basis_long, cutoff=polynomial_cutoff_p,
        type_names=list(built.type_names), seed=seed, model_dtype=metadata["model_dtype"], **options,
    )  # fmt: skip
    out.equitune_long_path = {
        "r_max": float(r_max), "avg_num_neighbors": float(avg_num_neighbors), "num_layers_long": num_layers_long,
        "num_channels_long": num_channels_long, "max_L_long": max_L_long, "max_ell_long": degree,
        "num_radial_basis_long": num_radial_basis_long, "radial_hidden_long": radial_hidden_long,
        "polynomial_cutoff_p": polynomial_cutoff_p, "seed": seed, "freeze_short": freeze_short,
    }  # fmt: skip
    if num_layers_long > 1 and any(".allegro." in f".{type(m).__module__}." for m in network.modules()):
        _LOG.warning(
            "Allegro with a long path of %d layers is not strictly local any more: LAMMPS's pair_allegro would give "
            "wrong forces; use num_layers_long: 1, or ASE, pair_nequip or ML-IAP", num_layers_long,
        )  # fmt: skip
    trained = sum(p.numel() for p in out.parameters() if p.requires_grad)
    _LOG.info("long path to %g Å beside a model of %g Å: %d values train", r_max, r_short, trained)
    return out


@model_builder
def _around(
    network: Any, derivatives: bool, r_short: float, r_max: float, neighbors: float, hidden: list[Irreps], degree: int,
    width: int, bessels: int, cutoff: int, type_names: list[str],
) -> ForceStressOutput:  # fmt: skip
    """Long path, then the model on its own edges, then the long path's energy on top."""
    modules: dict[str, Any] = {}
    # the first module's inputs are the model's: charges, for example
    last = append_path(
        modules, "long_", type_names, r_max, cutoff, bessels, hidden, degree, bool(width), width, neighbors,
        dict(network.irreps_in),
    )  # fmt: skip
    short: Any = ShortEdges(r_short, last.irreps_out)
    modules["short_edges"] = short
    modules["short"] = network
    modules["all_edges"] = AllEdges({LONG_FEATURES: short.irreps_out[LONG_FEATURES], **network.irreps_out})
    modules["long_energy_readout"] = readout = ScalarMLP(
        hidden_layers_depth=0, field=LONG_FEATURES, out_field=LONG_ENERGY, output_dim=1, hidden_layers_width=1,
        nonlinearity="silu", bias=False, forward_weight_init=True, irreps_in=modules["all_edges"].irreps_out,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in readout.parameters():
            parameter.zero_()
    far = AtomwiseReduce(field=ATOMS_LONG, out_field=ENERGY_LONG, reduce="sum")
    modules["long_energy"] = AddedEnergy(far, _scales(network, len(type_names)), readout.irreps_out)
    return ForceStressOutput(SequentialGraphNetwork(modules), derivatives)


def restore_long_path(model: Any, recipe: Mapping[str, Any]) -> Any:
    """The long path that an adapter's base had beside it; a model that has one stays as it is.

    Args:
        model: GraphModel of the short range.
        recipe: ``long_path`` of the adapter's metadata.
    """
    if hasattr(model, "equitune_long_path"):
        return model
    mode = "compile" if getattr(model, "is_compile_graph_model", False) else None
    return AddLongPath(model, compile_mode=mode, **recipe)


def _compiled_inside(config: Mapping[str, Any]) -> bool:
    inner = config.get("model")
    return config.get("compile_mode", "eager") != "eager" or (isinstance(inner, Mapping) and _compiled_inside(inner))


def _scales(network: nn.Module, types: int) -> torch.Tensor:
    """Energy scale of every type (types, 1) in eV, by which outputs of order one become energies; ones without."""
    for module in network.modules():
        if type(module).__name__ != "PerTypeScaleShift" or getattr(module, "field", "") != (
            AtomicDataDict.PER_ATOM_ENERGY_KEY
        ):
            continue
        if module.has_scales:
            return module.scales.detach().reshape(-1, 1).expand(types, 1).clone()  # type: ignore[operator, union-attr]
    return torch.ones(types, 1, dtype=torch.float64)
