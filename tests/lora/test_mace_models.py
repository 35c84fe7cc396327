"""The adapter in whole MACE models of three interaction families, in float64."""

import copy

import pytest
import torch
from models import FAMILIES, build_mace, dimer, energy_forces, molecules, randomise

pytest.importorskip("mace")

from e3nn import o3

from mace_lora import LoraConfig, apply_lora, coverage, merge_lora

pytestmark = [pytest.mark.mace, pytest.mark.usefixtures("double")]

CASES = [
    *[(family, "4x0e+4x1o", 2) for family in FAMILIES],
    ("agnostic", "4x0e", 1),
    ("agnostic", "4x0e+4x1o+4x2e", 3),
    ("density", "4x0e+4x1o+4x2e", 2),
    ("nonlinear", "4x0e", 3),
]


@pytest.fixture(params=CASES, ids=lambda c: f"{c[0]}-{c[1]}-correlation{c[2]}")
def model(request):
    family, hidden, correlation = request.param
    return build_mace(family, hidden, correlation=correlation)


def adapted(model):
    apply_lora(model, LoraConfig(rank=2, alpha=2))
    randomise(model)
    return model


def test_identity_at_start(model):
    batch = molecules()
    before = energy_forces(model, batch)
    apply_lora(model, LoraConfig(rank=3))
    for a, b in zip(energy_forces(model, batch), before, strict=True):
        # the JIT may differentiate a second call in another order: rounding only
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_equivariance_and_inversion(model):
    adapted(model)
    batch = molecules()
    energy, forces = energy_forces(model, batch)
    for inversion in (1.0, -1.0):
        rotation = inversion * o3.rand_matrix()
        moved = dict(batch) | {k: batch[k] @ rotation.T for k in ("positions", "shifts")}
        energy_r, forces_r = energy_forces(model, moved)
        torch.testing.assert_close(energy_r, energy, atol=1e-9, rtol=0)
        torch.testing.assert_close(forces_r, forces @ rotation.T, atol=1e-9, rtol=0)


def test_forces_are_the_negative_gradient(model):
    adapted(model)
    batch = molecules()
    _, forces = energy_forces(model, batch)
    step = 1e-5
    for atom, axis in ((0, 0), (3, 1), (6, 2)):
        energies = []
        for sign in (1, -1):
            positions = batch["positions"].detach().clone()
            positions[atom, axis] += sign * step
            energies.append(energy_forces(model, dict(batch) | {"positions": positions})[0].sum())
        slope = (energies[0] - energies[1]) / (2 * step)
        assert abs(float((forces[atom, axis] + slope).detach())) < 1e-6


def test_permutation_and_extensivity(model):
    adapted(model)
    batch = molecules()
    energy, forces = energy_forces(model, batch)
    n = batch["positions"].shape[0]
    order = torch.randperm(n)
    inverse = torch.argsort(order)
    moved = dict(batch) | {k: batch[k][order] for k in ("positions", "node_attrs", "batch")}
    moved["edge_index"] = inverse[batch["edge_index"]]
    energy_p, forces_p = energy_forces(model, moved)
    torch.testing.assert_close(energy_p, energy, atol=1e-10, rtol=0)
    torch.testing.assert_close(forces_p, forces[order], atol=1e-10, rtol=0)
    # both molecules in one frame, without edges between them: energies add
    joined = dict(batch) | {"batch": torch.zeros(n, dtype=torch.long), "ptr": torch.tensor([0, n])}
    joined |= {k: batch[k][:1] for k in ("energy", "weight", "head") if torch.is_tensor(batch.get(k))}
    joined["cell"] = batch["cell"][:3]
    torch.testing.assert_close(energy_forces(model, joined)[0].sum(), energy.sum(), atol=1e-10, rtol=0)


def test_smooth_at_the_cutoff(model):
    adapted(model)
    far = energy_forces(model, dimer(4.5))
    for distance in (4.0 - 1e-3, 4.0 + 1e-3):
        energy, forces = energy_forces(model, dimer(distance))
        torch.testing.assert_close(energy, far[0], atol=1e-6, rtol=0)
        assert forces.abs().max() < 1e-4
    assert energy_forces(model, dimer(2.0))[1].abs().max() > 1e-3


def test_merged_equals_unmerged(model):
    stock = {n: type(m).__qualname__ for n, m in model.named_modules()}
    names = list(model.state_dict())
    adapted(model)
    batch = molecules()
    merged = merge_lora(copy.deepcopy(model))
    for a, b in zip(energy_forces(merged, batch), energy_forces(model, batch), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    assert {n: type(m).__qualname__ for n, m in merged.named_modules()} == stock
    assert list(merged.state_dict()) == names


def test_only_adapter_tensors_change_in_a_training_step(model):
    apply_lora(model, LoraConfig(rank=2))
    before = {n: v.clone() for n, v in model.state_dict().items()}
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = molecules()
    for _ in range(2):
        optimiser.zero_grad()
        energy, forces = energy_forces(model, batch, training=True)
        (energy.square().sum() + forces.square().sum()).backward()
        optimiser.step()
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed
    assert all(".lora_A." in n or ".lora_B." in n or ".lora_dense." in n for n in changed)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    # at correlation 1 with scalar hidden features the l > 0 messages have no way into the energy
    dead = {n for n in trained - changed if any(ir in n.rpartition(".")[2] for ir in ("1o", "2e"))}
    assert trained - changed == dead
    assert len(dead) <= (12 if model.products[0].linear.irreps_in.lmax == 0 else 0)


def test_each_irrep_is_independent(model):
    adapted(model)
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and len(m.lora_A["default"]) > 1}
    for layer in layers.values():
        for changed in layer.lora_A["default"]:
            before = layer.delta("weight").clone()
            with torch.no_grad():
                layer.lora_A["default"][changed].add_(1.0)
            moved = layer.delta("weight") != before
            offset = 0
            for piece in layer.spec.params[0].pieces:
                tile = moved[offset : offset + piece.numel]
                assert bool(tile.any()) == (piece.block == changed)
                offset += piece.numel
    assert layers or "1o" not in str(model)


def test_usable_under_ema_and_swa(model):
    from torch.optim.swa_utils import AveragedModel
    from torch_ema import ExponentialMovingAverage

    adapted(model)
    batch = molecules()
    expected = energy_forces(model, batch)
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    torch.testing.assert_close(energy_forces(averaged.module, batch)[0], expected[0])
    ema = ExponentialMovingAverage([p for p in model.parameters() if p.requires_grad], decay=0.5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    assert not torch.allclose(energy_forces(model, batch)[0], expected[0])
    with ema.average_parameters():
        torch.testing.assert_close(energy_forces(model, batch)[0], expected[0])


def test_preset_upstream_adapts_what_mace_adapts():
    from mace.modules.lora import inject_LoRAs

    model = build_mace()
    theirs = inject_LoRAs(copy.deepcopy(model), rank=2)
    reached = {
        n.removesuffix(".base") for n, m in theirs.named_modules() if n.endswith(".base") and hasattr(m, "weight")
    }
    apply_lora(model, LoraConfig(rank=2, preset="upstream"))
    assert {r.module for r in coverage(model).rows} == reached


@pytest.mark.parametrize(
    ("n_elements", "trainable", "total"), [(2, 161_896, 655_256), (3, 175_880, 751_896), (4, 189_864, 848_536)]
)
def test_published_parameter_counts(n_elements, trainable, total):
    """MACE-OFF23-medium; counts from the published logs of ELoRA (ICML 2025)."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        model = build_mace(
            "agnostic", "128x0e+128x1o", max_ell=3, correlation=3, zs=(1, 6, 7, 8)[:n_elements],
            num_bessel=8, radial_MLP=[64, 64, 64], MLP_irreps=o3.Irreps("16x0e"), r_max=5.0,
        )  # fmt: skip
    finally:
        torch.set_default_dtype(before)
    apply_lora(model, LoraConfig(rank=16, alpha=16, preset="degree_parity"))
    report = coverage(model)
    assert (report.trainable, report.total) == (trainable, total)
