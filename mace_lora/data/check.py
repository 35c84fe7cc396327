"""Validation of labelled frames: keys, units, duplicates, consistency, outliers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import ase
import numpy as np
from numpy.typing import NDArray

from .consistency import energy_force_slope, units_of_slope
from .finding import Finding, listed
from .labels import finite, keys, read_labels, state
from .magnitude import bond_stiffness, energy_unit, force_unit, is_balanced, is_flat

__all__ = ["Finding", "check_frames", "require_sound"]

Floats = NDArray[np.float64]
_NEAR = (0.7, 1.4)


def check_frames(
    frames: Sequence[ase.Atoms], energy_key: str = "REF_energy", forces_key: str = "REF_forces",
    stress_key: str = "REF_stress",
) -> list[Finding]:  # fmt: skip
    """Everything that is suspicious about labelled frames.

    Args:
        frames: all frames, Å.
        energy_key: in ``info``, eV.
        forces_key: in ``arrays``, eV/Å.
        stress_key: in ``info``, eV/Å^3; frames without stress are fine.

    Returns:
        findings, errors first.
    """
    if not frames:
        return [Finding("error", "there are no frames", remedy="check the file")]
    scalars, found = read_labels(frames, "energy", energy_key)
    energies = [None if e is None else float(e) for e in scalars]
    forces, unusable = read_labels(frames, "forces", forces_key)
    stresses, wrong = read_labels(frames, "stress", stress_key)
    found += unusable + wrong + keys(frames, energy_key, forces_key)
    found += finite(frames, energies, forces, stresses)
    usable = [i for i, f in enumerate(frames) if np.isfinite(f.positions).all()]
    found += _geometry(frames, usable)
    found += _repeated(frames, energies, usable)
    found += _energies(frames, energies)
    found += _forces(frames, forces)
    found += _magnitudes(frames, energies, forces)
    found += _consistency(frames, energies, forces)
    order = {"error": 0, "warning": 1, "info": 2}
    return sorted(found, key=lambda f: order[f.severity])


def require_sound(
    frames: str | Path | Sequence[ase.Atoms], energy_key: str = "REF_energy", forces_key: str = "REF_forces",
    say: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Stop before anything is trained on frames with errors; what is only suspicious is said.

    Args:
        frames: a file that ASE reads, or frames.
        energy_key, forces_key: as for :func:`check_frames`.
        say: gets a line for every warning.

    Raises:
        ValueError: the first error, its frames and the remedy; or the file cannot be read.
        FileNotFoundError: no such file.
    """
    from mace_lora.evaluate.reading import read_frames

    name = str(frames) if isinstance(frames, str | Path) else "frames"
    read = read_frames(Path(frames)) if isinstance(frames, str | Path) else frames
    found = check_frames(read, energy_key, forces_key)
    for f in found:
        which = f"; frames {', '.join(map(str, f.frames))}" if f.frames else ""
        if f.severity == "error":
            raise ValueError(f"{name}: {f.what}{which}; {f.remedy}")
        if f.severity == "warning":
            say(f"{name}: warning: {f.what}{which}; {f.remedy}")


def _geometry(frames: Sequence[ase.Atoms], usable: list[int]) -> list[Finding]:
    from mace_lora.augment.perturb import keep_sound

    found = []
    flat = [i for i in usable if is_flat(frames[i])]
    if flat:
        text = f"{len(flat)} frames are periodic and have no cell"
        found.append(Finding("error", text, listed(flat), "set the cell"))
    boxed = [i for i in usable if not frames[i].pbc.any() and abs(np.linalg.det(np.array(frames[i].cell))) > 1e-3]
    if boxed:
        found.append(Finding("warning", f"{len(boxed)} frames have a cell but no periodic boundaries", listed(boxed),
                             "set pbc='T T T' if they are periodic"))  # fmt: skip
    mixed = {tuple(frames[i].pbc.tolist()) for i in usable}
    if len(mixed) > 1:
        found.append(Finding("info", f"frames of different periodicity: {sorted(mixed)}"))
    close = [i for i in usable if i not in flat and not list(keep_sound([frames[i]]))]
    if close:
        text = f"{len(close)} frames have atoms closer than half the sum of their covalent radii"
        found.append(Finding("warning", text, listed(close), "look at them; positions in another unit than Å?"))
    return found


def _repeated(frames: Sequence[ase.Atoms], energies: list[float | None], usable: list[int]) -> list[Finding]:
    seen: dict[bytes, int] = {}
    repeats, conflicts = [], []
    for i in usable:
        atoms = frames[i]
        parts = [
            atoms.numbers.tobytes(),
            np.round(atoms.positions, 6).tobytes(),
            np.round(np.array(atoms.cell), 6).tobytes(),
            state(atoms).encode(),
            str(atoms.info.get("head", "")).encode(),  # MACE's name of a level of theory
        ]
        first = seen.setdefault(hashlib.sha256(b"|".join(parts)).digest(), i)
        if first != i:
            repeats.append(i)
            a, b = energies[first], energies[i]
            if a is not None and b is not None and abs(a - b) > 1e-3 * len(atoms):
                conflicts.append(i)
    found = []
    if repeats:
        found.append(Finding("warning", f"{len(repeats)} frames repeat an earlier one", listed(repeats),
                             "remove them: they leak between training and test sets"))  # fmt: skip
    if conflicts:
        found.append(Finding("error", f"{len(conflicts)} of these have another energy label than the frame they repeat",
                             listed(conflicts), "labels of different methods in one file?"))  # fmt: skip
    return found


def _outliers(values: Floats, factor: float) -> NDArray[np.int64]:
    """Indices further from the median than ``factor`` robust standard deviations."""
    middle = np.median(values)
    width = 1.4826 * np.median(np.abs(values - middle))
    return np.flatnonzero(np.abs(values - middle) > factor * max(width, 1e-12))


def _energies(frames: Sequence[ase.Atoms], energies: list[float | None]) -> list[Finding]:
    index = [i for i, e in enumerate(energies) if e is not None and np.isfinite(e)]
    if len(index) < 10:
        return []
    elements = sorted({int(z) for i in index for z in frames[i].numbers})
    table = np.array([[(frames[i].numbers == z).sum() for z in elements] for i in index], float)
    values, atoms = np.array([energies[i] for i in index], float), np.array([len(frames[i]) for i in index])
    residual = (values - table @ np.linalg.lstsq(table, values, rcond=None)[0]) / atoms
    found = [Finding("info", f"energy per atom {np.median(values / atoms):.4g} eV (median); {residual.std() * 1e3:.4g} "
                     "meV/atom spread around the best sum of element energies")]  # fmt: skip
    if residual.std() > 5.0:
        text = f"energies spread by {residual.std():.3g} eV/atom around the best sum of element energies"
        found.append(Finding("warning", text, remedy="kcal/mol instead of eV, or several methods in one file?"))
    far = [i for i in _outliers(residual, 10.0) if abs(residual[i]) > 0.05]
    if far:
        found.append(Finding("warning", f"energies of {len(far)} frames are outliers (up to "
                             f"{np.abs(residual[far]).max():.3g} eV/atom off)", listed([index[i] for i in far]),
                             "check that these calculations converged"))  # fmt: skip
    return found


def _forces(frames: Sequence[ase.Atoms], forces: list[Floats | None]) -> list[Finding]:
    good = {
        i: f for i, f in enumerate(forces) if f is not None and f.shape == (len(frames[i]), 3) and np.isfinite(f).all()
    }
    if not good:
        return []
    index = list(good)
    largest = np.array([np.linalg.norm(f, axis=1).max(initial=0.0) for f in good.values()])
    several = [f for i, f in good.items() if len(frames[i]) > 1]  # symmetry leaves no force on one atom
    rms = float(np.sqrt(np.mean(np.concatenate([f.reshape(-1) for f in several or good.values()]) ** 2)))
    found = [Finding("info", f"forces: rms {rms:.4g} eV/Å per component, largest {largest.max():.4g} eV/Å")]
    if several and rms < 1e-6:
        crystals = all(is_balanced(frames[i]) for i in good)
        remedy = "right for perfect crystals only" if crystals else "check how they were written"
        found.append(Finding("warning" if crystals else "error", "all force labels are zero", remedy=remedy))
    zero = [index[i] for i in np.flatnonzero(largest == 0.0) if len(frames[index[i]]) > 1]
    if zero and rms >= 1e-6:
        found.append(Finding("warning", f"{len(zero)} frames have force labels that are exactly zero", listed(zero),
                             "missing forces written as zeros?"))  # fmt: skip
    far = [i for i in _outliers(np.log(largest + 1e-3), 8.0) if largest[i] > 10 * rms]
    if far:
        text = f"forces of {len(far)} frames are outliers (up to {largest[far].max():.3g} eV/Å)"
        found.append(Finding("warning", text, listed([index[i] for i in far]), "look at these structures"))
    net = np.array([np.linalg.norm(f.sum(0)) / len(f) for f in good.values()])
    pushed = np.flatnonzero(net > max(0.02 * rms, 1e-4))
    if len(pushed) > 0.05 * len(index):
        text = f"forces of {len(pushed)} frames do not add up to zero (up to {net.max():.3g} eV/Å per atom)"
        which = listed([index[i] for i in pushed])
        found.append(Finding("warning", text, which, "noisy forces, an external field, or a subset of the atoms?"))
    return found


def _magnitudes(
    frames: Sequence[ase.Atoms], energies: list[float | None], forces: list[Floats | None]
) -> list[Finding]:
    """Units that show in the values alone, whatever the order of the frames."""
    found = []
    unit, sure = energy_unit(frames, energies)
    if unit not in ("eV", ""):
        text = f"energies are those of the free atoms in {unit}, all electrons counted; expected eV"
        remedy = "convert the energies to eV, and see to the forces as well"
        remedy += "" if sure else "; unless they are of valence electrons alone, which one composition cannot show"
        found.append(Finding("error" if sure else "warning", text, remedy=remedy))
    stiffness, correlation, bonds = bond_stiffness(frames, forces)
    if bonds >= 30 and abs(correlation) > 0.8:
        text = f"bonds to hydrogen push back with {stiffness:.3g} eV/Å^2 ({bonds} bonds, correlation {correlation:.2f})"
        unit = force_unit(stiffness)
        remedy = "the sign is wrong (gradients?)" if stiffness < 0 else f"it looks like {unit}; expected eV/Å"
        found.append(Finding("info", text) if unit == "eV/Å" else Finding("error", f"{text}; 20 to 50 is usual",
                                                                          remedy=remedy))  # fmt: skip
    return found


def _consistency(
    frames: Sequence[ase.Atoms], energies: list[float | None], forces: list[Floats | None]
) -> list[Finding]:
    good = [f if f is not None and f.shape == (len(a), 3) and np.isfinite(f).all() else None
            for a, f in zip(frames, forces, strict=True)]  # fmt: skip
    finite = [e if e is not None and np.isfinite(e) else None for e in energies]
    slope, correlation, pairs = energy_force_slope(frames, finite, good)
    if not np.isfinite(slope) or abs(correlation) < 0.8:
        return []
    text = f"energies follow the forces with slope {slope:.4g} (correlation {correlation:.3f}, {pairs} pairs of frames)"
    if abs(slope - 1.0) < 0.1:
        return [Finding("info", text)]
    if _NEAR[0] < slope < _NEAR[1]:  # no mix-up of units is this small, but hot frames are this inexact
        return [Finding("warning", f"{text}; expected 1", remedy="frames far apart (hot dynamics) give this; "
                        "otherwise energies and forces are of two methods or settings")]  # fmt: skip
    return [Finding("error", f"{text}; expected 1", remedy=units_of_slope(slope))]
