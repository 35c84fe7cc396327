"""What is trained: a MACE model by ``mace_run_train``, or any model of a NequIP config by ``nequip-train``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mace_lora.atomic import content_digest
from mace_lora.mace_plugin import launch

from .config import Distillation, Training

__all__ = ["Framework", "MaceStudent", "default_flags", "framework", "plain"]

# a pre-trained multiscale model brings these
_OF_MULTISCALE = ("r_short", "multiscale_coupling", "multiscale_split", "long_range", "pme_smearing")


class Framework(Protocol):
    """How a student is trained.

    Attributes:
        kind: its models' prefix as potentials.
    """

    kind: str

    def settings(self, training: Training, lr: float, start: Path | None) -> dict[str, Any]:
        """Everything that a training depends on besides its frames; ``start``: pre-trained model."""

    def train(self, settings: Mapping[str, Any], data: tuple[Path, Path], place: Path) -> None:
        """Train on (training, validation) frames in a folder; goes on where it was stopped."""

    def model(self, place: Path) -> Path:
        """File of the trained model."""

    def curve(self, place: Path) -> list[tuple[int, float, float]]:
        """(epoch, energy MAE in meV/atom, force MAE in meV/Å) on the validation frames."""

    def steps_per_epoch(self, settings: Mapping[str, Any], frames: int) -> int:
        """Steps of the optimiser for so many training frames."""


def framework(config: Distillation) -> Framework:
    """The student's."""
    if config.student.nequip is None:
        return MaceStudent(config)
    from nequip_ext.distill import NequipStudent

    return NequipStudent(config.student.nequip, config.student.flags, config.seed + 1, config.device)


class MaceStudent:
    """Flags of ``mace_run_train``."""

    kind = "mace"

    def __init__(self, config: Distillation) -> None:
        self.config = config

    def settings(self, training: Training, lr: float, start: Path | None) -> dict[str, Any]:
        mine: dict[str, Any] = dict(self.config.student.flags)
        if start is not None:
            mine = {k: v for k, v in mine.items() if not k.endswith("_long") and k not in _OF_MULTISCALE}
            given = str(mine.get("E0s", "")).strip()  # isolated atoms hold for both ways to the quantum level
            kept = given if given.startswith("{") or given.endswith(".json") else "estimated"
            mine |= {"foundation_model": str(start), "multiheads_finetuning": False, "E0s": kept}
        every = default_flags(self.config, training.epochs) | mine | training.flags
        return every | {"max_num_epochs": training.epochs, "seed": self.config.seed + 1, "lr": lr}

    def train(self, settings: Mapping[str, Any], data: tuple[Path, Path], place: Path) -> None:
        launch.train({**settings, "train_file": data[0], "valid_file": data[1]}, place)

    def model(self, place: Path) -> Path:
        return place / "run.model"

    def curve(self, place: Path) -> list[tuple[int, float, float]]:
        return launch.validation_curve(place)

    def steps_per_epoch(self, settings: Mapping[str, Any], frames: int) -> int:
        return frames // int(settings["batch_size"])  # upstream leaves an incomplete batch out


def default_flags(config: Distillation, epochs: int) -> dict[str, Any]:
    """Flags where the config has none: a decaying learning rate, EMA, the best epoch by the validation loss."""
    return {
        "batch_size": 5, "valid_batch_size": 25, "ema": True, "ema_decay": 0.99, "scheduler": "ExponentialLR",
        "lr_scheduler_gamma": round(0.05 ** (1 / epochs), 6), "eval_interval": max(1, epochs // 50),
        "loss": "weighted", "energy_weight": 1, "forces_weight": 100, "default_dtype": config.dtype,
        "device": config.device, "plot": False, "patience": 1_000_000, "multiheads_finetuning": False,
    }  # fmt: skip


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for a hash: files count by their content alone, wherever they lie."""
    return launch.with_files(settings, content_digest)
