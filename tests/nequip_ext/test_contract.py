"""What we rely on in NequIP is there."""

import importlib

import pytest

pytest.importorskip("nequip")
pytestmark = pytest.mark.nequip

TESTED = "0.19"
NAMES = {
    "nequip.nn._ghost_exchange_base": ["NoOpGhostExchangeModule"],
    "nequip.model.energy_modules": ["_append_energy_modules"],
    "nequip.scripts._workflow_utils": ["get_workflow_state"],
    "nequip.model.saved_models.package": [
        "_cpu_deserialize_always", "_get_package_metadata", "_suppress_package_importer_exporter_warnings",
    ],
    "nequip.scripts._package_utils": ["_EXTERNAL_MODULES", "_INTERNAL_MODULES", "_MOCK_MODULES"],
    "nequip.nn.mlp": ["ScalarLinearLayer", "DeepLinearMLP"],
    "nequip.nn.atomwise": ["PerTypeScaleShift"],
    "nequip.train.ema": ["EMALightningModule", "EMAWeights"],
}  # fmt: skip


@pytest.mark.parametrize("module", NAMES)
def test_private_names(module):
    found = importlib.import_module(module)
    for name in NAMES[module]:
        assert hasattr(found, name), f"nequip changed: {module}.{name} is gone; equitune was tested with {TESTED}"


def test_all_private_imports_are_in_one_folder():
    from pathlib import Path

    folder = Path(__file__).parents[2] / "nequip_ext"
    for path in folder.rglob("*.py"):
        if path.parent.name != "upstream":
            lines = [x for x in path.read_text().splitlines() if "import" in x and "nequip." in x]
            private = [x for x in lines if "._" in x.split("import")[0].replace("nequip_ext", "")]
            assert not [x for x in private if x.startswith("from nequip.")], path
