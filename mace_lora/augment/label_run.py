"""One run of labelling: what is written, what is under way, and whose fault a dead worker was."""

from __future__ import annotations

import concurrent.futures
import io
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase
from ase.io.extxyz import write_extxyz

from .executors import open_executor
from .journal import Journal, frame_key
from .worker import Result, Task, label_frames

__all__ = ["LabelReport", "LabelRun"]

_CHUNK_SECONDS = 0.5  # tasks sent together should take this long, so that sending them costs nothing
_MAX_CHUNK = 64
_HOPELESS = 20  # so many failures and no success: something is wrong with the set-up


@dataclass
class LabelReport:
    """What a run did.

    Attributes:
        output, failed_file: files.
        labelled: frames labelled by this run; ``before``: by earlier ones.
        failed: frames without a label, of this and earlier runs; ``reasons``: the first few of this run.
        duplicates: input frames equal to an earlier one.
        relabelled: input frames that have an energy under the same key already; the output has the new one.
        others: frames in the output that are not in this run's input.
        wall, labeler: seconds this run took, and seconds spent in the labeler by all workers.
        workers: processes.
    """

    output: Path
    failed_file: Path
    labelled: int = 0
    before: int = 0
    failed: int = 0
    duplicates: int = 0
    relabelled: int = 0
    others: int = 0
    wall: float = 0.0
    labeler: float = 0.0
    workers: int = 1
    reasons: tuple[str, ...] = ()

    @property
    def done(self) -> int:
        """Frames that are settled: labelled, failed, or a duplicate."""
        return self.labelled + self.before + self.failed + self.duplicates


class LabelRun:
    """State of one run: what is written, what is under way."""

    def __init__(
        self, name: str, identity: str, prefix: str, timeout: float | None, provenance: dict[str, Any], threads: int,
        done: Journal, failed: Journal, report: LabelReport, progress: Callable[[LabelReport], None] | None,
    ) -> None:  # fmt: skip
        self.settings = (name, prefix, timeout, provenance)
        self.name, self.identity = name, identity
        self.done, self.failed, self.report = done, failed, report
        self.threads, self.progress, self.start = threads, progress, time.perf_counter()
        self.seen: set[bytes] = set()
        self.lost: set[str] = set()
        self.hopeless = 0  # failures of this run

    def tasks(self, frames: Iterator[ase.Atoms], retry_failed: bool) -> Iterator[Task]:
        """Frames that have no label yet."""
        energy = f"{self.settings[1]}_energy"
        for index, atoms in enumerate(frames):
            self.report.relabelled += energy in atoms.info
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

        When a process dies, the frames under way are tried again one by one in another one, and the caller goes on
        with a new pool. Frames that a cluster lost are sent again once, one by one.
        """
        under_way: dict[concurrent.futures.Future[list[Result]], list[Task]] = {}
        again: list[Task] = []
        size, broken = 1, False
        while True:
            while not broken and len(under_way) < 2 * workers:
                chunk = [again.pop()] if again else list(itertools.islice(tasks, size))
                if not chunk:
                    break
                try:
                    under_way[pool.submit(label_frames, chunk, *self.settings)] = chunk
                except BrokenProcessPool:
                    under_way[_broken()] = chunk
            if not under_way:
                self.one_by_one(again)
                return
            finished, _ = concurrent.futures.wait(under_way, return_when=concurrent.futures.FIRST_COMPLETED)
            suspects: list[Task] = []
            for future in finished:
                chunk, error = under_way.pop(future), future.exception()
                if error is None:
                    results = future.result()
                    self.settle(chunk, results)
                    mean = sum(r.seconds for r in results) / len(results)
                    size = max(1, min(_MAX_CHUNK, int(_CHUNK_SECONDS / max(mean, 1e-4))))
                elif isinstance(error, BrokenProcessPool):
                    suspects, broken = suspects + chunk, True
                elif chunk[0].key in self.lost:
                    self.settle(chunk, [_lost(task, f"no result, twice ({error})") for task in chunk])
                else:
                    again += chunk
                    self.lost.update(task.key for task in chunk)
            self.one_by_one(suspects)

    def one_by_one(self, tasks: list[Task]) -> None:
        """Label frames in a process of their own, one at a time; its death tells whose fault it was."""
        rest = list(tasks)
        while rest:
            with open_executor(None, 1, self.threads) as (pool, _):
                while rest:
                    task = rest.pop(0)
                    try:
                        self.settle([task], pool.submit(label_frames, [task], *self.settings).result())
                    except BrokenProcessPool as err:
                        limit = self.settings[2]
                        why = "crashed" if limit is None else f"crashed or hung for more than {limit:g} s"
                        self.settle([task], [_lost(task, f"the labeler's process {why} ({err})")])
                        break

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
            self.hopeless += 1
            if not self.done.keys and self.hopeless >= _HOPELESS:
                raise ValueError(
                    f"{self.name}: the first {_HOPELESS} frames all failed, the last with: {result.error}. Their list "
                    f"is in {self.failed.path}"
                )
        self.tell()

    def tell(self) -> None:
        self.report.wall = time.perf_counter() - self.start
        if self.progress is not None:
            self.progress(self.report)


def _lost(task: Task, why: str) -> Result:
    return Result(task.key, task.index, "", why, 0.0)


def _broken() -> concurrent.futures.Future[list[Result]]:
    future: concurrent.futures.Future[list[Result]] = concurrent.futures.Future()
    future.set_exception(BrokenProcessPool("the pool has lost a process"))
    return future


def _failed_text(task: Task, error: str) -> str:
    frame = task.atoms.copy()
    frame.calc = None
    frame.info |= {"label_key": task.key, "label_error": error.replace('"', "'"), "input_index": task.index}
    buffer = io.StringIO()
    write_extxyz(buffer, [frame], write_results=False)
    return buffer.getvalue()
