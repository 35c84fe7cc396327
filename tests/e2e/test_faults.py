"""Faults: ten kills at random moments, a full disk, two runs at once, NaN."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import BIN, dft_frames, flags, launch, train
from safetensors.torch import load_file, save_file

from mace_lora import LoraConfig, apply_lora, load_adapter, merge_lora, read_adapter, save_adapter
from mace_lora.evaluate.metrics import errors, predict
from mace_lora.mace_plugin.base_model import embedded_base

pytestmark = pytest.mark.mace
KILLS, EPOCHS = 10, 30

# Runs the real command; before its first epoch it stores what it trains with.
SPY = """
import sys, torch
import mace.cli.run_train as command
module = sys.modules["mace.tools.train"]
target = sys.argv.pop(1)
original = module.train_one_epoch
def first(model, optimizer, ema, epoch, **rest):
    raw = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    torch.save({"epoch": epoch, "raw": raw, "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}, target)
    module.train_one_epoch = original
    original(model=model, optimizer=optimizer, ema=ema, epoch=epoch, **rest)
module.train_one_epoch = first
command.main()
"""


def start(job, work, spy, **changes):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    arguments = map(str, flags(job, work, ema=True, max_num_epochs=EPOCHS, restart_latest=True, **changes))
    command = [sys.executable, "-c", SPY, str(spy), *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def newest(work):
    """Content of the newest checkpoint, or None."""
    found = sorted((work / "checkpoints").glob("*.pt"), key=lambda p: int(p.stem.rpartition("-")[2]))
    return torch.load(found[-1], weights_only=False) if found else None


def assert_continues(state, checkpoint):
    """A restart trains with exactly what the checkpoint holds: raw weights, EMA, optimiser."""
    saved = checkpoint["equitune"]["ema"]
    for values, reference in (
        (state["raw"], saved["collected_params"]),
        (state["ema"]["shadow_params"], saved["shadow_params"]),
    ):
        assert len(values) == len(reference) > 10
        assert all(torch.equal(a, b) for a, b in zip(values, reference, strict=True))
    assert state["ema"]["num_updates"] == saved["num_updates"]
    for index, entry in checkpoint["optimizer"]["state"].items():
        for name, value in entry.items():
            assert torch.equal(state["optimizer"]["state"][index][name], value)


def test_ten_kills_at_random_moments(job, tmp_path):
    rng = random.Random(0)
    work, before, restarts = tmp_path / "killed", None, 0
    for number in range(KILLS):
        spy = tmp_path / f"state{number}.pt"
        process = start(job, work, spy)
        deadline = time.time() + 120
        while not spy.exists() and process.poll() is None and time.time() < deadline:
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 1.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        try:
            state = torch.load(spy, weights_only=False)
        except (EOFError, RuntimeError):  # killed while the test's own spy wrote
            state = None
        if before is not None and state is not None:
            assert_continues(state, before)
            restarts += 1
        for path in (work / "checkpoints").glob("*.pt"):
            assert torch.load(path, weights_only=False)["equitune"]["best_loss"]
        if (work / "run-adapter" / "adapter_model.safetensors").exists():
            assert read_adapter(work / "run-adapter").tensors
        before = newest(work)
    assert restarts >= 5
    common = {"ema": True, "max_num_epochs": EPOCHS}
    train(job, work, restart_latest=True, **common)
    assert not list(work.rglob("*.part"))
    train(job, tmp_path / "straight", **common)
    found = {}
    for name in ("killed", "straight"):
        from mace.calculators import MACECalculator

        model = torch.load(tmp_path / name / "run.model", weights_only=False)
        calc = MACECalculator(models=[model], device="cpu", default_dtype="float64")
        found[name] = errors(predict(calc, dft_frames("test", 30))).mae_f
    assert found["killed"] == pytest.approx(found["straight"], rel=0.15)


def limited(job, work, size, **changes):
    """A run that cannot write files larger than `size` bytes, as on a full disk."""
    return launch(
        [BIN / "mace_run_train", *flags(job, work, **changes)], check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )  # fmt: skip


def test_adapter_that_cannot_be_written(job, tmp_path):
    """It is never ahead of the checkpoint; a restart writes what is missing, also when no better epoch follows."""
    adapter, hidden = tmp_path / "run-adapter", tmp_path / "hidden"
    train(job, tmp_path, max_num_epochs=1)
    shutil.copytree(adapter, hidden)
    train(job, tmp_path, max_num_epochs=2, restart_latest=True)
    shutil.rmtree(adapter)
    adapter.write_text("in the way")
    done = train(job, tmp_path, check=False, max_num_epochs=4, restart_latest=True)
    assert done.returncode == 1
    assert "cannot write the adapter to" in done.stdout
    assert "free some space and continue with --restart_latest" in " ".join(done.stdout.split())
    adapter.unlink()
    hidden.rename(adapter)  # the one before, as a full disk leaves it
    train(job, tmp_path, max_num_epochs=0, restart_latest=True)
    state = newest(tmp_path)["equitune"]["plugins"]["lora"]["state"]
    run = read_adapter(adapter).run
    assert run["epoch"] == str(state["epoch"]) == "1" and run["validation_loss"] == str(state["validation_loss"])
    assert run["validation_mae_f"].endswith(" eV/Å") and run["validation_rmse_e_per_atom"].endswith(" eV/atom")
    merged = merge_lora(load_adapter(embedded_base(torch.float64), adapter))
    stored = torch.load(tmp_path / "run.model", weights_only=False)
    for (name, value), other in zip(merged.named_parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(value, other, atol=1e-6, rtol=0, msg=name)


def test_full_disk_while_writing_a_checkpoint(job, tmp_path):
    train(job, tmp_path, max_num_epochs=1)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.pt")
    weights = tmp_path / "run-adapter" / "adapter_model.safetensors"
    before = checkpoint.read_bytes(), weights.read_bytes(), (tmp_path / "run.model").read_bytes()
    for size in (weights.stat().st_size // 2, 2 * weights.stat().st_size):
        done = limited(job, tmp_path, size, max_num_epochs=4, restart_latest=True)
        assert done.returncode == 1
        assert "--checkpoints_dir: cannot write" in done.stdout
        assert (checkpoint.read_bytes(), weights.read_bytes(), (tmp_path / "run.model").read_bytes()) == before
        assert not list((tmp_path / "checkpoints").glob(".*.part"))
    train(job, tmp_path, max_num_epochs=3, restart_latest=True)  # and on with space again
    assert read_adapter(tmp_path / "run-adapter").tensors
    size = checkpoint.stat().st_size if checkpoint.exists() else weights.stat().st_size
    done = limited(job, tmp_path, size, max_num_epochs=0, restart_latest=True)
    assert done.returncode == 1 and "--model_dir: cannot write" in done.stdout
    assert torch.load(tmp_path / "run.model", weights_only=False)


def test_two_runs_into_one_folder_at_once(job, tmp_path):
    spy = tmp_path / "state.pt"
    process = start(job, tmp_path / "w", spy)
    try:
        deadline = time.time() + 120
        while not spy.exists() and process.poll() is None and time.time() < deadline:
            time.sleep(0.05)
        again = train(job, tmp_path / "w", check=False, ema=True, restart_latest=True)
        seed = train(job, tmp_path / "w", check=False, ema=True, seed=77)  # would share the adapter and the model
    finally:
        process.kill()
        process.wait()
    for done in (again, seed):
        assert done.returncode == 1
        assert "--name run: another run is writing to" in done.stdout


def test_diverged_adapter_is_not_written(job, tmp_path):
    model = apply_lora(embedded_base(torch.float32), LoraConfig(rank=2))
    folder = save_adapter(model, tmp_path / "a")
    content = (folder / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"contains NaN or infinity in .*; it was not saved to"):
        save_adapter(model, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == content


def test_adapter_with_nan_is_refused(job, tmp_path):
    folder = save_adapter(apply_lora(embedded_base(torch.float32), LoraConfig(rank=2)), tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    tensors[name] = tensors[name] * float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="contains NaN or infinity; the adapter is unusable"):
        load_adapter(embedded_base(torch.float32), folder)
    done = train(job, tmp_path / "w", check=False, lora_rank=None, lora_init_adapter=folder)
    assert done.returncode == 1
    assert "--lora_init_adapter: adapter" in done.stdout
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_adapter_with_a_damaged_config_is_refused(tmp_path):
    folder = save_adapter(apply_lora(embedded_base(torch.float32), LoraConfig(rank=2)), tmp_path / "a")
    file = folder / "adapter_config.json"
    whole = json.loads(file.read_text())
    name = next(n for n, m in whole["equitune"]["modules"].items() if m["ranks"])
    for key, value, message in (
        ("scaling", {b: float("nan") for b in whole["equitune"]["modules"][name]["ranks"]}, "is no number"),
        ("scaling", {}, "adapter_config.json is incomplete .KeyError"),
        ("ranks", None, "adapter_config.json is incomplete .TypeError"),
    ):
        content = json.loads(json.dumps(whole))
        content["equitune"]["modules"][name][key] = value
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            read_adapter(folder)


def test_another_learning_rate_at_a_restart_is_refused(job, tmp_path):
    """It would have no effect: the optimiser's state has the checkpoint's."""
    train(job, tmp_path, max_num_epochs=1, lr=0.01)
    for changes, message in (
        ({"lr": 0.001}, "--lr: expected 0.01 as in the checkpoint that is continued"),
        ({"lr": 0.01, "lora_weight_decay": 0.5}, "weight_decay: 0.0 before, 0.5 now"),
    ):
        done = train(job, tmp_path, check=False, max_num_epochs=2, restart_latest=True, **changes)
        assert done.returncode == 1 and message in " ".join(done.stdout.split()), done.stdout[-1500:]
