"""Labels of the frames of both stages, as NequIP reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import ase
import numpy as np

from mace_lora.autotune.levels import Source
from mace_lora.mace_plugin.labels import MAX_FORCE, check_frame, label_of

__all__ = ["check_labels", "energy_key", "energy_of"]

_STANDARD = {"total_energy": "energy", "forces": "forces"}  # field of NequIP: ASE's own name, which is always read


def energy_of(atoms: ase.Atoms, data: Mapping[str, Any]) -> float | None:
    """Energy label of a frame in eV, or None.

    Args:
        atoms: the frame.
        data: the config's ``data``.
    """
    value = _read(atoms, data).get("total_energy")
    return None if value is None else float(np.asarray(value).reshape(-1)[0])


def energy_key(source: Source, data: Mapping[str, Any]) -> str:
    """Key under which a file has its energies.

    Raises:
        ValueError: it has none.
    """
    keys = _keys("total_energy", data)
    found = next((k for k in keys if any(label_of(a, "energy", k) is not None for a in source.frames)), None)
    if found is None:
        raise ValueError(
            f"{source.setting}: {source.path} has no energies under {' or '.join(keys)} of which offsets could be taken"
        )
    return found


def check_labels(source: Source, config: Mapping[str, Any], classical: bool) -> None:
    """Refuse labels that would make all weights NaN after hours, that are not there, or that are two.

    Args:
        source: frames to learn from.
        config: composed; its loss says which labels are needed, and whether some may be missing.
        classical: among many hot frames of a force field there is a close contact, so that forces may be large.

    Raises:
        ValueError: the file, its frame and what is wrong.
    """
    data, loss = config.get("data") or {}, (config.get("training_module") or {}).get("loss") or {}
    partial = '"ignore_nan": true' in json.dumps(loss)
    simple = str(loss.get("_target_", "")).endswith(("EnergyForceLoss", "EnergyForceStressLoss"))
    weights = loss.get("coeffs") or (dict.fromkeys(_STANDARD, 1.0) if simple else {})  # of others nothing is known
    needed = {k for k in _STANDARD if weights.get(k)}
    limit = float("inf") if classical else MAX_FORCE
    for index, atoms in enumerate(source.frames):
        where = f"{source.setting}: {source.path} frame {index} ({atoms.get_chemical_formula()})"
        for field in _STANDARD:
            _refuse_two(atoms, field, data, where)
        labels = _read(atoms, data)
        probe = ase.Atoms(atoms.numbers, positions=atoms.positions)
        if "total_energy" in labels and not (partial and np.isnan(labels["total_energy"]).any()):
            probe.info["energy"] = float(np.asarray(labels["total_energy"]).reshape(-1)[0])
        if "forces" in labels and not (partial and np.isnan(labels["forces"]).any()):
            probe.arrays["forces"] = np.asarray(labels["forces"])
        check_frame(probe, "energy", "forces", where, limit)
        needed -= {*labels}
    if needed:
        keys = "; ".join(f"{field} ({', '.join(_keys(field, data))})" for field in sorted(needed))
        raise ValueError(
            f"{source.setting}: {source.path} lacks labels that the loss needs: {keys}; data.key_mapping gives "
            "NequIP's names for the keys of the files"
        )


def _keys(field: str, data: Mapping[str, Any]) -> list[str]:
    """Keys of the files that NequIP takes for a field."""
    mapped = [k for k, v in (data.get("key_mapping") or {}).items() if v == field]
    return [*mapped, *({_STANDARD[field]} - {*mapped})]


def _read(atoms: ase.Atoms, data: Mapping[str, Any]) -> dict[str, np.ndarray]:
    from nequip.data import from_ase

    arguments = {k: data.get(k) for k in ("key_mapping", "include_keys", "exclude_keys")}
    found = from_ase(atoms, **arguments)
    return {k: np.asarray(found[k]) for k in _STANDARD if k in found}


def _refuse_two(atoms: ase.Atoms, field: str, data: Mapping[str, Any], where: str) -> None:
    """NequIP takes a calculator's label before that of ``info``, and would train on it without a word."""
    results = atoms.calc.results if atoms.calc is not None else {}
    values = {
        key: np.asarray(place[key], float)
        for place in (atoms.arrays, atoms.info, results) for key in _keys(field, data)
        if key in place and key not in (data.get("exclude_keys") or ())
    }  # fmt: skip
    first, *others = values.values() or [np.zeros(0)]
    for other in others:
        if other.shape != first.shape or not np.allclose(other, first, atol=1e-4, equal_nan=True):
            raise ValueError(
                f"{where}: two different labels for {field}: {' and '.join(values)}; remove one of them, or leave it "
                "out by data.exclude_keys"
            )
