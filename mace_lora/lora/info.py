"""What an adapter, a base or a model is: the content of ``equitune info``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from .adapter import CONFIG_FILE, AdapterFile, read_adapter
from .blocks import describe
from .fingerprint import fingerprint

_FITTED = ("atomic_energies", "shifts")  # set by a fit, not by training
_SHIFTS = tuple(f".lora_dense.{name}" for name in _FITTED)

__all__ = ["describe_adapter", "describe_model", "is_adapter", "recorded"]


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
        "trained in full": [f"{m.name}.{d}" for m in saved.plan for d in m.dense if not d.endswith(_FITTED)],
        **_shift(saved),
        **saved.metadata,
        **{k: v for k, v in saved.run.items() if k != "format"},
    }


def _shift(saved: AdapterFile) -> dict[str, Any]:
    """The adapter's shift of the energy references in eV: by head and element (MACE), or by type (NequIP)."""
    found = [v for k, v in saved.tensors.items() if k.endswith(_SHIFTS)]
    if not found:
        return {}
    names = [str(z) for z in saved.metadata.get("elements") or saved.metadata.get("type_names") or []]
    heads = saved.metadata.get("heads") or ["all"]
    rows = found[0].reshape(len(heads), -1).tolist()
    return {
        "shift of the energy references (eV)": {
            head: {z: round(e, 6) for z, e in zip(names if len(row) > 1 else ["all"], row, strict=True)}
            for head, row in zip(heads, rows, strict=True)
        }
    }


def recorded(path: Path) -> dict[str, Any]:
    """What the JSON of a model's weights tells of its making: level of theory, data, errors; {} without."""
    from mace_lora.embedded import BASE_FILES

    file = BASE_FILES[1] if path == Path("embedded") else path.with_suffix(".json")
    if path != Path("embedded") and (path.suffix not in (".safetensors", ".json") or not file.is_file()):
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    told = {key: content[key] for key in ("level", "epochs", "seeds") if key in content}
    if "counts" in content:
        told["data"] = {k: v for k, v in content["counts"].items() if not isinstance(v, dict)}
    if "errors" in content:
        told["errors"] = content["errors"]
    if "versions" in content:
        told["made with"] = content["versions"]
    return told


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
