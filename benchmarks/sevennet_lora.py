"""LoRA on SevenNet-0, the foundation model in sevenn's wheel: Cu and Si at PBE, against full fine-tuning.

The published experiment (Cu, 300 K) in kind, and mlearn's Cu and Si: 10 training and 10 validation frames,
up to 60 test frames, SevenNet's own Trainer, loss (the checkpoint's) and Adam; nothing of sevenn is changed,
the adapter is put on its model by mace_lora.apply_lora. Both methods start from the same aligned energy shift and get a
learning-rate sweep on the first seed, chosen by the validation forces and widened past its edges; the epoch that is
kept is the best by the geometric mean of validation E and F, noisy on 10 frames for both; energies are
given with the constant offset of the training frames removed, for both.

Command:  python benchmarks/sevennet_lora.py run --data DIR
          python benchmarks/sevennet_lora.py cost --data DIR    # time and memory of a step
          python benchmarks/sevennet_lora.py table
Cost:     8 to 15 minutes a run of 16 epochs on one CPU thread; cost 5 minutes.
"""

from __future__ import annotations

import copy
import datetime
import json
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from ase.calculators.singlepoint import SinglePointCalculator
from datasets import extxyz, load_split, split
from sweep import next_rate

from mace_lora import LoraConfig, apply_lora
from mace_lora.atomic import write_text

RESULTS = Path(__file__).parent / "results" / "sevennet_lora"
LRS = {"full": (0.0005, 0.001, 0.002), "lora": (0.005, 0.01, 0.02)}
COUNTS = (10, 10, 60)
app = typer.Typer(add_completion=False, no_args_is_help=True)


def load(frames: list[Any]) -> tuple[Any, Any, list[Any]]:
    """SevenNet-0, its config, and frames as its graphs."""
    from sevenn.atom_graph_data import AtomGraphData
    from sevenn.checkpoint import SevenNetCheckpoint
    from sevenn.train.dataload import graph_build
    from sevenn.util import pretrained_name_to_path

    checkpoint = SevenNetCheckpoint(pretrained_name_to_path("7net-0"))
    graphs = graph_build(frames, checkpoint.config["cutoff"], num_cores=1, y_from_calc=True)
    return checkpoint.build_model(), checkpoint.config, [AtomGraphData.from_numpy_dict(dict(g)) for g in graphs]


def errors(model: Any, graphs: list[Any], offset: float = 0.0) -> dict[str, Any]:
    """MAE of E (meV/atom) and F (meV/Å), and the mean energy error (eV/atom)."""
    model.eval()
    model.set_is_batch_data(False)
    de, df = [], []
    for graph in graphs:
        out = model(graph.clone())
        atoms = len(out["pos"])
        energy, forces = out["inferred_total_energy"], out["inferred_force"]
        de.append(float(energy.detach() - graph["total_energy"]) / atoms - offset)
        df.append((forces.detach() - graph["force_of_atoms"]).numpy())
    flat = np.concatenate(df)
    return {
        "mean_e": float(np.mean(de)), "mae_e": 1e3 * float(np.mean(np.abs(de))),
        "mae_f": 1e3 * float(np.abs(flat).mean()), "rmse_f": 1e3 * float(np.sqrt((flat**2).mean())),
    }  # fmt: skip


def frames_of(name: str, data: Path, seed: int) -> list[list[Any]]:
    """Training, validation and test frames with labels as ASE results.

    The mean energy of the training frames is taken off all labels: -357682 eV would leave 30 meV of float32's
    digits.
    """
    if name == "cu_300K":
        parts = split(extxyz(data / "cu_PBE" / "Cu_300K.extxyz"), list(COUNTS), seed)
    else:
        found = load_split(name, data, seed)
        parts = [part[:n] for part, n in zip((found.train, found.valid, found.test), COUNTS, strict=True)]
    per_atom = np.mean([f.info["REF_energy"] / len(f) for f in parts[0]])
    for frame in [f for part in parts for f in part]:
        energy = frame.info["REF_energy"] - per_atom * len(frame)
        frame.calc = SinglePointCalculator(frame, energy=energy, forces=frame.arrays["REF_forces"])
    return parts


def one_run(name: str, method: str, lr: float, seed: int, epochs: int, data: Path, results: Path) -> dict[str, Any]:
    """Train, test and store one run; a stored one is read."""
    from sevenn.train.loss import get_loss_functions_from_config
    from sevenn.train.trainer import Trainer
    from torch_geometric.loader import DataLoader

    target = results / f"{name}__{method}__lr{lr:g}__s{seed}__e{epochs}.json"
    if target.is_file():
        return json.loads(target.read_text())
    parts = frames_of(name, data, seed)
    torch.manual_seed(seed)
    model, config, graphs = load([f for part in parts for f in part])
    train, valid, test = graphs[: COUNTS[0]], graphs[COUNTS[0] : sum(COUNTS[:2])], graphs[sum(COUNTS[:2]) :]
    shift = errors(model, train)["mean_e"]
    with torch.no_grad():  # the same aligned shift for both
        model.rescale_atomic_energy.shift -= shift
    zero = errors(model, test)
    if method == "lora":
        apply_lora(model, LoraConfig(rank=16))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    scheduler = {"gamma": 0.2 ** (1 / epochs)}
    trainer = Trainer(
        model, get_loss_functions_from_config(config), torch.optim.Adam, {"lr": lr},
        torch.optim.lr_scheduler.ExponentialLR, scheduler, device="cpu",
    )  # fmt: skip
    loader = DataLoader(train, batch_size=2, shuffle=True)
    best: tuple[float, dict[str, Any]] | None = None
    curve, step, start = [], 0.0, time.time()
    for epoch in range(epochs):
        model.set_is_batch_data(True)
        begin = time.process_time()  # of this process alone: other jobs do not count
        trainer.run_one_epoch(loader, is_train=True)
        step += time.process_time() - begin
        trainer.scheduler_step()
        if epoch % 2 == 1:
            row = errors(model, valid, errors(model, train)["mean_e"])
            curve.append([epoch, round(row["mae_e"], 3), round(row["mae_f"], 3)])
            print(f"{target.stem} epoch {epoch}: validation E {row['mae_e']:.2f}, F {row['mae_f']:.1f}", flush=True)
            value = float(np.sqrt(row["mae_e"] * row["mae_f"]))
            if best is None or value < best[0]:
                best = (value, copy.deepcopy(model.state_dict()))
                valid_row = row
    assert best is not None
    model.load_state_dict(best[1])
    row = {
        "set": name, "zero_shot": zero, "method": method, "lr": lr, "seed": seed, "epochs": epochs,
        "trained": trained, "curve": curve, "step_s": step / (epochs * len(loader)), "wall_s": time.time() - start,
        "valid": valid_row, "test": errors(model, test, errors(model, train)["mean_e"]),
    }  # fmt: skip
    write_text(target, json.dumps(row) + "\n")
    return row


def score(row: dict[str, Any]) -> float:
    """Validation force MAE: the energies of 10 frames jump from one validated epoch to the next by more than the
    rates differ (see the curves in the JSON files). The table says what energies and forces together would choose."""
    return float(row["valid"]["mae_f"])


@app.command()
def run(
    data: Annotated[Path, typer.Option(help="folder of the public data sets")],
    sets: Annotated[str, typer.Option(help="of cu_300K, Cu, Si")] = "cu_300K,Si,Cu",
    seeds: Annotated[str, typer.Option(help="the first is used for the sweep")] = "0,1,2",
    epochs: Annotated[int, typer.Option(help="epochs of 5 steps")] = 16,
    results: Annotated[Path, typer.Option(help="one JSON per run")] = RESULTS,
) -> None:
    """Run what is missing; stop at any time."""
    warnings.filterwarnings("ignore")
    results.mkdir(parents=True, exist_ok=True)
    first, *rest = [int(s) for s in seeds.split(",")]
    for name in sets.split(","):
        rows = {m: [one_run(name, m, lr, first, epochs, data, results) for lr in lrs] for m, lrs in LRS.items()}
        for method, done in rows.items():
            while wider := next_rate(done, score):
                done.append(one_run(name, method, wider, first, epochs, data, results))
        for seed in rest:
            for method, done in rows.items():
                one_run(name, method, min(done, key=score)["lr"], seed, epochs, data, results)
    print(f"results in {results}")


@app.command()
def cost(
    data: Annotated[Path, typer.Option(help="folder of the public data sets")],
    rounds: Annotated[int, typer.Option(help="timed rounds")] = 10,
    output: Annotated[Path, typer.Option(help="table to write")] = RESULTS.parent / "sevennet_cost.md",
) -> None:
    """Time and memory of a training step of 2 Cu frames, full against LoRA of rank 16, interleaved."""
    from lora_cost import interleaved, ratio, tensor_peak
    from sevenn.train.loss import get_loss_functions_from_config
    from sevenn.train.trainer import Trainer
    from torch_geometric.loader import DataLoader

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    frames, steps, trained = frames_of("cu_300K", data, 0)[0][:2], {}, {}
    for method in LRS:
        model, config, graphs = load(frames)
        if method == "lora":
            apply_lora(model, LoraConfig(rank=16))
        trained[method] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        scheduler = (torch.optim.lr_scheduler.ExponentialLR, {"gamma": 1.0})
        losses = get_loss_functions_from_config(config)
        trainer = Trainer(model, losses, torch.optim.Adam, {"lr": 1e-6}, *scheduler, device="cpu")
        model.set_is_batch_data(True)
        loader = DataLoader(graphs, batch_size=2)
        steps[method] = lambda trainer=trainer, loader=loader: trainer.run_one_epoch(loader, is_train=True)
    times = interleaved(steps, rounds, 1, time.process_time)
    lines = [
        f"# Cost of LoRA on SevenNet-0: 2 frames of {len(frames[0])} Cu atoms", "",
        f"sevenn {version('sevenn')}, torch {version('torch')}, {datetime.date.today()}, one CPU thread, CPU time; "
        f"ratios are medians (quartiles) of {rounds} interleaved rounds. Command: `python benchmarks/sevennet_lora.py "
        "cost --data DIR`.", "",
        "| step | s | peak of tensors (MB) | values trained | time / full |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for method, step in steps.items():
        compared = "1" if method == "full" else ratio(times, method, "full")
        lines.append(
            f"| {method} | {median(times[method]):.1f} | {tensor_peak(step):.0f} | {trained[method]:,} | {compared} |"
        )
    write_text(output, "\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"written: {output}")


def _line(swept: list[dict[str, Any]], group: list[dict[str, Any]]) -> str:
    best = min(swept, key=score)["lr"]
    mine = [r for r in group if r["lr"] == best]
    cells = []
    for key, digits in (("mae_e", 2), ("mae_f", 1), ("rmse_f", 1)):
        v = [r["test"][key] for r in mine]
        cells.append(f"{median(v):.{digits}f} ({min(v):.{digits}f}–{max(v):.{digits}f})")
    cells += [f"{mine[0]['trained']:,}", f"{median(r['step_s'] for r in mine):.1f}"]
    return f"| {mine[0]['set']} | {mine[0]['method']} | {best:g} | {len(mine)} | {' | '.join(cells)} |"


@app.command()
def table(results: Annotated[Path, typer.Option(help="one JSON per run")] = RESULTS) -> None:
    """Write sevennet_lora.md from the finished runs."""
    rows = [json.loads(p.read_text()) for p in sorted(results.glob("*.json"))]
    lines = ["# LoRA on SevenNet-0: Cu and Si, 10 + 10 labels", "", __doc__.split("\n\n")[1].replace("\n", " "), ""]
    lines += [
        f"Median (min–max) over seeds; sevenn {version('sevenn')}, torch {version('torch')}, "
        f"{datetime.date.today()}, one CPU thread. Memory of a step: [sevennet_cost.md](sevennet_cost.md).",
        "",
    ]
    lines += ["| set | method | lr | seeds | E MAE (meV/atom) | F MAE (meV/Å) | F RMSE (meV/Å) | trained | s/step |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    sweeps, both = [], []
    for name in sorted({r["set"] for r in rows}):
        first = [r for r in rows if r["set"] == name and r["seed"] == min(x["seed"] for x in rows if x["set"] == name)]
        zero = first[0]["zero_shot"]
        lines.append(f"| {name} | SevenNet-0, shifted | – | – | {zero['mae_e']:.2f} | {zero['mae_f']:.1f} "
                     f"| {zero['rmse_f']:.1f} | – | – |")  # fmt: skip
        for method in LRS:
            swept = [r for r in first if r["method"] == method]
            if swept:
                other = min(swept, key=lambda r: r["valid"]["mae_e"] * r["valid"]["mae_f"])
                both.append(
                    f"{name} {method} {other['lr']:g}: {other['test']['mae_e']:.2f}/{other['test']['mae_f']:.1f}"
                )
                lines.append(_line(swept, [r for r in rows if (r["set"], r["method"]) == (name, method)]))
        sweeps += [
            f"{r['set']} {r['method']} {r['lr']:g}: {r['valid']['mae_e']:.2f}/{r['valid']['mae_f']:.1f}" for r in first
        ]
    lines += ["", f"Validation E/F MAE by learning rate: {', '.join(sweeps)}."]
    lines += ["", "Rates that the geometric mean of validation E and F would choose, and the test E/F MAE of that run "
              f"(first seed): {', '.join(both)}."]  # fmt: skip
    write_text(results.parent / "sevennet_lora.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"written: {results.parent / 'sevennet_lora.md'}")


if __name__ == "__main__":
    app()
