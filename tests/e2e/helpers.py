"""Helpers: real runs of mace_run_train on the embedded base and DFT frames."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

import ase
import ase.io
from warm import run as run_warm

EMBEDDED = Path(__file__).parents[2] / "mace_lora" / "embedded"
BIN = Path(sys.executable).parent


def dft_frames(part: str, count: int) -> list[ase.Atoms]:
    """Frames of the embedded PBE0 set."""
    with gzip.open(EMBEDDED / "glycolamide_pbe0.extxyz.gz", "rt") as handle:
        frames = ase.io.read(handle, ":", format="extxyz")
    return [f for f in frames if f.info.get("split") == part][:count]


def flags(job: Path, work: Path, **changes: object) -> list[str]:
    """Flags of a short LoRA run; a value of None leaves a flag out, True gives it bare."""
    values: dict[str, object] = {
        "name": "run", "foundation_model": job / "base.model", "train_file": job / "train.xyz",
        "valid_file": job / "valid.xyz", "E0s": (job / "e0s.txt").read_text(), "lora": True, "lora_rank": 4,
        "lr": 0.005, "batch_size": 5, "valid_batch_size": 5, "max_num_epochs": 2, "default_dtype": "float32",
        "device": "cpu", "work_dir": work, "multiheads_finetuning": "False", "loss": "weighted",
    } | changes  # fmt: skip
    out: list[str] = []
    for name, value in values.items():
        if value is not None:
            out += [f"--{name}"] if value is True else [f"--{name}={value}"]
    return out


def launch(
    arguments: list, check: bool = True, disable: bool = False, warm: bool = False, **kwargs
) -> subprocess.CompletedProcess:
    """Run a command with one thread; on failure show its output."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "EQUITUNE_DISABLE": "1" if disable else "0", "PYTHONWARNINGS": "ignore"}
    words = [str(a) for a in arguments]
    if warm:
        done = run_warm(words, env)
    else:
        done = subprocess.run(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)
    if check:
        assert done.returncode == 0, done.stdout[-3000:]
    return done


def train(job: Path, work: Path, check: bool = True, disable: bool = False, **changes) -> subprocess.CompletedProcess:
    """Run the console script; without equitune in a process of its own."""
    return launch([BIN / "mace_run_train", *flags(job, work, **changes)], check, disable, warm=not disable)


def base_frames(part: str, count: int) -> list[ase.Atoms]:
    """GFN2-xTB frames of the embedded base: ``replay`` (trained on) or ``heldout`` (other molecules)."""
    with gzip.open(EMBEDDED / "organic_small_frames.extxyz.gz", "rt") as handle:
        frames = ase.io.read(handle, ":", format="extxyz")
    return [f for f in frames if f.info["part"] == part][:count]
