"""LoRA against full fine-tuning over as many data sets as there are: wins and mean improvement.

Purpose:  the 27-set table of the two-stage framework (Hu et al., JCST 2026, doi 10.1007/s11390-026-6106-z) in kind,
          with every labelled file that is given: 50 training and 50 validation frames, up to 500 test frames; both
          methods get the same frames, epochs and energy references, and the best of three learning rates on the
          validation frames of the first seed.
Command:  python recipes/lora_27.py run --data DIR --base MACE.model        # again with another base for other elements
          python recipes/lora_27.py table
Data:     a folder with one file per set: extxyz or any format of ASE with energy and forces (eV, eV/Å; REF_energy and
          REF_forces count first), or rMD17's npz (kcal/mol).
Cost:     one CPU thread, laptop: 3 to 20 minutes a run of a molecule, 8 runs a set at one seed; smoke: 2 minutes a set.
Writes:   lora-27/: one JSON per run, report.md, improvement.png. Stopped, the same command goes on.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import ase
import ase.io
import numpy as np
import typer
from ase import units

from mace_lora.atomic import atomic_path, write_text
from mace_lora.data import require_sound
from mace_lora.distill.evaluation import evaluate_model
from mace_lora.mace_plugin.base_model import load_model
from mace_lora.mace_plugin.launch import train

KCAL = units.kcal / units.mol
EPOCHS = {"smoke": 2, "laptop": 70, "paper": 500}
TRAIN, VALID, TEST = 50, 50, 500
METHODS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "full": ({}, (0.002, 0.005, 0.01)),
    "lora": ({"lora": True}, (0.01, 0.02, 0.04)),
}
app = typer.Typer(add_completion=False, no_args_is_help=True)
Folder = Annotated[Path, typer.Option(help="results")]


def read(path: Path) -> list[ase.Atoms]:
    """Labelled frames of a file; eV, eV/Å."""
    if path.suffix == ".npz":
        data = np.load(path)
        found = zip(data["coords"], np.ravel(data["energies"]) * KCAL, data["forces"] * KCAL, strict=True)
        numbers = data["nuclear_charges"]
        return [labelled(ase.Atoms(numbers, positions=x), float(e), f) for x, e, f in found]
    out = []
    for atoms in ase.io.read(path, ":"):
        results = atoms.calc.results if atoms.calc is not None else {}
        energy = atoms.info.get("REF_energy", results.get("energy"))
        forces = atoms.arrays.get("REF_forces", results.get("forces"))
        if energy is None or forces is None:
            raise ValueError(f"{path}: expected frames with energy and forces")
        out.append(
            labelled(
                ase.Atoms(atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc), energy, forces
            )
        )
    return out


def labelled(atoms: ase.Atoms, energy: float, forces: np.ndarray) -> ase.Atoms:
    atoms.info["REF_energy"], atoms.arrays["REF_forces"] = float(energy), np.asarray(forces, float)
    return atoms


def parts(path: Path, seed: int, place: Path) -> dict[str, Path]:
    """Files of one split; the test frames are the same for every seed."""
    files = {name: place / f"{name}.xyz" for name in ("train", "valid", "test")}
    if files["test"].exists():
        return files
    frames = read(path)
    if len(frames) < TRAIN + VALID + 20:
        raise ValueError(f"{path}: expected at least {TRAIN + VALID + 20} frames, got {len(frames)}")
    fixed = np.random.default_rng(0).permutation(len(frames))
    count = min(TEST, len(frames) - TRAIN - VALID)
    rest = np.random.default_rng(seed + 1).permutation(fixed[count:])
    require_sound([frames[i] for i in [*fixed[:count], *rest[: TRAIN + VALID]]])
    for name, which in (("train", rest[:TRAIN]), ("valid", rest[TRAIN : TRAIN + VALID]), ("test", fixed[:count])):
        with atomic_path(files[name]) as temporary:
            ase.io.write(temporary, [frames[i] for i in which], format="extxyz", write_results=False)
    return files


def one(path: Path, base: Path, method: str, lr: float, seed: int, epochs: int, folder: Path) -> dict[str, Any]:
    """Train and evaluate one run; a stored one is read."""
    name = f"{path.name.partition('.')[0]}__{base.stem}__{method}__lr{lr:g}__s{seed}__e{epochs}"
    result, work = folder / f"{name}.json", folder / "work" / name
    if result.is_file():
        return json.loads(result.read_text())
    print(name, flush=True)
    files = parts(path, seed, folder / "work" / f"{path.name}-s{seed}")
    flags = METHODS[method][0] | {
        "foundation_model": base, "E0s": "estimated", "multiheads_finetuning": False, "train_file": files["train"],
        "valid_file": files["valid"], "lr": lr, "seed": seed, "max_num_epochs": epochs, "batch_size": 5,
        "valid_batch_size": 10, "eval_interval": max(1, epochs // 14), "ema": True, "ema_decay": 0.99,
        "scheduler": "ExponentialLR", "lr_scheduler_gamma": round(0.2 ** (1 / epochs), 5), "loss": "weighted",
        "energy_weight": 1, "forces_weight": 100, "default_dtype": "float32", "device": "cpu", "plot": False,
        "patience": 100_000,
    }  # fmt: skip
    model = train(flags, work)
    row: dict[str, Any] = {
        "set": path.name.partition(".")[0],
        "base": base.stem,
        "method": method,
        "lr": lr,
        "seed": seed,
    }
    for part in ("valid", "test"):
        evaluate_model(f"mace:{model}", files[part], files["train"], work / part)
        row[part] = json.loads((work / part / "errors.json").read_text())
    write_text(result, json.dumps(row) + "\n")
    shutil.rmtree(work)
    return row


def score(row: dict[str, Any]) -> float:
    """Geometric mean of energy and force MAE on the validation frames."""
    return float(np.sqrt(row["valid"]["mae_e_refit"] * row["valid"]["errors"]["mae_f"]))


@app.command()
def run(
    data: Annotated[Path, typer.Option(help="folder with one file per set")],
    base: Annotated[Path, typer.Option(help="MACE foundation model (a pickle: only from sources you trust)")],
    only: Annotated[str, typer.Option(help="part of the file name, to choose sets")] = "",
    seeds: Annotated[str, typer.Option(help="comma-separated; the first is used for the sweep")] = "0",
    scale: Annotated[str, typer.Option(help=f"one of {', '.join(EPOCHS)}")] = "laptop",
    folder: Folder = Path("lora-27"),
) -> None:
    """Run what is missing; sets with elements that the base lacks are left out and named."""
    known = {int(z) for z in load_model(base).atomic_numbers}
    suffixes = {".xyz", ".extxyz", ".npz", ".gz", ".traj", ".db"}
    paths = [p for p in sorted(data.rglob("*")) if p.is_file() and p.suffix in suffixes and only in p.name]
    if not paths:
        raise typer.BadParameter(f"no data files in {data} with {only!r} in their names", param_hint="--data")
    first, *rest = (int(s) for s in seeds.split(","))
    for path in paths:
        try:
            split = parts(path, first, folder / "work" / f"{path.name}-s{first}")
        except (ValueError, KeyError) as err:
            print(f"left out: {path}: {err}")
            continue
        missing = sorted(
            {
                s
                for a in ase.io.read(split["train"], ":")
                for s in a.get_chemical_symbols()
                if ase.Atom(s).number not in known
            }
        )
        if missing:
            print(f"left out: {path}: {base.name} does not know {', '.join(missing)}")
            continue
        for method, (_, lrs) in METHODS.items():
            rows = [one(path, base, method, lr, first, EPOCHS[scale], folder) for lr in lrs]
            best = min(rows, key=score)["lr"]
            for seed in rest:
                one(path, base, method, best, seed, EPOCHS[scale], folder)
        table(folder)


@app.command()
def table(folder: Folder = Path("lora-27")) -> None:
    """Write report.md and improvement.png from the finished runs."""
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for path in sorted(folder.glob("*.json")):
        row = json.loads(path.read_text())
        groups.setdefault((row["set"], row["base"]), {}).setdefault(row["method"], []).append(row)
    lines = [
        "# LoRA against full fine-tuning", "",
        f"{TRAIN} + {VALID} frames, best of three learning rates by validation, median over seeds; E in meV/atom with "
        f"constant offsets removed for both, F in meV/Å. {datetime.date.today()}, "
        f"{len(os.sched_getaffinity(0))} cores, CPU. Command: `python recipes/lora_27.py run --data DIR --base FILE`.",
        "",
        "| set | base | seeds | full: lr, E, F | LoRA: lr, E, F | change E | change F |", "|" + "---|" * 7,
    ]  # fmt: skip
    changes: list[tuple[str, float, float]] = []
    for (name, base), methods in groups.items():
        if set(methods) != set(METHODS):
            continue
        cells, errors, seeds = [], [], 0
        for rows in (methods[m] for m in METHODS):
            sweep = min(r["seed"] for r in rows)
            lr = min((r for r in rows if r["seed"] == sweep), key=score)["lr"]
            chosen = [r for r in rows if r["lr"] == lr]
            seeds = len(chosen)
            e, f = (
                median(r["test"]["mae_e_refit"] for r in chosen),
                median(r["test"]["errors"]["mae_f"] for r in chosen),
            )
            errors.append((e, f))
            cells.append(f"{lr:g}, {e:.2f}, {f:.1f}")
        e, f = (errors[1][k] / errors[0][k] - 1 for k in (0, 1))
        changes.append((name, e, f))
        lines.append(f"| {name} | {base} | {seeds} | {cells[0]} | {cells[1]} | {100 * e:+.1f} % | {100 * f:+.1f} % |")
    if changes:
        lines += ["", *(summary(what, [c[k] for c in changes]) for k, what in ((1, "Energy"), (2, "Forces")))]
        lines.append("The paper: 26 of 27 sets better, 22 % on average.")
        plot(changes, folder / "improvement.png")
    write_text(folder / "report.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"written: {folder / 'report.md'}")


def summary(what: str, values: list[float]) -> str:
    """Wins and mean change with a bootstrap interval over sets."""
    samples = np.random.default_rng(0).choice(values, (2000, len(values))).mean(axis=1)
    low, high = 100 * np.percentile(samples, [2.5, 97.5])
    return (
        f"{what}: LoRA better on {sum(v < 0 for v in values)} of {len(values)} sets, mean change "
        f"{100 * np.mean(values):+.1f} % ({low:+.1f} to {high:+.1f})."
    )


def plot(changes: list[tuple[str, float, float]], path: Path) -> None:
    """Change of both errors for every set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 1.2 + 0.3 * len(changes)), layout="constrained")
    axis = figure.subplots()
    rows = np.arange(len(changes))
    axis.barh(rows - 0.2, [100 * c[1] for c in changes], 0.4, label="energy")
    axis.barh(rows + 0.2, [100 * c[2] for c in changes], 0.4, label="forces")
    axis.set_yticks(rows, [c[0] for c in changes])
    axis.axvline(0, color="k", linewidth=0.8)
    axis.set(xlabel="LoRA against full fine-tuning: change of the test error (%)")
    axis.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


if __name__ == "__main__":
    app()
