"""Faults: ten kills at random moments, a full disk, two runs at once, NaN."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import BIN, dft_frames, flags, launch, train
from safetensors.torch import load_file, save_file

from mace_lora import LoraConfig, apply_lora, load_adapter, read_adapter, save_adapter
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


def test_full_disk_while_writing_the_adapter(job, tmp_path):
    train(job, tmp_path, max_num_epochs=1)
    weights = tmp_path / "run-adapter" / "adapter_model.safetensors"
    content, size = weights.read_bytes(), weights.stat().st_size
    checkpoints = list((tmp_path / "checkpoints").glob("*.pt"))
    done = limited(job, tmp_path, size // 2, max_num_epochs=4, restart_latest=True)
    assert done.returncode == 1
    assert "cannot write the adapter to" in done.stdout
    assert "free some space and continue with --restart_latest" in " ".join(done.stdout.split())
    assert weights.read_bytes() == content
    assert list((tmp_path / "checkpoints").glob("*.pt")) == checkpoints
    train(job, tmp_path, max_num_epochs=3, restart_latest=True)  # and on with space again
    assert read_adapter(tmp_path / "run-adapter").tensors


def test_full_disk_while_writing_a_checkpoint(job, tmp_path):
    train(job, tmp_path, max_num_epochs=1)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.pt")
    content = checkpoint.read_bytes()
    size = (tmp_path / "run-adapter" / "adapter_model.safetensors").stat().st_size
    done = limited(job, tmp_path, 2 * size, max_num_epochs=4, restart_latest=True)
    assert done.returncode == 1
    assert "--checkpoints_dir: cannot write" in done.stdout
    assert checkpoint.read_bytes() == content
    assert not list((tmp_path / "checkpoints").glob(".*.part"))


def test_two_runs_into_one_folder_at_once(job, tmp_path):
    spy = tmp_path / "state.pt"
    process = start(job, tmp_path / "w", spy)
    try:
        deadline = time.time() + 120
        while not spy.exists() and process.poll() is None and time.time() < deadline:
            time.sleep(0.05)
        done = train(job, tmp_path / "w", check=False, ema=True, restart_latest=True)
    finally:
        process.kill()
        process.wait()
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
