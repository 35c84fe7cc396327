"""Active learning: train a committee, explore with it, label what it disagrees on, repeat.

Concurrent learning with a force-deviation window, as in MS-MACE's data sets (arXiv 2312.09490: committee of 4, window
100 to 300 meV/Å, end below 0.5 % candidates). Every step writes a file and is left out when that is there, so that a
stopped run goes on where it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np

from mace_lora.atomic import atomic_path, content_digest, write_text
from mace_lora.data import require_sound
from mace_lora.mace_plugin import launch

from .active_config import ActiveLearning
from .dynamics import sample_md
from .labelers import open_labeler
from .labelling import iter_frames, label
from .selection import committee_deviation, evenly, within

__all__ = ["run"]

_OVERCONFIDENT, _CALIBRATION = 3.0, 50


def run(
    config: ActiveLearning, say: Callable[[str], None] = print,
    after_round: Callable[[list[dict[str, Any]]], None] = lambda rounds: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rounds until the candidate rate is low enough.

    Args:
        config: settings.
        say: gets a line for every step.
        after_round: gets the summaries so far.

    Returns:
        a summary of every round, which is also in ``rounds.json``.

    Raises:
        ValueError: unsound labelled frames, or a folder whose rounds are of other settings or files.
    """
    require_sound(config.data, say=say)
    config.folder.mkdir(parents=True, exist_ok=True)
    _same_settings(config)
    rounds: list[dict[str, Any]] = []
    data = config.data
    for number in range(config.max_rounds):
        place = config.folder / f"round-{number:02d}"
        summary, data = _round(config, number, place, data, say)
        rounds.append(summary)
        write_text(config.folder / "rounds.json", json.dumps(rounds, indent=1) + "\n")
        after_round(rounds)
        if summary["candidate_rate"] < config.stop_below:
            say(f"candidate rate below {100 * config.stop_below:g} %: done; the models are in {place}")
            break
        if not summary["labelled"]:
            say("nothing to label between the bounds, but frames above them: lower the temperature or raise the bound")
            break
    else:
        say(f"max_rounds reached; frames labelled in the last round are in {data} and not trained on yet")
    return rounds


def _same_settings(config: ActiveLearning) -> None:
    """Rounds of other settings must not be continued with these; what only says how long and where may change."""
    free = {"folder", "max_rounds", "stop_below", "timeout", "workers"}
    content, file = json.loads(config.model_dump_json(exclude=free)), config.folder / "settings.json"
    # files count by their content wherever they lie, methods by what they are made of
    contents = _contents(config)
    content = _without(content, contents) | {f"content of {name}": value for name, value in contents.items()}
    if file.is_file():
        before = _without(json.loads(file.read_text()), contents)
        changed = [k for k in content if before.get(k, content[k]) != content[k]]  # a key may be newer than the file
        if changed:
            raise ValueError(
                f"{config.folder}: {changed[0]}: its rounds were made with {before.get(changed[0])}, the config now "
                f"has {content[changed[0]]}; change it back, or give another 'folder'"
            )
    write_text(file, json.dumps(content) + "\n")


def _without(settings: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Settings less some keys, with dots for nested ones."""
    for name in names:
        *path, last = name.split(".")
        part = settings
        for key in path:
            part = part.get(key, {})
        part.pop(last, None)
    return settings


def _contents(config: ActiveLearning) -> dict[str, str]:
    named = {"data": config.data, "explore.starts": config.explore.starts}
    named |= {f"train.{k}": Path(v) for k, v in config.train.items() if isinstance(v, str | Path) and os.path.isfile(v)}  # noqa: PTH113  long strings, e.g. of E0s
    return {name: content_digest(path) for name, path in named.items()} | {"label": open_labeler(config.label).identity}


def _round(
    config: ActiveLearning, number: int, place: Path, data: Path, say: Callable[[str], None]
) -> tuple[dict[str, Any], Path]:
    """One round; returns its summary and the labelled frames after it."""
    place.mkdir(exist_ok=True)
    _split(config, number, place, data)
    say(f"round {number}: {len(ase.io.read(data, ':'))} labelled frames, training {config.members} members")
    _train(config, place)
    members = [f"mace:{place / f'member-{k}' / 'run.model'}" for k in range(config.members)]
    explored = place / "explored.xyz"
    if not explored.exists():
        starts = ase.io.read(config.explore.starts, ":")
        dropped = sample_md(
            starts, explored, members[0], config.explore.schedules(), replicas=config.explore.replicas,
            seed=config.seed + 1000 * (number + 1), workers=config.workers,
        )  # fmt: skip
        write_text(place / "dropped.json", json.dumps(dict(dropped)) + "\n")
    frames = list(iter_frames(explored))
    ratio = _calibration(place, members)
    if ratio > _OVERCONFIDENT and not config.calibrate:
        say(
            f"round {number}: on the validation frames the largest force errors are {ratio:.1f} times the deviation: "
            "the committee is over-confident; set 'calibrate: true', or lower the window"
        )
    deviation = _deviation(place, frames, members) * (max(1.0, ratio) if config.calibrate else 1.0)
    split = within(deviation, *config.window)
    chosen = evenly(deviation, split.inside, config.per_round)
    # frames that the model's own dynamics never reached, having blown up, are no better known than those above
    lost = len(ase.io.read(config.explore.starts, ":")) * config.explore.replicas * sum(
        s.frames for s in config.explore.schedules()
    ) - len(frames)  # fmt: skip
    rate = (len(split.inside) + len(split.above) + lost) / (len(frames) + lost)
    summary: dict[str, Any] = {
        "round": number, "explored": len(frames), "lost": lost, "dropped": _dropped(place),
        "in_window": len(split.inside), "above": len(split.above), "candidate_rate": rate,
        "median_deviation": float(np.median(deviation)), "error_over_deviation": ratio, "labelled": len(chosen),
    }  # fmt: skip
    if lost:
        say(f"round {number}: {lost} frames lost, the dynamics blew up or gave unsound frames: {_dropped(place)}")
    say(f"round {number}: {len(frames)} frames explored, candidate rate {100 * rate:.2f} %, labelling {len(chosen)}")
    if not len(chosen) or rate < config.stop_below:
        return summary | {"labelled": 0}, data
    if not (place / "chosen.xyz").exists():
        _write(place / "chosen.xyz", [frames[i] for i in chosen])
    if not (place / "labelled.xyz").exists():
        report = label(
            place / "chosen.xyz", place / "labelled.xyz", config.label, workers=config.workers, timeout=config.timeout
        )
        if report.failed:
            say(f"round {number}: {report.failed} frames could not be labelled: {'; '.join(report.reasons)}")
    new = list(iter_frames(place / "labelled.xyz"))
    if not new:
        raise ValueError(
            f"label: none of the chosen frames got a label; reasons are in {place / 'labelled.failed.xyz'}"
        )
    if not (place / "all.xyz").exists():
        _write(place / "all.xyz", [*ase.io.read(data, ":"), *new])
    return summary | {"labelled": len(new), **_errors(place, new, members[0])}, place / "all.xyz"


def _dropped(place: Path) -> dict[str, int] | None:
    """What exploration left out; unknown after a kill right before it was noted."""
    file = place / "dropped.json"
    return json.loads(file.read_text()) if file.is_file() else None


def _split(config: ActiveLearning, number: int, place: Path, data: Path) -> None:
    """Training and validation frames of a round."""
    if (place / "valid.xyz").exists():
        return
    frames = ase.io.read(data, ":")
    order = np.random.default_rng([config.seed, number]).permutation(len(frames))
    held = max(1, round(config.valid_fraction * len(frames)))
    if len(frames) <= held:
        raise ValueError(f"data: expected more than {held} labelled frames in {data}, got {len(frames)}")
    _write(place / "train.xyz", [frames[i] for i in order[held:]])
    _write(place / "valid.xyz", [frames[i] for i in order[:held]])


def _train(config: ActiveLearning, place: Path) -> None:
    """Members by the real command, ``workers`` at a time; those that are finished are left alone."""
    runs = [(_flags(config, place, k), place / f"member-{k}") for k in range(config.members)]
    for first in range(0, len(runs), config.workers):
        launch.train_beside(runs[first : first + config.workers])


def _flags(config: ActiveLearning, place: Path, member: int) -> dict[str, Any]:
    return {
        "default_dtype": "float64", "device": "cpu", **config.train, "seed": config.seed + member + 1,
        "train_file": place / "train.xyz", "valid_file": place / "valid.xyz",
    }  # fmt: skip


def _deviation(place: Path, frames: list[ase.Atoms], members: list[str]) -> np.ndarray:
    """Largest force deviations in meV/Å (frames,), kept in a file."""
    file = place / "deviation.json"
    if file.is_file():
        return np.array(json.loads(file.read_text()))
    deviation: np.ndarray = 1e3 * committee_deviation(frames, members)
    write_text(file, json.dumps([round(float(d), 6) for d in deviation]) + "\n")
    return deviation


def _calibration(place: Path, members: list[str]) -> float:
    """Median ratio of the largest force error of an atom (first member) to the deviation, on the validation frames."""
    file = place / "calibration.json"
    if not file.is_file():
        frames = ase.io.read(place / "valid.xyz", ":")[:_CALIBRATION]
        deviation = committee_deviation(frames, members)
        first = open_labeler(members[0])
        errors = [np.linalg.norm(first.label(a).forces - a.arrays["REF_forces"], axis=1).max() for a in frames]
        ratio = float(np.median(np.array(errors) / np.maximum(deviation, 1e-6)))
        write_text(file, json.dumps({"frames": len(frames), "error_over_deviation": ratio}) + "\n")
    return float(json.loads(file.read_text())["error_over_deviation"])


def _errors(place: Path, frames: list[ase.Atoms], member: str) -> dict[str, float]:
    """Errors of the first member on the frames that it had not seen when they were made."""
    file = place / "errors.json"
    if not file.is_file():
        labeler = open_labeler(member)
        found = [labeler.label(a) for a in frames]
        de = np.array([f.energy - a.info["REF_energy"] for f, a in zip(found, frames, strict=True)])
        atoms = np.array([len(a) for a in frames])
        df = np.concatenate([f.forces - a.arrays["REF_forces"] for f, a in zip(found, frames, strict=True)])
        row = {"mae_e": 1e3 * float(np.abs(de / atoms).mean()), "mae_f": 1e3 * float(np.abs(df).mean())}
        write_text(file, json.dumps(row) + "\n")
    content: dict[str, float] = json.loads(file.read_text())
    return content


def _write(path: Path, frames: list[ase.Atoms]) -> None:
    with atomic_path(path) as temporary:
        ase.io.write(temporary, frames, format="extxyz", write_results=False)
