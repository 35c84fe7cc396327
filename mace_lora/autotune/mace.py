"""``mace_run_train --autotune_train_file``: pre-training on classical labels and fine-tuning in one command.

Stage one is the same command in a process of its own, with the classical file, as a run named ``NAME_classical``. Its
model is the foundation of stage two, which is this command as it stands: weights are handed over; optimiser, EMA,
energy references and scale start anew (T-PaiNN, arXiv 2603.24752).
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
import torch
from torch import nn

from mace_lora.lora.mace_args import refuse_unused
from mace_lora.mace_plugin import checkpoints, labels
from mace_lora.mace_plugin.protocol import Run, SettingsError, TrainPlugin

from .classical import STAGE, become_classical, classical_stage, multiscale_sizes
from .handover import align, refit_references
from .schedule import Unfreezing, layerwise

__all__ = ["AutotunePlugin"]

_OPTIONS = (
    "autotune_valid_file", "autotune_epochs", "autotune_lr", "autotune_E0s", "autotune_rescale", "autotune_lr_decay",
    "autotune_unfreeze", "autotune_refit_E0s",
)  # fmt: skip


class AutotunePlugin(TrainPlugin):
    """Both stages of classical-to-quantum transfer."""

    name = "autotune"
    flag, leaves = "--autotune_train_file", "a classical pre-training"
    order = -20  # decides on the foundation model, which the others look at
    model_order = -5  # aligns the model when it is complete, before adapters are put on

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add ``--autotune_*``."""
        from mace.tools.arg_parser import str2bool

        group = parser.add_argument_group(
            "autotuning (equitune)",
            "pre-train on many classical labels, then fine-tune on --train_file, in one command",
        )
        group.add_argument("--autotune_train_file", help="frames with classical labels, under the same keys")
        group.add_argument(
            "--autotune_valid_file", help="classical validation frames (default: a twentieth of the others)"
        )
        group.add_argument("--autotune_epochs", type=int, help="of the classical stage (default --max_num_epochs)")
        group.add_argument("--autotune_lr", type=float, help="learning rate of the classical stage (default 0.01)")
        group.add_argument("--autotune_E0s", help="energy references of the classical labels (default average)")
        group.add_argument(
            "--autotune_rescale", type=str2bool,
            help="multiply the energy scale by the ratio of quantum to classical rms forces (default True)",
        )  # fmt: skip

        group.add_argument(
            "--autotune_refit_E0s", type=str2bool,
            help="refit the energy references to the training frames at every best epoch of stage two, where they are "
            "no isolated atoms (default True; with --lora see --lora_refit_E0s)",
        )  # fmt: skip
        group.add_argument(
            "--autotune_lr_decay", type=float,
            help="factor of the learning rate in stage two from a block to the one below it, readouts on top "
            "(default 1: all the same)",
        )  # fmt: skip
        group.add_argument(
            "--autotune_unfreeze",
            type=int,
            help="epochs of stage two after which one more block learns, from the readouts down (default: all at once)",
        )

    def enabled(self, args: argparse.Namespace) -> bool:
        return args.autotune_train_file is not None

    def check_args(self, run: Run) -> None:
        args = run.args
        given = [f for f in _OPTIONS if getattr(args, f) is not None]
        if not self.enabled(args):
            if given:
                raise SettingsError(
                    f"--{given[0]}: has no effect without --autotune_train_file; add it, or drop the flag"
                )
            return
        if os.environ.get(STAGE) == "classical":
            run.state["tag"] = run.tag  # upstream has named its files already
            become_classical(args)
            return
        _refuse(args)
        few = check_levels(Path(args.autotune_train_file), Path(args.train_file), args)
        run.state["autotune"] = True
        run.state["autotune_isolated"] = any(a.info.get("config_type") == "IsolatedAtom" for a in few)
        if args.E0s is None and not run.state["autotune_isolated"]:
            raise SettingsError(
                "--E0s: expected the energy references of the quantum labels: average, estimated, isolated-atom "
                "energies or IsolatedAtom frames in --train_file"
            )
        refuse_unused(args)  # before hours of stage one
        checkpoints.check_restart(run)
        _check_schedule(run)
        model = classical_stage(args)
        args.foundation_model = str(model)
        args.multiheads_finetuning = bool(args.multiheads_finetuning and args.pt_train_file)
        for name in multiscale_sizes(args):
            setattr(args, name, None)  # the classical model brings them

    def after_model(self, run: Run, model: nn.Module) -> nn.Module:
        if run.state.get("autotune"):
            model = model.to(torch.device(run.args.device))  # upstream leaves buffers behind on the CPU
            fitted = run.args.E0s in ("average", "estimated") and not run.state["autotune_isolated"]
            # an adapter is put on the classical model as its file has it, so the scale must stay
            run.state["autotune_refit"] = fitted and not run.args.lora and run.args.autotune_refit_E0s
            align(run, model, refit=fitted, rescale=run.args.autotune_rescale and not run.args.lora)
        return model

    def change_groups(self, run: Run, model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        decay = run.args.autotune_lr_decay
        if not run.state.get("autotune") or decay is None:
            return groups
        groups = layerwise(model, groups, run.args.lr, decay)
        rates = ", ".join(f"{rate:.3g}" for rate in sorted({g["lr"] for g in groups}, reverse=True))
        logging.info("equitune: autotune: learning rates from the readouts down %s", rates)
        return groups

    def before_epoch(self, run: Run, model: nn.Module, epoch: int) -> None:
        if not run.state.get("autotune") or run.args.autotune_unfreeze is None:
            return
        schedule = run.state.setdefault("unfreezing", None) or Unfreezing(model, run.args.autotune_unfreeze)
        run.state["unfreezing"] = schedule
        change = schedule.start(epoch)
        if change:
            logging.info("equitune: autotune: epoch %d: %s", epoch, change)

    def on_checkpoint(self, run: Run, model: nn.Module, epoch: int, stage_two: bool) -> dict[str, Any]:
        if run.state.get("autotune_refit"):
            refit_references(run, model)
        return _schedule(run.args)


def _schedule(args: argparse.Namespace) -> dict[str, Any]:
    return {"autotune_lr_decay": args.autotune_lr_decay, "autotune_unfreeze": args.autotune_unfreeze}


def _check_schedule(run: Run) -> None:
    """A restart has the parameter groups of its checkpoint."""
    saved = run.state.get("checkpoint_plugins", {}).get("autotune") or {}
    for name, value in _schedule(run.args).items():
        if name in saved and saved[name] != value:
            raise SettingsError(
                f"--{name}: expected {saved[name]} as in the checkpoint that is continued, got {value}; give it again, "
                "or choose another --name"
            )


def _refuse(args: argparse.Namespace) -> None:
    """Settings that contradict two stages."""
    if args.foundation_model is not None:
        raise SettingsError(
            "--foundation_model: autotuning makes its own from --autotune_train_file; drop one of the two flags"
        )
    if args.distributed:
        raise SettingsError("--distributed: not with --autotune_train_file; run the two stages one after the other")
    if args.heads is not None:
        raise SettingsError("--heads: not with --autotune_train_file; run the two stages one after the other")
    if not isinstance(args.train_file, str):
        raise SettingsError(f"--train_file: expected one file with --autotune_train_file, got {args.train_file!r}")
    for flag in ("autotune_train_file", "autotune_valid_file"):
        value = getattr(args, flag)
        if value is not None and not Path(value).is_file():
            raise SettingsError(f"--{flag}: no file {value}")
    for flag, least in (("autotune_epochs", 1), ("autotune_lr", 0.0)):
        value = getattr(args, flag)
        if value is not None and value <= (least - 1 if flag == "autotune_epochs" else 0.0):
            raise SettingsError(f"--{flag}: expected more than 0, got {value}")
    if args.autotune_lr_decay is not None and not 0 < args.autotune_lr_decay <= 1:
        raise SettingsError(f"--autotune_lr_decay: expected a factor above 0 and up to 1, got {args.autotune_lr_decay}")
    if args.autotune_unfreeze is not None and args.autotune_unfreeze < 1:
        raise SettingsError(f"--autotune_unfreeze: expected at least 1 epoch, got {args.autotune_unfreeze}")
    if args.autotune_unfreeze is not None and args.lbfgs:
        raise SettingsError("--autotune_unfreeze: not with --lbfgs, which takes all weights as one")
    for name in ("autotune_rescale", "autotune_refit_E0s"):
        if getattr(args, name) is None:
            setattr(args, name, True)


def check_levels(classical: Path, quantum: Path, args: argparse.Namespace) -> list[ase.Atoms]:
    """The two files must be what they are said to be.

    Returns:
        the quantum frames.

    Raises:
        SettingsError: the quantum file has elements that the classical one lacks, or the labels of equal frames are
            equal, so that one of the files is the other.
    """
    few, many = ase.io.read(quantum, ":"), ase.io.read(classical, ":")
    missing = sorted(
        {s for a in few for s in a.get_chemical_symbols()} - {s for a in many for s in a.get_chemical_symbols()}
    )
    if missing:
        raise SettingsError(
            f"--autotune_train_file: {classical} has no {', '.join(missing)}, which --train_file has; add classical "
            "frames with these elements"
        )
    places = {_place(a): a for a in many}
    for index, atoms in enumerate(few):
        twin = places.get(_place(atoms))
        pair = [labels.label_of(a, "energy", args.energy_key) for a in (atoms, twin)] if twin is not None else []
        if pair and None not in pair and np.isclose(float(pair[0]), float(pair[1]), rtol=0, atol=1e-6):
            raise SettingsError(
                f"--train_file: frame {index} of {quantum} has the same geometry and the same energy "
                f"({float(pair[0]):.6f} eV) as one of {classical}: classical labels were given as quantum ones, or the "
                "files were mixed up"
            )
    return few


def _place(atoms: ase.Atoms) -> bytes:
    return atoms.numbers.tobytes() + np.round(atoms.positions, 5).tobytes()
