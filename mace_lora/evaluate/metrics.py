"""Errors of a model on labelled frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ase
import numpy as np
from numpy.typing import NDArray

__all__ = ["Errors", "Predictions", "errors", "predict"]


@dataclass(frozen=True)
class Predictions:
    """Labels and predictions of the same frames.

    Attributes:
        atoms: number of atoms (frames,).
        energy_label, energy: (frames,) in eV.
        forces_label, forces: (all atoms, 3) in eV/Å.
    """

    atoms: NDArray[np.int64]
    energy_label: NDArray[np.float64]
    energy: NDArray[np.float64]
    forces_label: NDArray[np.float64]
    forces: NDArray[np.float64]


@dataclass(frozen=True)
class Errors:
    """MAE and RMSE of the energy per atom (meV) and of the forces (meV/Å)."""

    mae_e: float
    rmse_e: float
    mae_f: float
    rmse_f: float


def predict(
    calculator: Any, frames: Sequence[ase.Atoms], energy_key: str = "REF_energy", forces_key: str = "REF_forces"
) -> Predictions:
    """Evaluate an ASE calculator on labelled frames.

    Args:
        calculator: any ASE calculator with energies and forces.
        frames: structures with labels in eV and eV/Å.
        energy_key: key of the energy label in ``info``.
        forces_key: key of the force labels in ``arrays``.

    Raises:
        ValueError: a frame without one of the labels; its index is named.
    """
    energies, forces = [], []
    for index, frame in enumerate(frames):
        if energy_key not in frame.info or forces_key not in frame.arrays:
            raise ValueError(f"frame {index}: expected labels {energy_key} and {forces_key}, got {sorted(frame.info)}")
        atoms = ase.Atoms(frame.numbers, positions=frame.positions, cell=frame.cell, pbc=frame.pbc)
        atoms.calc = calculator
        energies.append(atoms.get_potential_energy())
        forces.append(atoms.get_forces())
    return Predictions(
        np.array([len(f) for f in frames]),
        np.array([float(f.info[energy_key]) for f in frames]),
        np.array(energies, dtype=float),
        np.concatenate([f.arrays[forces_key] for f in frames]),
        np.concatenate(forces),
    )


def errors(p: Predictions) -> Errors:
    """Mean absolute and root-mean-square errors."""
    de = 1e3 * (p.energy - p.energy_label) / p.atoms
    df = 1e3 * (p.forces - p.forces_label)
    return Errors(
        float(np.abs(de).mean()),
        float(np.sqrt((de**2).mean())),
        float(np.abs(df).mean()),
        float(np.sqrt((df**2).mean())),
    )
