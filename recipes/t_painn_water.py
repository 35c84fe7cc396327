"""Classical-to-quantum transfer for liquid water: errors, then structure, density and diffusion.

Purpose:  the water experiment of T-PaiNN (arXiv 2603.24752) in kind, with MACE: pre-trained on a flexible water model
          of OpenMM, fine-tuned on N DFT frames of 64 molecules, against the same model from scratch, at the best of 3
          learning rates (validation: a fifth of N, at least 5, out of N). Then dynamics with both: radial distribution
          functions against the DFT frames' own, self-diffusion (NVT, blocks) and density (NPT, 1 bar, blocks), beside
          the classical model's.
Command:  python recipes/t_painn_water.py train --data WATER.xyz --scale laptop
          python recipes/t_painn_water.py dynamics --data WATER.xyz --scale laptop
Data:     periodic DFT frames of water with energy and forces (eV, eV/Å), e.g. PBE0-TS of DeePMD-kit's example.
Cost:     one CPU thread: laptop train 5 hours a seed (23,000 steps of 2 x 192 atoms), dynamics 5 hours; smoke 15
          minutes.
Writes:   t-painn-water/: classical.xyz, one folder per seed, report.md, dynamics.md, rdf.png. Stopped, both go on, but
          an unfinished density (NPT) starts anew; settings.json keeps a folder to one scale, classical model and
          data file.
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
from ase import units
from ase.md.nose_hoover_chain import IsotropicMTKNPT

from mace_lora.atomic import atomic_path, content_digest, keep_settings, write_text
from mace_lora.augment import Schedule, label, molecule, open_labeler, pack, sample_md
from mace_lora.augment.dynamics import thermalize_momenta
from mace_lora.augment.perturb import bare
from mace_lora.autotune.advice import with_labels
from mace_lora.data import require_sound
from mace_lora.evaluate.machine import machine
from mace_lora.evaluate.structure import radial_distribution, rdf_distance

# classical frames of each temperature, test frames, numbers of labels, epochs of pre-training, steps and least epochs
# after; ps
SCALES = {
    "smoke": {
        "frames": 6, "test": 6, "counts": [10], "pretrain": 1, "steps": 6, "epochs": 1, "nvt": 0.2, "npt": 0.05,
        "wait": 0.02,
    },
    "laptop": {
        "frames": 100, "test": 100, "counts": [25, 50, 100], "pretrain": 10, "steps": 1000, "epochs": 40, "nvt": 10.0,
        "npt": 10.0, "wait": 2.0,
    },
    "paper": {
        "frames": 1000, "test": 100, "counts": [25, 50, 100, 200], "pretrain": 100, "steps": 10000, "epochs": 100,
        "nvt": 100.0, "npt": 100.0, "wait": 10.0,
    },
}  # fmt: skip
PAIRS = (("O", "O"), ("O", "H"), ("H", "H"))
TIMESTEP, EVERY = 0.5, 20  # fs, steps between frames
BALLISTIC = 0.5  # ps: what the mean square displacement is not fitted on
SCALE_HELP = f"one of {', '.join(SCALES)}"
app = typer.Typer(add_completion=False, no_args_is_help=True)
Folder = Annotated[Path, typer.Option(help="results")]
Scale = Annotated[str, typer.Option(help=SCALE_HELP)]
Data = Annotated[Path, typer.Option(help="DFT frames, any format ASE reads")]
Classical = Annotated[str, typer.Option(help="classical potential, as for equitune label")]


def write(path: Path, frames: list[ase.Atoms]) -> Path:
    with atomic_path(path) as temporary:
        ase.io.write(temporary, frames, format="extxyz", write_results=False)
    return path


def claim(folder: Path, scale: str, classical: str, data: Path) -> dict[str, Any]:
    """Sizes of a scale; a folder is kept to its first one, its classical model and its data."""
    if scale not in SCALES:
        raise typer.BadParameter(f"expected {SCALE_HELP}, got {scale!r}", param_hint="--scale")
    settings = {"scale": scale, "classical": classical, "data": content_digest(data), "sizes": SCALES[scale]}
    keep_settings(folder, settings, names={"data": "--data"}, error=typer.BadParameter)
    return dict(SCALES[scale])


def quantum_frames(data: Path) -> list[ase.Atoms]:
    """Periodic frames with labels under our keys, whether they are standard ones or ours already."""
    out = with_labels(ase.io.read(data, ":"))
    for frame in out:
        frame.pbc = True
    return out


@app.command()
def train(
    data: Data, scale: Scale = "laptop", classical: Classical = "openmm:spce.xml",
    seeds: Annotated[str, typer.Option(help="comma-separated")] = "0,1,2",
    workers: Annotated[int, typer.Option(help="processes")] = max(1, len(os.sched_getaffinity(0))),
    folder: Folder = Path("t-painn-water"),
) -> None:  # fmt: skip
    """Classical frames and labels, then both trainings for every number of labels."""
    open_labeler(classical)  # a wrong name before the folder is claimed
    frames = quantum_frames(data)
    require_sound(frames)
    sizes = claim(folder, scale, classical, data)
    if not (folder / "md.xyz").exists():
        boxes = [pack([molecule("O")], [64], density, seed=k) for k, density in enumerate((0.95, 1.0, 1.05))]
        schedules = [Schedule(t, t, sizes["frames"], 20.0, 0.5, 0.05, 1000.0) for t in (280.0, 330.0, 400.0)]
        sample_md(boxes, folder / "md.xyz", classical, schedules, seed=1, workers=workers)
    label(folder / "md.xyz", folder / "classical.xyz", classical, workers=workers)
    fixed = np.random.default_rng(0).permutation(len(frames))
    test, rest = fixed[: sizes["test"]], fixed[sizes["test"] :]
    for seed in map(int, seeds.split(",")):
        order, place = np.random.default_rng(seed + 1).permutation(rest), folder / f"s{seed}"
        place.mkdir(exist_ok=True)
        write(place / "test.xyz", [frames[i] for i in test])
        for count in sizes["counts"]:
            held = max(5, count // 5)
            if len(order) < count:
                raise typer.BadParameter(f"expected {len(test) + count} frames, got {len(frames)}", param_hint="--data")
            write(place / f"valid_{count}.xyz", [frames[i] for i in order[:held]])
            write(place / f"train_{count}.xyz", [frames[i] for i in order[held:count]])
            epochs = max(sizes["epochs"], sizes["steps"] * 2 // (count - held))
            content = {
                "folder": ".", "train": f"train_{count}.xyz", "valid": f"valid_{count}.xyz", "test": "test.xyz",
                "seed": seed, "report": f"n{count}", "filter": {"force": 50},
                "teacher": {"labelled": str((folder / "classical.xyz").resolve())},
                "student": {
                    "flags": {
                        "hidden_irreps": "16x0e+16x1o", "max_ell": 2, "correlation": 2, "r_max": 4.5, "E0s": "average",
                        "batch_size": 2, "valid_batch_size": 5, "compute_stress": True,
                    },
                    "pretrain": {"epochs": sizes["pretrain"], "lrs": [0.01]},
                    "finetune": {"epochs": epochs, "lrs": [0.002, 0.005, 0.01]},
                    "direct": {"epochs": epochs, "lrs": [0.005, 0.01, 0.02]},
                },
            }  # fmt: skip
            write_text(place / f"n{count}.yaml", yaml.safe_dump(content, sort_keys=False))
            print(f"seed {seed}, {count} labels", flush=True)
            subprocess.run([Path(sys.executable).parent / "equitune", "distill", place / f"n{count}.yaml"], check=True)
            table(folder, scale, classical)


def table(folder: Path, scale: str, classical: str) -> None:
    """report.md from the runs that are there."""
    lines = [
        "# Classical to quantum for liquid water", "",
        f"MACE 16x0e+16x1o, r_max 4.5 Å; classical: {classical}; scale `{scale}`, {datetime.date.today()}, "
        f"{machine()}; command `python recipes/t_painn_water.py train --data FILE "
        f"--scale {scale}`. Medians over seeds; E in meV/atom raw and with constant offsets removed, F in meV/Å.", "",
        "| labels | seeds | E scratch | E autotuned | F scratch | F autotuned | ratio F | fewer steps |",
        "|" + "---|" * 8,
    ]  # fmt: skip
    found: dict[int, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("s*/n*.json")):
        found.setdefault(int(path.stem[1:]), []).append(json.loads(path.read_text()))
    for count, contents in sorted(found.items()):
        cells = []
        for key in ("direct", "finetune"):
            rows = [c["evaluations"][key] for c in contents]
            raw, refit = median(r["errors"]["mae_e"] for r in rows), median(r["mae_e_refit"] for r in rows)
            cells.append((f"{raw:.2f} ({refit:.2f})", median(r["errors"]["mae_f"] for r in rows)))
        fewer = median(c["comparison"]["direct_steps"] / c["comparison"]["finetune_steps"] for c in contents)
        (e0, f0), (e1, f1) = cells
        lines.append(f"| {count} | {len(contents)} | {e0} | {e1} | {f0:.1f} | {f1:.1f} | {f0 / f1:.2f} | {fewer:.1f} |")
    write_text(folder / "report.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"written: {folder / 'report.md'}")


def density(potential: str, start: ase.Atoms, kelvin: float, ps: float, wait: float, file: Path) -> str:
    """Mean and standard error over blocks of the density in g/cm³; NPT at 1 bar."""
    if not file.exists():
        atoms = bare(start)
        thermalize_momenta(atoms, temperature_K=kelvin, rng=np.random.default_rng(0))
        atoms.calc = open_labeler(potential).calculator(atoms)
        dynamics = IsotropicMTKNPT(
            atoms, TIMESTEP * units.fs, temperature_K=kelvin, pressure_au=1e5 * units.Pascal, tdamp=50 * units.fs,
            pdamp=500 * units.fs,
        )  # fmt: skip
        values: list[float] = []
        dynamics.attach(
            lambda: values.append(atoms.get_masses().sum() / atoms.get_volume() * 1.66053907), interval=EVERY
        )
        try:
            dynamics.run(round(1e3 * (wait + ps) / TIMESTEP))
        except (ValueError, ArithmeticError, RuntimeError, np.linalg.LinAlgError) as err:  # a model that falls apart
            print(f"NPT with {potential}: {err}", flush=True)
            values = []
        write_text(file, json.dumps(values if np.all(np.isfinite(values)) else []) + "\n")
    values = json.loads(file.read_text())
    if not values:
        return "the box falls apart"
    blocks = [np.mean(b) for b in np.array_split(values[round(len(values) * wait / (wait + ps)) :], 5)]
    return f"{np.mean(blocks):.3f} ± {np.std(blocks, ddof=1) / 5**0.5:.3f}"


def diffusion(frames: list[ase.Atoms]) -> tuple[float, float]:
    """Self-diffusion of oxygen in 10⁻⁹ m²/s, and its standard error over four blocks.

    Slope of the mean square displacement over all time origins, from BALLISTIC (or a quarter of a block, if that is
    less) to half of a block.
    """
    oxygen = [a.index for a in frames[0] if a.symbol == "O"]
    # (frames, oxygens, 3); the thermostat lets the whole box wander
    places = np.array([a.positions[oxygen] - a.get_center_of_mass() for a in frames])
    ps = 1e-3 * EVERY * TIMESTEP
    blocks = []
    for block in np.array_split(places, 4):
        lags = np.arange(max(1, min(round(BALLISTIC / ps), len(block) // 4)), len(block) // 2 + 1)
        moved = [np.mean(np.sum((block[lag:] - block[:-lag]) ** 2, axis=2)) for lag in lags]
        blocks.append(10 * np.polyfit(ps * lags, moved, 1)[0] / 6)  # Å²/ps is 1e-8 m²/s
    return float(np.mean(blocks)), float(np.std(blocks, ddof=1) / 2)


@app.command()
def dynamics(
    data: Data, scale: Scale = "laptop", classical: Classical = "openmm:spce.xml",
    count: Annotated[int, typer.Option(help="labels of the models; default the largest of the scale")] = 0,
    seed: Annotated[int, typer.Option(help="of the models")] = 0,
    temperature: Annotated[float, typer.Option(help="K; that of the DFT frames, whose RDF is compared")] = 330.0,
    folder: Folder = Path("t-painn-water"),
) -> None:  # fmt: skip
    """NVT and NPT dynamics of 64 molecules with both models and the classical one."""
    sizes = claim(folder, scale, classical, data)
    count = count or max(sizes["counts"])
    trained = folder / f"s{seed}" / f"n{count}.json"
    if not trained.is_file():
        raise typer.BadParameter(f"no {trained}: run the command train first", param_hint="--count, --seed")
    fits = json.loads(trained.read_text())["fits"]
    models = {
        "autotuned": f"mace:{fits['finetune']['model']}",
        "scratch": f"mace:{fits['direct']['model']}",
        "classical": classical,
    }
    reference = quantum_frames(data)
    place, start = folder / f"dynamics-s{seed}-n{count}-{temperature:g}K", bare(reference[0])
    place.mkdir(exist_ok=True)
    r_max = round(0.49 * start.cell.lengths().min(), 2)
    curves = {"reference": {p: radial_distribution(reference, p, r_max) for p in PAIRS}}
    lines = [
        "# Dynamics of liquid water", "",
        f"64 molecules, {temperature:g} K, {TIMESTEP:g} fs; NVT {sizes['nvt']:g} ps after {sizes['wait']:g} ps, NPT "
        f"{sizes['npt']:g} ps at 1 bar; models of {count} labels, seed {seed}; RDF: difference from the DFT frames' "
        "own in percent (these are not in order of time: their band is over parts of the file); errors over blocks; "
        "diffusion as simulated, with Langevin friction 0.5/ps and without a correction for the size of the box. "
        f"Scale `{scale}`, {datetime.date.today()}.", "",
        "| model | RDF O-O | O-H | H-H | diffusion (10⁻⁹ m²/s) | density (g/cm³) |", "|" + "---|" * 6,
    ]  # fmt: skip
    for name, potential in models.items():
        print(f"dynamics with {name}", flush=True)
        frames_wanted = round(1e3 * sizes["nvt"] / TIMESTEP / EVERY)
        schedule = Schedule(
            temperature, temperature, frames_wanted, EVERY * TIMESTEP, TIMESTEP, 0.0005, 1e3 * sizes["wait"]
        )
        if not (place / f"{name}.xyz").exists():
            try:
                sample_md([start], place / f"{name}.xyz", potential, [schedule], seed=1)
            except ValueError as err:  # a model that falls apart
                print(err, flush=True)
                lines.append(f"| {name} | the box falls apart" + " | –" * 4 + " |")
                continue
        frames = ase.io.read(place / f"{name}.xyz", ":")
        curves[name] = {p: radial_distribution(frames, p, r_max) for p in PAIRS}
        far = [rdf_distance(curves[name][p][1], curves["reference"][p][1]) for p in PAIRS]
        if len(frames) < frames_wanted:
            lines.append(f"| {name} | falls apart after {len(frames) * EVERY * TIMESTEP:g} fs" + " | –" * 4 + " |")
            continue
        moving, error = diffusion(frames)
        rho = density(potential, start, temperature, sizes["npt"], sizes["wait"], place / f"{name}_density.json")
        lines.append(f"| {name} | {' | '.join(f'{x:.1f}' for x in far)} | {moving:.2f} ± {error:.2f} | {rho} |")
    plot(curves, folder / "rdf.png")
    write_text(folder / "dynamics.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"written: {folder / 'dynamics.md'}, {folder / 'rdf.png'}")


def plot(curves: dict[str, dict[tuple[str, str], Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3), layout="constrained")
    for axis, pair in zip(figure.subplots(1, 3), PAIRS, strict=True):
        for name, found in curves.items():
            r, g, error = found[pair]
            axis.plot(r, g, "k--" if name == "reference" else "-", label=name, linewidth=1)
            axis.fill_between(r, g - np.nan_to_num(error), g + np.nan_to_num(error), alpha=0.2, linewidth=0)
        axis.set(xlabel="r (Å)", ylabel=f"g(r) {'-'.join(pair)}", ylim=(0, 4))
        axis.legend(fontsize=6)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


if __name__ == "__main__":
    app()
