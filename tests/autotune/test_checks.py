"""What is wrong with a command of two stages is said before the first."""

import numpy as np
import pytest

pytest.importorskip("mace")

from autotune_frames import labelled

from mace_lora.autotune.checks import check_data, check_settings
from mace_lora.mace_plugin.protocol import SettingsError

pytestmark = pytest.mark.mace


def test_sound_commands(arguments, frames_file):
    for more in ({}, {"lora": True}, {"E0s": "Average"}, {"E0s": "{1: -1.0, 8: -2.0}"}, {"autotune_unfreeze": 3}):
        args = arguments(**more)
        check_settings(args)
        assert check_data(args) is False
    lone = [labelled(s, 0.0, config_type="IsolatedAtom") for s in ("H", "O", "C")]
    train = frames_file("isolated.xyz", labelled("OH2", -3.0, 1), *lone)
    many = frames_file("many.xyz", labelled("OH2", 0.5, 1), labelled("CH4", 0.3, 9), *lone)
    args = arguments(train_file=train, autotune_train_file=many, E0s=None)
    assert check_data(args) is True  # equal energies of single atoms are no mix-up


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"foundation_model": "small"}, "--foundation_model: autotuning makes its own"),
        ({"autotune_lr": -1.0}, "--autotune_lr: expected more than 0, got -1"),
        ({"autotune_epochs": 0}, "--autotune_epochs: expected more than 0, got 0"),
        ({"autotune_lr_decay": 1.5}, "--autotune_lr_decay: expected a factor above 0"),
        ({"autotune_unfreeze": 0}, "--autotune_unfreeze: expected at least 1 epoch, got 0"),
        ({"autotune_unfreeze": 4}, "--autotune_unfreeze 4: the lowest of 3 blocks would begin to learn at epoch 12"),
        ({"autotune_unfreeze": 1, "lbfgs": True}, "--autotune_unfreeze: not with --lbfgs"),
        ({"lora_rank": 4}, "--lora_rank: has no effect without --lora"),
        ({"dry_run": True}, "--dry_run: not with --autotune_train_file"),
        ({"swa": True, "autotune_lr_decay": 0.5}, r"--autotune_lr_decay: not with --swa \(--stage_two\)"),
        ({"lora": True, "autotune_rescale": True}, "--autotune_rescale: not with --lora"),
        ({"lora": True, "autotune_refit_E0s": False}, "--autotune_refit_E0s: not with --lora; give --lora_refit_E0s"),
        ({"lora": True, "lora_rank": 0}, "--lora_rank: .*got 0"),
        ({"lora": True, "freeze": 3}, "--freeze 3: --lora already freezes the base"),
        ({"pt_train_file": "x.xyz"}, "--E0s average: not with --pt_train_file, .* give --E0s=estimated"),
        ({"autotune_offsets": "composition", "autotune_E0s": "{1: -1.0}"}, "--autotune_offsets composition: not with"),
        (
            {"autotune_offsets": "composition", "multiheads_finetuning": True, "pt_train_file": "replay.xyz"},
            "--autotune_offsets composition: not with --pt_train_file: the classical model knows no",
        ),
        ({"autotune_E0s": "estimated"}, "--autotune_E0s estimated: the classical stage has no foundation model"),
    ],
)
def test_settings(arguments, flags, message):
    with pytest.raises(SettingsError, match=message):
        check_settings(arguments(**flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"train_file": "gone.xyz"}, "--train_file: no file gone.xyz"),
        ({"valid_file": "gone.xyz"}, "--valid_file: no file gone.xyz"),
        ({"test_file": "gone.xyz"}, "--test_file: no file gone.xyz"),
        ({"pt_train_file": "gone.xyz", "E0s": "estimated"}, "--pt_train_file: no file gone.xyz"),
        ({"autotune_train_file": "gone.xyz"}, "--autotune_train_file: no file gone.xyz"),
        ({"autotune_valid_file": "gone.xyz"}, "--autotune_valid_file: no file gone.xyz"),
        ({"train_file": __file__}, "--train_file: expected frames in a format that ASE reads"),
        ({"energy_key": "dft_energy"}, "--train_file: .* has no energies under --energy_key=dft_energy"),
        ({"E0s": None}, "--E0s: expected the energy references of the quantum labels"),
        ({"E0s": "{1: -1.0}"}, "--E0s: expected an energy of every element, got none of O, which --train_file"),
        ({"E0s": "nonsense"}, "--E0s: expected average, a dictionary .* got 'nonsense'"),
        ({"autotune_E0s": "{1: -1.0, 8: -2.0}"}, "--autotune_E0s: expected an energy .* none of C"),
        ({"atomic_numbers": "[1, 8, 16]"}, "--atomic_numbers: --autotune_train_file has no S"),
        ({"atomic_numbers": "water"}, "--atomic_numbers: expected a list such as"),
    ],
)
def test_files_and_references(arguments, flags, message):
    with pytest.raises(SettingsError, match=message):
        check_data(arguments(**flags))


@pytest.mark.parametrize("flag", ["train_file", "valid_file", "test_file", "pt_train_file"])
def test_elements_of_every_file(arguments, frames_file, flag):
    odd = frames_file("odd.xyz", labelled("SH2", -1.0, 5))
    with pytest.raises(SettingsError, match=f"--autotune_train_file: .* has no S, which --{flag} has"):
        check_data(arguments(**{flag: odd, "E0s": "estimated"}))


def test_elements_of_the_test_file_are_the_models(arguments, frames_file):
    test = frames_file("test.xyz", labelled("CH4", -1.0, 5))
    with pytest.raises(SettingsError, match=r"--test_file: .* has C, which --train_file and --valid_file lack"):
        check_data(arguments(test_file=test))
    check_data(arguments(test_file=test, foundation_model_elements=True))


def test_isolated_atoms_of_some_elements(arguments, frames_file):
    lone = labelled("H", -13.0, config_type="IsolatedAtom")
    train = frames_file("some.xyz", labelled("OH2", -3.0, 1), lone)
    with pytest.raises(SettingsError, match=r"--train_file: .* has IsolatedAtom frames of H, but none of O; add them"):
        check_data(arguments(train_file=train))


def test_classical_labels(arguments, frames_file):
    bad = labelled("OH2", 0.1, 1)
    bad.arrays["REF_forces"][0, 0] = np.nan
    many = frames_file("bad.xyz", labelled("OH2", 0.2, 2), bad)
    with pytest.raises(
        SettingsError, match=r"^--autotune_train_file: .*bad.xyz frame 1 .* force label of atom 0 is NaN"
    ):
        check_data(arguments(autotune_train_file=many))
    del bad.arrays["REF_forces"]
    many = frames_file("none.xyz", bad)
    with pytest.raises(SettingsError, match=r"^--autotune_train_file: .*none.xyz has no forces under --forces_key"):
        check_data(arguments(autotune_train_file=many))


def test_mixed_up(arguments, tmp_path):
    with pytest.raises(SettingsError, match=r"--train_file: frame 0 of .* same geometry and the same energy"):
        check_data(arguments(train_file=tmp_path / "classical.xyz"))
