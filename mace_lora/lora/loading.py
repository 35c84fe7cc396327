"""Saved adapters back onto their base, which is checked first."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapter import PREFIX, STORES, AdapterFile, framework_by_modules, framework_of, read_adapter
from .fingerprint import fingerprint
from .inject import RECORDS, adapter_layers, adapter_names, apply_plan, delete_adapter
from .layers import AdapterLayer

__all__ = ["load_adapter", "load_tensors", "remember"]


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    check_base: bool = True,
) -> nn.Module:
    """Add a saved adapter to its base model and make it the active one.

    A MACE foundation model from which the base was prepared (elements selected, energy references
    set), or a NequIP model before its shifts and scales were changed or a long path was put beside it, is accepted too:
    the same preparation is then repeated first.

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


def remember(model: nn.Module, adapter_name: str, saved: AdapterFile) -> None:
    """Keep what an adapter's files say of it with the model, for when it is saved again."""
    records = dict(getattr(model, RECORDS, {}))
    records[adapter_name] = {"config": saved.config.to_dict(), "metadata": dict(saved.metadata)}
    setattr(model, RECORDS, records)


def _matching_base(model: nn.Module, saved: AdapterFile, path: Path) -> nn.Module:
    if saved.metadata.get("framework") == "nequip" and hasattr(model, "type_names"):
        from nequip_ext.lora.metadata import base_metadata, check_adapter, energies_of

        fresh = not adapter_names(model)  # with adapters the base is as it was trained
        with energies_of(model, saved.metadata if fresh else {}):
            base = model
            if fresh and saved.metadata.get("long_path"):
                from nequip_ext.multiscale.around import restore_long_path

                base = restore_long_path(model, saved.metadata["long_path"])
            check_adapter(saved, base_metadata(base) | {"base_fingerprint": fingerprint(base)}, path)
        return base
    expected, got = saved.metadata.get("base_fingerprint"), fingerprint(model)
    if got == expected:
        return model
    theirs, mine = framework_of(saved), framework_by_modules(dict(model.named_modules()))
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
            prepared = prepare_base(source, saved.metadata)
            _check_long_path(prepared, saved, path)
            return prepared
    raise ValueError(
        f"adapter {path}: it was trained on another base model: expected fingerprint {expected}"
        + (f" (or its foundation model {foundation})" if foundation else "")
        + f", got {got}; load the base named in the adapter's README.md"
    )


def _check_long_path(model: Any, saved: AdapterFile, path: Path) -> None:
    """The adapter holds what training added to the first weights of a new long path."""
    expected = saved.metadata.get("multiscale", {}).get("fingerprint")
    if expected is not None and fingerprint(model.long) != expected:
        raise ValueError(
            f"adapter {path}: the new long path beside its base could not be made again (expected fingerprint "
            f"{expected}, got {fingerprint(model.long)}); another version of torch? Use the merged .model file"
        )


@torch.no_grad()
def load_tensors(model: nn.Module, saved: AdapterFile, adapter_name: str, path: Path) -> None:
    """Copy the saved factors and scalings into an adapter that is already in the model."""
    layers = adapter_layers(model)
    for p in saved.plan:
        layer: AdapterLayer = layers[p.name]
        layer.scaling[adapter_name] = dict(saved.scaling[p.name])
        for store in STORES:
            for key, parameter in getattr(layer, store)[adapter_name].items():
                value = saved.tensors[f"{PREFIX}{p.name}.{store}.{key}"]
                if value.shape != parameter.shape:
                    raise ValueError(
                        f"adapter {path}: {p.name} {store} {key}: expected shape {tuple(parameter.shape)} "
                        f"from the model, got {tuple(value.shape)}; wrong base model?"
                    )
                parameter.copy_(value)
