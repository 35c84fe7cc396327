"""New frames from old ones: rattled, strained, with a stretched bond, cut out as clusters; and their filters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import ase
import numpy as np
from ase.data import covalent_radii
from ase.neighborlist import neighbor_list

from .topology import find_bonds, in_its_box, molecules, smaller_side, unwrap

__all__ = ["bare", "cluster", "keep_sound", "rattle", "strain", "stretch_bond"]


def rattle(atoms: ase.Atoms, std: float, rng: np.random.Generator) -> ase.Atoms:
    """A copy with normally distributed displacements.

    Args:
        atoms: a frame.
        std: standard deviation of each component, Å.
        rng: random numbers.
    """
    if not (np.isfinite(std) and std > 0):
        raise ValueError(f"std: expected a length > 0 in Å, got {std}")
    moved = bare(atoms)
    moved.positions += rng.normal(0.0, std, moved.positions.shape)
    return moved


def strain(atoms: ase.Atoms, largest: float, rng: np.random.Generator) -> ase.Atoms:
    """A copy under a random symmetric strain.

    Args:
        atoms: a periodic frame.
        largest: bound of every component of the strain, e.g. 0.05.
        rng: random numbers.

    Raises:
        ValueError: the frame is not periodic, or the strain could turn the cell inside out.
    """
    if not 0 < largest < 0.5:
        raise ValueError(f"largest: expected a strain between 0 and 0.5, got {largest}")
    if not atoms.pbc.all():
        raise ValueError(f"strain: expected a frame periodic in all directions, got pbc {atoms.pbc.tolist()}")
    upper = np.triu(rng.uniform(-largest, largest, (3, 3)))
    strained = bare(atoms)
    strained.set_cell(np.array(atoms.cell) @ (np.eye(3) + (upper + upper.T) / 2), scale_atoms=True)
    return strained


def stretch_bond(
    atoms: ase.Atoms, rng: np.random.Generator, low: float = 0.85, high: float = 2.0, scale: float = 1.25
) -> ase.Atoms:
    """A copy with one random bond scaled by U(low, high); the smaller side of the bond moves rigidly.

    Bond-stretch augmentation of MS-MACE (arXiv 2312.09490). Bonds in rings have no sides and are never drawn.

    Args:
        atoms: a frame, periodic or not.
        rng: random numbers.
        low, high: bounds of the factor.
        scale: what counts as a bond, in sums of covalent radii.

    Returns:
        the frame, with ``info['stretched']`` = "i-j" and ``info['stretch_factor']``.

    Raises:
        ValueError: all bonds are in rings, or there are none.
    """
    bonds = find_bonds(atoms, scale)
    for bond in rng.permutation(len(bonds.pairs)):
        side = smaller_side(bonds, int(bond))
        if side is None:
            continue
        (i, j), vector = bonds.pairs[bond], bonds.vectors[bond]
        factor = float(rng.uniform(low, high))
        stretched = bare(atoms)
        direction = vector if j in side else -vector
        stretched.positions[side] += (factor - 1.0) * direction
        stretched.info.update(stretched=f"{i}-{j}", stretch_factor=factor)
        return stretched
    what = "all of its bonds are in rings" if len(bonds.pairs) else "it has no bonds"
    raise ValueError(f"stretch: {atoms.get_chemical_formula()} has no bond to stretch: {what}")


def cluster(atoms: ase.Atoms, count: int, scale: float = 1.25) -> ase.Atoms:
    """The molecules nearest to the centre of the box (of mass, without a box), in vacuum, each of them whole.

    Args:
        atoms: a frame of molecules, periodic in all directions or in none.
        count: number of molecules.
        scale: what counts as a bond, in sums of covalent radii.

    Raises:
        ValueError: there are fewer molecules, one is bound to its own image, the frame is a slab or wire, or it is
            charged or has unpaired electrons (whose they are is not known).
    """
    if atoms.pbc.any() and not atoms.pbc.all():
        raise ValueError(f"cluster: expected a frame periodic in all directions or in none, got {atoms.pbc.tolist()}")
    if atoms.info.get("charge", 0) != 0 or atoms.info.get("spin", 1) != 1:
        raise ValueError(
            f"cluster: charge {atoms.info.get('charge', 0)} and multiplicity {atoms.info.get('spin', 1)} of the frame "
            "cannot be divided among its molecules; remove them from info and set them on the clusters"
        )
    bonds = find_bonds(atoms, scale)
    found = molecules(bonds)
    if count < 1 or len(found) < count:
        raise ValueError(f"cluster: expected between 1 and {len(found)} molecules, got {count}")
    whole = unwrap(atoms, bonds)
    for (i, j), vector in zip(bonds.pairs, bonds.vectors, strict=True):
        if np.abs(whole.positions[j] - whole.positions[i] - vector).max() > 1e-6:
            raise ValueError("cluster: a molecule is bound to its own periodic image; this is no molecular system")
    middle = np.array([whole.positions[m].mean(0) for m in found])
    if atoms.pbc.all():
        cell, centre = np.array(atoms.cell), np.array(atoms.cell).sum(0) / 2
        middle -= np.round((middle - centre) @ np.linalg.inv(cell)) @ cell  # the image nearest to the centre
    else:
        centre = atoms.get_center_of_mass()
    shift = middle - np.array([whole.positions[m].mean(0) for m in found])
    chosen = np.sort(np.argsort(np.linalg.norm(middle - centre, axis=1))[:count])
    index = np.concatenate([found[c] for c in chosen])
    offsets = np.concatenate([np.repeat(shift[c][None], len(found[c]), 0) for c in chosen])
    return ase.Atoms(atoms.numbers[index], positions=whole.positions[index] + offsets - centre)


def keep_sound(
    frames: Iterable[ase.Atoms],
    reference: ase.Atoms | None = None,
    closest: float = 0.5,
    scale: float = 1.3,
    dropped: Counter[str] | None = None,
) -> Iterator[ase.Atoms]:
    """Leave out frames with overlapping atoms, values that are not finite, or (given a reference) other bonds.

    Args:
        frames: frames.
        reference: frame whose bonds must be kept; None to allow reactions.
        closest: atoms must be further apart than this fraction of the sum of their covalent radii.
        scale: what counts as a bond, in sums of covalent radii.
        dropped: counts what was left out, by reason.
    """
    wanted = None if reference is None else find_bonds(reference, scale).as_set
    counts: Counter[str] = Counter() if dropped is None else dropped
    radii = closest * covalent_radii
    for atoms in frames:
        if not np.isfinite(atoms.positions).all():
            counts["not finite"] += 1
        elif len(neighbor_list("i", in_its_box(atoms), [radii[z] for z in atoms.numbers])):
            counts["overlapping atoms"] += 1
        elif wanted is not None and find_bonds(atoms, scale).as_set != wanted:
            counts["bonds changed"] += 1
        else:
            yield atoms


def bare(atoms: ase.Atoms) -> ase.Atoms:
    """A copy without results, velocities and labels, which belong to the old positions."""
    copy = ase.Atoms(atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    keep = ("charge", "spin", "smiles")
    copy.info.update({k: v for k, v in atoms.info.items() if k in keep})
    if "residuenumbers" in atoms.arrays:
        copy.set_array("residuenumbers", atoms.arrays["residuenumbers"])
    return copy
