"""Water and AMBER models by OpenMM."""

from __future__ import annotations

from typing import Any

import ase
import numpy as np
from ase import units
from ase.calculators.calculator import all_changes

from .molecular import Bonded
from .registry import Factory, Method

__all__ = ["METHODS"]


class OpenMMForceField(Bonded):
    """An OpenMM force field, flexible (no constraints), PME where periodic; stress by strain differences.

    Every molecule has to match a residue template of the force field by elements and bonds; chains of residues need
    ``arrays['residuenumbers']``, as ASE reads them from PDB files.

    Args:
        xml: force-field files that OpenMM knows or that exist, joined by ``+``, e.g. ``tip3p.xml``,
            ``amber14-all.xml+amber14/tip3p.xml``.
        cutoff: of the real-space part in Å; reduced to half of a small box.
    """

    implemented_properties = ["energy", "forces", "stress"]

    def __init__(self, xml: str, cutoff: float = 9.0) -> None:
        from openmm import app

        super().__init__()
        self.xml, self.cutoff = xml, cutoff
        self.field = app.ForceField(*xml.split("+"))
        self._contexts: dict[Any, Any] = {}

    def calculate(
        self, atoms: ase.Atoms | None = None, properties: Any = None, system_changes: Any = all_changes
    ) -> None:
        """Energy and forces in eV and Å from kJ/mol and nm."""
        from openmm import unit

        super().calculate(atoms, properties, system_changes)
        frame = self.atoms
        if frame.pbc.any() and not frame.pbc.all():
            raise ValueError(f"openmm:{self.xml}: expected periodic boundaries in all directions or in none")
        context, order = self._context(frame)
        if properties is not None and "stress" in properties and frame.pbc.all():
            stress = {"stress": self._stress(context, frame, order)}
        else:
            stress = {}
        state = self._state(context, frame, order, np.eye(3), forces=True)
        kj = units.kJ / units.mol
        energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
        forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
        in_order = np.empty((len(frame), 3))
        in_order[order] = np.array(forces) * kj / 10.0
        self.results = {"energy": energy * kj, "forces": in_order, **stress}

    def _state(self, context: Any, frame: ase.Atoms, order: np.ndarray, strain: np.ndarray, forces: bool) -> Any:
        """OpenMM's state of a frame whose rows of positions and cell are multiplied by a matrix."""
        if frame.pbc.all():
            context.setPeriodicBoxVectors(*(0.1 * self._reduced(frame) @ strain))
        context.setPositions(0.1 * frame.positions[order] @ strain)
        return context.getState(getEnergy=True, getForces=forces)

    def _stress(self, context: Any, frame: ase.Atoms, order: np.ndarray) -> np.ndarray:
        """Stress (xx, yy, zz, yz, xz, xy) in eV/Å³: (dE/dstrain) / volume by central differences.

        A shear keeps the cell lower-triangular; the rotation in it leaves the energy as it is.
        """
        from openmm import unit

        stress, step = np.zeros(6), 1e-5
        for index, (i, j) in enumerate(((0, 0), (1, 1), (2, 2), (2, 1), (2, 0), (1, 0))):
            energies = []
            for sign in (1, -1):
                strain = np.eye(3)
                strain[i, j] += sign * step
                state = self._state(context, frame, order, strain, forces=False)
                energies.append(state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole))
            stress[index] = (energies[0] - energies[1]) / (2 * step)
        return stress * units.kJ / units.mol / frame.get_volume()

    def _reduced(self, frame: ase.Atoms) -> np.ndarray:
        """OpenMM wants the cell lower-triangular and reduced; ASE's must be the former."""
        cell = np.array(frame.cell)
        if np.abs(np.triu(cell, 1)).max() > 1e-8:
            raise ValueError(f"openmm:{self.xml}: expected a lower-triangular cell, got {cell.tolist()}")
        for row, column in ((2, 1), (2, 0), (1, 0)):  # the same lattice
            cell[row] -= cell[column] * np.round(cell[row, column] / cell[column, column])
        return cell

    def _context(self, frame: ase.Atoms) -> tuple[Any, np.ndarray]:
        """OpenMM context of a frame's molecules, and its order of the atoms."""
        import openmm
        from openmm import app, unit

        bonds = self.bonds(frame)
        width = float(np.diag(np.array(frame.cell)).min()) if frame.pbc.all() else 0.0
        cutoff = min(self.cutoff, np.floor(4.9 * width) / 10) if width else 0.0
        residues = frame.arrays.get("residuenumbers", np.zeros(0))
        # a new one for another cell: the mesh of PME comes from the cell that a context is made with
        cell = self._reduced(frame) if width else None
        key = (frame.numbers.tobytes(), bonds, cutoff, np.asarray(residues, int).tobytes(), str(cell))
        if key not in self._contexts:
            topology, order = _topology(frame, bonds, cell)
            method = app.PME if width else app.NoCutoff
            limits = {"nonbondedCutoff": 0.1 * cutoff * unit.nanometer} if width else {}
            try:
                system = self.field.createSystem(
                    topology, nonbondedMethod=method, constraints=None, rigidWater=False, **limits
                )  # fmt: skip
            except ValueError as err:
                raise ValueError(
                    f"openmm:{self.xml}: a molecule of this frame has no parameters ({err}); add a file with its "
                    "template (FIRST.xml+SECOND.xml), or arrays['residuenumbers'] for a chain of residues"
                ) from err
            if width:  # molecules may lie across the boundary
                for force in system.getForces():
                    if hasattr(force, "setUsesPeriodicBoundaryConditions"):
                        force.setUsesPeriodicBoundaryConditions(True)
                    if hasattr(force, "setExceptionsUsePeriodicBoundaryConditions"):
                        force.setExceptionsUsePeriodicBoundaryConditions(True)
            platform = openmm.Platform.getPlatformByName("Reference")
            self._contexts.clear()
            self._contexts[key] = (openmm.Context(system, openmm.VerletIntegrator(0.001), platform), order)
        found: tuple[Any, np.ndarray] = self._contexts[key]
        return found


def _members(atoms: int, bonds: tuple[tuple[int, int], ...]) -> list[int]:
    """Number of the molecule of every atom."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    i, j = np.array(bonds, int).reshape(-1, 2).T
    labels: list[int] = connected_components(
        coo_array((np.ones(len(i)), (i, j)), shape=(atoms, atoms)), directed=False
    )[1].tolist()
    return labels


def _topology(frame: ase.Atoms, bonds: tuple[tuple[int, int], ...], cell: np.ndarray | None) -> tuple[Any, np.ndarray]:
    """OpenMM topology and its order of the atoms: a residue for every molecule, or for every residue number in it."""
    from openmm import Vec3, app, unit

    topology = app.Topology()
    chain = topology.addChain()
    member = _members(len(frame), bonds)
    numbers = np.asarray(frame.arrays.get("residuenumbers", np.zeros(len(frame))), int)
    order = np.lexsort((numbers, np.asarray(member)))  # OpenMM wants the atoms of a residue one after the other
    symbols = frame.get_chemical_symbols()
    residue, last, atoms = None, None, {}
    for index in order.tolist():
        own = (member[index], int(numbers[index]))
        if own != last:
            residue, last = topology.addResidue("MOL", chain), own
        atoms[index] = topology.addAtom(f"{symbols[index]}{index}", app.Element.getBySymbol(symbols[index]), residue)
    for a, b in bonds:
        topology.addBond(atoms[a], atoms[b])
    if cell is not None:
        topology.setPeriodicBoxVectors([Vec3(*(0.1 * v)) for v in cell] * unit.nanometer)
    return topology, order


def _openmm(argument: str) -> tuple[Factory, str]:
    try:
        calculator = OpenMMForceField(argument)
    except (ValueError, FileNotFoundError) as err:
        raise ValueError(f"labeler: OpenMM cannot read the force field {argument!r} ({err})") from err
    return calculator.made_for, f"OpenMM {argument}, flexible, PME with a cutoff of 9 Å or half the box"


METHODS = (
    Method(
        "openmm",
        "FILE.xml[+FILE.xml]",
        "e.g. tip3p.xml, spce.xml, amber14-all.xml+amber14/tip3p.xml",
        {"openmm": "openmm"},
        _openmm,
        files=True,
    ),
)
