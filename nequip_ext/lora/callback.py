"""Lightning callback: checks before training, and the adapter on disk at every best epoch."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from nequip.data import AtomicDataDict

from mace_lora.atomic import content_digest
from mace_lora.lora.config import LoraConfig
from mace_lora.lora.fingerprint import fingerprint
from mace_lora.lora.inject import adapter_layers, disabled_adapters
from mace_lora.lora.saving import save_adapter
from nequip_ext.energies import check_data, predict, refit, residuals_of, training_batches

from .builder import ADAPTER

__all__ = ["SaveAdapter"]

_LOG = logging.getLogger("equitune")
_TOLERANCE = {"float32": 1e-4, "float64": 1e-9}


class SaveAdapter(lightning.Callback):
    """Write the adapter at every best epoch, with EMA weights where the run has them.

    "Best" is what the run's first ``ModelCheckpoint`` with a ``monitor`` watches, in every validated epoch
    (also where that checkpoint is written more rarely), as measured before the refit. Before training it
    checks that the adapted model equals its base and prints how far the energies are off; when saving, the
    shifts of the types are refitted to the training frames by least squares (the adapter keeps the change).

    Args:
        path: folder of the adapter; one of another run is not overwritten.
        refit_shifts: refit the energy shifts of the types.
        max_frames: training frames used for checks and refit.
        level_of_theory: of the labels, for the adapter's card, e.g. ``PBE0/def2-SVP``.
    """

    def __init__(
        self, path: str, refit_shifts: bool = True, max_frames: int = 200, level_of_theory: str | None = None
    ) -> None:  # fmt: skip
        super().__init__()
        if max_frames < 1:
            raise ValueError(f"max_frames: expected at least 1, got {max_frames}")
        self.path, self.refit_shifts, self.max_frames = Path(path), refit_shifts, max_frames
        self.level_of_theory, self.provenance = level_of_theory, dict[str, Any]()
        self.best: float | None = None

    @property
    def state_key(self) -> str:
        """One state for each adapter of a run."""
        return f"SaveAdapter{{path={self.path}}}"

    def state_dict(self) -> dict[str, Any]:
        """Best score so far, for restarts."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the best score of the checkpoint."""
        self.best = state_dict["best"]

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Checks; a fresh adapter gets its first shift of the energies.

        Raises:
            ValueError: no adapter in the model, no ModelCheckpoint, the optimiser would change the base,
                the adapted model is not its base, or ``path`` holds the adapter of another run.
        """
        model = adapted_model(pl_module)
        _checkpoint(trainer)
        if trainer.ckpt_path is None and (self.path / "adapter_config.json").exists():
            raise ValueError(
                f"SaveAdapter: path: {self.path} holds the adapter of another run; choose another folder, remove "
                "it, or continue that run with 'ckpt_path'"
            )
        _check_optimizers(trainer, pl_module)
        check_data(trainer, model)
        self.provenance = {
            "command": " ".join(sys.argv), "data": _files(trainer.datamodule), "level_of_theory": self.level_of_theory
        }  # fmt: skip
        _check_base(model)
        fresh = trainer.ckpt_path is None and is_fresh(model)
        batch = next(training_batches(trainer, self.max_frames), None)
        if batch is None:
            raise ValueError("SaveAdapter: the training data is empty")
        out = predict(model, batch)
        with disabled_adapters(model):
            base = predict(model, batch)
        keys = (AtomicDataDict.TOTAL_ENERGY_KEY, AtomicDataDict.FORCE_KEY)
        largest = [float((out[k] - base[k]).abs().max()) for k in keys if k in out]
        if fresh:
            _LOG.info("identity at start: largest difference of energies and forces %s", largest)
            tolerance = _TOLERANCE[str(model.model_dtype).rpartition(".")[2]]
            size = [float(base[k].abs().max()) for k in keys if k in out]
            if any(found > tolerance * (1 + s) for found, s in zip(largest, size, strict=True)):
                raise ValueError(f"nequip_ext.LoRA: the adapted model differs from its base before training: {largest}")
        residual, table = residuals_of(batch, out, len(model.type_names))
        if not len(residual):
            _LOG.info("no energies in %d training frames: the shifts of the types stay those of the base", len(table))
            return
        mean = float((residual / table.sum(1)).mean())
        _LOG.info("energy reference check: mean (label - model) %.4f per atom on %d frames", mean, len(residual))
        if abs(mean) > 1.0 and not (fresh and self.refit_shifts):  # the refit prints what it leaves
            _LOG.warning(
                "labels and base differ by %.2f per atom on average: the shifts do not fit the labels' level; "
                "set them with modify_PerTypeScaleShift (isolated atoms of the labels' method)", mean,
            )  # fmt: skip
        if fresh and self.refit_shifts:
            self._refit(trainer, pl_module, model)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save when the monitored value improved; EMA weights are still in the model at this point."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        checkpoint = _checkpoint(trainer)
        score = float(trainer.callback_metrics.get(str(checkpoint.monitor), math.nan))
        better = self.best is None or (score > self.best if checkpoint.mode == "max" else score < self.best)
        if not math.isfinite(score) or not better:
            return
        self.best = score
        model = adapted_model(pl_module)
        if trainer.global_step and is_fresh(model):
            raise ValueError(
                f"SaveAdapter: nothing of the adapter has moved in {trainer.global_step} steps; expected a learning "
                "rate above 0, and an optimizer and a training module that train what has gradients alone"
            )
        if self.refit_shifts:
            self._refit(trainer, pl_module, model)
        if trainer.is_global_zero:
            _check_base(model)
            measured = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val")}
            run = {"epoch": trainer.current_epoch} | {k.replace("/", " "): v for k, v in measured.items()}
            save_adapter(
                model, self.path, adapter_name=ADAPTER, config=LoraConfig.from_dict(model.equitune_config),
                metadata=model.equitune_metadata | self.provenance, run=run,
            )  # fmt: skip
            _LOG.info("best epoch %d: adapter written to %s", trainer.current_epoch, self.path)

    @torch.no_grad()
    def _refit(self, trainer: lightning.Trainer, pl_module: Any, model: Any) -> None:
        layer = next((la for la in adapter_layers(model).values() if "shifts" in la.lora_dense[ADAPTER]), None)
        if layer is None:
            return
        refit(trainer, pl_module, model, layer.lora_dense[ADAPTER]["shifts"], self.max_frames)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Say so when there is no adapter, as after its folder was removed from a run that is continued."""
        if trainer.is_global_zero and not (self.path / "adapter_config.json").is_file():
            _LOG.warning(
                "no adapter in %s: no epoch of this run was better than the best before (%s); take it from best.ckpt "
                "(README, NequIP), or train longer", self.path, self.best,
            )  # fmt: skip

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Say where the last adapter is."""
        if (self.path / "adapter_config.json").is_file():
            _LOG.info("the adapter of the best epoch so far is in %s", self.path)


def is_fresh(model: Any) -> bool:
    """Whether the adapter is as it was initialised: all B are zero."""
    return all(bool((b == 0).all()) for la in adapter_layers(model).values() for b in la.lora_B[ADAPTER].values())


def _files(datamodule: Any) -> dict[str, str]:
    """Hash of every file of training and validation data."""
    waiting, found = [datamodule.train_dataset, *datamodule.val_dataset], dict[str, str]()
    while waiting:
        dataset = waiting.pop()
        if isinstance(dataset, list):
            waiting += dataset
        elif hasattr(dataset, "dataset"):  # a part of another
            waiting.append(dataset.dataset)
        elif Path(str(getattr(dataset, "file_path", ""))).is_file():
            path, digest = Path(dataset.file_path), content_digest(dataset.file_path)
            # no more of the path than tells files apart: the card may go to a hub
            found[path.name if found.get(path.name, digest) == digest else f"{path.parent.name}/{path.name}"] = digest
    return found


def adapted_model(pl_module: Any) -> Any:
    """The one adapted model of a Lightning module.

    Raises:
        ValueError: there is none, or several.
    """
    found = [m for m in pl_module.model.values() if hasattr(m, "equitune_metadata")]
    if len(found) != 1:
        raise ValueError(
            f"SaveAdapter: expected one model built by nequip_ext.LoRA, got {len(found)}; wrap 'model' in "
            "'_target_: nequip_ext.LoRA'"
        )
    return found[0]


def _check_base(model: Any) -> None:
    """The base must still be the one that the adapter is written for."""
    expected, got = model.equitune_metadata["base_fingerprint"], fingerprint(model)
    if got != expected:
        raise ValueError(
            f"SaveAdapter: the base changed since the model was built (fingerprint {expected}, now {got}): a continued "
            "run whose base file is another by now, a modifier outside nequip_ext.LoRA (move it inside, around the "
            "base), or a callback that writes to frozen weights; start from that base"
        )


def _check_optimizers(trainer: lightning.Trainer, pl_module: Any) -> None:
    """What updates parameters without gradients must not get the frozen base: Muon's optimiser, ConFIG's solver."""
    if hasattr(pl_module, "ConFIG_model_param_names"):
        raise ValueError(
            f"training_module: {type(pl_module).__name__} solves for all weights at once, the frozen ones too, and "
            "would train nothing of an adapter; take nequip.train.EMALightningModule or NequIPLightningModule"
        )
    for optimizer in trainer.optimizers:
        muon = any("use_muon" in group for group in optimizer.param_groups)
        if muon and not all(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                f"optimizer: {type(optimizer).__name__} would decay and update the frozen base; expected groups of "
                "trained parameters only; set 'param_groups: {_target_: nequip_ext.MuonParamGroups, muon: …, adam: …}'"
            )


def _checkpoint(trainer: lightning.Trainer) -> ModelCheckpoint:
    found = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor]
    if not found:
        raise ValueError(
            "SaveAdapter: expected a ModelCheckpoint callback with 'monitor' in trainer.callbacks, got none"
        )
    return found[0]
