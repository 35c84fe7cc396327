"""The adapter layer: base module plus low-rank and dense updates, merged in weight space."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from .blocks import ModuleSpec, ParamSpec
from .config import LoraConfig

__all__ = ["AdapterLayer"]

# Layers whose forward takes the weight as an argument: cheaper than functional_call.
_WEIGHT_ARGUMENT = ("o3.Linear", "o3.FullyConnectedTensorProduct")


class AdapterLayer(nn.Module):
    """A module whose parameters are read as base + sum of the active adapters' updates.

    The update is computed in weight space at every call (W + alpha/r A B, then the base module
    runs once), so nothing is cached that could go stale, double backward works and inference
    after a merge costs exactly the base. Attribute names follow PEFT's ``LoraLayer``.

    Args:
        base_layer: module to adapt; its parameters are frozen.
        spec: blocks of the module.

    Attributes:
        lora_A: adapter name -> block name -> (m, r) factor.
        lora_B: adapter name -> block name -> (r, n) factor.
        lora_dense: adapter name -> parameter name ('.' written as '__') -> full-shape update.
        scaling: adapter name -> block name -> alpha/r.
    """

    lora_A: MutableMapping[str, nn.ParameterDict]
    lora_B: MutableMapping[str, nn.ParameterDict]
    lora_dense: MutableMapping[str, nn.ParameterDict]
    adapter_layer_names: tuple[str, ...] = ("lora_A", "lora_B", "lora_dense")
    other_param_names: tuple[str, ...] = ("r", "lora_alpha", "scaling")

    def __init__(self, base_layer: nn.Module, spec: ModuleSpec) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.spec = spec
        self.lora_A = nn.ModuleDict()  # type: ignore[assignment]
        self.lora_B = nn.ModuleDict()  # type: ignore[assignment]
        self.lora_dense = nn.ModuleDict()  # type: ignore[assignment]
        self.r: dict[str, dict[str, int]] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, dict[str, float]] = {}
        self._active_adapter: str | list[str] = []
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged: dict[str, torch.Tensor] = {}
        # (base module, parameters, *inputs) -> output or None; see by_element.enable
        self.kernel: Callable[..., torch.Tensor | None] | None = None
        # NequIP's packages: stand in for the merged base when pickled
        self.pickle_merged = False
        base_layer.requires_grad_(False)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not self.pickle_merged:
            return super().__reduce_ex__(protocol)
        merged = copy.deepcopy(self.base_layer)
        with torch.no_grad():
            for name, value in self.effective_parameters().items():
                owner, _, leaf = name.rpartition(".")
                getattr(merged.get_submodule(owner), leaf).copy_(value)
        # an expression of the standard library whose value is the merged module
        return operator.getitem, ((merged.requires_grad_(True),), 0)

    def __getattr__(self, name: str) -> Any:
        # Upstream reads attributes of the wrapped layer (irreps_out, weight_numel, …).
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None:
                raise
            return getattr(base, name)

    # -- structure ---------------------------------------------------------------------------

    def add_adapter(self, name: str, ranks: Mapping[str, int], dense: Iterable[str], config: LoraConfig) -> None:
        """Add an adapter with zero update: A random, B zero, dense zero.

        Args:
            name: adapter name.
            ranks: rank of each adapted block.
            dense: parameters to update in full.
            config: scaling and initialisation.
        """
        blocks = {b.name: b for b in self.spec.blocks}
        factors_a, factors_b = nn.ParameterDict(), nn.ParameterDict()
        for key, rank in ranks.items():
            block, like = blocks[key], self._like(key)
            std = block.init_scale * (math.sqrt(0.1 / rank) if config.init == "scaled" else 1.0)
            factors_a[key] = nn.Parameter(torch.randn(block.m, rank, dtype=like.dtype, device=like.device) * std)
            factors_b[key] = nn.Parameter(torch.zeros(rank, block.n, dtype=like.dtype, device=like.device))
        updates = nn.ParameterDict()
        for parameter in dense:
            updates[parameter.replace(".", "__")] = nn.Parameter(
                torch.zeros_like(self.base_value(parameter), requires_grad=False)
            )
        self.lora_A[name], self.lora_B[name], self.lora_dense[name] = factors_a, factors_b, updates
        self.r[name] = dict(ranks)
        self.lora_alpha[name] = float(config.alpha)
        self.scaling[name] = {key: config.scaling_of(rank) for key, rank in ranks.items()}

    def _like(self, block: str) -> torch.Tensor:
        for param in self.spec.params:
            if any(p.block == block for p in param.pieces):
                return self.base_layer.get_parameter(param.name)
        raise KeyError(block)

    def base_value(self, name: str) -> torch.Tensor:
        """A parameter or buffer of the base module."""
        owner, _, leaf = name.rpartition(".")
        value: torch.Tensor = getattr(self.base_layer.get_submodule(owner), leaf)
        return value

    def remove_adapter(self, name: str) -> None:
        """Delete one adapter; a merged one has to be unmerged first."""
        if name in self.merged_adapters:
            raise ValueError(f"adapter {name!r} is merged; unmerge it before deleting it")
        for store in (self.lora_A, self.lora_B, self.lora_dense):
            if name in store:
                del store[name]
        for table in (self.r, self.lora_alpha, self.scaling):
            table.pop(name, None)
        self.activate([a for a in self.active_adapters if a != name])

    # -- state -------------------------------------------------------------------------------

    @property
    def active_adapter(self) -> str | list[str]:
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        active = self._active_adapter
        return [active] if isinstance(active, str) else list(active)

    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters

    def activate(self, names: Iterable[str]) -> None:
        """Use these adapters and let only them receive gradients."""
        self._active_adapter = list(names)
        for store in (self.lora_A, self.lora_B, self.lora_dense):
            for name, factors in store.items():
                for key, factor in factors.items():
                    fitted = store is self.lora_dense and key.replace("__", ".") in self.spec.fitted
                    factor.requires_grad_(name in self._active_adapter and not fitted)

    def set_disabled(self, disabled: bool) -> None:
        """Bypass all adapters (base model), or use them again."""
        self._disable_adapters = disabled

    # -- weights -----------------------------------------------------------------------------

    def delta(self, parameter: str, adapters: Iterable[str] | None = None) -> torch.Tensor | None:
        """Update of one parameter, same shape as the parameter; None when no adapter touches it.

        Args:
            parameter: parameter name of the base module.
            adapters: adapter names; default the active ones.
        """
        spec = next((p for p in self.spec.params if p.name == parameter), None)
        total: torch.Tensor | None = None
        for name in self.active_adapters if adapters is None else adapters:
            parts = []
            if spec is not None and name in self.lora_A:
                parts.append(self._low_rank(spec, name))
            key = parameter.replace(".", "__")
            if name in self.lora_dense and key in self.lora_dense[name]:
                parts.append(self.lora_dense[name][key])
            for part in parts:
                if part is not None:
                    total = part if total is None else total + part
        return total

    def _low_rank(self, spec: ParamSpec, adapter: str) -> torch.Tensor | None:
        factors_a, factors_b = self.lora_A[adapter], self.lora_B[adapter]
        products: dict[str, torch.Tensor] = {}
        for piece in spec.pieces:
            if piece.block in factors_a and piece.block not in products:
                scale, b = self.scaling[adapter][piece.block], factors_b[piece.block]
                products[piece.block] = factors_a[piece.block] @ (b if scale == 1.0 else scale * b)
        if not products:
            return None
        like = next(iter(products.values()))
        if spec.columns:
            tiles = [
                products[p.block][:, slice(*p.cols)]
                if p.block in products
                else like.new_zeros(spec.shape[0], p.cols[1] - p.cols[0])
                for p in spec.pieces
            ]
            return torch.cat(tiles, 1)
        flat = []
        for piece in spec.pieces:
            product = products.get(piece.block)
            if product is None:
                flat.append(like.new_zeros(piece.numel))
                continue
            tile = product[slice(*piece.rows), slice(*piece.cols)]
            flat.append((tile.T if spec.transpose else tile).reshape(-1))
        return (flat[0] if len(flat) == 1 else torch.cat(flat)).reshape(spec.shape)

    def effective_parameters(self) -> dict[str, torch.Tensor]:
        """Base + active updates for every parameter that an active adapter touches."""
        out = {}
        active = [a for a in self.active_adapters if a not in self.merged_adapters]
        for name in self._adaptable():
            fused = self._one_matrix(name, active[0]) if len(active) == 1 else None
            if fused is not None:
                out[name] = fused
                continue
            delta = self.delta(name, active)
            if delta is not None:
                out[name] = self.base_value(name) + delta
        return out

    def _one_matrix(self, parameter: str, adapter: str) -> torch.Tensor | None:
        """base + alpha/r A B in one operation, for a parameter that is a single block; else None."""
        spec = next((p for p in self.spec.params if p.name == parameter), None)
        if spec is None or len(spec.pieces) != 1 or adapter not in self.lora_A:
            return None
        block = spec.pieces[0].block
        if block not in self.lora_A[adapter] or parameter.replace(".", "__") in self.lora_dense[adapter]:
            return None
        a, b, scale = self.lora_A[adapter][block], self.lora_B[adapter][block], self.scaling[adapter][block]
        base = self.base_value(parameter)
        if base.numel() != a.shape[0] * b.shape[1]:  # the piece is a part of its block
            return None
        if spec.transpose:
            return torch.addmm(base, b.T, a.T, alpha=scale)
        return torch.addmm(base.view(a.shape[0], b.shape[1]), a, b, alpha=scale).view(spec.shape)

    def _adaptable(self) -> list[str]:
        names = [p.name for p in self.spec.params]
        for updates in self.lora_dense.values():
            names += [k.replace("__", ".") for k in updates if k.replace("__", ".") not in names]
        return names

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base module with its updated parameters; arguments as for the base module."""
        if self._disable_adapters or not self.active_adapters:
            if self.merged_adapters:
                # merge() changed the base weights: the base model's own are kept aside.
                return functional_call(self.base_layer, dict(self._unmerged), args, kwargs)
            return self.base_layer(*args, **kwargs)
        parameters = self.effective_parameters()
        if not parameters:
            return self.base_layer(*args, **kwargs)
        if self.kernel is not None and not kwargs and args[0].device.type == "cpu":
            out = self.kernel(self.base_layer, parameters, *args)
            if out is not None:
                return out
        if self.spec.kind in _WEIGHT_ARGUMENT and parameters.keys() == {"weight"} and "weight" not in kwargs:
            return self.base_layer(*args, weight=parameters["weight"], **kwargs)
        return functional_call(self.base_layer, parameters, args, kwargs)

    # -- merge -------------------------------------------------------------------------------

    @torch.no_grad()
    def merge_in_place(self, adapters: Iterable[str]) -> None:
        """Add the adapters' updates to the base weights; undone exactly by :meth:`unmerge_all`."""
        names = [a for a in adapters if a in self.lora_A and a not in self.merged_adapters]
        for parameter in self._adaptable():
            delta = self.delta(parameter, names)
            if delta is None:
                continue
            base = self.base_value(parameter)
            self._unmerged.setdefault(parameter, base.detach().clone())
            base.add_(delta)
        self.merged_adapters += names

    @torch.no_grad()
    def unmerge_all(self) -> None:
        """Restore the base weights bit for bit."""
        for parameter, value in self._unmerged.items():
            self.base_value(parameter).copy_(value)
        self._unmerged.clear()
        self.merged_adapters = []

    def merged_base(self) -> nn.Module:
        """The base module with the active updates folded in; parameters trainable again."""
        self.unmerge_all()
        if not self._disable_adapters:
            self.merge_in_place(self.active_adapters)
            self._unmerged.clear()
        self.base_layer.requires_grad_(True)
        return self.base_layer
