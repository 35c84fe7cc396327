"""The report of a distillation: Markdown with plots, JSON."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np

from mace_lora.atomic import atomic_path, write_text
from mace_lora.evaluate.machine import machine
from mace_lora.evaluate.metrics import Predictions
from mace_lora.evaluate.plots import parity

from .config import Distillation
from .pipeline import Fit, Outcome

__all__ = ["comparison", "verdict", "write_report"]

_NAMES = {
    "teacher": "teacher", "pretrain": "student, synthetic labels only", "finetune": "student, two stages",
    "direct": "student, directly on the quantum labels",
}  # fmt: skip


def comparison(outcome: Outcome) -> dict[str, float]:
    """Two stages against direct training on the test frames.

    Returns:
        ``improvement_e``, ``improvement_f``: 1 - error / error of direct training (energies with constant offsets
        removed for both); ``direct_steps``, ``finetune_steps``: steps of the optimiser to the direct training's best
        validation force error (infinite where it is never reached); ``all_steps``: the latter with pre-training.
    """
    two, one = (outcome.evaluations[k] for k in ("finetune", "direct"))
    direct, finetune = outcome.fits["direct"], outcome.fits["finetune"]
    best = min(f for _, _, f in direct.curve)
    steps = {name: _steps_to(fit, best) for name, fit in (("direct", direct), ("finetune", finetune))}
    return {
        "improvement_e": 1 - two["mae_e_refit"] / one["mae_e_refit"],
        "improvement_f": 1 - two["errors"]["mae_f"] / one["errors"]["mae_f"],
        "direct_steps": steps["direct"], "finetune_steps": steps["finetune"],
        "all_steps": steps["finetune"] + outcome.fits["pretrain"].steps,
    }  # fmt: skip


def _steps_to(fit: Fit, error: float) -> float:
    """Steps of the optimiser until the validation force error is first as low; infinite where it never is."""
    epoch = next((n for n, _, f in fit.curve if f <= error), None)
    return float("inf") if epoch is None else (epoch + 1) * fit.steps / fit.epochs


def verdict(outcome: Outcome) -> str:
    """First line of the report."""
    if "direct" not in outcome.fits:
        return "Two-stage student (no direct training was asked for, so there is nothing to compare with)."
    c = comparison(outcome)
    e, f = 100 * c["improvement_e"], 100 * c["improvement_f"]
    if not np.isfinite(e):  # no energy labels
        better = f"force error {abs(f):.0f} % {'lower' if f > 0 else 'higher'}"
        return f"Two stages beat direct training: {better}." if f > 0 else f"WORSE THAN DIRECT TRAINING: {better}."
    raw = 1 - outcome.evaluations["finetune"]["errors"]["mae_e"] / outcome.evaluations["direct"]["errors"]["mae_e"]
    also = "" if raw > 0 else f" AS THEY ARE, ENERGIES ARE WORSE ({-100 * raw:.0f} %): a constant offset is left."
    if min(e, f) > 0:
        better = f"energy error {e:.0f} % lower (offsets removed), force error {f:.0f} % lower"
        return f"Two stages beat direct training: {better}.{also}"
    worse = " and ".join(f"{what} ({-x:.0f} % higher)" for what, x in (("energy", e), ("force", f)) if x <= 0)
    return f"WORSE THAN DIRECT TRAINING in the error of {worse}: use the directly trained student, or a better teacher."


def write_report(config: Distillation, outcome: Outcome) -> Path:
    """Write ``report.md``, ``report.json``, ``report_curves.png`` and ``report_parity.png``.

    Returns:
        the Markdown file.
    """
    curves, pairs = (config.folder / f"{config.report}_{what}.png" for what in ("curves", "parity"))
    counts = json.loads((outcome.synthetic / "counts.json").read_text())
    lines = [f"**{verdict(outcome)}**", "", f"Test: {outcome.evaluations['finetune']['frames']} quantum frames.", ""]
    lines += _table(outcome)
    if "direct" in outcome.fits:
        lines += ["", _iterations(outcome)]
    fidelity = outcome.fits["pretrain"].valid
    dropped, lost = (
        ", ".join(f"{v} {k}" for k, v in counts.get(key, {}).items() if v) or "none"
        for key in ("dropped", "lost_before")
    )
    lines += [
        "",
        f"Synthetic frames: {counts['kept']} of {counts['labelled']} labelled ones kept (dropped: {dropped}; lost in "
        f"sampling and labelling: {lost}). The pre-trained "
        f"student repeats the teacher's labels on {counts['for_validation']} held-out synthetic frames to "
        f"{fidelity[0]:.2f} meV/atom and {fidelity[1]:.1f} meV/Å; this is fidelity to the teacher, not accuracy.",
        "",
        *_rates(outcome),
        "",
        *_times(outcome),
        "",
        f"![curves]({curves.name}) ![parity]({pairs.name})\n\n{datetime.date.today()}, trained on "
        f"{config.device}, timed and evaluated on CPU, {machine()}, seed {config.seed}.",
    ]
    _curves(outcome.fits, curves)
    shown = {_NAMES[k]: _predictions(v["folder"]) for k, v in outcome.evaluations.items() if k != "pretrain"}
    parity(shown, pairs)
    content = {
        "verdict": verdict(outcome), "comparison": comparison(outcome) if "direct" in outcome.fits else None,
        "evaluations": outcome.evaluations, "ms_per_evaluation": outcome.speed, "synthetic": counts,
        "seconds": outcome.seconds,
        "fits": {k: {"model": str(v.model), "lr": v.lr, "steps": v.steps} for k, v in outcome.fits.items()},
    }  # fmt: skip
    write_text(config.folder / f"{config.report}.json", json.dumps(content, indent=1) + "\n")
    write_text(config.folder / f"{config.report}.md", "\n".join(lines) + "\n")
    return config.folder / f"{config.report}.md"


def _table(outcome: Outcome) -> list[str]:
    teacher = outcome.speed.get("teacher", float("nan"))
    lines = [
        "| model | E MAE (meV/atom) | E MAE, offsets removed | F MAE (meV/Å) | 95 % interval | ms per evaluation | "
        "speed over teacher |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, content in outcome.evaluations.items():
        e, (low, high) = content["errors"], content["intervals"]["mae_f"]
        ms = outcome.speed[key]
        lines.append(
            f"| {_NAMES[key]} | {e['mae_e']:.2f} | {content['mae_e_refit']:.2f} | {e['mae_f']:.1f} | "
            f"{low:.1f}–{high:.1f} | {ms:.1f} ({content['atoms']} atoms) | {teacher / ms:.1f} |"
        )
    return lines


def _iterations(outcome: Outcome) -> str:
    c = comparison(outcome)
    if not np.isfinite(c["finetune_steps"]):
        return "Fine-tuning never reaches the best validation force error of direct training."
    return (
        f"To the best validation force error of direct training: {c['direct_steps']:.0f} steps directly, "
        f"{c['finetune_steps']:.0f} steps of fine-tuning ({c['direct_steps'] / c['finetune_steps']:.1f} times fewer), "
        f"{c['all_steps']:.0f} with pre-training."
    )


def _rates(outcome: Outcome) -> list[str]:
    lines = ["| training | learning rates: validation score (geometric mean of E and F MAE) | steps |", "|---|---|---|"]
    for name, fit in outcome.fits.items():
        scores = ", ".join(
            f"**{lr:g}: {s:.2f}**" if lr == fit.lr else f"{lr:g}: {s:.2f}" for lr, s in fit.sweep.items()
        )
        lines.append(f"| {name} | {scores} | {fit.steps} |")
    return lines + [f"\n{note}" for note in _doubts(outcome.fits)]


def _doubts(fits: dict[str, Fit]) -> list[str]:
    """What a reader should know before the comparison is believed."""
    out = []
    for name, fit in fits.items():
        if len(fit.sweep) > 1 and fit.lr in (min(fit.sweep), max(fit.sweep)):
            further = fit.lr / 2 if fit.lr == min(fit.sweep) else 2 * fit.lr
            out.append(
                f"The best learning rate of {name} is at the edge of those tried: add {further:g} to "
                f"student.{name}.lrs."
            )
    if "direct" in fits and fits["direct"].steps < fits["finetune"].steps:
        out.append(
            f"Direct training had fewer steps ({fits['direct'].steps}) than fine-tuning ({fits['finetune'].steps}): "
            "raise student.direct.epochs for a fair comparison."
        )
    return out


def _times(outcome: Outcome) -> list[str]:
    lines = ["| stage | seconds (since its last start) |", "|---|---|"]
    return [*lines, *(f"| {name} | {seconds:.0f} |" for name, seconds in outcome.seconds.items())]


def _curves(fits: dict[str, Fit], path: Path) -> None:
    """Validation force error against steps of fine-tuning and direct training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.subplots()
    for key in ("direct", "finetune"):
        if key in fits:
            fit = fits[key]
            steps = [(epoch + 1) * fit.steps / fit.epochs for epoch, _, _ in fit.curve]
            axis.plot(steps, [f for _, _, f in fit.curve], label=_NAMES[key])
    axis.set(xlabel="steps on quantum labels", ylabel="validation F MAE (meV/Å)", yscale="log")
    axis.legend(fontsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def _predictions(folder: str) -> Predictions:
    values: Any = np.load(Path(folder) / "predictions.npz")
    return Predictions(**{k: values[k] for k in values.files})
