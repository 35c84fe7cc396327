"""``equitune transfer-check``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mace_lora.console import console, print_json

__all__ = ["transfer_check"]


def transfer_check(
    frames: Annotated[Path, typer.Argument(help="your quantum frames, labelled (eV, eV/Å)")],
    with_: Annotated[str, typer.Option("--with", help="classical potential, as for equitune label")],
    count: Annotated[int, typer.Option("--count", "-n", help="frames to use at most")] = 200,
    energy_key: Annotated[str, typer.Option(help="energy label (eV) in the frame's info")] = "REF_energy",
    forces_key: Annotated[str, typer.Option(help="force labels (eV/Å) in the frame's arrays")] = "REF_forces",
    pilot: Annotated[
        Path | None, typer.Option(help="folder of a small trial: equal models from scratch and pre-trained, minutes")
    ] = None,
    workers: Annotated[int, typer.Option(help="processes of the trial's dynamics and labels")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Is classical pre-training (mace_run_train --autotune_train_file) likely to help your data?

    Compares a classical potential's forces and energies with the labels of your own frames, overall and by element,
    in seconds, before anything is labelled or trained. With --pilot small models are trained on your frames with and
    without classical pre-training; stopped, the same command goes on.
    """
    import numpy as np

    from mace_lora.augment.labelers import open_labeler
    from mace_lora.augment.labelling import iter_frames

    from .advice import advice, agreement, with_labels
    from .pilot import pilot as run_pilot

    if count < 1:
        raise ValueError(f"--count: expected at least 1, got {count}")
    found = with_labels(list(iter_frames(frames)), energy_key, forces_key)
    available = len(found)
    found = [found[i] for i in np.unique(np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int))]

    def bar(items: Any) -> Any:
        return track(items, description="evaluating", console=Console(stderr=True), transient=True)

    result = agreement(found, open_labeler(with_).label, energy_key, forces_key, bar)
    trial = None
    if pilot is not None:
        trial = run_pilot(
            found, with_, pilot, energy_key=energy_key, forces_key=forces_key, workers=workers,
            say=lambda line: Console(stderr=True).print(line, highlight=False),
        )  # fmt: skip
    text = advice(result, available, None if trial is None else trial.gain)
    if as_json:
        more = {} if trial is None else {"pilot": asdict(trial) | {"gain": trial.gain}}
        print_json(asdict(result) | {"available": available, "advice": text} | more)
        return
    table = Table("element", "force correlation", "slope (quantum / classical)")
    for symbol, (correlation, slope) in {"all": (result.correlation, result.slope), **result.elements}.items():
        table.add_row(symbol, f"{correlation:.3f}", f"{slope:.3f}")
    console.print(table)
    console.print(
        f"energies about the elements' offsets: {result.energy_rms:.1f} meV/atom; less the classical ones: "
        f"{result.energy_rest:.1f} meV/atom ({result.frames} frames)",
        highlight=False,
    )
    console.print(text, highlight=False)
    if trial is not None:
        console.print(trial.text(), highlight=False)
        console.print(f"written: {pilot}", highlight=False)
