"""Energy references are refitted before a validation: the best epoch is chosen with those that are saved."""

import ase.io
import numpy as np
import pytest
import torch
from helpers import train
from mace.calculators import MACECalculator

from mace_lora import read_adapter

pytestmark = pytest.mark.mace


def energy_errors(model, file):
    """Label minus model, eV/atom."""
    calculator = MACECalculator(models=[model], device="cpu", default_dtype="float64")
    errors = []
    for atoms in ase.io.read(file, ":"):
        label = atoms.info["REF_energy"]
        atoms.calc = calculator
        errors.append((label - atoms.get_potential_energy()) / len(atoms))
    return errors


@pytest.mark.parametrize("ema", [False, True])
def test_errors_in_the_card_are_those_of_the_adapter(job, tmp_path, ema):
    # forces alone are trained: the constant of the energies wanders
    settings = {"max_num_epochs": 3, "default_dtype": "float64", "energy_weight": 1e-9, "lr": 0.02} | (
        {"ema": True} if ema else {}
    )
    train(job, tmp_path, **settings)
    card = read_adapter(tmp_path / "run-adapter").run
    model = torch.load(tmp_path / "run.model", weights_only=False)
    errors = {part: energy_errors(model, job / f"{part}.xyz") for part in ("train", "valid")}
    rmse = float(np.sqrt(np.mean(np.square(errors["valid"]))))
    assert float(card["validation_rmse_e_per_atom"].split()[0]) == pytest.approx(rmse, rel=1e-4)
    assert abs(np.mean(errors["train"])) < 1e-8
