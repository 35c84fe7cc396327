"""Errors of parts of a data set, and against the number of labels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase.build import bulk

from mace_lora.evaluate.curves import read_points
from mace_lora.evaluate.groups import by_force, by_key
from mace_lora.evaluate.metrics import Predictions

HERE = Path(__file__).parent
PROGRAM = Path(sys.executable).parent / "equitune"


def predictions() -> Predictions:
    """Four frames of two atoms; forces grow with the frame, so do their errors."""
    label = np.zeros((8, 3))
    label[:, 0] = np.arange(1, 9)
    energy = np.array([0.0, 1.0, 2.0, 3.0])
    return Predictions(np.full(4, 2), energy, energy + [0.1, 0.1, 0.4, 0.4], label, label * 1.1, np.full(8, 29))


def test_by_size_of_the_force():
    rows = by_force(predictions(), 4)
    assert [(r["low"], r["high"], r["atoms"]) for r in rows] == [(1, 2, 2), (3, 4, 2), (5, 6, 2), (7, 8, 2)]
    np.testing.assert_allclose([r["mae"] for r in rows], [50, 350 / 3, 550 / 3, 250])
    np.testing.assert_allclose([r["relative"] for r in rows], 0.1)
    assert by_force(predictions(), 100)[-1]["atoms"] == 1
    with pytest.raises(ValueError, match="bins: expected at least 1"):
        by_force(predictions(), 0)


def test_by_key():
    rows = by_key(predictions(), [1000, 300, 300, 1000])
    assert list(rows) == ["300", "1000"]  # as numbers
    assert rows["300"]["frames"] == 2
    assert rows["300"]["mae_e"] == pytest.approx(125)
    assert rows["1000"]["mae_f"] == pytest.approx(1e3 * 0.1 * (1 + 2 + 7 + 8) / 12)
    with pytest.raises(ValueError, match="values: expected one for each of 4 frames, got 1"):
        by_key(predictions(), [300])


def test_evaluate_a_potential_by_name_and_its_curve(tmp_path):
    frames = []
    for seed in range(8):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(0.05, seed=seed)
        atoms.info["T"] = 300 if seed % 2 else 600
        frames.append(atoms)
    ase.io.write(tmp_path / "frames.xyz", frames)
    environment = os.environ | {"PYTHONPATH": str(HERE)}

    def run(*arguments):
        return subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, env=environment)

    out, folder = tmp_path / "out.xyz", tmp_path / "eval"
    assert run("label", tmp_path / "frames.xyz", "-o", out, "--with", "emt").returncode == 0
    evaluate = ["evaluate", "potentials:weak", out, "-o", folder, "--by"]
    done = run(*evaluate, "T")
    assert done.returncode == 0, done.stderr
    content = json.loads((folder / "errors.json").read_text())
    assert content["errors"]["mae_e"] == pytest.approx(0, abs=1e-6)
    assert {k: v["frames"] for k, v in content["errors_by"]["T"].items()} == {"300": 4, "600": 4}
    assert all(r["relative"] == pytest.approx(0.1, rel=1e-3) for r in content["force_errors_by_size"])
    missing = run(*evaluate, "P")
    assert missing.returncode == 2 and "--by: frame 0 has no 'P' in its info" in " ".join(missing.stderr.split())
    named = run(*evaluate[:3], "--adapter", "some")
    assert named.returncode == 2 and "potentials:weak is a potential by name" in " ".join(named.stderr.split())
    file = folder / "errors.json"
    done = run("learning-curve", f"weak:25={file}", f"weak:50={folder}", f"weak:50={file}", "-o", tmp_path / "c.png")
    assert "weak" in done.stdout and (tmp_path / "c.png").stat().st_size > 5000


def test_points_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"expected NAME:N=errors.json, e.g. lora:50=.*, got 'x=y'"):
        read_points(["x=y"])
    with pytest.raises(FileNotFoundError, match="no file"):
        read_points([f"a:5={tmp_path}/gone.json"])
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match=r"expected an errors\.json of equitune evaluate"):
        read_points([f"a:5={tmp_path}/other.json"])


def test_stress_has_intervals():
    from mace_lora.evaluate.metrics import Predictions, intervals, stress_errors

    rng = np.random.default_rng(0)
    stress = rng.normal(size=(20, 6))
    label = stress + 0.01 * rng.normal(size=(20, 6))
    label[3] = np.nan  # a frame without the label
    p = Predictions(
        np.full(20, 2),
        np.zeros(20),
        np.zeros(20),
        np.zeros((40, 3)),
        np.zeros((40, 3)),
        np.ones(40, int),
        label,
        stress,
    )
    found, errors = intervals(p), stress_errors(p)
    for key, value in zip(("mae_s", "rmse_s"), errors, strict=True):
        assert found[key][0] < value < found[key][1]
