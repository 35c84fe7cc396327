"""Private functions used while models are built; never part of a package."""

from __future__ import annotations

from typing import Any

from nequip.model.energy_modules import _append_energy_modules as append_energy_modules
from nequip.model.modify_utils import _ONLY_APPLY_PERSISTENT
from nequip.scripts._workflow_utils import get_workflow_state

__all__ = ["append_energy_modules", "energy_network", "is_loading", "is_packaging"]


def energy_network(model: Any) -> Any:
    """What a GraphModel takes derivatives of: the modules that end in atomic and total energies.

    Raises:
        ValueError: the model is built otherwise.
    """
    network = getattr(getattr(model, "model", None), "func", None)
    if network is None or "total_energy" not in getattr(network, "irreps_out", {}):
        raise ValueError(
            "model: expected a NequIP-framework model whose derivatives are those of an energy network "
            f"(ForceStressOutput), got {type(getattr(model, 'model', model)).__name__}"
        )
    return network


def is_packaging() -> bool:
    """Whether ``nequip-package`` is building the model."""
    return get_workflow_state() == "package"


def is_loading() -> bool:
    """Whether the model is being built for a checkpoint, whose weights it will get."""
    return bool(_ONLY_APPLY_PERSISTENT.get())
