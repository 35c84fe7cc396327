"""equitune sample: dynamics, rattle, strain, stretched bonds, clusters, filters."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule

from mace_lora.augment.dynamics import Schedule, sample_md, trajectory
from mace_lora.augment.packing import molecule as smiles_molecule
from mace_lora.augment.packing import pack
from mace_lora.augment.perturb import cluster, keep_sound, rattle, strain, stretch_bond
from mace_lora.augment.topology import find_bonds, molecules, smaller_side

SHORT = Schedule(300.0, 300.0, frames=4, spacing=5.0, timestep=1.0, equilibration=5.0)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_bonds_molecules_and_sides():
    ethanol = molecule("CH3CH2OH")
    bonds = find_bonds(ethanol)
    assert len(bonds.pairs) == 8
    assert [len(m) for m in molecules(bonds)] == [9]
    carbon_carbon = [n for n, (i, j) in enumerate(bonds.pairs) if set(ethanol.numbers[[i, j]]) == {6}]
    assert sorted(ethanol.numbers[smaller_side(bonds, carbon_carbon[0])]) == [1, 1, 1, 6]
    ring = find_bonds(molecule("C6H6"))
    in_ring = [n for n, (i, j) in enumerate(ring.pairs) if i < 6 and j < 6]
    assert all(smaller_side(ring, n) is None for n in in_ring)


@pytest.mark.parametrize("seed", range(20))
def test_stretch_moves_one_side_rigidly(seed):
    atoms = molecule("CH3CH2OH")
    frame = stretch_bond(atoms, rng(seed))
    i, j = map(int, frame.info["stretched"].split("-"))
    factor = frame.info["stretch_factor"]
    assert 0.85 <= factor <= 2.0
    before, after = atoms.get_all_distances(), frame.get_all_distances()
    assert after[i, j] == pytest.approx(factor * before[i, j])
    bonds = find_bonds(atoms)
    index = next(n for n, pair in enumerate(bonds.pairs) if set(pair) == {i, j})
    side = smaller_side(bonds, index)
    rest = np.setdiff1d(np.arange(len(atoms)), side)
    for part in (side, rest):
        np.testing.assert_allclose(after[np.ix_(part, part)], before[np.ix_(part, part)], atol=1e-12)
    np.testing.assert_array_equal(frame.positions[rest], atoms.positions[rest])


def test_stretch_of_rings_and_periodic_molecules():
    for seed in range(20):  # benzene: only C-H bonds are drawn
        i, j = map(int, stretch_bond(molecule("C6H6"), rng(seed)).info["stretched"].split("-"))
        assert i < 6 <= j
    water = molecule("H2O")
    water.positions[:, 2] -= water.positions[0, 2]
    box = Atoms("OHH", positions=water.positions % 8.0, cell=[8.0] * 3, pbc=True)  # across the boundary
    frame = stretch_bond(box, rng(1), low=1.2, high=1.2)
    i, j = map(int, frame.info["stretched"].split("-"))
    assert frame.get_distance(i, j, mic=True) == pytest.approx(1.2 * box.get_distance(i, j, mic=True))
    ring = Atoms("C6", positions=molecule("C6H6").positions[:6])
    with pytest.raises(ValueError, match="stretch: C6 has no bond to stretch: all of its bonds are in rings"):
        stretch_bond(ring, rng())
    with pytest.raises(ValueError, match="it has no bonds"):
        stretch_bond(Atoms("Ar"), rng())


def test_rattle_and_strain():
    atoms = bulk("Cu", cubic=True) * (4, 4, 4)
    moved = rattle(atoms, 0.05, rng()).positions - atoms.positions
    assert moved.std() == pytest.approx(0.05, rel=0.1)
    np.testing.assert_array_equal(rattle(atoms, 0.05, rng(3)).positions, rattle(atoms, 0.05, rng(3)).positions)
    strained = strain(atoms, 0.03, rng())
    change = np.linalg.inv(np.array(atoms.cell)) @ np.array(strained.cell) - np.eye(3)
    np.testing.assert_allclose(change, change.T, atol=1e-12)
    assert 0 < np.abs(change).max() <= 0.03
    np.testing.assert_allclose(strained.get_scaled_positions(), atoms.get_scaled_positions(), atol=1e-10)
    with pytest.raises(ValueError, match="strain: expected a frame periodic in all directions"):
        strain(molecule("H2O"), 0.05, rng())


def water_box() -> Atoms:
    box = Atoms(cell=[12.4] * 3, pbc=True)
    for place in np.ndindex(4, 4, 4):
        one = molecule("H2O")
        one.translate(3.1 * np.array(place))
        box += one
    box.wrap()  # tears molecules at the boundary
    return box


def test_cluster_is_whole_and_at_the_centre():
    found = cluster(water_box(), 5)
    assert found.get_chemical_formula() == "H10O5"
    assert not found.pbc.any()
    assert len(molecules(find_bonds(found))) == 5
    box = water_box()
    oxygen = box.positions[box.numbers == 8]
    nearest = np.sort(np.linalg.norm(oxygen - 6.2, axis=1))[:5]
    mine = np.sort(np.linalg.norm(found.positions[found.numbers == 8], axis=1))
    assert np.abs(mine - nearest).max() < 0.5  # by centres of molecules, not by oxygens
    with pytest.raises(ValueError, match="cluster: expected between 1 and 64 molecules, got 65"):
        cluster(water_box(), 65)
    with pytest.raises(ValueError, match="bound to its own periodic image"):
        cluster(bulk("Cu", cubic=True) * (2, 2, 2), 1)
    droplet = cluster(box, 20)
    inner = cluster(droplet, 3)
    assert inner.get_chemical_formula() == "H6O3"
    far = droplet.positions[droplet.numbers == 8] - droplet.get_center_of_mass()
    mine = inner.positions[inner.numbers == 8]
    assert np.linalg.norm(mine, axis=1).max() < np.sort(np.linalg.norm(far, axis=1))[3] + 0.5
    droplet.pbc = [True, True, False]
    with pytest.raises(ValueError, match="cluster: expected a frame periodic in all directions or in none"):
        cluster(droplet, 3)


def test_packed_liquid(tmp_path):
    """Density, whole molecules, least distance across the boundary, equal seeds."""
    pytest.importorskip("packmol")
    pytest.importorskip("rdkit")
    water, ethanol = smiles_molecule("O"), smiles_molecule("CCO")
    box = pack([water, ethanol], [20, 4], 0.9, seed=3)
    assert box.get_chemical_formula() == "C8H64O24" and box.pbc.all()
    grams = box.get_masses().sum() / 6.02214076e23
    assert grams / (box.get_volume() * 1e-24) == pytest.approx(0.9, rel=1e-5)
    whole = molecules(find_bonds(box))
    assert sorted(map(len, whole)) == [3] * 20 + [9] * 4
    owner = np.empty(len(box), int)
    for n, member in enumerate(whole):
        owner[member] = n
    distances = box.get_all_distances(mic=True)
    assert distances[owner[:, None] != owner[None]].min() > 1.95
    np.testing.assert_array_equal(pack([water, ethanol], [20, 4], 0.9, seed=3).positions, box.positions)
    assert np.abs(pack([water, ethanol], [20, 4], 0.9, seed=4).positions - box.positions).max() > 0.1
    with pytest.raises(ValueError, match="Packmol found no room for 24 molecules at 6 g/cm"):
        pack([water, ethanol], [20, 4], 6.0)
    for counts, density, message in (
        ([20], 0.9, "counts: expected one number for each of 2 species, got 1"),
        ([20, 0], 0.9, "counts: expected numbers of at least 1"),
        ([20, 4], -1.0, "density: expected g/cm.3 between 0 and 30"),
    ):
        with pytest.raises(ValueError, match=message):
            pack([water, ethanol], counts, density)
    with pytest.raises(ValueError, match="expected a file or a SMILES string, got 'not one'"):
        smiles_molecule("not one")
    with pytest.raises(FileNotFoundError, match=r"no file 'gone\.xyz'"):
        smiles_molecule("gone.xyz")
    program = Path(sys.executable).parent / "equitune"
    run = [program, "sample", "pack", "O", "--count", "30", "--density", "1.0", "-o", str(tmp_path / "w.xyz")]
    done = subprocess.run([*run, "--boxes", "2"], capture_output=True, text=True, check=True)
    assert "written: 2 frames" in done.stdout
    bad = subprocess.run([*run[:5], "many", *run[6:]], capture_output=True, text=True, check=False)
    assert bad.returncode == 2 and "--count: expected whole numbers" in bad.stderr


def test_filters_count_what_they_drop():
    good = molecule("H2O")
    close, far, lost = good.copy(), good.copy(), good.copy()
    close.positions[1] = close.positions[0] + 0.1
    far.positions[1] += 5.0
    lost.positions[0, 0] = np.nan
    dropped = Counter()
    kept = list(keep_sound([good, close, far, lost], reference=good, dropped=dropped))
    assert kept == [good]
    assert dropped == {"overlapping atoms": 1, "bonds changed": 1, "not finite": 1}
    assert len(list(keep_sound([far]))) == 1  # reactions are allowed without a reference


def test_trajectory_continues_to_the_digit():
    start = bulk("Cu", cubic=True) * (2, 2, 2)
    whole = list(trajectory(start, "emt", SHORT, (7, 0)))
    for cut in (1, 3):
        rest = list(trajectory(start, "emt", SHORT, (7, 0), done=whole[:cut]))
        for a, b in zip(whole[cut:], rest, strict=True):
            np.testing.assert_array_equal(a.positions, b.positions)
            np.testing.assert_array_equal(a.get_momenta(), b.get_momenta())
    other = next(trajectory(start, "emt", SHORT, (8, 0)))
    assert np.abs(other.positions - whole[0].positions).max() > 1e-3


def test_temperature_of_the_frames():
    """Kinetic temperature over frames and a schedule: 600 K, and 900 K falling to 100 K."""
    start = bulk("Cu", cubic=True) * (3, 3, 3)
    steady = Schedule(600.0, 600.0, frames=40, spacing=20.0, timestep=4.0, friction=0.05, equilibration=400.0)
    values = [a.get_kinetic_energy() / (1.5 * units.kB * len(a)) for a in trajectory(start, "emt", steady, (1,))]
    assert np.mean(values) == pytest.approx(600.0, rel=0.08)
    falling = Schedule(900.0, 100.0, frames=20, spacing=100.0, timestep=5.0, friction=0.05, equilibration=400.0)
    assert [round(falling.temperature(n)) for n in (0, 10, 19)] == [900, 479, 100]
    values = [a.get_kinetic_energy() / (1.5 * units.kB * len(a)) for a in trajectory(start, "emt", falling, (1,))]
    assert np.mean(values[-4:]) < 350 < 600 < np.mean(values[:4])


def test_killed_run_gives_the_same_file(tmp_path):
    start = tmp_path / "start.xyz"
    ase.io.write(start, bulk("Cu", cubic=True) * (2, 2, 2))
    run = [
        str(Path(sys.executable).parent / "equitune"), "sample", "md", str(start), "--with", "emt", "--frames", "30",
        "--spacing", "20", "--temperatures", "300,900:300", "--workers", "2", "--timestep", "1",
    ]  # fmt: skip
    subprocess.run([*run, "-o", str(tmp_path / "once.xyz")], check=True, stdout=subprocess.DEVNULL)
    kills = 0
    while kills < 2:
        process = subprocess.Popen([*run, "-o", str(tmp_path / "out.xyz")], stdout=subprocess.DEVNULL, env=os.environ)
        time.sleep(3.0 + 0.3 * kills)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        time.sleep(1.5)  # workers notice
    done = subprocess.run([*run, "-o", str(tmp_path / "out.xyz")], check=True, capture_output=True, text=True)
    assert "written: 60 frames to" in " ".join(done.stdout.split())
    assert (tmp_path / "out.xyz").read_bytes() == (tmp_path / "once.xyz").read_bytes()
    assert not (tmp_path / "out.xyz.trajectories").exists()


def test_other_settings_are_not_mixed(tmp_path):
    start = bulk("Cu", cubic=True)
    folder = tmp_path / "out.xyz.trajectories"
    folder.mkdir()
    (folder / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="begun with other settings"):
        sample_md([start], tmp_path / "out.xyz", "emt", [SHORT])
    with pytest.raises(ValueError, match="starts: expected at least one frame"):
        sample_md([], tmp_path / "out.xyz", "emt", [SHORT])
    with pytest.raises(ValueError, match="emt: the model does not know Fe"):
        sample_md([bulk("Fe")], tmp_path / "out.xyz", "emt", [SHORT])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 0.0}, "start: expected a number > 0, got 0.0"),
        ({"timestep": -1.0}, "timestep: expected a number > 0"),
        ({"frames": 0}, "frames, equilibration: expected >= 1"),
        ({"spacing": 0.1}, r"spacing: expected at least the timestep \(0.5 fs\), got 0.1 fs"),
    ],
)
def test_schedules_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**({"start": 300.0, "end": 300.0} | settings))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["md", "{xyz}", "--with", "emt", "--temperatures", "hot"],
            "--temperatures: expected numbers > 0 in K, or A:B",
        ),
        (["stretch", "{xyz}", "--low", "2", "--high", "1"], "--low, --high: expected 0 < low < high"),
        (["rattle", "{xyz}", "--copies", "0"], "Invalid value for '--copies'"),
        (["rattle", "missing.xyz"], "no file missing.xyz"),
    ],
)
def test_bad_options(options, message, tmp_path):
    ase.io.write(tmp_path / "a.xyz", bulk("Cu"))
    program = Path(sys.executable).parent / "equitune"
    arguments = [o.replace("{xyz}", str(tmp_path / "a.xyz")) for o in options]
    done = subprocess.run([program, "sample", *arguments, "-o", tmp_path / "o.xyz"], capture_output=True, text=True)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
