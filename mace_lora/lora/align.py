"""Start an adapter in the directions that the data asks for: A from gradients of the base's weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from .blocks import ModuleSpec, block_matrices
from .inject import adapter_layers, adapter_names, disabled_adapters
from .layers import AdapterLayer

__all__ = ["align_adapter"]


def align_adapter(model: nn.Module, losses: Iterable[torch.Tensor], adapter_name: str = "default") -> nn.Module:
    """Draw A along the leading input directions of the loss gradient, block by block.

    For every block (l, p) with weight gradients G_k of shape (m, n), one for each loss, the columns
    of A become the leading eigenvectors of sum_k G_k G_k^T / |G_k|^2, with the same Frobenius norm
    that a random A with entries of variance 1/r has. B stays zero, so the model is unchanged. The
    idea follows gradient-aligned initialisation (LoRA-GA, arXiv 2407.05000); here only A is
    aligned, so that the base weights stay as they are, and the subspace comes from many gradients.

    Args:
        model: model with the adapter, fresh (B zero).
        losses: scalar losses of the base on training frames, evaluated lazily with the adapters
            switched off; a generator that evaluates one small batch at a time keeps memory low.
        adapter_name: adapter to align.

    Returns:
        the same model.

    Raises:
        ValueError: unknown adapter, or no loss was given, or a gradient is not finite.
    """
    if adapter_name not in adapter_names(model):
        raise ValueError(f"adapter_name: the model has no adapter {adapter_name!r}; got {adapter_names(model)}")
    layers = {n: la for n, la in adapter_layers(model).items() if any(la.r.get(adapter_name, {}).values())}
    weights = {(n, p.name): la.base_layer.get_parameter(p.name) for n, la in layers.items() for p in la.spec.params}
    sums: dict[tuple[str, str], torch.Tensor] = {}
    count = 0
    state = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        with disabled_adapters(model):
            for loss in losses:
                gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                by_name = dict(zip(weights, gradients, strict=True))
                for name, layer in layers.items():
                    _accumulate(
                        sums, name, layer, {p: g for (n, p), g in by_name.items() if n == name and g is not None}
                    )
                count += 1
    finally:
        for parameter, flag in state:
            parameter.requires_grad_(flag)
    if not count:
        raise ValueError("losses: expected at least one loss, got none")
    with torch.no_grad():
        for (name, block), gram in sums.items():
            a = layers[name].lora_A[adapter_name].get(block)
            if a is not None:
                a.copy_(_leading(gram, a.shape[1], _init_scale(layers[name].spec, block)).to(a.dtype))
    return model


def _accumulate(
    sums: dict[tuple[str, str], torch.Tensor], name: str, layer: AdapterLayer, gradients: dict[str, torch.Tensor]
) -> None:
    """Add the normalised G G^T (m, m), float64, of every block of one layer."""
    for block, matrix in block_matrices(layer.spec, gradients).items():
        norm = matrix.square().sum()
        if not torch.isfinite(norm):
            raise ValueError(f"losses: the gradient of {name} is not finite; check the labels")
        if norm > 0:
            gram = matrix @ matrix.T / norm
            key = (name, block)
            sums[key] = sums[key] + gram if key in sums else gram


def _init_scale(spec: ModuleSpec, block: str) -> float:
    return next(b.init_scale for b in spec.blocks if b.name == block)


def _leading(gram: torch.Tensor, rank: int, scale: float) -> torch.Tensor:
    """(m, r): the r leading eigenvectors scaled to |A|_F^2 = m scale^2; random where r exceeds m."""
    m = gram.shape[0]
    _, vectors = torch.linalg.eigh(gram)
    chosen = vectors.flip(1)[:, :rank] * (scale * math.sqrt(m / rank))
    if rank > m:
        chosen = torch.cat(
            [chosen, torch.randn(m, rank - m, dtype=gram.dtype, device=gram.device) * scale / rank**0.5], 1
        )
    return chosen
