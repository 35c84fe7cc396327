"""Arguments of a command of two stages, and its files."""

from pathlib import Path

import ase
import ase.io
import pytest
from autotune_frames import labelled


@pytest.fixture
def frames_file(tmp_path):
    """Writes frames to a file of the test's folder."""

    def write(name: str, *frames: ase.Atoms) -> Path:
        ase.io.write(tmp_path / name, list(frames), format="extxyz", write_results=False)
        return tmp_path / name

    return write


@pytest.fixture
def arguments(tmp_path, frames_file):
    """Upstream's parsed arguments with sound files, changed by flags."""
    from mace_lora.mace_plugin.launch import check_flags

    frames_file("train.xyz", labelled("OH2", -3.0, 1), labelled("OH2", -3.1, 2))
    frames_file("valid.xyz", labelled("OH2", -3.2, 3))
    frames_file("classical.xyz", *(labelled("OH2", 0.1 * k, k) for k in range(1, 5)), labelled("CH4", 0.3, 9))

    def build(**flags):
        flags = {
            "train_file": tmp_path / "train.xyz", "valid_file": tmp_path / "valid.xyz", "E0s": "average",
            "autotune_train_file": tmp_path / "classical.xyz", "work_dir": tmp_path, "max_num_epochs": 10,
        } | flags  # fmt: skip
        args = check_flags({k: v for k, v in flags.items() if v is not None}, "test")
        args.model_dir = str(tmp_path)
        for place in ("checkpoints", "results", "log"):
            setattr(args, f"{place}_dir", str(tmp_path / place))
        return args

    return build
