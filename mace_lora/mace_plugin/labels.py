"""Check training and validation files before anything expensive: labels present, finite, sane."""

from __future__ import annotations

import argparse
import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np

from .protocol import SettingsError

__all__ = ["MAX_FORCE", "check_files", "check_frame", "data_hashes", "label_of"]

MAX_FORCE = 300.0  # eV/Å: beyond any structure worth training on; Hartree/Bohr mix-ups come earlier
MAX_ENERGY_PER_ATOM = 2e6  # eV: beyond the all-electron total energy of any element
_NAMED = ("mp", "omat", "matpes_pbe", "matpes_r2scan")  # data for replay that upstream downloads
_READABLE = {".xyz", ".extxyz", ".gz", ".db", ".traj", ".cif", ".json"}


def _files(args: argparse.Namespace) -> Iterator[tuple[str, Path, argparse.Namespace]]:
    """Files of the command line or of its heads, and those to replay: where they are named, path, and their keys."""
    for prefix, mine in _heads(args):
        for flag in ("train_file", "valid_file", "test_file"):
            value = getattr(mine, flag, None)
            for item in value if isinstance(value, list) else [value]:
                if item:
                    yield prefix + flag, Path(str(item)), mine
    if getattr(args, "multiheads_finetuning", False):
        for flag in ("pt_train_file", "pt_valid_file"):
            value = getattr(args, flag, None)
            if value and value not in _NAMED:
                yield flag, Path(str(value)), args


def _heads(args: argparse.Namespace) -> Iterator[tuple[str, argparse.Namespace]]:
    """Each head's files and keys, as upstream completes them from the command line's."""
    heads = args.heads
    if heads is None:
        yield "", args
        return
    if isinstance(heads, str):
        try:
            heads = ast.literal_eval(heads)
        except (ValueError, SyntaxError) as err:
            raise SettingsError(f"--heads: expected a dictionary {{'NAME': {{'train_file': …}}}} ({err})") from err
    if not isinstance(heads, dict) or not all(isinstance(head, dict) for head in heads.values()):
        raise SettingsError(f"--heads: expected a dictionary {{'NAME': {{'train_file': …}}}}, got {heads!r}")
    for name, head in heads.items():
        mine = argparse.Namespace(**vars(args))
        mine.train_file = head.get("train_file", args.train_file)
        mine.valid_file = head.get("valid_file", args.valid_file)
        mine.test_file = head.get("test_file")
        mine.energy_key = head.get("info_keys", {}).get("energy", head.get("energy_key", args.energy_key))
        mine.forces_key = head.get("arrays_keys", {}).get("forces", head.get("forces_key", args.forces_key))
        yield f"heads: {name}: ", mine


def data_hashes(args: argparse.Namespace) -> dict[str, str]:
    """sha256 of each training and validation file."""
    out = {}
    for flag, path, _ in _files(args):
        if path.is_file():
            with path.open("rb") as handle:
                out[f"{flag}:{path.name}"] = hashlib.file_digest(handle, "sha256").hexdigest()
    return out


def check_files(args: argparse.Namespace, largest: float = MAX_FORCE) -> None:
    """Check every data file named on the command line, those of heads and of replay included.

    Args:
        args: upstream's.
        largest: force component beyond which a label is absurd, eV/Å.

    Raises:
        SettingsError: a missing file, a file without labels under the requested keys, a NaN or
            absurd label with its frame's index, or a force array of the wrong shape.
    """
    for flag, path, mine in _files(args):
        if not path.exists():
            raise SettingsError(f"--{flag}: no file {path}")
        if path.suffix not in _READABLE:
            continue
        frames = _frames(f"--{flag}", path)
        energies = forces = 0
        for index, atoms in enumerate(frames):
            where = f"--{flag}: {path} frame {index} ({atoms.get_chemical_formula()})"
            energy, force = check_frame(atoms, mine.energy_key, mine.forces_key, where, largest)
            _check_stress(atoms, mine, where)
            energies, forces = energies + energy, forces + force
        if not flag.endswith("test_file"):
            _check_labelled(mine, f"--{flag}: {path}", frames, energies, forces)


def _frames(flag: str, path: Path) -> list[ase.Atoms]:
    if not path.is_file():
        raise SettingsError(f"{flag}: expected a file, got the folder {path}")
    try:
        frames = ase.io.read(path, index=":")
    except Exception as err:  # ASE's readers raise whatever their parsing runs into
        raise SettingsError(
            f"{flag}: {path} cannot be read as structures ({type(err).__name__}: {err}); it is empty or damaged"
        ) from err
    assert isinstance(frames, list)
    return frames


def _check_labelled(args: argparse.Namespace, where: str, frames: list[ase.Atoms], energies: int, forces: int) -> None:
    """Both kinds of labels must be there somewhere in the file, unless their loss weight is zero."""
    first = frames[0] if frames else ase.Atoms()
    results = first.calc.results if first.calc is not None else {}
    keys = sorted({*first.info, *first.arrays, *results} - {"numbers", "positions"})
    missing = []
    if not energies and args.energy_weight > 0:
        missing.append(f"no energies under --energy_key={args.energy_key}")
    if not forces and args.forces_weight > 0:
        missing.append(f"no forces under --forces_key={args.forces_key}")
    if missing:
        raise SettingsError(
            f"{where} has {' and '.join(missing)}; its first frame has {keys}; name the right key, or set the weight "
            "of what is missing (--energy_weight, --forces_weight) to 0"
        )


def _uses_stress(args: argparse.Namespace) -> bool:
    """Whether the loss will use stress or virials; multi-head fine-tuning sets its own loss, which does."""
    base = args.foundation_model
    replay = base is not None and args.multiheads_finetuning and (args.pt_train_file or not Path(base).is_file())
    return bool(replay) or args.loss in ("stress", "virials", "huber", "universal")


def check_frame(
    atoms: ase.Atoms, energy_key: str, forces_key: str, where: str, limit: float = MAX_FORCE
) -> tuple[bool, bool]:  # fmt: skip
    """Check positions, energy and forces of one frame.

    Args:
        atoms: the frame.
        energy_key, forces_key: of its labels.
        where: it stands, for messages.
        limit: force component beyond which a label is absurd, eV/Å.

    Returns:
        whether it has an energy, and forces.

    Raises:
        SettingsError: a NaN or absurd value, or a force array of the wrong shape.
    """
    if not np.isfinite(atoms.positions).all():
        raise SettingsError(f"{where}: positions contain NaN or infinity; remove the frame")
    energy, forces = label_of(atoms, "energy", energy_key), label_of(atoms, "forces", forces_key)
    if energy is not None:
        value = float(energy)
        if not np.isfinite(value):
            raise SettingsError(f"{where}: energy label is {value}; remove or relabel the frame")
        if abs(value) / len(atoms) > MAX_ENERGY_PER_ATOM:
            raise SettingsError(
                f"{where}: energy label {value:.6g} eV for {len(atoms)} atoms is absurd; expected eV, check the units"
            )
    if forces is not None:
        array = np.asarray(forces, dtype=float)
        if array.shape != (len(atoms), 3):
            raise SettingsError(f"{where}: force labels have shape {array.shape}, expected {(len(atoms), 3)}")
        if not np.isfinite(array).all():
            atom = int(np.argwhere(~np.isfinite(array))[0, 0])
            raise SettingsError(f"{where}: force label of atom {atom} is NaN or infinite; remove or relabel the frame")
        largest = float(np.abs(array).max(initial=0.0))
        if largest > limit:
            raise SettingsError(
                f"{where}: force label of {largest:.4g} eV/A is absurd (limit {limit:g}); expected eV/A, check the "
                "units, or remove the frame"
            )
    return energy is not None, forces is not None


def _check_stress(atoms: ase.Atoms, args: argparse.Namespace, where: str) -> None:
    for kind in ("stress", "virials") if _uses_stress(args) else ():  # one NaN makes all weights NaN
        label = label_of(atoms, kind, getattr(args, f"{kind}_key", kind))
        if label is not None and not np.isfinite(np.asarray(label, dtype=float)).all():
            raise SettingsError(f"{where}: {kind} label contains NaN or infinity; remove or relabel the frame")


def label_of(atoms: ase.Atoms, kind: str, key: str) -> Any:
    """Energy, forces, stress or virials of a frame under a key, as upstream finds them; None without."""
    found = atoms.arrays.get(key) if kind == "forces" else atoms.info.get(key)
    if found is None and key == kind and atoms.calc is not None:
        found = atoms.calc.results.get(kind)
    return found
