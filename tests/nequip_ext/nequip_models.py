"""Small NequIP-framework models and data for the tests."""

from __future__ import annotations

import os
import pkgutil

import torch
from nequip.utils.unittests.model_tests import BaseEnergyModelTests
from nequip.utils.unittests.model_tests_basic import EnergyModelTestsMixin

# upstream's training, packaging and compilation tests take minutes each
Upstream = BaseEnergyModelTests if os.environ.get("EQUITUNE_FULL") == "1" else EnergyModelTestsMixin

COMMON = {
    "seed": 123, "type_names": ["H", "C", "O"], "r_max": 4.0, "avg_num_neighbors": 6.0,
    "per_type_energy_scales": 2.0, "per_type_energy_shifts": {"H": 0.1, "C": 0.2, "O": 0.3},
}  # fmt: skip
MODELS = {
    "nequip": {
        "_target_": "nequip.model.NequIPGNNModel", "num_layers": 2, "l_max": 1, "num_features": 8, "parity": True,
        "radial_mlp_width": 8, "bessel_trainable": True, **COMMON,
    },
    "allegro": {
        "_target_": "allegro.model.AllegroModel", "num_layers": 2, "l_max": 1, "num_scalar_features": 8,
        "num_tensor_features": 4, "allegro_mlp_hidden_layers_width": 16,
        "radial_chemical_embed": {"_target_": "allegro.nn.TwoBodyBesselScalarEmbed", "num_bessels": 6}, **COMMON,
    },
    "multiscale": {
        "_target_": "nequip_ext.MultiScaleNequIP", "r_short": 2.2, "num_layers": 2, "num_features": 6,
        "radial_mlp_width": 8, "num_channels_long": 4, "num_layers_long": 2, **COMMON,
    },
    "painn": {"_target_": "nequip_ext.PaiNN", "num_layers": 2, "num_features": 8, "num_bessels": 6, **COMMON},
}  # fmt: skip


def build(name: str, **changes: object):
    """The plain model."""
    from nequip.utils.global_state import set_global_state

    set_global_state()
    config = {"model_dtype": "float64", **MODELS[name], **changes}
    return pkgutil.resolve_name(config.pop("_target_"))(**config)


def lora(name: str, changes: dict | None = None, **settings: object):
    """The same model with an adapter."""
    from nequip.utils.global_state import set_global_state

    import nequip_ext

    set_global_state()
    return nequip_ext.LoRA(model={"model_dtype": "float64", **MODELS[name], **(changes or {})}, **settings)


def randomise(model, std: float = 0.1) -> None:
    """Give the adapter a non-zero update."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B." in name or ".lora_dense." in name:
                p.add_(std * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))


def molecule(rotation: torch.Tensor | None = None):
    """Acetaldehyde as NequIP's data; optionally rotated."""
    from ase.build import molecule as build_molecule
    from nequip.data import AtomicDataDict, compute_neighborlist_, from_ase

    atoms = build_molecule("CH3CHO")
    atoms.rattle(0.05, seed=3)
    if rotation is not None:
        atoms.positions = atoms.positions @ rotation.numpy().T
    data = compute_neighborlist_(from_ase(atoms), r_max=4.0)
    types = [["H", "C", "O"].index(s) for s in atoms.get_chemical_symbols()]
    data[AtomicDataDict.ATOM_TYPE_KEY] = torch.tensor(types)
    return data


def energy_forces(model, data):
    """Total energy and forces."""
    out = model(dict(data))
    return out["total_energy"].detach(), out["forces"].detach()
