"""MACE base models: rebuild one for an adapter, save and load one without a pickle."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .convention import check_convention, sign_dependent_paths, wigner_3j_sign

__all__ = [
    "describe_base",
    "elements",
    "embedded_base",
    "load_base",
    "load_model",
    "prepare_base",
    "save_base",
    "select_head",
]

_BESSEL = "radial_embedding.bessel_fn.bessel_weights"
EMBEDDED = Path(__file__).parents[1] / "embedded" / "organic_small"


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def elements(model: nn.Module) -> list[int]:
    """Atomic numbers of a MACE model, ascending."""
    return [int(z) for z in model.atomic_numbers]  # type: ignore[union-attr, arg-type]


def describe_base(model: nn.Module) -> dict[str, Any]:
    """What identifies a base beyond its weights: elements, r_max (Å), E0s (eV), heads, versions."""
    heads = list(getattr(model, "heads", ["Default"]))
    energies = torch.atleast_2d(model.atomic_energies_fn.atomic_energies)  # type: ignore[union-attr, arg-type]
    rows = {
        head: {str(z): float(e) for z, e in zip(elements(model), row, strict=True)}
        for head, row in zip(heads, energies.tolist(), strict=True)
    }
    return {
        "elements": elements(model),
        "r_max": float(model.r_max),  # type: ignore[arg-type]
        "E0s": rows,
        "heads": heads,
        "units": {"energy": "eV", "length": "Angstrom"},
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "e3nn_convention": _version("e3nn"),
        "versions": {name: _version(name) for name in ("equitune", "mace-torch", "e3nn", "torch")},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def prepare_base(foundation: nn.Module, metadata: Mapping[str, Any]) -> nn.Module:
    """Repeat what ``mace_run_train`` does with a foundation model before it trains.

    Args:
        foundation: the foundation model; not changed.
        metadata: elements, heads, E0s (eV) and dtype as :func:`describe_base` gives them; ``multiscale``: of the new
            long path beside it, as ``--model=MultiScaleMACE`` made it.

    Returns:
        a new model with the chosen elements, heads and energy references.
    """
    from mace import modules
    from mace.tools.finetuning_utils import load_foundations_elements
    from mace.tools.scripts_utils import extract_config_mace_model
    from mace.tools.utils import AtomicNumberTable

    if hasattr(foundation, "r_short"):  # a multiscale model: prepare its short path, take the long one over
        from mace_lora.multiscale.rebuild import attach_long, stock_paths

        short = prepare_base(stock_paths(foundation)[0], metadata)
        return attach_long(short, foundation, [int(z) for z in metadata["elements"]])
    dtype = getattr(torch, metadata.get("dtype", "float32"))
    zs, heads = [int(z) for z in metadata["elements"]], list(metadata["heads"])
    energies = [[float(metadata["E0s"][h][str(z)]) for z in zs] for h in heads]
    with _default_dtype(dtype):
        config = extract_config_mace_model(foundation)
        config |= {
            "atomic_energies": torch.tensor(energies).numpy(),
            "atomic_numbers": zs,
            "num_elements": len(zs),
            "heads": heads,
            "atomic_inter_scale": [1.0] * len(heads),
            "atomic_inter_shift": [0.0] * len(heads),
        }
        model = modules.ScaleShiftMACE(**config)
        with torch.no_grad():
            model = load_foundations_elements(
                model, foundation, AtomicNumberTable(zs), load_readout=True,
                max_L=config["hidden_irreps"].lmax, default_dtype=dtype,
            )  # fmt: skip
            buffer = model.atomic_energies_fn.atomic_energies
            buffer.copy_(torch.tensor(energies, dtype=buffer.dtype).reshape(buffer.shape))
    prepared: nn.Module = model
    if "multiscale" in metadata:
        from mace_lora.multiscale.build import LongPath, to_multiscale

        recipe = {k: v for k, v in metadata["multiscale"].items() if k != "fingerprint"}
        return to_multiscale(prepared, sizes=LongPath(**recipe.pop("sizes")), **recipe)  # type: ignore[arg-type]
    return prepared


def select_head(model: nn.Module, head: str | None) -> nn.Module | None:
    """The single-head model that ``mace_run_train --foundation_head`` starts from.

    Args:
        model: a MACE model; not changed.
        head: head to keep; None takes the first that is not the replay head, as upstream does.

    Returns:
        a new model with that head, or None when the model has one head only or lacks the head.
    """
    heads = list(getattr(model, "heads", []))
    if len(heads) < 2 or (head is not None and head not in heads):
        return None
    from mace.tools.scripts_utils import remove_pt_head

    with _default_dtype(next(model.parameters()).dtype):
        selected: nn.Module = remove_pt_head(model, head)
    return selected


def save_base(model: nn.Module, stem: str | os.PathLike[str], card: Mapping[str, Any] | None = None) -> None:
    """Write ``<stem>.safetensors`` and ``<stem>.json``, from which :func:`load_base` rebuilds.

    Args:
        model: a MACE model of stock classes.
        stem: path without extension.
        card: what to record beside the architecture.
    """
    from mace.tools.scripts_utils import extract_config_mace_model
    from safetensors.torch import save_file

    from mace_lora.atomic import atomic_path, write_text

    if type(model).__name__ != "ScaleShiftMACE":
        raise ValueError(f"save_base: expected a ScaleShiftMACE, got a {type(model).__name__}")
    config = {k: _to_json(k, v) for k, v in extract_config_mace_model(model).items()}
    convention = {"wigner_3j_sign": wigner_3j_sign(), "sign_dependent_paths": sign_dependent_paths(model)}
    state = {k: v.detach().cpu().clone().contiguous() for k, v in model.state_dict().items()}
    with atomic_path(f"{os.fspath(stem)}.safetensors") as temporary:
        save_file(state, temporary)
    write_text(
        f"{os.fspath(stem)}.json", json.dumps({"config": config, "e3nn": convention, **(card or {})}, indent=1) + "\n"
    )


def load_base(stem: str | os.PathLike[str], dtype: torch.dtype | None = None) -> nn.Module:
    """Rebuild a MACE model from ``<stem>.json`` and ``<stem>.safetensors``; nothing is unpickled.

    Args:
        stem: path without extension.
        dtype: type of the weights; default the torch default.
    """
    import mace  # noqa: F401  before e3nn: it sets the environment that e3nn 0.4.4 needs
    from mace import modules
    from safetensors.torch import load_file

    with _readable(stem):
        content = json.loads(Path(f"{os.fspath(stem)}.json").read_text(encoding="utf-8"))
        state = load_file(f"{os.fspath(stem)}.safetensors")
    if not isinstance(content, dict) or "config" not in content:
        raise ValueError(f"{os.fspath(stem)}.json: expected a base of equitune convert-model, got no key 'config'")
    check_convention(content.get("e3nn", {}), os.fspath(stem))
    with _default_dtype(dtype or torch.get_default_dtype()):
        model = modules.ScaleShiftMACE(**{k: _from_json(k, v) for k, v in content["config"].items()})
        fixed = any(n == _BESSEL for n, _ in model.named_buffers())
        if fixed and content.get("trainable_bessel", True):
            # upstream turns the frequencies into a parameter when it loads a foundation model
            basis = model.radial_embedding.bessel_fn
            basis.bessel_weights = nn.Parameter(basis.bessel_weights)
        # models saved by older versions lack these marks; the constructor sets them
        state |= {k: v for k, v in model.state_dict().items() if k.endswith("_zeroed") and k not in state}
        try:
            model.load_state_dict(state, strict=True)
        except RuntimeError as err:
            last = str(err).splitlines()[-1].strip()
            raise ValueError(
                f"{os.fspath(stem)}.json and .safetensors do not belong together ({last}); convert the model again"
            ) from err
    loaded: nn.Module = model
    return loaded


def load_model(source: str | os.PathLike[str], dtype: torch.dtype | None = None) -> nn.Module:
    """Load a MACE model from whatever the user names.

    Args:
        source: ``"embedded"``; a base of :func:`save_base` (``X``, ``X.json`` or ``X.safetensors``);
            or a ``.model`` file, which is MACE's own pickle: only from sources you trust.
        dtype: convert the weights; default as stored (the torch default for the embedded base).

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not a model.
    """
    import mace  # noqa: F401  before e3nn

    path = Path(source)
    if str(source) == "embedded" and not path.exists():
        return embedded_base(dtype)
    stem = path.with_suffix("") if path.suffix in (".json", ".safetensors") else path
    if Path(f"{stem}.json").is_file() and Path(f"{stem}.safetensors").is_file():
        return load_base(stem, dtype or _stored_dtype(stem))
    if not path.is_file():
        raise FileNotFoundError(f"no model {source}: expected a .model file, a safetensors + JSON pair, or 'embedded'")
    try:
        model = torch.load(path, map_location="cpu", weights_only=False)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, AttributeError, ImportError) as err:
        raise ValueError(f"{source} cannot be read as a MACE model ({type(err).__name__}: {err})") from err
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"{source} is compiled for TorchScript, which holds no layers to read; give the .model file beside it"
        )
    if not isinstance(model, nn.Module) or not hasattr(model, "atomic_numbers"):
        raise ValueError(f"{source} holds a {type(model).__name__}; expected a MACE model (a .model file)")
    return model if dtype is None else model.to(dtype)


@contextmanager
def _readable(stem: str | os.PathLike[str]) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as err:
        raise ValueError(f"{os.fspath(stem)}.json or .safetensors is damaged ({err}); convert the model again") from err


def _stored_dtype(stem: Path) -> torch.dtype:
    from safetensors import safe_open

    with _readable(stem), safe_open(f"{stem}.safetensors", framework="pt") as handle:
        tensors = (handle.get_tensor(key) for key in handle.keys())  # noqa: SIM118
        return next(t.dtype for t in tensors if t.is_floating_point())


# Upstream's own JSON form of a config forgets the gate and most block classes.
_CLASSES = ("interaction_cls", "interaction_cls_first", "readout_cls")
_IRREPS = ("hidden_irreps", "MLP_irreps", "edge_irreps")


def _to_json(key: str, value: Any) -> Any:
    if key in _CLASSES:
        return value.__name__
    if key == "gate":
        return None if value is None else value.__name__
    if key in _IRREPS:
        return None if value is None else str(value)
    if isinstance(value, np.ndarray | torch.Tensor):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str | list | dict):
        return value
    raise ValueError(f"save_base: cannot store {key} = {value!r} of type {type(value).__name__} without a pickle")


def _from_json(key: str, value: Any) -> Any:
    from e3nn import o3
    from mace import modules
    from mace.modules import blocks

    if key in _CLASSES:
        return getattr(blocks, value)
    if key == "gate":
        return next((g for g in modules.gate_dict.values() if g is not None and g.__name__ == value), None)
    if key in _IRREPS:
        return None if value is None else o3.Irreps(value)
    if key == "atomic_energies":
        return np.array(value)
    return value


def embedded_base(dtype: torch.dtype | None = None) -> nn.Module:
    """The small organic base (H, C, N, O, F, S; GFN2-xTB) that comes with the package."""
    return load_base(EMBEDDED, dtype)
