"""Offsets of compositions: what is taken off, what stays, and where nothing would be left."""

import ase.io
import numpy as np
import pytest

pytest.importorskip("mace")

from ase.calculators.singlepoint import SinglePointCalculator
from autotune_frames import labelled

from mace_lora.autotune.checks import check_data
from mace_lora.autotune.classical import become_classical, classical_model, classical_stage
from mace_lora.autotune.levels import Source, read_source
from mace_lora.autotune.offsets import by_composition, write_without
from mace_lora.mace_plugin.protocol import SettingsError

pytestmark = pytest.mark.mace


def test_means_of_compositions_and_nothing_else(frames_file, tmp_path):
    ethers = [labelled("C2H6O", 5.0, 1), labelled("CH3OCH3", 7.0, 2)]  # one composition, however it is written
    waters = [labelled("OH2", -1.0, 3), labelled("H2O", -3.0, 4)]
    bare = waters[0].copy()
    del bare.info["REF_energy"]
    source = read_source("--autotune_train_file", frames_file("many.xyz", *ethers, *waters, bare))
    said = []
    offsets = by_composition([source], "REF_energy", said.append)
    assert offsets == {"C2H6O": 6.0, "H2O": -2.0}
    assert "energy offsets of 2 composition(s)" in said[0] and "-> 248.5 meV/atom" in said[0]
    new = ase.io.read(write_without(source, offsets, "REF_energy", tmp_path / "new.xyz"), ":")
    assert [a.info.get("REF_energy") for a in new] == [-1.0, 1.0, 1.0, -1.0, None]
    for old, atoms in zip(source.frames, new, strict=True):
        np.testing.assert_array_equal(atoms.arrays["REF_forces"], old.arrays["REF_forces"])
        np.testing.assert_array_equal(atoms.positions, old.positions)


def test_standard_labels(tmp_path):
    frames = [labelled("OH2", 0.0, k) for k in (1, 2)]
    for k, atoms in enumerate(frames):
        atoms.info, forces = {}, atoms.arrays.pop("REF_forces")
        atoms.calc = SinglePointCalculator(atoms, energy=float(k), forces=forces)
    source = Source("--autotune_train_file", tmp_path / "x.xyz", frames)
    offsets = by_composition([source], "energy", lambda _: None)
    new = ase.io.read(write_without(source, offsets, "energy", tmp_path / "new.xyz"), ":")
    assert [a.get_potential_energy() for a in new] == [-0.5, 0.5]
    np.testing.assert_allclose(new[1].get_forces(), frames[1].get_forces(), atol=1e-8)


def test_single_frames_are_refused_before_training(arguments, frames_file):
    path = frames_file("one.xyz", labelled("OH2", 1.0, 1), labelled("CH4", 2.0, 2), labelled("CH4O", 3.0, 3))
    with pytest.raises(SettingsError, match="3 of its 3 labelled frames are the only ones of their composition"):
        check_data(arguments(autotune_train_file=path, autotune_offsets="composition"))


def test_isolated_atoms_are_refused(arguments, frames_file):
    lone = [labelled(s, 0.0, config_type="IsolatedAtom") for s in ("H", "O")]
    path = frames_file("iso.xyz", labelled("OH2", 1.0, 1), labelled("OH2", 2.0, 2), *lone)
    with pytest.raises(SettingsError, match="--autotune_offsets composition: --autotune_train_file has IsolatedAtom"):
        check_data(arguments(autotune_train_file=path, autotune_offsets="composition"))


def test_stage_one_gets_the_copies(arguments, frames_file, tmp_path, monkeypatch):
    from models import build_mace
    from torch import save

    from mace_lora.autotune import classical

    args = arguments(autotune_offsets="composition", autotune_valid_file=frames_file("v.xyz", labelled("OH2", 0.7, 8)))
    monkeypatch.setattr(classical, "run_child", lambda *_, **__: save(build_mace(), classical_model(args)))
    classical_stage(args)
    become_classical(args)
    train, valid = ase.io.read(args.train_file, ":"), ase.io.read(args.valid_file, ":")
    waters = [a.info["REF_energy"] for a in [*train[:4], *valid]]
    assert np.isclose(sum(waters), 0.0) and np.isclose(waters[4] - waters[0], 0.6)
    assert train[4].info["REF_energy"] == 0.0  # the one methane
