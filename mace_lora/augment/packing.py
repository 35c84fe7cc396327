"""Boxes of molecular liquids at a density, packed by Packmol."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import ase
import ase.io
import numpy as np
from ase.units import _amu

__all__ = ["molecule", "pack"]

_GRAMS_PER_AMU = 1e3 * _amu


def molecule(source: str, seed: int = 0) -> ase.Atoms:
    """A single molecule from the first frame of a file, or from a SMILES string where no such file exists.

    Args:
        source: file that ASE reads, or SMILES; conformers are made by RDKit (ETKDG, then MMFF94 or UFF).
        seed: of the conformer.

    Raises:
        ValueError: neither a file nor a SMILES string.
    """
    if Path(source).is_file():
        first: ase.Atoms = ase.io.read(source, "0")
        return first
    if not source or source.endswith((".xyz", ".extxyz", ".pdb", ".cif")):
        raise FileNotFoundError(f"molecule: no file {source!r}")
    try:
        from rdkit import Chem, rdBase
        from rdkit.Chem import rdDistGeom
        from rdkit.Chem import rdForceFieldHelpers as helpers
    except ImportError as err:
        raise ValueError(f"molecule: {source!r} is no file; for SMILES install RDKit: pip install rdkit") from err
    with rdBase.BlockLogs():
        found = Chem.MolFromSmiles(source)
    if found is None:
        raise ValueError(f"molecule: expected a file or a SMILES string, got {source!r}, which is neither")
    found = Chem.AddHs(found)
    if rdDistGeom.EmbedMolecule(found, randomSeed=seed + 1):
        raise ValueError(f"molecule: RDKit finds no conformer of {source!r}; give a file with its geometry")
    known = helpers.MMFFHasAllMoleculeParams(found)
    (helpers.MMFFOptimizeMolecule if known else helpers.UFFOptimizeMolecule)(found, maxIters=2000)
    symbols = [a.GetSymbol() for a in found.GetAtoms()]
    atoms = ase.Atoms(symbols, positions=found.GetConformer().GetPositions())
    atoms.info.update(smiles=source, charge=Chem.GetFormalCharge(found))
    return atoms


def pack(
    molecules: Sequence[ase.Atoms], counts: Sequence[int], density: float, seed: int = 0, tolerance: float = 2.0
) -> ase.Atoms:
    """A cubic periodic box of randomly placed and oriented molecules.

    Args:
        molecules: one frame for each species, Å.
        counts: molecules of each species.
        density: g/cm^3; it fixes the box.
        seed: equal seeds give equal boxes.
        tolerance: least distance between atoms of different molecules, images included, Å.

    Returns:
        the box, molecules one after the other and whole across the boundary.

    Raises:
        ValueError: Packmol is missing or cannot fit the molecules at this density, or several have unpaired electrons.
    """
    _check(molecules, counts, density)
    unpaired = [m.info["spin"] for m, n in zip(molecules, counts, strict=True) if m.info.get("spin", 1) != 1
                for _ in range(n)]  # fmt: skip
    if len(unpaired) > 1:
        raise ValueError(
            f"pack: {len(unpaired)} molecules have unpaired electrons, whose coupling is not known; remove "
            "info['spin'] and set it on the box"
        )
    grams = _GRAMS_PER_AMU * sum(n * m.get_masses().sum() for n, m in zip(counts, molecules, strict=True))
    length = (grams / density * 1e24) ** (1 / 3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [f"tolerance {tolerance}", "filetype xyz", "output packed.xyz", f"seed {seed + 1}"]
        lines += ["pbc" + 3 * f" {length:.6f}", "nloop 400"]
        for k, (atoms, count) in enumerate(zip(molecules, counts, strict=True)):
            ase.io.write(folder / f"{k}.xyz", ase.Atoms(atoms.numbers, positions=atoms.positions), format="xyz")
            lines += [f"structure {k}.xyz", f"  number {count}", "end structure"]
        settings = folder / "packmol.inp"
        settings.write_text("\n".join([*lines, ""]))
        with settings.open() as file:  # not a pipe: Packmol reads its input twice
            done = subprocess.run([_packmol()], stdin=file, cwd=folder, capture_output=True, text=True, check=False)
        if "Success!" not in done.stdout:
            raise ValueError(
                f"pack: Packmol found no room for {sum(counts)} molecules at {density:g} g/cm^3 in a box of "
                f"{length:.2f} Å with a tolerance of {tolerance:g} Å; lower the density and compress by dynamics, or "
                "lower the tolerance"
            )
        packed: ase.Atoms = ase.io.read(folder / "packed.xyz")
    packed.set_cell([length] * 3)
    packed.pbc = True
    packed.info.clear()  # Packmol's comment
    packed.info.update(
        density_g_cm3=round(density, 6),
        charge=sum(int(m.info.get("charge", 0)) * n for m, n in zip(molecules, counts, strict=True)),
    )
    if unpaired:
        packed.info["spin"] = unpaired[0]
    return packed


def _check(molecules: Sequence[ase.Atoms], counts: Sequence[int], density: float) -> None:
    if not molecules or len(molecules) != len(counts):
        raise ValueError(f"counts: expected one number for each of {len(molecules)} species, got {len(counts)}")
    if min(counts) < 1:
        raise ValueError(f"counts: expected numbers of at least 1, got {list(counts)}")
    if not (np.isfinite(density) and 0 < density < 30):
        raise ValueError(f"density: expected g/cm^3 between 0 and 30, got {density}")


def _packmol() -> str:
    """The program of this environment, or of the machine."""
    here = Path(sys.executable).parent / "packmol"
    found = str(here) if here.is_file() else shutil.which("packmol")
    if found is None:
        raise ValueError("pack: Packmol is not installed: pip install packmol")
    return found
