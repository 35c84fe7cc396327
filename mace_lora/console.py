"""What the commands share: the terminal, common options, loading of a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

__all__ = ["MODEL_HELP", "Dtype", "console", "is_nequip_file", "model_from", "print_json", "require_device"]

Dtype = Literal["float32", "float64"]
MODEL_HELP = (
    "MACE .model or NequIP .nequip.zip/.ckpt (these run code when read: only from sources you trust), "
    "safetensors + JSON base, or 'embedded'"
)
# with --json nothing else goes to standard output, not even what MACE prints when it is imported
_json_only = "--json" in sys.argv[1:] and Path(sys.argv[0]).stem == "equitune"
if _json_only:
    sys.stdout = sys.stderr
console = Console(width=None if sys.stdout.isatty() else 120)


def print_json(content: Any) -> None:
    """What ``--json`` asks for."""
    print(json.dumps(content, indent=1, default=str), file=sys.__stdout__ if _json_only else sys.stdout)


def is_nequip_file(path: Path) -> bool:
    """Whether a path is meant as a NequIP package or checkpoint.

    Raises:
        ValueError: a compiled model, whose weights nobody can read.
    """
    if str(path).endswith((".nequip.pt2", ".nequip.pth", ".pt2")):
        raise ValueError(f"{path}: a compiled model cannot be read; give the checkpoint or package it was made from")
    return str(path).endswith((".nequip.zip", ".ckpt"))


def model_from(source: Path, adapter: Path | None = None) -> Any:
    """A MACE or NequIP model, with an adapter merged into it if one is given."""
    from mace_lora.lora.adapter import read_adapter
    from mace_lora.lora.inject import merge_lora
    from mace_lora.lora.loading import load_adapter

    if adapter is not None:
        read_adapter(adapter)  # before the slow part
    if is_nequip_file(source):
        from nequip_ext.lora.saved import load_nequip

        model: Any = load_nequip(source)
    else:
        from mace_lora.mace_plugin.base_model import load_model

        model = load_model(source)
    return model if adapter is None else merge_lora(load_adapter(model, adapter))


def require_device(device: str, name: str) -> str:
    """A device that torch can compute on.

    Args:
        device: cpu, cuda, cuda:1, ….
        name: of the option, for the message.

    Raises:
        ValueError: torch cannot; why.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as err:  # the latter from builds without CUDA
        why = str(err).partition("\n")[0]
        raise ValueError(f"{name}: expected cpu, or cuda on a machine with a GPU, got {device!r} ({why})") from err
    return device
