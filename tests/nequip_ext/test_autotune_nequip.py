"""equitune nequip-autotune: two stages of nequip-train from one YAML."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ase
import ase.io
import pytest

pytest.importorskip("nequip")

import torch
from nequip_models import MODELS
from test_lora_lifecycle import BIN, ROOT, call, close, predict

import nequip_ext
from nequip_ext.autotune import driver, labels

pytestmark = pytest.mark.nequip


@pytest.fixture(scope="module")
def springs(tmp_path_factory):
    """Classical frames: the quantum set's geometries with made-up spring labels."""
    folder = tmp_path_factory.mktemp("autotune")
    with gzip.open(ROOT / "mace_lora" / "embedded" / "glycolamide_pbe0.extxyz.gz", "rt") as handle:
        frames = ase.io.read(handle, "0:30", format="extxyz")
    middle = sum(a.positions for a in frames) / len(frames)
    classical = []
    for atoms in frames:
        new = ase.Atoms(atoms.numbers, positions=atoms.positions)
        off = atoms.positions - middle
        new.info["REF_energy"], new.arrays["REF_forces"] = float((off**2).sum()), -2 * off
        classical.append(new)
    ase.io.write(folder / "classical.xyz", classical, format="extxyz")
    return folder


@pytest.fixture(scope="module")
def work(springs):
    """The two stages, shortened."""
    (springs / "log").write_text(run(springs))
    return springs


def run(folder, *overrides: str, check: bool = True, out: str = "out") -> str:
    return call(
        BIN / "equitune", "nequip-autotune", "recipes/configs/nequip_autotune.yaml", f"folder={folder}/{out}",
        "epochs=2", f"autotune.frames={folder}/classical.xyz", "autotune.val=5", "autotune.epochs=2",
        "autotune.lr_decay=0.5",
        "data.split_dataset.train=20", "data.split_dataset.val=5", "data.split_dataset.test=175", *overrides,
        check=check,
    )  # fmt: skip


def model_of(checkpoint):
    from nequip.model.saved_models import load_saved_model
    from nequip.utils.global_state import set_global_state

    set_global_state()
    return load_saved_model(str(checkpoint))


def test_two_stages(work):
    log = (work / "log").read_text()
    assert log.index("stage one: training on") < log.index("stage two: fine-tuning") < log.index("written:")
    rates = re.findall(r"learning rates from the readouts down: (.*)", log)
    assert [r.strip() for r in rates] == ["0.005, 0.0025, 0.00125, 0.000625, 0.000313"]  # not in stage one
    assert "tensors taken over from" in log and "kept of this level of theory" in log
    before, after = map(float, re.findall(r"rms residual ([\d.]+) -> ([\d.]+) per atom", log)[-1])
    assert after < 0.5 * before
    first, second = (model_of(work / "out" / p) for p in ("classical/best.ckpt", "best.ckpt"))
    assert list(first.state_dict()) == list(second.state_dict())
    norms = [{n: b for n, b in m.named_buffers() if n.endswith("norm_const")} for m in (first, second)]
    assert norms[0] and all(torch.equal(norms[1][n], b) for n, b in norms[0].items())
    package = work / "tuned.nequip.zip"
    call(BIN / "nequip-package", "build", work / "out" / "best.ckpt", package)
    assert close(predict(package, "block"), predict(work / "out" / "best.ckpt", ""), 1e-4, 1e-2)


def test_as_a_labeler(work):
    """equitune label --with nequip:FILE: the model's own energies, forces that are their derivative."""
    from mace_lora.augment import open_labeler

    checkpoint = work / "out" / "best.ckpt"
    labeler = open_labeler(f"nequip:{checkpoint}")
    frames = ase.io.read(ROOT / "mace_lora" / "embedded" / "glycolamide_pbe0.extxyz.gz", "0:3", format="extxyz")
    labels = [labeler.label(a) for a in frames]
    expected = predict(checkpoint, "")
    assert [x.energy for x in labels] == pytest.approx([e for e, _ in expected], abs=1e-3)
    for mine, (_, forces) in zip(labels, expected, strict=True):
        assert mine.forces.reshape(-1).tolist() == pytest.approx(forces, abs=1e-3)
    assert labeler.identity.startswith("nequip:best.ckpt#")
    with pytest.raises(ValueError, match="nequip: the model does not know Cu"):
        labeler.label(ase.Atoms("Cu"))


def test_again_leaves_stage_one_alone_and_continues(work):
    before = (work / "out" / "classical" / "best.ckpt").stat().st_mtime_ns
    log = run(work, "epochs=3")
    assert "stage one is there" in log
    assert (work / "out" / "classical" / "best.ckpt").stat().st_mtime_ns == before
    other = run(work, "seed=7", check=False)
    assert "its stage was made with other settings" in " ".join(other.split())


def test_weights_and_levels(work, tmp_path):
    """Everything but the shifts comes from the checkpoint: neighbour normalisation and scales belong to its weights."""
    from nequip.utils.global_state import set_global_state

    set_global_state()
    inner = {"model_dtype": "float64", **MODELS["nequip"]}
    plain = nequip_ext.Autotuned(model=inner)
    names = [n for n, _ in plain.named_parameters()]
    assert names == [n for n, _ in nequip_ext.Autotuned(model=inner, model_dtype="float64").named_parameters()]
    first = work / "out" / "classical" / "best.ckpt"
    with pytest.raises(ValueError, match=r"type_names of the classical stage: expected \['H', 'C', 'O'\], got"):
        nequip_ext.Autotuned(model=inner, checkpoint=str(first))
    types = ["H", "C", "N", "O", "F", "S"]
    changes = {"type_names": types, "per_type_energy_shifts": dict.fromkeys(types, 1.5), "r_max": 5.0}
    with pytest.raises(ValueError, match="it is of another architecture than 'model'"):
        nequip_ext.Autotuned(model=inner | changes, checkpoint=str(first))
    with pytest.raises(ValueError, match=r"r_max of the classical stage: expected 4\.0, got 5\.0"):
        nequip_ext.Autotuned(model=inner | changes | {"r_max": 4.0}, checkpoint=str(first))
    with pytest.raises(FileNotFoundError, match="run the classical stage first"):
        nequip_ext.Autotuned(model=inner, checkpoint=str(tmp_path / "gone.ckpt"))
    same = {
        "_target_": "nequip.model.NequIPGNNModel", "seed": 9, "model_dtype": "float32", "type_names": types,
        "r_max": 5.0, "num_layers": 3, "l_max": 1, "parity": False, "num_features": 32, "radial_mlp_depth": 1,
        "radial_mlp_width": 64, "avg_num_neighbors": 3.0, "per_type_energy_shifts": 2.5,
        "per_type_energy_shifts_trainable": True,
        "per_type_energy_scales": 0.5,
    }  # fmt: skip
    with pytest.raises(ValueError, match="avg_num_neighbors: expected the value of the classical stage"):
        nequip_ext.Autotuned(model=same, checkpoint=str(first))
    content = torch.load(first, weights_only=False)["hyper_parameters"]["model"]["model"]
    same["avg_num_neighbors"] = content["avg_num_neighbors"]
    source = model_of(first)
    theirs = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    for kept in (("shifts",), ("shifts", "scales")):
        tuned = nequip_ext.Autotuned(model=same, checkpoint=str(first), keep=list(kept))
        for name, value in {**dict(tuned.named_parameters()), **dict(tuned.named_buffers())}.items():
            what = name.rpartition(".")[2]
            if what in kept:
                assert torch.allclose(value, torch.full_like(value, 2.5 if what == "shifts" else 0.5))
            else:
                torch.testing.assert_close(value, theirs[name])


def test_aligning_needs_shifts(work):
    shown = run(work, "training_module.model.model.per_type_energy_shifts=null", check=False, out="none")
    assert "has no per_type_energy_shifts to refit; set them (0.0 will do)" in " ".join(shown.split())
    with pytest.raises(ValueError, match="max_frames: expected a positive whole number, got 0"):
        nequip_ext.AlignEnergies(max_frames=0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("autotune.frames=gone.xyz", "autotune.frames: no file"),
        ("autotune.val=30", "autotune.val: expected between 1 and 28 of the frames"),
        ("autotune.epoch=3", "autotune: expected the keys .* unknown: epoch"),
        ("autotune.lr_decay=0", "autotune.lr_decay: expected a factor above 0 and up to 1, got 0"),
        ("autotune.offsets=atom", "autotune.offsets: expected one of element, composition, got 'atom'"),
        ("autotune.unfreeze=0.5", "autotune.unfreeze: expected null or at least 1 epoch, got 0.5"),
    ],
)
def test_bad_configs(springs, override, message):
    shown = " ".join(run(springs, override, check=False, out="bad").split())
    assert re.search(message, shown), shown[-800:]
    assert not (springs / "bad").exists()


def test_config_without_the_key(tmp_path):
    shutil.copy(ROOT / "recipes" / "configs" / "nequip_scratch.yaml", tmp_path / "plain.yaml")
    shown = call(BIN / "equitune", "nequip-autotune", tmp_path / "plain.yaml", check=False)
    expected = "checkpoint, epochs, frames, lr, val, and if wanted lr_decay, unfreeze, offsets; missing"
    assert f"autotune: expected the keys {expected}" in " ".join(shown.split())
    shown = call(BIN / "equitune", "nequip-autotune", tmp_path / "gone.yaml", check=False)
    assert "no file" in shown


@pytest.fixture
def stages(springs, tmp_path, monkeypatch):
    """The driver without trainings: each leaves its checkpoints, unless told to stop before the best."""
    calls, finish = [], {"classical": True}

    def train(folder, name, out, overrides):
        calls.append((out, driver._compose(folder, name, [*overrides, f"folder={driver._quoted(out)}"])))
        out.mkdir(parents=True, exist_ok=True)
        (out / "last.ckpt").write_text(str(len(calls)))
        if finish.get(out.name, True):
            (out / "best.ckpt").write_text(str(len(calls)))
        else:
            raise ValueError("stopped")

    monkeypatch.setattr(driver, "_train", train)
    monkeypatch.setattr(driver, "normalisation", lambda checkpoint: {})
    classical = tmp_path / "a, b=(c)" / "it's [d].xyz"
    classical.parent.mkdir()
    shutil.copy(springs / "classical.xyz", classical)

    def go(*more, out="out"):
        return driver.run(ROOT / "recipes" / "configs", "nequip_autotune", [
            f"folder={driver._quoted(tmp_path / out)}", f"autotune.frames={driver._quoted(classical)}",
            "autotune.val=5", *more,
        ], say=lambda line: None)  # fmt: skip

    return go, calls, finish, classical


def test_paths_with_characters_of_hydra(stages, tmp_path):
    go, calls, _, classical = stages
    go(out="a,b='(c)'=d")
    (first, one), (second, two) = calls
    assert first == second / "classical" == tmp_path / "a,b='(c)'=d" / "classical"
    assert one["data"]["split_dataset"] == {"file_path": str(classical), "train": 24, "val": 5, "test": 1}
    assert two["autotune"]["checkpoint"] == str(first / "best.ckpt")


def test_a_changed_classical_stage_is_not_continued(stages, tmp_path):
    go, calls, finish, classical = stages
    finish["classical"] = False
    with pytest.raises(ValueError, match="stopped"):
        go()
    text = classical.read_text()
    classical.write_text(text.replace("REF_energy=", "REF_energy=1", 1))
    with pytest.raises(ValueError, match=r"made with other settings \(autotune.frames: \w+ before, \w+ now\)"):
        go()
    classical.write_text(text)
    with pytest.raises(ValueError, match=r"made with other settings \(batch_size: 5 before, 4 now; "):
        go("batch_size=4")
    finish["classical"] = True
    go("lr=0.5", "epochs=7")  # of stage two alone
    assert len(calls) == 3
    go()
    assert len(calls) == 4  # stage one is there
    (tmp_path / "out" / "classical" / "best.ckpt").write_text("other")
    with pytest.raises(ValueError, match=r"last.ckpt: it did not start from .*classical/best.ckpt as it is now"):
        go()
    (tmp_path / "out" / "classical" / "stage_one.json").unlink()
    with pytest.raises(ValueError, match="checkpoints are left of a stage whose settings are unknown"):
        go()
    assert not json.loads((tmp_path / "out" / "stage_two.json").read_text())["classical"].startswith("other")


def test_other_quantum_data_are_not_continued(stages, springs, tmp_path):
    go, calls, _, _ = stages
    go()
    quantum = ase.io.read(ROOT / "mace_lora" / "embedded" / "glycolamide_pbe0.extxyz.gz", "0:60", format="extxyz")
    ase.io.write(tmp_path / "q.xyz", quantum, format="extxyz")
    file = driver._quoted(tmp_path / "q.xyz")
    for changes in (("frames=" + file,), ("data.split_dataset.train=40",)):
        with pytest.raises(ValueError, match=r"data: .*last.ckpt, which is continued, was trained on other fra"):
            go(*changes)
    go("epochs=9")  # no other data
    with pytest.raises(ValueError, match=r"data: the classical stage would read .*q\.xyz; expected split_dataset with"):
        go(f"data.split_dataset.file_path={file}", out="fixed")
    assert len(calls) == 3


def test_schedule_is_of_stage_two_alone(stages):
    go, calls, _, _ = stages
    with pytest.raises(
        ValueError, match=r"autotune.unfreeze: nothing in the config uses it; expected nequip_ext.Gradual"
    ):
        go("autotune.unfreeze=2", "trainer.callbacks=[]")
    go("autotune.unfreeze=2", "autotune.lr_decay=0.5")
    one, two = (config["autotune"] for _, config in calls)
    assert (one["unfreeze"], one["lr_decay"], two["unfreeze"], two["lr_decay"]) == (None, 1.0, 2, 0.5)
    with pytest.raises(
        ValueError, match=r"autotune.lr_decay: expected 0.5 as in .*last.ckpt, which is continued, got 1"
    ):
        go("autotune.unfreeze=2")


def test_offsets_of_compositions(stages, tmp_path):
    go, calls, _, classical = stages
    go("autotune.offsets=composition")
    path = Path(calls[0][1]["data"]["split_dataset"]["file_path"])
    old, new = (ase.io.read(p, ":") for p in (classical, path))
    change = [a.info["REF_energy"] - b.info["REF_energy"] for a, b in zip(old, new, strict=True)]
    assert sum(b.info["REF_energy"] for b in new) == pytest.approx(0.0, abs=1e-6)
    assert change == pytest.approx([change[0]] * len(change))
    assert calls[1][1]["data"]["split_dataset"]["file_path"] != str(path)
    with pytest.raises(ValueError, match=r"autotune.offsets: \"?composition\"? before, \"?element\"? now"):
        go()


def test_levels_are_checked_before_training(stages, springs):
    go, calls, _, classical = stages
    frames = ase.io.read(springs / "classical.xyz", ":")
    for atoms in frames:
        atoms.numbers[atoms.numbers == 7] = 8
    ase.io.write(classical, frames, format="extxyz")
    with pytest.raises(ValueError, match=r"autotune.frames: .* has no N, which frames of the config has"):
        go()
    quantum = ase.io.read(ROOT / "mace_lora" / "embedded" / "glycolamide_pbe0.extxyz.gz", "0:30", format="extxyz")
    ase.io.write(classical, quantum, format="extxyz")
    with pytest.raises(
        ValueError, match=r"same geometry and the same energy .* classical labels were given as quantum"
    ):
        go()
    assert not calls


def test_training_ends_with_the_driver(tmp_path):
    """SIGTERM to the driver alone."""
    fake = tmp_path / "nequip-train"
    fake.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/new && mv {tmp_path}/new {tmp_path}/pid\nexec sleep 100\n")
    fake.chmod(0o755)
    code = (
        f"import sys; sys.executable = '{tmp_path}/python'\nfrom pathlib import Path\n"
        f"from nequip_ext.autotune import driver\ndriver._train(Path(), 'x', Path('{tmp_path}/out'), [])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    end = time.time() + 60
    while not (tmp_path / "pid").exists() and time.time() < end:
        time.sleep(0.05)
    child = int((tmp_path / "pid").read_text())
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 143
    assert not Path(f"/proc/{child}").exists()


def test_labels_of_both_files_are_looked_at_before_stage_one(stages):
    go, calls, _, classical = stages
    text = classical.read_text()
    classical.write_text(re.sub(r"REF_energy=\S+", "REF_energy=nan", text, count=1))
    with pytest.raises(ValueError, match=r"autotune.frames: .* frame 0 \(C2H5NO2\): energy label is nan; remove or"):
        go()
    classical.write_text(text.replace("REF_forces", "their_forces"))
    with pytest.raises(ValueError, match=r"lacks labels that the loss needs: forces \(REF_forces, forces\); data.key_"):
        go()
    with_two = re.sub("Properties=", "energy=-1.0 Properties=", text)  # upstream would train on this one
    classical.write_text(with_two)
    with pytest.raises(ValueError, match="two different labels for total_energy: REF_energy and energy; remove one"):
        go()
    assert not calls


@pytest.mark.parametrize("keys", [("energy", "forces"), ("free_energy", "forces"), ("E", "F")])
def test_labels_are_found_where_upstream_finds_them(stages, keys):
    go, calls, _, classical = stages
    text = classical.read_text().replace("REF_energy", keys[0]).replace("REF_forces", keys[1])
    classical.write_text(text)
    names = f"REF_energy:total_energy,REF_forces:forces,{keys[0]}:total_energy,{keys[1]}:forces"
    mapping = f"++data.key_mapping={{{names}}}"
    if keys[0] == "free_energy":  # in the calculator alone
        with pytest.raises(
            ValueError, match="has no energies under REF_energy or free_energy or energy of which offsets"
        ):
            go(mapping, "autotune.offsets=composition")
        go(mapping, out="other")
        assert len(calls) == 2
        return
    go(mapping, "autotune.offsets=composition")
    assert len(calls) == 2
    (copy,) = classical.parent.parent.glob("out/classical/frames_without_offsets.xyz")
    frames = ase.io.read(copy, ":")
    assert abs(sum(labels.energy_of(a, {"key_mapping": {keys[0]: "total_energy"}}) for a in frames)) < 1e-4


def test_frames_may_lack_labels_where_the_loss_allows_it(stages):
    go, calls, _, classical = stages
    classical.write_text(re.sub(r"REF_energy=\S+", "REF_energy=nan", classical.read_text(), count=1))
    metric = "{name:e,field:total_energy,ignore_nan:true,metric:{_target_:nequip.train.MeanSquaredError}}"
    loss = f"training_module.loss={{_target_:nequip.train.MetricsManager,metrics:[{metric}]}}"
    with pytest.raises(ValueError, match="energy label is nan"):
        go()
    go("~training_module.loss", "+" + loss)
    assert len(calls) == 2


def test_settings_of_stage_two_leave_stage_one_alone(stages):
    go, calls, _, _ = stages
    go()
    go("trainer.callbacks.1.rescale=false", "+training_module.model.keep=[shifts,scales]")
    assert [out.name for out, _ in calls] == ["classical", "out", "out"]
