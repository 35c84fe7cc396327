"""Checks on the adapted model before any training: coverage, identity, merge, energy references."""

from __future__ import annotations

import copy
import logging
import math

import torch
from ase import units
from torch import nn

from mace_lora.mace_plugin import evaluation
from mace_lora.mace_plugin.protocol import Run, SettingsError

from .coverage import coverage
from .inject import adapter_layers, disabled_adapters, merge_lora

__all__ = ["preflight"]

# Largest deviation that rounding explains, relative to the largest value (float32, float64).
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}
_FRAMES = 32
_UNIT_CORRELATION, _UNIT_SLOPE = 0.6, 5.0
# eV/A per unit: labels in that unit are 1/value times as large as in eV/A
_FORCE_UNITS = {
    "Hartree/Bohr": units.Hartree / units.Bohr,
    "Hartree/A": units.Hartree,
    "kcal/mol/A": units.kcal / units.mol,
    "kJ/mol/A": units.kJ / units.mol,
    "kJ/mol/nm": 0.1 * units.kJ / units.mol,
    "meV/A": 1e-3,
}


def preflight(run: Run, model: nn.Module, adapter: str, fresh: bool) -> None:
    """Print the coverage table and check the model on a batch of training frames.

    Args:
        run: the run; its training frames are used without disturbing their shuffling.
        model: adapted model on its device.
        adapter: adapter name.
        fresh: the adapter is new, so the model must equal its base.

    Raises:
        SettingsError: identity or merge fails, or nothing is trainable.
    """
    report = coverage(model)
    logging.info("equitune: LoRA coverage\n%s", report)
    if report.trainable == 0:
        raise SettingsError("--lora: no parameter is trainable; check --lora_targets and --lora_rank_pattern")
    batch = evaluation.batch_of(run.train_dataset, _FRAMES, next(model.parameters()).device)
    adapted = evaluation.energy_forces(model, batch)
    with disabled_adapters(model):
        base = evaluation.energy_forces(model, batch)
    if fresh:
        de, df = _largest(base, adapted)
        logging.info("equitune: identity at start: |dE| <= %.2e eV, |dF| <= %.2e eV/A", de, df)
        _require_equal(base, adapted, "the adapted model differs from its base before training")
    _dry_merge(model, adapter, batch)
    refit = bool(run.args.lora_refit_E0s)
    for head, frames in evaluation.spread_by_head(run.train_dataset, _FRAMES).items():
        batch = evaluation.batch_of(run.train_dataset, frames, next(model.parameters()).device)
        predicted = evaluation.energy_forces(model, batch)
        name = f" of head {run.heads[head]}" if len(run.heads) > 1 else ""
        _force_units(batch, predicted, name)
        _energy_references(batch, predicted, name, refit)


def _largest(a: evaluation.Prediction, b: evaluation.Prediction) -> tuple[float, float]:
    return float((a.energy - b.energy).abs().max()), float((a.forces - b.forces).abs().max())


def _require_equal(a: evaluation.Prediction, b: evaluation.Prediction, what: str) -> None:
    tolerance = _TOLERANCE.get(a.forces.dtype, 1e-3)
    de, df = _largest(a, b)
    if de > tolerance * (1 + float(a.energy.abs().max())) or df > tolerance * (1 + float(a.forces.abs().max())):
        raise SettingsError(f"--lora: {what}: |dE| = {de:.3e} eV, |dF| = {df:.3e} eV/A (tolerance {tolerance:g})")


def _dry_merge(model: nn.Module, adapter: str, batch: evaluation.Batch) -> None:
    """Merge a copy whose B is not zero and compare it with the unmerged model."""
    trial = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in adapter_layers(trial).values():
            for b in layer.lora_B[adapter].values():
                b.add_(1e-4 * torch.randn(b.shape, generator=generator, dtype=b.dtype).to(b.device))
    unmerged = evaluation.energy_forces(trial, batch)
    merged = evaluation.energy_forces(merge_lora(trial), batch)
    _require_equal(unmerged, merged, "the merged model differs from the adapted one")
    logging.info("equitune: dry-run merge: |dE| <= %.2e eV, |dF| <= %.2e eV/A", *_largest(unmerged, merged))


def _force_units(batch: evaluation.Batch, predicted: evaluation.Prediction, head: str) -> None:
    """Labels that follow the base's forces at a scale no level of theory explains are in other units."""
    label, model = batch.forces.reshape(-1).double(), predicted.forces.reshape(-1).double()
    norms = float(label.norm() * model.norm())
    if not norms or not torch.isfinite(label).all():
        return
    correlation, slope = float(label @ model) / norms, float(label @ model) / float(model @ model)
    logging.info("equitune: label against model forces%s: correlation %.3f, slope %.3g", head, correlation, slope)
    if correlation < -_UNIT_CORRELATION:
        raise SettingsError(
            f"--train_file: force labels{head} are opposite to the base model's forces (correlation "
            f"{correlation:.2f}); expected forces, these look like energy gradients; change their sign"
        )
    if correlation > _UNIT_CORRELATION and not 1 / _UNIT_SLOPE < slope < _UNIT_SLOPE:
        unit = min(_FORCE_UNITS, key=lambda u: abs(math.log(slope * _FORCE_UNITS[u])))
        raise SettingsError(
            f"--train_file: force labels{head} are {slope:.3g} times the base model's forces, correlation "
            f"{correlation:.2f}; expected eV/A, these look like {unit}; convert forces and energies to eV/A and eV"
        )


def _energy_references(batch: evaluation.Batch, predicted: evaluation.Prediction, head: str, refit: bool) -> None:
    """Table of the mean energy residual before training; a large one means wrong E0s."""
    residual = (batch.energy - predicted.energy) / batch.atoms
    residual = residual[batch.labelled & torch.isfinite(residual)]
    if residual.numel() == 0:
        return
    mean, spread = float(residual.mean()), float(residual.std(unbiased=False))
    logging.info(
        "equitune: energy reference check on %d frames%s: mean (label - model) %.4f eV/atom, spread %.4f eV/atom",
        residual.numel(), head, mean, spread,
    )  # fmt: skip
    if abs(mean) > 1.0:
        logging.warning(
            "equitune: labels%s and base model differ by %.2f eV/atom on average: %s", head, mean,
            "--lora_refit_E0s takes that off at the start; if --E0s are not isolated-atom energies of the labels' own "
            "method, give those, or --E0s=estimated"
            if refit
            else "the E0s do not fit the labels' level of theory. Give isolated-atom energies of the labels' own "
            "method with --E0s (or IsolatedAtom frames), or --E0s=estimated to fit them to the base model, or "
            "--E0s=average",
        )  # fmt: skip
