"""Errors of a model on labelled frames, with bootstrap intervals over frames."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ase
import numpy as np
from numpy.typing import NDArray

from mace_lora.augment.labelers import Labeler
from mace_lora.data.labels import read_label

__all__ = ["Errors", "Predictions", "errors", "intervals", "per_element", "predict", "stress_errors"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Predictions:
    """Labels and predictions of the same frames; a label that a frame lacks is NaN.

    Attributes:
        atoms: number of atoms (frames,).
        energy_label, energy: (frames,) in eV.
        forces_label, forces: (all atoms, 3) in eV/Å.
        numbers: atomic numbers (all atoms,).
        stress_label, stress: (frames, 6) Voigt in eV/Å^3, or None where no frame has a label.
    """

    atoms: NDArray[np.int64]
    energy_label: Floats
    energy: Floats
    forces_label: Floats
    forces: Floats
    numbers: NDArray[np.int64]
    stress_label: Floats | None = None
    stress: Floats | None = None


@dataclass(frozen=True)
class Errors:
    """MAE and RMSE of the energy per atom (meV) and of the forces (meV/Å)."""

    mae_e: float
    rmse_e: float
    mae_f: float
    rmse_f: float


def predict(
    calculator: Any,
    frames: Sequence[ase.Atoms],
    energy_key: str = "REF_energy",
    forces_key: str = "REF_forces",
    stress_key: str = "REF_stress",
    progress: Any = None,
) -> Predictions:
    """Evaluate an ASE calculator on labelled frames.

    Args:
        calculator: any ASE calculator with energies and forces, or a labeler.
        frames: structures with labels in eV, eV/Å and eV/Å^3; each needs an energy or forces.
        energy_key, stress_key: keys in ``info``; a key ASE knows itself (``energy``, ``stress``) is
            also looked for in the frame's attached results.
        forces_key: key in ``arrays``, or ``forces`` of the attached results.
        progress: function that wraps an iterable, e.g. ``tqdm``.

    Raises:
        ValueError: no frames, a key of your own that no frame has, or a frame without any label or with one that
            is no number; its index is named.
    """
    if not frames:
        raise ValueError("frames: expected at least one labelled frame, got none")
    labels = [_labels(i, f, energy_key, forces_key, stress_key) for i, f in enumerate(frames)]
    for given, default, kind, column in (
        (energy_key, "REF_energy", "energy", 0), (forces_key, "REF_forces", "forces", 1),
        (stress_key, "REF_stress", "stress", 2),
    ):  # fmt: skip
        if given != default and not any(np.isfinite(row[column]).all() for row in labels):
            raise ValueError(
                f"--{kind}-key {given}: no frame has it; frame 0 has {_there(frames[0])}. Name another key, or leave "
                "the option out"
            )
    with_stress = any(np.isfinite(s).all() for _, _, s in labels)
    energies, forces, stresses = [], [], []
    items: Iterable[ase.Atoms] = progress(frames) if progress is not None else frames
    for frame, (_, _, stress) in zip(items, labels, strict=True):
        atoms = ase.Atoms(frame.numbers, positions=frame.positions, cell=frame.cell, pbc=frame.pbc)
        if isinstance(calculator, Labeler):  # charge, spin and topology belong to the frame
            atoms.info.update(frame.info)
            atoms.calc = calculator.calculator(atoms)
        else:
            atoms.calc = calculator
        energies.append(atoms.get_potential_energy())
        forces.append(atoms.get_forces())
        stresses.append(atoms.get_stress() if np.isfinite(stress).all() else np.full(6, np.nan))
    return Predictions(
        np.array([len(f) for f in frames]),
        np.array([e for e, _, _ in labels]),
        np.array(energies, dtype=float),
        np.concatenate([f for _, f, _ in labels]),
        np.concatenate(forces),
        np.concatenate([f.numbers for f in frames]),
        np.array([s for _, _, s in labels]) if with_stress else None,
        np.array(stresses) if with_stress else None,
    )


def _labels(index: int, frame: ase.Atoms, energy_key: str, forces_key: str, stress_key: str) -> tuple[Any, Any, Any]:
    """Energy, forces (atoms, 3) and stress (6,) of one frame; NaN where missing."""
    try:
        energy, forces = read_label(frame, "energy", energy_key), read_label(frame, "forces", forces_key)
        stress = read_label(frame, "stress", stress_key)
    except ValueError as err:
        raise ValueError(f"frame {index}: {err}; correct the label, or name another key") from err
    if energy is None and forces is None:
        raise ValueError(f"frame {index}: expected labels {energy_key} and {forces_key}, got {_there(frame)}")
    voigt = np.full(6, np.nan)
    if stress is not None:
        voigt = stress if stress.size == 6 else stress.reshape(3, 3)[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
    return (
        np.nan if energy is None else float(energy),
        np.full((len(frame), 3), np.nan) if forces is None else forces,
        voigt,
    )


def _there(frame: ase.Atoms) -> list[str]:
    results = frame.calc.results if frame.calc is not None else {}
    return sorted({*frame.info, *frame.arrays, *results} - {"numbers", "positions"})


def errors(p: Predictions) -> Errors:
    """Mean absolute and root-mean-square errors."""
    de = 1e3 * (p.energy - p.energy_label) / p.atoms
    df = 1e3 * (p.forces - p.forces_label)
    return Errors(_mae(de), _rmse(de), _mae(df), _rmse(df))


def _mae(x: Floats) -> float:
    return float(np.nanmean(np.abs(x))) if np.isfinite(x).any() else float("nan")


def _rmse(x: Floats) -> float:
    return float(np.sqrt(np.nanmean(x**2))) if np.isfinite(x).any() else float("nan")


def per_element(p: Predictions) -> dict[int, tuple[int, float, float]]:
    """Atomic number -> (atoms with force labels, MAE, RMSE of force components in meV/Å)."""
    df = 1e3 * (p.forces - p.forces_label)
    labelled = np.isfinite(df).all(axis=1)
    out = {}
    for z in np.unique(p.numbers):
        rows = df[labelled & (p.numbers == z)]
        if len(rows):
            out[int(z)] = (len(rows), _mae(rows), _rmse(rows))
    return out


def stress_errors(p: Predictions) -> tuple[float, float] | None:
    """MAE and RMSE of the stress components in meV/Å^3, or None without labels."""
    if p.stress is None or p.stress_label is None:
        return None
    ds = 1e3 * (p.stress - p.stress_label)
    return _mae(ds), _rmse(ds)


def intervals(p: Predictions, level: float = 0.95, resamples: int = 1000, seed: int = 0) -> dict[str, tuple[Any, Any]]:
    """Bootstrap intervals of :func:`errors`, resampling whole frames.

    Args:
        p: predictions.
        level: confidence level.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Returns:
        name of the error -> (low, high); NaN with fewer than two labelled frames. With stress labels also ``mae_s`` and
        ``rmse_s`` in meV/Å^3.
    """
    from scipy.stats import bootstrap

    de = 1e3 * (p.energy - p.energy_label) / p.atoms
    per_frame = np.split(1e3 * (p.forces - p.forces_label), np.cumsum(p.atoms)[:-1])
    parts = {
        "mae_e": (np.abs(de), np.ones_like(de)),
        "rmse_e": (de**2, np.ones_like(de)),
        "mae_f": (np.array([np.abs(f).sum() for f in per_frame]), 3.0 * p.atoms),
        "rmse_f": (np.array([(f**2).sum() for f in per_frame]), 3.0 * p.atoms),
    }
    if p.stress is not None and p.stress_label is not None:
        ds = 1e3 * (p.stress - p.stress_label)
        parts |= {
            "mae_s": (np.abs(ds).sum(axis=1), np.full(len(ds), 6.0)),
            "rmse_s": ((ds**2).sum(axis=1), np.full(len(ds), 6.0)),
        }
    out = {}
    for name, (total, count) in parts.items():
        known = np.isfinite(total)
        if known.sum() < 2:
            out[name] = (float("nan"), float("nan"))
            continue
        result = bootstrap(
            (total[known], count[known]), _ratio, paired=True, vectorized=True, n_resamples=resamples,
            confidence_level=level, method="percentile", rng=np.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
        low, high = float(result.low), float(result.high)
        out[name] = (low**0.5, high**0.5) if name.startswith("rmse") else (low, high)
    assert out.keys() - {"mae_s", "rmse_s"} == asdict(errors(p)).keys()
    return out


def _ratio(total: Any, count: Any, axis: int = -1) -> Any:
    return total.sum(axis=axis) / count.sum(axis=axis)
