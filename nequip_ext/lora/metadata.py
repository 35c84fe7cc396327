"""What an adapter of a NequIP-framework model says about its base, and whether it fits another."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from mace_lora.lora.adapter import AdapterFile, framework_of

__all__ = ["base_metadata", "check_adapter", "energies_of", "holds_adapter"]

_LOG = logging.getLogger("equitune")


def base_metadata(model: nn.Module) -> dict[str, Any]:
    """Types, cutoff, energy shifts and versions of a GraphModel.

    Args:
        model: NequIP's GraphModel.
    """
    graph: Any = model
    metadata = dict(graph.metadata)
    return {
        "framework": "nequip",
        "type_names": list(graph.type_names),
        "r_max": float(metadata["r_max"]),
        "model_dtype": metadata["model_dtype"],
        **_energies(model),
        **({"long_path": dict(graph.equitune_long_path)} if hasattr(graph, "equitune_long_path") else {}),
        "units": "those of the training data (eV and Å in our recipes)",
        "e3nn_convention": _version("e3nn"),
        "versions": {p: _version(p) for p in ("nequip", "nequip-allegro", "e3nn", "torch", "equitune")},
    }


def holds_adapter(model: nn.Module) -> bool:
    """By name, because a package holds renamed copies of our classes."""
    return any(".lora_A." in name for name, _ in model.named_parameters())


def _energies(model: nn.Module) -> dict[str, list[float] | None]:
    """Shifts and scales of the types as the base has them, without an adapter's change."""
    out: dict[str, list[float] | None] = {"energy_shifts": None, "energy_scales": None}
    for name, value in model.state_dict().items():
        key = f"energy_{name.rpartition('.')[2]}"
        if ".per_type_energy_scale_shift." in f".{name}" and ".lora_dense." not in name and key in out:
            out[key] = [float(x) for x in value.reshape(-1)]
    return out


@contextmanager
def energies_of(model: nn.Module, metadata: Mapping[str, Any]) -> Iterator[None]:
    """Shifts and scales of an adapter's base; the model gets its own back where the adapter is refused inside."""
    before = {name: m for name, m in model.named_modules() if type(m).__name__ == "PerTypeScaleShift"}
    try:
        if metadata.get("framework") == "nequip":
            _restore_energies(model, metadata)
        yield
    except BaseException:
        for name, module in before.items():
            model.set_submodule(name, module)
        raise


def _restore_energies(model: nn.Module, metadata: Mapping[str, Any]) -> None:
    """Give a base the per-type shifts and scales it had when the adapter was trained, by upstream's modifier.

    Fine-tuning commonly starts with ``modify_PerTypeScaleShift``; so the adapter goes onto the model that
    the user has, before that change too.

    Args:
        model: GraphModel, changed in place.
        metadata: the adapter's.
    """
    from nequip.model import modify

    now, names = _energies(model), list(model.type_names)  # type: ignore[arg-type]
    changes = {}
    for key, values in now.items():
        wanted = metadata.get(key)
        if wanted and values and wanted != values and len(wanted) in (1, len(names)):
            per_type = dict(zip(names, wanted, strict=True)) if len(wanted) > 1 else wanted[0]
            changes[key.removeprefix("energy_")] = per_type
    if changes:
        try:
            modify(model, [{"modifier": "modify_PerTypeScaleShift", **changes}])
        except AssertionError as err:
            raise ValueError(
                f"model: NequIP's modifiers cannot be applied to it ({err}); a long path around a package has modules "
                "of two kinds: package that model (nequip-package build), or start from a checkpoint"
            ) from err
        _LOG.info("%s of the types set to those the adapter was trained with", " and ".join(changes))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_adapter(saved: AdapterFile, base: dict[str, Any], path: Path) -> None:
    """Refuse an adapter of another base.

    Args:
        saved: the adapter.
        base: :func:`base_metadata` of the model and its ``base_fingerprint``.
        path: for the message.

    Raises:
        ValueError: framework, types, cutoff or weights differ; what was expected and what was got.
    """
    theirs = saved.metadata
    if theirs.get("framework") != "nequip":
        kind, name = framework_of(saved), theirs.get("base_model")
        raise ValueError(
            f"adapter {path}: expected one of a NequIP-framework model, got one of "
            f"{f'a {kind} model' if kind == 'MACE' else 'another kind of model'}{f' ({name})' if name else ''}; "
            "adapters do not cross frameworks"
        )
    if theirs.get("long_path") and "long_path" not in base:
        raise ValueError(
            f"adapter {path}: its base has a long path; put the model into nequip_ext.AddLongPath with "
            f"{theirs['long_path']}"
        )
    for key, what in (("type_names", "the same types in the same order"), ("r_max", "the same cutoff (Å)")):
        if theirs.get(key) != base[key]:
            raise ValueError(
                f"adapter {path}: {key}: expected {theirs.get(key)}, got {base[key]}; an adapter needs {what}"
            )
    if theirs.get("base_fingerprint") != base["base_fingerprint"]:
        raise ValueError(
            f"adapter {path}: it was trained on another base model: expected fingerprint "
            f"{theirs.get('base_fingerprint')}, got {base['base_fingerprint']}; load {theirs.get('base_model')}"
        )
