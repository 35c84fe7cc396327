"""mace_run_train --autotune_train_file: two stages in one command, restarted in either; bad input."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from helpers import BIN, dft_frames, flags, train
from mace.calculators import MACECalculator

from mace_lora.autotune.schedule import depth

TWO_STAGES = {
    "foundation_model": None, "lora": None, "lora_rank": None, "multiheads_finetuning": None, "E0s": "average",
    "hidden_irreps": "8x0e+8x1o", "max_ell": 2, "correlation": 2, "r_max": 4.0, "default_dtype": "float64",
    "max_num_epochs": 3, "autotune_epochs": 4, "seed": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def classical(job):
    """Frames of the quantum set's molecule, rattled, with UFF labels."""
    pytest.importorskip("rdkit")
    from mace_lora.augment import label

    frames = []
    for seed, atoms in enumerate(dft_frames("train", 40)):
        bare = ase.Atoms(atoms.numbers, positions=atoms.positions)
        bare.rattle(0.03, seed=seed)
        frames.append(bare)
    label(frames, job / "classical.xyz", "uff")
    return job / "classical.xyz"


def load(path):
    return torch.load(path, weights_only=False, map_location="cpu")


def test_both_stages_and_again(job, classical, tmp_path):
    done = train(job, tmp_path, **TWO_STAGES, autotune_train_file=classical)
    shown = " ".join(done.stdout.split())
    assert shown.index("stage one: training on the classical labels") < shown.index("stage two: fine-tuning")
    found = re.search(r"correlation ([\d.]+), slope ([\d.]+)", shown)
    assert found and 0.3 < float(found[1]) <= 1.0
    residual = re.search(r"energy residual on 10 frames ([\d.]+) meV/atom before, ([\d.]+) after refitting", shown)
    assert residual and float(residual[2]) < 0.1 * float(residual[1])
    first, second = load(tmp_path / "run_classical.model"), load(tmp_path / "run.model")
    assert type(first) is type(second)
    frames = ase.io.read(job / "train.xyz", ":")
    residual = []
    for atoms in frames:
        reference = atoms.info["REF_energy"]
        atoms.calc = MACECalculator(models=[second], device="cpu", default_dtype="float64")
        residual.append((reference - atoms.get_potential_energy()) / len(atoms))
    assert abs(np.mean(residual)) < 1e-6  # nothing constant is left
    e0s = [m.atomic_energies_fn.atomic_energies.reshape(-1) for m in (first, second)]
    assert (e0s[0] - e0s[1]).abs().max() > 1.0  # other level of theory
    stamp = (tmp_path / "run_classical.model").stat().st_mtime_ns
    again = train(
        job, tmp_path, **TWO_STAGES | {"max_num_epochs": 5}, autotune_train_file=classical, restart_latest=True
    )
    assert "stage one is there" in again.stdout and "Loading checkpoint" in again.stdout
    assert (tmp_path / "run_classical.model").stat().st_mtime_ns == stamp
    other = train(
        job, tmp_path, check=False, **TWO_STAGES | {"autotune_epochs": 9}, autotune_train_file=classical,
        restart_latest=True,
    )  # fmt: skip
    assert "its classical stage was made with other data or settings (--autotune_epochs: 4 before, 9 now)" in " ".join(
        other.stdout.split()
    )
    with torch.no_grad():
        next(first.parameters()).mul_(1.5)
    torch.save(first, tmp_path / "run_classical.model")
    for message in ("started from another classical model than", "started from a classical model that is gone"):
        restart = train(job, tmp_path, check=False, **TWO_STAGES, autotune_train_file=classical, restart_latest=True)
        assert restart.returncode and message in " ".join(restart.stdout.split())
        (tmp_path / "run_classical.model").unlink(missing_ok=True)


def test_weights_are_handed_over(job, classical, tmp_path):
    """At a vanishing learning rate stage two ends with stage one's weights; only E0s and scale are new."""
    train(job, tmp_path, **TWO_STAGES | {"lr": 1e-30, "max_num_epochs": 1}, autotune_train_file=classical)
    first, second = load(tmp_path / "run_classical.model"), load(tmp_path / "run.model")
    theirs = first.state_dict()  # upstream makes the Bessel frequencies trainable on the way
    for name, value in second.named_parameters():
        torch.testing.assert_close(value, theirs[name].reshape(value.shape), rtol=0, atol=1e-12)
    assert float(second.scale_shift.scale) != pytest.approx(float(first.scale_shift.scale), rel=1e-4)
    kept = train(
        job, tmp_path / "b", **TWO_STAGES | {"lr": 1e-30, "max_num_epochs": 1, "autotune_rescale": False},
        autotune_train_file=classical,
    )  # fmt: skip
    assert "energy scale multiplied" not in kept.stdout
    scales = [float(load(tmp_path / "b" / f"{n}.model").scale_shift.scale) for n in ("run", "run_classical")]
    assert scales[0] == pytest.approx(scales[1])


def test_requested_references_are_kept(job, classical, tmp_path):
    e0s = (job / "e0s.txt").read_text()
    done = train(
        job, tmp_path, **TWO_STAGES | {"lr": 1e-30, "max_num_epochs": 1, "E0s": e0s}, autotune_train_file=classical
    )
    assert "the references are those that were asked for" in " ".join(done.stdout.split())
    model = load(tmp_path / "run.model")
    wanted = eval(e0s)
    mine = model.atomic_energies_fn.atomic_energies.reshape(-1).tolist()
    assert mine == pytest.approx([wanted[int(z)] for z in model.atomic_numbers], abs=1e-6)
    assert float(model.scale_shift.shift) == 0.0  # isolated atoms have their references
    assert "must be unlearnt, since the references are isolated atoms" in " ".join(done.stdout.split())


def test_shift_takes_the_mean_residual(job, classical, tmp_path):
    """ScaleShiftMACE: upstream's shift is the mean interaction energy, so that it belongs to the level of theory."""
    done = train(
        job, tmp_path,
        **TWO_STAGES | {
            "lr": 1e-30, "max_num_epochs": 1, "autotune_epochs": 2, "model": "ScaleShiftMACE",
            "E0s": (job / "e0s.txt").read_text(),
        }, autotune_train_file=classical,
    )  # fmt: skip
    shown = " ".join(done.stdout.split())
    before, after = map(float, re.search(r"shift of the interaction energy (-?[\d.]+) eV/atom before, (-?[\d.]+) after",
                                         shown).groups())  # fmt: skip
    assert abs(after - before) > 1.0 and "must be unlearnt" not in shown
    residual = re.search(r"energy residual on 10 frames ([\d.]+) meV/atom before, ([\d.]+) after; the ref", shown)
    assert float(residual[2]) < 0.1 * float(residual[1])
    model = load(tmp_path / "run.model")
    assert float(model.scale_shift.shift) == pytest.approx(after, abs=1e-3)
    left = []
    for atoms in ase.io.read(job / "train.xyz", ":"):
        reference = atoms.info["REF_energy"]
        atoms.calc = MACECalculator(models=[model], device="cpu", default_dtype="float64")
        left.append((reference - atoms.get_potential_energy()) / len(atoms))
    assert abs(np.mean(left)) < 1e-6


@pytest.mark.parametrize("kind", ["lora", "multiscale"])
def test_with_lora_and_with_a_multiscale_model(job, classical, tmp_path, kind):
    extra = {"lora": True, "lora_rank": 2} if kind == "lora" else {
        "model": "MultiScaleMACE", "r_short": 2.5, "num_channels_long": 4, "autotune_offsets": "composition",
    }  # fmt: skip
    done = train(job, tmp_path, **TWO_STAGES | extra, autotune_train_file=classical)
    if kind == "lora":
        assert (tmp_path / "run-adapter" / "adapter_model.safetensors").is_file()
        assert "energy residual on 10 frames" in done.stdout
    else:
        assert "energy offsets of 1 composition(s) taken off" in done.stdout
        assert {type(load(tmp_path / f"{n}.model")).__name__ for n in ("run", "run_classical")} == {"MultiScaleMACE"}


def test_layerwise_and_gradual(job, classical, tmp_path):
    """Until its epoch a block keeps the weights of stage one; a restart with another schedule is refused."""
    options = TWO_STAGES | {
        "max_num_epochs": 4, "autotune_epochs": 1, "autotune_unfreeze": 1, "autotune_lr_decay": 0.5,
        "keep_checkpoints": True, "save_all_checkpoints": True,
    }  # fmt: skip
    done = train(job, tmp_path, **options, autotune_train_file=classical)
    shown = " ".join(done.stdout.split())
    assert "autotune: learning rates from the readouts down 0.005, 0.0025, 0.00125, 0.000625" in shown
    assert "autotune: epoch 0: blocks 0 to 0 of 3 learn" in shown
    theirs, depths = load(tmp_path / "run_classical.model").state_dict(), []
    names = [n for n, p in load(tmp_path / "run.model").named_parameters() if p.requires_grad]
    for epoch in range(4):
        (path,) = (tmp_path / "checkpoints").glob(f"run_run-2_epoch-{epoch}.pt")
        mine = load(path)["model"]
        changed = {depth(n, 2) for n in names if (mine[n] != theirs[n].reshape(mine[n].shape)).any()}
        depths.append(sorted(changed))
    assert depths == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    other = train(
        job, tmp_path, check=False, **options | {"autotune_lr_decay": None}, autotune_train_file=classical,
        restart_latest=True,
    )  # fmt: skip
    assert "--autotune_lr_decay: expected 0.5 as in the checkpoint" in " ".join(other.stdout.split())


def test_killed_in_either_stage(job, classical, tmp_path):
    options = TWO_STAGES | {"autotune_epochs": 12, "max_num_epochs": 12, "restart_latest": True, "ema": True}
    options |= {"swa": True, "start_swa": 6}
    command = [BIN / "mace_run_train", *flags(job, tmp_path, **options, autotune_train_file=classical)]

    def until(condition) -> None:
        process = subprocess.Popen(
            [str(a) for a in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        end = time.time() + 240
        while process.poll() is None and not condition() and time.time() < end:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    checkpoints = tmp_path / "checkpoints"
    until(lambda: list(checkpoints.glob("classical/run_run-2_epoch-*.pt")))
    assert not (tmp_path / "run_classical.model").exists()
    until(lambda: list(checkpoints.glob("run_run-2_epoch-*.pt")))
    assert (tmp_path / "run_classical.model").exists() and not (tmp_path / "run.model").exists()
    done = train(job, tmp_path, **options, autotune_train_file=classical)
    assert "stage one is there" in done.stdout and "Loading checkpoint" in done.stdout
    assert (tmp_path / "run.model").is_file()


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="reads /proc")  # noqa: PTH112
def test_terminated_in_stage_one(job, classical, tmp_path):
    """SIGTERM to the command alone ends its stage one too."""
    options = TWO_STAGES | {"autotune_epochs": 1000}
    process = subprocess.Popen(
        [str(a) for a in [BIN / "mace_run_train", *flags(job, tmp_path, **options, autotune_train_file=classical)]],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    children, end = Path(f"/proc/{process.pid}/task/{process.pid}/children"), time.time() + 240
    while process.poll() is None and time.time() < end:
        if list((tmp_path / "checkpoints").glob("classical/run_run-2_epoch-*.pt")):
            break
        time.sleep(0.05)
    found = [int(pid) for pid in children.read_text().split()]
    assert found
    process.terminate()
    assert process.wait(60) == 143
    assert not [pid for pid in found if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"autotune_epochs": 5}, "--autotune_epochs: has no effect without --autotune_train_file"),
        ({"autotune_train_file": "gone.xyz"}, "error: --autotune_train_file: no file gone.xyz"),
        ({"autotune_train_file": "{c}", "energy_key": "dft_energy"}, "has no energies under --energy_key=dft_energy"),
        ({"autotune_train_file": "{t}"}, "same geometry and the same energy .* classical labels were given as quantum"),
    ],
)
def test_bad_input(job, classical, tmp_path, changes, message):
    places = {"{c}": classical, "{t}": job / "train.xyz"}
    options = TWO_STAGES | {"autotune_epochs": None} | {k: places.get(v, v) for k, v in changes.items()}
    done = train(job, tmp_path / "run", check=False, **options)
    assert done.returncode != 0
    assert re.search(message, " ".join(done.stdout.split())), done.stdout[-1500:]
    assert "Epoch 0" not in done.stdout and "Traceback" not in done.stdout and "stage one:" not in done.stdout
