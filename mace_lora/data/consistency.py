"""Do energies and forces belong together? Energy differences against the work of the forces."""

from __future__ import annotations

from collections.abc import Sequence

import ase
import numpy as np
from ase import units
from numpy.typing import NDArray

from .labels import state

__all__ = ["energy_force_slope", "units_of_slope"]

Floats = NDArray[np.float64]
# units in which energies come, in eV; forces are energies per length
_ENERGIES = {"eV": 1.0, "Hartree": units.Hartree, "Ry": units.Ry, "kcal/mol": units.kcal / units.mol,
             "kJ/mol": units.kJ / units.mol, "meV": 1e-3}  # fmt: skip
_LENGTHS = {"Å": 1.0, "Bohr": units.Bohr, "nm": 10.0}


def energy_force_slope(
    frames: Sequence[ase.Atoms], energies: Sequence[float | None], forces: Sequence[Floats | None], largest: float = 0.3
) -> tuple[float, float, int]:
    """Energy differences of similar frames against the work of their forces: slope, correlation, pairs.

    For two frames of the same atoms, charge and spin, E_b - E_a = -(F_a + F_b)·(x_b - x_a) / 2 up to third order. The
    slope is 1 where energies and forces are of one method and unit.

    Args:
        frames: in the order of the file; pairs up to three apart are compared.
        energies, forces: labels, eV and eV/Å.
        largest: displacement up to which a pair counts, Å.
    """
    changes, works = [], []
    for i in range(len(frames)):
        for j in range(i + 1, min(i + 4, len(frames))):
            a, b, ea, eb, fa, fb = frames[i], frames[j], energies[i], energies[j], forces[i], forces[j]
            if ea is None or eb is None or fa is None or fb is None or not np.array_equal(a.numbers, b.numbers):
                continue
            if state(a) != state(b) or not np.allclose(np.array(a.cell), np.array(b.cell), atol=1e-6):
                continue
            step = b.positions - a.positions
            if a.pbc.any():
                step = step - np.round(step @ np.linalg.pinv(np.array(a.cell))) @ np.array(a.cell)
            step = step - step.mean(0)
            if np.linalg.norm(step, axis=1).max() <= largest:
                changes.append(eb - ea)
                works.append(-0.5 * float(((fa + fb) * step).sum()))
    if len(changes) < 5 or not np.std(works):
        return float("nan"), float("nan"), len(changes)
    slope = float(np.polyfit(works, changes, 1)[0])
    return slope, float(np.corrcoef(works, changes)[0, 1]), len(changes)


def units_of_slope(slope: float) -> str:
    """Which mix-up of units would give this slope."""
    if abs(slope + 1.0) < 0.1:
        return "the forces have the wrong sign (gradients instead of forces)"
    guesses = []
    for energy, e in _ENERGIES.items():
        for force, f in _ENERGIES.items():
            for length, x in _LENGTHS.items():
                # the file's numbers are taken as eV and eV/Å
                expected = (f / x) / e
                if energy != force or length != "Å":
                    guesses.append(
                        (abs(np.log(abs(slope) / expected)), f"energies in {energy}, forces in {force}/{length}")
                    )
    distance, best = min(guesses)
    if slope > 0 and distance < 0.1:
        return f"it looks like {best}; expected eV and eV/Å"
    return "energies and forces are not of one method or unit"
