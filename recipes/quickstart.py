"""Quickstart: adapt the embedded organic base to 50 DFT frames, LoRA beside full fine-tuning.

Purpose:  the main job of the package from end to end with real data: a MACE base trained on
          GFN2-xTB labels becomes a PBE0 potential of glycolamide from 50 + 50 labelled frames.
Command:  make quickstart        (or: python recipes/quickstart.py)
Cost:     4 to 8 minutes on two CPU cores.
Writes:   quickstart-run/: table.md, parity.png, learning_curve.png, and one folder per run with
          MACE's own .model and the adapter.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import ase
import ase.io
import typer

warnings.filterwarnings("ignore")

import mace  # noqa: E402, F401  before e3nn
import torch  # noqa: E402
from mace.calculators import MACECalculator  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.markdown import Markdown  # noqa: E402
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn  # noqa: E402

from mace_lora import embedded_dft_path  # noqa: E402
from mace_lora.atomic import write_text  # noqa: E402
from mace_lora.data import require_sound  # noqa: E402
from mace_lora.evaluate.metrics import Errors, Predictions, errors, predict  # noqa: E402
from mace_lora.evaluate.plots import learning_curve, parity  # noqa: E402
from mace_lora.mace_plugin.base_model import describe_base, embedded_base, prepare_base  # noqa: E402

BIN = Path(sys.executable).parent
# every method gets two learning rates and the same number of epochs; the better one on the
# validation frames is reported
LORA = ["--lora"]
RUNS = {
    "full_lr0.002": ("full fine-tuning", 0.002, []),
    "full_lr0.005": ("full fine-tuning", 0.005, []),
    "lora_lr0.01": ("LoRA, rank 16", 0.01, LORA),
    "lora_lr0.02": ("LoRA, rank 16", 0.02, LORA),
}
SPLITS = ("train", "valid", "test")


def prepare(folder: Path) -> None:
    """Write the base as a .model and the DFT frames as extxyz."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(embedded_base(torch.float32), folder / "base.model")
    with gzip.open(embedded_dft_path(), "rt") as handle:
        frames = ase.io.read(handle, ":", format="extxyz")
    for split in SPLITS:
        chosen = [f for f in frames if f.info["split"] == split]
        ase.io.write(folder / f"{split}.xyz", chosen, format="extxyz")
        require_sound(folder / f"{split}.xyz")


def train(folder: Path, name: str, lr: float, extra: list[str], epochs: int) -> float:
    """One run of the real command; returns its wall time in seconds."""
    work = folder / name
    if (work / f"{name}.model").is_file():
        return json.loads((work / "time.json").read_text())
    work.mkdir(exist_ok=True)
    command = [
        BIN / "mace_run_train", f"--name={name}", f"--foundation_model={folder}/base.model",
        f"--train_file={folder}/train.xyz", f"--valid_file={folder}/valid.xyz", f"--work_dir={work}",
        "--E0s=estimated", "--multiheads_finetuning=False", f"--lr={lr}", "--batch_size=5", "--valid_batch_size=50",
        f"--max_num_epochs={epochs}", "--eval_interval=2", "--ema", "--ema_decay=0.99", "--loss=weighted",
        "--energy_weight=1", "--forces_weight=100", "--error_table=TotalMAE", "--default_dtype=float32",
        "--device=cpu", "--seed=1", "--restart_latest", *extra,
    ]  # fmt: skip
    start = time.time()
    with (work / "output.log").open("a") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{name} failed; its output is in {work / 'output.log'}")
    write_text(work / "time.json", json.dumps(time.time() - start))
    return time.time() - start


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """(epoch, validation force MAE in meV/Å) from MACE's own results file."""
    (path,) = (folder / name / "results").glob("*_train.txt")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(r["epoch"], 1e3 * r["mae_f"]) for r in rows if r["mode"] == "eval" and r["epoch"] is not None]


def evaluate(model: torch.nn.Module, folder: Path, split: str) -> Predictions:
    """Predictions on one split in float64."""
    calculator = MACECalculator(models=[model.double()], device="cpu", default_dtype="float64")
    return predict(calculator, ase.io.read(folder / f"{split}.xyz", ":"))


def zero_shot(folder: Path, fitted: torch.nn.Module) -> Predictions:
    """The base before training, with the energy references that the runs fitted."""
    base = prepare_base(embedded_base(torch.float32), describe_base(fitted) | {"dtype": "float32"})
    return evaluate(base, folder, "test")


def table(rows: list[tuple[str, str, Errors, str]]) -> str:
    """Markdown table of the test errors."""
    lines = [
        "| model | learning rate | E MAE (meV/atom) | F MAE (meV/Å) | F RMSE (meV/Å) | file to keep |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {lr} | {e.mae_e:.2f} | {e.mae_f:.1f} | {e.rmse_f:.1f} | {size} |" for name, lr, e, size in rows
    ]
    return "\n".join(lines)


def main(
    folder: Annotated[Path, typer.Option(help="where everything is written")] = Path("quickstart-run"),
    epochs: Annotated[int, typer.Option(help="epochs of every run")] = 80,
    jobs: Annotated[int, typer.Option(help="runs at a time, one thread each")] = 2,
) -> None:
    """Train, evaluate on 100 unseen DFT frames, write table and plots; continues where it was stopped."""
    console = Console()
    start = time.time()
    console.print("Base: MACE, H C N O F S, GFN2-xTB. Labels: 50 train + 50 validation PBE0 frames of glycolamide.")
    prepare(folder)
    with (
        Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress,
        ThreadPoolExecutor(jobs) as pool,
    ):

        def job(name: str) -> None:
            label, lr, extra = RUNS[name]
            task = progress.add_task(f"mace_run_train: {label}, lr {lr}")
            train(folder, name, lr, extra, epochs)
            progress.update(task, description=f"mace_run_train: {label}, lr {lr}: done", total=1, completed=1)

        list(pool.map(job, RUNS))
    models = {n: torch.load(folder / n / f"{n}.model", weights_only=False) for n in RUNS}
    predictions = {"base model, energies aligned": zero_shot(folder, next(iter(models.values())))}
    rows = [(n, "–", errors(p), "–") for n, p in predictions.items()]
    for label in dict.fromkeys(label for label, _, _ in RUNS.values()):
        names = [n for n, (other, _, _) in RUNS.items() if other == label]
        best = min(names, key=lambda n: errors(evaluate(models[n], folder, "valid")).mae_f)
        predictions[label] = evaluate(models[best], folder, "test")
        adapter = folder / best / f"{best}-adapter" / "adapter_model.safetensors"
        kept = adapter if adapter.is_file() else folder / best / f"{best}.model"
        size = f"{'adapter' if kept == adapter else '.model'}, {kept.stat().st_size // 1000} kB"
        rows.append((label, f"{RUNS[best][1]:g}", errors(predictions[label]), size))
    text = table(rows)
    write_text(folder / "table.md", text + "\n")
    parity(predictions, folder / "parity.png")
    learning_curve({f"{RUNS[n][0]}, lr {RUNS[n][1]:g}": curve(folder, n) for n in RUNS}, folder / "learning_curve.png")
    console.print(Markdown(text))
    console.print(
        "Energies aligned: the base with the isolated-atom energies that fit it best to the PBE0 training labels."
    )
    console.print(f"100 unseen PBE0 frames; {time.time() - start:.0f} s on {jobs} core(s).")
    console.print(f"Everything is in {folder}/: table.md, parity.png, learning_curve.png, and a folder per run.")


if __name__ == "__main__":
    typer.run(main)
