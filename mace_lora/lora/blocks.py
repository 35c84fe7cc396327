"""Describe a module's weights as matrix blocks tagged by degree l and parity p.

Every equivariant weight is a direct sum of matrices, one for each pair of input and output
slots with the same irrep (Schur's lemma). A :class:`Block` is one such matrix space, a
:class:`ParamSpec` says how the blocks tile one flat parameter. The same description serves
``o3.Linear``, ``FullyConnectedTensorProduct``, e3nn's MLP layers, ``nn.Linear`` and, through the
upstream packages' own describers, MACE's symmetric contraction.
"""

# no postponed annotations: dataclasses could not resolve them in a module inside a NequIP package
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Block", "ModuleSpec", "ParamSpec", "Piece", "block_matrices", "describe", "is_kind"]

# Modules with a ``describe(module, parent)`` for layers that only an upstream package defines.
# They are duck-typed and import nothing from their upstream.
EXTENSIONS = ["mace_lora.mace_plugin.blocks", "nequip_ext.lora.blocks", "mace_lora.lora.sevennet"]


@dataclass(frozen=True)
class Block:
    """One (m, n) matrix space of weights that share an irrep.

    Attributes:
        name: key of the factors in the adapter file; unique in its module, no dots.
        irrep: degree and parity, e.g. ``"1o"``.
        m: number of rows: all input channels of this irrep (times attributes, elements, …).
        n: number of columns: all output channels of this irrep.
        init_scale: factor on the standard deviation with which A is drawn.
    """

    name: str
    irrep: str
    m: int
    n: int
    init_scale: float = 1.0


@dataclass(frozen=True)
class Piece:
    """A rectangle of a block's (m, n) matrix that fills the next stretch of the flat parameter."""

    block: str
    rows: tuple[int, int]
    cols: tuple[int, int]

    @property
    def numel(self) -> int:
        return (self.rows[1] - self.rows[0]) * (self.cols[1] - self.cols[0])


@dataclass(frozen=True)
class ParamSpec:
    """How blocks tile one parameter: the pieces, flattened row-major, follow each other in memory.

    Attributes:
        name: parameter name inside the module, e.g. ``"weight"``.
        shape: shape of the parameter.
        pieces: tiles in memory order.
        transpose: the parameter stores the block as (n, m), as ``nn.Linear`` does.
        columns: the parameter is a matrix and the pieces stand side by side, each with all its rows.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    transpose: bool = False
    columns: bool = False


@dataclass(frozen=True)
class ModuleSpec:
    """What an adapter can do in one module.

    Attributes:
        kind: short name of the layer type, e.g. ``"o3.Linear"``.
        blocks: low-rank blocks.
        params: tiling of each parameter that has blocks.
        dense: names of parameters that the ``degree_parity`` preset trains in full.
        fitted: names of parameters or buffers whose update is set by a fit, never by a gradient.
    """

    kind: str
    blocks: tuple[Block, ...] = ()
    params: tuple[ParamSpec, ...] = ()
    dense: tuple[str, ...] = field(default=())
    fitted: tuple[str, ...] = ()


def is_kind(module: torch.nn.Module, name: str, module_suffix: str) -> bool:
    """Whether ``module`` is an instance of class ``name`` from a Python module ending so.

    Compared by name, because packaged models carry renamed copies of their classes that fail
    ``isinstance``.
    """
    return any(c.__name__ == name and c.__module__.endswith(module_suffix) for c in type(module).__mro__)


def describe(module: torch.nn.Module, parent: torch.nn.Module | None = None) -> ModuleSpec | None:
    """Describe one module's adaptable weights, or None when the layer kind is not known.

    Args:
        module: any module.
        parent: the module that holds it, for kinds whose irrep only the parent knows.
    """
    if is_kind(module, "Linear", "e3nn.o3._linear"):
        return _describe_o3_linear(module)
    if is_kind(module, "FullyConnectedTensorProduct", "e3nn.o3._tensor_product._sub"):
        return _describe_fctp(module)
    if is_kind(module, "_Layer", "e3nn.nn._fc"):
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        return _whole_matrix("e3nn MLP", weight, transpose=False)
    if type(module) is torch.nn.Linear:
        return _whole_matrix("nn.Linear", module.weight, transpose=True)
    for path in EXTENSIONS:
        found: ModuleSpec | None = importlib.import_module(path).describe(module, parent)
        if found is not None:
            return found
    return None


def block_matrices(spec: ModuleSpec, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cut parameters (or their gradients or changes) into the matrices of their blocks.

    Args:
        spec: description of the module.
        values: parameter name -> tensor of the parameter's shape; missing ones count as absent.

    Returns:
        block name -> (m, n) float64 matrix, zero where the instruction list leaves a tile out.
    """
    shapes = {b.name: (b.m, b.n) for b in spec.blocks}
    matrices: dict[str, torch.Tensor] = {}
    for param in spec.params:
        if param.name not in values:
            continue
        value = values[param.name].detach().double()
        flat, start = value.reshape(-1), 0
        if param.columns:
            widths = [p.cols[1] - p.cols[0] for p in param.pieces]
            flat = torch.cat([part.reshape(-1) for part in value.split(widths, 1)])
        for piece in param.pieces:
            matrix = matrices.setdefault(piece.block, flat.new_zeros(shapes[piece.block]))
            tile = flat[start : start + piece.numel]
            start += piece.numel
            rows, cols = piece.rows[1] - piece.rows[0], piece.cols[1] - piece.cols[0]
            tile = tile.reshape(cols, rows).T if param.transpose else tile.reshape(rows, cols)
            matrix[slice(*piece.rows), slice(*piece.cols)] += tile
    return matrices


def _whole_matrix(kind: str, weight: torch.Tensor, transpose: bool) -> ModuleSpec:
    """A scalar (0e) weight matrix that is one block: (m, n), or stored (n, m) if transposed."""
    m, n = (weight.shape[1], weight.shape[0]) if transpose else (weight.shape[0], weight.shape[1])
    block = Block("0e", "0e", m, n)
    param = ParamSpec("weight", tuple(weight.shape), (Piece("0e", (0, m), (0, n)),), transpose)
    return ModuleSpec(kind, (block,), (param,))


def _slots(irreps: Any) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """Row range of every slot among the slots of its own irrep, and channels per irrep."""
    ranges: list[tuple[int, int]] = []
    totals: dict[str, int] = {}
    for mul, ir in irreps:
        start = totals.get(str(ir), 0)
        ranges.append((start, start + mul))
        totals[str(ir)] = start + mul
    return ranges, totals


def _describe_o3_linear(module: Any) -> ModuleSpec | None:
    """``o3.Linear``: one block per irrep; slots of the same irrep are stacked.

    Instructions that were left out are left out of the delta too, since only existing ones are
    tiled. Biases (``i_in == -1``) are not low-rank and stay with the base.
    """
    if not getattr(module, "internal_weights", False) or not module.weight_numel:
        return None
    if getattr(module, "f_in", None) is not None or getattr(module, "f_out", None) is not None:
        return None
    irreps_in, irreps_out = module.irreps_in, module.irreps_out
    rows, m_of = _slots(irreps_in)
    cols, n_of = _slots(irreps_out)
    pieces, seen = [], dict[str, None]()
    for ins in _weighted(module):
        name = str(irreps_out[ins.i_out].ir)
        seen[name] = None
        pieces.append(Piece(name, rows[ins.i_in], cols[ins.i_out]))
    blocks = tuple(Block(name, name, m_of[name], n_of[name]) for name in seen)
    weight = ParamSpec("weight", (sum(p.numel for p in pieces),), tuple(pieces))
    return ModuleSpec("o3.Linear", blocks, (weight,))


def _weighted(module: Any) -> Iterator[Any]:
    for ins in module.instructions:
        if ins.i_in >= 0:
            yield ins


def _describe_fctp(module: Any) -> ModuleSpec | None:
    """``FullyConnectedTensorProduct``: one block per path, A over channels times attributes."""
    if not module.internal_weights or not module.weight_numel:
        return None
    blocks, pieces = [], []
    for i, ins in enumerate(module.instructions):
        if not ins.has_weight:
            continue
        ir1 = module.irreps_in1[ins.i_in1].ir
        ir2 = module.irreps_in2[ins.i_in2].ir
        ir_out = module.irreps_out[ins.i_out].ir
        mul1, mul2, mul_out = ins.path_shape
        name = f"{ir_out}_{ir1}x{ir2}_{i}"
        blocks.append(Block(name, str(ir_out), mul1 * mul2, mul_out))
        pieces.append(Piece(name, (0, mul1 * mul2), (0, mul_out)))
    weight = ParamSpec("weight", (sum(p.numel for p in pieces),), tuple(pieces))
    return ModuleSpec("o3.FullyConnectedTensorProduct", tuple(blocks), (weight,))
