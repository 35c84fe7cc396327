"""Stage one: what it depends on, what it does not, and what is refused."""

import copy
import json
from pathlib import Path

import pytest

pytest.importorskip("mace")

import torch
from autotune_frames import labelled
from models import build_mace

from mace_lora.autotune import classical
from mace_lora.autotune.classical import become_classical, classical_stage, fingerprint
from mace_lora.mace_plugin.protocol import SettingsError

pytestmark = pytest.mark.mace


@pytest.fixture
def stage(arguments, monkeypatch):
    """Runs stage one with a child that only leaves its files; ``outcome`` says which."""
    runs, outcome = [], {"model": build_mace(), "code": 0}

    def child(command, env):
        args = runs[-1]
        folder = Path(args.checkpoints_dir) / "classical"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{args.name}_run-{args.seed}_epoch-1.pt").touch()
        if outcome["model"] is not None:
            torch.save(outcome["model"], classical.classical_model(args))
        return outcome["code"]

    monkeypatch.setattr(classical, "run_child", child)

    def go(**flags):
        runs.append(arguments(**flags))
        return classical_stage(runs[-1])

    return go, outcome


def test_flags_of_stage_two_do_not_reach_stage_one(arguments):
    zeros = '{"embedding_lr_factor": 0.0, "interactions_lr_factor": 0.0, "products_lr_factor": 0.0}'
    plain, odd = arguments(), arguments(
        lr_params_factors=zeros, statistics_file="s.json", atomic_numbers="[1, 8]", test_dir="t", mean=1.0, std=2.0,
        freeze=5, lora=True, swa=True, start_swa=3, foundation_model_elements=True, multiheads_finetuning=True,
    )  # fmt: skip
    for args in (plain, odd):
        become_classical(args)
    assert odd.lr_params_factors == plain.lr_params_factors != zeros
    assert {k: v for k, v in vars(odd).items() if v != getattr(plain, k)} == {}


def test_harmless_changes_keep_stage_one(arguments, tmp_path, frames_file):
    before = fingerprint(arguments(autotune_epochs=5))
    copied = frames_file("copy.xyz", *(labelled("OH2", 0.1 * k, k) for k in range(1, 5)), labelled("CH4", 0.3, 9))
    after = fingerprint(
        arguments(
            autotune_epochs=5, autotune_train_file=copied, lr=0.5, max_num_epochs=99, plot=False, log_level="DEBUG",
            restart_latest=True, num_workers=2, wandb=True, wandb_name="x", E0s="estimated", lora=True,
            autotune_lr_decay=0.5, test_file="t.xyz", swa=True, device="cuda", keep_checkpoints=True,
        )
    )  # fmt: skip
    assert before == after


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ({"num_channels": 8, "max_L": 1}, "--max_L: None before, 1 now"),
        ({"autotune_lr": 0.1}, "--autotune_lr: 0.01 before, 0.1 now"),
        ({"lr_scheduler_gamma": 0.5}, "--lr_scheduler_gamma: 0.9993 before, 0.5 now"),
        ({"amsgrad": True, "weight_decay": 0.1}, "--weight_decay: 5e-07 before, 0.1 now"),
        ({"autotune_E0s": "{1: 0.0, 6: 0.0, 8: 0.0}"}, "--autotune_E0s: average before"),
        ({"autotune_offsets": "composition"}, "--autotune_offsets: element before, composition now"),
        ({"energy_key": "other"}, "--energy_key: REF_energy before, other now"),
        ({"autotune_valid_file": "{v}"}, r"--autotune_valid_file: None before, \w{64} now"),
    ],
)
def test_other_settings_are_refused(stage, tmp_path, flags, shown):
    go, _ = stage
    go()
    flags = {k: tmp_path / "valid.xyz" if v == "{v}" else v for k, v in flags.items()}
    with pytest.raises(SettingsError, match=shown) as error:
        go(**flags)
    assert "its classical stage was made with other data or settings" in str(error.value)
    for path in ("checkpoints/run_classical.json", "run_classical.model", "checkpoints/classical/run_run-*"):
        assert str(tmp_path / path) in str(error.value)


def test_a_longer_stage_two_is_no_other_stage_one(stage):
    go, outcome = stage
    go()
    outcome["code"] = 1  # not asked again
    go(max_num_epochs=20)
    with pytest.raises(SettingsError, match="--autotune_epochs: 10 before, 20 now"):
        go(max_num_epochs=20, autotune_epochs=20)


def test_validation_frames_by_content(stage, frames_file):
    go, _ = stage
    path = frames_file("v.xyz", labelled("OH2", 0.1, 1))
    go(autotune_valid_file=path)
    frames_file("v.xyz", labelled("OH2", 0.2, 1))
    with pytest.raises(SettingsError, match=r"--autotune_valid_file: .* before, .* now"):
        go(autotune_valid_file=path)


def test_files_without_a_record(stage, tmp_path):
    go, _ = stage
    go()
    record = tmp_path / "checkpoints" / "run_classical.json"
    assert json.loads(record.read_text())["lr"] == "0.01"
    record.unlink()
    with pytest.raises(
        SettingsError, match=r"files of a classical stage are left .* remove .*run_classical.model, .*run_run-"
    ):
        go()
    (tmp_path / "run_classical.model").unlink()
    with pytest.raises(SettingsError, match="files of a classical stage are left"):
        go()
    next((tmp_path / "checkpoints" / "classical").glob("*.pt")).unlink()
    go()


def test_failed_and_diverged(stage, tmp_path):
    go, outcome = stage
    good, bad = outcome["model"], copy.deepcopy(outcome["model"])
    with torch.no_grad():
        next(bad.parameters()).fill_(float("nan"))
    outcome |= {"code": 1, "model": None}
    with pytest.raises(SettingsError, match="the classical stage failed"):
        go()
    outcome |= {"code": 0, "model": bad}
    for _ in range(2):  # it does not count as done the second time either
        with pytest.raises(SettingsError, match=r"has diverged: expected finite weights in .*; check .* and remove"):
            go()
    (tmp_path / "run_classical.model").write_bytes(b"half")
    outcome["model"] = good
    assert go() == tmp_path / "run_classical.model"
    assert torch.load(tmp_path / "run_classical.model", weights_only=False) is not None
