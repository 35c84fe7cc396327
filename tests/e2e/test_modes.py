"""--lora with upstream's other modes: several processes, LBFGS, replay, multi-head foundations."""

import ast
import re
import sys

import ase.io
import numpy as np
import pytest
import torch
from helpers import BIN, base_frames, dft_frames, flags, launch, train

from mace_lora import fingerprint, load_adapter, merge_lora, read_adapter
from mace_lora.evaluate.metrics import errors, predict
from mace_lora.mace_plugin.base_model import embedded_base, select_head

pytestmark = pytest.mark.mace


def model_errors(model, frames, head=None):
    from mace.calculators import MACECalculator

    calc = MACECalculator(models=[model], device="cpu", default_dtype="float64", head=head)
    return errors(predict(calc, frames))


def same_weights(a, b, atol=1e-5):
    theirs, ours = a.state_dict(), b.state_dict()
    assert theirs.keys() == ours.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name].double(), theirs[name].double(), atol=atol, rtol=1e-4, msg=name)


def test_two_processes_under_torchrun(job, tmp_path):
    arguments = flags(job, tmp_path, distributed=True, launcher="torchrun", ema=True, batch_size=2, max_num_epochs=3)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", BIN / "mace_run_train"]
    log = launch([*run, *arguments]).stdout
    assert "Processes: 2" in log
    merged = torch.load(tmp_path / "run.model", weights_only=False)
    same_weights(merged, merge_lora(load_adapter(embedded_base(torch.float32), tmp_path / "run-adapter")))
    test = dft_frames("test", 5)
    start = torch.load(job / "base.model", weights_only=False)
    assert model_errors(merged, test).mae_f < model_errors(start, test).mae_f


def test_two_processes_give_the_weights_of_one(job, tmp_path):
    """Same frames a step, so the averaged gradients and hence the adapters are the same."""
    one = tmp_path / "one"
    common = {"max_num_epochs": 1, "default_dtype": "float64", "lr": 1e-3, "clip_grad": 1e6}
    train(job, one, batch_size=10, **common)
    two = tmp_path / "two"
    arguments = flags(job, two, distributed=True, launcher="torchrun", batch_size=5, **common)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", BIN / "mace_run_train"]
    launch([*run, *arguments])
    first, second = (read_adapter(w / "run-adapter").tensors for w in (one, two))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=2e-5, rtol=1e-3, msg=name)


def test_two_processes_share_the_energy_references(job, tmp_path):
    """After wrong E0s, one that had others would train against another target."""
    common = {"max_num_epochs": 3, "default_dtype": "float64", "lr": 1e-3, "clip_grad": 1e6}
    e0s = ast.literal_eval((job / "e0s.txt").read_text())
    common["E0s"] = str({z: e + 0.9 for z, e in e0s.items()})
    log = train(job, tmp_path / "one", batch_size=10, **common).stdout
    assert "energy references refitted on" in log
    arguments = flags(job, tmp_path / "two", distributed=True, launcher="torchrun", batch_size=5, **common)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", BIN / "mace_run_train"]
    launch([*run, *arguments])
    first, second = (read_adapter(tmp_path / w / "run-adapter").tensors for w in ("one", "two"))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-3, rtol=2e-2, msg=name)


def test_distributed_needs_a_launcher(job, tmp_path):
    done = train(job, tmp_path, check=False, distributed=True)
    assert done.returncode == 1
    assert "--distributed: expected one of several processes, started by torchrun" in " ".join(done.stdout.split())


def test_lbfgs(job, tmp_path):
    log = train(job, tmp_path, lbfgs=True, batch_size=10, max_num_epochs=2, default_dtype="float64").stdout
    assert "Switching optimizer to LBFGS" in log
    trained = int(re.search(r"equitune: training ([\d,]+) values", log)[1].replace(",", ""))
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.pt")
    (state,) = torch.load(checkpoint, weights_only=False)["optimizer"]["state"].values()
    assert {v.numel() for v in state["old_dirs"]} == {trained}  # nothing for the frozen base
    again = train(
        job, tmp_path, lbfgs=True, batch_size=10, max_num_epochs=3, default_dtype="float64", restart_latest=True
    )
    assert "Loading checkpoint" in again.stdout
    merged = torch.load(tmp_path / "run.model", weights_only=False)
    same_weights(merged, merge_lora(load_adapter(embedded_base(torch.float64), tmp_path / "run-adapter")))


def test_estimated_energy_references_with_another_dtype(job, tmp_path):
    """Stock MACE fails when the base file's dtype is not --default_dtype."""
    assert next(torch.load(job / "base.model", weights_only=False).parameters()).dtype == torch.float64
    log = train(job, tmp_path, E0s="estimated", max_num_epochs=1, default_dtype="float32").stdout
    assert "energy reference check on 10 frames: mean (label - model)" in log
    assert "do not fit the labels" not in log


@pytest.fixture(scope="module")
def replayed(job, tmp_path_factory):
    """A multi-head run: DFT frames with replay of the base's own GFN2-xTB frames."""
    work = tmp_path_factory.mktemp("replay")
    frames = base_frames("replay", 160)
    ase.io.write(work / "replay.xyz", frames[:150], format="extxyz")
    ase.io.write(work / "replay_valid.xyz", frames[150:], format="extxyz")
    log = train(
        job, work, multiheads_finetuning="True", pt_train_file=work / "replay.xyz",
        pt_valid_file=work / "replay_valid.xyz", max_num_epochs=3, lr=0.003, ema=True,
        ema_decay=0.9, batch_size=5, default_dtype="float64",
    ).stdout  # fmt: skip
    return work, log


def test_replay_head_keeps_its_error_and_the_new_head_learns(job, replayed, tmp_path):
    work, log = replayed
    assert "--lora keeps lr 0.003" in log
    model = torch.load(work / "run.model", weights_only=False)
    assert sorted(model.heads) == ["Default", "pt_head"]
    base = torch.load(job / "base.model", weights_only=False)
    own = [f for f in base_frames("replay", 200)[160:] if set(f.numbers) <= {1, 6, 7, 8}]  # the single head's elements
    test = dft_frames("test", 10)
    train(job, tmp_path, max_num_epochs=45, lr=0.003, ema=True, ema_decay=0.9, default_dtype="float64")
    alone = torch.load(tmp_path / "run.model", weights_only=False)
    before, with_replay, without = (
        model_errors(base, own).mae_f, model_errors(model, own, head="pt_head").mae_f, model_errors(alone, own).mae_f,
    )  # fmt: skip
    assert with_replay < 1.35 * before, (before, with_replay, without)
    assert with_replay < 0.4 * without, (before, with_replay, without)
    assert model_errors(model, test, head="Default").mae_f < 0.7 * model_errors(base, test).mae_f


def test_labels_of_every_head_are_checked(job, tmp_path):
    """Replay frames come first and are sound by construction; the user's are what can be wrong."""
    for part in ("train", "valid"):
        frames = ase.io.read(job / f"{part}.xyz", ":")
        for atoms in frames:
            atoms.arrays["REF_forces"] = -atoms.arrays["REF_forces"]
        ase.io.write(tmp_path / f"{part}.xyz", frames, format="extxyz", write_results=False)
    ase.io.write(tmp_path / "replay.xyz", base_frames("replay", 40), format="extxyz")
    done = train(
        job, tmp_path / "w", check=False, multiheads_finetuning="True", pt_train_file=tmp_path / "replay.xyz",
        pt_valid_file=tmp_path / "replay.xyz", train_file=tmp_path / "train.xyz", valid_file=tmp_path / "valid.xyz",
    )  # fmt: skip
    assert done.returncode == 1
    assert "force labels of head Default are opposite to the base model's forces" in " ".join(done.stdout.split())


def test_per_head_readouts_adapt(job, replayed):
    work, _ = replayed
    model = torch.load(work / "run.model", weights_only=False)
    from mace_lora.mace_plugin.base_model import prepare_base

    start = prepare_base(
        torch.load(job / "base.model", weights_only=False), read_adapter(work / "run-adapter").metadata
    )
    change = (model.readouts[0].linear.weight - start.readouts[0].linear.weight).detach().reshape(-1, 2)
    assert (change.norm(dim=0) > 1e-4).all()  # (inputs, heads): both heads' columns
    assert not torch.allclose(change[:, 0], change[:, 1], rtol=1e-2, atol=1e-5)


def test_multi_head_adapter_on_its_foundation(job, replayed):
    work, _ = replayed
    base = torch.load(job / "base.model", weights_only=False)
    same_weights(
        torch.load(work / "run.model", weights_only=False), merge_lora(load_adapter(base, work / "run-adapter"))
    )


def test_multi_head_foundation(job, replayed, tmp_path):
    """The head is chosen at training and chosen again when the adapter is loaded on the whole foundation."""
    multi = replayed[0] / "run.model"
    train(job, tmp_path, foundation_model=multi, foundation_head="Default", max_num_epochs=2)
    merged = torch.load(tmp_path / "run.model", weights_only=False)
    foundation = torch.load(multi, weights_only=False)
    saved = read_adapter(tmp_path / "run-adapter")
    assert saved.metadata["foundation_head"] == "Default"
    assert saved.metadata["foundation_fingerprint"] == fingerprint(select_head(foundation, "Default"))
    same_weights(merged, merge_lora(load_adapter(foundation, tmp_path / "run-adapter")))
    with pytest.raises(ValueError, match="it was trained on another base model"):
        load_adapter(select_head(foundation, "pt_head"), tmp_path / "run-adapter")
    assert np.isfinite(model_errors(merged, dft_frames("test", 3)).mae_f)
    for tuned, more in ((tmp_path / "run-adapter", ()), (tmp_path / "run.model", ("--head", "Default"))):
        assert "rows shown" in launch([BIN / "equitune", "diff", multi, tuned, *more]).stdout
    done = launch([BIN / "equitune", "diff", multi, tmp_path / "run.model", "--head", "nonsense"], check=False)
    assert done.returncode == 2 and "--head: the base has heads pt_head, Default; name the one" in done.stdout
