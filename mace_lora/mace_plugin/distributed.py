"""``--distributed`` on CPUs: upstream starts a process group for CUDA and XPU only."""

from __future__ import annotations

import argparse
import functools
import os
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .protocol import SettingsError

__all__ = ["RANKS", "prepare"]

RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")  # number of this process; upstream sets the first later


def prepare(args: argparse.Namespace) -> None:
    """Start a gloo group and let upstream's ``DDP(model, device_ids=[…])`` accept a CPU model.

    Does nothing unless the run is distributed on CPUs by torchrun. Upstream leaves an existing
    process group alone.

    Raises:
        SettingsError: no launcher started this process.
    """
    if args.distributed and not any(name in os.environ for name in RANKS):
        raise SettingsError(
            "--distributed: expected one of several processes, started by torchrun, srun or mpirun, got a process on "
            "its own; for example torchrun --no-python --nproc_per_node=2 mace_run_train …, or leave the flag out"
        )
    if not args.distributed or args.device != "cpu" or "RANK" not in os.environ:
        return
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend="gloo", init_method="env://")
    _accept_cpu_models()


def _accept_cpu_models() -> None:
    original = DistributedDataParallel.__init__
    if getattr(original, "__wrapped__", None) is not None:
        return

    # upstream has copied the class's name by now, so the method is what can still be reached
    @functools.wraps(original)
    def init(self: Any, module: nn.Module, device_ids: Any = None, *args: Any, **kwargs: Any) -> None:
        if all(p.device.type == "cpu" for p in module.parameters()):
            device_ids = None
        original(self, module, device_ids, *args, **kwargs)

    DistributedDataParallel.__init__ = init  # type: ignore[method-assign]
