"""Errors on quantum test frames, and speed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import ase
import ase.io
import numpy as np

from mace_lora.atomic import atomic_path, write_text
from mace_lora.augment import open_labeler
from mace_lora.augment.perturb import bare
from mace_lora.evaluate.metrics import Predictions, errors, intervals, predict
from mace_lora.lora.energies import solve_offsets

from .checks import is_atom

__all__ = ["evaluate_model", "measure_speed", "validate"]

_TIMED = 15


_FITTED = 200  # training frames that the energy offsets are fitted to


def evaluate_model(potential: str, test: Path, train: Path, place: Path) -> None:
    """Write ``errors.json`` and ``predictions.npz``.

    Energies are judged as they are, and with the constant offsets of the elements removed that are left on the quantum
    training frames.

    Args:
        potential: as for labelling.
        test, train: quantum frames (REF_energy in eV, REF_forces in eV/Å).
        place: folder to write to.
    """
    found, refit, frames = _errors(potential, test, train)
    low_high: dict[str, Any] = intervals(found)
    content = {
        "errors": vars(errors(found)), "intervals": low_high, "mae_e_refit": refit,
        "frames": len(frames), "atoms": len(frames[0]),
    }  # fmt: skip
    _save(found, place)
    write_text(place / "errors.json", json.dumps(content, indent=1) + "\n")


def _errors(potential: str, test: Path, train: Path) -> tuple[Predictions, float, list[ase.Atoms]]:
    """Predictions on test frames, energy MAE (meV/atom) without the offsets that are left on training frames."""
    labeler = open_labeler(potential)
    known, frames = ([a for a in ase.io.read(f, ":") if not is_atom(a)] for f in (train, test))
    known = [known[i] for i in np.unique(np.linspace(0, len(known) - 1, min(_FITTED, len(known))).astype(int))]
    found, fitted = predict(labeler, frames), predict(labeler, known)
    zs = sorted({int(z) for a in [*known, *frames] for z in a.numbers})
    has = np.isfinite(fitted.energy_label)
    left = (fitted.energy_label - fitted.energy)[has]
    offsets = solve_offsets(_counts(known, zs)[has], left) if has.any() else np.zeros(len(zs))
    shifted = 1e3 * np.abs(found.energy + _counts(frames, zs) @ offsets - found.energy_label) / found.atoms
    return found, float(np.nanmean(shifted)) if np.isfinite(shifted).any() else float("nan"), frames


def _counts(frames: list[ase.Atoms], zs: list[int]) -> np.ndarray:
    """(frames, elements) numbers of atoms."""
    return np.array([[(a.numbers == z).sum() for z in zs] for a in frames], float)


def validate(potential: str, data: tuple[Path, Path], place: Path) -> None:
    """Write ``valid.json``: MAE of energy (meV/atom; also without constant offsets) and forces (meV/Å).

    Args:
        potential: the trained model.
        data: its training frames, which offsets are fitted to, and its validation frames.
        place: folder to write to.
    """
    predictions, refit, frames = _errors(potential, data[1], data[0])
    row = errors(predictions)
    found: dict[str, float | None] = {"mae_e": row.mae_e, "mae_e_refit": refit, "mae_f": row.mae_f}
    labelled = {"mae_e": "REF_energy", "mae_e_refit": "REF_energy", "mae_f": "REF_forces"}
    for key, label in labelled.items():
        if not any(label in a.info or label in a.arrays for a in frames):
            found[key] = None
    write_text(place / "valid.json", json.dumps(found) + "\n")


def measure_speed(potentials: Mapping[str, str], test: Path, place: Path) -> None:
    """Write ``speed.json``: median milliseconds of energy and forces of one frame, as dynamics needs them.

    Args:
        potentials: name -> potential, as for labelling; they take turns, so that a busy machine is fair to all.
        test: frames; the first is used.
        place: folder to write to.
    """
    atoms = next(a for a in ase.io.iread(test, ":") if not is_atom(a))
    moving = {name: bare(atoms) for name in potentials}
    for name, potential in potentials.items():
        moving[name].calc = open_labeler(potential).calculator(moving[name])
    times: dict[str, list[float]] = {name: [] for name in potentials}
    for step in range(_TIMED + 3):
        for name, frame in moving.items():
            frame.positions[0, 0] += 1e-3 * (-1) ** step
            start = time.perf_counter()
            frame.get_forces()
            times[name].append(1e3 * (time.perf_counter() - start))
    write_text(place / "speed.json", json.dumps({n: median(t[3:]) for n, t in times.items()}) + "\n")


def _save(p: Predictions, place: Path) -> None:
    """For the parity plot."""
    with atomic_path(place / "predictions.npz") as temporary, temporary.open("wb") as handle:
        np.savez(
            handle, atoms=p.atoms, energy_label=p.energy_label, energy=p.energy, forces_label=p.forces_label,
            forces=p.forces, numbers=p.numbers,
        )  # fmt: skip
