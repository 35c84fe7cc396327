"""Settings of ``mace_run_train --lora`` from the command line, and what they must not be combined with."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from mace_lora.mace_plugin.launch import default_of
from mace_lora.mace_plugin.protocol import SettingsError

from .config import INITS, PRESETS, LoraConfig, parse_rank_pattern

__all__ = ["add_arguments", "config_from", "refuse_conflicts", "refuse_unused", "resolve_defaults"]

# Flags that describe the adapter; an adapter given by --lora_init_adapter brings its own values.
_SHAPE = ("lora_rank", "lora_alpha", "lora_preset", "lora_rank_pattern", "lora_targets", "lora_dense", "lora_init")
_OTHER = ("lora_init_adapter", "lora_weight_decay", "lora_refit_E0s", "lora_level_of_theory")
DEFAULTS: dict[str, Any] = {
    "lora_rank": 16, "lora_preset": "degree_parity", "lora_rank_pattern": "", "lora_dense": "preset",
    "lora_init": "scaled", "lora_weight_decay": 0.0, "lora_refit_E0s": True,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--lora_*`` and let ``--lora`` stand without a value."""
    from mace.tools.arg_parser import str2bool

    actions = {a.dest: a for a in parser._actions}
    lora = actions["lora"]
    lora.nargs, lora.const = "?", True
    lora.help = "fine-tune low-rank adapters instead of all weights; --lora, --lora True or YAML 'lora: true'"
    rank, alpha = actions["lora_rank"], actions["lora_alpha"]
    rank.default = alpha.default = None
    rank.help = "rank r of every (l, p) block (unset: 16, or 4 with --lora_backend=mace)"
    alpha.help = "the update is scaled by alpha/r (unset: the rank, or 1 with --lora_backend=mace)"
    group = parser.add_argument_group("LoRA (equitune)")
    group.add_argument(
        "--lora_backend", choices=("equitune", "mace"), default="equitune", help="whose LoRA layers to use"
    )
    group.add_argument(
        "--lora_preset",
        choices=PRESETS,
        help="degree_parity (default): every equivariant weight, one independent pair per irrep (l, p); "
        "upstream: only the layers that MACE's own LoRA adapts",
    )
    group.add_argument("--lora_rank_pattern", help="rank per irrep, e.g. '0e:16,1o:8'")
    group.add_argument("--lora_targets", help="comma-separated regular expressions of module names to adapt")
    group.add_argument(
        "--lora_dense",
        help="parameters trained in full: 'preset' (default), 'none', or comma-separated regular expressions",
    )
    group.add_argument(
        "--lora_init",
        choices=INITS,
        help="A ~ N(0, 0.1/r) (scaled, default) or N(0, 1) (elora, as published); B is 0",
    )
    group.add_argument("--lora_init_adapter", metavar="DIR", help="start from this adapter")
    group.add_argument(
        "--lora_refit_E0s",
        type=str2bool,
        help="before every validation, shift the energy references by least squares on the training frames; the "
        "shift is part of the adapter (default True)",
    )
    group.add_argument("--lora_weight_decay", type=float, help="weight decay of all adapter parameters (default 0)")
    group.add_argument("--lora_level_of_theory", help="of the labels, for the adapter's card, e.g. PBE0/def2-SVP")


def refuse_unused(args: argparse.Namespace) -> None:
    """Flags that would have no effect; to be called before defaults are filled in.

    Raises:
        SettingsError: ``--lora_*`` without ``--lora``, settings of our LoRA with MACE's own, or
            settings that contradict ``--lora_init_adapter``.
    """
    given = [f for f in (*_SHAPE, *_OTHER) if getattr(args, f) is not None]
    if not args.lora and given:
        raise SettingsError(f"--{given[0]}: has no effect without --lora; add --lora or drop it")
    ours = [f for f in given if f not in ("lora_rank", "lora_alpha")]
    if args.lora and args.lora_backend == "mace" and ours:
        raise SettingsError(f"--{ours[0]}: MACE's own LoRA does not know it; drop it or --lora_backend=mace")
    shape = [f for f in given if f in _SHAPE]
    if args.lora_init_adapter is not None and shape:
        raise SettingsError(
            f"--{shape[0]}: the adapter given by --lora_init_adapter brings its own; drop one of the two flags"
        )


def resolve_defaults(args: argparse.Namespace) -> None:
    """Fill in the defaults of unset flags, MACE's own ones for ``--lora_backend=mace``."""
    if args.lora_backend == "mace":
        args.lora_rank = 4 if args.lora_rank is None else args.lora_rank
        args.lora_alpha = 1.0 if args.lora_alpha is None else args.lora_alpha
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.lora_alpha is None:
        args.lora_alpha = float(args.lora_rank)


def config_from(args: argparse.Namespace) -> LoraConfig:
    """LoRA settings from the command line.

    Raises:
        SettingsError: a value out of range; the flag is named.
    """
    dense: tuple[str, ...] | None = None
    if args.lora_dense == "none":
        dense = ()
    elif args.lora_dense != "preset":
        dense = tuple(_split(args.lora_dense))
    try:
        return LoraConfig(
            rank=args.lora_rank,
            alpha=args.lora_alpha,
            preset=args.lora_preset,
            rank_pattern=parse_rank_pattern(args.lora_rank_pattern),
            targets=None if args.lora_targets is None else tuple(_split(args.lora_targets)),
            dense=dense,
            init=args.lora_init,
        )
    except ValueError as err:  # its message starts with the name of the setting
        raise SettingsError(f"--lora_{err}") from err


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def refuse_conflicts(args: argparse.Namespace) -> None:
    """Upstream options that cannot be combined with ``--lora``.

    Raises:
        SettingsError: the combination, why it fails and what to do.
    """
    base = args.foundation_model
    if base is None:
        raise SettingsError("--lora: expected a base model, got none; give --foundation_model")
    if (os.sep in str(base) or str(base).endswith((".model", ".pt"))) and not Path(base).is_file():
        raise SettingsError(f"--foundation_model: no file {base}")
    if not args.foundation_filter_elements:
        raise SettingsError(
            "--foundation_filter_elements False: upstream then re-initialises the readouts, and --lora would freeze "
            "random readouts; leave it True"
        )
    for flag, instead in (("weight_decay", "--lora_weight_decay"), ("lr_params_factors", "--lora_targets")):
        used_before = flag == "weight_decay" and getattr(args, "autotune_train_file", None)  # by the classical stage
        if getattr(args, flag) != default_of(flag) and not used_before:
            raise SettingsError(f"--{flag}: has no effect with --lora, whose parameters are one group; use {instead}")
    if args.freeze:
        raise SettingsError(f"--freeze {args.freeze}: --lora already freezes the base; drop one of the two")
    if args.enable_cueq or args.enable_oeq or args.only_cueq:
        raise SettingsError(
            "--enable_cueq/--enable_oeq/--only_cueq: upstream's conversion drops LoRA layers; train with --lora on the "
            "e3nn backend and convert the merged model afterwards"
        )
    if args.model not in ("MACE", "ScaleShiftMACE", "MultiScaleMACE"):
        raise SettingsError(f"--model {args.model}: --lora supports MACE, ScaleShiftMACE and MultiScaleMACE")
