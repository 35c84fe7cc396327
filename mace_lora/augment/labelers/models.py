"""Machine-learned potentials and ASE's EMT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ase

from .registry import Factory, Method

__all__ = ["METHODS"]


def _file(kind: str, argument: str) -> tuple[Path, Path | None]:
    name, _, adapter = argument.partition("+")
    base = Path(name) if name == "embedded" else Path(name).resolve()
    folder = Path(adapter).resolve() if adapter else None
    for path in (base, folder):
        if path is not None and not path.exists() and path != Path("embedded"):
            raise ValueError(f"labeler {kind}: no file {path}")
    return base, folder


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
    from mace_lora.lora.adapter import load_adapter
    from mace_lora.lora.inject import merge_lora

    path, adapter = _file("mace", argument)
    model = model_from(path).double()
    if adapter is not None:
        model = merge_lora(load_adapter(model, adapter))
    calculator = MACECalculator(models=[model], device="cpu", default_dtype="float64")
    elements = {chemical_symbols[int(z)] for z in model.atomic_numbers}
    return _known(calculator, elements, "mace"), f"MACE {argument}"


def _nequip(argument: str) -> tuple[Factory, str]:
    from mace_lora.console import model_from
    from nequip_ext.lora.saved import calculator

    path, adapter = _file("nequip", argument)
    model = model_from(path, adapter)
    return _known(calculator(model, "cpu"), set(model.type_names), "nequip"), f"NequIP {argument}"


def _sevennet(argument: str) -> tuple[Factory, str]:
    from sevenn.calculator import SevenNetCalculator

    calculator = SevenNetCalculator(argument, device="cpu")
    return (lambda atoms: calculator), f"SevenNet {argument}"


def _ani2x(argument: str) -> tuple[Factory, str]:
    import torchani

    try:
        calculator = torchani.models.ANI2x(periodic_table_index=True).double().ase()
    except Exception as err:  # its weights come from the network at first use
        raise ValueError(f"labeler ani2x: TorchANI could not load its weights ({err}); load them once online") from err
    return _known(calculator, {"H", "C", "N", "O", "F", "S", "Cl"}, "ani2x"), "ANI-2x"


def _emt(argument: str) -> tuple[Factory, str]:
    from ase.calculators.emt import EMT, parameters

    known = _known(None, set(parameters), "emt")
    # a new one for each frame: its neighbour list keeps a skin, so that last digits depend on the frames before
    return (lambda atoms: known(atoms) or EMT()), "EMT"


_MACE_HELP = "a MACE .model, or 'embedded', with an adapter"
METHODS = (
    Method("mace", "FILE[+ADAPTER]", _MACE_HELP, {"mace": "mace-torch"}, _mace, files=True),
    Method("nequip", "FILE[+ADAPTER]", "a NequIP package or checkpoint", {"nequip": "nequip"}, _nequip, files=True),
    Method("sevennet", "NAME", "a SevenNet model, e.g. 7net-0", {"sevenn": "sevenn"}, _sevennet, files=True),
    Method("ani2x", "", "ANI-2x by TorchANI", {"torchani": "torchani"}, _ani2x),
    Method("emt", "", "effective medium theory of ASE, metals", {"ase": "ase"}, _emt),
)
