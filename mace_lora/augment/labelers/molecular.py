"""Molecular force fields: MMFF94 and UFF by RDKit, and the bonds that force fields keep.

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


class Bonded(Calculator):
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


class RDKitForceField(Bonded):
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


METHODS = (
    Method("mmff94", "", "MMFF94 by RDKit, molecules", {"rdkit": "rdkit"}, partial(_rdkit, "mmff94")),
    Method("uff", "", "UFF by RDKit, molecules", {"rdkit": "rdkit"}, partial(_rdkit, "uff")),
)
