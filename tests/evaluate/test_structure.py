"""Radial distribution functions."""

import json
import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from mace_lora.evaluate.structure import radial_distribution, rdf_distance

PROGRAM = Path(sys.executable).parent / "equitune"


def gas(seed: int, symbols: str = "Ar200") -> Atoms:
    rng = np.random.default_rng(seed)
    atoms = Atoms(symbols, cell=[20.0] * 3, pbc=True)
    atoms.positions = rng.uniform(0, 20, (len(atoms), 3))
    return atoms


def test_ideal_gas_is_one_and_crystal_counts_neighbours():
    r, g, error = radial_distribution([gas(s) for s in range(20)], ("Ar", "Ar"), 8.0, 16)
    assert np.abs(g[4:] - 1).max() < 0.12
    assert (error[4:] < 0.1).all()
    copper = bulk("Cu", cubic=True) * (4, 4, 4)
    r, g, _ = radial_distribution([copper], ("Cu", "Cu"), 3.2, 64)
    density = len(copper) / copper.get_volume()
    count = (g * 4 * np.pi * r**2 * (3.2 / 64)).sum() * density
    assert count == pytest.approx(12, rel=0.02)
    assert r[g.argmax()] == pytest.approx(2.553, abs=0.06)
    assert rdf_distance(g, g) == 0.0
    assert rdf_distance(np.array([1.0, 0]), np.array([0, 1.0])) == 100.0


def test_mixed_pairs_and_molecules():
    r, g, _ = radial_distribution([gas(s, "Ar100Ne100") for s in range(20)], ("Ar", "Ne"), 8.0, 16)
    assert np.abs(g[4:] - 1).max() < 0.15
    r, g, error = radial_distribution([molecule("H2O")], ("O", "H"), 3.0, 60)
    assert r[g.argmax()] == pytest.approx(0.97, abs=0.03) and np.isnan(error).all()
    np.testing.assert_allclose(radial_distribution([molecule("H2O")], ("H", "O"), 3.0, 60)[1], g)


def test_bad_requests():
    with pytest.raises(ValueError, match="pair: expected elements of Ar, got 'O'"):
        radial_distribution([gas(0)], ("Ar", "O"))
    with pytest.raises(ValueError, match=r"r_max: expected at most 10.00 Å, half the box of frame 0"):
        radial_distribution([gas(0)], ("Ar", "Ar"), 12.0)
    with pytest.raises(ValueError, match="frames: expected at least one"):
        radial_distribution([], ("Ar", "Ar"))


def test_empty_trajectory(tmp_path):
    (tmp_path / "a.xyz").touch()
    program = Path(sys.executable).parent / "equitune"
    run = [program, "rdf", tmp_path / "a.xyz", "--pair", "O-O", "-o", tmp_path / "o.png"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 2 and "a.xyz is empty" in " ".join(done.stderr.split())


def test_command(tmp_path):
    for name, seeds in (("a", range(5)), ("b", range(5, 10))):
        ase.io.write(tmp_path / f"{name}.xyz", [gas(s) for s in seeds])
    run = [PROGRAM, "rdf", tmp_path / "a.xyz", tmp_path / "b.xyz", "-o", tmp_path / "rdf.png"]
    subprocess.run([*run, "--pair", "Ar-Ar"], check=True, capture_output=True)
    content = json.loads((tmp_path / "rdf.json").read_text())
    assert [c["frames"] for c in content] == [5, 5]
    assert content[0]["difference_percent"] == 0 < content[1]["difference_percent"] < 20
    assert (tmp_path / "rdf.png").stat().st_size > 5000
    done = subprocess.run([*run, "--pair", "ArAr"], capture_output=True, text=True)
    assert done.returncode == 2 and "--pair: expected two elements such as O-H" in done.stderr
