"""equitune transfer-check --pilot, and what active-learn, distill and the pilot share: real trainings as processes."""

import json
import subprocess
import sys
from pathlib import Path

import ase.io
import pytest
import torch

from mace_lora.autotune.pilot import Pilot, pilot
from mace_lora.evaluate.metrics import Errors
from mace_lora.mace_plugin.launch import check_flags, train, validation_curve

PROGRAM = Path(sys.executable).parent / "equitune"
EMBEDDED = Path(__file__).parents[2] / "mace_lora" / "embedded" / "glycolamide_pbe0.extxyz.gz"


def frames(count: int):
    return ase.io.read(EMBEDDED, f":{count}", format="extxyz")


def test_pilot_trains_both_and_continues(tmp_path):
    pytest.importorskip("rdkit")
    few, said = frames(12), []
    options = {"classical": 16, "epochs": 2, "say": said.append}
    found = pilot(few, "uff", tmp_path, **options)
    assert (found.trained, found.validated) == (8, 2)
    assert len(ase.io.read(tmp_path / "classical.xyz", ":")) == 16
    assert found.gain == pytest.approx(found.scratch.mae_f / found.autotuned.mae_f)
    assert (tmp_path / "autotuned" / "run_classical.model").is_file()
    assert not (tmp_path / "scratch" / "run_classical.model").exists()
    assert validation_curve(tmp_path / "scratch")[-1][0] == 1
    checkpoint = torch.load(next((tmp_path / "scratch" / "checkpoints").glob("*.pt")), weights_only=False)
    assert checkpoint["equitune"]["best_loss"] and checkpoint["equitune"]["ema"]  # plain trainings of ours too
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.model")}
    assert pilot(few, "uff", tmp_path, **options) == found
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.model")}
    with pytest.raises(ValueError, match="it was begun with other settings"):
        pilot(few, "mmff94", tmp_path, **options)
    ase.io.write(tmp_path / "few.xyz", few, format="extxyz")
    done = subprocess.run(
        [PROGRAM, "transfer-check", "few.xyz", "--with", "uff", "--json"], cwd=tmp_path, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["frames"] == 12
    other = subprocess.run(
        [PROGRAM, "transfer-check", "few.xyz", "--with", "uff", "--pilot", "."], cwd=tmp_path, capture_output=True,
        text=True,
    )  # fmt: skip
    assert other.returncode == 2 and "it was begun with other settings" in other.stderr


def test_verdicts():
    def text(scratch, autotuned):
        return Pilot(10, 5, Errors(1, 1, scratch, 1), Errors(1, 1, autotuned, 1)).text()

    assert "helped; force MAE 100 meV/Å from scratch, 50 with it (2.00 times lower)" in text(100, 50)
    assert "made no clear difference" in text(100, 101)
    assert "did harm" in text(100, 120)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="frames: expected at least 6 for a pilot, got 5"):
        pilot(frames(5), "uff", tmp_path)
    with pytest.raises(ValueError, match="labeler: unknown name 'nonsense'"):
        pilot(frames(6), "nonsense", tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"hiden_irreps": "8x0e"}, "mine: unrecognized arguments: --hiden_irreps=8x0e"),
        ({"r_max": "x"}, "mine: argument --r_max: invalid float value: 'x'"),
        ({"model": "Foo"}, "mine: argument --model: invalid choice: 'Foo'"),
    ],
)
def test_flags_are_checked_before_training(flags, message):
    check_flags({"hidden_irreps": "8x0e", "lora": True, "ema": True}, "mine")
    with pytest.raises(ValueError, match=message):
        check_flags(flags, "mine")


def test_failed_training_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"training in .* failed: .*no file gone.xyz.*output.log"):
        train({"train_file": "gone.xyz", "E0s": "average", "autotune_train_file": "gone.xyz"}, tmp_path)
