"""Energies and forces of a MACE model on a few training graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["Batch", "EnergyTable", "Prediction", "batch_of", "energy_forces", "energy_table", "spread"]

_MAX_ATOMS = 2000


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


@dataclass(frozen=True)
class EnergyTable:
    """Energy residuals of labelled frames.

    Attributes:
        counts: (frames, elements), atoms of each element of the model.
        residual: (frames,), label minus model in eV.
        head: (frames,), the head that each frame belongs to.
    """

    counts: np.ndarray
    residual: np.ndarray
    head: np.ndarray


def batch_of(
    dataset: Any, frames: int | Sequence[int], device: torch.device, max_atoms: int = _MAX_ATOMS
) -> Batch:  # fmt: skip
    """Frames of a dataset as one batch; leaves the training loader's random state alone.

    Args:
        dataset: upstream's graphs.
        frames: how many of the first at most, or which.
        device: where the batch goes.
        max_atoms: stop before this many atoms, so that large cells fit into memory.
    """
    from mace.tools import torch_geometric

    items: list[Any] = []
    atoms_so_far = 0
    for i in range(min(frames, len(dataset))) if isinstance(frames, int) else frames:
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


def spread(dataset: Any, max_frames: int) -> list[int]:
    """Indices of up to ``max_frames`` frames of each head, spread evenly over the dataset, in order."""
    return sorted(index for mine in spread_by_head(dataset, max_frames).values() for index in mine)


def spread_by_head(dataset: Any, max_frames: int) -> dict[int, list[int]]:
    """The same for each head.

    Args:
        dataset: upstream's graphs; of very large ones only a part is looked at.
        max_frames: how many frames at most for a head.
    """
    looked_at = np.unique(np.linspace(0, len(dataset) - 1, min(50 * max_frames, len(dataset))).round().astype(int))
    by_head: dict[int, list[int]] = {}
    for index in looked_at:
        by_head.setdefault(int(getattr(dataset[int(index)], "head", 0) or 0), []).append(int(index))
    chosen = {}
    for head, found in by_head.items():
        places = np.linspace(0, len(found) - 1, min(max_frames, len(found))).round().astype(int)
        chosen[head] = [found[i] for i in np.unique(places)]
    return chosen


@torch.no_grad()
def energy_table(model: nn.Module, dataset: Any, chosen: Sequence[int]) -> EnergyTable:
    """Energy residuals of some frames of a dataset, without forces; those that are not finite are left out.

    Args:
        model: MACE model; its mode and the training loader's random state are left alone.
        dataset: upstream's graphs.
        chosen: indices of the frames.
    """
    from mace.tools import torch_geometric

    device, was_training = next(model.parameters()).device, model.training
    counts, residual, heads = [], [], []
    items: list[Any] = []
    model.eval()
    try:
        for position, index in enumerate(chosen):
            items.append(dataset[int(index)])
            if position + 1 < len(chosen) and sum(int(i.num_nodes) for i in items) < _MAX_ATOMS:
                continue
            batch = torch_geometric.Batch.from_data_list(items).to(device)
            items = []
            energy = model(batch.to_dict(), training=False, compute_force=False)["energy"]
            frames = len(energy)
            per_frame = torch.zeros(frames, batch.node_attrs.shape[1], dtype=torch.float64, device=device)
            per_frame.index_add_(0, batch.batch, batch.node_attrs.double())
            left = (batch.energy.reshape(-1) - energy).double().cpu().numpy()
            # one broken prediction must not break the references, which keep what is added to them
            labelled = (batch.energy_weight.reshape(-1) != 0).cpu().numpy() & np.isfinite(left)
            head = batch.head.reshape(-1) if "head" in batch.keys else torch.zeros(frames)
            counts.append(per_frame.cpu().numpy()[labelled])
            residual.append(left[labelled])
            heads.append(head.cpu().numpy().astype(int)[labelled])
    finally:
        model.train(was_training)
    return EnergyTable(np.concatenate(counts), np.concatenate(residual), np.concatenate(heads))
