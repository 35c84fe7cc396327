"""What an adapter of a NequIP-framework model says about its base, and whether it fits another."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from mace_lora.lora.adapter import AdapterFile

__all__ = ["base_metadata", "check_adapter"]


def base_metadata(model: nn.Module) -> dict[str, Any]:
    """Types, cutoff, energy shifts and versions of a GraphModel.

    Args:
        model: NequIP's GraphModel.
    """
    graph: Any = model
    metadata = dict(graph.metadata)
    shifts = {
        name: [round(float(x), 10) for x in value.reshape(-1)]
        for name, value in model.state_dict().items()
        if name.endswith("per_type_energy_scale_shift.shifts")
    }
    return {
        "framework": "nequip",
        "type_names": list(graph.type_names),
        "r_max": float(metadata["r_max"]),
        "model_dtype": metadata["model_dtype"],
        "energy_shifts": next(iter(shifts.values()), None),
        "units": "those of the training data (eV and Å in our recipes)",
        "versions": {p: _version(p) for p in ("nequip", "nequip-allegro", "e3nn", "torch", "equitune")},
    }


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
        raise ValueError(
            f"adapter {path}: it was made for a MACE model ({theirs.get('base_model')}), the model here is NequIP's; "
            "adapters do not cross frameworks"
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
