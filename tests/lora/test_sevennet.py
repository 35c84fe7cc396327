"""The upstream-agnostic core on SevenNet-0, the real checkpoint from sevenn's wheel."""

import pytest
import torch

pytest.importorskip("sevenn")

from ase.build import bulk
from e3nn import o3

from mace_lora import (
    LoraConfig,
    apply_lora,
    coverage,
    disabled_adapters,
    fingerprint,
    load_adapter,
    merge_lora,
    save_adapter,
)


@pytest.fixture(autouse=True, scope="module")
def float32():
    """SevenNet builds its model in the default precision, which other tests change."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


def foundation(name: str = "7net-0"):
    from sevenn.checkpoint import SevenNetCheckpoint
    from sevenn.util import pretrained_name_to_path

    model = SevenNetCheckpoint(pretrained_name_to_path(name)).build_model().eval()
    model.set_is_batch_data(False)
    return model


def energy_forces(model, rotation=None):
    """Energy (eV) and forces (atoms, 3) in eV/Å of distorted copper, by SevenNet's own calculator."""
    from sevenn.calculator import SevenNetCalculator

    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=1)
    if rotation is not None:
        atoms.set_cell(atoms.cell @ rotation.T, scale_atoms=True)
    atoms.calc = SevenNetCalculator(model, device="cpu")
    return atoms.get_potential_energy(), torch.tensor(atoms.get_forces()).double()


def test_as_a_labeler():
    """equitune label --with sevennet:NAME: SevenNet's own values, forces that are -dE/dx, stress where periodic."""
    from mace_lora.augment import open_labeler

    labeler, atoms = open_labeler("sevennet:7net-0"), bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=1)
    labels = labeler.label(atoms)
    energy, forces = energy_forces("7net-0")
    assert labels.energy == pytest.approx(energy, abs=1e-5) and labels.stress is not None
    assert torch.allclose(torch.tensor(labels.forces).double(), forces, atol=1e-5)
    energies = []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.positions[0, 0] += sign * 0.01
        energies.append(labeler.label(moved).energy)
    assert labels.forces[0, 0] == pytest.approx(-(energies[0] - energies[1]) / 0.02, abs=5e-3)  # float32


@pytest.fixture(scope="module")
def base():
    return foundation()


def adapted():
    """SevenNet-0 with a non-zero adapter; built anew, since models with compiled e3nn code cannot be copied."""
    model = apply_lora(foundation(), LoraConfig(rank=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                p.copy_(0.05 * torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def tuned():
    return adapted()


def test_every_irrep_of_every_layer_is_reached(tuned):
    table = coverage(tuned)
    assert {r.irreps for r in table.rows if r.irreps} == {"0e", "1e", "2e"}
    assert {r.kind for r in table.rows} == {"o3.Linear", "e3nn MLP", "Bessel basis"}
    left = {r.module.rpartition(".")[2] for r in table.unreached}
    assert left == {"denominator", "shift", "scale"}


def test_identity_and_what_trains(base):
    model = apply_lora(foundation(), LoraConfig(rank=4))
    assert fingerprint(model) == fingerprint(base)
    assert all(".lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    for a, b in zip(energy_forces(model), energy_forces(base), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-6)


def test_merge_and_disable(base, tuned):
    before, after = energy_forces(base), energy_forces(tuned)
    assert (after[1] - before[1]).abs().max() > 1e-3
    with disabled_adapters(tuned):
        torch.testing.assert_close(energy_forces(tuned), before, atol=1e-5, rtol=1e-6)
    merged = merge_lora(adapted())
    assert [n for n, _ in merged.named_parameters()] == [n for n, _ in base.named_parameters()]
    torch.testing.assert_close(energy_forces(merged), after, atol=1e-4, rtol=1e-5)


def test_rotation_and_inversion(tuned):
    energy, forces = energy_forces(tuned)
    torch.manual_seed(0)
    for sign in (1.0, -1.0):
        rotation = sign * o3.rand_matrix().double()
        turned = energy_forces(tuned, rotation.numpy())
        assert turned[0] == pytest.approx(energy, abs=1e-4)
        torch.testing.assert_close(turned[1], forces @ rotation.T, atol=1e-3, rtol=0)  # float32


def test_adapter_file(tuned, tmp_path):
    save_adapter(tuned, tmp_path)
    again = load_adapter(foundation(), tmp_path)
    torch.testing.assert_close(energy_forces(again), energy_forces(tuned), atol=1e-5, rtol=1e-6)
    with pytest.raises(ValueError, match="trained on another base model"):
        load_adapter(foundation("7net-l3i5"), tmp_path)
