"""Units of labels from their size alone: stiffness of bonds to hydrogen, total energies of atoms."""

from __future__ import annotations

from collections.abc import Sequence

import ase
import numpy as np
from ase import units
from ase.data import covalent_radii
from ase.neighborlist import neighbor_list
from numpy.typing import NDArray

__all__ = ["bond_stiffness", "energy_unit", "force_unit", "is_balanced", "is_flat"]

Floats = NDArray[np.float64]
_USUAL = 37.0  # eV/Å^2: C-H 30, N-H 40, O-H 45 (harmonic, from 2900 to 3700 1/cm)
_SPREAD, _HARMONIC = 0.015, 0.1  # Å: bonds of one kind must vary by so much; those further off are left out
_FORCES = {
    "eV/Å": 1.0, "Hartree/Bohr": units.Bohr / units.Hartree, "Ry/Bohr": units.Bohr / units.Ry,
    "kcal/mol/Å": units.mol / units.kcal, "kJ/mol/Å": units.mol / units.kJ, "meV/Å": 1e3,
}  # fmt: skip
# no Ry: valence-only energies in eV are of that size
_ENERGIES = {
    "Hartree": 1.0, "eV": units.Hartree, "kcal/mol": units.Hartree * units.mol / units.kcal,
    "kJ/mol": units.Hartree * units.mol / units.kJ,
}  # fmt: skip


def is_flat(atoms: ase.Atoms) -> bool:
    """Whether the vectors of the periodic directions span no length, area or volume; a slab needs no third vector."""
    vectors = np.array(atoms.cell)[atoms.pbc]
    return len(vectors) > 0 and bool(np.linalg.det(vectors @ vectors.T) < 1e-6)


def is_balanced(atoms: ase.Atoms, reach: float = 6.0) -> bool:
    """Whether symmetry leaves no force on any atom, as in perfect crystals: one made-up pair force sums to nothing."""
    i, j, vectors = neighbor_list("ijD", atoms, reach)  # (pairs, 3) Å
    weight = np.exp(-((vectors / 1.5) ** 2).sum(1)) * (1.0 + 0.1 * atoms.numbers[j])
    force = np.zeros((len(atoms), 3))
    np.add.at(force, i, weight[:, None] * vectors)
    return bool(np.abs(force).max(initial=0.0) < 1e-4)


def bond_stiffness(
    frames: Sequence[ase.Atoms], forces: Sequence[Floats | None], most: int = 100
) -> tuple[float, float, int]:
    """How the force on a hydrogen along its bond to C, N or O falls with the length of the bond.

    Hydrogens hang on one bond, so that this is nearly its force constant. Bonds are compared with those of the same
    kind (the other atom's element and neighbours), since relaxed ones differ from kind to kind without a force.

    Args:
        frames: positions in Å.
        forces: labels, (atoms, 3) in eV/Å.
        most: frames looked at, evenly chosen.

    Returns:
        stiffness in eV/Å^2 (negative where stretched bonds are pushed further), correlation, number of bonds; NaN
        where bonds hardly vary.
    """
    from mace_lora.augment.topology import in_its_box

    kinds: dict[tuple[int, ...], list[tuple[float, float]]] = {}
    for n in np.unique(np.linspace(0, len(frames) - 1, min(most, len(frames))).astype(int)):
        atoms, force = frames[n], forces[n]
        if force is None or force.shape != (len(atoms), 3) or not np.isfinite(force).all():
            continue
        if not np.isfinite(atoms.positions).all() or is_flat(atoms):
            continue
        i, j, d, vector = neighbor_list("ijdD", in_its_box(atoms), 1.3 * covalent_radii[atoms.numbers])
        for bond in np.flatnonzero((atoms.numbers[i] == 1) & np.isin(atoms.numbers[j], (6, 7, 8))):
            other = j[bond]
            kind = (int(atoms.numbers[other]), *sorted(atoms.numbers[j[i == other]].tolist()))
            # along the bond, outwards positive
            push = -float(force[i[bond]] @ vector[bond]) / d[bond]
            kinds.setdefault(kind, []).append((float(d[bond]), push))
    x: list[float] = []
    y: list[float] = []
    for pairs in kinds.values():
        values = np.array(pairs)
        values = values[np.abs(values[:, 0] - np.median(values[:, 0])) < _HARMONIC]
        if len(values) >= 5 and values[:, 0].std() > _SPREAD:
            x += (values[:, 0] - values[:, 0].mean()).tolist()
            y += (values[:, 1] - values[:, 1].mean()).tolist()
    if not x or not np.std(y):
        return float("nan"), float("nan"), 0
    return -float(np.polyfit(x, y, 1)[0]), float(np.corrcoef(x, y)[0, 1]), len(x)


def force_unit(stiffness: float) -> str:
    """Unit in which forces give this stiffness of bonds to hydrogen; "" for a negative one."""
    if stiffness <= 0:
        return ""
    return min(_FORCES, key=lambda unit: abs(np.log(stiffness / (_USUAL * _FORCES[unit]))))


def energy_unit(frames: Sequence[ase.Atoms], energies: Sequence[float | None]) -> tuple[str, bool]:
    """Unit in which the energies are total energies with all electrons ("" where that does not show), and how sure.

    Energies of the elements by least squares have to be those of free atoms, each within 5 % from carbon on: the
    Thomas-Fermi-Scott-Schwinger series -0.7687 Z^(7/3) + Z^2 / 2 - 0.2699 Z^(5/3) Hartree. With fewer different
    compositions than elements only the sums are compared, within 2 %, which valence-only energies may meet by chance.

    Args:
        frames: for the elements.
        energies: labels of whole frames.
    """
    known = [n for n, e in enumerate(energies) if e is not None and np.isfinite(e)]
    elements = sorted({int(z) for n in known for z in frames[n].numbers})
    heavy = [k for k, z in enumerate(elements) if z > 5]
    if not heavy:
        return "", False
    table = np.array([[(frames[n].numbers == z).sum() for z in elements] for n in known], float)
    values, z = np.array([energies[n] for n in known], float), np.array(elements, float)
    atoms = -0.7687 * z ** (7 / 3) + 0.5 * z**2 - 0.2699 * z ** (5 / 3)
    found, _, rank, _ = np.linalg.lstsq(table, values, rcond=None)
    sure = bool(rank == len(elements))
    ratios = found[heavy] / atoms[heavy] if sure else np.median(values / (table @ atoms))
    near = 0.05 if sure else 0.02
    return next((unit for unit, scale in _ENERGIES.items() if np.all(np.abs(ratios / scale - 1) < near)), ""), sure
