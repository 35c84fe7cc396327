"""AddLongPath: a model of a short cutoff, as it was, with a long path beside it."""

import shutil

import pytest
import torch

pytest.importorskip("nequip")

from nequip.data import AtomicDataDict
from nequip.utils.unittests.conftest import *  # noqa: F403  upstream's fixtures
from nequip_models import MODELS, Upstream, build, energy_forces, molecule
from test_lora_lifecycle import BIN, ROOT, call, close, predict, train

import nequip_ext

pytestmark = pytest.mark.nequip
LONG = {"r_max": 6.0, "avg_num_neighbors": 8.0}


@pytest.fixture(scope="session", params=["float64"])
def model_dtype(request):
    return request.param


class TestUpstream(Upstream):
    """What NequIP asks of an energy model."""

    @pytest.fixture(scope="class")
    @classmethod
    def config(cls):
        short = {k: v for k, v in MODELS["nequip"].items() if k not in ("seed", "type_names")}
        inner = short | {"seed": 1, "type_names": ["H", "C", "O"], "model_dtype": "float64", "r_max": 3.0}
        return {"_target_": "nequip_ext.AddLongPath", "model": inner, "seed": 123, "r_max": 4.0,
                "avg_num_neighbors": 6.0, "type_names": ["H", "C", "O"]}  # fmt: skip

    @pytest.fixture
    def strict_locality(self):
        return False


def around(name: str, **options):
    """A model of nequip_models with a long path to 6 Å."""
    from nequip.utils.global_state import set_global_state

    set_global_state()
    return nequip_ext.AddLongPath(model={"model_dtype": "float64", **MODELS[name]}, **{**LONG, **options})


def wake(model) -> None:
    """Readout of the long path away from zero."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".long_energy_readout." in name:
                p.add_(torch.linspace(-1, 1, p.numel(), dtype=p.dtype).reshape(p.shape))


def chain(*distances: float) -> AtomicDataDict.Type:
    """H, C, O, C, … on a line, Å, with the neighbour list of the long cutoff."""
    from ase import Atoms
    from nequip.data import compute_neighborlist_, from_ase

    z = torch.cumsum(torch.tensor([0.0, *distances]), 0).tolist()
    symbols = ["H", "C", "O", "C", "H"][: len(z)]
    data = compute_neighborlist_(from_ase(Atoms(symbols, [[0.1 * i, 0, x] for i, x in enumerate(z)])), r_max=6.0)
    data[AtomicDataDict.ATOM_TYPE_KEY] = torch.tensor([["H", "C", "O"].index(s) for s in symbols])
    return data


@pytest.mark.parametrize("name", ["nequip", "allegro", "painn"])
def test_the_model_itself_at_first(name):
    """Energies, forces and atomic energies are the model's own; the cutoff of its file is the long one."""
    if name == "allegro":
        pytest.importorskip("allegro")
    plain, both = build(name), around(name)
    assert float(both.metadata["r_max"]) == 6.0 and both.type_names == plain.type_names
    short, far = molecule(), chain(1.1, 1.4, 2.5, 5.0)
    for data in (short, far):
        out, expected = both(dict(data)), plain(dict(data))
        for key in ("total_energy", "forces", "atomic_energy"):
            torch.testing.assert_close(out[key], expected[key], atol=1e-10, rtol=0)
        assert out["energy_long"].abs().max() == 0
        torch.testing.assert_close(out["energy_short"], out["total_energy"])


@pytest.mark.parametrize("name", ["nequip", "allegro", "painn"])
def test_forces_and_shares(name):
    """Forces are -dE/dx; the shares add up; atoms beyond the short cutoff are felt, beyond the long one not."""
    if name == "allegro":
        pytest.importorskip("allegro")
    model, eps = around(name), 1e-4
    wake(model)

    def at(distance: float):
        return model(chain(1.2, distance))

    plain = build(name)
    for distance in (2.0, 5.0):
        out = at(distance)
        more, less = (at(distance + d)["total_energy"].item() for d in (eps, -eps))
        slope = (more - less) / (2 * eps)
        assert float(out["forces"][2, 2]) == pytest.approx(-slope, abs=1e-6)
        torch.testing.assert_close(out["energy_short"] + out["energy_long"], out["total_energy"], atol=1e-12, rtol=0)
        torch.testing.assert_close(out["energy_short"], plain(chain(1.2, distance))["total_energy"])
        torch.testing.assert_close(out["atomic_energy"].sum(), out["total_energy"].sum())
    assert (at(5.0)["energy_long"] - at(5.5)["energy_long"]).abs().item() > 1e-7
    assert abs(float(at(6.5)["forces"][2].abs().max())) < 1e-12  # O is 6.5 Å from C
    batch = AtomicDataDict.batched_from_list([chain(1.2, 5.0), chain(1.1, 1.4, 2.5)])
    single = [model(chain(1.2, 5.0)), model(chain(1.1, 1.4, 2.5))]
    torch.testing.assert_close(model(batch)["energy_long"], torch.cat([o["energy_long"] for o in single]))


@pytest.mark.parametrize("cutoff", [4.0, 6.0])
def test_smooth_at_both_cutoffs(cutoff):
    model, eps = around("nequip"), 1e-5
    wake(model)
    points = [energy_forces(model, chain(1.2, cutoff + k * eps)) for k in (-2, -1, 1, 2)]
    energies, forces = [float(e) for e, _ in points], [float(f[2, 2]) for _, f in points]
    assert abs(energies[2] - energies[1] + 2 * eps * forces[1]) < 1e-9
    assert abs(forces[2] - forces[1]) < 1e-4
    assert abs((forces[3] - forces[2]) - (forces[1] - forces[0])) / eps < 2e-2


def test_what_trains():
    frozen, free = around("nequip", freeze_short=True), around("nequip")
    trained = {n for n, p in frozen.named_parameters() if p.requires_grad}
    assert trained and all(".long_" in n for n in trained)
    assert {n for n, p in free.named_parameters() if p.requires_grad} > trained
    wake(frozen)
    frozen(chain(1.2, 5.0))["total_energy"].sum().backward()
    assert all(p.grad is not None for p in frozen.parameters() if p.requires_grad)


def test_lora_on_the_model_and_the_long_path_in_full():
    from nequip.utils.global_state import set_global_state

    set_global_state()
    inner = {"_target_": "nequip_ext.AddLongPath", "model": {"model_dtype": "float64", **MODELS["nequip"]}, **LONG}
    model = nequip_ext.LoRA(model=inner, rank=2, exclude=["long_"], dense=["long_"])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(".short.layer0_convnet." in n and ".lora_A." in n for n in trained)
    assert any(".long_layer0_convnet." in n for n in trained)
    expected = energy_forces(build("nequip"), molecule())
    torch.testing.assert_close(energy_forces(model, molecule()), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r_max": 4.0}, r"r_short: expected a length between 0 and r_max \(4.0 Å\), got 4.0"),
        ({"r_max": float("nan")}, "r_max: expected a finite length > 0 in Å, got nan"),
        ({"avg_num_neighbors": 0}, "avg_num_neighbors: expected a finite number > 0, got 0"),
        ({"num_layers_long": 0}, "num_layers_long: expected a positive whole number, got 0"),
        ({"max_ell_long": -1}, "max_ell_long: expected a whole number of at least 0, got -1"),
        ({"freeze_short": "yes"}, "freeze_short: expected true or false, got 'yes'"),
        ({"type_names": ["C", "H", "O"]}, r"type_names: expected the model's \['H', 'C', 'O'\], got \['C', 'H', 'O'\]"),
        ({"model": 3}, "model: expected the config of a model or a built one, got 3"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        if "model" in options:
            nequip_ext.AddLongPath(**LONG, **options)
        else:
            around("nequip", **options)


def test_models_that_have_what_it_adds():
    from nequip_models import lora

    with pytest.raises(ValueError, match="model: expected a short-range model, got one that has a long path already"):
        around("multiscale")
    with pytest.raises(ValueError, match="model: it has a LoRA adapter; merge it"):
        nequip_ext.AddLongPath(model=lora("nequip"), **LONG)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("short")
    train("nequip_scratch", "epochs=1", f"folder={folder}")
    return folder / "best.ckpt"


@pytest.mark.timeout(1800)  # compiles twice
def test_trained_compiled_packaged_and_in_ase(base, tmp_path):
    """Around a checkpoint; in the end without our packages."""
    log = train("nequip_add_long", "epochs=2", f"folder={tmp_path}/eager", f"base={base}")
    assert "long path to 7 Å beside a model of 5 Å" in log
    eager = predict(tmp_path / "eager" / "best.ckpt", "")
    again = train("nequip_add_long", "epochs=3", f"folder={tmp_path}/again", f"base={base}",
                  f"++ckpt_path={tmp_path}/eager/last.ckpt")  # fmt: skip
    assert "Restored all states from the checkpoint" in again or "Restoring states" in again
    train("nequip_add_long", "epochs=2", f"folder={tmp_path}/compiled", f"base={base}",
          "++training_module.model.compile_mode=compile")  # fmt: skip
    assert close(predict(tmp_path / "compiled" / "best.ckpt", ""), eager, 1e-2, 0.1)
    package, compiled = tmp_path / "long.nequip.zip", tmp_path / "long.nequip.pt2"
    call(BIN / "nequip-package", "build", tmp_path / "eager" / "best.ckpt", package)
    assert close(predict(package, "block"), eager, 1e-5, 1e-3)
    call(BIN / "nequip-compile", package, compiled, "--mode", "aotinductor", "--device", "cpu", "--target", "ase")
    assert close(predict(compiled, "block"), eager, 1e-3, 1e-2)


@pytest.mark.timeout(900)
def test_around_a_package(base, tmp_path):
    short, longer = tmp_path / "short.nequip.zip", tmp_path / "longer.nequip.zip"
    call(BIN / "nequip-package", "build", base, short)
    recipes = ROOT / "recipes" / "configs"
    shutil.copy(recipes / "nequip_data.yaml", tmp_path)
    text = (recipes / "nequip_add_long.yaml").read_text()
    text = text.replace("ModelFromCheckpoint", "ModelFromPackage").replace("checkpoint_path:", "package_path:")
    (tmp_path / "around.yaml").write_text(text)
    call(BIN / "nequip-train", "-cd", tmp_path, "-cn", "around", "epochs=1", f"folder={tmp_path}/run", f"base={short}")
    trained = predict(tmp_path / "run" / "best.ckpt", "")
    call(BIN / "nequip-package", "build", tmp_path / "run" / "best.ckpt", longer)
    assert close(predict(longer, "block"), trained, 1e-5, 1e-3)
