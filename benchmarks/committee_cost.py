"""Cost of a committee of K adapters: four ways to evaluate it, interleaved, on one CPU thread.

merged   K copies of the model with the adapters folded in, one after the other: K times the weights.
switch   one model; the active adapter is switched and its update formed anew at every pass.
passes   one model; K passes with precomputed weights (``strategy="passes"``).
batched  one model; one pass over K copies of the graph (``strategy="batched"``).

Command:  OMP_NUM_THREADS=1 python benchmarks/committee_cost.py --base embedded --base MACE-OFF23_small.model
Cost:     about 3 minutes.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import ase.build
import torch
import typer

from mace_lora import LoraConfig, apply_lora, merge_lora, set_adapter
from mace_lora.atomic import write_text
from mace_lora.lora.calculator import choose_head, graph_of
from mace_lora.lora.committee import _evaluate, _replicate, _weights
from mace_lora.lora.inject import adapter_layers
from mace_lora.mace_plugin.base_model import load_model


def committee(base: str, members: int, rank: int, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """A base with adapters whose updates are random and small."""
    model, names = load_model(base, dtype), [f"member{k}" for k in range(members)]
    for name in names:
        apply_lora(model, LoraConfig(rank=rank), name)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01 * torch.randn_like(parameter))
    return model.requires_grad_(False), names


def ways(model: Any, names: list[str], graph: dict[str, Any]) -> dict[str, Callable[[], tuple[Any, Any]]]:
    """The four ways; each gives energies (K, frames) in eV and forces (K, atoms, 3) in eV/Å."""
    copies = [merge_lora(copy.deepcopy(set_adapter(model, name))).requires_grad_(False) for name in names]
    weights, members = _weights(list(adapter_layers(model).values()), names), tuple(names)

    def run(one: Any) -> tuple[Any, Any]:
        out = one(_replicate(graph, 1), training=False, compute_force=True)
        return out["energy"].detach(), out["forces"].detach()

    def stacked(results: list[tuple[Any, Any]]) -> tuple[Any, Any]:
        return torch.stack([e for e, _ in results]), torch.stack([f for _, f in results])

    def strategy(name: str) -> tuple[Any, Any]:
        found = _evaluate(model, weights, members, graph, name)
        return found.energies, found.forces_comm

    return {
        "merged": lambda: stacked([run(one) for one in copies]),
        "switch": lambda: stacked([run(set_adapter(model, name).requires_grad_(False)) for name in names]),
        "passes": lambda: strategy("passes"),
        "batched": lambda: strategy("batched"),
    }


def measure(functions: dict[str, Callable[[], tuple[Any, Any]]], rounds: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of every way in every round, and the largest force difference to "merged" (eV/Å)."""
    results = {name: [function() for _ in range(3)][-1] for name, function in functions.items()}  # warms the JIT up
    worst = max(float((forces - results["merged"][1]).abs().max()) for _, forces in results.values())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds, worst


def main(
    base: Annotated[list[str], typer.Option(help="embedded, or a .model file; may be repeated")] = ["embedded"],  # noqa: B006
    members: Annotated[int, typer.Option(help="K")] = 4,
    rank: Annotated[int, typer.Option(help="rank of the adapters")] = 16,
    molecule: Annotated[str, typer.Option(help="name in ase.build.molecule")] = "CH3CH2OCH3",
    batches: Annotated[str, typer.Option(help="molecules in a batch")] = "1,8",
    dtypes: Annotated[str, typer.Option(help="float32, float64")] = "float32,float64",
    rounds: Annotated[int, typer.Option(help="interleaved rounds")] = 15,
    output: Annotated[Path | None, typer.Option(help="Markdown table to write")] = None,
) -> None:
    """Measure and print a Markdown table: ratio to "passes" (median over the rounds), and its time."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = [
        f"K = {members}, rank {rank}, {molecule}; time relative to K passes with precomputed weights",
        "",
        "| base | dtype | molecules | edges | merged | switch | batched | passes (ms) | max force difference (eV/Å) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in base:
        for dtype in dtypes.split(","):
            model, names = committee(name, members, rank, getattr(torch, dtype))
            for size in (int(n) for n in batches.split(",")):
                frames = [ase.build.molecule(molecule) for _ in range(size)]
                for seed, atoms in enumerate(frames):
                    atoms.rattle(0.05, seed=seed)
                graph = graph_of(model, frames, choose_head(model, None))
                seconds, worst = measure(ways(model, names, graph), rounds)
                ratio = {
                    key: median(a / b for a, b in zip(values, seconds["passes"], strict=True))
                    for key, values in seconds.items()
                }
                cells = [Path(name).stem, dtype, size, graph["edge_index"].shape[1]]
                cells += [f"{ratio[key]:.2f}" for key in ("merged", "switch", "batched")]
                cells += [f"{1e3 * median(seconds['passes']):.0f}", f"{worst:.0e}"]
                lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
                print(lines[-1], flush=True)
    print("\n".join(lines))
    if output is not None:
        write_text(output, "\n".join(lines) + "\n")


if __name__ == "__main__":
    typer.run(main)
