"""equitune distill: stages, filters, safeguards, report; killed in every stage."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
import yaml

from mace_lora.distill.config import read_config
from mace_lora.distill.pipeline import Fit, Outcome
from mace_lora.distill.report import _doubts, comparison, verdict
from mace_lora.distill.stages import Stages
from mace_lora.distill.synthesis import select_frames

PROGRAM = Path(sys.executable).parent / "equitune"
EMBEDDED = Path(__file__).parents[2] / "mace_lora" / "embedded" / "glycolamide_pbe0.extxyz.gz"
CONFIG = {
    "folder": "out", "train": "train.xyz", "valid": "valid.xyz", "test": "test.xyz",
    "teacher": {
        "members": 2,
        "flags": {"foundation_model": "base.model", "E0s": "estimated", "lora": True, "lr": 0.01, "max_num_epochs": 2},
    },
    "synthetic": {
        "temperatures": [300], "frames": 8, "spacing_fs": 5, "equilibration_fs": 10, "starts": 2, "rattle": 1,
        "stretch": 1,
    },
    "filter": {"deviation": 5000, "force": 100, "duplicates": 0.0},
    "student": {
        "flags": {"hidden_irreps": "8x0e", "max_ell": 1, "correlation": 2, "r_max": 4.0, "E0s": "average"},
        "pretrain": {"epochs": 3, "lrs": [0.01]},
        "finetune": {"epochs": 2, "lrs": [0.005, 0.01]},
        "direct": {"epochs": 2, "lrs": [0.01]},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder with a base, quantum frames and a config."""
    folder = tmp_path_factory.mktemp("distill")
    frames = ase.io.read(EMBEDDED, ":", format="extxyz")
    for name, part in (("train", frames[:10]), ("valid", frames[10:15]), ("test", frames[15:27])):
        ase.io.write(folder / f"{name}.xyz", part, format="extxyz")
    subprocess.run([PROGRAM, "export-base", "base.model"], cwd=folder, check=True, capture_output=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    moved = frames[3].copy()
    moved.positions += 1.0
    ase.io.write(folder / "moved.xyz", [moved, *frames[16:27]], format="extxyz")
    gold = ase.Atoms("Au2", [[0, 0, 0], [0, 0, 2.5]], info={"REF_energy": -1.0})
    gold.arrays["REF_forces"] = np.array([[0, 0, 0.5], [0, 0, -0.5]])
    ase.io.write(folder / "gold.xyz", [gold], format="extxyz")
    ase.io.write(folder / "unlabelled.xyz", [ase.Atoms("H2", [[0, 0, 0], [0, 0, 0.8]])] * 3)
    return folder


def distill(folder, *more, check=True, config="config.yaml"):
    done = subprocess.run(
        [PROGRAM, "distill", config, *more], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stdout[-3000:]
    return " ".join(done.stdout.split())


def test_every_stage_killed_then_whole_then_changed(place):
    """Kill -9 in stages (EQUITUNE_FULL: each); finished ones are not redone; a changed key redoes what follows."""
    out = place / "out"
    until = ["sampled-*", "pretrain-*", "direct-*"]
    if os.environ.get("EQUITUNE_FULL") == "1":
        until = ["teacher-1-*", "sampled-*", "labelled-*", "pretrain-*", "finetune-lr0.01-*", "direct-*"]
    for pattern in until:
        process = subprocess.Popen(
            [PROGRAM, "distill", "config.yaml"], cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        end = time.time() + 240
        while process.poll() is None and not list(out.glob(pattern)) and time.time() < end:
            time.sleep(0.05)
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert list(out.glob(pattern)) and not (out / "report.md").exists()
    stamps = {p: p.stat().st_mtime_ns for p in out.glob("*/stage.json")}
    assert len(stamps) >= 6
    shown = distill(place)
    assert "teacher-0: is there" in shown and "direct-lr0.01: going on" in shown
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}
    report = (out / "report.md").read_text()
    assert report.startswith("**") and "student, two stages" in report and "fidelity to the teacher" in report
    assert all((out / f).stat().st_size for f in ("report.json", "report_curves.png", "report_parity.png"))
    content = json.loads((out / "report.json").read_text())
    assert content["verdict"] in report and content["evaluations"]["finetune"]["frames"] == 12
    assert content["synthetic"]["kept"] <= content["synthetic"]["labelled"] == 36
    again = distill(place)
    assert "starting" not in again and "going on" not in again
    changed = yaml.safe_load((place / "config.yaml").read_text())
    changed["student"]["finetune"]["epochs"] = 3
    (place / "changed.yaml").write_text(yaml.safe_dump(changed))
    third = distill(place, config="changed.yaml")
    assert set(re.findall(r"([\w.-]+): starting", third)) == {
        "finetune-lr0.005", "finetune-lr0.01", "evaluated-finetune", "speed",
    }  # fmt: skip


def test_filters_and_leakage(place, tmp_path):
    """Frames with large forces, high energies, repetitions, test and validation frames (moved, turned) are left out."""
    config = read_config(place / "config.yaml")
    config.filter = config.filter.model_copy(update={"deviation": None, "force": 20.0, "energy": 1.0})
    quantum, valid, test = (ase.io.read(p, ":") for p in (config.train, config.valid, config.test))
    frames = []
    for n, source in enumerate([*quantum, *quantum[:3], test[0], valid[0], quantum[4], quantum[5]]):
        frame = ase.Atoms(source.numbers, positions=source.positions)
        frame.rattle(0.01, seed=n) if n < 10 else None
        frame.info |= {"REF_energy": source.info["REF_energy"], "input_index": n}
        frame.arrays["REF_forces"] = source.arrays["REF_forces"]
        frames.append(frame)
    frames[12].rotate(40, "x")  # the first 3 again: not among the rattled ones
    frames[13].positions += 3.0  # a test frame and one of validation
    frames[14].rotate(70, "z")
    frames[15].arrays["REF_forces"] = np.zeros((len(frames[15]), 3))
    frames[15].arrays["REF_forces"][:2, 0] = 30.0, -30.0
    frames[16].info["REF_energy"] += 1.5 * len(frames[16])
    frames += [frames[2].copy()]
    frames[-1].info["input_index"] = 17
    frames += [frames[3].copy()]
    frames[-1].info["input_index"] = 18
    frames[-1].arrays["REF_forces"] = frames[-1].arrays["REF_forces"] + 0.02  # eV/Å on every atom
    ase.io.write(tmp_path / "labelled.xyz", frames, format="extxyz")
    select_frames(config, tmp_path / "labelled.xyz", [f"mace:{place / 'base.model'}"], tmp_path)
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["dropped"] == {
        "net force": 1, "large force": 1, "high energy": 1, "equal to a test frame": 1,
        "equal to a validation frame": 1, "repetition": 1,
    }  # fmt: skip
    assert counts["kept"] == 13
    kept = [*ase.io.read(tmp_path / "synthetic.xyz", ":"), *ase.io.read(tmp_path / "synthetic_valid.xyz", ":")]
    assert sorted(a.info["input_index"] for a in kept) == list(range(13))
    config.filter = config.filter.model_copy(update={"force": 1e-3})
    with pytest.raises(ValueError, match=r"filter: expected at least 10 synthetic frames to be left, got 0 of 19"):
        select_frames(config, tmp_path / "labelled.xyz", [f"mace:{place / 'base.model'}"], tmp_path)


def test_labels_that_are_more_noise_than_force(place, tmp_path):
    """Two potentials disagree by the same about strong and weak forces; the weak ones go."""
    config = read_config(place / "config.yaml")
    frames: list[ase.Atoms] = ase.io.read(config.train, ":")[:10] * 2
    frames = [a.copy() for a in frames]
    for n, atoms in enumerate(frames):
        atoms.rattle(0.01, seed=n)
        atoms.info["input_index"] = n
        atoms.arrays["REF_forces"] = (1.0 if n < 10 else 1e-3) * atoms.arrays["REF_forces"]
    ase.io.write(tmp_path / "labelled.xyz", frames, format="extxyz")
    committee = [f"mace:{place / 'base.model'}", "gfn2-xtb"]
    config.filter = config.filter.model_copy(update={"deviation": None, "noise": 20.0, "duplicates": None})
    select_frames(config, tmp_path / "labelled.xyz", committee, tmp_path)
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["dropped"]["more noise than force"] == 10 and counts["kept"] == 10
    settings = config.model_dump()
    settings["teacher"]["members"] = 1
    with pytest.raises(ValueError, match="filter: noise: needs a committee, which is teacher flags with 2 members"):
        type(config).model_validate(settings)


def outcome(two: float, one: float, curve_two, curve_one) -> Outcome:
    def fit(curve):
        return Fit(Path("x"), 0.01, 10, 100, curve, {0.01: 1.0})

    def row(error):
        return {"errors": {"mae_f": error, "mae_e": error}, "mae_e_refit": error}

    fits = {"pretrain": fit([(9, 1.0, 1.0)]), "finetune": fit(curve_two), "direct": fit(curve_one)}
    return Outcome([], Path(), fits, {"finetune": row(two), "direct": row(one)}, {}, {})


def test_comparison_and_first_line():
    good = outcome(50.0, 100.0, [(0, 1, 90), (1, 1, 40)], [(4, 1, 120), (9, 1, 100)])
    c = comparison(good)
    assert (c["improvement_e"], c["improvement_f"]) == (0.5, 0.5)
    assert (c["direct_steps"], c["finetune_steps"], c["all_steps"]) == (100, 10, 110)
    assert verdict(good).startswith("Two stages beat direct training: energy error 50 % lower (offsets removed), force")
    good.evaluations["finetune"]["errors"]["mae_e"] = 110.0
    assert verdict(good).endswith("AS THEY ARE, ENERGIES ARE WORSE (10 %): a constant offset is left.")
    bad = outcome(120.0, 100.0, [(0, 1, 130)], [(9, 1, 100)])
    assert comparison(bad)["finetune_steps"] == np.inf
    assert verdict(bad).startswith("WORSE THAN DIRECT TRAINING in the error of energy (20 % higher) and force (20 %")


def test_doubts_about_the_comparison():
    good = outcome(50.0, 100.0, [(0, 1, 90)], [(4, 1, 120)]).fits
    assert _doubts(good) == []
    sweeps = {"direct": {0.005: 2.0, 0.01: 1.0}, "finetune": {0.01: 1.0, 0.02: 3.0}, "pretrain": {0.01: 1.0}}
    edges = {name: replace(fit, sweep=sweeps[name]) for name, fit in good.items()}
    at_the_edge = "is at the edge of those tried: add"
    assert [d for d in _doubts(edges) if at_the_edge in d] == _doubts(edges)
    assert f"of direct {at_the_edge} 0.02 to student.direct.lrs." in _doubts(edges)[1]
    assert f"of finetune {at_the_edge} 0.005 to student.finetune.lrs." in _doubts(edges)[0]
    shorter = good | {"direct": replace(good["direct"], steps=50)}
    assert _doubts(shorter)[0].startswith(
        "Direct training had fewer steps (50) than fine-tuning (100): raise student.d"
    )


def test_stage_is_kept_by_content(tmp_path):
    file, made = tmp_path / "in.txt", []
    file.write_text("a")
    stages = Stages(tmp_path / "out", say=lambda _: None)

    def run(**settings):
        return stages.run("one", settings, [file], lambda place: made.append(place))

    first = run(x=1)
    file.touch()
    assert run(x=1) == first and len(made) == 1
    assert run(x=2) != first and len(made) == 2
    file.write_text("b")
    assert run(x=1) != first and len(made) == 3
    (first / "stage.json").unlink()  # killed before its end
    file.write_text("a")
    assert run(x=1) == first and len(made) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teachers": {}}, "teachers: unknown key, expected one of folder, train, valid"),
        ({"teacher": {"flags": {}}}, "teacher: expected either flags of a fine-tuning, a potential, or labelled"),
        ({"teacher": {"labelled": "gone.xyz"}, "synthetic": ...}, "labelled: no file .*gone.xyz"),
        ({"teacher": {"labelled": "train.xyz"}}, "synthetic: nothing is made where teacher.labelled gives the frames"),
        ({"teacher": {"potential": "emt"}, "filter.deviation": 9}, "filter: deviation: needs a committee"),
        (
            {"teacher": {"labelled": "train.xyz"}, "synthetic": ..., "student.nequip": "x.yaml", "dtype": "float64"},
            "dtype: of MACE trainings, of which there is none here; set model_dtype in student.flags",
        ),
        ({"student.flags": {}}, "student: expected flags of a MACE model, or nequip with a config"),
        ({"student.nequip": "train.xyz"}, "student.nequip: NequIP is not installed in this environment"),
        ({"teacher": {"flags": {"lora": True}}}, "teacher.flags: expected foundation_model"),
        ({"teacher.flags.seed": 3}, "flags: seed is set by the command"),
        ({"teacher.flags.lorra": True}, "teacher.flags: unrecognized arguments: --lorra"),
        ({"teacher.flags.foundation_model": "./gone.model"}, "foundation_model: no file ./gone.model"),
        ({"teacher": {"potential": "nonsense"}}, "labeler: unknown name 'nonsense'"),
        ({"student.flags.hiden": "8x0e"}, "student.flags: unrecognized arguments: --hiden=8x0e"),
        ({"student.flags.lora": True}, "flags: lora: the student is a new model"),
        ({"student.finetune.flags": {"lora_rnk": 3}}, "student.finetune.flags: unrecognized arguments: --lora_rnk=3"),
        ({"student.finetune.lrs": [0.1, 0.1]}, "lrs: expected different numbers > 0"),
        ({"student.pretrain.epochs": 0}, "student.pretrain.epochs: Input should be greater than or equal to 1, got 0"),
        ({"synthetic.temperatures": [], "synthetic.rattle": 0, "synthetic.stretch": 0}, "synthetic: nothing to make"),
        ({"student.flags.swa": True}, "flags: swa: the model of the second stage would not be used"),
        ({"teacher.flags.foundation_model": "gone.model"}, "foundation_model: no file gone.model"),
        ({"teacher": {"potential": "emt"}}, "filter.duplicates: needs the features of a MACE teacher"),
        (
            {"teacher": {"labelled": "unlabelled.xyz"}, "synthetic": ...},
            "frame 0: expected finite labels REF_energy and REF_forces in all",
        ),
        ({"synthetic.strain": 2}, "synthetic.strain: expected periodic training frames"),
        ({"test": "valid.xyz"}, "frame 0 of test is also frame 0 of valid: labels leak between them"),
        ({"test": "gone.xyz"}, "no file .*gone.xyz"),
        ({"test": "moved.xyz"}, "frame 0 of test is also frame 3 of train: labels leak"),
        ({"test": "gold.xyz"}, "test: Au is in none of the training frames"),
        ({"student.flags.batch_size": 64}, "batch_size: expected at most the 10 training frames, got 64"),
        ({"teacher.flags.batch_size": 11}, "teacher.flags: batch_size: expected at most the 10 training frames, got"),
        ({"student.flags.E0s": "averge"}, "student.flags: E0s: expected average, estimated, foundation, a .json"),
        ({"student.flags.hidden_irreps": "8x0q"}, "hidden_irreps: expected irreps such as 32x0e.32x1o, got '8x0q'"),
        ({"student.flags.model_dir": "models"}, "student.flags: model_dir is not possible here; leave it out"),
        ({"student.flags.stage_two": True}, "swa: the model of the second stage would not be used"),
        ({"student.finetune.flags": {"lora_rank": 4}}, "student.finetune.flags: --lora_rank: has no effect"),
        ({"student.direct.flags": {"hidden_irreps": "4x0e"}}, "direct.flags: hidden_irreps belongs to student.flags"),
        ({"student.pretrain.flags": {"foundation_model": "small"}}, "foundation_model belongs to student.flags"),
        ({"teacher.flags.freeze": 3}, "teacher.flags: --freeze 3: --lora already freezes the base"),
        ({"device": "cudda"}, "device: Input should be 'cpu', 'cuda'"),
    ],
)
def test_bad_configs_fail_before_any_compute(place, tmp_path, change, message):
    content = yaml.safe_load(yaml.safe_dump(CONFIG | {"folder": str(tmp_path / "out")}))
    if "teacher" in change:  # no committee
        del content["filter"]["deviation"]
    for key, value in change.items():
        *path, last = key.split(".")
        target = content
        for part in path:
            target = target[part]
        if value is ...:
            del target[last]
        else:
            target[last] = value
    (place / "bad.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises((ValueError, OSError), match=message):
        read_config(place / "bad.yaml")
    assert not (tmp_path / "out").exists()


def test_check_only(place):
    assert "config.yaml: sound; nothing was run" in distill(place, "--check")


def test_names_of_teachers_keep_what_decides_their_labels(place, tmp_path):
    """The hash of a potential has its method and the content of its files, not their folder."""
    pytest.importorskip("pyscf")
    from mace_lora.distill.pipeline import _name

    assert _name("pyscf:pbe/def2-svp") != _name("pyscf:pbe0/def2-svp")
    copy = tmp_path / "copy.model"
    copy.write_bytes((place / "base.model").read_bytes())
    assert _name(f"mace:{copy}") == _name(f"mace:{place / 'base.model'}")


def test_same_place_in_another_cell_is_another_frame():
    from mace_lora.distill.checks import Places

    one, two = (ase.Atoms("Cu2", [[0, 0, 0], [0, 0, 2]], cell=[a] * 3, pbc=True) for a in (4.0, 4.1))
    near = one.copy()
    near.positions[0] = [-1e-9, 1e-9, 0]
    seen = Places()
    seen.add(one, "one")
    assert seen.find(two) is None and seen.find(near) == "one"


@pytest.mark.parametrize("periodic", [False, True])
def test_equal_frames_are_found_however_they_lie(periodic):
    from ase.build import bulk

    from mace_lora.distill.checks import Places

    atoms = bulk("NaCl", "rocksalt", a=5.6, cubic=True) if periodic else ase.io.read(EMBEDDED, 0, format="extxyz")
    atoms.rattle(0.1, seed=1)
    seen, other, moved = Places(), atoms.copy(), atoms[::-1]
    seen.add(atoms, "first")
    other.rattle(0.003, seed=2)
    moved.positions += [1.0, 2.0, 3.0]
    moved.rotate(30, "z", rotate_cell=periodic)
    moved.wrap() if periodic else None
    assert seen.find(moved) == "first" and seen.find(other) is None


def test_orderings_of_a_lattice_are_different_frames():
    from ase.build import bulk

    from mace_lora.distill.checks import Places

    cell = bulk("Cu", cubic=True) * (3, 3, 3)
    seen = Places()
    for pair in ((0, 1), (0, 60)):
        alloy = cell.copy()
        alloy.symbols[list(pair)] = "Au"
        assert seen.find(alloy) is None
        seen.add(alloy, str(pair))
        assert seen.find(alloy) == str(pair)
    moved = alloy.copy()
    moved.positions[50] += [0.01, 0, 0]  # one of many equal atoms
    assert seen.find(moved) is None


def test_sound_configs(place):
    """What must not be refused: LoRA in the fine-tuning, references given with the trainings."""
    content = yaml.safe_load(yaml.safe_dump(CONFIG))
    content["student"]["finetune"]["flags"] = {"lora": True, "lora_rank": 4}
    del content["student"]["flags"]["E0s"]
    for name in ("pretrain", "direct"):
        content["student"][name]["flags"] = {"E0s": "average"}
    (place / "sound.yaml").write_text(yaml.safe_dump(content))
    read_config(place / "sound.yaml")
    content["student"]["flags"]["weight_decay"] = 0.1
    (place / "unsound.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"student\.finetune\.flags: --weight_decay: has no effect with --lora"):
        read_config(place / "unsound.yaml")


def test_verdict_without_energy_labels():
    nan = float("nan")
    found = outcome(50.0, 100.0, [(0, nan, 90)], [(4, nan, 120)])
    for row in found.evaluations.values():
        row["mae_e_refit"] = nan
    assert verdict(found) == "Two stages beat direct training: force error 50 % lower."
