"""equitune select: diverse frames, windows, committees."""

import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from mace_lora.augment.selection import committee_deviation, farthest, features, random_frames, unique, within


def test_farthest_points_by_definition():
    values = np.random.default_rng(0).normal(size=(60, 5))
    index, distance = farthest(values, 12)
    assert index[0] == 0
    for n in range(1, 12):
        gaps = np.linalg.norm(values[:, None] - values[index[:n]][None], axis=-1).min(1)
        assert index[n] == gaps.argmax()
        assert distance[n] == pytest.approx(gaps.max())
    assert (np.diff(distance[1:]) <= 1e-12).all()
    with pytest.raises(ValueError, match=r"count: expected between 1 and 60 \(different frames\), got 61"):
        farthest(values, 61)
    with pytest.raises(ValueError, match=r"between 1 and 1 \(different frames\), got 2"):
        farthest(np.ones((5, 2)), 2)


def test_features_of_a_model():
    """Equal for rotated and renumbered molecules, different for distorted ones."""
    pytest.importorskip("mace")
    atoms = molecule("CH3CH2OH")
    turned = atoms.copy()
    turned.rotate(50, "xyz"[0])
    shuffled = atoms[[8, 3, 1, 0, 2, 7, 4, 6, 5]]
    distorted = atoms.copy()
    distorted.rattle(0.2, seed=1)
    values = features([atoms, turned, shuffled, distorted, molecule("CH4")])
    np.testing.assert_allclose(values[1], values[0], atol=1e-8)
    np.testing.assert_allclose(values[2], values[0], atol=1e-8)
    gaps = np.linalg.norm(values - values[0], axis=1)
    assert gaps[3:].min() > 0.01
    with pytest.raises(ValueError, match="mace: the model does not know Cu"):
        features([bulk("Cu")])


def test_duplicates_also_turned_and_renumbered(tmp_path):
    pytest.importorskip("mace")
    atoms = molecule("CH3CH2OH")
    turned = atoms.copy()
    turned.rotate(50, "x")
    turned.translate([1, 2, 3])
    shuffled = atoms[[8, 3, 1, 0, 2, 7, 4, 6, 5]]
    near, far = atoms.copy(), atoms.copy()
    near.rattle(0.002, seed=1)
    far.rattle(0.2, seed=1)
    frames = [atoms, turned, far, shuffled, near, molecule("CH4")]
    values = features(frames)
    assert list(unique(frames, values, 1e-6)) == [0, 2, 4, 5]
    assert list(unique(frames, values, 0.05)) == [0, 2, 5]
    copper = [bulk("Cu", cubic=True), bulk("Cu", cubic=True) * (2, 1, 1)]  # equal environments, other sizes
    assert list(unique(copper, np.zeros((2, 3)), 0.1)) == [0, 1]
    with pytest.raises(ValueError, match="tolerance: expected a number >= 0"):
        unique(frames, values, -1.0)
    ase.io.write(tmp_path / "all.xyz", frames)
    run = [Path(sys.executable).parent / "equitune", "select", "unique", tmp_path / "all.xyz", "-o", tmp_path / "o.xyz"]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert "dropped 2 of 6 frames as duplicates" in done.stdout
    assert [a.info["selected_from"] for a in ase.io.read(tmp_path / "o.xyz", ":")] == [0, 2, 4, 5]


def test_random_and_window():
    chosen = random_frames(100, 10, seed=3)
    assert len(set(chosen)) == 10
    np.testing.assert_array_equal(chosen, random_frames(100, 10, seed=3))
    with pytest.raises(ValueError, match="count: expected between 1 and 5, got 6"):
        random_frames(5, 6)
    split = within(np.array([50.0, 100.0, 299.0, 300.0, np.nan]), 100.0, 300.0)
    assert [list(x) for x in (split.inside, split.below, split.above)] == [[1, 2], [0], [3, 4]]
    assert split.rate == pytest.approx(0.8)  # all that is not below
    with pytest.raises(ValueError, match=r"window: expected lower < upper, got 2\.0 and 1\.0"):
        within(np.ones(3), 2.0, 1.0)


def test_committee_of_different_methods():
    pytest.importorskip("tblite")
    from mace_lora.augment import open_labeler

    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=1)
    a, b = (open_labeler(m).label(atoms).forces for m in ("gfn1-xtb", "gfn2-xtb"))
    expected = np.linalg.norm(a - b, axis=1).max() / 2  # two members: half of their difference
    assert committee_deviation([atoms], ["gfn1-xtb", "gfn2-xtb"])[0] == pytest.approx(expected)
    with pytest.raises(ValueError, match="a committee needs at least two different potentials"):
        committee_deviation([atoms], ["gfn1-xtb", "gfn1-xtb"])


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapters of the embedded base."""
    pytest.importorskip("mace")
    import torch

    from mace_lora import LoraConfig, apply_lora, embedded_base, save_adapter

    folders = []
    for seed in (1, 2):
        model = apply_lora(embedded_base(torch.float64), LoraConfig(rank=2))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if ".lora_B." in name:
                    p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        folder = tmp_path_factory.mktemp("adapters") / f"member{seed}"
        save_adapter(model, folder, dtype=torch.float64)
        folders.append(folder)
    return folders


def test_committee_of_adapters_shares_a_backbone(adapters):
    from mace_lora.augment.selection import _adapters, _separate

    frames = [molecule("CH3CH2OH"), molecule("CH3CHO")]
    members = [f"mace:embedded+{folder}" for folder in adapters]
    shared = _adapters(members)
    assert shared is not None
    separate = _separate(members)
    for atoms in frames:
        assert shared(atoms) == pytest.approx(separate(atoms), abs=1e-8)
    assert _adapters([members[0], "gfn2-xtb"]) is None
    assert committee_deviation(frames, members).shape == (2,)


def equitune(*arguments: object) -> subprocess.CompletedProcess:
    program = Path(sys.executable).parent / "equitune"
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)


def test_commands(tmp_path, adapters):
    frames = []
    for seed in range(12):
        atoms = molecule("CH3CH2OH")
        atoms.rattle(0.02 * seed, seed=seed)
        atoms.info["REF_energy"] = float(seed)
        atoms.arrays["REF_forces"] = np.full((9, 3), 0.1 * seed)
        frames.append(atoms)
    path, out = tmp_path / "a.xyz", tmp_path / "o.xyz"
    ase.io.write(path, frames)
    assert "written: 4 of 12 frames" in equitune("select", "fps", path, "-o", out, "-n", 4).stdout
    assert len({a.info["selected_from"] for a in ase.io.read(out, ":")}) == 4
    equitune("select", "random", path, "-o", out, "-n", 5, "--seed", 1)
    assert len(ase.io.read(out, ":")) == 5
    shown = equitune("select", "window", path, "-o", out, "--max-force", 1.0, "--max-energy", 0.5).stdout
    kept = [a.info["selected_from"] for a in ase.io.read(out, ":")]
    assert kept == [0, 1, 2, 3, 4]  # energies up to 0.5 eV/atom * 9 atoms; forces sqrt(3) * 0.1 * seed
    assert "dropped 7 of 12 frames" in shown
    members = [x for folder in adapters for x in ("--member", f"mace:embedded+{folder}")]
    committee = ("select", "committee", path, "-o", out, "--lower", 0.001, "--upper", 1e9, *members)
    shown = " ".join(equitune(*committee).stdout.split())
    assert "12 in the window" in shown
    assert "candidate rate 100.00 %" in shown
    equitune(*committee, "-n", 3)
    chosen = ase.io.read(out, ":")
    assert len(chosen) == 3
    assert all(a.info["max_force_deviation"] > 0 for a in chosen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["window", "--max-force", "1"], "frame 0: expected a label under 'REF_forces'"),
        (["random", "-n", "9"], "count: expected between 1 and 1, got 9"),
        (["committee", "--member", "emt"], "a committee needs at least two different potentials"),
        (["window"], "--max-force, --max-energy, --min-force, --min-energy: give at least one of them"),
    ],
)
def test_bad_options(options, message, tmp_path):
    ase.io.write(tmp_path / "a.xyz", Atoms("Cu"))
    done = equitune("select", options[0], tmp_path / "a.xyz", "-o", tmp_path / "o.xyz", *options[1:])
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
