"""equitune label: what users give it by mistake, and faults among many frames."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ase.io
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from mace_lora.augment import frame_key, label, open_labeler

HERE = Path(__file__).parent
PROGRAM = Path(sys.executable).parent / "equitune"


@pytest.fixture(autouse=True)
def own_labelers(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", str(HERE))  # for workers


def copper(count: int) -> list[Atoms]:
    frames = []
    for seed in range(count):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(0.05, seed=seed)
        frames.append(atoms)
    return frames


def equitune(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run([PROGRAM, *map(str, arguments)], capture_output=True, text=True, **options)


def test_other_files_stay_as_they_are(tmp_path):
    notes = tmp_path / "notes.xyz"
    for text in ("a line without an end", "two\nlines\n", "3\nnot ours\nH 0 0 0\nH 0 0 1\nH 0 1 0\n"):
        notes.write_text(text)
        with pytest.raises(ValueError, match=r"notes.xyz holds frames that equitune label did not write, not of emt"):
            label(copper(1), notes, "emt")
        assert notes.read_text() == text
    failed = tmp_path / "out.failed.xyz"
    for text in ("my notes\n", "1\nnot ours\nH 0 0 0\n"):
        failed.write_text(text)
        with pytest.raises(
            ValueError, match=r"out.failed.xyz: equitune did not write what is in it; move it, or choose"
        ):
            label(copper(1), tmp_path / "out.xyz", "emt")
        assert failed.read_text() == text


def test_output_is_not_the_input(tmp_path):
    file = tmp_path / "frames.xyz"
    ase.io.write(file, copper(2))
    before = file.read_text()
    with pytest.raises(ValueError, match=r"output: .*frames.xyz is the input as well; choose another output"):
        label(file, tmp_path / "." / "frames.xyz", "emt")
    assert file.read_text() == before


def test_another_prefix_is_another_file(tmp_path):
    label(copper(2), tmp_path / "out.xyz", "emt")
    with pytest.raises(
        ValueError, match=r"prefix: .* holds labels under another prefix than 'DFT'; choose another output"
    ):
        label(copper(3), tmp_path / "out.xyz", "emt", prefix="DFT")


def test_prefixes_are_whole_words(tmp_path):
    label(copper(2), tmp_path / "out.xyz", "emt", prefix="MY_REF")
    with pytest.raises(ValueError, match=r"holds labels under another prefix than 'REF'"):
        label(copper(2), tmp_path / "out.xyz", "emt")
    again = ase.io.read(tmp_path / "out.xyz", ":")
    label(again, tmp_path / "both.xyz", "emt", prefix="DFT")  # its frames have MY_REF labels as well
    with pytest.raises(ValueError, match=r"holds labels under another prefix than 'MY_REF'"):
        label(again, tmp_path / "both.xyz", "emt", prefix="MY_REF")


def test_a_frame_of_ones_own_in_the_output(tmp_path):
    out = tmp_path / "out.xyz"
    label(copper(2), out, "emt")
    ase.io.write(out, copper(1), append=True)
    before = out.read_text()
    with pytest.raises(ValueError, match="equitune did not write all that is in it; move it, or choose another output"):
        label(copper(3), out, "emt")
    assert out.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["out.xyz"]


def test_many_bad_frames_after_good_ones(tmp_path):
    """Labels of an earlier run show that the set-up works."""
    good, bad = copper(35), copper(60)[30:]
    label(good[:5], tmp_path / "out.xyz", "own_labelers:faulty")
    for atoms in bad:
        atoms.info["fault"] = "throws"
    report = label([*bad, *good[5:10]], tmp_path / "out.xyz", "own_labelers:faulty")
    assert (report.failed, report.labelled) == (30, 5)


def test_charges_that_are_none_fail_alone(tmp_path):
    pytest.importorskip("tblite")
    frames = [molecule("H2O") for _ in range(4)]
    for charge, atoms in zip(("neutral", float("nan"), 0.5, 0), frames, strict=True):
        atoms.info["charge"] = charge
    report = label(frames, tmp_path / "out.xyz", "gfn2-xtb")
    assert (report.labelled, report.failed) == (1, 3)
    reasons = [a.info["label_error"] for a in ase.io.read(tmp_path / "out.failed.xyz", ":")]
    # two workers: failures are listed in the order in which they came
    for got in ("'neutral'", "nan", "0.5"):
        assert sum(f"info['charge']: expected an integer, got {got}" in r for r in reasons) == 1


def test_bonds_given_by_smiles_are_part_of_a_frame():
    a, b = molecule("CH3CH2OH"), molecule("CH3CH2OH")
    assert frame_key(a, "uff") == frame_key(b, "uff")
    b.info["smiles"] = "CCO"
    assert frame_key(a, "uff") != frame_key(b, "uff")


def test_a_file_cut_within_its_last_number(tmp_path):
    file = tmp_path / "cut.xyz"
    ase.io.write(file, copper(2))
    file.write_text(file.read_text()[:-4])
    with pytest.raises(ValueError, match="its last line has no line end: the file is truncated or damaged there"):
        label(file, tmp_path / "out.xyz", "emt")
    ase.io.write(file, copper(2))
    file.write_text(file.read_text()[:-1])  # an editor's habit: complete
    assert label(file, tmp_path / "out.xyz", "emt").labelled == 2


def test_nothing_to_write(tmp_path):
    for k in range(2):  # again: the list of failures is known
        with pytest.raises(
            ValueError, match=r"hopeless: all 3 frames failed, see .*out.failed.xyz; " + ("frame [012]", "in an")[k]
        ):
            label(copper(3), tmp_path / "out.xyz", "own_labelers:hopeless")
        assert not (tmp_path / "out.xyz").exists() and not (tmp_path / "out.xyz.partial").exists()
    with pytest.raises(ValueError, match="frames: expected at least one in the list, got none"):
        label([], tmp_path / "none.xyz", "emt")
    ase.io.write(tmp_path / "in.xyz", copper(3))
    done = equitune("label", tmp_path / "in.xyz", "-o", tmp_path / "o.xyz", "--with", "own_labelers:hopeless")
    assert done.returncode == 2 and "all 3 frames failed" in " ".join(done.stderr.split())


@pytest.mark.parametrize("fault", ["dies", "hangs compiled"])
def test_one_bad_frame_among_many(tmp_path, fault, monkeypatch):
    """The frames that were under way with it are labelled as well, without a process for each of them."""
    from mace_lora.augment import label_run

    started = []
    opened = label_run.open_executor
    monkeypatch.setattr(label_run, "open_executor", lambda *a: started.append(a) or opened(*a))
    frames = copper(200)
    frames[120].info["fault"] = fault
    timeout = 2.0 if fault == "hangs compiled" else None
    report = label(frames, tmp_path / "out.xyz", "own_labelers:faulty", workers=2, timeout=timeout)
    assert (report.labelled, report.failed) == (199, 1)
    assert "the labeler's process crashed" in report.reasons[0] and "frame 120" in report.reasons[0]
    assert len(started) <= 2


def test_identity_is_content(tmp_path, monkeypatch):
    """Both files of a model of ours count, the path does not; neither does where a module lies."""
    pytest.importorskip("mace")
    from mace_lora.embedded import BASE_FILES

    monkeypatch.chdir(tmp_path)
    for file in BASE_FILES:
        shutil.copy(file, tmp_path / f"base{file.suffix}")
    names = ("mace:base.json", "mace:./base.json", "mace:base.safetensors")
    one, same, other = (open_labeler(n).identity for n in names)
    assert one == same and one.split("#")[1] == other.split("#")[1]
    assert open_labeler("mace:embedded").identity.split("#")[1] == one.split("#")[1]
    if importlib.util.find_spec("openmm"):
        (tmp_path / "mine.xml").write_text("<ForceField></ForceField>")
        two = {open_labeler(f"openmm:{n}/spce.xml+mine.xml").identity for n in ("amber14", "charmm36")}
        assert len(two) == 2
    (tmp_path / "base.json").write_text((tmp_path / "base.json").read_text() + " ")
    assert open_labeler("mace:base.safetensors").identity != other
    (tmp_path / "beside.py").write_text("from own_labelers import slow\n")
    first = open_labeler("beside:slow").identity
    assert first.startswith("beside:slow#")
    ase.io.write(tmp_path / "in.xyz", copper(2))
    done = equitune("label", "in.xyz", "-o", "out.xyz", "--with", "beside:slow", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ase.io.read(tmp_path / "out.xyz").info["label_name"] == first


def test_list_of_labelers_needs_nothing_else():
    done = equitune("label", "--labelers")
    assert done.returncode == 0
    assert "gfn2-xtb" in done.stdout and "openmm:FILE.xml[+FILE.xml]" in done.stdout


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_full_tmpfs(tmp_path):
    """A real full disk: finished frames stay, the command says so, and goes on when there is room."""
    ase.io.write(tmp_path / "in.xyz", copper(60))
    small = tmp_path / "small"
    small.mkdir()
    script = (
        f"mount -t tmpfs -o size=16k none {small} && {PROGRAM} label {tmp_path}/in.xyz -o {small}/out.xyz --with emt "
        f"--workers 1; echo code $?; mount -o remount,size=1m {small} && {PROGRAM} label {tmp_path}/in.xyz "
        f"-o {small}/out.xyz --with emt --workers 1 && cp {small}/out.xyz {tmp_path}/out.xyz"
    )
    done = subprocess.run(["unshare", "-rm", "bash", "-c", script], capture_output=True, text=True, env=os.environ)
    if "Operation not permitted" in done.stderr or "permission denied" in done.stderr.lower():
        pytest.skip("user namespaces are not allowed here")
    assert "code 2" in done.stdout and "make room and run again" in " ".join(done.stderr.split()), done.stderr
    assert "frames had their labels from an earlier run" in done.stdout
    assert len(ase.io.read(tmp_path / "out.xyz", ":")) == 60


def test_evaluate_knows_labelers_without_an_argument(tmp_path):
    label(copper(12), tmp_path / "out.xyz", "emt")
    done = equitune("evaluate", "emt", tmp_path / "out.xyz", "--output", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "report" / "errors.json").read_text())["errors"]["mae_f"] < 1e-3


def test_outputs_and_options_that_do_not_fit(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"output: expected a file, got the folder .*folder"):
        label(copper(1), tmp_path / "folder", "emt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder"]
    for prefix in ("a b", "", "1st", "a="):
        with pytest.raises(ValueError, match=r"prefix: expected a letter, then letters, digits or _, got"):
            label(copper(1), tmp_path / "a.xyz", "emt", prefix=prefix)
    with pytest.raises(ValueError, match="threads: with an executor its own configuration sets them, got threads=2"):
        label(copper(1), tmp_path / "a.xyz", "emt", threads=2, executor="parsl:a.py")
    (tmp_path / "empty.xyz").write_text("")
    with pytest.raises(ValueError, match=r"empty.xyz"):
        label(tmp_path / "empty.xyz", tmp_path / "a.xyz", "emt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.xyz", "folder"]
    done = equitune("label", tmp_path / "empty.xyz", "-o", tmp_path / "a.xyz", "--with", "emt", "--workers", "0")
    assert done.returncode == 2
    assert "Invalid value for '--workers'" in done.stderr


def test_positions_and_shapes_that_are_no_labels(tmp_path):
    frames = copper(3)
    frames[1].info["fault"] = "one force"
    report = label(frames, tmp_path / "a.xyz", "own_labelers:faulty")
    assert (report.labelled, report.failed) == (2, 1)
    assert "expected forces of shape (4, 3) and a stress of shape (6,), got (1, 3)" in report.reasons[0]
    frames[0].positions[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the frame's positions are not finite"):
        open_labeler("emt").label(frames[0])


def test_what_was_there_is_told(tmp_path):
    frames = copper(4)
    for atoms in frames[:2]:
        atoms.info["REF_energy"] = -1.0
    ase.io.write(tmp_path / "a.xyz", frames[:3])
    ase.io.write(tmp_path / "b.xyz", frames[2:])
    shown = []
    for name in ("a", "b"):
        done = equitune("label", tmp_path / f"{name}.xyz", "-o", tmp_path / "o.xyz", "--with", "emt", "--workers", "1")
        assert done.returncode == 0, done.stderr
        shown.append(" ".join(done.stdout.split()))
    assert "2 frames of the input have an energy under the same key; o.xyz has the new one (--prefix gives" in shown[0]
    assert "other input" not in shown[0]
    assert "2 more frames, labelled from other input, are in it as before" in shown[1]
    assert len(ase.io.read(tmp_path / "o.xyz", ":")) == 4


def test_a_device_that_is_not_there(monkeypatch):
    pytest.importorskip("mace")
    monkeypatch.setenv("EQUITUNE_DEVICE", "gpu")
    with pytest.raises(ValueError, match="EQUITUNE_DEVICE: expected cpu, or cuda on a machine with a GPU, got 'gpu'"):
        open_labeler("mace:embedded")
