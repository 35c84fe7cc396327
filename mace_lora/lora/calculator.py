"""ASE calculator of a MACE model with adapters that are switched without rebuilding anything."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from torch import nn

from .adapter import AdapterFile, read_adapter
from .energies import BUFFER, MODULE, difference
from .fingerprint import fingerprint
from .inject import RECORDS, adapter_layers, adapter_names, disabled_adapters, merge_adapters, set_adapter
from .loading import load_adapter, load_tensors

__all__ = [
    "choose_head",
    "graph_of",
    "like_model",
    "load_calculator",
    "load_with_adapters",
]  # and AdapterCalculator, on demand

AdapterPath = str | os.PathLike[str]
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
# Upstream's conversions rebuild the model from its architecture and would drop the adapters.
_REBUILDING = ("enable_cueq", "enable_oeq", "compile_mode")


def load_calculator(
    base: nn.Module | AdapterPath,
    adapter: AdapterPath | Mapping[str, AdapterPath] | None = None,
    *,
    device: str = "cpu",
    default_dtype: str = "",
    head: str | None = None,
    merge: bool = False,
    **kwargs: Any,
) -> Any:
    """ASE calculator from a base model and saved adapters, in one call.

    Args:
        base: a MACE model (copied, the caller's stays as it is); ``"embedded"``; the stem of a
            safetensors + JSON base; or a ``.model`` file, which is MACE's own pickle: open only
            files that you trust. A foundation model is prepared as the adapters' metadata say.
        adapter: one adapter folder (its name becomes ``"default"``), or name -> folder; the first
            one is active. None: the base alone, with the adapters that it may have already.
        device: where to run, as for torch.
        default_dtype: ``"float32"`` or ``"float64"`` for weights and results; empty: the model's own.
        head: head of a multi-head model; default its only one, or the one named "default".
        merge: fold the active adapter into the weights at every switch: an evaluation then costs
            exactly the base's, at the price of a second copy of the adapted weights in memory.
        kwargs: further arguments of ``MACECalculator``.

    Returns:
        an :class:`AdapterCalculator`, which is a ``MACECalculator``: energy in eV, forces in eV/Å,
        stress in eV/Å³.

    Raises:
        ValueError: adapters of different bases, an adapter that does not fit the base, an unknown
            head or dtype, or an option that would drop the adapters.
        FileNotFoundError: no base or no adapter there.
    """
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: expected one that torch can use here, got {device!r} without CUDA; 'cpu' works")
    adapters = {"default": adapter} if isinstance(adapter, str | os.PathLike) else adapter
    model = load_with_adapters(base, adapters, default_dtype=default_dtype)
    for option in _REBUILDING:
        if kwargs.get(option) and adapter_names(model):
            raise ValueError(
                f"load_calculator: {option}={kwargs[option]!r} rebuilds the model without its adapters; "
                "merge the adapter first (equitune merge) and give the merged model to MACECalculator"
            )
    return _calculator_class()(
        models=[model], device=device, default_dtype=dtype_name(model), head=choose_head(model, head), merge=merge,
        **kwargs,
    )  # fmt: skip


def load_with_adapters(
    base: nn.Module | AdapterPath, adapters: Mapping[str, AdapterPath] | None, *, default_dtype: str = ""
) -> nn.Module:
    """Base model with several saved adapters; the first one is active.

    Args:
        base: as for :func:`load_calculator`; a module is copied.
        adapters: name -> folder; None for the base alone.
        default_dtype: ``"float32"``, ``"float64"`` or empty (the model's own).

    Returns:
        the model on the CPU if it was read from a file, else where the module was.

    Raises:
        ValueError: no adapters given, adapters of different bases, one that does not fit the base,
            or an unknown dtype.
        FileNotFoundError: no base or no adapter there.
    """
    if default_dtype and default_dtype not in _DTYPES:
        raise ValueError(f"default_dtype: expected one of {', '.join(_DTYPES)} or '', got {default_dtype!r}")
    dtype = _DTYPES.get(default_dtype)
    if adapters is not None and not adapters:
        raise ValueError("adapter: expected at least one adapter folder, got none; give None for the base alone")
    files = {name: read_adapter(path) for name, path in (adapters or {}).items()}
    _check_same_base(files)
    if isinstance(base, nn.Module):
        model = copy.deepcopy(base)
    else:
        from mace_lora.mace_plugin.base_model import load_model

        model = load_model(base)  # in its own precision: adapters know their base by its weights
    if adapter_names(model) and any(f.metadata.get("base_fingerprint") != fingerprint(model) for f in files.values()):
        raise ValueError(
            f"base: it has adapters already ({', '.join(adapter_names(model))}) and is not the prepared base of the "
            "adapters to load; give the base that they were trained on, or one without adapters"
        )
    # The first one may prepare a new model from a foundation model. The others belong to the same, as was checked;
    # prepared in another precision than in training it could differ in a last digit.
    for name, path in (adapters or {}).items():
        first = name == next(iter(files))
        model = load_adapter(model, path, adapter_name=name, check_base=first)
        if first and dtype is not None:  # known by now; the factors' own precision may exceed the base's
            model = model.to(dtype)
            load_tensors(model, files[name], name, Path(path))
        _own_references(model, name, files)
    if dtype is not None:
        model = model.to(dtype)
    return set_adapter(model, next(iter(files))) if files else model


def _check_same_base(files: Mapping[str, AdapterFile]) -> None:
    """Adapters share a backbone only if they were trained on the same prepared base."""
    names = list(files)
    for other in names[1:]:
        a, b = files[names[0]].metadata, files[other].metadata
        if a.get("base_fingerprint") != b.get("base_fingerprint") and not _only_references(files[other], a, b):
            raise ValueError(
                f"adapters {names[0]!r} and {other!r} belong to different prepared bases: {_difference(a, b)}; "
                "train them with the same base, elements and E0s, or load each into a calculator of its own"
            )


def _only_references(other: AdapterFile, a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two adapters are of one foundation and differ in the E0s alone, which the second can make up for."""
    same = ("foundation_fingerprint", "foundation_head", "elements", "heads")
    change = difference(a.get("E0s"), b.get("E0s"), b.get("heads", ()))
    known = a.get("foundation_fingerprint") is not None and change is not None
    return known and all(a.get(k) == b.get(k) for k in same) and MODULE in [p.name for p in other.plan]


@torch.no_grad()
def _own_references(model: nn.Module, name: str, files: Mapping[str, AdapterFile]) -> None:
    """Give an adapter the E0s it was trained with, on a base that has the first adapter's."""
    first, mine = files[next(iter(files))].metadata, files[name].metadata
    change = difference(mine.get("E0s"), first.get("E0s"), first.get("heads", ()))
    layer = adapter_layers(model).get(MODULE)
    shifts: Any = layer.lora_dense[name] if layer is not None and name in layer.lora_dense else {}
    if change is None or not change.any() or BUFFER not in shifts:
        return  # without a shift of its own the fingerprints, and so the E0s, are the same
    update = shifts[BUFFER]
    update += torch.as_tensor(change).to(update).reshape(update.shape)
    # saved from here, it is an adapter of the first one's references
    getattr(model, RECORDS)[name]["metadata"] |= {k: first.get(k) for k in ("E0s", "base_fingerprint")}


def _difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """The first difference that a user can act on."""
    for key in ("foundation_fingerprint", "foundation_head", "elements", "heads", "E0s"):
        if key in a and key in b and a[key] != b[key]:
            unit = " (eV)" if key == "E0s" else ""
            return f"{key}{unit} {a[key]} and {b[key]}"
    return f"base fingerprints {a.get('base_fingerprint')} and {b.get('base_fingerprint')}"


def dtype_name(model: nn.Module) -> str:
    """``"float32"`` or ``"float64"``, the type of the model's weights."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def choose_head(model: nn.Module, head: str | None) -> str:
    """The head to evaluate; upstream would quietly take the last one for an unknown name.

    Args:
        model: MACE model.
        head: the head asked for; None takes the only one, or the one named "default".

    Raises:
        ValueError: an unknown head, or none chosen where there is no default.
    """
    heads = [str(h) for h in getattr(model, "heads", None) or ["Default"]]  # type: ignore[union-attr]
    if head is None:
        matching = heads if len(heads) == 1 else [h for h in heads if h.lower() == "default"]
        if not matching:
            raise ValueError(f"head: the model has several; choose one of {', '.join(heads)}")
        return matching[0]
    if head not in heads:
        raise ValueError(f"head: the model has no head {head!r}; expected one of {', '.join(heads)}")
    return head


def graph_of(model: Any, frames: Sequence[Atoms], head: str) -> dict[str, Any]:
    """ASE frames as one MACE batch in the model's dtype and on its device.

    Args:
        model: MACE model.
        frames: at least one.
        head: one of the model's heads.

    Raises:
        ValueError: elements that the model does not know.
    """
    import mace  # noqa: F401  before e3nn
    from mace import data
    from mace.tools import AtomicNumberTable, torch_geometric

    from mace_lora.mace_plugin.base_model import _default_dtype, elements

    require_elements(model, frames)
    known = elements(model)
    # as MACECalculator does; upstream's own context manager would leave the dtype after an error
    keys = data.KeySpecification(info_keys={"total_spin": "spin", "total_charge": "charge"})
    with _default_dtype(next(model.parameters()).dtype):
        configs = [data.config_from_atoms(atoms, key_specification=keys, head_name=head) for atoms in frames]
        table, heads = AtomicNumberTable(known), list(getattr(model, "heads", None) or ["Default"])
        items = [data.AtomicData.from_config(c, z_table=table, cutoff=float(model.r_max), heads=heads) for c in configs]
    return like_model(model, torch_geometric.Batch.from_data_list(items).to_dict())


def require_elements(model: Any, frames: Sequence[Atoms]) -> None:
    """Refuse frames with elements that the model does not know.

    Raises:
        ValueError: such elements, by atomic number.
    """
    known = [int(z) for z in model.atomic_numbers]
    foreign = sorted({int(z) for atoms in frames for z in atoms.numbers} - set(known))
    if foreign:
        raise ValueError(f"frames: the model does not know the atomic numbers {foreign}, only {known}")


def like_model(model: nn.Module, graph: Mapping[str, Any]) -> dict[str, Any]:
    """A MACE batch dictionary in the model's dtype and on its device; nothing is changed in place."""
    like = next(model.parameters())
    out = dict(graph)
    for key, value in graph.items():
        if torch.is_tensor(value):
            out[key] = value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
    return out


class _Switching:
    """What :class:`AdapterCalculator` adds to ``MACECalculator``."""

    models: list[nn.Module]

    def __init__(self, *args: Any, merge: bool = False, **kwargs: Any) -> None:
        self._merge = merge
        # Upstream extends the list that all ASE calculators share.
        self.implemented_properties: list[str] = []
        super().__init__(*args, **kwargs)
        if self.active_adapters:
            # After the base class has moved and converted the model: the weights that a merge
            # keeps aside are no parameters and would not follow.
            self.set_adapter(self.active_adapters)

    @property
    def adapter_names(self) -> list[str]:
        """Names of the adapters that :meth:`set_adapter` accepts."""
        return adapter_names(self.models[0])

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that act now; none inside :meth:`disabled`."""
        layers = adapter_layers(self.models[0]).values()
        return list(dict.fromkeys(n for layer in layers if not layer.disable_adapters for n in layer.active_adapters))

    def set_adapter(self, names: str | Sequence[str]) -> None:
        """Switch to another adapter, or to the sum of several; cached results are dropped.

        Args:
            names: one of :attr:`adapter_names`, or several.

        Raises:
            ValueError: an unknown name; the active adapter stays as it was.
        """
        for model in self.models:
            (merge_adapters if self._merge else set_adapter)(model, names)
            model.requires_grad_(False)  # switching makes the active factors trainable
        self._forget()

    @contextlib.contextmanager
    def disabled(self) -> Iterator[Any]:
        """Inside the ``with`` block the calculator is the base's."""
        with contextlib.ExitStack() as stack:
            for model in self.models:
                stack.enter_context(disabled_adapters(model))
            self._forget()
            try:
                yield self
            finally:
                self._forget()

    def calculate(self, atoms: Atoms | None = None, *args: Any, **kwargs: Any) -> None:
        """As upstream's, with a message for an element that the model does not have.

        Raises:
            ValueError: such an element; adapters have the elements of their training frames only.
        """
        if atoms is not None:
            require_elements(self.models[0], [atoms])
        super().calculate(atoms, *args, **kwargs)  # type: ignore[misc]

    def _forget(self) -> None:
        self.reset()  # type: ignore[attr-defined]


@functools.cache
def _calculator_class() -> type:
    import mace  # noqa: F401  before e3nn: it sets the environment that e3nn 0.4.4 needs
    from mace.calculators import MACECalculator

    doc = """``MACECalculator`` of one model with switchable adapters; made by :func:`load_calculator`.

    Args:
        merge: fold the active adapter into the weights at every switch.
        args, kwargs: as for ``MACECalculator``.
    """
    return type("AdapterCalculator", (_Switching, MACECalculator), {"__doc__": doc, "__module__": __name__})


def __getattr__(name: str) -> Any:
    # The class needs mace; the module does not.
    if name == "AdapterCalculator":
        return _calculator_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
