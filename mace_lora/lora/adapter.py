"""Adapter files: PEFT's layout, readable without PEFT.

``adapter_config.json`` holds PEFT's own fields and one key ``equitune`` with everything PEFT does
not know (ranks per irrep, base fingerprint, elements, energy references, …). It stays the same
during a run; what changes with training (epoch, validation errors) is in the header of
``adapter_model.safetensors``, so a reader never sees two files that disagree.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from mace_lora.atomic import atomic_path, write_text

from .card import model_card
from .config import LoraConfig
from .fingerprint import fingerprint, layer_fingerprint
from .inject import RECORDS, ModulePlan, adapter_layers, adapter_names, apply_plan, delete_adapter
from .layers import AdapterLayer

__all__ = [
    "AdapterFile", "adapter_tensors", "config_json", "framework_of", "load_adapter", "read_adapter", "save_adapter",
]  # fmt: skip

FORMAT = 1
CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "adapter_config.json", "adapter_model.safetensors", "README.md"
_PREFIX = "base_model.model."  # PEFT's prefix of every key
_STORES = ("lora_A", "lora_B", "lora_dense")


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


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """Tensors of one adapter under PEFT's file keys (no adapter name in them)."""
    out = {}
    for name, layer in adapter_layers(model).items():
        for store in _STORES:
            group = getattr(layer, store)
            if adapter_name in group:
                for key, value in group[adapter_name].items():
                    out[f"{_PREFIX}{name}.{store}.{key}"] = value.detach()
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
        dtype: storage type of the factors; float32 keeps files small.

    Returns:
        the folder.

    Raises:
        ValueError: no such adapter, or an adapter that contains NaN or infinity.
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
    metadata.setdefault("base_fingerprint", fingerprint(model))
    config = config or (LoraConfig.from_dict(record["config"]) if record["config"] else _recorded_config(model, name))
    content = config_json(model, config, name, metadata)
    header = {k: str(v) for k, v in (run or {}).items()} | {"format": "pt"}
    # Both files are complete before either replaces its predecessor.
    with atomic_path(folder / WEIGHTS_FILE) as weights:
        save_file({k: v.to("cpu", dtype).contiguous() for k, v in tensors.items()}, weights, metadata=header)
        _write_config(folder, json.loads(json.dumps(content)))
    write_text(folder / CARD_FILE, model_card(content, header, sum(v.numel() for v in tensors.values())))
    return folder


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
    plan = tuple(ModulePlan(n, m["ranks"], tuple(m["dense"])) for n, m in own["modules"].items())
    _check_keys(folder, plan, tensors)
    scaling = {n: m["scaling"] for n, m in own["modules"].items()}
    return AdapterFile(LoraConfig.from_dict(own["config"]), plan, scaling, tensors, own["metadata"], run)


def _check_keys(folder: Path, plan: tuple[ModulePlan, ...], tensors: Mapping[str, torch.Tensor]) -> None:
    expected = set()
    for p in plan:
        expected |= {f"{_PREFIX}{p.name}.{s}.{b}" for b in p.ranks for s in ("lora_A", "lora_B")}
        expected |= {f"{_PREFIX}{p.name}.lora_dense.{d.replace('.', '__')}" for d in p.dense}
    missing, extra = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
    if missing or extra:
        raise ValueError(
            f"adapter {folder}: {WEIGHTS_FILE} and {CONFIG_FILE} do not belong together: "
            f"missing {missing[:2] or 'nothing'}, unexpected {extra[:2] or 'nothing'}"
        )


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    check_base: bool = True,
) -> nn.Module:
    """Add a saved adapter to its base model and make it the active one.

    A MACE foundation model from which the base was prepared (elements selected, energy references
    set), or a NequIP model before its shifts and scales were changed, is accepted too: the same
    preparation is then repeated first.

    Args:
        model: the base, or the foundation model it was made from; changed in place in the first
            case.
        path: adapter folder.
        adapter_name: name under which the adapter appears in the model.
        check_base: compare fingerprints; turn off only for a base known to be equivalent.

    Returns:
        the model with the adapter.

    Raises:
        ValueError: the adapter belongs to another base (both fingerprints are named), or it is
            corrupt, or its shapes do not fit.
        FileNotFoundError: no adapter there.
    """
    saved = read_adapter(path)
    if check_base:
        model = _matching_base(model, saved, Path(path))
    before = adapter_names(model)
    try:
        apply_plan(model, saved.plan, saved.config, adapter_name)
        load_tensors(model, saved, adapter_name, Path(path))
    except (AttributeError, KeyError, ValueError) as err:
        if adapter_name not in before and adapter_name in adapter_names(model):
            delete_adapter(model, adapter_name)  # leave no half-loaded adapter behind
        if isinstance(err, ValueError):
            raise
        raise ValueError(f"adapter {path}: the model has no layer for it ({err}); wrong base model?") from err
    remember(model, adapter_name, saved)
    return model


def framework_of(saved: AdapterFile) -> str | None:
    """MACE or NequIP-framework, by what an adapter's file says or by the names of its modules."""
    named = {"nequip": "NequIP-framework", "mace": "MACE"}.get(str(saved.metadata.get("framework")))
    return named or _framework([p.name for p in saved.plan])


def _framework(modules: Iterable[str]) -> str | None:
    """By the names that upstream gives its modules."""
    for name in modules:
        if re.match(r"(long\.)?(interactions|products|readouts)\.\d", name):
            return "MACE"
        if re.search(r"(^|\.)(layer\d+_\w+|allegro|per_type_energy_scale_shift)($|\.)", name):
            return "NequIP-framework"
    return None


def remember(model: nn.Module, adapter_name: str, saved: AdapterFile) -> None:
    """Keep what an adapter's files say of it with the model, for when it is saved again."""
    records = dict(getattr(model, RECORDS, {}))
    records[adapter_name] = {"config": saved.config.to_dict(), "metadata": dict(saved.metadata)}
    setattr(model, RECORDS, records)


def _matching_base(model: nn.Module, saved: AdapterFile, path: Path) -> nn.Module:
    if saved.metadata.get("framework") == "nequip" and hasattr(model, "type_names"):
        from nequip_ext.lora.metadata import base_metadata, check_adapter, restore_energies

        if not adapter_names(model):  # with adapters the base is as it was trained
            restore_energies(model, saved.metadata)
        check_adapter(saved, base_metadata(model) | {"base_fingerprint": fingerprint(model)}, path)
        return model
    expected, got = saved.metadata.get("base_fingerprint"), fingerprint(model)
    if got == expected:
        return model
    theirs, mine = framework_of(saved), _framework(dict(model.named_modules()))
    if theirs and mine and theirs != mine:
        raise ValueError(
            f"adapter {path}: expected one of a {mine} model, got one of a {theirs} model "
            f"({saved.metadata.get('base_model')}); adapters do not cross frameworks"
        )
    foundation = saved.metadata.get("foundation_fingerprint")
    if foundation is not None:
        from mace_lora.mace_plugin.base_model import prepare_base, select_head

        # a foundation with several heads: mace_run_train starts from one of them
        head = saved.metadata.get("foundation_head")
        source = model if got == foundation else select_head(model, head)
        if source is not None and fingerprint(source) == foundation:
            if adapter_names(model):
                raise ValueError(
                    f"adapter {path}: the model is the adapter's foundation, has adapters {adapter_names(model)} "
                    "already and would have to be prepared anew; load this adapter first, or on the prepared base"
                )
            return prepare_base(source, saved.metadata)
    raise ValueError(
        f"adapter {path}: it was trained on another base model: expected fingerprint {expected}"
        + (f" (or its foundation model {foundation})" if foundation else "")
        + f", got {got}; load the base named in the adapter's README.md"
    )


@torch.no_grad()
def load_tensors(model: nn.Module, saved: AdapterFile, adapter_name: str, path: Path) -> None:
    """Copy the saved factors and scalings into an adapter that is already in the model."""
    layers = adapter_layers(model)
    for p in saved.plan:
        layer: AdapterLayer = layers[p.name]
        layer.scaling[adapter_name] = dict(saved.scaling[p.name])
        for store in _STORES:
            for key, parameter in getattr(layer, store)[adapter_name].items():
                value = saved.tensors[f"{_PREFIX}{p.name}.{store}.{key}"]
                if value.shape != parameter.shape:
                    raise ValueError(
                        f"adapter {path}: {p.name} {store} {key}: expected shape {tuple(parameter.shape)} "
                        f"from the model, got {tuple(value.shape)}; wrong base model?"
                    )
                parameter.copy_(value)
