"""Molecular force fields: MMFF94 and UFF by RDKit, water and AMBER models by OpenMM.

They need bonds, which come from the geometry that a calculator is made for and stay, so that dynamics may stretch them
as far as it likes; bond orders come from ``info['smiles']`` where a frame has it,
otherwise from RDKit's perception with ``info['charge']``.
"""

from __future__ import annotations

import copy
from functools import lru_cache, partial
from typing import Any

import ase
import numpy as np
from ase import units
from ase.calculators.calculator import Calculator, all_changes

from mace_lora.augment.topology import find_bonds

from .registry import Factory, Method

__all__ = ["METHODS"]

KCAL = units.kcal / units.mol


def _pairs(frame: ase.Atoms) -> tuple[tuple[int, int], ...]:
    return tuple((int(a), int(b)) for a, b in find_bonds(frame).pairs)


@lru_cache(maxsize=512)
def _molecule(numbers: tuple[int, ...], bonds: tuple[tuple[int, int], ...], smiles: str, charge: int) -> Any:
    """RDKit molecule with bond orders; cached, since frames of one molecule share it."""
    from rdkit import Chem
    from rdkit.Chem import AllChem, rdDetermineBonds

    edit = Chem.RWMol()
    for z in numbers:
        atom = Chem.Atom(z)
        atom.SetNoImplicit(True)
        edit.AddAtom(atom)
    for a, b in bonds:
        edit.AddBond(a, b, Chem.BondType.SINGLE)
    molecule = edit.GetMol()
    molecule.AddConformer(Chem.Conformer(len(numbers)))  # RDKit asks for one; positions are given later
    try:
        if smiles:
            molecule = AllChem.AssignBondOrdersFromTemplate(Chem.AddHs(Chem.MolFromSmiles(smiles)), molecule)
        else:
            rdDetermineBonds.DetermineBondOrders(molecule, charge=charge)
        Chem.SanitizeMol(molecule)
    except (ValueError, RuntimeError) as err:
        hint = f"they do not match smiles {smiles!r}" if smiles else "give info['smiles'] or info['charge']"
        raise ValueError(f"topology: no bond orders for the bonds found in the geometry ({err}); {hint}") from err
    return molecule


class _Bonded(Calculator):
    """A calculator that knows the bonds of the frame it was made for."""

    def __init__(self) -> None:
        super().__init__()
        self._own: tuple[bytes, tuple[tuple[int, int], ...]] | None = None

    def made_for(self, atoms: ase.Atoms) -> Any:
        """A calculator with the bonds of a frame; what costs time to set up is shared."""
        other = copy.copy(self)
        other.results, other.atoms = {}, None
        other._own = (atoms.numbers.tobytes(), _pairs(atoms))
        return other

    def bonds(self, frame: ase.Atoms) -> tuple[tuple[int, int], ...]:
        """Pairs of bonded atoms: its own, or for another molecule those of the geometry."""
        if self._own is not None and self._own[0] == frame.numbers.tobytes():
            return self._own[1]
        return _pairs(frame)


class RDKitForceField(_Bonded):
    """MMFF94 or UFF energies and forces of molecules without periodic boundaries.

    Args:
        method: ``mmff94`` or ``uff``.
    """

    implemented_properties = ["energy", "forces"]

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method

    def calculate(
        self, atoms: ase.Atoms | None = None, properties: Any = None, system_changes: Any = all_changes
    ) -> None:
        """Evaluate the force field (kcal/mol, Å) in eV and Å."""
        super().calculate(atoms, properties, system_changes)
        frame = self.atoms
        if frame.pbc.any():
            raise ValueError(f"{self.method}: expected a molecule, got periodic boundaries")
        key = (tuple(int(z) for z in frame.numbers), self.bonds(frame), str(frame.info.get("smiles", "")))
        molecule = _molecule(*key, int(frame.info.get("charge", 0)))
        field = self._field(molecule)
        positions = [float(x) for x in frame.positions.reshape(-1)]
        energy = field.CalcEnergy(positions)
        gradient = np.array(field.CalcGrad(positions)).reshape(-1, 3)
        self.results = {"energy": energy * KCAL, "forces": -gradient * KCAL}

    def _field(self, molecule: Any) -> Any:
        from rdkit.Chem import rdForceFieldHelpers as helpers

        # no cut-off of the non-bonded terms: their neighbour list would come from the empty conformer
        limits: dict[str, Any] = {"nonBondedThresh": 1e4} if self.method == "mmff94" else {"vdwThresh": 1e4}
        if self.method == "mmff94":
            properties = helpers.MMFFGetMoleculeProperties(molecule)
            if properties is None:
                raise ValueError("mmff94: it has no parameters for an atom of this molecule")
            field = helpers.MMFFGetMoleculeForceField(
                molecule, properties, ignoreInterfragInteractions=False, **limits
            )  # fmt: skip
        else:
            if not helpers.UFFHasAllMoleculeParams(molecule):
                raise ValueError("uff: it has no parameters for an atom of this molecule")
            field = helpers.UFFGetMoleculeForceField(molecule, ignoreInterfragInteractions=False, **limits)
        field.Initialize()
        return field


def _rdkit(method: str, argument: str) -> tuple[Factory, str]:
    return RDKitForceField(method).made_for, {"mmff94": "MMFF94", "uff": "UFF"}[method]


class OpenMMForceField(_Bonded):
    """An OpenMM force field, flexible (no constraints), PME where periodic.

    Every molecule has to match a residue template of the force field by elements and bonds; chains of residues need
    ``arrays['residuenumbers']``, as ASE reads them from PDB files.

    Args:
        xml: force-field files that OpenMM knows or that exist, joined by ``+``, e.g. ``tip3p.xml``,
            ``amber14-all.xml+amber14/tip3p.xml``.
        cutoff: of the real-space part in Å; reduced to half of a small box.
    """

    implemented_properties = ["energy", "forces"]

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
        if frame.pbc.all():
            context.setPeriodicBoxVectors(*(0.1 * self._reduced(frame)))
        context.setPositions(0.1 * frame.positions[order])
        state = context.getState(getEnergy=True, getForces=True)
        kj = units.kJ / units.mol
        energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
        forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
        in_order = np.empty((len(frame), 3))
        in_order[order] = np.array(forces) * kj / 10.0
        self.results = {"energy": energy * kj, "forces": in_order}

    def _reduced(self, frame: ase.Atoms) -> np.ndarray:
        """OpenMM wants the cell in lower-triangular reduced form; ASE's must be so already."""
        cell = np.array(frame.cell)
        if np.abs(np.triu(cell, 1)).max() > 1e-8:
            raise ValueError(f"openmm:{self.xml}: expected a lower-triangular cell, got {cell.tolist()}")
        return cell

    def _context(self, frame: ase.Atoms) -> tuple[Any, np.ndarray]:
        """OpenMM context of a frame's molecules, and its order of the atoms."""
        import openmm
        from openmm import app, unit

        bonds = self.bonds(frame)
        width = float(np.min(np.linalg.norm(np.array(frame.cell), axis=1))) if frame.pbc.all() else 0.0
        cutoff = round(min(self.cutoff, 0.49 * width), 1) if width else 0.0
        residues = frame.arrays.get("residuenumbers", np.zeros(0))
        key = (frame.numbers.tobytes(), bonds, cutoff, np.asarray(residues, int).tobytes())
        if key not in self._contexts:
            topology, order = _topology(frame, bonds)
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


def _topology(frame: ase.Atoms, bonds: tuple[tuple[int, int], ...]) -> tuple[Any, np.ndarray]:
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
    if frame.pbc.all():
        topology.setPeriodicBoxVectors([Vec3(*(0.1 * v)) for v in np.array(frame.cell)] * unit.nanometer)
    return topology, order


def _openmm(argument: str) -> tuple[Factory, str]:
    try:
        calculator = OpenMMForceField(argument)
    except (ValueError, FileNotFoundError) as err:
        raise ValueError(f"labeler: OpenMM cannot read the force field {argument!r} ({err})") from err
    return calculator.made_for, f"OpenMM {argument}, flexible"


METHODS = (
    Method("mmff94", "", "MMFF94 by RDKit, molecules", {"rdkit": "rdkit"}, partial(_rdkit, "mmff94")),
    Method("uff", "", "UFF by RDKit, molecules", {"rdkit": "rdkit"}, partial(_rdkit, "uff")),
    Method(
        "openmm",
        "FILE.xml[+FILE.xml]",
        "e.g. tip3p.xml, spce.xml, amber14-all.xml+amber14/tip3p.xml; no stress",
        {"openmm": "openmm"},
        _openmm,
        files=True,
    ),
)
