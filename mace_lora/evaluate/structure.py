"""Radial distribution functions of trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ase
import numpy as np
from ase.data import atomic_numbers
from ase.neighborlist import neighbor_list
from numpy.typing import NDArray

__all__ = ["radial_distribution", "rdf_distance"]

Floats = NDArray[np.float64]


def radial_distribution(
    frames: Sequence[ase.Atoms], pair: tuple[str, str], r_max: float = 6.0, bins: int = 120, blocks: int = 5
) -> tuple[Floats, Floats, Floats]:
    """g(r) of a pair of elements, averaged over frames, with its standard error over blocks of the trajectory.

    Frames without a box (clusters) are normalised by the volume of a sphere of r_max, which is enough to compare
    trajectories of the same system.

    Args:
        frames: in time order, Å.
        pair: two symbols.
        r_max: Å; at most half the box.
        bins: number of bins.
        blocks: consecutive parts for the error.

    Returns:
        r (bins,) in Å, g (bins,), standard error (bins,).

    Raises:
        ValueError: no frames, an element that is missing, no bins, or a box that is too small.
    """
    if bins < 1:
        raise ValueError(f"bins: expected at least 1, got {bins}")
    if not 0 < r_max < np.inf:
        raise ValueError(f"r_max: expected a length > 0 in Å, got {r_max}")
    if not frames:
        raise ValueError("frames: expected at least one, got none")
    numbers = [atomic_numbers.get(s, 0) for s in pair]
    for symbol, z in zip(pair, numbers, strict=True):
        if z not in frames[0].numbers:
            known = ", ".join(sorted(set(frames[0].get_chemical_symbols())))
            raise ValueError(f"pair: expected elements of {known}, got {symbol!r}")
    edges = np.linspace(0.0, r_max, bins + 1)
    shells = 4 / 3 * np.pi * np.diff(edges**3)
    each: list[Any] = []
    for n, atoms in enumerate(frames):
        if atoms.pbc.all() and r_max > 0.5 * _width(atoms):
            raise ValueError(f"r_max: expected at most {0.5 * _width(atoms):.2f} Å, half the box of frame {n}")
        volume = atoms.get_volume() if atoms.pbc.all() else 4 / 3 * np.pi * r_max**3
        first, second = (atoms.numbers == z for z in numbers)
        i, j, d = neighbor_list("ijd", atoms, r_max)
        count = np.histogram(d[first[i] & second[j]], edges)[0]
        others = second.sum() - (numbers[0] == numbers[1])  # an atom is no neighbour of itself
        each.append(count * volume / (shells * first.sum() * max(1, others)))
    g: Floats = np.array(each)
    r = np.asarray((np.arange(bins) + 0.5) * (r_max / bins), float)
    parts: list[Any] = [part.mean(axis=0) for part in np.array_split(g, min(blocks, len(g)))]
    error = np.std(parts, axis=0, ddof=1) / np.sqrt(len(parts)) if len(parts) > 1 else np.full(bins, np.nan)
    return r, g.mean(axis=0), np.asarray(error, float)


def _width(atoms: ase.Atoms) -> float:
    """Smallest distance between opposite faces, Å."""
    cell = atoms.cell.array
    areas = np.linalg.norm(np.cross(cell[[1, 2, 0]], cell[[2, 0, 1]]), axis=1)
    return float((abs(np.linalg.det(cell)) / areas).min())


def rdf_distance(g: Floats, reference: Floats) -> float:
    """Difference of two distributions in percent: sum |g - g_ref| over sum (g + g_ref); 0 equal, 100 no overlap."""
    total = float(np.abs(g).sum() + np.abs(reference).sum())
    return 100 * float(np.abs(g - reference).sum()) / total if total else 0.0
