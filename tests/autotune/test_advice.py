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

from mace_lora.autotune.advice import advice, agreement, with_labels

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
    assert "may help" in advice(agreement(frames(), classical(0.5)))
    assert "is unlikely to help" in advice(agreement(frames(), classical(3.0)))
    assert "worst for O" in advice(agreement(frames(), classical(0.05, bad=8)))
    assert "check the units" in advice(agreement(frames(), classical(0.0, factor=0.02)))


def test_advice_depends_on_the_number_of_frames():
    good, middling = (agreement(frames(), classical(noise)) for noise in (0.1, 0.5))
    assert "likely to help" in advice(good, 400) and "may help" in advice(good, 401)
    assert "the gain fades" in advice(good, 401) and "the quantum frames are few" in advice(middling, 100)
    assert "is unlikely to help" in advice(middling, 101) and "101 quantum frames" in advice(middling, 101)


def test_a_pilot_decides():
    good, bad = (agreement(frames(), classical(noise)) for noise in (0.1, 3.0))
    assert "Do without classical pre-training: in the pilot it raised the force error 2.00" in advice(good, gain=0.5)
    assert "makes no clear difference: the force errors of the pilot's two" in advice(good, gain=1.12)
    assert "helps: in the pilot its force error was 1.50 times lower" in advice(bad, gain=1.5)
    assert "likely to help" not in advice(bad, gain=1.5)
    assert "may do little: in the pilot, of at most 50 quantum frames" in advice(bad, 5000, gain=1.5)


def test_gradients_given_as_forces():
    text = advice(agreement(frames(), classical(0.1, factor=-1.0)))
    assert "opposite: force correlation -" in text and "wrong sign (energy gradients given as forces?)" in text


def test_standard_labels_are_found(tmp_path):
    """Energy and forces of standard extxyz are ASE's results after reading."""
    own = frames()
    for atoms in own:
        atoms.info["energy"], atoms.arrays["forces"] = atoms.info.pop("REF_energy"), atoms.arrays.pop("REF_forces")
    ase.io.write(tmp_path / "q.xyz", own, format="extxyz")
    read = ase.io.read(tmp_path / "q.xyz", ":")
    for keys in ((), ("energy", "forces")):
        found = with_labels(read, *keys)
        e, f = keys or ("REF_energy", "REF_forces")
        assert [a.info[e] for a in found] == pytest.approx([a.get_potential_energy() for a in read])
        np.testing.assert_allclose(found[0].arrays[f], read[0].get_forces())
    with pytest.raises(ValueError, match="frame 0: expected labels dft and forces, got energy, forces; name the right"):
        with_labels(read, "dft", "forces")


def test_labels_that_are_not_finite():
    bad = frames(3)
    bad[1].arrays["REF_forces"][0, 1] = np.nan
    with pytest.raises(ValueError, match="frame 1: expected finite labels REF_energy and REF_forces, got NaN"):
        agreement(bad, classical(0.0))
    with pytest.raises(ValueError, match="frame 0: the classical potential gives NaN or infinity"):
        agreement(frames(), classical(np.nan))


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
