"""Data that comes with the package: a small base model and a small DFT set, both made by recipes."""

from __future__ import annotations

from pathlib import Path

__all__ = ["embedded_dft_path"]


def embedded_dft_path() -> Path:
    """200 PBE0/def2-SVP frames of glycolamide (extxyz, gzip): 50 train, 50 valid, 100 test.

    Energies in eV (``REF_energy``), forces in eV/Å (``REF_forces``), ``split`` in the frame info.
    """
    return Path(__file__).parent / "glycolamide_pbe0.extxyz.gz"
