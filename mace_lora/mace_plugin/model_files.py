"""Model files of a run: written to a temporary name and renamed, so that none is ever half-written."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from mace_lora.atomic import atomic_path

from .protocol import SettingsError, current_run

__all__ = ["atomic_torch", "write_model"]


def write_model(content: Any, file: str | os.PathLike[str], save: Callable[..., None]) -> None:
    """Write a model file completely, or leave the old one.

    Raises:
        SettingsError: the disk is full or not writable.
    """
    try:
        with atomic_path(Path(file)) as temporary:
            save(content, temporary)
    except (OSError, RuntimeError) as err:  # torch reports a failed write as RuntimeError
        raise SettingsError(
            f"--model_dir: cannot write {file} ({err}); free some space, and give the same command with "
            "--restart_latest: training is done"
        ) from err


def atomic_torch(step: Callable[..., Any]) -> ModuleType:
    """torch as a module knows it, with ``save`` and ``jit.save`` that write files of a run completely.

    Args:
        step: calls its first argument with the others, and ends the program where a file cannot be written.
    """

    class Torch(ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        @staticmethod
        def save(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            if not _is_of_a_run(file):
                torch.save(content, file, *args, **kwargs)
                return
            step(write_model, content, file, functools.partial(torch.save, *args, **kwargs))

    class Jit(ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(torch.jit, name)

        @staticmethod
        def save(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            if not _is_of_a_run(file):
                torch.jit.save(content, file, *args, **kwargs)
                return
            made = io.BytesIO()  # what cannot be scripted raises here, and upstream goes on without
            torch.jit.save(content, made, *args, **kwargs)
            step(write_model, made.getvalue(), file, lambda value, path: Path(path).write_bytes(value))

    out = Torch("torch")
    out.jit = Jit("torch.jit")  # type: ignore[attr-defined]
    return out


def _is_of_a_run(file: Any) -> bool:
    return current_run() is not None and isinstance(file, str | os.PathLike)
