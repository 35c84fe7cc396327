"""One fine-tuning run of a benchmark: the real command, and errors on held-out frames."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
from datasets import Split, load_split, write

from mace_lora.atomic import write_text

__all__ = ["METHODS", "Job", "prepare", "run"]

# flags of mace_run_train; a method that starts with random weights has its own base
METHODS: dict[str, list[str]] = {
    "full": [],
    "scratch": [],
    "readout": ["--freeze", "6"],
    "mace-lora-r4": ["--lora", "True", "--lora_backend", "mace", "--lora_rank", "4", "--lora_alpha", "4"],
    "mace-lora-r16": ["--lora", "True", "--lora_backend", "mace", "--lora_rank", "16", "--lora_alpha", "16"],
    "ours": ["--lora"],
    "ours-r4": ["--lora", "--lora_rank", "4"],
    "ours-r64": ["--lora", "--lora_rank", "64"],
    "ours-elora": ["--lora", "--lora_init", "elora"],
}


@dataclass(frozen=True)
class Job:
    """One run: data set, base, method, learning rate, seed, epochs."""

    set: str
    base: str
    method: str
    lr: float
    seed: int
    epochs: int

    @property
    def name(self) -> str:
        """File name of the result."""
        return f"{self.set}__{self.base}__{self.method}__lr{self.lr:g}__s{self.seed}__e{self.epochs}"


def load(path: Path) -> Any:
    """A MACE model (upstream's pickle; only files of our own or of the user's choice)."""
    from mace_lora.mace_plugin.base_model import load_model

    return load_model(path)


def residuals(model: Any, frames: list[ase.Atoms]) -> tuple[np.ndarray, np.ndarray]:
    """Model minus label in float64: energies (frames,) in meV, forces (atoms, 3) in meV/Å."""
    from mace_lora.lora.calculator import graph_of

    model = model.double()
    energies, forces = [], []
    for start in range(0, len(frames), 20):
        chunk = frames[start : start + 20]
        out = model(graph_of(model, chunk, None), training=False, compute_force=True)
        energies.append(out["energy"].detach().numpy())
        forces.append(out["forces"].detach().numpy())
    de = 1e3 * (np.concatenate(energies) - np.array([f.info["REF_energy"] for f in frames]))
    df = 1e3 * (np.concatenate(forces) - np.concatenate([f.arrays["REF_forces"] for f in frames]))
    return de, df


def counts(frames: list[ase.Atoms], elements: list[int]) -> np.ndarray:
    """(frames, elements) numbers of atoms."""
    return np.array([[(f.numbers == z).sum() for z in elements] for f in frames], float)


def energy_offsets(model: Any, train: list[ase.Atoms]) -> dict[int, float]:
    """Least-squares offsets of the elements (meV) that remain on the training frames."""
    from mace_lora.lora.energies import solve_offsets

    elements = sorted({int(z) for f in train for z in f.numbers})
    solution = solve_offsets(counts(train, elements), residuals(model, train)[0])
    return dict(zip(elements, solution.tolist(), strict=True))


def evaluate(model: Any, frames: list[ase.Atoms], offsets: dict[int, float]) -> dict[str, float]:
    """MAE and RMSE of the energy (meV, whole frame and per atom) and of the forces (meV/Å), in float64.

    ``mae_e_refit`` is the energy MAE with the offsets of the training frames removed: what a refit of
    the energy references gives to any method.
    """
    de, df = residuals(model, frames)
    refit = de - counts(frames, list(offsets)) @ np.array(list(offsets.values()))
    per_atom = de / np.array([len(f) for f in frames])
    return {
        "mae_e": float(np.abs(de).mean()), "rmse_e": float(np.sqrt((de**2).mean())),
        "mae_e_per_atom": float(np.abs(per_atom).mean()), "rmse_e_per_atom": float(np.sqrt((per_atom**2).mean())),
        "mae_e_refit": float(np.abs(refit).mean()),
        "mae_f": float(np.abs(df).mean()), "rmse_f": float(np.sqrt((df**2).mean())),
    }  # fmt: skip


def aligned_E0s(model: Any, frames: list[ase.Atoms]) -> dict[int, float]:
    """Base E0s plus the least-squares (minimum-norm) offset to the labels, eV; same for all methods."""
    from mace_lora.lora.calculator import graph_of

    model = model.double()
    energy = np.concatenate(
        [model(graph_of(model, [f], None), training=False, compute_force=False)["energy"].detach() for f in frames]
    )
    zs = sorted({int(z) for f in frames for z in f.numbers})
    known = [int(z) for z in model.atomic_numbers]
    base = np.atleast_2d(model.atomic_energies_fn.atomic_energies.numpy())[0]
    residual = np.array([f.info["REF_energy"] for f in frames]) - energy
    shift = np.linalg.lstsq(counts(frames, zs), residual, rcond=None)[0]
    return {z: float(base[known.index(z)] + s) for z, s in zip(zs, shift, strict=True)}


def prepare(job: Job, data: Path, bases: dict[str, Path], work: Path) -> tuple[Split, Path, dict[int, float]]:
    """Write the data files and the base of a job; returns the split, the base file and the E0s (eV)."""
    import torch

    frames = load_split(job.set, data, job.seed)
    folder = work / f"data_{job.set}_s{job.seed}"
    if not (folder / "valid.xyz").is_file():
        write(folder / "train.xyz", frames.train)
        write(folder / "valid.xyz", frames.valid)
    model = load(bases[job.base])
    e0s = aligned_E0s(model, frames.train)
    file = work / f"{job.base}.model"
    if job.method == "scratch":
        file = work / f"{job.base}_random{job.seed}.model"
        torch.manual_seed(job.seed)
        for name, p in model.named_parameters():
            if "bessel" not in name:  # equal distribution of values, no information
                p.data = p.data.reshape(-1)[torch.randperm(p.numel())].reshape(p.shape)
    if not file.is_file():
        work.mkdir(parents=True, exist_ok=True)
        torch.save(model.float(), file)
    return frames, file, e0s


def command(job: Job, base: Path, folder: Path, data: Path, e0s: dict[int, float]) -> list[str]:
    """The training command; the same for all methods but for their own flags."""
    return [
        str(Path(sys.executable).parent / "mace_run_train"), "--name", "run", "--seed", str(job.seed),
        "--foundation_model", str(base), "--train_file", str(data / "train.xyz"),
        "--valid_file", str(data / "valid.xyz"), "--E0s", str(e0s), "--multiheads_finetuning", "False",
        "--lr", str(job.lr), "--batch_size", "5", "--valid_batch_size", "25", "--max_num_epochs", str(job.epochs),
        "--eval_interval", "5", "--ema", "--ema_decay", "0.99", "--patience", "1000",
        "--scheduler", "ExponentialLR", "--lr_scheduler_gamma", str(round(0.2 ** (1 / job.epochs), 5)),
        "--default_dtype", "float32", "--device", "cpu", "--loss", "weighted", "--energy_weight", "1",
        "--forces_weight", "100", "--error_table", "TotalMAE", "--work_dir", str(folder), "--plot", "False",
        "--restart_latest", *METHODS[job.method],
    ]  # fmt: skip


def curve(folder: Path) -> list[tuple[int, float]]:
    """(epoch, validation force MAE in meV/Å) as upstream logged them."""
    points = {}
    for line in next((folder / "results").glob("run_run-*_train.txt")).read_text().splitlines():
        row = json.loads(line)
        if row.get("mode") == "eval" and row["epoch"] is not None:
            points[int(row["epoch"])] = round(1e3 * row["mae_f"], 3)
    return sorted(points.items())


def run(job: Job, data: Path, bases: dict[str, Path], work: Path, results: Path) -> dict[str, Any]:
    """Train, evaluate and store one job; a stored one is read."""
    result = results / f"{job.name}.json"
    if result.is_file():
        return json.loads(result.read_text())
    frames, base, e0s = prepare(job, data, bases, work)
    folder = work / job.name
    folder.mkdir(parents=True, exist_ok=True)
    start = time.time()
    with (folder / "stdout.log").open("a") as log:
        subprocess.run(
            command(job, base, folder, work / f"data_{job.set}_s{job.seed}", e0s),
            check=True, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )  # fmt: skip
    model = load(folder / "run.model")
    offsets = energy_offsets(model, frames.train)
    row = {
        **asdict(job), "level": frames.level, "wall_s": round(time.time() - start, 1), "curve": curve(folder),
        "valid": evaluate(model, frames.valid, offsets), "test": evaluate(model, frames.test, offsets),
    }  # fmt: skip
    write_text(result, json.dumps(row) + "\n")
    shutil.rmtree(folder)
    return row


def zero_shot(set_name: str, base: str, data: Path, bases: dict[str, Path], results: Path) -> dict[str, float]:
    """Errors of the base with aligned energy references, fitted on the training frames of seed 0."""
    result = results / f"{set_name}__{base}__zero-shot.json"
    if not result.is_file():
        frames, model = load_split(set_name, data, 0), load(bases[base]).double()
        known = [int(z) for z in model.atomic_numbers]
        for z, value in aligned_E0s(model, frames.train).items():
            model.atomic_energies_fn.atomic_energies.view(-1)[known.index(z)] = value
        row = evaluate(model, frames.test, energy_offsets(model, frames.train))
        write_text(result, json.dumps(row) + "\n")
    return json.loads(result.read_text())
