"""Settings of ``equitune active-learn``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from mace_lora.mace_plugin.launch import check_flags, with_files

from .labelers import open_labeler
from .settings import DynamicsKeys, Strict, read_yaml

__all__ = ["ActiveLearning", "Explore", "read_config"]

_OURS = ("name", "seed", "train_file", "valid_file", "work_dir", "restart_latest")


class Explore(DynamicsKeys):
    """Dynamics with the committee's first member, in every round.

    Attributes:
        starts: frames to start from.
    """

    starts: Path


class ActiveLearning(Strict):
    """Settings of a run; the keys of its YAML file.

    Attributes:
        folder: everything is written here.
        data: labelled frames to begin with (REF_energy in eV, REF_forces in eV/Å).
        valid_fraction: of all labelled frames, used for validation.
        label: labeler, as for ``equitune label``.
        train: flags of ``mace_run_train`` without dashes; ours are added: name, seed, files, work_dir.
        members: models of the committee; they differ by their seeds.
        window: lower and upper bound of the largest force deviation, meV/Å.
        calibrate: multiply deviations by the ratio of error to deviation on the validation frames, where it is above
            one. Members that share a foundation model agree more than they are right.
        per_round: frames labelled in a round at most.
        stop_below: end when a smaller fraction of the explored frames is in the window or above.
        max_rounds: end in any case.
        workers: processes for dynamics and labels, and members trained at a time.
        timeout: seconds a label may take.
        seed: of everything.
    """

    folder: Path
    data: Path
    valid_fraction: float = Field(0.1, gt=0, lt=1)
    label: str
    train: dict[str, Any]
    members: int = Field(4, ge=2)
    window: tuple[float, float] = (100.0, 300.0)
    calibrate: bool = False
    per_round: int = Field(50, ge=1)
    stop_below: float = Field(0.005, gt=0, lt=1)
    max_rounds: int = Field(10, ge=1)
    workers: int = Field(1, ge=1)
    timeout: float | None = Field(None, gt=0)
    seed: int = 0
    explore: Explore

    @model_validator(mode="after")
    def _check(self) -> ActiveLearning:
        if not 0 <= self.window[0] < self.window[1]:
            raise ValueError(f"window: expected lower < upper in meV/Å, got {list(self.window)}")
        ours = [k for k in self.train if k in _OURS]
        if ours:
            raise ValueError(f"train: {ours[0]} is set by the loop; leave it out")
        self.explore.schedules()
        return self


def read_config(path: Path) -> ActiveLearning:
    """Read a YAML file; paths in it are relative to its folder.

    Raises:
        FileNotFoundError: no such file, or one that it names.
        ValueError: an unknown key or a wrong value; which one.
    """
    config = read_yaml(path, ActiveLearning)
    base = path.parent.resolve()
    config.folder, config.data = base / config.folder, base / config.data
    config.explore.starts = base / config.explore.starts
    config.train = with_files(config.train, str, base)
    for file in (config.data, config.explore.starts):
        if not file.is_file():
            raise FileNotFoundError(f"{path}: no file {file}")
    open_labeler(config.label)
    check_flags(config.train, f"{path}: train")
    return config
