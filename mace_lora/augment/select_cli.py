"""``equitune select``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import ase
import numpy as np
import typer
from ase.io.extxyz import write_extxyz
from rich.console import Console
from rich.progress import track

from mace_lora.atomic import atomic_path
from mace_lora.console import console

from .labelling import iter_frames
from .selection import committee_deviation, evenly, farthest, features, random_frames, unique, within

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Choose frames: diverse, different, random, in a window, disputed.")
Frames = Annotated[Path, typer.Argument(help="frames, any format ASE reads")]
Output = Annotated[Path, typer.Option("--output", "-o", help="extxyz to write")]
Count = Annotated[int, typer.Option("--count", "-n", min=1, help="frames to choose")]


@app.command("fps")
def fps(
    frames: Frames,
    output: Output,
    count: Count = 50,
    with_: Annotated[str, typer.Option("--with", help="features: a MACE .model, 'embedded', or 'soap'")] = "embedded",
) -> None:
    """Farthest-point sampling on a model's own features: each frame is the furthest from those chosen before."""
    found = list(iter_frames(frames))
    index, distance = farthest(features(found, with_, _bar), count)
    _write(output, found, index, {"fps_distance": distance})


@app.command("unique")
def no_duplicates(
    frames: Frames,
    output: Output,
    with_: Annotated[str, typer.Option("--with", help="features, as for fps")] = "embedded",
    tolerance: Annotated[float, typer.Option(help="distance of features below which frames are one")] = 1e-4,
) -> None:
    """Leave out frames that repeat an earlier one, also moved, turned or renumbered, or nearly so (--tolerance)."""
    found = list(iter_frames(frames))
    index = unique(found, features(found, with_, _bar), tolerance)
    console.print(f"dropped {len(found) - len(index)} of {len(found)} frames as duplicates", highlight=False)
    _write(output, found, index, {})


@app.command("random")
def at_random(
    frames: Frames, output: Output, count: Count = 50,
    seed: Annotated[int, typer.Option(help="equal seeds, equal choice")] = 0,
) -> None:  # fmt: skip
    """Random frames."""
    found = list(iter_frames(frames))
    _write(output, found, random_frames(len(found), count, seed), {})


@app.command("window")
def window(
    frames: Frames,
    output: Output,
    max_force: Annotated[float | None, typer.Option(help="largest force of an atom, eV/Å")] = None,
    max_energy: Annotated[float | None, typer.Option(help="energy above the lowest of the same atoms, eV/atom")] = None,
    min_force: Annotated[float | None, typer.Option(help="least largest force of an atom, eV/Å")] = None,
    min_energy: Annotated[float | None, typer.Option(help="least energy above the lowest, eV/atom")] = None,
    energy_key: Annotated[str, typer.Option(help="in info, eV")] = "REF_energy",
    forces_key: Annotated[str, typer.Option(help="in arrays, eV/Å")] = "REF_forces",
) -> None:
    """Keep labelled frames whose energy and largest force lie between bounds."""
    if all(b is None for b in (max_force, max_energy, min_force, min_energy)):
        raise ValueError("--max-force, --max-energy, --min-force, --min-energy: give at least one of them")
    found = list(iter_frames(frames))
    keep = np.ones(len(found), bool)
    if max_force is not None or min_force is not None:
        sizes = [np.linalg.norm(_need(a.arrays, forces_key, i), axis=1) for i, a in enumerate(found)]
        keep &= _between(np.array([s.max() for s in sizes]), min_force, max_force)
    if max_energy is not None or min_energy is not None:
        kinds = [a.get_chemical_formula() for a in found]
        energies = np.array([_need(a.info, energy_key, i) / len(a) for i, a in enumerate(found)])
        lowest = {k: energies[[x == k for x in kinds]].min() for k in set(kinds)}
        keep &= _between(energies - np.array([lowest[k] for k in kinds]), min_energy, max_energy)
    console.print(f"dropped {int((~keep).sum())} of {len(found)} frames", highlight=False)
    _write(output, found, np.flatnonzero(keep), {})


@app.command("committee")
def committee(
    frames: Frames,
    output: Output,
    members: Annotated[list[str], typer.Option("--member", help="potential, as for equitune label; at least twice")],
    lower: Annotated[float, typer.Option(help="meV/Å: below it the models know the frame")] = 100.0,
    upper: Annotated[float, typer.Option(help="meV/Å: above it the frame is too far off")] = 300.0,
    count: Annotated[int | None, typer.Option("--count", "-n", help="at most so many, evenly by deviation")] = None,
) -> None:
    """Frames on which a committee disagrees: largest force deviation of an atom between two bounds."""
    found = list(iter_frames(frames))
    deviation = 1e3 * committee_deviation(found, members, _bar)
    split = within(deviation, lower, upper)
    chosen = split.inside if count is None else evenly(deviation, split.inside, count)
    console.print(
        f"largest force deviation: median {np.median(deviation):.1f}, largest {deviation.max():.1f} meV/Å; "
        f"{len(split.below)} frames below, {len(split.inside)} in the window, {len(split.above)} above; "
        f"candidate rate {100 * split.rate:.2f} %",
        highlight=False,
    )
    _write(output, found, chosen, {"max_force_deviation": deviation[chosen]})


def _between(values: Any, low: float | None, high: float | None) -> Any:
    return (values >= (-np.inf if low is None else low)) & (values <= (np.inf if high is None else high))


def _need(values: Any, key: str, index: int) -> Any:
    if key not in values:
        raise ValueError(f"frame {index}: expected a label under {key!r}, got {sorted(values)}; name the right key")
    return values[key]


def _bar(frames: Iterable[ase.Atoms]) -> Iterable[ase.Atoms]:
    return track(list(frames), description="evaluating", console=Console(stderr=True), transient=True)


def _write(output: Path, frames: list[ase.Atoms], index: Any, scores: dict[str, Any]) -> None:
    if not len(index):
        console.print(f"none of {len(frames)} frames is chosen: {output} is not written", highlight=False)
        raise typer.Exit(1)
    with atomic_path(output) as temporary, temporary.open("w", encoding="utf-8") as handle:
        for rank, i in enumerate(index):
            frame = frames[int(i)].copy()
            frame.info |= {"selected_from": int(i), **{k: float(v[rank]) for k, v in scores.items()}}
            write_extxyz(handle, [frame], write_results=False)
    console.print(f"written: {len(index)} of {len(frames)} frames to {output}", highlight=False)
