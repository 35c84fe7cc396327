"""Append-only extxyz files that survive a kill at any moment."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import ase
import numpy as np

__all__ = ["KEY", "Journal", "complete_frames", "frame_key"]

KEY = "label_key"
_KEY = re.compile(rb"\b" + KEY.encode() + rb'="?([0-9a-f]{32})')


def frame_key(atoms: ase.Atoms, labeler: str) -> str:
    """Identity of a frame and its labeler: 32 hexadecimal digits.

    Args:
        atoms: numbers, positions (Å), cell (Å), periodicity, ``info['charge']`` and ``info['spin']`` count.
        labeler: the labeler's name.
    """
    digest = hashlib.sha256(labeler.encode())
    digest.update(np.asarray(atoms.numbers, "<i4").tobytes())
    digest.update(np.asarray(atoms.positions, "<f8").tobytes())
    digest.update(np.asarray(atoms.cell, "<f8").tobytes() + np.asarray(atoms.pbc, "u1").tobytes())
    digest.update(f"{int(atoms.info.get('charge', 0))} {int(atoms.info.get('spin', 1))}".encode())
    return digest.hexdigest()[:32]


class Journal:
    """A growing extxyz file, one frame an append, locked against a second writer.

    Opening cuts off a frame that a kill or a full disk left incomplete.

    Args:
        path: the file; created when missing.

    Raises:
        ValueError: another process writes to it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.file = path.open("ab", buffering=0)  # nothing waits in memory that a failed write would leave behind
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            self.file.close()
            raise ValueError(
                f"{path}: another process is writing to it; wait for it, or choose another output"
            ) from err
        self.keys: set[bytes] = set()
        self.size = 0
        with path.open("rb") as existing:
            for key, self.size in complete_frames(existing):
                if key:
                    self.keys.add(bytes.fromhex(key))
        self.file.truncate(self.size)

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self.keys

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
