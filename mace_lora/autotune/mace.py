"""``mace_run_train --autotune_train_file``: pre-training on classical labels and fine-tuning in one command.

Stage one is the same command in a process of its own, with the classical file, as a run named ``NAME_classical``. Its
model is the foundation of stage two, which is this command as it stands: weights are handed over; optimiser, EMA,
energy references and scale start anew (T-PaiNN, arXiv 2603.24752).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
import torch
from torch import nn

from mace_lora.atomic import write_text
from mace_lora.lora.mace_args import refuse_unused
from mace_lora.mace_plugin import checkpoints, labels
from mace_lora.mace_plugin.protocol import Run, SettingsError, TrainPlugin

from .handover import align

__all__ = ["AutotunePlugin"]

STAGE = "EQUITUNE_AUTOTUNE_STAGE"
_OPTIONS = ("autotune_valid_file", "autotune_epochs", "autotune_lr", "autotune_E0s", "autotune_rescale")
# of the quantum stage alone: the classical stage is a plain training of the same architecture
_QUANTUM_ONLY = {
    "lora": False, "freeze": None, "test_file": None, "multiheads_finetuning": False, "swa": False,
    "multiscale_freeze_short": None, "foundation_model_elements": False, "eval_interval": None,
    "start_swa": None,
}  # fmt: skip


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
            _become_classical(args)
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
        model = _classical_stage(args)
        args.foundation_model = str(model)
        args.multiheads_finetuning = bool(args.multiheads_finetuning and args.pt_train_file)
        for name in _multiscale_sizes(args):
            setattr(args, name, None)  # the classical model brings them

    def after_model(self, run: Run, model: nn.Module) -> nn.Module:
        if run.state.get("autotune"):
            model = model.to(torch.device(run.args.device))  # upstream leaves buffers behind on the CPU
            fitted = run.args.E0s in ("average", "estimated") and not run.state["autotune_isolated"]
            # an adapter is put on the classical model as its file has it, so the scale must stay
            align(run, model, refit=fitted, rescale=run.args.autotune_rescale and not run.args.lora)
        return model


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
    if args.autotune_rescale is None:
        args.autotune_rescale = True


def _become_classical(args: argparse.Namespace) -> None:
    """Change the arguments of this process, which runs stage one, to those of the classical training."""
    args.train_file = args.autotune_train_file
    args.valid_file = args.autotune_valid_file
    args.valid_fraction = 0.05
    args.name = f"{args.name}_classical"
    for place in ("checkpoints_dir", "results_dir", "log_dir"):  # upstream has named their files already
        setattr(args, place, str(Path(getattr(args, place)) / "classical"))
    args.max_num_epochs = args.autotune_epochs or args.max_num_epochs
    args.lr = 0.01 if args.autotune_lr is None else args.autotune_lr
    args.E0s = args.autotune_E0s or "average"
    args.restart_latest = True
    for name, value in _QUANTUM_ONLY.items():
        if hasattr(args, name):
            setattr(args, name, value)
    args.eval_interval = max(1, args.max_num_epochs // 50)
    for name in vars(args):
        if name.startswith("lora_") and name not in ("lora_backend",):
            setattr(args, name, None)


def _classical_stage(args: argparse.Namespace) -> Path:
    """Run stage one unless its model is there; returns the model's file."""
    model = Path(args.model_dir) / f"{args.name}_classical.model"
    record = Path(args.checkpoints_dir) / f"{args.name}_classical.json"
    wanted = _fingerprint(args)
    if record.is_file() and json.loads(record.read_text()) != wanted:
        raise SettingsError(
            f"--name {args.name}: its classical stage was made with other data or settings ({record}); choose another "
            "--name or --work_dir, or remove it"
        )
    if model.is_file() and record.is_file():
        _say(f"stage one is there: {model}")
        return model
    record.parent.mkdir(parents=True, exist_ok=True)
    write_text(record, json.dumps(wanted) + "\n")
    _say(f"stage one: training on the classical labels of {args.autotune_train_file}")
    program = [sys.executable, "-c", "from mace_lora.cli import main; main()", "run", "mace_run_train"]
    done = subprocess.run([*program, *sys.argv[1:]], env=os.environ | {STAGE: "classical"}, check=False)
    if done.returncode or not model.is_file():
        raise SettingsError(
            "--autotune_train_file: the classical stage failed (its messages are above); the same command continues it"
        )
    _say("stage two: fine-tuning on the quantum labels")
    return model


def _say(text: str) -> None:
    print(f"equitune: autotune: {text}", flush=True)  # upstream's log is not open yet


def _fingerprint(args: argparse.Namespace) -> dict[str, Any]:
    """What stage one depends on."""
    with Path(args.autotune_train_file).open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    shape = (
        "model",
        "hidden_irreps",
        "r_max",
        "num_interactions",
        "correlation",
        "max_ell",
        "num_radial_basis",
        "seed",
    )
    more = (
        "loss", "energy_weight", "forces_weight", "energy_key", "forces_key", "batch_size", "radial_MLP", "MLP_irreps",
        "interaction", "interaction_first", "num_cutoff_basis", "pair_repulsion", "distance_transform", "radial_type",
        "default_dtype", "autotune_E0s", "autotune_valid_file", "ema", "scheduler",
    )  # fmt: skip
    return {
        "file": digest, "epochs": args.autotune_epochs or args.max_num_epochs, "lr": args.autotune_lr,
        "seed": args.seed,
        **{name: str(getattr(args, name)) for name in (*shape, *more, *_multiscale_sizes(args))},
    }  # fmt: skip


def _multiscale_sizes(args: argparse.Namespace) -> list[str]:
    """Flags of a multiscale model, which its file brings in stage two."""
    names = [n for n in vars(args) if n.endswith("_long")]
    return [n for n in (*names, "r_short", "multiscale_coupling", "long_range", "pme_smearing") if hasattr(args, n)]


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
        pair = [labels._label(a, "energy", args.energy_key) for a in (atoms, twin)] if twin is not None else []
        if pair and None not in pair and np.isclose(float(pair[0]), float(pair[1]), rtol=0, atol=1e-6):
            raise SettingsError(
                f"--train_file: frame {index} of {quantum} has the same geometry and the same energy "
                f"({float(pair[0]):.6f} eV) as one of {classical}: classical labels were given as quantum ones, or the "
                "files were mixed up"
            )
    return few


def _place(atoms: ase.Atoms) -> bytes:
    return atoms.numbers.tobytes() + np.round(atoms.positions, 5).tobytes()
