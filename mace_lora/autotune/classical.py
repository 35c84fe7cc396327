"""Stage one of ``--autotune_train_file``: the same command in a process of its own, with the classical file."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from mace_lora.atomic import write_text
from mace_lora.mace_plugin.protocol import SettingsError

__all__ = ["STAGE", "become_classical", "classical_stage", "multiscale_sizes"]

STAGE = "EQUITUNE_AUTOTUNE_STAGE"
# of the quantum stage alone: the classical stage is a plain training of the same architecture
_QUANTUM_ONLY = {
    "lora": False, "freeze": None, "test_file": None, "multiheads_finetuning": False, "swa": False,
    "multiscale_freeze_short": None, "foundation_model_elements": False, "eval_interval": None,
    "start_swa": None,
}  # fmt: skip


def become_classical(args: argparse.Namespace) -> None:
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


def classical_stage(args: argparse.Namespace) -> Path:
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
        **{name: str(getattr(args, name)) for name in (*shape, *more, *multiscale_sizes(args))},
    }  # fmt: skip


def multiscale_sizes(args: argparse.Namespace) -> list[str]:
    """Flags of a multiscale model, which its file brings in stage two."""
    names = [n for n in vars(args) if n.endswith("_long")]
    return [n for n in (*names, "r_short", "multiscale_coupling", "long_range", "pme_smearing") if hasattr(args, n)]
