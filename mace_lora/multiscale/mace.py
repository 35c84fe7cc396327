"""``mace_run_train --model=MultiScaleMACE``: flags and behaviour in MACE's training command."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from torch import nn

from mace_lora.mace_plugin.protocol import Run, SettingsError, TrainPlugin

from .checks import (
    MODEL,
    Default,
    check_against_multiscale,
    check_cutoffs,
    check_periodic,
    check_restart,
    check_short,
    read_foundation,
    refuse_conflicts,
)

__all__ = ["MultiscalePlugin"]

_FLAGS = (
    "r_short", "multiscale_coupling", "multiscale_split", "multiscale_freeze_short", "long_range", "pme_smearing",
)  # fmt: skip


class MultiscalePlugin(TrainPlugin):
    """A model with a short and a long path, from scratch or around a foundation model."""

    name = "multiscale"
    flag, leaves = f"--model={MODEL}", "a long path"
    order = -10  # builds the model that LoRA adapts

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the model and its flags; the flags of the short path are MACE's own."""
        from mace.tools.arg_parser import str2bool

        from .build import LongPath

        actions = {a.dest: a for a in parser._actions}
        actions["model"].choices += [MODEL]  # type: ignore[operator]
        actions["r_max"].default = Default(actions["r_max"].default)
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
            "--multiscale_split", type=str2bool, nargs="?", const=True,
            help="the long path leaves near neighbours to the short one: its radial functions are multiplied by one "
            "minus the short path's cutoff function (default False)",
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
        refuse_conflicts(args)
        known = read_foundation(args)
        short = args.r_short if known is None else float(getattr(known, "r_short", known.r_max))
        if known is not None:
            check_short(args.r_short, short)
        if hasattr(known, "r_short"):
            check_against_multiscale(known, given, args)
            run.state["r_long"], run.state["multiscale_foundation"] = float(known.r_max), True
        else:
            if isinstance(args.r_max, Default):
                raise SettingsError(f"--r_max: --model={MODEL} needs the long cutoff in Å, larger than the short one")
            if short is None and args.foundation_model is None:
                raise SettingsError(f"--r_short: --model={MODEL} needs the short cutoff in Å, smaller than --r_max")
            run.state["r_long"] = float(args.r_max)
            if args.lora_init_adapter is not None:
                raise SettingsError(
                    "--lora_init_adapter: it would leave the new long path untrained; start the adapter anew, or give "
                    f"a {MODEL} as --foundation_model"
                )
        if short is not None:
            check_cutoffs(short, run.state["r_long"])

    def before_data(self, run: Run) -> None:
        args = run.args
        if args.foundation_model is not None and not run.state.get("multiscale_foundation"):
            # upstream has set r_max to the foundation's
            check_short(args.r_short, args.r_max)
            check_cutoffs(args.r_max, run.state["r_long"])
        args.r_max = run.state["r_long"]

    def check_foundation(self, run: Run) -> None:
        if hasattr(run.foundation, "r_short") and not self.enabled(run.args):
            raise SettingsError(f"--foundation_model: it is a {MODEL}; give --model={MODEL} to fine-tune it")

    def before_model(self, run: Run) -> None:
        from .rebuild import stock_paths

        args = run.args
        if args.long_range == "pme" or hasattr(run.foundation, "charges"):
            check_periodic(run)
        if args.apply_cutoff and any("NonLinear" in str(b) for b in (args.interaction, args.interaction_first)):
            logging.warning(
                "equitune: upstream's NonLinear interaction blocks jump at a cutoff with --apply_cutoff True, here at "
                "both; give --apply_cutoff False, or other blocks"
            )
        run.state["avg_num_neighbors_long"] = args.avg_num_neighbors
        if hasattr(run.foundation, "r_short"):
            run.stand_in = stock_paths(run.foundation)[0]
        short = args.r_short if run.foundation is None else float((run.stand_in or run.foundation).r_max)  # type: ignore[arg-type]
        # as upstream's default from scratch: no shift and a first block without a residual, so that lone atoms have E0
        args.r_max, args.model = short, "MACE" if run.foundation is None else "ScaleShiftMACE"
        if run.foundation is None:
            args.avg_num_neighbors = _neighbours(run.train_dataset, short)
            logging.info("equitune: average number of neighbors within r_short: %g", args.avg_num_neighbors)

    def after_model(self, run: Run, model: nn.Module) -> nn.Module:
        from mace_lora.lora.fingerprint import fingerprint

        from .build import to_multiscale
        from .rebuild import attach_long

        args, long = run.args, run.state["r_long"]
        args.r_max, args.model = long, MODEL
        coupling = args.multiscale_coupling or "sum"
        try:
            if hasattr(run.foundation, "r_short"):
                built = attach_long(model, run.foundation, run.elements)
                coupling = built.coupling
                if hasattr(built, "charges") and args.lora_dense != "none":
                    run.state["train_in_full"] = ("charges",)  # LoRA has nothing to adapt in them
            else:
                around = run.foundation is not None
                recipe = {
                    "r_max": long, "coupling": coupling, "long_range": args.long_range or "none",
                    "pme_smearing": args.pme_smearing, "split": bool(args.multiscale_split),
                    "seed": args.seed if around else None,
                    "avg_num_neighbors": _neighbours(run.train_dataset, long)
                    if around
                    else run.state["avg_num_neighbors_long"],
                }  # fmt: skip
                built = to_multiscale(model, sizes=run.state["long_path"], zero=around, **recipe)  # type: ignore[arg-type]
                if around:
                    run.state["train_in_full"] = ("long.", "charges")
                    recipe |= {"sizes": asdict(run.state["long_path"]), "fingerprint": fingerprint(built.long)}
                    run.state["base_recipe"] = {"multiscale": recipe}  # for adapters
        except ValueError as err:
            raise SettingsError(f"--model={MODEL}: {err}") from err
        run.state["multiscale"] = _settings(run, built)
        check_restart(run)
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

    def on_checkpoint(self, run: Run, model: nn.Module, epoch: int, stage_two: bool) -> Mapping[str, Any]:
        """What a restart must agree with: weights would fit other cutoffs too."""
        return dict(run.state["multiscale"])


def _settings(run: Run, model: Any) -> dict[str, Any]:
    """Flag and value of everything that changes the model beside its weights."""
    from .split import is_split

    pme = hasattr(model, "charges")
    sizes = {} if run.state.get("multiscale_foundation") else asdict(run.state["long_path"])
    return {
        "r_short": round(float(model.r_short), 4), "r_max": round(float(model.r_max), 4),
        "multiscale_coupling": model.coupling, "multiscale_split": is_split(model.long),
        "long_range": "pme" if pme else "none", "pme_smearing": round(model.smearing, 4) if pme else None,
        "multiscale_freeze_short": bool(run.args.multiscale_freeze_short), **sizes,
    }  # fmt: skip


_HELP = {
    "num_channels_long": "features of every degree in the long path",
    "max_L_long": "highest degree of the long path's features",
    "max_ell_long": "highest degree of the long path's spherical harmonics",
    "correlation_long": "correlation of the long path; 1 is a linear update",
    "num_radial_basis_long": "radial functions of the long path on (0, r_max)",
    "radial_hidden_long": "hidden width of the long path's radial network; 0 for none",
}


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
