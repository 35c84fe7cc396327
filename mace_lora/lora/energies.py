"""Energy references of an adapter, refitted by least squares before every validation.

Training on forces leaves the energies with an offset that the optimiser hardly sees: the loss of the
energies per atom is orders of magnitude below that of the forces. The offset is linear in the numbers
of atoms of each element, so that it has a closed-form solution on the training frames.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mace_lora.mace_plugin import evaluation

from .inject import ModulePlan
from .layers import AdapterLayer

__all__ = [
    "BUFFER", "MODULE", "ReferenceFit", "difference", "fit_references", "reference_plan", "shift", "solve_offsets",
]  # fmt: skip

MODULE, BUFFER = "atomic_energies_fn", "atomic_energies"
# Singular values below the first share of the largest: combinations of elements that the data hardly determines. They
# are fitted only if that takes away more than a model's own errors (eV/atom), as another method's references do, and
# more than so many standard deviations of what no references explain.
_CUTOFF, _FLOOR, _BEYOND_MODELS, _BEYOND_NOISE = 0.05, 1e-4, 0.05, 4.0


@dataclass(frozen=True)
class ReferenceFit:
    """What a fit did: root mean square residual per atom (eV/atom) before and after, on how many frames."""

    before: float
    after: float
    frames: int


def reference_plan() -> ModulePlan:
    """Plan of the energy references' update, for :func:`apply_plan`."""
    return ModulePlan(MODULE, {}, (BUFFER,))


def difference(before: Any, now: Any, heads: Sequence[str]) -> np.ndarray | None:
    """Change of energy references, before minus now, (heads, elements) in eV; None unless they name the same.

    Args:
        before, now: ``E0s`` of two adapters: head -> atomic number -> eV; files sort their heads.
        heads: in the model's order.
    """
    if not isinstance(before, dict) or not isinstance(now, dict) or not {*before} == {*now} == {*heads}:
        return None
    if any(before[h].keys() != now[h].keys() for h in now):
        return None
    return np.array([[float(before[h][z]) - float(now[h][z]) for z in sorted(now[h], key=int)] for h in heads])


def solve_offsets(counts: np.ndarray, residual: np.ndarray) -> np.ndarray:
    """Minimum-norm offsets of the elements that explain energy residuals per atom.

    Args:
        counts: (frames, elements), atoms of each element.
        residual: (frames,), label minus model in eV.

    Returns:
        (elements,) in eV. Combinations of elements that the frames hardly determine stay at zero unless they leave
        more than 50 meV/atom, and more than noise: for frames of one composition only the composition's own energy is
        shifted.
    """
    if not len(residual):
        return np.zeros(counts.shape[1])
    atoms = counts.sum(1, keepdims=True)
    u, s, vt = np.linalg.svd(counts / atoms, full_matrices=False)  # (frames, k), (k,), (k, elements)
    per_atom = residual / atoms[:, 0]
    explained = per_atom @ u  # (k,)
    possible = s > _FLOOR * s[0]
    free = len(residual) - possible.sum()
    left = per_atom - u[:, possible] @ explained[possible]
    noise = float(np.sqrt(left @ left / free)) if free > 0 else 0.0
    needed = np.abs(explained) > max(_BEYOND_MODELS * np.sqrt(len(residual)), _BEYOND_NOISE * noise)
    kept = (s > _CUTOFF * s[0]) | (possible & needed)
    solution: np.ndarray = (explained[kept] / s[kept]) @ vt[kept]
    return solution


def shift(references: torch.Tensor, table: evaluation.EnergyTable) -> np.ndarray:
    """Add the least-squares offsets of a table to energy references, in place.

    Args:
        references: (heads, elements) or (elements,), eV.
        table: residuals of labelled frames.

    Returns:
        residuals that are left, eV (frames,).
    """
    by_head = references.view(-1, references.shape[-1])
    after: np.ndarray = table.residual.copy()
    for head in range(by_head.shape[0]):
        mine = table.head == head
        if mine.any():
            offsets = solve_offsets(table.counts[mine], table.residual[mine])
            by_head[head] += torch.as_tensor(offsets).to(by_head)
            after[mine] -= table.counts[mine] @ offsets
    return after


@torch.no_grad()
def fit_references(
    model: nn.Module, adapter: str, dataset: Any, chosen: Sequence[int], level: int = logging.INFO
) -> ReferenceFit | None:  # fmt: skip
    """Set the adapter's update of the energy references to the least-squares solution, in place.

    Args:
        model: model in which the adapter was added with :func:`reference_plan`.
        adapter: its name.
        dataset: upstream's training graphs.
        chosen: indices of the frames; those without an energy label are left out.
        level: of the message.

    Returns:
        residuals before and after, or None where no frame has an energy.
    """
    layer = model.get_submodule(MODULE)
    assert isinstance(layer, AdapterLayer)
    update = layer.lora_dense[adapter][BUFFER]
    table = evaluation.energy_table(model, dataset, chosen)
    if not len(table.residual):
        return None
    after = shift(update, table)
    atoms = table.counts.sum(1)
    rms = [float(np.sqrt(np.mean((r / atoms) ** 2))) for r in (table.residual, after)]
    logging.log(
        level, "equitune: energy references refitted on %d frames: rms residual %.2f -> %.2f meV/atom",
        len(atoms), 1e3 * rms[0], 1e3 * rms[1],
    )  # fmt: skip
    return ReferenceFit(rms[0], rms[1], len(atoms))
