"""``mace_run_train --autotune_train_file``: pre-training on classical labels and fine-tuning in one command.

Stage one is the same command in a process of its own, with the classical file, as a run named ``NAME_classical``. Its
model is the foundation of stage two, which is this command as it stands: weights are handed over; optimiser, EMA,
energy references and scale start anew (T-PaiNN, arXiv 2603.24752).
"""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

import torch
from torch import nn

from mace_lora.atomic import content_digest
from mace_lora.mace_plugin import checkpoints
from mace_lora.mace_plugin.protocol import Run, SettingsError, TrainPlugin

from .checks import check_data, check_settings
from .classical import STAGE, become_classical, classical_model, classical_stage, multiscale_sizes
from .handover import align, refit_references
from .schedule import Unfreezing, layerwise

__all__ = ["AutotunePlugin"]

_OPTIONS = (
    "autotune_valid_file", "autotune_epochs", "autotune_lr", "autotune_E0s", "autotune_rescale", "autotune_lr_decay",
    "autotune_unfreeze", "autotune_refit_E0s", "autotune_offsets",
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
            "--autotune_offsets", choices=("element", "composition"),
            help="what the classical stage need not learn: an energy of every element (--autotune_E0s), or the mean "
            "energy of every composition, for force fields and many molecules (default element)",
        )  # fmt: skip
        group.add_argument(
            "--autotune_rescale", type=str2bool,
            help="multiply the energy scale by the ratio of quantum to classical rms forces (default True)",
        )  # fmt: skip

        group.add_argument(
            "--autotune_refit_E0s", type=str2bool,
            help="refit the energy references to the training frames before every validation of stage two, where they "
            "are no isolated atoms (default True; with --lora see --lora_refit_E0s)",
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
        check_settings(args)  # everything that is known at once is said before hours of stage one
        run.state["autotune"], run.state["autotune_isolated"] = True, check_data(args)
        checkpoints.check_restart(run)
        _check_schedule(run)
        saved = run.state.get("checkpoint_plugins", {}).get("autotune") or {}
        if "classical" in saved and not classical_model(args).is_file():
            raise SettingsError(
                f"--restart_latest: {run.state['checkpoint']} started from a classical model that is gone: expected "
                f"{classical_model(args)}; put it back, or choose another --name or --work_dir"
            )
        model = classical_stage(args)
        digest = run.state["autotune_classical"] = content_digest(model)
        if saved.get("classical", digest) != digest:
            raise SettingsError(
                f"--restart_latest: {run.state['checkpoint']} started from another classical model than {model} is "
                "now; remove the checkpoints of stage two to start it anew, or choose another --name or --work_dir"
            )
        args.foundation_model = str(model)
        args.multiheads_finetuning = bool(args.multiheads_finetuning and args.pt_train_file)
        for name in multiscale_sizes(args):
            setattr(args, name, None)  # the classical model brings them
        # the shift of this model alone is the mean interaction energy of the training frames, upstream's own choice
        run.state["autotune_shift"] = args.model == "ScaleShiftMACE" and not args.lora

    def after_model(self, run: Run, model: nn.Module) -> nn.Module:
        if run.state.get("autotune"):
            model = model.to(torch.device(run.args.device))  # upstream leaves buffers behind on the CPU
            known = str(run.args.E0s).lower() in ("average", "estimated")
            fitted = known and not run.state["autotune_isolated"]
            # an adapter is put on the classical model as its file has it, so scale and shift must stay
            run.state["autotune_refit"] = fitted and not run.args.lora and run.args.autotune_refit_E0s is not False
            rescale = run.args.autotune_rescale is not False and not run.args.lora
            align(run, model, refit=fitted, rescale=rescale, move_shift=run.state["autotune_shift"] and not fitted)
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

    def before_validation(self, run: Run, model: nn.Module) -> None:
        if run.state.get("autotune_refit"):
            refit_references(run, model)

    def on_checkpoint(self, run: Run, model: nn.Module, epoch: int, stage_two: bool) -> dict[str, Any]:
        return _schedule(run.args) | {"classical": run.state.get("autotune_classical")}


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
