"""How a name of MACE is wrapped, and how a plugin's refusal ends the program."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .contract import require
from .protocol import SettingsError, start_run

__all__ = ["or_exit", "wrap"]


def wrap(module: ModuleType, name: str) -> Callable[[Callable[..., Any]], None]:
    """Decorator: replace ``module.name`` by a function that receives the original first."""

    def decorate(function: Callable[..., Any]) -> None:
        require(module, name)
        original = getattr(module, name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        setattr(module, name, wrapper)

    return decorate


def or_exit(step: Callable[..., Any], *args: Any) -> Any:
    """Run a plugin step; a SettingsError ends the program with its message, not a traceback."""
    try:
        return step(*args)
    except SettingsError as err:
        start_run(None)
        # Not an Exception: upstream has ``except Exception`` around restarts.
        raise SystemExit(f"mace_run_train: error: {err}") from err
