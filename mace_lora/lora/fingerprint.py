"""Fingerprint of a base model: which weights an adapter belongs to."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from .inject import adapter_layers

__all__ = ["fingerprint", "layer_fingerprint"]

# Buffers that define the potential. Others (coupling tensors, masks) follow from the architecture
# and the e3nn version.
_BUFFERS = {
    "atomic_numbers", "r_max", "r_inner", "atomic_energies", "scale", "shift", "scales", "shifts", "bessel_weights",
    "_rmax_recip", "norm_const", "_qqr2exesquare",
}  # fmt: skip
# of NequIP's scalar MLPs
_ACTIVATIONS = {"SiLU", "Mish", "GELU", "Tanh", "Sigmoid", "Softplus", "ShiftedSoftplus"}


def fingerprint(model: nn.Module) -> str:
    """sha256 over a model's configuration and weights, without its adapters.

    Weights are hashed as float32, so that a model loaded in float64 or float32 has the same
    fingerprint. Adapters, merged or not, do not change it.

    Args:
        model: a base model, with or without adapters.

    Returns:
        64 hexadecimal digits.
    """
    tensors = _base_tensors(model)
    # NequIP's compiled wrapper holds the same model
    digest = hashlib.sha256(type(model).__name__.replace("CompileGraphModel", "GraphModel").encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu()
        value = value.to(torch.float32) if value.is_floating_point() else value.to(torch.int64)
        digest.update(f"{name}|{tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    for name, module in sorted(_base_modules(model).items()):
        neighbours = getattr(module, "avg_num_neighbors", None)
        if isinstance(neighbours, int | float):
            digest.update(f"{name}.avg_num_neighbors|{float(neighbours):.6g}".encode())
    if hasattr(model, "type_names"):
        choices = {n.replace(".base_layer", ""): _choice(m) for n, m in model.named_modules()}
        digest.update("".join(f"{n}|{c}" for n, c in sorted(choices.items()) if c).encode())
    return digest.hexdigest()


def _choice(module: nn.Module) -> str:
    """What a module of a NequIP-framework model computes beyond its weights: builders of one seed may differ here."""
    kind = type(module).__name__
    if kind == "PolynomialCutoff":
        return f"p={float(module.p):g}"  # type: ignore[arg-type]
    if kind in ("ScalarLinearLayer", "DeepLinearMLP"):  # 1/sqrt of its inputs, or of its outputs
        return f"alpha={float(module.alpha):.6g}"  # type: ignore[arg-type]
    if kind == "LennardJones":
        return f"{module.lj_style} {float(module.exponent):g}"  # type: ignore[arg-type]
    if kind == "normalize2mom":
        return str(getattr(module.f, "__name__", type(module.f).__name__))
    return kind if kind in _ACTIVATIONS else ""


def layer_fingerprint(module: nn.Module) -> str:
    """First 16 hexadecimal digits of a sha256 over one layer's own weights, as float32."""
    digest = hashlib.sha256()
    for name, value in sorted(module.named_parameters()):
        digest.update(f"{name}|{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().to(torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _base_modules(model: nn.Module) -> dict[str, nn.Module]:
    inside = tuple(f"{n}." for n in adapter_layers(model))
    return (
        {n: m for n, m in model.named_modules() if not n.startswith(inside)} if inside else dict(model.named_modules())
    )


def _base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    layers = adapter_layers(model)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if any(f".{store}." in f".{name}" for store in ("lora_A", "lora_B", "lora_dense")):
            continue
        leaf = name.rpartition(".")[2]
        if not isinstance(value, nn.Parameter) and leaf not in _BUFFERS:
            continue
        tensors[name.replace(".base_layer", "")] = value
    for name, layer in layers.items():
        for parameter, original in layer._unmerged.items():
            tensors[f"{name}.{parameter}"] = original
    return tensors
