"""Will classical pre-training help? What a classical potential knows about a set of quantum frames."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ase
import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray

from mace_lora.lora.energies import solve_offsets

__all__ = ["Agreement", "advice", "agreement"]

Floats = NDArray[np.float64]
LIKELY, POSSIBLE = 0.8, 0.5


@dataclass(frozen=True)
class Agreement:
    """Classical against quantum labels of the same frames.

    Attributes:
        frames: number of frames.
        correlation, slope: of all force components, quantum against classical.
        rest: what is left of the quantum forces after the scaled classical ones, sqrt(1 - correlation^2).
        elements: symbol -> (correlation, slope).
        energy_rms: root mean square quantum energy about its mean composition energies, meV/atom.
        energy_rest: the same after the classical energies and the elements' offsets are taken off, meV/atom.
    """

    frames: int
    correlation: float
    slope: float
    rest: float
    elements: dict[str, tuple[float, float]]
    energy_rms: float
    energy_rest: float


def agreement(
    frames: Sequence[ase.Atoms], classical: Callable[[ase.Atoms], Any], energy_key: str = "REF_energy",
    forces_key: str = "REF_forces", progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Agreement:  # fmt: skip
    """Compare the labels of quantum frames with a classical potential's.

    Args:
        frames: labelled frames (eV, eV/Å).
        classical: gives an object with ``energy`` (eV) and ``forces`` (atoms, 3) in eV/Å for a frame.
        energy_key, forces_key: of the quantum labels.
        progress: wraps the frames.

    Raises:
        ValueError: no frames, or a frame without labels.
    """
    if not frames:
        raise ValueError("frames: expected at least one labelled frame, got none")
    for index, atoms in enumerate(frames):
        if energy_key not in atoms.info or forces_key not in atoms.arrays:
            raise ValueError(f"frame {index}: expected labels {energy_key} and {forces_key}; name the right keys")
    found = [classical(atoms) for atoms in progress(frames)]
    quantum = np.concatenate([a.arrays[forces_key] for a in frames])  # (all atoms, 3)
    mine = np.concatenate([f.forces for f in found])
    numbers = np.concatenate([a.numbers for a in frames])
    correlation, slope = _line(mine, quantum)
    elements = {chemical_symbols[int(z)]: _line(mine[numbers == z], quantum[numbers == z]) for z in np.unique(numbers)}
    zs = np.unique(numbers)
    counts = np.array([[(a.numbers == z).sum() for z in zs] for a in frames], float)
    energies = np.array([float(a.info[energy_key]) for a in frames])
    parts = [_about_offsets(counts, e) for e in (energies, energies - [f.energy for f in found])]
    return Agreement(
        len(frames), correlation, slope, float(np.sqrt(max(0.0, 1 - correlation**2))), elements, parts[0], parts[1]
    )


def _line(x: Floats, y: Floats) -> tuple[float, float]:
    """Correlation about zero, and slope through it."""
    x, y = x.reshape(-1), y.reshape(-1)
    xx, yy, xy = float(x @ x), float(y @ y), float(x @ y)
    return (xy / np.sqrt(xx * yy) if xx * yy > 0 else 0.0), (xy / xx if xx > 0 else 0.0)


def _about_offsets(counts: Floats, energies: Floats) -> float:
    """Root mean square of energies after least-squares offsets of the elements, meV/atom."""
    rest = energies - counts @ solve_offsets(counts, energies)
    return 1e3 * float(np.sqrt(np.mean((rest / counts.sum(1)) ** 2)))


def advice(a: Agreement) -> str:
    """One paragraph for the user."""
    shown = f"force correlation {a.correlation:.2f}, slope {a.slope:.2f}"
    if a.correlation >= LIKELY:
        text = (
            f"Classical pre-training is likely to help: {shown}. A perfectly pre-trained model would start with "
            f"{100 * a.rest:.0f} % of the force error of a new one. Expect the gain to be largest at tens of quantum "
            "frames and to fade at many hundreds."
        )
    elif a.correlation >= POSSIBLE:
        text = (
            f"Classical pre-training may help at few quantum frames: {shown}. Compare it with a training from scratch "
            "on your validation frames before paying for many classical labels."
        )
    else:
        text = (
            f"Classical pre-training is unlikely to help: {shown}. Another classical potential, or a machine-learned "
            "one (equitune label --with mace:FILE), will serve better."
        )
    odd = [s for s, (c, _) in a.elements.items() if c < 0.7 * a.correlation]
    if odd and a.correlation >= POSSIBLE:
        text += f" The potential is worst for {', '.join(odd)}."
    if abs(a.slope) > 3 or (0 < abs(a.slope) < 1 / 3 and a.correlation > POSSIBLE):
        text += " The slope is far from one: check the units of both labels (eV, eV/Å)."
    return text
