"""equitune label: complete, resumable, and honest about what failed."""

import functools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase.build import bulk

from mace_lora.augment import frame_key, label
from mace_lora.augment.journal import Journal

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def own_labelers(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", str(HERE))  # for workers


def copper(count: int) -> list:
    frames = []
    for seed in range(count):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(0.05, seed=seed)
        frames.append(atoms)
    return frames


def texts(path: Path) -> list[str]:
    """Frames of an extxyz file as text, sorted."""
    lines, out = path.read_text().splitlines(), []
    while lines:
        count = int(lines[0]) + 2
        out.append("\n".join(lines[:count]))
        lines = lines[count:]
    return sorted(out)


def test_labels_provenance_and_order(tmp_path):
    frames = copper(12)
    frames[3].info["split"] = "train"
    report = label([*frames, frames[0]], tmp_path / "out.xyz", "emt", workers=2)
    assert (report.labelled, report.failed, report.duplicates) == (12, 0, 1)
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob("*.failed*"))
    found = sorted(ase.io.read(tmp_path / "out.xyz", ":"), key=lambda a: a.info["input_index"])
    for index, (before, after) in enumerate(zip(frames, found, strict=True)):
        assert after.info["input_index"] == index
        assert after.info["label_key"] == frame_key(before, "emt")
        assert after.info["label_source"].startswith("EMT ase ")
        assert after.info["label_units"] == "eV, eV/Å, eV/Å^3"
        from ase.calculators.emt import EMT

        before.calc = EMT()
        assert after.info["REF_energy"] == pytest.approx(before.get_potential_energy(), abs=1e-9)
        np.testing.assert_allclose(after.arrays["REF_forces"], before.get_forces(), atol=1e-7)
        np.testing.assert_allclose(after.info["REF_stress"], before.get_stress(), atol=1e-9)
    assert found[3].info["split"] == "train"


def test_more_frames_later(tmp_path):
    frames = copper(8)
    label(frames[:5], tmp_path / "out.xyz", "emt")
    report = label(frames, tmp_path / "out.xyz", "emt")
    assert (report.before, report.labelled) == (5, 3)
    label(frames, tmp_path / "once.xyz", "emt")
    assert texts(tmp_path / "out.xyz") == texts(tmp_path / "once.xyz")


def command(frames: Path, output: Path, name: str, *options: str) -> list[str]:
    program = Path(sys.executable).parent / "equitune"
    return [str(program), "label", str(frames), "-o", str(output), "--with", name, *options]


def test_twenty_kills_lose_nothing(tmp_path):
    """kill -9 of the main process at random moments: every frame once, the same bytes up to order."""
    frames = tmp_path / "frames.xyz"
    ase.io.write(frames, copper(500))
    label(frames, tmp_path / "once.xyz", "own_labelers:slow", workers=2)
    rng, output = random.Random(1), tmp_path / "out.xyz"
    run = command(frames, output, "own_labelers:slow", "--workers", "2")
    kills, before = 0, set(processes())
    while kills < 20 and not output.exists():
        process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.8, 1.9))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        if output.exists():  # finished before 20 kills: start over, so that all of them are had
            output.unlink()
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    assert texts(output) == texts(tmp_path / "once.xyz")
    assert len(texts(output)) == 500
    time.sleep(2.0)
    left = {p: line for p, (_, line) in processes().items() if p not in before and "spawn_main" in line}
    assert not left, "workers outlive a killed main process"


def test_torn_frame_is_cut_off(tmp_path):
    frames = copper(6)
    label(frames, tmp_path / "out.xyz", "emt")
    whole = (tmp_path / "out.xyz").read_bytes()
    for cut in (1, 40, 200, len(whole) // 2, len(whole) - 1):
        (tmp_path / "out.xyz").unlink(missing_ok=True)
        (tmp_path / "out.xyz.partial").write_bytes(whole[:cut])
        label(frames, tmp_path / "out.xyz", "emt")
        assert sorted((tmp_path / "out.xyz").read_bytes().splitlines()) == sorted(whole.splitlines())


def test_faults_of_a_labeler_are_reported_and_the_rest_completes(tmp_path):
    frames = copper(24)
    for index, fault in {4: "throws", 9: "nan", 13: "hangs", 17: "dies"}.items():
        frames[index].info["fault"] = fault
    report = label(frames, tmp_path / "out.xyz", "own_labelers:faulty", workers=2, timeout=1.0)
    assert (report.labelled, report.failed) == (20, 4)
    failed = {a.info["input_index"]: a.info["label_error"] for a in ase.io.iread(tmp_path / "out.failed.xyz", ":")}
    assert failed[4] == "RuntimeError: no convergence"
    assert failed[9] == "ValueError: own_labelers:faulty: the forces is not finite"
    assert failed[13] == "TimeoutError: no result within 1 s"
    assert "process crashed or hung for more than 1 s" in failed[17]
    again = label(frames, tmp_path / "out.xyz", "own_labelers:faulty", workers=2, timeout=1.0)
    assert (again.before, again.labelled, again.failed) == (20, 0, 4)
    for index in (4, 9, 13, 17):
        del frames[index].info["fault"]
    assert label(frames, tmp_path / "out.xyz", "own_labelers:faulty", retry_failed=True).labelled == 4
    assert not (tmp_path / "out.failed.xyz").exists()


def test_hopeless_set_up_stops_early(tmp_path):
    frames = copper(40)
    for atoms in frames:
        atoms.info["fault"] = "throws"
    with pytest.raises(ValueError, match="the first 20 frames all failed, the last with: RuntimeError: no convergence"):
        label(frames, tmp_path / "out.xyz", "own_labelers:faulty")


def test_damaged_input_keeps_what_is_finished(tmp_path):
    frames = tmp_path / "frames.xyz"
    ase.io.write(frames, copper(6))
    text = frames.read_text()
    frames.write_text(text[: int(len(text) * 0.9)].rpartition("\n")[0] + "\n")
    with pytest.raises(ValueError, match=r"frame 5 \(counted from 0\) cannot be read .* truncated or damaged"):
        label(frames, tmp_path / "out.xyz", "emt")
    ase.io.write(frames, copper(6))
    assert label(frames, tmp_path / "out.xyz", "emt").labelled <= 6
    assert len(texts(tmp_path / "out.xyz")) == 6


def test_full_disk(tmp_path):
    """A file-size limit makes writes fail as a full disk does."""
    frames = tmp_path / "frames.xyz"
    ase.io.write(frames, copper(200))
    run = " ".join(command(frames, tmp_path / "out.xyz", "emt", "--workers", "1"))
    done = subprocess.run(
        ["bash", "-c", f"trap '' XFSZ; ulimit -f 40; {run}"], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 2
    assert "labelled frames are safe in" in done.stderr.replace("\n", " ")
    kept = len(texts(tmp_path / "out.xyz.partial"))
    assert 10 < kept < 200
    report = label(frames, tmp_path / "out.xyz", "emt")
    assert (report.before, report.labelled) == (kept, 200 - kept)


def test_interrupted_from_the_keyboard(tmp_path):
    frames = tmp_path / "frames.xyz"
    ase.io.write(frames, copper(500))
    run = command(frames, tmp_path / "out.xyz", "own_labelers:slow", "--workers", "1")
    # a shell that runs in the background leaves its children with the signal ignored
    restore = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(run, stdout=subprocess.PIPE, text=True, preexec_fn=restore)
    partial = tmp_path / "out.xyz.partial"
    while process.poll() is None and not (partial.exists() and partial.stat().st_size > 10_000):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "the same command goes on from there" in " ".join(shown.split())
    assert len(texts(partial)) > 5


def processes() -> dict[int, tuple[int, str]]:
    """Parent and command line of every process of this machine."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found[int(folder.name)] = (int((folder / "stat").read_text().rpartition(")")[2].split()[1]), line)
            except OSError:
                continue
    return found


def test_parsl_with_a_lost_worker(tmp_path, monkeypatch):
    """Two HTEX workers on the loopback; one is killed: nothing is lost, nothing is there twice."""
    pytest.importorskip("parsl")
    monkeypatch.chdir(tmp_path)
    frames = tmp_path / "frames.xyz"
    ase.io.write(frames, copper(400))
    label(frames, tmp_path / "once.xyz", "own_labelers:slow", workers=2)
    config = HERE.parents[1] / "recipes" / "clusters" / "local.py"
    run = command(frames, tmp_path / "out.xyz", "own_labelers:slow", "--workers", "2", "--executor", f"parsl:{config}")
    process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
    partial, killed = tmp_path / "out.xyz.partial", 0
    while process.poll() is None and not killed:
        time.sleep(0.2)
        if partial.exists() and partial.stat().st_size > 2000:
            running = processes()
            # bash script of the block -> manager -> its multiprocessing manager, then the workers
            managers = {
                p for p, (parent, _) in running.items() if "parsl.local.block" in running.get(parent, (0, ""))[1]
            }
            victims = [p for p, (parent, line) in running.items() if parent in managers and "spawn_main" in line]
            if len(victims) == 3:
                os.kill(max(victims), signal.SIGKILL)
                killed += 1
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 0, shown
    assert killed == 1
    assert texts(tmp_path / "out.xyz") == texts(tmp_path / "once.xyz")


def test_parsl_config_that_is_none(tmp_path):
    pytest.importorskip("parsl")
    (tmp_path / "wrong.py").write_text("configuration = 3")
    with pytest.raises(ValueError, match=r"wrong.py must define 'config', a parsl.Config, got NoneType"):
        label(copper(1), tmp_path / "out.xyz", "emt", executor=f"parsl:{tmp_path / 'wrong.py'}")
    with pytest.raises(FileNotFoundError, match="--executor: no file"):
        label(copper(1), tmp_path / "out.xyz", "emt", executor="parsl:missing.py")


def test_files_that_are_not_ours(tmp_path):
    frames = copper(3)
    label(frames, tmp_path / "out.xyz", "emt")
    with pytest.raises(ValueError, match=r"holds labels of emt, not of own_labelers:slow#.*; choose another output"):
        label(frames, tmp_path / "out.xyz", "own_labelers:slow")
    text = (tmp_path / "out.xyz").read_text().replace("label_name=emt", 'label_name="mace:a b.model"')
    (tmp_path / "spaced.xyz").write_text(text)
    with pytest.raises(ValueError, match=r"holds labels of mace:a b\.model, not of emt"):
        label(frames, tmp_path / "spaced.xyz", "emt")
    ase.io.write(tmp_path / "plain.xyz", frames)
    with pytest.raises(ValueError, match="holds frames that equitune label did not write"):
        label(frames, tmp_path / "plain.xyz", "emt")
    with Journal(tmp_path / "busy.xyz.partial"), pytest.raises(ValueError, match="another process is writing to it"):
        label(frames, tmp_path / "busy.xyz", "emt")
    with pytest.raises(FileNotFoundError, match=r"no file .*missing.xyz"):
        label(tmp_path / "missing.xyz", tmp_path / "new.xyz", "emt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 0}, "workers, threads: expected at least 1"),
        ({"timeout": -1.0}, "timeout: expected seconds > 0, got -1.0"),
        ({"executor": "dask:x"}, "--executor: expected parsl:FILE.py, got 'dask:x'"),
    ],
)
def test_settings_that_do_not_fit(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        label(copper(1), tmp_path / "out.xyz", "emt", **settings)


def test_another_model_in_the_same_file_is_another_labeler(tmp_path):
    """The content of the model file belongs to the labels, not its name alone."""
    pytest.importorskip("mace")
    import torch
    from ase.build import molecule

    from mace_lora import embedded_base
    from mace_lora.mace_plugin.convert import save_model

    file, out = tmp_path / "base.model", tmp_path / "out.xyz"
    model = embedded_base(torch.float64)
    save_model(model, file)
    label([molecule("H2O")], out, f"mace:{file}")
    assert label([molecule("H2O")], out, f"mace:{file}").before == 1
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    save_model(model, file)
    with pytest.raises(ValueError, match=r"holds labels of mace:.*#[0-9a-f]{16}, not of mace:.*; choose another"):
        label([molecule("H2O")], out, f"mace:{file}")
