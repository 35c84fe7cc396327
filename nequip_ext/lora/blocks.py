"""Blocks of the layers that only NequIP and Allegro define. Duck-typed: imports neither."""

from __future__ import annotations

from typing import Any

import torch

from mace_lora.lora.blocks import Block, ModuleSpec, ParamSpec, Piece, is_kind

__all__ = ["describe"]


def describe(module: torch.nn.Module, parent: torch.nn.Module | None = None) -> ModuleSpec | None:
    """Describe a layer of NequIP or Allegro, or None."""
    if is_kind(module, "ScalarLinearLayer", "nequip.nn.mlp"):
        return _scalar_matrices("NequIP MLP", {"weight": module.weight})
    if is_kind(module, "DeepLinearMLP", "nequip.nn.mlp"):
        return _scalar_matrices("NequIP MLP", {f"weights.{i}": w for i, w in enumerate(module.weights)})  # type: ignore[arg-type]
    if is_kind(module, "Contracter", "allegro.nn._strided._contract"):
        return _contracter(module)
    if is_kind(module, "BesselEdgeLengthEncoding", "nequip.nn.embedding._edge"):
        trained = "bessel_weights" in module._parameters
        return ModuleSpec("Bessel basis", dense=("bessel_weights",)) if trained else None
    if is_kind(module, "PerTypeScaleShift", "nequip.nn.atomwise"):
        # what upstream's modifier (or the builder) has made trainable is trained in full; shifts are fitted otherwise
        free = tuple(k for k in ("scales", "shifts") if k in module._parameters)
        fitted = ("shifts",) if module.has_shifts and "shifts" not in free else ()
        return ModuleSpec("energy references", dense=free, fitted=fitted) if free or fitted else None
    return None


def _scalar_matrices(kind: str, weights: dict[str, Any]) -> ModuleSpec:
    """Matrices (m, n) on scalars, a block each."""
    blocks, params = [], []
    for name, weight in weights.items():
        m, n = weight.shape
        block = f"0e_{name.rpartition('.')[2]}" if len(weights) > 1 else "0e"
        blocks.append(Block(block, "0e", m, n))
        params.append(ParamSpec(name, (m, n), (Piece(block, (0, m), (0, n)),)))
    return ModuleSpec(kind, tuple(blocks), tuple(params))


def _contracter(module: Any) -> ModuleSpec:
    """Allegro's path weights (channels, paths): a block for each output irrep, over its paths.

    Without channels, or with one path, there is no matrix: such weights are small and trained in full.
    """
    if not module.path_channel_coupling or module.num_paths == 1:
        return ModuleSpec("Allegro contraction", dense=("weights",))
    irreps = [str(module.irreps_out[out].ir) for _, _, out in _instructions(module)]
    totals: dict[str, int] = {}
    pieces: list[Piece] = []
    for irrep in irreps:
        column = totals.get(irrep, 0)
        totals[irrep] = column + 1
        pieces.append(Piece(irrep, (0, module.mul), (column, column + 1)))
    blocks = tuple(Block(irrep, irrep, module.mul, n) for irrep, n in totals.items())
    weights = ParamSpec("weights", tuple(module.weights.shape), tuple(_joined(pieces)), columns=True)
    return ModuleSpec("Allegro contraction", blocks, (weights,))


def _instructions(module: Any) -> list[tuple[int, int, int]]:
    """The paths; upstream leaves the attribute None where it takes all of them."""
    if module.instructions is not None:
        return list(module.instructions)
    return [
        (i1, i2, out)
        for out, (_, ir_out) in enumerate(module.irreps_out)
        for i1, (_, ir1) in enumerate(module.irreps_in1)
        for i2, (_, ir2) in enumerate(module.irreps_in2)
        if ir_out in ir1 * ir2
    ]


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbouring columns of one block as one piece."""
    out: list[Piece] = []
    for piece in pieces:
        if out and out[-1].block == piece.block and out[-1].cols[1] == piece.cols[0]:
            out[-1] = Piece(piece.block, piece.rows, (out[-1].cols[0], piece.cols[1]))
        else:
            out.append(piece)
    return out
