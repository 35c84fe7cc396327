"""Model card of an adapter, in the form that model hubs read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["model_card"]

# hubs refuse a base_model that is no name of theirs, such as a path
_HUB_NAME = re.compile(r"[\w-][\w.-]*/(?!.*\.(model|pt|ckpt|zip|safetensors|json)$)[\w.-]+")


def model_card(content: Mapping[str, Any], run: Mapping[str, str], parameters: int) -> str:
    """README.md of an adapter folder.

    Args:
        content: ``adapter_config.json`` as a dictionary.
        run: header of the weights file: epoch, validation errors.
        parameters: number of values in the adapter.
    """
    own = content["equitune"]
    meta, config = own["metadata"], own["config"]
    base = str(meta.get("base_model", "unknown"))
    lines = [
        "---",
        "library_name: peft",
        *([f"base_model: {base}"] if _HUB_NAME.fullmatch(base) else []),
        f"tags: [lora, {meta.get('framework', 'mace')}, interatomic-potential, equitune]",
        "---",
        "",
        "# LoRA adapter for an equivariant interatomic potential",
        "",
        "| | |",
        "|---|---|",
        f"| base model | {Path(base).name} |",
        f"| preset | {config['preset']} |",
        f"| rank, alpha | {config['rank']}, {config['alpha']:g} |",
        f"| parameters | {parameters:,} |",
        f"| adapted modules | {len(own['modules'])} |",
    ]
    for key in (
        "base_fingerprint", "foundation_fingerprint", "elements", "type_names", "r_max", "E0s", "energy_shifts",
        "long_path", "units", "level_of_theory", "heads", "e3nn_convention", "versions", "command", "data",
    ):  # fmt: skip
        if key in meta:
            lines.append(f"| {key.replace('_', ' ')} | `{meta[key]}` |")
    lines += [f"| {k.replace('_', ' ')} | {v} |" for k, v in run.items() if k != "format"]
    lines += ["", *_usage(meta), ""]
    return "\n".join(lines)


def _usage(metadata: Mapping[str, Any]) -> list[str]:
    """Code that puts the adapter on its base."""
    if metadata.get("framework") == "nequip":
        return [
            "```yaml",
            "model:                                   # in the config of nequip-train, or nequip-package",
            "  _target_: nequip_ext.LoRA",
            "  model: {_target_: nequip.model.ModelFromCheckpoint, checkpoint_path: base.ckpt}",
            "  adapter: path/to/this/folder",
            "```",
            "",
            "Or `equitune merge base.ckpt path/to/this/folder merged.nequip.zip`.",
        ]
    return [
        "```python",
        "from mace_lora import load_adapter, merge_lora",
        "model = load_adapter(base_model, 'path/to/this/folder')   # base_model: see the fingerprint above",
        "model = merge_lora(model)                                 # optional: stock MACE modules again",
        "```",
    ]
