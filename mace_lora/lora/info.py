"""What an adapter, a base or a model is: the content of ``equitune info``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from .adapter import CONFIG_FILE, AdapterFile, read_adapter
from .blocks import describe
from .energies import MODULE
from .fingerprint import fingerprint

__all__ = ["describe_adapter", "describe_model", "is_adapter"]


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a path is meant as an adapter folder."""
    return Path(path).is_dir() or Path(path).name == CONFIG_FILE


def describe_adapter(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Settings, sizes and provenance of an adapter folder.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_adapter`.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    saved = read_adapter(folder)
    ranks: dict[str, list[int]] = {}
    for module in saved.plan:
        for block, rank in module.ranks.items():
            irrep = block.split("_")[0]
            ranks.setdefault(irrep if irrep[:1].isdigit() else block, []).append(rank)
    return {
        "kind": "adapter",
        "preset": saved.config.preset,
        "rank, alpha": f"{saved.config.rank}, {saved.config.alpha:g}",
        "ranks": {k: f"{min(v)}–{max(v)}" if min(v) < max(v) else str(v[0]) for k, v in sorted(ranks.items())},
        "initialisation": saved.config.init,
        "modules": len(saved.plan),
        "parameters": sum(t.numel() for t in saved.tensors.values()),
        "trained in full": [f"{m.name}.{d}" for m in saved.plan for d in m.dense if m.name != MODULE],
        **_shift(saved),
        **saved.metadata,
        **{k: v for k, v in saved.run.items() if k != "format"},
    }


def _shift(saved: AdapterFile) -> dict[str, Any]:
    """The adapter's shift of the energy references, eV by head and element."""
    found = [v for k, v in saved.tensors.items() if f".{MODULE}.lora_dense." in k]
    if not found:
        return {}
    elements = [str(z) for z in saved.metadata.get("elements", [])]
    heads = saved.metadata.get("heads", [])
    rows = found[0].reshape(-1, found[0].shape[-1]).tolist()
    return {
        "shift of the E0s (eV)": {
            head: {z: round(e, 6) for z, e in zip(elements, row, strict=True)}
            for head, row in zip(heads, rows, strict=True)
        }
    }


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Fingerprint, elements, sizes and adaptable weights per irrep of a MACE model."""
    from mace_lora.mace_plugin.base_model import describe_base

    weights: dict[str, int] = {}
    parents = dict(model.named_modules())
    for name, module in parents.items():
        spec = describe(module, parents.get(name.rpartition(".")[0]))
        for block in spec.blocks if spec else ():
            weights[block.irrep] = weights.get(block.irrep, 0) + block.m * block.n
    interactions: Any = model.interactions
    return {
        "kind": type(model).__name__,
        "fingerprint": fingerprint(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "adaptable weights": dict(sorted(weights.items())),
        "hidden irreps": str(interactions[0].hidden_irreps),
        "interactions": len(interactions),
        **describe_base(model),
    }
