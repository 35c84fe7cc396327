"""Data that comes with the package: a small base model and a small DFT set, both made by recipes."""

from __future__ import annotations

from pathlib import Path

__all__ = ["BASE_FILES", "embedded_dft_path"]

_FOLDER = Path(__file__).parent
BASE_FILES = (_FOLDER / "organic_small.safetensors", _FOLDER / "organic_small.json")


def embedded_dft_path(molecule: str = "glycolamide") -> Path:
    """PBE0/def2-SVP frames of one molecule (extxyz, gzip): 50 train, 50 valid, the rest test.

    Energies in eV (``REF_energy``), forces in eV/Å (``REF_forces``), ``split`` in the frame info.

    Args:
        molecule: ``glycolamide`` (200 frames), ``2_fluoroethanol`` or ``thioacetamide`` (152 each).

    Raises:
        ValueError: another molecule.
    """
    known = sorted(p.name.removesuffix("_pbe0.extxyz.gz") for p in _FOLDER.glob("*_pbe0.extxyz.gz"))
    if molecule not in known:
        raise ValueError(f"molecule: expected one of {', '.join(known)}, got {molecule!r}")
    return _FOLDER / f"{molecule}_pbe0.extxyz.gz"
