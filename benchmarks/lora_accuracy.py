"""LoRA against full fine-tuning and MACE's own LoRA on real data: accuracy at 50 + 50 labels.

Each method gets the same frames, budget and its own learning-rate sweep on the first seed, widened past its edges; the
learning rate with the lowest geometric mean of validation energy and force MAE is then run on the
other seeds. Test frames are only reported. One JSON file per run, so that a stopped benchmark
continues, several sessions can share the work, and tables and plots come from files alone.

Command:  python benchmarks/lora_accuracy.py run --data DIR --sets ethanol,3bpa --bases off,embedded
          python benchmarks/lora_accuracy.py table
Cost:     3 minutes (9 atoms, embedded base) to 20 minutes (27 atoms, MACE-OFF23-small) a run of 70
          epochs on one CPU thread; --jobs runs in parallel.
"""

from __future__ import annotations

import concurrent.futures
import datetime
import json
import warnings
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from finetune import METHODS, Job, run, zero_shot
from sweep import next_rate

from mace_lora.atomic import atomic_path, write_text

RESULTS = Path(__file__).parent / "results" / "lora_accuracy"
LRS = {
    "full": "0.002,0.005,0.01", "scratch": "0.01", "readout": "0.03",
    "mace-lora-r4": "0.02,0.04,0.08", "mace-lora-r16": "0.02,0.04,0.08", "ours": "0.01,0.02,0.04",
    "ours-r4": "0.01,0.02,0.04", "ours-r64": "0.005,0.01,0.02", "ours-elora": "0.002,0.005,0.01",
}  # fmt: skip
# mean over methods would hide where a method fails, so wins are counted per set and base
MAIN = ("full", "mace-lora-r4", "mace-lora-r16", "ours")
SHOWN = ("mae_e", "mae_e_refit", "rmse_e", "mae_f", "rmse_f")
app = typer.Typer(add_completion=False, no_args_is_help=True)
Results = Annotated[Path, typer.Option(help="one JSON per run")]


def score(row: dict[str, Any]) -> float:
    """Selection by validation frames: geometric mean of energy (meV) and force (meV/Å) MAE."""
    value = float(np.sqrt(row["valid"]["mae_e"] * row["valid"]["mae_f"]))
    return value if np.isfinite(value) else float("inf")


@app.command("run")
def run_all(
    data: Annotated[Path, typer.Option(help="folder of the public data sets")],
    sets: Annotated[str, typer.Option(help="comma-separated data sets")] = "ethanol",
    bases: Annotated[str, typer.Option(help="of off, mp, embedded")] = "off",
    methods: Annotated[str, typer.Option(help=f"of {', '.join(METHODS)}")] = ",".join(MAIN),
    seeds: Annotated[str, typer.Option(help="the first is used for the sweep")] = "0,1,2",
    lrs: Annotated[str, typer.Option(help="learning rates; default each method's own sweep")] = "",
    epochs: Annotated[int, typer.Option(help="epochs of every run, 10 steps each")] = 70,
    jobs: Annotated[int, typer.Option(help="runs at a time, one thread each")] = 2,
    workdir: Annotated[Path, typer.Option(help="files of unfinished runs")] = Path("build/lora_accuracy"),
    results: Results = RESULTS,
) -> None:
    """Run what is missing; stop at any time."""
    warnings.filterwarnings("ignore")
    files = {
        "off": data / "models" / "MACE-OFF23_small.model", "mp": data / "models" / "mace_mp_small.model",
        "embedded": Path("embedded"),
    }  # fmt: skip
    seed_list = [int(s) for s in seeds.split(",")]
    cases = [(s, b, m) for s in sets.split(",") for b in bases.split(",") for m in methods.split(",")]
    workdir.mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    for s, b, _ in cases:
        zero_shot(s, b, data, files, results)
    sweep = [Job(s, b, m, float(lr), seed_list[0], epochs) for s, b, m in cases for lr in (lrs or LRS[m]).split(",")]
    rows: list[dict[str, Any]] = []
    tried: set[Job] = set()
    while sweep:
        tried.update(sweep)
        rows += _in_parallel(sweep, jobs, data, files, workdir, results)
        swept = {c: [r for r in rows if (r["set"], r["base"], r["method"]) == c] for c in cases}
        wider = {c: next_rate(mine, score) for c, mine in swept.items() if mine}
        more = [Job(*c, lr, seed_list[0], epochs) for c, lr in wider.items() if lr is not None]
        sweep = [job for job in more if job not in tried]  # a run that failed is not tried again
    rest = []
    for case, mine in swept.items():
        if mine:
            best = min(mine, key=score)["lr"]
            rest += [Job(*case, best, seed, epochs) for seed in seed_list[1:]]
    _in_parallel(rest, jobs, data, files, workdir, results)
    print(f"results in {results}")


def _in_parallel(todo: list[Job], jobs: int, *places: Any) -> list[dict[str, Any]]:
    """Run jobs in threads, which wait for one training process each."""
    rows = []
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run, job, *places): job for job in todo}
        for future in concurrent.futures.as_completed(futures):
            job = futures[future]
            try:
                row = future.result()
            except Exception as err:  # a failed run must not stop the others; its log stays
                print(f"FAILED {job.name}: {err}", flush=True)
                continue
            rows.append(row)
            print(f"{job.name}: test E {row['test']['mae_e']:.1f} meV, F {row['test']['mae_f']:.1f} meV/Å", flush=True)
    return rows


def chosen(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Runs at the learning rate chosen on the first seed's validation frames, by (set, base, method)."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["set"], row["base"], row["method"]), []).append(row)
    out = {}
    for key, group in groups.items():
        first = min(r["seed"] for r in group)
        best = min((r for r in group if r["seed"] == first), key=score)["lr"]
        out[key] = [r for r in group if r["lr"] == best]
    return out


def cell(rows: list[dict[str, Any]], key: str) -> str:
    """Median and range over seeds."""
    values = [r["test"][key] for r in rows]
    text = f"{median(values):.1f}"
    return text if len(values) == 1 else f"{text} ({min(values):.1f}–{max(values):.1f})"


def tables(rows: list[dict[str, Any]], zero: dict[tuple[str, str], dict[str, float]]) -> str:
    """Markdown: a table per set and base, then the summary of ours against the others."""
    best = chosen(rows)
    lines: list[str] = []
    for case in sorted({k[:2] for k in best}):
        lines += [
            f"## {case[0]}, base {case[1]}",
            "",
            "| method | lr | seeds | E MAE | E MAE, refit | E RMSE | F MAE | F RMSE |",
        ]
        lines += ["|---|---|---|---|---|---|---|---|"]
        if case in zero:
            z = zero[case]
            values = " | ".join(f"{z[k]:.1f}" for k in SHOWN)
            lines.append(f"| base, energies aligned | – | – | {values} |")
        for method in METHODS:
            group = best.get((*case, method))
            if group:
                cells = " | ".join(cell(group, k) for k in SHOWN)
                lines.append(f"| {method} | {group[0]['lr']:g} | {len(group)} | {cells} |")
        lines += ["", _sweeps(rows, case), ""]
    return "\n".join([*_summary(best), "", *lines])


def _sweeps(rows: list[dict[str, Any]], case: tuple[str, str]) -> str:
    """Validation E/F MAE of every learning rate of the sweep seed."""
    parts = []
    for method in METHODS:
        mine = [r for r in rows if (r["set"], r["base"]) == case and r["method"] == method]
        first = min((r["seed"] for r in mine), default=0)
        points = sorted((r["lr"], r["valid"]) for r in mine if r["seed"] == first)
        if points:
            text = ", ".join(f"{lr:g}: {v['mae_e']:.1f}/{v['mae_f']:.1f}" for lr, v in points)
            parts.append(f"{method} {text}")
    return "Validation E/F MAE by learning rate: " + "; ".join(parts) + "."


def _summary(best: dict[tuple[str, str, str], list[dict[str, Any]]]) -> list[str]:
    """Mean improvement of ours over each other method, paired by seed, with a bootstrap interval."""
    lines = [
        "| ours against | cases | E MAE better | F MAE better | mean change E | E, both refitted | mean change F |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for other in ("full", "mace-lora-r4", "mace-lora-r16", "ours-elora"):
        ratios: dict[str, list[float]] = {"mae_e": [], "mae_e_refit": [], "mae_f": []}
        for (s, b, m), group in best.items():
            if m != "ours" or (s, b, other) not in best:
                continue
            for key, values in ratios.items():
                mine, theirs = (median(r["test"][key] for r in g) for g in (group, best[s, b, other]))
                values.append(mine / theirs - 1)
        if not ratios["mae_f"]:
            continue
        wins = [sum(v < 0 for v in ratios[k]) for k in ("mae_e", "mae_f")]
        change = " | ".join(_interval(values) for values in ratios.values())
        n = len(ratios["mae_f"])
        lines.append(f"| {other} | {n} | {wins[0]}/{n} | {wins[1]}/{n} | {change} |")
    return lines


def _interval(values: list[float]) -> str:
    mean = 100 * float(np.mean(values))
    if len(values) < 3:
        return f"{mean:+.1f} %"
    rng = np.random.default_rng(0)
    samples = 100 * rng.choice(values, (2000, len(values))).mean(axis=1)
    low, high = np.percentile(samples, [2.5, 97.5])
    return f"{mean:+.1f} % ({low:+.1f} to {high:+.1f})"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Validation curves of the chosen runs, a panel per set and base."""
    from matplotlib.figure import Figure

    best = chosen(rows)
    cases = sorted({k[:2] for k in best})
    figure = Figure(figsize=(4.2 * min(3, len(cases)), 3.2 * -(-len(cases) // 3)), layout="constrained")
    axes = figure.subplots(-(-len(cases) // 3), min(3, len(cases)), squeeze=False).ravel()
    for axis, case in zip(axes, cases, strict=False):
        for method in METHODS:
            for i, row in enumerate(best.get((*case, method), [])):
                x, y = zip(*row["curve"], strict=True)
                label = method if i == 0 else None
                axis.plot(x, y, color=f"C{list(METHODS).index(method)}", label=label, linewidth=1, alpha=0.8)
        axis.set(title=f"{case[0]}, {case[1]}", yscale="log", xlabel="epoch", ylabel="validation F MAE (meV/Å)")
        axis.legend(fontsize=6)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


@app.command()
def table(results: Results = RESULTS, epochs: Annotated[int, typer.Option(help="which budget")] = 70) -> None:
    """Write lora_accuracy.md and lora_accuracy.png from the finished runs."""
    rows, zero = [], {}
    for path in sorted(results.glob("*.json")):
        content = json.loads(path.read_text())
        parts = path.stem.split("__")
        if parts[-1] == "zero-shot":
            zero[parts[0], parts[1]] = content
        elif content["epochs"] == epochs:
            rows.append(content)
    if not rows:
        raise SystemExit(f"no finished runs of {epochs} epochs in {results}")
    head = (
        "# LoRA against full fine-tuning at 50 + 50 labels\n\n"
        "50 training + 50 validation frames (both counted as labels), up to 1000 test frames, "
        f"{epochs} epochs of 10 steps, learning rate decaying exponentially to a fifth, EMA 0.99, best epoch by the "
        "validation loss, float32, one CPU thread a run; E in meV (whole frame; 'refit': with the constant offsets of "
        "the training frames' energies removed, which ours does by itself), F in meV/Å; median (min–max) over seeds, "
        "which change frames, initialisation and order. "
        "The learning rate is chosen on the validation frames of the first seed (lowest geometric mean of E and F "
        "MAE).\n"
        "Commands: `python benchmarks/lora_accuracy.py run --data DIR --sets … --bases …`, "
        f"`python benchmarks/lora_accuracy.py table` ({datetime.date.today()}, mace-torch {version('mace-torch')}, "
        f"torch {version('torch')}).\n\n"
    )
    text = head + tables(rows, zero)
    write_text(results.parent / "lora_accuracy.md", text + "\n")
    plot(rows, results.parent / "lora_accuracy.png")
    print(text)
    print(f"written: {results.parent / 'lora_accuracy.md'} and .png")


if __name__ == "__main__":
    app()
