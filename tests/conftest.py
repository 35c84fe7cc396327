"""Shared fixtures: default dtype, and the folder of public data sets when it is there."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

HAS_MACE = importlib.util.find_spec("mace") is not None
if HAS_MACE:
    import mace  # noqa: F401  before e3nn

torch.set_num_threads(1)


@pytest.fixture()
def double():
    """float64 as the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the public data sets; EQUITUNE_DATA overrides ../shared/data."""
    folder = Path(os.environ.get("EQUITUNE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "models").is_dir():
        pytest.skip(f"public data sets not found in {folder}; set EQUITUNE_DATA")
    return folder
