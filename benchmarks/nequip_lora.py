"""LoRA against full fine-tuning in NequIP: accuracy at 50 + 50 labels, by nequip-train itself.

The base is a NequIP model pre-trained on the GFN2-xTB frames of every third molecule of the embedded base's recipe.
Both methods get the same frames, budget, aligned energy references and a learning-rate sweep on the first seed, widened
past its edges; the best on its validation frames (geometric mean of energy and force MAE) is run on the other seeds.

Command:  python recipes/embedded_base.py sample --every 3 --workdir build/embedded_third
          python benchmarks/nequip_lora.py base --frames build/embedded_third/train.extxyz
          python benchmarks/nequip_lora.py run --data DIR --sets ethanol,3bpa
          python benchmarks/nequip_lora.py table
Cost:     sampling and base about half an hour each on one CPU thread, runs 2 to 6 minutes.
"""

from __future__ import annotations

import csv
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import ase.io
import numpy as np
import typer
from datasets import load_split, write
from omegaconf import OmegaConf
from sweep import next_rate

from mace_lora.atomic import write_text
from mace_lora.lora.energies import solve_offsets

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "nequip_lora"
WORK = Path("build/nequip_lora")
LRS = {"full": (0.005, 0.01, 0.02), "lora": (0.005, 0.01, 0.02)}
KEYS = {"mae_e": "total_energy_mae", "mae_f": "forces_mae"}
SHOWN = ("mae_e", "mae_e_refit", "mae_f", "rmse_f")
app = typer.Typer(add_completion=False, no_args_is_help=True)
Results = Annotated[Path, typer.Option(help="one JSON per run")]


def nequip_train(name: str, folder: Path, **settings: Any) -> None:
    """Write a config of recipes/configs with changed keys (dots for nesting), and run the real command on it."""
    recipes = ROOT / "recipes" / "configs"
    config = OmegaConf.merge(OmegaConf.load(recipes / "nequip_data.yaml"), OmegaConf.load(recipes / f"{name}.yaml"))
    for key, value in ({"folder": str(folder)} | settings).items():
        OmegaConf.update(config, key, value, merge=False, force_add=True)
    for key in ("defaults", "frames"):
        del config[key]
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, folder / "config.yaml")
    command = [str(Path(sys.executable).parent / "nequip-train"), "-cd", str(folder), "-cn", "config"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with (folder / "log.txt").open("a") as log:
        subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=log, stderr=log)


@app.command()
def base(
    frames: Annotated[Path, typer.Option(help="GFN2-xTB frames with REF_energy and REF_forces")],
    epochs: Annotated[int, typer.Option(help="epochs")] = 24,
    valid: Annotated[int, typer.Option(help="validation frames")] = 500,
    work: Annotated[Path, typer.Option(help="runs")] = WORK,
) -> None:
    """Pre-train the base; continues an interrupted run."""
    folder = (work / "base").resolve()
    count = len(ase.io.read(frames, ":", format="extxyz"))
    parts = {"file_path": str(frames.resolve()), "train": count - 2 * valid, "val": valid, "test": valid}
    restart = {"ckpt_path": str(folder / "last.ckpt")} if (folder / "last.ckpt").is_file() else {}
    nequip_train(
        "nequip_scratch", folder, **{
            "data.split_dataset": parts, "epochs": epochs, "batch_size": 20,
            "training_module.lr_scheduler.scheduler.gamma": 0.02 ** (1 / epochs),
            "training_module.ema_decay": 0.999, "training_module.model.compile_mode": "compile",
            "training_module.loss.coeffs": {"total_energy": 10.0, "forces": 100.0}, **restart,
        },
    )  # fmt: skip
    print(f"base: {folder / 'best.ckpt'}")


def predict(model: Any, frames: list[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Label minus model: energies (frames,) in eV, forces (atoms, 3) in eV/Å; and counts (frames, types)."""
    import torch
    from nequip.data import AtomicDataDict, compute_neighborlist_, from_ase

    names, r_max = list(model.type_names), float(model.metadata["r_max"])
    de, df = [], []
    for start in range(0, len(frames), 20):
        graphs = []
        for atoms in frames[start : start + 20]:
            graph = compute_neighborlist_(from_ase(atoms), r_max=r_max)
            graph["atom_types"] = torch.tensor([names.index(s) for s in atoms.get_chemical_symbols()])
            graphs.append(graph)
        out = model(AtomicDataDict.batched_from_list(graphs))
        de.append(out["total_energy"].detach().reshape(-1).double().numpy())
        df.append(out["forces"].detach().double().numpy())
    counts = np.array([[a.get_chemical_symbols().count(n) for n in names] for a in frames], float)
    energies, forces = [a.info["REF_energy"] for a in frames], [a.arrays["REF_forces"] for a in frames]
    return np.array(energies) - np.concatenate(de), np.concatenate(forces) - np.concatenate(df), counts


def load(checkpoint: Path) -> Any:
    """Upstream's model in evaluation mode."""
    from nequip.model.saved_models import load_saved_model
    from nequip.utils.global_state import set_global_state

    set_global_state()
    return load_saved_model(str(checkpoint)).requires_grad_(False).eval()


def aligned_shifts(checkpoint: Path, frames: list[Any]) -> dict[str, float]:
    """The base's shifts plus the least-squares offset to the labels (eV), the same for both methods."""
    model = load(checkpoint)
    shifts = next(v for n, v in model.state_dict().items() if n.endswith("scale_shift.shifts")).reshape(-1).tolist()
    residual, _, counts = predict(model, frames)
    offset = np.linalg.lstsq(counts, residual, rcond=None)[0]
    return {n: float(s + o) for n, s, o in zip(model.type_names, shifts, offset, strict=True)}


def errors(model: Any, train: list[Any], test: list[Any]) -> dict[str, float]:
    """MAE in meV and meV/Å; ``refit``: with the offsets of the training frames' energies removed."""
    residual, _, counts = predict(model, train)
    de, df, test_counts = predict(model, test)
    refit = de - test_counts @ solve_offsets(counts, residual)
    return {
        "mae_e": 1e3 * float(np.abs(de).mean()), "mae_e_refit": 1e3 * float(np.abs(refit).mean()),
        "mae_f": 1e3 * float(np.abs(df).mean()), "rmse_f": 1e3 * float(np.sqrt((df**2).mean())),
    }  # fmt: skip


def one_run(name: str, method: str, lr: float, seed: int, epochs: int, data: Path, work: Path, results: Path) -> Any:
    """Train, test and store one run; a stored one is read."""
    target = results / f"{name}__{method}__lr{lr:g}__s{seed}__e{epochs}.json"
    if target.is_file():
        return json.loads(target.read_text())
    frames, folder = load_split(name, data, seed), (work / target.stem).resolve()
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped: its adapter and its metrics
    files = {part: write(folder / f"{part}.xyz", getattr(frames, part)) for part in ("train", "valid", "test")}
    checkpoint = (work / "base" / "best.ckpt").resolve()
    paths = {f"data.{part}_file_path": str(files["valid" if part == "val" else part].resolve())
             for part in ("train", "val", "test")}  # fmt: skip
    start = time.time()
    nequip_train(
        f"nequip_{method}", folder, **paths, **{
            "data.split_dataset": [], "run": ["train"], "base": str(checkpoint), "lr": lr, "seed": seed,
            "epochs": epochs, "E0s_pbe0": aligned_shifts(checkpoint, frames.train),
            "training_module.lr_scheduler.scheduler.gamma": 0.2 ** (1 / epochs),
            "trainer.enable_progress_bar": False,
            **({"training_module.model.seed": seed} if method == "lora" else {}),
        },
    )  # fmt: skip
    with next((folder / "lightning_logs").glob("*/metrics.csv")).open() as handle:
        log = list(csv.DictReader(handle))
    row: dict[str, Any] = {"set": name, "method": method, "lr": lr, "seed": seed, "epochs": epochs}
    row |= {"wall_s": round(time.time() - start, 1), "curve": []}
    best = None
    for line in log:
        if line.get("val0_epoch/weighted_sum"):
            values = {k: 1e3 * float(line[f"val0_epoch/{v}"]) for k, v in KEYS.items()}
            row["curve"].append(round(values["mae_f"], 2))
            if best is None or float(line["val0_epoch/weighted_sum"]) < best:
                best, row["valid"] = float(line["val0_epoch/weighted_sum"]), values
    row["test"] = errors(load(folder / "best.ckpt"), frames.train, frames.test)
    write_text(target, json.dumps(row) + "\n")
    shutil.rmtree(folder)
    return row


def zero_shot(name: str, seed: int, data: Path, work: Path, results: Path) -> None:
    """Errors of the base; its energies count with the offsets removed."""
    target = results / f"{name}__zero-shot.json"
    if not target.is_file():
        frames = load_split(name, data, seed)
        test = errors(load(work / "base" / "best.ckpt"), frames.train, frames.test)
        row = {"set": name, "method": "base", "lr": 0.0, "seed": seed, "valid": test, "test": test}
        write_text(target, json.dumps(row) + "\n")


def score(row: dict[str, Any]) -> float:
    """Geometric mean of the validation energy and force MAE."""
    return float(np.sqrt(row["valid"]["mae_e"] * row["valid"]["mae_f"]))


@app.command()
def run(
    data: Annotated[Path, typer.Option(help="folder of the public data sets")],
    sets: Annotated[str, typer.Option(help="comma-separated data sets")] = "ethanol,aspirin,3bpa",
    seeds: Annotated[str, typer.Option(help="the first is used for the sweep")] = "0,1,2",
    epochs: Annotated[int, typer.Option(help="epochs of 10 steps")] = 100,
    work: Annotated[Path, typer.Option(help="runs, and the base")] = WORK,
    results: Results = RESULTS,
) -> None:
    """Run what is missing; stop at any time."""
    results.mkdir(parents=True, exist_ok=True)
    first, *rest = [int(s) for s in seeds.split(",")]
    for name in sets.split(","):
        zero_shot(name, first, data, work, results)
        for method, lrs in LRS.items():
            rows = [one_run(name, method, lr, first, epochs, data, work, results) for lr in lrs]
            while wider := next_rate(rows, score):
                rows.append(one_run(name, method, wider, first, epochs, data, work, results))
            best = min(rows, key=score)["lr"]
            rows += [one_run(name, method, best, seed, epochs, data, work, results) for seed in rest]
            for row in rows:
                shown = f"E {row['test']['mae_e']:.1f}, F {row['test']['mae_f']:.1f}"
                print(f"{name} {method} lr {row['lr']:g} seed {row['seed']}: {shown}", flush=True)
    print(f"results in {results}")


@app.command()
def table(results: Results = RESULTS) -> None:
    """Write nequip_lora.md from the finished runs."""
    rows = [json.loads(p.read_text()) for p in sorted(results.glob("*.json"))]
    groups: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        groups.setdefault((row["set"], row["method"]), []).append(row)
    lines = ["# LoRA in NequIP at 50 + 50 labels", "", __doc__.split("\n\n")[1].replace("\n", " "), ""]
    lines += [f"E in meV (whole frame), F in meV/Å, median (min–max) over seeds; nequip {version('nequip')}, "
              f"{datetime.date.today()}, one CPU thread a run. Values trained, time and memory of a step: "
              "[nequip_cost.md](nequip_cost.md).", ""]  # fmt: skip
    lines += [
        "| set | method | lr | seeds | E MAE | E MAE, refit | F MAE | F RMSE | min |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (name, method), group in sorted(groups.items()):
        first = min(r["seed"] for r in group)
        best = min((r for r in group if r["seed"] == first), key=score)["lr"]
        mine = [r["test"] for r in group if r["lr"] == best]
        cells = []
        for key in SHOWN:
            values = [t[key] for t in mine]
            if method == "base":
                cells.append("–" if key == "mae_e" else f"{values[0]:.1f}")
                continue
            cells.append(f"{median(values):.1f} ({min(values):.1f}–{max(values):.1f})")
        minutes = median(r.get("wall_s", 0.0) for r in group if r["lr"] == best) / 60
        took = f"{minutes:.1f}" if minutes else "–"
        lines.append(f"| {name} | {method} | {best:g} | {len(mine)} | {' | '.join(cells)} | {took} |")
    write_text(results.parent / "nequip_lora.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"written: {results.parent / 'nequip_lora.md'}")


if __name__ == "__main__":
    app()
