"""Teacher, synthetic frames, student: every stage of ``equitune distill`` in its order."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np

from mace_lora.augment import open_labeler
from mace_lora.mace_plugin import launch

from .config import Distillation, Training
from .evaluation import evaluate_model, measure_speed
from .stages import Stages
from .synthesis import label_frames, make_frames, select_frames

__all__ = ["Fit", "Outcome", "run"]

# a pre-trained multiscale model brings these
_OF_MULTISCALE = ("r_short", "multiscale_coupling", "long_range", "pme_smearing")


@dataclass(frozen=True)
class Fit:
    """A training at its best learning rate.

    Attributes:
        model: file of the model.
        lr: learning rate chosen on the validation frames.
        epochs, steps: of this training, steps of the optimiser in all.
        curve: (epoch, energy MAE in meV/atom, force MAE in meV/Å) on its validation frames.
        sweep: learning rate -> validation score, geometric mean of both MAE.
    """

    model: Path
    lr: float
    epochs: int
    steps: int
    curve: list[tuple[int, float, float]]
    sweep: dict[float, float]


@dataclass(frozen=True)
class Outcome:
    """What the report is made of.

    Attributes:
        teachers: potentials of the committee, the first labels.
        synthetic: folder with the synthetic frames and their counts.
        fits: ``pretrain``, ``finetune`` and, where it was asked for, ``direct``.
        evaluations: name of a model -> its figures on the test frames.
        speed: milliseconds of energy and forces of the first test frame.
        seconds: of every stage.
    """

    teachers: list[str]
    synthetic: Path
    fits: dict[str, Fit]
    evaluations: dict[str, dict[str, Any]]
    speed: dict[str, float]
    seconds: dict[str, float]


def run(config: Distillation, say: Callable[[str], None] = print) -> Outcome:
    """Run every stage that is not there yet.

    Args:
        config: settings.
        say: gets a line for every stage.

    Raises:
        ValueError: a training fails, or too few synthetic frames are left.
    """
    stages = Stages(config.folder, say)
    teachers = _teachers(config, stages)
    synthetic = _synthetic(config, stages, teachers)
    student, parts = config.student, (synthetic / "synthetic.xyz", synthetic / "synthetic_valid.xyz")
    quantum = (config.train, config.valid)
    fits = {"pretrain": _fit(config, stages, "pretrain", student.pretrain, student.flags, parts)}
    start = {
        "foundation_model": str(fits["pretrain"].model), "multiheads_finetuning": False, "E0s": "estimated",
    }  # fmt: skip
    flags = {k: v for k, v in student.flags.items() if not k.endswith("_long") and k not in _OF_MULTISCALE}
    fits["finetune"] = _fit(config, stages, "finetune", student.finetune, flags | start, quantum)
    if student.direct is not None:
        fits["direct"] = _fit(config, stages, "direct", student.direct, student.flags, quantum)
    models = {"teacher": teachers[0], **{name: f"mace:{fit.model}" for name, fit in fits.items()}}
    evaluations = {name: _evaluate(config, stages, name, model) for name, model in models.items()}
    place = stages.run(
        "speed", {name: _name(model) for name, model in models.items()}, [config.test],
        lambda place: measure_speed(models, config.test, place),
    )  # fmt: skip
    speed = json.loads((place / "speed.json").read_text())
    return Outcome(teachers, synthetic, fits, evaluations, speed, stages.seconds)


def _teachers(config: Distillation, stages: Stages) -> list[str]:
    """Potentials of the committee."""
    teacher = config.teacher
    if teacher.potential is not None:
        return [teacher.potential]
    found = []
    for k in range(teacher.members):
        flags = _defaults(config, int(teacher.flags["max_num_epochs"])) | teacher.flags
        flags["seed"] = config.seed + 1 + k
        files = [config.train, config.valid, *_files(flags)]
        place = stages.run(f"teacher-{k}", _plain(flags), files, _trainer(flags, (config.train, config.valid)))
        found.append(f"mace:{place / 'run.model'}")
    return found


def _synthetic(config: Distillation, stages: Stages, teachers: list[str]) -> Path:
    """Folder with the filtered synthetic frames."""
    who = [_name(t) for t in teachers]
    settings = {"synthetic": config.synthetic.model_dump(mode="json"), "seed": config.seed, "teacher": who[0]}
    made = stages.run("sampled", settings, [config.train], lambda place: make_frames(config, teachers[0], place))
    labelled = stages.run(
        "labelled", {"teacher": who[0]}, [made / "sampled.xyz"],
        lambda place: label_frames(made / "sampled.xyz", teachers[0], config.workers, place),
    )  # fmt: skip
    return stages.run(
        "synthetic", {"filter": config.filter.model_dump(), "committee": who, "seed": config.seed},
        [labelled / "labelled.xyz", config.train, config.test],
        lambda place: select_frames(config, labelled / "labelled.xyz", teachers, place),
    )  # fmt: skip


def _name(teacher: str) -> str:
    """Identity of a potential without the place of its file, so that a moved folder stays valid."""
    return open_labeler(teacher).identity.rpartition("/")[2]


def _fit(
    config: Distillation, stages: Stages, name: str, training: Training, flags: Mapping[str, Any],
    data: tuple[Path, Path],
) -> Fit:  # fmt: skip
    """One training for each learning rate; the best on its validation frames."""
    found: dict[float, Path] = {}
    every = dict(_defaults(config, training.epochs)) | dict(flags) | training.flags
    every |= {"max_num_epochs": training.epochs, "seed": config.seed + 1}
    for lr in training.lrs:
        mine = every | {"lr": lr}
        found[lr] = stages.run(f"{name}-lr{lr:g}", _plain(mine), [*data, *_files(mine)], _trainer(mine, data))
    curves = {lr: launch.validation_curve(place) for lr, place in found.items()}
    scores = {lr: min((float(np.sqrt(e * f)) for _, e, f in curve), default=np.inf) for lr, curve in curves.items()}
    best = min(scores, key=lambda lr: scores[lr])
    frames = len(ase.io.read(data[0], ":"))
    steps = training.epochs * -(-frames // int(every["batch_size"]))
    return Fit(found[best] / "run.model", best, training.epochs, steps, curves[best], scores)


def _trainer(flags: Mapping[str, Any], data: tuple[Path, Path]) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        launch.train({**flags, "train_file": data[0], "valid_file": data[1]}, place)

    return make


def _defaults(config: Distillation, epochs: int) -> dict[str, Any]:
    """Flags where the config has none: a decaying learning rate, EMA, the best epoch by the validation loss."""
    return {
        "batch_size": 5, "valid_batch_size": 25, "ema": True, "ema_decay": 0.99, "scheduler": "ExponentialLR",
        "lr_scheduler_gamma": round(0.05 ** (1 / epochs), 6), "eval_interval": max(1, epochs // 50),
        "loss": "weighted", "energy_weight": 1, "forces_weight": 100, "default_dtype": config.dtype,
        "device": config.device, "plot": False, "patience": 1_000_000, "multiheads_finetuning": False,
    }  # fmt: skip


def _files(flags: Mapping[str, Any]) -> list[Path]:
    return [Path(v) for v in flags.values() if isinstance(v, str) and Path(v).is_file()]


def _plain(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags for a hash: files count by their content alone."""
    return {k: "a file" if isinstance(v, str) and Path(v).is_file() else v for k, v in flags.items()}


def _evaluate(config: Distillation, stages: Stages, name: str, potential: str) -> dict[str, Any]:
    place = stages.run(
        f"evaluated-{name}", {"model": _name(potential)}, [config.test, config.train],
        lambda place: evaluate_model(potential, config.test, config.train, place),
    )  # fmt: skip
    content: dict[str, Any] = json.loads((place / "errors.json").read_text())
    return content | {"folder": str(place)}
