"""Frames that the commands read."""

from __future__ import annotations

import re
from pathlib import Path

import ase
import ase.io

__all__ = ["read_frames"]

_SLICE = r"-?\d+|(-?\d+)?:(-?\d+)?(:(-?0*[1-9]\d*)?)?"  # a step of 0 is none


def read_frames(path: Path, index: str = ":") -> list[ase.Atoms]:
    """Frames of a file.

    Args:
        path: any format ASE reads.
        index: what ``--index`` gives: a number or a slice.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an index of another form, one without frames, or a file that is empty or cannot be read.
    """
    if not re.fullmatch(_SLICE, index):
        raise ValueError(f"--index: expected a number or a slice such as 0:100 or ::10, got {index!r}")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty; expected frames in a format that ASE reads")
    try:
        found = ase.io.read(path, index)
    except (IndexError, StopIteration) as err:
        raise ValueError(f"--index: {path} has no frame {index}; count from 0, or leave the option out") from err
    except Exception as err:  # ASE's readers raise whatever their parsing runs into
        raise ValueError(f"{path}: cannot be read as structures ({type(err).__name__}: {err})") from err
    frames = found if isinstance(found, list) else [found]
    if not frames and index == ":":
        raise ValueError(f"{path} has no frames; expected at least one")
    if not frames:
        raise ValueError(f"--index: {path} has no frames in {index!r}; expected a slice with at least one of them")
    return frames
