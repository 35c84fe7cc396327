"""Adapter files: PEFT's layout, readable without PEFT.

``adapter_config.json`` holds PEFT's own fields and one key ``equitune`` with everything PEFT does
not know (ranks per irrep, base fingerprint, elements, energy references, …). It stays the same
during a run; what changes with training (epoch, validation errors) is in the header of
``adapter_model.safetensors``, so a reader never sees two files that disagree.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .config import LoraConfig
from .inject import ModulePlan

__all__ = ["AdapterFile", "framework_of", "read_adapter"]

FORMAT = 1
CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "adapter_config.json", "adapter_model.safetensors", "README.md"
PREFIX = "base_model.model."  # PEFT's prefix of every key
STORES = ("lora_A", "lora_B", "lora_dense")


@dataclass(frozen=True)
class AdapterFile:
    """A validated adapter as read from disk.

    Attributes:
        config: LoRA settings.
        plan: ranks and dense parameters per module.
        scaling: module -> block -> factor on A B.
        tensors: module name, store, key -> tensor.
        metadata: provenance: base_fingerprint, elements, r_max, E0s, units, versions, …
        run: what training wrote last: epoch, validation errors.
    """

    config: LoraConfig
    plan: tuple[ModulePlan, ...]
    scaling: Mapping[str, Mapping[str, float]]
    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, Any]
    run: Mapping[str, str]


def read_adapter(path: str | os.PathLike[str]) -> AdapterFile:
    """Read and validate an adapter folder without touching a model; needs no PEFT.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: not an equitune adapter, corrupt or truncated files, NaN, missing tensors.
    """
    folder = Path(path)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"adapter {folder}: expected a file {name}; is this an adapter folder?")
    try:
        content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as err:
        raise ValueError(f"adapter {folder}: {CONFIG_FILE} is not readable JSON ({err})") from err
    own = content.get("equitune") if isinstance(content, dict) else None
    if not isinstance(own, dict) or own.get("format") != FORMAT:
        raise ValueError(
            f"adapter {folder}: expected key 'equitune' with format {FORMAT} in {CONFIG_FILE}, "
            f"got {own.get('format') if isinstance(own, dict) else None!r}; not written by this version of equitune"
        )
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as handle:
            tensors = {k: handle.get_tensor(k) for k in handle.keys()}  # noqa: SIM118
            run = dict(handle.metadata() or {})
    except SafetensorError as err:
        raise ValueError(
            f"adapter {folder}: {WEIGHTS_FILE} is corrupt or truncated ({err}); restore it or train again"
        ) from err
    bad = [k for k, v in tensors.items() if not bool(torch.isfinite(v).all())]
    if bad:
        raise ValueError(f"adapter {folder}: tensor {bad[0]} contains NaN or infinity; the adapter is unusable")
    gone = [k for k in ("config", "modules", "metadata") if not isinstance(own.get(k), dict)]
    if gone:
        raise ValueError(
            f"adapter {folder}: expected 'equitune.{gone[0]}' in {CONFIG_FILE}, got none; restore the file"
        )
    try:
        plan = tuple(ModulePlan(n, dict(m["ranks"]), tuple(m["dense"])) for n, m in own["modules"].items())
        scaling = {n: {b: float(m["scaling"][b]) for b in m["ranks"]} for n, m in own["modules"].items()}
        config = LoraConfig.from_dict(own["config"])
    except (KeyError, TypeError, AttributeError) as err:
        raise ValueError(
            f"adapter {folder}: {CONFIG_FILE} is incomplete ({type(err).__name__}: {err}); restore the file"
        ) from err
    _check_keys(folder, plan, tensors)
    unsound = [f"{n}, {b}: {v}" for n, row in scaling.items() for b, v in row.items() if not math.isfinite(v)]
    if unsound:
        raise ValueError(f"adapter {folder}: the scaling of {unsound[0]} is no number; the adapter is unusable")
    return AdapterFile(config, plan, scaling, tensors, own["metadata"], run)


def _check_keys(folder: Path, plan: tuple[ModulePlan, ...], tensors: Mapping[str, torch.Tensor]) -> None:
    expected = set()
    for p in plan:
        expected |= {f"{PREFIX}{p.name}.{s}.{b}" for b in p.ranks for s in ("lora_A", "lora_B")}
        expected |= {f"{PREFIX}{p.name}.lora_dense.{d.replace('.', '__')}" for d in p.dense}
    missing, extra = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
    if missing or extra:
        raise ValueError(
            f"adapter {folder}: {WEIGHTS_FILE} and {CONFIG_FILE} do not belong together: "
            f"missing {missing[:2] or 'nothing'}, unexpected {extra[:2] or 'nothing'}"
        )


def framework_of(saved: AdapterFile) -> str | None:
    """MACE or NequIP-framework, by what an adapter's file says or by the names of its modules."""
    named = {"nequip": "NequIP-framework", "mace": "MACE"}.get(str(saved.metadata.get("framework")))
    return named or framework_by_modules([p.name for p in saved.plan])


def framework_by_modules(modules: Iterable[str]) -> str | None:
    """By the names that upstream gives its modules."""
    for name in modules:
        if re.match(r"(long\.)?(interactions|products|readouts)\.\d", name):
            return "MACE"
        if re.search(r"(^|\.)(layer\d+_\w+|allegro|per_type_energy_scale_shift)($|\.)", name):
            return "NequIP-framework"
    return None
