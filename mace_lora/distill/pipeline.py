"""Teacher, synthetic frames, student: every stage of ``equitune distill`` in its order."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np

from mace_lora.augment import open_labeler
from mace_lora.mace_plugin import launch

from .config import Distillation, Training
from .evaluation import evaluate_model, measure_speed, validate
from .stages import Stages
from .students import Framework, default_flags, framework, plain
from .synthesis import label_frames, make_frames, select_frames

__all__ = ["Fit", "Outcome", "run"]


@dataclass(frozen=True)
class Fit:
    """A training at its best learning rate.

    Attributes:
        model: file of the model.
        lr: learning rate chosen on the validation frames.
        epochs, steps: of this training, steps of the optimiser in all.
        curve: (epoch, energy MAE in meV/atom, force MAE in meV/Å) on its validation frames.
        sweep: learning rate -> validation score of the saved model, geometric mean of both MAE (offsets removed).
        valid: energy MAE (meV/atom) and force MAE (meV/Å) of the saved model on its validation frames.
    """

    model: Path
    lr: float
    epochs: int
    steps: int
    curve: list[tuple[int, float, float]]
    sweep: dict[float, float]
    valid: tuple[float, float] = (0.0, 0.0)


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
    stages, student = Stages(config.folder, say), config.student
    teachers = _teachers(config, stages)
    synthetic = _synthetic(config, stages, teachers)
    parts, quantum = (synthetic / "synthetic.xyz", synthetic / "synthetic_valid.xyz"), (config.train, config.valid)
    how = framework(config)
    fits = {"pretrain": _fit(how, stages, "pretrain", student.pretrain, parts)}
    fits["finetune"] = _fit(how, stages, "finetune", student.finetune, quantum, fits["pretrain"].model)
    if student.direct is not None:
        fits["direct"] = _fit(how, stages, "direct", student.direct, quantum)
    models = {"teacher": teachers[0]} if teachers else {}
    models |= {name: f"{how.kind}:{fit.model}" for name, fit in fits.items()}
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
    if teacher.labelled is not None:
        return []
    found, data = [], (config.train, config.valid)
    for k in range(teacher.members):
        flags = default_flags(config, int(teacher.flags["max_num_epochs"])) | teacher.flags
        flags["seed"] = config.seed + 1 + k
        given = {**flags, "train_file": data[0], "valid_file": data[1]}
        place = stages.run(f"teacher-{k}", plain(flags), data, functools.partial(launch.train, given))
        found.append(f"mace:{place / 'run.model'}")
    return found


def _synthetic(config: Distillation, stages: Stages, teachers: list[str]) -> Path:
    """Folder with the filtered synthetic frames."""
    who = [_name(t) for t in teachers]
    if config.teacher.labelled is not None:
        return _filtered(config, stages, teachers, config.teacher.labelled)
    settings = {"synthetic": config.synthetic.model_dump(mode="json"), "seed": config.seed, "teacher": who[0]}
    made = stages.run("sampled", settings, [config.train], lambda place: make_frames(config, teachers[0], place))
    labelled = stages.run(
        "labelled", {"teacher": who[0]}, [made / "sampled.xyz"],
        lambda place: label_frames(made / "sampled.xyz", teachers[0], config.workers, place),
    )  # fmt: skip
    return _filtered(config, stages, teachers, labelled / "labelled.xyz")


def _filtered(config: Distillation, stages: Stages, teachers: list[str], labelled: Path) -> Path:
    settings = {"filter": config.filter.model_dump(), "committee": [_name(t) for t in teachers], "seed": config.seed}
    return stages.run(
        "synthetic", settings, [labelled, config.train, config.valid, config.test],
        lambda place: select_frames(config, labelled, teachers, place),
    )  # fmt: skip


def _name(teacher: str) -> str:
    """Identity of a potential without the place of its files, so that a moved folder stays valid."""
    found = open_labeler(teacher)
    if not found.has_files:
        return found.identity
    return f"{found.identity.partition(':')[0]}#{found.identity.rpartition('#')[2]}"


def _fit(
    how: Framework, stages: Stages, name: str, training: Training, data: tuple[Path, Path], start: Path | None = None
) -> Fit:
    """One training for each learning rate; the saved model that is best on the validation frames."""
    every = {lr: how.settings(training, lr, start) for lr in training.lrs}

    def make(mine: dict[str, Any], place: Path) -> None:
        how.train(mine, data, place)
        validate(f"{how.kind}:{how.model(place)}", data, place)

    found = {
        lr: stages.run(f"{name}-lr{lr:g}", plain(mine), data, functools.partial(make, mine))
        for lr, mine in every.items()
    }
    valid = {lr: json.loads((place / "valid.json").read_text()) for lr, place in found.items()}
    for lr, place in found.items():
        if "mae_e_refit" not in valid[lr]:  # of an earlier version
            validate(f"{how.kind}:{how.model(place)}", data, place)
            valid[lr] = json.loads((place / "valid.json").read_text())
    scores = {lr: _score(row) for lr, row in valid.items()}
    best = min(scores, key=lambda lr: scores[lr])
    if not np.isfinite(scores[best]):
        raise ValueError(f"student.{name}: the model is not finite on its validation frames at any of {training.lrs}")
    frames = sum(a.info.get("config_type") != "IsolatedAtom" for a in ase.io.read(data[0], ":"))
    steps = training.epochs * how.steps_per_epoch(every[best], frames)
    row = valid[best]
    return Fit(
        how.model(found[best]),
        best,
        training.epochs,
        steps,
        how.curve(found[best]),
        scores,
        (row["mae_e"], row["mae_f"]),
    )


def _score(row: dict[str, float]) -> float:
    """Geometric mean of the energy (offsets removed) and force MAE, or the one with labels; infinite if not finite."""
    known = [row[k] for k in ("mae_e_refit", "mae_f") if row[k] is not None]
    value = float(np.prod(known)) ** (1 / len(known)) if known else np.inf
    return value if np.isfinite(value) else np.inf


def _evaluate(config: Distillation, stages: Stages, name: str, potential: str) -> dict[str, Any]:
    place = stages.run(
        f"evaluated-{name}", {"model": _name(potential)}, [config.test, config.train],
        lambda place: evaluate_model(potential, config.test, config.train, place),
    )  # fmt: skip
    content: dict[str, Any] = json.loads((place / "errors.json").read_text())
    return content | {"folder": str(place)}
