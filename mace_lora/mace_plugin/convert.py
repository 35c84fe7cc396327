"""A MACE ``.model`` (a pickle) to safetensors + JSON and back."""

from __future__ import annotations

import os
from pathlib import Path

import ase
import numpy as np
import torch

from mace_lora.atomic import atomic_path

from .base_model import elements, load_base, load_model, save_base

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
        _verify(model, load_model(out), source)
        return [out]
    if out.suffix not in (".safetensors", ".json"):
        raise ValueError(f"target: expected a name ending in .model or .safetensors, got {out.name}")
    stem = out.with_suffix("")
    stem.parent.mkdir(parents=True, exist_ok=True)
    trial = stem.with_name(f".{stem.name}-part")  # a pair that is there stays until the new one is verified
    try:
        save_base(model, trial, {"source": Path(source).name})
        _verify(model, load_base(trial, next(model.parameters()).dtype), source)
        for suffix in (".safetensors", ".json"):
            Path(f"{trial}{suffix}").replace(f"{stem}{suffix}")
    finally:
        for suffix in (".safetensors", ".json"):
            Path(f"{trial}{suffix}").unlink(missing_ok=True)
    return [Path(f"{stem}.safetensors"), Path(f"{stem}.json")]


def _verify(model: torch.nn.Module, again: torch.nn.Module, source: str | os.PathLike[str]) -> None:
    """Equal weights and buffers, and equal predictions: what is an attribute only is not in the former."""
    before, after = model.state_dict(), again.state_dict()
    different = [k for k, v in before.items() if k not in after or not torch.equal(after[k].cpu(), v.cpu())]
    if different:
        raise ValueError(f"{source}: cannot be rebuilt exactly from its configuration (first: {different[0]})")
    one, two = (_prediction(m) for m in (model, again))
    if not all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(one, two, strict=True)):
        change = max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True))
        raise ValueError(
            f"{source}: the rebuilt model has equal weights and other predictions (by {change:.3g} eV or eV/Å on a "
            "probe): something that its configuration does not tell was changed; keep the file as it is"
        )


def _prediction(model: torch.nn.Module) -> list[torch.Tensor]:
    """Energy and forces of a few of the model's atoms, some 1.5 Å apart."""
    from mace_lora.lora.calculator import graph_of

    numbers = elements(model)[:8]
    shift = np.random.default_rng(0).uniform(-0.2, 0.2, (len(numbers) + 1, 3))
    line = np.array([[1.5 * i, 0.7 * (i % 2), 0.0] for i in range(len(numbers) + 1)])
    atoms = ase.Atoms([*numbers, numbers[0]], positions=line + shift)
    head = str((getattr(model, "heads", None) or ["Default"])[0])
    was_training = model.training
    model.eval()
    try:
        out = model(graph_of(model, [atoms], head), training=False)
    finally:
        model.train(was_training)
    return [out["energy"].detach().cpu(), out["forces"].detach().cpu()]
