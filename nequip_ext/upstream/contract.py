"""What we rely on in NequIP, checked: a changed upstream gives a clear message, not a wrong result."""

from __future__ import annotations

import importlib

__all__ = ["EXPECTED", "check"]

TESTED = "0.19.1"

# module -> names that we import, patch nothing of, or tell layers by
EXPECTED: dict[str, tuple[str, ...]] = {
    "nequip.data._key_registry": ("register_fields",),
    "nequip.nn._ghost_exchange_base": ("NoOpGhostExchangeModule",),
    "nequip.model.energy_modules": ("_append_energy_modules",),
    "nequip.model.modify_utils": ("_ONLY_APPLY_PERSISTENT",),
    "nequip.scripts._workflow_utils": ("get_workflow_state",),
    "nequip.model.saved_models.package": (
        "_cpu_deserialize_always", "_get_package_metadata", "_suppress_package_importer_exporter_warnings",
    ),
    "nequip.scripts._package_utils": ("_EXTERNAL_MODULES", "_INTERNAL_MODULES", "_MOCK_MODULES"),
    "nequip.integrations.utils": ("basic_transforms",),
    "nequip.nn.mlp": ("ScalarLinearLayer", "DeepLinearMLP"),
    "nequip.nn.atomwise": ("PerTypeScaleShift",),
    "nequip.nn.embedding._edge": ("BesselEdgeLengthEncoding",),
    "nequip.train.ema": ("EMALightningModule", "EMAWeights"),
}  # fmt: skip


def check() -> list[tuple[str, str | None]]:
    """Every module we rely on, and what is missing in it (None when all is there)."""
    out: list[tuple[str, str | None]] = []
    for module, names in EXPECTED.items():
        try:
            found = importlib.import_module(module)
        except ImportError as err:
            out.append((module, f"gone ({err}); equitune was tested with nequip {TESTED}"))
            continue
        missing = [n for n in names if not hasattr(found, n)]
        message = f"{', '.join(missing)} gone; equitune was tested with nequip {TESTED}" if missing else None
        out.append((module, message))
    return out
