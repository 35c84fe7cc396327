"""Hand-over between levels of theory: align energy references and scale, weights untouched."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mace_lora.lora.energies import shift
from mace_lora.mace_plugin import evaluation
from mace_lora.mace_plugin.protocol import Run

from .scale import scale_between

__all__ = ["Alignment", "align", "refit_references"]

_FRAMES = 100
_NOTICEABLE = 50.0  # meV/atom: a mean residual that the network would have to learn


@dataclass(frozen=True)
class Alignment:
    """What was changed.

    Attributes:
        before, after: root mean square energy residual per atom, meV.
        offsets: change of the energy references by atomic number, eV.
        correlation, slope: of quantum against classical forces.
        scale: what the energy scale was multiplied by; 1 where it was left alone.
        shift: what was added to the energy of every atom, eV.
    """

    before: float
    after: float
    offsets: dict[int, float]
    correlation: float
    slope: float
    scale: float
    shift: float = 0.0


@torch.no_grad()
def align(
    run: Run, model: nn.Module, refit: bool = True, rescale: bool = True, move_shift: bool = False
) -> Alignment:  # fmt: skip
    """Fit scale and energy references of a model from another level of theory to the training frames, in place.

    Args:
        run: its training frames are the new level's.
        model: the model that was handed over.
        refit: shift the energy references by least squares on the residuals (minimum norm); otherwise the residual
            is only printed, since the references are isolated atoms that were asked for.
        rescale: in a model of one head, multiply the energy scale by the ratio of the root mean square forces, label
            to model.
        move_shift: where the references stay, add the mean residual per atom to the shift of the interaction energy.
            An isolated atom has the energy of its reference plus the shift: right for ScaleShiftMACE, whose shift
            upstream sets so; MACE's is zero, so that isolated atoms have their references exactly.

    Returns:
        what was done; it is logged too.
    """
    chosen = evaluation.spread(run.train_dataset, _FRAMES)
    correlation, slope, ratio = _forces(model, [run.train_dataset[i] for i in chosen])
    rescale = rescale and len(getattr(model, "heads", [""])) == 1  # replay frames are of the old level
    scale = ratio if rescale else 1.0
    model.scale_shift.scale.mul_(scale)  # type: ignore[operator, union-attr]
    table = evaluation.energy_table(model, run.train_dataset, chosen)
    if not len(table.residual):
        logging.info("equitune: autotune: no energy labels to align")
        return Alignment(float("nan"), float("nan"), {}, correlation, slope, scale)
    atoms = table.counts.sum(1)
    before = _rms(table.residual / atoms)
    energies: Any = model.atomic_energies_fn.atomic_energies  # type: ignore[union-attr]
    old = energies.view(-1, energies.shape[-1])[-1].clone()
    moved = 0.0 if refit or not move_shift else _move_shift(model, table)
    left = shift(energies, table) if refit else table.residual - moved * atoms * (table.head == table.head.max())
    after = _rms(left / atoms)
    total = (energies.view(-1, energies.shape[-1])[-1] - old).double().cpu().numpy()
    zs = [int(z) for z in model.atomic_numbers]  # type: ignore[union-attr, arg-type]
    logging.info(
        "equitune: autotune: quantum against classical forces: correlation %.3f, slope %.3f%s", correlation, slope,
        "" if scale == 1.0 else f"; energy scale multiplied by {scale:.3f}",
    )  # fmt: skip
    logging.info(
        "equitune: autotune: energy residual on %d frames %.2f meV/atom before, %.2f after%s", len(atoms), before,
        after, " refitting the energy references" if refit else "; the references are those that were asked for",
    )  # fmt: skip
    if not refit and not move_shift:
        _warn(table, adapted=bool(run.args.lora))
    return Alignment(before, after, dict(zip(zs, total.tolist(), strict=True)), correlation, slope, scale, moved)


def _mean(table: evaluation.EnergyTable) -> float:
    """Mean residual per atom of the last head, which is the new level's; eV."""
    mine = table.head == table.head.max()
    return float(np.mean(table.residual[mine] / table.counts[mine].sum(1)))


def _move_shift(model: nn.Module, table: evaluation.EnergyTable) -> float:
    """Add the mean residual to the shift of the new level; returns it."""
    mean = _mean(table)
    shifts: torch.Tensor = model.scale_shift.shift.view(-1)  # type: ignore[operator, union-attr, assignment]
    before = float(shifts[-1])
    shifts[-1] += mean
    logging.info(
        "equitune: autotune: shift of the interaction energy %.4f eV/atom before, %.4f after", before, float(shifts[-1])
    )
    return mean


def _warn(table: evaluation.EnergyTable, adapted: bool) -> None:
    """What references of isolated atoms leave to the network, unless an adapter's own refit takes it away."""
    mean = 1e3 * _mean(table)
    if abs(mean) > _NOTICEABLE and not adapted:
        logging.warning(
            "equitune: autotune: the mean energy residual of %.0f meV/atom must be unlearnt, since the references are "
            "isolated atoms and this model gives isolated atoms their references; give the classical stage isolated "
            "atoms of its own method (--autotune_E0s), or fit the references (--E0s=average)", mean,
        )  # fmt: skip


@torch.no_grad()
def refit_references(run: Run, model: nn.Module) -> None:
    """Least squares for the energy references at the present weights: forces leave a constant in the energies."""
    if "autotune_fit_frames" not in run.state:
        run.state["autotune_fit_frames"] = evaluation.spread(run.train_dataset, _FRAMES)
    table = evaluation.energy_table(model, run.train_dataset, run.state["autotune_fit_frames"])
    if len(table.residual):
        atoms = table.counts.sum(1)
        after = shift(model.atomic_energies_fn.atomic_energies, table)  # type: ignore[union-attr, arg-type]
        before, left = _rms(table.residual / atoms), _rms(after / atoms)
        logging.debug("equitune: autotune: energy references refitted: residual %.2f -> %.2f meV/atom", before, left)


def _rms(values: np.ndarray) -> float:
    return 1e3 * float(np.sqrt(np.mean(values**2)))


def _forces(model: nn.Module, frames: list[Any]) -> tuple[float, float, float]:
    """Correlation, slope and scale of labels against predictions, a frame at a time; upstream fills in zeros."""
    labels, predictions = [], []
    device = next(model.parameters()).device
    for frame in (f for f in frames if float(f.forces_weight) != 0):
        batch = evaluation.batch_of([frame], 1, device)
        with torch.enable_grad():
            predictions.append(evaluation.energy_forces(model, batch).forces.reshape(-1).double())
        labels.append(batch.forces.reshape(-1).double())
    if not labels:
        return 0.0, 1.0, 1.0
    label, mine = torch.cat(labels), torch.cat(predictions)
    product, square = float(label @ mine), float(mine @ mine)
    correlation, ratio = scale_between(product, float(label @ label), square)
    return correlation, product / square if square else 1.0, ratio
