"""What a labeler is, and how a name such as ``pyscf:pbe/def2-svp`` becomes one."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ase
import numpy as np

__all__ = ["Labeler", "Labels", "Method", "labeler_help", "open_labeler"]

# A calculator's factory gets the frame, since charge, spin and topology belong to it.
Factory = Callable[[ase.Atoms], Any]


@dataclass(frozen=True)
class Labels:
    """Labels of one frame.

    Attributes:
        energy: eV.
        forces: (atoms, 3) eV/Å.
        stress: (6,) eV/Å^3 in Voigt order, or None where the frame is not periodic.
    """

    energy: float
    forces: np.ndarray
    stress: np.ndarray | None


@dataclass(frozen=True)
class Method:
    """A family of labelers.

    Attributes:
        name: what comes before the colon.
        argument: what comes after it, for the help; "" when nothing does.
        help: one line.
        packages: importable modules it needs, and their names for pip.
        open: makes the factory and the level's description from the argument.
        electrons: whether charge and multiplicity mean something to it.
        files: whether the argument names files, joined by ``+``, whose content decides the labels.
    """

    name: str
    argument: str
    help: str
    packages: dict[str, str]
    open: Callable[[str], tuple[Factory, str]]
    electrons: bool = False
    files: bool = False


@dataclass
class Labeler:
    """A method ready to label.

    Attributes:
        name: as the user wrote it.
        identity: the name, and the content of the files in it; labels of equal identity may be mixed.
        level: description of the level of theory.
        versions: of the programs behind it.
    """

    name: str
    level: str
    versions: dict[str, str]
    _factory: Factory = field(repr=False)
    _electrons: bool = False
    identity: str = ""

    def __post_init__(self) -> None:
        self.identity = self.identity or self.name

    def calculator(self, atoms: ase.Atoms) -> Any:
        """ASE calculator for a frame.

        Raises:
            ValueError: the method cannot describe the frame; the reason is given.
        """
        if self._electrons:
            _check_electrons(atoms)
        return self._factory(atoms)

    def label(self, atoms: ase.Atoms) -> Labels:
        """Energy, forces and (periodic frames) stress.

        Raises:
            ValueError: the method cannot describe the frame, or the result is not finite.
        """
        frame = ase.Atoms(atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        frame.info.update(atoms.info)
        frame.calc = self.calculator(frame)
        energy, forces = float(frame.get_potential_energy()), np.array(frame.get_forces(), dtype=float)
        stress = None
        if frame.pbc.all() and "stress" in getattr(frame.calc, "implemented_properties", ()):
            stress = np.array(frame.get_stress(), dtype=float)
        for what, value in (("energy", energy), ("forces", forces), ("stress", stress)):
            if value is not None and not np.isfinite(value).all():
                raise ValueError(f"{self.name}: the {what} is not finite")
        return Labels(energy, forces, stress)


def _check_electrons(atoms: ase.Atoms) -> None:
    """Charge and multiplicity (``info['charge']``, ``info['spin']``) must fit the number of electrons."""
    charge, spin = atoms.info.get("charge", 0), atoms.info.get("spin", 1)
    for name, value in (("charge", charge), ("spin", spin)):
        if not math.isfinite(float(value)) or int(value) != value:
            raise ValueError(f"info[{name!r}]: expected an integer, got {value!r}")
    electrons = int(atoms.numbers.sum()) - int(charge)
    if electrons < 1 or spin < 1 or spin > electrons + 1 or (electrons - (int(spin) - 1)) % 2:
        raise ValueError(
            f"charge {int(charge)} and multiplicity {int(spin)} are impossible with {electrons} electrons; set "
            "info['charge'] and info['spin'] (multiplicity) of the frame"
        )


def _methods() -> dict[str, Method]:
    from . import lammps_ff, models, molecular, quantum

    found = [*quantum.METHODS, *molecular.METHODS, *lammps_ff.METHODS, *models.METHODS]
    return {m.name: m for m in found}


def labeler_help() -> str:
    """A line for every method."""
    lines = []
    for m in _methods().values():
        lines.append(f"{m.name}{':' + m.argument if m.argument else ''}  {m.help}")
    return "\n".join([*lines, "MODULE:FUNCTION  your own: a function of the frame that returns an ASE calculator"])


def open_labeler(name: str) -> Labeler:
    """A labeler by name.

    Args:
        name: e.g. ``gfn2-xtb``, ``pyscf:pbe0/def2-svp``, ``mace:model.model+adapter``,
            ``my_module:my_function``.

    Raises:
        ValueError: unknown name, bad argument, or a package that is not installed; the remedy is given.
    """
    head, _, argument = name.partition(":")
    method = _methods().get(head)
    if method is None:
        if argument:
            return _callable(name, head, argument)
        raise ValueError(f"labeler: unknown name {name!r}; expected one of\n{labeler_help()}")
    if bool(argument) != bool(method.argument):
        expected = f"{head}:{method.argument}" if method.argument else head
        raise ValueError(f"labeler: expected {expected}, got {name!r}")
    missing = [pip for module, pip in method.packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f"labeler {head}: it needs {', '.join(missing)}; pip install {' '.join(missing)}")
    factory, level = method.open(argument)
    versions = {pip: _version(pip) for pip in method.packages.values()}
    identity = name
    if method.files and (digest := _digest([Path(a) for a in argument.split("+")])):
        identity = f"{name}#{digest}"
    return Labeler(name, level, versions, factory, method.electrons, identity)


def _digest(paths: list[Path]) -> str:
    """16 hexadecimal digits of the content of those that exist; "" when none does."""
    files = [f for p in paths for f in (sorted(p.glob("adapter_*")) if p.is_dir() else [p]) if f.is_file()]
    if not files:
        return ""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()[:16]


def _callable(name: str, module: str, attribute: str) -> Labeler:
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as err:
        known = ", ".join(_methods())
        raise ValueError(f"labeler: {name!r} is neither a known name ({known}) nor importable ({err})") from err
    if not callable(function):
        raise ValueError(f"labeler: {name!r} is a {type(function).__name__}, not a function")
    return Labeler(name, name, {}, function)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"
