"""What we rely on in NequIP is there."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nequip")

from nequip_ext.upstream.contract import EXPECTED, check

pytestmark = pytest.mark.nequip


def test_private_names():
    assert [(m, p) for m, p in check() if p] == []


def test_a_changed_upstream_is_named(monkeypatch):
    monkeypatch.setitem(EXPECTED, "nequip.nn.mlp", ("NoSuchLayer",))
    monkeypatch.setitem(EXPECTED, "nequip.no_such_module", ())
    problems = {m: p for m, p in check() if p}
    assert problems["nequip.nn.mlp"] == "NoSuchLayer gone; equitune was tested with nequip 0.19.1"
    assert problems["nequip.no_such_module"].startswith("gone (No module named")


def test_doctor_checks_nequip():
    shown = subprocess.run([Path(sys.executable).parent / "equitune", "doctor"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stdout
    assert "nequip.scripts._package_utils" in shown.stdout


def test_all_private_imports_are_in_one_folder():
    folder = Path(__file__).parents[2] / "nequip_ext"
    for path in folder.rglob("*.py"):
        if path.parent.name != "upstream":
            lines = [x for x in path.read_text().splitlines() if "import" in x and "nequip." in x]
            private = [x for x in lines if "._" in x.split("import")[0].replace("nequip_ext", "")]
            assert not [x for x in private if x.startswith("from nequip.")], path
