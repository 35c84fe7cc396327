"""What the YAML files of our commands share: strict keys, readable errors, the keys of dynamics."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .dynamics import Schedule

__all__ = ["DynamicsKeys", "Strict", "read_yaml"]


class Strict(BaseModel):
    """Settings without unknown keys."""

    model_config = ConfigDict(extra="forbid")


Settings = TypeVar("Settings", bound=Strict)


def read_yaml(path: Path, kind: type[Settings]) -> Settings:
    """Settings in a YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, an unknown key or a wrong value; which one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise ValueError(f"{path}: not a YAML file: {' '.join(str(err).split())}") from err
    try:
        return kind.model_validate(content)
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(map(str, first["loc"])) or "config"
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            known = _known(kind, first["loc"][:-1])
            message = "unknown key" + (f", expected one of {', '.join(known)}" if known else "")
        raise ValueError(f"{path}: {where}: {message}, got {first['input']!r:.80}") from err


def _known(kind: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Keys of the part of the settings that ``loc`` leads to."""
    for name in loc:
        field = kind.model_fields.get(str(name))
        types = () if field is None else (field.annotation, *get_args(field.annotation))
        found = [t for t in types if isinstance(t, type) and issubclass(t, BaseModel)]
        if not found:  # within a list or the like
            return []
        kind = found[0]
    return list(kind.model_fields)


class DynamicsKeys(Strict):
    """Langevin dynamics from several starts at several temperatures.

    Attributes:
        temperatures: K; pairs [A, B] anneal.
        frames, spacing_fs, timestep_fs, friction_per_fs, equilibration_fs: as for ``equitune sample md``.
        replicas: trajectories of every start and temperature.
    """

    temperatures: list[float | tuple[float, float]] = [300.0]
    frames: int = Field(50, ge=1)
    spacing_fs: float = Field(50.0, gt=0)
    timestep_fs: float = Field(0.5, gt=0)
    friction_per_fs: float = Field(0.02, gt=0)
    equilibration_fs: float = Field(100.0, ge=0)
    replicas: int = Field(1, ge=1)

    def schedules(self) -> list[Schedule]:
        """One schedule for each temperature."""
        rest = (self.frames, self.spacing_fs, self.timestep_fs, self.friction_per_fs, self.equilibration_fs)
        pairs = [t if isinstance(t, tuple) else (t, t) for t in self.temperatures]
        return [Schedule(a, b, *rest) for a, b in pairs]
