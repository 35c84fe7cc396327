"""Which weights an adapter reaches: the table printed before training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .inject import adapter_layers

__all__ = ["Coverage", "CoverageRow", "coverage"]


@dataclass(frozen=True)
class CoverageRow:
    """One adapted block or dense parameter, or one parameter that is not reached.

    Attributes:
        module: module name.
        kind: layer type.
        irreps: irrep (l, p) of the block; '' for whole parameters.
        shape: (m, n) of the block, or the parameter's shape.
        rank: rank of the update; None when trained in full or not reached.
        parameters: number of values that the row adds to training (or leaves out).
        trainable: whether they receive gradients.
    """

    module: str
    kind: str
    irreps: str
    shape: tuple[int, ...]
    rank: int | None
    parameters: int
    trainable: bool


@dataclass(frozen=True)
class Coverage:
    """Rows of adapted and unreached weights, and totals.

    Attributes:
        rows: adapted blocks and dense parameters of the active adapters.
        unreached: parameters of the base that no active adapter changes.
        trainable: number of values that receive gradients.
        total: number of parameters of the base model.
    """

    rows: tuple[CoverageRow, ...]
    unreached: tuple[CoverageRow, ...]
    trainable: int
    total: int

    def __str__(self) -> str:
        head = ("module", "layer", "irrep", "shape", "rank", "parameters", "trained")
        body = [_cells(r) for r in self.rows] + [_cells(r) for r in self.unreached]
        widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in [head, *body]]
        lines.insert(1, "  ".join("-" * w for w in widths))
        share = 100.0 * self.trainable / max(self.total, 1)
        lines.append(f"trainable {self.trainable:,}, base {self.total:,} parameters ({share:.1f} %)")
        return "\n".join(lines)


def _cells(row: CoverageRow) -> tuple[str, ...]:
    rank = "-" if not row.trainable else "full" if row.rank is None else str(row.rank)
    shape = "x".join(map(str, row.shape)) or "scalar"
    return (
        row.module, row.kind, row.irreps, shape, rank, f"{row.parameters:,}", "yes" if row.trainable else "no",
    )  # fmt: skip


def coverage(model: nn.Module) -> Coverage:
    """Report which weights the active adapters reach.

    Args:
        model: model after :func:`apply_lora`.

    Returns:
        rows (module, irreps, rank, parameters, trainable), the unreached parameters and totals.

    Raises:
        ValueError: the model has no adapter.
    """
    layers = adapter_layers(model)
    if not layers:
        raise ValueError("coverage: the model has no adapter; call apply_lora or load_adapter first")
    rows: list[CoverageRow] = []
    reached: set[str] = set()
    for name, layer in layers.items():
        blocks = {b.name: b for b in layer.spec.blocks}
        for adapter in layer.active_adapters:
            for key, a in layer.lora_A[adapter].items():
                block, b = blocks[key], layer.lora_B[adapter][key]
                rows.append(
                    CoverageRow(
                        name,
                        layer.spec.kind,
                        block.irrep,
                        (block.m, block.n),
                        a.shape[1],
                        a.numel() + b.numel(),
                        a.requires_grad and b.requires_grad,
                    )
                )
            for key, update in layer.lora_dense[adapter].items():
                parameter = key.replace("__", ".")
                reached.add(f"{name}.base_layer.{parameter}")
                rows.append(
                    CoverageRow(
                        f"{name}.{parameter}",
                        layer.spec.kind,
                        "",
                        tuple(update.shape),
                        None,
                        update.numel(),
                        update.requires_grad,
                    )
                )
        reached.update(f"{name}.base_layer.{p}" for p in layer.effective_parameters())
    unreached = tuple(
        CoverageRow(n.replace(".base_layer", ""), "not reached", "", tuple(p.shape), None, p.numel(), p.requires_grad)
        for n, p in model.named_parameters()
        if n not in reached and not _is_adapter(n) and p.numel()
    )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for n, p in model.named_parameters() if not _is_adapter(n))
    return Coverage(tuple(rows), unreached, trainable, total)


def _is_adapter(name: str) -> bool:
    return any(f".{store}." in f".{name}" for store in ("lora_A", "lora_B", "lora_dense"))
