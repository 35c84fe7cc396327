"""LoRA settings, presets and their validation."""

# no postponed annotations: dataclasses could not resolve them in a module inside a NequIP package
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

__all__ = ["INITS", "PRESETS", "LoraConfig", "parse_rank_pattern"]

PRESETS = ("degree_parity", "upstream")
INITS = ("scaled", "elora")
_KINDS = {
    "degree_parity": None,  # every kind we can describe
    "upstream": ("o3.Linear", "nn.Linear", "e3nn MLP"),  # what MACE's own --lora adapts
}
_IRREP = re.compile(r"\d+[eo]")
# PEFT options that PEFT itself ignores for custom layers.
_NOT_HONOURED = {
    "use_dora": False,
    "lora_dropout": 0.0,
    "lora_bias": False,
    "bias": "none",
    "fan_in_fan_out": False,
    "layer_replication": None,
    "megatron_config": None,
    "trainable_token_indices": None,
    "modules_to_save": None,
    "target_parameters": None,
}


@dataclass(frozen=True)
class LoraConfig:
    """Degree-parity-independent LoRA: W_lp <- W_lp + (alpha/r) A_lp B_lp for every irrep (l, p).

    Args:
        rank: rank r of every block, at least 1.
        alpha: numerator of the scaling alpha/r.
        preset: ``"degree_parity"`` adapts every equivariant weight and trains the lower-order
            contraction weights and the Bessel frequencies in full (ELoRA, ICML 2025);
            ``"upstream"`` adapts the layers that MACE's own LoRA adapts, nothing in full.
        use_rslora: scale by alpha/sqrt(r) instead of alpha/r (arXiv 2312.03732).
        rank_pattern: rank per irrep, e.g. ``{"0e": 16, "1o": 8}``; 0 leaves an irrep out.
        module_rank_pattern: rank per module, regular expression (searched) to rank.
        targets: regular expressions (searched in the module name); None adapts all.
        exclude: regular expressions of modules to leave out.
        dense: regular expressions of parameter names to train in full; None takes the preset's
            choice, an empty tuple trains none.
        init: ``"scaled"`` draws A ~ N(0, 0.1/r), so that a step of B changes W by a third of the
            learning rate at every rank and A has room to turn (measured: README); ``"elora"`` draws
            A ~ N(0, 1) as published. For contractions A is 1/n_paths times that; B starts at zero.
        clip_rank: lower r to min(m, n) where it is larger; off because the published parameter
            counts do not clip.

    Raises:
        ValueError: a value out of range; the message names the argument, what was expected and
            what was got.
    """

    rank: int = 16
    alpha: float = 16.0
    preset: str = "degree_parity"
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    module_rank_pattern: Mapping[str, int] = field(default_factory=dict)
    targets: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    dense: tuple[str, ...] | None = None
    init: str = "scaled"
    clip_rank: bool = False

    def __post_init__(self) -> None:
        _check_rank("rank", self.rank, least=1)
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if not (number and math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha: expected a positive number, got {self.alpha!r}")
        _check_choice("preset", self.preset, PRESETS)
        _check_choice("init", self.init, INITS)
        for name in ("use_rslora", "clip_rank"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected true or false, got {getattr(self, name)!r}")
        for name in ("rank_pattern", "module_rank_pattern"):
            value = getattr(self, name)
            if not (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
                raise ValueError(f"{name}: expected a mapping of names to ranks, got {value!r}")
        for irrep, rank in self.rank_pattern.items():
            if not _IRREP.fullmatch(irrep):
                raise ValueError(f"rank_pattern: expected irreps such as '0e' or '1o', got {irrep!r}")
            _check_rank(f"rank_pattern[{irrep!r}]", rank, least=0)
        for pattern, rank in self.module_rank_pattern.items():
            _check_regex("module_rank_pattern", pattern)
            _check_rank(f"module_rank_pattern[{pattern!r}]", rank, least=0)
        for name in ("targets", "exclude", "dense"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(f"{name}: expected a sequence of regular expressions, got the string {value!r}")
            if value is not None:
                object.__setattr__(self, name, tuple(value))
            for pattern in value or ():
                _check_regex(name, pattern)

    def kind_selected(self, kind: str) -> bool:
        """Whether the preset adapts layers of this kind."""
        kinds = _KINDS[self.preset]
        return kinds is None or kind in kinds

    def module_selected(self, name: str) -> bool:
        """Whether ``targets`` and ``exclude`` let the adapter into this module."""
        if any(re.search(p, name) for p in self.exclude):
            return False
        return self.targets is None or any(re.search(p, name) for p in self.targets)

    def rank_of(self, module: str, irrep: str, m: int, n: int) -> int:
        """Rank of one block: per-module pattern first, then per-irrep, then ``rank``."""
        rank = next((r for p, r in self.module_rank_pattern.items() if re.search(p, module)), None)
        if rank is None:
            rank = self.rank_pattern.get(irrep, self.rank)
        return min(rank, m, n) if self.clip_rank else rank

    def scaling_of(self, rank: int) -> float:
        """alpha/r, or alpha/sqrt(r) with rsLoRA."""
        return self.alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def dense_selected(self, parameter: str, in_preset: bool) -> bool:
        """Whether a parameter is trained in full."""
        if self.dense is None:
            return in_preset and self.preset == "degree_parity"
        return any(re.search(p, parameter) for p in self.dense)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        out = asdict(self)
        out["rank_pattern"] = dict(self.rank_pattern)
        out["module_rank_pattern"] = dict(self.module_rank_pattern)
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LoraConfig":
        """Inverse of :meth:`to_dict`; an unknown key is an error.

        Raises:
            ValueError: unknown key, or an option that PEFT has and that these layers cannot honour
                (DoRA, PiSSA, dropout, …).
        """
        known = {f.name for f in fields(cls)}
        for key, value in values.items():
            if key in known:
                continue
            if key in _NOT_HONOURED or key in ("init_lora_weights", "loftq_config", "eva_config"):
                reject_unsupported({key: value})
            raise ValueError(f"LoraConfig: unknown key {key!r}; expected one of {', '.join(sorted(known))}")
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**arguments)


def reject_unsupported(options: Mapping[str, Any]) -> None:
    """Raise for PEFT options that the irrep-wise layers cannot honour; PEFT would ignore them.

    Args:
        options: PEFT ``LoraConfig`` fields.
    """
    for key, neutral in _NOT_HONOURED.items():
        value = options.get(key, neutral)
        if value not in (neutral, None, [], {}):
            raise ValueError(
                f"{key}: equivariant LoRA layers cannot honour {key}={value!r}; leave it at {neutral!r}. "
                "DoRA, dropout on features, biases and parameter targets would break equivariance or be ignored."
            )
    init = options.get("init_lora_weights", True)
    if init not in (True, False, None):
        raise ValueError(
            f"init_lora_weights: equivariant LoRA layers cannot honour {init!r} (PiSSA, OLoRA, LoftQ, EVA, CorDA, …); "
            f"choose init from {', '.join(INITS)} instead."
        )


def parse_rank_pattern(text: str) -> dict[str, int]:
    """Parse ``"0e:16,1o:8"`` into ``{"0e": 16, "1o": 8}``.

    Raises:
        ValueError: an entry that is not ``irrep:rank``.
    """
    out: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        irrep, sep, rank = part.partition(":")
        if not sep or not _IRREP.fullmatch(irrep.strip()) or not rank.strip().isdigit():
            raise ValueError(f"rank_pattern: expected 'irrep:rank' pairs such as '0e:16,1o:8', got {part!r}")
        if irrep.strip() in out:
            raise ValueError(f"rank_pattern: irrep {irrep.strip()!r} is given twice in {text!r}")
        out[irrep.strip()] = int(rank)
    return out


def _check_rank(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _check_regex(name: str, pattern: str) -> None:
    if not isinstance(pattern, str):
        raise ValueError(f"{name}: expected regular expressions, got {pattern!r}")
    try:
        re.compile(pattern)
    except re.error as err:
        raise ValueError(f"{name}: {pattern!r} is not a regular expression ({err})") from err
