"""A stage in a process of its own, which ends with ours."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = ["run_child"]

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def run_child(command: Sequence[str], env: Mapping[str, str] | None = None, pass_fds: Sequence[int] = ()) -> int:
    """Run a command to its end.

    Where this process is terminated or interrupted the command is terminated and waited for; where this one is killed
    outright, Linux terminates the command.

    Args:
        command: program and arguments.
        env: its environment; default ours.
        pass_fds: file descriptors that it keeps open.

    Returns:
        its exit code.
    """
    with _termination_as_exit():
        process = subprocess.Popen(command, env=env, pass_fds=tuple(pass_fds), preexec_fn=_bound_to(os.getpid()))
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise


def _bound_to(parent: int) -> Callable[[], None] | None:
    """For the child before it becomes the command: SIGTERM when the parent dies."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)

    def bind() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died in between
            os._exit(143)

    return bind


@contextmanager
def _termination_as_exit() -> Iterator[None]:
    """SIGTERM as an exception, unless somebody else handles it already."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
