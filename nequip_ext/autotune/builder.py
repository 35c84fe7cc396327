"""``_target_: nequip_ext.Autotuned``: a model that takes over the weights of a classical stage."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nequip_ext.lora.builder import build_model, with_keys
from nequip_ext.upstream.build import is_loading

__all__ = ["Autotuned"]

_LOG = logging.getLogger("equitune")
_LEVEL = ("shifts", "scales")  # of PerTypeScaleShift
_NORMALISATION = "norm_const"  # files leave it out: it is always that of the config


def Autotuned(
    model: Mapping[str, Any], checkpoint: str | None = None, keep: Sequence[str] = ("shifts",),
    model_dtype: str | None = None, compile_mode: str | None = None,
) -> nn.Module:  # fmt: skip
    """The inner model, with the weights of a checkpoint of the same architecture where one is given.

    Energy shifts of the types stay those of the config: they belong to the level of theory of the data (T-PaiNN,
    arXiv 2603.24752). The weights belong to the scales they were trained with; ``AlignEnergies`` with ``rescale``
    compares both levels on the same frames.

    Args:
        model: config of the inner model, as in stage one.
        checkpoint: best.ckpt of stage one; None in stage one itself.
        keep: what stays the config's: shifts, scales; the rest is taken over.
        model_dtype, compile_mode: for the inner model, as if written there.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: its types, cutoff or architecture are others.
    """
    if isinstance(keep, str) or not set(keep) <= set(_LEVEL):
        raise ValueError(f"keep: expected a list of {' and '.join(_LEVEL)}, got {keep!r}")
    built = build_model(with_keys(model, model_dtype, compile_mode))
    if checkpoint is None or is_loading():
        return built
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"checkpoint: no file {checkpoint}; run the classical stage first")
    from nequip.model.saved_models import load_saved_model

    source: Any = load_saved_model(checkpoint)
    for what, mine, theirs in (
        ("type_names", list(built.type_names), list(source.type_names)),  # type: ignore[arg-type]
        ("r_max", float(built.metadata["r_max"]), float(source.metadata["r_max"])),  # type: ignore[index]
    ):
        if mine != theirs:
            raise ValueError(f"checkpoint: {what} of the classical stage: expected {mine}, got {theirs}")
    state, target = _tensors(source), _tensors(built)
    wrong = sorted({*state} ^ {*target}) + [k for k in state if k in target and state[k].shape != target[k].shape]
    if wrong:
        raise ValueError(
            f"checkpoint: it is of another architecture than 'model': {', '.join(wrong[:4])} differ(s); keep the keys "
            "of 'model' as they were in the classical stage"
        )
    for name in (n for n in state if n.endswith(_NORMALISATION)):
        if not torch.allclose(state[name].to(target[name]), target[name], rtol=1e-5):
            raise ValueError(
                "avg_num_neighbors: expected the value of the classical stage, since the weights belong to it "
                f"({name} is {target[name].tolist()}, was {state[name].tolist()}); equitune nequip-autotune sets it"
            )
    kept = [k for k in target if k.rpartition(".")[2] in keep]
    with torch.no_grad():
        for name, value in target.items():
            if name not in kept:
                value.copy_(state[name])
    _LOG.info(
        "autotune: %d tensors taken over from %s; kept of this level of theory: %s", len(target) - len(kept),
        checkpoint, ", ".join(kept) or "nothing",
    )  # fmt: skip
    return built


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, also those that files leave out."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
