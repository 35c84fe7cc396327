"""What each stage of a run in NequIP was made of, so that nothing else is continued as it."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mace_lora.atomic import content_digest, write_text

__all__ = [
    "FILES", "SCHEDULE", "check_classical_data", "check_start", "data_files", "fingerprint", "finished", "quantum_data",
]  # fmt: skip

# keys of the schedule: what carries them out, under which argument, and what leaves it off
SCHEDULE = {"lr_decay": ("LayerwiseRates", "decay", 1.0), "unfreeze": ("GradualUnfreezing", "every", None)}
FILES = ("file_path", "train_file_path", "val_file_path", "test_file_path")
_ELSEWHERE = ("folder", "autotune", "run", "hydra", "frames")  # of no consequence for stage one, or hashed
_REPORTS = tuple(
    f"trainer.{k}" for k in ("accelerator", "devices", "logger", "log_every_n_steps", "enable_progress_bar")
)


def data_files(config: dict[str, Any], keys: Sequence[str]) -> list[str]:
    """Files of the config's data under these keys, as far as they can be told without running it."""
    data = config.get("data") or {}
    parts = data.get("split_dataset") or {}
    places = [data, *(parts if isinstance(parts, list) else [parts])]
    found = [p[key] for p in places for key in keys if p.get(key)]
    return [str(q) for p in found for q in (p if isinstance(p, list) else [p]) if "${" not in str(q)]


def check_classical_data(one: dict[str, Any], frames: Path) -> None:
    """Stage one must read the classical file, which it gets as ``frames``.

    Raises:
        ValueError: its composed config reads something else.
    """
    other = [p for p in data_files(one, FILES[:3]) if Path(p).resolve() != frames.resolve()]
    if other:
        raise ValueError(
            f"data: the classical stage would read {other[0]}; expected split_dataset with file_path: ${{frames}}, and "
            "the quantum file under 'frames', as in recipes/configs/nequip_autotune.yaml"
        )


def quantum_data(config: dict[str, Any]) -> str:
    """Which frames stage two learns from: content of the files, split and labels; sha256."""
    data = config.get("data") or {}

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return content_digest(value) if isinstance(value, str) and Path(value).is_file() else value

    kept = {k: plain(data.get(k)) for k in ("split_dataset", "seed", "key_mapping", "ase_args", *FILES)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def fingerprint(config: dict[str, Any], classical: Path) -> dict[str, str]:
    """What stage one depends on: its whole config, and the content of the classical file."""
    flat: dict[str, str] = {"autotune.frames": content_digest(classical)}
    config = copy.deepcopy(config)
    (config.get("training_module", {}).get("model") or {}).pop("keep", None)  # both are of stage two
    for callback in config.get("trainer", {}).get("callbacks") or []:
        if str(callback.get("_target_", "")).endswith("AlignEnergies"):
            callback.pop("rescale", None)

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            flat[prefix] = json.dumps(value)

    add("", {k: v for k, v in config.items() if k not in _ELSEWHERE})
    return {k: v for k, v in flat.items() if not k.endswith("file_path") and not k.startswith(_REPORTS)}


def finished(first: Path, wanted: dict[str, str]) -> bool:
    """Whether stage one is there.

    Raises:
        ValueError: what is there was made with other data or settings, or nobody knows with which.
    """
    marker = first / "stage_one.json"
    left = [p for p in (first / "best.ckpt", first / "last.ckpt") if p.is_file()]
    if not left:
        return False
    content = json.loads(marker.read_text()) if marker.is_file() else {}
    if "settings" not in content:
        raise ValueError(
            f"{first}: checkpoints are left of a stage whose settings are unknown; give another folder, or remove it"
        )
    saved = {"autotune.offsets": "element"} | content["settings"]  # an earlier version had no choice
    changed = [
        f"{k}: {saved.get(k, 'none')} before, {wanted.get(k, 'none')} now"
        for k in sorted({*saved, *wanted}) if saved.get(k) != wanted.get(k)
    ]  # fmt: skip
    if changed:
        raise ValueError(
            f"{first}: its stage was made with other settings ({'; '.join(changed)}); give those, give another folder, "
            "or remove it"
        )
    return bool(content["finished"]) and (first / "best.ckpt").is_file()


def check_start(out: Path, checkpoint: Path, schedule: dict[str, Any], data: str) -> None:
    """Stage two goes on from its own classical stage, with its own data and schedule only; new ones are noted.

    Raises:
        ValueError: its last checkpoint started from other weights, saw other data, or had another schedule.
    """
    marker, digest = out / "stage_two.json", content_digest(checkpoint)
    saved = json.loads(marker.read_text()) if marker.is_file() else {}
    if (out / "last.ckpt").is_file():
        if saved.get("classical") != digest:
            raise ValueError(
                f"{out / 'last.ckpt'}: it did not start from {checkpoint} as it is now; remove last.ckpt and best.ckpt "
                f"of {out} to start stage two anew, or give another folder"
            )
        if saved.get("data", data) != data:  # an earlier version did not note them
            raise ValueError(
                f"data: {out / 'last.ckpt'}, which is continued, was trained on other frames, another split or other "
                "labels; give those again, or another folder"
            )
        for key, value in schedule.items():
            if (before := saved.get(key, SCHEDULE[key][-1])) != value:
                raise ValueError(
                    f"autotune.{key}: expected {before} as in {out / 'last.ckpt'}, which is continued, got {value}; "
                    "give it again, or another folder"
                )
    write_text(marker, json.dumps({"classical": digest, "data": data, **schedule}) + "\n")
