"""``equitune label``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mace_lora.console import console

from .journal import complete_frames
from .labelling import LabelReport, iter_frames
from .labelling import label as label_frames

__all__ = ["label"]

_QUIET = 60.0  # seconds between lines where there is no terminal for a bar


def _list(wanted: bool) -> None:
    if wanted:
        from .labelers import labeler_help

        console.print(labeler_help(), highlight=False, markup=False)
        raise typer.Exit


def label(
    frames: Annotated[Path, typer.Argument(help="frames, any format ASE reads (Å)")],
    output: Annotated[Path, typer.Option("--output", "-o", help="extxyz to write (eV, eV/Å, eV/Å³)")],
    with_: Annotated[str, typer.Option("--with", help="labeler; --labelers lists them")],
    workers: Annotated[int, typer.Option(min=1, help="processes")] = max(1, len(os.sched_getaffinity(0))),
    threads: Annotated[int, typer.Option(min=1, help="threads of each worker; not with --executor")] = 1,
    executor: Annotated[str | None, typer.Option(help="parsl:FILE.py, a file that defines a parsl.Config")] = None,
    prefix: Annotated[str, typer.Option(help="of the labels' keys: PREFIX_energy, PREFIX_forces")] = "REF",
    timeout: Annotated[float | None, typer.Option(help="seconds a frame may take; default no limit")] = None,
    retry_failed: Annotated[bool, typer.Option(help="try frames again that failed before")] = False,
    tasks_per_worker: Annotated[
        int | None, typer.Option(min=1, help="renew a worker after so many tasks, for programs that leak memory")
    ] = None,
    labelers: Annotated[bool, typer.Option("--labelers", is_eager=True, callback=_list, help="list them")] = False,
) -> None:
    """Label frames in parallel with a force field, a semi-empirical or DFT method, or a model.

    Stop it at any time: the same command goes on where it was. Failed frames and their reasons are in
    OUTPUT.failed.xyz. Charge and multiplicity are read from info['charge'] and info['spin'].
    """
    total = _count(frames)
    last: LabelReport | None = None
    said = 0.0
    columns = (
        TextColumn("labelling"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    try:
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=total, rate="")

            def show(report: LabelReport) -> None:
                nonlocal last, said
                last = report
                speed = report.labelled / max(report.wall, 1e-9)
                rate = f"{speed:.2f} frames/s" + (f", {report.failed} failed" if report.failed else "")
                bar.update(task, completed=report.done, rate=rate)
                if not console.is_terminal and report.wall - said > _QUIET:
                    said = report.wall
                    left = (total - report.done) / speed / 60 if speed else float("nan")
                    console.print(f"{report.done}/{total}, {rate}, {left:.1f} minutes left", highlight=False)

            report = label_frames(
                frames, output, with_, workers=workers, threads=threads, executor=executor, prefix=prefix,
                timeout=timeout, retry_failed=retry_failed, tasks_per_worker=tasks_per_worker, progress=show,
            )  # fmt: skip
    except KeyboardInterrupt:
        for line in _summary(last, threads)[:-1] if last is not None else []:
            console.print(line, highlight=False, markup=False)
        console.print(f"stopped; what is finished is in {output}.partial, the same command goes on from there")
        raise typer.Exit(130) from None
    for line in _summary(report, threads):
        console.print(line, highlight=False, markup=False)


def _count(frames: Path) -> int:
    """Number of frames, for the progress bar; of xyz files by lines alone."""
    if frames.suffix not in (".xyz", ".extxyz") or not frames.is_file():
        return sum(1 for _ in iter_frames(frames))
    with frames.open("rb") as handle:
        return sum(1 for _ in complete_frames(handle))


def _summary(report: LabelReport, threads: int) -> list[str]:
    lines: list[Any] = []
    if report.labelled:
        each = report.labeler / report.labelled
        lines.append(
            f"labelled {report.labelled} frames in {report.wall:.1f} s ({report.labelled / report.wall:.2f} frames/s, "
            f"{each:.3g} s each in the labeler, {report.labeler * threads / 3600:.2g} core-hours, "
            f"{report.workers} workers)"
        )
    if report.before:
        lines.append(f"{report.before} frames had their labels from an earlier run")
    if report.duplicates:
        lines.append(f"{report.duplicates} frames of the input repeat another one and were left out")
    if report.relabelled:
        lines.append(
            f"{report.relabelled} frames of the input have an energy under the same key; {report.output.name} has the "
            "new one (--prefix gives other keys)"
        )
    if report.others:
        lines.append(f"{report.others} more frames, labelled from other input, are in it as before")
    if report.failed:
        lines.append(f"{report.failed} frames failed, see {report.failed_file}:")
        lines += [f"  {reason}" for reason in report.reasons]
    return [*lines, f"written: {report.output}"]
