"""Both stages of classical-to-quantum transfer by ``nequip-train``, from one YAML."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from mace_lora.atomic import only_writer, write_text
from mace_lora.autotune.child import run_child
from mace_lora.autotune.levels import Source, check_elements, check_mixed_up, read_source
from mace_lora.autotune.offsets import by_composition, write_without

from .labels import check_labels, energy_key, energy_of
from .records import (
    FILES,
    SCHEDULE,
    check_classical_data,
    check_start,
    data_files,
    fingerprint,
    finished,
    quantum_data,
)

__all__ = ["normalisation", "run"]

_KEYS = {"frames", "val", "epochs", "lr", "checkpoint"}
_OFFSETS = ("element", "composition")


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
        ValueError: the config has no or wrong ``autotune`` keys, the classical file lacks elements or was mixed up
            with the quantum one, a stage was made with other data or settings or fails, or another run trains there
            now.
    """
    file = folder / f"{name}.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    _check_keys(yaml.safe_load(file.read_text()), file, overrides)
    config = _compose(folder, name, overrides)
    settings = _settings(config["autotune"], file)
    schedule = _schedule(config, file)
    classical: Source = settings.pop("source")
    _check_levels(classical, config)
    if config.get("folder") is None:
        raise ValueError("folder: the config has none; give folder=… as an override")
    out = Path(str(config["folder"])).resolve()
    first = out / "classical"
    split = {"train": settings["train"], "val": settings["val"], "test": 1}  # upstream wants a test frame
    copied = settings["offsets"] == "composition"
    frames = first / "frames_without_offsets.xyz" if copied else classical.path
    mine = [
        *overrides, f"frames={_quoted(frames)}", f"epochs={settings['epochs']}", f"lr={settings['lr']}",
        *(f"data.split_dataset.{part}={count}" for part, count in split.items()), "run=[train]",
        "autotune.checkpoint=null",
        *(f"autotune.{key}={'null' if off is None else off}" for key, (*_, off) in SCHEDULE.items()
          if key in config["autotune"]),
    ]  # fmt: skip
    one = _compose(folder, name, mine)
    check_classical_data(one, frames)
    wanted = fingerprint(one, classical.path) | {"autotune.offsets": settings["offsets"]}
    if finished(first, wanted):
        say(f"stage one is there: {first / 'best.ckpt'}")
    else:
        say(f"stage one: training on {classical.path}")
        if copied:
            first.mkdir(parents=True, exist_ok=True)
            key = energy_key(classical, config.get("data") or {})
            write_without(classical, by_composition([classical], key, say), key, frames)
        write_text(first / "stage_one.json", json.dumps({"finished": False, "settings": wanted}) + "\n")
        _train(folder, name, first, mine)
        write_text(first / "stage_one.json", json.dumps({"finished": True, "settings": wanted}) + "\n")
    check_start(out, first / "best.ckpt", schedule, quantum_data(config))
    say("stage two: fine-tuning on the quantum labels")
    neighbours = [f"{k}={v}" for k, v in normalisation(first / "best.ckpt").items()]
    _train(folder, name, out, [*overrides, f"autotune.checkpoint={_quoted(first / 'best.ckpt')}", *neighbours])
    return out / "best.ckpt"


def _compose(folder: Path, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The whole config with its defaults list, interpolated as far as that needs no data."""
    from hydra import compose, initialize_config_dir  # type: ignore[import-not-found]
    from hydra.errors import HydraException  # type: ignore[import-not-found]
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(folder.resolve()), version_base=None):
            found = compose(name, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as err:
        raise ValueError(f"{folder / name}.yaml: {err}") from err
    content: dict[str, Any] = yaml.safe_load(_here(OmegaConf.to_yaml(found)))
    return content | {key: _resolved(content, content.get(key)) for key in ("folder", "autotune", "data")}


def _resolved(root: dict[str, Any], value: Any) -> Any:
    """Interpolations of other keys; functions that need the data are left as they are written."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(value, dict):
        return {k: _resolved(root, v) for k, v in value.items()}
    if isinstance(value, list):
        return [_resolved(root, v) for v in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    try:
        found = OmegaConf.create({**root, "_here": value})["_here"]
        return OmegaConf.to_object(found) if OmegaConf.is_config(found) else found
    except OmegaConfBaseException:
        return value


def _check_levels(classical: Source, config: dict[str, Any]) -> None:
    """The classical file against those of the config, under the config's labels."""
    data, paths = config.get("data") or {}, data_files(config, FILES)
    if not str(data.get("_target_", "")).endswith("ASEDataModule"):
        return  # other modules have files and labels of their own
    arguments = data.get("ase_args") or {}
    quantum = [read_source("frames of the config", p, **arguments) for p in dict.fromkeys(map(str, paths))]
    learnt = {Path(p) for p in data_files(config, FILES[:3])}
    for source in (classical, *(q for q in quantum if q.path in learnt)):
        check_labels(source, config, classical=source is classical)
    check_elements(classical, quantum)
    check_mixed_up(classical, quantum, lambda atoms: energy_of(atoms, data))


def _schedule(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """The schedule of stage two, which the config must hand on to what carries it out.

    Raises:
        ValueError: a value out of range, or one that nothing in the config uses.
    """
    found = {key: config["autotune"].get(key, off) for key, (*_, off) in SCHEDULE.items()}
    decay, every = found["lr_decay"], found["unfreeze"]
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 < decay <= 1:
        raise ValueError(f"{file}: autotune.lr_decay: expected a factor above 0 and up to 1, got {decay!r}")
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ValueError(f"{file}: autotune.unfreeze: expected null or at least 1 epoch, got {every!r}")
    groups = config.get("training_module", {}).get("optimizer", {}).get("param_groups") or {}
    parts = [groups, *(config.get("trainer", {}).get("callbacks") or [])]
    for key, (name, argument, off) in SCHEDULE.items():
        used = any(
            str(p.get("_target_", "")).endswith(name) and p.get(argument) == f"${{autotune.{key}}}" for p in parts
        )
        if found[key] != off and not used:
            raise ValueError(
                f"{file}: autotune.{key}: nothing in the config uses it; expected nequip_ext.{name} with "
                f"{argument}: ${{autotune.{key}}}, as in recipes/configs/nequip_autotune.yaml"
            )
    return found


def _quoted(path: Path) -> str:
    """A path as a value of a Hydra override, where = , ( [ and blanks have meanings."""
    text = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), str(path))
    return f"'{text}'"


def normalisation(checkpoint: Path) -> dict[str, float]:
    """Overrides for stage two: a checkpoint's weights belong to its number of neighbours, not to the new data's."""
    import torch

    content = torch.load(checkpoint, map_location="cpu", weights_only=False)  # upstream's own pickle, written just now
    value = content["hyper_parameters"]["model"]["model"].get("avg_num_neighbors")
    return {"training_module.model.model.avg_num_neighbors": value} if isinstance(value, int | float) else {}


def _check_keys(config: dict[str, Any], file: Path, overrides: Sequence[str]) -> None:
    """The ``autotune`` keys of the config and the overrides, before Hydra puts them together."""
    found = {*(config.get("autotune") or {})}
    for override in overrides:
        key = override.partition("=")[0].lstrip("+")
        if key.startswith("autotune."):
            found.add(key.removeprefix("autotune."))
    wanted = (*SCHEDULE, "offsets")
    unknown, missing = sorted(found - _KEYS - {*wanted}), sorted(_KEYS - {"checkpoint"} - found)
    if unknown or missing:
        raise ValueError(
            f"{file}: autotune: expected the keys {', '.join(sorted(_KEYS))}, and if wanted {', '.join(wanted)}; "
            + (f"unknown: {', '.join(unknown)}" if unknown else f"missing: {', '.join(missing)}")
        )


def _settings(found: dict[str, Any], file: Path) -> dict[str, Any]:
    frames = Path(str(found["frames"])).resolve()
    if not frames.is_file():
        raise FileNotFoundError(f"{file}: autotune.frames: no file {frames}")
    source = read_source("autotune.frames", frames)
    train = len(source.frames) - int(found["val"]) - 1
    if int(found["val"]) < 1 or train < 1:
        raise ValueError(
            f"{file}: autotune.val: expected between 1 and {max(1, train + int(found['val']) - 1)} of the frames in "
            f"{frames}, got {found['val']}"
        )
    offsets = found.get("offsets") or "element"
    if offsets not in _OFFSETS:
        raise ValueError(f"{file}: autotune.offsets: expected one of {', '.join(_OFFSETS)}, got {offsets!r}")
    return {"source": source, "train": train, "offsets": offsets, **{k: found[k] for k in ("val", "epochs", "lr")}}


def _here(text: str) -> str:
    return text.replace("${hydra:runtime.cwd}", str(Path.cwd()))


def _train(folder: Path, name: str, out: Path, overrides: Sequence[str]) -> None:
    """One stage, continued from its last checkpoint where there is one."""
    command = [str(Path(sys.executable).parent / "nequip-train"), "-cd", str(folder), "-cn", name, *overrides]
    command.append(f"folder={_quoted(out)}")
    if (out / "last.ckpt").is_file():
        command.append(f"++ckpt_path={_quoted(out / 'last.ckpt')}")
    with only_writer(out) as lock:
        code = run_child(command, pass_fds=(lock,))
    if code:
        raise ValueError(f"nequip-train failed in {out} (its messages are above); the same command continues it")
