"""Read the public benchmark sets as extxyz splits with REF_energy (eV) and REF_forces (eV/Å)."""

from __future__ import annotations

from pathlib import Path

import ase
import ase.io
import numpy as np
from ase import units

__all__ = ["rmd17", "split", "write"]

KCAL = units.kcal / units.mol


def rmd17(folder: Path, molecule: str, part: str) -> list[ase.Atoms]:
    """Frames of rMD17 (PBE/def2-SVP), official split 01.

    Args:
        folder: folder of the npz files.
        molecule: e.g. "ethanol".
        part: "train" or "test".
    """
    found = sorted(folder.glob(f"*{molecule}*{part}*.npz"))
    if not found:
        raise FileNotFoundError(f"no npz of {molecule} {part} in {folder}")
    data = np.load(found[0])
    frames = []
    for xyz, energy, forces in zip(data["coords"], data["energies"], data["forces"], strict=True):
        atoms = ase.Atoms(data["nuclear_charges"], positions=xyz)
        atoms.info["REF_energy"] = float(np.ravel(energy)[0]) * KCAL
        atoms.arrays["REF_forces"] = np.asarray(forces) * KCAL
        frames.append(atoms)
    return frames


def split(frames: list[ase.Atoms], counts: list[int], seed: int) -> list[list[ase.Atoms]]:
    """Disjoint random subsets of the given sizes."""
    order = np.random.default_rng(seed).permutation(len(frames))
    out, start = [], 0
    for n in counts:
        out.append([frames[i] for i in order[start : start + n]])
        start += n
    return out


def write(path: Path, frames: list[ase.Atoms]) -> Path:
    """Write extxyz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ase.io.write(path, frames, format="extxyz")
    return path
