"""Model files of a run: whole or not at all, and upstream's own way where a model cannot be scripted."""

import argparse

import pytest
import torch

pytest.importorskip("mace")

from mace.cli import run_train

from mace_lora.mace_plugin.protocol import Run, start_run


class Calls(torch.nn.Module):
    """Calls Python, which TorchScript can run and not save."""

    @torch.jit.ignore
    def outside(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outside(x)


@pytest.fixture()
def run():
    start_run(Run(argparse.Namespace(), []))
    yield
    start_run(None)


def test_scripted_copies(run, tmp_path):
    scripted = torch.jit.script(torch.nn.Linear(2, 1))
    run_train.torch.jit.save(scripted, tmp_path / "a.model", _extra_files={"note.txt": b"x"})
    extra = {"note.txt": ""}
    again = torch.jit.load(tmp_path / "a.model", _extra_files=extra)
    assert torch.equal(again.weight, scripted.weight) and extra["note.txt"] == b"x"
    assert [p.name for p in tmp_path.iterdir()] == ["a.model"]


def test_a_model_that_cannot_be_exported_is_left_to_upstream(run, tmp_path):
    with pytest.raises(RuntimeError, match="Could not export Python function call"):
        run_train.torch.jit.save(torch.jit.script(Calls()), tmp_path / "b.model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["save", "jit"])
def test_a_folder_that_cannot_be_written_to(run, tmp_path, what):
    place = tmp_path / "a file"
    place.write_text("")
    save = run_train.torch.save if what == "save" else run_train.torch.jit.save
    with pytest.raises(
        SystemExit, match=r"--model_dir: cannot write .*c\.model .* with --restart_latest: training is done"
    ):
        save(torch.jit.script(torch.nn.Linear(2, 1)) if what == "jit" else {}, place / "c.model")
