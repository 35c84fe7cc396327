"""Lightning callback: checks before training, and the adapter on disk at every best epoch."""

from __future__ import annotations

import logging
import math
import sys
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning

from mace_lora.atomic import only_writer
from mace_lora.lora.adapter import read_adapter
from mace_lora.lora.config import LoraConfig
from mace_lora.lora.inject import adapter_layers, disabled_adapters
from mace_lora.lora.saving import save_adapter
from nequip_ext.checks import require_flags
from nequip_ext.energies import WithTrainingFrames, check_data, predict, refit, residuals_of
from nequip_ext.labels import require_finite, require_units

from .builder import ADAPTER
from .preflight import (
    adapted_model,
    check_base,
    check_identity,
    check_optimizers,
    checkpoint_callback,
    data_files,
    is_fresh,
)

__all__ = ["SaveAdapter"]

_LOG = logging.getLogger("equitune")


class SaveAdapter(WithTrainingFrames):
    """Write the adapter at every best epoch, with EMA weights where the run has them.

    "Best" is what the run's first ``ModelCheckpoint`` with a ``monitor`` watches, in every validated epoch
    (also where that checkpoint is written more rarely). Before training it checks that the adapted model equals
    its base, that the labels fit it, and prints how far the energies are off. Before every validation the shifts of
    the types are refitted to the training frames by least squares (the adapter keeps the change).

    Args:
        path: folder of the adapter; one of another run is not overwritten.
        refit_shifts: refit the energy shifts of the types.
        max_frames: training frames used for checks and refit.
        level_of_theory: of the labels, for the adapter's card, e.g. ``PBE0/def2-SVP``.
        check_units: refuse forces that are the base's times a factor (other units, wrong sign).
    """

    def __init__(
        self, path: str, refit_shifts: bool = True, max_frames: int = 200, level_of_theory: str | None = None,
        check_units: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(max_frames)
        require_flags({"refit_shifts": refit_shifts, "check_units": check_units})
        if not isinstance(path, str | Path) or not str(path) or Path(path).is_file():
            raise ValueError(f"path: expected a folder for the adapter, new or of this run, got {path!r}")
        self.path, self.refit_shifts, self.check_units = Path(path), refit_shifts, check_units
        self.level_of_theory, self.provenance = level_of_theory, dict[str, Any]()
        self.best: float | None = None
        self.run_id = uuid.uuid4().hex
        self._unseen = {"training", "validation"}
        self._finite: bool | None = None  # None: nothing was validated
        self._held = ExitStack()

    @property
    def state_key(self) -> str:
        """The same wherever the adapter lies: a run has one."""
        return "SaveAdapter"

    def state_dict(self) -> dict[str, Any]:
        """Best score so far and whose adapter it is, for restarts."""
        return {"best": self.best, "run_id": self.run_id}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the best score of the checkpoint."""
        self.best, self.run_id = state_dict["best"], state_dict["run_id"]

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Checks; a fresh adapter gets its first shift of the energies.

        Raises:
            ValueError: no adapter in the model, no ModelCheckpoint, the optimiser would change the base,
                the adapted model is not its base, labels that do not fit it, or ``path`` holds the adapter of
                another run or is being written to.
        """
        model = adapted_model(pl_module)
        checkpoint_callback(trainer)
        if trainer.is_global_zero:
            self._held.enter_context(only_writer(self.path.parent, f".{self.path.name}.lock"))
            self._check_folder(trainer.ckpt_path is not None)
        check_optimizers(trainer, pl_module)
        check_data(trainer, model)
        self.provenance = {
            "command": " ".join(sys.argv),
            "data": data_files(trainer.datamodule),
            "level_of_theory": self.level_of_theory,
        }
        check_base(model)
        fresh = trainer.ckpt_path is None and is_fresh(model)
        self._unseen, self._finite = {"training", "validation"}, None
        batch = next(self.batches(trainer), None)
        if batch is None:
            raise ValueError("SaveAdapter: the training data is empty")
        out = predict(model, batch)
        with disabled_adapters(model):
            base = predict(model, batch)
        if fresh:
            check_identity(model, out, base)
        require_finite(batch, pl_module.loss, "training frames, first batch")
        if self.check_units:
            require_units(batch, base)
        residual, table = residuals_of(batch, out, len(model.type_names))
        if not len(residual):
            _LOG.info("no energies in %d training frames: the shifts of the types stay those of the base", len(table))
            return
        mean = float((residual / table.sum(1)).mean())
        _LOG.info("energy reference check: mean (label - model) %.4f per atom on %d frames", mean, len(residual))
        if fresh and self._refit(trainer, pl_module, model, logging.INFO):  # which prints what it leaves
            return
        if abs(mean) > 1.0:
            _LOG.warning(
                "labels and base differ by %.2f per atom on average, and nothing takes that off: set shifts of the "
                "labels' level with modify_PerTypeScaleShift (isolated atoms of their method), or "
                "per_type_energy_shifts where the base has none; SaveAdapter's refit_shifts is %s", mean,
                self.refit_shifts,
            )  # fmt: skip

    def _check_folder(self, continued: bool) -> None:
        """An adapter of another run must not be overwritten."""
        if not (self.path / "adapter_config.json").exists():
            return
        if not continued:
            raise ValueError(
                f"SaveAdapter: path: {self.path} holds the adapter of another run; choose another folder, remove "
                "it, or continue that run with 'ckpt_path'"
            )
        theirs = read_adapter(self.path).run.get("run id")
        if theirs not in (None, self.run_id):  # None: of a version that had no run id
            raise ValueError(
                f"SaveAdapter: path: {self.path} holds the adapter of another run ({theirs}) than the one that "
                f"'ckpt_path' continues ({self.run_id}); give the folder of that run, or a new one"
            )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The labels of every frame are looked at once, after a restart again."""
        if "training" in self._unseen:
            require_finite(batch, pl_module.loss, f"training batch {batch_idx}")

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """All training frames have been looked at."""
        self._unseen.discard("training")

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """The same for validation."""
        if trainer.state.fn == "fit" and "validation" in self._unseen:
            require_finite(batch, pl_module.loss, f"validation batch {batch_idx}")

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Refit what will be validated; EMA weights are in the model at this point."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._refit(trainer, pl_module, adapted_model(pl_module), logging.DEBUG)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save when the monitored value improved; EMA weights are still in the model at this point."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._unseen.discard("validation")
        checkpoint = checkpoint_callback(trainer)
        score = float(trainer.callback_metrics.get(str(checkpoint.monitor), math.nan))
        better = self.best is None or (score > self.best if checkpoint.mode == "max" else score < self.best)
        self._finite = bool(self._finite) or math.isfinite(score)
        if not math.isfinite(score) or not better:
            return
        self.best = score
        model = adapted_model(pl_module)
        if trainer.global_step and is_fresh(model):
            raise ValueError(
                f"SaveAdapter: nothing of the adapter has moved in {trainer.global_step} steps; expected a learning "
                "rate above 0, and an optimizer and a training module that train what has gradients alone"
            )
        if trainer.is_global_zero:
            check_base(model)
            measured = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val")}
            run = {"epoch": trainer.current_epoch, "run id": self.run_id} | {
                k.replace("/", " "): v for k, v in measured.items()
            }
            save_adapter(
                model, self.path, adapter_name=ADAPTER, config=LoraConfig.from_dict(model.equitune_config),
                metadata=model.equitune_metadata | self.provenance, run=run,
            )  # fmt: skip
            _LOG.info("best epoch %d: adapter written to %s", trainer.current_epoch, self.path)

    def _refit(self, trainer: lightning.Trainer, pl_module: Any, model: Any, level: int) -> bool:
        """Whether there was something to refit, and energies to refit it to."""
        layer = next((la for la in adapter_layers(model).values() if "shifts" in la.lora_dense[ADAPTER]), None)
        if layer is None or not self.refit_shifts:
            return False
        return refit(pl_module, model, layer.lora_dense[ADAPTER]["shifts"], self.batches(trainer), level)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Say so when this run gave no adapter: nothing finite, or the folder was removed from a continued run."""
        super().on_fit_end(trainer, pl_module)
        self._held.close()
        if not trainer.is_global_zero:
            return
        there = (self.path / "adapter_config.json").is_file()
        if self._finite is False or (self.best is None and not there):
            _LOG.warning(
                "%s in %s: %s was never finite in a validated epoch; lower the learning rate, or look for what is "
                "missing in the validation labels", "only the adapter of before" if there else "no adapter", self.path,
                checkpoint_callback(trainer).monitor,
            )  # fmt: skip
        elif not there:
            _LOG.warning(
                "no adapter in %s: no epoch of this run was better than the best before (%s); take it from best.ckpt "
                "(README, NequIP), or train longer", self.path, self.best,
            )  # fmt: skip

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Say where the last adapter is."""
        self._held.close()
        if (self.path / "adapter_config.json").is_file():
            _LOG.info("the adapter of the best epoch so far is in %s", self.path)
