"""mace_run_train --model=MultiScaleMACE: from scratch, around a foundation, with LoRA, restarted; bad input."""

import json
import re

import ase
import ase.io
import numpy as np
import pytest
import torch
from helpers import BIN, base_frames, flags, launch, train
from mace.calculators import MACECalculator

from mace_lora.multiscale.split import is_split

SCRATCH = {
    "foundation_model": None, "lora": None, "lora_rank": None, "multiheads_finetuning": None,
    "model": "MultiScaleMACE", "r_short": 2.5, "r_max": 5.0, "hidden_irreps": "8x0e+8x1o", "max_ell": 2,
    "correlation": 2,
    "num_channels_long": 4, "default_dtype": "float64", "max_num_epochs": 2,
}  # fmt: skip
AROUND = {"lora": None, "lora_rank": None, "model": "MultiScaleMACE", "r_max": 8.0, "num_channels_long": 4}


def load(work, name="run"):
    return torch.load(work / f"{name}.model", weights_only=False, map_location="cpu")


def forces(model, frames):
    calculator = MACECalculator(models=[model], device="cpu", default_dtype="float64")
    out = []
    for atoms in frames:
        atoms = atoms.copy()
        atoms.calc = calculator
        out.append((atoms.get_potential_energy(), atoms.get_forces()))
    return out


def test_from_scratch_with_swa_ema_and_restart(job, tmp_path):
    once = train(job, tmp_path / "once", **SCRATCH | {"max_num_epochs": 4, "ema": True, "seed": 3})
    assert "short path 2.5 Å" in once.stdout and "coupling sum" in once.stdout
    assert re.search(r"average number of neighbors within r_short: [\d.]+", once.stdout)
    model = load(tmp_path / "once")
    assert type(model).__name__ == "MultiScaleMACE"
    assert float(model.r_short) == 2.5 and float(model.r_max) == 5.0
    near, far = (float(m.interactions[0].avg_num_neighbors) for m in (model, model.long))
    assert near < far
    for symbol, e0 in zip("HCNO", model.atomic_energies_fn.atomic_energies.reshape(-1).tolist(), strict=False):
        [(energy, _)] = forces(model, [ase.Atoms(symbol)])
        assert energy == pytest.approx(e0, abs=1e-9)
    two = {"max_num_epochs": 2, "ema": True, "seed": 3}
    train(job, tmp_path / "two", **SCRATCH | two)
    again = train(job, tmp_path / "two", **SCRATCH | two | {"max_num_epochs": 4, "restart_latest": True})
    assert "Loading checkpoint" in again.stdout
    other = {"r_short": 2.0, "r_max": 4.0, "max_num_epochs": 6, "restart_latest": True}
    done = train(job, tmp_path / "two", check=False, **SCRATCH | two | other)
    expected = (
        "differ from the checkpoint's (--r_short: 2.5 before, 2.0 now; --r_max: 5.0 before, 4.0 now); give the same"
    )
    assert done.returncode != 0 and expected in " ".join(done.stdout.split()), done.stdout[-1500:]
    frames = ase.io.read(job / "test.xyz", ":")
    for (e1, f1), (e2, f2) in zip(forces(model, frames), forces(load(tmp_path / "two"), frames), strict=True):
        assert np.isfinite(f1).all()
        assert abs(e1 - e2) < 0.5 and np.abs(f1 - f2).max() < 0.5  # data order differs after a restart
    moved = [n for n, p in model.named_parameters() if n.startswith("long.") and p.grad is None]
    assert moved  # the long path is there; its weights are checked below
    fresh = train(job, tmp_path / "swa", **SCRATCH | {"swa": True, "start_swa": 1, "max_num_epochs": 3, "ema": True})
    assert "stage two" in fresh.stdout.lower() or "swa" in fresh.stdout.lower()
    assert (tmp_path / "swa" / "run_stagetwo.model").is_file()


def test_short_path_from_scratch_is_stock_mace(job, tmp_path):
    """The same flags and seed give the same first weights as --model=MACE of the short cutoff."""
    still = {"lr": 1e-30, "max_num_epochs": 1, "seed": 5}
    train(job, tmp_path / "ms", **SCRATCH | still)
    stock = {"model": None, "r_short": None, "r_max": 2.5, "num_channels_long": None}
    train(job, tmp_path / "stock", **SCRATCH | still | stock)
    mine, theirs = load(tmp_path / "ms"), load(tmp_path / "stock")
    a, b = mine.short_model().state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    for key, value in b.items():
        torch.testing.assert_close(a[key], value, msg=key)
    assert float(torch.as_tensor(mine.scale_shift.shift).abs().max()) == 0
    with torch.no_grad():
        for readout in mine.long.readouts:
            (readout.linear if hasattr(readout, "linear") else readout.linear_2).weight.zero_()
    frames = ase.io.read(job / "test.xyz", ":")
    for (e1, f1), (e2, f2) in zip(forces(mine, frames), forces(theirs, frames), strict=True):
        assert e1 == pytest.approx(e2, abs=1e-8)
        np.testing.assert_allclose(f1, f2, atol=1e-8)


def test_evaluated_by_upstreams_command(job, tmp_path):
    train(job, tmp_path, **SCRATCH)
    out = tmp_path / "out.xyz"
    launch([
        BIN / "mace_eval_configs", f"--configs={job / 'test.xyz'}", f"--model={tmp_path / 'run.model'}",
        f"--output={out}", "--device=cpu", "--default_dtype=float64",
    ])  # fmt: skip
    frames = ase.io.read(out, ":")
    expected = forces(load(tmp_path), frames)
    for atoms, (energy, force) in zip(frames, expected, strict=True):
        assert atoms.info["MACE_energy"] == pytest.approx(energy, abs=1e-6)
        np.testing.assert_allclose(atoms.arrays["MACE_forces"], force, atol=1e-6)
    launch([BIN / "mace_create_lammps_model", tmp_path / "run.model", "--format=libtorch"])
    exported = torch.jit.load(tmp_path / "run.model-lammps.pt")
    assert float(exported.r_max) == 5.0  # LAMMPS makes its neighbour list by it


@pytest.mark.parametrize(("coupling", "split"), [("sum", False), ("fused", False), ("sum", True)])
def test_around_a_foundation(job, tmp_path, coupling, split):
    """lr 0: the foundation's predictions; then the long path alone; then a fine-tuning of the result."""
    frozen = {} if coupling == "fused" else {"multiscale_freeze_short": True}
    options = AROUND | {"multiscale_coupling": coupling, "default_dtype": "float64"}
    options |= {"multiscale_split": True} if split else {}
    train(job, tmp_path / "still", **options | {"lr": 1e-30, "max_num_epochs": 1})
    train(job, tmp_path / "plain", lora=None, lora_rank=None, lr=1e-30, max_num_epochs=1, default_dtype="float64")
    frames = ase.io.read(job / "test.xyz", ":")
    still, plain = load(tmp_path / "still"), load(tmp_path / "plain")
    for (e1, f1), (e2, f2) in zip(forces(still, frames), forces(plain, frames), strict=True):
        assert e1 == pytest.approx(e2, abs=1e-6)
        np.testing.assert_allclose(f1, f2, atol=1e-6)
    train(job, tmp_path / "long", **options | frozen | {"max_num_epochs": 3, "lr": 0.01})
    tuned = load(tmp_path / "long")
    changed = {n for n, p in tuned.named_parameters() if not torch.equal(p, dict(still.named_parameters())[n])}
    assert any(n.startswith("long.") for n in changed)
    if frozen:
        assert all(n.startswith("long.") for n in changed)
    more = {"foundation_model": tmp_path / "long" / "run.model", "r_max": None, "num_channels_long": None}
    more |= {"multiscale_coupling": None, "multiscale_split": None}
    train(job, tmp_path / "more", **options | more | {"lr": 1e-30, "max_num_epochs": 1})
    again = load(tmp_path / "more")
    assert again.coupling == coupling and float(again.r_max) == 8.0 and is_split(again.long) == split
    for (_, f1), (_, f2) in zip(forces(tuned, frames), forces(again, frames), strict=True):
        np.testing.assert_allclose(f1, f2, atol=1e-6)
    if frozen:
        done = train(job, tmp_path / "long", check=False, **options | {"max_num_epochs": 4, "restart_latest": True})
        assert "--multiscale_freeze_short: True before, False now" in " ".join(done.stdout.split())
        changed = options | {"max_num_epochs": 4, "restart_latest": True, "multiscale_split": not split}
        done = train(job, tmp_path / "long", check=False, **changed)
        assert f"--multiscale_split: {split} before, {not split} now" in " ".join(done.stdout.split())
    wrong = {"r_max": ({"r_max": 7.0}, "--r_max: expected 8 Å, the foundation's long cutoff, got 7; leave it out")}
    if coupling == "fused":
        wrong["freeze"] = (
            {"multiscale_freeze_short": True},
            "--multiscale_freeze_short: the foundation's coupling is fused, and fused readouts belong to both paths",
        )
    for name, (changes, message) in wrong.items():
        done = train(job, tmp_path / name, check=False, **options | more | changes)
        assert done.returncode != 0 and message in " ".join(done.stdout.split()), done.stdout[-1500:]


def test_lora_around_a_foundation_and_on_a_multiscale_base(job, tmp_path):
    from mace_lora.lora.calculator import load_calculator

    work = tmp_path / "first"
    own = {"lora": True, "lora_rank": 2, "default_dtype": "float64", "lr": 0.01, "multiscale_split": True}
    done = train(job, work, **AROUND | own)
    assert "writing the adapter" in done.stdout
    model = load(work)
    assert type(model).__name__ == "MultiScaleMACE"
    assert not [n for n, _ in model.named_modules() if "base_layer" in n]
    frames = ase.io.read(job / "test.xyz", ":")
    adapter = work / "run-adapter"
    for base in (job / "base.model", "embedded"):  # the adapter brings the recipe of its long path
        calculator = load_calculator(base, adapter, default_dtype="float64")
        for atoms, (energy, force) in zip(frames, forces(model, frames), strict=True):
            atoms = atoms.copy()
            atoms.calc = calculator
            assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-5)
            np.testing.assert_allclose(atoms.get_forces(), force, atol=1e-5)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["equitune"]["metadata"]["multiscale"]["seed"] += 1
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the new long path beside its base could not be made again"):
        load_calculator(job / "base.model", adapter)
    options = {
        "foundation_model": work / "run.model", "model": "MultiScaleMACE", "lora_rank": 2, "default_dtype": "float64",
        "lr": 0.01, "restart_latest": True,
    }  # fmt: skip
    train(job, tmp_path / "second", **options | {"max_num_epochs": 1})
    done = train(job, tmp_path / "second", **options | {"max_num_epochs": 3})
    assert "Loading checkpoint" in done.stdout
    merged = load(tmp_path / "second")
    calculator = load_calculator(work / "run.model", tmp_path / "second" / "run-adapter", default_dtype="float64")
    for atoms, (energy, force) in zip(frames, forces(merged, frames), strict=True):
        atoms = atoms.copy()
        atoms.calc = calculator
        assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-5)
        np.testing.assert_allclose(atoms.get_forces(), force, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (SCRATCH | {"r_short": 5.0}, r"--r_max: expected the long cutoff, larger than r_short \(5 Å\), got 5 Å"),
        (SCRATCH | {"r_short": -1.0}, "--r_short: expected a length > 0 in Å, got -1"),
        (SCRATCH | {"r_max": "nan"}, "--r_max: expected the long cutoff, a finite length > 0 in Å, got nan"),
        (SCRATCH | {"r_max": "inf"}, "--r_max: expected the long cutoff, a finite length > 0 in Å, got inf"),
        (SCRATCH | {"r_short": "nan"}, "--r_short: expected a length > 0 in Å, got nan"),
        (SCRATCH | {"r_max": None}, "--r_max: --model=MultiScaleMACE needs the long cutoff in Å"),
        (AROUND | {"r_max": None}, "--r_max: --model=MultiScaleMACE needs the long cutoff in Å"),
        (SCRATCH | {"r_short": None}, "--r_short: --model=MultiScaleMACE needs the short cutoff"),
        (SCRATCH | {"num_channels_long": -3}, "--num_channels_long: expected a whole number of at least 1, got -3"),
        (SCRATCH | {"enable_cueq": "True"}, "--enable_cueq/--enable_oeq/--only_cueq: upstream converts MACE"),
        (SCRATCH | {"multiscale_freeze_short": True}, "it would freeze random weights; give --foundation_model"),
        (SCRATCH | {"model": "MACE"}, "--r_short: has no effect without --model=MultiScaleMACE"),
        (SCRATCH | {"freeze": 5}, "--freeze 5: use --multiscale_freeze_short"),
        (AROUND | {"r_max": 4.0}, r"--r_max: expected the long cutoff, larger than r_short \(4.5 Å\), got 4 Å"),
        (AROUND | {"r_short": 3.0}, "--r_short: expected 4.5 Å, the foundation's cutoff, got 3"),
        (
            AROUND | {"multiscale_freeze_short": True, "multiscale_coupling": "fused"},
            "fused readouts belong to both paths",
        ),
        (AROUND | {"multiscale_freeze_short": True, "lora": True}, "--lora adapts the short path; drop one"),
    ],
)
def test_bad_input(job, tmp_path, changes, message):
    done = train(job, tmp_path, check=False, **changes)
    assert done.returncode != 0
    assert re.search(message, " ".join(done.stdout.split())), done.stdout[-1500:]
    assert "Epoch 0" not in done.stdout


def test_replay_on_a_multiscale_base(job, tmp_path):
    """Every head starts as the base; with coupling fused heads cannot be added."""
    frames = ase.io.read(job / "test.xyz", ":")
    known = [f for f in base_frames("replay", 60) if set(f.numbers) <= {1, 6, 7, 8}]
    ase.io.write(tmp_path / "replay.xyz", known[:20], format="extxyz")
    replay = {"multiheads_finetuning": "True", "pt_train_file": tmp_path / "replay.xyz"}
    replay |= {"pt_valid_file": tmp_path / "replay.xyz", "max_num_epochs": 1, "lr": 1e-30, "default_dtype": "float64"}
    replay |= {"force_mh_ft_lr": "True"}  # upstream trains with its own learning rate otherwise
    for coupling in ("sum", "fused"):
        work = tmp_path / coupling
        around = AROUND | {"multiscale_coupling": coupling, "max_num_epochs": 1, "lr": 0.01}
        train(job, work / "base", **around | {"default_dtype": "float64"})
        base = work / "base" / "run.model"
        again = {"foundation_model": base, "model": "MultiScaleMACE", "lora": None, "lora_rank": None}
        done = train(job, work / "heads", check=False, **again | replay)
        if coupling == "fused":
            assert done.returncode != 0 and "--multiheads_finetuning: the foundation's coupling" in done.stdout
            continue
        assert done.returncode == 0, done.stdout[-1500:]
        before, model = load(work / "base"), load(work / "heads")
        assert sorted(model.heads) == ["Default", "pt_head"]
        for head in model.heads:
            for atoms in frames[:2]:
                values = []
                for each, name in ((before, "Default"), (model, head)):
                    atoms = atoms.copy()
                    atoms.calc = MACECalculator(models=[each], device="cpu", default_dtype="float64", head=name)
                    values.append(atoms.get_forces())
                np.testing.assert_allclose(values[1], values[0], atol=1e-6)


def test_multiscale_foundation_needs_the_flag(job, tmp_path):
    train(job, tmp_path / "base", **SCRATCH | {"max_num_epochs": 1, "E0s": "average"})
    base = tmp_path / "base" / "run.model"
    done = train(job, tmp_path / "a", check=False, foundation_model=base, lora=None, lora_rank=None)
    assert done.returncode != 0
    assert "it is a MultiScaleMACE; give --model=MultiScaleMACE" in " ".join(done.stdout.split())
    done = train(
        job, tmp_path / "b", check=False, foundation_model=base, lora=None, lora_rank=None, model="MultiScaleMACE",
        num_channels_long=4,
    )  # fmt: skip
    assert "brings its own; leave the flag out" in " ".join(done.stdout.split())
    assert flags(job, tmp_path)  # the helper's flags stay those of a stock run


def test_pme_on_periodic_frames(job, tmp_path):
    pytest.importorskip("torchpme")
    done = train(job, tmp_path / "a", check=False, **SCRATCH | {"long_range": "pme"})
    assert "expected frames that are periodic in all directions, got training frame 0" in " ".join(done.stdout.split())
    done = train(job, tmp_path / "b", check=False, **SCRATCH | {"pme_smearing": 1.0})
    assert "--pme_smearing: has no effect without --long_range=pme" in done.stdout
    files = {}
    for part in ("train", "valid"):
        frames = ase.io.read(job / f"{part}.xyz", ":")
        for atoms in frames:
            atoms.set_cell([11.0, 11.0, 11.0])
            atoms.pbc = True
        files[f"{part}_file"] = tmp_path / f"{part}.xyz"
        ase.io.write(files[f"{part}_file"], frames, format="extxyz", write_results=False)
    mixed = SCRATCH | files | {"long_range": "pme"}
    for part, changes in (
        ("validation (Default)", {"valid_file": job / "valid.xyz"}),
        ("test (glycolamide_Default)", {"test_file": job / "test.xyz"}),
    ):  # fmt: skip
        done = train(job, tmp_path / part.split()[0], check=False, **mixed | changes)
        assert f"in all directions, got {part} frame 0 without" in " ".join(done.stdout.split()), done.stdout[-1500:]
        assert "Epoch 0" not in done.stdout
    train(job, tmp_path / "c", **mixed)
    model = load(tmp_path / "c")
    assert type(model).__name__ == "MultiScaleMACEPME" and hasattr(model, "charges")
    again = {"foundation_model": tmp_path / "c" / "run.model", "r_short": None, "r_max": None, "hidden_irreps": None}
    again |= {"max_ell": None, "correlation": None, "num_channels_long": None, "lr": 1e-30, "max_num_epochs": 1}
    train(job, tmp_path / "d", **SCRATCH | files | again)
    frames = ase.io.read(files["valid_file"], ":")
    for (_, f1), (_, f2) in zip(forces(model, frames), forces(load(tmp_path / "d"), frames), strict=True):
        np.testing.assert_allclose(f1, f2, atol=1e-6)
    adapted = again | {"lora": True, "lora_rank": 2, "lr": 0.01}
    train(job, tmp_path / "e", **SCRATCH | files | adapted)
    from mace_lora.lora.adapter import read_adapter

    charges = [dict(load(tmp_path / n).charges.named_parameters()) for n in "ce"]
    for name, before in charges[0].items():  # trained beside the adapters, not frozen
        assert (charges[1][name] - before).abs().max() > 1e-4
    assert "charges" in [plan.name for plan in read_adapter(tmp_path / "e" / "run-adapter").plan]


def test_named_foundation_with_another_cutoff():
    """Its cutoff is known once upstream has loaded it, before data are read."""
    from argparse import Namespace

    from mace_lora.mace_plugin.protocol import Run, SettingsError
    from mace_lora.multiscale.mace import MultiscalePlugin

    for flags_, message in (
        ({"r_short": 3.0}, "--r_short: expected 6 Å, the foundation's cutoff, got 3; leave it out"),
        ({"r_short": None}, r"--r_max: expected the long cutoff, larger than r_short \(6 Å\), got 5 Å"),
    ):
        args = Namespace(foundation_model="medium", r_max=6.0, **flags_)
        with pytest.raises(SettingsError, match=message):
            MultiscalePlugin().before_data(Run(args, [], state={"r_long": 5.0}))
