"""Labels of frames: whether they are there, are numbers of the right shape, and are finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import ase
import numpy as np
from numpy.typing import NDArray

from .finding import Finding, listed

__all__ = ["Kind", "finite", "is_isolated", "keys", "read_label", "read_labels", "state"]

Floats = NDArray[np.float64]
Kind = Literal["energy", "forces", "stress"]


def _found(atoms: ase.Atoms, kind: Kind, key: str) -> Any:
    """What a frame has under the key, or under ASE's own name where that is asked for."""
    results = atoms.calc.results if atoms.calc is not None else {}
    return (atoms.arrays if kind == "forces" else atoms.info).get(key, results.get(key))


def read_label(atoms: ase.Atoms, kind: Kind, key: str) -> Floats | None:
    """A label as numbers: () for an energy, (atoms, 3) for forces, (6,), (9,) or (3, 3) for stress; None without one.

    Raises:
        ValueError: a text, or another shape; the key, what was expected and the value.
    """
    value = _found(atoms, kind, key)
    if value is None:
        return None
    every: dict[Kind, tuple[list[tuple[int, ...]], str]] = {
        "energy": ([(), (1,)], "one number (eV)"),
        "forces": ([(len(atoms), 3)], f"numbers of shape ({len(atoms)}, 3) (eV/Å)"),
        "stress": ([(6,), (9,), (3, 3)], "6 or 9 (3x3) numbers (eV/Å³)"),
    }
    shapes, expected = every[kind]
    try:
        numbers = np.asarray(value, float)
    except (ValueError, TypeError):
        text = " ".join(repr(value).split())
        raise ValueError(f"{key}: expected {expected}, got {text:.80}") from None
    if numbers.shape not in shapes:
        shown = f"shape {numbers.shape}" if numbers.ndim else str(numbers)
        raise ValueError(f"{key}: expected {expected}, got {shown}")
    return numbers.reshape(()) if kind == "energy" else numbers


def read_labels(frames: Sequence[ase.Atoms], kind: Kind, key: str) -> tuple[list[Floats | None], list[Finding]]:
    """Labels of all frames, None where one is missing or cannot be used; the latter are errors."""
    values: list[Floats | None] = []
    bad: dict[int, str] = {}
    for i, atoms in enumerate(frames):
        try:
            values.append(read_label(atoms, kind, key))
        except ValueError as err:
            values.append(None)
            bad[i] = str(err)
    if not bad:
        return values, []
    text = f"{len(bad)} frames have {kind} labels that cannot be used; {next(iter(bad.values()))}"
    return values, [Finding("error", text, listed(list(bad)), "check how they were written")]


def is_isolated(atoms: ase.Atoms) -> bool:
    """Whether a frame is a free atom; a periodic cell of one atom is a crystal unless it says otherwise."""
    return len(atoms) == 1 and (not atoms.pbc.any() or atoms.info.get("config_type") == "IsolatedAtom")


def state(atoms: ase.Atoms) -> str:
    """Charge and multiplicity, under our names or MACE's: energies of one geometry differ by them."""
    charge = atoms.info.get("charge", atoms.info.get("total_charge", 0))
    spin = atoms.info.get("spin", atoms.info.get("total_spin", 1))
    return " ".join(str(float(v)) if isinstance(v, int | float | np.number) else str(v) for v in (charge, spin))


def keys(frames: Sequence[ase.Atoms], energy_key: str, forces_key: str) -> list[Finding]:
    """Labels that are not there, and what the frames are; stress is nobody's duty."""
    results = frames[0].calc.results if frames[0].calc is not None else {}
    there = sorted({*frames[0].info, *frames[0].arrays, *results} - {"numbers", "positions"})
    found = []
    kinds: list[tuple[Kind, str]] = [("energy", energy_key), ("forces", forces_key)]
    for kind, key in kinds:
        missing = [i for i, a in enumerate(frames) if _found(a, kind, key) is None]
        if len(missing) == len(frames):
            found.append(Finding("error", f"no frame has {kind} labels under {key!r}; the first frame has {there}",
                                 remedy=f"name the right key with --{kind}-key"))  # fmt: skip
        elif missing:
            text = f"{len(missing)} of {len(frames)} frames have no {kind} label"
            found.append(Finding("warning", text, listed(missing), "label them, or leave them out"))
    elements = sorted({s for f in frames for s in f.get_chemical_symbols()})
    alone = {f.get_chemical_symbols()[0] for f in frames if is_isolated(f)}
    text = (
        f"{len(frames)} frames, {min(map(len, frames))} to {max(map(len, frames))} atoms, elements {' '.join(elements)}"
    )
    found.append(Finding("info", text))
    without = [e for e in elements if e not in alone]
    if without:
        found.append(Finding("info", f"no isolated atom of {' '.join(without)}: energy references have to come from "
                             "elsewhere (E0s of the method, or a least-squares fit)"))  # fmt: skip
    return found


def finite(
    frames: Sequence[ase.Atoms], energies: Sequence[float | None], forces: Sequence[Floats | None],
    stresses: Sequence[Floats | None],
) -> list[Finding]:  # fmt: skip
    """Frames with NaN or infinity."""
    found = []
    every: dict[str, Sequence[Any]] = {
        "positions": [f.positions for f in frames], "an energy label": energies, "force labels": forces,
        "a stress label": stresses,
    }  # fmt: skip
    for what, values in every.items():
        indices = [i for i, v in enumerate(values) if v is not None and not np.isfinite(v).all()]
        if indices:
            text = f"{len(indices)} frames have {what} with NaN or infinity"
            found.append(Finding("error", text, listed(indices), "remove or relabel them"))
    return found
