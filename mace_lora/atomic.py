"""Files never half-written (temporary name, then rename), folders with one writer and of one set of settings."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

__all__ = ["atomic_path", "content_digest", "keep_settings", "lock", "only_writer", "write_text"]

LONGEST_SHOWN = 30  # characters of a setting in a message
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it replaces ``path`` in one step.

    Args:
        path: the final file. Its folder is created when missing.

    Raises:
        OSError: the folder cannot be written, or the disk is full (what to do is said); ``path`` is then unchanged.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=final.parent, prefix=f".{final.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(final)
    except OSError as err:
        if err.errno not in DISK_FULL:
            raise
        raise OSError(err.errno, f"{err.strerror}; {final} was not written: make room and run again") from err
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def content_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, or of the files of a folder and their names, hexadecimal."""
    if Path(path).is_dir():
        parts = [f"{p.relative_to(path)} {content_digest(p)}" for p in sorted(Path(path).rglob("*")) if p.is_file()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def keep_settings(
    folder: str | os.PathLike[str],
    settings: Mapping[str, Any],
    *,
    names: Mapping[str, str] | None = None,
    error: Callable[[str], Exception] = ValueError,
) -> None:
    """Write settings.json of a folder that is worked on in several goes, and refuse to go on with other settings.

    Args:
        folder: made when missing.
        settings: what JSON can hold.
        names: words for keys of ``settings`` in the message.
        error: class of the exception, e.g. ``typer.BadParameter``.

    Raises:
        ValueError: (or ``error``) the folder was begun with other settings; which ones, and both values if short.
    """
    file, now = Path(folder) / "settings.json", json.loads(json.dumps(settings))  # tuples are lists in the file
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else now
    changed = []
    for key in now:
        old, new = (repr(values.get(key)) for values in (before, now))
        if old != new:
            values = f": {old} before, {new} now" if max(len(old), len(new)) <= LONGEST_SHOWN else ""
            changed.append((names or {}).get(key, key) + values)
    if changed:
        raise error(
            f"{folder}: it was begun with other settings ({'; '.join(changed)}); give those again, or another folder"
        )
    write_text(file, json.dumps(now, indent=1) + "\n")


def lock(file: IO[Any]) -> bool:
    """Lock an open file; False where another process has. File systems without locks are trusted, with a warning."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as err:
        logging.getLogger("equitune").warning("%s cannot be locked (%s): take care of second runs", file.name, err)
    return True


@contextmanager
def only_writer(folder: str | os.PathLike[str], name: str = ".equitune.lock") -> Iterator[int]:
    """Keep other runs of ours out of a folder.

    The lock is the operating system's and ends with the last process that has its file open.

    Args:
        folder: made when missing.
        name: of the lock's file in it.

    Yields:
        file descriptor for ``pass_fds`` of a child that writes there, so that the lock outlives a killed parent.

    Raises:
        ValueError: another run is writing there now.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    with (place / name).open("w") as held:
        if not lock(held):
            raise ValueError(
                f"folder {place}: another run is writing there now; wait for it to end, or choose another folder"
            )
        yield held.fileno()
