"""Blocks of the layers that only MACE defines: symmetric contraction, Bessel basis, energy references."""

from __future__ import annotations

import torch

from mace_lora.lora.blocks import Block, ModuleSpec, ParamSpec, Piece, is_kind

__all__ = ["describe"]


def describe(module: torch.nn.Module, parent: torch.nn.Module | None = None) -> ModuleSpec | None:
    """Describe a MACE-only layer, or None. Duck-typed: imports nothing from MACE."""
    if is_kind(module, "Contraction", "modules.symmetric_contraction"):
        return _describe_contraction(module, parent)
    if is_kind(module, "BesselBasis", "modules.radial") and "bessel_weights" in module._parameters:
        return ModuleSpec("Bessel basis", dense=("bessel_weights",))
    if is_kind(module, "AtomicEnergiesBlock", "modules.blocks"):
        return ModuleSpec("energy references", fitted=("atomic_energies",))
    return None


def _describe_contraction(module: torch.nn.Module, parent: torch.nn.Module | None) -> ModuleSpec:
    """Contraction weights (n_elements, n_paths, channels).

    The highest correlation (``weights_max``) is one low-rank block, A over elements and paths, B
    shared by the elements; A is drawn with standard deviation 1/n_paths. The lower correlations
    are small and trained in full. Weights that MACE marks as identically zero are left alone.
    """
    irrep = _output_irrep(module, parent)
    blocks, params = [], []
    weights_max = module.weights_max
    assert isinstance(weights_max, torch.Tensor)
    if not bool(getattr(module, "weights_max_zeroed", False)):
        n_elem, n_path, channels = weights_max.shape
        m = n_elem * n_path
        blocks.append(Block("weights_max", irrep, m, channels, init_scale=1.0 / n_path))
        piece = Piece("weights_max", (0, m), (0, channels))
        params.append(ParamSpec("weights_max", (n_elem, n_path, channels), (piece,)))
    lower = [
        f"weights.{i}"
        for i in range(len(module.weights))  # type: ignore[arg-type]
        if not bool(getattr(module, f"weights_{i}_zeroed", False))
    ]
    return ModuleSpec("symmetric contraction", tuple(blocks), tuple(params), tuple(lower))


def _output_irrep(module: torch.nn.Module, parent: torch.nn.Module | None) -> str:
    """Output irrep of a contraction: its slot in the parent's ``irreps_out``.

    ``parent`` is the ModuleList of contractions or the SymmetricContraction; without it the
    degree is read from the coupling tensor and the parity taken as (-1)^l.
    """
    irreps_out = getattr(parent, "irreps_out", None)
    if irreps_out is not None:
        for i, child in enumerate(parent.contractions):  # type: ignore[union-attr, arg-type]
            if child is module or getattr(child, "base_layer", None) is module:
                return str(irreps_out[i].ir)
    u1 = dict(module.named_buffers())["U_matrix_1"]
    degree = 0 if u1.dim() == 2 else (u1.shape[0] - 1) // 2
    return f"{degree}{'e' if degree % 2 == 0 else 'o'}"
