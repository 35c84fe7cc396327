"""GFN-xTB by tblite, and density functionals by PySCF."""

from __future__ import annotations

from functools import partial
from typing import Any

import ase
import numpy as np
from ase import units
from ase.calculators.calculator import Calculator, all_changes

from .registry import Factory, Method

__all__ = ["METHODS", "PySCF"]


def _tblite(method: str, argument: str) -> tuple[Factory, str]:
    def make(atoms: ase.Atoms) -> Any:
        from tblite.ase import TBLite

        if atoms.pbc.any() and not atoms.pbc.all():  # it would take the frame as periodic in all directions
            raise ValueError(
                f"{method}: expected periodic boundaries in all directions or in none, got {atoms.pbc.tolist()}; for a "
                "slab or wire put vacuum into the cell and make it periodic"
            )
        charge, spin = int(atoms.info.get("charge", 0)), int(atoms.info.get("spin", 1))
        return TBLite(method=method, charge=charge, multiplicity=spin, verbosity=0)

    return make, method


class PySCF(Calculator):
    """Kohn-Sham energies and analytic forces of a molecule.

    Args:
        functional: PySCF's name, e.g. ``pbe0``.
        basis: e.g. ``def2-svp``.
        charge: total charge in e.
        spin: multiplicity 2S + 1; unrestricted where it is not 1.
    """

    implemented_properties = ["energy", "forces"]

    def __init__(self, functional: str, basis: str, charge: int = 0, spin: int = 1) -> None:
        super().__init__()
        self.functional, self.basis, self.charge, self.spin = functional, basis, charge, spin

    def calculate(
        self, atoms: ase.Atoms | None = None, properties: Any = None, system_changes: Any = all_changes
    ) -> None:
        """Run the SCF and its gradient."""
        from pyscf import dft, gto

        super().calculate(atoms, properties, system_changes)
        frame = self.atoms
        if frame.pbc.any():
            raise ValueError("pyscf: expected a molecule, got periodic boundaries")
        mole = gto.M(
            atom=list(zip(frame.get_chemical_symbols(), frame.positions, strict=True)), unit="Angstrom",
            basis=self.basis, charge=self.charge, spin=self.spin - 1, verbose=0,
        )  # fmt: skip
        field = (dft.RKS if self.spin == 1 else dft.UKS)(mole, xc=self.functional).density_fit()
        field.kernel()
        if not field.converged:
            raise ValueError("pyscf: the SCF did not converge")
        method = field.nuc_grad_method()
        method.grid_response = True  # forces are then the derivative of the energy
        gradient = method.kernel()
        self.results = {
            "energy": field.e_tot * units.Hartree, "forces": -np.asarray(gradient) * units.Hartree / units.Bohr,
        }  # fmt: skip


def _pyscf(argument: str) -> tuple[Factory, str]:
    functional, _, basis = argument.partition("/")
    if not functional or not basis:
        raise ValueError(f"labeler: expected pyscf:FUNCTIONAL/BASIS such as pyscf:pbe0/def2-svp, got pyscf:{argument}")
    from pyscf import dft, gto

    try:
        dft.libxc.parse_xc(functional)
        gto.basis.load(basis, "H")
    except (KeyError, ValueError, RuntimeError, AttributeError) as err:
        raise ValueError(f"labeler: PySCF knows no functional or basis like {argument!r} ({err})") from err

    def make(atoms: ase.Atoms) -> Any:
        charge, spin = int(atoms.info.get("charge", 0)), int(atoms.info.get("spin", 1))
        return PySCF(functional, basis, charge, spin)

    return make, f"{functional}/{basis} (density fitting)"


METHODS = (
    Method("gfn2-xtb", "", "GFN2-xTB by tblite", {"tblite": "tblite"}, partial(_tblite, "GFN2-xTB"), electrons=True),
    Method("gfn1-xtb", "", "GFN1-xTB by tblite", {"tblite": "tblite"}, partial(_tblite, "GFN1-xTB"), electrons=True),
    Method("pyscf", "FUNCTIONAL/BASIS", "DFT of molecules", {"pyscf": "pyscf"}, _pyscf, electrons=True),
)
