"""Data sets: what is wrong with them, before anything is trained on them."""

from __future__ import annotations

from .check import check_frames, require_sound
from .finding import Finding

__all__ = ["Finding", "check_frames", "require_sound"]
