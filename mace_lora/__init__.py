"""equitune: quantum accuracy from few quantum labels for MACE and NequIP.

Importing this package is cheap: names are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "AdapterLayer": "lora.layers",
    "LoraConfig": "lora.config",
    "parse_rank_pattern": "lora.config",
    "apply_lora": "lora.inject",
    "merge_lora": "lora.inject",
    "set_adapter": "lora.inject",
    "disabled_adapters": "lora.inject",
    "delete_adapter": "lora.inject",
    "merge_adapters": "lora.inject",
    "unmerge_adapters": "lora.inject",
    "combine_adapters": "lora.inject",
    "adapter_names": "lora.inject",
    "coverage": "lora.coverage",
    "save_adapter": "lora.saving",
    "load_adapter": "lora.loading",
    "read_adapter": "lora.adapter",
    "fingerprint": "lora.fingerprint",
    "load_calculator": "lora.calculator",
    "Committee": "lora.committee",
    "committee_predict": "lora.committee",
    "load_committee": "lora.committee",
    "register_peft": "lora.peft_bridge",
    "embedded_base": "mace_plugin.base_model",
    "prepare_base": "mace_plugin.base_model",
    "embedded_dft_path": "embedded",
}
__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'mace_lora' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mace_lora.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
