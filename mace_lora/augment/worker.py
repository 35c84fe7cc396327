"""What runs in a worker process: label a few frames, one after the other."""

from __future__ import annotations

import faulthandler
import io
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import ase
import numpy as np

__all__ = ["Result", "Task", "label_frames", "prepare"]

_LABELERS: dict[str, Any] = {}
_GRACE = 5.0  # seconds after which a hanging compiled program takes its process down


@dataclass(frozen=True)
class Task:
    """A frame to label.

    Attributes:
        key: identity of frame and labeler.
        index: position in the input.
        atoms: the frame.
    """

    key: str
    index: int
    atoms: ase.Atoms


@dataclass(frozen=True)
class Result:
    """A labelled frame as extxyz text, or the reason why there is none.

    Attributes:
        key, index: of the task.
        text: extxyz, "" on failure.
        error: reason of a failure, "" otherwise.
        seconds: wall time of the labeler.
    """

    key: str
    index: int
    text: str
    error: str
    seconds: float


def prepare(threads: int, parent: int) -> None:
    """Set up a worker: threads, Ctrl-C left to the main process, end when that one has gone.

    Args:
        threads: for the linear algebra of one worker.
        parent: process that started this one; it may be gone before we get here.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def label_frames(
    tasks: list[Task], labeler: str, prefix: str, timeout: float | None, provenance: dict[str, Any]
) -> list[Result]:
    """Label frames; a failure of one does not touch the others.

    Args:
        tasks: frames.
        labeler: name, see :func:`mace_lora.augment.labelers.open_labeler`.
        prefix: of the keys, e.g. ``REF`` for ``REF_energy``.
        timeout: seconds for a frame; None for no limit.
        provenance: written to every frame's ``info``.
    """
    if labeler not in _LABELERS:
        from .labelers import open_labeler

        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        _LABELERS[labeler] = open_labeler(labeler)
    return [_one(task, _LABELERS[labeler], prefix, timeout, provenance) for task in tasks]


def _one(task: Task, labeler: Any, prefix: str, timeout: float | None, provenance: dict[str, Any]) -> Result:
    start = time.perf_counter()
    seconds = None
    try:
        with _TimeLimit(timeout):
            labels = labeler.label(task.atoms)
        seconds = time.perf_counter() - start
        error, text = "", _extxyz(task, labels, prefix, provenance)
    except KeyboardInterrupt:
        raise
    except Exception as err:  # any program's own exceptions; the reason goes to the failed frames
        error, text = f"{type(err).__name__}: {err}".replace("\n", " ")[:500], ""
    return Result(task.key, task.index, text, error, time.perf_counter() - start if seconds is None else seconds)


class _TimeLimit:
    """Raise TimeoutError in Python code; end the process where a compiled program does not return."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.alarm = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> None:
        if self.seconds is None:
            return
        if self.alarm:
            self.before = signal.signal(signal.SIGALRM, self._raise)
            signal.setitimer(signal.ITIMER_REAL, self.seconds)
        faulthandler.dump_traceback_later(self.seconds + _GRACE, exit=True, file=2)

    def __exit__(self, *exception: object) -> None:
        if self.seconds is None:
            return
        faulthandler.cancel_dump_traceback_later()
        if self.alarm:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, self.before)

    def _raise(self, number: int, frame: Any) -> None:
        raise TimeoutError(f"no result within {self.seconds:g} s")


def _extxyz(task: Task, labels: Any, prefix: str, provenance: dict[str, Any]) -> str:
    from ase.io.extxyz import write_extxyz

    frame = task.atoms.copy()
    frame.calc = None
    for name in ("energy", "forces", "stress", "free_energy"):  # ASE's own names would be taken for results
        frame.info.pop(name, None)
        frame.arrays.pop(name, None)
    frame.info.update(provenance)
    frame.info |= {"input_index": task.index, "label_key": task.key, f"{prefix}_energy": labels.energy}
    frame.arrays[f"{prefix}_forces"] = np.asarray(labels.forces)
    frame.info.pop(f"{prefix}_stress", None)
    if labels.stress is not None:
        frame.info[f"{prefix}_stress"] = np.asarray(labels.stress)
    buffer = io.StringIO()
    write_extxyz(buffer, [frame], write_results=False)
    return buffer.getvalue()
