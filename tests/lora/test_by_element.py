"""Element by element evaluation gives the numbers of upstream's kernels, in float64."""

import copy

import pytest
import torch
from models import build_mace, energy_forces, molecules, randomise

pytest.importorskip("mace")

from mace_lora import LoraConfig, apply_lora, merge_lora
from mace_lora.lora.by_element import enable, group
from mace_lora.mace_plugin.by_element import KERNELS

pytestmark = [pytest.mark.mace, pytest.mark.usefixtures("double")]

CASES = [
    ("agnostic", "4x0e", 1),
    ("agnostic", "4x0e", 3),
    ("agnostic", "4x0e+4x1o", 2),
    ("agnostic", "4x0e+4x1o+4x2e", 3),
    ("density", "4x0e+4x1o+4x2e", 2),
    ("nonlinear", "4x0e", 3),
]


@pytest.fixture(params=CASES, ids=lambda c: f"{c[0]}-{c[1]}-correlation{c[2]}")
def model(request):
    family, hidden, correlation = request.param
    model = build_mace(family, hidden, correlation=correlation)
    apply_lora(model, LoraConfig(rank=2, alpha=2))
    randomise(model)
    return model


def results(model, batch):
    energy, forces = energy_forces(model, batch, training=True)
    wanted = [p for p in model.parameters() if p.requires_grad]
    return energy, forces, torch.autograd.grad(energy.square().sum() + forces.square().sum(), wanted)


def test_same_energy_forces_and_weight_gradients(model):
    batch = molecules()
    energy, forces, gradients = results(model, batch)
    assert enable(model, KERNELS) >= 2
    energy_k, forces_k, gradients_k = results(model, batch)
    torch.testing.assert_close(energy_k, energy, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(forces_k, forces, atol=1e-10, rtol=1e-10)
    for a, b in zip(gradients_k, gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


def test_every_layer_uses_its_kernel_and_merging_gives_the_same(model):
    answers = []

    def recorded(kernel):
        def run(*args):
            answers.append(kernel(*args))
            return answers[-1]

        return run

    count = enable(model, {kind: recorded(kernel) for kind, kernel in KERNELS.items()})
    batch = molecules()
    energy, forces = energy_forces(model, batch)
    assert len(answers) == count and all(a is not None for a in answers)
    enable(model, KERNELS, on=False)
    energy_m, forces_m = energy_forces(merge_lora(copy.deepcopy(model)), batch)
    torch.testing.assert_close(energy_m, energy, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(forces_m, forces, atol=1e-10, rtol=1e-10)


def test_attributes_that_are_not_one_hot_use_upstream_kernels(model):
    batch = molecules()
    batch["node_attrs"] = 0.5 * batch["node_attrs"]
    assert group(batch["node_attrs"]) is None
    energy, forces = energy_forces(model, batch)
    enable(model, KERNELS)
    energy_k, forces_k = energy_forces(model, batch)
    torch.testing.assert_close(energy_k, energy, atol=1e-12, rtol=0)
    torch.testing.assert_close(forces_k, forces, atol=1e-12, rtol=0)


def test_grouping():
    attrs = torch.eye(3)[[2, 0, 2, 0]]
    atoms = group(attrs)
    assert atoms.counts == [2, 0, 2] and atoms.present == [0, 2]
    assert atoms.order.tolist() == [1, 3, 0, 2]
    assert torch.equal(attrs[atoms.order][atoms.inverse], attrs)
    assert group(attrs) is atoms
    attrs[0] = torch.tensor([1.0, 0.0, 0.0])  # changed in place: sorted again
    assert group(attrs).counts == [3, 0, 1]
    assert group(torch.tensor([[0.5, 0.5]])) is None
    assert group(torch.tensor([[1.0, 0.0]], requires_grad=True)) is None
