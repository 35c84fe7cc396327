"""Learned charges and their Coulomb energy beyond the long cutoff."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

pytest.importorskip("mace")
pytest.importorskip("torchpme")

from mace.calculators import MACECalculator
from models import build_mace
from test_multiscale_model import box, evaluate

from mace_lora.multiscale import LongPath, to_multiscale

SHORT, LONG, COULOMB = 2.5, 5.0, 14.399645478425667
pytestmark = pytest.mark.usefixtures("double")


def build(zs=(1, 6, 8), zero=False, **options):
    torch.manual_seed(1)
    sizes = LongPath(num_channels_long=4)
    return to_multiscale(build_mace(r_max=SHORT, zs=zs), LONG, sizes, zero=zero, long_range="pme", **options)


def only_charges(*values: float):
    """Sodium and chlorine with fixed charges, and nothing else."""
    model = build(zs=(11, 17))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.atomic_energies_fn.atomic_energies.zero_()
        model.charges.element.copy_(torch.tensor(values))
    return model


def energy(model, atoms: Atoms) -> float:
    atoms = atoms.copy()
    atoms.calc = MACECalculator(models=[model], device="cpu", default_dtype="float64")
    return atoms.get_potential_energy()


@pytest.mark.parametrize(("structure", "constant"), [("rocksalt", 1.747564594633), ("cesiumchloride", 1.762674773)])
def test_madelung_constants(structure, constant):
    """Without the exclusion of the near range, the whole Coulomb sum."""
    model = only_charges(1.0, -1.0)
    model.coulomb.potential.exclusion_radius = None
    lattice = 5.64 if structure == "rocksalt" else 4.1
    crystal = bulk("NaCl", structure, a=lattice).repeat(3)
    nearest = lattice / 2 if structure == "rocksalt" else lattice * 3**0.5 / 2
    per_pair = energy(model, crystal) / 27
    assert per_pair == pytest.approx(-constant * COULOMB / nearest, rel=2e-5)


def test_separated_ions_where_a_cutoff_must_fail():
    """Beyond r_max the energy is the whole Coulomb energy; within it, less and less of it is counted."""
    side = 24.0

    def pair(model, distance: float) -> float:
        place = [[12 - distance / 2, 12, 12], [12 + distance / 2, 12, 12]]
        return energy(model, Atoms("NaCl", positions=place, cell=[side] * 3, pbc=True))

    model, whole = only_charges(0.5, -0.5), only_charges(0.5, -0.5)
    whole.coulomb.potential.exclusion_radius = None
    bare = to_multiscale(build_mace(r_max=SHORT, zs=(11, 17)), LONG, LongPath(num_channels_long=4), zero=False)
    separations = (5.2, 7.0, 10.0)
    mine, full, flat = (np.array([pair(m, d) for d in separations]) for m in (model, whole, bare))
    np.testing.assert_allclose(mine, full, atol=1e-4)
    assert np.ptp(mine) > 0.2
    assert np.ptp(flat) < 1e-9  # any finite cutoff
    images = 2 * np.pi * COULOMB * (0.5 * np.array(separations)) ** 2 / (3 * side**3)  # Makov and Payne 1995
    vacuum = -0.25 * COULOMB / np.array(separations) - images
    np.testing.assert_allclose(full, vacuum, rtol=0.05)
    shares = [pair(model, d) / pair(whole, d) for d in (1.0, 2.5, 4.0)]
    assert shares[0] < 0.2 < shares[1] < 0.7 < shares[2] < 1.0


def test_forces_stress_and_smoothness():
    model, atoms, h = build(), box(), 1e-5
    with torch.no_grad():
        model.charges.element.copy_(torch.tensor([0.4, 0.1, -0.8]))
    atoms.calc = MACECalculator(models=[model], device="cpu", default_dtype="float64")
    forces, stress = atoms.get_forces(), atoms.get_stress()
    for atom, axis in ((0, 0), (8, 2)):
        values = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[atom, axis] += sign * h
            values.append(energy(model, moved))
        assert forces[atom, axis] == pytest.approx(-(values[0] - values[1]) / (2 * h), abs=1e-6)
    for component, strain in ((0, np.diag([1.0, 0, 0])), (3, np.array([[0, 0, 0], [0, 0, 0.5], [0, 0.5, 0]]))):
        values = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.set_cell(atoms.cell.array @ (np.eye(3) + sign * h * strain), scale_atoms=True)
            values.append(energy(model, moved))
        expected = (values[0] - values[1]) / (2 * h * atoms.get_volume())
        assert stress[component] == pytest.approx(expected, abs=1e-6)


def test_charges_are_neutral_and_batches_are_independent():
    model = build()
    with torch.no_grad():
        model.charges.element.copy_(torch.tensor([0.4, 0.1, -0.8]))
    one, two = box(0), box(5)
    both = evaluate(model, one, two)
    for i, atoms in enumerate((one, two)):
        torch.testing.assert_close(evaluate(model, atoms)["energy"][0], both["energy"][i])
    features = torch.randn(9, 4)
    batch = torch.tensor([0] * 5 + [1] * 4)
    attrs = torch.eye(3)[torch.randint(0, 3, (9,))]
    charges = model.charges(attrs, features, batch)
    assert charges[:5].sum().abs() < 1e-12 and charges[5:].sum().abs() < 1e-12
    assert charges.abs().max() > 0.01


def test_starts_nearly_as_the_short_model_and_learns():
    short = build_mace(r_max=SHORT)
    model = to_multiscale(short, LONG, LongPath(num_channels_long=4), long_range="pme")
    mine, theirs = evaluate(model, box()), evaluate(short, box())
    assert (mine["energy"] - theirs["energy"]).abs().max() < 1e-4
    assert (mine["forces"] - theirs["forces"]).abs().max() < 1e-4
    evaluate(model, box(), training=True)["energy"].sum().backward()
    assert model.charges.element.grad.abs().max() > 0


def test_bad_input():
    slab = box()
    slab.pbc = [True, True, False]
    with pytest.raises(ValueError, match="expected frames that are periodic in all directions"):
        energy(build(), slab)
    with pytest.raises(ValueError, match="long_range: expected none or pme, got 'ewald'"):
        to_multiscale(build_mace(r_max=SHORT), LONG, long_range="ewald")
    with pytest.raises(ValueError, match=r"pme_smearing: expected a length above 0 and at most 1.25 Å"):
        build(pme_smearing=3.0)
