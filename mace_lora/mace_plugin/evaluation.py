"""Energies and forces of a MACE model on a few training graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["Batch", "Prediction", "batch_of", "energy_forces"]


@dataclass(frozen=True)
class Batch:
    """Upstream's batch with what we read of it.

    Attributes:
        graph: keyword tensors for the model's forward.
        energy: labels (frames,) in eV.
        forces: labels (atoms, 3) in eV/Å; zero where a frame has none.
        atoms: number of atoms (frames,).
        labelled: whether the frame has an energy label (frames,); upstream fills in zeros.
    """

    graph: dict[str, Any]
    energy: torch.Tensor
    forces: torch.Tensor
    atoms: torch.Tensor
    labelled: torch.Tensor


@dataclass(frozen=True)
class Prediction:
    """Energies (frames,) in eV and forces (atoms, 3) in eV/Å, detached."""

    energy: torch.Tensor
    forces: torch.Tensor


def batch_of(dataset: Any, frames: int, device: torch.device, max_atoms: int = 2000) -> Batch:
    """First frames of a dataset as one batch; leaves the training loader's random state alone.

    Args:
        dataset: upstream's graphs.
        frames: how many at most.
        device: where the batch goes.
        max_atoms: stop before this many atoms, so that large cells fit into memory.
    """
    from mace.tools import torch_geometric

    items: list[Any] = []
    atoms_so_far = 0
    for i in range(min(frames, len(dataset))):
        item = dataset[i]
        atoms_so_far += int(item.num_nodes)
        if items and atoms_so_far > max_atoms:
            break
        items.append(item)
    batch = torch_geometric.Batch.from_data_list(items).to(device)
    atoms = batch.ptr[1:] - batch.ptr[:-1]
    labelled = batch.energy_weight.detach().reshape(-1) != 0
    return Batch(batch.to_dict(), batch.energy.detach().reshape(-1), batch.forces.detach(), atoms, labelled)


def energy_forces(model: nn.Module, batch: Batch) -> Prediction:
    """Evaluate a model in inference mode.

    Args:
        model: MACE model.
        batch: from :func:`batch_of`.
    """
    was_training = model.training
    model.eval()
    try:
        out = model(dict(batch.graph), training=False, compute_force=True)
    finally:
        model.train(was_training)
    return Prediction(out["energy"].detach(), out["forces"].detach())
