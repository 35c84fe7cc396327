"""Classical-to-quantum transfer with MACE: error against the number of quantum labels, from scratch and autotuned.

A molecule of rMD17 (PBE): MMFF94 dynamics and rattled frames are labelled by MMFF94 for stage one; N quantum frames are
trained on, N/5 (at least 5) validated on, 500 tested. Equal architecture, equal number of steps in the quantum stage,
each method at the best of its own learning rates (first seed's validation frames). Controls: "same", whose classical
stage sees the N training geometries only; "lora", whose second stage is LoRA. One JSON per run; stopped, it continues.
The numbers of labels of a seed share one stage one, whose learning rate decays as that of the number run first.

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

from mace_lora.atomic import atomic_path, write_text
from mace_lora.augment import Schedule, label, rattle, sample_md

RESULTS = Path(__file__).parent / "results" / "autotune_mace"
METHODS = ("scratch", "autotune", "lora", "same")
LRS, SEEDS = "0.005,0.01,0.02", "0,1,2"
# energy references; rows without the key are of code that never refitted
AS_TRAINED, REFIT, JUDGED = "as trained", "refit", "refit before validation"
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


def gamma(count: int) -> str:
    """Decay of the learning rate by an epoch, to a twentieth at the end."""
    return f"{0.05 ** (1 / max(1, STEPS * BATCH // count)):.6f}"


def command(method: str, lr: float, seed: int, count: int, folder: Path, data: Path, classical: Path) -> list[str]:
    """The training command of a run."""
    epochs = max(1, STEPS * BATCH // count)
    flags = [
        "--name=run", f"--seed={seed}", f"--train_file={data / 'train.xyz'}", f"--valid_file={data / 'valid.xyz'}",
        "--E0s=average", "--hidden_irreps=16x0e+16x1o", "--max_ell=2", "--correlation=2", "--r_max=4.5", f"--lr={lr}",
        f"--batch_size={BATCH}", "--valid_batch_size=25", f"--max_num_epochs={epochs}",
        f"--eval_interval={max(1, epochs // 40)}", "--ema", "--ema_decay=0.99", "--patience=100000",
        "--scheduler=ExponentialLR", f"--lr_scheduler_gamma={gamma(count)}", "--default_dtype=float32",
        "--device=cpu", "--loss=weighted", "--energy_weight=1", "--forces_weight=100", "--error_table=TotalMAE",
        f"--work_dir={folder}", "--plot=False", "--restart_latest",
    ]  # fmt: skip
    if method != "scratch":
        flags += [f"--autotune_train_file={classical}", "--autotune_lr=0.01"]
        flags += [f"--autotune_epochs={CLASSICAL_EPOCHS if method != 'same' else epochs}"]
    return [str(Path(sys.executable).parent / "mace_run_train"), *flags, *(["--lora"] if method == "lora" else [])]


def one(molecule: str, method: str, count: int, lr: float, seed: int, data: Path, work: Path) -> dict[str, Any]:
    """Train, evaluate and store one run; a stored one is read."""
    kind = AS_TRAINED if method == "scratch" else JUDGED
    name = f"{molecule}__{method}__n{count}__lr{lr:g}__s{seed}"
    name += "" if kind == AS_TRAINED else f"__{kind.replace(' ', '-')}"
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
        shutil.copy(shared / pieces[0], folder / pieces[0])
        record = json.loads((shared / pieces[1]).read_text()) | {"lr_scheduler_gamma": str(float(gamma(count)))}
        write_text(folder / pieces[1], json.dumps(record) + "\n")
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
        "molecule": molecule, "method": method, "count": count, "lr": lr, "seed": seed, "energies": kind,
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
    lrs: Annotated[str, typer.Option(help="sweep on the first seed")] = LRS,
    seeds: Annotated[str, typer.Option(help="the first is used for the sweep")] = SEEDS,
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
        "best validation force error (0: never reached). "
        "Energies: refit where the energy references were refitted at every best epoch or before every validation, "
        f"as trained where they were not. *: unfinished, fewer than {len(LRS.split(','))} learning rates or "
        f"{len(SEEDS.split(','))} seeds.",
        "Command: `python benchmarks/autotune_mace.py run --data DIR`, `… table` "
        f"({datetime.date.today()}, mace-torch {version('mace-torch')}).",
    ]
    for molecule in sorted({r["molecule"] for r in rows}):
        lines += ["", f"## {molecule}", "", "| N | method | energies | lr | seeds | E MAE | E MAE, offset removed | "
                  "F MAE | scratch / this: E raw | E | F | fewer epochs |", "|" + "---|" * 12]  # fmt: skip
        for count in sorted({r["count"] for r in rows if r["molecule"] == molecule}):
            base = chosen(rows, molecule, count, "scratch", AS_TRAINED)
            for method in METHODS:
                for kind in (AS_TRAINED, REFIT, JUDGED):
                    mine = chosen(rows, molecule, count, method, kind)
                    if mine:
                        lines.append(line(count, method, mine, base, unfinished(rows, mine)))
    text = "\n".join(lines) + "\n"
    plot(rows, RESULTS.parent / "autotune_mace.png")
    write_text(RESULTS.parent / "autotune_mace.md", text)
    print(text)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Force and energy error against the number of labels, log-log."""
    from matplotlib.figure import Figure

    molecules = sorted({r["molecule"] for r in rows})
    figure = Figure(figsize=(8, 3.2 * len(molecules)), layout="constrained")
    for axes, molecule in zip(figure.subplots(len(molecules), 2, squeeze=False), molecules, strict=True):
        for axis, key, name in zip(
            axes, ("mae_e_refit", "mae_f"), ("E MAE, offset removed (meV)", "F MAE (meV/Å)"), strict=True
        ):
            for method in METHODS:
                for kind, style in ((AS_TRAINED, "o--"), (REFIT, "s-"), (JUDGED, "^-")):
                    found = {n: chosen(rows, molecule, n, method, kind) for n in sorted({r["count"] for r in rows})}
                    points = [(n, median(r["test"][key] for r in mine)) for n, mine in found.items() if mine]
                    if points:
                        axis.plot(*zip(*points, strict=True), style, label=f"{method}, {kind}")
            axis.set(xscale="log", yscale="log", xlabel="quantum labels", ylabel=name, title=molecule)
        axes[1].legend(fontsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def energies(row: dict[str, Any]) -> str:
    return str(row.get("energies", AS_TRAINED))


def of(rows: list[dict[str, Any]], molecule: str, count: int, method: str, kind: str) -> list[dict[str, Any]]:
    key = (molecule, count, method, kind)
    return [r for r in rows if (r["molecule"], r["count"], r["method"], energies(r)) == key]


def unfinished(rows: list[dict[str, Any]], mine: list[dict[str, Any]]) -> bool:
    """Whether learning rates of the sweep or seeds of the best one are missing."""
    first = mine[0]
    every = of(rows, first["molecule"], first["count"], first["method"], energies(first))
    swept = {r["lr"] for r in every if r["seed"] == min(e["seed"] for e in every)}
    return len(swept) < len(LRS.split(",")) or len(mine) < len(SEEDS.split(","))


def chosen(rows: list[dict[str, Any]], molecule: str, count: int, method: str, kind: str) -> list[dict[str, Any]]:
    """Runs at the learning rate that the first seed's validation frames chose."""
    mine = of(rows, molecule, count, method, kind)
    if not mine:
        return []
    first = min(r["seed"] for r in mine)
    best = min((r for r in mine if r["seed"] == first), key=score)["lr"]
    return [r for r in mine if r["lr"] == best]


def line(count: int, method: str, mine: list[dict[str, Any]], base: list[dict[str, Any]], partial: bool) -> str:
    cells = []
    for key in ("mae_e", "mae_e_refit", "mae_f"):
        values = [r["test"][key] for r in mine]
        middle = f"{median(values):.1f}"
        cells.append(middle if len(values) == 1 else f"{middle} ({min(values):.1f}–{max(values):.1f})")
    ratios = ["–", "–", "–"]
    if base:
        ratios = [
            f"{median(r['test'][k] for r in base) / median(r['test'][k] for r in mine):.2f}"
            for k in ("mae_e", "mae_e_refit", "mae_f")
        ]
    fewer = [sooner(b, r) for b in base for r in mine if b["seed"] == r["seed"]] if method != "scratch" else []
    ratios.append(f"{median(fewer):.1f} ({min(fewer):.1f}–{max(fewer):.1f})" if fewer else "–")
    start = f"| {count} | {method} | {energies(mine[0])} | {mine[0]['lr']:g} | {len(mine)}{'*' if partial else ''} | "
    return start + " | ".join([*cells, *ratios]) + " |"


def sooner(base: dict[str, Any], row: dict[str, Any]) -> float:
    """How many times fewer epochs of the quantum stage reach the base's best validation force error; 0: none does."""
    best = min(f for _, f in base["curve"])
    when = next(epoch for epoch, f in base["curve"] if f == best)
    return next(((when + 1) / (epoch + 1) for epoch, f in row["curve"] if f <= best), 0.0)


if __name__ == "__main__":
    app()
