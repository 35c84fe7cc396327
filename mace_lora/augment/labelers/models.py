"""Machine-learned potentials and ASE's EMT."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import ase

from .registry import Factory, Method

__all__ = ["METHODS", "device"]


def _file(kind: str, argument: str) -> tuple[Path, Path | None]:
    name, _, adapter = argument.partition("+")
    base = Path(name) if name == "embedded" else Path(name).resolve()
    folder = Path(adapter).resolve() if adapter else None
    for path in (base, folder):
        if path is not None and not path.exists() and path != Path("embedded"):
            raise ValueError(f"labeler {kind}: no file {path}")
    return base, folder


def device() -> str:
    """Where machine-learned potentials compute: $EQUITUNE_DEVICE, else the CPU.

    Raises:
        ValueError: torch cannot compute there.
    """
    from mace_lora.console import require_device

    return require_device(os.environ.get("EQUITUNE_DEVICE", "cpu"), "EQUITUNE_DEVICE")


def _known(calculator: Any, elements: set[str], name: str) -> Factory:
    """The same calculator for every frame, for known elements only."""

    def make(atoms: ase.Atoms) -> Any:
        missing = sorted(set(atoms.get_chemical_symbols()) - elements)
        if missing:
            raise ValueError(
                f"{name}: the model does not know {', '.join(missing)}; it knows {', '.join(sorted(elements))}"
            )
        return calculator

    return make


def _mace(argument: str) -> tuple[Factory, str]:
    from ase.data import chemical_symbols
    from mace.calculators import MACECalculator

    from mace_lora.console import model_from
    from mace_lora.lora.inject import merge_lora
    from mace_lora.lora.loading import load_adapter

    path, adapter = _file("mace", argument)
    model = model_from(path).double()
    if adapter is not None:
        model = merge_lora(load_adapter(model, adapter))
    calculator = MACECalculator(models=[model], device=device(), default_dtype="float64")
    elements = {chemical_symbols[int(z)] for z in model.atomic_numbers}
    return _known(calculator, elements, "mace"), f"MACE {argument}"


def _nequip(argument: str) -> tuple[Factory, str]:
    from mace_lora.console import model_from
    from nequip_ext.lora.saved import calculator

    path, adapter = _file("nequip", argument)
    model = model_from(path, adapter)
    return _known(calculator(model, device()), set(model.type_names), "nequip"), f"NequIP {argument}"


def _sevennet(argument: str) -> tuple[Factory, str]:
    from sevenn.calculator import SevenNetCalculator

    calculator = SevenNetCalculator(argument, device=device())
    return (lambda atoms: calculator), f"SevenNet {argument}"


def _ani(model: str, elements: set[str], argument: str) -> tuple[Factory, str]:
    """TorchANI's ensemble; some of its releases carry weights, others fetch them at first use."""
    name = model.lower()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # of its CUDA extension, which is optional
            import torchani

            calculator = getattr(torchani.models, model)(periodic_table_index=True).double().ase()
    except Exception as err:
        hint = "" if model == "ANI2x" else ", or take torchani==2.0 with setuptools<81, which holds its weights"
        raise ValueError(
            f"labeler {name}: TorchANI could not load {model} ({str(err)[:200]}); take torchani>=2.2 and load it once "
            f"online{hint}"
        ) from err
    known = _known(calculator, elements, name)

    def make(atoms: ase.Atoms) -> Any:
        charge, spin = atoms.info.get("charge", 0), atoms.info.get("spin", 1)
        if charge != 0 or spin != 1:
            raise ValueError(f"{name}: it knows neutral singlets only, got charge {charge} and multiplicity {spin}")
        return known(atoms)

    return make, f"ANI-{model[3:]}"


def _nep(argument: str) -> tuple[Factory, str]:
    """A neuroevolution potential: a text file of GPUMD."""
    from calorine.calculators import CPUNEP

    path, _ = _file("nep", argument)
    head = path.read_text(errors="replace").split("\n", 1)[0].split()
    if not head or not head[0].startswith("nep"):
        raise ValueError(f"labeler nep: {path} is not a NEP potential; expected a first line like 'nep4 1 C'")
    known = _known(None, set(head[2:]), "nep")
    # a new one for each frame: it keeps the frame of its last result
    return (lambda atoms: known(atoms) or CPUNEP(str(path))), f"NEP {argument}"


def _emt(argument: str) -> tuple[Factory, str]:
    from ase.calculators.emt import EMT, parameters

    known = _known(None, set(parameters), "emt")
    # a new one for each frame: its neighbour list keeps a skin, so that last digits depend on the frames before
    return (lambda atoms: known(atoms) or EMT()), "EMT"


_MACE_HELP = "a MACE .model, or 'embedded', with an adapter"
_TORCHANI, _HCNO = {"torchani": "torchani"}, {"H", "C", "N", "O"}
_2X = {*_HCNO, "F", "S", "Cl"}
METHODS = (
    Method("mace", "FILE[+ADAPTER]", _MACE_HELP, {"mace": "mace-torch"}, _mace, files=True),
    Method("nequip", "FILE[+ADAPTER]", "a NequIP package or checkpoint", {"nequip": "nequip"}, _nequip, files=True),
    Method("sevennet", "NAME", "a SevenNet model, e.g. 7net-0", {"sevenn": "sevenn"}, _sevennet, files=True),
    Method("ani1x", "", "ANI-1x by TorchANI; H C N O", _TORCHANI, partial(_ani, "ANI1x", _HCNO)),
    Method("ani1ccx", "", "ANI-1ccx by TorchANI; H C N O", _TORCHANI, partial(_ani, "ANI1ccx", _HCNO)),
    Method("ani2x", "", "ANI-2x by TorchANI; H C N O F S Cl", _TORCHANI, partial(_ani, "ANI2x", _2X)),
    Method("nep", "FILE", "a neuroevolution potential of GPUMD", {"calorine": "calorine"}, _nep, files=True),
    Method("emt", "", "effective medium theory of ASE, metals", {"ase": "ase"}, _emt),
)
