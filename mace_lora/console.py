"""What the commands share: the terminal, common options, loading of a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

__all__ = ["MODEL_HELP", "Dtype", "console", "model_from"]

Dtype = Literal["float32", "float64"]
MODEL_HELP = ".model (a pickle: only from sources you trust), safetensors + JSON base, or 'embedded'"
console = Console(width=None if sys.stdout.isatty() else 120)


def model_from(source: Path, adapter: Path | None = None) -> Any:
    """A MACE model, with an adapter merged into it if one is given."""
    from mace_lora.lora.adapter import load_adapter, read_adapter
    from mace_lora.lora.inject import merge_lora
    from mace_lora.mace_plugin.base_model import load_model

    if adapter is not None:
        read_adapter(adapter)  # before the slow part
    model = load_model(source)
    return model if adapter is None else merge_lora(load_adapter(model, adapter))
