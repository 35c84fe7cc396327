"""mace_run_train --lora, end to end."""

import sys

import mace.cli.run_train
import numpy as np
import pytest
import torch
from helpers import BIN, dft_frames, flags, launch, train

from mace_lora import adapter_names, coverage, fingerprint, load_adapter, merge_lora, read_adapter
from mace_lora.mace_plugin.base_model import describe_base, embedded_base, prepare_base

pytestmark = pytest.mark.mace

EVALUATE = """
import sys
sys.modules["mace_lora"] = None  # as where equitune is not installed
import ase.io, numpy, torch
from mace.calculators import MACECalculator
atoms = ase.io.read(sys.argv[2], "0")
calc = MACECalculator(model_paths=sys.argv[1], device="cpu", default_dtype="float32")
atoms.calc = calc
numpy.savez(sys.argv[3], e=atoms.get_potential_energy(), f=atoms.get_forces())
"""


@pytest.fixture(scope="module")
def finished(job, tmp_path_factory):
    """A run with EMA and stage two."""
    work = tmp_path_factory.mktemp("finished")
    log = train(job, work, ema=True, swa=True, start_swa=2, max_num_epochs=4, test_file=job / "test.xyz",
                lora_level_of_theory="PBE0/def2-SVP").stdout  # fmt: skip
    return work, log


def test_what_a_run_writes(finished):
    work, _ = finished
    for folder in ("run-adapter", "run_stagetwo-adapter"):
        assert {p.name for p in (work / folder).iterdir()} == {
            "adapter_config.json", "adapter_model.safetensors", "README.md",
        }  # fmt: skip
    assert (work / "run.model").is_file()
    assert (work / "run_compiled.model").is_file()  # TorchScript works on the merged model
    saved = read_adapter(work / "run-adapter")
    assert saved.config.rank == 4
    assert saved.metadata["foundation_fingerprint"] == fingerprint(embedded_base())
    assert saved.metadata["elements"] == [1, 6, 7, 8]
    assert "epoch" in saved.run
    assert "validation_loss" in saved.run
    assert {"train_file:train.xyz", "valid_file:valid.xyz"} <= set(saved.metadata["data"])
    assert "--lora" in saved.metadata["command"]
    assert saved.metadata["level_of_theory"] == "PBE0/def2-SVP"
    assert "| level of theory | `PBE0/def2-SVP` |" in (work / "run-adapter" / "README.md").read_text()
    assert not [p.name for p in work.iterdir() if p.name.endswith((".part", ".tmp"))]


def test_preflight_is_printed(finished):
    log = finished[1]
    assert "LoRA coverage" in log
    assert "interactions.0.skip_tp" in log
    assert "identity at start: |dE| <= 0.00e+00 eV" in log
    assert "dry-run merge" in log
    assert "energy reference check on 10 frames" in log


def test_adapter_on_the_foundation_model_is_the_merged_model(job, finished):
    work, _ = finished
    merged = torch.load(work / "run.model", weights_only=False)
    model = merge_lora(load_adapter(embedded_base(torch.float32), work / "run-adapter"))
    theirs, ours = merged.state_dict(), model.state_dict()
    assert theirs.keys() == ours.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-5)


def test_requested_energy_references_are_in_the_model(job, tmp_path):
    """Upstream takes the foundation's E0s where data and foundation have the same elements."""
    base = embedded_base(torch.float64)
    full = describe_base(base)
    four = {z: e for z, e in full["E0s"]["Default"].items() if int(z) in (1, 6, 7, 8)}
    same = prepare_base(base, full | {"elements": [1, 6, 7, 8], "E0s": {"Default": four}})
    torch.save(same, tmp_path / "same.model")
    log = train(job, tmp_path, foundation_model=tmp_path / "same.model", max_num_epochs=1, lora_refit_E0s=False).stdout
    merged = torch.load(tmp_path / "run.model", weights_only=False)
    wanted = {str(z): e for z, e in eval((job / "e0s.txt").read_text()).items()}
    assert describe_base(merged)["E0s"]["Default"] == pytest.approx(wanted, rel=1e-6)
    assert "upstream replaced the requested E0s" in log


def test_merged_model_without_equitune(job, finished, tmp_path):
    work, _ = finished
    out = tmp_path / "out.npz"
    launch([sys.executable, "-c", EVALUATE, work / "run.model", job / "test.xyz", out], disable=True)
    from mace.calculators import MACECalculator

    model = load_adapter(embedded_base(torch.float32), work / "run-adapter")
    atoms = dft_frames("test", 1)[0]
    atoms.calc = MACECalculator(models=[model], device="cpu", default_dtype="float32")
    result = np.load(out)
    assert result["e"] == pytest.approx(atoms.get_potential_energy(), abs=2e-3)  # float32 at -7725 eV
    assert np.abs(result["f"] - atoms.get_forces()).max() < 1e-4


def test_merge_and_info_on_the_command_line(job, finished, tmp_path):
    work, _ = finished
    adapter, merged = work / "run-adapter", tmp_path / "merged.model"
    launch([BIN / "equitune", "merge", job / "base.model", adapter, "-o", merged])
    ours, theirs = (torch.load(p, weights_only=False).state_dict() for p in (merged, work / "run.model"))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-5)
    shown = launch([BIN / "equitune", "info", adapter]).stdout
    assert "degree_parity" in shown
    assert "4, 4" in shown
    assert read_adapter(adapter).metadata["base_fingerprint"][:20] in shown
    done = launch([BIN / "equitune", "merge", work / "run.model", adapter, "-o", tmp_path / "x.model"], check=False)
    assert done.returncode == 2
    assert "equitune: error: adapter" in done.stdout
    assert "it was trained on another base model" in done.stdout
    done = launch([BIN / "equitune", "info", tmp_path], check=False)
    assert done.returncode == 2
    assert "expected a file adapter_config.json" in done.stdout


def test_python_module_file_path_and_launcher(job, tmp_path):
    ways = {
        "module": [sys.executable, "-m", "mace.cli.run_train"],
        "path": [sys.executable, mace.cli.run_train.__file__],
        "launcher": [BIN / "equitune", "run", "mace_run_train"],
    }
    for name, command in ways.items():
        launch([*command, *flags(job, tmp_path / name, max_num_epochs=1)])
        assert (tmp_path / name / "run-adapter" / "adapter_model.safetensors").is_file()


def test_yaml_config_and_flags(job, tmp_path):
    (tmp_path / "config.yaml").write_text(
        "lora: true\nlora_rank_pattern: '0e:3,1o:1'\nlora_targets: 'readouts,linear_up'\n"
    )
    train(job, tmp_path / "w", lora=None, config=tmp_path / "config.yaml", max_num_epochs=1, lora_dense="none")
    saved = read_adapter(tmp_path / "w" / "run-adapter")
    assert {p.name for p in saved.plan} == {
        "atomic_energies_fn",  # their shift is fitted, not trained
        "interactions.0.linear_up", "interactions.1.linear_up", "readouts.0.linear", "readouts.1.linear_1",
        "readouts.1.linear_2",
    }  # fmt: skip
    ranks = {p.name: dict(p.ranks) for p in saved.plan}
    assert ranks["interactions.1.linear_up"] == {"0e": 3, "1o": 1}


def test_start_from_an_adapter(job, finished, tmp_path):
    work, _ = finished
    log = train(job, tmp_path, lora_init_adapter=work / "run-adapter", lora_rank=None, max_num_epochs=1, lr=1e-9).stdout
    assert "identity at start" not in log
    first, second = (read_adapter(w / "run-adapter").tensors for w in (work, tmp_path))
    for name in first:  # the refit of the energies sees float32 rounding of -7725 eV
        atol = 1e-3 if "atomic_energies" in name else 1e-5
        torch.testing.assert_close(first[name], second[name], atol=atol, rtol=0)


def test_only_adapter_in_one_optimiser_group(job, tmp_path):
    log = train(job, tmp_path, max_num_epochs=1, lora_weight_decay=0.25).stdout
    assert "Param group 0" in log
    assert "Param group 1" not in log
    content = torch.load(next((tmp_path / "checkpoints").glob("*.pt")), weights_only=False)
    (group,) = content["optimizer"]["param_groups"]
    assert (group["name"], group["weight_decay"]) == ("lora", 0.25)
    base = load_adapter(embedded_base(torch.float32), tmp_path / "run-adapter")
    trained = [p for p in base.parameters() if p.requires_grad]
    assert len(group["params"]) == len(trained)
    assert adapter_names(base) == ["default"]
    assert coverage(base).trainable == sum(p.numel() for p in trained)


def test_upstream_backend_is_still_there(job, tmp_path):
    log = train(job, tmp_path, lora_backend="mace", lora_rank=None, max_num_epochs=1).stdout
    assert "rank=4 and alpha=1.0" in log
    assert not (tmp_path / "run-adapter").exists()


def test_kill_switch_gives_stock_mace(job, tmp_path):
    stock = launch([BIN / "mace_run_train", "--help"], disable=True).stdout
    assert "--lora_preset" not in stock
    assert "--lora_preset" in launch([BIN / "mace_run_train", "--help"]).stdout
    done = train(job, tmp_path, check=False, disable=True)
    assert done.returncode == 2
    assert "argument --lora: expected one argument" in done.stdout
