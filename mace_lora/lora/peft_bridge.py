"""The one door to PEFT: after ``register_peft()`` PEFT's own loader reads our adapters.

PEFT writes no mapping from layer types to custom layers into its files, so it has to be
registered in each process. We register a config class that carries our ``equitune`` key and adds
the mapping when the key is there; every other LoRA config is untouched.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

try:
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.tuners.lora.layer import LoraLayer
except ImportError as err:
    raise ImportError("PEFT's own loader needs peft: pip install 'equitune[peft]'") from err
from torch import nn

from .blocks import describe
from .config import LoraConfig, reject_unsupported
from .fingerprint import fingerprint, layer_fingerprint
from .inject import apply_plan, plan_lora
from .layers import AdapterLayer
from .saving import config_json

__all__ = ["EquituneLoraConfig", "PeftAdapterLayer", "peft_config", "register_peft"]

SUPPORTED = ">=0.19,<0.22"


class PeftAdapterLayer(AdapterLayer, LoraLayer):
    """Our adapter layer with the methods that PEFT's tuner calls on its layers."""

    adapter_layer_names = AdapterLayer.adapter_layer_names
    other_param_names = AdapterLayer.other_param_names

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: EquituneLoraConfig, **kwargs: Any) -> None:
        target = kwargs["target_name"]
        spec = describe(base_layer)
        if spec is None:
            raise ValueError(f"adapter: {target} is a {type(base_layer).__name__}, which has no adaptable weights")
        AdapterLayer.__init__(self, base_layer, spec)
        self.lora_variant: dict[str, Any] = {}
        self.lora_bias: dict[str, bool] = {}
        self.update_layer(adapter_name, config=config, target_name=target)

    def update_layer(self, adapter_name: str, *_: Any, config: EquituneLoraConfig, target_name: str, **__: Any) -> None:
        """Add an adapter as its config's plan says; PEFT calls this for a second adapter too."""
        assert config.equitune is not None
        plan = config.equitune["modules"][target_name]
        got = layer_fingerprint(self.base_layer)
        if got != plan["base"]:
            raise ValueError(
                f"adapter: it was trained on another base model: weights of {target_name} have fingerprint {got}, "
                f"expected {plan['base']}; load the base named in the adapter's README.md"
            )
        own = LoraConfig.from_dict(config.equitune["config"])
        self.add_adapter(adapter_name, plan["ranks"], plan["dense"], own)
        self.scaling[adapter_name] = dict(plan["scaling"])
        self.set_adapter(self.active_adapters or [adapter_name], inference_mode=config.inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's merge: fold adapters into the base weights."""
        self.merge_in_place(self.active_adapters if adapter_names is None else adapter_names)

    def unmerge(self) -> None:
        """PEFT's unmerge; exact."""
        self.unmerge_all()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The factors are per irrep and cannot be turned into PEFT's two matrices per layer."""
        return False


@dataclass
class EquituneLoraConfig(peft.LoraConfig):
    """PEFT's LoraConfig plus the ``equitune`` key of our adapter files."""

    equitune: dict[str, Any] | None = field(default=None)

    def __post_init__(self) -> None:
        if self.equitune is not None:
            reject_unsupported({k: getattr(self, k) for k in _peft_options(self)})
        super().__post_init__()
        if self.equitune is not None:
            self._register_custom_module({nn.Module: PeftAdapterLayer})


def _peft_options(config: EquituneLoraConfig) -> list[str]:
    return [k for k in asdict(config) if k not in ("equitune", "peft_type")]


def register_peft() -> None:
    """Let PEFT's loaders (``PeftModel.from_pretrained`` …) read equitune adapters in this process."""
    PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.LORA] = EquituneLoraConfig


def peft_config(model: nn.Module, config: LoraConfig | None = None, **metadata: Any) -> EquituneLoraConfig:
    """PEFT config with which ``peft.get_peft_model(model, config)`` adds our adapter.

    Args:
        model: base model; not changed.
        config: LoRA settings.
        metadata: provenance to keep in the adapter.
    """
    import copy

    config = config or LoraConfig()
    planned = apply_plan(copy.deepcopy(model), plan_lora(model, config), config)
    content = config_json(planned, config, "default", {"base_fingerprint": fingerprint(model), **metadata})
    content.pop("peft_type")
    content["inference_mode"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return EquituneLoraConfig(**content)


def check_peft() -> list[tuple[str, str | None]]:
    """Check what we rely on in PEFT.

    Returns:
        (what, problem) pairs; problem is None where all is well.
    """
    import inspect

    from peft.tuners.lora.model import LoraModel

    results: list[tuple[str, str | None]] = []
    registers = hasattr(peft.LoraConfig, "_register_custom_module")
    results.append(("peft.LoraConfig._register_custom_module", None if registers else _changed("is missing")))
    source = tuple(inspect.signature(LoraModel._create_new_module).parameters)
    expected = ("lora_config", "adapter_name", "target")
    fits = source[:3] == expected
    results.append(("peft LoraModel._create_new_module", None if fits else _changed(f"takes {source}")))
    known = peft.PeftType.LORA in PEFT_TYPE_TO_CONFIG_MAPPING
    results.append(("peft PEFT_TYPE_TO_CONFIG_MAPPING", None if known else _changed("has no LORA entry")))
    return results


def _changed(what: str) -> str:
    return f"{what}; equitune was tested with peft {SUPPORTED}, got {peft.__version__}: install a version in that range"
