"""NequIP checkpoints and packages on disk: reading, description, merging of an adapter."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mace_lora.atomic import atomic_path
from mace_lora.lora.adapter import read_adapter
from mace_lora.lora.blocks import describe
from mace_lora.lora.fingerprint import fingerprint
from mace_lora.lora.inject import merge_lora
from mace_lora.lora.loading import load_adapter
from nequip_ext.upstream.package import (
    cpu_deserialize_always,
    declare_dependencies,
    no_package_warnings,
    package_metadata,
)

from .metadata import base_metadata, holds_adapter

__all__ = ["calculator", "describe_nequip", "load_nequip", "merge_package"]

_PACKAGE = ".nequip.zip"


def load_nequip(path: Path) -> nn.Module:
    """The GraphModel of a package or a checkpoint.

    Both formats run code when read: load only files from sources you trust.

    Args:
        path: X.nequip.zip or X.ckpt.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not readable, or a LoRA run whose base is another by now.
    """
    from nequip.model.saved_models import load_saved_model
    from nequip.utils.global_state import set_global_state

    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    set_global_state()
    try:
        model: nn.Module = load_saved_model(str(path))
    except (RuntimeError, KeyError, EOFError, AttributeError, pickle.UnpicklingError, zipfile.BadZipFile) as err:
        raise ValueError(f"{path}: cannot be read as a NequIP package or checkpoint ({err})") from err
    # a LoRA checkpoint builds its base from the file of before, then takes the weights of the checkpoint
    built: dict[str, Any] = getattr(model, "equitune_metadata", {})
    if built and built["base_fingerprint"] != fingerprint(model):
        raise ValueError(
            f"{path}: its base {built.get('base_model')} is another by now, and what is no weight (numbers of "
            "neighbours, cutoffs) is taken from that file: put the base of the training back there"
        )
    return model.eval()


def describe_nequip(model: nn.Module) -> dict[str, Any]:
    """Fingerprint, types, cutoff, energy references and adaptable weights per irrep.

    Args:
        model: GraphModel.
    """
    weights: dict[str, int] = {}
    for module in model.modules():
        spec = describe(module)
        for block in spec.blocks if spec else ():
            weights[block.irrep] = weights.get(block.irrep, 0) + block.m * block.n
    return {
        "kind": "NequIP-framework model",
        "fingerprint": fingerprint(model),
        "parameters": sum(p.numel() for n, p in model.named_parameters() if ".lora_" not in n),
        "adapter": "unmerged" if holds_adapter(model) else "none",
        "adaptable weights": dict(sorted(weights.items())),
        **base_metadata(model),
    }


def merge_package(base: Path, adapter: Path, output: Path) -> None:
    """Fold an adapter into its base and write a package that needs no equitune.

    Args:
        base: X.nequip.zip, or X.ckpt of a run without LoRA, which is packaged first.
        adapter: adapter folder.
        output: Y.nequip.zip.

    Raises:
        ValueError: another ending of ``output``, or the adapter belongs to another base.
        FileNotFoundError: no such base or adapter.
    """
    if not str(output).endswith(_PACKAGE):
        raise ValueError(f"output: expected a file name ending in {_PACKAGE}, got {output}")
    if not base.is_file():
        raise FileNotFoundError(f"no file {base}")
    read_adapter(adapter)
    with tempfile.TemporaryDirectory() as folder:
        source = base
        if base.suffix == ".ckpt":
            if holds_adapter(load_nequip(base)):
                raise ValueError(
                    f"{base}: expected the base of the adapter, got a run with LoRA; nequip-package build merges its "
                    "adapter, or give the file that the run started from"
                )
            source = Path(folder) / f"base{_PACKAGE}"
            _package(base, source)
        with no_package_warnings(), atomic_path(output) as temporary:
            _rewrite(source, adapter, temporary)


def _package(checkpoint: Path, target: Path) -> None:
    """Upstream's own command, in a process of its own because it keeps global state."""
    program = str(Path(sys.executable).parent / "nequip-package")
    done = subprocess.run(
        [program, "build", str(checkpoint), str(target)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise ValueError(f"{checkpoint}: nequip-package build failed:\n{done.stdout[-1500:]}")


def _rewrite(source: Path, adapter: Path, target: Path) -> None:
    """Copy a package, with the adapter merged into each of its models."""
    from nequip.utils.global_state import set_global_state

    set_global_state()
    importer = torch.package.PackageImporter(source)
    with torch.package.PackageExporter(target, importer=(importer, torch.package.importer.sys_importer)) as exporter:
        declare_dependencies(exporter)
        with cpu_deserialize_always():
            example = importer.load_pickle("model", "example_data.pkl")
        exporter.save_pickle("model", "example_data.pkl", example, dependencies=True)
        for text in ("config.yaml", "package_metadata.txt"):
            exporter.save_text("model", text, importer.load_text("model", text))
        for mode in package_metadata(importer)["available_models"]:
            with cpu_deserialize_always():
                models = importer.load_pickle("model", f"{mode}_model.pkl", map_location="cpu")
            for name, model in list(models.items()):
                if holds_adapter(model):
                    raise ValueError(f"{source}: it holds an unmerged adapter already; give the base of the adapter")
                models[name] = merge_lora(load_adapter(model, adapter))
            exporter.save_pickle("model", f"{mode}_model.pkl", models, dependencies=True)


def calculator(model: nn.Module, device: str) -> Any:
    """ASE calculator of a GraphModel.

    Args:
        model: GraphModel with element symbols as types.
        device: cpu or cuda.
    """
    from nequip.integrations.ase import NequIPCalculator
    from nequip.integrations.utils import basic_transforms

    graph: Any = model
    names = list(graph.type_names)
    transforms = basic_transforms(graph.metadata, float(graph.metadata["r_max"]), names, {n: n for n in names})
    return NequIPCalculator(model.eval(), device=device, transforms=transforms)
