"""A MACE ``.model`` (a pickle) to safetensors + JSON and back."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from mace_lora.atomic import atomic_path

from .base_model import load_base, load_model, save_base

__all__ = ["convert_model", "save_model"]


def save_model(model: torch.nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a stock MACE ``.model`` atomically."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        torch.save(model, temporary)


def convert_model(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> list[Path]:
    """Convert in the direction that the target's suffix asks for, and verify the result.

    Args:
        source: a ``.model`` file, or a safetensors + JSON pair.
        target: ``X.model``, or ``X.safetensors`` (with ``X.json`` beside it).

    Returns:
        the files written.

    Raises:
        ValueError: another suffix, a model that cannot be stored without a pickle, or weights of
            the other e3nn sign convention that would change their meaning.
    """
    out = Path(target)
    model = load_model(source)
    if out.suffix == ".model":
        save_model(model, out)
        return [out]
    if out.suffix not in (".safetensors", ".json"):
        raise ValueError(f"target: expected a name ending in .model or .safetensors, got {out.name}")
    stem = out.with_suffix("")
    stem.parent.mkdir(parents=True, exist_ok=True)
    dtype = next(model.parameters()).dtype
    card = {"source": Path(source).name}
    save_base(model, stem, card)
    again, before = load_base(stem, dtype).state_dict(), model.state_dict()
    different = [k for k, v in before.items() if k not in again or not torch.equal(again[k].cpu(), v.cpu())]
    if different:
        for suffix in (".safetensors", ".json"):
            Path(f"{stem}{suffix}").unlink(missing_ok=True)
        raise ValueError(f"{source}: cannot be rebuilt exactly from its configuration (first: {different[:1]})")
    return [Path(f"{stem}.safetensors"), Path(f"{stem}.json")]
