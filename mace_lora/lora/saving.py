"""Writing adapters: each file atomically, and no moment at which two files disagree."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from mace_lora.atomic import atomic_path, write_text

from .adapter import CARD_FILE, CONFIG_FILE, FORMAT, PREFIX, STORES, WEIGHTS_FILE
from .card import model_card
from .config import LoraConfig
from .fingerprint import fingerprint, layer_fingerprint
from .inject import RECORDS, adapter_layers, adapter_names

__all__ = ["adapter_tensors", "config_json", "save_adapter"]


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """Tensors of one adapter under PEFT's file keys (no adapter name in them)."""
    out = {}
    for name, layer in adapter_layers(model).items():
        for store in STORES:
            group = getattr(layer, store)
            if adapter_name in group:
                for key, value in group[adapter_name].items():
                    out[f"{PREFIX}{name}.{store}.{key}"] = value.detach()
    return out


def config_json(model: nn.Module, config: LoraConfig, adapter_name: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Content of ``adapter_config.json``."""
    modules = {}
    for name, layer in adapter_layers(model).items():
        if adapter_name in layer.lora_A:
            modules[name] = {
                "ranks": layer.r[adapter_name],
                "scaling": layer.scaling[adapter_name],
                "dense": [k.replace("__", ".") for k in layer.lora_dense[adapter_name]],
                # lets PEFT's loader, which sees one layer at a time, notice a wrong base
                "base": layer_fingerprint(layer.base_layer),
            }
    pattern = "|".join(n.replace(".", r"\.") for n in modules)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": metadata.get("base_model"),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.use_rslora,
        "target_modules": f"^({pattern})$",
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "equitune": {
            "format": FORMAT,
            "config": config.to_dict(),
            "modules": modules,
            "metadata": {k: v for k, v in metadata.items() if v is not None},
        },
    }


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    config: LoraConfig | None = None,
    metadata: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write one adapter as a PEFT folder, each file atomically.

    Args:
        model: model with the adapter.
        path: folder; created when missing.
        adapter_name: which adapter; default the only one.
        config: its settings, for the record; default those it was loaded with, else of equal rank and alpha.
        metadata: provenance to store; default what it was loaded or built with. The base fingerprint is added when
            missing.
        run: state of training to store in the weights file, e.g. epoch and validation loss.
        dtype: storage type of the factors; float32 keeps files small. Fitted energies keep their own.

    Returns:
        the folder.

    Raises:
        ValueError: no such adapter, one that contains NaN or infinity, or a base that is not the recorded one.
    """
    folder = Path(path)
    name = _only_adapter(model) if adapter_name is None else adapter_name
    tensors = adapter_tensors(model, name)
    if not tensors:
        raise ValueError(f"adapter_name: the model has no adapter {name!r}; expected one of {adapter_names(model)}")
    bad = [k for k, v in tensors.items() if not bool(torch.isfinite(v).all())]
    if bad:
        raise ValueError(f"adapter {name!r} contains NaN or infinity in {bad[0]}; it was not saved to {folder}")
    record = getattr(model, RECORDS, {}).get(name) or {
        "config": getattr(model, "equitune_config", None),
        "metadata": getattr(model, "equitune_metadata", {}),
    }  # the latter as nequip_ext.LoRA leaves them
    metadata = dict(record["metadata"] if metadata is None else metadata)
    expected, got = metadata.get("base_fingerprint"), fingerprint(model)
    if expected not in (None, got):
        raise ValueError(
            f"model: its base is not the one that adapter {name!r} was made for: expected fingerprint {expected}, "
            f"got {got}; the base's file is another by now, or its weights were changed; not saved to {folder}"
        )
    metadata["base_fingerprint"] = got
    config = config or (LoraConfig.from_dict(record["config"]) if record["config"] else _recorded_config(model, name))
    content = config_json(model, config, name, metadata)
    header = {k: str(v) for k, v in (run or {}).items()} | {"format": "pt"}
    # Both files are complete before either replaces its predecessor.
    with atomic_path(folder / WEIGHTS_FILE) as weights:
        exact = _fitted(model)  # energies of all electrons have more digits than float32
        stored = {k: v.to("cpu", v.dtype if k in exact else dtype).contiguous() for k, v in tensors.items()}
        save_file(stored, weights, metadata=header)
        _write_config(folder, json.loads(json.dumps(content)))
    write_text(folder / CARD_FILE, model_card(content, header, sum(v.numel() for v in tensors.values())))
    return folder


def _fitted(model: nn.Module) -> set[str]:
    """Keys of what a fit sets, not a gradient: energy references."""
    layers = adapter_layers(model).items()
    return {f"{PREFIX}{name}.lora_dense.{key.replace('.', '__')}" for name, la in layers for key in la.spec.fitted}


def _write_config(folder: Path, content: dict[str, Any]) -> None:
    """Write ``adapter_config.json``; weights of another adapter must not be paired with it for a moment."""
    target = folder / CONFIG_FILE
    try:
        before = json.loads(target.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        before = None
    if before == content:
        return
    with atomic_path(target) as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        if before is not None and _identity(before) != _identity(content):
            (folder / WEIGHTS_FILE).unlink(missing_ok=True)


def _identity(content: Mapping[str, Any]) -> list[Any]:
    """What has to agree for weights to fit a config; provenance may differ."""
    own = content.get("equitune", {})
    return [own.get("config"), own.get("modules"), own.get("metadata", {}).get("base_fingerprint")]


def _only_adapter(model: nn.Module) -> str:
    names = adapter_names(model)
    if len(names) != 1:
        raise ValueError(f"adapter_name: the model has adapters {names or 'none'}; name the one that is meant")
    return names[0]


def _recorded_config(model: nn.Module, name: str) -> LoraConfig:
    layer = next(la for la in adapter_layers(model).values() if name in la.lora_A and la.r[name])
    return LoraConfig(rank=max(layer.r[name].values()), alpha=layer.lora_alpha[name])
