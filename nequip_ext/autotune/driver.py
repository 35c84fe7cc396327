"""Both stages of classical-to-quantum transfer by ``nequip-train``, from one YAML."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ase.io
import yaml

from mace_lora.atomic import only_writer, write_text

__all__ = ["normalisation", "run"]

_KEYS = {"frames", "val", "epochs", "lr", "checkpoint"}


def run(folder: Path, name: str, overrides: Sequence[str] = (), say: Callable[[str], None] = print) -> Path:
    """Train on the classical frames of the config's ``autotune`` key, then on its own data with those weights.

    Stage one is kept in ``FOLDER/classical`` and left alone once it is finished; each stage continues where it was
    stopped.

    Args:
        folder: of the config, as for ``nequip-train -cd``.
        name: of the config, without ``.yaml``.
        overrides: Hydra overrides for both stages.
        say: gets a line for every step.

    Returns:
        the checkpoint of stage two.

    Raises:
        FileNotFoundError: no such config or classical file.
        ValueError: the config has no or wrong ``autotune`` keys, a stage fails, or another run
            trains there now.
    """
    file = folder / f"{name}.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    config = yaml.safe_load(file.read_text())
    settings = _settings(config, file, overrides)
    out = Path(_value("folder", config, overrides)).resolve()
    first = out / "classical"
    wanted = settings | {"overrides": [o for o in overrides if not o.startswith(("folder=", "epochs=", "lr="))]}
    marker = first / "stage_one.json"
    if marker.is_file() and (first / "best.ckpt").is_file():
        if json.loads(marker.read_text()) != wanted:
            raise ValueError(f"{first}: its stage was made with other settings; give another folder, or remove it")
        say(f"stage one is there: {first / 'best.ckpt'}")
    else:
        say(f"stage one: training on {settings['frames']}")
        split = {"train": settings["train"], "val": settings["val"], "test": 1}  # upstream wants a test frame
        _train(folder, name, first, [
            *overrides, f"frames={settings['frames']}", f"epochs={settings['epochs']}", f"lr={settings['lr']}",
            *(f"data.split_dataset.{part}={count}" for part, count in split.items()), "run=[train]",
            "autotune.checkpoint=null",
        ])  # fmt: skip
        write_text(marker, json.dumps(wanted) + "\n")
    say("stage two: fine-tuning on the quantum labels")
    neighbours = [f"{k}={v}" for k, v in normalisation(first / "best.ckpt").items()]
    _train(folder, name, out, [*overrides, f"autotune.checkpoint={first / 'best.ckpt'}", *neighbours])
    return out / "best.ckpt"


def normalisation(checkpoint: Path) -> dict[str, float]:
    """Overrides for stage two: a checkpoint's weights belong to its number of neighbours, not to the new data's."""
    import torch

    content = torch.load(checkpoint, map_location="cpu", weights_only=False)  # upstream's own pickle, written just now
    value = content["hyper_parameters"]["model"]["model"].get("avg_num_neighbors")
    return {"training_module.model.model.avg_num_neighbors": value} if isinstance(value, int | float) else {}


def _settings(config: dict[str, Any], file: Path, overrides: Sequence[str]) -> dict[str, Any]:
    found = dict(config.get("autotune") or {})
    for override in overrides:
        key, _, value = override.partition("=")
        if key.startswith("autotune."):
            found[key.removeprefix("autotune.")] = yaml.safe_load(value)
    unknown, missing = sorted({*found} - _KEYS), sorted(_KEYS - {"checkpoint"} - {*found})
    if unknown or missing:
        raise ValueError(
            f"{file}: autotune: expected the keys {', '.join(sorted(_KEYS))}; "
            + (f"unknown: {', '.join(unknown)}" if unknown else f"missing: {', '.join(missing)}")
        )
    frames = Path(_here(str(found["frames"]))).resolve()
    if not frames.is_file():
        raise FileNotFoundError(f"{file}: autotune.frames: no file {frames}")
    train = _count(frames) - int(found["val"]) - 1
    if int(found["val"]) < 1 or train < 1:
        raise ValueError(
            f"{file}: autotune.val: expected between 1 and {max(1, train + int(found['val']) - 1)} of the frames in "
            f"{frames}, got {found['val']}"
        )
    return {"frames": str(frames), "train": train, **{k: found[k] for k in ("val", "epochs", "lr")}}


def _count(path: Path) -> int:
    """Frames of a file."""
    return sum(1 for _ in ase.io.iread(path, ":"))


def _value(key: str, config: dict[str, Any], overrides: Sequence[str]) -> str:
    given = [o.partition("=")[2] for o in overrides if o.startswith(f"{key}=")]
    value = given[-1] if given else config.get(key)
    if value is None:
        raise ValueError(f"{key}: the config has none; give {key}=… as an override")
    return _here(str(value))


def _here(text: str) -> str:
    return text.replace("${hydra:runtime.cwd}", str(Path.cwd()))


def _train(folder: Path, name: str, out: Path, overrides: Sequence[str]) -> None:
    """One stage, continued from its last checkpoint where there is one."""
    command = [str(Path(sys.executable).parent / "nequip-train"), "-cd", str(folder), "-cn", name, *overrides]
    command.append(f"folder={out}")
    if (out / "last.ckpt").is_file():
        command.append(f"++ckpt_path={out / 'last.ckpt'}")
    with only_writer(out) as lock:
        code = subprocess.run(command, pass_fds=(lock,), check=False).returncode
    if code:
        raise ValueError(f"nequip-train failed in {out} (its messages are above); the same command continues it")
