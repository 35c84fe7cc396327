"""MultiScaleMACE: reductions to MACE, symmetries, smoothness at both cutoffs, extensivity."""

import copy

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

pytest.importorskip("mace")

from e3nn.util import jit
from mace import data, tools
from mace.calculators import MACECalculator
from mace.tools import torch_geometric
from models import build_mace
from scipy.spatial.transform import Rotation

from mace_lora.multiscale import LongPath, MultiScaleMACE, build_long, to_multiscale
from mace_lora.multiscale.rebuild import attach_long, stock_paths

SHORT, LONG = 2.5, 5.0
ZS = (1, 6, 8)
pytestmark = pytest.mark.usefixtures("double")


def build(coupling: str = "sum", family: str = "agnostic", sizes: LongPath | None = None, **changes) -> MultiScaleMACE:
    """A small model whose two paths both contribute; "split sum": the long one leaves near neighbours out."""
    torch.manual_seed(1)
    short = build_mace(family, r_max=SHORT, **changes)
    model = to_multiscale(
        short, LONG, sizes or LongPath(num_channels_long=4), coupling=coupling.removeprefix("split "), zero=False,
        split=coupling.startswith("split "),
    )  # fmt: skip
    if coupling == "fused":
        with torch.no_grad():
            for parameter in model.readouts.parameters():
                parameter.normal_(std=0.3)
    return model


def evaluate(model: torch.nn.Module, *frames: Atoms, **options) -> dict[str, torch.Tensor]:
    """Outputs of the model on a batch, with its own neighbour list."""
    table = tools.AtomicNumberTable([int(z) for z in model.atomic_numbers])
    graphs = [
        data.AtomicData.from_config(data.config_from_atoms(a), z_table=table, cutoff=float(model.r_max)) for a in frames
    ]
    batch = next(iter(torch_geometric.dataloader.DataLoader(graphs, len(graphs), shuffle=False)))
    return model(batch.to_dict(), **options)


def ethanol(seed: int = 0, std: float = 0.1) -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(std, seed=seed)
    return atoms


def box(seed: int = 0) -> Atoms:
    atoms = ethanol(seed)
    atoms.set_cell([6.0, 6.5, 7.0])
    atoms.pbc = True
    return atoms


@pytest.mark.parametrize("coupling", ["sum", "fused"])
@pytest.mark.parametrize("family", ["agnostic", "density"])
def test_starts_as_the_short_model(coupling, family):
    """A zero-initialised long path changes nothing, but it learns: its gradient is not zero."""
    short = build_mace(family, r_max=SHORT)
    model = to_multiscale(short, LONG, LongPath(num_channels_long=4, max_L_long=1), coupling=coupling)
    for atoms in (ethanol(), box()):
        mine, theirs = evaluate(model, atoms, compute_stress=True), evaluate(short, atoms, compute_stress=True)
        for key in ("energy", "forces", "node_energy", *(("stress",) if atoms.pbc.all() else ())):
            torch.testing.assert_close(mine[key], theirs[key], rtol=0, atol=1e-12)
        assert mine["energy_long"].abs().max() == 0
    evaluate(model, ethanol(), training=True)["energy"].sum().backward()
    last = model.readouts[-1].linear_1.weight if coupling == "fused" else model.long.readouts[-1].linear_2.weight
    assert last.grad.abs().max() > 0


def test_contains_mace_of_the_long_cutoff():
    """With the short path silent, it is the MACE of its long path."""
    long = build_mace(r_max=LONG)
    short = build_mace(r_max=LONG)
    with torch.no_grad():
        for readout in short.readouts:
            (readout.linear if hasattr(readout, "linear") else readout.linear_2).weight.zero_()
    model = MultiScaleMACE(short, long)
    mine, theirs = evaluate(model, box(), compute_stress=True), evaluate(long, box(), compute_stress=True)
    for key in ("energy", "forces", "stress"):
        torch.testing.assert_close(mine[key], theirs[key], rtol=0, atol=1e-12)


def test_fused_readouts_leave_nothing_unused():
    """Parameters without a gradient would stop distributed training."""
    model = build("fused")
    evaluate(model, ethanol(), training=True)["forces"].square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.numel() and p.grad is None]
    with pytest.raises(ValueError, match="this model's readouts cannot be fused; expected sum"):
        to_multiscale(build_mace("nonlinear", r_max=SHORT), LONG, LongPath(num_channels_long=4), coupling="fused")


def test_split_long_path_sees_no_near_neighbours():
    """Weight u(r)(1 - S(r)): nothing at 0, all of u beyond the short cutoff; adapters tell the two models apart."""
    from mace_lora.lora.fingerprint import fingerprint

    plain, split = build(), build("split sum")
    old, new = (m.long.radial_embedding.cutoff_fn for m in (plain, split))
    r = torch.tensor([[1e-3], [0.9], [SHORT], [3.5], [LONG]])
    assert float(new(r)[0]) < 1e-12 and 0 < float(new(r)[1]) < 0.2 * float(old(r)[1])
    torch.testing.assert_close(new(r)[2:], old(r)[2:])
    assert fingerprint(plain) != fingerprint(split)
    pair = [Atoms("CO", [[0, 0, 0], [0, 0, d]]) for d in (0.2, 3.0)]
    shares = [evaluate(m, *pair)["energy_long"].abs() for m in (plain, split)]
    assert shares[1][0] < 1e-3 * shares[0][0] and shares[1][1] > 1e-6


def test_energies_are_split():
    model = build()
    out = evaluate(model, ethanol(), box(1))
    total = out["energy_short"] + out["energy_long"]
    torch.testing.assert_close(total, out["interaction_energy"])
    alone = copy.deepcopy(model)
    with torch.no_grad():
        for readout in alone.long.readouts:
            (readout.linear if hasattr(readout, "linear") else readout.linear_2).weight.zero_()
    torch.testing.assert_close(evaluate(alone, ethanol(), box(1))["interaction_energy"], out["energy_short"])
    assert out["energy_long"].abs().min() > 1e-4


@pytest.mark.parametrize("coupling", ["sum", "fused", "split sum"])
def test_symmetries(coupling):
    """Rotation with inversion, translation, renumbering."""
    model, atoms = build(coupling), ethanol()
    turn = -Rotation.random(random_state=3).as_matrix()
    moved = atoms.copy()
    moved.positions = moved.positions @ turn.T + [1.0, -2.0, 0.5]
    order = np.random.default_rng(0).permutation(len(atoms))
    a, b, c = (evaluate(model, x) for x in (atoms, moved, atoms[order]))
    torch.testing.assert_close(a["energy"], b["energy"])
    torch.testing.assert_close(a["forces"] @ torch.tensor(turn).T, b["forces"])
    torch.testing.assert_close(a["energy"], c["energy"])
    torch.testing.assert_close(a["forces"][order], c["forces"])


@pytest.mark.parametrize("coupling", ["sum", "fused", "split sum"])
def test_forces_and_stress_are_derivatives(coupling):
    model, atoms, h = build(coupling), box(), 1e-5
    calculator = MACECalculator(models=[model], device="cpu", default_dtype="float64")
    atoms.calc = calculator
    forces, stress = atoms.get_forces(), atoms.get_stress()

    def energy(frame: Atoms) -> float:
        frame.calc = calculator
        return frame.get_potential_energy()

    for atom, axis in ((0, 0), (4, 1), (8, 2)):
        values = []
        for sign in (1, -1):
            frame = atoms.copy()
            frame.positions[atom, axis] += sign * h
            values.append(energy(frame))
        assert forces[atom, axis] == pytest.approx(-(values[0] - values[1]) / (2 * h), abs=1e-6)
    values = []
    for sign in (1, -1):
        frame = atoms.copy()
        frame.set_cell(np.diag([1 + sign * h, 1, 1]) @ atoms.cell.array, scale_atoms=True)
        values.append(energy(frame))
    assert stress[0] == pytest.approx((values[0] - values[1]) / (2 * h * atoms.get_volume()), abs=1e-7)


@pytest.mark.parametrize("cutoff", [SHORT, LONG])
@pytest.mark.parametrize("coupling", ["sum", "fused", "split sum"])
def test_smooth_at_both_cutoffs(cutoff, coupling):
    """E, F and dF/dx are continuous where a neighbour enters the short or the long range."""
    model = build(coupling)

    def at(distance: float) -> tuple[float, float]:
        out = evaluate(model, Atoms("COH", positions=[[0, 0, 0], [0, 0, distance], [0, 1.0, 0]]))
        return float(out["energy"]), float(out["forces"][1, 2])

    eps = 1e-5
    points = [at(cutoff + k * eps) for k in (-2, -1, 1, 2)]
    energies, forces = zip(*points, strict=True)
    assert abs(energies[2] - energies[1] + 2 * eps * forces[1]) < 1e-9
    assert abs(forces[2] - forces[1]) < 1e-4
    slopes = [(forces[1] - forces[0]) / eps, (forces[3] - forces[2]) / eps]
    assert abs(slopes[1] - slopes[0]) < 1e-2
    assert abs(at(LONG - 1.5)[1]) > 1e-6  # beyond the short range the atom is felt


def test_range_is_the_long_one():
    model = build()
    pair = [Atoms("CO", positions=[[0, 0, 0], [0, 0, d]]) for d in (LONG - 0.5, LONG + 0.1)]
    near, far = (evaluate(model, a) for a in pair)
    apart = sum(float(evaluate(model, Atoms(s))["energy"]) for s in "CO")
    assert abs(float(near["energy"]) - apart) > 1e-7
    assert float(far["energy"]) == pytest.approx(apart, abs=1e-12)
    assert float(near["energy_short"]) == pytest.approx(float(far["energy_short"]), abs=1e-12)


def test_extensive_and_isolated_atoms():
    model, atoms = build(), ethanol()
    twice = atoms.copy()
    other = atoms.copy()
    other.translate([40.0, 0, 0])
    twice += other
    one, two = evaluate(model, atoms), evaluate(model, twice)
    torch.testing.assert_close(2 * one["energy"], two["energy"])
    torch.testing.assert_close(torch.cat([one["forces"]] * 2), two["forces"])
    batch = evaluate(model, atoms, box(2), ethanol(3))
    torch.testing.assert_close(batch["energy"][0], one["energy"][0])


@pytest.mark.parametrize("coupling", ["sum", "fused", "split sum"])
def test_isolated_atom_is_its_E0(coupling):
    model = build(coupling)
    for index, symbol in enumerate(("H", "C", "O")):
        expected = model.atomic_energies_fn.atomic_energies.reshape(-1)[index : index + 1]
        torch.testing.assert_close(evaluate(model, Atoms(symbol))["energy"], expected)


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ("RealAgnosticResidualInteractionBlock", "RealAgnosticInteractionBlock"),
        ("RealAgnosticDensityResidualInteractionBlock", "RealAgnosticDensityInteractionBlock"),
        ("RealAgnosticResidualNonLinearInteractionBlock", "RealAgnosticDensityInteractionBlock"),
        ("RealAgnosticDensityInteractionBlock", "RealAgnosticDensityInteractionBlock"),
    ],
)
def test_long_path_gives_lone_atoms_nothing(first, expected):
    """Also beside a foundation whose first block has a residual, and with it an energy of lone atoms."""
    from mace.modules import interaction_classes

    family = "nonlinear" if "NonLinear" in first else "agnostic"
    short = build_mace(family, r_max=SHORT, interaction_cls_first=interaction_classes[first])
    model = to_multiscale(short, LONG, LongPath(num_channels_long=4), zero=False)
    assert type(model.long.interactions[0]).__name__ == expected
    assert evaluate(model, ethanol())["energy_long"].abs().max() > 1e-5
    for symbol in ("H", "C", "O"):
        assert evaluate(model, Atoms(symbol))["energy_long"].abs().max() == 0


@pytest.mark.parametrize("option", ["compile_mode", "enable_cueq", "enable_oeq"])
def test_accelerations_of_stock_models_are_refused(option):
    from mace.cli import convert_e3nn_cueq, convert_e3nn_oeq

    from mace_lora.mace_plugin.startup import is_installed

    if not is_installed():
        pytest.skip("the package is not installed")
    model = build()
    convert = {  # what MACECalculator calls where the kernels are installed
        "compile_mode": lambda: MACECalculator(models=[model], device="cpu", compile_mode="default"),
        "enable_cueq": lambda: convert_e3nn_cueq.run(model),
        "enable_oeq": lambda: convert_e3nn_oeq.run(model),
    }
    with pytest.raises(ValueError, match="MultiScaleMACE: MACE rebuilds a model for compile_mode, enable_cueq"):
        convert[option]()


@pytest.mark.parametrize("coupling", ["sum", "fused", "split sum"])
def test_script_and_file(coupling, tmp_path):
    model = build(coupling)
    expected = evaluate(model, box())
    scripted = jit.compile(copy.deepcopy(model))
    torch.jit.save(scripted, tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    torch.save(model, tmp_path / "run.model")
    again = torch.load(tmp_path / "run.model", weights_only=False)
    for other in (loaded, again):
        out = evaluate(other, box())
        torch.testing.assert_close(out["energy"], expected["energy"])
        torch.testing.assert_close(out["forces"], expected["forces"])


def test_single_precision():
    model = build()
    expected = evaluate(model, box())
    torch.set_default_dtype(torch.float32)
    out = evaluate(copy.deepcopy(model).float(), box())
    assert out["forces"].dtype == torch.float32
    torch.testing.assert_close(out["forces"].double(), expected["forces"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("coupling", ["sum", "fused", "split sum"])
def test_taken_apart_and_put_together_for_fewer_elements(coupling):
    model = build(coupling)
    short, long = stock_paths(model)
    assert type(short).__name__ == type(long).__name__ == "ScaleShiftMACE"
    assert float(short.r_max) == SHORT and float(long.r_max) == LONG
    from mace.tools.finetuning_utils import load_foundations_elements
    from mace.tools.scripts_utils import extract_config_mace_model

    elements = [1, 8]
    config = extract_config_mace_model(short) | {"atomic_numbers": elements, "num_elements": 2}
    config["atomic_energies"] = short.atomic_energies_fn.atomic_energies[:, [0, 2]].numpy()
    smaller = load_foundations_elements(
        type(short)(**config), short, tools.AtomicNumberTable(elements), load_readout=True, max_L=1
    )
    rebuilt = attach_long(smaller, model, elements)
    water = molecule("H2O")
    a, b = evaluate(model, water), evaluate(rebuilt, water)
    torch.testing.assert_close(a["energy"], b["energy"])
    torch.testing.assert_close(a["forces"], b["forces"])
    torch.testing.assert_close(a["energy_long"], b["energy_long"])


def test_lora_on_both_paths():
    from mace_lora import LoraConfig, apply_lora, coverage, merge_lora

    model = build(sizes=LongPath(num_channels_long=4, max_L_long=1))
    before = evaluate(model, ethanol())
    adapted = apply_lora(model, LoraConfig(rank=2))
    names = [row.module for row in coverage(adapted).rows]
    assert any(n.startswith("long.interactions") for n in names) and any(n.startswith("interactions") for n in names)
    torch.testing.assert_close(evaluate(adapted, ethanol())["forces"], before["forces"])
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    changed = evaluate(adapted, ethanol())
    assert (changed["forces"] - before["forces"]).abs().max() > 1e-4
    merged = merge_lora(adapted)
    assert type(merged) is MultiScaleMACE
    torch.testing.assert_close(evaluate(merged, ethanol())["forces"], changed["forces"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, m: MultiScaleMACE(m, s), r"r_short: expected 0 < r_short <= r_max .*, got 5 and 2.5 Å"),
        (lambda s, m: MultiScaleMACE(s, m, "mean"), "coupling: expected one of sum, fused, got 'mean'"),
        (lambda s, m: MultiScaleMACE(s, build_mace(r_max=LONG, zs=(1, 8))), "elements: expected the same in both"),
        (lambda s, m: MultiScaleMACE(s, build_mace(r_max=LONG, heads=("a", "b"))), "heads: expected the same in both"),
        (lambda s, m: to_multiscale(s, 0.0), "r_max: expected a length > 0"),
        (lambda s, m: to_multiscale(s, 2.0), r"r_short: expected 0 < r_short <= r_max .*, got 2.5 and 2 Å"),
    ],
)
def test_paths_that_do_not_fit(change, message):
    short = build_mace(r_max=SHORT)
    long = build_long(short, LONG, LongPath(num_channels_long=2), 10.0)
    with pytest.raises(ValueError, match=message):
        change(short, long)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_channels_long": 0}, "num_channels_long: expected a whole number of at least 1, got 0"),
        ({"max_ell_long": -1}, "max_ell_long: expected a whole number of at least 1, got -1"),
        ({"correlation_long": 1.5}, "correlation_long: expected a whole number"),
        ({"radial_hidden_long": -4}, "radial_hidden_long: expected a whole number of at least 0"),
        ({"max_L_long": 2}, "max_L_long: expected at most 1 with max_ell_long 1 and correlation_long 1, got 2"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        LongPath(**sizes)


@pytest.mark.parametrize("coupling", ["sum", "fused"])
def test_two_heads(coupling):
    """Each head has energies of its own; the frame's head is used."""
    torch.manual_seed(2)
    short = build_mace(r_max=SHORT, heads=("a", "b"))
    model = to_multiscale(short, LONG, LongPath(num_channels_long=4), coupling=coupling, zero=False)
    table = tools.AtomicNumberTable(list(ZS))
    energies = {}
    for head in ("a", "b"):
        config = data.config_from_atoms(ethanol(), head_name=head)
        graph = data.AtomicData.from_config(config, z_table=table, cutoff=LONG, heads=["a", "b"])
        batch = next(iter(torch_geometric.dataloader.DataLoader([graph], 1, shuffle=False))).to_dict()
        out = model(batch)
        energies[head] = float(out["interaction_energy"])
        torch.testing.assert_close(out["energy_short"] + out["energy_long"], out["interaction_energy"])
    assert abs(energies["a"] - energies["b"]) > 1e-3
