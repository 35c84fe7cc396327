"""The ``equitune`` command."""

from __future__ import annotations

import importlib.metadata
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from mace_lora.augment.active_cli import active_learn
from mace_lora.augment.cli import label
from mace_lora.augment.sample_cli import app as sample
from mace_lora.augment.select_cli import app as select
from mace_lora.autotune.cli import transfer_check
from mace_lora.console import MODEL_HELP, Dtype, console, is_nequip_file, model_from, print_json
from mace_lora.data.cli import check
from mace_lora.distill.cli import distill
from mace_lora.evaluate.cli import evaluate, learning_curve
from mace_lora.evaluate.md_cli import rdf, stability
from mace_lora.lora.cli import diff, tune

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Quantum accuracy from few quantum labels for MACE and NequIP.",
)


def main() -> None:
    """Entry point: a bad setting or file ends with its message, not a traceback."""
    for category in (DeprecationWarning, UserWarning):  # inside torch and e3nn, not the user's to act on
        warnings.filterwarnings("ignore", category=category)
    try:
        app()
    except ModuleNotFoundError as err:
        package = (err.name or "").partition(".")[0]
        extra = {"nequip": "nequip", "allegro": "allegro", "mace": "mace", "sevenn": "sevennet"}.get(package)
        if extra is None:
            raise
        typer.echo(f'equitune: error: this needs {package} here: pip install "equitune[{extra}]"', err=True)
        sys.exit(2)
    except (ValueError, OSError) as err:
        typer.echo(f"equitune: error: {err}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("equitune: stopped", err=True)
        sys.exit(130)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def run(context: typer.Context, command: str) -> None:
    """Run mace_run_train (or any console script) with the plugins active.

    For installations where the start-up file is not read (python -S, PYTHONPATH only):
    equitune run mace_run_train --lora …
    """
    from mace_lora.mace_plugin.startup import install

    if command in ("--help", "-h"):
        typer.echo(context.get_help())
        return
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
    """Check the installation: hook, plugins, upstream versions, contract with MACE, NequIP and PEFT."""
    from mace_lora.mace_plugin import startup

    problems = 0
    table = Table("check", "result", show_lines=False)
    disabled = os.environ.get(startup.KILL_SWITCH) == "1"
    in_pth = _hook_is_read()
    table.add_row("start-up hook", "off (EQUITUNE_DISABLE=1)" if disabled else "active" if in_pth else "NOT active")
    problems += not in_pth and not disabled
    for name in (
        "equitune",
        "torch",
        "e3nn",
        "mace-torch",
        "nequip",
        "nequip-allegro",
        "sevenn",
        "peft",
        "safetensors",
    ):
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


def _hook_is_read() -> bool:
    """Whether a new Python process has the hook without asking for it."""
    code = "import sys; print('mace_lora.mace_plugin.startup' in sys.modules)"
    flags = ["-S"] if sys.flags.no_site else []
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() == "True"


def _check_contracts(table: Table) -> int:
    problems = 0
    if _installed("mace-torch"):
        from mace_lora.mace_plugin.contract import check

        for what, problem in check():
            problems += problem is not None
            table.add_row(what, problem or "ok")
    if _installed("nequip"):
        from nequip_ext.upstream.contract import check as check_nequip

        for what, problem in check_nequip():
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
    dtype: Annotated[Dtype, typer.Option(help="precision of the weights; MACE's default is float64")] = "float64",
) -> None:
    """Write the embedded organic base (H C N O F S) as a .model for --foundation_model.

    The .model is MACE's own format, a pickle: load such files only from sources you trust.
    """
    import torch

    from mace_lora.mace_plugin.base_model import embedded_base
    from mace_lora.mace_plugin.convert import save_model

    save_model(embedded_base(getattr(torch, dtype)), output)
    console.print(f"base model written to {output}")


@app.command("convert-model")
def convert(
    source: Annotated[Path, typer.Argument(help="X.model (a pickle: only from sources you trust) or X.safetensors")],
    target: Annotated[Path, typer.Argument(help="Y.safetensors (writes Y.json too) or Y.model")],
) -> None:
    """Convert a MACE .model to safetensors + JSON, or back; the result is verified.

    The pair needs no unpickling and crosses between e3nn versions where that is exact (models of
    natural parity); where it is not, loading is refused.
    """
    from mace_lora.mace_plugin.convert import convert_model

    files = convert_model(source, target)
    console.print(f"written: {', '.join(map(str, files))}")


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(help=MODEL_HELP)],
    adapter: Annotated[Path, typer.Argument(help="adapter folder")],
    output: Annotated[Path, typer.Option("--output", "-o", help="MACE .model or NequIP .nequip.zip to write")],
    dtype: Annotated[
        Dtype | None, typer.Option(help="precision of the merged MACE model; default that of the training")
    ] = None,
) -> None:
    """Fold an adapter into its base: a stock MACE .model or NequIP package that needs no equitune."""
    if output.resolve() == Path(base).resolve() or adapter.resolve() in output.resolve().parents:
        raise ValueError(f"--output: {output} is the base, or in the adapter's folder; choose another name")
    if is_nequip_file(base):
        from nequip_ext.lora.saved import merge_package

        if dtype is not None:
            raise ValueError("--dtype: a NequIP model keeps the model_dtype it was built with; leave the option out")
        merge_package(base, adapter, output)
        console.print(f"merged package written to {output}")
        return
    import torch

    from mace_lora.mace_plugin.convert import save_model

    if output.suffix != ".model":
        raise ValueError(f"--output: expected a name that ends in .model, got {output}")
    model = model_from(base, adapter)
    if dtype is not None:
        model = model.to(getattr(torch, dtype))
    save_model(model, output)
    precision = str(next(model.parameters()).dtype).removeprefix("torch.")
    console.print(f"merged model ({precision}) written to {output}")


@app.command()
def info(
    path: Annotated[Path, typer.Argument(help=f"adapter folder; {MODEL_HELP}")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show what an adapter, base or model is: fingerprint, elements, ranks, parameters, errors, provenance."""
    from mace_lora.lora.info import describe_adapter, describe_model, is_adapter, recorded

    if is_adapter(path):
        content = describe_adapter(path)
    elif is_nequip_file(path):
        from nequip_ext.lora.saved import describe_nequip

        content = describe_nequip(model_from(path))
    else:
        content = describe_model(model_from(path)) | recorded(path)
    if as_json:
        print_json(content)
        return
    table = Table("", "", show_header=False)
    for key, value in content.items():
        table.add_row(key, _cell(value))
    console.print(table)


def _cell(value: Any) -> str:
    """A value for a table; nested ones take a line for each key."""
    if isinstance(value, dict) and any(isinstance(v, dict) for v in value.values()):
        return "\n".join(f"{k}: {_cell(v)}" for k, v in value.items())
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


@app.command("nequip-autotune", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def nequip_autotune(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="YAML of nequip-train with an autotune key")],
) -> None:
    """Classical-to-quantum transfer for NequIP and PaiNN: both stages of nequip-train from one YAML.

    Further arguments are Hydra overrides, e.g. folder=out epochs=100. Stopped, the same command goes on.
    """
    from nequip_ext.autotune.driver import run as autotune

    result = autotune(
        config.parent.resolve(), config.stem, context.args, lambda line: console.print(line, highlight=False)
    )
    console.print(f"written: {result}", highlight=False)


for command in (evaluate, diff, label, check, stability, rdf, distill):
    app.command()(command)
app.command("learning-curve")(learning_curve)
app.command("transfer-check")(transfer_check)
app.add_typer(sample, name="sample")
app.add_typer(select, name="select")
app.command("active-learn")(active_learn)
app.command("tune", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(tune)


if __name__ == "__main__":
    main()
