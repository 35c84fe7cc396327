"""The patches themselves: each takes one of MACE's defining modules and wraps names in it.

Outside a run of ``mace_run_train`` (no :func:`current_run`) every wrapper passes straight through.
``contract.check`` has the list of what we rely on.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from . import checkpoints, distributed
from .contract import require
from .energies import restore_energy_references
from .model_files import atomic_torch
from .protocol import Run, current_run, load_plugins, run_training, start_run
from .training import patch_checkpoint, patch_train
from .wrapping import or_exit, wrap

__all__ = [
    "patch_arg_parser",
    "patch_arg_parser_tools",
    "patch_checkpoint",
    "patch_data_utils",
    "patch_lora",
    "patch_model_script_utils",
    "patch_multihead_tools",
    "patch_run_train",
    "patch_scripts_utils",
    "patch_train",
]


def patch_arg_parser(module: ModuleType) -> None:
    """Plugins add their flags."""

    @wrap(module, "build_default_arg_parser")
    def build(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        parser = original(*args, **kwargs)
        upstreams = set(parser._actions)
        for plugin in load_plugins():
            plugin.add_arguments(parser)
        for action in set(parser._actions) - upstreams:
            if action.default is None and action.help:
                action.help += "%(default).0s"  # the text says what happens without the flag; not "(default: None)"
        return parser


def patch_arg_parser_tools(module: ModuleType) -> None:
    """The run starts here: plugins check the arguments before any work."""

    @wrap(module, "check_args")
    def check_args(original: Callable[..., Any], args: Any) -> Any:
        args, messages = original(args)
        run = Run(args, load_plugins())
        start_run(run)
        for plugin in run.plugins:
            or_exit(plugin.check_args, run)
        if run.active():
            or_exit(checkpoints.lock, run)
            or_exit(distributed.prepare, args)
        or_exit(checkpoints.check_restart, run)
        return args, messages


def patch_data_utils(module: ModuleType) -> None:
    """``--E0s=estimated``: upstream fails where the foundation's dtype is not ``--default_dtype``."""

    @wrap(module, "estimate_e0s_from_foundation")
    def estimate(original: Callable[..., Any], foundation_model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_default_dtype()
        if current_run() is not None and next(foundation_model.parameters()).dtype != dtype:
            foundation_model = copy.deepcopy(foundation_model).to(dtype)
        return original(foundation_model, *args, **kwargs)


def patch_multihead_tools(module: ModuleType) -> None:
    """Plugins change what data are read with; the foundation is loaded by then, the data are not."""

    @wrap(module, "dict_head_to_dataclass")
    def head_config(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run = current_run()
        if run is not None and not run.state.get("before_data"):
            run.state["before_data"] = True
            for plugin in run.active():
                or_exit(plugin.before_data, run)
        return original(*args, **kwargs)


def patch_model_script_utils(module: ModuleType) -> None:
    """Data checks before, energy references and plugins after upstream builds the model."""

    @wrap(module, "configure_model")
    def configure_model(original: Callable[..., Any], args: Any, train_loader: Any, *rest: Any, **kwargs: Any) -> Any:
        run = current_run()
        if run is None:
            return original(args, train_loader, *rest, **kwargs)
        call = require(module, "configure_model").bind(args, train_loader, *rest, **kwargs)
        bound = call.arguments
        run.args, run.train_dataset = args, train_loader.dataset
        run.foundation, run.heads = bound.get("model_foundation"), list(bound.get("heads") or [])
        run.E0s = bound.get("atomic_energies")
        run.elements = [int(z) for z in bound["z_table"].zs]
        run.state["head_configs"] = list(bound.get("head_configs") or [])
        for plugin in run.plugins:
            or_exit(plugin.check_foundation, run)
        active = run.active()  # before_model may change what enabled() looks at, for upstream's sake
        for plugin in active:
            or_exit(plugin.before_model, run)
        if run.stand_in is not None:
            bound["model_foundation"] = run.stand_in
        model, output_args = original(*call.args, **call.kwargs)
        if run.foundation is not None and run.E0s is not None:
            # with --foundation_model_elements upstream pads elements that the data lacks with zeros
            given = {int(z) for h in bound.get("head_configs") or [] for z in h.atomic_numbers}
            restore_energy_references(model, run.E0s, given or set(run.elements))
        for plugin in sorted(active, key=lambda p: p.model_order):
            model = or_exit(plugin.after_model, run, model)
        run.model = weakref.ref(model)
        return model, output_args


def patch_run_train(module: ModuleType) -> None:
    """LBFGS keeps its history for what is trained only; model files are never half-written."""

    @wrap(module, "LBFGS")
    def lbfgs(original: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Any:
        run = current_run()
        if run is not None and run.active():
            params = [p for p in params if p.requires_grad]
        return original(params, *args, **kwargs)

    module.torch = atomic_torch(or_exit)  # type: ignore[attr-defined]


def patch_lora(module: ModuleType) -> None:
    """``--lora``: the model already has our adapters; at the end they are merged our way."""

    @wrap(module, "inject_LoRAs")
    def inject(original: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        run = run_training(model)
        if run is not None and any(p.name == "lora" for p in run.active()):
            logging.getLogger().addFilter(_not_miscounted)
            return model
        injected: nn.Module = original(model, *args, **kwargs)
        return injected

    @wrap(module, "merge_lora_weights")
    def merge(original: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        run = current_run()  # the model is a copy of the run's
        if run is None or not run.active() or _has_class_of(module, model):
            merged: nn.Module = original(model, *args, **kwargs)
            return merged
        for plugin in run.active():
            model = plugin.before_save(run, model)
        return model


def _not_miscounted(record: logging.LogRecord) -> bool:
    """Upstream counts the frozen base too; ours is the line "training … values"."""
    return not str(record.msg).startswith("Model with LoRA has %s trainable parameters")


def _has_class_of(module: ModuleType, model: nn.Module) -> bool:
    return any(type(m).__module__ == module.__name__ for m in model.modules())


def patch_scripts_utils(module: ModuleType) -> None:
    """Optimiser groups; and a config is read from the merged model, which has stock classes."""

    @wrap(module, "get_params_options")
    def get_params_options(original: Callable[..., Any], args: Any, model: nn.Module) -> dict[str, Any]:
        options: dict[str, Any] = original(args, model)
        run = run_training(model)
        if run is None:
            return options
        replaced = [groups for p in run.active() if (groups := p.optimizer_groups(run, model)) is not None]
        extra = [group for p in run.active() for group in p.extra_groups(run, model)]
        options["params"] = replaced[-1] if replaced else options["params"] + extra
        for plugin in run.active():
            options["params"] = plugin.change_groups(run, model, options["params"])
        return options

    @wrap(module, "extract_config_mace_model")
    def extract_config(original: Callable[..., Any], model: nn.Module) -> Any:
        run = run_training(model)
        if run is not None:
            model = copy.deepcopy(model)
            for plugin in run.active():
                model = plugin.before_save(run, model)
        config = original(model)
        if current_run() is None and "error" in config and hasattr(model, "r_short"):
            # upstream's callers take the message for the config
            raise ValueError(
                f"{type(model).__name__}: MACE rebuilds a model for compile_mode, enable_cueq and enable_oeq from the "
                "config of a stock model, which this is not; leave these options out"
            )
        return config
