"""LoRA against full fine-tuning over as many data sets as there are: wins and mean improvement.

Purpose:  the 27-set table of the two-stage framework (Hu et al., JCST 2026, doi 10.1007/s11390-026-6106-z) in kind,
          with every labelled file that is given: 50 training and 50 validation frames, up to 500 test frames; both
          methods get the same frames, epochs and energy references, and the best of three learning rates on the
          validation frames of the first seed.
Command:  python recipes/lora_27.py run --data DIR --base MACE.model        # again with another base for other elements
          python recipes/lora_27.py table
Data:     a folder of extxyz or any format of ASE with energy and forces (eV, eV/Å; REF_energy and REF_forces count
          first), or rMD17's npz (kcal/mol). Files of a folder whose names differ by train, valid, val and test alone
          are one set: it learns from the first and is tested on the last of these; any other file is split.
Cost:     one CPU thread, laptop: 3 to 20 minutes a run of a molecule, 8 runs a set at one seed; smoke: 2 minutes a set.
Writes:   lora-27/: one JSON per run, report.md, improvement.png. Stopped, the same command goes on.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import ase
import ase.io
import numpy as np
import typer
from ase import units

from mace_lora.atomic import atomic_path, content_digest, write_text
from mace_lora.data import require_sound
from mace_lora.distill.evaluation import evaluate_model
from mace_lora.evaluate.machine import machine
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


@dataclass(frozen=True)
class Source:
    """One data set: files to learn from and files to test on (none: the former are split)."""

    name: str
    learn: tuple[Path, ...]
    test: tuple[Path, ...]

    @property
    def label(self) -> str:
        """Name and content."""
        return f"{self.name} ({self.digest})"

    @property
    def digest(self) -> str:
        """Content of its files, so that results of other data of the same name are not taken for its own."""
        text = "".join(content_digest(p) for p in (*self.learn, *self.test))
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def sources(data: Path) -> list[Source]:
    """The sets of a folder."""
    groups: dict[str, dict[str, list[Path]]] = {}
    for path in sorted(data.rglob("*")):
        if not path.is_file() or path.suffix not in {".xyz", ".extxyz", ".npz", ".gz", ".traj", ".db"}:
            continue
        stem = re.sub(r"\.(gz|xyz|extxyz|npz|traj|db)$", "", re.sub(r"\.gz$", "", path.name))
        part = re.findall(r"(?i)(?:^|[_.-])(train|valid|val|test)[0-9]*(?=[_.-]|$)", stem)
        kind = part[-1].lower() if part else ""
        common = re.sub(r"(?i)(^|[_.-])(train|valid|val|test)[0-9]*(?=[_.-]|$)", "", stem).strip("_.-")
        folder = "_".join(path.parent.relative_to(data).parts)
        name = "_".join(p for p in (folder, common) if p) or data.name
        groups.setdefault(name, {}).setdefault("valid" if kind == "val" else kind, []).append(path)
    out = []
    for name, parts in groups.items():
        learn = parts.get("train") or parts.get("") or parts.get("valid")
        if learn is None:  # frames that somebody keeps for tests are not learnt from
            continue
        others = parts.get("test") or parts.get("valid") or []
        out.append(Source(name, tuple(learn), tuple(others) if others is not learn else ()))
    return out


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
        frame = ase.Atoms(atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        out.append(labelled(frame, energy, forces))
    return out


def labelled(atoms: ase.Atoms, energy: float, forces: np.ndarray) -> ase.Atoms:
    atoms.info["REF_energy"], atoms.arrays["REF_forces"] = float(energy), np.asarray(forces, float)
    return atoms


def parts(source: Source, seed: int, place: Path) -> dict[str, Path]:
    """Files of one split; the test frames are the same for every seed."""
    files = {name: place / f"{name}.xyz" for name in ("train", "valid", "test")}
    if files["test"].exists():
        return files
    pool, test = ([a for path in paths for a in read(path)] for paths in (source.learn, source.test))
    needed = TRAIN + VALID + (0 if test else 20)
    if len(pool) < needed:
        raise ValueError(f"expected at least {needed} frames, got {len(pool)}")
    if not test:
        fixed = np.random.default_rng(0).permutation(len(pool))
        count = min(TEST, len(pool) - TRAIN - VALID)
        test, pool = [pool[i] for i in fixed[:count]], [pool[i] for i in fixed[count:]]
    tested = [test[i] for i in np.random.default_rng(0).permutation(len(test))[:TEST]]
    order = np.random.default_rng(seed + 1).permutation(len(pool))
    chosen = {"train": [pool[i] for i in order[:TRAIN]], "valid": [pool[i] for i in order[TRAIN : TRAIN + VALID]]}
    chosen["test"] = tested
    require_sound([a for frames in chosen.values() for a in frames])
    for name, frames in chosen.items():  # the test frames last: they say that all are there
        with atomic_path(files[name]) as temporary:
            ase.io.write(temporary, frames, format="extxyz", write_results=False)
    return files


def one(source: Source, base: Path, method: str, lr: float, seed: int, epochs: int, folder: Path) -> dict[str, Any]:
    """Train and evaluate one run; a stored one is read."""
    name = f"{source.name}-{source.digest}__{named(base)}__{method}__lr{lr:g}__s{seed}__e{epochs}"
    result, work = folder / f"{name}.json", folder / "work" / name
    if result.is_file():
        return json.loads(result.read_text())
    print(name, flush=True)
    files = parts(source, seed, split_folder(folder, source, seed))
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
        "set": source.name, "base": named(base), "method": method, "lr": lr, "seed": seed, "epochs": epochs,
        "digest": source.digest,
    }  # fmt: skip
    for part in ("valid", "test"):
        evaluate_model(f"mace:{model}", files[part], files["train"], work / part)
        row[part] = json.loads((work / part / "errors.json").read_text())
    write_text(result, json.dumps(row) + "\n")
    shutil.rmtree(work)
    return row


def named(base: Path) -> str:
    """A base by name and content."""
    return f"{base.stem}-{content_digest(base)[:8]}"


def split_folder(folder: Path, source: Source, seed: int) -> Path:
    return folder / "work" / f"{source.name}-{source.digest}-s{seed}"


def score(row: dict[str, Any]) -> float:
    """Geometric mean of energy and force MAE on the validation frames."""
    return float(np.sqrt(row["valid"]["mae_e_refit"] * row["valid"]["errors"]["mae_f"]))


@app.command()
def run(
    data: Annotated[Path, typer.Option(help="folder of data sets")],
    base: Annotated[Path, typer.Option(help="MACE foundation model (a pickle: only from sources you trust)")],
    only: Annotated[str, typer.Option(help="part of the sets' names, to choose some")] = "",
    seeds: Annotated[str, typer.Option(help="comma-separated; the first is used for the sweep")] = "0",
    scale: Annotated[str, typer.Option(help=f"one of {', '.join(EPOCHS)}")] = "laptop",
    folder: Folder = Path("lora-27"),
) -> None:
    """Run what is missing; sets with elements that the base lacks, or that fail, are left out and named."""
    if scale not in EPOCHS:
        raise typer.BadParameter(f"expected one of {', '.join(EPOCHS)}, got {scale!r}", param_hint="--scale")
    known = {int(z) for z in load_model(base).atomic_numbers}
    chosen = [s for s in sources(data) if only in s.name]
    if not chosen:
        raise typer.BadParameter(f"no data files in {data} with {only!r} in their sets' names", param_hint="--data")
    command = f"python recipes/lora_27.py run --data DIR --base {base.name} --seeds {seeds} --scale {scale}"
    first, *rest = (int(s) for s in seeds.split(","))
    settings = folder / "settings" / f"{named(base)}.json"
    known_runs = json.loads(settings.read_text()) if settings.is_file() else {"commands": [], "left": {}}
    commands, left = [*dict.fromkeys([*known_runs["commands"], command])], known_runs["left"]
    for source in chosen:
        left.pop(source.label, None)
        try:
            split = parts(source, first, split_folder(folder, source, first))
            elements = {(s, ase.Atom(s).number) for a in ase.io.read(split["train"], ":") for s in a.symbols}
            missing = sorted(s for s, z in elements if z not in known)
            if missing:
                raise ValueError(f"{base.name} does not know {', '.join(missing)}")
            for method, (_, lrs) in METHODS.items():
                rows = [one(source, base, method, lr, first, EPOCHS[scale], folder) for lr in lrs]
                best = min(rows, key=score)["lr"]
                for seed in rest:
                    one(source, base, method, best, seed, EPOCHS[scale], folder)
        except Exception as err:  # readers raise what they run into; one bad set must not end the others
            left[source.label] = f"{type(err).__name__}: {err}" if not isinstance(err, ValueError) else str(err)
            print(f"left out: {source.label}: {left[source.label]}", flush=True)
        write_text(settings, json.dumps({"commands": commands, "left": left}) + "\n")
        table(folder)


@app.command()
def table(folder: Folder = Path("lora-27")) -> None:
    """Write report.md and improvement.png from the finished runs, at the largest number of epochs that there is."""
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    rows = [r for r in rows if "epochs" in r]  # others are of an earlier version
    runs = [json.loads(path.read_text()) for path in sorted((folder / "settings").glob("*.json"))]
    epochs = max((r["epochs"] for r in rows), default=0)
    groups: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = {}
    for row in (r for r in rows if r["epochs"] == epochs):
        groups.setdefault(f"{row['set']} ({row['digest']})", {}).setdefault(row["base"], {}).setdefault(
            row["method"], []
        ).append(row)
    lines = [
        "# LoRA against full fine-tuning", "",
        f"{TRAIN} + {VALID} frames, {epochs} epochs, best of three learning rates by validation, median over seeds; E "
        f"in meV/atom with constant offsets removed for both, F in meV/Å; a set that several bases know counts once, "
        "with the one that is better on its validation frames.", "",
        f"{datetime.date.today()}, {machine()}.", "",
        "Commands: " + "; ".join(f"`{c}`" for r in runs for c in r["commands"]) + ".", "",
        "| set | base | seeds | full: lr, E, F | LoRA: lr, E, F | change E | change F |", "|" + "---|" * 7,
    ]  # fmt: skip
    changes: list[tuple[str, float, float]] = []
    for name, bases in groups.items():
        complete = {b: methods for b, methods in bases.items() if set(methods) == set(METHODS)}
        if not complete:
            continue
        base = min(complete, key=lambda b: min(score(r) for rows in complete[b].values() for r in rows))
        chosen = [best_rows(complete[base][m]) for m in METHODS]
        errors = [[median(test_mae(r)[k] for r in rows) for k in (0, 1)] for rows in chosen]
        e, f = (errors[1][k] / errors[0][k] - 1 for k in (0, 1))
        cells = [f"{rows[0]['lr']:g}, {x:.2f}, {y:.1f}" for rows, (x, y) in zip(chosen, errors, strict=True)]
        seeds = ", ".join(str(r["seed"]) for r in chosen[1])
        changes.append((name, e, f))
        lines.append(f"| {name} | {base} | {seeds} | {cells[0]} | {cells[1]} | {100 * e:+.1f} % | {100 * f:+.1f} % |")
    if changes:
        lines += ["", *(summary(what, [c[k] for c in changes]) for k, what in ((1, "Energy"), (2, "Forces")))]
        lines.append("The paper: 26 of 27 sets better, 22 % on average.")
        plot(changes, folder / "improvement.png")
    # a set of which only one method could be trained is none of the wins, and is named
    left = dict.fromkeys(groups, "not all runs are finished") | {k: v for r in runs for k, v in r["left"].items()}
    left = {k: v for k, v in left.items() if k not in {c[0] for c in changes}}
    lines += ["", "Left out: " + ("; ".join(f"{k} ({v})" for k, v in left.items()) or "none") + "."]
    write_text(folder / "report.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"written: {folder / 'report.md'}")


def best_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs of all seeds at the learning rate that is best on the validation frames of the first."""
    sweep = min(r["seed"] for r in rows)
    lr = min((r for r in rows if r["seed"] == sweep), key=score)["lr"]
    return [r for r in rows if r["lr"] == lr]


def test_mae(row: dict[str, Any]) -> tuple[float, float]:
    """Energy (meV/atom, offsets removed) and force (meV/Å) MAE."""
    return row["test"]["mae_e_refit"], row["test"]["errors"]["mae_f"]


def summary(what: str, values: list[float]) -> str:
    """Wins and mean change with a bootstrap interval over sets, as if they were independent."""
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
