"""What ``--model=MultiScaleMACE`` refuses."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from mace_lora.mace_plugin.protocol import Run, SettingsError

__all__ = [
    "MODEL",
    "Default",
    "check_against_multiscale",
    "check_cutoffs",
    "check_periodic",
    "check_restart",
    "check_short",
    "read_foundation",
    "refuse_conflicts",
]

MODEL = "MultiScaleMACE"


class Default(float):
    """A flag's default, to be told from the same number on the command line."""


def check_short(given: float | None, foundation: float) -> None:
    """The short cutoff is that of the foundation's (short) path."""
    if given is not None and not math.isclose(given, foundation, abs_tol=1e-6):
        raise SettingsError(
            f"--r_short: expected {foundation:g} Å, the foundation's cutoff, got {given:g}; leave it out"
        )


def check_cutoffs(short: float, long: float) -> None:
    """Two lengths, the second larger."""
    if not (math.isfinite(short) and short > 0):
        raise SettingsError(f"--r_short: expected a length > 0 in Å, got {short:g}")
    _check_long(long)
    if short >= long:
        raise SettingsError(
            f"--r_max: expected the long cutoff, larger than r_short ({short:g} Å), got {long:g} Å; about twice "
            "r_short is usual"
        )


def _check_long(long: float) -> None:
    if not (math.isfinite(long) and long > 0):
        raise SettingsError(f"--r_max: expected the long cutoff, a finite length > 0 in Å, got {long:g}")


def refuse_conflicts(args: argparse.Namespace) -> None:
    """Options that upstream or we do not support for this model."""
    _check_long(args.r_max)
    if args.enable_cueq or args.enable_oeq or args.only_cueq:
        raise SettingsError(
            f"--enable_cueq/--enable_oeq/--only_cueq: upstream converts MACE and ScaleShiftMACE only, not {MODEL}; "
            "leave the flag out"
        )
    if args.embedding_specs is not None:
        raise SettingsError(f"--embedding_specs: {MODEL} has no extra embeddings; leave the flag out")
    if args.pme_smearing is not None and args.long_range != "pme":
        raise SettingsError("--pme_smearing: has no effect without --long_range=pme; add it, or drop the flag")
    if args.long_range == "pme":
        from .pme import pme_calculator

        try:
            pme_calculator(args.r_max, args.r_max / 6 if args.pme_smearing is None else args.pme_smearing)
        except ValueError as err:
            raise SettingsError(f"--long_range=pme: {err}") from err
    if args.lora and args.lora_backend == "mace":
        raise SettingsError(f"--lora_backend=mace: it knows stock models only, not {MODEL}; leave it out")
    if args.multiscale_freeze_short and args.foundation_model is None:
        raise SettingsError("--multiscale_freeze_short: it would freeze random weights; give --foundation_model")
    if args.multiscale_freeze_short and args.lora:
        raise SettingsError("--multiscale_freeze_short: --lora adapts the short path; drop one of the two")
    if args.multiscale_freeze_short and args.multiscale_coupling == "fused":
        raise SettingsError("--multiscale_freeze_short: fused readouts belong to both paths; use coupling sum")
    if args.freeze:
        raise SettingsError(f"--freeze {args.freeze}: use --multiscale_freeze_short to train the long path only")


def read_foundation(args: argparse.Namespace) -> Any:
    """The foundation model where it is a file, so that mistakes show before data are read; None otherwise."""
    if args.foundation_model is None or not Path(args.foundation_model).is_file():
        return None
    return torch.load(args.foundation_model, map_location="cpu", weights_only=False)  # as upstream does next


def check_against_multiscale(model: Any, given: list[str], args: argparse.Namespace) -> None:
    """A multiscale foundation brings its own sizes, and one head."""
    if len(model.heads) > 1:
        raise SettingsError(
            f"--foundation_model: it is a {MODEL} with the heads {', '.join(model.heads)}; upstream takes heads apart "
            "of stock models only; train a model with one head"
        )
    if model.fused and args.multiheads_finetuning and args.pt_train_file is not None:
        raise SettingsError(
            "--multiheads_finetuning: the foundation's coupling is fused, and heads are added to a foundation with "
            "coupling sum only; leave the flag out"
        )
    wrong = [f for f in given if f not in ("multiscale_freeze_short", "r_short")]
    if wrong:
        raise SettingsError(f"--{wrong[0]}: the foundation model is a {MODEL} and brings its own; leave the flag out")
    long = float(model.r_max)
    if not isinstance(args.r_max, Default) and not math.isclose(args.r_max, long, abs_tol=1e-4):
        raise SettingsError(
            f"--r_max: expected {long:g} Å, the foundation's long cutoff, got {args.r_max:g}; leave it out"
        )
    if args.multiscale_freeze_short and model.fused:
        raise SettingsError(
            "--multiscale_freeze_short: the foundation's coupling is fused, and fused readouts belong to both paths; "
            "leave the flag out, or give a foundation with coupling sum"
        )


def check_periodic(run: Run) -> None:
    """All frames, as far as upstream has read them by now: validation and test frames may still be on disk."""
    parts: dict[str, Any] = {"training": run.train_dataset}
    for head in run.state.get("head_configs", ()):
        found = getattr(head, "collections", None)
        parts[f"validation ({head.head_name})"] = getattr(found, "valid", None) or ()
        parts |= {f"test ({name})": frames for name, frames in getattr(found, "tests", None) or ()}
    for part, frames in parts.items():
        for index, frame in enumerate(frames):
            if frame.pbc is None or not bool(torch.as_tensor(frame.pbc).all()):
                raise SettingsError(
                    f"--long_range=pme: expected frames that are periodic in all directions, got {part} frame {index} "
                    "without; leave the flag out, or give periodic frames"
                )


def check_restart(run: Run) -> None:
    """The checkpoint's cutoffs and sizes are the command's; its graphs would be cut short otherwise."""
    saved, now = run.state.get("checkpoint_plugins", {}).get("multiscale", {}), run.state["multiscale"]
    changed = [f"--{k}: {saved[k]} before, {v} now" for k, v in now.items() if k in saved and saved[k] != v]
    if changed:
        raise SettingsError(
            f"--restart_latest: the multiscale flags differ from the checkpoint's ({'; '.join(changed)}); give the "
            "same flags as before, or another --name"
        )
