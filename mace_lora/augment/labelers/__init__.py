"""Methods that label frames, by name: ``open_labeler("gfn2-xtb")``."""

from __future__ import annotations

from .registry import Labeler, Labels, labeler_help, open_labeler

__all__ = ["Labeler", "Labels", "labeler_help", "open_labeler"]
