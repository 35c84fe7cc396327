"""Synthetic pre-training on disordered carbon: NequIP from N DFT structures, directly and after other labels.

Purpose:  the carbon experiment of Gardner et al. (Mach. Learn.: Sci. Technol. 5, 015003), in kind: NequIP (r_max 4, 4
          layers, 32 features, l_max 1) is pre-trained on carbon structures labelled by an empirical or machine-learned
          potential and fine-tuned on N = 25 … 250 DFT structures; test RMSE of energy and forces against direct
          training at the best of three learning rates. --source names the labels, e.g. lammps:tersoff,
          lammps:edip, lammps:lcbop, nep:FILE, sevennet:7net-0 or mace:FILE; several can be compared.
Command:  python recipes/synthetic_pretraining_carbon.py frames                       # MACE environment, [lammps]
          python recipes/synthetic_pretraining_carbon.py label --source lammps:tersoff   # where the source is installed
          python recipes/synthetic_pretraining_carbon.py run --data CARBON.xyz --source lammps:tersoff   # in NequIP's
          … run … --frames 250 or --pretrain-epochs 5: dependence on the size and the length of pre-training
          … label … --data CARBON.xyz, then run … --same: control, the source's labels on the N DFT geometries alone
          python recipes/synthetic_pretraining_carbon.py table
Data:     DFT structures of carbon with energy (eV) and forces (eV/Å), any format of ASE, e.g. C-GAP-17's; --test takes
          a file of its own for the test, else 49 of the former are held out. N counts training and validation.
Cost:     laptop on one CPU thread: frames 30 minutes, labels minutes, run 4 hours a source and seed; smoke 8 minutes.
Writes:   carbon/: frames.xyz, one labelled file per source, one folder per seed (direct training is shared by all
          sources), report.md. Stopped, every command goes on.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import ase
import ase.io
import numpy as np
import typer
import yaml
from ase.build import bulk

from mace_lora.atomic import atomic_path, content_digest, keep_settings, write_text
from mace_lora.augment import Schedule, label, sample_md
from mace_lora.data import require_sound
from mace_lora.evaluate.machine import machine

# cells for each density, frames of each, test structures, numbers of DFT structures, epochs of pre-training, steps
SCALES = {
    "smoke": {"cells": 1, "frames": 8, "test": 10, "counts": [25], "pretrain": 1, "steps": 10},
    "laptop": {"cells": 4, "frames": 50, "test": 49, "counts": [25, 100, 250], "pretrain": 20, "steps": 1500},
    "paper": {
        "cells": 20,
        "frames": 200,
        "test": 49,
        "counts": [25, 50, 100, 250],
        "pretrain": 50,
        "steps": 10000,
    },
}
DENSITIES = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)  # g/cm³
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
    """A potential's name as part of a file name; files of equal names in different folders stay apart."""
    kind, _, files = source.partition(":")
    parts = [kind, *(Path(p).name for p in files.split("+") if p)]
    text = "_".join("".join(c if c.isalnum() or c == "." else "_" for c in p) for p in parts)
    return text if "/" not in source else f"{text}_{hashlib.sha256(source.encode()).hexdigest()[:6]}"


def settings_of(folder: Path, wanted: dict[str, str] | None = None) -> dict[str, Any]:
    """Scale and dynamics of a folder; other ones are refused."""
    if wanted is not None:
        keep_settings(folder, wanted, error=typer.BadParameter)
    file = folder / "settings.json"
    if not file.is_file():
        raise typer.BadParameter(f"run the command frames first: no {file}", param_hint="--folder")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@app.command()
def frames(
    scale: Annotated[str, typer.Option(help=f"one of {', '.join(SCALES)}")] = "laptop",
    with_: Annotated[str, typer.Option("--with", help="potential of the dynamics")] = "lammps:tersoff",
    workers: Annotated[int, typer.Option(help="processes")] = max(1, len(os.sched_getaffinity(0))),
    folder: Folder = Path("carbon"),
) -> None:
    """Melt and quench 64-atom cells at seven densities, 8000 to 300 K."""
    if scale not in SCALES:
        raise typer.BadParameter(f"expected one of {', '.join(SCALES)}, got {scale!r}", param_hint="--scale")
    settings_of(folder, {"scale": scale, "dynamics": with_})
    sizes: dict[str, Any] = SCALES[scale]
    starts = []
    for density in DENSITIES:
        cell = bulk("C", "diamond", a=3.567, cubic=True) * (2, 2, 2)
        volume = len(cell) * 12.011 * 1.66053907 / density
        cell.set_cell(cell.cell * (volume / cell.get_volume()) ** (1 / 3), scale_atoms=True)
        starts += [cell] * sizes["cells"]
    schedule = Schedule(8000.0, 300.0, sizes["frames"], 20.0, 0.5, 0.02, 500.0)
    if not (folder / "frames.xyz").is_file():
        sample_md(starts, folder / "frames.xyz", with_, [schedule], seed=1, workers=workers)
    print(f"written: {len(ase.io.read(folder / 'frames.xyz', ':'))} frames to {folder / 'frames.xyz'}")


def keep_data(folder: Path, **files: Path | None) -> None:
    """All runs of a folder are of the same DFT structures, and tested on the same."""
    for name, file in files.items():
        digest = content_digest(file) if file is not None else ""
        keep_settings(folder / "dft" / name, {f"--{name}": digest}, error=typer.BadParameter)


@app.command("label")
def label_frames(
    source: Source,
    data: Annotated[Path | None, typer.Option(help="DFT structures, labelled by the source too (for --same)")] = None,
    workers: Annotated[int, typer.Option(help="processes")] = max(1, len(os.sched_getaffinity(0))),
    folder: Folder = Path("carbon"),
) -> None:
    """Label the frames by one source."""
    if data is not None:
        keep_data(folder, data=data)
    report = label(folder / "frames.xyz", folder / f"{named(source)}.xyz", source, workers=workers)
    print(f"written: {report.output}")
    if data is not None:
        geometries = [
            ase.Atoms(a.numbers, positions=a.positions, cell=a.cell, pbc=a.pbc) for a in ase.io.read(data, ":")
        ]
        print(f"written: {label(geometries, folder / f'{named(source)}-same.xyz', source, workers=workers).output}")


def structures(path: Path) -> list[ase.Atoms]:
    """DFT structures with REF_energy (eV) and REF_forces (eV/Å)."""
    out = []
    for atoms in ase.io.read(path, ":"):
        frame = ase.Atoms(atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        frame.info["REF_energy"], frame.arrays["REF_forces"] = atoms.get_potential_energy(), atoms.get_forces()
        out.append(frame)
    return out


@dataclass(frozen=True)
class Variant:
    """Which synthetic labels are learnt: so many of the frames (None: all), for so many epochs.

    None: as many steps as all frames take in the scale's epochs, so that variants differ in their data alone.
    """

    source: str
    frames: int | None = None
    epochs: int | None = None
    same: bool = False

    @property
    def name(self) -> str:
        more = (("frames", self.frames), ("epochs", self.epochs), ("same", self.same or None))
        return named(self.source) + "".join(f"-{k}{'' if v is True else v}" for k, v in more if v is not None)

    def labelled(self, folder: Path, place: Path, chosen: np.ndarray) -> Path:
        """File of the labelled frames; ``chosen``: indices of the DFT structures that are learnt from."""
        file = folder / f"{named(self.source)}{'-same' if self.same else ''}.xyz"
        if not file.is_file():
            raise typer.BadParameter(f"no {file}: run the command label first", param_hint="--source")
        if not self.same and self.frames is None:
            return file.resolve()
        found = sorted(ase.io.read(file, ":"), key=lambda a: int(a.info["input_index"]))
        if self.same:
            wanted = {int(i) for i in chosen}
            part = [a for a in found if int(a.info["input_index"]) in wanted]
        else:
            part = [found[i] for i in np.random.default_rng(0).permutation(len(found))[: self.frames]]
        return write(place / f"{self.name}-{len(chosen)}.xyz", part).resolve()


def config(
    folder: Path, data: Path, test: Path | None, variant: Variant, seed: int, count: int, sizes: dict[str, Any]
) -> Path:
    """Frames and config of one run of equitune distill."""
    place = folder / f"s{seed}"
    place.mkdir(parents=True, exist_ok=True)
    pool, tested = structures(data), structures(test) if test is not None else []
    fixed = np.random.default_rng(0).permutation(len(pool))  # the test structures are the same for every seed
    apart = 0 if tested else sizes["test"]
    tested, rest = (
        tested or [pool[i] for i in fixed[:apart]],
        np.random.default_rng(seed + 1).permutation(fixed[apart:]),
    )
    if len(rest) < count:
        raise typer.BadParameter(f"expected {apart + count} structures for {count} labels, got {len(pool)}",
                                 param_hint="--data")  # fmt: skip
    chosen = rest[:count]
    role = np.arange(count) % 5 == 4  # by place: what is trained on at a smaller N is trained on at a larger one
    for name, which in (("train", chosen[~role]), ("valid", chosen[role])):
        write(place / f"{name}_{count}.xyz", [pool[i] for i in which])
    write(place / "test.xyz", tested)
    for name in ("nequip_data", "nequip_autotune"):
        target = "student" if name == "nequip_autotune" else name
        write_text(place / f"{target}.yaml", (CONFIGS / f"{name}.yaml").read_text())
    epochs, inner = max(1, sizes["steps"] * 10 // int((~role).sum())), "training_module.model.model"
    labelled = variant.labelled(folder, place, chosen[~role])
    # every variant takes as many steps as the whole set does in the scale's epochs
    whole, part = (len(ase.io.read(p, ":")) for p in (folder / f"{named(variant.source)}.xyz", labelled))
    first = variant.epochs or max(1, round(sizes["pretrain"] * whole / part))
    gamma = "training_module.lr_scheduler.scheduler.gamma"
    content = {
        "folder": ".", "train": f"train_{count}.xyz", "valid": f"valid_{count}.xyz", "test": "test.xyz", "seed": seed,
        "report": f"n{count}-{variant.name}",
        "teacher": {"labelled": str(labelled)},
        "filter": {"force": 80},
        "student": {
            "nequip": "student.yaml",
            "flags": {
                "types": ["C"], "r_max": 4.0, "batch_size": 10, f"{inner}.num_layers": 4, f"{inner}.l_max": 1,
                f"{inner}.num_features": 32,
            },
            "pretrain": {"epochs": first, "lrs": [0.01], "flags": {gamma: 0.05 ** (1 / first)}},
            "finetune": {
                "epochs": epochs, "lrs": [0.002, 0.005, 0.01], "flags": {gamma: 0.05 ** (1 / epochs)},
            },
            "direct": {
                "epochs": epochs, "lrs": [0.002, 0.005, 0.01], "flags": {gamma: 0.05 ** (1 / epochs)},
            },
        },
    }  # fmt: skip
    file = place / f"n{count}-{variant.name}.yaml"
    write_text(file, yaml.safe_dump(content, sort_keys=False))
    return file


@app.command()
def run(
    data: Annotated[Path, typer.Option(help="DFT structures of carbon")],
    source: Source,
    test: Annotated[Path | None, typer.Option(help="DFT structures for the test alone")] = None,
    seeds: Annotated[str, typer.Option(help="comma-separated")] = "0,1,2,3,4",
    counts: Annotated[str, typer.Option(help="numbers of structures; default those of the scale")] = "",
    frames: Annotated[int | None, typer.Option(help="synthetic frames to learn from; default all")] = None,
    pretrain_epochs: Annotated[int | None, typer.Option(help="epochs of pre-training; default the scale's")] = None,
    same: Annotated[bool, typer.Option(help="control: pre-train on the source's labels of the N geometries")] = False,
    folder: Folder = Path("carbon"),
) -> None:
    """Train directly and after pre-training for every number of DFT structures."""
    sizes: dict[str, Any] = SCALES[settings_of(folder)["scale"]]
    variant = Variant(source, frames, pretrain_epochs, same)
    for file in (data, *([test] if test else [])):
        require_sound(structures(file))
    keep_data(folder, data=data, test=test)
    for seed in seeds.split(","):
        for count in map(int, counts.split(",")) if counts else sizes["counts"]:
            print(f"{variant.name}, seed {seed}, {count} structures", flush=True)
            file = config(folder, data, test, variant, int(seed), count, sizes)
            subprocess.run([Path(sys.executable).parent / "equitune", "distill", file], check=True)
    table(folder)


@app.command()
def table(folder: Folder = Path("carbon")) -> None:
    """Write report.md from the runs that are there."""
    settings = settings_of(folder)
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("s*/n*-*.json")):
        count, _, name = path.stem[1:].partition("-")
        row = json.loads(path.read_text()) | {"seed": path.parent.name[1:]}
        found.setdefault((int(count), name), []).append(row)
    lines = [
        "# Synthetic pre-training on disordered carbon", "",
        f"NequIP, r_max 4 Å, 4 layers, 32 features, l_max 1; dynamics: {settings['dynamics']}; scale "
        f"`{settings['scale']}`, "
        f"{datetime.date.today()}, {machine()}. Test RMSE, median over seeds: energy "
        "(meV/atom; in brackets the MAE without constant offsets) / forces (eV/Å). Commands: `python "
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
        seeds = ", ".join(c["seed"] for c in contents)
        lines.append(
            f"| {count} | {source} | {seeds} | {' | '.join(cells)} | {change[0]:+.0f} % | {change[1]:+.0f} % |"
        )
    lines += ["", *efficiency(found)]
    lines += ["", "The paper at N = 25, 100, 400: " + "; ".join(f"{k} {v}" for k, v in PAPER.items()) + "."]
    write_text(folder / "report.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"written: {folder / 'report.md'}")


def efficiency(found: dict[tuple[int, str], list[dict[str, Any]]]) -> list[str]:
    """Pre-trained at the smallest N against direct training at the largest, for every kind of labels."""
    lines = []
    for source in sorted({s for _, s in found}):
        counts = sorted(n for n, s in found if s == source)
        few, many = found[counts[0], source], found[counts[-1], source]
        if counts[0] == counts[-1]:
            continue
        values = [
            median(r["evaluations"][kind]["errors"][key] for r in rows)
            for key in ("rmse_e", "rmse_f") for rows, kind in ((few, "finetune"), (many, "direct"))
        ]  # fmt: skip
        lines.append(
            f"{source}: pre-trained at N = {counts[0]}: {values[0]:.0f} meV/atom and {values[2] / 1e3:.3f} eV/Å; "
            f"directly at N = {counts[-1]}: {values[1]:.0f} and {values[3] / 1e3:.3f}."
        )
    return lines


if __name__ == "__main__":
    app()
