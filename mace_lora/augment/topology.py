"""Bonds, molecules and the parts of a molecule on either side of a bond."""

from __future__ import annotations

from dataclasses import dataclass

import ase
import numpy as np
from ase.neighborlist import natural_cutoffs, neighbor_list
from scipy.sparse import coo_array
from scipy.sparse.csgraph import breadth_first_order, connected_components

__all__ = ["Bonds", "find_bonds", "molecules", "smaller_side", "unwrap"]


@dataclass(frozen=True)
class Bonds:
    """Bonds of a frame.

    Attributes:
        pairs: (bonds, 2) atoms i < j.
        vectors: (bonds, 3) from i to the image of j it is bound to, Å.
        atoms: number of atoms.
    """

    pairs: np.ndarray
    vectors: np.ndarray
    atoms: int

    @property
    def as_set(self) -> frozenset[tuple[int, int]]:
        """The pairs, for comparisons."""
        return frozenset((int(a), int(b)) for a, b in self.pairs)

    def graph(self, without: int | None = None) -> coo_array:
        """Adjacency of the atoms, optionally with one bond cut."""
        keep = np.arange(len(self.pairs)) != (-1 if without is None else without)
        i, j = self.pairs[keep].T if keep.any() else np.zeros((2, 0), int)
        return coo_array((np.ones(len(i)), (i, j)), shape=(self.atoms, self.atoms))


def in_its_box(atoms: ase.Atoms) -> ase.Atoms:
    """A molecule without its cell: ASE's neighbour list would search all of a large empty one."""
    return atoms if atoms.pbc.any() else ase.Atoms(atoms.numbers, positions=atoms.positions)


def find_bonds(atoms: ase.Atoms, scale: float = 1.25) -> Bonds:
    """Pairs of atoms closer than ``scale`` times the sum of their covalent radii, across boundaries too.

    Args:
        atoms: a frame.
        scale: dimensionless.
    """
    i, j, vectors = neighbor_list("ijD", in_its_box(atoms), natural_cutoffs(atoms, mult=scale))
    once = i < j
    order = np.lexsort((j[once], i[once]))
    return Bonds(np.stack([i[once], j[once]], 1)[order], vectors[once][order], len(atoms))


def molecules(bonds: Bonds) -> list[np.ndarray]:
    """Atoms of every molecule, in the order of their first atoms."""
    count, member = connected_components(bonds.graph(), directed=False)
    return [np.flatnonzero(member == m) for m in range(count)]


def smaller_side(bonds: Bonds, bond: int) -> np.ndarray | None:
    """Atoms on the smaller side of a bond, or None where the bond is part of a ring.

    Args:
        bonds: of the frame.
        bond: row of ``bonds.pairs``.
    """
    a, b = bonds.pairs[bond]
    graph = bonds.graph(without=bond)
    graph = (graph + graph.T).tocsr()
    sides = [breadth_first_order(graph, start, return_predecessors=False) for start in (a, b)]
    if b in sides[0]:
        return None
    return min(sides, key=len)


def unwrap(atoms: ase.Atoms, bonds: Bonds) -> ase.Atoms:
    """A copy in which every molecule is whole: bound atoms are at their bond vectors.

    Args:
        atoms: a frame, periodic or not.
        bonds: of this frame.
    """
    whole = atoms.copy()
    vectors = {}
    for (i, j), d in zip(bonds.pairs, bonds.vectors, strict=True):
        vectors[int(i), int(j)], vectors[int(j), int(i)] = d, -d
    graph = bonds.graph()
    graph = (graph + graph.T).tocsr()
    for member in molecules(bonds):
        order, before = breadth_first_order(graph, member[0], return_predecessors=True)
        for atom in order[1:]:
            parent = int(before[atom])
            whole.positions[atom] = whole.positions[parent] + vectors[parent, int(atom)]
    return whole
