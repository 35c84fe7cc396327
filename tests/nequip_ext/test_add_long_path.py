"""AddLongPath: a model of a short cutoff, as it was, with a long path beside it."""

import shutil
import sys

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
FRAMES = ROOT / "mace_lora" / "embedded" / "glycolamide_pbe0.extxyz.gz"
SET_UP = "from nequip.utils.global_state import set_global_state; set_global_state()\n"


@pytest.fixture(scope="session", params=["float64"])
def model_dtype(request):
    return request.param


class TestUpstream(Upstream):
    """What NequIP asks of an energy model."""

    @pytest.fixture(scope="class", params=["nequip", "allegro", "painn"])
    @classmethod
    def config(cls, request):
        if request.param == "allegro":
            pytest.importorskip("allegro")
        short = {k: v for k, v in MODELS[request.param].items() if k not in ("seed", "type_names")}
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
    return nequip_ext.AddLongPath(**{"model": {"model_dtype": "float64", **MODELS[name]}, **LONG, **options})


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


def test_inputs_of_the_model_beyond_atoms():
    """A model with an embedding of the total charge still gets it."""
    fields = [{"field": "charge", "num_features": 4, "min": -2, "max": 2}]
    data = molecule()
    data["charge"] = torch.tensor([[1]])
    plain, both = (f("nequip", {"categorical_graph_field_embed": fields}) for f in (build_with, around_with))
    charged, expected = energy_forces(both, data), energy_forces(plain, data)
    torch.testing.assert_close(charged, expected, atol=1e-10, rtol=0)
    data["charge"] = torch.tensor([[-1]])
    assert abs(energy_forces(both, data)[0] - charged[0]).item() > 1e-6


def build_with(name: str, changes: dict):
    return build(name, **changes)


def around_with(name: str, changes: dict):
    return nequip_ext.AddLongPath(model={"model_dtype": "float64", **MODELS[name], **changes}, **LONG)


def test_rows_of_ghost_atoms():
    """In LAMMPS ML-IAP Allegro's atomic energies have rows for ghosts, the long path's have not."""
    from nequip.nn import AtomwiseReduce

    from nequip_ext.multiscale.modules import ATOMS_LONG, ENERGY_LONG, LONG_ENERGY, LONG_FEATURES, AddedEnergy

    far = AtomwiseReduce(field=ATOMS_LONG, out_field=ENERGY_LONG, reduce="sum")
    irreps = {LONG_ENERGY: "1x0e", AtomicDataDict.PER_ATOM_ENERGY_KEY: "1x0e", AtomicDataDict.TOTAL_ENERGY_KEY: "1x0e"}
    module = AddedEnergy(far, torch.tensor([[2.0], [3.0]]), irreps)
    data = {
        AtomicDataDict.PER_ATOM_ENERGY_KEY: torch.tensor([[1.0], [1.0], [0.5]]), LONG_FEATURES: torch.zeros(2, 4),
        AtomicDataDict.TOTAL_ENERGY_KEY: torch.tensor([[2.5]]), LONG_ENERGY: torch.tensor([[0.1], [0.2]]),
        AtomicDataDict.ATOM_TYPE_KEY: torch.tensor([0, 1, 1]), AtomicDataDict.LMP_MLIAP_DATA_KEY: object(),
    }  # fmt: skip
    out = module(data)
    torch.testing.assert_close(out[AtomicDataDict.PER_ATOM_ENERGY_KEY], torch.tensor([[1.2], [1.6], [0.5]]))
    torch.testing.assert_close(out[ENERGY_LONG], torch.tensor([[0.8]]))


def test_allegro_is_not_strictly_local_any_more(caplog):
    pytest.importorskip("allegro")
    around("allegro")
    assert "Allegro with a long path of 2 layers is not strictly local any more" in caplog.text
    caplog.clear()
    around("allegro", num_layers_long=1)
    assert "strictly local" not in caplog.text


def test_compile_mode_from_outside():
    """The two paths are one model: LoRA hands the mode to AddLongPath, and the inner model has none of its own."""
    inner = {"model_dtype": "float64", **MODELS["nequip"]}
    whole = {"_target_": "nequip_ext.AddLongPath", "model": inner, **LONG}
    assert nequip_ext.LoRA(model=whole, compile_mode="compile").is_compile_graph_model
    with pytest.raises(ValueError, match="model: compile_mode: give it to nequip_ext"):
        nequip_ext.AddLongPath(model=inner | {"compile_mode": "compile"}, **LONG)
    with pytest.raises(ValueError, match="model_dtype: a built model brings its own; drop 'float32'"):
        nequip_ext.AddLongPath(model=build("nequip"), model_dtype="float32", **LONG)
    with pytest.raises(ValueError, match="freezes every weight and adapts the short path"):
        nequip_ext.LoRA(model=whole | {"freeze_short": True})


def test_adapter_of_both_paths_goes_onto_the_short_model(tmp_path):
    """The adapter knows how the long path was made; NequIP's builder is told in words."""
    from nequip_models import randomise

    from mace_lora import load_adapter, save_adapter

    inner = {"_target_": "nequip_ext.AddLongPath", "model": {"model_dtype": "float64", **MODELS["nequip"]}, **LONG}
    trained = nequip_ext.LoRA(model=inner | {"seed": 5}, rank=2, dense=["long_"])
    assert not any(".long_" in n and ".lora_A." in n for n, _ in trained.named_parameters())
    randomise(trained)
    save_adapter(trained, tmp_path / "adapter")
    assert "long path" in (tmp_path / "adapter" / "README.md").read_text()
    again = load_adapter(build("nequip"), tmp_path / "adapter")
    for data in (molecule(), chain(1.2, 5.0)):
        torch.testing.assert_close(energy_forces(again, data), energy_forces(trained, data), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="its base has a long path; put the model into nequip_ext"):
        nequip_ext.LoRA(model={"model_dtype": "float64", **MODELS["nequip"]}, adapter=str(tmp_path / "adapter"))


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
        ({"r_max": 4.0}, r"r_max: expected more than the model's own cutoff \(4 Å\), got 4"),
        ({"r_max": float("nan")}, "r_max: expected a finite length > 0 in Å, got nan"),
        ({"avg_num_neighbors": {"H": 3}}, "avg_num_neighbors: expected a finite number > 0, got {'H': 3}"),
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
    with pytest.raises(ValueError, match="model: expected a NequIP-framework model whose derivatives"):
        nequip_ext.AddLongPath(model=torch.nn.Linear(1, 1), **LONG)
    with pytest.raises(ValueError, match="model: it has a LoRA adapter; merge it"):
        nequip_ext.AddLongPath(model=lora("nequip"), **LONG)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("short")
    train("nequip_scratch", "epochs=1", f"folder={folder}", "training_module.model.num_layers=1")  # to compile it soon
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
    train("around", "epochs=1", f"folder={tmp_path}/run", f"base={short}", folder=tmp_path)
    trained = predict(tmp_path / "run" / "best.ckpt", "")
    call(BIN / "nequip-package", "build", tmp_path / "run" / "best.ckpt", longer)
    assert close(predict(longer, "block"), trained, 1e-5, 1e-3)
    modifiers = "from nequip.model.modify_utils import get_all_modifiers; from nequip.model.saved_models import *\n"
    code = f"{modifiers}print(len(get_all_modifiers(load_saved_model('{longer}'))))"
    assert int(call(sys.executable, "-c", SET_UP + code).splitlines()[-1]) > 1


def test_merge_into_a_package_of_the_short_model(base, tmp_path):
    from nequip.utils.global_state import set_global_state
    from nequip_models import randomise

    from mace_lora import save_adapter
    from nequip_ext.lora.saved import load_nequip, merge_package

    set_global_state()
    model = nequip_ext.LoRA(model=nequip_ext.AddLongPath(load_nequip(base), r_max=7.0, avg_num_neighbors=12.0), rank=2)
    randomise(model, std=0.02)
    save_adapter(model, tmp_path / "adapter")
    merge_package(base, tmp_path / "adapter", tmp_path / "merged.nequip.zip")
    shown = predict(tmp_path / "merged.nequip.zip", "block")
    import ase.io
    from nequip.data import compute_neighborlist_, from_ase

    for (energy, forces), atoms in zip(shown, ase.io.read(FRAMES, "0:3", format="extxyz"), strict=True):
        data = compute_neighborlist_(from_ase(atoms), r_max=7.0)
        data["atom_types"] = torch.tensor([model.type_names.index(s) for s in atoms.get_chemical_symbols()])
        out = model(data)
        assert abs(out["total_energy"].item() - energy) < 1e-3
        torch.testing.assert_close(out["forces"].flatten().double(), torch.tensor(forces).double(), atol=1e-3, rtol=0)
