"""Scale between a NequIP model and labels of another method."""

from types import SimpleNamespace

import pytest

pytest.importorskip("nequip")

import torch
from nequip_models import MODELS, build, energy_forces, molecule
from test_add_long_path import around, wake

import nequip_ext
from nequip_ext.energies import rescale

pytestmark = pytest.mark.nequip


@pytest.mark.parametrize("name", ["nequip", "painn", "multiscale", "long path"])
def test_forces_get_the_size_of_the_labels(name):
    if name == "long path":  # it has a copy of the scales
        model = around("nequip")
        wake(model)
    else:
        model = build(name)
    batch = molecule()
    before = energy_forces(model, batch)[1]
    noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(1), dtype=before.dtype)
    label = 1.5 * before + 0.01 * before.std() * noise
    label[0] = float("nan")  # an atom without a label
    assert rescale(SimpleNamespace(), model, [batch | {"forces": label}]) == pytest.approx(1.5, rel=0.02)
    torch.testing.assert_close(energy_forces(model, batch)[1], 1.5 * before, rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("factor", [-1.5, 0.0, 23.06])
def test_levels_that_have_nothing_in_common_leave_the_scale(factor, caplog):
    model, batch = build("nequip"), molecule()
    before = energy_forces(model, batch)[1]
    assert rescale(SimpleNamespace(), model, [batch | {"forces": factor * before}]) == 1.0
    warned = (
        f"but {abs(factor):.3g} times as large: no methods differ so much; the scales are left alone, check the unit"
    )
    assert (warned in caplog.text) is (factor != 0.0)
    torch.testing.assert_close(energy_forces(model, batch)[1], before)


def test_without_scales_or_forces_nothing_changes():
    model, batch = build("nequip", per_type_energy_scales=None), molecule()
    assert rescale(SimpleNamespace(), model, [batch | {"forces": 2.0 * energy_forces(model, batch)[1]}]) == 1.0
    assert rescale(SimpleNamespace(), build("nequip"), [batch]) == 1.0
    long = around("nequip", model={"model_dtype": "float64", **MODELS["nequip"], "per_type_energy_scales": None})
    wake(long)
    before = energy_forces(long, batch)[1]
    assert rescale(SimpleNamespace(), long, [batch | {"forces": 1.5 * before}]) == 1.0
    torch.testing.assert_close(energy_forces(long, batch)[1], before)


def test_rescale_is_a_flag():
    with pytest.raises(ValueError, match="rescale: expected true or false"):
        nequip_ext.AlignEnergies(rescale="yes")
