"""How fast the blocks of a handed-over model learn: layer-wise learning rates and gradual unfreezing.

Both keep what the lower blocks have learnt from the classical labels, as in ULMFiT (arXiv 1801.06146): a block is an
interaction with its product, the readouts are on top, the embedding is at the bottom.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["Unfreezing", "by_depth", "depth", "layerwise"]

_BLOCK = re.compile(r"(?:^|\.)(?:interactions|products)\.(\d+)\.")


def depth(name: str, layers: int) -> int:
    """Blocks between a parameter and the energy.

    Args:
        name: of the parameter in the model.
        layers: interactions of the model.

    Returns:
        0 for readouts and what stands beside the network, 1 for the last interaction and its product, ``layers`` for
        the first, ``layers + 1`` for the embedding.
    """
    found = _BLOCK.search(name)
    if found:
        return layers - int(found[1])
    return layers + 1 if "embedding" in name else 0


def layerwise(model: Any, groups: Sequence[dict[str, Any]], lr: float, decay: float) -> list[dict[str, Any]]:
    """Split parameter groups by block, with the learning rate times ``decay`` to the power of the block's depth.

    Args:
        model: MACE model, with adapters or without.
        groups: of the optimiser, each with its own learning rate or none.
        lr: of groups without one.
        decay: factor from a block to the one below it.

    Returns:
        new groups over the same parameters; the weight decay and everything else of a group is kept.
    """
    depths = {id(p): depth(n, len(model.interactions)) for n, p in model.named_parameters()}
    return by_depth(groups, depths, lr, decay)


def by_depth(
    groups: Sequence[dict[str, Any]], depths: Mapping[int, int], lr: float, decay: float
) -> list[dict[str, Any]]:
    """The groups of :func:`layerwise`, for depths by ``id`` of the parameter."""
    out = []
    for group in groups:
        parts: dict[int, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(depths[id(parameter)], []).append(parameter)
        for level, parameters in sorted(parts.items()):
            name = f"{group['name']}_{level}" if "name" in group else str(level)
            rate = group.get("lr", lr) * decay**level
            out.append({**group, "name": name, "params": parameters, "lr": rate})
    return out


class Unfreezing:
    """Lets one more block learn every few epochs, from the readouts down.

    A block that does not learn yet has no gradients, so that optimisers skip it with its weight decay and momenta.

    Args:
        model: MACE model, with adapters or without.
        every: epochs between blocks.
    """

    def __init__(self, model: Any, every: int) -> None:
        self.every, self.level = every, 0
        self.deepest = 0
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                level = depth(name, len(model.interactions))
                self.deepest = max(self.deepest, level)
                parameter.register_post_accumulate_grad_hook(self._hook(level))

    def _hook(self, level: int) -> Any:
        def drop(parameter: torch.Tensor) -> None:
            if level > self.level:
                parameter.grad = None

        return drop

    def start(self, epoch: int) -> str | None:
        """Begin an epoch; returns what has changed, for the log."""
        before, self.level = self.level, min(epoch // self.every, self.deepest)
        if self.level == before and epoch:
            return None
        return f"blocks 0 to {self.level} of {self.deepest} learn (0: readouts)"
