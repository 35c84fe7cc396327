"""Synthetic frames: made, labelled by the teacher, filtered."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import ase
import ase.io
import numpy as np

from mace_lora.atomic import atomic_path, write_text
from mace_lora.augment import committee_deviation, features, keep_sound, label, rattle, sample_md, strain, stretch_bond
from mace_lora.augment.perturb import bare
from mace_lora.augment.selection import unique

from .checks import Places, is_atom
from .config import Distillation, Filter, Synthetic

__all__ = ["label_frames", "make_frames", "select_frames"]

_HELD = 0.05  # of the synthetic frames, for validation of the pre-training
_HELD_MOST = 200


def make_frames(config: Distillation, teacher: str, place: Path) -> None:
    """Write ``sampled.xyz``: dynamics with the teacher and changed copies of the quantum training frames."""
    quantum: list[ase.Atoms] = [a for a in ase.io.read(config.train, ":") if not is_atom(a)]
    settings, dropped = config.synthetic, Counter[str]()
    frames: list[ase.Atoms] = []
    if settings.temperatures:
        which = np.unique(np.linspace(0, len(quantum) - 1, settings.starts).round().astype(int))
        trajectories = place / "md.xyz"
        if not trajectories.exists():
            lost = sample_md(
                [bare(quantum[i]) for i in which], trajectories, teacher, settings.schedules(),
                replicas=settings.replicas, seed=config.seed, workers=config.workers, keep_bonds=settings.keep_bonds,
            )  # fmt: skip
            write_text(place / "md_dropped.json", json.dumps(lost) + "\n")
        frames += ase.io.read(trajectories, ":")
        if (place / "md_dropped.json").is_file():
            dropped.update(json.loads((place / "md_dropped.json").read_text()))
    frames += keep_sound(_changed(quantum, settings, config.seed, dropped), dropped=dropped)
    write_frames(place / "sampled.xyz", [bare(a) for a in frames])
    write_text(place / "dropped.json", json.dumps(dropped) + "\n")


def _changed(
    quantum: Sequence[ase.Atoms], settings: Synthetic, seed: int, dropped: Counter[str]
) -> Iterator[ase.Atoms]:
    for index, atoms in enumerate(quantum):
        for kind, count in enumerate((settings.rattle, settings.strain, settings.stretch)):
            for copy in range(count):
                rng = np.random.default_rng([seed, index, kind, copy])
                if kind == 0:
                    yield rattle(atoms, settings.rattle_std, rng)
                elif kind == 1:
                    yield strain(atoms, settings.strain_largest, rng)
                else:
                    try:
                        yield stretch_bond(atoms, rng, settings.stretch_low, settings.stretch_high)
                    except ValueError:  # no bond, or all of them in rings
                        dropped["no bond to stretch"] += 1


def label_frames(sampled: Path, teacher: str, workers: int, place: Path) -> None:
    """Write ``labelled.xyz``: the frames with the teacher's energies and forces; ``lost.json``: what is not in it."""
    report = label(sampled, place / "labelled.xyz", teacher, workers=workers)
    lost = json.loads((sampled.parent / "dropped.json").read_text())
    if report.failed:
        lost["the teacher's label failed"] = report.failed
    write_text(place / "lost.json", json.dumps(lost) + "\n")


def select_frames(config: Distillation, labelled: Path, committee: Sequence[str], place: Path) -> None:
    """Write ``synthetic.xyz`` and ``synthetic_valid.xyz`` with what passes the filters, and ``counts.json``.

    Raises:
        ValueError: fewer than ten frames are left; why.
    """
    frames: list[ase.Atoms] = ase.io.read(labelled, ":")
    frames.sort(key=lambda a: int(a.info.get("input_index", 0)))
    dropped: dict[str, int] = {}
    count, deviation = len(frames), None
    if (config.filter.deviation or config.filter.noise) and len(committee) > 1:
        deviation = 1e3 * committee_deviation(frames, committee)
        keep = deviation <= (config.filter.deviation or np.inf)
        dropped["the committee disagrees"] = int((~keep).sum())
        if config.filter.noise is not None:
            size = [1e3 * float(np.sqrt((a.arrays["REF_forces"] ** 2).sum(1).mean())) for a in frames]
            clear = deviation <= config.filter.noise * np.array(size)
            dropped["more noise than force"] = int((keep & ~clear).sum())
            keep &= clear
        frames = [a for a, k in zip(frames, keep, strict=True) if k]
    held_out = {"test": ase.io.read(config.test, ":"), "validation": ase.io.read(config.valid, ":")}
    frames = _by_labels(frames, config.filter, dropped)
    source = _source(committee[0]) if committee else None
    for name, known in held_out.items():  # validation frames choose epoch and learning rate of all students
        frames = _not_among(frames, known, name, dropped)
    if config.filter.duplicates is not None and frames:
        if source is None:
            raise ValueError("filter: duplicates: needs the features of a MACE teacher; leave it out")
        found = unique(frames, features(frames, source), config.filter.duplicates)
        dropped["repetition"] = len(frames) - len(found)
        frames = [frames[i] for i in found]
    if len(frames) < 10:
        raise ValueError(
            f"filter: expected at least 10 synthetic frames to be left, got {len(frames)} of {count} "
            f"(dropped: {dropped})"
        )
    order = np.random.default_rng(config.seed).permutation(len(frames))
    held = min(_HELD_MOST, max(1, round(_HELD * len(frames))))
    write_frames(place / "synthetic_valid.xyz", [frames[i] for i in order[:held]])
    write_frames(place / "synthetic.xyz", [frames[i] for i in order[held:]])
    lost = labelled.parent / "lost.json"
    content = {
        "lost_before": json.loads(lost.read_text()) if lost.is_file() else {},
        "labelled": count, "dropped": dropped, "kept": len(frames), "for_validation": held,
        "median_deviation_meV_A": None if deviation is None else float(np.median(deviation)),
    }  # fmt: skip
    write_text(place / "counts.json", json.dumps(content, indent=1) + "\n")


def _by_labels(frames: list[ase.Atoms], limits: Filter, dropped: dict[str, int]) -> list[ase.Atoms]:
    """Frames within the windows of force and energy, whose forces add up to nothing."""
    if limits.net_force is not None:
        kept = [
            a for a in frames
            if 1e3 * np.linalg.norm(a.arrays["REF_forces"].sum(0)) <= limits.net_force * len(a)
        ]  # fmt: skip
        dropped["net force"], frames = len(frames) - len(kept), kept
    if limits.force is not None:
        kept = [a for a in frames if np.linalg.norm(a.arrays["REF_forces"], axis=1).max() <= limits.force]
        dropped["large force"], frames = len(frames) - len(kept), kept
    if limits.energy is not None:
        lowest: dict[str, float] = {}  # of the same level: another one has another zero
        for a in frames:
            formula = a.get_chemical_formula()
            lowest[formula] = min(lowest.get(formula, np.inf), float(a.info["REF_energy"]))
        kept = [
            a for a in frames
            if a.info["REF_energy"] - lowest.get(a.get_chemical_formula(), np.inf) <= limits.energy * len(a)
        ]  # fmt: skip
        dropped["high energy"], frames = len(frames) - len(kept), kept
    return frames


def _not_among(frames: list[ase.Atoms], known: list[ase.Atoms], name: str, dropped: dict[str, int]) -> list[ase.Atoms]:
    """Frames that are none of the known ones, moved, turned or renumbered."""
    places = Places()
    for atoms in known:
        places.add(atoms, name)
    kept = [a for a in frames if is_atom(a) or places.find(a) is None]
    dropped[f"equal to a {name} frame"] = len(frames) - len(kept)
    return kept


def _source(teacher: str) -> str | None:
    """What :func:`mace_lora.augment.features` takes for a teacher; None where it has no features."""
    kind, _, file = teacher.partition(":")
    return file.partition("+")[0] if kind == "mace" else None


def write_frames(path: Path, frames: Sequence[ase.Atoms]) -> None:
    """Write frames without results of calculators, atomically."""
    with atomic_path(path) as temporary:
        ase.io.write(temporary, frames, format="extxyz", write_results=False)
