"""Start-up hook: imported by ``equitune_hook.pth`` in every Python process of the environment.

MACE has no plugin mechanism, and ``mace.cli.run_train`` copies the names it uses. So a finder
patches the *defining* modules right after they execute, before anything copies from them. This
module is read at every interpreter start: it imports nothing but the standard library's import
machinery.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["KILL_SWITCH", "PATCHED", "install", "is_installed"]

KILL_SWITCH = "EQUITUNE_DISABLE"

# defining module of MACE -> function of mace_lora.mace_plugin.patches that patches it
PATCHED = {
    "mace.data.utils": "patch_data_utils",
    "mace.tools.arg_parser": "patch_arg_parser",
    "mace.tools.arg_parser_tools": "patch_arg_parser_tools",
    "mace.tools.checkpoint": "patch_checkpoint",
    "mace.tools.multihead_tools": "patch_multihead_tools",
    "mace.tools.train": "patch_train",
    "mace.tools.scripts_utils": "patch_scripts_utils",
    "mace.tools.model_script_utils": "patch_model_script_utils",
    "mace.modules.lora": "patch_lora",
    "mace.cli.run_train": "patch_run_train",
}


class _PatchingLoader(importlib.abc.Loader):
    """Upstream's loader, followed by our patch."""

    def __init__(self, loader: importlib.abc.Loader, patch: str) -> None:
        self._loader, self._patch = loader, patch

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        patches = importlib.import_module("mace_lora.mace_plugin.patches")
        getattr(patches, self._patch)(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules in PATCHED through the other finders and wraps their loader."""

    def __init__(self) -> None:
        self._busy: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in PATCHED or fullname in self._busy or os.environ.get(KILL_SWITCH) == "1":
            return None
        self._busy.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._busy.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _PatchingLoader(spec.loader, PATCHED[fullname])
        return spec


def is_installed() -> bool:
    """Whether the finder is active in this process."""
    return any(isinstance(f, _Finder) for f in sys.meta_path)


def install() -> None:
    """Put the finder first on ``sys.meta_path``; does nothing under ``EQUITUNE_DISABLE=1``."""
    if os.environ.get(KILL_SWITCH) != "1" and not is_installed():
        sys.meta_path.insert(0, _Finder())


install()
