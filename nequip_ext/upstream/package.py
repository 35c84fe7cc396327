"""Private functions with which ``nequip-package`` reads and writes packages."""

from __future__ import annotations

from nequip.model.saved_models import package as _package
from nequip.scripts._package_utils import _EXTERNAL_MODULES, _INTERNAL_MODULES, _MOCK_MODULES
from torch.package import PackageExporter

__all__ = ["cpu_deserialize_always", "declare_dependencies", "no_package_warnings", "package_metadata"]

cpu_deserialize_always = _package._cpu_deserialize_always
no_package_warnings = _package._suppress_package_importer_exporter_warnings
package_metadata = _package._get_package_metadata


def declare_dependencies(exporter: PackageExporter) -> None:
    """Which modules go into a package, which it expects and which it does without, as upstream has it."""
    exporter.mock([f"{name}.**" for name in _MOCK_MODULES])
    exporter.extern([f"{name}.**" for name in _EXTERNAL_MODULES])
    exporter.intern([f"{name}.**" for name in _INTERNAL_MODULES])
