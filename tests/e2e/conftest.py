"""Fixtures of the end-to-end tests."""

import importlib.util
import json
import subprocess

import ase.io
import pytest
from helpers import BIN, EMBEDDED, dft_frames

if importlib.util.find_spec("mace") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def job(tmp_path_factory):
    """Folder with a base .model, small train/valid/test files and the PBE0 E0s."""
    folder = tmp_path_factory.mktemp("job")
    subprocess.run([BIN / "equitune", "export-base", folder / "base.model"], check=True, capture_output=True)
    for part, count in (("train", 10), ("valid", 5), ("test", 5)):
        ase.io.write(folder / f"{part}.xyz", dft_frames(part, count), format="extxyz")
    e0s = json.loads((EMBEDDED / "glycolamide_pbe0.json").read_text())["E0s_eV"]
    (folder / "e0s.txt").write_text(str({int(z): e for z, e in e0s.items()}))
    return folder
