"""equitune stability: survival, collapse, restart, conservation of energy."""

import json
import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from mace_lora.evaluate.stability import bond_excess, energy_drift, stability

HERE = Path(__file__).parent
PROGRAM = Path(sys.executable).parent / "equitune"


@pytest.fixture(autouse=True)
def potentials(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", str(HERE))


def nitrogen() -> Atoms:
    return Atoms("N2", positions=[[0, 0, 0], [0, 0, 1.1]])


def test_excess_of_a_bond_also_across_the_boundary():
    excess = bond_excess(nitrogen())
    moved = nitrogen()
    moved.positions[1, 2] = 4.1
    assert excess(nitrogen()) == 0.0
    assert excess(moved) == pytest.approx(3.0)
    moved.positions[0, 0] = np.nan
    assert excess(moved) == np.inf
    box = Atoms("N2", positions=[[0, 0, 0.2], [0, 0, 9.1]], cell=[10] * 3, pbc=True)
    out = box.copy()
    out.positions[1, 2] -= 0.4  # its image at -0.9 goes to -1.3
    assert bond_excess(box)(out) == pytest.approx(0.4)
    assert bond_excess(Atoms("Ar"))(Atoms("Ar")) == 0.0


def test_bound_survives_and_unbound_collapses(tmp_path):
    options = {"temperature": 300.0, "steps": 1000, "timestep": 0.5, "replicas": 3, "every": 50}
    good = stability([nitrogen()], tmp_path / "good", "potentials:bound", **options)
    assert [(r.survived, r.steps, r.why) for r in good] == 3 * [(True, 1000, "")]
    bad = stability([nitrogen()], tmp_path / "bad", "potentials:unbound", **options)
    assert not any(r.survived for r in bad)
    assert all(0 < r.steps < 1000 and "Å from its length at the start" in r.why for r in bad)
    content = json.loads((tmp_path / "bad" / "stability.json").read_text())
    assert content["surviving"] == 0.0 and content["steps"] == 1000
    excess = bond_excess(nitrogen())
    for row in bad:
        frames = ase.io.read(tmp_path / "bad" / f"trajectory-000-{row.replica:03d}.xyz", ":")
        values = [excess(a) for a in frames]
        assert values[-1] > 5.0 and max(values[:-1]) <= 5.0
        assert len(frames) == row.steps // 50 + 1
    before = {f.name: f.read_bytes() for f in (tmp_path / "bad").glob("*.xyz")}
    assert stability([nitrogen()], tmp_path / "bad", "potentials:unbound", **options) == bad  # nothing runs again
    assert before == {f.name: f.read_bytes() for f in (tmp_path / "bad").glob("*.xyz")}
    with pytest.raises(ValueError, match="it was begun with other settings"):
        stability([nitrogen()], tmp_path / "bad", "potentials:unbound", **(options | {"temperature": 200.0}))


def test_energy_is_conserved_and_drift_is_seen():
    start = bulk("Cu", cubic=True) * (3, 3, 3)
    found = energy_drift(start, "emt", temperature=300.0, steps=400, timestep=2.0)
    assert abs(found["drift"]) < 0.5 and found["fluctuation"] < 0.5
    assert len(found["energy"]) == len(found["time"]) == 41
    coarse = energy_drift(start, "emt", temperature=300.0, steps=400, timestep=12.0)
    assert coarse["fluctuation"] > 5 * found["fluctuation"]


def test_command(tmp_path):
    ase.io.write(tmp_path / "n2.xyz", nitrogen())
    run = [
        PROGRAM, "stability", tmp_path / "n2.xyz", "--with", "potentials:bound", "-o", tmp_path / "out",
        "--steps", "200", "--replicas", "2", "--nve", "100",
    ]  # fmt: skip
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    shown = " ".join(done.stdout.split())
    assert "2 of 2 trajectories survived 200 steps at 300 K" in shown
    assert "NVE: drift" in shown
    for name in ("stability.json", "stability.png", "energy_drift.json"):
        assert (tmp_path / "out" / name).stat().st_size > 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every: expected between 1 and 100 steps, got 0"),
        ({"every": 101}, "every: expected between 1 and 100 steps, got 101"),
        ({"replicas": 0}, "replicas: expected at least 1, got 0"),
        ({"limit": 0.0}, "limit: expected a length > 0 in Å"),
        ({"temperature": -3.0}, "start: expected a number > 0"),
    ],
)
def test_bad_settings(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        stability([nitrogen()], tmp_path, "potentials:bound", **({"steps": 100, "every": 10} | options))


def test_bad_starts(tmp_path):
    with pytest.raises(ValueError, match="starts: expected at least one frame"):
        stability([], tmp_path, "potentials:bound")
    with pytest.raises(ValueError, match="emt: the model does not know Fe"):
        stability([bulk("Fe")], tmp_path, "emt")
    with pytest.raises(ValueError, match="steps: expected at least 30, got 20"):
        energy_drift(nitrogen(), "potentials:bound", steps=20)
    with pytest.raises(ValueError, match="NVE dynamics: the energy is not finite at step"):
        energy_drift(nitrogen(), "potentials:broken", steps=200)
