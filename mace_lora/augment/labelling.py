"""Label frames in parallel; a stopped run continues where it was."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import ase
import ase.io

from mace_lora.atomic import DISK_FULL

from .executors import open_executor
from .journal import Journal, require_ours
from .label_run import LabelReport, LabelRun
from .labelers import open_labeler

__all__ = ["LabelReport", "label"]


def label(
    frames: str | Path | Iterable[ase.Atoms],
    output: str | Path,
    with_: str,
    *,
    workers: int = 1,
    threads: int = 1,
    executor: str | None = None,
    prefix: str = "REF",
    timeout: float | None = None,
    retry_failed: bool = False,
    tasks_per_worker: int | None = None,
    progress: Callable[[LabelReport], None] | None = None,
) -> LabelReport:
    """Label frames with energies (eV), forces (eV/Å) and, where periodic, stress (eV/Å^3).

    Results are appended to ``OUTPUT.partial`` as they come and become ``output`` when all frames are settled.
    Frames are identified by content, so that a run continues after a kill, a crash or with more input.

    Args:
        frames: a file that ASE reads, or frames; read one by one.
        output: extxyz file to write, in order of completion; ``info['input_index']`` is the position in the input of
            the run that labelled the frame.
        with_: labeler, see :func:`mace_lora.augment.labelers.open_labeler`.
        workers: processes.
        threads: of each worker's linear algebra.
        executor: None, or ``parsl:FILE.py``.
        prefix: of the labels' keys; letters, digits and _.
        timeout: seconds a frame may take.
        retry_failed: try frames again that failed in an earlier run.
        tasks_per_worker: renew a worker after so many chunks.
        progress: called with the report whenever frames are settled.

    Returns:
        the report.

    Raises:
        ValueError: unknown labeler, unreadable input, another run into the same output, or every frame fails.
        OSError: the disk is full; finished frames are kept.
    """
    if workers < 1 or threads < 1:
        raise ValueError(f"workers, threads: expected at least 1, got {workers} and {threads}")
    if timeout is not None and timeout <= 0:
        raise ValueError(f"timeout: expected seconds > 0, got {timeout}")
    if executor is not None and threads != 1:
        raise ValueError(f"threads: with an executor its own configuration sets them, got threads={threads} as well")
    if not re.fullmatch(r"[A-Za-z]\w*", prefix, re.ASCII):
        raise ValueError(f"prefix: expected a letter, then letters, digits or _, got {prefix!r}")
    if isinstance(frames, str | Path) and not Path(frames).is_file():
        raise FileNotFoundError(f"no file {frames}")
    labeler = open_labeler(with_)  # fails before anything is started
    source = " ".join([labeler.level, *(f"{k} {v}" for k, v in labeler.versions.items())])
    provenance = {"label_source": source, "label_name": labeler.identity, "label_units": "eV, eV/Å, eV/Å^3"}
    provenance["label_prefix"] = prefix
    output = Path(output)
    partial, failed_file = output.with_name(f"{output.name}.partial"), output.with_suffix(f".failed{output.suffix}")
    for path in (output, partial, failed_file):
        if path.is_dir():
            raise ValueError(f"output: expected a file, got the folder {path}")
    source_file = Path(frames).resolve() if isinstance(frames, str | Path) else None
    if source_file in {p.resolve() for p in (output, partial, failed_file)}:
        raise ValueError(f"output: {frames} is the input as well; choose another output")
    for path in (output, partial):
        _check_owner(path, labeler.identity, prefix)
    require_ours(output)
    report = LabelReport(output, failed_file, workers=workers)
    start = time.perf_counter()
    with Journal(failed_file) as failed, _unfinished(output, partial) as done:
        if retry_failed:
            failed.clear()
        run = LabelRun(with_, labeler.identity, prefix, timeout, provenance, threads, done, failed, report, progress)
        try:
            tasks = run.tasks(iter_frames(frames), retry_failed)
            while (first := next(tasks, None)) is not None:  # the pool starts when there is something to do
                with open_executor(executor, workers, threads, tasks_per_worker) as (pool, count):
                    run.drain(itertools.chain([first], tasks), pool, count)
        except OSError as err:
            if err.errno not in DISK_FULL:
                raise
            safe = f"{len(done.keys)} labelled frames are safe in {partial}: make room and run again"
            raise OSError(err.errno, f"{err.strerror}; {safe}") from err
        finally:
            for journal in (done, failed):
                if not journal.size:
                    journal.path.unlink()
        if not done.keys:
            raise ValueError(_nothing(with_, report, source_file))
        report.others = len(done.keys) - report.labelled - report.before
        partial.replace(output)
    report.wall = time.perf_counter() - start
    return report


def _nothing(name: str, report: LabelReport, source: Path | None) -> str:
    """Why there is no label."""
    if not report.failed:
        return f"frames: expected at least one in {source or 'the list'}, got none"
    why = report.reasons[0] if report.reasons else "in an earlier run; --retry-failed tries them again"
    return f"{name}: all {report.failed} frames failed, see {report.failed_file}; {why}"


def _unfinished(output: Path, partial: Path) -> Journal:
    """The frames labelled so far; a finished output is continued, since more frames may have come."""
    if output.exists() and not partial.exists():
        output.replace(partial)
    return Journal(partial)


def _check_owner(path: Path, name: str, prefix: str) -> None:
    """Labels of two methods, or under two names, must not end up in one file."""
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open(errors="replace") as handle:
        head, comment = handle.readline(), handle.readline()
    if head.strip().isdigit() and not comment.endswith("\n"):
        return  # torn within the first frame
    found = re.search(r'label_name=(?:"([^"]*)"|(\S+))', comment)
    owner = (found.group(1) or found.group(2)) if found else None
    if owner != name:
        holds = f"labels of {owner}" if owner else "frames that equitune label did not write"
        raise ValueError(f"output: {path} holds {holds}, not of {name}; choose another output")
    named = re.search(r'label_prefix="?([^"\s]+)', comment)
    if named.group(1) != prefix if named else not re.search(rf"(?<!\S){re.escape(prefix)}_energy=", comment):
        raise ValueError(f"prefix: {path} holds labels under another prefix than {prefix!r}; choose another output")


def iter_frames(frames: str | Path | Iterable[ase.Atoms]) -> Iterator[ase.Atoms]:
    """Frames one by one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read to its end; the frame's number is given.
    """
    if not isinstance(frames, str | Path):
        yield from frames
        return
    path, count = Path(frames), 0
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if path.suffix in (".xyz", ".extxyz") and _cut_in_a_number(path):
        raise ValueError(
            f"{path}: its last line has no line end: the file is truncated or damaged there, perhaps inside a number; "
            "if it is complete, add a line end"
        )
    try:
        for atoms in ase.io.iread(path, ":"):
            yield atoms
            count += 1
    except Exception as err:  # ASE's readers raise whatever their parsing runs into
        raise ValueError(
            f"{path}: frame {count} (counted from 0) cannot be read ({type(err).__name__}: {err}); the file is "
            "truncated or damaged there"
        ) from err


def _cut_in_a_number(path: Path) -> bool:
    """Whether the last line has no end and its last number fewer digits than the one above."""
    with path.open("rb") as handle:
        size = handle.seek(0, 2)
        handle.seek(max(0, size - 4096))
        lines = handle.read().split(b"\n")
    if not lines[-1]:
        return False
    above, last = (lines[-2] if len(lines) > 1 else b"").split(), lines[-1].split()
    digits = [line[-1].partition(b".")[2] if line else b"" for line in (above, last)]
    return len(above) != len(last) or len(digits[0]) != len(digits[1])
