"""MS-MACE on a molecular liquid: accuracy, stretched bonds, stability and structure for C12F27N at GFN2-xTB.

Purpose:  the experiments of the multiscale paper (arXiv 2312.09490) in kind: clusters of three molecules (120 atoms)
          from an annealed droplet; MACE with a short and with a long cutoff, MS-MACE, NequIP and MS-NequIP; each with
          and without bond-stretch augmentation (a random bond scaled by U(0.85, 2.0)).
Table:    errors on held-out clusters and on stretched ones; fraction of Langevin trajectories at 800 K that survive
          (collapse: a bond more than 5 Å from equilibrium); radial distribution functions against GFN2-xTB dynamics.
Command:  python recipes/multiscale_liquid.py --scale laptop [--nequip-bin .venv-nequip/bin]
Cost:     smoke 15 minutes, laptop about 6 hours on one core, paper: days on a GPU.
Writes:   multiscale-liquid/: settings.json, report.md, stability and rdf plots, one folder per model. Stopped, it goes
          on.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import ase.io
import numpy as np
import typer
import yaml
from active_liquid import SMILES, start_frames, write

from mace_lora.atomic import keep_settings, write_text
from mace_lora.augment import Schedule, cluster, keep_sound, label, sample_md, stretch_bond
from mace_lora.console import require_device
from mace_lora.data import require_sound

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[1]
SHORT, LONG = 3.5, 7.0
SCALES: dict[str, dict[str, Any]] = {
    "smoke": {"molecules": 4, "frames": 16, "test": 4, "stretched": 6, "epochs": 2, "steps": 200, "md": 40,
              "hidden": "8x0e+8x1o", "lr": 0.01, "models": ("MACE short", "MS-MACE")},
    "laptop": {"molecules": 8, "frames": 160, "test": 40, "stretched": 60, "epochs": 60, "steps": 10_000, "md": 4000,
               "hidden": "16x0e+16x1o", "lr": 0.01,
               "models": ("MACE short", "MACE long", "MS-MACE", "NequIP", "MS-NequIP")},
    "paper": {"molecules": 27, "frames": 901, "test": 100, "stretched": 300, "epochs": 500, "steps": 50_000,
              "md": 50_000, "hidden": "64x0e+64x1o", "lr": 0.01,
              "models": ("MACE short", "MACE long", "MS-MACE", "NequIP", "MS-NequIP")},
}  # fmt: skip


def make_data(folder: Path, sizes: dict[str, Any], workers: int) -> None:
    """train.xyz, augmented.xyz, valid.xyz, test.xyz and stretched.xyz, all labelled by GFN2-xTB."""
    if (folder / "data.done").is_file():
        return
    frames = ase.io.read(start_frames(folder, sizes["frames"], sizes["molecules"], workers), ":")
    order = np.random.default_rng(0).permutation(len(frames))
    parts = {"test": order[: sizes["test"]]}
    rest = order[sizes["test"] :]
    held = max(2, len(rest) // 8)
    parts |= {"valid": rest[:held], "train": rest[held:]}
    for name, index in parts.items():
        write(folder / f"{name}.xyz", [frames[i] for i in index])
    for name, source, seed in (("more", "train", 1), ("stretched", "test", 2)):
        start = ase.io.read(folder / f"{source}.xyz", ":")
        dropped: Counter[str] = Counter()
        rng = np.random.default_rng(seed)
        new = (stretch_bond(start[k % len(start)], rng) for k in range(sizes["stretched"]))
        write(folder / f"{name}_unlabelled.xyz", list(keep_sound(new, dropped=dropped)))
        print(f"{name}: dropped {dict(dropped) or 'none'}", flush=True)
        label(folder / f"{name}_unlabelled.xyz", folder / f"{name}.xyz", "gfn2-xtb", workers=workers, timeout=600)
    plain, more = (ase.io.read(folder / f"{n}.xyz", ":") for n in ("train", "more"))
    write(folder / "augmented.xyz", [*plain, *more])
    for name in ("train", "augmented", "valid", "test", "stretched"):
        require_sound(folder / f"{name}.xyz")
    write_text(folder / "data.done", "")  # last: a stopped run makes what is missing


def mace_flags(model: str) -> list[str]:
    if model == "MACE short":
        return [f"--r_max={SHORT}"]
    if model == "MACE long":
        return [f"--r_max={LONG}"]
    return [f"--r_max={LONG}", f"--r_short={SHORT}", "--model=MultiScaleMACE"]


def train(folder: Path, model: str, data: str, sizes: dict[str, Any], nequip: Path | None) -> Path | None:
    """Train one model by its real command; returns the file of the potential."""
    work = folder / f"{model.replace(' ', '-')}_{data}"
    if "NequIP" in model:
        return None if nequip is None else train_nequip(folder, work, model, data, sizes, nequip)
    if not (work / "run.model").is_file():
        print(f"training {model} on {data}", flush=True)
        work.mkdir(exist_ok=True)
        epochs = sizes["epochs"]
        command = [
            BIN / "mace_run_train", "--name=run", "--seed=1", f"--train_file={folder / f'{data}.xyz'}",
            f"--valid_file={folder / 'valid.xyz'}", f"--work_dir={work}", "--E0s=average",
            f"--hidden_irreps={sizes['hidden']}", "--max_ell=2", "--correlation=2", f"--lr={sizes['lr']}",
            "--batch_size=4", "--valid_batch_size=8", f"--max_num_epochs={epochs}", "--eval_interval=2", "--ema",
            "--ema_decay=0.99", "--scheduler=ExponentialLR", f"--lr_scheduler_gamma={0.05 ** (1 / epochs):.5f}",
            "--loss=weighted", "--energy_weight=1", "--forces_weight=100", "--default_dtype=float32",
            f"--device={device()}", "--error_table=TotalMAE", "--plot=False", "--restart_latest", *mace_flags(model),
        ]  # fmt: skip
        with (work / "output.log").open("a") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, env=one_thread())
    return work / "run.model"


def train_nequip(folder: Path, work: Path, model: str, data: str, sizes: dict[str, Any], nequip: Path) -> Path:
    """NequIP rows, in the environment of NequIP."""
    if not (work / "done").is_file():
        print(f"training {model} on {data}", flush=True)
        config = yaml.safe_load((ROOT / "recipes" / "configs" / "nequip_multiscale.yaml").read_text())
        work.mkdir(exist_ok=True)
        network = config["training_module"]["model"]
        width = int(sizes["hidden"].split("x")[0])
        network |= {"num_features": width, "num_layers": 2, "type_names": ["C", "N", "F"]}
        network["per_type_energy_shifts"] = "${training_data_stats:per_atom_energy_mean}"
        if model == "NequIP":
            keep = ("seed", "model_dtype", "type_names", "r_max", "num_layers", "l_max", "parity", "num_features",
                    "radial_mlp_depth", "radial_mlp_width", "avg_num_neighbors", "per_type_energy_shifts",
                    "per_type_energy_scales")  # fmt: skip
            network = {"_target_": "nequip.model.NequIPGNNModel", **{k: network[k] for k in keep}}
        else:
            network["r_short"] = SHORT
        config["training_module"]["model"] = network
        config["trainer"] = {"accelerator": "cpu" if device() == "cpu" else "gpu"}
        config |= {"types": ["C", "N", "F"], "r_max": LONG, "run": ["train"]}
        config |= {"folder": str(work.resolve()), "epochs": sizes["epochs"], "batch_size": 4}
        files = {"train": data, "val": "valid", "test": "test"}
        config["data"] = {f"{part}_file_path": str((folder / f"{f}.xyz").resolve()) for part, f in files.items()}
        # the schedule of the MACE rows: to a twentieth at the end
        config["training_module"]["lr_scheduler"] = {"scheduler": {"gamma": 0.05 ** (1 / sizes["epochs"])}}
        (work / "configs").mkdir(exist_ok=True)
        write_text(work / "configs" / "run.yaml", yaml.safe_dump(config, sort_keys=False))
        shared = yaml.safe_load((ROOT / "recipes" / "configs" / "nequip_data.yaml").read_text())
        del shared["data"]["split_dataset"]  # files of their own instead; Hydra can replace it, not take it away
        write_text(work / "configs" / "nequip_data.yaml", yaml.safe_dump(shared, sort_keys=False))
        with (work / "output.log").open("a") as log:
            command = [(nequip / "nequip-train").resolve(), "-cd", (work / "configs").resolve(), "-cn", "run"]
            if (work / "last.ckpt").is_file():
                command.append(f"++ckpt_path={(work / 'last.ckpt').resolve()}")
            subprocess.run(command, check=True, stdout=log, stderr=log, env=one_thread(), cwd=ROOT)
        write_text(work / "done", "")
    return work / "best.ckpt"


def device() -> str:
    return os.environ.get("EQUITUNE_DEVICE", "cpu")  # main sets it; labelers of potentials read it


def one_thread() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def evaluate(folder: Path, model: str, file: Path, part: str, nequip: Path | None) -> dict[str, Any]:
    """Errors by equitune evaluate, in the environment that the model needs."""
    out = file.parent / f"errors_{part}"
    if not (out / "errors.json").is_file():
        program = (nequip if "NequIP" in model and nequip is not None else BIN) / "equitune"
        command = [program, "evaluate", file, folder / f"{part}.xyz", "-o", out, "--device", device()]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=one_thread())
    return json.loads((out / "errors.json").read_text())


def dynamics(folder: Path, sizes: dict[str, Any], files: dict[tuple[str, str], Path], workers: int) -> dict[str, Any]:
    """Survival at 800 K of one molecule, and its structure at 300 K against GFN2-xTB."""
    molecule = folder / "molecule.xyz"
    if not molecule.is_file():
        write(molecule, [cluster(ase.io.read(folder / "annealed.xyz", "-1"), 1)])
    found = {}
    for data in ("train", "augmented"):
        potential = f"mace:{files['MS-MACE', data]}"
        out = folder / f"stability_{data}"
        if not (out / "stability.json").is_file():
            print(f"stability of MS-MACE trained on {data}: 5 trajectories of {sizes['steps']} steps", flush=True)
            subprocess.run(
                [
                    BIN / "equitune", "stability", molecule, "--with", potential, "-o", out, "--temperature", "800",
                    "--steps", str(sizes["steps"]), "--timestep", "1.0", "--replicas", "5", "--every", "100", "--nve",
                    str(min(2000, sizes["steps"])), "--workers", str(workers),
                ],
                check=True, stdout=subprocess.DEVNULL, env=one_thread(),
            )  # fmt: skip
        found[data] = json.loads((out / "stability.json").read_text())
    schedule = Schedule(300, 300, sizes["md"] // 20, spacing=20.0, timestep=1.0, equilibration=min(500, sizes["md"]))
    runs = {"gfn2-xtb": "gfn2-xtb", "ms-mace": f"mace:{files['MS-MACE', 'augmented']}"}
    for name, potential in runs.items():
        if not (folder / f"md_{name}.xyz").is_file():
            print(f"dynamics with {name}: {sizes['md']} steps at 300 K", flush=True)
            try:
                sample_md([ase.io.read(molecule)], folder / f"md_{name}.xyz", potential, [schedule], seed=3)
            except ValueError as err:  # a model that falls apart has no structure
                print(err, flush=True)
    there = [folder / f"md_{n}.xyz" for n in runs if (folder / f"md_{n}.xyz").is_file()]
    subprocess.run(
        [BIN / "equitune", "rdf", *there, "--pair", "C-F", "--pair", "F-F", "-o",
         folder / "rdf.png"], check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    found["rdf"] = json.loads((folder / "rdf.json").read_text())
    return found


def report(folder: Path, scale: str, rows: list[dict[str, Any]], md: dict[str, Any]) -> Path:
    counts = {n: len(ase.io.read(folder / f"{n}.xyz", ":")) for n in ("train", "augmented", "test", "stretched")}
    lines = [
        "# MS-MACE on C12F27N at GFN2-xTB",
        "",
        f"Clusters of three molecules (120 atoms; SMILES {SMILES}), r_short {SHORT} Å, r_long {LONG} Å; frames: "
        f"{counts}. Scale `{scale}`, {datetime.date.today()}.",
        f"Command: `python recipes/multiscale_liquid.py --scale {scale}`.",
        "",
        "Paper (arXiv 2312.09490): 901 samples; lowest errors with MS-MACE; stable over 50,000 steps at 800 K only "
        "with stretched bonds in the training data.",
        "",
        "| model | trained on | E MAE (meV/atom) | F MAE (meV/Å) | stretched: E MAE | stretched: F MAE |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [f"{r[p]['errors'][k]:.2f}" for p in ("test", "stretched") for k in ("mae_e", "mae_f")]
        lines.append(f"| {r['model']} | {r['data']} | " + " | ".join(cells) + " |")
    lines += ["", "| MS-MACE trained on | trajectories | steps | surviving | sound steps |", "|---|---|---|---|---|"]
    for data in ("train", "augmented"):
        s = md[data]
        steps = ", ".join(str(r["steps"]) for r in s["runs"])
        lines.append(f"| {data} | {s['trajectories']} | {s['steps']} | {100 * s['surviving']:.0f} % | {steps} |")
    lines += ["", "Difference of radial distribution functions from GFN2-xTB dynamics (one molecule, 300 K): "]
    found = [f"{c['pair']} {c['difference_percent']:.1f} %" for c in md["rdf"] if "ms-mace" in c["trajectory"]]
    lines[-1] += ", ".join(found) or "none, the dynamics with MS-MACE fell apart"
    write_text(folder / "report.md", "\n".join(lines) + ".\n")
    return folder / "report.md"


def main(
    scale: Annotated[str, typer.Option(help=", ".join(SCALES))] = "smoke",
    folder: Annotated[Path, typer.Option(help="everything is written here")] = Path("multiscale-liquid"),
    nequip_bin: Annotated[
        Path | None, typer.Option(help="bin folder of an environment with NequIP, for its rows")
    ] = None,
    workers: Annotated[int, typer.Option(help="processes for labels and dynamics; one thread each")] = 1,
    on: Annotated[str, typer.Option("--device", help="cpu or cuda, for training, errors and dynamics")] = "cpu",
) -> None:
    """Data, training, errors, stability, structure, report."""
    if scale not in SCALES:
        raise SystemExit(f"--scale: expected one of {', '.join(SCALES)}, got {scale!r}")
    if nequip_bin is not None and not (nequip_bin / "nequip-train").is_file():
        raise SystemExit(f"--nequip-bin: no nequip-train in {nequip_bin}")
    try:
        os.environ["EQUITUNE_DEVICE"] = require_device(on, "--device")
    except ValueError as err:
        raise SystemExit(str(err)) from err
    sizes = SCALES[scale]
    keep_settings(folder, {"scale": scale, "sizes": sizes}, error=typer.BadParameter)
    make_data(folder, sizes, workers)
    files, rows = {}, []
    for model in sizes["models"]:
        for data in ("train", "augmented"):
            file = train(folder, model, data, sizes, nequip_bin)
            if file is None:
                continue
            files[model, data] = file
            errors = {part: evaluate(folder, model, file, part, nequip_bin) for part in ("test", "stretched")}
            rows.append({"model": model, "data": data, **errors})
            e, f = errors["test"]["errors"]["mae_e"], errors["test"]["errors"]["mae_f"]
            print(f"{model} on {data}: E {e:.2f} meV/atom, F {f:.1f} meV/Å", flush=True)
    md = dynamics(folder, sizes, files, workers)
    print(f"written: {report(folder, scale, rows, md)}, {folder / 'rdf.png'}, {folder}/stability_*/stability.png")


if __name__ == "__main__":
    typer.run(main)
