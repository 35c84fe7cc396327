"""One run a folder: whose lock, whose leftovers."""

import argparse

import pytest

from mace_lora.mace_plugin import checkpoints
from mace_lora.mace_plugin.protocol import Run


@pytest.fixture
def run(tmp_path):
    args = argparse.Namespace(
        name="eth", seed=1, checkpoints_dir=tmp_path / "checkpoints", model_dir=tmp_path, distributed=False
    )
    yield Run(args, [])
    while checkpoints._held:
        checkpoints._held.pop().release(force=True)


def test_files_of_other_runs_stay(run, tmp_path):
    """Another run in the same folder may be writing at this moment."""
    mine = ["checkpoints/.eth_run-1_epoch-3.pt.x.part", "eth-adapter/.adapter_model.safetensors.x.part"]
    others = ["checkpoints/.ethanol_run-1_epoch-3.pt.x.part", "ethanol-adapter/.adapter_model.safetensors.x.part"]
    for name in (*mine, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    checkpoints.lock(run)
    assert [(tmp_path / n).exists() for n in (*mine, *others)] == [False, False, True, True]


@pytest.mark.parametrize("name", ["RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"])
def test_only_the_first_process_locks(run, tmp_path, monkeypatch, name):
    """Also under Slurm and MPI, where upstream sets RANK later; a plain run in a job step locks as ever."""
    for other in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "1")
    run.args.distributed = True
    checkpoints.lock(run)
    assert not checkpoints._held
    run.args.distributed = False
    checkpoints.lock(run)
    assert checkpoints._held
