"""A NequIP-framework student of ``equitune distill``: trainings of a config by ``nequip-train``."""

from __future__ import annotations

import csv
import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mace_lora.atomic import only_writer, write_text
from nequip_ext.autotune.driver import normalisation

__all__ = ["NequipStudent", "check_config", "compose"]

_NAME = "equitune_student"
_GAMMA = "training_module.lr_scheduler.scheduler.gamma"
_SHIPPED = 0.98  # of the ExponentialLR in our configs; another schedule is the user's
_ENERGY, _FORCES = "val0_epoch/per_atom_energy_mae", "val0_epoch/forces_mae"


def compose(path: Path) -> Any:
    """A config with those that its ``defaults`` name, as one (OmegaConf, interpolations kept).

    Raises:
        ValueError: a default that is no name of a file beside it, or a key that a student's training needs is missing.
    """
    content: Any = OmegaConf.load(path)
    parts = content.pop("defaults", ["_self_"])
    merged: Any = OmegaConf.create()
    for part in parts:
        if not isinstance(part, str) or (part != "_self_" and not (path.parent / f"{part}.yaml").is_file()):
            raise ValueError(f"{path}: defaults: expected names of files beside it, or _self_, got {part!r}")
        other = content if part == "_self_" else compose(path.parent / f"{part}.yaml")
        merged = OmegaConf.merge(merged, other)
    return merged


def check_config(path: Path, overrides: Mapping[str, Any]) -> None:
    """The config must have what a student's training changes, and the keys that are overridden.

    Raises:
        ValueError: a key is missing; which one.
    """
    content: Any = OmegaConf.to_container(compose(path), resolve=False)
    found = {*content, *(f"autotune.{key}" for key in content.get("autotune") or {})}
    for key in ("folder", "lr", "epochs", "batch_size", "data", "autotune.checkpoint"):
        if key not in found:
            raise ValueError(f"{path}: expected the key {key}, as in recipes/configs/nequip_autotune.yaml")
    for key in overrides:
        part: Any = content
        for name in key.split("."):
            if not isinstance(part, Mapping) or name not in part:
                raise ValueError(f"{path}: student.flags: it has no key {key}")
            part = part[name]
    _check_outputs(content, path)
    model = (content.get("training_module") or {}).get("model") or {}
    if model.get("_target_") != "nequip_ext.Autotuned" or model.get("checkpoint") != "${autotune.checkpoint}":
        raise ValueError(
            f"{path}: training_module.model: expected _target_: nequip_ext.Autotuned with checkpoint: "
            "${autotune.checkpoint}, or the pre-trained weights would not be used"
        )


def _check_outputs(content: Mapping[str, Any], path: Path) -> None:
    """What is read of a training, and what it is given, must be as in our configs.

    Raises:
        ValueError: the key and what it should be.
    """
    trainer, data = content.get("trainer") or {}, content.get("data") or {}
    training = content.get("training_module") or {}
    saving = [c for c in trainer.get("callbacks") or [] if str(c.get("_target_", "")).endswith("ModelCheckpoint")]
    metrics = training.get("val_metrics")
    metrics = content.get(metrics[2:-1]) if isinstance(metrics, str) and metrics.startswith("${") else metrics
    wanted = {_ENERGY.rpartition("/")[2], _FORCES.rpartition("/")[2]}
    mapping = data.get("key_mapping") or {}
    for good, key, expected in (
        (str(data.get("_target_", "")).endswith("ASEDataModule"), "data", "nequip.data.datamodule.ASEDataModule"),
        (
            mapping.get("REF_energy") == "total_energy" and mapping.get("REF_forces") == "forces",
            "data.key_mapping", "REF_energy: total_energy and REF_forces: forces, the keys of the frames",
        ),
        (
            any(c.get("filename") == "best" and c.get("save_last") and c.get("dirpath") == "${folder}" for c in saving),
            "trainer.callbacks", "a ModelCheckpoint with dirpath: ${folder}, filename: best and save_last: true",
        ),
        (
            str((trainer.get("logger") or {}).get("_target_", "")).endswith("CSVLogger")
            and trainer["logger"].get("save_dir") == "${folder}",
            "trainer.logger", "lightning.pytorch.loggers.CSVLogger with save_dir: ${folder}",
        ),
        (
            isinstance(metrics, Mapping) and wanted <= {*(metrics.get("coeffs") or {})},
            "training_module.val_metrics", f"coeffs with {' and '.join(sorted(wanted))}",
        ),
    ):  # fmt: skip
        if not good:
            raise ValueError(f"{path}: {key}: expected {expected}, as in recipes/configs/nequip_data.yaml")


class NequipStudent:
    """Trainings of one config.

    Args:
        config: YAML of ``nequip-train`` with the keys folder, lr, epochs and autotune.checkpoint.
        overrides: keys (dots for nesting) and values for all trainings.
        seed: of weights and order.
        device: cpu or cuda.
    """

    kind = "nequip"

    def __init__(self, config: Path, overrides: Mapping[str, Any], seed: int, device: str = "cpu") -> None:
        self.config, self.overrides, self.seed = config, dict(overrides), seed
        self.accelerator = "cpu" if device == "cpu" else "gpu"

    def settings(self, training: Any, lr: float, start: Path | None) -> dict[str, Any]:
        text = OmegaConf.to_yaml(compose(self.config))  # with the files that it names
        out = {
            "composed": hashlib.sha256(text.encode()).hexdigest(),
            "seed": self.seed,
            **self.overrides,
            **training.flags,
        }
        out |= {"epochs": training.epochs, "lr": lr}
        if OmegaConf.select(compose(self.config), _GAMMA) == _SHIPPED and _GAMMA not in out:
            out[_GAMMA] = round(0.05 ** (1 / training.epochs), 6)  # of an epoch: as for MACE students
        if start is not None:
            out["start"] = str(start)
        return out

    def train(self, settings: Mapping[str, Any], data: tuple[Path, Path], place: Path) -> None:
        """Run ``nequip-train`` in a folder; continues from its last checkpoint.

        Raises:
            ValueError: the training fails (where its messages are), or another run trains there now.
        """
        content = compose(self.config)
        keys = {k: v for k, v in settings.items() if k not in ("composed", "start")}
        keys |= {"folder": str(place), "run": ["train"], "autotune.checkpoint": None}
        keys |= {"trainer.accelerator": self.accelerator}
        keys |= {"data.train_file_path": str(data[0]), "data.val_file_path": str(data[1])}
        if "start" in settings:
            keys["autotune.checkpoint"] = settings["start"]
            keys |= normalisation(Path(settings["start"]))
        command = [str(Path(sys.executable).parent / "nequip-train"), "-cd", str(place), "-cn", _NAME]
        env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with only_writer(place) as lock, (place / "output.log").open("a") as log:
            if (place / "last.ckpt").is_file():
                keys["ckpt_path"] = str(place / "last.ckpt")
            for part in ("split_dataset", "test_file_path"):
                content.data.pop(part, None)
            for key, value in keys.items():
                OmegaConf.update(content, key, value, merge=False, force_add=True)
            # upstream would prefer a file of the same name in the current folder
            write_text(place / f"{_NAME}.yaml", OmegaConf.to_yaml(content))
            run = subprocess.run(command, stdout=log, stderr=log, env=env, pass_fds=(lock,), check=False)
        if run.returncode or not self.model(place).is_file():
            raise ValueError(f"nequip-train in {place} failed: its output is in {place / 'output.log'}")

    def model(self, place: Path) -> Path:
        return place / "best.ckpt"

    def curve(self, place: Path) -> list[tuple[int, float, float]]:
        points: dict[int, tuple[float, float]] = {}
        for path in sorted((place / "lightning_logs").glob("*/metrics.csv"), key=lambda p: p.stat().st_mtime):
            with path.open() as handle:
                for row in csv.DictReader(handle):
                    if row.get(_FORCES):
                        points[int(row["epoch"])] = (1e3 * float(row[_ENERGY]), 1e3 * float(row[_FORCES]))
        return [(epoch, e, f) for epoch, (e, f) in sorted(points.items())]

    def steps_per_epoch(self, settings: Mapping[str, Any], frames: int) -> int:
        size = settings["batch_size"] if "batch_size" in settings else compose(self.config)["batch_size"]
        return -(-frames // int(size))
