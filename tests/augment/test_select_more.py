"""SOAP features, windows with lower bounds, and names of models."""

import sys

import ase.io
import numpy as np
import pytest
from ase.build import molecule
from typer.testing import CliRunner

from mace_lora.augment.select_cli import app
from mace_lora.augment.selection import farthest, features


def test_soap_does_not_change_under_rotation():
    pytest.importorskip("dscribe")
    water, turned, other = molecule("H2O"), molecule("H2O"), molecule("H2O")
    turned.rotate(50, (1, 2, 3))
    turned.translate([4, 5, 6])
    other.rattle(0.2, seed=1)
    values = features([water, turned, other], "soap")
    np.testing.assert_allclose(values[0], values[1], atol=1e-9)
    assert np.abs(values[0] - values[2]).max() > 1e-3
    assert list(farthest(values, 2)[0]) == [0, 2]


def test_soap_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "dscribe.descriptors", None)
    with pytest.raises(ValueError, match="features: soap needs dscribe; pip install dscribe"):
        features([molecule("H2O")], "soap")


def test_windows_have_two_ends(tmp_path):
    frames = []
    for k in range(5):
        atoms = molecule("H2O")
        atoms.info["REF_energy"] = 3.0 * k
        atoms.arrays["REF_forces"] = np.full((3, 3), float(k)) / np.sqrt(3)
        frames.append(atoms)
    ase.io.write(tmp_path / "a.xyz", frames)
    for options, expected in (
        (["--min-force", "1.5", "--max-force", "3.5"], [2, 3]), (["--min-energy", "2.5"], [3, 4]),
        (["--min-energy", "0.5", "--max-energy", "2.5", "--max-force", "1.5"], [1]),
    ):  # fmt: skip
        done = CliRunner().invoke(app, ["window", str(tmp_path / "a.xyz"), "-o", str(tmp_path / "o.xyz"), *options])
        assert done.exit_code == 0, done.output
        assert [a.info["selected_from"] for a in ase.io.read(tmp_path / "o.xyz", ":")] == expected


def test_a_model_is_named_as_elsewhere():
    pytest.importorskip("mace")
    water = [molecule("H2O")]
    np.testing.assert_array_equal(features(water, "mace:embedded"), features(water, "embedded"))


def test_nothing_chosen(tmp_path):
    atoms = molecule("H2O")
    atoms.arrays["REF_forces"] = np.ones((3, 3))
    ase.io.write(tmp_path / "a.xyz", atoms)
    done = CliRunner().invoke(
        app, ["window", str(tmp_path / "a.xyz"), "-o", str(tmp_path / "o.xyz"), "--max-force", "0.1"]
    )
    assert done.exit_code == 1
    assert not (tmp_path / "o.xyz").exists()


@pytest.mark.parametrize("source", ["soap", "embedded"])
def test_positions_that_are_not_finite(source):
    atoms = molecule("H2O")
    atoms.positions[1, 0] = np.nan
    with pytest.raises(ValueError, match="frame 1: its positions are not finite; remove it"):
        features([molecule("H2O"), atoms], source)
