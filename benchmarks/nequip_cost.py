"""What LoRA costs in NequIP: time and memory of a training step, full fine-tuning against LoRA, interleaved.

Command:  OMP_NUM_THREADS=1 python benchmarks/nequip_cost.py BASE --data DIR
Cost:     about 3 minutes on one CPU thread.
"""

from __future__ import annotations

import datetime
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from datasets import rmd17
from lora_cost import interleaved, ratio, tensor_peak

from mace_lora.atomic import write_text

app = typer.Typer(add_completion=False)
RANKS = (16, 4)


def build(base: Path, rank: int) -> Any:
    """The base, with an adapter if ``rank`` is not 0."""
    from nequip.model.saved_models import load_saved_model

    import nequip_ext

    model = load_saved_model(str(base)).train()
    return nequip_ext.LoRA(model=model, rank=rank) if rank else model.requires_grad_(True)


def batch_of(model: Any, frames: list[Any]) -> tuple[dict[str, Any], Any]:
    """NequIP's batch and the force labels."""
    import torch
    from nequip.data import AtomicDataDict, compute_neighborlist_, from_ase

    graphs = []
    for atoms in frames:
        graph = compute_neighborlist_(from_ase(atoms), r_max=float(model.metadata["r_max"]))
        graph["atom_types"] = torch.tensor([list(model.type_names).index(s) for s in atoms.get_chemical_symbols()])
        graphs.append(graph)
    forces = torch.cat([torch.as_tensor(f.arrays["REF_forces"]) for f in frames])
    return AtomicDataDict.batched_from_list(graphs), forces


def stepper(model: Any, batch: dict[str, Any], forces: Any) -> Callable[[], None]:
    """One training step: forward with forces, backward, Adam with amsgrad over all that upstream passes it."""
    import torch

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, amsgrad=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        out = model(dict(batch))
        ((out["forces"] - forces).square().mean() + 0 * out["total_energy"].sum()).backward()
        optimizer.step()

    return step


@app.command()
def main(
    base: Annotated[Path, typer.Argument(help="NequIP checkpoint or package")],
    data: Annotated[Path, typer.Option(help="folder of the public data sets")],
    molecule: Annotated[str, typer.Option(help="rMD17 molecule")] = "aspirin",
    batch: Annotated[int, typer.Option(help="frames in a batch")] = 5,
    rounds: Annotated[int, typer.Option(help="timed rounds")] = 60,
    output: Annotated[Path, typer.Option(help="table to write")] = Path("benchmarks/results/nequip_cost.md"),
) -> None:
    """Write the table."""
    import torch
    from nequip.utils.global_state import set_global_state

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    set_global_state()
    names = {"full": 0, **{f"LoRA r{r}": r for r in RANKS}}
    models = {name: build(base, rank) for name, rank in names.items()}
    data_batch, forces = batch_of(models["full"], rmd17(data / "rmd17_PBE", molecule, "train")[:batch])
    steps = {name: stepper(m, data_batch, forces) for name, m in models.items()}
    times = interleaved(steps, rounds, 8, time.process_time)
    lines = [f"# Cost of LoRA in NequIP: {batch} frames of {molecule}", ""]
    versions = f"nequip {version('nequip')}, torch {torch.__version__}, {datetime.date.today()}"
    lines += [f"{versions}, one CPU thread, CPU time; ratios are medians (quartiles) of interleaved rounds.", ""]
    lines += ["| step | ms | peak of tensors (MB) | values trained | time / full |", "|---|---|---|---|---|"]
    for name, model in models.items():
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        compared = "1" if name == "full" else ratio(times, name, "full")
        lines.append(
            f"| {name} | {1e3 * median(times[name]):.1f} | {tensor_peak(steps[name]):.0f} | {trained:,} | {compared} |"
        )
    write_text(output, "\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"written: {output}")


if __name__ == "__main__":
    app()
