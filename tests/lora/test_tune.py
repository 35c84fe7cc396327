"""equitune tune: what a folder holds, which loss counts, what is no divergence."""

import json
import math

import pytest

from mace_lora.lora import tune as module
from mace_lora.lora.tune import Trial, best_validation_loss, tune


def log(folder, rows):
    (folder / "results").mkdir(parents=True)
    lines = [json.dumps({"mode": "eval", "epoch": e, "head": h, "loss": x}) for e, h, x in rows]
    (folder / "results" / "trial_run-1_train.txt").write_text("\n".join(lines) + '\n{"mode": "ev')


def test_the_last_head_counts(tmp_path):
    """As for upstream's checkpoints: the replay head's small loss says nothing about the user's data."""
    log(tmp_path, [(0, "pt_head", 0.01), (0, "Default", 5.0), (1, "pt_head", 0.02), (1, "Default", 4.0)])
    assert best_validation_loss(tmp_path) == 4.0
    assert best_validation_loss(tmp_path / "none") == math.inf


def test_a_folder_belongs_to_one_search(tmp_path, monkeypatch):
    data = tmp_path / "train.xyz"
    data.write_text("1")
    trained = []
    monkeypatch.setattr(module, "_train", lambda t, n, *_: trained.append(t) or Trial(t.rank, t.lr, n, t.lr))
    arguments = [f"--train_file={data}", "--E0s=average"]
    best = tune(arguments, [4], [0.02, 0.01], 6, tmp_path / "out", progress=lambda _: None)[0]
    assert (best.lr, len(trained)) == (0.01, 3)
    tune(arguments, [4], [0.02, 0.01], 6, tmp_path / "out", progress=lambda _: None)
    with pytest.raises(ValueError, match=r"folder: .*out holds a search with other flags \(--train_file="):
        tune([*arguments, "--ema"], [4], [0.01], 6, tmp_path / "out")
    data.write_text("2")
    with pytest.raises(ValueError, match=r"holds a search with other data; choose another --folder"):
        tune(arguments, [4], [0.01], 6, tmp_path / "out")


def test_all_diverged(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_train", lambda t, n, *_: Trial(t.rank, t.lr, n, math.inf))
    with pytest.raises(ValueError, match=r"lrs: every training diverged .*; try lower learning rates than 0\.1"):
        tune([], [4], [0.1, 0.2], 6, tmp_path)


def test_a_failure_is_no_divergence(tmp_path, monkeypatch):
    """A full disk must not be stored as a bad learning rate."""
    log(tmp_path / "rank4_lr0.01", [(0, "Default", 1.0)])
    monkeypatch.setattr(module.sys, "executable", str(tmp_path / "python"))
    (tmp_path / "mace_run_train").write_text("#!/bin/sh\necho no space left; exit 1\n")
    (tmp_path / "mace_run_train").chmod(0o755)
    with pytest.raises(ValueError, match=r"mace_run_train failed in .*: no space left"):
        tune([], [4], [0.01], 2, tmp_path)
    assert not (tmp_path / "rank4_lr0.01" / "done.json").exists()
    (tmp_path / "mace_run_train").write_text(
        "#!/bin/sh\necho mace_run_train: error: --lora: the adapter contains NaN or infinity; exit 1\n"
    )
    with pytest.raises(ValueError, match="every training diverged"):
        tune([], [4], [0.01], 2, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr=0.1"], "--lr: the search sets it itself"),
        (["--work_dir", "x"], "--work_dir: the search sets it itself"),
        (["--checkpoints_dir=ck"], "--checkpoints_dir: the search sets it itself"),
        (["--swa"], "--swa: does not go with the search: stage two would begin at another epoch"),
        (["--config=c.yaml"], "--max_num_epochs: the search sets it itself"),
        (["--config", "c.yaml"], "--max_num_epochs: the search sets it itself"),
    ],
)
def test_flags_of_the_search_itself(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("swa: false\nmax_num_epochs: 5\n")
    with pytest.raises(ValueError, match=message):
        tune(arguments, [4], [0.01], 2, tmp_path / "out")
    assert not (tmp_path / "out").exists()
