"""``mace_run_train --lora``: flags and behaviour of LoRA in MACE's training command."""

from __future__ import annotations

import argparse
import logging
import numbers
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from mace_lora.mace_plugin import base_model, labels
from mace_lora.mace_plugin.by_element import KERNELS
from mace_lora.mace_plugin.evaluation import spread
from mace_lora.mace_plugin.protocol import Run, SettingsError, TrainPlugin

from .adapter import read_adapter
from .by_element import enable
from .energies import BUFFER, MODULE, difference, fit_references, reference_plan
from .fingerprint import fingerprint
from .inject import ModulePlan, adapter_layers, apply_plan, merge_lora, plan_lora
from .loading import load_tensors
from .mace_args import add_arguments, config_from, refuse_conflicts, refuse_unused, resolve_defaults
from .preflight import preflight
from .saving import adapter_tensors, save_adapter

__all__ = ["LoraPlugin"]

ADAPTER = "default"
_FIT_FRAMES = 200  # of each head, for the refit of the energy references


class LoraPlugin(TrainPlugin):
    """LoRA for MACE: replaces upstream's ``--lora`` unless ``--lora_backend=mace``."""

    name = "lora"
    flag, leaves = "--lora", "LoRA adapters"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_arguments(parser)

    def enabled(self, args: argparse.Namespace) -> bool:
        return bool(args.lora) and args.lora_backend == "equitune"

    def check_args(self, run: Run) -> None:
        args = run.args
        refuse_unused(args)
        resolve_defaults(args)
        if not self.enabled(args):
            return
        run.state["lora_config"] = config_from(args)
        refuse_conflicts(args)
        _keep_learning_rate(args)
        if args.lora_init_adapter is not None:
            try:
                run.state["lora_start"] = read_adapter(args.lora_init_adapter)
            except (ValueError, FileNotFoundError) as err:
                raise SettingsError(f"--lora_init_adapter: {err}") from err
        labels.check_files(args)
        run.state["lora_data"] = labels.data_hashes(args)  # upstream turns the files into heads later

    def before_model(self, run: Run) -> None:
        _check_adapter_folder(run)
        foundation = run.foundation
        if foundation is None:
            raise SettingsError("--lora: expected a base model, got none; give --foundation_model")
        known = set(base_model.elements(foundation))
        missing = sorted(set(run.elements) - known)
        if missing:
            raise SettingsError(
                f"--train_file: element(s) Z = {missing} are missing in the base model {run.args.foundation_model}, "
                f"which has Z = {sorted(known)}; choose a base that covers them, or train without --lora"
            )
        if run.args.multiheads_finetuning:
            logging.info(
                "equitune: --lora keeps lr %g and the EMA settings of the command line in multi-head fine-tuning "
                "(upstream would set lr 0.0001 and EMA decay 0.99999)", run.args.lr,
            )  # fmt: skip

    def after_model(self, run: Run, model: nn.Module) -> nn.Module:
        config, start = run.state["lora_config"], run.state.get("lora_start")
        run.state["lora_metadata"] = _metadata(run, model)
        model = model.to(torch.device(run.args.device))
        try:
            plan = plan_lora(model, config) if start is None else list(start.plan)
            if start is None:
                plan = _train_in_full(model, plan, run.state.get("train_in_full", ()))
            if run.args.lora_refit_E0s and MODULE not in [p.name for p in plan]:
                plan.append(reference_plan())
            if start is not None:
                run.state["lora_config"] = config = start.config
                _check_start(run, start.metadata, model)
            apply_plan(model, plan, config, ADAPTER)
            if start is not None:
                load_tensors(model, start, ADAPTER, Path(run.args.lora_init_adapter))
                _keep_references(run, start.metadata, model)
        except ValueError as err:
            raise SettingsError(f"--lora: {err}") from err
        preflight(run, model, ADAPTER, fresh=start is None)
        if run.args.lora_refit_E0s and start is None and "checkpoint" not in run.state:
            _refit(run, model)  # else the first epochs are spent, and judged, on a constant
        enable(model, KERNELS)
        return model

    def optimizer_groups(self, run: Run, model: nn.Module) -> list[dict[str, Any]] | None:
        # One group, whatever the parameters' names: upstream decays by name.
        trained = [p for p in model.parameters() if p.requires_grad]
        group = {"name": "lora", "params": trained, "weight_decay": run.args.lora_weight_decay, "lr": run.args.lr}
        if run.args.optimizer in ("adam", "adamw"):
            group["fused"] = True  # many small factors: one kernel instead of a loop over them
        return [group]

    def before_epoch(self, run: Run, model: nn.Module, epoch: int) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # every process refits the energy references, on a GPU not to the last digit
            for layer in adapter_layers(model).values():
                for update in layer.lora_dense[ADAPTER].values():
                    if not update.requires_grad:
                        torch.distributed.broadcast(update.data, 0)

    def before_validation(self, run: Run, model: nn.Module) -> None:
        if run.args.lora_refit_E0s:
            _refit(run, model, logging.DEBUG)

    def on_checkpoint(self, run: Run, model: nn.Module, epoch: int, stage_two: bool) -> Mapping[str, Any]:
        bad = [k for k, v in adapter_tensors(model, ADAPTER).items() if not bool(torch.isfinite(v).all())]
        if bad:  # before the checkpoint is written: the last one is sound
            raise SettingsError(
                f"--lora: the adapter contains NaN or infinity in {bad[0]}: the training has diverged; the last "
                "checkpoint and adapter are unchanged; start again with a lower --lr and another --name"
            )
        state = {"epoch": epoch, "validation_loss": run.last_valid_loss, **_valid_errors(run)}
        return {
            "config": run.state["lora_config"].to_dict(), "refit_E0s": run.args.lora_refit_E0s, "state": state,
            "stage_two": stage_two, "lr": run.args.lr, "weight_decay": run.args.lora_weight_decay,
        }  # fmt: skip

    def after_checkpoint(self, run: Run, model: nn.Module, stored: Mapping[str, Any]) -> None:
        """Write the adapter: after the checkpoint, so that it is never ahead of what a restart goes on from."""
        folder = _folder(run, stored["stage_two"])
        try:
            save_adapter(
                model,
                folder,
                adapter_name=ADAPTER,
                config=run.state["lora_config"],
                metadata=run.state["lora_metadata"],
                run=stored["state"],
            )
        except (OSError, SafetensorError) as err:
            raise SettingsError(
                f"--model_dir: cannot write the adapter to {folder} ({err}); the last one is unchanged; free some "
                "space and continue with --restart_latest"
            ) from err
        if not run.state.get("lora_announced"):
            run.state["lora_announced"] = True
            logging.info("equitune: writing the adapter to %s at every best epoch", folder)

    def after_restart(self, run: Run, model: nn.Module) -> None:
        assert run.restored is not None
        stored = run.restored["plugins"]["lora"]
        saved, now = stored["config"], run.state["lora_config"].to_dict()
        changed = [f"{k}: {saved.get(k)!r} before, {v!r} now" for k, v in now.items() if saved.get(k) != v]
        args = run.args
        for key, value in (("refit_E0s", args.lora_refit_E0s), ("weight_decay", args.lora_weight_decay)):
            if stored.get(key, value) != value:
                changed.append(f"{key}: {stored[key]} before, {value} now")
        if stored.get("lr", args.lr) != args.lr:
            raise SettingsError(
                f"--lr: expected {stored['lr']:g} as in the checkpoint that is continued, whose optimiser state holds "
                f"it, got {args.lr:g}; give it again, or start anew with another --name (--lora_init_adapter goes on "
                "from an adapter)"
            )
        if changed:
            raise SettingsError(
                f"--restart_latest: the --lora_* flags differ from the checkpoint's ({'; '.join(changed)}); give "
                "the same flags as before, or another --name"
            )
        expected, got = run.state["lora_metadata"]["base_fingerprint"], fingerprint(model)
        if got != expected:
            raise SettingsError(
                "--restart_latest: the checkpoint has another base model or other energy references than this command: "
                f"expected fingerprint {expected}, got {got}; give the same --foundation_model and --E0s as before"
            )
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        first = not several or torch.distributed.get_rank() == 0
        if first and "state" in stored and not _is_current(_folder(run, stored["stage_two"]), stored["state"]):
            self.after_checkpoint(run, model, stored)  # killed between the two files, or the disk was full

    def before_save(self, run: Run, model: nn.Module) -> nn.Module:
        return merge_lora(model)


def _folder(run: Run, stage_two: bool) -> Path:
    return Path(run.args.model_dir) / f"{run.args.name}{'_stagetwo' * stage_two}-adapter"


def _is_current(folder: Path, state: Mapping[str, Any]) -> bool:
    """Whether the adapter on disk is the checkpoint's."""
    try:
        return read_adapter(folder).run.get("validation_loss") == str(state["validation_loss"])
    except (ValueError, FileNotFoundError):
        return False


def _refit(run: Run, model: nn.Module, level: int = logging.INFO) -> None:
    if "lora_fit_frames" not in run.state:
        run.state["lora_fit_frames"] = spread(run.train_dataset, _FIT_FRAMES)
    fit_references(model, ADAPTER, run.train_dataset, run.state["lora_fit_frames"], level)


_ERRORS = {
    "mae_e_per_atom": "eV/atom", "rmse_e_per_atom": "eV/atom", "mae_f": "eV/Å", "rmse_f": "eV/Å",
    "mae_stress": "eV/Å³", "rmse_stress": "eV/Å³",
}  # fmt: skip


def _valid_errors(run: Run) -> dict[str, str]:
    """Validation errors of the epoch as upstream computed them."""
    found = {name: run.state.get("valid_errors", {}).get(name) for name in _ERRORS}
    return {f"validation_{k}": f"{float(v):.6g} {_ERRORS[k]}" for k, v in found.items() if isinstance(v, numbers.Real)}


def _train_in_full(model: nn.Module, plan: list[ModulePlan], prefixes: tuple[str, ...]) -> list[ModulePlan]:
    """Modules without trained weights (a new long path) are trained in full instead of adapted."""
    if not prefixes:
        return plan
    kept = [p for p in plan if not p.name.startswith(prefixes)]
    for name, module in model.named_modules():
        own = tuple(n for n, p in module.named_parameters() if "." not in n and p.numel())
        if name.startswith(prefixes) and own:
            kept.append(ModulePlan(name, {}, own))
    return kept


def _keep_learning_rate(args: argparse.Namespace) -> None:
    """Upstream's replay mode sets lr 1e-4 and EMA decay 0.99999, with which adapters hardly move."""
    if args.multiheads_finetuning and not args.force_mh_ft_lr:
        args.force_mh_ft_lr = True


@torch.no_grad()
def _keep_references(run: Run, saved: Mapping[str, Any], model: nn.Module) -> None:
    """The shift of a loaded adapter is relative to its own E0s: here it must add up to the same, or be none."""
    layer = adapter_layers(model).get(MODULE)
    update = None if layer is None else layer.lora_dense[ADAPTER].get(BUFFER)
    if update is None:
        return
    if not run.args.lora_refit_E0s:
        update.zero_()
        logging.info("equitune: --lora_refit_E0s False: the shift of the energy references in the adapter is dropped")
        return
    mine = run.state["lora_metadata"]
    change = difference(saved.get("E0s"), mine.get("E0s"), mine.get("heads", ()))
    if change is not None and change.size == update.numel():
        update += torch.as_tensor(change).to(update).reshape(update.shape)


def _check_adapter_folder(run: Run) -> None:
    """A run of another seed has the same folder for its adapter, which must not be lost."""
    for folder in (_folder(run, False), _folder(run, True)):
        try:
            theirs = read_adapter(folder).metadata.get("run")
        except (ValueError, FileNotFoundError):
            continue
        if theirs is not None and theirs != run.tag:
            raise SettingsError(
                f"--name {run.args.name}: {folder} holds the adapter of the run {theirs}, this is {run.tag}; choose "
                "another --name or --work_dir, or move that folder"
            )


def _check_start(run: Run, saved: Mapping[str, Any], model: nn.Module) -> None:
    expected, got = saved.get("base_fingerprint"), run.state["lora_metadata"]["base_fingerprint"]
    foundation, ours = saved.get("foundation_fingerprint"), run.state["lora_metadata"]["foundation_fingerprint"]
    if expected != got and foundation != ours:
        raise ValueError(
            f"--lora_init_adapter: it was trained on another base model: expected fingerprint {expected} "
            f"(foundation {foundation}), got {got} (foundation {ours})"
        )
    if "elements" in saved and list(saved["elements"]) != base_model.elements(model):
        raise ValueError(
            f"--lora_init_adapter: it was trained for elements Z = {saved.get('elements')}, the data has "
            f"Z = {base_model.elements(model)}; adapters only fit the same set of elements"
        )


def _metadata(run: Run, model: nn.Module) -> dict[str, Any]:
    """Provenance for ``adapter_config.json``."""
    assert run.foundation is not None
    return (
        base_model.describe_base(model)
        | {
            "base_model": str(run.args.foundation_model),
            "base_fingerprint": fingerprint(model),
            "foundation_fingerprint": fingerprint(run.foundation),
            "foundation_head": run.args.foundation_head,
            "run": run.tag,
            "command": " ".join(sys.argv),
            "data": run.state["lora_data"],
        }
        | ({"level_of_theory": run.args.lora_level_of_theory} if run.args.lora_level_of_theory else {})
        | run.state.get("base_recipe", {})
    )
