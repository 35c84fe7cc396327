"""equitune distill with a student of the NequIP framework."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ase.io
import pytest
import yaml

pytest.importorskip("nequip")
from mace_lora.atomic import only_writer
from nequip_ext.distill import NequipStudent, check_config, compose

PROGRAM = Path(sys.executable).parent / "equitune"
ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "configs"
CONFIG = {
    "folder": "out", "train": "train.xyz", "valid": "valid.xyz", "test": "test.xyz",
    "teacher": {"labelled": "synthetic.xyz"},
    "student": {
        "nequip": "student.yaml",
        "flags": {"training_module.model.model.num_features": 4, "training_module.model.model.num_layers": 2},
        "pretrain": {"epochs": 2, "lrs": [0.01]},
        "finetune": {"epochs": 2, "lrs": [0.005]},
        "direct": {"epochs": 2, "lrs": [0.01]},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill_nequip")
    frames = ase.io.read(ROOT / "mace_lora" / "embedded" / "glycolamide_pbe0.extxyz.gz", ":", format="extxyz")
    parts = {"train": frames[:10], "valid": frames[10:15], "test": frames[15:23], "synthetic": frames[30:60]}
    for name, part in parts.items():
        ase.io.write(folder / f"{name}.xyz", part, format="extxyz")
    for name, copy in (("nequip_data", "nequip_data"), ("nequip_autotune", "student")):
        (folder / f"{copy}.yaml").write_text((RECIPES / f"{name}.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


def distill(place):
    done = subprocess.run(
        [PROGRAM, "distill", "config.yaml"], cwd=place, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return " ".join(done.stdout.split())


def test_labelled_elsewhere(place):
    shown = distill(place)
    assert "pretrain-lr0.01: starting" in shown and "written:" in shown
    content = json.loads((place / "out" / "report.json").read_text())
    assert {"pretrain", "finetune", "direct"} == content["evaluations"].keys() == content["fits"].keys()
    fine = Path(content["fits"]["finetune"]["model"])
    assert fine.name == "best.ckpt" and fine.is_file()
    used = yaml.safe_load((fine.parent / "equitune_student.yaml").read_text())
    assert used["autotune"]["checkpoint"] == content["fits"]["pretrain"]["model"]
    assert used["data"]["train_file_path"] == str(place / "train.xyz") and "split_dataset" not in used["data"]
    assert "starting" not in distill(place)
    data = (place / "nequip_data.yaml").read_text()  # what the student's config names counts too
    (place / "nequip_data.yaml").write_text(data.replace("forces: 100.0", "forces: 10.0"))
    assert "pretrain-lr0.01: starting" in distill(place)


def test_a_killed_training_goes_on(place, tmp_path):
    student = NequipStudent(place / "student.yaml", CONFIG["student"]["flags"], 1)

    class Training:
        epochs, flags = 1, {}

    data = (place / "train.xyz", place / "valid.xyz")
    student.train(student.settings(Training, 0.01, None), data, tmp_path)
    assert [epoch for epoch, _, _ in student.curve(tmp_path)] == [0]
    with only_writer(tmp_path), pytest.raises(ValueError, match=r"another run is writing there now; wait for it"):
        student.train(student.settings(Training, 0.01, None), data, tmp_path)
    Training.epochs = 3
    student.train(student.settings(Training, 0.01, None), data, tmp_path)
    assert [epoch for epoch, _, _ in student.curve(tmp_path)] == [0, 1, 2]
    assert student.steps_per_epoch(student.settings(Training, 0.01, None), 11) == 3


def test_bad_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where Hydra writes by default
    file = tmp_path / "student.yaml"
    file.write_text("lr: 0.1\nfolder: a\nepochs: 2\nbatch_size: 5\ndata: {}\n")
    with pytest.raises(ValueError, match=r"expected the key autotune.checkpoint, as in recipes"):
        check_config(file, {})
    shared, full = ((RECIPES / f"{n}.yaml").read_text() for n in ("nequip_data", "nequip_autotune"))
    (tmp_path / "nequip_data.yaml").write_text(shared)
    file.write_text(full)
    check_config(file, {"lr": 0.1, "training_module.model.model.l_max": 2})
    with pytest.raises(ValueError, match=r"student.flags: it has no key batchsize"):
        check_config(file, {"batchsize": 3})
    file.write_text(file.read_text().replace("nequip_ext.Autotuned", "nequip.model.NequIPGNNModel"))
    with pytest.raises(ValueError, match=r"expected _target_: nequip_ext.Autotuned with checkpoint"):
        check_config(file, {})
    file.write_text(full)
    for old, new, message in (
        ("nequip.data.datamodule.ASEDataModule", "my.Module", "data: expected nequip.data.datamodule.ASEDataModule"),
        ("REF_energy: total_energy", "energy: total_energy", "data.key_mapping: expected REF_energy: total_energy"),
        ("CSVLogger", "TensorBoardLogger", "trainer.logger: expected lightning.pytorch.loggers.CSVLogger"),
        ("per_atom_energy_mae", "per_atom_energy_rmse", "training_module.val_metrics: expected coeffs with forces_mae"),
    ):
        (tmp_path / "nequip_data.yaml").write_text(shared.replace(old, new))
        with pytest.raises(ValueError, match=message):
            check_config(file, {})
    (tmp_path / "nequip_data.yaml").write_text(shared)
    file.write_text(full.replace("filename: best", "filename: top"))
    with pytest.raises(ValueError, match=r"trainer.callbacks: expected a ModelCheckpoint with dirpath"):
        check_config(file, {})
    file.write_text("defaults: [gone, _self_]\n")
    with pytest.raises(ValueError, match="defaults: expected names of files beside it, or _self_, got 'gone'"):
        compose(file)
    file.write_text("defaults: [_self_, other]\nlr: 1\nb: {c: 1, d: 2}\n")
    (tmp_path / "other.yaml").write_text("b: {c: 3}\n")
    assert compose(file) == {"lr": 1, "b": {"c": 3, "d": 2}}
    with pytest.raises(ValueError, match=r"nequip-train in .* failed: its output is in"):
        file.write_text("lr: 0.1\nfolder: a\nepochs: 2\nbatch_size: 5\ndata: {}\nautotune: {checkpoint: null}\n")
        student = NequipStudent(file, {}, 1)
        (tmp_path / "run").mkdir()
        student.train({}, (file, file), tmp_path / "run")
