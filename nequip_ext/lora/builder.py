"""``_target_: nequip_ext.LoRA``: any NequIP-framework model with a LoRA adapter in it."""

from __future__ import annotations

import logging
import os
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mace_lora.lora.adapter import read_adapter
from mace_lora.lora.config import LoraConfig
from mace_lora.lora.coverage import coverage
from mace_lora.lora.fingerprint import fingerprint
from mace_lora.lora.inject import ModulePlan, adapter_layers, apply_plan, plan_lora
from mace_lora.lora.loading import load_tensors
from nequip_ext.upstream.build import is_loading, is_packaging

from .metadata import base_metadata, check_adapter, energies_of, holds_adapter

__all__ = ["ADAPTER", "LoRA", "build_model", "with_keys"]

ADAPTER = "default"
_LOG = logging.getLogger("equitune")


def LoRA(
    model: Mapping[str, Any] | nn.Module,
    rank: int = 16,
    alpha: float | None = None,
    preset: str = "degree_parity",
    rank_pattern: Mapping[str, int] | None = None,
    module_rank_pattern: Mapping[str, int] | None = None,
    targets: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    dense: Sequence[str] | None = None,
    init: str = "scaled",
    use_rslora: bool = False,
    clip_rank: bool = False,
    adapter: str | None = None,
    seed: int = 0,
    model_dtype: str | None = None,
    compile_mode: str | None = None,
) -> nn.Module:
    """Wrap a model: its weights are frozen, and one low-rank pair for every irrep (l, p) trains.

    Args:
        model: config of the inner model (any ``_target_``: a builder, ``ModelFromPackage``,
            ``ModelFromCheckpoint``, ``nequip.model.modify``), or a built model.
        rank: rank of every block.
        alpha: the update is scaled by alpha/rank; default the rank.
        preset: ``degree_parity`` (``upstream`` adapts the layers that MACE's own LoRA would).
        rank_pattern: irrep to rank, e.g. ``{0e: 16, 1o: 8}``.
        module_rank_pattern: regular expression of module names to rank.
        targets: regular expressions of the modules to adapt; default all.
        exclude: regular expressions of modules to leave out.
        dense: regular expressions of parameters to train in full, e.g. ``[type_embed]``; default the
            Bessel frequencies, Allegro's weights that are no matrices, and the per-type shifts and scales that
            upstream's ``modify_PerTypeScaleShift`` made trainable.
        init: ``scaled`` or ``elora``.
        use_rslora: scale the update by alpha/sqrt(rank) instead.
        clip_rank: no block gets a rank beyond its smaller side.
        adapter: folder of an adapter to start from; it brings its own rank, targets, … and the shifts and
            scales of the types that its base had.
        seed: of the random factors.
        model_dtype, compile_mode: for the inner model, as if written there.

    Returns:
        the same model (a GraphModel, or a checkpoint's ModuleDict with one) with the adapter.

    Raises:
        ValueError: a setting out of range, nothing matches, or the adapter belongs to another base.
    """
    if not isinstance(model, nn.Module | Mapping):
        raise ValueError(f"model: expected the config of a model or a built one, got {model!r}")
    if not isinstance(adapter, str | Path | None):
        raise ValueError(f"adapter: expected the folder of an adapter, got {adapter!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed: expected a whole number, got {seed!r}")
    built = model if isinstance(model, nn.Module) else build_model(with_keys(model, model_dtype, compile_mode))
    inner: Any = built
    if isinstance(built, nn.ModuleDict):  # a checkpoint's models by name
        if len(built) != 1:
            raise ValueError(f"model: nequip_ext.LoRA adapts one model, got {list(built)}; wrap each of them")
        inner = next(iter(built.values()))
    if not (hasattr(inner, "metadata") and hasattr(inner, "type_names")):
        raise ValueError(
            f"model: expected a NequIP-framework model (GraphModel) or its builder, got {type(inner).__name__}"
        )
    if holds_adapter(inner):
        raise ValueError(
            "model: it has LoRA adapters already (a package made with EQUITUNE_PACKAGE=unmerged has them too); wrap "
            "the base, or give 'adapter' to continue from one"
        )
    config = LoraConfig(
        rank=rank, alpha=rank if alpha is None else alpha, preset=preset, init=init, use_rslora=use_rslora,
        clip_rank=clip_rank, rank_pattern=_plain(rank_pattern or {}),
        module_rank_pattern=_plain(module_rank_pattern or {}), targets=_plain(targets), exclude=_plain(exclude or ()),
        dense=_plain(dense),
    )  # fmt: skip
    if getattr(inner, "equitune_long_path", {}).get("freeze_short"):
        raise ValueError(
            "model: freeze_short: nequip_ext.LoRA freezes every weight and adapts the short path; leave it out, or "
            "leave LoRA out to train the long path alone"
        )
    saved = None
    if adapter is not None:
        changed = [k for k, v in config.to_dict().items() if v != LoraConfig().to_dict()[k]]
        if changed:
            raise ValueError(f"{changed[0]}: the adapter given by 'adapter' brings its own; drop one of the two keys")
        saved = read_adapter(adapter)
        config = saved.config
    with energies_of(inner, saved.metadata if saved else {}):
        metadata = base_metadata(inner) | {"base_fingerprint": fingerprint(inner), "base_model": _source(model)}
        if saved is not None:
            check_adapter(saved, metadata, Path(str(adapter)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        plan = plan_lora(inner, config) if saved is None else list(saved.plan)
        plan = _with_references(inner, plan)
        apply_plan(inner, plan, config, ADAPTER)
    if saved is not None:
        load_tensors(inner, saved, ADAPTER, Path(str(adapter)))
    inner.equitune_metadata = metadata
    inner.equitune_config = config.to_dict()
    _merge_when_packaged(inner)
    _LOG.info("LoRA coverage\n%s", coverage(inner))
    return built


def _plain(value: Any) -> Any:
    """A config's lists and mappings as Python's; anything else stays, and LoraConfig refuses it."""
    if isinstance(value, Mapping):
        return dict(value)
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def with_keys(config: Mapping[str, Any], model_dtype: str | None, compile_mode: str | None) -> dict[str, Any]:
    """The config with these keys set in its innermost model.

    Raises:
        ValueError: another precision for a model from a file, which brings its own.
    """
    if model_dtype not in (None, "float32", "float64"):
        raise ValueError(f"model_dtype: expected float32 or float64, got {model_dtype!r}")
    target = str(config.get("_target_", ""))
    if isinstance(config.get("model"), Mapping) and not target.endswith("AddLongPath"):  # nequip.model.modify
        return dict(config) | {"model": with_keys(config["model"], model_dtype, compile_mode)}
    if model_dtype is not None and target.endswith(("FromCheckpoint", "FromPackage")):
        raise ValueError(f"model_dtype: a model from a file brings its own; drop {model_dtype!r}, or train in another")
    given = {"model_dtype": model_dtype, "compile_mode": compile_mode}
    return dict(config) | {k: v for k, v in given.items() if v is not None}


def build_model(config: Mapping[str, Any]) -> nn.Module:
    """The model of a config.

    Raises:
        ValueError: no ``_target_``, or one that cannot be imported.
    """
    content = dict(config)
    target = content.pop("_target_", None)
    if target is None:
        raise ValueError(f"model: expected a config with a '_target_', got keys {sorted(content)}")
    try:
        builder = pkgutil.resolve_name(str(target))
    except (ImportError, AttributeError, ValueError) as err:
        raise ValueError(f"model: cannot import _target_ {target!r} ({err})") from err
    built: nn.Module = builder(**content)
    return built


def _source(model: Mapping[str, Any] | nn.Module) -> str | None:
    """What the base is, for the adapter's card: the file it was read from, or the builder."""
    if isinstance(model, nn.Module):
        return None
    content: Any = model
    while isinstance(content.get("model"), Mapping):  # modify
        content = content["model"]
    return str(content.get("package_path") or content.get("checkpoint_path") or content.get("_target_"))


def _with_references(model: nn.Module, plan: Sequence[ModulePlan]) -> list[ModulePlan]:
    """The plan with the per-type shifts, which SaveAdapter refits.

    Raises:
        ValueError: upstream's modifier made shifts or scales trainable, but the settings leave them out.
    """
    planned = {p.name: p for p in plan}
    for name, module in model.named_modules():
        if type(module).__name__ != "PerTypeScaleShift" or getattr(module, "field", None) != "atomic_energy":
            continue
        mine = planned.get(name, ModulePlan(name, {}))
        for kind in ("shifts", "scales"):
            if kind in module._parameters and kind not in mine.dense and not is_loading():
                raise ValueError(
                    f"model: {name}: {kind}_trainable is true, but targets, exclude or dense leave {kind} out of the "
                    f"adapter; add {kind!r} to dense, or set {kind}_trainable: false by modify_PerTypeScaleShift"
                )
        if getattr(module, "has_shifts", False) and "shifts" not in mine.dense:
            mine = replace(mine, dense=(*mine.dense, "shifts"))
        if mine.dense:
            planned[name] = mine
    return list(planned.values())


def _merge_when_packaged(model: nn.Module) -> None:
    """During ``nequip-package`` the layers pickle as their merged base, unless EQUITUNE_PACKAGE=unmerged."""
    wanted = os.environ.get("EQUITUNE_PACKAGE", "merged")
    if wanted not in ("merged", "unmerged"):
        raise ValueError(f"EQUITUNE_PACKAGE: expected merged or unmerged, got {wanted!r}")
    if is_packaging():
        for layer in adapter_layers(model).values():
            layer.pickle_merged = wanted == "merged"
