"""Refit of the energy references: exact on exact data, part of the adapter, never of the gradient."""

import copy

import numpy as np
import pytest
import torch
from models import build_mace, energy_forces, molecules, randomise

pytest.importorskip("mace")

from mace_lora import LoraConfig, apply_lora, fingerprint, load_adapter, merge_lora, save_adapter
from mace_lora.lora.energies import MODULE, fit_references, reference_plan, solve_offsets
from mace_lora.lora.inject import apply_plan, disabled_adapters, plan_lora
from mace_lora.mace_plugin.evaluation import spread

pytestmark = [pytest.mark.mace, pytest.mark.usefixtures("double")]


def test_offsets_of_mixed_compositions_are_exact():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 9, (30, 3)).astype(float)
    offsets = np.array([0.3, -0.1, 0.02])
    assert solve_offsets(counts, counts @ offsets) == pytest.approx(offsets, abs=1e-12)


def test_one_composition_shifts_only_itself():
    counts = np.tile([6.0, 2.0, 1.0, 0.0], (20, 1))
    residual = 0.05 + 0.01 * np.random.default_rng(0).normal(size=20)
    offsets = solve_offsets(counts, residual)
    assert np.mean(residual - counts @ offsets) == pytest.approx(0.0, abs=1e-12)
    assert offsets[3] == 0.0
    assert np.abs(offsets).max() < 0.05


def test_combinations_that_the_data_hardly_determines_stay_at_zero():
    """CH2 units almost fix the ratio of C and H: noise must not become large opposite offsets."""
    rng = np.random.default_rng(1)
    carbon = np.arange(4, 24)
    counts = np.stack([2.0 * carbon + (carbon % 2 == 0), carbon], 1)
    residual = 0.002 * counts.sum(1) + 0.01 * rng.normal(size=20)
    assert np.abs(solve_offsets(counts, residual)).max() < 0.006


def test_combinations_that_the_data_hardly_determines_are_fitted_where_another_method_is_seen():
    """Alcohols: without it, eV per atom of the total energies would stay for the network to learn."""
    carbon = np.arange(1, 11)
    counts = np.stack([2.0 * carbon + 2, carbon, np.ones(10)], 1)  # H, C, O
    offsets = np.array([-13.6, -1030.0, -2042.0])
    rng = np.random.default_rng(1)
    residual = counts @ offsets + 0.01 * counts.sum(1) * rng.normal(size=10)
    left = (residual - counts @ solve_offsets(counts, residual)) / counts.sum(1)
    assert np.sqrt(np.mean(left**2)) < 0.015


@pytest.mark.parametrize("count", [5, 25, 100])
def test_noise_is_no_other_method(count):
    """An untrained model's errors of 0.3 eV/atom on cells of nearly one composition."""
    rng, largest = np.random.default_rng(2), []
    for _ in range(50):
        counts = np.stack([20 + rng.integers(-1, 2, count), 40 + rng.integers(-1, 2, count)], 1).astype(float)
        largest.append(np.abs(solve_offsets(counts, 0.3 * counts.sum(1) * rng.normal(size=count))).max())
    assert np.quantile(largest, 0.9) < 1.0


def test_no_frames_no_offsets():
    assert (solve_offsets(np.zeros((0, 3)), np.zeros(0)) == 0).all()


def frames(model, heads, offsets):
    """Graphs labelled with the model's energies plus offsets of the elements, per head."""
    import ase
    from mace import data
    from mace.tools import AtomicNumberTable, torch_geometric

    rng, out = np.random.default_rng(0), []
    keys = data.utils.KeySpecification(info_keys={"energy": "REF_energy"}, arrays_keys={})
    for i in range(12):
        numbers = rng.choice([1, 6, 8], 5)
        head = heads[i % len(heads)]
        line = 1.3 * np.arange(5)[:, None] * [1, 0, 0]
        atoms = ase.Atoms(numbers, positions=line + rng.normal(scale=0.15, size=(5, 3)))
        atoms.info["REF_energy"] = 0.0
        config = data.config_from_atoms(atoms, key_specification=keys, head_name=head)
        item = data.AtomicData.from_config(config, z_table=AtomicNumberTable([1, 6, 8]), cutoff=4.0, heads=heads)
        energy = model(torch_geometric.Batch.from_data_list([item]).to_dict(), compute_force=False)["energy"].detach()
        shift = sum(offsets[heads.index(head)][[1, 6, 8].index(int(z))] for z in numbers)
        item.energy = energy[0] + shift
        out.append(item)
    return out


@pytest.mark.parametrize("heads", [("Default",), ("a", "b")])
def test_fit_is_exact_and_belongs_to_the_adapter(heads, tmp_path):
    model = build_mace(hidden="4x0e", heads=heads)
    base = copy.deepcopy(model)
    config = LoraConfig(rank=2)
    apply_plan(model, [*plan_lora(model, config), reference_plan()], config)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert not any(MODULE in n for n in trained)
    randomise(model, std=0.003)
    offsets = [[0.1, -0.2, 0.3], [-0.4, 0.5, 0.05]][: len(heads)]
    before = fingerprint(model)
    fit = fit_references(model, "default", frames(model, list(heads), offsets), range(12))
    assert fit.frames == 12
    assert fit.before > 0.05
    assert fit.after < 1e-10
    update = model.get_submodule(MODULE).lora_dense["default"]["atomic_energies"]
    assert update.reshape(len(heads), 3).numpy(force=True) == pytest.approx(np.array(offsets), abs=1e-9)
    assert fingerprint(model) == before == fingerprint(base)
    batch = molecules()
    with disabled_adapters(model):
        torch.testing.assert_close(energy_forces(model, batch), energy_forces(base, batch), atol=1e-12, rtol=0)
    save_adapter(model, tmp_path / "adapter", config=config, dtype=torch.float64)
    again = load_adapter(copy.deepcopy(base), tmp_path / "adapter")
    expected = energy_forces(model, batch)
    torch.testing.assert_close(energy_forces(again, batch), expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(energy_forces(merge_lora(again), batch), expected, atol=1e-10, rtol=0)


def test_unlabelled_frames_do_not_count():
    model = build_mace(hidden="4x0e")
    apply_plan(model, [*plan_lora(model, LoraConfig(rank=2)), reference_plan()], LoraConfig(rank=2))
    dataset = frames(model, ["Default"], [[0.1, 0.1, 0.1]])
    for item in dataset[1:]:
        item.energy_weight = torch.zeros(())
    assert fit_references(model, "default", dataset, range(12)).frames == 1
    dataset[0].energy_weight = torch.zeros(())
    assert fit_references(model, "default", dataset, range(12)) is None


def test_not_part_of_plain_lora():
    model = apply_lora(build_mace(hidden="4x0e"), LoraConfig(rank=2))
    assert not any(n.startswith(f"{MODULE}.lora") for n, _ in model.named_parameters())


def test_every_head_gets_its_frames():
    model = build_mace(hidden="4x0e", heads=("a", "b"))
    mixed = frames(model, ["a", "b"], [[0.0] * 3] * 2)
    few = [f for f in mixed if int(f.head) == 1][:2]
    many = [f for f in mixed if int(f.head) == 0] * 20
    chosen = spread(many + few, 10)
    assert chosen[-2:] == [len(many), len(many) + 1]
    assert len(chosen) == 12
    assert max(np.diff(chosen[:10])) <= 14
