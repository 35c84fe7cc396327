"""MultiScaleNequIP: NequIP's own model tests, and the two ranges."""

import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("nequip")

from nequip.data import AtomicDataDict
from nequip.utils.unittests.conftest import *  # noqa: F403  upstream's fixtures
from nequip_models import MODELS, Upstream, build, energy_forces, molecule
from test_lora_lifecycle import train

# upstream's tests start nequip-train by name
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

pytestmark = pytest.mark.nequip

MODEL = MODELS["multiscale"]


@pytest.fixture(scope="session", params=["float64"])
def model_dtype(request):
    return request.param


class TestUpstream(Upstream):
    """What NequIP asks of an energy model; EQUITUNE_FULL=1: also trained, compiled and packaged."""

    @pytest.fixture(scope="class")
    @classmethod
    def config(cls):
        return MODEL

    @pytest.fixture
    def strict_locality(self):
        return False

    @pytest.fixture(scope="class", params=["minimal_toy_emt.yaml"])
    @classmethod
    def conffile(cls, request):
        return request.param

    @pytest.fixture(scope="class", params=["package"])
    @classmethod
    def model_source(cls, request):
        return request.param


def pair(distance: float) -> AtomicDataDict.Type:
    """C–O at a distance (Å), with a neighbour list of the long cutoff."""
    from ase import Atoms
    from nequip.data import compute_neighborlist_, from_ase

    atoms = Atoms("COH", positions=[[0, 0, 0], [0, 0, distance], [0, 1.0, 0]])
    data = compute_neighborlist_(from_ase(atoms), r_max=MODEL["r_max"])
    data[AtomicDataDict.ATOM_TYPE_KEY] = torch.tensor([1, 2, 0])
    return data


@pytest.mark.parametrize("coupling", ["sum", "fused"])
@pytest.mark.parametrize("cutoff", [MODEL["r_short"], MODEL["r_max"]])
def test_smooth_at_both_cutoffs(coupling, cutoff):
    model, eps = build("multiscale", multiscale_coupling=coupling), 1e-5

    def at(distance: float) -> tuple[float, float]:
        energy, forces = energy_forces(model, pair(distance))
        return float(energy), float(forces[1, 2])

    energies, forces = zip(*(at(cutoff + k * eps) for k in (-2, -1, 1, 2)), strict=True)
    assert abs(energies[2] - energies[1] + 2 * eps * forces[1]) < 1e-9
    assert abs(forces[2] - forces[1]) < 1e-4
    slopes = [(forces[1] - forces[0]) / eps, (forces[3] - forces[2]) / eps]
    assert abs(slopes[1] - slopes[0]) < 2e-2
    assert abs(at(MODEL["r_max"] - 1.0)[1]) > 1e-7  # beyond the short range the atom is felt
    assert abs(at(MODEL["r_max"] + 0.5)[1]) < 1e-12


@pytest.mark.parametrize("coupling", ["sum", "fused"])
def test_shares_of_the_two_paths(coupling):
    """They add up; an atom that only the long path sees changes the long share alone, and lone atoms have none."""
    model = build("multiscale", multiscale_coupling=coupling, per_type_energy_scales={"H": 2.0, "C": 3.0, "O": 0.5})
    near, far = (model(pair(d)) for d in (MODEL["r_short"] + 0.5, MODEL["r_short"] + 1.0))
    for out in (near, far):
        torch.testing.assert_close(out["energy_short"] + out["energy_long"], out["total_energy"], atol=1e-12, rtol=0)
    torch.testing.assert_close(near["energy_short"], far["energy_short"], atol=1e-10, rtol=0)
    assert (near["energy_long"] - far["energy_long"]).abs().item() > 1e-6
    batch = AtomicDataDict.batched_from_list([pair(3.0), pair(3.4)])
    out, single = model(batch), [model(pair(d)) for d in (3.0, 3.4)]
    torch.testing.assert_close(out["energy_long"], torch.cat([o["energy_long"] for o in single]), atol=1e-10, rtol=0)


def test_short_path_sees_short_edges_only():
    model, seen = build("multiscale"), {}
    for name in ("layer0_convnet", "long_layer0_convnet"):
        module = next(m for n, m in model.named_modules() if n.endswith(f".{name}"))

        def note(_, args, key=name):
            seen[key] = args[0][AtomicDataDict.EDGE_INDEX_KEY].shape[1]

        module.register_forward_pre_hook(note)
    data = molecule()
    lengths = (data["pos"][data["edge_index"][1]] - data["pos"][data["edge_index"][0]]).norm(dim=1)
    model(dict(data))
    assert seen["long_layer0_convnet"] == len(lengths)
    assert 0 < seen["layer0_convnet"] == int((lengths < MODEL["r_short"]).sum()) < len(lengths)


@pytest.mark.parametrize("key", ["avg_num_neighbors", "avg_num_neighbors_short"])
def test_each_path_has_its_number_of_neighbours(key):
    """NequIP keeps the factor of the first path in the data; the second must not take it."""
    both = {"avg_num_neighbors": 6.0, "avg_num_neighbors_short": 2.0}
    few, many = (build("multiscale", **both | {key: n}) for n in (1.5, 24.0))
    left = []
    last = next(m for n, m in few.named_modules() if n.endswith(".all_edges"))
    last.register_forward_hook(lambda module, args, out: left.append(AtomicDataDict.FEATURE_NORM_FACTOR_KEY in out))
    energies = [float(energy_forces(m, molecule())[0]) for m in (few, many)]
    assert abs(energies[0] - energies[1]) > 1e-4
    assert left == [False]
    of_each = dict.fromkeys(MODEL["type_names"], 1.5)
    same = energy_forces(build("multiscale", **both | {key: of_each}), molecule())[0]
    assert float(same) == pytest.approx(energies[0], abs=1e-9)


def test_neighbours_of_each_type_are_scaled_with_the_volume():
    of_each = dict.fromkeys(MODEL["type_names"], 6.0)
    energies = [float(energy_forces(build("multiscale", avg_num_neighbors=n), molecule())[0]) for n in (6.0, of_each)]
    assert energies[0] == pytest.approx(energies[1], abs=1e-9)


def test_with_a_pair_potential():
    """ZBL gets all edges back, with their normed lengths."""
    zbl = {"_target_": "nequip.nn.pair_potential.ZBL", "units": "metal", "chemical_species": ["H", "C", "O"]}
    plain, repulsive = build("multiscale"), build("multiscale", pair_potential=zbl)
    near = pair(0.5)
    energies = [float(energy_forces(m, near)[0]) for m in (plain, repulsive)]
    assert energies[1] > energies[0] + 5


def test_lora_on_both_paths():
    from nequip_models import lora, randomise

    plain, adapted = build("multiscale"), lora("multiscale", rank=2)
    base = energy_forces(plain, molecule())
    torch.testing.assert_close(energy_forces(adapted, molecule()), base, atol=1e-10, rtol=0)
    names = [n for n, _ in adapted.named_parameters() if ".lora_A." in n]
    assert any(".long_layer0_convnet." in n for n in names) and any(".layer0_convnet." in n for n in names)
    randomise(adapted)
    assert (energy_forces(adapted, molecule())[1] - base[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r_short": 4.0}, r"r_short: expected a length between 0 and r_max \(4.0 Å\), got 4.0"),
        ({"r_short": -1.0}, "r_short: expected a length between 0 and r_max"),
        ({"multiscale_coupling": "mean"}, "multiscale_coupling: expected one of sum, fused, got 'mean'"),
        ({"num_channels_long": 0}, "num_channels_long: expected a positive whole number, got 0"),
        ({"num_layers_long": -2}, "num_layers_long: expected a positive whole number, got -2"),
        ({"max_L_long": -1}, "max_L_long: expected a whole number of at least 0, got -1"),
        ({"max_L_long": 1.5}, "max_L_long: expected a whole number of at least 0, got 1.5"),
        ({"l_max": -1}, "l_max: expected a whole number of at least 0, got -1"),
        ({"radial_hidden_long": -4}, "radial_hidden_long: expected a whole number of at least 0, got -4"),
        ({"num_features": float("nan")}, "num_features: expected a positive whole number, got nan"),
        ({"num_bessels": "8"}, "num_bessels: expected a positive whole number, got '8'"),
        ({"r_max": float("inf")}, "r_max: expected a finite length > 0 in Å, got inf"),
        ({"avg_num_neighbors": None}, "avg_num_neighbors: expected a finite number > 0, got None"),
        ({"avg_num_neighbors": -3}, "avg_num_neighbors: expected a finite number > 0, got -3"),
        ({"avg_num_neighbors_short": float("nan")}, "avg_num_neighbors_short: expected a finite number > 0, got nan"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        build("multiscale", **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two epochs of the config in recipes/, as it is."""
    folder = tmp_path_factory.mktemp("multiscale")
    train("nequip_multiscale", "epochs=2", f"folder={folder}/eager")
    return folder


@pytest.mark.timeout(1800)  # compiles twice
def test_training_compiled_packaged_and_in_ase(trained):
    from test_lora_lifecycle import BIN, call, close, predict

    small = ("epochs=2", "training_module.model.num_layers=2")
    train("nequip_multiscale", *small, f"folder={trained}/small")
    eager = predict(trained / "small" / "best.ckpt", "")
    train("nequip_multiscale", *small, f"folder={trained}/compiled", "+training_module.model.compile_mode=compile")
    assert close(predict(trained / "compiled" / "best.ckpt", ""), eager, 1e-2, 0.1)
    package, compiled = trained / "ms.nequip.zip", trained / "ms.nequip.pt2"
    call(BIN / "nequip-package", "build", trained / "small" / "best.ckpt", package)
    assert close(predict(package, "block"), eager, 1e-5, 1e-3)  # without our package installed
    call(BIN / "nequip-compile", package, compiled, "--mode", "aotinductor", "--device", "cpu", "--target", "ase")
    assert close(predict(compiled, "block"), eager, 1e-3, 1e-2)


def test_restart(trained):
    log = train("nequip_multiscale", "epochs=3", f"folder={trained}/again", f"++ckpt_path={trained}/eager/last.ckpt")
    assert "Restored all states from the checkpoint" in log or "Restoring states" in log
