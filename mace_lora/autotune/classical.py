"""Stage one of ``--autotune_train_file``: the same command in a process of its own, with the classical file."""

from __future__ import annotations

import argparse
import copy
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import torch

from mace_lora.atomic import content_digest, write_text
from mace_lora.mace_plugin.protocol import SettingsError

from .child import run_child
from .levels import read_source
from .offsets import by_composition, write_without

__all__ = ["STAGE", "become_classical", "classical_model", "classical_stage", "fingerprint", "multiscale_sizes"]

STAGE = "EQUITUNE_AUTOTUNE_STAGE"
# of the quantum stage alone: the classical stage is a plain training of the same architecture
_QUANTUM_ONLY = {"lora": False, "multiheads_finetuning": False, "swa": False}
_DEFAULT_INSTEAD = (
    "freeze", "lr_params_factors", "test_file", "test_dir", "statistics_file", "atomic_numbers", "mean", "std",
    "multiscale_freeze_short", "foundation_model_elements", "foundation_head", "foundation_model_kwargs",
    "foundation_filter_elements", "foundation_model_readout", "pt_train_file", "pt_valid_file", "pseudolabel_replay",
    "start_swa", "skip_evaluate_heads",
)  # fmt: skip
# of no consequence for the model of stage one: names, places, hardware, reports, what stage two has for itself
_IGNORED = (
    "name", "config", "work_dir", "device", "num_workers", "pin_memory", "log_level", "distributed", "launcher",
    "restart_latest", "error_table", "keep_checkpoints", "save_all_checkpoints", "save_cpu", "eval_interval",
    "enable_cueq", "only_cueq", "enable_oeq", "dry_run", "multi_processed_test", "num_samples_pt", "subselect_pt",
    "filter_type_pt", "force_mh_ft_lr", "valid_batch_size", "train_file", "valid_file",
)  # fmt: skip
_IGNORED_KINDS = (
    "autotune_", "lora_", "plot", "wandb", "swa_", "foundation_", "pt_", "weight_pt", "real_pt", "disallow_random",
    "pseudolabel",
)  # fmt: skip
_FLAGS = {"max_num_epochs": "autotune_epochs", "lr": "autotune_lr", "E0s": "autotune_E0s"}


def become_classical(args: argparse.Namespace) -> None:
    """Change the arguments of this process, which runs stage one, to those of the classical training."""
    from mace.tools.arg_parser import build_default_arg_parser

    args.train_file, args.valid_file = args.autotune_train_file, args.autotune_valid_file
    if _by_composition(args):
        args.train_file, args.valid_file = (
            str(_without_offsets(args, part)) if part is not None else None
            for part in (args.autotune_train_file, args.autotune_valid_file)
        )
    args.valid_fraction = 0.05
    args.name = f"{args.name}_classical"
    for place in ("checkpoints_dir", "results_dir", "log_dir"):  # upstream has named their files already
        setattr(args, place, str(Path(getattr(args, place)) / "classical"))
    args.max_num_epochs = args.autotune_epochs or args.max_num_epochs
    args.lr = 0.01 if args.autotune_lr is None else args.autotune_lr
    args.E0s = args.autotune_E0s or "average"
    args.restart_latest = True
    for name, value in _QUANTUM_ONLY.items():
        setattr(args, name, value)
    defaults = build_default_arg_parser()
    for name in _DEFAULT_INSTEAD:
        if hasattr(args, name):
            setattr(args, name, defaults.get_default(name))
    args.eval_interval = max(1, args.max_num_epochs // 50)
    for name in vars(args):
        if name.startswith("lora_") and name not in ("lora_backend",):
            setattr(args, name, None)


def classical_model(args: argparse.Namespace) -> Path:
    """Where stage one leaves its model."""
    return Path(args.model_dir) / f"{args.name}_classical.model"


def classical_stage(args: argparse.Namespace) -> Path:
    """Run stage one unless its model is there.

    Returns:
        the model's file.

    Raises:
        SettingsError: it was made with other settings, files are left of one that is unknown, it fails, or its
            weights are not finite.
    """
    model = classical_model(args)
    record = Path(args.checkpoints_dir) / f"{args.name}_classical.json"
    wanted, left = fingerprint(args), _left(args)
    if record.is_file() and left:
        _compare(args, json.loads(record.read_text()), wanted, [record, *left])
    elif left:
        raise SettingsError(
            f"--name {args.name}: files of a classical stage are left whose settings are unknown, since {record} is "
            f"missing; choose another --name or --work_dir, or remove {_list(left)}"
        )
    if model.is_file() and _is_whole(model, [record, *left]):
        _say(f"stage one is there: {model}")
        return model
    record.parent.mkdir(parents=True, exist_ok=True)
    write_text(record, json.dumps(wanted) + "\n")
    if _by_composition(args):
        _take_off_offsets(args)
    _say(f"stage one: training on the classical labels of {args.autotune_train_file}")
    program = [sys.executable, "-c", "from mace_lora.cli import main; main()", "run", "mace_run_train"]
    code = run_child([*program, *sys.argv[1:]], env=os.environ | {STAGE: "classical"})
    if code or not model.is_file():
        raise SettingsError(
            "--autotune_train_file: the classical stage failed (its messages are above); the same command continues it"
        )
    _is_whole(model, [record, *_left(args)])
    _say("stage two: fine-tuning on the quantum labels")
    return model


def _by_composition(args: argparse.Namespace) -> bool:
    return bool(args.autotune_offsets == "composition")


def _without_offsets(args: argparse.Namespace, path: str) -> Path:
    """Copy of a classical file for stage one."""
    part = "train" if path == args.autotune_train_file else "valid"
    return Path(args.checkpoints_dir) / "classical" / f"{args.name}_{part}_without_offsets.xyz"


def _take_off_offsets(args: argparse.Namespace) -> None:
    sources = [
        read_source(f"--{flag}", getattr(args, flag)) for flag in ("autotune_train_file", "autotune_valid_file")
        if getattr(args, flag) is not None
    ]  # fmt: skip
    offsets = by_composition(sources, args.energy_key, _say)
    for source in sources:
        path = _without_offsets(args, getattr(args, source.setting.removeprefix("--")))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_without(source, offsets, args.energy_key, path)


def _say(text: str) -> None:
    print(f"equitune: autotune: {text}", flush=True)  # upstream's log is not open yet


def _left(args: argparse.Namespace) -> list[Path]:
    """Files of a stage one of this name; many checkpoints as one pattern."""
    folder = Path(args.checkpoints_dir) / "classical"
    models = [classical_model(args), Path(args.model_dir) / f"{args.name}_classical_compiled.model"]
    pattern = f"{args.name}_run-*"
    found = any(p.suffix in (".pt", ".model") for p in folder.glob(pattern))
    return [*(m for m in models if m.is_file()), *([folder / pattern] if found else [])]


def _list(paths: list[Path]) -> str:
    return ", ".join(map(str, paths))


def _is_whole(path: Path, files: list[Path]) -> bool:
    """Whether a model file can be read, which upstream does not write in one step.

    Raises:
        SettingsError: it has weights that are not finite.
    """
    from mace_lora.mace_plugin.base_model import load_model

    try:
        model = load_model(path)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        _say(f"{path} cannot be read, as after a kill; its last checkpoint is continued")
        return False
    bad = [n for n, t in model.state_dict().items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise SettingsError(
            f"--autotune_train_file: the classical stage has diverged: expected finite weights in {path}, got NaN or "
            f"infinity in {', '.join(bad[:3])}; check the classical labels, lower --autotune_lr, and remove "
            f"{_list(files)}"
        )
    return True


def fingerprint(args: argparse.Namespace) -> dict[str, str]:
    """What stage one depends on: its arguments, and the content of its files."""
    mine = copy.copy(args)
    become_classical(mine)
    out = {}
    for name, value in sorted(vars(mine).items()):
        if name in _IGNORED or name.endswith("_dir") or name.startswith(_IGNORED_KINDS):
            continue
        text = str(value)
        out[name] = content_digest(text) if os.path.isfile(text) else text  # noqa: PTH113 (long texts)
    for name in ("autotune_train_file", "autotune_valid_file"):
        value = getattr(args, name)
        out[name] = "None" if value is None else content_digest(value)
    out["autotune_offsets"] = str(args.autotune_offsets or "element")
    return out


def _compare(args: argparse.Namespace, saved: dict[str, Any], wanted: dict[str, str], files: list[Path]) -> None:
    """Refuse a stage one of other settings; what only one version of this program knows is left out.

    Raises:
        SettingsError: what differs, and what to remove.
    """
    saved = {"autotune_offsets": "element"} | saved  # an earlier version had no choice
    keys = {k for k in wanted if k in saved} | {"autotune_train_file"}
    if classical_model(args).is_file() and args.autotune_epochs is None:
        keys.discard("max_num_epochs")  # a longer stage two does not ask for a longer stage one
    changed = [
        f"--{_FLAGS.get(k, k)}: {saved.get(k, 'unknown')} before, {wanted[k]} now"
        for k in sorted(keys) if saved.get(k) != wanted[k]
    ]  # fmt: skip
    if changed:
        raise SettingsError(
            f"--name {args.name}: its classical stage was made with other data or settings ({'; '.join(changed)}); "
            f"give those, choose another --name or --work_dir, or remove {_list(files)} to train it anew"
        )


def multiscale_sizes(args: argparse.Namespace) -> list[str]:
    """Flags of a multiscale model, which its file brings in stage two."""
    names = [n for n in vars(args) if n.endswith("_long")]
    own = ("r_short", "multiscale_coupling", "multiscale_split", "long_range", "pme_smearing")
    return [n for n in (*names, *own) if hasattr(args, n)]
