"""MACE's symmetric contraction element by element; see :mod:`mace_lora.lora.by_element`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mace_lora.lora.by_element import Kernel, attribute_product, group

__all__ = ["KERNELS", "contraction"]


def contraction(
    module: Any, parameters: Mapping[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor | None:
    """One ``Contraction``: equation 10 of Batatia et al. 2022 (arXiv 2206.07697) for sorted atoms.

    The weights of an element are contracted with the coupling tensors first; the features then
    enter one by one, highest correlation first.

    Args:
        module: MACE's contraction to one output irrep.
        parameters: updated parameters of the module.
        x: (n, channels, i) features.
        y: (n, elements) one-hot attributes.

    Returns:
        (n, channels * output dim), or None where the attributes are not one-hot.
    """
    atoms = group(y)
    if atoms is None:
        return None
    nu = int(module.correlation)
    present = atoms.present
    names = ["weights_max", *(f"weights.{k}" for k in range(nu - 1))]
    coupled = []  # correlation nu, nu - 1, …, 1: (e, channels, …, i), with … of nu - k - 1 features and the output
    for k, name in enumerate(names):
        weight = parameters.get(name)
        weight = module.get_parameter(name) if weight is None else weight
        coupling = getattr(module, f"U_matrix_{nu - k}")
        coupled.append(torch.tensordot(weight[present], coupling, dims=([1], [coupling.dim() - 1])))
    sorted_x = x[atoms.order].transpose(0, 1)  # channels, n, i
    channels, _, dim = sorted_x.shape
    out, start = [], 0
    for e, n in enumerate(atoms.counts[z] for z in present):
        x_e = sorted_x[:, start : start + n]
        start += n
        first = coupled[0][e].reshape(channels, -1, dim).transpose(1, 2)
        if nu > 1:
            value = torch.baddbmm(coupled[1][e].reshape(channels, 1, -1), x_e, first)
        else:
            value = torch.bmm(x_e, first)
        for k in range(1, nu):
            value = value.reshape(channels * n, -1, dim)
            value = torch.bmm(value, x_e.reshape(channels * n, dim, 1)).reshape(channels, n, -1)
            if k < nu - 1:
                value = value + coupled[k + 1][e].reshape(channels, 1, -1)
        out.append(value)
    return torch.cat(out, 1).transpose(0, 1)[atoms.inverse].reshape(len(x), -1)


KERNELS: Mapping[str, Kernel] = {
    "symmetric contraction": contraction,
    "o3.FullyConnectedTensorProduct": attribute_product,
}
