"""A committee of adapters on one backbone: mean, spread and every member's energies and forces.

Two ways to evaluate, equal to rounding: *passes* runs the model once per adapter with precomputed
weights; *batched* replicates the graph K times and runs the model once, each adapter layer mapping
its K weights over the K copies (``torch.vmap``), everything else seeing one larger batch. On one CPU
thread, K = 4 (``benchmarks/committee_cost.py``), time relative to K passes with precomputed weights:
embedded base 0.62-0.65 for one molecule of 12 atoms, 0.99-1.27 for eight; MACE-OFF23-small 0.87-0.93 and
1.08-1.18 (K merged copies 0.96-1.00; forming the updates anew at every pass 1.16-1.48 and 0.99-1.20),
so the batched pass is the default for small graphs on the CPU (``_BATCH_BYTES``); nothing was measured on
a GPU. Mapping the whole forward instead is about as fast and would need MACE patched; ``torch.func.grad``
gives zero forces through e3nn's TorchScript modules.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from torch import nn
from torch.func import functional_call

from .calculator import AdapterPath, choose_head, graph_of, like_model, load_with_adapters
from .inject import adapter_layers, adapter_names
from .layers import _WEIGHT_ARGUMENT, AdapterLayer

__all__ = ["STRATEGIES", "Committee", "CommitteePrediction", "committee_predict", "load_committee"]

STRATEGIES = ("auto", "batched", "passes")
# Size of one member's largest message tensor up to which the batched pass is measured to be faster.
_BATCH_BYTES = 3 * 2**19

Weights = list[tuple[AdapterLayer, dict[str, torch.Tensor]]]  # parameter -> (K, *shape), of each layer


@dataclass(frozen=True)
class CommitteePrediction:
    """What K adapters predict; tensors are detached, in the model's dtype and on its device.

    Attributes:
        names: the K adapters.
        energies: (K, frames) in eV.
        forces_comm: (K, atoms, 3) in eV/Å, the atoms of all frames in order.
        frame: (atoms,) int64, the frame of each atom.
    """

    names: tuple[str, ...]
    energies: torch.Tensor
    forces_comm: torch.Tensor
    frame: torch.Tensor

    @property
    def energy(self) -> torch.Tensor:
        """Mean over the members (frames,), float64, eV."""
        return self.energies.double().mean(0)

    @property
    def energy_std(self) -> torch.Tensor:
        """Standard deviation over the members, divisor K, (frames,), float64, eV."""
        return self.energies.double().std(0, correction=0)

    @property
    def forces(self) -> torch.Tensor:
        """Mean over the members (atoms, 3), eV/Å."""
        return self.forces_comm.mean(0)

    @property
    def forces_std(self) -> torch.Tensor:
        """sqrt(mean_k |F_k - mean F|^2) of each atom (atoms,), eV/Å."""
        return (self.forces_comm - self.forces).square().sum(-1).mean(0).sqrt()

    @property
    def max_forces_std(self) -> torch.Tensor:
        """Largest ``forces_std`` of each frame (frames,), eV/Å: the usual measure in active learning."""
        out = self.forces_std.new_zeros(self.energies.shape[1])
        return out.scatter_reduce(0, self.frame, self.forces_std, "amax")


def committee_predict(
    model: nn.Module, frames: Atoms | Sequence[Atoms] | Mapping[str, Any], names: Sequence[str] | None = None, *,
    head: str | None = None, strategy: str = "auto", batch_size: int = 8,
) -> CommitteePrediction:  # fmt: skip
    """Energies and forces of several adapters of one model; the active adapter stays as it is.

    Args:
        model: MACE model with the adapters; not changed.
        frames: ASE atoms, or one MACE batch dictionary.
        names: at least two adapters; default all in the model.
        head: head of a multi-head model, for ASE atoms; a batch dictionary carries its own.
        strategy: ``"auto"``, ``"batched"`` or ``"passes"`` (module docstring).
        batch_size: ASE frames evaluated together.

    Raises:
        ValueError: fewer than two adapters, an unknown one, no frames, unknown elements or strategy.
    """
    members = _check(model, names, strategy)
    weights = _weights(list(adapter_layers(model).values()), members)
    if isinstance(frames, Mapping):
        return _evaluate(model, weights, members, like_model(model, frames), strategy)
    items = [frames] if isinstance(frames, Atoms) else list(frames)
    if not items or batch_size < 1:
        raise ValueError(f"frames: expected at least one, got {len(items)}, with batch_size {batch_size} >= 1")
    parts = []
    for start in range(0, len(items), batch_size):
        graph = graph_of(model, items[start : start + batch_size], choose_head(model, head))
        part = _evaluate(model, weights, members, graph, strategy)
        parts.append((part.energies, part.forces_comm, part.frame + start))
    energies, forces, frame = zip(*parts, strict=True)
    return CommitteePrediction(members, torch.cat(energies, 1), torch.cat(forces, 1), torch.cat(frame))


class Committee(Calculator):
    """ASE calculator whose energy and forces are the mean over adapters of one backbone.

    ``results`` has besides ``energy``, ``free_energy`` and ``forces``: ``energy_comm`` (K,) and
    ``energy_std`` in eV; ``forces_comm`` (K, N, 3), ``forces_std`` (N,) and ``max_forces_std`` in
    eV/Å, as :class:`CommitteePrediction` defines them. The first is not called ``energies``, which
    in ASE means energies per atom: ``ase.io.write`` fails on K of them.

    Args:
        model: MACE model with the adapters; copied, so training it further has no effect here.
        names: at least two adapters; default all in the model.
        device: where to run, as for torch.
        default_dtype: ``"float32"`` or ``"float64"``; empty: the model's own.
        head: head of a multi-head model; default its only one, or the one named "default".
        strategy: ``"auto"``, ``"batched"`` or ``"passes"`` (module docstring).
        kwargs: further arguments of ASE's ``Calculator``.

    Raises:
        ValueError: fewer than two adapters, an unknown one, an unknown head, dtype or strategy.
    """

    implemented_properties = ["energy", "free_energy", "forces"]

    def __init__(
        self, model: nn.Module, names: Sequence[str] | None = None, *, device: str = "cpu", default_dtype: str = "",
        head: str | None = None, strategy: str = "auto", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(**kwargs)
        self.members, self.strategy = _check(model, names, strategy), strategy
        self.head = choose_head(model, head)
        self.model = load_with_adapters(model, None, default_dtype=default_dtype).to(device).eval()
        self.model.requires_grad_(False)
        self._weights: Weights = []
        self._seen: list[Any] | None = None

    def calculate(self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = all_changes) -> None:
        """Fill ``results``; called by ASE."""
        super().calculate(atoms, properties, system_changes)
        graph = graph_of(self.model, [self.atoms], self.head)
        found = _evaluate(self.model, self._current_weights(), self.members, graph, self.strategy)
        energy = float(found.energy)
        self.results = {
            "energy": energy, "free_energy": energy, "forces": found.forces.cpu().numpy(),
            "energy_comm": found.energies[:, 0].cpu().numpy(), "energy_std": float(found.energy_std),
            "forces_comm": found.forces_comm.cpu().numpy(), "forces_std": found.forces_std.cpu().numpy(),
            "max_forces_std": float(found.max_forces_std),
        }  # fmt: skip

    def _current_weights(self) -> Weights:
        """The members' weights, formed again when a factor or base weight changed in place."""
        layers = list(adapter_layers(self.model).values())
        seen = [(p.data_ptr(), p._version) for layer in layers for p in layer.parameters()]
        if seen != self._seen:
            self._weights, self._seen = _weights(layers, self.members), seen
        return self._weights


def load_committee(
    base: nn.Module | AdapterPath, adapters: Sequence[AdapterPath] | Mapping[str, AdapterPath], device: str = "cpu",
    default_dtype: str = "", **kwargs: Any,
) -> Committee:  # fmt: skip
    """Committee from a base model and saved adapters.

    Args:
        base: as for ``load_calculator``.
        adapters: at least two adapter folders (their names become the adapters'), or name -> folder.
        device: where to run, as for torch.
        default_dtype: ``"float32"`` or ``"float64"``; empty: the model's own.
        kwargs: further arguments of :class:`Committee`.

    Raises:
        ValueError: fewer than two adapters, adapters of different bases, or one that does not fit.
        FileNotFoundError: no base or no adapter there.
    """
    if isinstance(adapters, str | os.PathLike) or len(adapters) < 2:
        raise ValueError(f"adapters: a committee needs at least two adapter folders, got {adapters!r}")
    if not isinstance(adapters, Mapping):
        names = [Path(path).resolve().name.replace(".", "_") for path in adapters]
        if len(set(names)) < len(names):
            names = [f"{name}-{i}" for i, name in enumerate(names)]
        adapters = dict(zip(names, adapters, strict=True))
    model = load_with_adapters(base, adapters, default_dtype=default_dtype)
    return Committee(model, list(adapters), device=device, **kwargs)


def _check(model: nn.Module, names: Sequence[str] | None, strategy: str) -> tuple[str, ...]:
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    known = adapter_names(model)
    members = tuple(known if names is None else names)
    if unknown := [name for name in members if name not in known]:
        raise ValueError(f"adapter {unknown[0]!r} is not in the model; expected one of {', '.join(known) or 'none'}")
    if len(members) < 2 or len(set(members)) < len(members):
        raise ValueError(f"names: a committee needs at least two different adapters, got {list(members)}")
    return members


@torch.no_grad()
def _weights(layers: Sequence[AdapterLayer], names: Sequence[str]) -> Weights:
    """What each layer needs to be any of the members, whatever is active, disabled or merged now."""
    out: Weights = []
    for layer in layers:
        stack = {}
        for parameter in layer._adaptable():
            deltas = [layer.delta(parameter, [name]) for name in names]
            if parameter in layer._unmerged or any(d is not None for d in deltas):
                base = layer._unmerged.get(parameter, layer.base_value(parameter))
                stack[parameter] = torch.stack([base if d is None else base + d for d in deltas])
        out.append((layer, stack))
    return out


def _run(layer: AdapterLayer, parameters: Mapping[str, torch.Tensor], args: Sequence[Any]) -> Any:
    if layer.spec.kind in _WEIGHT_ARGUMENT and parameters.keys() == {"weight"}:
        return layer.base_layer(*args, weight=parameters["weight"])
    return functional_call(layer.base_layer, dict(parameters), tuple(args))


def _as_member(layer: AdapterLayer, stack: Mapping[str, torch.Tensor], k: int) -> Callable[..., Any]:
    """Forward of a layer for member k."""
    parameters = {name: value[k] for name, value in stack.items()}
    return lambda *args: _run(layer, parameters, args)


def _as_all(layer: AdapterLayer, stack: Mapping[str, torch.Tensor], members: int) -> Callable[..., Any]:
    """Forward of a layer for all members; the rows of every argument are K equal stretches."""
    mapped = torch.vmap(lambda parameters, *args: _run(layer, parameters, args))

    def forward(*args: torch.Tensor) -> Any:
        split = [a.unflatten(0, (members, a.shape[0] // members)) for a in args]
        if layer.spec.kind == "symmetric contraction":  # vmap would turn its einsums into slow batched products
            return torch.cat([_as_member(layer, stack, k)(*(a[k] for a in split)) for k in range(members)])
        return mapped(dict(stack), *split).flatten(0, 1)

    return forward


@contextlib.contextmanager
def _forwards(weights: Weights, make: Callable[..., Callable[..., Any]], which: int) -> Iterator[None]:
    """Inside the ``with`` block every adapter layer runs ``make(layer, stack, which)``."""
    try:
        for layer, stack in weights:
            layer.__dict__["forward"] = make(layer, stack, which)  # found before the class's own
        yield
    finally:
        for layer, _ in weights:
            layer.__dict__.pop("forward", None)


def _evaluate(
    model: Any, weights: Weights, names: tuple[str, ...], graph: Mapping[str, Any], strategy: str
) -> CommitteePrediction:
    n = len(names)
    batched = strategy == "batched"
    if strategy == "auto":
        width = max(int(interaction.conv_tp.irreps_out.dim) for interaction in model.interactions)
        size = int(graph["edge_index"].shape[1]) * width * graph["positions"].element_size()
        batched = size <= _BATCH_BYTES and graph["positions"].device.type == "cpu"
    passes = []
    for which in (n,) if batched else range(n):
        with _forwards(weights, _as_all if batched else _as_member, which):
            out = model(_replicate(graph, n if batched else 1), training=False, compute_force=True)
        passes.append((out["energy"].detach(), out["forces"].detach()))
    energies, forces = (torch.cat(values) for values in zip(*passes, strict=True))
    return CommitteePrediction(names, energies.reshape(n, -1), forces.reshape(n, -1, 3), graph["batch"])


def _replicate(graph: Mapping[str, Any], copies: int) -> dict[str, Any]:
    """The batch so many times in a row, as one batch; positions are a fresh leaf."""
    steps = {"edge_index": graph["positions"].shape[0], "batch": len(graph["ptr"]) - 1}
    out: dict[str, Any] = {}
    for key, value in graph.items():
        if key in steps:
            out[key] = torch.cat([value + i * steps[key] for i in range(copies)], dim=-1)
        elif key == "ptr":
            out[key] = torch.cat([value[:1], *(value[1:] + i * value[-1] for i in range(copies))])
        elif torch.is_tensor(value) and value.dim():
            out[key] = value.detach().repeat(copies, *(1 for _ in value.shape[1:]))
        else:
            out[key] = value
    return out
