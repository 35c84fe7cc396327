"""What is wrong with a command of two stages, said before the first."""

from __future__ import annotations

import argparse
import ast
import copy
import json
from pathlib import Path
from typing import Any

import ase
import numpy as np

from mace_lora.lora.mace_args import config_from, refuse_conflicts, refuse_unused, resolve_defaults
from mace_lora.mace_plugin import labels
from mace_lora.mace_plugin.protocol import SettingsError

from .levels import Source, check_elements, check_mixed_up, numbers_of, read_source, symbols
from .offsets import by_composition

__all__ = ["check_data", "check_settings"]

_FITTED = ("average", "estimated", "foundation")
_DOWNLOADED = ("mp", "matpes_pbe", "matpes_r2scan", "omat")  # replay data that upstream fetches


def check_settings(args: argparse.Namespace) -> None:
    """Refuse settings that contradict two stages, or each other.

    Raises:
        SettingsError: the flag, why, and what to do.
    """
    _refuse_modes(args)
    if not isinstance(args.train_file, str):
        raise SettingsError(f"--train_file: expected one file with --autotune_train_file, got {args.train_file!r}")
    if args.autotune_epochs is not None and args.autotune_epochs < 1:
        raise SettingsError(f"--autotune_epochs: expected more than 0, got {args.autotune_epochs}")
    if args.autotune_lr is not None and not args.autotune_lr > 0:
        raise SettingsError(f"--autotune_lr: expected more than 0, got {args.autotune_lr}")
    if str(args.autotune_E0s).lower() in _FITTED[1:]:
        raise SettingsError(
            f"--autotune_E0s {args.autotune_E0s}: the classical stage has no foundation model; expected average or a "
            "dictionary of isolated-atom energies"
        )
    if args.autotune_offsets == "composition" and args.autotune_E0s not in (None, "average"):
        raise SettingsError(
            f"--autotune_offsets composition: not with --autotune_E0s {args.autotune_E0s}: without the mean of each "
            "composition, energies of isolated atoms mean nothing; drop one of the two"
        )
    if args.autotune_offsets == "composition" and _replay(args):
        raise SettingsError(
            "--autotune_offsets composition: not with --pt_train_file: the classical model knows no energies of whole "
            "compositions, which the frames to replay have; drop one of the two"
        )
    _refuse_schedules(args)
    _refuse_lora(args)
    if _replay(args) and str(args.E0s).lower() == "average":
        raise SettingsError(
            f"--E0s {args.E0s}: not with --pt_train_file, for which MACE wants references of the quantum labels that "
            "fit the classical ones; give --E0s=estimated, or isolated-atom energies"
        )


def _refuse_modes(args: argparse.Namespace) -> None:
    if args.foundation_model is not None:
        raise SettingsError(
            "--foundation_model: autotuning makes its own from --autotune_train_file; drop one of the two flags"
        )
    if args.distributed:
        raise SettingsError("--distributed: not with --autotune_train_file; run the two stages one after the other")
    if args.heads is not None:
        raise SettingsError("--heads: not with --autotune_train_file; run the two stages one after the other")
    if args.dry_run:
        raise SettingsError(
            "--dry_run: not with --autotune_train_file, whose second stage needs the model of the first; drop it, or "
            "try either stage alone"
        )


def _refuse_schedules(args: argparse.Namespace) -> None:
    decay, every = args.autotune_lr_decay, args.autotune_unfreeze
    if decay is not None and not 0 < decay <= 1:
        raise SettingsError(f"--autotune_lr_decay: expected a factor above 0 and up to 1, got {decay}")
    if decay is not None and args.swa:
        raise SettingsError(
            "--autotune_lr_decay: not with --swa (--stage_two), which sets one learning rate for all blocks; drop one "
            "of the two"
        )
    if every is None:
        return
    if every < 1:
        raise SettingsError(f"--autotune_unfreeze: expected at least 1 epoch, got {every}")
    if args.lbfgs:
        raise SettingsError("--autotune_unfreeze: not with --lbfgs, which takes all weights as one")
    blocks = args.num_interactions + 1  # below the readouts: interactions and the embedding
    if every * blocks >= args.max_num_epochs:
        raise SettingsError(
            f"--autotune_unfreeze {every}: the lowest of {blocks} blocks would begin to learn at epoch "
            f"{every * blocks}, but --max_num_epochs is {args.max_num_epochs}; unfreeze faster, or train longer"
        )


def _refuse_lora(args: argparse.Namespace) -> None:
    refuse_unused(args)
    if not args.lora:
        return
    if args.autotune_rescale:
        raise SettingsError(
            "--autotune_rescale: not with --lora, whose adapter is put on the classical model with its scale; drop it"
        )
    if args.autotune_refit_E0s is not None:
        raise SettingsError("--autotune_refit_E0s: not with --lora; give --lora_refit_E0s instead")
    if args.lora_backend != "equitune":
        return
    mine = copy.copy(args)
    resolve_defaults(mine)
    config_from(mine)
    mine.foundation_model = "autotune"  # stage one makes it
    refuse_conflicts(mine)


def _replay(args: argparse.Namespace) -> bool:
    return bool(args.multiheads_finetuning and args.pt_train_file)


def check_data(args: argparse.Namespace) -> bool:
    """Check files, labels, elements and energy references of both levels.

    Returns:
        whether energy references come from IsolatedAtom frames of the training file.

    Raises:
        SettingsError: the flag, the file and what is wrong.
    """
    classical = read_source("--autotune_train_file", args.autotune_train_file)
    more = [read_source("--autotune_valid_file", args.autotune_valid_file)] if args.autotune_valid_file else []
    train = read_source("--train_file", args.train_file)
    valid, test = _sources(args, "valid_file"), _sources(args, "test_file")
    replay = [
        source for flag in ("pt_train_file", "pt_valid_file") if _replay(args) for source in _sources(args, flag)
    ]  # fmt: skip
    labels.check_files(args)
    _check_classical_labels(args)
    quantum = [train, *valid, *test]
    check_elements(classical, [*more, *quantum, *replay])
    check_mixed_up(classical, quantum, lambda a: labels.label_of(a, "energy", args.energy_key))
    _check_table(args, train, valid, test, numbers_of(classical.frames))
    isolated = _isolated(train)
    if args.statistics_file is None:
        if args.E0s is None and not isolated:
            raise SettingsError(
                "--E0s: expected the energy references of the quantum labels: average, estimated, isolated-atom "
                "energies or IsolatedAtom frames in --train_file"
            )
        _check_references("--E0s", args.E0s, [train, *valid], isolated)
    _check_references("--autotune_E0s", args.autotune_E0s, [classical, *more], _isolated(classical))
    if args.autotune_offsets == "composition":
        if _isolated(classical):
            raise SettingsError(
                "--autotune_offsets composition: --autotune_train_file has IsolatedAtom frames, whose energies mean "
                "nothing without the mean of each composition; remove them, or drop the flag"
            )
        by_composition([classical, *more], args.energy_key, lambda _: None)
    return bool(isolated)


def _sources(args: argparse.Namespace, flag: str) -> list[Source]:
    value = getattr(args, flag)
    names = [v for v in (value if isinstance(value, list) else [value]) if v and v not in _DOWNLOADED]
    return [read_source(f"--{flag}", name) for name in names]


def _check_classical_labels(args: argparse.Namespace) -> None:
    """Labels of stage one, which has the same keys."""
    mine = copy.copy(args)
    mine.train_file, mine.valid_file, mine.test_file = args.autotune_train_file, args.autotune_valid_file, None
    try:
        labels.check_files(mine, largest=np.inf)  # a close contact among many hot frames of a force field
    except SettingsError as err:
        text = (
            str(err).replace("--train_file", "--autotune_train_file").replace("--valid_file", "--autotune_valid_file")
        )
        raise SettingsError(text) from err


def _check_table(
    args: argparse.Namespace, train: Source, valid: list[Source], test: list[Source], classical: set[int]
) -> None:
    """Elements of the model: those of training and validation frames, unless they are given."""
    if args.atomic_numbers is not None:
        try:
            given = {int(z) for z in ast.literal_eval(args.atomic_numbers)}
        except (ValueError, SyntaxError, TypeError) as err:
            raise SettingsError(
                f"--atomic_numbers: expected a list such as '[1, 6, 8]', got {args.atomic_numbers!r}"
            ) from err
        if given - classical:
            raise SettingsError(f"--atomic_numbers: --autotune_train_file has no {symbols(given - classical)}")
    elif not args.foundation_model_elements and args.statistics_file is None:
        given = numbers_of([*train.frames, *(a for s in valid for a in s.frames)])
        for source in test:
            missing = numbers_of(source.frames) - given
            if missing:
                raise SettingsError(
                    f"{source.setting}: {source.path} has {symbols(missing)}, which --train_file and --valid_file "
                    "lack; remove these frames, or keep the classical elements with --foundation_model_elements=True"
                )


def _isolated(source: Source) -> set[int]:
    """Elements of the IsolatedAtom frames."""
    return numbers_of(a for a in source.frames if _is_isolated(a))


def _is_isolated(atoms: ase.Atoms) -> bool:
    return len(atoms) == 1 and atoms.info.get("config_type") == "IsolatedAtom"


def _check_references(flag: str, given: Any, sources: list[Source], isolated: set[int]) -> None:
    """References of isolated atoms must be there for every element."""
    needed = numbers_of(a for s in sources for a in s.frames if not _is_isolated(a))
    if isolated:  # upstream takes these and nothing else
        if needed - isolated:
            raise SettingsError(
                f"{sources[0].setting}: {sources[0].path} has IsolatedAtom frames of {symbols(isolated)}, but none of "
                f"{symbols(needed - isolated)}; add them, or remove all IsolatedAtom frames and give {flag}"
            )
        return
    if given is None or str(given).lower() in _FITTED:
        return
    try:
        content = json.loads(Path(given).read_text()) if str(given).endswith(".json") else ast.literal_eval(given)
        known = {int(z) for z, energy in content.items() if isinstance(energy, int | float)}
    except (OSError, ValueError, SyntaxError, TypeError, AttributeError) as err:
        raise SettingsError(
            f"{flag}: expected average, a dictionary such as '{{1: -13.6, 8: -2043.1}}' (eV) or a .json file of one, "
            f"got {given!r} ({type(err).__name__}: {err})"
        ) from err
    if needed - known:
        raise SettingsError(
            f"{flag}: expected an energy of every element, got none of {symbols(needed - known)}, which "
            f"{' and '.join(s.setting for s in sources)} have"
        )
