"""The real ``mace_run_train`` as a process of its own, for commands of ours that train."""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from .protocol import Run, TrainPlugin, load_plugins

__all__ = [
    "LAUNCHED",
    "LaunchedPlugin",
    "check_flags",
    "default_of",
    "start",
    "train",
    "train_beside",
    "validation_curve",
    "with_files",
]


LAUNCHED = "EQUITUNE_LAUNCHED"
_FOLDERS = ("lora_init_adapter",)  # flags that take a folder


class LaunchedPlugin(TrainPlugin):
    """Gives every training that we start whole checkpoints, their best loss, EMA and a lock on its folder."""

    name = "launched"
    flag, leaves = "equitune", "what equitune adds to checkpoints of its own trainings"

    def enabled(self, args: argparse.Namespace) -> bool:
        return os.environ.get(LAUNCHED) == "1"


def start(flags: Mapping[str, Any], log: Path) -> subprocess.Popen[bytes]:
    """Start a training with one thread.

    Args:
        flags: names without dashes and values; flags that stand alone are true or false.
        log: gets what the command prints, appended.
    """
    command = [str(Path(sys.executable).parent / "mace_run_train"), *_words(flags)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=output,
            env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", LAUNCHED: "1"},
        )  # fmt: skip


@functools.cache
def _parser() -> Any:
    from mace.tools.arg_parser import build_default_arg_parser

    from .startup import install

    install()
    return build_default_arg_parser()


def default_of(flag: str) -> Any:
    """Upstream's default of a flag, named without dashes."""
    return _parser().get_default(flag)


def _words(flags: Mapping[str, Any]) -> list[str]:
    """Flags as on the command line: some take true or false as their value, others stand alone."""
    alone = {o for action in _parser()._actions if action.nargs == 0 for o in action.option_strings}
    words = []
    for name, value in flags.items():
        if isinstance(value, bool) and f"--{name}" in alone:
            words += [f"--{name}"] if value else []
        else:
            words.append(f"--{name}={value}")
    return words


def train(flags: Mapping[str, Any], folder: Path) -> Path:
    """Train in a folder unless its model is there; continues a training that was stopped.

    Args:
        flags: as for :func:`start`, without name and folder.
        folder: for the run and its ``output.log``.

    Returns:
        the model's file.

    Raises:
        ValueError: the training fails; where its messages are.
    """
    return train_beside([(flags, folder)])[0]


def train_beside(runs: Sequence[tuple[Mapping[str, Any], Path]]) -> list[Path]:
    """As :func:`train` for several trainings at the same time.

    Args:
        runs: flags and folder of each.

    Returns:
        the models' files.
    """
    processes: list[tuple[Path, subprocess.Popen[bytes]]] = []
    try:
        for flags, folder in runs:
            model = folder / "run.model"
            if model.is_file() and (folder / "run.complete").is_file():
                continue
            model.unlink(missing_ok=True)  # upstream does not write it atomically; its last checkpoint is at hand
            words = {**flags, "name": "run", "work_dir": folder, "restart_latest": True}
            processes.append((folder, start(words, folder / "output.log")))
        for folder, process in processes:
            log = folder / "output.log"
            if process.wait() or not (folder / "run.model").is_file():
                raise ValueError(f"training in {folder} failed: {_last_line(log)} (its output is in {log})")
            (folder / "run.complete").touch()
    finally:  # Ctrl-C or a failure: the others must not go on alone
        for _, process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait()
    return [folder / "run.model" for _, folder in runs]


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "no output"


def with_files(flags: Mapping[str, Any], change: Callable[[Path], Any], base: Path = Path()) -> dict[str, Any]:
    """Flags with those changed whose values name files.

    Args:
        flags: as for :func:`start`.
        change: gets the file, gives the new value.
        base: folder that relative names start from.
    """
    out = dict(flags)
    for name, value in flags.items():
        exists = os.path.exists if name in _FOLDERS else os.path.isfile  # Path's own fail on long texts
        if isinstance(value, str) and exists(base / value):
            out[name] = change(base / value)
    return out


def check_flags(flags: Mapping[str, Any], where: str, plugins: Collection[str] = ()) -> argparse.Namespace:
    """Refuse flags that ``mace_run_train`` would refuse, before anything is trained.

    Args:
        flags: as for :func:`start`; ``--name`` is added.
        where: for the message.
        plugins: names of plugins that check their flags as well.

    Returns:
        upstream's parsed arguments.

    Raises:
        ValueError: an unknown flag, a value of another kind, or a plugin's refusal.
    """
    parser, problem = _parser(), ""

    def fail(message: str) -> None:
        nonlocal problem
        problem = problem or message
        raise ValueError(message)

    before, parser.error = parser.error, fail
    try:
        args: argparse.Namespace = parser.parse_args(["--name=run", *_words(flags)])
        mine = [p for p in load_plugins() if p.name in plugins]
        for plugin in mine:
            plugin.check_args(Run(args, mine))
    except (ValueError, SystemExit) as err:
        raise ValueError(f"{where}: {problem or err}") from None
    finally:
        parser.error = before
    return args


def validation_curve(folder: Path) -> list[tuple[int, float, float]]:
    """(epoch, energy MAE in meV/atom, force MAE in meV/Å) on the validation frames, as upstream logged them."""
    points = {}
    for path in sorted((folder / "results").glob("run_run-*_train.txt")):
        for line in path.read_text().splitlines():
            row = json.loads(line) if line.endswith("}") else {}
            if row.get("mode") == "eval" and row.get("epoch") is not None:
                points[int(row["epoch"])] = (1e3 * row["mae_e_per_atom"], 1e3 * row["mae_f"])
    return [(epoch, e, f) for epoch, (e, f) in sorted(points.items())]
