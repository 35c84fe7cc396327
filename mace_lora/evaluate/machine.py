"""What a report was made on."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

__all__ = ["machine"]


def machine() -> str:
    """Cores that this process may use, and the processor's name, for reports."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    known = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", known.read_text()) if known.is_file() else None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{cores} cores of {name}"
