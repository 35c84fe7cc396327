"""Blocks of the layers that only SevenNet defines. Duck-typed: imports nothing of it."""

from __future__ import annotations

import torch

from .blocks import ModuleSpec, is_kind

__all__ = ["describe"]


def describe(module: torch.nn.Module, parent: torch.nn.Module | None = None) -> ModuleSpec | None:
    """Describe a layer of SevenNet, or None; its linears and MLPs are e3nn's own."""
    if is_kind(module, "BesselBasis", "sevenn.nn.edge_embedding"):
        return ModuleSpec("Bessel basis", dense=("coeffs",))
    return None
