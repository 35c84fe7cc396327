"""Read the public benchmark sets as frames with REF_energy (eV) and REF_forces (eV/Å)."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import ase
import ase.io
import numpy as np
from ase import units

__all__ = ["EMBEDDED_SETS", "RMD17", "Split", "load_split", "rmd17", "split", "write"]

KCAL = units.kcal / units.mol
RMD17 = ("ethanol", "aspirin", "toluene", "uracil", "paracetamol")
EMBEDDED_SETS = ("glycolamide", "2_fluoroethanol", "thioacetamide")
METALS = ("Cu", "Li", "Mo", "Si")
TRAIN, VALID, TEST = 50, 50, 1000


@dataclass(frozen=True)
class Split:
    """Disjoint frames for training, validation and test, and what they are."""

    train: list[ase.Atoms]
    valid: list[ase.Atoms]
    test: list[ase.Atoms]
    level: str


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


def extxyz(path: Path, index: str = ":") -> list[ase.Atoms]:
    """Frames of an extxyz file whose labels are under ASE's own names."""
    frames = []
    for atoms in ase.io.read(path, index, format="extxyz"):
        plain = ase.Atoms(atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        plain.info["REF_energy"] = float(atoms.get_potential_energy())
        plain.arrays["REF_forces"] = atoms.get_forces()
        frames.append(plain)
    return frames


def load_split(name: str, folder: Path, seed: int, train: int = TRAIN) -> Split:
    """50 training, 50 validation and up to 1000 test frames of a set.

    Args:
        name: an rMD17 molecule, "3bpa" (300 K for training, mixed temperatures for the test), a
            metal of mlearn, "hfo2", or a molecule of the embedded PBE0 set.
        folder: folder of the public data sets.
        seed: chooses training and validation frames; the test frames are the same for all seeds.
        train: training frames; as many for validation, 50 at most.

    Raises:
        ValueError: an unknown set.
        FileNotFoundError: its files are missing.
    """
    counts = [train, min(train, VALID)]
    if name in RMD17:
        pool, test = (rmd17(folder / "rmd17_PBE", name, part) for part in ("train", "test"))
        return Split(*split(pool, counts, seed), test[:TEST], "PBE/def2-SVP")
    if name == "3bpa":
        pool = extxyz(folder / "3bpa_wB97X" / "train_300K.xyz")
        test = extxyz(folder / "3bpa_wB97X" / "train_mixedT.xyz")
        return Split(*split(pool, counts, seed), test[:TEST], "wB97X/6-31G(d)")
    if name in METALS:
        pool = extxyz(folder / "mlearn_PBE" / f"{name}_train.extxyz.gz")
        test = extxyz(folder / "mlearn_PBE" / f"{name}_test.extxyz")
        return Split(*split(pool, counts, seed), test[:TEST], "PBE")
    if name == "hfo2":
        pool = extxyz(folder / "hfo2_PBE" / "HfO2_train.extxyz.gz")
        test = extxyz(folder / "hfo2_PBE" / "HfO2_valid.extxyz")
        return Split(*split(pool, counts, seed), test[:TEST], "PBE")
    if name in EMBEDDED_SETS:
        from mace_lora import embedded_dft_path

        with gzip.open(embedded_dft_path(name), "rt") as handle:
            frames = ase.io.read(handle, ":", format="extxyz")
        pool = [f for f in frames if f.info["split"] != "test"]
        test = [f for f in frames if f.info["split"] == "test"]
        return Split(*split(pool, counts, seed), test, "PBE0/def2-SVP")
    raise ValueError(f"set: expected one of {RMD17}, 3bpa, {METALS}, hfo2, {EMBEDDED_SETS}, got {name!r}")


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
