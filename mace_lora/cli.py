"""The ``equitune`` command."""

from __future__ import annotations

import importlib.metadata
import os
import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Quantum accuracy from few quantum labels for MACE and NequIP.",
)
console = Console(width=None if sys.stdout.isatty() else 120)


def main() -> None:
    """Entry point: a bad setting or file ends with its message, not a traceback."""
    try:
        app()
    except (ValueError, FileNotFoundError) as err:
        typer.echo(f"equitune: error: {err}", err=True)
        sys.exit(2)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def run(context: typer.Context, command: str) -> None:
    """Run mace_run_train (or any console script) with the plugins active.

    For installations where the start-up file is not read (python -S, PYTHONPATH only):
    equitune run mace_run_train --lora …
    """
    from mace_lora.mace_plugin.startup import install

    install()
    found = [e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == command]
    sys.argv = [command, *context.args]
    if found:
        sys.exit(found[0].load()())
    if Path(command).is_file():
        sys.path.insert(0, str(Path(command).resolve().parent))
        runpy.run_path(command, run_name="__main__")
        return
    raise ValueError(f"run: expected the name of an installed command such as mace_run_train, got {command!r}")


@app.command()
def doctor() -> None:
    """Check the installation: hook, plugins, upstream versions, contract with MACE and PEFT."""
    from mace_lora.mace_plugin import startup

    problems = 0
    table = Table("check", "result", show_lines=False)
    disabled = os.environ.get(startup.KILL_SWITCH) == "1"
    in_pth = "mace_lora.mace_plugin.startup" in sys.modules and startup.is_installed()
    table.add_row("start-up hook", "off (EQUITUNE_DISABLE=1)" if disabled else "active" if in_pth else "NOT active")
    problems += not in_pth and not disabled
    for name in ("equitune", "torch", "e3nn", "mace-torch", "nequip", "peft", "safetensors"):
        try:
            table.add_row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(name, "not installed")
    for entry in importlib.metadata.entry_points(group="mace.run_train"):
        table.add_row(f"plugin {entry.name}", entry.value)
    problems += _check_contracts(table)
    console.print(table)
    if problems:
        console.print(
            f"[red]{problems} problem(s).[/red] Without the hook, use: equitune run mace_run_train …"
            if not in_pth
            else f"[red]{problems} problem(s)[/red]"
        )
        raise typer.Exit(1)
    console.print("all checks passed")


def _check_contracts(table: Table) -> int:
    problems = 0
    if _installed("mace-torch"):
        from mace_lora.mace_plugin.contract import check

        for what, problem in check():
            problems += problem is not None
            table.add_row(what, problem or "ok")
    if _installed("peft"):
        from mace_lora.lora.peft_bridge import check_peft

        for what, problem in check_peft():
            problems += problem is not None
            table.add_row(what, problem or "ok")
    return problems


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@app.command("export-base")
def export_base(
    output: Annotated[Path, typer.Argument(help="file to write, e.g. organic.model")],
    dtype: Annotated[str, typer.Option(help="float32 or float64")] = "float64",
) -> None:
    """Write the embedded organic base (H, C, N, O) as a .model for --foundation_model.

    The .model is MACE's own format, a pickle: load such files only from sources you trust.
    """
    import torch

    from mace_lora.atomic import atomic_path
    from mace_lora.mace_plugin.base_model import embedded_base

    if dtype not in ("float32", "float64"):
        raise ValueError(f"--dtype: expected float32 or float64, got {dtype!r}")
    model = embedded_base(getattr(torch, dtype))
    with atomic_path(output) as temporary:
        torch.save(model, temporary)
    console.print(f"base model written to {output}")


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(help="base or foundation .model (a pickle: only from sources you trust)")],
    adapter: Annotated[Path, typer.Argument(help="adapter folder")],
    output: Annotated[Path, typer.Option("--output", "-o", help="stock MACE .model to write")],
) -> None:
    """Fold an adapter into its base: a stock MACE .model that needs no equitune."""
    from mace_lora.atomic import atomic_path
    from mace_lora.lora.adapter import load_adapter, read_adapter
    from mace_lora.lora.inject import merge_lora

    read_adapter(adapter)  # before the slow part
    if not base.is_file():
        raise FileNotFoundError(f"no file {base}")
    import mace  # noqa: F401  before e3nn, which the .model needs
    import torch

    model = merge_lora(load_adapter(torch.load(base, map_location="cpu", weights_only=False), adapter))
    with atomic_path(output) as temporary:
        torch.save(model, temporary)
    console.print(f"merged model written to {output}")


@app.command()
def info(path: Annotated[Path, typer.Argument(help="adapter folder")]) -> None:
    """Show what an adapter is: ranks, parameters, base fingerprint, elements, provenance."""
    from mace_lora.lora.adapter import read_adapter

    saved = read_adapter(path)
    table = Table("", "", show_header=False)
    config = saved.config
    values = sum(t.numel() for t in saved.tensors.values())
    table.add_row("preset, rank, alpha", f"{config.preset}, {config.rank}, {config.alpha:g}")
    table.add_row("modules, parameters", f"{len(saved.plan)}, {values:,}")
    for key, value in [*saved.metadata.items(), *saved.run.items()]:
        table.add_row(key, str(value))
    console.print(table)


if __name__ == "__main__":
    main()
