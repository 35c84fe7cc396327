"""``equitune diff`` and ``equitune tune``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from mace_lora.atomic import write_text
from mace_lora.console import MODEL_HELP, console, is_nequip_file, model_from, print_json

__all__ = ["diff", "tune"]


def diff(
    base: Annotated[Path, typer.Argument(help=MODEL_HELP)],
    tuned: Annotated[Path, typer.Argument(help="fine-tuned model of the same kind, or adapter folder of this base")],
    head: Annotated[str | None, typer.Option(help="head of a multi-head base that training began with")] = None,
    rows: Annotated[int, typer.Option(help="rows to show, largest change first; 0 shows all")] = 40,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """What changed between a base and a fine-tuned model, per layer and irrep (l, p).

    Relative change |dW|/|W| in the Frobenius norm, and how many singular values hold 90 % of |dW|².
    """
    from dataclasses import asdict

    from mace_lora.lora.diff import diff_models
    from mace_lora.lora.info import is_adapter
    from mace_lora.lora.inject import adapter_layers, merge_lora

    if not is_adapter(tuned) and is_nequip_file(base) != is_nequip_file(tuned):
        raise ValueError(f"tuned: expected a model of the same framework as {base}, got {tuned}")
    after = model_from(base, tuned) if is_adapter(tuned) else model_from(tuned)
    if adapter_layers(after):  # a checkpoint of a LoRA run
        after = merge_lora(after)
    before = model_from(base)
    if not is_nequip_file(base):
        before = _as_training_began(before, after, tuned, head)
    elif head is not None:
        raise ValueError(f"--head: a NequIP model has no heads; leave {head!r} out")
    changes = diff_models(before, after)
    if as_json:
        print_json([asdict(c) for c in changes])
        return
    table = Table("module", "irrep", "shape", "|dW|/|W|", "rank of 90 %", "full rank")
    for change in changes[: rows or None]:
        shape, rank = "x".join(map(str, change.shape)), change.rank90
        table.add_row(
            change.module, change.irrep, shape, f"{change.relative:.3g}", "–" if rank is None else str(rank),
            "–" if change.full_rank is None else str(change.full_rank),
        )  # fmt: skip
    console.print(table)
    console.print(f"{min(rows or len(changes), len(changes))} of {len(changes)} rows shown")


def _as_training_began(before: Any, after: Any, tuned: Path, head: str | None) -> Any:
    """A MACE base with elements selected and heads made as in the fine-tuned model."""
    from mace_lora.lora.adapter import read_adapter
    from mace_lora.lora.info import is_adapter
    from mace_lora.mace_plugin.base_model import describe_base, prepare_base, select_head

    many = (getattr(before, "heads", None) or [1], getattr(after, "heads", None) or [1])
    if len(many[0]) > len(many[1]) == 1:  # fine-tuning starts from one of a foundation's heads
        wanted = head or (read_adapter(tuned).metadata.get("foundation_head") if is_adapter(tuned) else None)
        chosen = select_head(before, wanted)
        if chosen is None:
            raise ValueError(
                f"--head: the base has heads {', '.join(before.heads)}; name the one that training began with"
            )
        before = chosen
    wanted_now = describe_base(after)
    theirs = next(iter(describe_base(before)["E0s"].values()))  # as given: other E0s are a change too
    energies = {h: {z: theirs.get(z, e) for z, e in row.items()} for h, row in wanted_now["E0s"].items()}
    return prepare_base(before, wanted_now | {"E0s": energies})


def tune(
    context: typer.Context,
    ranks: Annotated[str, typer.Option(help="LoRA ranks to try")] = "4,16",
    lrs: Annotated[str, typer.Option(help="learning rates to try")] = "0.005,0.01,0.02",
    epochs: Annotated[int, typer.Option(help="epochs of the winner; losing settings stop after 1/3, 1/9, …")] = 90,
    folder: Annotated[Path, typer.Option("--folder", "-o", help="runs and result; a stopped search continues")] = Path(
        "tune"
    ),
) -> None:
    """Search rank and learning rate on your own validation frames, by successive halving.

    Flags of mace_run_train follow after --, for example

    equitune tune --ranks 4,16 --lrs 0.005,0.02 -- --foundation_model=base.model --train_file=dft.xyz …
    """
    from mace_lora.lora.tune import tune as search

    try:
        rank_list, lr_list = [int(r) for r in ranks.split(",")], [float(x) for x in lrs.split(",")]
    except ValueError as err:
        raise ValueError(f"--ranks/--lrs: expected comma-separated numbers, got {ranks!r} and {lrs!r}") from err
    arguments = [a for a in context.args if a != "--"]
    trials = search(arguments, rank_list, lr_list, epochs, folder, console.print)
    table = Table("rank", "lr", "epochs", "validation loss")
    for t in trials:
        table.add_row(str(t.rank), f"{t.lr:g}", str(t.epochs), f"{t.loss:.6g}")
    console.print(table)
    best = trials[0]
    text = json.dumps([{"rank": t.rank, "lr": t.lr, "epochs": t.epochs, "loss": t.loss} for t in trials], indent=1)
    write_text(folder / "tune.json", text.replace("Infinity", "null") + "\n")
    console.print(f"best: --lora --lora_rank={best.rank} --lr={best.lr:g}; its run is in {folder / best.folder}")
