"""What fine-tuning changed, per irrep (l, p)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .blocks import block_matrices
from .inject import candidates

__all__ = ["Change", "diff_models"]


# buffers that are part of the potential
_REFERENCES = (
    "atomic_energies_fn.atomic_energies", "scale_shift.scale", "scale_shift.shift", "energy_scale_shift.scales",
    "energy_scale_shift.shifts",
)  # fmt: skip


@dataclass(frozen=True)
class Change:
    """Change of one weight block, or of one parameter that has no blocks.

    Attributes:
        module: module name.
        irrep: degree and parity; '' for a parameter without one.
        shape: (m, n) of the block, or the parameter's shape.
        relative: |dW|_F / |W|_F.
        rank90: singular values that hold 90 % of |dW|_F^2; None for what is no matrix.
        full_rank: min(m, n); None for what is no matrix.
    """

    module: str
    irrep: str
    shape: tuple[int, ...]
    relative: float
    rank90: int | None
    full_rank: int | None


def diff_models(base: nn.Module, tuned: nn.Module) -> list[Change]:
    """Compare two models of the same architecture.

    Args:
        base: the model before.
        tuned: the model after, with stock modules.

    Returns:
        changes, the largest relative change first.

    Raises:
        ValueError: different architectures; the first difference is named.
    """
    before, after = dict(base.named_parameters()), dict(tuned.named_parameters())
    for name in {**before, **after}:
        shapes = [tuple(p[name].shape) if name in p else None for p in (before, after)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the models differ in architecture: {name} has shape {shapes[0]} before, {shapes[1]} after"
            )
    rows: list[Change] = []
    covered: set[str] = set()
    for name, module, spec in candidates(base):
        old = {p: v.detach() for p, v in module.named_parameters()}
        new = {p: after[f"{name}.{p}"].detach().to(v) for p, v in old.items()}
        covered.update(f"{name}.{p.name}" for p in spec.params)
        delta = block_matrices(spec, {p: new[p] - old[p] for p in old})
        size = block_matrices(spec, old)
        irreps = {b.name: b.irrep for b in spec.blocks}
        rows += [_change(name, irreps[block], d, size[block]) for block, d in delta.items()]
    for name, value in before.items():
        if name not in covered and value.numel():
            change = (after[name].detach().to(value) - value.detach()).double()
            relative = float(change.norm() / value.detach().double().norm().clamp_min(1e-30))
            rows.append(Change(name, "", tuple(value.shape), relative, None, None))
    buffers = [dict(m.named_buffers()) for m in (base, tuned)]
    for name in buffers[0]:
        if name.endswith(_REFERENCES) and name in buffers[1]:
            old, new = (torch.atleast_1d(b[name].double()) for b in buffers)
            if old.shape == new.shape:
                relative = float((new.to(old) - old).norm() / old.norm().clamp_min(1e-30))
                rows.append(Change(name, "", tuple(old.shape), relative, None, None))
    return sorted(rows, key=lambda r: -r.relative)


def _change(module: str, irrep: str, delta: torch.Tensor, weight: torch.Tensor) -> Change:
    relative = float(delta.norm() / weight.norm().clamp_min(1e-30))
    energy = torch.linalg.svdvals(delta).square()
    rank = None
    if float(energy.sum()) > 0:
        rank = int((energy.cumsum(0) < 0.9 * energy.sum()).sum()) + 1
    return Change(module, irrep, (delta.shape[0], delta.shape[1]), relative, rank or 0, min(delta.shape))
