"""What LoRA costs: time and memory of a training step, inference, start-up, files.

All methods run interleaved in one process on the same batch, in random order in every round; figures
are medians of per-round ratios with their range. Peak memory is measured in a fresh process each.

Command:  OMP_NUM_THREADS=1 python benchmarks/lora_cost.py --base embedded --base MACE-OFF23_small.model
Cost:     about 5 minutes a base on one CPU thread.
"""

from __future__ import annotations

import copy
import datetime
import gzip
import itertools
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from mace_lora.atomic import write_text

METHODS = ("full", "mace-lora r16", "ours r16", "ours, MACE's layers r16", "mace-lora r4", "ours r4")
app = typer.Typer(add_completion=False, invoke_without_command=True)


def build(base: str, dtype: Any) -> Any:
    """A base model: 'embedded', a .model file, or hidden irreps (random weights, MACE-OFF23-medium's shape)."""
    import mace  # noqa: F401  before e3nn
    import numpy as np
    import torch
    from e3nn import o3
    from mace import modules

    from mace_lora.mace_plugin.base_model import load_model

    if base == "embedded" or Path(base).is_file():
        return load_model(base).to(dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    model = modules.ScaleShiftMACE(
        r_max=5.0, num_bessel=8, num_polynomial_cutoff=5, max_ell=3, num_interactions=2, num_elements=6,
        interaction_cls=modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
        interaction_cls_first=modules.interaction_classes["RealAgnosticInteractionBlock"],
        hidden_irreps=o3.Irreps(base), MLP_irreps=o3.Irreps("16x0e"), atomic_energies=np.zeros(6),
        avg_num_neighbors=10.0, atomic_numbers=[1, 6, 7, 8, 9, 16], correlation=3, gate=torch.nn.functional.silu,
        radial_MLP=[64, 64, 64], atomic_inter_scale=1.0, atomic_inter_shift=0.0, heads=["Default"],
    )  # fmt: skip
    torch.set_default_dtype(before)
    return model


def frames_of(batch: int, data: Path | None, molecule: str) -> list[Any]:
    """Labelled frames: rMD17 or the embedded set."""
    import ase.io
    from datasets import rmd17

    from mace_lora import embedded_dft_path

    if data is not None:
        return rmd17(data, molecule, "train")[:batch]
    with gzip.open(embedded_dft_path(), "rt") as handle:
        return ase.io.read(handle, f":{batch}", format="extxyz")


def select_elements(model: Any, frames: list[Any]) -> Any:
    """The model as mace_run_train makes it: with the elements of the data only."""
    from mace_lora.mace_plugin.base_model import describe_base, prepare_base

    device, about = next(model.parameters()).device, describe_base(model)
    zs = sorted({int(z) for f in frames for z in f.numbers})
    head = about["heads"][0]
    energies = {head: {str(z): about["E0s"][head][str(z)] for z in zs}}
    return prepare_base(model.cpu(), about | {"elements": zs, "heads": [head], "E0s": energies}).to(device)


def graphs(model: Any, frames: list[Any]) -> tuple[dict[str, Any], Any]:
    """A batch of labelled frames in the model's dtype and on its device."""
    import torch

    from mace_lora.lora.calculator import graph_of

    graph = graph_of(model, frames, None)
    like = next(model.parameters())
    forces = torch.cat([torch.as_tensor(f.arrays["REF_forces"]) for f in frames]).to(like)
    return graph, (torch.zeros(len(frames)).to(like), forces)


def method_model(method: str, base: Any) -> Any:
    """A copy of the base as the method trains it."""
    from mace.modules.lora import inject_LoRAs

    from mace_lora import LoraConfig, apply_lora
    from mace_lora.lora.by_element import enable
    from mace_lora.mace_plugin.by_element import KERNELS

    model = copy.deepcopy(base)
    rank = int(method.rpartition("r")[2]) if " r" in method else 0
    if method.startswith("mace-lora"):
        return inject_LoRAs(model, rank=rank, alpha=rank).to(next(base.parameters()).device)
    if method.startswith("ours"):
        preset = "upstream" if "MACE's layers" in method else "degree_parity"
        enable(
            apply_lora(model, LoraConfig(rank=rank, alpha=float(rank), preset=preset)), KERNELS
        )  # as the plugin does
        return model
    return model.requires_grad_(True)


def stepper(model: Any, graph: dict[str, Any], labels: Any) -> Callable[[], None]:
    """One training step as upstream does it: forward with forces, backward, clip, Adam, EMA."""
    import torch
    from torch_ema import ExponentialMovingAverage

    trained = [p for p in model.parameters() if p.requires_grad]
    # the plugin asks for the fused step, upstream does not
    ours = any(".base_layer." in name for name, _ in model.named_parameters())
    optimizer = torch.optim.Adam([{"params": trained, "fused": ours or None}], lr=1e-5, amsgrad=True)
    ema = ExponentialMovingAverage(averaged(model), decay=0.99)
    energy, forces = labels

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        out = model(dict(graph), training=True, compute_force=True)
        loss = 100 * (out["forces"] - forces).square().mean() + (out["energy"] * 0 - energy).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 10.0)
        optimizer.step()
        ema.update()
        if graph["positions"].is_cuda:
            torch.cuda.synchronize()

    return step


def averaged(model: Any) -> list[Any]:
    """Parameters under EMA: the trained ones with our plugin, upstream averages all of them."""
    ours = any(".base_layer." in name for name, _ in model.named_parameters())
    return [p for p in model.parameters() if p.requires_grad or not ours]


def state_bytes(model: Any) -> int:
    """Bytes of Adam's three moments (amsgrad) and of the EMA."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return 3 * trained + sum(p.numel() * p.element_size() for p in averaged(model))


def interleaved(
    steps: dict[str, Callable[[], None]], rounds: int, warmup: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every step, a list per method; all methods in each round, in random order."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    rng = random.Random(0)
    for number in range(warmup + rounds):
        order = list(steps)
        rng.shuffle(order)
        for name in order:
            start = clock()
            steps[name]()
            if number >= warmup:
                times[name].append(clock() - start)
    return times


def ratio(times: dict[str, list[float]], a: str, b: str) -> str:
    """Median and quartiles of the per-round ratio a/b."""
    values = sorted(x / y for x, y in zip(times[a], times[b], strict=True))
    return f"{median(values):.3f} ({values[len(values) // 4]:.3f}–{values[3 * len(values) // 4]:.3f})"


def measure(base: str, options: dict[str, Any]) -> list[str]:
    """Markdown rows of one base."""
    import torch

    from mace_lora import merge_lora, save_adapter

    dtype, device = getattr(torch, options["dtype"]), options["device"]
    # a neighbour's load on the machine is not ours
    clock = time.process_time if device == "cpu" else time.perf_counter
    frames = frames_of(options["batch"], options["data"], options["molecule"])
    model = select_elements(build(base, dtype), frames).to(device)
    graph, labels = graphs(model, frames)
    models = {m: method_model(m, model) for m in METHODS}
    times = interleaved({m: stepper(x, graph, labels) for m, x in models.items()}, options["rounds"], 4, clock)
    label = Path(base).name
    lines = [f"## {label}, {graph['positions'].shape[0]} atoms, {graph['edge_index'].shape[1]} edges", ""]
    lines += ["| step | ms | peak memory (MB) | optimiser + EMA (kB) |", "|---|---|---|---|"]
    for name, x in models.items():
        states = state_bytes(x) / 1e3
        memory = peak_memory(base, name, options)
        lines.append(f"| {name} | {1e3 * median(times[name]):.1f} | {memory:.0f} | {states:.0f} |")
    lines += ["", "| ratio | median (quartiles) |", "|---|---|"]
    for rank in (16, 4):
        lines.append(f"| step, ours r{rank} / full | {ratio(times, f'ours r{rank}', 'full')} |")
        lines.append(f"| step, ours / MACE's own, r{rank} | {ratio(times, f'ours r{rank}', f'mace-lora r{rank}')} |")
    same = ratio(times, "ours, MACE's layers r16", "mace-lora r16")
    lines.append(f"| step, ours on the layers that MACE's own adapts / MACE's own, r16 | {same} |")
    merged = merge_lora(copy.deepcopy(models["ours r16"]))
    plain = {
        n: (lambda m=m: m(dict(graph), training=False, compute_force=True))
        for n, m in (("base", model), ("merged", merged))
    }
    inference = interleaved(plain, 3 * options["rounds"], 6, clock)
    lines.append(f"| inference, merged / base | {ratio(inference, 'merged', 'base')} |")
    weights = 4 * sum(p.numel() for p in model.parameters())
    for rank in (16, 4):
        with tempfile.TemporaryDirectory() as folder:
            size = (save_adapter(models[f"ours r{rank}"], folder) / "adapter_model.safetensors").stat().st_size
        text = f"{100 * size / weights:.1f} % of the base's weights ({size / 1e3:.0f} of {weights / 1e3:.0f} kB)"
        if Path(base).is_file():
            text += f", {100 * size / Path(base).stat().st_size:.1f} % of the .model file"
        lines.append(f"| adapter file, r{rank} | {text} |")
    return [*lines, ""]


def peak_memory(base: str, method: str, options: dict[str, Any]) -> float:
    """MB of tensors that a training step holds at its peak beyond model and optimiser, in a fresh process."""
    command = [sys.executable, "-W", "ignore", __file__, "peak", base, method, "--dtype", options["dtype"]]
    command += ["--device", options["device"], "--batch", str(options["batch"]), "--molecule", options["molecule"]]
    command += ["--data", str(options["data"])] if options["data"] else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


@app.command(hidden=True)
def peak(
    base: str, method: str, dtype: str = "float32", device: str = "cpu", batch: int = 5, molecule: str = "aspirin",
    data: Path | None = None,
) -> None:  # fmt: skip
    """Print the memory of one method."""
    import torch

    torch.set_num_threads(1)
    frames = frames_of(batch, data, molecule)
    model = select_elements(build(base, getattr(torch, dtype)), frames).to(device)
    graph, labels = graphs(model, frames)
    model(dict(graph), training=False, compute_force=True)
    step = stepper(method_model(method, model), graph, labels)
    for _ in range(3):
        step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        print((torch.cuda.max_memory_allocated() - before) / 1e6)
        return
    print(tensor_peak(step))


def tensor_peak(step: Callable[[], None]) -> float:
    """MB that the CPU allocator hands out at the peak: resident memory also has the kernel's moods in it."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))) / 1e6


def start_up(pairs: int) -> str:
    """Ratio of the CPU time of `mace_run_train --help` with and without the hook."""
    command = [str(Path(sys.executable).parent / "mace_run_train"), "--help"]

    def call(disable: str) -> Callable[[], None]:
        env = os.environ | {"EQUITUNE_DISABLE": disable}
        return lambda: subprocess.run(command, env=env, check=True, capture_output=True) and None  # type: ignore[return-value]

    def of_children() -> float:
        return sum(os.times()[2:4])

    times = interleaved({"with": call("0"), "without": call("1")}, pairs, 1, of_children)
    seconds = f"{median(times['with']):.2f} and {median(times['without']):.2f} s"
    both = ratio(times, "with", "without")
    return f"`mace_run_train --help`, with the hook / without: {both}, CPU time {seconds}, {pairs} pairs."


@app.callback()
def main(
    context: typer.Context,
    base: Annotated[list[str] | None, typer.Option(help="embedded, a .model file, or hidden irreps")] = None,
    data: Annotated[Path | None, typer.Option(help="folder of rMD17 npz files; default the embedded frames")] = None,
    molecule: Annotated[str, typer.Option(help="rMD17 molecule")] = "aspirin",
    batch: Annotated[int, typer.Option(help="frames in a batch")] = 5,
    rounds: Annotated[int, typer.Option(help="timed rounds")] = 30,
    threads: Annotated[int, typer.Option(help="torch threads")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or float64")] = "float32",
    pairs: Annotated[int, typer.Option(help="pairs of start-ups; 0 leaves it out")] = 9,
    output: Annotated[Path | None, typer.Option(help="Markdown file")] = None,
) -> None:
    """Measure and print; --output writes the table."""
    if context.invoked_subcommand is not None:
        return
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(threads)
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, {threads} thread(s)"
    options = {"data": data, "molecule": molecule, "batch": batch, "rounds": rounds, "device": device, "dtype": dtype}
    command = " ".join(Path(a).name if "/" in a else a for a in sys.argv[1:])
    lines = [
        "# Cost of LoRA", "",
        f"{hardware}, {dtype}, batch of {batch}, {rounds} interleaved rounds of CPU time (wall time on a GPU), "
        f"{datetime.date.today()}, mace-torch {version('mace-torch')}, torch {version('torch')}. Peak memory: tensors "
        f"of a step beyond model and optimiser. Command: `python benchmarks/lora_cost.py {command}`.", "",
    ]  # fmt: skip
    for one in base or ["embedded"]:
        lines += measure(one, options)
        print("\n".join(lines[-18:]), flush=True)
    if pairs:
        lines.append(start_up(pairs))
        print(lines[-1])
    if output is not None:
        write_text(output, "\n".join(lines) + "\n")
        print(f"written: {output}")


if __name__ == "__main__":
    app()
