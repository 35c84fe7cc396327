"""Energy references of a training in NequIP: how far labels and model are apart, and least squares for the shifts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import lightning
import numpy as np
import torch
from nequip.data import AtomicDataDict
from torch import nn

from mace_lora.autotune.scale import scale_between
from mace_lora.lora.blocks import is_kind
from mace_lora.lora.energies import solve_offsets
from nequip_ext.checks import require_flags, require_sizes
from nequip_ext.upstream.build import energy_network

__all__ = ["AlignEnergies", "WithTrainingFrames", "check_data", "predict", "refit", "residuals_of"]

_LOG = logging.getLogger("equitune")
_ALIKE = 0.8  # correlation of forces of the same frames by two methods, where one is not just in other units


class WithTrainingFrames(lightning.Callback):
    """A callback that looks at some of the training frames again and again.

    Args:
        max_frames: how many; spread over the set.
    """

    def __init__(self, max_frames: int) -> None:
        super().__init__()
        require_sizes({"max_frames": max_frames})
        self.max_frames = max_frames
        self._batches: list[dict[str, Any]] = []

    def batches(self, trainer: lightning.Trainer) -> Iterator[dict[str, Any]]:
        """The frames on the training's device; their neighbour lists are made once."""
        if not self._batches:
            self._batches = list(training_batches(trainer, self.max_frames))
        device = trainer.strategy.root_device
        for batch in self._batches:
            yield {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Let go of the frames."""
        self._batches = []


class AlignEnergies(WithTrainingFrames):
    """Refit the energy shifts of the types to the training frames, at the start and before every validation.

    For fine-tuning with all weights, also after a classical stage: without it the first epochs are spent on a constant,
    and the best epoch is the one whose constant happens to be small. Prints the residual before and after.

    Args:
        max_frames: training frames used.
        every_validation: refit before every validation too (energies of these frames, no forces).
        rescale: at the start also multiply the energy scales of the types by the ratio of the root mean square forces,
            label to model, where the two agree well enough: after a stage on labels of another method.
    """

    def __init__(self, max_frames: int = 200, every_validation: bool = True, rescale: bool = False) -> None:
        super().__init__(max_frames)
        require_flags({"every_validation": every_validation, "rescale": rescale})
        self.every_validation, self.rescale = every_validation, rescale

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Refit, unless training goes on from a checkpoint.

        Raises:
            ValueError: the model has no per-type shifts, or the training frames no energies.
        """
        for name, model in pl_module.model.items():
            if hasattr(model, "equitune_metadata"):
                raise ValueError(
                    "AlignEnergies: the shifts of a LoRA model belong to its frozen base; leave it out, "
                    "SaveAdapter refits them"
                )
            check_data(trainer, model)
            if trainer.ckpt_path is not None:
                continue
            shifts = shifts_of(model)
            if shifts is None:
                raise ValueError(
                    f"AlignEnergies: the model {name} has no per_type_energy_shifts to refit; set them (0.0 will do)"
                )
            if self.rescale:
                rescale(pl_module, model, self.batches(trainer))
            if not refit(pl_module, model, shifts, self.batches(trainer)):
                raise ValueError("AlignEnergies: expected total_energy labels in the training frames, got none")

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Refit what will be validated; EMA weights are in the model at this point."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or not self.every_validation:
            return
        for model in pl_module.model.values():
            shifts = shifts_of(model)
            if shifts is not None:
                refit(pl_module, model, shifts, self.batches(trainer), level=logging.DEBUG)


def _scale_shifts(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if is_kind(m, "PerTypeScaleShift", "nequip.nn.atomwise")]


def shifts_of(model: nn.Module) -> torch.Tensor | None:
    """Energy shifts of the types, eV; None where the model has none."""
    layers = _scale_shifts(model)
    return layers[-1].shifts if layers and layers[-1].has_shifts else None


@torch.no_grad()
def refit(
    pl_module: Any, model: Any, shifts: torch.Tensor, batches: Iterable[dict[str, Any]], level: int = logging.INFO
) -> bool:
    """Add the least-squares offsets of label minus model (training frames) to shifts, and to their EMA copy.

    Args:
        shifts: values for each type, or one for all, eV; changed in place.
        batches: training frames.
        level: of the line that says by how much.

    Returns:
        whether the frames have energies.
    """
    residuals, counts = [], []
    for batch in batches:
        residual, table = residuals_of(batch, _energies(model, batch), len(model.type_names))
        residuals.append(residual)
        counts.append(table)
    if not sum(map(len, residuals)):
        return False
    table, residual = np.concatenate(counts), np.concatenate(residuals)
    offsets = solve_offsets(table, residual)
    if shifts.numel() == 1:  # one shift for all types
        offsets = np.array([np.mean(residual / table.sum(1))])
    new = shifts + torch.as_tensor(offsets).to(shifts).reshape(shifts.shape)
    rms = [float(np.sqrt(np.mean((r / table.sum(1)) ** 2))) for r in (residual, residual - shifted(table, offsets))]
    _LOG.log(level, "energy shifts refitted on %d frames: rms residual %.5f -> %.5f per atom", len(residual), *rms)
    for tensor in with_averages(pl_module, shifts):
        tensor.copy_(new)
    return True


@torch.no_grad()
def rescale(pl_module: Any, model: Any, batches: Iterable[dict[str, Any]]) -> float:
    """Multiply the energy scales by the ratio of the forces, label to model, and their EMA copies too.

    Args:
        batches: training frames.

    Returns:
        the factor; 1 where the model has no scales, or the forces have too little in common to take one from.
    """
    key, sums = AtomicDataDict.FORCE_KEY, np.zeros(3)
    for batch in batches:
        if key in batch:
            label, mine = batch[key].double(), predict(model, batch)[key].double()
            known = torch.isfinite(label)
            label, mine = label[known], mine[known]
            sums += [float(label @ mine), float(label @ label), float(mine @ mine)]
    correlation, factor = scale_between(*sums)
    # a long path beside a trained model has a copy of its scales
    tensors = {id(m.scales): m.scales for m in model.modules() if torch.is_tensor(getattr(m, "scales", None))}
    layers: list[Any] = _scale_shifts(model)
    if not layers or not layers[-1].has_scales:
        tensors, factor = {}, 1.0
    elif factor == 1.0 and abs(correlation) > _ALIKE:
        _LOG.warning(
            "forces of labels and model are alike (correlation %.3f) but %.3g times as large: no methods differ so "
            "much; the scales are left alone, check the unit and the sign of the labels", correlation,
            (sums[1] / sums[2]) ** 0.5,
        )  # fmt: skip
    for tensor in (t for t in tensors.values() if t.numel()):
        new = tensor * factor
        for place in with_averages(pl_module, tensor):
            place.copy_(new)
    _LOG.info(
        "labels against the model's forces: correlation %.3f%s", correlation,
        "" if factor == 1.0 else f"; energy scales multiplied by {factor:.3f}",
    )  # fmt: skip
    return factor


def training_batches(trainer: Any, max_frames: int) -> Iterator[dict[str, torch.Tensor]]:
    """Training frames in order, in batches no larger than the training's; its shuffling is not disturbed."""
    loader = trainer.datamodule.train_dataloader()
    dataset, collate = loader.dataset, loader.collate_fn
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(max_frames, len(dataset))).round().astype(int))
    size = min(20, loader.batch_size or 20)  # larger ones might not fit the device
    for start in range(0, len(chosen), size):
        yield collate([dataset[int(i)] for i in chosen[start : start + size]])


def predict(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.enable_grad():
        # the plain forward: a compiled variant would be made for this batch's shape
        out = model.model({k: v for k, v in batch.items() if k in model.model_input_fields})  # type: ignore[operator]
    return {k: v.detach() for k, v in out.items() if torch.is_tensor(v)}


def _energies(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Energies without the cost of forces, where the model is built as upstream's are."""
    try:
        network = energy_network(model)
    except ValueError:
        return predict(model, batch)
    out: dict[str, torch.Tensor] = network({k: v for k, v in batch.items() if k in model.model_input_fields})
    return out


def residuals_of(
    batch: dict[str, torch.Tensor], out: dict[str, torch.Tensor], types: int
) -> tuple[np.ndarray, np.ndarray]:
    """Label minus model energy (labelled frames,) and their numbers of atoms of each type (frames, types)."""
    key = AtomicDataDict.TOTAL_ENERGY_KEY
    frame = batch[AtomicDataDict.BATCH_KEY].cpu().numpy()
    table = np.zeros((frame.max() + 1, types))
    np.add.at(table, (frame, batch[AtomicDataDict.ATOM_TYPE_KEY].reshape(-1).cpu().numpy()), 1.0)
    if key not in batch:
        return np.zeros(0), table[:0]
    difference = (batch[key] - out[key]).double().reshape(-1).cpu().numpy()
    labelled = np.isfinite(difference)
    return difference[labelled], table[labelled]


def check_data(trainer: Any, model: Any) -> None:
    """Training and validation data must number the types as the model does, and have neighbours as far as it looks.

    Upstream does not compare them: a model on data with other types or a shorter cutoff trains, and is wrong.

    Raises:
        ValueError: another order or set of types, or a shorter cutoff.
    """
    waiting = [trainer.datamodule.train_dataset, *trainer.datamodule.val_dataset]
    while waiting:
        dataset = waiting.pop()
        if isinstance(dataset, list):
            waiting += dataset
            continue
        waiting += [dataset.dataset] if hasattr(dataset, "dataset") else list(getattr(dataset, "datasets", ()))
        for transform in getattr(dataset, "transforms", ()):
            types, cutoff = getattr(transform, "model_type_names", None), getattr(transform, "r_max", None)
            if types is not None and list(types) != list(model.type_names):
                raise ValueError(
                    f"data: model_type_names: expected {list(model.type_names)}, in this order, as in the model, got "
                    f"{list(types)}"
                )
            if cutoff is not None and float(cutoff) < float(model.metadata["r_max"]) - 1e-6:
                raise ValueError(
                    f"data: r_max of {type(transform).__name__}: expected at least the model's "
                    f"{float(model.metadata['r_max']):g} Å, got {float(cutoff):g} Å"
                )


def shifted(table: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    shifted: np.ndarray = table.sum(1) * offsets[0] if len(offsets) == 1 else table @ offsets
    return shifted


def with_averages(pl_module: Any, parameter: torch.Tensor) -> list[torch.Tensor]:
    """A parameter and, with EMA, its other copy: refits must not be averaged with the past."""
    ema = getattr(pl_module, "ema", None)
    if ema is None:
        return [parameter]
    index = next((i for i, p in enumerate(pl_module.model.parameters()) if p is parameter), None)
    return [parameter] if index is None else [parameter, ema.ema_weights[index]]  # fixed shifts have no average
