"""Checkpoints that survive kill -9 and restart exactly.

Upstream deletes the old checkpoint before it writes the new one in place, stores the EMA averages
but not the raw weights and the EMA's own state, and forgets the best loss at a restart.
"""

from __future__ import annotations

import glob
import logging
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn

from mace_lora.atomic import atomic_path

from .distributed import RANKS
from .protocol import Run, SettingsError

__all__ = ["check_restart", "collect", "is_best", "lock", "resume", "write"]

_held: list[Any] = []


def _stage_two(swa_start: int | None, epoch: int) -> bool:
    return swa_start is not None and epoch >= swa_start


def is_best(run: Run, swa_start: int | None, epoch: int) -> bool:
    """Whether this checkpoint improves on the best before a restart, of the same stage."""
    best = (run.state.get("best_loss") or {}).get(str(_stage_two(swa_start, epoch)))
    if best is None or run.args.save_all_checkpoints or run.last_valid_loss is None:
        return True
    return not run.last_valid_loss >= best  # a NaN is saved, as upstream does


def _loss_scale(run: Run) -> str:
    """What makes two validation losses comparable."""
    names = ("loss", "energy_weight", "forces_weight", "stress_weight", "virials_weight", "valid_file")
    return "; ".join(f"{n}={getattr(run.args, n, None)}" for n in names)


def collect(run: Run, model: nn.Module, swa_start: int | None, epoch: int) -> dict[str, Any]:
    """Our part of a checkpoint: EMA state, raw weights, best losses, what the plugins add."""
    stage_two = _stage_two(swa_start, epoch)
    best = dict(run.state.get("best_loss") or {})
    if run.last_valid_loss is not None and math.isfinite(run.last_valid_loss):
        best[str(stage_two)] = run.last_valid_loss
    run.state["best_loss"] = best
    out: dict[str, Any] = {"best_loss": best, "loss_scale": _loss_scale(run), "plugins": {}}
    if run.ema is not None:
        # collected_params are the raw weights: upstream saves inside average_parameters().
        out["ema"] = run.ema.state_dict()
    for plugin in run.active():
        out["plugins"][plugin.name] = dict(plugin.on_checkpoint(run, model, epoch, stage_two))
    return out


def write(io: Any, checkpoint: dict[str, Any], epochs: int, keep_last: bool, save: Callable[..., None]) -> None:
    """Write the new checkpoint completely, then delete the old one."""
    path = Path(io.directory) / io._get_checkpoint_filename(epochs, io.swa_start)
    try:
        with atomic_path(path) as temporary:
            save(checkpoint, temporary)
    except (OSError, RuntimeError) as err:  # torch reports a failed write as RuntimeError
        raise SettingsError(
            f"--checkpoints_dir: cannot write {path} ({err}); free some space and continue with --restart_latest"
        ) from err
    old, io.old_path = io.old_path, str(path)
    if not io.keep and old and not keep_last and old != str(path):
        Path(old).unlink(missing_ok=True)


@torch.no_grad()
def resume(run: Run, model: nn.Module) -> None:
    """After ``--restart_latest``: give the EMA and the raw weights back what they had.

    Raises:
        SettingsError: a checkpoint was there and upstream did not load it.
    """
    if not run.args.restart_latest or "checkpoint" not in run.state:
        return
    if run.restored is None:
        raise SettingsError(
            f"--restart_latest: the checkpoint {run.state['checkpoint']} could not be loaded into this model "
            "(upstream then starts again at epoch 0); use the same data, model and --lora_* flags as before, or "
            "another --name to start afresh"
        )
    if run.restored["loss_scale"] == _loss_scale(run):
        run.state["best_loss"] = dict(run.restored["best_loss"])
    else:
        logging.info("equitune: another loss or validation set than before the restart; best loss counted anew")
    saved = run.restored.get("ema")
    if run.ema is None or saved is None:
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    run.ema.load_state_dict(saved)
    for parameter, raw in zip(trained, saved["collected_params"] or [], strict=False):
        parameter.copy_(raw.to(parameter.device))
    run.ema.collected_params = None
    logging.info("equitune: restored EMA state (%d updates) and raw weights", run.ema.num_updates)


def lock(run: Run) -> None:
    """Keep other runs out of this run's files, and clear what a killed run left half-written.

    Checkpoints have the seed in their names, the model and the adapter have not: two locks.

    The lock is the operating system's: it ends with the process, however that ends.

    Raises:
        SettingsError: another run is writing there now.
    """
    if run.args.distributed and _rank() != "0":
        return
    models = Path(run.args.model_dir)
    while _held:  # of an earlier run in this process
        _held.pop().release(force=True)
    for folder, file in ((run.checkpoints_dir, f"{run.tag}.lock"), (models, f".{run.args.name}.lock")):
        folder.mkdir(parents=True, exist_ok=True)
        _held.append(FileLock(folder / file))
        try:
            _held[-1].acquire(blocking=False)
        except Timeout:
            raise SettingsError(
                f"--name {run.args.name}: another run is writing to {folder} now; wait for it to end, or choose "
                "another --name or --work_dir (runs of several seeds need one each)"
            ) from None
    leftovers = list(run.checkpoints_dir.glob(f".{glob.escape(run.tag)}_epoch-*.part"))
    for folder in (models / f"{run.args.name}-adapter", models / f"{run.args.name}_stagetwo-adapter"):
        leftovers += folder.glob(".*.part")
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)


def _rank() -> str:
    """Number of this process, by torchrun, Slurm or MPI."""
    return next((os.environ[n] for n in RANKS if n in os.environ), "0")


def latest_checkpoint(run: Run) -> Path | None:
    """The checkpoint that ``--restart_latest`` will take, as upstream chooses it (stage two first)."""
    found: list[tuple[bool, int, Path]] = []
    if run.checkpoints_dir.is_dir():
        for path in run.checkpoints_dir.glob(f"{run.tag}_epoch-*.pt"):
            number = path.stem.removeprefix(f"{run.tag}_epoch-")
            stage_two = number.endswith("_swa")
            number = number.removesuffix("_swa")
            if number.isdigit():
                found.append((stage_two, int(number), path))
    return max(found)[2] if found else None


def check_restart(run: Run) -> None:
    """Refuse a restart with other adapters than the checkpoint has.

    Upstream would not load the checkpoint, swallow the error and start at epoch 0.

    Raises:
        SettingsError: the checkpoint has adapters and the command has no ``--lora``, or the other
            way round, or the checkpoint is unreadable.
    """
    path = latest_checkpoint(run)
    if path is None:
        return
    if not run.args.restart_latest:
        if run.active():
            raise SettingsError(
                f"--name {run.args.name}: {os.fspath(path)} is left from an earlier run, and MACE would take the "
                "latest checkpoint it finds for this run's result; continue that run with --restart_latest, or choose "
                "another --name or --work_dir, or delete its checkpoints"
            )
        return
    try:
        content = torch.load(path, map_location="cpu", weights_only=False)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as err:
        if not run.active():
            return  # upstream's own affair
        raise SettingsError(
            f"--restart_latest: {os.fspath(path)} is corrupt ({err}); delete it and restart from the one before"
        ) from err
    saved = content["equitune"]["plugins"] if "equitune" in content else {}
    active = run.active()
    for plugin in run.plugins:
        if plugin.name in saved and plugin not in active:
            raise SettingsError(
                f"--restart_latest: {os.fspath(path)} holds {plugin.leaves}, but {plugin.flag} was not given; add "
                f"{plugin.flag} with the same flags as before, or choose another --name to train without"
            )
        if plugin.name not in saved and plugin in active:
            raise SettingsError(
                f"--restart_latest: {os.fspath(path)} has no {plugin.leaves.removeprefix('a ')}, but {plugin.flag} was "
                f"given; drop {plugin.flag} to continue it, or choose another --name"
            )
    if saved:
        run.state["checkpoint"] = path
        run.state["checkpoint_plugins"] = content["equitune"]["plugins"]
