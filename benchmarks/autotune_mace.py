"""Classical-to-quantum transfer with MACE: error against the number of quantum labels, from scratch and autotuned.

A molecule of rMD17 (PBE): MMFF94 dynamics and rattled frames are labelled by MMFF94 for stage one; N quantum frames are
trained on, N/5 (at least 5) validated on, 500 tested. Equal architecture, equal number of steps in the quantum stage,
each method at the best of its own learning rates (first seed's validation frames). Controls: "same", whose classical
stage sees the N training geometries only; "lora", whose second stage is LoRA. One JSON per run; stopped, it continues.

Command:  python benchmarks/autotune_mace.py run --data DIR [--molecules aspirin --counts 25,50,100,400]
          python benchmarks/autotune_mace.py table
Cost:     one CPU thread, aspirin: 20 minutes a classical stage (one per seed), 2 to 3 minutes a run.
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
from datasets import rmd17, split, write
from finetune import curve, energy_offsets, evaluate, load

from mace_lora.atomic import write_text
from mace_lora.augment import Schedule, label, rattle, sample_md

RESULTS = Path(__file__).parent / "results" / "autotune_mace"
METHODS = ("scratch", "autotune", "lora", "same")
CLASSICAL, CLASSICAL_EPOCHS, STEPS, BATCH = 4000, 12, 2000, 5
app = typer.Typer(add_completion=False, no_args_is_help=True)


def classical_frames(molecule: str, data: Path, work: Path) -> Path:
    """MMFF94 dynamics at 300 to 1000 K and rattled frames, labelled by MMFF94."""
    out = work / f"{molecule}_classical.xyz"
    if not out.exists():
        work.mkdir(parents=True, exist_ok=True)
        start = rmd17(data / "rmd17_PBE", molecule, "train")[0]
        start.info.clear()
        start.arrays = {k: v for k, v in start.arrays.items() if k in ("numbers", "positions")}
        schedules = [Schedule(t, t, CLASSICAL // 4, 20.0, 0.5, 0.02, 500.0) for t in (300.0, 600.0, 1000.0)]
        sample_md([start], work / f"{molecule}_md.xyz", "mmff94", schedules, seed=1, keep_bonds=True)
        frames = ase.io.read(work / f"{molecule}_md.xyz", ":")
        more = [rattle(frames[k % len(frames)], 0.05, np.random.default_rng(k)) for k in range(CLASSICAL // 4)]
        label([*frames, *more], out, "mmff94")
    return out


def command(method: str, lr: float, seed: int, count: int, folder: Path, data: Path, classical: Path) -> list[str]:
    """The training command of a run."""
    epochs = max(1, STEPS * BATCH // count)
    flags = [
        "--name=run", f"--seed={seed}", f"--train_file={data / 'train.xyz'}", f"--valid_file={data / 'valid.xyz'}",
        "--E0s=average", "--hidden_irreps=16x0e+16x1o", "--max_ell=2", "--correlation=2", "--r_max=4.5", f"--lr={lr}",
        f"--batch_size={BATCH}", "--valid_batch_size=25", f"--max_num_epochs={epochs}",
        f"--eval_interval={max(1, epochs // 40)}", "--ema", "--ema_decay=0.99", "--patience=100000",
        "--scheduler=ExponentialLR", f"--lr_scheduler_gamma={0.05 ** (1 / epochs):.6f}", "--default_dtype=float32",
        "--device=cpu", "--loss=weighted", "--energy_weight=1", "--forces_weight=100", "--error_table=TotalMAE",
        f"--work_dir={folder}", "--plot=False", "--restart_latest",
    ]  # fmt: skip
    if method != "scratch":
        flags += [f"--autotune_train_file={classical}", "--autotune_lr=0.01"]
        flags += [f"--autotune_epochs={CLASSICAL_EPOCHS if method != 'same' else epochs}"]
    return [str(Path(sys.executable).parent / "mace_run_train"), *flags, *(["--lora"] if method == "lora" else [])]


def one(molecule: str, method: str, count: int, lr: float, seed: int, data: Path, work: Path) -> dict[str, Any]:
    """Train, evaluate and store one run; a stored one is read."""
    name = f"{molecule}__{method}__n{count}__lr{lr:g}__s{seed}"
    result = RESULTS / f"{name}.json"
    if result.is_file():
        return json.loads(result.read_text())
    pool, test = (rmd17(data / "rmd17_PBE", molecule, part) for part in ("train", "test"))
    train, valid = split(pool, [count, max(5, count // 5)], seed)
    place, folder = work / f"{molecule}_n{count}_s{seed}", work / name
    write(place / "train.xyz", train)
    write(place / "valid.xyz", valid)
    classical = classical_frames(molecule, data, work)
    if method == "same":
        classical = place / "same.xyz"
        if not classical.exists():
            label([ase.Atoms(a.numbers, positions=a.positions) for a in train], classical, "mmff94")
    folder.mkdir(parents=True, exist_ok=True)
    shared = work / f"{molecule}_stage_one_s{seed}"
    pieces = ("run_classical.model", "checkpoints/run_classical.json")
    if method in ("autotune", "lora") and all((shared / p).is_file() for p in pieces):
        (folder / "checkpoints").mkdir(exist_ok=True)
        for piece in pieces:
            shutil.copy(shared / piece, folder / piece)
    start = time.time()
    with (folder / "stdout.log").open("a") as log:
        subprocess.run(
            command(method, lr, seed, count, folder, place, classical), check=True, stdout=log, stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )  # fmt: skip
    if method in ("autotune", "lora") and not (shared / pieces[0]).is_file():
        (shared / "checkpoints").mkdir(parents=True, exist_ok=True)
        for piece in reversed(pieces):
            shutil.copy(folder / piece, shared / piece)
    model = load(folder / "run.model")
    offsets = energy_offsets(model, train)
    row = {
        "molecule": molecule, "method": method, "count": count, "lr": lr, "seed": seed,
        "wall_s": round(time.time() - start, 1), "curve": curve(folder), "valid": evaluate(model, valid, offsets),
        "test": evaluate(model, test[:500], offsets),
    }  # fmt: skip
    write_text(result, json.dumps(row) + "\n")
    shutil.rmtree(folder)
    return row


def score(row: dict[str, Any]) -> float:
    value = float(np.sqrt(row["valid"]["mae_e_refit"] * row["valid"]["mae_f"]))
    return value if np.isfinite(value) else float("inf")


@app.command("run")
def run_all(
    data: Annotated[Path, typer.Option(help="folder of the public data sets")],
    molecules: Annotated[str, typer.Option(help="rMD17 molecules")] = "aspirin",
    methods: Annotated[str, typer.Option(help=f"of {', '.join(METHODS)}")] = "scratch,autotune",
    counts: Annotated[str, typer.Option(help="numbers of quantum training frames")] = "50,25,100,400",
    lrs: Annotated[str, typer.Option(help="sweep on the first seed")] = "0.005,0.01,0.02",
    seeds: Annotated[str, typer.Option(help="the first is used for the sweep")] = "0,1,2",
    workdir: Annotated[Path, typer.Option(help="files of unfinished runs")] = Path("build/autotune_mace"),
) -> None:
    """Run what is missing; stop at any time."""
    warnings.filterwarnings("ignore")
    first, *rest = [int(s) for s in seeds.split(",")]
    for molecule in molecules.split(","):
        for count in [int(c) for c in counts.split(",")]:
            for method in methods.split(","):
                rows = [one(molecule, method, count, float(lr), first, data, workdir) for lr in lrs.split(",")]
                best = min(rows, key=score)["lr"]
                rows = [r for r in rows if r["lr"] == best]
                rows += [one(molecule, method, count, best, seed, data, workdir) for seed in rest]
                e, f = (median(r["test"][k] for r in rows) for k in ("mae_e_refit", "mae_f"))
                print(f"{molecule} N={count} {method} lr {best:g}: E {e:.1f} meV, F {f:.1f} meV/Å", flush=True)


@app.command()
def table() -> None:
    """Write autotune_mace.md and .png from the finished runs."""
    rows = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json"))]
    if not rows:
        raise SystemExit(f"no finished runs in {RESULTS}")
    lines = [
        "# Classical-to-quantum transfer with MACE",
        "",
        f"rMD17 (PBE), classical stage {CLASSICAL} MMFF94 frames for {CLASSICAL_EPOCHS} epochs, quantum stage {STEPS} "
        f"steps of {BATCH} frames for both; 16x0e+16x1o, max_ell 2, correlation 2, r_max 4.5 Å, float32; rates chosen "
        "on validation frames of the first seed; median (min–max) over seeds. E in meV per frame, raw and with the "
        "training frames' mean offset removed; F in meV/Å; fewer epochs: of the quantum stage, to scratch's "
        "best validation force error. Measured before energy references were refitted at every best epoch, which "
        "ends the raw offsets.",
        "Command: `python benchmarks/autotune_mace.py run --data DIR`, `… table` "
        f"({datetime.date.today()}, mace-torch {version('mace-torch')}).",
    ]
    for molecule in sorted({r["molecule"] for r in rows}):
        lines += ["", f"## {molecule}", "", "| N | method | lr | seeds | E MAE | E MAE, offset removed | F MAE | "
                  "scratch / this: E | F | fewer epochs |", "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for count in sorted({r["count"] for r in rows if r["molecule"] == molecule}):
            base = chosen(rows, molecule, count, "scratch")
            for method in METHODS:
                mine = chosen(rows, molecule, count, method)
                if mine:
                    lines.append(line(count, method, mine, base))
    text = "\n".join(lines) + "\n"
    write_text(RESULTS.parent / "autotune_mace.md", text)
    print(text)


def chosen(rows: list[dict[str, Any]], molecule: str, count: int, method: str) -> list[dict[str, Any]]:
    """Runs at the learning rate that the first seed's validation frames chose."""
    mine = [r for r in rows if (r["molecule"], r["count"], r["method"]) == (molecule, count, method)]
    if not mine:
        return []
    first = min(r["seed"] for r in mine)
    best = min((r for r in mine if r["seed"] == first), key=score)["lr"]
    return [r for r in mine if r["lr"] == best]


def line(count: int, method: str, mine: list[dict[str, Any]], base: list[dict[str, Any]]) -> str:
    cells = []
    for key in ("mae_e", "mae_e_refit", "mae_f"):
        values = [r["test"][key] for r in mine]
        middle = f"{median(values):.1f}"
        cells.append(middle if len(values) == 1 else f"{middle} ({min(values):.1f}–{max(values):.1f})")
    ratios = ["–", "–"]
    if base:
        ratios = [
            f"{median(r['test'][k] for r in base) / median(r['test'][k] for r in mine):.2f}"
            for k in ("mae_e_refit", "mae_f")
        ]
    fewer = [f for f in (sooner(b, r) for b in base for r in mine if b["seed"] == r["seed"]) if f is not None]
    ratios.append(f"{median(fewer):.1f} ({min(fewer):.1f}–{max(fewer):.1f})" if fewer and method != "scratch" else "–")
    return f"| {count} | {method} | {mine[0]['lr']:g} | {len(mine)} | " + " | ".join([*cells, *ratios]) + " |"


def sooner(base: dict[str, Any], row: dict[str, Any]) -> float | None:
    """How many times fewer epochs of the quantum stage reach the best validation force error of the base."""
    best = min(f for _, f in base["curve"])
    when = next(epoch for epoch, f in base["curve"] if f == best)
    return next(((when + 1) / (epoch + 1) for epoch, f in row["curve"] if f <= best), None)


if __name__ == "__main__":
    app()
