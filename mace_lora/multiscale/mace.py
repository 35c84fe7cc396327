"""``mace_run_train --model=MultiScaleMACE``: flags and behaviour in MACE's training command."""

from __future__ import annotations

import argparse
import logging
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mace_lora.mace_plugin.protocol import Run, SettingsError, TrainPlugin

__all__ = ["MultiscalePlugin"]

MODEL = "MultiScaleMACE"
_FLAGS = ("r_short", "multiscale_coupling", "multiscale_freeze_short", "long_range", "pme_smearing")


class MultiscalePlugin(TrainPlugin):
    """A model with a short and a long path, from scratch or around a foundation model."""

    name = "multiscale"
    flag, leaves = f"--model={MODEL}", "a long path"
    order = -10  # builds the model that LoRA adapts

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the model and its flags; the flags of the short path are MACE's own."""
        from mace.tools.arg_parser import str2bool

        from .build import LongPath

        next(a for a in parser._actions if a.dest == "model").choices += [MODEL]  # type: ignore[operator]
        group = parser.add_argument_group(
            "multiscale model (equitune)",
            "--model=MultiScaleMACE: a MACE within r_short and a light one within r_max. With --foundation_model the "
            "foundation becomes the short path and --r_max is the long cutoff.",
        )
        group.add_argument("--r_short", type=float, help="short cutoff in Å (with --foundation_model: its own)")
        for item in fields(LongPath):
            group.add_argument(
                f"--{item.name}", type=int, help=f"{_HELP[item.name]} (default {item.default})", metavar="N"
            )
        group.add_argument(
            "--multiscale_coupling", choices=("sum", "fused"),
            help="sum (default): the paths have readouts of their own; fused: one readout sees both",
        )  # fmt: skip
        group.add_argument(
            "--multiscale_freeze_short", type=str2bool, nargs="?", const=True,
            help="train the long path only, beside a foundation model (default False)",
        )  # fmt: skip

        group.add_argument(
            "--long_range", choices=("none", "pme"),
            help="pme: learned charges and their Coulomb energy beyond r_max, periodic frames only (default none)",
        )  # fmt: skip
        group.add_argument("--pme_smearing", type=float, help="Å; width of the Ewald Gaussians (default r_max / 6)")

    def enabled(self, args: argparse.Namespace) -> bool:
        return bool(args.model == MODEL)

    def check_args(self, run: Run) -> None:
        from .build import LongPath

        args = run.args
        sizes = {f.name: getattr(args, f.name) for f in fields(LongPath) if getattr(args, f.name) is not None}
        given = [f for f in (*_FLAGS, *sizes) if getattr(args, f) is not None]
        if not self.enabled(args):
            if given:
                raise SettingsError(f"--{given[0]}: has no effect without --model={MODEL}; add it, or drop the flag")
            return
        try:
            run.state["long_path"] = LongPath(**sizes)
        except ValueError as err:  # its message starts with the name of the flag
            raise SettingsError(f"--{err}") from err
        _refuse_conflicts(args)
        known = _read_foundation(args)
        short = args.r_short if known is None else float(getattr(known, "r_short", known.r_max))
        if known is not None and args.r_short is not None and not math.isclose(args.r_short, short, abs_tol=1e-6):
            raise SettingsError(
                f"--r_short: expected {short:g} Å, the foundation's cutoff, got {args.r_short:g}; leave it out"
            )
        if hasattr(known, "r_short"):
            _check_against_multiscale(known, given)
            run.state["r_long"], run.state["multiscale_foundation"] = float(known.r_max), True
        else:
            if short is None and args.foundation_model is None:
                raise SettingsError(f"--r_short: --model={MODEL} needs the short cutoff in Å, smaller than --r_max")
            run.state["r_long"] = args.r_max
            if args.lora_init_adapter is not None:
                raise SettingsError(
                    "--lora_init_adapter: it would leave the new long path untrained; start the adapter anew, or give "
                    f"a {MODEL} as --foundation_model"
                )
        if short is not None:
            _check_cutoffs(short, run.state["r_long"])

    def before_data(self, run: Run) -> None:
        # upstream has set r_max to the foundation's
        if run.args.foundation_model is not None and not run.state.get("multiscale_foundation"):
            _check_cutoffs(run.args.r_max if run.args.r_short is None else run.args.r_short, run.state["r_long"])
        run.args.r_max = run.state["r_long"]

    def check_foundation(self, run: Run) -> None:
        if hasattr(run.foundation, "r_short") and not self.enabled(run.args):
            raise SettingsError(f"--foundation_model: it is a {MODEL}; give --model={MODEL} to fine-tune it")

    def before_model(self, run: Run) -> None:
        from .rebuild import stock_paths

        args = run.args
        if args.long_range == "pme" or hasattr(run.foundation, "charges"):
            _check_periodic(run.train_dataset)
        run.state["avg_num_neighbors_long"] = args.avg_num_neighbors
        if hasattr(run.foundation, "r_short"):
            run.stand_in = stock_paths(run.foundation)[0]
        short = args.r_short if run.foundation is None else float((run.stand_in or run.foundation).r_max)  # type: ignore[arg-type]
        args.r_max, args.model = short, "ScaleShiftMACE"
        if run.foundation is None:
            args.avg_num_neighbors = _neighbours(run.train_dataset, short)
            logging.info("equitune: average number of neighbors within r_short: %g", args.avg_num_neighbors)

    def after_model(self, run: Run, model: nn.Module) -> nn.Module:
        from .build import to_multiscale
        from .rebuild import attach_long

        args, long = run.args, run.state["r_long"]
        args.r_max, args.model = long, MODEL
        coupling = args.multiscale_coupling or "sum"
        try:
            if hasattr(run.foundation, "r_short"):
                built = attach_long(model, run.foundation, run.elements)
                coupling = built.coupling
            else:
                built = to_multiscale(
                    model, long, run.state["long_path"], coupling=coupling,  # type: ignore[arg-type]
                    avg_num_neighbors=run.state["avg_num_neighbors_long"]
                    if run.foundation is None
                    else _neighbours(run.train_dataset, long),
                    zero=run.foundation is not None, long_range=args.long_range or "none",
                    pme_smearing=args.pme_smearing,
                )  # fmt: skip
                run.state["train_in_full"] = ("long.", "charges") if run.foundation is not None else ()
        except ValueError as err:
            raise SettingsError(f"--model={MODEL}: {err}") from err
        if args.multiscale_freeze_short:
            for name, parameter in built.named_parameters():
                parameter.requires_grad_(name.startswith(("long.", "charges.")))
        count = sum(p.numel() for p in built.long.parameters())
        logging.info(
            "equitune: %s: short path %g Å with %s, long path %g Å with %s parameters, coupling %s", MODEL,
            float(built.r_short), f"{sum(p.numel() for p in built.parameters()) - count:,}", long, f"{count:,}",
            coupling,
        )  # fmt: skip
        return built

    def extra_groups(self, run: Run, model: nn.Module) -> list[dict[str, Any]]:
        """The long path, with upstream's rule of what is decayed."""
        decayed = ("linear.weight", "skip_tp_full.weight", "products.")
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in model.long.named_parameters():  # type: ignore[union-attr]
            is_weight = ("interactions." in name or "products." in name) and any(d in name for d in decayed)
            groups[is_weight].append(parameter)
        if hasattr(model, "charges"):
            groups[False] += model.charges.parameters()  # type: ignore[operator, union-attr]
        weight_decay = run.args.weight_decay
        return [
            {"name": "long_decay", "params": groups[True], "weight_decay": weight_decay, "lr": run.args.lr},
            {"name": "long_no_decay", "params": groups[False], "weight_decay": 0.0, "lr": run.args.lr},
        ]


_HELP = {
    "num_channels_long": "features of every degree in the long path",
    "max_L_long": "highest degree of the long path's features",
    "max_ell_long": "highest degree of the long path's spherical harmonics",
    "correlation_long": "correlation of the long path; 1 is a linear update",
    "num_radial_basis_long": "radial functions of the long path on (0, r_max)",
    "radial_hidden_long": "hidden width of the long path's radial network; 0 for none",
}


def _check_cutoffs(short: float, long: float) -> None:
    if not (math.isfinite(short) and short > 0):
        raise SettingsError(f"--r_short: expected a length > 0 in Å, got {short:g}")
    if short >= long:
        raise SettingsError(
            f"--r_max: expected the long cutoff, larger than r_short ({short:g} Å), got {long:g} Å; about twice "
            "r_short is usual"
        )


def _refuse_conflicts(args: argparse.Namespace) -> None:
    """Options that upstream or we do not support for this model."""
    if args.enable_cueq or args.enable_oeq or args.only_cueq:
        raise SettingsError(
            f"--enable_cueq/--enable_oeq/--only_cueq: upstream converts MACE and ScaleShiftMACE only, not {MODEL}; "
            "leave the flag out"
        )
    if args.embedding_specs is not None:
        raise SettingsError(f"--embedding_specs: {MODEL} has no extra embeddings; leave the flag out")
    if args.pme_smearing is not None and args.long_range != "pme":
        raise SettingsError("--pme_smearing: has no effect without --long_range=pme; add it, or drop the flag")
    if args.long_range == "pme":
        from .pme import pme_calculator

        try:
            pme_calculator(args.r_max, args.r_max / 6 if args.pme_smearing is None else args.pme_smearing)
        except ValueError as err:
            raise SettingsError(f"--long_range=pme: {err}") from err
    if args.lora and args.lora_backend == "mace":
        raise SettingsError(f"--lora_backend=mace: it knows stock models only, not {MODEL}; leave it out")
    if args.multiscale_freeze_short and args.foundation_model is None:
        raise SettingsError("--multiscale_freeze_short: it would freeze random weights; give --foundation_model")
    if args.multiscale_freeze_short and args.lora:
        raise SettingsError("--multiscale_freeze_short: --lora adapts the short path; drop one of the two")
    if args.multiscale_freeze_short and args.multiscale_coupling == "fused":
        raise SettingsError("--multiscale_freeze_short: fused readouts belong to both paths; use coupling sum")
    if args.freeze:
        raise SettingsError(f"--freeze {args.freeze}: use --multiscale_freeze_short to train the long path only")


def _read_foundation(args: argparse.Namespace) -> Any:
    """The foundation model where it is a file, so that mistakes show before data are read; None otherwise."""
    if args.foundation_model is None or not Path(args.foundation_model).is_file():
        return None
    return torch.load(args.foundation_model, map_location="cpu", weights_only=False)  # as upstream does next


def _check_against_multiscale(model: Any, given: list[str]) -> None:
    """A multiscale foundation brings its own sizes, and one head."""
    if len(model.heads) > 1:
        raise SettingsError(
            f"--foundation_model: it is a {MODEL} with the heads {', '.join(model.heads)}; upstream takes heads apart "
            "of stock models only; train a model with one head"
        )
    wrong = [f for f in given if f not in ("multiscale_freeze_short", "r_short")]
    if wrong:
        raise SettingsError(f"--{wrong[0]}: the foundation model is a {MODEL} and brings its own; leave the flag out")


def _check_periodic(dataset: Any) -> None:
    for index, graph in enumerate(dataset):
        if not bool(torch.as_tensor(graph.pbc).all()):
            raise SettingsError(
                f"--long_range=pme: expected frames that are periodic in all directions, got training frame {index} "
                "without; leave the flag out, or give periodic frames"
            )


def _neighbours(dataset: Any, cutoff: float) -> float:
    """Average number of neighbours within a cutoff (Å), from the graphs of the training frames."""
    edges = atoms = 0
    for graph in dataset:
        sender, receiver = graph.edge_index
        vectors = graph.positions[receiver] - graph.positions[sender] + graph.shifts
        edges += int((vectors.norm(dim=1) < cutoff).sum())
        atoms += len(graph.positions)
    if not edges:
        raise SettingsError(f"--r_short: no two atoms of the training frames are within {cutoff:g} Å; raise it")
    return edges / atoms
