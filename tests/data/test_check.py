"""equitune check finds what is wrong with a data set."""

import json
import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.emt import EMT

from mace_lora.data import check_frames, require_sound
from mace_lora.data.consistency import energy_force_slope, units_of_slope
from mace_lora.data.magnitude import bond_stiffness, energy_unit, force_unit


def good(count: int = 20) -> list[Atoms]:
    """Copper as along a trajectory: each frame a little off the one before."""
    rng, frames = np.random.default_rng(0), []
    atoms = bulk("Cu", cubic=True) * (2, 2, 2)
    for _ in range(count):
        atoms = atoms.copy()
        atoms.positions += rng.normal(0, 0.02, atoms.positions.shape)
        atoms.calc = EMT()
        atoms.info["REF_energy"] = atoms.get_potential_energy()
        atoms.arrays["REF_forces"] = atoms.get_forces()
        atoms.calc = None
        frames.append(atoms)
    return frames


def problems(frames: list[Atoms], **keys: str) -> dict[str, tuple]:
    return {f.what: (f.severity, f.frames, f.remedy) for f in check_frames(frames, **keys) if f.severity != "info"}


def only(frames: list[Atoms], start: str, **keys: str) -> tuple:
    """The one problem, whose sentence starts so."""
    found = problems(frames, **keys)
    assert len(found) == 1, found
    assert next(iter(found)).startswith(start), found
    return next(iter(found.values()))


def test_good_frames_have_no_problems():
    assert problems(good()) == {}
    infos = [f.what for f in check_frames(good())]
    assert any("energies follow the forces with slope 1" in t or "slope 0.99" in t for t in infos)
    assert any("no isolated atom of Cu" in t for t in infos)


@pytest.mark.parametrize(
    ("energy", "force", "guess"),
    [
        (1 / (units.kcal / units.mol), 1.0, "energies in kcal/mol, forces in eV/Å"),
        (1 / units.Hartree, units.Bohr / units.Hartree, "energies in Hartree, forces in Hartree/Bohr"),
        (1.0, units.Bohr / units.Hartree, "energies in eV, forces in Hartree/Bohr"),
        (1.0, -1.0, "the forces have the wrong sign"),
        (1.0, 3.0, "energies and forces are not of one method or unit"),
    ],
)
def test_units_from_energies_and_forces(energy, force, guess):
    frames = good()
    for atoms in frames:
        atoms.info["REF_energy"] *= energy
        atoms.arrays["REF_forces"] *= force
    slope, correlation, pairs = energy_force_slope(
        frames, [a.info["REF_energy"] for a in frames], [a.arrays["REF_forces"] for a in frames]
    )
    assert pairs > 20
    assert abs(correlation) > 0.99
    assert slope == pytest.approx(energy / force, rel=0.05)
    if "Hartree/Bohr" not in guess or energy == 1.0:
        assert guess in units_of_slope(slope)
        found = problems(frames)
        assert any(guess in remedy for _, _, remedy in found.values()), found
    else:  # Hartree and Hartree/Bohr: only the length shows
        assert units_of_slope(slope).startswith("it looks like")


def organic(count: int = 60) -> list[Atoms]:
    """Molecules in no order, with labels as of an all-electron program."""
    from mace_lora.augment import open_labeler

    pytest.importorskip("tblite")
    labeler, frames = open_labeler("gfn2-xtb"), []
    for seed in range(count):
        atoms = molecule(("CH3CH2OH", "CH3COOH", "CH3CONH2", "CH4", "H2O", "NH3")[seed % 6])
        atoms.rattle(0.05, seed=seed)
        labels = labeler.label(atoms)
        # GFN2-xTB has valence electrons alone; PBE0's free atoms are those of the recipes (eV)
        atoms.info["REF_energy"] = labels.energy + sum({"H": -2.9, "C": -978.7, "N": -1411.5, "O": -1936.3}[s]
                                                       for s in atoms.get_chemical_symbols())  # fmt: skip
        atoms.arrays["REF_forces"] = labels.forces
        frames.append(atoms)
    return frames


@pytest.mark.parametrize(
    ("energy", "force", "expected"),
    [
        (1.0, 1.0, []),
        (1.0, units.mol / units.kcal, ["it looks like kcal/mol/Å; expected eV/Å"]),
        (1.0, units.Bohr / units.Hartree, ["it looks like Hartree/Bohr; expected eV/Å"]),
        (1.0, -1.0, ["the sign is wrong (gradients?)"]),
        (1 / units.Hartree, 1.0, ["convert the energies to eV, and see to the forces as well"]),
        (units.mol / units.kcal, 1.0, ["convert the energies to eV, and see to the forces as well"]),
    ],
)
def test_units_show_without_a_trajectory(energy, force, expected):
    frames = organic()
    for atoms in frames:
        atoms.info["REF_energy"] *= energy
        atoms.arrays["REF_forces"] *= force
    found = [(what, remedy) for what, (severity, _, remedy) in problems(frames).items() if severity == "error"]
    assert {*expected} <= {remedy for _, remedy in found} and bool(found) == bool(expected), found
    if energy != 1.0:
        unit = "Hartree" if energy < 1 else "kcal/mol"
        assert found[0][0] == f"energies are those of the free atoms in {unit}, all electrons counted; expected eV"


def test_sound_data_that_look_odd():
    """Valence-only energies, and relaxed bonds whose lengths differ by kind, are no mix-up of units."""
    from mace_lora.augment import open_labeler

    pytest.importorskip("tblite")
    labeler, hot, relaxed = open_labeler("gfn2-xtb"), [], []
    for seed in range(40):
        atoms = molecule("CH3CH2OH")
        atoms.rattle(0.04, seed=seed)
        still = molecule(("CH3CHO", "CH3CH2OH", "HCOOH", "CH3CONH2")[seed % 4])
        still.rattle(0.001, seed=seed)
        for frames, frame in ((hot, atoms), (relaxed, still)):
            labels = labeler.label(frame)
            frame.info["REF_energy"], frame.arrays["REF_forces"] = labels.energy, labels.forces
            frames.append(frame)
    for frames in (hot, relaxed):
        assert not [p for p in check_frames(frames) if p.severity == "error"]


def test_magnitudes_of_real_sets(shared_data):
    """Bonds to hydrogen are as stiff in every public set; total energies are recognised where they are such."""
    for path, unit in (
        ("ani1x_wB97X/ani1x_1000_6-31Gs.extxyz", "eV"), ("qm7x_PBE0MBD/qm7x_2500.extxyz", "eV"),
        ("3bpa_wB97X/train_300K.xyz", "eV"), ("mad_PBEsol/mad_small_1000.extxyz", ""),
    ):  # fmt: skip
        frames = ase.io.read(shared_data / path, ":100")
        forces = [a.get_forces() for a in frames]
        stiffness, correlation, bonds = bond_stiffness(frames, forces)
        assert 15 < stiffness < 60 and correlation < -0.7 and bonds > 100, path
        assert force_unit(stiffness) == "eV/Å"
        assert energy_unit(frames, [a.get_potential_energy() for a in frames])[0] == unit


def test_slopes_near_one_are_a_warning():
    """Hot frames are too far apart for a slope of exactly 1; no mix-up of units is as small."""
    frames = good()
    for atoms in frames:
        atoms.arrays["REF_forces"] *= 1.2
    severity, _, remedy = only(frames, "energies follow the forces with slope 0.8")
    assert severity == "warning" and "two methods" in remedy


def test_missing_and_wrong_keys():
    frames = good()
    severity, _, remedy = only(frames, "no frame has energy labels under 'energy'", energy_key="energy")
    assert (severity, remedy) == ("error", "name the right key with --energy-key")
    del frames[3].arrays["REF_forces"]
    assert only(frames, "1 of 20 frames have no forces label")[1] == (3,)
    assert check_frames([])[0].what == "there are no frames"


def test_values_that_are_not_numbers():
    frames = good()
    frames[2].info["REF_energy"] = float("nan")
    assert only(frames, "1 frames have an energy label with NaN")[:2] == ("error", (2,))
    frames = good()
    frames[4].arrays["REF_forces"][1, 1] = np.inf
    assert only(frames, "1 frames have force labels with NaN or infinity")[:2] == ("error", (4,))
    frames = good()
    frames[5].positions[0, 0] = np.nan
    assert only(frames, "1 frames have positions with NaN or infinity")[:2] == ("error", (5,))


def test_repeated_and_conflicting_frames():
    frames = good()
    frames.append(frames[7].copy())
    assert only(frames, "1 frames repeat an earlier one")[:2] == ("warning", (20,))
    frames[-1].info["REF_energy"] += 1.0
    assert any(w.startswith("1 of these have another energy label") for w in problems(frames))


def test_outliers_are_named():
    frames = good()
    frames[6].info["REF_energy"] += 50.0
    found = problems(frames)
    assert any(w.startswith("energies of 1 frames are outliers") and v[1] == (6,) for w, v in found.items()), found
    frames = good()
    frames[9].arrays["REF_forces"] *= 200.0
    assert any(w.startswith("forces of 1 frames are outliers") and v[1] == (9,) for w, v in problems(frames).items())


def test_forces_that_cannot_be():
    frames = good()
    for atoms in frames:
        atoms.arrays["REF_forces"][:] = 0.0
    assert "all force labels are zero" in problems(frames)
    found = [f for f in check_frames(crystals()) if f.what == "all force labels are zero"]
    assert [f.severity for f in found] == ["warning"]


def crystals():
    """Perfect ones of several volumes, in which symmetry leaves no force on any of the atoms."""
    frames = []
    for a in (5.3, 5.4, 5.5):
        atoms = bulk("Si", a=a)
        atoms.info["REF_energy"] = -10.0 + (a - 5.4) ** 2
        atoms.arrays["REF_forces"] = np.zeros((2, 3))
        frames.append(atoms)
    return frames


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.xyz").write_text("")
    with pytest.raises(ValueError, match=r"empty.xyz is empty; expected frames"):
        require_sound(tmp_path / "empty.xyz")
    frames = good()
    frames[3].arrays["REF_forces"][:] = 0.0
    assert any(w.startswith("1 frames have force labels that are exactly zero") for w in problems(frames))
    frames = good()
    for atoms in frames:
        atoms.arrays["REF_forces"] += [0.3, 0.0, 0.0]
    assert any("do not add up to zero" in w for w in problems(frames))


def test_periodicity_and_overlap():
    frames = good()
    frames[1].cell[:] = 0.0
    assert any(w.startswith("1 frames are periodic and have no cell") for w in problems(frames))
    frames = good()
    frames[1].pbc = False
    assert any(w.startswith("1 frames have a cell but no periodic boundaries") for w in problems(frames))
    frames = good()
    frames[1].positions[0] = frames[1].positions[1] + 0.3
    assert any(w.startswith("1 frames have atoms closer than half") for w in problems(frames))


def test_command(tmp_path):
    program, path = Path(sys.executable).parent / "equitune", tmp_path / "a.xyz"
    frames = good()
    ase.io.write(path, frames)
    done = subprocess.run([program, "check", path], capture_output=True, text=True)
    assert done.returncode == 0
    assert "0 errors, 0 warnings" in " ".join(done.stdout.split())
    frames[2].info["REF_energy"] = float("nan")
    ase.io.write(path, frames)
    done = subprocess.run([program, "check", path, "--json"], capture_output=True, text=True)
    assert done.returncode == 1
    assert json.loads(done.stdout)[0]["severity"] == "error"


def test_real_sets_are_consistent(shared_data):
    """Slope of energies against forces is 1 for a real trajectory, whatever the energies' offset."""
    frames = ase.io.read(shared_data / "cu_PBE" / "Cu_300K.extxyz", ":")
    slope, correlation, _ = energy_force_slope(
        frames, [a.get_potential_energy() for a in frames], [a.get_forces() for a in frames]
    )
    assert slope == pytest.approx(1.0, abs=0.02)
    assert correlation > 0.999


def test_molecules_without_pairs_say_nothing_of_units():
    frames = []
    for seed in range(12):
        atoms = molecule("CH3CH2OH")
        atoms.rattle(1.0, seed=seed)
        atoms.info["REF_energy"], atoms.arrays["REF_forces"] = (
            float(seed),
            np.ones((9, 3)) * [[1.0], [-1.0], *[[0.0]] * 7],
        )
        frames.append(atoms)
    assert not any("slope" in f.what for f in check_frames(frames))


def test_recipes_stop_at_errors_and_say_warnings(tmp_path):
    sound = good()
    said: list[str] = []
    require_sound(sound, say=said.append)
    lost = [a.copy() for a in sound]
    lost[3].arrays["REF_forces"][0, 0] = np.nan
    ase.io.write(tmp_path / "lost.xyz", lost, write_results=False)
    with pytest.raises(ValueError, match=r"lost\.xyz: .*NaN.*; frames 3"):
        require_sound(tmp_path / "lost.xyz")
    with pytest.raises(ValueError, match="no frame has energy labels under 'energy_dft'"):
        require_sound(sound, energy_key="energy_dft")
    require_sound([*sound, sound[0]], say=said.append)
    assert any(("warning" in s and "frames 20" in s) or "duplicate" in s or "repeat" in s for s in said), said
