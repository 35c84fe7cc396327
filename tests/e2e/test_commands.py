"""The ``equitune`` commands on real files."""

import json
import re
import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from helpers import BIN, dft_frames, launch, train

from mace_lora import LoraConfig, apply_lora, fingerprint, save_adapter
from mace_lora.evaluate.metrics import errors, intervals, predict
from mace_lora.lora.diff import diff_models
from mace_lora.lora.tune import rungs
from mace_lora.mace_plugin.base_model import embedded_base, load_model
from mace_lora.mace_plugin.convention import check_convention, sign_dependent_paths
from mace_lora.mace_plugin.convert import convert_model

pytestmark = pytest.mark.mace


def equitune(*arguments, check=True):
    own = arguments[0] in ("run", "tune")  # they start mace_run_train
    return launch([BIN / "equitune", *arguments], check=check, warm=not own)


@pytest.fixture(scope="module")
def adapter(job, tmp_path_factory):
    """An adapter trained for three epochs."""
    work = tmp_path_factory.mktemp("adapter")
    train(job, work, max_num_epochs=3, default_dtype="float64")
    return work / "run-adapter"


def test_evaluate_base_and_adapter(job, adapter, tmp_path):
    shown = equitune("evaluate", job / "base.model", job / "test.xyz", "--adapter", adapter, "-o", tmp_path).stdout
    content = json.loads((tmp_path / "errors.json").read_text())
    from mace.calculators import MACECalculator

    calc = MACECalculator(model_paths=str(adapter.parent / "run.model"), device="cpu", default_dtype="float64")
    expected = errors(predict(calc, dft_frames("test", 5)))
    assert content["errors"]["mae_f"] == pytest.approx(expected.mae_f, rel=1e-4)
    assert content["errors"]["mae_e"] == pytest.approx(expected.mae_e, rel=1e-3)
    assert content["intervals"]["mae_f"][0] < expected.mae_f < content["intervals"]["mae_f"][1]
    assert set(content["force_errors_by_element"]) == {"H", "C", "N", "O"}
    assert f"{expected.mae_f:.1f}" in shown
    assert (tmp_path / "parity.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_stress_of_a_crystal(tmp_path):
    from ase.build import bulk
    from mace.calculators import MACECalculator

    model = embedded_base(torch.float64)
    calc = MACECalculator(models=[model], device="cpu", default_dtype="float64")
    frames = []
    for scale in (1.0, 1.02):
        atoms = bulk("C", "diamond", a=3.6 * scale, cubic=True)
        atoms.calc = calc
        energy, forces, stress = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
        atoms.calc = None
        atoms.info.update(REF_energy=energy + 0.008, REF_stress=stress + 1e-3)
        atoms.arrays["REF_forces"] = forces
        frames.append(atoms)
    ase.io.write(tmp_path / "c.xyz", frames, format="extxyz")
    equitune("evaluate", "embedded", tmp_path / "c.xyz", "-o", tmp_path)
    content = json.loads((tmp_path / "errors.json").read_text())
    assert content["stress_errors"]["mae"] == pytest.approx(1.0, rel=1e-3)
    assert content["errors"]["mae_e"] == pytest.approx(1.0, rel=1e-3)
    assert content["mae_e_without_mean_error"] == pytest.approx(0.0, abs=1e-6)


def test_frames_without_one_kind_of_label():
    frames = dft_frames("test", 3)
    del frames[0].info["REF_energy"]
    del frames[1].arrays["REF_forces"]
    from mace.calculators import MACECalculator

    p = predict(MACECalculator(models=[embedded_base(torch.float64)], device="cpu"), frames)
    assert np.isfinite(p.energy_label).tolist() == [False, True, True]
    assert np.isfinite(errors(p).mae_f)
    assert intervals(p)["mae_f"][0] < errors(p).mae_f < intervals(p)["mae_f"][1]
    del frames[0].arrays["REF_forces"]
    with pytest.raises(ValueError, match="frame 0: expected labels REF_energy and REF_forces, got"):
        predict(None, frames)
    with pytest.raises(ValueError, match="frames: expected at least one labelled frame, got none"):
        predict(None, [])


def test_convert_there_and_back(job, tmp_path):
    equitune("convert-model", job / "base.model", tmp_path / "x.safetensors")
    equitune("convert-model", tmp_path / "x.safetensors", tmp_path / "y.model")
    before, after = (torch.load(p, weights_only=False) for p in (job / "base.model", tmp_path / "y.model"))
    assert fingerprint(before) == fingerprint(after)
    for name, value in before.state_dict().items():
        assert torch.equal(value, after.state_dict()[name]), name
        assert value.dtype == after.state_dict()[name].dtype


@pytest.mark.parametrize("name", ["MACE-OFF23_small", "mace_mp_small"])
def test_convert_public_models(shared_data, tmp_path, name):
    convert_model(shared_data / "models" / f"{name}.model", tmp_path / "x.safetensors")
    again = load_model(tmp_path / "x")
    before = torch.load(shared_data / "models" / f"{name}.model", map_location="cpu", weights_only=False)
    assert fingerprint(again) == fingerprint(before)


ACROSS = """
import sys, mace, e3nn, torch, numpy, ase.io
from mace_lora.mace_plugin.base_model import load_model
from mace.calculators import MACECalculator
atoms = ase.io.read(sys.argv[2], "0")
atoms.calc = MACECalculator(models=[load_model(sys.argv[1])], device="cpu", default_dtype="float64")
numpy.savez(sys.argv[3], version=e3nn.__version__, e=atoms.get_potential_energy(), f=atoms.get_forces())
"""


def test_safetensors_cross_e3nn_versions_exactly(job, tmp_path, monkeypatch):
    """A float64 base gives the same energy and forces under e3nn 0.4.4 and 0.6."""
    found = sorted(Path(__file__).parents[2].glob(".venv-nequip/lib/python*/site-packages/e3nn"))
    if not found:
        pytest.skip("no e3nn 0.6 at hand (make env-nequip)")
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "e3nn").symlink_to(found[0])
    convert_model(job / "base.model", tmp_path / "x.safetensors")
    results = {}
    for label, path in (("older", ""), ("newer", str(tmp_path / "newer"))):
        monkeypatch.setenv("PYTHONPATH", path)
        launch([sys.executable, "-c", ACROSS, tmp_path / "x", job / "test.xyz", tmp_path / f"{label}.npz"])
        results[label] = np.load(tmp_path / f"{label}.npz")
    assert str(results["older"]["version"]).startswith("0.4")
    assert str(results["newer"]["version"]).startswith("0.6")
    assert results["newer"]["e"] == pytest.approx(float(results["older"]["e"]), abs=1e-9)
    assert np.abs(results["newer"]["f"] - results["older"]["f"]).max() < 1e-10


def test_sign_dependent_models_are_refused_across_versions():
    from e3nn import o3

    product = o3.FullyConnectedTensorProduct("2x1e", "2x2e", "2x2e")
    model = torch.nn.ModuleDict({"tp": product})
    assert sign_dependent_paths(model) == ["tp: 1 x 2 -> 2"]
    assert sign_dependent_paths(embedded_base(torch.float64)) == []
    stored = {"wigner_3j_sign": 0, "sign_dependent_paths": sign_dependent_paths(model)}
    with pytest.raises(
        ValueError, match=r"X: written under the other e3nn sign convention, and 1 tensor-product paths"
    ):
        check_convention(stored, "X")
    check_convention(stored | {"sign_dependent_paths": []}, "X")


def test_diff_finds_what_was_changed(job, adapter):
    rows = json.loads(equitune("diff", job / "base.model", adapter, "--json").stdout.partition("[")[2].join(("[", "")))
    assert rows[0]["relative"] > rows[-1]["relative"]
    touched = [r for r in rows if r["module"] == "interactions.0.linear" and r["irrep"] == "1o"]
    assert touched[0]["relative"] > 1e-4
    assert touched[0]["rank90"] <= 4 < touched[0]["full_rank"]  # the adapter's rank is 4
    shown = equitune("diff", job / "base.model", adapter.parent / "run.model", "--rows", "3").stdout
    assert f"3 of {len(rows)} rows shown" in shown


def test_diff_sees_energy_references_and_scale(job, tmp_path):
    model = torch.load(job / "base.model", weights_only=False)
    model.atomic_energies_fn.atomic_energies += 5.0
    model.scale_shift.scale *= 2.0
    torch.save(model, tmp_path / "other.model")
    shown = equitune("diff", job / "base.model", tmp_path / "other.model", "--json").stdout
    rows = {r["module"]: r["relative"] for r in json.loads(shown.partition("[")[2].join(("[", "")))}
    assert rows["scale_shift.scale"] == pytest.approx(1.0)
    assert rows["atomic_energies_fn.atomic_energies"] > 1e-3
    assert rows["scale_shift.shift"] == 0


def test_merge_leaves_other_files_alone(job, adapter, tmp_path):
    base = tmp_path / "b.model"
    base.write_bytes((job / "base.model").read_bytes())
    for output, message in (
        (base, "--output: .*b.model is the base"),
        (adapter / "m.model", "or in the adapter's folder; choose another name"),
        (tmp_path / "m.safetensors", "--output: expected a name that ends in .model"),
    ):
        done = equitune("merge", base, adapter, "-o", output, check=False)
        assert done.returncode == 2 and re.search(message, " ".join(done.stdout.split())), done.stdout
    assert base.read_bytes() == (job / "base.model").read_bytes()


def test_run_has_help():
    assert "mace_run_train" in equitune("run", "--help").stdout


def test_conversion_is_verified_by_a_prediction(job, tmp_path):
    """What is an attribute only is in neither weights nor configuration; the pair before stays."""
    model = torch.load(job / "base.model", weights_only=False)
    (first,) = (p for p in convert_model(job / "base.model", tmp_path / "pair.safetensors") if p.suffix == ".json")
    content = first.read_bytes()
    model.interactions[0].avg_num_neighbors = 99.0
    torch.save(model, tmp_path / "odd.model")
    with pytest.raises(ValueError, match="the rebuilt model has equal weights and other predictions"):
        convert_model(tmp_path / "odd.model", tmp_path / "pair.safetensors")
    assert first.read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["odd.model", "pair.json", "pair.safetensors"]


def test_elements_and_devices_that_are_not_there(job, adapter):
    from mace_lora import load_calculator

    atoms = dft_frames("test", 1)[0]
    atoms.numbers[0] = 9
    atoms.calc = load_calculator(job / "base.model", adapter)
    with pytest.raises(ValueError, match=r"the model does not know the atomic numbers \[9\], only \[1, 6, 7, 8\]"):
        atoms.get_potential_energy()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: expected one that torch can use here, got 'cuda' without CUDA"):
            load_calculator(job / "base.model", adapter, device="cuda")


def test_bad_files(job, tmp_path):
    """A message, no traceback."""
    from mace_lora.mace_plugin.base_model import save_base

    save_base(embedded_base(), tmp_path / "cut")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:1000])
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "empty.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes())
    (tmp_path / "notes.xyz").write_text("nothing")
    save_base(embedded_base(), tmp_path / "mixed")
    content = json.loads((tmp_path / "mixed.json").read_text())
    content["config"]["max_ell"] = 1
    (tmp_path / "mixed.json").write_text(json.dumps(content))
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "run_compiled.model")
    test = job / "test.xyz"
    for arguments, message in (
        (("info", tmp_path / "cut.safetensors"), "cut.json or .safetensors is damaged"),
        (("info", tmp_path / "mixed.json"), "mixed.json and .safetensors do not belong together"),
        (("info", tmp_path / "run_compiled.model"), "is compiled for TorchScript, which holds no layers to read"),
        (("info", tmp_path / "x.nequip.zip"), 'this needs nequip here: pip install "equitune[nequip]"'),
        (("evaluate", "embedded", tmp_path / "notes.xyz"), "notes.xyz: cannot be read as structures"),
        (("evaluate", "embedded", test, "--index", "x"), "--index: expected a number or a slice such as 0:100"),
        (("evaluate", "embedded", test, "--index", "9999"), "has no frame 9999"),
    ):
        done = equitune(*arguments, check=False)
        assert done.returncode == 2 and message in " ".join(done.stdout.split()), done.stdout


def test_evaluate_the_last_frame(job, tmp_path):
    equitune("evaluate", "embedded", job / "test.xyz", "--index", "-1", "-o", tmp_path)
    assert json.loads((tmp_path / "errors.json").read_text())["frames"] == 1


def test_diff_of_different_architectures():
    a, b = torch.nn.Linear(2, 3), torch.nn.Linear(2, 4)
    with pytest.raises(ValueError, match="the models differ in architecture: weight has shape"):
        diff_models(a, b)


def test_info_on_everything(job, adapter):
    content = json.loads("{" + equitune("info", adapter, "--json").stdout.partition("{")[2])
    assert content["rank, alpha"] == "4, 4"
    assert content["parameters"] > 1000
    model = json.loads("{" + equitune("info", job / "base.model", "--json").stdout.partition("{")[2])
    assert model["fingerprint"] == fingerprint(embedded_base(torch.float64))
    assert model["kind"] == "ScaleShiftMACE"
    assert "1o" in model["adaptable weights"]
    assert content["foundation_fingerprint"] == model["fingerprint"]
    shown = " ".join(equitune("info", "embedded").stdout.replace("│", " ").split())
    assert (
        "held-out molecules: frames 1417, MAE_E_per_atom_meV 3.71, RMSE_E_per_atom_meV 5.0, MAE_F_meV_per_A 54.69"
        in shown
    )
    assert "level GFN2-xTB" in shown


def test_merge_in_another_precision(job, adapter, tmp_path):
    shown = equitune("merge", job / "base.model", adapter, "-o", tmp_path / "m.model", "--dtype", "float32").stdout
    assert "merged model (float32) written" in shown
    assert next(torch.load(tmp_path / "m.model", weights_only=False).parameters()).dtype == torch.float32


def test_tune_is_resumable_and_names_the_best(job, tmp_path):
    given = [
        f"--foundation_model={job / 'base.model'}", f"--train_file={job / 'train.xyz'}",
        f"--valid_file={job / 'valid.xyz'}", f"--E0s={(job / 'e0s.txt').read_text()}", "--default_dtype=float32",
        "--batch_size=5", "--valid_batch_size=5", "--multiheads_finetuning=False", "--device=cpu",
    ]  # fmt: skip
    command = ["tune", "--ranks", "2,4", "--lrs", "0.0001,0.01", "--epochs", "6", "-o", tmp_path, "--", *given]
    shown = equitune(*command).stdout
    trials = json.loads((tmp_path / "tune.json").read_text())
    assert len(trials) == 4
    assert trials[0]["lr"] == 0.01  # 0.0001 hardly moves in so few steps
    assert trials[0]["epochs"] == 6
    assert min(t["epochs"] for t in trials) < 6
    assert f"best: --lora --lora_rank={trials[0]['rank']} --lr=0.01" in shown
    logs = {p: p.stat().st_size for p in tmp_path.glob("*/log.txt")}
    equitune(*command)
    assert logs == {p: p.stat().st_size for p in tmp_path.glob("*/log.txt")}
    done = equitune("tune", "-o", tmp_path / "bad", "--ranks", "2", "--lrs", "0.01", "--", "--nonsense=1", check=False)
    assert done.returncode == 2
    assert "mace_run_train failed in" in done.stdout


def test_rungs():
    assert rungs(90, 6) == [(10, 6), (30, 2), (90, 1)]
    assert rungs(90, 1) == [(90, 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nowhere.model", "{test}"], "no model nowhere.model: expected a .model file"),
        (["evaluate", "embedded", "nowhere.xyz"], "no file nowhere.xyz"),
        (["evaluate", "embedded", "{test}", "--head", "x"], "--head: expected one of Default, got 'x'"),
        (["evaluate", "embedded", "{test}", "--level", "2"], "--level: expected a number between 0 and 1, got 2.0"),
        (
            ["evaluate", "embedded", "{test}", "--energy-key", "E", "--forces-key", "F"],
            "frame 0: expected labels E and F",
        ),
        (["evaluate", "{corrupt}", "{test}"], "cannot be read as a MACE model"),
        (["merge", "{corrupt}", "{adapter}", "-o", "x.model"], "cannot be read as a MACE model"),
        (["info", "{other}"], "holds a dict; expected a MACE model"),
        (["convert-model", "embedded", "x.pt"], "target: expected a name ending in .model or .safetensors, got x.pt"),
        (["diff", "embedded", "nowhere.model"], "no model nowhere.model"),
        (["tune", "--ranks", "a"], "--ranks/--lrs: expected comma-separated numbers"),
        (["run", "no_such_command"], "run: expected the name of an installed command"),
    ],
)
def test_messages(job, adapter, tmp_path, arguments, message):
    (tmp_path / "corrupt.model").write_bytes((job / "base.model").read_bytes()[:3000])
    torch.save({"a": 1}, tmp_path / "other.model")
    places = {
        "test": job / "test.xyz", "corrupt": tmp_path / "corrupt.model", "other": tmp_path / "other.model",
        "adapter": adapter,
    }  # fmt: skip
    done = equitune(*(a.format(**places) for a in arguments), check=False)
    assert done.returncode == 2
    assert "equitune: error: " in done.stdout
    assert message in " ".join(done.stdout.split())
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize(
    "command", ["evaluate", "diff", "merge", "info", "tune", "convert-model", "export-base", "doctor"]
)
def test_help(command):
    done = subprocess.run([BIN / "equitune", command, "--help"], capture_output=True, text=True, check=True)
    assert "Usage: equitune" in done.stdout


def test_loading_a_wrong_base_leaves_no_adapter_behind(tmp_path):
    from models import build_mace

    from mace_lora import adapter_names, load_adapter

    folder = save_adapter(apply_lora(build_mace(), LoraConfig(rank=2)), tmp_path / "a")
    other = build_mace(hidden="6x0e+6x1o")
    with pytest.raises(ValueError, match=r"expected shape .* from the model, got .*; wrong base model\?"):
        load_adapter(other, folder, check_base=False)
    assert adapter_names(other) == []
