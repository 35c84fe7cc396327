"""Evaluate adapted layers element by element: the same numbers as upstream's kernels, in less time.

MACE's and NequIP's node attributes are one-hot in the element, and upstream multiplies by them.
When weights train, that product also appears in the backward passes of the weight gradient. With
the atoms sorted by element each layer is a few dense matrix products with the element's own
weights instead. Only for training on a CPU: the sorting depends on the data, which compilers and a
GPU's launch queue dislike, and inference runs on merged models.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .inject import adapter_layers

__all__ = ["Grouping", "Kernel", "attribute_product", "enable", "group"]

# (base module, updated parameters, features, node attributes) -> output, or None if it does not apply
Kernel = Callable[[Any, Mapping[str, torch.Tensor], torch.Tensor, torch.Tensor], torch.Tensor | None]


@dataclass(frozen=True)
class Grouping:
    """Atoms of a batch sorted by element.

    Attributes:
        order: (n,) int64, atom at every sorted place.
        inverse: (n,) int64, sorted place of every atom.
        counts: atoms of each element, 0 for absent ones.
    """

    order: torch.Tensor
    inverse: torch.Tensor
    counts: list[int]

    @property
    def present(self) -> list[int]:
        """Elements with at least one atom."""
        return [e for e, count in enumerate(self.counts) if count]


_last: tuple[weakref.ref[torch.Tensor], int, Grouping | None] | None = None


def group(node_attrs: torch.Tensor) -> Grouping | None:
    """Sort the atoms of a batch by element; None where the attributes are not one-hot.

    All layers of a model get the same tensor in a forward pass, so the last answer is kept.

    Args:
        node_attrs: (n, elements) float, one-hot.
    """
    global _last
    if _last is not None and _last[0]() is node_attrs and _last[1] == node_attrs._version:
        return _last[2]
    found = None
    if not node_attrs.requires_grad and bool(((node_attrs != 0).sum(1) == 1).all() & (node_attrs.sum(1) == 1).all()):
        element = node_attrs.argmax(1)
        order = torch.argsort(element, stable=True)
        counts = torch.bincount(element, minlength=node_attrs.shape[1]).tolist()
        found = Grouping(order, torch.argsort(order), counts)
    _last = (weakref.ref(node_attrs), node_attrs._version, found)
    return found


def attribute_product(
    module: Any, parameters: Mapping[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor | None:
    """``FullyConnectedTensorProduct`` of features with one-hot scalars: x_e W_e for every element e.

    Args:
        module: e3nn's product; its second input must be scalars (0e) of one slot.
        parameters: updated parameters of the module.
        x: (n, dim of irreps_in1) features.
        y: (n, elements) one-hot attributes.

    Returns:
        (n, dim of irreps_out), or None where the layer or the attributes have another form.
    """
    if str(module.irreps_in2) != f"{y.shape[-1]}x0e" or any(
        not i.has_weight or i.connection_mode != "uvw" for i in module.instructions
    ):
        return None
    atoms = group(y)
    if atoms is None:
        return None
    weight = parameters.get("weight", module.weight)
    sorted_x, slices = x[atoms.order], module.irreps_in1.slices()
    slots: list[list[torch.Tensor]] = [[] for _ in module.irreps_out]
    start = 0
    for ins in module.instructions:
        m1, m2, m_out = ins.path_shape
        d = module.irreps_in1[ins.i_in1].ir.dim
        w = weight[start : start + m1 * m2 * m_out].view(m1, m2, m_out) * (ins.path_weight / d**0.5)
        start += m1 * m2 * m_out
        part = sorted_x[:, slices[ins.i_in1]]
        if d > 1:  # (n, m1 d) -> (n d, m1): components are rows
            part = part.reshape(-1, m1, d).transpose(1, 2).reshape(-1, m1)
        pieces = part.split([n * d for n in atoms.counts])
        out = torch.cat([pieces[e] @ w[:, e] for e in atoms.present])
        if d > 1:
            out = out.reshape(-1, d, m_out).transpose(1, 2).reshape(-1, m_out * d)
        slots[ins.i_out].append(out)
    columns = [
        sum(parts[1:], parts[0]) if parts else x.new_zeros(len(x), mul * ir.dim)
        for parts, (mul, ir) in zip(slots, module.irreps_out, strict=True)
    ]
    return torch.cat(columns, 1)[atoms.inverse]


def enable(model: nn.Module, kernels: Mapping[str, Kernel], on: bool = True) -> int:
    """Let the adapter layers of these kinds run their kernel while their inputs are on a CPU.

    Args:
        model: model with adapters.
        kernels: layer kind (as in the coverage table) -> kernel.
        on: switch on or off.

    Returns:
        number of layers that have a kernel.
    """
    count = 0
    for layer in adapter_layers(model).values():
        kernel = kernels.get(layer.spec.kind)
        layer.kernel = kernel if on else None
        count += kernel is not None
    return count
