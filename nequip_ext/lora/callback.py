"""Lightning callback: checks before training, and the adapter on disk at every best epoch."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from nequip.data import AtomicDataDict
from torch import nn

from mace_lora.lora.adapter import save_adapter
from mace_lora.lora.config import LoraConfig
from mace_lora.lora.energies import solve_offsets
from mace_lora.lora.inject import adapter_layers, disabled_adapters

from .builder import ADAPTER

__all__ = ["SaveAdapter"]

_LOG = logging.getLogger("equitune")
_TOLERANCE = {"float32": 1e-4, "float64": 1e-9}


class SaveAdapter(lightning.Callback):
    """Write the adapter at every best epoch, with EMA weights where the run has them.

    "Best" is what the run's ``ModelCheckpoint`` monitors. Before training it checks that the adapted
    model equals its base and prints how far the energies are off; when saving, the shifts of the
    types are refitted to the training frames by least squares (the adapter keeps the change).

    Args:
        path: folder of the adapter.
        refit_shifts: refit the energy shifts of the types.
        max_frames: training frames used for checks and refit.
    """

    def __init__(self, path: str, refit_shifts: bool = True, max_frames: int = 200) -> None:
        super().__init__()
        if max_frames < 1:
            raise ValueError(f"max_frames: expected at least 1, got {max_frames}")
        self.path, self.refit_shifts, self.max_frames = Path(path), refit_shifts, max_frames
        self.best: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """Best score so far, for restarts."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the best score of the checkpoint."""
        self.best = state_dict["best"]

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Checks; a fresh adapter gets its first shift of the energies.

        Raises:
            ValueError: no adapter in the model, no ModelCheckpoint, the optimiser would change the base, or
                the adapted model is not its base.
        """
        model = adapted_model(pl_module)
        _checkpoint(trainer)
        _check_optimizers(trainer)
        fresh = trainer.ckpt_path is None and all(
            bool((b == 0).all()) for la in adapter_layers(model).values() for b in la.lora_B[ADAPTER].values()
        )
        batch = next(_batches(trainer, self.max_frames), None)
        if batch is None:
            raise ValueError("SaveAdapter: the training data is empty")
        out = _predict(model, batch)
        with disabled_adapters(model):
            base = _predict(model, batch)
        keys = (AtomicDataDict.TOTAL_ENERGY_KEY, AtomicDataDict.FORCE_KEY)
        largest = [float((out[k] - base[k]).abs().max()) for k in keys if k in out]
        if fresh:
            _LOG.info("identity at start: largest difference of energies and forces %s", largest)
            tolerance = _TOLERANCE[str(model.model_dtype).rpartition(".")[2]]
            if max(largest) > tolerance * (1 + float(base[keys[0]].abs().max())):
                raise ValueError(f"nequip_ext.LoRA: the adapted model differs from its base before training: {largest}")
        residual, atoms = _residual(batch, out)
        if not len(residual):
            return
        mean = float((residual / atoms).mean())
        _LOG.info("energy reference check: mean (label - model) %.4f per atom on %d frames", mean, len(residual))
        if abs(mean) > 1.0:
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
        if self.refit_shifts:
            self._refit(trainer, pl_module, model)
        if trainer.is_global_zero:
            run = {"epoch": trainer.current_epoch, str(checkpoint.monitor).replace("/", " "): score}
            config = LoraConfig.from_dict(model.equitune_config)
            save_adapter(
                model, self.path, adapter_name=ADAPTER, config=config, metadata=model.equitune_metadata, run=run
            )
            _LOG.info("best epoch %d: adapter written to %s", trainer.current_epoch, self.path)

    @torch.no_grad()
    def _refit(self, trainer: lightning.Trainer, pl_module: Any, model: Any) -> None:
        layer = next((la for la in adapter_layers(model).values() if "shifts" in la.lora_dense[ADAPTER]), None)
        if layer is None:
            return
        residuals, counts = [], []
        for batch in _batches(trainer, self.max_frames):
            residual, _ = _residual(batch, _predict(model, batch))
            if len(residual):
                residuals.append(residual)
                counts.append(_counts(batch, len(model.type_names)))
        if not residuals:
            return
        table, residual = np.concatenate(counts), np.concatenate(residuals)
        offsets = solve_offsets(table, residual)
        update = layer.lora_dense[ADAPTER]["shifts"]
        if update.numel() == 1:  # one shift for all types
            offsets = np.array([np.mean(residual / table.sum(1))])
        new = update + torch.as_tensor(offsets).to(update).reshape(update.shape)
        rms = [float(np.sqrt(np.mean((r / table.sum(1)) ** 2))) for r in (residual, residual - _shift(table, offsets))]
        _LOG.info("energy shifts refitted on %d frames: rms residual %.5f -> %.5f per atom", len(residual), *rms)
        for tensor in _with_averages(pl_module, update):
            tensor.copy_(new)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Say where the last adapter is."""
        if (self.path / "adapter_config.json").is_file():
            _LOG.info("the adapter of the best epoch so far is in %s", self.path)


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


def _check_optimizers(trainer: lightning.Trainer) -> None:
    """Muon's optimiser updates parameters without gradients: the frozen base must not be among them."""
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


def _batches(trainer: Any, max_frames: int) -> Iterator[dict[str, torch.Tensor]]:
    """Training frames in order, in batches, without disturbing the training loader's shuffling."""
    loader = trainer.datamodule.train_dataloader()
    dataset, collate = loader.dataset, loader.collate_fn
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(max_frames, len(dataset))).round().astype(int))
    device = trainer.strategy.root_device
    for start in range(0, len(chosen), 20):
        batch = collate([dataset[int(i)] for i in chosen[start : start + 20]])
        yield {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


def _predict(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.enable_grad():
        # the plain forward: a compiled variant would be made for this batch's shape
        out = model.model({k: v for k, v in batch.items() if k in model.model_input_fields})  # type: ignore[operator]
    return {k: v.detach() for k, v in out.items() if torch.is_tensor(v)}


def _residual(batch: dict[str, torch.Tensor], out: dict[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Label minus model energy (frames,) of labelled frames, and their numbers of atoms."""
    key = AtomicDataDict.TOTAL_ENERGY_KEY
    atoms = np.bincount(batch[AtomicDataDict.BATCH_KEY].cpu().numpy()).astype(float)
    if key not in batch:
        return np.zeros(0), atoms
    difference = (batch[key] - out[key]).double().reshape(-1).cpu().numpy()
    if not np.isfinite(difference).all():
        return np.zeros(0), atoms
    return difference, atoms


def _counts(batch: dict[str, torch.Tensor], types: int) -> np.ndarray:
    """(frames, types) numbers of atoms."""
    frame = batch[AtomicDataDict.BATCH_KEY].cpu().numpy()
    table = np.zeros((frame.max() + 1, types))
    np.add.at(table, (frame, batch[AtomicDataDict.ATOM_TYPE_KEY].reshape(-1).cpu().numpy()), 1.0)
    return table


def _shift(table: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    shifted: np.ndarray = table.sum(1) * offsets[0] if len(offsets) == 1 else table @ offsets
    return shifted


def _with_averages(pl_module: Any, parameter: torch.Tensor) -> list[torch.Tensor]:
    """A parameter and, with EMA, its other copy: refits must not be averaged with the past."""
    ema = getattr(pl_module, "ema", None)
    if ema is None:
        return [parameter]
    index = next(i for i, p in enumerate(pl_module.model.parameters()) if p is parameter)
    return [parameter, ema.ema_weights[index]]
