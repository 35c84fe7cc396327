"""Public foundation models and public quantum data; skipped where the files are not at hand."""

import sys

import ase.io
import numpy as np
import pytest
import torch
from helpers import launch, train
from test_train import EVALUATE

from mace_lora import load_adapter, merge_lora

pytestmark = pytest.mark.mace
KCAL = 0.0433641153087705  # eV


def ethanol(shared):
    """15 frames of rMD17 (PBE) and no isolated atoms: E0s as averages."""
    data = np.load(shared / "rmd17_PBE" / "rmd17_ethanol_train_01.npz")
    frames = []
    for i in range(15):
        atoms = ase.Atoms(data["nuclear_charges"], positions=data["coords"][i])
        atoms.info["REF_energy"] = float(np.ravel(data["energies"][i])[0]) * KCAL
        atoms.arrays["REF_forces"] = data["forces"][i] * KCAL
        frames.append(atoms)
    return frames, "average", {}


def three_bpa(shared):
    """15 frames at 300 K (wB97X) and its isolated atoms."""
    folder = shared / "3bpa_wB97X"
    frames = ase.io.read(folder / "train_300K.xyz", ":15")
    atoms = {int(a.numbers[0]): float(a.get_potential_energy()) for a in ase.io.read(folder / "iso_atoms.xyz", ":")}
    for frame in frames:
        frame.info["REF_energy"], frame.arrays["REF_forces"] = frame.get_potential_energy(), frame.get_forces()
        frame.calc = None
    return frames, str(atoms), {}


@pytest.mark.parametrize("base", ["MACE-OFF23_small", "mace_mp_small"])
@pytest.mark.parametrize("data", [ethanol, three_bpa], ids=lambda f: f.__name__)
def test_train_merge_and_evaluate_without_equitune(shared_data, job, tmp_path, base, data):
    frames, e0s, changes = data(shared_data)
    for part, chosen in (("train", frames[:10]), ("valid", frames[10:])):
        ase.io.write(tmp_path / f"{part}.xyz", chosen, format="extxyz")
    model_file = shared_data / "models" / f"{base}.model"
    log = train(
        job, tmp_path, foundation_model=model_file, train_file=tmp_path / "train.xyz", ema=True, lr=0.002,
        valid_file=tmp_path / "valid.xyz", E0s=e0s, lora_rank=8, **changes,
    ).stdout  # fmt: skip
    assert "LoRA coverage" in log
    merged = torch.load(tmp_path / "run.model", weights_only=False)
    foundation = torch.load(model_file, map_location="cpu", weights_only=False)
    again = merge_lora(load_adapter(foundation, tmp_path / "run-adapter"))
    for (name, a), b in zip(merged.state_dict().items(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-4, msg=name)
    out = tmp_path / "out.npz"
    launch([sys.executable, "-c", EVALUATE, tmp_path / "run.model", tmp_path / "valid.xyz", out], disable=True)
    result = np.load(out)
    label = frames[10].arrays["REF_forces"]
    assert np.abs(result["f"] - label).mean() < 0.6 * np.abs(label).mean()
