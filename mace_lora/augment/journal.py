"""Append-only extxyz files that survive a kill at any moment."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import ase
import numpy as np

from mace_lora.atomic import lock

__all__ = ["KEY", "Journal", "complete_frames", "frame_key"]

KEY = "label_key"
_KEY = re.compile(rb"\b" + KEY.encode() + rb'="?([0-9a-f]{32})')


def frame_key(atoms: ase.Atoms, labeler: str) -> str:
    """Identity of a frame and its labeler: 32 hexadecimal digits.

    Args:
        atoms: numbers, positions (Å), cell (Å), periodicity, ``info['charge']``, ``info['spin']`` and
            ``info['smiles']`` and ``arrays['residuenumbers']`` (for force fields) count.
        labeler: the labeler's name.
    """
    digest = hashlib.sha256(labeler.encode())
    digest.update(np.asarray(atoms.numbers, "<i4").tobytes())
    digest.update(np.asarray(atoms.positions, "<f8").tobytes())
    digest.update(np.asarray(atoms.cell, "<f8").tobytes() + np.asarray(atoms.pbc, "u1").tobytes())
    if "residuenumbers" in atoms.arrays:
        digest.update(np.asarray(atoms.arrays["residuenumbers"], "<i4").tobytes())
    digest.update(f"{_whole(atoms.info.get('charge', 0))} {_whole(atoms.info.get('spin', 1))}".encode())
    if "smiles" in atoms.info:
        digest.update(str(atoms.info["smiles"]).encode())
    return digest.hexdigest()[:32]


def _whole(value: Any) -> str:
    """An integer's digits; what is none keeps its own text, and the labeler says what is wrong with it."""
    try:
        return str(int(value)) if int(value) == float(value) else repr(value)
    except (ValueError, TypeError, OverflowError):
        return repr(value)


def require_ours(path: Path) -> None:
    """Every frame of a file must have a key, or it is not from here.

    Raises:
        ValueError: one has none.
    """
    if path.is_file():
        with path.open("rb") as handle:
            if not all(key for key, _ in complete_frames(handle)):
                raise ValueError(f"{path}: equitune did not write all that is in it; move it, or choose another output")


class Journal:
    """A growing extxyz file, one frame an append, locked against a second writer.

    Opening cuts off a frame that a kill or a full disk left incomplete.

    Args:
        path: the file; created when missing.
        keyed: its frames have keys; a file whose frames have none is somebody else's.

    Raises:
        ValueError: another process writes to it, or it holds something else.
    """

    def __init__(self, path: Path, keyed: bool = True) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.file = path.open("ab", buffering=0)  # nothing waits in memory that a failed write would leave behind
        if not lock(self.file):
            self.file.close()
            raise ValueError(f"{path}: another process is writing to it; wait for it, or choose another output")
        self.keys: set[bytes] = set()
        self.size = 0
        with path.open("rb") as existing:
            foreign = False
            for key, self.size in complete_frames(existing):
                foreign = foreign or (keyed and not key)
                if key:
                    self.keys.add(bytes.fromhex(key))
            existing.seek(self.size)
            rest = existing.readline().strip()
        if foreign or (rest and not rest.isdigit()):
            self.file.close()
            raise ValueError(f"{path}: equitune did not write what is in it; move it, or choose another output")
        self.file.truncate(self.size)

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self.keys

    def clear(self) -> None:
        """Forget all frames."""
        self.file.truncate(0)
        self.size = 0
        self.keys.clear()

    def append(self, text: str, key: str) -> None:
        """Write one frame.

        Raises:
            OSError: disk full, …; the file then ends with its last complete frame.
        """
        data = text.encode()
        try:
            written = 0
            while written < len(data):  # a full disk shows as a short write first
                written += self.file.write(data[written:]) or 0
        except OSError:
            self.file.truncate(self.size)
            raise
        self.size += len(data)
        self.keys.add(bytes.fromhex(key))

    def close(self) -> None:
        """Flush to disk and release the lock."""
        if not self.file.closed:
            try:
                os.fsync(self.file.fileno())
            finally:
                self.file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def complete_frames(file: BinaryIO) -> Iterator[tuple[str, int]]:
    """Key ("" without one) and end offset of every complete frame, by lines alone; stops at the first torn one."""
    while True:
        head = file.readline()
        if not head.endswith(b"\n") or not head.strip().isdigit():
            return
        comment = file.readline()
        if not comment.endswith(b"\n"):
            return
        for _ in range(int(head)):
            line = file.readline()
            if not line.endswith(b"\n"):
                return
        found = _KEY.search(comment)
        yield (found.group(1).decode() if found else ""), file.tell()
