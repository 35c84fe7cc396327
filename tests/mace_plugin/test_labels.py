"""Label checks do not reject what is fine."""

import argparse

import ase.io
import numpy as np
import pytest

pytest.importorskip("mace")

from mace.tools import build_default_arg_parser

from mace_lora.mace_plugin import labels
from mace_lora.mace_plugin.protocol import SettingsError

pytestmark = pytest.mark.mace


def arguments(path, **changes):
    """What upstream's parser makes of a training file, with some values changed."""
    args = build_default_arg_parser().parse_args(["--name", "labels", "--train_file", str(path)])
    return argparse.Namespace(**(vars(args) | changes))


def frame(symbols="OH", energy=-1.0, forces=True):
    atoms = ase.Atoms(symbols, positions=np.eye(3)[: 1 if symbols == "U" else 2])
    atoms.info["REF_energy"] = energy
    if forces:
        atoms.arrays["REF_forces"] = np.ones((len(atoms), 3))
    return atoms


@pytest.mark.parametrize(
    "frames",
    [
        [frame()],
        [frame("U", energy=-7.6e5, forces=False), frame()],  # all-electron energy of uranium
        [frame(), ase.Atoms("He")],  # one frame without labels
    ],
)
def test_accepted(tmp_path, frames):
    ase.io.write(tmp_path / "a.xyz", frames, format="extxyz")
    labels.check_files(arguments(tmp_path / "a.xyz"))


def test_every_head_and_the_frames_to_replay(tmp_path):
    """Heads have files and keys of their own, given in either of upstream's two ways."""
    good, bad = frame(), frame()
    good.info["E"] = good.info.pop("REF_energy")
    bad.arrays["REF_forces"][1, 2] = np.nan
    for name, atoms in (("a", frame()), ("e", good), ("bad", bad)):
        ase.io.write(tmp_path / f"{name}.xyz", atoms, format="extxyz")

    def given(head, **changes):
        return arguments(
            tmp_path / "a.xyz", heads=repr({"one": {"train_file": str(tmp_path / "a.xyz")}, "two": head}), **changes
        )

    other = str(tmp_path / "e.xyz")
    for keys in ({"energy_key": "E"}, {"info_keys": {"energy": "E"}}):
        labels.check_files(given({"train_file": other} | keys))
    with pytest.raises(
        SettingsError, match=r"--heads: two: train_file: .*e.xyz has no energies under --energy_key=REF_"
    ):
        labels.check_files(given({"train_file": other}))
    with pytest.raises(SettingsError, match=r"--heads: two: valid_file: .*bad.xyz frame 0 .* atom 1 is NaN"):
        labels.check_files(given({"valid_file": str(tmp_path / "bad.xyz")}))
    with pytest.raises(SettingsError, match=r"--heads: two: train_file: no file .*gone.xyz"):
        labels.check_files(given({"train_file": str(tmp_path / "gone.xyz")}))
    for wrong in ("{'one': ", "{'one': 'file.xyz'}"):
        with pytest.raises(SettingsError, match=r"--heads: expected a dictionary"):
            labels.check_files(arguments(tmp_path / "a.xyz", heads=wrong))
    replay = {"multiheads_finetuning": True, "pt_train_file": str(tmp_path / "bad.xyz"), "pt_valid_file": None}
    with pytest.raises(SettingsError, match=r"--pt_train_file: .*bad.xyz frame 0 .* atom 1 is NaN"):
        labels.check_files(arguments(tmp_path / "a.xyz", **replay))
    labels.check_files(arguments(tmp_path / "a.xyz", **replay | {"pt_train_file": "mp"}))
    assert len(labels.data_hashes(given({"train_file": other}, **replay))) == 3


def test_energies_only_need_a_word(tmp_path):
    ase.io.write(tmp_path / "a.xyz", [frame(forces=False)], format="extxyz")
    labels.check_files(arguments(tmp_path / "a.xyz", forces_weight=0.0))
    with pytest.raises(SettingsError, match=r"has no forces under --forces_key=REF_forces; .* set the weight"):
        labels.check_files(arguments(tmp_path / "a.xyz"))
    with pytest.raises(SettingsError, match=r"has no energies under --energy_key=E; its first frame has"):
        labels.check_files(arguments(tmp_path / "a.xyz", energy_key="E", forces_weight=0.0))


def test_energy_and_forces_in_ase_s_own_keys(tmp_path):
    from ase.calculators.singlepoint import SinglePointCalculator

    atoms = ase.Atoms("OH", positions=np.eye(3)[:2])
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.ones((2, 3)))
    ase.io.write(tmp_path / "a.xyz", atoms, format="extxyz")
    labels.check_files(arguments(tmp_path / "a.xyz", energy_key="energy", forces_key="forces"))


def test_compressed_folders_and_unlabelled_test_files(tmp_path):
    ase.io.write(tmp_path / "a.xyz.gz", frame(), format="extxyz")
    ase.io.write(tmp_path / "t.xyz", ase.Atoms("H"), format="extxyz")
    (tmp_path / "sharded").mkdir()
    labels.check_files(
        arguments(tmp_path / "a.xyz.gz", valid_file=str(tmp_path / "sharded"), test_file=tmp_path / "t.xyz")
    )
    assert list(labels.data_hashes(arguments(tmp_path / "a.xyz.gz"))) == ["train_file:a.xyz.gz"]
