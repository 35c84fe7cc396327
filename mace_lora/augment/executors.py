"""Where labels are computed: processes of this machine, or a cluster through Parsl."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

from .worker import prepare

__all__ = ["open_executor"]

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@contextlib.contextmanager
def open_executor(
    spec: str | None, workers: int, threads: int, tasks_per_worker: int | None = None
) -> Iterator[tuple[concurrent.futures.Executor, int]]:
    """An executor and its number of workers.

    Args:
        spec: None for processes here; ``parsl:FILE.py`` for a file that defines ``config``, a ``parsl.Config``.
        workers: number of processes; for Parsl the number of tasks kept in flight comes from its config.
        threads: of each worker.
        tasks_per_worker: renew processes after this many tasks, against leaking programs.

    Raises:
        ValueError: unknown kind, or the file defines no ``config``.
        FileNotFoundError: no such file.
    """
    if spec is None:
        # threads are read when a library is loaded, so they are set for the children from their start
        saved = {name: os.environ.get(name) for name in _THREADS}
        os.environ.update(dict.fromkeys(_THREADS, str(threads)))
        pool = concurrent.futures.ProcessPoolExecutor(
            workers, mp_context=multiprocessing.get_context("spawn"), initializer=prepare,
            initargs=(threads, os.getpid()),
            max_tasks_per_child=tasks_per_worker,
        )  # fmt: skip
        try:
            yield pool, workers
        finally:
            _end(pool)
            for name, value in saved.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        return
    kind, _, file = spec.partition(":")
    if kind != "parsl" or not file:
        raise ValueError(f"--executor: expected parsl:FILE.py, got {spec!r}")
    if not Path(file).is_file():
        raise FileNotFoundError(f"--executor: no file {file}")
    try:
        from parsl.concurrent import ParslPoolExecutor
    except ImportError as err:
        raise ValueError("--executor parsl: it needs parsl; pip install parsl") from err
    config = runpy.run_path(file).get("config")
    if config is None or type(config).__name__ != "Config":
        raise ValueError(f"--executor: {file} must define 'config', a parsl.Config, got {type(config).__name__}")
    programs = str(Path(sys.executable).parent)  # Parsl starts its own by name
    if programs not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = programs + os.pathsep + os.environ["PATH"]
    with ParslPoolExecutor(config=config) as parsl_pool:
        yield parsl_pool, workers


def _end(pool: concurrent.futures.ProcessPoolExecutor) -> None:
    """Stop at once: what is under way is done again by the next run."""
    processes = list((getattr(pool, "_processes", None) or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(5.0)
