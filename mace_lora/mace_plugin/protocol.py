"""What a plugin of ``mace_run_train`` can do, and the state of the run that it sees.

Plugins are entry points of the group ``mace.run_train``: a class derived from :class:`TrainPlugin`
whose methods are called at fixed points of upstream's ``run``. Each may be left out.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["GROUP", "Run", "SettingsError", "TrainPlugin", "current_run", "load_plugins", "run_training", "start_run"]

GROUP = "mace.run_train"
_OURS = {
    "autotune": "mace_lora.autotune.mace:AutotunePlugin",
    "launched": "mace_lora.mace_plugin.launch:LaunchedPlugin",
    "lora": "mace_lora.lora.mace:LoraPlugin",
    "multiscale": "mace_lora.multiscale.mace:MultiscalePlugin",
}


class SettingsError(ValueError):
    """A setting or input that must be corrected by the user; ends ``mace_run_train`` with its message."""


@dataclass
class Run:
    """One run of ``mace_run_train``.

    Attributes:
        args: upstream's parsed arguments.
        plugins: plugins of this run.
        foundation: model given by ``--foundation_model``, or None.
        stand_in: what upstream builds its model from instead, where a plugin knows better.
        train_dataset: all training frames as upstream's graphs.
        heads: head names.
        elements: atomic numbers of the model.
        E0s: requested energy references (eV), heads x elements.
        last_valid_loss: validation loss of the last evaluation.
        restored: our part of the checkpoint that was loaded for a restart.
        state: free for plugins.
        model: the model that is trained, once it is built.
    """

    args: argparse.Namespace
    plugins: Sequence[TrainPlugin]
    foundation: nn.Module | None = None
    stand_in: nn.Module | None = None
    train_dataset: Any = None
    heads: list[str] = field(default_factory=list)
    elements: list[int] = field(default_factory=list)
    E0s: Any = None
    last_valid_loss: float | None = None
    ema: Any = None
    restored: dict[str, Any] | None = None
    state: dict[str, Any] = field(default_factory=dict)
    model: weakref.ref[nn.Module] | None = None

    @property
    def tag(self) -> str:
        """Upstream's name of the run in file names."""
        return str(self.state.get("tag") or f"{self.args.name}_run-{self.args.seed}")

    @property
    def checkpoints_dir(self) -> Path:
        return Path(self.args.checkpoints_dir)

    def active(self) -> list[TrainPlugin]:
        """Plugins that take part in this run."""
        return [p for p in self.plugins if p.enabled(self.args)]


class TrainPlugin:
    """Base of a plugin; every method may be left as it is."""

    name = "plugin"
    flag, leaves = "--plugin", "its state"  # for messages: what switches it on, what a checkpoint has of it
    order = 0  # plugins with a lower one are called first: what changes the architecture before what adapts it

    @property
    def model_order(self) -> int:
        """The same for ``after_model`` alone."""
        return self.order

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add or change command-line flags."""

    def enabled(self, args: argparse.Namespace) -> bool:
        """Whether the plugin takes part in a run with these arguments."""
        return False

    def check_args(self, run: Run) -> None:
        """Check the arguments; called for every plugin, enabled or not, before any work.

        Raises:
            SettingsError: something the user has to correct.
        """

    def before_data(self, run: Run) -> None:
        """Change arguments that data are read with; upstream has loaded the foundation model."""

    def check_foundation(self, run: Run) -> None:
        """Check the foundation model; called for every plugin, enabled or not."""

    def before_model(self, run: Run) -> None:
        """Check data and foundation model before the model is built; may set ``run.stand_in``."""

    def after_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Change the model after upstream has built it."""
        return model

    def after_restart(self, run: Run, model: nn.Module) -> None:
        """Check the model after a checkpoint was loaded; with EMA it has the averages, the raw weights come later.

        Raises:
            SettingsError: the checkpoint does not belong to this command.
        """

    def optimizer_groups(self, run: Run, model: nn.Module) -> list[dict[str, Any]] | None:
        """Replace upstream's parameter groups, or None to keep them."""
        return None

    def extra_groups(self, run: Run, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups beside upstream's; not asked for where a plugin replaces them all."""
        return []

    def change_groups(self, run: Run, model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Change the parameter groups of all."""
        return groups

    def before_epoch(self, run: Run, model: nn.Module, epoch: int) -> None:
        """Called before every epoch, also the first after a restart."""

    def before_validation(self, run: Run, model: nn.Module) -> None:
        """Called after an epoch, with the weights that are judged and saved (EMA's, where there is one)."""

    def on_checkpoint(self, run: Run, model: nn.Module, epoch: int, stage_two: bool) -> Mapping[str, Any]:
        """Called when a best checkpoint is written; returns what to store in it."""
        return {}

    def after_checkpoint(self, run: Run, model: nn.Module, stored: Mapping[str, Any]) -> None:
        """Called when a best checkpoint is on disk, with what :meth:`on_checkpoint` stored in it."""

    def before_save(self, run: Run, model: nn.Module) -> nn.Module:
        """Turn the trained model (a copy) into what MACE saves."""
        return model


_current: Run | None = None


def load_plugins() -> list[TrainPlugin]:
    """Instantiate all plugins registered in this environment, and ours where it is not installed."""
    found = {ep.name: ep for ep in entry_points(group=GROUP)}
    for name, value in _OURS.items():  # PYTHONPATH-only use has no entry points
        found.setdefault(name, EntryPoint(name, value, GROUP))
    return sorted((found[name].load()() for name in sorted(found)), key=lambda p: p.order)


def start_run(run: Run | None) -> None:
    """Make ``run`` the process's current run."""
    global _current
    _current = run


def current_run() -> Run | None:
    """The run in progress in this process, or None outside ``mace_run_train``."""
    return _current


def run_training(model: nn.Module) -> Run | None:
    """The run that trains this model with at least one plugin; None for any other model.

    Upstream's ``run`` has no end that we see, so a model handled later in the same process must
    not be taken for the run's.
    """
    run = _current
    if run is None or run.model is None or run.model() is not model or not run.active():
        return None
    return run
