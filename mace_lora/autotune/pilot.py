"""A small experiment on the user's own frames: does classical pre-training help them?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np

from mace_lora.atomic import atomic_path, keep_settings
from mace_lora.augment import Schedule, frame_key, label, open_labeler, sample_md
from mace_lora.augment.perturb import bare
from mace_lora.evaluate.metrics import Errors, errors, predict
from mace_lora.mace_plugin.launch import train

from .advice import CLEAR, with_labels

__all__ = ["Pilot", "pilot"]

_STARTS = 4
_SMALL = {
    "hidden_irreps": "16x0e+16x1o", "max_ell": 2, "correlation": 2, "r_max": 4.5, "E0s": "average", "batch_size": 5,
    "valid_batch_size": 10, "ema": True, "ema_decay": 0.99, "scheduler": "ExponentialLR", "loss": "weighted",
    "energy_weight": 1, "forces_weight": 100, "default_dtype": "float32", "device": "cpu", "lr": 0.01,
    "plot": False, "patience": 100_000,
}  # fmt: skip


@dataclass(frozen=True)
class Pilot:
    """Errors of equal small models on quantum frames that neither was trained nor chosen on.

    Attributes:
        trained, validated: quantum frames trained on, and compared on.
        scratch, autotuned: errors without and with classical pre-training.
        gain: force error from scratch over that with pre-training; above one where it helped.
    """

    trained: int
    validated: int
    scratch: Errors
    autotuned: Errors

    @property
    def gain(self) -> float:
        return self.scratch.mae_f / self.autotuned.mae_f

    def text(self) -> str:
        """One sentence for the user."""
        clear = self.gain > CLEAR, self.gain < 1 / CLEAR
        verdict = "helped" if clear[0] else "did harm" if clear[1] else "made no clear difference"
        return (
            f"Pilot with {self.trained} of your frames and small models: classical pre-training {verdict}; force MAE "
            f"{self.scratch.mae_f:.0f} meV/Å from scratch, {self.autotuned.mae_f:.0f} with it ({self.gain:.2f} times "
            "lower)."
        )


def pilot(
    frames: Sequence[ase.Atoms], with_: str, folder: Path, *, classical: int = 400, epochs: int = 40,
    temperatures: Sequence[float] = (300.0, 600.0), energy_key: str = "REF_energy", forces_key: str = "REF_forces",
    seed: int = 0, workers: int = 1, say: Callable[[str], None] = print,
) -> Pilot:  # fmt: skip
    """Train small MACE models from scratch and with classical pre-training; compare them on held-out quantum frames.

    Classical frames come from dynamics with the classical potential that starts from the quantum frames. Stopped, it
    goes on.

    Args:
        frames: labelled quantum frames (eV, eV/Å); two thirds are trained on, at most 50; half of the rest choose
            the epoch, the other half are compared on.
        with_: classical potential, as for labelling.
        folder: for all files.
        classical: frames of the classical stage.
        epochs: of the quantum stage; the classical one has the same number of steps.
        temperatures: of the dynamics, K.
        energy_key, forces_key: of the quantum labels.
        seed: of choice and training.
        workers: processes of the dynamics and labels.
        say: gets a line for every step.

    Raises:
        ValueError: too few frames, a potential or a training that fails, or a folder of another pilot.
    """
    frames = with_labels(frames, energy_key, forces_key)
    if len(frames) < 6:
        raise ValueError(f"frames: expected at least 6 for a pilot, got {len(frames)}")
    open_labeler(with_)
    order = np.random.default_rng(seed).permutation(len(frames))
    count = min(50, 2 * len(frames) // 3)
    chosen = [frames[i] for i in order[: min(len(frames), count + 50)]]
    few, valid, held = chosen[:count], chosen[count::2], chosen[count + 1 :: 2]  # the last are looked at once
    settings = {
        "frames": [frame_key(a, f"{a.info[energy_key]:.9f}") for a in chosen],
        "potential": open_labeler(with_).identity, "classical": classical, "epochs": epochs,
        "temperatures": list(temperatures), "seed": seed,
    }  # fmt: skip
    keep_settings(folder, settings)
    for name, part in (("train", few), ("valid", valid)):
        _write(folder / f"{name}.xyz", part, energy_key, forces_key)
    labelled = folder / "classical.xyz"
    if not labelled.exists():
        say(f"pilot: {classical} frames from dynamics with {with_}")
        starts = _starts(few)
        each = -(-classical // (len(starts) * len(temperatures)))
        schedules = [Schedule(t, t, each, 20.0, 0.5, 0.02, 200.0) for t in temperatures]
        sampled = folder / "sampled.xyz"
        if not sampled.exists():
            sample_md(starts, sampled, with_, schedules, seed=seed, workers=workers)
        label(sampled, labelled, with_, workers=workers)
    flags = _SMALL | {
        "train_file": folder / "train.xyz", "valid_file": folder / "valid.xyz", "max_num_epochs": epochs,
        "eval_interval": max(1, epochs // 10), "lr_scheduler_gamma": round(0.05 ** (1 / epochs), 4), "seed": seed,
    }  # fmt: skip
    first = max(1, round(epochs * count / classical))
    autotune = {"autotune_train_file": labelled, "autotune_epochs": first, "autotune_lr": 0.01}
    found = {}
    for name, more in {"scratch": {}, "autotuned": autotune}.items():
        say(f"pilot: training {name}")
        model = train(flags | more, folder / name)
        found[name] = errors(predict(open_labeler(f"mace:{model}"), held, energy_key, forces_key))
    return Pilot(len(few), len(held), found["scratch"], found["autotuned"])


def _starts(few: Sequence[ase.Atoms]) -> list[ase.Atoms]:
    """A few frames that have every element of all."""
    missing, found = {z for a in few for z in a.numbers}, list[ase.Atoms]()
    for atoms in few:
        if len(found) < _STARTS or missing & {*atoms.numbers}:
            found.append(bare(atoms))
            missing -= {*atoms.numbers}
    return found


def _write(path: Path, frames: Sequence[ase.Atoms], energy_key: str, forces_key: str) -> None:
    """Frames with our own keys."""
    if path.exists():
        return
    out: list[Any] = []
    for atoms in frames:
        frame = bare(atoms)
        frame.info["REF_energy"] = float(atoms.info[energy_key])
        frame.arrays["REF_forces"] = np.asarray(atoms.arrays[forces_key], float)
        out.append(frame)
    with atomic_path(path) as temporary:
        ase.io.write(temporary, out, format="extxyz", write_results=False)
