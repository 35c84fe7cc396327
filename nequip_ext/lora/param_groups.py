"""Optimiser groups of an adapted model."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["MuonParamGroups", "TrainedParams"]


def TrainedParams(model: nn.Module) -> list[nn.Parameter]:
    """Only what trains: for optimisers that touch parameters without a gradient.

    Args:
        model: what the Lightning module passes.
    """
    return [p for p in model.parameters() if p.requires_grad]


def MuonParamGroups(model: nn.Module, muon: dict[str, Any], adam: dict[str, Any]) -> list[dict[str, Any]]:
    """Groups for ``nequip.train.MuonWithAuxAdam``: low-rank factors by Muon, the rest by Adam.

    Upstream's own groups contain the frozen base, which its optimiser decays and updates even
    without gradients.

    Args:
        model: what the Lightning module passes.
        muon: Muon's settings (lr, weight_decay, …).
        adam: Adam's settings.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    factors = [p for n, p in trained.items() if (".lora_A." in n or ".lora_B." in n) and min(p.shape) > 1]
    taken = {id(p) for p in factors}
    others = [p for p in trained.values() if id(p) not in taken]
    return [
        {"params": factors, "use_muon": True, "e3nn_reshaping": {}, **muon},
        {"params": others, "use_muon": False, **adam},
    ]
