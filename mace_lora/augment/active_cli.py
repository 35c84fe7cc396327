"""``equitune active-learn``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from mace_lora.atomic import atomic_path
from mace_lora.console import console

__all__ = ["active_learn"]


def active_learn(
    config: Annotated[Path, typer.Argument(help="YAML file, e.g. recipes/configs/active_learning.yaml")],
) -> None:
    """Train a committee with mace_run_train, explore, label what it disagrees on, repeat.

    Ends when the candidate rate (explored frames whose largest force deviation is above the window's lower bound, and
    those lost because the dynamics blew up) falls below stop_below. Stopped at any point, the same command goes on.
    Writes rounds.json and rounds.png.
    """
    from .active import run
    from .active_config import read_config

    settings = read_config(config)
    picture = settings.folder / "rounds.png"
    rounds = run(
        settings, lambda line: console.print(line, highlight=False),
        lambda so_far: _plot(so_far, picture, settings.stop_below),
    )  # fmt: skip
    table = Table("round", "explored", "lost", "in window", "above", "candidate rate", "labelled", "E MAE", "F MAE")
    for r in rounds:
        errors = [f"{r[k]:.2f}" if k in r else "–" for k in ("mae_e", "mae_f")]
        table.add_row(
            str(r["round"]), str(r["explored"]), str(r.get("lost", "–")), str(r["in_window"]), str(r["above"]),
            f"{100 * r['candidate_rate']:.2f} %", str(r["labelled"]), *errors,
        )  # fmt: skip
    console.print(table)
    console.print(
        "errors of the first member on the frames of its round before they were trained on, meV/atom and meV/Å"
    )
    console.print(f"written: {settings.folder / 'rounds.json'}, {picture}", highlight=False)


def _plot(rounds: list[dict[str, Any]], path: Path, stop: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    number = [r["round"] for r in rounds]
    left.plot(number, [100 * r["candidate_rate"] for r in rounds], "o-")
    left.axhline(100 * stop, ls=":", c="k")
    left.set(xlabel="round", ylabel="candidate rate (%)", ylim=(0, None))
    with_errors = [r for r in rounds if "mae_f" in r]
    for key, label in (("mae_f", "F (meV/Å)"), ("mae_e", "E (meV/atom)")):
        right.plot([r["round"] for r in with_errors], [r[key] for r in with_errors], "s-", label=label)
    right.set(xlabel="round", ylabel="MAE on new frames", yscale="log")
    if with_errors:
        right.legend()
    for axis in (left, right):
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
