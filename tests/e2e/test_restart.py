"""Interruption and restart: nothing half-written, exact state, no silent start at epoch 0."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import BIN, flags, train

from mace_lora import read_adapter

pytestmark = pytest.mark.mace

# Stops upstream's loop at its first epoch and stores what it would train with.
SPY = """
import sys, torch
import mace.cli.run_train as command
module = sys.modules["mace.tools.train"]
target = sys.argv.pop(1)
def stop(model, optimizer, ema, epoch, **_):
    raw = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    torch.save({"epoch": epoch, "raw": raw, "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}, target)
    raise SystemExit(0)
module.train_one_epoch = stop
command.main()
"""


def checkpoints(work):
    return sorted(
        (work / "checkpoints").glob("*.pt"), key=lambda p: int(p.stem.rpartition("-")[2].removesuffix("_swa"))
    )


def start(job, work, **changes):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [str(BIN / "mace_run_train"), *map(str, flags(job, work, **changes))],
        env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture(scope="module")
def killed(job, tmp_path_factory):
    """A run killed with SIGKILL in mid-epoch, after some checkpoints."""
    work = tmp_path_factory.mktemp("killed")
    process = start(job, work, ema=True, max_num_epochs=500, batch_size=1)
    deadline = time.time() + 240
    while time.time() < deadline and not (
        checkpoints(work) and checkpoints(work)[-1].stem.endswith(("-2", "-3", "-4"))
    ):
        assert process.poll() is None, "the run ended by itself"
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return work


def test_files_are_whole_after_kill(killed):
    saved = read_adapter(killed / "run-adapter")  # raises on a truncated or inconsistent adapter
    latest = torch.load(checkpoints(killed)[-1], weights_only=False)
    assert saved.tensors
    assert latest["equitune"]["ema"]["num_updates"] > 0


def test_restart_continues_with_identical_adapter_optimiser_and_ema(job, killed, tmp_path):
    latest = checkpoints(killed)[-1]
    expected = torch.load(latest, weights_only=False)
    out = tmp_path / "state.pt"
    arguments = flags(job, killed, ema=True, max_num_epochs=500, batch_size=1, restart_latest=True)
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SPY, str(out), *map(str, arguments)],
        check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
    )  # fmt: skip
    got = torch.load(out, weights_only=False)
    assert got["epoch"] == int(latest.stem.rpartition("-")[2])
    ema = expected["equitune"]["ema"]
    for key, reference in (("raw", ema["collected_params"]), ("shadow_params", ema["shadow_params"])):
        values = got["raw"] if key == "raw" else got["ema"][key]
        assert len(values) == len(reference) > 10
        assert all(torch.equal(a, b) for a, b in zip(values, reference, strict=True))
    assert got["ema"]["num_updates"] == ema["num_updates"]
    assert got["ema"]["collected_params"] is None
    for index, state in expected["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(got["optimizer"]["state"][index][name], value)


def test_restart_trains_on_to_the_end(job, killed):
    epoch = int(checkpoints(killed)[-1].stem.rpartition("-")[2])
    log = train(job, killed, ema=True, max_num_epochs=epoch + 3, batch_size=1, restart_latest=True).stdout
    assert "restored EMA state" in log
    assert f"Epoch {epoch}:" in log
    assert "Epoch 0:" not in log
    best = min(
        torch.load(p, weights_only=False)["equitune"]["best_loss"]["False"]
        for p in (killed / "checkpoints").glob("*.pt")
    )
    assert float(read_adapter(killed / "run-adapter").run["validation_loss"]) == pytest.approx(best)


def test_restart_with_other_adapters_is_refused(job, killed):
    done = train(job, killed, check=False, lora=None, lora_rank=None, restart_latest=True)
    assert done.returncode == 1
    assert "holds LoRA adapters, but --lora was not given; add --lora" in done.stdout
    done = train(job, killed, check=False, lora_rank=3, ema=True, restart_latest=True)
    assert done.returncode == 1
    assert "could not be loaded into this model" in done.stdout
    done = train(job, killed, check=False, lora_alpha=64, ema=True, restart_latest=True, max_num_epochs=500)
    assert done.returncode == 1
    assert "flags differ from the checkpoint's (alpha: 4.0 before, 64.0 now)" in done.stdout
    done = train(
        job, killed, check=False, ema=True, restart_latest=True, max_num_epochs=500, batch_size=1, lora_refit_E0s=False
    )
    assert done.returncode == 1
    assert "flags differ from the checkpoint's (refit_E0s: True before, False now)" in done.stdout
    other = "{1: -13.0, 6: -1027.0, 7: -1482.0, 8: -2038.0}"
    done = train(job, killed, check=False, ema=True, restart_latest=True, max_num_epochs=500, E0s=other)
    assert done.returncode == 1
    assert "the checkpoint has another base model or other energy references" in done.stdout


def test_leftover_checkpoints_are_refused(job, killed):
    done = train(job, killed, check=False, ema=True)
    assert done.returncode == 1
    assert "is left from an earlier run" in done.stdout
    assert "continue that run with --restart_latest, or choose another --name" in done.stdout


def test_restart_of_a_plain_run_with_lora_is_refused(job, tmp_path):
    train(job, tmp_path, lora=None, lora_rank=None, max_num_epochs=1)
    done = train(job, tmp_path, check=False, restart_latest=True)
    assert done.returncode == 1
    assert "has no LoRA adapters, but --lora was given; drop --lora to continue it" in done.stdout


def test_corrupt_checkpoint_is_refused(job, killed, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    latest = checkpoints(killed)[-1]
    (tmp_path / "checkpoints" / latest.name).write_bytes(latest.read_bytes()[:5000])
    done = train(job, tmp_path, check=False, restart_latest=True)
    assert done.returncode == 1
    assert "is corrupt" in done.stdout
    assert "delete it and restart from the one before" in done.stdout
