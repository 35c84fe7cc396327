"""equitune transfer-check: what a classical potential knows about quantum frames."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ase.io
import numpy as np
import pytest
from ase import Atoms

from mace_lora.autotune.advice import advice, agreement

PROGRAM = Path(sys.executable).parent / "equitune"


def frames(count: int = 30) -> list[Atoms]:
    rng, out = np.random.default_rng(0), []
    for n in range(count):
        atoms = Atoms("COH" if n % 2 else "COHH", positions=rng.normal(size=(4 - n % 2, 3)))
        atoms.arrays["REF_forces"] = rng.normal(size=(len(atoms), 3))
        atoms.info["REF_energy"] = float(rng.normal()) - 30.0 * len(atoms)
        out.append(atoms)
    return out


def classical(noise: float, factor: float = 0.5, bad: int = 0):
    """The quantum forces, smaller and noisy; atoms of one element may be wrong altogether."""
    rng = np.random.default_rng(1)

    def label(atoms: Atoms) -> SimpleNamespace:
        forces = factor * atoms.arrays["REF_forces"] + noise * rng.normal(size=(len(atoms), 3))
        forces[atoms.numbers == bad] = rng.normal(size=forces[atoms.numbers == bad].shape)
        return SimpleNamespace(energy=atoms.info["REF_energy"] + 29.0 * len(atoms), forces=forces)

    return label


def test_slope_correlation_and_energies():
    found = agreement(frames(), classical(0.0))
    assert found.correlation == pytest.approx(1.0) and found.slope == pytest.approx(2.0)
    assert found.rest == pytest.approx(0.0, abs=1e-6)
    assert found.energy_rest == pytest.approx(0.0, abs=1e-6) and found.energy_rms > 10
    assert set(found.elements) == {"H", "C", "O"}
    noisy = agreement(frames(), classical(0.5))
    assert noisy.correlation == pytest.approx(0.5**0.5, abs=0.06)
    assert noisy.rest == pytest.approx((1 - noisy.correlation**2) ** 0.5)


def test_advice_follows_the_correlation():
    assert "likely to help" in advice(agreement(frames(), classical(0.1)))
    assert "may help at few quantum frames" in advice(agreement(frames(), classical(0.5)))
    assert "is unlikely to help" in advice(agreement(frames(), classical(3.0)))
    assert "worst for O" in advice(agreement(frames(), classical(0.05, bad=8)))
    assert "check the units" in advice(agreement(frames(), classical(0.0, factor=0.02)))


def test_bad_frames():
    with pytest.raises(ValueError, match="frames: expected at least one labelled frame"):
        agreement([], classical(0.0))
    bare = [Atoms("H")]
    with pytest.raises(ValueError, match="frame 0: expected labels REF_energy and REF_forces"):
        agreement(bare, classical(0.0))


def test_real_force_field_on_real_labels():
    """UFF and MMFF94 on PBE0 frames of glycolamide: MMFF94 knows more."""
    pytest.importorskip("rdkit")
    import gzip

    from mace_lora import embedded_dft_path
    from mace_lora.augment import open_labeler

    with gzip.open(embedded_dft_path(), "rt") as handle:
        found = ase.io.read(handle, "0:20", format="extxyz")
    uff, mmff = (agreement(found, open_labeler(n).label) for n in ("uff", "mmff94"))
    assert 0.5 < uff.correlation < mmff.correlation < 1.0
    assert mmff.correlation > 0.8 and "likely to help" in advice(mmff)
    assert mmff.energy_rest < mmff.energy_rms


def test_command(tmp_path):
    pytest.importorskip("rdkit")
    import gzip

    from mace_lora import embedded_dft_path

    with gzip.open(embedded_dft_path(), "rt") as handle:
        ase.io.write(tmp_path / "q.xyz", ase.io.read(handle, "0:10", format="extxyz"), write_results=False)
    run = [PROGRAM, "transfer-check", tmp_path / "q.xyz", "--with", "mmff94"]
    shown = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert "Classical pre-training is likely to help" in " ".join(shown.split())
    content = json.loads(subprocess.run([*run, "--json"], capture_output=True, text=True, check=True).stdout)
    assert content["frames"] == 10 and content["correlation"] > 0.8
    bad = subprocess.run([*run, "-n", "0"], capture_output=True, text=True)
    assert bad.returncode == 2 and "--count: expected at least 1, got 0" in bad.stderr
