"""Put adapters into a model and take them out: apply, coverage, switch, merge, combine."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .blocks import ModuleSpec, describe
from .config import LoraConfig
from .layers import AdapterLayer

__all__ = [
    "RECORDS",
    "ModulePlan",
    "adapter_layers",
    "adapter_names",
    "apply_lora",
    "apply_plan",
    "combine_adapters",
    "delete_adapter",
    "disabled_adapters",
    "merge_adapters",
    "merge_lora",
    "plan_lora",
    "set_adapter",
    "unmerge_adapters",
]

# attribute of a model: adapter name -> settings and provenance, as plain values, of those that came from files
RECORDS = "_lora_records"


@dataclass(frozen=True)
class ModulePlan:
    """What one adapter does in one module.

    Attributes:
        name: module name in the model.
        ranks: block name -> rank.
        dense: parameters of the module trained in full.
    """

    name: str
    ranks: Mapping[str, int]
    dense: tuple[str, ...] = ()


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """All adapter layers of a model by module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AdapterLayer)}


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters in a model, in order of their first appearance."""
    seen: dict[str, None] = {}
    for layer in adapter_layers(model).values():
        seen.update(dict.fromkeys(layer.lora_A))
    return list(seen)


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, ModuleSpec]]:
    """Modules with adaptable weights, with the base module behind an existing adapter layer."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if ".base_layer" in f".{name}":
            continue
        if isinstance(module, AdapterLayer):
            yield name, module.base_layer, module.spec
            continue
        spec = describe(module, _holder(modules, name))
        if spec is None and _is_plain_leaf(module):
            spec = ModuleSpec("other")  # reached only by an explicit choice of ``dense``
        if spec is not None:
            yield name, module, spec


def _is_plain_leaf(module: nn.Module) -> bool:
    if isinstance(module, nn.ParameterList | nn.ParameterDict):
        return False
    return not any(True for _ in module.children()) and any(True for _ in module.parameters())


def _holder(modules: Mapping[str, nn.Module], name: str) -> nn.Module | None:
    """Nearest ancestor that is not a plain container: it may know a child's irreps."""
    while name:
        name = name.rpartition(".")[0]
        parent = modules.get(name)
        if parent is not None and not isinstance(parent, nn.ModuleList | nn.Sequential):
            return parent
    return None


def plan_lora(model: nn.Module, config: LoraConfig) -> list[ModulePlan]:
    """Choose blocks, ranks and dense parameters for a model without changing it.

    Raises:
        ValueError: nothing matches, or the rank pattern names an irrep that the model lacks.
    """
    plans, irreps, names = [], set[str](), []
    for name, module, spec in candidates(model):
        if spec.blocks or spec.dense:
            names.append(name)
        irreps.update(b.irrep for b in spec.blocks)
        dense = _plan_dense(name, module, spec, config)
        ranks: dict[str, int] = {}
        if config.module_selected(name) and config.kind_selected(spec.kind):
            full = {t.block for p in spec.params if p.name in dense for t in p.pieces}
            for block in spec.blocks:
                rank = config.rank_of(name, block.irrep, block.m, block.n)
                if rank and block.name not in full:
                    ranks[block.name] = rank
        if ranks or dense:
            plans.append(ModulePlan(name, ranks, dense))
    _check_plan(plans, config, irreps, names)
    return plans


def _plan_dense(name: str, module: nn.Module, spec: ModuleSpec, config: LoraConfig) -> tuple[str, ...]:
    """Parameters of one module that are trained in full."""
    return tuple(
        p
        for p, value in module.named_parameters()
        if (p in spec.dense or "." not in p)
        and value.numel()
        and config.dense_selected(f"{name}.{p}", p in spec.dense and config.module_selected(name))
    )


def _check_plan(plans: Sequence[ModulePlan], config: LoraConfig, irreps: set[str], names: list[str]) -> None:
    unknown = sorted(set(config.rank_pattern) - irreps)
    if unknown:
        raise ValueError(
            f"rank_pattern: the model has no weights of irrep {', '.join(unknown)}; "
            f"expected irreps among {', '.join(sorted(irreps)) or 'none'}"
        )
    for option in ("targets", "exclude", "module_rank_pattern"):
        for pattern in getattr(config, option) or ():
            if not any(re.search(pattern, name) for name in names):
                shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
                raise ValueError(f"{option}: no layer matches {pattern!r}; adaptable layers are {shown or 'none'}")
    for pattern in config.dense or ():
        if not any(re.search(pattern, f"{p.name}.{d}") for p in plans for d in p.dense):
            raise ValueError(f"dense: no parameter matches {pattern!r}")
    if not any(p.ranks for p in plans):
        shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        raise ValueError(
            f"targets: no layer matches targets={config.targets} exclude={config.exclude} "
            f"rank_pattern={dict(config.rank_pattern)} preset={config.preset}"
            + (f" beside what dense={config.dense} trains in full" if config.dense else "")
            + f"; adaptable layers are {shown or 'none'}"
        )


def apply_lora(model: nn.Module, config: LoraConfig | None = None, adapter_name: str = "default") -> nn.Module:
    """Add a LoRA adapter to a model in place and freeze everything else.

    Args:
        model: MACE model or any module made of e3nn and dense linear layers.
        config: settings; default the published recipe (rank = alpha = 16).
        adapter_name: name of the new adapter; it becomes the active one.

    Returns:
        the same model.

    Raises:
        ValueError: the name is taken, nothing matches, or a rank pattern does not fit the model.
    """
    config = config or LoraConfig()
    return apply_plan(model, plan_lora(model, config), config, adapter_name)


def apply_plan(
    model: nn.Module, plans: Sequence[ModulePlan], config: LoraConfig, adapter_name: str = "default"
) -> nn.Module:
    """Add an adapter as planned; see :func:`apply_lora`."""
    if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict, adapter_name):
        raise ValueError(
            f"adapter_name: expected a name without dots that torch does not use itself, got {adapter_name!r}"
        )
    if adapter_name in adapter_names(model):
        raise ValueError(f"adapter_name: the model already has an adapter {adapter_name!r}; choose another name")
    specs = {name: spec for name, _, spec in candidates(model)}
    model.requires_grad_(False)
    for plan in plans:
        layer = model.get_submodule(plan.name)
        if not isinstance(layer, AdapterLayer):
            layer = AdapterLayer(layer, specs[plan.name])
            parent, _, child = plan.name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
        layer.add_adapter(adapter_name, plan.ranks, plan.dense, config)
        layer.train(model.training)
    set_adapter(model, adapter_name)
    return model


def set_adapter(model: nn.Module, names: str | Sequence[str]) -> nn.Module:
    """Switch to these adapters: only they act and only they train.

    Raises:
        ValueError: an unknown name.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    known = adapter_names(model)
    for name in wanted:
        if name not in known:
            raise ValueError(f"adapter {name!r} is not in the model; expected one of {', '.join(known) or 'none'}")
    for layer in adapter_layers(model).values():
        layer.unmerge_all()  # a merged adapter would act beside the chosen ones
        layer.activate([n for n in wanted if n in layer.lora_A])
    return model


@contextlib.contextmanager
def disabled_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the ``with`` block the model is its base."""
    layers = adapter_layers(model).values()
    before = [layer.disable_adapters for layer in layers]
    for layer in layers:
        layer.set_disabled(True)
    try:
        yield model
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer.set_disabled(state)


def delete_adapter(model: nn.Module, name: str) -> nn.Module:
    """Remove one adapter from the model in place."""
    if name not in adapter_names(model):
        raise ValueError(f"adapter {name!r} is not in the model; expected one of {', '.join(adapter_names(model))}")
    for layer in adapter_layers(model).values():
        layer.remove_adapter(name)
    getattr(model, RECORDS, {}).pop(name, None)
    return model


def merge_adapters(model: nn.Module, names: str | Sequence[str]) -> nn.Module:
    """Fold adapters into the base weights, keeping the adapter layers so that it can be undone."""
    wanted = [names] if isinstance(names, str) else list(names)
    known = adapter_names(model)
    for name in wanted:
        if name not in known:
            raise ValueError(f"adapter {name!r} is not in the model; expected one of {', '.join(known) or 'none'}")
    set_adapter(model, wanted)
    for layer in adapter_layers(model).values():
        layer.merge_in_place(wanted)
    return model


def unmerge_adapters(model: nn.Module) -> nn.Module:
    """Undo :func:`merge_adapters` exactly."""
    for layer in adapter_layers(model).values():
        layer.unmerge_all()
    return model


def merge_lora(model: nn.Module) -> nn.Module:
    """Fold the active adapters into the weights and put the stock modules back, in place.

    Returns:
        the same model, made of upstream's own classes only, all parameters trainable.
    """
    for name, layer in adapter_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.merged_base())
    model.requires_grad_(True)
    model.__dict__.pop(RECORDS, None)
    return model


def combine_adapters(model: nn.Module, weights: Mapping[str, float], name: str) -> nn.Module:
    """Add an adapter whose update is the weighted sum of others', exactly.

    The factors are stacked along the rank, so the new rank is the sum of the ranks.

    Args:
        model: model with the named adapters.
        weights: adapter name -> coefficient of its update.
        name: name of the combination; it becomes the active adapter. Saved, it keeps the provenance that all of
            those loaded from files share.
    """
    known = adapter_names(model)
    missing = [n for n in weights if n not in known]
    if missing or not weights:
        raise ValueError(f"weights: adapters {missing or '(none)'} are not in the model; expected among {known}")
    if name in known:
        raise ValueError(f"name: the model already has an adapter {name!r}; choose another name")
    unit = LoraConfig(rank=1, alpha=1.0)
    for layer in adapter_layers(model).values():
        parts = [(n, w) for n, w in weights.items() if n in layer.lora_A]
        blocks = dict.fromkeys(b for n, _ in parts for b in layer.lora_A[n])
        ranks = {b: sum(layer.r[n].get(b, 0) for n, _ in parts) for b in blocks}
        dense = dict.fromkeys(k.replace("__", ".") for n, _ in parts for k in layer.lora_dense[n])
        layer.add_adapter(name, ranks, dense, unit)
        layer.scaling[name] = dict.fromkeys(ranks, 1.0)
        with torch.no_grad():
            for b in blocks:
                have = [(n, w) for n, w in parts if b in layer.lora_A[n]]
                layer.lora_A[name][b].copy_(torch.cat([layer.lora_A[n][b] for n, _ in have], 1))
                layer.lora_B[name][b].copy_(
                    torch.cat([w * layer.scaling[n][b] * layer.lora_B[n][b] for n, w in have], 0)
                )
            for key, update in layer.lora_dense[name].items():
                for n, w in parts:
                    if key in layer.lora_dense[n]:
                        update.add_(w * layer.lora_dense[n][key])
    _combine_records(model, weights, name)
    return set_adapter(model, name)


def _combine_records(model: nn.Module, weights: Mapping[str, float], name: str) -> None:
    """What is known of the adapters alike; their sum was not trained, so that it has no errors and no settings."""
    records = getattr(model, RECORDS, {})
    if all(n in records for n in weights):
        first, *others = (records[n]["metadata"] for n in weights)
        same = {k: v for k, v in first.items() if all(o.get(k) == v for o in others)}
        records[name] = {"config": None, "metadata": same | {"combined": dict(weights)}}
