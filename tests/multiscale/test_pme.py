"""Learned charges and their Coulomb energy beyond the long cutoff."""

import copy

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

pytest.importorskip("mace")
pytest.importorskip("torchpme")

from mace.calculators import MACECalculator
from models import build_mace
from test_multiscale_model import box, evaluate

from mace_lora.multiscale import LongPath, to_multiscale
from mace_lora.multiscale.pme import pme_calculator

SHORT, LONG, COULOMB = 2.5, 5.0, 14.399645478425667
pytestmark = pytest.mark.usefixtures("double")


def build(zs=(1, 6, 8), zero=False, **options):
    torch.manual_seed(1)
    sizes = LongPath(num_channels_long=4)
    return to_multiscale(build_mace(r_max=SHORT, zs=zs), LONG, sizes, zero=zero, long_range="pme", **options)


def only_charges(sodium: float, chlorine: float):
    """Sodium and chlorine without anything but what they exchange by their chi."""
    model = build(zs=(11, 17))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.atomic_energies_fn.atomic_energies.zero_()
        model.charges.element.copy_(torch.tensor([sodium, chlorine]))
    return model


class FixedCharges(torch.nn.Module):
    """Charges of the elements, whatever is near."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(values))

    def forward(self, node_attrs, *_):
        return node_attrs @ self.weight


def charges_of(model, *frames: Atoms) -> torch.Tensor:
    seen = []
    hook = model.charges.register_forward_hook(lambda *args: seen.append(args[2].detach()))
    evaluate(model, *frames)
    hook.remove()
    return seen[0]


def energy(model, atoms: Atoms) -> float:
    atoms = atoms.copy()
    atoms.calc = MACECalculator(models=[model], device="cpu", default_dtype="float64")
    return atoms.get_potential_energy()


@pytest.mark.parametrize(("structure", "constant"), [("rocksalt", 1.747564594633), ("cesiumchloride", 1.762674773)])
def test_madelung_constants(structure, constant):
    """Without the exclusion of the near range, the whole Coulomb sum."""
    model = only_charges(-0.5, 0.5)
    model.coulomb.potential.exclusion_radius = None
    lattice = 5.64 if structure == "rocksalt" else 4.1
    crystal = bulk("NaCl", structure, a=lattice).repeat(3)
    start = charges_of(model, crystal)[0].abs()
    with torch.no_grad():  # sodium gives to chlorine: whole ions
        model.charges.element /= start
    whole = [1.0 if s == "Na" else -1.0 for s in crystal.symbols]
    torch.testing.assert_close(charges_of(model, crystal), torch.tensor(whole))
    nearest = lattice / 2 if structure == "rocksalt" else lattice * 3**0.5 / 2
    per_pair = energy(model, crystal) / 27
    assert per_pair == pytest.approx(-constant * COULOMB / nearest, rel=2e-5)


def test_separated_ions_where_a_cutoff_must_fail():
    """Beyond r_max the energy is the whole Coulomb energy; within it, less and less of it is counted."""
    side = 24.0

    def pair(model, distance: float) -> float:
        place = [[12 - distance / 2, 12, 12], [12 + distance / 2, 12, 12]]
        return energy(model, Atoms("NaCl", positions=place, cell=[side] * 3, pbc=True))

    model, whole = only_charges(0.0, 0.0), only_charges(0.0, 0.0)
    for each in (model, whole):  # ions this far apart have no neighbour to exchange charge with
        each.charges = FixedCharges(0.5, -0.5)
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


def test_float32_while_float64_is_the_default():
    model, atoms = build(), box()
    values = {}
    for dtype in ("float64", "float32"):
        atoms.calc = MACECalculator(models=[copy.deepcopy(model)], device="cpu", default_dtype=dtype)
        torch.set_default_dtype(torch.float64)  # as a script may have done
        values[dtype] = (atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress())
    for exact, rounded in zip(*values.values(), strict=True):
        np.testing.assert_allclose(rounded, exact, atol=2e-5)


def test_separated_dipoles_where_a_cutoff_must_fail():
    """Two polar molecules beyond r_max: their learned charges attract as two dipoles do."""
    side, bond = 26.0, 2.4
    model, whole = only_charges(-10.0, 10.0), only_charges(0.0, 0.0)
    one = Atoms("NaCl", positions=[[15, 15, 5], [15, 15, 5 + bond]], cell=[side] * 3, pbc=True)
    charge = float(charges_of(model, one)[0])
    assert charge > 0.1
    whole.charges = FixedCharges(charge, -charge)
    whole.coulomb.potential.exclusion_radius = None

    def attraction(model, distance: float) -> float:
        other = one.copy()
        other.translate([0, 0, distance])
        return energy(model, one + other) - 2 * energy(model, one)

    mine, full = (np.array([attraction(m, d) for d in (9.0, 11.0)]) for m in (model, whole))
    np.testing.assert_allclose(mine, full, atol=1e-5)
    assert mine[0] < mine[1] - 0.01 < -0.02
    vacuum = COULOMB * charge**2 * (2 / 9 - 1 / (9 - bond) - 1 / (9 + bond))
    images = -4 * np.pi * COULOMB * (charge * bond) ** 2 / (3 * side**3)  # Lorentz field
    assert full[0] == pytest.approx(vacuum + images, rel=0.1)


def test_charges_are_neutral_and_batches_are_independent():
    model = build()
    with torch.no_grad():
        model.charges.element.copy_(torch.tensor([0.4, 0.1, -0.8]))
    one, two = box(0), box(5)
    both = evaluate(model, one, two)
    for i, atoms in enumerate((one, two)):
        torch.testing.assert_close(evaluate(model, atoms)["energy"][0], both["energy"][i])
    charges = charges_of(model, one, two)
    torch.testing.assert_close(both["charges"], charges)
    assert both["energy_coulomb"].abs().min() > 1e-6 and not both["charges"].requires_grad
    for parameter in model.charges.parameters():
        parameter.data.zero_()
    without = evaluate(model, one, two)
    torch.testing.assert_close(both["energy"] - without["energy"], both["energy_coulomb"])
    assert charges[:9].sum().abs() < 1e-12 and charges[9:].sum().abs() < 1e-12
    assert charges.abs().max() > 0.01


def test_far_fragments_do_not_change_each_other():
    """Each is neutral, keeps its charges beside the other, and a lone atom has none: the energy is additive."""
    model = build()
    with torch.no_grad():
        model.charges.element.copy_(torch.tensor([0.4, 0.1, -0.8]))

    def boxed(*parts: Atoms) -> Atoms:
        together = sum(parts[1:], parts[0].copy())
        together.set_cell([26.0] * 3)
        together.pbc = True
        return together

    methane, dioxide, atom = molecule("CH4"), molecule("CO2"), Atoms("O")
    dioxide.positions += [13.0, 0, 0]
    atom.positions += [0, 13.0, 13.0]
    alone = [boxed(part) for part in (methane, dioxide, atom)]
    all_of_them = boxed(methane, dioxide, atom)
    charges = charges_of(model, all_of_them)
    torch.testing.assert_close(charges, torch.cat([charges_of(model, part) for part in alone]))
    shares = charges.split([5, 3, 1])
    assert max(abs(float(share.sum())) for share in shares) < 1e-12
    assert shares[0].abs().max() > 0.01 and shares[1].abs().max() > 0.01 and shares[2].abs().max() == 0
    assert energy(model, all_of_them) == pytest.approx(sum(energy(model, part) for part in alone), abs=1e-6)


@pytest.mark.parametrize("cutoff", [SHORT, LONG])
def test_smooth_at_both_cutoffs(cutoff):
    """E, F and dF/dx are continuous where a neighbour enters the exclusion and the exchange of charges."""
    model, eps = build(), 1e-5
    with torch.no_grad():
        model.charges.element.copy_(torch.tensor([3.0, 1.0, -4.0]))

    def at(distance: float) -> tuple[float, float]:
        places = np.array([[0, 0, 0], [0, 0, distance], [0, 1.0, 0], [1.0, 0, distance]]) + [5.1, 5.2, 3.3]
        out = evaluate(model, Atoms("COHH", positions=places, cell=[12.0, 12.5, 13.0], pbc=True))
        return float(out["energy"].detach()), float((out["forces"][1, 2] + out["forces"][3, 2]).detach())

    points = [at(cutoff + k * eps) for k in (-2, -1, 1, 2)]
    energies, forces = zip(*points, strict=True)
    assert abs(energies[2] - energies[1] + 2 * eps * forces[1]) < 1e-8
    slopes = [(forces[1] - forces[0]) / eps, (forces[3] - forces[2]) / eps]
    assert abs(slopes[1] - slopes[0]) < 1e-2
    assert abs(forces[2] - forces[1]) < 3 * eps * max(1.0, abs(slopes[0]))


def test_starts_nearly_as_the_short_model_and_learns():
    short = build_mace(r_max=SHORT)
    model = to_multiscale(short, LONG, LongPath(num_channels_long=4), long_range="pme")
    mine, theirs = evaluate(model, box()), evaluate(short, box())
    assert (mine["energy"] - theirs["energy"]).abs().max() < 1e-4
    assert (mine["forces"] - theirs["forces"]).abs().max() < 1e-4
    evaluate(model, box(), training=True)["energy"].sum().backward()
    assert model.charges.element.grad.abs().max() > 0


@pytest.mark.parametrize("asked", ["compute_edge_forces", "compute_atomic_stresses"])
def test_sums_over_edges_are_refused(asked):
    """Edges lack the forces of the mesh, so that these would be wrong without a word."""
    with pytest.raises(ValueError, match="long_range pme: expected compute_edge_forces and compute_atomic_stresses"):
        evaluate(build(), box(), compute_stress=True, **{asked: True})


def test_files_with_other_charges_are_refused(tmp_path):
    model = build()
    torch.save(model, tmp_path / "new.model")
    again = torch.load(tmp_path / "new.model", weights_only=False)
    torch.testing.assert_close(evaluate(again, box())["forces"], evaluate(model, box())["forces"])
    del model.charges._buffers["neighbors"]
    torch.save(model, tmp_path / "old.model")
    with pytest.raises(ValueError, match="got one of an earlier version, whose charges have another meaning"):
        torch.load(tmp_path / "old.model", weights_only=False)


def test_bad_input():
    slab = box()
    slab.pbc = [True, True, False]
    with pytest.raises(ValueError, match="expected frames that are periodic in all directions"):
        energy(build(), slab)
    with pytest.raises(ValueError, match="long_range: expected none or pme, got 'ewald'"):
        to_multiscale(build_mace(r_max=SHORT), LONG, long_range="ewald")
    with pytest.raises(ValueError, match=r"pme_smearing: expected a length above 0 and at most 1.25 Å"):
        build(pme_smearing=3.0)


@pytest.mark.parametrize("skew", [0.0, 0.4])
def test_the_mesh_is_not_felt(skew):
    """No jumps where an atom comes nearer to another mesh point or the mesh changes; no net force."""
    torch.manual_seed(0)
    coulomb, side = pme_calculator(6.0, 1.0).double(), 14.0  # 64 mesh points up to 15.75 Å, then 128
    cell = side * torch.tensor([[1.0, 0, 0], [skew, (1 - skew**2) ** 0.5, 0], [0, 0, 1.0]])
    places, charges = side * torch.rand(20, 3), 0.3 * torch.randn(20)
    charges -= charges.mean()
    none = torch.zeros((0, 2), dtype=torch.long), torch.zeros(0)

    def at(x: float, scale: float = 1.0) -> tuple[float, torch.Tensor]:
        moved = places.clone()
        moved[0] = x / side * cell[0]
        moved = (scale * moved).requires_grad_(True)
        potential = coulomb(charges[:, None], scale * cell, moved, *none)
        total = (charges * potential[:, 0]).sum()
        return float(total.detach()), torch.autograd.grad(total, moved)[0]

    step = 1e-7
    for odd in (1, 3, 5):
        (low, low_slope), (high, high_slope) = (at(odd * side / 128 + sign * step) for sign in (-1, 1))
        assert high - low == pytest.approx(step * float(low_slope[0, 0] + high_slope[0, 0]), abs=1e-10)
        torch.testing.assert_close(high_slope, low_slope, atol=2e-6, rtol=0)
        assert high_slope.sum(0).abs().max() < 2e-5
    border = 15.75 / side
    (low, _), (high, _) = (at(3.0, border * (1 + sign * 1e-8)) for sign in (-1, 1))
    assert abs(high - low) < 2e-6 * len(charges)
