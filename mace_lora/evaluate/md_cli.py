"""``equitune stability`` and ``equitune rdf``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import Progress
from rich.table import Table

from mace_lora.atomic import atomic_path, write_text
from mace_lora.console import console

__all__ = ["rdf", "stability"]


def stability(
    frames: Annotated[Path, typer.Argument(help="frames to start from, with bonds near equilibrium")],
    with_: Annotated[str, typer.Option("--with", help="potential, as for equitune label, e.g. mace:run.model")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder")] = Path("stability"),
    temperature: Annotated[float, typer.Option(help="K")] = 300.0,
    steps: Annotated[int, typer.Option(min=1, help="of every trajectory")] = 10_000,
    timestep: Annotated[float, typer.Option(help="fs")] = 0.5,
    friction: Annotated[float, typer.Option(help="1/fs")] = 0.01,
    replicas: Annotated[int, typer.Option(min=1, help="trajectories of every start")] = 5,
    every: Annotated[int, typer.Option(min=1, help="steps between looks and frames kept")] = 100,
    limit: Annotated[float, typer.Option(help="Å that a bond may be off its length at the start")] = 5.0,
    nve: Annotated[int, typer.Option(min=0, help="NVE steps for the energy drift; 0 for none")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="equal seeds give equal trajectories")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="processes")] = 1,
) -> None:
    """Does dynamics with a potential stay physical?

    Langevin trajectories until a bond comes apart (fraction that survives), and the drift of the total energy in NVE
    dynamics. Stopped, the same command goes on. Writes stability.json, stability.png and the trajectories.
    """
    from . import stability as module
    from .reading import read_frames

    for name, value in (("temperature", temperature), ("timestep", timestep), ("friction", friction), ("limit", limit)):
        if not 0 < value < np.inf:
            raise ValueError(f"--{name}: expected a number > 0, got {value}")
    if every > steps:
        raise ValueError(f"--every: expected at most --steps ({steps}), got {every}")
    if 0 < nve < 30:  # before the trajectories, not after them
        raise ValueError(f"--nve: expected 0 or at least 30 steps, got {nve}")
    starts = read_frames(frames)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("trajectories", total=None)
        rows = module.stability(
            starts, output, with_, temperature=temperature, steps=steps, timestep=timestep, friction=friction,
            replicas=replicas, every=every, limit=limit, seed=seed, workers=workers,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    whole = steps // every * every
    table = Table("start", "replica", "sound steps", "end")
    for r in rows:
        table.add_row(str(r.start), str(r.replica), f"{r.steps:,}", r.why or "survived")
    console.print(table)
    survived = sum(r.survived for r in rows)
    console.print(f"{survived} of {len(rows)} trajectories survived {whole:,} steps at {temperature:g} K")
    _plot_survival([r.steps for r in rows], whole, output / "stability.png")
    if nve:
        found = module.energy_drift(
            starts[0], with_, temperature=temperature, steps=nve, timestep=timestep, seed=seed
        )  # fmt: skip
        write_text(output / "energy_drift.json", json.dumps(found, indent=1) + "\n")
        console.print(
            f"NVE: drift {found['drift']:+.3f} meV/atom/ps, fluctuation {found['fluctuation']:.3f} meV/atom "
            f"({nve} steps of {timestep:g} fs from {temperature:g} K)"
        )
    console.print(f"written: {output / 'stability.json'}, {output / 'stability.png'}", highlight=False)


def _plot_survival(steps: list[int], whole: int, path: Path) -> None:
    """Fraction of trajectories that are sound, against steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.subplots()
    ends = sorted(s for s in steps if s < whole)
    x = [0, *ends, whole]
    y = [1 - k / len(steps) for k in range(len(ends) + 1)]
    axis.step(x, [*y, y[-1]], where="post")
    axis.set(xlabel="step", ylabel="fraction surviving", ylim=(0, 1.05))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def rdf(
    trajectories: Annotated[list[Path], typer.Argument(help="trajectories to compare; the first is the reference")],
    pair: Annotated[list[str], typer.Option(help="elements, e.g. O-O; give it several times for several panels")],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG to write; a JSON goes beside it")] = Path(
        "rdf.png"
    ),
    r_max: Annotated[float, typer.Option(help="Å")] = 6.0,
    bins: Annotated[int, typer.Option(min=1, help="number of bins")] = 120,
    index: Annotated[str, typer.Option(help="which frames, as an ASE slice")] = ":",
) -> None:
    """Radial distribution functions of trajectories, and how far each is from the first."""
    from matplotlib.figure import Figure

    from .reading import read_frames
    from .structure import radial_distribution, rdf_distance

    pairs = [tuple(p.split("-")) for p in pair]
    for p, text in zip(pairs, pair, strict=True):
        if len(p) != 2:
            raise ValueError(f"--pair: expected two elements such as O-H, got {text!r}")
    if not 0 < r_max < np.inf:
        raise ValueError(f"--r-max: expected a length > 0 in Å, got {r_max}")
    read = {path: read_frames(path, index) for path in trajectories}
    figure = Figure(figsize=(4.2 * len(pairs), 3.2), layout="constrained")
    axes = figure.subplots(1, len(pairs), squeeze=False)[0]
    content = []
    table = Table("trajectory", "pair", "difference from the first (%)")
    for axis, p in zip(axes, pairs, strict=True):
        reference = None
        for path, frames in read.items():
            r, g, error = radial_distribution(frames, (p[0], p[1]), r_max, bins)
            reference = g if reference is None else reference
            axis.plot(r, g, label=path.stem)
            axis.fill_between(r, g - error, g + error, alpha=0.25, linewidth=0)
            distance = rdf_distance(g, reference)
            table.add_row(path.name, "-".join(p), f"{distance:.2f}")
            content.append({
                "trajectory": str(path), "pair": "-".join(p), "frames": len(frames), "r": r.tolist(), "g": g.tolist(),
                "standard_error": np.nan_to_num(error).tolist(), "difference_percent": distance,
            })  # fmt: skip
        axis.set(xlabel="r (Å)", ylabel=f"g(r) {'-'.join(p)}", xlim=(0, r_max))
        axis.legend(fontsize=7)
    with atomic_path(output) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    write_text(output.with_suffix(".json"), json.dumps(content) + "\n")
    console.print(table)
    console.print(f"written: {output}, {output.with_suffix('.json')}", highlight=False)
