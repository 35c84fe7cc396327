"""Private functions used while models are built; never part of a package."""

from __future__ import annotations

from nequip.model.energy_modules import _append_energy_modules as append_energy_modules
from nequip.model.modify_utils import _ONLY_APPLY_PERSISTENT
from nequip.scripts._workflow_utils import get_workflow_state

__all__ = ["append_energy_modules", "is_loading", "is_packaging"]


def is_packaging() -> bool:
    """Whether ``nequip-package`` is building the model."""
    return get_workflow_state() == "package"


def is_loading() -> bool:
    """Whether the model is being built for a checkpoint, whose weights it will get."""
    return bool(_ONLY_APPLY_PERSISTENT.get())
