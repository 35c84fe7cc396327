"""Label frames in parallel; a stopped run continues where it was."""

from __future__ import annotations

import concurrent.futures
import errno
import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase
import ase.io

from .executors import open_executor
from .journal import Journal, frame_key
from .labelers import open_labeler
from .worker import Result, Task, label_frames

__all__ = ["LabelReport", "label"]

_CHUNK_SECONDS = 0.5  # tasks sent together should take this long, so that sending them costs nothing
_MAX_CHUNK = 64
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_HOPELESS = 20  # so many failures and no success: something is wrong with the set-up


@dataclass
class LabelReport:
    """What a run did.

    Attributes:
        output, failed_file: files.
        labelled: frames labelled by this run; ``before``: by earlier ones.
        failed: frames without a label, of this and earlier runs; ``reasons``: the first few of this run.
        duplicates: input frames equal to an earlier one.
        wall, labeler: seconds this run took, and seconds spent in the labeler by all workers.
        workers: processes.
    """

    output: Path
    failed_file: Path
    labelled: int = 0
    before: int = 0
    failed: int = 0
    duplicates: int = 0
    wall: float = 0.0
    labeler: float = 0.0
    workers: int = 1
    reasons: tuple[str, ...] = ()

    @property
    def done(self) -> int:
        """Frames that are settled: labelled, failed, or a duplicate."""
        return self.labelled + self.before + self.failed + self.duplicates


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
        output: extxyz file to write, in order of completion; ``info['input_index']`` has the input's order.
        with_: labeler, see :func:`mace_lora.augment.labelers.open_labeler`.
        workers: processes.
        threads: of each worker's linear algebra.
        executor: None, or ``parsl:FILE.py``.
        prefix: of the labels' keys.
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
    if isinstance(frames, str | Path) and not Path(frames).is_file():
        raise FileNotFoundError(f"no file {frames}")
    labeler = open_labeler(with_)  # fails before anything is started
    source = " ".join([labeler.level, *(f"{k} {v}" for k, v in labeler.versions.items())])
    provenance = {"label_source": source, "label_name": labeler.identity, "label_units": "eV, eV/Å, eV/Å^3"}
    output = Path(output)
    partial, failed_file = output.with_name(f"{output.name}.partial"), output.with_suffix(f".failed{output.suffix}")
    for path in (output, partial):
        _check_owner(path, labeler.identity)
    if output.exists() and not partial.exists():
        output.replace(partial)  # more frames may have come
    if retry_failed:
        failed_file.unlink(missing_ok=True)
    report = LabelReport(output, failed_file, workers=workers)
    start = time.perf_counter()
    with Journal(partial) as done, Journal(failed_file) as failed:
        run = _Run(with_, labeler.identity, prefix, timeout, provenance, done, failed, report, progress, start)
        stream = iter_frames(frames)
        try:
            tasks = run.tasks(stream, retry_failed)
            first = next(tasks, None)
            while first is not None:
                with open_executor(executor, workers, threads, tasks_per_worker) as (pool, count):
                    run.drain(itertools.chain([first], tasks), pool, count)
                first = next(tasks, None)
        except OSError as err:
            if err.errno not in _DISK:
                raise
            raise OSError(
                err.errno,
                f"{err.strerror}; {len(done.keys)} labelled frames are safe in {partial}: make room and run again",
            ) from err
        finally:
            if not failed.size:
                failed_file.unlink()
    partial.replace(output)
    report.wall = time.perf_counter() - start
    return report


def _check_owner(path: Path, name: str) -> None:
    """Labels of two methods must not end up in one file."""
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open(errors="replace") as handle:
        handle.readline()
        comment = handle.readline()
    if not comment.endswith("\n"):
        return  # torn within the first frame
    found = re.search(r'label_name=(?:"([^"]*)"|(\S+))', comment)
    owner = (found.group(1) or found.group(2)) if found else None
    if owner != name:
        holds = f"labels of {owner}" if owner else "frames that equitune label did not write"
        raise ValueError(f"output: {path} holds {holds}, not of {name}; choose another output")


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
    try:
        for atoms in ase.io.iread(path, ":"):
            yield atoms
            count += 1
    except Exception as err:  # ASE's readers raise whatever their parsing runs into
        raise ValueError(
            f"{path}: frame {count} (counted from 0) cannot be read ({type(err).__name__}: {err}); the file is "
            "truncated or damaged there"
        ) from err


class _Run:
    """State of one run: what is written, what is under way."""

    def __init__(
        self, name: str, identity: str, prefix: str, timeout: float | None, provenance: dict[str, Any], done: Journal,
        failed: Journal, report: LabelReport, progress: Callable[[LabelReport], None] | None, start: float,
    ) -> None:  # fmt: skip
        self.settings = (name, prefix, timeout, provenance)
        self.name, self.identity = name, identity
        self.done, self.failed, self.report = done, failed, report
        self.progress, self.start = progress, start
        self.seen: set[bytes] = set()

    def tasks(self, frames: Iterator[ase.Atoms], retry_failed: bool) -> Iterator[Task]:
        """Frames that have no label yet."""
        for index, atoms in enumerate(frames):
            key = frame_key(atoms, self.identity)
            own = bytes.fromhex(key)
            if own in self.seen:
                self.report.duplicates += 1
            elif key in self.done:
                self.report.before += 1
            elif key in self.failed and not retry_failed:
                self.report.failed += 1
            else:
                self.seen.add(own)
                yield Task(key, index, atoms)
                continue
            self.seen.add(own)
            self.tell()

    def drain(self, tasks: Iterator[Task], pool: concurrent.futures.Executor, workers: int) -> None:
        """Keep the workers busy until the tasks or the pool are at their end.

        When a worker dies, its frames are tried again one by one in processes of their own, and the caller goes on
        with a new pool.
        """
        under_way: dict[concurrent.futures.Future[list[Result]], list[Task]] = {}
        size, broken = 1, False
        while True:
            while not broken and len(under_way) < 2 * workers:
                chunk = list(itertools.islice(tasks, size))
                if not chunk:
                    break
                try:
                    under_way[pool.submit(label_frames, chunk, *self.settings)] = chunk
                except BrokenProcessPool:
                    under_way[_broken()] = chunk
            if not under_way:
                return
            finished, _ = concurrent.futures.wait(under_way, return_when=concurrent.futures.FIRST_COMPLETED)
            suspects: list[Task] = []
            for future in finished:
                chunk = under_way.pop(future)
                if future.exception() is None:
                    results = future.result()
                    self.settle(chunk, results)
                    mean = sum(r.seconds for r in results) / len(results)
                    size = max(1, min(_MAX_CHUNK, int(_CHUNK_SECONDS / max(mean, 1e-4))))
                else:
                    suspects += chunk
                    broken = broken or isinstance(future.exception(), BrokenProcessPool)
            for task in suspects:
                self.alone(task)
            if broken and not under_way:
                return

    def alone(self, task: Task) -> None:
        """Label one frame in a process of its own, whose death tells whose fault it was."""
        with open_executor(None, 1, 1) as (pool, _):
            try:
                results = pool.submit(label_frames, [task], *self.settings).result()
            except Exception as err:
                limit = self.settings[2]
                why = "crashed" if limit is None else f"crashed or hung for more than {limit:g} s"
                results = [Result(task.key, task.index, "", f"the labeler's process {why} ({err})", 0.0)]
        self.settle([task], results)

    def settle(self, chunk: list[Task], results: list[Result]) -> None:
        """Write labels and failures."""
        for task, result in zip(chunk, results, strict=True):
            self.report.labeler += result.seconds
            if result.text and result.key not in self.done:
                self.done.append(result.text, result.key)
                self.report.labelled += 1
            if result.text:
                continue
            self.report.failed += 1
            self.report.reasons = (*self.report.reasons, f"frame {task.index}: {result.error}")[:5]
            self.failed.append(_failed_text(task, result.error), result.key)
            if self.report.labelled + self.report.before == 0 and self.report.failed >= _HOPELESS:
                raise ValueError(
                    f"{self.name}: the first {_HOPELESS} frames all failed, the last with: {result.error}. Their list "
                    f"is in {self.failed.path}"
                )
        self.tell()

    def tell(self) -> None:
        self.report.wall = time.perf_counter() - self.start
        if self.progress is not None:
            self.progress(self.report)


def _broken() -> concurrent.futures.Future[list[Result]]:
    future: concurrent.futures.Future[list[Result]] = concurrent.futures.Future()
    future.set_exception(BrokenProcessPool("the pool has lost a process"))
    return future


def _failed_text(task: Task, error: str) -> str:
    import io

    from ase.io.extxyz import write_extxyz

    frame = task.atoms.copy()
    frame.calc = None
    frame.info |= {"label_key": task.key, "label_error": error.replace('"', "'"), "input_index": task.index}
    buffer = io.StringIO()
    write_extxyz(buffer, [frame], write_results=False)
    return buffer.getvalue()
