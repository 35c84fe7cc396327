"""equitune's NequIP extension: imported by every ``import nequip``, hence light.

NequIP interns this package into packaged models, so nothing here may import peft, transformers
or hydra. What configs name (``_target_: nequip_ext.PaiNN``) is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "AddLongPath": "nequip_ext.multiscale.around",
    "AlignEnergies": "nequip_ext.energies",
    "Autotuned": "nequip_ext.autotune.builder",
    "GradualUnfreezing": "nequip_ext.autotune.schedule",
    "LayerwiseRates": "nequip_ext.autotune.schedule",
    "LoRA": "nequip_ext.lora.builder",
    "MultiScaleNequIP": "nequip_ext.multiscale.model",
    "MuonParamGroups": "nequip_ext.lora.param_groups",
    "PaiNN": "nequip_ext.painn.model",
    "SaveAdapter": "nequip_ext.lora.callback",
    "TrainedParams": "nequip_ext.lora.param_groups",
}

__all__ = [
    "AddLongPath", "AlignEnergies", "Autotuned", "GradualUnfreezing", "LayerwiseRates", "LoRA", "MultiScaleNequIP",
    "MuonParamGroups", "PaiNN", "SaveAdapter", "TrainedParams",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
