"""Two levels of theory in two files: what must hold between them, for any framework."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
from ase.data import chemical_symbols

from mace_lora.mace_plugin.protocol import SettingsError

__all__ = ["Source", "check_elements", "check_mixed_up", "numbers_of", "read_source", "symbols"]

_SAME = 1e-6  # eV


@dataclass(frozen=True)
class Source:
    """Frames and where they come from.

    Attributes:
        setting: that names the file, for messages.
        path: the file.
        frames: all of it.
    """

    setting: str
    path: Path
    frames: Sequence[ase.Atoms]


def read_source(setting: str, path: str | Path, **arguments: Any) -> Source:
    """Read a file of frames.

    Args:
        setting: that names it.
        path: the file.
        arguments: of ``ase.io.read``, e.g. format and index.

    Raises:
        SettingsError: no such file, nothing that ASE reads, or no frames.
    """
    file = Path(path)
    if not file.exists():
        raise SettingsError(f"{setting}: no file {file}")
    try:
        frames = ase.io.read(file, **({"index": ":"} | arguments))
    except Exception as err:  # readers of many formats, each with errors of its own
        raise SettingsError(
            f"{setting}: expected frames in a format that ASE reads (extxyz …), cannot read {file} "
            f"({type(err).__name__}: {err}); convert it"
        ) from err
    if not isinstance(frames, list) or not frames:
        raise SettingsError(f"{setting}: expected at least one frame in {file}, got none")
    return Source(setting, file, frames)


def numbers_of(frames: Iterable[ase.Atoms]) -> set[int]:
    """Atomic numbers of all frames."""
    return {int(z) for atoms in frames for z in np.unique(atoms.numbers)}


def symbols(numbers: Iterable[int]) -> str:
    """Element symbols for a message."""
    return ", ".join(sorted(chemical_symbols[z] for z in numbers))


def check_elements(classical: Source, others: Iterable[Source]) -> None:
    """All elements must be in the classical frames, since a model cannot learn new ones at the hand-over.

    Raises:
        SettingsError: another file has an element that the classical one lacks.
    """
    known = numbers_of(classical.frames)
    for other in others:
        missing = numbers_of(other.frames) - known
        if missing:
            raise SettingsError(
                f"{classical.setting}: {classical.path} has no {symbols(missing)}, which {other.setting} has "
                f"({other.path}); add classical frames with these elements"
            )


def check_mixed_up(
    classical: Source, quantum: Iterable[Source], energy: Callable[[ase.Atoms], float | None]
) -> None:  # fmt: skip
    """Equal frames must not have equal energies in both files; frames of one atom are left out.

    Args:
        classical: frames of the classical level.
        quantum: frames of the quantum level.
        energy: label of a frame in eV, or None.

    Raises:
        SettingsError: one of the files is the other.
    """
    places = {_place(a): a for a in classical.frames if len(a) > 1}
    for source in quantum:
        for index, atoms in enumerate(source.frames):
            twin = places.get(_place(atoms)) if len(atoms) > 1 else None
            if twin is None:
                continue
            pair = (energy(atoms), energy(twin))
            if pair[0] is not None and pair[1] is not None and abs(float(pair[0]) - float(pair[1])) < _SAME:
                raise SettingsError(
                    f"{source.setting}: frame {index} of {source.path} has the same geometry and the same energy "
                    f"({float(pair[0]):.6f} eV) as one of {classical.path}: classical labels were given as quantum "
                    "ones, or the files were mixed up"
                )


def _place(atoms: ase.Atoms) -> bytes:
    return bytes(atoms.numbers.tobytes()) + bytes((np.round(atoms.positions, 5) + 0.0).tobytes())  # no negative zeros
