"""Cost of MultiScaleMACE against MACE of the short and of the long cutoff: time and memory by system size.

Models are interleaved in one process with one thread; memory is the peak of a process of its own for each model and
size, above what it held before the evaluation. Boxes are water at 1 g/cm^3 (120 atoms, packed by Packmol), repeated.

Command:  python benchmarks/multiscale_cost.py run [--sizes 1,2,4] [--device cuda]
Cost:     15 minutes on one CPU thread (sizes 1,2,4: 120, 960, 7680 atoms).
"""

from __future__ import annotations

import datetime
import json
import resource
import subprocess
import sys
import time
import warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

warnings.filterwarnings("ignore")

import mace  # noqa: E402, F401  before e3nn
import numpy as np  # noqa: E402
import torch  # noqa: E402
import typer  # noqa: E402
from e3nn import o3  # noqa: E402
from mace import data, modules, tools  # noqa: E402
from mace.tools import torch_geometric  # noqa: E402

from mace_lora.atomic import write_text  # noqa: E402
from mace_lora.augment import molecule, pack  # noqa: E402
from mace_lora.multiscale import LongPath, to_multiscale  # noqa: E402

RESULTS = Path(__file__).parent / "results"
SHORT, LONG = 4.5, 9.0
NAMES = ("MACE, short", "MS-MACE", "MACE, long")
LIMIT = 14 * 2**30  # address space of a memory measurement, bytes
app = typer.Typer(add_completion=False)


def stock(r_max: float, channels: int, neighbours: float) -> torch.nn.Module:
    """A MACE of the size of MACE-OFF-small with vectors: 64x0e+64x1o, max_ell 3, correlation 3, two layers."""
    blocks = modules.interaction_classes
    return modules.ScaleShiftMACE(
        r_max=r_max, num_bessel=8, num_polynomial_cutoff=5, max_ell=3,
        interaction_cls=blocks["RealAgnosticResidualInteractionBlock"],
        interaction_cls_first=blocks["RealAgnosticInteractionBlock"], num_interactions=2, num_elements=2,
        hidden_irreps=o3.Irreps(f"{channels}x0e+{channels}x1o"), atomic_energies=np.zeros(2),
        avg_num_neighbors=neighbours, atomic_numbers=[1, 8], correlation=3, radial_MLP=[64, 64, 64],
        gate=torch.nn.functional.silu, MLP_irreps=o3.Irreps("16x0e"), atomic_inter_scale=1.0, atomic_inter_shift=0.0,
    )  # fmt: skip


def build(name: str, channels: int) -> torch.nn.Module:
    """One of the three models with random weights."""
    torch.manual_seed(0)
    if name == "MACE, long":
        return stock(LONG, channels, 300.0)
    short = stock(SHORT, channels, 38.0)
    return short if name == "MACE, short" else to_multiscale(short, LONG, LongPath(), zero=False)


def water(repeat: int) -> Any:
    return pack([molecule("O")], [40], 1.0, seed=1).repeat(repeat)


def batch(repeat: int, r_max: float, device: str) -> dict[str, torch.Tensor]:
    table = tools.AtomicNumberTable([1, 8])
    graph = data.AtomicData.from_config(data.config_from_atoms(water(repeat)), z_table=table, cutoff=r_max)
    loader = torch_geometric.dataloader.DataLoader([graph], 1, shuffle=False)
    return next(iter(loader)).to(device).to_dict()


def fresh(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v.detach().clone() if torch.is_tensor(v) else v for k, v in values.items()}


def timed(function: Any, device: str) -> float:
    begin = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def evaluate(model: torch.nn.Module, values: dict[str, Any]) -> None:
    model(fresh(values), compute_force=True)


def train_step(model: torch.nn.Module, values: dict[str, Any]) -> None:
    out = model(fresh(values), training=True, compute_force=True)
    loss = out["energy"].square().mean() + out["forces"].square().mean()
    loss.backward()
    model.zero_grad(set_to_none=True)


@app.command()
def memory(name: str, repeat: int, channels: int, device: str = "cpu") -> None:
    """Peak memory of one evaluation, for a process of its own; prints bytes."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    model = build(name, channels).to(device)
    values = batch(repeat, float(model.r_max), device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(values, compute_force=True)
        print(torch.cuda.max_memory_allocated() - before)
        return
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    model(values, compute_force=True)
    print(1024 * (status("VmHWM") - before))


def status(key: str) -> int:
    """A value of this process in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def peak(name: str, repeat: int, channels: int, device: str) -> float | None:
    """Bytes, or None where memory did not suffice."""
    command = [sys.executable, __file__, "memory", name, str(repeat), str(channels), "--device", device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and not any(w in done.stderr for w in ("allocate memory", "out of memory", "MemoryError")):
        raise RuntimeError(done.stderr[-2000:])
    return None if done.returncode else float(done.stdout.split()[-1])


@app.command()
def run(
    sizes: Annotated[str, typer.Option(help="repeats of the box of 120 atoms in each direction")] = "1,2,4",
    channels: Annotated[int, typer.Option(help="of the short path and of MACE")] = 64,
    repeats: Annotated[int, typer.Option(help="timings of each")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Measure and write multiscale_cost.md."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    rows = []
    for repeat in [int(s) for s in sizes.split(",")]:
        atoms = 120 * repeat**3
        gigabytes = {n: peak(n, repeat, channels, device) for n in NAMES}
        print(f"{atoms} atoms: peak memory {gigabytes}", flush=True)
        models = {n: build(n, channels).to(device) for n in NAMES if gigabytes[n] is not None}
        inputs = {n: batch(repeat, float(m.r_max), device) for n, m in models.items()}
        step: dict[str, list[float]] = {n: [] for n in models}
        training: dict[str, list[float]] = {n: [] for n in models}
        count = repeats if repeat < 3 else max(2, repeats // 2)
        for turn in range(count + 1):
            for name, model in models.items():
                seconds = timed(partial(evaluate, model, inputs[name]), device)
                step[name] += [seconds] if turn else []  # the first one warms up
                if repeat == 1:
                    seconds = timed(partial(train_step, model, inputs[name]), device)
                    training[name] += [seconds] if turn else []
        for name in NAMES:
            rows.append({
                "atoms": atoms, "model": name, "memory": gigabytes[name], "step": step.get(name), "train":
                training.get(name), "edges": int(inputs[name]["edge_index"].shape[1]) if name in models else None,
            })  # fmt: skip
            if name in models:
                print(f"  {name}: {median(step[name]):.3f} s", flush=True)
    parameters = {n: sum(p.numel() for p in build(n, channels).parameters()) for n in NAMES}
    content = {"rows": rows, "parameters": parameters, "channels": channels, "device": device}
    write_text(RESULTS / f"multiscale_cost_{device}.json", json.dumps(content, indent=1) + "\n")
    text = report(content)
    write_text(RESULTS / f"multiscale_cost_{device}.md", text)
    print(text)


def slope(rows: list[dict[str, Any]], name: str, key: str) -> str:
    """Log-log slope against the number of atoms, over the two largest sizes."""
    points = [(r["atoms"], median(r[key]) if isinstance(r[key], list) else r[key]) for r in rows if r["model"] == name]
    points = [p for p in points if p[1]][-2:]
    if len(points) < 2:
        return "–"
    (x0, y0), (x1, y1) = points
    return f"{np.log(y1 / y0) / np.log(x1 / x0):.2f}"


def report(content: dict[str, Any]) -> str:
    rows = content["rows"]
    lines = [
        "# Cost of MS-MACE",
        "",
        f"r_short {SHORT} Å, r_long {LONG} Å; short path and MACE: {content['channels']}x0e+{content['channels']}x1o, "
        "max_ell 3, correlation 3, two layers; long path: the defaults. Water, float32, energy and forces; "
        f"{content['device']}{', one thread' if content['device'] == 'cpu' else ''}. Median of interleaved timings "
        "(min–max). Parameters: " + ", ".join(f"{n} {p:,}" for n, p in content["parameters"].items()) + ".",
        f"Command: `python benchmarks/multiscale_cost.py run --device {content['device']}` ({datetime.date.today()}, "
        f"torch {version('torch')}, mace-torch {version('mace-torch')}).",
        "",
        "| atoms | model | edges | E+F (s) | against short | long / this | peak memory (GB) | against short | "
        "training step (s) | against short |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        mine = {x["model"]: x for x in rows if x["atoms"] == r["atoms"]}

        def ratio(key: str, over: str, row: dict[str, Any] = r, mine: dict[str, Any] = mine) -> str:
            a, b = row[key], mine[over][key]
            a, b = (median(v) if isinstance(v, list) and v else v for v in (a, b))
            return f"{a / b:.2f}" if a and b and not isinstance(a, list) and not isinstance(b, list) else "–"

        long_ratio = ratio("step", "MACE, long")
        faster = "–" if long_ratio == "–" else f"{1 / float(long_ratio):.1f}×"
        step = f"{median(r['step']):.3f} ({min(r['step']):.3f}–{max(r['step']):.3f})" if r["step"] else "–"
        memory = f"{r['memory'] / 1e9:.2f}" if r["memory"] else f"more than {LIMIT / 1e9:.0f}"
        train = f"{median(r['train']):.3f}" if r["train"] else "–"
        edges = f"{r['edges']:,}" if r["edges"] else "–"
        lines.append(
            f"| {r['atoms']:,} | {r['model']} | {edges} | {step} | {ratio('step', 'MACE, short')} | {faster} | "
            f"{memory} | {ratio('memory', 'MACE, short')} | {train} | {ratio('train', 'MACE, short')} |"
        )
    lines += ["", "Log-log slope against atoms (two largest sizes), time / memory: "]
    lines[-1] += "; ".join(f"{n} {slope(rows, n, 'step')} / {slope(rows, n, 'memory')}" for n in NAMES) + "."
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    app()
