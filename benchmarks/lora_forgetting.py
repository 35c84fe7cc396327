"""What fine-tuning does to the base's own knowledge: errors on its held-out molecules.

The embedded base (GFN2-xTB) is fine-tuned on 50 PBE0 frames of one molecule by full fine-tuning,
LoRA, and LoRA with replay of some of the base's own training frames (a second head). Then the base's
held-out molecules are evaluated against GFN2-xTB: forces, and energies with the mean error of each
molecule removed, because the fine-tuned models have the energy references of PBE0. A LoRA adapter
that is switched off leaves the base exactly.

Command:  python benchmarks/lora_forgetting.py
Cost:     about 2 minutes a run on one CPU thread, 9 runs.
"""

from __future__ import annotations

import datetime
import gzip
import json
import os
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import ase
import ase.io
import numpy as np
import typer
from datasets import load_split, write
from finetune import aligned_E0s

from mace_lora.atomic import write_text

RESULTS = Path(__file__).parent / "results"
EMBEDDED = Path(__file__).parents[1] / "mace_lora" / "embedded"
METHODS = {
    "full": ["--lr", "0.005"],
    "LoRA": ["--lora", "--lr", "0.01"],
    "LoRA + replay": ["--lora", "--lr", "0.01", "--multiheads_finetuning", "True"],
}


def base_frames(part: str, elements: set[int]) -> list[ase.Atoms]:
    """GFN2-xTB frames that come with the base, ``replay`` or ``heldout``, of the fine-tuned model's elements."""
    with gzip.open(EMBEDDED / "organic_small_frames.extxyz.gz", "rt") as handle:
        frames = ase.io.read(handle, ":", format="extxyz")
    return [f for f in frames if f.info["part"] == part and elements.issuperset(f.numbers)]


def model_errors(model: Any, frames: list[ase.Atoms], head: str | None, per_molecule: bool) -> tuple[float, float]:
    """MAE of the energy per atom (meV; per molecule with its mean removed) and of the forces (meV/Å)."""
    from mace.calculators import MACECalculator

    calc = MACECalculator(models=[model.double()], device="cpu", default_dtype="float64", head=head)
    de: dict[str, list[float]] = {}
    df = []
    for frame in frames:
        atoms = ase.Atoms(frame.numbers, positions=frame.positions, calculator=calc)
        error = 1e3 * (atoms.get_potential_energy() - frame.info["REF_energy"]) / len(frame)
        de.setdefault(frame.get_chemical_formula() if per_molecule else "", []).append(error)
        df.append(1e3 * np.abs(atoms.get_forces() - frame.arrays["REF_forces"]).ravel())
    energy = [np.abs(np.array(v) - (np.mean(v) if per_molecule else 0.0)) for v in de.values()]
    return float(np.concatenate(energy).mean()), float(np.concatenate(df).mean())


def one_run(method: str, molecule: str, seed: int, epochs: int, work: Path) -> dict[str, Any]:
    """Fine-tune by the real command; a finished run is read from its file."""
    import torch

    from mace_lora import embedded_base

    name = f"{molecule}_{method.replace(' + ', '_').lower()}_s{seed}"
    result = work / f"{name}.json"
    if result.is_file():
        return json.loads(result.read_text())
    frames, folder = load_split(molecule, Path(), seed), work / name
    for part, content in (("train", frames.train), ("valid", frames.valid)):
        write(folder / f"{part}.xyz", content)
    elements = set(frames.train[0].numbers)
    replay = base_frames("replay", elements)
    write(folder / "replay.xyz", replay[:-15])
    write(folder / "replay_valid.xyz", replay[-15:])
    torch.save(embedded_base(torch.float64), folder / "base.model")
    command = [
        str(Path(sys.executable).parent / "mace_run_train"), "--name", "run", "--seed", str(seed), "--foundation_model",
        str(folder / "base.model"), "--train_file", str(folder / "train.xyz"),
        "--valid_file", str(folder / "valid.xyz"),
        "--E0s", str(aligned_E0s(embedded_base(torch.float64), frames.train)), "--batch_size", "5",
        "--valid_batch_size", "25", "--max_num_epochs", str(epochs), "--eval_interval", "2", "--ema", "--ema_decay",
        "0.99", "--default_dtype", "float32", "--device", "cpu", "--loss", "weighted", "--energy_weight", "1",
        "--forces_weight", "100", "--work_dir", str(folder), "--restart_latest", "--plot", "False",
    ]  # fmt: skip
    if "replay" in method:
        command += ["--pt_train_file", str(folder / "replay.xyz"), "--pt_valid_file", str(folder / "replay_valid.xyz")]
    else:
        command += ["--multiheads_finetuning", "False"]
    with (folder / "stdout.log").open("a") as log:
        env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        subprocess.run([*command, *METHODS[method]], check=True, stdout=log, stderr=log, env=env)
    model = torch.load(folder / "run.model", weights_only=False)  # written by this script
    own, new = ("pt_head", "Default") if "replay" in method else (None, None)
    row = {"heldout": model_errors(model, base_frames("heldout", elements), own, True)}
    row["test"] = model_errors(model, frames.test, new, False)
    write_text(result, json.dumps(row) + "\n")
    return row


def main(
    molecule: Annotated[str, typer.Option(help="molecule of the embedded PBE0 sets")] = "glycolamide",
    seeds: Annotated[str, typer.Option(help="comma-separated")] = "0,1,2",
    epochs: Annotated[
        int, typer.Option(help="epochs of full and LoRA; replay gets a quarter, its epochs are longer")
    ] = 100,
    work: Annotated[Path, typer.Option(help="runs")] = Path("build/forgetting"),
) -> None:
    """Run what is missing and write the table."""
    import torch

    from mace_lora import embedded_base

    warnings.filterwarnings("ignore")
    elements = set(load_split(molecule, Path(), 0).train[0].numbers)
    own, replayed = base_frames("heldout", elements), len(base_frames("replay", elements)) - 15
    before = model_errors(embedded_base(torch.float64), own, None, True)
    lines = [
        f"# Forgetting: the embedded base after 50 PBE0 frames of {molecule}", "",
        f"{len(own)} GFN2-xTB frames of molecules that neither the base nor the fine-tuning has seen; energies with "
        "each molecule's mean error removed (meV/atom), forces in meV/Å; test: PBE0 frames of the fine-tuned molecule. "
        f"Median (min–max) over seeds {seeds}; {epochs} epochs (replay {epochs // 4}, {replayed} frames).",
        f"Command: `python benchmarks/lora_forgetting.py --molecule {molecule}` ({datetime.date.today()}, mace-torch "
        f"{version('mace-torch')}, torch {version('torch')}).", "",
        "| model | own held-out E MAE | own held-out F MAE | new E MAE | new F MAE |", "|---|---|---|---|---|",
        f"| base (and LoRA with the adapter switched off) | {before[0]:.1f} | {before[1]:.1f} | – | – |",
    ]  # fmt: skip
    for method in METHODS:
        length = epochs // 4 if "replay" in method else epochs
        rows = [one_run(method, molecule, int(s), length, work) for s in seeds.split(",")]
        cells = []
        for part in ("heldout", "test"):
            for i in (0, 1):
                values = [r[part][i] for r in rows]
                cells.append(f"{median(values):.1f} ({min(values):.1f}–{max(values):.1f})")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    text = "\n".join(lines)
    write_text(RESULTS / "lora_forgetting.md", text + "\n")
    print(text)
    print(f"written: {RESULTS / 'lora_forgetting.md'}")


if __name__ == "__main__":
    typer.run(main)
