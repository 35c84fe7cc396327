"""The adapter that nequip_ext.SaveAdapter writes: which epoch, whose, beside which base."""

import csv
import json
import shutil

import ase.io
import numpy as np
import pytest
from test_lora_lifecycle import BIN, ROOT, call, close, predict, train

pytest.importorskip("nequip")
pytestmark = pytest.mark.nequip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A base and frames of DFT: half.xyz to train on, rest.xyz to validate."""
    folder = tmp_path_factory.mktemp("save")
    train("nequip_scratch", "epochs=1", f"folder={folder}/base")
    frames = ase.io.read(ROOT / "mace_lora/embedded/glycolamide_pbe0.extxyz.gz", ":40", format="extxyz")
    for name, part in (("half", frames[::2]), ("rest", frames[1::2])):
        ase.io.write(folder / f"{name}.xyz", part, format="extxyz")
    return folder


def lora(work, folder, *overrides: str, data: str = "half", check: bool = True) -> str:
    return " ".join(
        train(
            "nequip_lora", f"folder={folder}", f"base={work}/base/best.ckpt", "run=[train]", "~data.split_dataset",
            f"+data.train_file_path={work}/{data}.xyz", f"+data.val_file_path={work}/rest.xyz", *overrides,
            check=check,
        ).split()
    )  # fmt: skip


@pytest.fixture(scope="module")
def plain(work):
    """A run without modify_PerTypeScaleShift: shifts of valence electrons under labels of all electrons."""
    lora(work, work / "plain", "epochs=3", "training_module.model.model.modifiers=[]")
    return work / "plain"


def test_best_epoch_and_its_errors_are_of_what_is_saved(work, plain, tmp_path):
    """The shifts are refitted before a validation, not after it."""
    with next((plain / "lightning_logs").glob("*/metrics.csv")).open() as handle:
        rows = [r for r in csv.DictReader(handle) if r["val0_epoch/weighted_sum"]]
    best = min(rows, key=lambda r: float(r["val0_epoch/weighted_sum"]))
    call(
        BIN / "equitune", "evaluate", work / "base" / "best.ckpt", work / "rest.xyz", "--adapter", plain / "adapter",
        "-o", tmp_path,
    )  # fmt: skip
    found = json.loads((tmp_path / "errors.json").read_text())["errors"]
    assert found["mae_e"] == pytest.approx(1e3 * float(best["val0_epoch/per_atom_energy_mae"]), rel=1e-3)
    assert found["mae_f"] == pytest.approx(1e3 * float(best["val0_epoch/forces_mae"]), rel=1e-3)
    shown = json.loads(call(BIN / "equitune", "info", plain / "adapter", "--json"))
    assert best["val0_epoch/forces_mae"][:6] in json.dumps(shown)


def test_large_shifts_are_kept_exactly(work, plain):
    """700 eV per atom, 1e-6 eV per atom of 9 atoms."""
    trained = predict(plain / "best.ckpt", "")
    assert close(trained, predict(work / "base" / "best.ckpt", "", plain / "adapter"), 9e-6, 1e-5)


def test_full_fine_tuning_is_validated_with_refitted_shifts(work, tmp_path):
    """Labels moved by 3 eV at each atom: no epoch is judged by that."""
    frames = ase.io.read(work / "half.xyz", ":")
    for name, shift in (("near", 0.0), ("far", 3.0)):
        for part in ("half", "rest"):
            moved = [a.copy() for a in frames]
            for a in moved:
                a.info["REF_energy"] += shift * len(a)
            ase.io.write(tmp_path / f"{name}_{part}.xyz", moved, format="extxyz")
        train(
            "nequip_full", f"folder={tmp_path}/{name}", f"base={work}/base/best.ckpt", "run=[train]", "epochs=1",
            "~data.split_dataset", f"+data.train_file_path={tmp_path}/{name}_half.xyz",
            f"+data.val_file_path={tmp_path}/{name}_rest.xyz",
        )  # fmt: skip
    found = []
    for name in ("near", "far"):
        with next((tmp_path / name / "lightning_logs").glob("*/metrics.csv")).open() as handle:
            found += [float(r["val0_epoch/per_atom_energy_mae"]) for r in csv.DictReader(handle)
                      if r["val0_epoch/weighted_sum"]]  # fmt: skip
    assert found[0] == pytest.approx(found[1], rel=0.02) and found[0] < 0.1


def test_base_without_shifts_is_said(work, tmp_path):
    train("nequip_scratch", "epochs=1", f"folder={tmp_path}/base", "training_module.model.per_type_energy_shifts=null")
    log = lora(
        work,
        tmp_path / "lora",
        "epochs=1",
        f"base={tmp_path}/base/best.ckpt",
        "training_module.model.model.modifiers=[]",
    )
    assert "per atom on average, and nothing takes that off" in log


def test_adapter_of_another_run_is_not_overwritten(work, plain, tmp_path):
    before = (plain / "adapter" / "adapter_model.safetensors").read_bytes()
    lora(work, tmp_path, "epochs=1")
    more = ("epochs=2", f"++ckpt_path={tmp_path}/last.ckpt")
    log = lora(work, tmp_path, *more, f"trainer.callbacks.1.path={plain}/adapter", check=False)
    assert "holds the adapter of another run (" in log and "than the one that 'ckpt_path' continues" in log
    assert (plain / "adapter" / "adapter_model.safetensors").read_bytes() == before
    log = lora(work, tmp_path, *more, f"trainer.callbacks.1.path={tmp_path}/moved")  # its best score goes with it
    assert "best epoch 1" in log or "no epoch of this run was better than the best before" in log


def test_one_run_at_a_time(work, tmp_path):
    from mace_lora.atomic import only_writer

    with only_writer(tmp_path, ".adapter.lock"):
        log = lora(work, tmp_path, "epochs=1", check=False)
    assert "another run is writing there now" in log and not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.callbacks.1.path=null", "path: expected a folder for the adapter, new or of this run, got None"),
        ("+trainer.callbacks.1.max_frames=a", "max_frames: expected a positive whole number, got 'a'"),
        ("+trainer.callbacks.1.check_units='no'", "check_units: expected true or false, got 'no'"),
    ],
)
def test_bad_settings(work, tmp_path, override, message):
    assert message in lora(work, tmp_path, "epochs=1", override, check=False)


def test_bad_labels(work, tmp_path):
    frames = ase.io.read(work / "half.xyz", ":")
    frames[17].arrays["REF_forces"][2, 0] = np.nan
    ase.io.write(work / "nan.xyz", frames, format="extxyz")
    log = lora(work, tmp_path, "epochs=1", data="nan", check=False)
    assert "label 'forces' is NaN or infinite in frames [" in log and not (tmp_path / "adapter").exists()
    (tmp_path / "file").write_text("")
    log = lora(work, tmp_path, "epochs=1", f"trainer.callbacks.1.path={tmp_path}/file", check=False)
    assert "path: expected a folder for the adapter, new or of this run, got" in log


def test_labels_are_looked_at_after_a_restart_too(work, tmp_path):
    frames = ase.io.read(work / "half.xyz", ":")
    lora(work, tmp_path, "epochs=1", "data.train_dataloader.shuffle=false")
    frames[17].arrays["REF_forces"][2, 0] = np.nan
    ase.io.write(tmp_path / "nan.xyz", frames, format="extxyz")
    log = lora(work, tmp_path, "epochs=3", "data.train_dataloader.shuffle=false", f"++ckpt_path={tmp_path}/last.ckpt",
               f"data.train_file_path={tmp_path}/nan.xyz", check=False)  # fmt: skip
    assert "training batch 3: label 'forces' is NaN or infinite in frames [" in log


def test_a_base_is_no_run_to_continue(work, tmp_path):
    log = " ".join(train("nequip_lora", f"folder={tmp_path}", f"base={work}/base/best.ckpt", "epochs=2",
                         f"++ckpt_path={work}/base/last.ckpt", check=False).split())  # fmt: skip
    assert "'ckpt_path' continues a run, with the model of that run and not the config's: give a base" in log


def test_restarted_training_is_the_uninterrupted_one(work, tmp_path):
    import torch

    def trained(name: str, *overrides: str) -> dict:
        lora(work, tmp_path / name, "data.train_dataloader.shuffle=false", *overrides)
        state = torch.load(tmp_path / name / "last.ckpt", map_location="cpu", weights_only=False)["state_dict"]
        return {n: v for n, v in state.items() if torch.is_tensor(v)}

    once = trained("once", "epochs=2")
    trained("twice", "epochs=1")
    again = trained("twice", "epochs=2", f"++ckpt_path={tmp_path}/twice/last.ckpt")
    assert once.keys() == again.keys() and all(torch.equal(v, again[n]) for n, v in once.items())


def test_adapter_from_a_checkpoint_whose_base_is_another_by_now(work, tmp_path):
    """Weights come from the checkpoint, and numbers of neighbours from the file."""
    from nequip_ext.lora.saved import load_nequip

    base = tmp_path / "base.ckpt"
    shutil.copy(work / "base" / "best.ckpt", base)
    lora(work, tmp_path / "run", "epochs=1", f"base={base}")
    train("nequip_scratch", "epochs=1", "seed=5", f"folder={tmp_path}/other")
    shutil.copy(tmp_path / "other" / "best.ckpt", base)
    with pytest.raises(
        ValueError, match=r"best\.ckpt: its base .*base\.ckpt is another by now, .*: put the base of the"
    ):
        load_nequip(tmp_path / "run" / "best.ckpt")


def test_merge_and_diff(work, plain, tmp_path):
    base, adapter = work / "base.nequip.zip", plain / "adapter"
    call(BIN / "nequip-package", "build", work / "base" / "best.ckpt", base)
    before = base.read_bytes()
    for output in (base, adapter / "merged.nequip.zip"):
        log = " ".join(call(BIN / "equitune", "merge", base, adapter, "-o", output, check=False).split())
        assert "is the base, or in the adapter's folder; choose another name" in log
    assert base.read_bytes() == before
    rows = json.loads(call(BIN / "equitune", "diff", base, adapter, "--json", "--rows", "0"))
    assert json.loads(call(BIN / "equitune", "diff", base, plain / "best.ckpt", "--json", "--rows", "0")) == rows
    assert {r["irrep"] for r in rows if r["relative"] > 0} >= {"0e", "1o"}
    assert next(r for r in rows if r["module"].endswith("shifts"))["relative"] > 1
    for arguments, message in (
        ((base, adapter, "--head", "pt"), "--head: a NequIP model has no heads; leave 'pt' out"),
        ((base, "embedded"), "tuned: expected a model of the same framework as"),
        (("x.nequip.pt2", adapter), "x.nequip.pt2: a compiled model cannot be read; give the checkpoint or package"),
    ):
        assert message in " ".join(call(BIN / "equitune", "diff", *arguments, check=False).split())


def test_trained_params():
    from nequip_models import lora as adapted

    import nequip_ext

    model = adapted("painn", rank=2)
    wanted = {n for n, p in model.named_parameters() if p.requires_grad}
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)] for p in nequip_ext.TrainedParams(model)} == wanted and wanted
