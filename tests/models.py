"""Small real MACE models and batches for the tests."""

from __future__ import annotations

import copy
import functools

import torch

# first interaction, later interactions, readout: the three families of MACE interaction blocks
FAMILIES = {
    "agnostic": ("RealAgnosticInteractionBlock", "RealAgnosticResidualInteractionBlock", "NonLinearReadoutBlock"),
    "density": (
        "RealAgnosticDensityInteractionBlock", "RealAgnosticDensityResidualInteractionBlock", "NonLinearReadoutBlock",
    ),
    "nonlinear": (
        "RealAgnosticResidualNonLinearInteractionBlock", "RealAgnosticResidualNonLinearInteractionBlock",
        "NonLinearBiasReadoutBlock",
    ),
}  # fmt: skip


@functools.cache
def _built(dtype: torch.dtype, arguments: tuple):
    return _build_mace(**dict(arguments))


def build_mace(family: str = "agnostic", hidden: str = "4x0e+4x1o", **changes: object):
    """A small ScaleShiftMACE in the default dtype; equal arguments give copies with new weights."""
    arguments = {"family": family, "hidden": hidden} | changes
    try:
        model = copy.deepcopy(_built(torch.get_default_dtype(), tuple(sorted(arguments.items()))))
    except TypeError:  # unhashable arguments
        return _build_mace(**arguments)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bessel" not in name and not name.endswith(("alpha", "beta")):
                parameter.copy_(parameter.reshape(-1)[torch.randperm(parameter.numel())].reshape(parameter.shape))
    return model


def _build_mace(
    family: str = "agnostic",
    hidden: str = "4x0e+4x1o",
    max_ell: int = 2,
    correlation: int = 2,
    zs: tuple[int, ...] = (1, 6, 8),
    heads: tuple[str, ...] = ("Default",),
    trainable_bessel: bool = True,
    **changes: object,
):
    """A small ScaleShiftMACE in the default dtype, weights from the current seed."""
    import numpy as np
    from e3nn import o3
    from mace import modules
    from mace.modules.blocks import NonLinearBiasReadoutBlock, NonLinearReadoutBlock

    first, later, readout = FAMILIES[family]
    readouts = {"NonLinearBiasReadoutBlock": NonLinearBiasReadoutBlock, "NonLinearReadoutBlock": NonLinearReadoutBlock}
    energies = np.arange(len(zs) * len(heads)).reshape(len(heads), -1) - 3.0
    config = {
        # biased radial MLPs are only smooth at r_max with the cutoff applied after them
        "apply_cutoff": family != "nonlinear",
        "r_max": 4.0, "num_bessel": 6, "num_polynomial_cutoff": 5, "max_ell": max_ell,
        "interaction_cls": modules.interaction_classes[later],
        "interaction_cls_first": modules.interaction_classes[first],
        "num_interactions": 2, "num_elements": len(zs), "hidden_irreps": o3.Irreps(hidden),
        "MLP_irreps": o3.Irreps("4x0e"), "atomic_energies": energies,
        "avg_num_neighbors": 4.0, "atomic_numbers": list(zs), "correlation": correlation,
        "gate": torch.nn.functional.silu, "radial_MLP": [8, 8], "radial_type": "bessel",
        "readout_cls": readouts[readout], "heads": list(heads),
        "atomic_inter_scale": [1.0] * len(heads), "atomic_inter_shift": [0.0] * len(heads),
    } | changes  # fmt: skip
    model = modules.ScaleShiftMACE(**config)
    if trainable_bessel:  # as upstream leaves it after loading a foundation model
        basis = model.radial_embedding.bessel_fn
        basis.bessel_weights = torch.nn.Parameter(basis.bessel_weights)
    with torch.no_grad():  # biases start at zero, which would hide errors in them
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and parameter.numel():
                parameter.normal_(std=0.1)
            elif name.endswith("beta"):  # zero switches the density off
                parameter.fill_(0.3)
    return model


def molecules(seed: int = 0, dtype: torch.dtype | None = None, zs: tuple[int, ...] = (1, 6, 8)):
    """Two random molecules as one MACE batch dictionary, and their positions leaf."""
    import ase
    import numpy as np
    from mace import data
    from mace.tools import AtomicNumberTable, torch_geometric

    rng = np.random.default_rng(seed)
    items = []
    for n in (5, 4):
        grid = np.array([(i % 2, (i // 2) % 2, i // 4) for i in range(n)]) * 1.3
        atoms = ase.Atoms(rng.choice(zs, n), positions=grid + rng.normal(scale=0.15, size=(n, 3)))
        config = data.config_from_atoms(atoms)
        items.append(data.AtomicData.from_config(config, z_table=AtomicNumberTable(list(zs)), cutoff=4.0))
    batch = torch_geometric.Batch.from_data_list(items).to_dict()
    dtype = dtype or torch.get_default_dtype()
    return {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}


def dimer(distance: float):
    """O–H at a distance in Å as a MACE batch."""
    import ase
    from mace import data
    from mace.tools import AtomicNumberTable, torch_geometric

    atoms = ase.Atoms("OH", positions=[[0, 0, 0], [0.6 * distance, 0, 0.8 * distance]])
    item = data.AtomicData.from_config(data.config_from_atoms(atoms), z_table=AtomicNumberTable([1, 6, 8]), cutoff=4.0)
    return torch_geometric.Batch.from_data_list([item]).to_dict()


def energy_forces(model, batch, training: bool = False):
    """Energy (frames,) and forces (atoms, 3)."""
    out = model(dict(batch), training=training, compute_force=True)
    return out["energy"], out["forces"]


def randomise(model, std: float = 0.3, seed: int = 1) -> None:
    """Give the active adapter a non-zero update."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                scale = 0.02 if "bessel" in name else std
                p.copy_(p + scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))
