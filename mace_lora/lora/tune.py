"""``equitune tune``: a rank and learning-rate search by successive halving through the real command."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from mace_lora.atomic import content_digest, write_text

__all__ = ["Trial", "rungs", "tune"]

NAME = "trial"


@dataclass(frozen=True)
class Trial:
    """One setting and how far it got.

    Attributes:
        rank: LoRA rank.
        lr: learning rate.
        epochs: epochs trained.
        loss: best validation loss (upstream's, in its own units); infinite when it diverged.
    """

    rank: int
    lr: float
    epochs: int = 0
    loss: float = math.inf

    @property
    def folder(self) -> str:
        """Folder name of the trial."""
        return f"rank{self.rank}_lr{self.lr:g}"


def rungs(epochs: int, trials: int, factor: int = 3) -> list[tuple[int, int]]:
    """Successive halving: (epochs, number of trials) of each rung.

    Args:
        epochs: epochs of the last rung.
        trials: settings at the start.
        factor: a rung trains `factor` times as long as the one before, with 1/`factor` of its trials.
    """
    plan, count = [], trials
    while count > 1:
        plan.append(count)
        count = math.ceil(count / factor)
    plan.append(1)
    last = len(plan) - 1
    return [(max(2, round(epochs / factor ** (last - i))), n) for i, n in enumerate(plan)]


def best_validation_loss(folder: Path) -> float:
    """Lowest validation loss that upstream logged, of the last head as for its checkpoints; infinite without one."""
    losses: dict[int, float] = {}
    for path in (folder / "results").glob(f"{NAME}_run-*_train.txt"):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut off by an interruption
            if row.get("mode") == "eval" and row.get("epoch") is not None:
                losses[int(row["epoch"])] = float(row["loss"])  # heads come in turn, the one that counts last
    return min((x for x in losses.values() if math.isfinite(x)), default=math.inf)


def _train(trial: Trial, epochs: int, arguments: Sequence[str], folder: Path) -> Trial:
    """Train one trial up to `epochs`; a finished stage is read from its folder."""
    done = folder / "done.json"
    if done.is_file():
        content = json.loads(done.read_text(encoding="utf-8"))
        if content["epochs"] >= epochs:
            return Trial(trial.rank, trial.lr, content["epochs"], content["loss"] or math.inf)
    folder.mkdir(parents=True, exist_ok=True)
    command = [str(Path(sys.executable).parent / "mace_run_train"), *arguments]
    command += ["--name", NAME, "--work_dir", str(folder), "--max_num_epochs", str(epochs), "--restart_latest"]
    command += ["--lora", "True", "--lora_rank", str(trial.rank), "--lr", f"{trial.lr:g}"]
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        status = subprocess.run(command, stdout=log, stderr=log, env=dict(os.environ), check=False).returncode
    loss = best_validation_loss(folder)
    if status != 0:
        text = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip()
        if "error: --lora: the adapter contains NaN" not in text[-3000:]:
            tail = text.splitlines()[-1:]
            raise ValueError(f"mace_run_train failed in {folder}: {tail[0] if tail else 'no output'} (see log.txt)")
        loss = math.inf  # diverged on the way
    write_text(done, json.dumps({"epochs": epochs, "loss": loss if math.isfinite(loss) else None}) + "\n")
    return Trial(trial.rank, trial.lr, epochs, loss)


_OURS = (
    "name", "work_dir", "checkpoints_dir", "model_dir", "results_dir", "log_dir", "downloads_dir", "max_num_epochs",
    "lora_rank", "lr", "restart_latest",
)  # fmt: skip
_UNSUITABLE = {
    "swa": "stage two would begin at another epoch of every trial", "lbfgs": "it has no learning rate",
}  # fmt: skip
_UNSUITABLE["stage_two"] = _UNSUITABLE["swa"]


def _check_arguments(arguments: Sequence[str]) -> None:
    """The search sets some flags itself; given as well they would be overridden, or mix up the trials."""
    given = [a.lstrip("-").partition("=")[0] for a in arguments if a.startswith("--")]
    for position, argument in enumerate(arguments):
        if argument.lstrip("-").partition("=")[0] != "config" or not argument.startswith("--"):
            continue
        file = argument.partition("=")[2] or (arguments[position + 1] if position + 1 < len(arguments) else "")
        if Path(file).is_file():
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
            given += [k for k, v in content.items() if v not in (None, False)] if isinstance(content, dict) else []
    for name in given:
        if name in _OURS:
            raise ValueError(f"--{name}: the search sets it itself (--ranks, --lrs, --epochs, --folder); leave it out")
        if name in _UNSUITABLE:
            raise ValueError(f"--{name}: does not go with the search: {_UNSUITABLE[name]}; leave it out")


def _check_search(arguments: Sequence[str], folder: Path) -> None:
    """A folder belongs to one command and its data: results of another must not be taken for this one's."""
    texts = [part for a in arguments for part in (a, a.partition("=")[2])]
    files = [t for t in texts if t and os.path.isfile(t)]  # noqa: PTH113  Path.is_file fails on long texts
    now = {"arguments": list(arguments), "files": {f: content_digest(f) for f in files}}
    record = folder / "search.json"
    if record.is_file():
        before = json.loads(record.read_text(encoding="utf-8"))
        if before != now:
            what = "data" if before["arguments"] == now["arguments"] else f"flags ({' '.join(before['arguments'])})"
            raise ValueError(f"folder: {folder} holds a search with other {what}; choose another --folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(record, json.dumps(now, indent=1) + "\n")


def tune(
    arguments: Sequence[str],
    ranks: Sequence[int],
    lrs: Sequence[float],
    epochs: int,
    folder: Path,
    progress: Callable[[str], None] = print,
) -> list[Trial]:
    """Search rank and learning rate on the validation frames of a training command.

    Args:
        arguments: flags of ``mace_run_train`` (data, base, E0s, …).
        ranks, lrs: values to try.
        epochs: epochs of the winner; losing trials stop earlier.
        folder: one subfolder per trial; a stopped search continues where it was.
        progress: called with a one-line message after each training.

    Returns:
        all trials, the best first: those that trained longest, by validation loss.

    Raises:
        ValueError: no values, flags that the search sets itself or that do not go with it, or the command fails.
    """
    if not ranks or not lrs:
        raise ValueError("ranks, lrs: expected at least one value each")
    _check_arguments(arguments)
    _check_search(arguments, folder)
    trials = [Trial(r, lr) for r in ranks for lr in lrs]
    alive = trials
    final: dict[str, Trial] = {t.folder: t for t in trials}
    for length, count in rungs(epochs, len(trials)):
        alive = alive[:count]
        results = []
        for trial in alive:
            result = _train(trial, length, arguments, folder / trial.folder)
            final[trial.folder] = result
            results.append(result)
            progress(f"rank {result.rank:>3}  lr {result.lr:<7g} epochs {length:>4}  validation loss {result.loss:.6g}")
        alive = sorted(results, key=lambda t: t.loss)
        if not math.isfinite(alive[0].loss):
            raise ValueError(f"lrs: every training diverged (see {folder}); try lower learning rates than {min(lrs):g}")
    return sorted(final.values(), key=lambda t: (-t.epochs, t.loss))
