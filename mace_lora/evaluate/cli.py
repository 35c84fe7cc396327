"""``equitune evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from mace_lora.console import MODEL_HELP, Dtype, console, is_nequip_file, model_from, require_device

__all__ = ["evaluate", "learning_curve"]


def evaluate(
    model: Annotated[str, typer.Argument(help=f"{MODEL_HELP}; or a potential's name as for equitune label")],
    frames: Annotated[Path, typer.Argument(help="labelled frames, any format ASE reads (eV, eV/Å, eV/Å³)")],
    adapter: Annotated[Path | None, typer.Option(help="adapter folder to put on the model")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for errors.json and parity.png")] = Path(
        "evaluation"
    ),
    energy_key: Annotated[str, typer.Option(help="energy label (eV) in the frame's info")] = "REF_energy",
    forces_key: Annotated[str, typer.Option(help="force labels (eV/Å) in the frame's arrays")] = "REF_forces",
    stress_key: Annotated[str, typer.Option(help="stress label (eV/Å³) in the frame's info")] = "REF_stress",
    head: Annotated[str | None, typer.Option(help="head of a multi-head model")] = None,
    index: Annotated[str, typer.Option(help="which frames, as an ASE slice")] = ":",
    by: Annotated[list[str] | None, typer.Option(help="key in the frames' info, e.g. temperature_K")] = None,
    level: Annotated[float, typer.Option(help="confidence level of the bootstrap intervals, 0 to 1")] = 0.95,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="precision of the evaluation; a NequIP model keeps its own")] = "float64",
) -> None:
    """Errors of a model, or of base + adapter, on labelled frames.

    MAE and RMSE of the energy per atom (meV/atom), of forces (meV/Å) and of stress (meV/Å³) with
    bootstrap intervals over frames, force errors per element and by size of the force, errors for
    each value of a key (--by), a parity plot and JSON.
    """
    import numpy as np

    from mace_lora.evaluate.metrics import predict
    from mace_lora.evaluate.reading import read_frames
    from mace_lora.evaluate.report import report, tables, write_report

    if not 0 < level < 1:
        raise ValueError(f"--level: expected a number between 0 and 1, got {level}")
    structures = read_frames(frames, index)
    groups = {key: [_value(a, key, i) for i, a in enumerate(structures)] for key in by or []}
    calculator = _potential(model, adapter, head, device, dtype, structures)
    try:
        predictions = predict(calculator, structures, energy_key, forces_key, stress_key, progress=_bar)  # type: ignore[arg-type]
    except ValueError as err:
        within = "" if index == ":" else f" (counted within --index {index})"
        raise ValueError(f"{frames}: {err}{within}") from err
    for kind, key, label in (
        ("energy", energy_key, predictions.energy_label), ("forces", forces_key, predictions.forces_label),
    ):  # fmt: skip
        if not np.isfinite(label).any():
            console.print(f"no frame has {kind} labels under {key}: no errors of {kind}")
    content = report(
        predictions, level, groups, model=model, adapter=str(adapter) if adapter else None, frames_file=str(frames)
    )
    for table in tables(content):
        console.print(table)
    files = write_report(predictions, content, output, (adapter or Path(model)).name)
    console.print(f"written: {', '.join(map(str, files))}")


def learning_curve(
    points: Annotated[list[str], typer.Argument(help="NAME:N=errors.json; several of one N are seeds")],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG to write")] = Path("learning_curve.png"),
) -> None:
    """Errors against the number of labels, of several evaluations: a table and a log-log plot."""
    from statistics import median

    from rich.table import Table

    from .curves import data_curve, read_points

    curves = read_points(points)
    table = Table("model", "labels", "seeds", "E MAE (meV/atom)", "F MAE (meV/Å)")
    for name, rows in curves.items():
        for count in sorted(rows):
            cells = []
            for key in ("mae_e", "mae_f"):
                known = [c["errors"][key] for c in rows[count] if c["errors"][key] is not None]
                cells.append(f"{median(known):.2f}" if known else "–")
            table.add_row(name, str(count), str(len(rows[count])), *cells)
    console.print(table)
    data_curve(curves, output)
    console.print(f"written: {output}", highlight=False)


def _value(atoms: Any, key: str, index: int) -> Any:
    if key not in atoms.info:
        raise ValueError(f"--by: frame {index} has no {key!r} in its info; it has {sorted(atoms.info)}")
    return atoms.info[key]


def _potential(model: str, adapter: Path | None, head: str | None, device: str, dtype: str, frames: list[Any]) -> Any:
    """Calculator of a model file, or the labeler of that name."""
    from mace_lora.augment.labelers import is_labeler, open_labeler

    path = Path(model)
    if is_labeler(model) and not path.exists():
        if adapter is not None or head is not None or (device, dtype) != ("cpu", "float64"):
            raise ValueError(f"--adapter, --head, --device, --dtype: {model} is a potential by name; leave them out")
        return open_labeler(model)
    require_device(device, "--device")
    loaded = model_from(path, adapter)
    _require_elements(loaded, path, frames)
    return _nequip(loaded, head, device) if is_nequip_file(path) else _calculator(loaded, head, device, dtype)


def _require_elements(model: Any, path: Path, frames: list[Any]) -> None:
    from ase.data import chemical_symbols

    known = set(model.type_names) if is_nequip_file(path) else {chemical_symbols[int(z)] for z in model.atomic_numbers}
    for i, atoms in enumerate(frames):
        missing = sorted(set(atoms.get_chemical_symbols()) - known)
        if missing:
            raise ValueError(
                f"frame {i}: {path.name} does not know {', '.join(missing)}; it knows {', '.join(sorted(known))}"
            )


def _nequip(model: Any, head: str | None, device: str) -> Any:
    from nequip_ext.lora.saved import calculator

    if head is not None:
        raise ValueError(f"--head: a NequIP model has one head, got {head!r}; leave the option out")
    return calculator(model, device)


def _calculator(model: Any, head: str | None, device: str, dtype: str) -> Any:
    from mace.calculators import MACECalculator

    heads = list(getattr(model, "heads", ["Default"]))
    if head is not None and head not in heads:
        raise ValueError(f"--head: expected one of {', '.join(heads)}, got {head!r}")
    if len(heads) > 1 and head is None:
        raise ValueError(f"--head: the model has heads {', '.join(heads)}; choose one")
    return MACECalculator(models=[model], device=device, default_dtype=dtype, head=head or heads[0])


def _bar(items: Any) -> Any:
    return track(items, description="evaluating", console=Console(stderr=True), transient=True)
