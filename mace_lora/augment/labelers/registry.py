"""What a labeler is, and how a name such as ``pyscf:pbe/def2-svp`` becomes one."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ase
import numpy as np

from mace_lora.atomic import content_digest

__all__ = ["Labeler", "Labels", "Method", "is_labeler", "labeler_help", "open_labeler"]

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
        has_files: whether the content of files stands for them in the identity.
        level: description of the level of theory.
        versions: of the programs behind it.
    """

    name: str
    level: str
    versions: dict[str, str]
    _factory: Factory = field(repr=False)
    _electrons: bool = False
    identity: str = ""
    has_files: bool = False

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
        if not np.isfinite(atoms.positions).all():
            raise ValueError("the frame's positions are not finite")
        frame = ase.Atoms(atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        frame.info.update(atoms.info)
        if "residuenumbers" in atoms.arrays:
            frame.set_array("residuenumbers", atoms.arrays["residuenumbers"])
        frame.calc = self.calculator(frame)
        energy, forces = float(frame.get_potential_energy()), np.array(frame.get_forces(), dtype=float)
        stress = None
        if frame.pbc.all() and "stress" in getattr(frame.calc, "implemented_properties", ()):
            stress = np.array(frame.get_stress(), dtype=float)
        for what, value in (("energy", energy), ("forces", forces), ("stress", stress)):
            if value is not None and not np.isfinite(value).all():
                raise ValueError(f"{self.name}: the {what} is not finite")
        if forces.shape != (len(frame), 3) or (stress is not None and stress.shape != (6,)):
            got = f"{forces.shape}" + ("" if stress is None else f" and {stress.shape}")
            raise ValueError(
                f"{self.name}: expected forces of shape ({len(frame)}, 3) and a stress of shape (6,), got {got}"
            )
        return Labels(energy, forces, stress)


def _check_electrons(atoms: ase.Atoms) -> None:
    """Charge and multiplicity (``info['charge']``, ``info['spin']``) must fit the number of electrons."""
    charge, spin = atoms.info.get("charge", 0), atoms.info.get("spin", 1)
    for name, value in (("charge", charge), ("spin", spin)):
        number = isinstance(value, int | float | np.number)
        if not number or not math.isfinite(value) or int(value) != value:
            raise ValueError(f"info[{name!r}]: expected an integer, got {value!r}")
    electrons = int(atoms.numbers.sum()) - int(charge)
    if electrons < 1 or spin < 1 or spin > electrons + 1 or (electrons - (int(spin) - 1)) % 2:
        raise ValueError(
            f"charge {int(charge)} and multiplicity {int(spin)} are impossible with {electrons} electrons; set "
            "info['charge'] and info['spin'] (multiplicity) of the frame"
        )


def _methods() -> dict[str, Method]:
    from . import lammps_ff, models, molecular, openmm_ff, quantum

    found = [*quantum.METHODS, *molecular.METHODS, *openmm_ff.METHODS, *lammps_ff.METHODS, *models.METHODS]
    return {m.name: m for m in found}


def labeler_help() -> str:
    """A line for every method."""
    lines = []
    for m in _methods().values():
        lines.append(f"{m.name}{':' + m.argument if m.argument else ''}  {m.help}")
    return "\n".join([*lines, "MODULE:FUNCTION  your own: a function of the frame that returns an ASE calculator"])


def is_labeler(name: str) -> bool:
    """Whether this is how a labeler is named; a file of the same name is not looked for."""
    return ":" in name or name in _methods()


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
    paths = [Path(a) for a in argument.split("+")]
    if method.files and (digest := _digest(paths)):  # wherever the files lie
        identity = f"{head}:{'+'.join(p.name if p.exists() else str(p) for p in paths)}#{digest}"
    return Labeler(name, level, versions, factory, method.electrons, identity, method.files and "#" in identity)


def _digest(paths: list[Path]) -> str:
    """16 hexadecimal digits of the content of those that exist; "" when none does."""
    files = [f for p in paths for f in _files(p) if f.is_file()]
    if not files:
        return ""
    digest = hashlib.sha256()
    for file in files:
        digest.update(bytes.fromhex(content_digest(file)))
    return digest.hexdigest()[:16]


def _files(path: Path) -> list[Path]:
    """Files whose content a path stands for."""
    if path == Path("embedded"):
        from mace_lora.embedded import BASE_FILES

        return list(BASE_FILES)
    if path.is_dir():
        return sorted(path.glob("adapter_*"))
    if path.suffix in (".safetensors", ".json"):  # a model of ours is both
        return [path.with_suffix(".safetensors"), path.with_suffix(".json")]
    return [path]


def _callable(name: str, module: str, attribute: str) -> Labeler:
    if (here := str(Path.cwd())) not in sys.path:  # as for a script there
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as err:
        known = ", ".join(_methods())
        raise ValueError(f"labeler: {name!r} is neither a known name ({known}) nor importable ({err})") from err
    if not callable(function):
        raise ValueError(f"labeler: {name!r} is a {type(function).__name__}, not a function")
    source = getattr(sys.modules[module], "__file__", None)
    digest = _digest([Path(source)]) if source else ""
    return Labeler(name, name, {}, function, identity=f"{name}#{digest}" if digest else name)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"
