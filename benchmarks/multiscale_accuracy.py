"""Accuracy of MultiScaleMACE against MACE of the short and of the long cutoff, from scratch, at an equal budget.

Liquid water (64 molecules, PBE0+TS, 50 training frames) and clusters of three C12F27N molecules (GFN2-xTB, made by
recipes/active_liquid.py). Every method gets its own learning-rate sweep on the first seed's validation frames. One
JSON file per run; a stopped benchmark continues.

Command:  python benchmarks/multiscale_accuracy.py run --data DIR [--clusters FILE] --sets water --methods short,ms,long
          python benchmarks/multiscale_accuracy.py table
Cost:     water, one CPU thread: 4 (short), 5 (ms) and 30 minutes (long) a run.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import ase.io
import numpy as np
import typer
from datasets import extxyz, split, write
from finetune import curve, energy_offsets, evaluate, load

from mace_lora.atomic import write_text

RESULTS = Path(__file__).parent / "results" / "multiscale_accuracy"
CUTOFFS = {"water": (3.5, 7.0), "c12f27n": (3.5, 7.0)}
COUNTS = {"water": [50, 25, 100], "c12f27n": [50, 25, 100]}
MULTI = ["--model=MultiScaleMACE"]
METHODS = {
    "short": [], "long": [], "ms": MULTI, "ms-fused": [*MULTI, "--multiscale_coupling=fused"],
    "ms-scalar": [*MULTI, "--max_L_long=0"], "ms-32": [*MULTI, "--num_channels_long=32"],
    "ms-hidden": [*MULTI, "--radial_hidden_long=16"], "ms-ell2": [*MULTI, "--max_ell_long=2"],
    "ms-corr2": [*MULTI, "--correlation_long=2"],
}  # fmt: skip
app = typer.Typer(add_completion=False, no_args_is_help=True)


def frames_of(name: str, data: Path, clusters: Path | None, seed: int) -> list[list[ase.Atoms]]:
    """Training, validation and test frames; the test frames are the same for all seeds."""
    if name == "water":
        pool = extxyz(data / "water_PBE0TS" / "water_deepmd_64H2O_400.extxyz.gz")
    elif clusters is None:
        raise SystemExit("--clusters: give the labelled clusters of recipes/active_liquid.py")
    else:
        pool = ase.io.read(clusters, ":")
    counts = COUNTS[name]
    rest, test = split(pool, [len(pool) - counts[2], counts[2]], 12345)
    train, valid = split(rest, counts[:2], seed)
    return [train, valid, test]


def command(name: str, method: str, lr: float, seed: int, epochs: int, folder: Path, data: Path) -> list[str]:
    """The training command of a method."""
    short, long = CUTOFFS[name]
    cutoffs = [f"--r_max={short if method == 'short' else long}"]
    if method.startswith("ms"):
        cutoffs.append(f"--r_short={short}")
    return [
        str(Path(sys.executable).parent / "mace_run_train"), "--name=run", f"--seed={seed}",
        f"--train_file={data / 'train.xyz'}", f"--valid_file={data / 'valid.xyz'}", "--E0s=average",
        "--hidden_irreps=16x0e+16x1o", "--max_ell=2", "--correlation=2", f"--lr={lr}", "--batch_size=2",
        "--valid_batch_size=5", f"--max_num_epochs={epochs}", "--eval_interval=5", "--ema", "--ema_decay=0.99",
        "--patience=1000", "--scheduler=ExponentialLR", f"--lr_scheduler_gamma={round(0.05 ** (1 / epochs), 5)}",
        "--default_dtype=float32", "--device=cpu", "--loss=weighted", "--energy_weight=1", "--forces_weight=100",
        "--error_table=TotalMAE", f"--work_dir={folder}", "--plot=False", "--restart_latest", *cutoffs,
        *METHODS[method],
    ]  # fmt: skip


def one(
    name: str, method: str, lr: float, seed: int, epochs: int, data: Path, clusters: Path | None, work: Path
) -> dict[str, Any]:
    """Train, evaluate and store one run; a stored one is read."""
    label = f"{name}__{method}__lr{lr:g}__s{seed}__e{epochs}"
    result = RESULTS / f"{label}.json"
    if result.is_file():
        return json.loads(result.read_text())
    train, valid, test = frames_of(name, data, clusters, seed)
    place, folder = work / f"data_{name}_s{seed}", work / label
    folder.mkdir(parents=True, exist_ok=True)
    write(place / "train.xyz", train)
    write(place / "valid.xyz", valid)
    start = time.time()
    with (folder / "stdout.log").open("a") as log:
        subprocess.run(
            command(name, method, lr, seed, epochs, folder, place), check=True, stdout=log, stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )  # fmt: skip
    seconds = time.time() - start
    model = load(folder / "run.model")
    offsets = energy_offsets(model, train)
    row = {
        "set": name, "method": method, "lr": lr, "seed": seed, "epochs": epochs, "wall_s": round(seconds, 1),
        "parameters": sum(p.numel() for p in model.parameters()), "curve": curve(folder),
        "valid": evaluate(model, valid, offsets), "test": evaluate(model, test, offsets),
    }  # fmt: skip
    write_text(result, json.dumps(row) + "\n")
    shutil.rmtree(folder)
    return row


def score(row: dict[str, Any]) -> float:
    value = float(np.sqrt(row["valid"]["mae_e"] * row["valid"]["mae_f"]))
    return value if np.isfinite(value) else float("inf")


@app.command("run")
def run_all(
    data: Annotated[Path, typer.Option(help="folder of the public data sets")],
    clusters: Annotated[Path | None, typer.Option(help="labelled C12F27N clusters")] = None,
    sets: Annotated[str, typer.Option(help=f"of {', '.join(CUTOFFS)}")] = "water",
    methods: Annotated[str, typer.Option(help=f"of {', '.join(METHODS)}")] = "short,ms,ms-fused,long",
    lrs: Annotated[str, typer.Option(help="sweep on the first seed")] = "0.005,0.01,0.02",
    seeds: Annotated[str, typer.Option(help="the first is used for the sweep")] = "0,1,2",
    epochs: Annotated[int, typer.Option(help="epochs of every run, 25 steps each")] = 40,
    workdir: Annotated[Path, typer.Option(help="files of unfinished runs")] = Path("build/multiscale_accuracy"),
) -> None:
    """Run what is missing; stop at any time."""
    warnings.filterwarnings("ignore")
    first, *rest = [int(s) for s in seeds.split(",")]
    for name in sets.split(","):
        for method in methods.split(","):
            rows = [one(name, method, float(lr), first, epochs, data, clusters, workdir) for lr in lrs.split(",")]
            best = min(rows, key=score)["lr"]
            rows += [one(name, method, best, seed, epochs, data, clusters, workdir) for seed in rest]
            for r in rows:
                e, f = r["test"]["mae_e_per_atom"], r["test"]["mae_f"]
                print(f"{name} {method} lr {r['lr']:g} s{r['seed']}: E {e:.2f} meV/atom, F {f:.1f} meV/Å", flush=True)


@app.command()
def table(epochs: Annotated[int, typer.Option(help="which budget")] = 40) -> None:
    """Write multiscale_accuracy.md from the finished runs."""
    rows = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json"))]
    rows = [r for r in rows if r["epochs"] == epochs]
    if not rows:
        raise SystemExit(f"no finished runs of {epochs} epochs in {RESULTS}")
    lines = [
        "# Accuracy of MS-MACE against MACE of the short and of the long cutoff",
        "",
        "From scratch, 16x0e+16x1o, max_ell 2, correlation 2, two layers; 50 training, 25 validation and 100 test "
        f"frames; {epochs} epochs of 25 steps, rate falling to a twentieth, EMA 0.99, float32; learning rates are "
        "chosen on the first seed's validation frames; E in meV/atom, the mean offset of the training frames removed, "
        "F in meV/Å; median (min–max) over seeds.",
        "Command: `python benchmarks/multiscale_accuracy.py run --data DIR`, `… table` "
        f"({datetime.date.today()}, mace-torch {version('mace-torch')}).",
    ]
    for name in sorted({r["set"] for r in rows}):
        short, long = CUTOFFS[name]
        lines += ["", f"## {name}, r_short {short} Å, r_long {long} Å", ""]
        lines += ["| method | parameters | lr | seeds | E MAE | F MAE | F RMSE | training (min) |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        atoms = {"water": 192, "c12f27n": 120}[name]
        for method in METHODS:
            mine = [r for r in rows if r["set"] == name and r["method"] == method]
            if not mine:
                continue
            first = min(r["seed"] for r in mine)
            best = min((r for r in mine if r["seed"] == first), key=score)["lr"]
            chosen = [r for r in mine if r["lr"] == best]
            cells = [
                _cell([r["test"]["mae_e_refit"] / atoms for r in chosen], 2),
                *(_cell([r["test"][k] for r in chosen], 1) for k in ("mae_f", "rmse_f")),
                f"{median(r['wall_s'] for r in chosen) / 60:.1f}",
            ]
            lines.append(
                f"| {method} | {chosen[0]['parameters']:,} | {best:g} | {len(chosen)} | " + " | ".join(cells) + " |"
            )
    text = "\n".join(lines) + "\n"
    write_text(RESULTS.parent / "multiscale_accuracy.md", text)
    print(text)


def _cell(values: list[float], digits: int) -> str:
    middle = f"{median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}–{max(values):.{digits}f})"


if __name__ == "__main__":
    app()
