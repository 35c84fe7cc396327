"""Every bad input ends the real command before training, with a message that helps."""

import re

import ase.io
import mace.cli.run_train
import numpy as np
import pytest
import torch
from helpers import dft_frames, flags

from mace_lora import LoraConfig, apply_lora, save_adapter

pytestmark = pytest.mark.mace


def run(job, work, monkeypatch, **changes):
    """mace_run_train in this process."""
    monkeypatch.setattr("sys.argv", ["mace_run_train", *map(str, flags(job, work, **changes))])
    mace.cli.run_train.main()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 0}, r"--lora_rank: expected an integer >= 1, got 0"),
        ({"lora_alpha": -1.0}, r"--lora_alpha: expected a positive number, got -1.0"),
        (
            {"lora_rank_pattern": "0e=3"},
            r"--lora_rank_pattern: expected 'irrep:rank' pairs such as '0e:16,1o:8', got '0e=3'",
        ),
        ({"lora_targets": "("}, r"--lora_targets: '\(' is not a regular expression"),
        ({"foundation_model": "nowhere.model"}, r"--foundation_model: no file nowhere.model"),
        ({"lora": None}, r"--lora_rank: has no effect without --lora; add --lora or drop it"),
        (
            {"lora_backend": "mace", "lora_dense": "none"},
            r"--lora_dense: MACE's own LoRA does not know it; drop it or --lora_backend=mace",
        ),
        (
            {"lora_init_adapter": "somewhere"},
            r"--lora_rank: the adapter given by --lora_init_adapter brings its own; drop one of the two flags",
        ),
        ({"energy_key": "E"}, r"has no energies under --energy_key=E; its first frame has .*REF_energy"),
        ({"foundation_model": None}, r"--lora: expected a base model, got none; give --foundation_model"),
        ({"foundation_filter_elements": "False"}, r"re-initialises the readouts, and --lora would freeze"),
        ({"freeze": 5}, r"--freeze 5: --lora already freezes the base; drop one of the two"),
        ({"weight_decay": 0.5}, r"--weight_decay: has no effect with --lora, .*; use --lora_weight_decay"),
        ({"lr_params_factors": '{"readouts_lr_factor": 0}'}, r"--lr_params_factors: has no effect with --lora"),
        ({"enable_cueq": "True"}, r"upstream's conversion drops LoRA layers"),
        ({"model": "MACELES"}, r"--model MACELES: --lora supports MACE, ScaleShiftMACE and MultiScaleMACE"),
        ({"train_file": "nowhere.xyz"}, r"--train_file: no file nowhere.xyz"),
        ({"energy_key": "E", "forces_key": "F"}, r"has no energies under --energy_key=E and no forces under"),
        (
            {"lora_init_adapter": "nowhere", "lora_rank": None},
            r"--lora_init_adapter: adapter nowhere: expected a file adapter_config.json",
        ),
        ({"lora_targets": "nothing_like_this"}, r"--lora: targets: no layer matches"),
        ({"lora_rank_pattern": "4e:3"}, r"--lora: rank_pattern: the model has no weights of irrep 4e"),
        ({"lora_dense": "nothing"}, r"--lora: dense: no parameter matches 'nothing'"),
    ],
)
def test_settings(job, tmp_path, monkeypatch, changes, message):
    with pytest.raises(SystemExit, match=message):
        run(job, tmp_path, monkeypatch, **changes)
    assert not list(tmp_path.glob("checkpoints/*.pt"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_preset": "best"}, "argument --lora_preset: invalid choice: 'best'"),
        ({"lora_backend": "peft"}, "argument --lora_backend: invalid choice: 'peft'"),
        ({"lora_init": "pissa"}, "argument --lora_init: invalid choice: 'pissa'"),
        ({"lora_rank": "many"}, "argument --lora_rank: invalid int value: 'many'"),
        ({"lora": "perhaps"}, "argument --lora: Boolean value expected"),
        ({"lora_typo": 3}, "unrecognized arguments: --lora_typo=3"),
    ],
)
def test_unknown_flag_values(job, tmp_path, monkeypatch, capsys, changes, message):
    import re

    with pytest.raises(SystemExit):
        run(job, tmp_path, monkeypatch, **changes)
    assert re.search(message, capsys.readouterr().err)


def spoil_energy(atoms):
    atoms.info["REF_energy"] = float("nan")


def spoil_force(atoms):
    atoms.arrays["REF_forces"][2, 1] = np.nan


def spoil_units(atoms):
    atoms.arrays["REF_forces"] *= 1000


def hartree(atoms):
    atoms.info["REF_energy"] /= 27.211386
    atoms.arrays["REF_forces"] /= 51.422067


def gradients(atoms):
    atoms.arrays["REF_forces"] *= -1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (hartree, r"force labels are 0.0\d+ times the base model's forces, .* look like Hartree/Bohr; convert"),
        (gradients, r"force labels are opposite to the base model's forces .* look like energy gradients"),
    ],
)
def test_consistent_but_wrong_units(job, tmp_path, monkeypatch, spoil, message):
    frames = dft_frames("train", 10)
    for atoms in frames:
        spoil(atoms)
    ase.io.write(tmp_path / "bad.xyz", frames, format="extxyz")
    with pytest.raises(SystemExit, match=message):
        run(job, tmp_path / "w", monkeypatch, train_file=tmp_path / "bad.xyz", valid_file=tmp_path / "bad.xyz")


@pytest.mark.parametrize("content", ["", "2\nProperties=species:S:1:pos:R:3\nH 0 0 0\n", "no frames"])
def test_files_that_cannot_be_read(job, tmp_path, monkeypatch, content):
    (tmp_path / "bad.xyz").write_text(content)
    with pytest.raises(SystemExit, match=r"--train_file: .*bad.xyz cannot be read as structures .*empty or damaged"):
        run(job, tmp_path / "w", monkeypatch, train_file=tmp_path / "bad.xyz")
    (tmp_path / "folder.xyz").mkdir()
    with pytest.raises(SystemExit, match=r"--train_file: expected a file, got the folder .*folder.xyz"):
        run(job, tmp_path / "w", monkeypatch, train_file=tmp_path / "folder.xyz")


def test_adapter_of_another_seed(job, tmp_path, monkeypatch):
    model = apply_lora(torch.load(job / "base.model", weights_only=False), LoraConfig(rank=2))
    save_adapter(model, tmp_path / "run-adapter", metadata={"run": "run_run-7"})
    with pytest.raises(SystemExit, match=r"run-adapter holds the adapter of the run run_run-7, this is run_run-\d+;"):
        run(job, tmp_path, monkeypatch)


def spoil_positions(atoms):
    atoms.positions[0] = np.inf


def spoil_stress(atoms):
    atoms.info["REF_stress"] = np.full(9, np.nan)


def spoil_energy_units(atoms):
    atoms.info["REF_energy"] *= 1e6


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_energy, r"frame 3 \(C2H5NO2\): energy label is nan; remove or relabel the frame"),
        (spoil_force, r"frame 3 \(C2H5NO2\): force label of atom 2 is NaN or infinite"),
        (spoil_units, r"frame 3 \(C2H5NO2\): force label of .* eV/A is absurd \(limit 300\); expected eV/A"),
        (spoil_energy_units, r"frame 3 \(C2H5NO2\): energy label .* is absurd; expected eV, check the units"),
        (spoil_stress, r"frame 3 \(C2H5NO2\): stress label contains NaN or infinity; remove or relabel the frame"),
        (spoil_positions, r"frame 3 \(C2H5NO2\): positions contain NaN or infinity"),
    ],
)
def test_labels(job, tmp_path, monkeypatch, spoil, message):
    frames = dft_frames("train", 5)
    spoil(frames[3])
    ase.io.write(tmp_path / "bad.xyz", frames, format="extxyz")
    loss = {"loss": "stress"} if spoil is spoil_stress else {}
    with pytest.raises(SystemExit, match=message):
        run(job, tmp_path / "w", monkeypatch, train_file=tmp_path / "bad.xyz", **loss)


def test_stress_labels_that_the_loss_of_replay_will_use(job, tmp_path, monkeypatch):
    """Multi-head fine-tuning sets a loss with stress, whatever --loss says; without it nobody looks at them."""
    frames = dft_frames("train", 5)
    spoil_stress(frames[3])
    ase.io.write(tmp_path / "bad.xyz", frames, format="extxyz")
    replay = {"multiheads_finetuning": "True", "pt_train_file": job / "train.xyz"}
    with pytest.raises(SystemExit, match=r"stress label contains NaN or infinity; remove or relabel the frame"):
        run(job, tmp_path / "w", monkeypatch, train_file=tmp_path / "bad.xyz", **replay)


def test_element_missing_in_the_base(job, tmp_path, monkeypatch):
    frames = dft_frames("train", 5)
    for atoms in frames:
        atoms.numbers[atoms.numbers == 7] = 15
    ase.io.write(tmp_path / "p.xyz", frames, format="extxyz")
    with pytest.raises(
        SystemExit, match=r"element\(s\) Z = \[15\] are missing in the base model .* has Z = \[1, 6, 7, 8"
    ):
        run(job, tmp_path / "w", monkeypatch, train_file=tmp_path / "p.xyz", valid_file=tmp_path / "p.xyz",
            E0s="{1: -13.0, 6: -1000.0, 8: -2000.0, 15: -9000.0}")  # fmt: skip


def test_adapter_of_another_base(job, tmp_path, monkeypatch):
    model = torch.load(job / "base.model", weights_only=False)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    apply_lora(model, LoraConfig(rank=2))
    save_adapter(model, tmp_path / "other")
    with pytest.raises(SystemExit, match=r"--lora_init_adapter: it was trained on another base model: expected finger"):
        run(job, tmp_path / "w", monkeypatch, lora_init_adapter=tmp_path / "other", lora_rank=None)


def test_truncated_adapter(job, tmp_path, monkeypatch):
    model = torch.load(job / "base.model", weights_only=False)
    folder = save_adapter(apply_lora(model, LoraConfig(rank=2)), tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(SystemExit, match=r"--lora_init_adapter: .* is corrupt or truncated"):
        run(job, tmp_path / "w", monkeypatch, lora_init_adapter=folder, lora_rank=None)


def test_energy_references_of_another_level_are_a_warning(job, tmp_path, monkeypatch, caplog):
    other = {"E0s": "{1: -13.0, 6: -1000.0, 7: -1480.0, 8: -2000.0}", "dry_run": True}
    run(job, tmp_path / "a", monkeypatch, lora_refit_E0s=False, **other)
    assert "the E0s do not fit the labels' level of theory" in caplog.text
    assert "--E0s=estimated" in caplog.text
    caplog.clear()
    run(job, tmp_path / "b", monkeypatch, **other)
    assert "--lora_refit_E0s takes that off at the start" in caplog.text
    assert re.search(r"energy references refitted on \d+ frames: rms residual [\d.]{6,} -> [\d.]{4,5} meV", caplog.text)


def test_models_handled_after_a_run_in_the_same_process_are_not_taken_for_its_model(job, tmp_path, monkeypatch):
    from mace.modules.lora import LoRAO3Linear, inject_LoRAs, merge_lora_weights

    run(job, tmp_path, monkeypatch, dry_run=True)
    model = inject_LoRAs(torch.load(job / "base.model", weights_only=False), rank=2)
    assert any(isinstance(m, LoRAO3Linear) for m in model.modules())
    assert not any(isinstance(m, LoRAO3Linear) for m in merge_lora_weights(model).modules())
