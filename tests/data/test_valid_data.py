"""What is right must not be called wrong; and labels that are no numbers, stress among them."""

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, graphene
from test_check import good, only, problems

from mace_lora.data import check_frames, require_sound
from mace_lora.data.consistency import energy_force_slope


def primitive(count: int = 8) -> list[Atoms]:
    """Copper cells of one atom at several volumes: forces are zero by symmetry."""
    frames = []
    for a in np.linspace(3.4, 3.8, count):
        atoms = bulk("Cu", a=a)
        atoms.info["REF_energy"], atoms.arrays["REF_forces"] = (a - 3.6) ** 2, np.zeros((1, 3))
        frames.append(atoms)
    return frames


def infos(frames: list[Atoms]) -> list[str]:
    return [f.what for f in check_frames(frames) if f.severity == "info"]


def test_one_atom_has_no_force():
    assert problems(primitive()) == {}
    mixed = primitive() + good()
    assert not [what for what in problems(mixed) if "zero" in what]
    for atoms in mixed:
        atoms.arrays["REF_forces"][:] = 0.0
    assert problems(mixed)["all force labels are zero"][0] == "error"


def test_crystals_of_one_atom_are_not_isolated():
    frames = primitive()
    assert any(t.startswith("no isolated atom of Cu") for t in infos(frames))
    frames[0].info["config_type"] = "IsolatedAtom"
    assert not any(t.startswith("no isolated atom") for t in infos(frames))
    free = Atoms("Cu", info={"REF_energy": 0.0})
    free.arrays["REF_forces"] = np.zeros((1, 3))
    assert not any(t.startswith("no isolated atom") for t in infos([*primitive(), free]))


def test_slabs_need_no_third_vector():
    slab = graphene(vacuum=None) * (2, 2, 1)
    slab.rattle(0.02, seed=0)
    slab.info["REF_energy"], slab.arrays["REF_forces"] = -70.0, np.random.default_rng(0).normal(size=(8, 3))
    slab.arrays["REF_forces"] -= slab.arrays["REF_forces"].mean(0)
    assert not slab.cell[2].any() and problems([slab]) == {}
    slab.cell[1] = 2 * slab.cell[0]  # these two span no area
    assert only([slab], "1 frames are periodic and have no cell")[:2] == ("error", (0,))


@pytest.mark.parametrize(
    "state", [{"charge": 1}, {"spin": 3}, {"total_charge": 1}, {"total_spin": 3}, {"head": "wB97X"}]
)
def test_another_charge_spin_or_head_is_another_frame(state):
    frames = good()
    other = frames[7].copy()
    other.info["REF_energy"] += 8.0
    assert len(problems([*frames, other])) >= 2  # repeated and conflicting
    other.info |= state
    found = problems([*frames, other])
    assert not [what for what in found if "repeat" in what], found
    frames[7].info |= {"charge": 0.0, "total_spin": 1}  # the same as none
    again = frames[7].copy()
    again.info = {"REF_energy": again.info["REF_energy"]}
    assert only([*frames, again], "1 frames repeat an earlier one")[:2] == ("warning", (20,))


def test_work_is_compared_within_a_charge():
    frames = good()
    slope, _, pairs = energy_force_slope(
        frames, [a.info["REF_energy"] for a in frames], [a.arrays["REF_forces"] for a in frames]
    )
    ions = [a.copy() for a in frames]
    for atoms in ions:
        atoms.info["charge"] = 1
        atoms.info["REF_energy"] += 8.0
    both = [a for pair in zip(frames, ions, strict=True) for a in pair]
    found = energy_force_slope(both, [a.info["REF_energy"] for a in both], [a.arrays["REF_forces"] for a in both])
    assert found[0] == pytest.approx(slope, abs=0.1) and found[1] > 0.99 and found[2] < 2 * pairs


def test_texts_are_named(tmp_path):
    frames = good()
    frames[3].info["REF_energy"] = "abc"
    severity, which, remedy = only(
        frames, "1 frames have energy labels that cannot be used; REF_energy: expected one number (eV), got 'abc'"
    )
    assert (severity, which, remedy) == ("error", (3,), "check how they were written")
    ase.io.write(tmp_path / "a.xyz", frames)
    with pytest.raises(ValueError, match=r"a\.xyz: .*REF_energy: expected one number \(eV\), got 'abc'; frames 3"):
        require_sound(tmp_path / "a.xyz")
    frames = good()
    del frames[2].arrays["REF_forces"]
    frames[2].arrays["REF_forces"] = np.zeros((32, 2))
    only(frames, "1 frames have forces labels that cannot be used; REF_forces: expected numbers of shape (32, 3) (eV/Å)"
                 ", got shape (32, 2)")  # fmt: skip


@pytest.mark.parametrize("stress", [np.arange(6.0), np.arange(9.0), np.eye(3)])
def test_stress_may_be_there(stress):
    frames = good()
    frames[1].info["REF_stress"] = stress
    assert problems(frames) == {}
    frames[1].info["REF_stress"] = np.where(stress == 1.0, np.nan, stress)
    assert only(frames, "1 frames have a stress label with NaN or infinity")[:2] == ("error", (1,))


@pytest.mark.parametrize(
    ("stress", "shown"), [(np.arange(5.0), "shape (5,)"), (1.5, "1.5"), ("none", "'none'"), (np.inf, "inf")]
)
def test_stress_of_another_shape(stress, shown):
    frames = good()
    frames[4].info["dft_stress"] = stress
    assert problems(frames) == {}
    expected = f"dft_stress: expected 6 or 9 (3x3) numbers (eV/Å³), got {shown}"
    found = only(frames, f"1 frames have stress labels that cannot be used; {expected}", stress_key="dft_stress")
    assert found[:2] == ("error", (4,))
