"""``equitune sample``."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import ase
import ase.io
import numpy as np
import typer
from ase.io.extxyz import write_extxyz
from rich.progress import Progress

from mace_lora.atomic import atomic_path
from mace_lora.console import console

from .dynamics import Schedule, sample_md
from .labelling import iter_frames
from .packing import molecule, pack
from .perturb import cluster, keep_sound, rattle, strain, stretch_bond

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True, help="Make new frames: dynamics, rattle, strain, stretching, clusters, packed liquids."
)
Frames = Annotated[Path, typer.Argument(help="frames to start from, any format ASE reads (Å)")]
Output = Annotated[Path, typer.Option("--output", "-o", help="extxyz to write, unlabelled")]
Seed = Annotated[int, typer.Option(help="equal seeds give equal frames")]
Copies = Annotated[int, typer.Option(min=1, help="new frames for every frame read")]
KeepBonds = Annotated[bool, typer.Option(help="drop frames whose bonds are not the start's")]


@app.command("md")
def md(
    frames: Frames,
    output: Output,
    with_: Annotated[str, typer.Option("--with", help="potential, as for equitune label")],
    temperatures: Annotated[
        str, typer.Option(help="K, comma-separated; A:B anneals from A to B, e.g. 300,600 or 800:280")
    ] = "300",
    count: Annotated[int, typer.Option("--frames", min=1, help="frames of every trajectory")] = 100,
    spacing: Annotated[float, typer.Option(help="fs between frames")] = 50.0,
    timestep: Annotated[float, typer.Option(help="fs")] = 0.5,
    friction: Annotated[float, typer.Option(help="1/fs")] = 0.02,
    equilibration: Annotated[float, typer.Option(help="fs before the first frame")] = 500.0,
    replicas: Annotated[int, typer.Option(min=1, help="trajectories of every start and temperature")] = 1,
    seed: Seed = 0,
    keep_bonds: KeepBonds = False,
    workers: Annotated[int, typer.Option(min=1, help="processes")] = max(1, len(os.sched_getaffinity(0))),
    executor: Annotated[str | None, typer.Option(help="parsl:FILE.py, a file that defines a parsl.Config")] = None,
) -> None:
    """Langevin (NVT) dynamics from every frame at every temperature. Stopped, the same command goes on."""
    schedules = [
        Schedule(a, b, count, spacing, timestep, friction, equilibration)
        for a, b in map(_range, temperatures.split(","))
    ]
    try:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("trajectories", total=None)
            dropped = sample_md(
                list(iter_frames(frames)), output, with_, schedules, replicas=replicas, seed=seed, workers=workers,
                executor=executor, keep_bonds=keep_bonds,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )  # fmt: skip
    except KeyboardInterrupt:
        console.print(f"stopped; what is finished is in {output}.trajectories, the same command goes on from there")
        raise typer.Exit(130) from None
    _finish(output, dropped)


def _range(text: str) -> tuple[float, float]:
    try:
        values = [float(x) for x in text.split(":")]
    except ValueError:
        values = []
    if len(values) not in (1, 2) or not all(0 < v < np.inf for v in values):
        raise ValueError(f"--temperatures: expected numbers > 0 in K, or A:B, got {text!r}")
    return values[0], values[-1]


@app.command("rattle")
def rattle_frames(
    frames: Frames, output: Output, std: Annotated[float, typer.Option(help="standard deviation, Å")] = 0.05,
    copies: Copies = 1, seed: Seed = 0, keep_bonds: KeepBonds = False,
) -> None:  # fmt: skip
    """Normally distributed displacements of all atoms."""
    if not 0 < std < np.inf:
        raise ValueError(f"--std: expected a length > 0 in Å, got {std}")
    _each(frames, output, copies, seed, lambda a, rng: rattle(a, std, rng), keep_bonds)


@app.command("strain")
def strain_frames(
    frames: Frames, output: Output, largest: Annotated[float, typer.Option(help="bound of a strain component")] = 0.05,
    copies: Copies = 1, seed: Seed = 0, keep_bonds: KeepBonds = False,
) -> None:  # fmt: skip
    """Random symmetric strain of periodic frames."""
    if not 0 < largest < 0.5:
        raise ValueError(f"--largest: expected a strain between 0 and 0.5, got {largest}")
    _each(frames, output, copies, seed, lambda a, rng: strain(a, largest, rng), keep_bonds)


@app.command("stretch")
def stretch_frames(
    frames: Frames, output: Output, low: Annotated[float, typer.Option(help="smallest factor")] = 0.85,
    high: Annotated[float, typer.Option(help="largest factor")] = 2.0, copies: Copies = 1, seed: Seed = 0,
) -> None:  # fmt: skip
    """Scale one random bond; the smaller side of it moves rigidly, bonds in rings are left alone."""
    if not 0 < low < high:
        raise ValueError(f"--low, --high: expected 0 < low < high, got {low} and {high}")
    _each(frames, output, copies, seed, lambda a, rng: stretch_bond(a, rng, low, high))


@app.command("cluster")
def cluster_frames(
    frames: Frames, output: Output, molecules: Annotated[int, typer.Option(help="molecules of a cluster")] = 3
) -> None:
    """Cut out the molecules nearest to the centre of the box (or droplet), whole and in vacuum."""
    _each(frames, output, 1, 0, lambda a, rng: cluster(a, molecules))


@app.command("pack")
def pack_box(
    species: Annotated[list[str], typer.Argument(help="for each species a file of its molecule, or its SMILES")],
    output: Output,
    density: Annotated[float, typer.Option(help="g/cm³")],
    counts: Annotated[str, typer.Option("--count", help="molecules of each species, comma-separated")],
    boxes: Annotated[int, typer.Option(min=1, help="independent boxes")] = 1,
    tolerance: Annotated[float, typer.Option(help="least distance between molecules, Å")] = 2.0,
    seed: Seed = 0,
) -> None:
    """Pack a molecular liquid into a cubic periodic box at a density (by Packmol)."""
    try:
        numbers = [int(n) for n in counts.split(",")]
    except ValueError:
        raise ValueError(f"--count: expected whole numbers, comma-separated, got {counts!r}") from None
    found = [molecule(s, seed) for s in species]
    frames = [pack(found, numbers, density, seed * 1000 + k, tolerance) for k in range(boxes)]
    with atomic_path(output) as temporary, temporary.open("w", encoding="utf-8") as handle:
        write_extxyz(handle, frames, write_results=False)
    console.print(f"box of {frames[0].cell[0, 0]:.2f} Å, {len(frames[0])} atoms", highlight=False)
    _finish(output, Counter())


def _each(
    frames: Path, output: Path, copies: int, seed: int, make: Callable[[ase.Atoms, np.random.Generator], ase.Atoms],
    keep_bonds: bool = False,
) -> None:  # fmt: skip
    def new() -> Iterator[ase.Atoms]:
        for index, atoms in enumerate(iter_frames(frames)):
            for copy in range(copies):
                try:
                    frame = make(atoms, np.random.default_rng([seed, index, copy]))
                except ValueError as err:
                    dropped[f"{err} (the first: frame {firsts.setdefault(str(err), index)})"] += 1
                    continue
                frame.info["start"] = index
                yield from keep_sound([frame], atoms if keep_bonds else None, dropped=dropped)

    dropped: Counter[str] = Counter()
    firsts: dict[str, int] = {}
    count = 0
    with atomic_path(output) as temporary, temporary.open("w", encoding="utf-8") as handle:
        for frame in new():
            write_extxyz(handle, [frame], write_results=False)
            count += 1
        if not count:
            raise ValueError(f"{frames}: nothing to write: {'; '.join(dropped) or 'it holds no frames'}")
    _finish(output, dropped)


def _finish(output: Path, dropped: Counter[str]) -> None:
    with output.open() as handle:
        count = sum(1 for line in handle if line.strip().isdigit())
    for reason, number in dropped.most_common():
        console.print(f"dropped {number} frames: {reason}", highlight=False)
    console.print(f"written: {count} frames to {output}", highlight=False)
