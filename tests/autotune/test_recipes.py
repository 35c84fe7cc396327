"""Recipes and benchmark of the transfer: their folders, labels and tables; no training."""

import importlib.util
import json
import shutil
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
import typer
from autotune_frames import labelled

ROOT = Path(__file__).parents[2]


def script(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_laptop_scale_has_enough_classical_frames():
    sizes = script("recipes/t_painn_qm9.py").SCALES["laptop"]
    seen = 0.9 * sizes["molecules"]
    made = seen * (3 * -(-sizes["md"] // 3) + sizes["rattle"]) - (sizes["quantum"] - sizes["test"])
    assert 0.9 * made >= 20_000  # some molecules and rattled frames are refused


def test_a_folder_keeps_its_scale(tmp_path):
    water, data = script("recipes/t_painn_water.py"), tmp_path / "dft.xyz"
    data.write_text("frames")
    assert water.claim(tmp_path / "w", "smoke", "openmm:spce.xml", data)["frames"] == 6
    for scale, message in (("laptop", "scale: 'smoke' before, 'laptop' now"), ("big", "expected one of smoke, laptop")):
        with pytest.raises(typer.BadParameter, match=message):
            water.claim(tmp_path / "w", scale, "openmm:spce.xml", data)
    data.write_text("other frames")
    with pytest.raises(typer.BadParameter, match="--data"):
        water.claim(tmp_path / "w", "smoke", "openmm:spce.xml", data)


@pytest.mark.parametrize("keys", [("energy", "forces"), ("REF_energy", "REF_forces")])
def test_quantum_files_keep_their_labels(tmp_path, keys, monkeypatch, capsys):
    atoms = labelled("OH2", -3.0)
    wanted = atoms.arrays["REF_forces"].copy()
    atoms.info[keys[0]], atoms.arrays[keys[1]] = atoms.info.pop("REF_energy"), atoms.arrays.pop("REF_forces")
    atoms.set_cell([9.0] * 3)
    ase.io.write(tmp_path / "dft.xyz", atoms, format="extxyz")
    (found,) = script("recipes/t_painn_water.py").quantum_frames(tmp_path / "dft.xyz")
    assert found.pbc.all() and found.info["REF_energy"] == -3.0
    np.testing.assert_allclose(found.arrays["REF_forces"], wanted, atol=1e-6)
    qm9, folder = script("recipes/t_painn_qm9.py"), tmp_path / "out"
    made = {"start.xyz": 3, "md.xyz": 90}  # in place of hours of dynamics
    folder.mkdir()
    for name, count in made.items():
        frames = [labelled("OH2", 0.0, 1000 * count + k) for k in range(count)]
        for number, frame in enumerate(frames):
            frame.info["start"] = number // 30
        ase.io.write(folder / name, frames, format="extxyz")

    def label(frames, out, *more, **options):
        found = ase.io.read(frames, ":")
        for k, one in enumerate(found):
            one.info |= {"REF_energy": float(k), "input_index": k}
            one.arrays["REF_forces"] = np.zeros((len(one), 3))
        ase.io.write(out, found, format="extxyz")

    monkeypatch.setattr(qm9, "label", label)
    monkeypatch.setattr(qm9, "rattle", lambda atoms, *more: atoms)
    qm9.prepare(tmp_path / "dft.xyz", quantum=str(tmp_path / "dft.xyz"), scale="smoke", workers=1, folder=folder)
    (kept,) = ase.io.read(folder / "quantum.xyz", ":")
    assert kept.info["REF_energy"] == -3.0
    np.testing.assert_allclose(kept.arrays["REF_forces"], wanted, atol=1e-6)
    assert json.loads((folder / "settings.json").read_text())["scale"] == "smoke"
    energies = [a.info["REF_energy"] for a in ase.io.read(folder / "pretrain.xyz", ":")]
    assert np.isclose(np.mean(energies), 0.0) and np.ptp(energies) > 10  # one composition, its mean taken off
    (twin,) = ase.io.read(folder / "pretrain_same.xyz", ":")
    assert twin.info["input_index"] == 0 and np.isclose(twin.info["REF_energy"], min(energies))
    ase.io.write(tmp_path / "dft.xyz", [kept, kept], format="extxyz")
    with pytest.raises(typer.BadParameter, match=r"other settings \(--molecules; --quantum\)"):
        qm9.prepare(tmp_path / "dft.xyz", quantum=str(tmp_path / "dft.xyz"), scale="smoke", workers=1, folder=folder)
    sampled = tmp_path / "sampled"
    sampled.mkdir()
    for name in made:
        shutil.copy(folder / name, sampled)
    qm9.prepare(tmp_path / "dft.xyz", scale="smoke", workers=1, folder=sampled)
    frames = ase.io.read(sampled / "quantum.xyz", ":")
    tests = [a for a in frames if a.info.get("unseen", False)]
    assert len(tests) == 22 and len(frames) == 72  # some labels may fail
    places = {bytes(a.positions.round(4).tobytes()) for a in ase.io.read(sampled / "pretrain.xyz", ":")}
    assert not places & {bytes(a.positions.round(4).tobytes()) for a in frames}
    sizes = qm9.SCALES["smoke"]
    place = qm9.config(sampled, "mace", 0, 25, sizes, same=False, long=False).parent
    assert all(a.info["unseen"] for a in ase.io.read(place / "test.xyz", ":"))
    for part in ("train_25", "valid_25"):
        assert not any(a.info.get("unseen", False) for a in ase.io.read(place / f"{part}.xyz", ":"))
    kept = [a for a in frames if not a.info.get("unseen", False)]
    ase.io.write(sampled / "quantum.xyz", kept + tests[:12], format="extxyz")
    capsys.readouterr()
    qm9.config(sampled, "mace", 0, 25, sizes, same=False, long=False)
    assert "test: 12 frames instead of 20, of molecules that no stage has seen" in capsys.readouterr().out
    assert len(ase.io.read(place / "test.xyz", ":")) == 12  # none of a molecule that was learnt
    with pytest.raises(typer.BadParameter, match="run the command prepare first"):
        qm9.run("mace", folder=tmp_path / "none")
    with pytest.raises(typer.BadParameter, match="no file "):
        qm9.prepare(tmp_path / "gone.xyz", scale="smoke", workers=1, folder=tmp_path / "none")


def test_diffusion_of_a_random_walk():
    water, rng = script("recipes/t_painn_water.py"), np.random.default_rng(0)
    wanted = 2.3  # 1e-9 m²/s, that is 0.23 Å²/ps
    steps = rng.normal(scale=np.sqrt(2 * 0.1 * wanted * 1e-3 * water.EVERY * water.TIMESTEP), size=(2000, 216, 3))
    steps[:, :, 0] += 0.02  # a drift of all
    frames = [ase.Atoms("O216", positions=p) for p in np.cumsum(steps, axis=0)]
    found, error = water.diffusion(frames)
    assert abs(found - wanted) < 4 * error and error < 0.1


def row(method: str, lr: float, seed: int, raw: float, **more) -> dict:
    errors = {"mae_e": raw, "mae_e_refit": 10.0, "mae_f": 20.0}
    return {
        "molecule": "ethanol", "method": method, "count": 50, "lr": lr, "seed": seed, "curve": [[0, 9.0], [1, 5.0]],
        "valid": errors, "test": errors, **more,
    }  # fmt: skip


def test_benchmark_table(tmp_path, monkeypatch):
    pytest.importorskip("mace")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench = script("benchmarks/autotune_mace.py")
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "runs")
    (tmp_path / "runs").mkdir()
    rows = [row("scratch", lr, 0, 80.0) for lr in (0.005, 0.01, 0.02)]
    rows += [row("scratch", 0.005, seed, 80.0) for seed in (1, 2)]
    rows += [row("autotune", 0.01, 0, 40.0), row("autotune", 0.01, 0, 16.0, energies="refit")]
    for number, content in enumerate(rows):
        (tmp_path / "runs" / f"{number}.json").write_text(json.dumps(content))
    bench.table()
    text = (tmp_path / "autotune_mace.md").read_text()
    assert "| 50 | scratch | as trained | 0.005 | 3 | 80.0 (80.0–80.0) |" in text
    assert "| 50 | autotune | as trained | 0.01 | 1* | 40.0 | 10.0 | 20.0 | 2.00 | 1.00 | 1.00 |" in text
    assert "| 50 | autotune | refit | 0.01 | 1* | 16.0 | 10.0 | 20.0 | 5.00 | 1.00 | 1.00 |" in text
    assert (tmp_path / "autotune_mace.png").read_bytes().startswith(b"\x89PNG")
