"""equitune active-learn: real training, dynamics, labels; stopped and continued."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ase.io
import numpy as np
import pytest
import yaml
from ase.build import molecule

from mace_lora.augment.active_config import read_config
from mace_lora.augment.selection import evenly

PROGRAM = Path(sys.executable).parent / "equitune"
CONFIG = {
    "folder": "run", "data": "labelled.xyz", "label": "gfn1-xtb", "members": 2, "window": [1, 1000], "per_round": 3,
    "max_rounds": 2, "workers": 2, "stop_below": 0.001,
    "train": {
        "foundation_model": "base.model", "E0s": "estimated", "multiheads_finetuning": False, "lora": True,
        "lora_rank": 2, "lr": 0.02, "batch_size": 5, "max_num_epochs": 2, "loss": "weighted",
        "default_dtype": "float32",
    },
    "explore": {"starts": "start.xyz", "temperatures": [800.0], "frames": 4, "spacing_fs": 5.0, "equilibration_fs": 10},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A base, 12 frames of ethanol with GFN1-xTB labels, a start and a config."""
    pytest.importorskip("mace")
    pytest.importorskip("tblite")
    import torch

    from mace_lora import embedded_base
    from mace_lora.augment import label
    from mace_lora.mace_plugin.convert import save_model

    save_model(embedded_base(torch.float32), tmp_path / "base.model")
    frames = []
    for seed in range(12):
        atoms = molecule("CH3CH2OH")
        atoms.rattle(0.05, seed=seed)
        frames.append(atoms)
    label(frames, tmp_path / "labelled.xyz", "gfn1-xtb")
    ase.io.write(tmp_path / "start.xyz", molecule("CH3CH2OH"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def explored_round(folder, deviations, ratio):
    """Config and folder of a round whose committee is trained, calibrated and has explored."""
    place = folder / "run" / "round-00"
    place.mkdir(parents=True)
    (place / "calibration.json").write_text(json.dumps({"frames": 1, "error_over_deviation": ratio}))
    for name in ("train", "valid"):
        (place / f"{name}.xyz").write_text((folder / "labelled.xyz").read_text())
    ase.io.write(place / "explored.xyz", [molecule("CH3CH2OH")] * len(deviations))
    (place / "deviation.json").write_text(json.dumps(deviations))
    return read_config(folder / "config.yaml"), place


def test_overconfident_committees_are_told_and_corrected(folder, monkeypatch):
    from mace_lora.augment import active

    config, place = explored_round(folder, [5.0, 20.0, 60.0, 90.0], 8.0)
    monkeypatch.setattr(active, "_train", lambda *_: None)
    config.window, config.stop_below = (100.0, 500.0), 0.9
    said: list[str] = []
    plain, _ = active._round(config, 0, place, config.data, said.append)
    assert (plain["in_window"], plain["above"]) == (0, 0)
    assert "8.0 times the deviation: the committee is over-confident" in " ".join(said)
    config.calibrate, said[:] = True, []
    corrected, _ = active._round(config, 0, place, config.data, said.append)
    assert (corrected["in_window"], corrected["above"]) == (2, 1)  # 40 | 160, 480 | 720
    assert not any("over-confident" in s for s in said)


def test_lost_frames_count_as_candidates(folder, monkeypatch):
    """A model whose dynamics blows up is not done, however much its committee agrees on what is left."""
    from mace_lora.augment import active

    config, place = explored_round(folder, [0.1], 1.0)  # 1 frame of 4
    monkeypatch.setattr(active, "_train", lambda *_: None)
    config.stop_below = 0.9
    said: list[str] = []
    found, _ = active._round(config, 0, place, config.data, said.append)
    assert (found["lost"], found["candidate_rate"]) == (3, 0.75)
    assert "round 0: 3 frames lost, the dynamics blew up or gave unsound frames" in " ".join(said)


def test_two_rounds_with_a_kill_between(folder):
    run = [str(PROGRAM), "active-learn", str(folder / "config.yaml")]
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ, cwd="/")
    first = folder / "run" / "round-00" / "explored.xyz"
    while process.poll() is None and not first.exists():
        time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    model = first.parent / "member-0" / "run.model"
    made = model.stat().st_mtime_ns
    half = first.parent / "member-1"  # as a kill while upstream writes the model leaves it
    (half / "run.complete").unlink()
    (half / "run.model").write_bytes(b"half")
    done = subprocess.run(run, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
    assert model.stat().st_mtime_ns == made  # not trained again
    assert (half / "run.complete").exists()
    assert (half / "run.model").stat().st_size > 100_000
    rounds = json.loads((folder / "run" / "rounds.json").read_text())
    assert [r["round"] for r in rounds] == [0, 1]
    for r in rounds:
        assert r["explored"] == 4
        assert r["candidate_rate"] == (r["in_window"] + r["above"]) / 4
        assert 0 < r["labelled"] <= 3
        assert r["mae_f"] > 0
        assert r["error_over_deviation"] > 0
    counts = [len(ase.io.read(folder / "run" / f"round-0{n}" / "all.xyz", ":")) for n in (0, 1)]
    assert counts == [12 + rounds[0]["labelled"], 12 + rounds[0]["labelled"] + rounds[1]["labelled"]]
    parts = [ase.io.read(folder / "run" / "round-01" / f"{p}.xyz", ":") for p in ("train", "valid")]
    assert sum(map(len, parts)) == counts[0]
    assert "max_rounds reached" in " ".join(done.stdout.split())
    assert (folder / "run" / "rounds.png").stat().st_size > 5000
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"per_round": 2}))
    done = subprocess.run(run, capture_output=True, text=True, cwd="/")
    assert done.returncode == 2
    assert "per_round: its rounds were made with 3, the config now has 2" in " ".join(done.stderr.split())
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    with (folder / "start.xyz").open("a") as handle:  # the same name, other frames
        handle.write((folder / "start.xyz").read_text())
    done = subprocess.run(run, capture_output=True, text=True, cwd="/")
    assert done.returncode == 2
    assert "content of explore.starts: its rounds were made with" in " ".join(done.stderr.split())


def test_even_choice_by_deviation():
    deviation = np.array([10.0, 200.0, 150.0, 120.0, 290.0, 500.0])
    assert list(evenly(deviation, np.array([1, 2, 3, 4]), 2)) == [3, 4]
    assert list(evenly(deviation, np.array([1, 2, 3, 4]), 9)) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": [1, 2]}, "windows: unknown key, expected one of folder, data, valid_fraction"),
        ({"members": 1}, "members: Input should be greater than or equal to 2, got 1"),
        ({"window": [300, 100]}, "window: expected lower < upper in meV/Å"),
        ({"train": {"seed": 3}}, "train: seed is set by the loop"),
        (
            {"explore": {"starts": "start.xyz", "frames": 0}},
            "explore.frames: Input should be greater than or equal to 1",
        ),
        ({"explore": {"starts": "start.xyz", "temperatures": [-5.0]}}, "start: expected a number > 0, got -5.0"),
        ({"label": "gfn9"}, "labeler: unknown name 'gfn9'"),
    ],
)
def test_configs_that_do_not_fit(change, message, tmp_path):
    for name in ("labelled.xyz", "start.xyz"):
        ase.io.write(tmp_path / name, molecule("H2O"))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG | change))
    with pytest.raises(ValueError, match=r".*") as caught:
        read_config(tmp_path / "c.yaml")
    assert message in str(caught.value)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*c.yaml"):
        read_config(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.raises(FileNotFoundError, match=r"no file .*labelled.xyz"):
        read_config(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("folder: [")
    with pytest.raises(ValueError, match=r"c.yaml: not a YAML file"):
        read_config(tmp_path / "c.yaml")
