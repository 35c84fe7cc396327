"""Methods that label frames, by name: ``open_labeler("gfn2-xtb")``."""

from __future__ import annotations

from .registry import Labeler, Labels, is_labeler, labeler_help, open_labeler

__all__ = ["Labeler", "Labels", "is_labeler", "labeler_help", "open_labeler"]
