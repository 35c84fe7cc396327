"""PaiNN and NequIP from scratch on rMD17: force error against the number of labels, at equal budget.

Both are trained by nequip-train for the same number of steps of 10 frames, with a learning-rate sweep on the
first seed at 200 labels, widened past its upper edge. N counts training and validation frames (a twentieth, at
least 10); 1000 test frames of the official split. Published for 1000 MD17 labels, trained to convergence (arXiv
2102.03150): 0.22 (ethanol) and 0.34 kcal/mol/Å (aspirin).

Command:  python benchmarks/painn_accuracy.py run --data DIR
          python benchmarks/painn_accuracy.py table
Cost:     3 to 5 minutes a run on one CPU thread, 44 runs; with --long 20000 four more of 20 to 30 minutes.
"""

from __future__ import annotations

import datetime
import json
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import matplotlib
import numpy as np
import torch
import typer
from datasets import rmd17, split, write
from nequip_lora import errors, load, nequip_train

from mace_lora.atomic import write_text

matplotlib.use("Agg")
RESULTS = Path(__file__).parent / "results" / "painn_accuracy"
WORK = Path("build/painn_accuracy")
LRS = {"painn": (0.01, 0.02, 0.04), "nequip": (0.005, 0.01, 0.02)}
SWEEP, BATCH, EPOCHS = 200, 10, 25
CONFIGS = {"painn": "painn", "nequip": "nequip_scratch"}
PUBLISHED = {"ethanol": 0.22, "aspirin": 0.34}
KCAL = 43.364  # meV in a kcal/mol
app = typer.Typer(add_completion=False, no_args_is_help=True)
Results = Annotated[Path, typer.Option(help="one JSON per run")]


def isolated(frames: list[Any]) -> dict[str, float]:
    """Minimum-norm energies of the elements (eV), the same for both models."""
    elements = sorted({s for f in frames for s in f.get_chemical_symbols()})
    table = np.array([[f.get_chemical_symbols().count(e) for e in elements] for f in frames], float)
    values = np.linalg.lstsq(table, np.array([f.info["REF_energy"] for f in frames]), rcond=None)[0]
    return dict(zip(elements, values.tolist(), strict=True))


def one_run(
    molecule: str, model: str, labels: int, lr: float, seed: int, steps: int, data: Path, results: Path
) -> dict[str, Any]:
    """Train, test and store one run; a stored one is read."""
    target = results / f"{molecule}__{model}__n{labels}__lr{lr:g}__s{seed}__{steps}.json"
    if target.is_file():
        return json.loads(target.read_text())
    held = max(10, labels // 20)
    train, valid = split(rmd17(data / "rmd17_PBE", molecule, "train"), [labels - held, held], seed)
    test = rmd17(data / "rmd17_PBE", molecule, "test")[:1000]
    folder = (WORK / target.stem).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    files = {"train": write(folder / "train.xyz", train), "val": write(folder / "valid.xyz", valid)}
    start = time.time()
    shifts = isolated(train)
    nequip_train(
        CONFIGS[model], folder, **{
            **{f"data.{part}_file_path": str(file) for part, file in files.items()},
            "data.split_dataset": [], "run": ["train"], "lr": lr, "seed": seed, "batch_size": BATCH,
            # equal steps for every N: an epoch is a given number of batches, drawn again and again
            "data.train_dataloader": {
                "_target_": "torch.utils.data.DataLoader", "batch_size": BATCH,
                "sampler": {"_target_": "torch.utils.data.RandomSampler", "data_source": list(range(len(train))),
                            "replacement": len(train) < steps * BATCH // EPOCHS,
                            "num_samples": steps * BATCH // EPOCHS},
            },
            "epochs": EPOCHS, "types": list(shifts), "training_module.model.type_names": list(shifts),
            "training_module.model.per_type_energy_shifts": shifts,
            "training_module.model.per_type_energy_shifts_trainable": True,
            "training_module.model.compile_mode": "compile",
            "training_module.lr_scheduler.scheduler.gamma": 0.02 ** (1 / EPOCHS),
            "training_module.ema_decay": 0.99, "trainer.enable_progress_bar": False,
        },
    )  # fmt: skip
    trained = load(folder / "best.ckpt")
    row = {
        "molecule": molecule, "model": model, "labels": labels, "lr": lr, "seed": seed, "steps": steps,
        "parameters": sum(p.numel() for p in trained.parameters()), "wall_s": round(time.time() - start, 1),
        "valid": errors(trained, train, valid), "test": errors(trained, train, test),
    }  # fmt: skip
    write_text(target, json.dumps(row) + "\n")
    shutil.rmtree(folder)
    print(f"{target.stem}: test E {row['test']['mae_e']:.1f} meV, F {row['test']['mae_f']:.1f} meV/Å", flush=True)
    return row


@app.command()
def run(
    data: Annotated[Path, typer.Option(help="folder of the public data sets")],
    molecules: Annotated[str, typer.Option(help="rMD17 molecules")] = "ethanol,aspirin",
    labels: Annotated[str, typer.Option(help="numbers of labels")] = "50,200,1000",
    seeds: Annotated[str, typer.Option(help="the first is used for the sweep")] = "0,1,2",
    steps: Annotated[int, typer.Option(help="steps of every run")] = 3000,
    long: Annotated[int, typer.Option(help="steps of one more run of each model at the most labels; 0: none")] = 0,
    results: Results = RESULTS,
) -> None:
    """Run what is missing; stop at any time."""
    torch.set_num_threads(1)
    results.mkdir(parents=True, exist_ok=True)
    first, *rest = [int(s) for s in seeds.split(",")]
    found: dict[str, dict[str, float]] = {}
    for molecule in molecules.split(","):
        best = found[molecule] = {}
        for model, lrs in LRS.items():
            rows = [one_run(molecule, model, SWEEP, lr, first, steps, data, results) for lr in lrs]
            # a best rate at the upper edge: the sweep goes on
            while (top := max(r["lr"] for r in rows)) == min(rows, key=lambda r: r["valid"]["mae_f"])["lr"] < 0.1:
                rows.append(one_run(molecule, model, SWEEP, 2 * top, first, steps, data, results))
            best[model] = min(rows, key=lambda r: r["valid"]["mae_f"])["lr"]
        for seed in (first, *rest):
            for n in labels.split(","):
                for model, lr in best.items():
                    one_run(molecule, model, int(n), lr, seed, steps, data, results)
    for molecule, best in found.items() if long else ():
        for model, lr in best.items():
            one_run(molecule, model, max(map(int, labels.split(","))), lr, first, long, data, results)
    print(f"results in {results}")


@app.command()
def table(results: Results = RESULTS) -> None:
    """Write painn_accuracy.md and .png from the finished runs."""
    import matplotlib.pyplot as plt

    rows = [json.loads(p.read_text()) for p in sorted(results.glob("*.json"))]
    lines = ["# PaiNN against NequIP on rMD17, from scratch", "", __doc__.split("\n\n")[1].replace("\n", " "), ""]
    lines += [f"Median (min–max) over seeds; the energies of the isolated atoms are trained too; nequip "
              f"{version('nequip')}, {datetime.date.today()}, one CPU thread, inductor; min: wall time, "
              "in part beside other jobs.", ""]  # fmt: skip
    lines += [
        "| molecule | model | parameters | labels | steps | lr | seeds "
        "| E MAE (meV) | F MAE (meV/Å) | (kcal/mol/Å) | min |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|---|---|"]
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    for axis, molecule in zip(axes, PUBLISHED, strict=True):
        for model in LRS:
            mine = [r for r in rows if (r["molecule"], r["model"]) == (molecule, model)]
            swept = [r for r in mine if r["labels"] == SWEEP and r["seed"] == min(x["seed"] for x in mine)]
            if not swept:
                continue
            usual = min(r["steps"] for r in mine)
            lr = min(swept, key=lambda r: r["valid"]["mae_f"])["lr"]
            points = []
            for n, steps in sorted({(r["labels"], r["steps"]) for r in mine}):
                group = [r for r in mine if (r["labels"], r["steps"], r["lr"]) == (n, steps, lr)]
                if not group:
                    continue
                e, f = ([r["test"][k] for r in group] for k in ("mae_e", "mae_f"))
                if steps == usual:
                    points.append((n, median(f)))
                minutes = median(r["wall_s"] for r in group) / 60
                lines.append(
                    f"| {molecule} | {model} | {group[0]['parameters']:,} | {n} | {steps} | {lr:g} | {len(group)} "
                    f"| {median(e):.1f} ({min(e):.1f}–{max(e):.1f}) | {median(f):.1f} ({min(f):.1f}–{max(f):.1f}) "
                    f"| {median(f) / KCAL:.2f} | {minutes:.1f} |"
                )
            axis.loglog(*zip(*points, strict=True), "o-", label=f"{model}, {usual} steps")
        axis.axhline(PUBLISHED[molecule] * KCAL, ls=":", c="k", label="PaiNN, published (1000)")
        axis.set(title=molecule, xlabel="labels", ylabel="force MAE (meV/Å)")
        axis.legend()
    picture = results.parent / "painn_accuracy.png"
    figure.savefig(picture, dpi=150)
    write_text(results.parent / "painn_accuracy.md", "\n".join(lines) + f"\n\n![learning curves]({picture.name})\n")
    print("\n".join(lines))
    print(f"written: {results.parent / 'painn_accuracy.md'}, {picture}")


if __name__ == "__main__":
    app()
