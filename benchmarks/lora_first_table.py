"""Full fine-tuning, MACE's own LoRA and ours on few frames of one rMD17 molecule.

Each method gets the same data, budget and its own learning-rate sweep; the learning rate is chosen
on the validation frames, the test frames are only reported. One JSON file per run, so the script
can be stopped and run again.

Command:  python benchmarks/lora_first_table.py --data DIR --base MACE-OFF23_small.model
Cost:     about 4 minutes a run (100 epochs, ethanol) on one CPU thread.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated

import ase
import numpy as np
import typer
from datasets import rmd17, split, write

from mace_lora.atomic import write_text

METHODS = {
    "full": [],
    "mace-lora": ["--lora", "True", "--lora_backend", "mace", "--lora_rank", "16", "--lora_alpha", "16"],
    "ours": ["--lora", "--lora_rank", "16"],
    "ours-unit": ["--lora", "--lora_rank", "16", "--lora_init", "unit_delta"],
}
TRAIN, VALID, TEST = 50, 50, 1000


def load(path: Path):
    """A MACE model (upstream's pickle; only files of our own or of the user's choice)."""
    import mace  # noqa: F401
    import torch

    return torch.load(path, map_location="cpu", weights_only=False)


def predict(model, frames: list[ase.Atoms]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Energies (eV) and forces (eV/Å) in float64."""
    from mace.calculators import MACECalculator

    calc = MACECalculator(models=[model.double()], device="cpu", default_dtype="float64")
    energies, forces = [], []
    for frame in frames:
        atoms = ase.Atoms(frame.numbers, positions=frame.positions)
        atoms.calc = calc
        energies.append(atoms.get_potential_energy())
        forces.append(atoms.get_forces())
    return np.array(energies), forces


def errors(model, frames: list[ase.Atoms]) -> dict[str, float]:
    """MAE and RMSE of total energy (meV) and forces (meV/Å)."""
    energy, forces = predict(model, frames)
    de = 1e3 * (energy - np.array([f.info["REF_energy"] for f in frames]))
    df = 1e3 * np.concatenate([(p - f.arrays["REF_forces"]).ravel() for p, f in zip(forces, frames, strict=True)])
    return {
        "mae_e": float(np.abs(de).mean()), "rmse_e": float(np.sqrt((de**2).mean())),
        "mae_f": float(np.abs(df).mean()), "rmse_f": float(np.sqrt((df**2).mean())),
    }  # fmt: skip


def aligned_E0s(base: Path, frames: list[ase.Atoms]) -> dict[int, float]:
    """Base E0s plus the least-squares (minimum-norm) offset to the labels, eV; same for all methods."""
    model = load(base)
    energy, _ = predict(model, frames)
    zs = sorted({int(z) for f in frames for z in f.numbers})
    known = [int(z) for z in model.atomic_numbers]
    base_e0 = np.atleast_2d(model.atomic_energies_fn.atomic_energies.numpy())[0]
    counts = np.array([[(f.numbers == z).sum() for z in zs] for f in frames], float)
    residual = np.array([f.info["REF_energy"] for f in frames]) - energy
    shift = np.linalg.lstsq(counts, residual, rcond=None)[0]
    return {z: float(base_e0[known.index(z)] + s) for z, s in zip(zs, shift, strict=True)}


def one_run(folder: Path, base: Path, method: str, lr: float, seed: int, epochs: int, e0s: dict[int, float]) -> dict:
    """Train by the real command and evaluate the saved model; returns and stores the figures."""
    name = f"{method}_lr{lr:g}_s{seed}"
    result = folder / f"{name}.json"
    if result.is_file():
        return json.loads(result.read_text())
    data = folder / f"data_s{seed}"
    command = [
        "mace_run_train", "--name", name, "--seed", str(seed), "--foundation_model", str(base),
        "--train_file", str(data / "train.xyz"), "--valid_file", str(data / "valid.xyz"), "--E0s", str(e0s),
        "--multiheads_finetuning", "False", "--lr", str(lr), "--batch_size", "5", "--valid_batch_size", "50",
        "--max_num_epochs", str(epochs), "--eval_interval", "2", "--ema", "--ema_decay", "0.99",
        "--scheduler_patience", "20", "--patience", "1000", "--default_dtype", "float32", "--device", "cpu",
        "--loss", "weighted", "--energy_weight", "1", "--forces_weight", "100", "--error_table", "TotalMAE",
        "--work_dir", str(folder / name), "--restart_latest", *METHODS[method],
    ]  # fmt: skip
    start = time.time()
    (folder / name).mkdir(parents=True, exist_ok=True)
    with (folder / name / "stdout.log").open("a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    wall = time.time() - start
    import ase.io

    model = load(folder / name / f"{name}.model")
    row = {
        "method": method, "lr": lr, "seed": seed, "epochs": epochs, "wall_s": wall,
        "valid": errors(model, ase.io.read(data / "valid.xyz", ":")),
        "test": errors(model, ase.io.read(data / "test.xyz", ":")),
    }  # fmt: skip
    result.write_text(json.dumps(row, indent=1))
    return row


def table(rows: list[dict], zero_shot: dict[str, float]) -> str:
    """Markdown: best learning rate of each method on validation forces; median and range over seeds."""
    lines = [
        "| method | lr (chosen on validation) | seeds | valid F MAE | test E MAE | test F MAE | test F RMSE |",
        "|---|---|---|---|---|---|---|",
        "| base, energies aligned | – | – | – | "
        + " | ".join(f"{zero_shot[k]:.1f}" for k in ("mae_e", "mae_f", "rmse_f"))
        + " |",
    ]
    for method in dict.fromkeys(r["method"] for r in rows):
        own = [r for r in rows if r["method"] == method]
        first = min(r["seed"] for r in own)
        best = min((r for r in own if r["seed"] == first), key=lambda r: r["valid"]["mae_f"])["lr"]
        chosen = [r for r in own if r["lr"] == best]
        cells = []
        for part, key in (("valid", "mae_f"), ("test", "mae_e"), ("test", "mae_f"), ("test", "rmse_f")):
            values = [r[part][key] for r in chosen]
            cells.append(f"{median(values):.1f} ({min(values):.1f}–{max(values):.1f})")
        lines.append(f"| {method} | {best:g} | {len(chosen)} | " + " | ".join(cells) + " |")
    lines += ["", "Sweep (seed of the sweep, validation force MAE in meV/Å):", ""]
    for method in dict.fromkeys(r["method"] for r in rows):
        first = min(r["seed"] for r in rows)
        sweep = sorted((r["lr"], r["valid"]["mae_f"]) for r in rows if r["method"] == method and r["seed"] == first)
        lines.append(f"- {method}: " + ", ".join(f"lr {lr:g}: {value:.1f}" for lr, value in sweep))
    return "\n".join(lines)


def main(
    data: Annotated[Path, typer.Option(help="folder of the rMD17 npz files")],
    base: Annotated[Path, typer.Option(help="foundation model")],
    molecule: Annotated[str, typer.Option(help="rMD17 molecule")] = "ethanol",
    workdir: Annotated[Path, typer.Option(help="runs and results")] = Path("build/first_table"),
    epochs: Annotated[int, typer.Option(help="epochs of every run")] = 100,
    lrs: Annotated[str, typer.Option(help="learning rates of the sweep")] = "0.002,0.005,0.01,0.02",
    methods: Annotated[str, typer.Option(help="comma-separated")] = "full,mace-lora,ours,ours-unit",
    seeds: Annotated[str, typer.Option(help="the first is used for the sweep")] = "0,1,2",
    output: Annotated[Path | None, typer.Option(help="Markdown table to write")] = None,
) -> None:
    """Run what is missing and print the table."""
    warnings.filterwarnings("ignore")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    folder = workdir / f"{base.stem}_{molecule}"
    seed_list = [int(s) for s in seeds.split(",")]
    pool, test = rmd17(data, molecule, "train"), rmd17(data, molecule, "test")[:TEST]
    for seed in seed_list:
        if not (folder / f"data_s{seed}" / "test.xyz").is_file():
            for part, frames in zip(("train", "valid"), split(pool, [TRAIN, VALID], seed), strict=True):
                write(folder / f"data_s{seed}" / f"{part}.xyz", frames)
            write(folder / f"data_s{seed}" / "test.xyz", test)
    import ase.io

    e0s = {s: aligned_E0s(base, ase.io.read(folder / f"data_s{s}" / "train.xyz", ":")) for s in seed_list}
    zero = folder / "zero_shot.json"
    if not zero.is_file():
        model = load(base)
        known = [int(z) for z in model.atomic_numbers]
        for z, value in e0s[seed_list[0]].items():
            model.atomic_energies_fn.atomic_energies.view(-1)[known.index(z)] = value
        zero.write_text(json.dumps(errors(model, test)))
    for method in methods.split(","):
        sweep = [
            one_run(folder, base, method, float(lr), seed_list[0], epochs, e0s[seed_list[0]]) for lr in lrs.split(",")
        ]
        best = min(sweep, key=lambda r: r["valid"]["mae_f"])["lr"]
        for seed in seed_list[1:]:
            one_run(folder, base, method, best, seed, epochs, e0s[seed])
    # all finished runs, those of earlier calls with other learning rates included
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*_lr*_s*.json"))]
    rows = sorted((r for r in found if r["epochs"] == epochs), key=lambda r: list(METHODS).index(r["method"]))
    text = table(rows, json.loads(zero.read_text()))
    print(text)
    if output is not None:
        head = (
            f"# {molecule}, rMD17 (PBE/def2-SVP), base {base.stem}\n\n"
            f"{TRAIN} training + {VALID} validation frames (both counted as labels), {len(test)} test frames, "
            f"{epochs} epochs of 10 steps, EMA, float32, one CPU thread per run; E in meV (total energy), F in meV/Å; "
            "median (min–max) over seeds, which change frames, initialisation and order.\n"
            "`full` trains all weights; `mace-lora`: MACE's own --lora, rank 16, alpha 16; `ours`: --lora "
            "--lora_rank=16; "
            "`ours-unit`: the same with --lora_init=unit_delta.\n"
            f"Command: `python benchmarks/lora_first_table.py --data DIR --base {base.name} --molecule {molecule}` "
            f"({datetime.date.today()}, mace-torch {version('mace-torch')}, torch {version('torch')}).\n\n"
        )
        write_text(output, head + text + "\n")
        print(f"table written to {output}")


if __name__ == "__main__":
    typer.run(main)
