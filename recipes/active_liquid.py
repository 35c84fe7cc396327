"""Active learning of a molecular liquid: perfluorotri-n-butylamine (C12F27N) at GFN2-xTB.

Purpose:  the data set of the multiscale paper (arXiv 2312.09490) in kind: frames of a packed and annealed liquid,
          clusters of the three molecules (120 atoms) nearest to the centre, a committee of 4, a window of
          100 to 300 meV/Å, stop below 0.5 % candidates. The committee is four LoRA fine-tunings of the embedded base,
          or with --scratch four small models that start from nothing.
Command:  python recipes/active_liquid.py --scale laptop [--scratch]
Cost:     smoke 10 minutes; laptop 1.5 hours on one core; paper: days, give it workers.
Writes:   active-liquid/: settings.json, the packed box, the annealed droplet, labelled start frames, config.yaml, one
          folder per round, rounds.png, report.md. Stopped, the same command goes on.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import ase.io
import typer
import yaml

from mace_lora.atomic import atomic_path, keep_settings, write_text
from mace_lora.augment import Schedule, cluster, keep_sound, label, molecule, pack, sample_md
from mace_lora.data.check import require_sound
from mace_lora.evaluate.machine import machine

SMILES = "FC(F)(F)C(F)(F)C(F)(F)C(F)(F)N(C(F)(F)C(F)(F)C(F)(F)C(F)(F)F)C(F)(F)C(F)(F)C(F)(F)C(F)(F)F"
BIN = Path(sys.executable).parent
# molecules in the box, frames of the annealing, members, frames labelled a round, rounds, epochs, temperatures
SCALES = {
    "smoke": {"molecules": 4, "start": 10, "members": 2, "per_round": 5, "rounds": 2, "epochs": 2, "frames": 5},
    "laptop": {"molecules": 8, "start": 10, "members": 4, "per_round": 10, "rounds": 6, "epochs": 20, "frames": 25},
    "paper": {
        "molecules": 27,
        "start": 300,
        "members": 4,
        "per_round": 100,
        "rounds": 12,
        "epochs": 100,
        "frames": 200,
    },
}


def write(path: Path, frames: list[ase.Atoms]) -> None:
    with atomic_path(path) as temporary:
        ase.io.write(temporary, frames, format="extxyz", write_results=False)


def start_frames(folder: Path, count: int, molecules: int, workers: int) -> Path:
    """Pack the liquid, anneal a droplet of it from 800 to 280 K with MMFF94, cut clusters, label them."""
    labelled, clusters = folder / "start.xyz", folder / "clusters.xyz"
    if not (folder / "box.xyz").exists():
        write(folder / "box.xyz", [pack([molecule(SMILES)], [molecules], density=1.6)])
    droplet = cluster(ase.io.read(folder / "box.xyz"), molecules)  # RDKit's force fields know no boundary
    annealed = folder / "annealed.xyz"
    if not annealed.exists():
        schedule = Schedule(800.0, 280.0, frames=count, spacing=200.0, timestep=1.0, friction=0.01, equilibration=2000)
        print(f"annealing {len(droplet)} atoms with MMFF94, 800 to 280 K in {0.2 * count:g} ps", flush=True)
        sample_md([droplet], annealed, "mmff94", [schedule], seed=1)
    if not clusters.exists():
        dropped: Counter[str] = Counter()
        cut = (cluster(a, 3) for a in ase.io.read(annealed, ":"))
        write(clusters, list(keep_sound(cut, dropped=dropped)))
        print(f"clusters: dropped {dict(dropped) or 'none'}", flush=True)
    if not labelled.exists():
        print("labelling the start frames with GFN2-xTB", flush=True)
        label(clusters, labelled, "gfn2-xtb", workers=workers)
    require_sound(labelled)
    return labelled


def config(folder: Path, sizes: dict[str, int], workers: int, scratch: bool) -> Path:
    """What equitune active-learn gets.

    The window of the paper is one of committees from scratch. Members fine-tuned from one base agree far more than they
    are right, so theirs is one of deviations calibrated on validation frames, that is of expected largest errors.
    """
    if scratch:  # as in the paper: nothing is known before
        start = {
            "hidden_irreps": "16x0e+16x1o",
            "r_max": 4.5,
            "max_ell": 2,
            "correlation": 2,
            "E0s": "average",
            "lr": 0.01,
        }
    else:
        start = {"foundation_model": "base.model", "multiheads_finetuning": False, "lora": True, "E0s": "estimated"}
        start |= {"lr": 0.02}
    starts = ase.io.read(folder / "clusters.xyz", ":")
    write(folder / "explore.xyz", [starts[0], starts[-1]])  # hot and cold
    content = {
        "folder": "rounds", "data": "start.xyz", "label": "gfn2-xtb", "members": sizes["members"],
        "window": [100, 300] if scratch else [300, 1500], "per_round": sizes["per_round"], "workers": workers,
        "max_rounds": sizes["rounds"],
        "stop_below": 0.005, "timeout": 300, "calibrate": not scratch,
        "train": {
            **start, "batch_size": 5, "valid_batch_size": 5, "max_num_epochs": sizes["epochs"], "ema": True,
            "ema_decay": 0.99, "loss": "weighted", "energy_weight": 1, "forces_weight": 100, "scheduler":
            "ExponentialLR", "lr_scheduler_gamma": round(0.1 ** (1 / sizes["epochs"]), 4), "eval_interval": 1,
            "default_dtype": "float32",
        },
        "explore": {
            "starts": "explore.xyz", "temperatures": [280, 500, 800], "frames": sizes["frames"], "spacing_fs": 20,
            "timestep_fs": 1.0, "equilibration_fs": 200,
        },
    }  # fmt: skip
    write_text(folder / "config.yaml", yaml.safe_dump(content, sort_keys=False))
    return folder / "config.yaml"


def report(folder: Path, scale: str, seconds: float, scratch: bool) -> Path:
    """Rounds as Markdown."""
    rounds = json.loads((folder / "rounds" / "rounds.json").read_text())
    who = "small models from scratch" if scratch else "LoRA fine-tunings of the embedded base"
    lines = [
        "# Active learning of C12F27N at GFN2-xTB",
        "",
        f"3-molecule clusters (120 atoms) of an annealed droplet; committee of {who}; "
        f"{'deviations as they are' if scratch else 'deviations calibrated on validation frames'}; "
        f"window {'100–300' if scratch else '300–1500'} meV/Å; exploration at 280, 500 and 800 K. Scale `{scale}`, "
        f"{datetime.date.today()}, "
        f"{seconds / 60:.0f} minutes this run, {machine()}.",
        "",
        f"Command: `python recipes/active_liquid.py --scale {scale}{' --scratch' * scratch}`. "
        "Errors: first member on the round's new frames "
        "before they were trained on.",
        "",
        "| round | trained on | explored | in window | above | candidate rate | median deviation (meV/Å) | "
        "error / deviation | labelled | "
        "E MAE (meV/atom) | F MAE (meV/Å) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rounds:
        place = folder / "rounds" / f"round-{r['round']:02d}"
        trained = sum(len(ase.io.read(place / f"{s}.xyz", ":")) for s in ("train", "valid"))
        errors = " | ".join(f"{r[k]:.2f}" if k in r else "–" for k in ("mae_e", "mae_f"))
        lines.append(
            f"| {r['round']} | {trained} | {r['explored']} | {r['in_window']} | {r['above']} | "
            f"{100 * r['candidate_rate']:.1f} % | {r['median_deviation']:.0f} | "
            f"{r.get('error_over_deviation', float('nan')):.1f} | "
            f"{r['labelled']} | {errors} |"
        )
    write_text(folder / "report.md", "\n".join(lines) + "\n")
    return folder / "report.md"


def main(
    scale: Annotated[str, typer.Option(help=", ".join(SCALES))] = "smoke",
    folder: Annotated[Path, typer.Option(help="everything is written here")] = Path("active-liquid"),
    workers: Annotated[int, typer.Option(help="processes; one thread each")] = 1,
    scratch: Annotated[bool, typer.Option(help="a committee of small models from scratch, without the base")] = False,
) -> None:
    """Pack, anneal, cut, label, then active learning."""
    if scale not in SCALES:
        raise SystemExit(f"--scale: expected one of {', '.join(SCALES)}, got {scale!r}")
    sizes, begin = dict(SCALES[scale]), time.time()
    if scratch:
        sizes |= {"start": 4 * sizes["start"], "per_round": 2 * sizes["per_round"], "epochs": 3 * sizes["epochs"] // 2}
    keep_settings(folder, {"scale": scale, "scratch": scratch, "sizes": sizes}, error=typer.BadParameter)
    start_frames(folder, sizes["start"], sizes["molecules"], workers)
    if not (folder / "base.model").exists():
        subprocess.run([BIN / "equitune", "export-base", folder / "base.model", "--dtype", "float32"], check=True)
    subprocess.run([BIN / "equitune", "active-learn", config(folder, sizes, workers, scratch)], check=True)
    print(f"written: {report(folder, scale, time.time() - begin, scratch)}, {folder / 'rounds' / 'rounds.png'}")


if __name__ == "__main__":
    typer.run(main)
