"""Patches of MACE's training loop and checkpoints, for :mod:`.patches`."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from . import checkpoints
from .contract import require
from .protocol import current_run, run_training
from .wrapping import or_exit, wrap

__all__ = ["patch_checkpoint", "patch_train"]


def patch_train(module: ModuleType) -> None:
    """Restore a restart's exact state; EMA only over what is trained; remember the loss."""

    @wrap(module, "valid_err_log")
    def valid_err_log(original: Callable[..., Any], valid_loss: Any, *args: Any, **kwargs: Any) -> Any:
        run = current_run()
        if run is not None:
            run.last_valid_loss = float(valid_loss)
            run.state["valid_errors"] = args[0] if args else kwargs.get("eval_metrics", {})  # of the last head
        return original(valid_loss, *args, **kwargs)

    @wrap(module, "train")
    def train(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run = run_training(kwargs["model"]) if "model" in kwargs else None
        if run is not None:
            ema = kwargs.get("ema")
            if ema is not None:
                trained = [p for p in kwargs["model"].parameters() if p.requires_grad]
                ema = type(ema)(trained, decay=ema.decay)
                kwargs["ema"] = run.ema = ema
            if run.restored is not None:
                for plugin in run.active():
                    or_exit(plugin.after_restart, run, kwargs["model"])
            or_exit(checkpoints.resume, run, kwargs["model"])
            logging.info("equitune: training %s values", f"{_trained(kwargs['model']):,}")
        try:
            return original(*args, **kwargs)
        finally:
            if run is not None:
                run.state.pop("trained_since", None)  # what is evaluated now is not an epoch

    @wrap(module, "train_one_epoch")
    def train_one_epoch(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run = run_training(kwargs["model"]) if "model" in kwargs else None
        for plugin in run.active() if run is not None else ():
            plugin.before_epoch(run, kwargs["model"], int(kwargs["epoch"]))  # type: ignore[arg-type]
        done = original(*args, **kwargs)
        if run is not None:
            run.state["trained_since"] = True
        return done

    @wrap(module, "evaluate")
    def evaluate(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run = current_run()
        model = run.model() if run is not None and run.model is not None else None  # the argument may be DDP's wrapper
        if run is not None and model is not None and run.state.pop("trained_since", False):  # once for all heads
            for plugin in run.active():
                plugin.before_validation(run, model)
        return original(*args, **kwargs)


def _trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def patch_checkpoint(module: ModuleType) -> None:
    """Checkpoints are written atomically and carry the plugins' and EMA's state."""

    for name in ("CheckpointBuilder", "CheckpointIO", "CheckpointHandler"):
        require(module, name)
    handler, builder, io = module.CheckpointHandler, module.CheckpointBuilder, module.CheckpointIO
    handler_save, load_checkpoint, io_save = handler.save, builder.load_checkpoint, io.save

    @functools.wraps(handler_save)
    def save(self: Any, state: Any, epochs: int, keep_last: bool = False) -> None:
        run = run_training(state.model)
        if run is None:
            handler_save(self, state, epochs, keep_last)
            return
        if not checkpoints.is_best(run, self.io.swa_start, epochs):
            return
        checkpoint = self.builder.create_checkpoint(state)
        checkpoint["equitune"] = or_exit(checkpoints.collect, run, state.model, self.io.swa_start, epochs)
        self.io.save(checkpoint, epochs, keep_last)
        for plugin in run.active():
            or_exit(plugin.after_checkpoint, run, state.model, checkpoint["equitune"]["plugins"][plugin.name])

    def load(state: Any, checkpoint: dict[str, Any], strict: bool) -> None:
        load_checkpoint(state, checkpoint, strict)
        run = run_training(state.model)
        if run is not None:
            run.restored = checkpoint.get("equitune")

    @functools.wraps(io_save)
    def save_file(self: Any, checkpoint: dict[str, Any], epochs: int, keep_last: bool = False) -> None:
        if "equitune" not in checkpoint:
            io_save(self, checkpoint, epochs, keep_last)
            return
        or_exit(checkpoints.write, self, checkpoint, epochs, keep_last, torch.save)

    handler.save = save
    builder.load_checkpoint = staticmethod(functools.wraps(load_checkpoint)(load))
    io.save = save_file
