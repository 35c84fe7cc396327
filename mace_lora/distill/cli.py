"""``equitune distill``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mace_lora.console import console

__all__ = ["distill"]


def distill(
    config: Annotated[Path, typer.Argument(help="YAML file, e.g. recipes/configs/distill.yaml")],
    check: Annotated[bool, typer.Option("--check", help="only check the config and its files")] = False,
) -> None:
    """Make a fast, accurate student of a foundation model from few quantum labels.

    A foundation model is adapted to the quantum labels, makes and labels synthetic frames, the student is pre-trained
    on those and fine-tuned on the quantum labels; all are compared on test frames in report.md. Stopped, the same
    command goes on; stages whose inputs did not change are not run again.
    """
    from .config import read_config

    settings = read_config(config)
    if check:
        console.print(f"{config}: sound; nothing was run")
        return
    from .pipeline import run
    from .report import verdict, write_report

    outcome = run(settings, lambda line: console.print(line, highlight=False))
    report = write_report(settings, outcome)
    console.print(verdict(outcome), highlight=False)
    console.print(f"student: {outcome.fits['finetune'].model}", highlight=False)
    console.print(f"written: {report}, beside it JSON and plots", highlight=False)
