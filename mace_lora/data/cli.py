"""``equitune check``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mace_lora.console import console, print_json

from .check import check_frames

__all__ = ["check"]

_STYLE = {"error": "red", "warning": "yellow", "info": "dim"}


def check(
    frames: Annotated[Path, typer.Argument(help="labelled frames, any format ASE reads")],
    energy_key: Annotated[str, typer.Option(help="energy label (eV) in the frame's info")] = "REF_energy",
    forces_key: Annotated[str, typer.Option(help="force labels (eV/Å) in the frame's arrays")] = "REF_forces",
    stress_key: Annotated[str, typer.Option(help="stress label (eV/Å³) in the frame's info, if any")] = "REF_stress",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Look for what is wrong with a data set before anything is trained on it.

    Missing keys, NaN, units (also by comparing energies with the work of the forces), duplicates, periodicity,
    outliers with their frame numbers. Ends with exit code 1 when there are errors.
    """
    from mace_lora.augment.labelling import iter_frames

    findings = check_frames(list(iter_frames(frames)), energy_key, forces_key, stress_key)
    if as_json:
        print_json([asdict(f) for f in findings])
    else:
        for f in findings:
            which = f"; frames {', '.join(map(str, f.frames))}" if f.frames else ""
            remedy = f" -> {f.remedy}" if f.remedy else ""
            console.print(f"[{_STYLE[f.severity]}]{f.severity:8s}[/] {f.what}{which}{remedy}", highlight=False)
    errors = sum(f.severity == "error" for f in findings)
    warnings = sum(f.severity == "warning" for f in findings)
    if not as_json:
        console.print(f"{frames}: {errors} errors, {warnings} warnings", highlight=False)
    if errors:
        raise typer.Exit(1)
