"""Will classical pre-training help? What a classical potential knows about a set of quantum frames."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ase
import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray

from mace_lora.augment.perturb import bare
from mace_lora.lora.energies import solve_offsets

__all__ = ["Agreement", "advice", "agreement", "with_labels"]

Floats = NDArray[np.float64]
LIKELY, POSSIBLE = 0.8, 0.5
FEW, MANY = 100, 400  # quantum frames: a middling potential still helps up to the one, a good one up to the other
CLEAR = 1.15  # ratio of force errors: smaller ones of two runs of one seed say little
DEFAULT_KEYS = ("REF_energy", "REF_forces")


@dataclass(frozen=True)
class Agreement:
    """Classical against quantum labels of the same frames.

    Attributes:
        frames: number of frames.
        correlation, slope: of all force components, quantum against classical.
        rest: what is left of the quantum forces after the scaled classical ones, sqrt(1 - correlation^2).
        elements: symbol -> (correlation, slope).
        energy_rms: root mean square quantum energy about its mean composition energies, meV/atom.
        energy_rest: the same after the classical energies and the elements' offsets are taken off, meV/atom.
    """

    frames: int
    correlation: float
    slope: float
    rest: float
    elements: dict[str, tuple[float, float]]
    energy_rms: float
    energy_rest: float


def agreement(
    frames: Sequence[ase.Atoms], classical: Callable[[ase.Atoms], Any], energy_key: str = "REF_energy",
    forces_key: str = "REF_forces", progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Agreement:  # fmt: skip
    """Compare the labels of quantum frames with a classical potential's.

    Args:
        frames: labelled frames (eV, eV/Å).
        classical: gives an object with ``energy`` (eV) and ``forces`` (atoms, 3) in eV/Å for a frame.
        energy_key, forces_key: of the quantum labels.
        progress: wraps the frames.

    Raises:
        ValueError: no frames, a frame without labels, or labels that are not finite.
    """
    frames = with_labels(frames, energy_key, forces_key)
    found = [classical(atoms) for atoms in progress(frames)]
    for index, label in enumerate(found):
        if not (np.isfinite(label.energy) and np.isfinite(label.forces).all()):
            raise ValueError(f"frame {index}: the classical potential gives NaN or infinity; remove the frame")
    quantum = np.concatenate([a.arrays[forces_key] for a in frames])  # (all atoms, 3)
    mine = np.concatenate([f.forces for f in found])
    numbers = np.concatenate([a.numbers for a in frames])
    correlation, slope = _line(mine, quantum)
    elements = {chemical_symbols[int(z)]: _line(mine[numbers == z], quantum[numbers == z]) for z in np.unique(numbers)}
    zs = np.unique(numbers)
    counts = np.array([[(a.numbers == z).sum() for z in zs] for a in frames], float)
    energies = np.array([float(a.info[energy_key]) for a in frames])
    parts = [_about_offsets(counts, e) for e in (energies, energies - [f.energy for f in found])]
    return Agreement(
        len(frames), correlation, slope, float(np.sqrt(max(0.0, 1 - correlation**2))), elements, parts[0], parts[1]
    )


def with_labels(
    frames: Sequence[ase.Atoms], energy_key: str = DEFAULT_KEYS[0], forces_key: str = DEFAULT_KEYS[1]
) -> list[ase.Atoms]:  # fmt: skip
    """Copies of frames with nothing but their labels, under the keys that were asked for.

    Args:
        frames: from any file; extxyz's standard energy and forces, which ASE takes for results, are found under the
            keys energy and forces, and where the default keys are absent.
        energy_key, forces_key: of the labels.

    Raises:
        ValueError: no frames, a frame without labels, or labels that are not finite.
    """
    if not frames:
        raise ValueError("frames: expected at least one labelled frame, got none")
    out = []
    for index, atoms in enumerate(frames):
        results = atoms.calc.results if atoms.calc is not None else {}
        energy = atoms.info.get(energy_key, results.get("energy") if energy_key in ("energy", "REF_energy") else None)
        forces = atoms.arrays.get(forces_key, results.get("forces") if forces_key in ("forces", "REF_forces") else None)
        if energy is None or forces is None:
            there = sorted({*atoms.info, *atoms.arrays, *results} - {"numbers", "positions"})
            raise ValueError(
                f"frame {index}: expected labels {energy_key} and {forces_key}, got {', '.join(there) or 'none'}; name "
                "the right keys"
            )
        frame, values = bare(atoms), np.asarray(forces, float)
        if values.shape != (len(atoms), 3):
            raise ValueError(f"frame {index}: {forces_key}: expected shape {(len(atoms), 3)}, got {values.shape}")
        if not (np.isfinite(float(energy)) and np.isfinite(values).all()):
            raise ValueError(
                f"frame {index}: expected finite labels {energy_key} and {forces_key}, got NaN or infinity; remove the "
                "frame, or label it anew"
            )
        frame.info[energy_key], frame.arrays[forces_key] = float(energy), values
        out.append(frame)
    return out


def _line(x: Floats, y: Floats) -> tuple[float, float]:
    """Correlation about zero, and slope through it."""
    x, y = x.reshape(-1), y.reshape(-1)
    xx, yy, xy = float(x @ x), float(y @ y), float(x @ y)
    return (xy / np.sqrt(xx * yy) if xx * yy > 0 else 0.0), (xy / xx if xx > 0 else 0.0)


def _about_offsets(counts: Floats, energies: Floats) -> float:
    """Root mean square of energies after least-squares offsets of the elements, meV/atom."""
    rest = energies - counts @ solve_offsets(counts, energies)
    return 1e3 * float(np.sqrt(np.mean((rest / counts.sum(1)) ** 2)))


def advice(a: Agreement, available: int | None = None, gain: float | None = None) -> str:
    """One paragraph for the user.

    Args:
        a: what was found.
        available: quantum frames that there are to train on; default those compared.
        gain: force error from scratch over that with pre-training in a pilot, which decides where one ran.
    """
    count = a.frames if available is None else available
    shown = f"force correlation {a.correlation:.2f}, slope {a.slope:.2f}, {count} quantum frames"
    if gain is not None:
        text = _by_pilot(gain, count, shown)
    elif a.correlation <= -POSSIBLE:
        return (
            f"The forces of the two levels are opposite: {shown}. One of them has the wrong sign (energy gradients "
            "given as forces?); correct it, and check again."
        )
    else:
        text = _by_correlation(a, count, shown)
    odd = [s for s, (c, _) in a.elements.items() if c < 0.7 * a.correlation]
    if odd and a.correlation >= POSSIBLE:
        text += f" The potential is worst for {', '.join(odd)}."
    if abs(a.slope) > 3 or (0 < abs(a.slope) < 1 / 3 and a.correlation > POSSIBLE):
        text += " The slope is far from one: check the units of both labels (eV, eV/Å)."
    return text


def _by_pilot(gain: float, count: int, shown: str) -> str:
    if gain > CLEAR and count > MANY:
        return (
            f"Classical pre-training may do little: in the pilot, of at most 50 quantum frames, its force error was "
            f"{gain:.2f} times lower, but with many hundreds of frames the gain fades ({shown})."
        )
    if gain > CLEAR:
        return f"Classical pre-training helps: in the pilot its force error was {gain:.2f} times lower ({shown})."
    if gain > 1 / CLEAR:
        return (
            f"Classical pre-training makes no clear difference: the force errors of the pilot's two small models, one "
            f"run each, are as 1 to {gain:.2f} ({shown}). A gain of your own model, if there is one, is small."
        )
    return f"Do without classical pre-training: in the pilot it raised the force error {1 / gain:.2f} times ({shown})."


def _by_correlation(a: Agreement, count: int, shown: str) -> str:
    if a.correlation >= LIKELY and count <= MANY:
        return (
            f"Classical pre-training is likely to help: {shown}. A perfectly pre-trained model would start with "
            f"{100 * a.rest:.0f} % of the force error of a new one. Expect the gain to be largest at tens of quantum "
            "frames and to fade at many hundreds."
        )
    if a.correlation >= LIKELY or (a.correlation >= POSSIBLE and count <= FEW):
        why = (
            "the potential is good, but with so many quantum frames the gain fades" if a.correlation >= LIKELY
            else "the potential is middling, but the quantum frames are few"
        )  # fmt: skip
        return (
            f"Classical pre-training may help: {shown}; {why}. Compare it with a training from scratch (--pilot DIR) "
            "before paying for many classical labels."
        )
    if a.correlation >= POSSIBLE:
        return (
            f"Classical pre-training is unlikely to help: {shown}. The potential is middling, and so many quantum "
            "frames say more than it does. --pilot DIR tells for certain."
        )
    return (
        f"Classical pre-training is unlikely to help: {shown}. Another classical potential, or a machine-learned "
        "one (equitune label --with mace:FILE), will serve better."
    )
