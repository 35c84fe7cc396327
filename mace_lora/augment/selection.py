"""Which frames to label: diverse ones, random ones, those in a window, those a committee disagrees on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ase
import numpy as np
from numpy.typing import NDArray

__all__ = ["Window", "committee_deviation", "evenly", "farthest", "features", "random_frames", "unique", "within"]

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Progress = Callable[[Iterable[ase.Atoms]], Iterable[ase.Atoms]]


def _quiet(frames: Iterable[ase.Atoms]) -> Iterable[ase.Atoms]:
    return frames


def features(frames: Sequence[ase.Atoms], source: str = "embedded", progress: Progress = _quiet) -> Floats:
    """A vector for every frame: means over the atoms of each element.

    Args:
        frames: frames.
        source: a MACE model (file or ``embedded``), whose invariant node features are used, or ``soap``
            (dscribe, cutoff 5 Å).
        progress: wraps the frames, e.g. a progress bar.

    Returns:
        (frames, features).

    Raises:
        ValueError: unknown elements, positions that are not finite, or a package that is not installed.
    """
    for index, atoms in enumerate(frames):
        if not np.isfinite(atoms.positions).all():
            raise ValueError(f"frame {index}: its positions are not finite; remove it")
    elements = sorted({int(z) for f in frames for z in f.numbers})
    describe = _soap(elements) if source == "soap" else _mace(source)
    rows = []
    for atoms in progress(frames):
        values = describe(atoms)  # (atoms, features)
        parts = [values[atoms.numbers == z] for z in elements]
        rows.append(np.concatenate([p.mean(0) if len(p) else np.zeros(values.shape[1]) for p in parts]))
    return np.array(rows, float)


def _mace(source: str) -> Callable[[ase.Atoms], Floats]:
    from .labelers import open_labeler

    labeler = open_labeler(f"mace:{source.removeprefix('mace:')}")

    def describe(atoms: ase.Atoms) -> Floats:
        values: Floats = labeler.calculator(atoms).get_descriptors(atoms)
        return values

    return describe


def _soap(elements: Sequence[int]) -> Callable[[ase.Atoms], Floats]:
    try:
        from dscribe.descriptors import SOAP
    except ImportError as err:
        raise ValueError("features: soap needs dscribe; pip install dscribe") from err
    soaps = {p: SOAP(species=elements, r_cut=5.0, n_max=6, l_max=4, periodic=p) for p in (True, False)}

    def describe(atoms: ase.Atoms) -> Floats:
        values: Floats = soaps[bool(atoms.pbc.any())].create(atoms)
        return values

    return describe


def farthest(values: Floats, count: int, first: int = 0) -> tuple[Indices, Floats]:
    """Farthest-point sampling by skmatter: each choice is the furthest from those before it.

    Args:
        values: (frames, features).
        count: frames to choose.
        first: where to start.

    Returns:
        (count,) indices in order of choice, and (count,) distances to the nearest earlier choice (infinite for the
        first).

    Raises:
        ValueError: more frames asked for than there are different ones.
    """
    from skmatter.sample_selection import FPS

    different = len(np.unique(values, axis=0))
    if not 1 <= count <= different:
        raise ValueError(f"count: expected between 1 and {different} (different frames), got {count}")
    if count == 1:
        return np.array([first]), np.array([np.inf])
    selector = FPS(initialize=first, n_to_select=count)
    selector.fit(values)
    index = np.asarray(selector.selected_idx_, np.int64)
    gaps = [np.inf]
    gaps += [float(np.linalg.norm(values[index[:n]] - values[index[n]], axis=1).min()) for n in range(1, count)]
    return index, np.array(gaps)


def unique(frames: Sequence[ase.Atoms], values: Floats, tolerance: float) -> Indices:
    """Frames that are no repetition of an earlier one: other atoms, or features further away than the tolerance.

    Features of a model do not change when a frame is moved, turned or renumbered, so such copies are found too.

    Args:
        frames: frames.
        values: (frames, features).
        tolerance: distance in the features' units.

    Returns:
        indices in rising order.

    Raises:
        ValueError: the tolerance is negative.
    """
    from scipy.spatial import cKDTree

    if tolerance < 0:
        raise ValueError(f"tolerance: expected a number >= 0, got {tolerance}")
    close = cKDTree(values).query_ball_point(values, tolerance + 1e-12)
    kinds = [a.get_chemical_formula() for a in frames]
    kept: list[int] = []
    is_kept = np.zeros(len(frames), bool)
    for n, neighbours in enumerate(close):
        if not any(is_kept[m] and kinds[m] == kinds[n] for m in neighbours):
            is_kept[n] = True
            kept.append(n)
    return np.array(kept, np.int64)


def random_frames(frames: int, count: int, seed: int = 0) -> Indices:
    """Indices without repetition, in rising order.

    Args:
        frames: number of frames.
        count: frames to choose.
        seed: equal seeds give equal choices.
    """
    if not 1 <= count <= frames:
        raise ValueError(f"count: expected between 1 and {frames}, got {count}")
    return np.sort(np.random.default_rng(seed).choice(frames, count, replace=False))


@dataclass(frozen=True)
class Window:
    """Frames by a value: below, inside or above.

    Attributes:
        inside, below, above: indices.
    """

    inside: Indices
    below: Indices
    above: Indices

    @property
    def rate(self) -> float:
        """Fraction of the frames that are not below: the candidate rate of active learning."""
        unknown = len(self.inside) + len(self.above)
        return unknown / max(1, unknown + len(self.below))


def evenly(deviation: Floats, inside: Indices, count: int) -> Indices:
    """At most ``count`` of the frames ``inside``, evenly by deviation.

    Args:
        deviation: (frames,) of every frame.
        inside: (candidates,) indices.
        count: at most so many.

    Returns:
        sorted indices.
    """
    if len(inside) <= count:
        return inside
    order = inside[np.argsort(deviation[inside])]
    chosen: Indices = np.sort(order[np.linspace(0, len(order) - 1, count).round().astype(int)])
    return chosen


def within(values: Floats, lower: float, upper: float) -> Window:
    """Split frames by lower <= value < upper.

    Args:
        values: (frames,).
        lower, upper: bounds in the unit of the values.

    Raises:
        ValueError: lower is not below upper.
    """
    if not lower < upper:
        raise ValueError(f"window: expected lower < upper, got {lower} and {upper}")
    finite = np.nan_to_num(values, nan=np.inf)  # what broke a model is beyond any window
    return Window(
        np.flatnonzero((finite >= lower) & (finite < upper)), np.flatnonzero(finite < lower),
        np.flatnonzero(finite >= upper),
    )  # fmt: skip


def committee_deviation(frames: Sequence[ase.Atoms], members: Sequence[str], progress: Progress = _quiet) -> Floats:
    """Largest force deviation of every frame: max over atoms of sqrt(mean_k |F_k - mean F|^2).

    Args:
        frames: frames.
        members: at least two potentials, by the names of labelers; ``mace:BASE+ADAPTER`` of one base share a backbone.
        progress: wraps the frames.

    Returns:
        (frames,) eV/Å.

    Raises:
        ValueError: fewer than two members, or one that cannot describe a frame.
    """
    if len(set(members)) < 2:
        raise ValueError(f"members: a committee needs at least two different potentials, got {list(members)}")
    evaluate = _adapters(members) or _separate(members)
    return np.array([evaluate(atoms) for atoms in progress(frames)])


def _adapters(members: Sequence[str]) -> Callable[[ase.Atoms], float] | None:
    """One backbone with K adapters, where the members are such."""
    parts = [m.removeprefix("mace:").partition("+") for m in members]
    same_base = all(m.startswith("mace:") for m in members) and len({p[0] for p in parts}) == 1
    if not same_base or not all(p[2] for p in parts):
        return None
    from mace_lora import load_committee

    from .labelers.models import device

    committee = load_committee(parts[0][0], [p[2] for p in parts], default_dtype="float64", device=device())

    def evaluate(atoms: ase.Atoms) -> float:
        committee.calculate(atoms)
        return float(committee.results["max_forces_std"])

    return evaluate


def _separate(members: Sequence[str]) -> Callable[[ase.Atoms], float]:
    from .labelers import open_labeler

    labelers: list[Any] = [open_labeler(m) for m in members]

    def evaluate(atoms: ase.Atoms) -> float:
        forces = np.array([labeler.label(atoms).forces for labeler in labelers])  # (members, atoms, 3)
        return float(np.sqrt(np.square(forces - forces.mean(0)).sum(-1).mean(0)).max())

    return evaluate
