"""equitune sample: potentials that give up, frames that cannot be changed, charges."""

import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from mace_lora.augment import Schedule, cluster, rattle, sample_md, strain
from mace_lora.augment.packing import pack
from mace_lora.evaluate.stability import stability

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def own_labelers(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", str(HERE))  # for workers


def sample(*arguments: object) -> subprocess.CompletedProcess:
    program = Path(sys.executable).parent / "equitune"
    return subprocess.run([program, "sample", *map(str, arguments)], capture_output=True, text=True)


def copper() -> Atoms:
    atoms = bulk("Cu", cubic=True) * (2, 1, 1)
    atoms.rattle(0.02, seed=1)
    return atoms


def test_a_potential_that_gives_up_ends_its_trajectory(tmp_path):
    """Hot dynamics fails, cold dynamics does not; what is there is kept and the rest counted."""
    schedules = [Schedule(t, t, 20, 10.0, 2.0, 0.05, 0.0) for t in (50.0, 9000.0)]
    dropped = sample_md([copper()], tmp_path / "md.xyz", "own_labelers:tiring", schedules, seed=1)
    frames = ase.io.read(tmp_path / "md.xyz", ":")
    why, lost = next((k, n) for k, n in dropped.items() if k.startswith("the potential failed"))
    assert why == "the potential failed (RuntimeError: no convergence)"
    assert len(frames) + sum(dropped.values()) == 40 and lost > 5
    assert sum(a.info["temperature_K"] == 50.0 for a in frames) == 20
    with pytest.raises(
        ValueError, match=r"own_labelers:hopeless: no trajectory gave a frame: the potential failed \(Runtime"
    ):
        sample_md([copper()], tmp_path / "none.xyz", "own_labelers:hopeless", schedules[:1])


def test_blown_up_dynamics_ends(tmp_path):
    """A time step far too long: the trajectory ends with its reason, in a collapsing box before memory does."""
    with pytest.raises(ValueError, match=r"no trajectory gave a frame: the potential failed \(ValueError: an atom"):
        sample_md([copper()], tmp_path / "no.xyz", "emt", [Schedule(3000.0, 3000.0, 5, 400.0, 200.0, 0.05, 400.0)])


def test_amber_goes_on_where_it_was(tmp_path):
    """Residues are the start's, also for frames that come from the trajectory's file."""
    pytest.importorskip("openmm")
    from test_labelers import dipeptide

    from mace_lora.augment.dynamics import run_trajectory

    name, seed = "openmm:amber14-all.xml", (1, 0)
    whole, part = Schedule(300.0, 300.0, 4, 2.0, 0.5, 0.02, 2.0), Schedule(300.0, 300.0, 2, 2.0, 0.5, 0.02, 2.0)
    assert run_trajectory(dipeptide(), name, whole, seed, str(tmp_path / "a.xyz")) == (4, "")
    assert run_trajectory(dipeptide(), name, part, seed, str(tmp_path / "b.xyz")) == (2, "")
    assert run_trajectory(dipeptide(), name, whole, seed, str(tmp_path / "b.xyz")) == (4, "")
    assert (tmp_path / "a.xyz").read_text() == (tmp_path / "b.xyz").read_text()


def test_nothing_sound(tmp_path):
    start = Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 0.9]])
    with pytest.raises(ValueError, match=r"emt: all frames were dropped \(3 bonds changed\); lower the temperature"):
        sample_md(
            [start], tmp_path / "no.xyz", "emt", [Schedule(50.0, 50.0, 3, 50.0, 1.0, 0.05, 100.0)], keep_bonds=True
        )
    assert not (tmp_path / "no.xyz").exists()


def test_stability_counts_it_as_an_end(tmp_path):
    found = stability([copper()], tmp_path, "own_labelers:tiring", temperature=9000.0, steps=200, every=10, replicas=1,
                      timestep=2.0)  # fmt: skip
    assert not found[0].survived and found[0].why == "the potential failed (RuntimeError: no convergence)"
    assert found[0].steps < 200


def test_frames_that_cannot_be_changed_are_left_out(tmp_path):
    ase.io.write(tmp_path / "in.xyz", [molecule("H2O"), Atoms("Ar"), molecule("CH4"), Atoms("Ar")])
    done = sample("stretch", tmp_path / "in.xyz", "-o", tmp_path / "out.xyz", "--copies", "2")
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    assert "dropped 4 frames: stretch: Ar has no bond to stretch: it has no bonds (the first: frame 1)" in shown
    assert {a.info["start"] for a in ase.io.read(tmp_path / "out.xyz", ":")} <= {0, 2}
    done = sample("strain", tmp_path / "in.xyz", "-o", tmp_path / "no.xyz")
    assert done.returncode == 2 and "nothing to write: strain: expected a frame periodic" in " ".join(
        done.stderr.split()
    )
    assert not (tmp_path / "no.xyz").exists()


def test_charges_of_molecules():
    box = Atoms()
    for k in range(3):
        one = molecule("H2O")
        one.translate([4.0 * k, 0, 0])
        box += one
    box.info["charge"] = 1
    with pytest.raises(ValueError, match=r"cluster: charge 1 and multiplicity 1 of the frame cannot be divided"):
        cluster(box, 2)
    pytest.importorskip("packmol")
    radical, water = molecule("CH3"), molecule("H2O")
    radical.info["spin"] = 2
    box = pack([radical, water], [1, 8], 0.6)
    assert box.info == {"density_g_cm3": 0.6, "charge": 0, "spin": 2}
    with pytest.raises(ValueError, match="pack: 2 molecules have unpaired electrons, whose coupling is not known"):
        pack([radical, water], [2, 8], 0.6)


def test_options_that_do_not_fit(tmp_path):
    ase.io.write(tmp_path / "cu.xyz", copper())
    for command, options, message in (
        ("md", ["--with", "emt", "--replicas", "0"], "Invalid value for '--replicas'"),
        ("md", ["--with", "emt", "--workers", "0"], "Invalid value for '--workers'"),
        ("md", ["--with", "emt", "--temperatures", "0"], "--temperatures: expected numbers > 0 in K, or A:B, got '0'"),
        ("rattle", ["--std", "-1"], "--std: expected a length > 0 in Å, got -1.0"),
        ("strain", ["--largest", "2"], "--largest: expected a strain between 0 and 0.5, got 2.0"),
    ):
        done = sample(command, tmp_path / "cu.xyz", "-o", tmp_path / "out.xyz", *options)
        assert done.returncode == 2
        assert message in " ".join(done.stderr.replace("│", " ").split())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cu.xyz"]
    with pytest.raises(ValueError, match="replicas: expected at least 1, got 0"):
        sample_md([copper()], tmp_path / "a.xyz", "emt", [Schedule(50.0, 50.0)], replicas=0)
    for wrong in (0.0, float("nan")):
        with pytest.raises(ValueError, match="std: expected a length > 0 in Å"):
            rattle(copper(), wrong, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"largest: expected a strain between 0 and 0.5, got 0.7"):
        strain(copper(), 0.7, np.random.default_rng(0))


def test_rattled_molecules_may_have_to_stay_whole(tmp_path):
    ase.io.write(tmp_path / "in.xyz", molecule("CH3CH2OH"))
    done = sample(
        "rattle", tmp_path / "in.xyz", "-o", tmp_path / "out.xyz", "--std", "0.25", "--copies", "40", "--keep-bonds"
    )
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    kept = len(ase.io.read(tmp_path / "out.xyz", ":"))
    assert 0 < kept < 40
    assert "bonds changed" in shown and f"written: {kept} frames" in shown
