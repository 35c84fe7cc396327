"""Frames with labels."""

import ase
import numpy as np


def labelled(symbols: str, energy: float, seed: int = 0, **info) -> ase.Atoms:
    """A frame with labels under the default keys."""
    rng = np.random.default_rng(seed)
    atoms = ase.Atoms(symbols, positions=rng.normal(size=(len(ase.Atoms(symbols)), 3)))
    atoms.info |= {"REF_energy": energy, **info}
    atoms.arrays["REF_forces"] = rng.normal(size=(len(atoms), 3))
    return atoms
