"""nequip_ext.LoRA on NequIP, Allegro and PaiNN: coverage, identity, files, errors."""

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("nequip")

from e3nn import o3
from nequip_models import MODELS, build, energy_forces, lora, molecule, randomise

import nequip_ext
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
from mace_lora.lora.blocks import block_matrices, describe
from mace_lora.lora.inject import adapter_layers

pytestmark = pytest.mark.nequip
TIGHT = {"atol": 1e-10, "rtol": 0}


@pytest.fixture(params=MODELS, scope="module")
def name(request):
    if request.param == "allegro":
        pytest.importorskip("allegro")
    return request.param


def test_what_is_adapted(name):
    """Every weight but those of the embeddings."""
    model = lora(name, rank=2)
    kinds = {r.kind for r in coverage(model).rows}
    expected = {
        "nequip": {"o3.Linear", "o3.FullyConnectedTensorProduct", "NequIP MLP", "Bessel basis", "energy references"},
        "allegro": {"NequIP MLP", "Allegro contraction", "energy references"},
        "painn": {"o3.Linear", "NequIP MLP", "energy references"},
        "multiscale": {"o3.Linear", "o3.FullyConnectedTensorProduct", "NequIP MLP", "energy references"},
    }
    assert kinds == expected[name]
    left = [n for n, _ in model.named_parameters() if not any(n.startswith(f"{m}.") for m in adapter_layers(model))]
    assert left and all(re.search(r"(type|center|neighbor)_embed\.(embed_module\.)?weight$", n) for n in left)


def test_identity_training_merge_and_pickle(name):
    data, base = molecule(), build(name)
    model = lora(name, rank=2)
    before = energy_forces(base, data)
    torch.testing.assert_close(energy_forces(model, data), before, **TIGHT)
    assert fingerprint(model) == fingerprint(base)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in n and "shifts" not in n for n in trained)
    randomise(model)
    after = energy_forces(model, data)
    assert (after[1] - before[1]).abs().max() > 1e-4
    with disabled_adapters(model):
        torch.testing.assert_close(energy_forces(model, data), before, **TIGHT)
    for layer in adapter_layers(model).values():
        layer.pickle_merged = True  # as nequip-package does
    packaged = pickle.loads(pickle.dumps(model))
    assert not adapter_layers(packaged)
    assert not any("lora" in n for n in packaged.state_dict())
    torch.testing.assert_close(energy_forces(packaged, data), after, **TIGHT)
    torch.testing.assert_close(energy_forces(merge_lora(copy.deepcopy(model)), data), after, **TIGHT)


def crystal(strain: torch.Tensor | None = None):
    """A distorted cell of four atoms as NequIP's data, strained by a 3x3 matrix; and its volume in Å³."""
    from ase.build import bulk
    from nequip.data import compute_neighborlist_, from_ase

    atoms = bulk("Cu", cubic=True, a=3.2)
    atoms.symbols[:] = ["C", "O", "H", "H"]
    atoms.rattle(0.05, seed=1)
    if strain is not None:
        atoms.set_cell(atoms.cell @ (torch.eye(3).double() + strain).numpy(), scale_atoms=True)
    data = compute_neighborlist_(from_ase(atoms), r_max=4.0)
    data["atom_types"] = torch.tensor([["H", "C", "O"].index(s) for s in atoms.get_chemical_symbols()])
    return data, atoms.get_volume()


def test_stress_is_the_derivative_by_the_strain(name):
    model = lora(name, rank=2)
    randomise(model)
    data, volume = crystal()
    stress = model(data)["stress"].detach().view(3, 3)
    assert stress.abs().max() > 1e-3
    for i, j in ((0, 0), (1, 1), (0, 1), (1, 2)):
        strain = torch.zeros(3, 3).double()
        strain[i, j] = strain[j, i] = 1e-4 if i == j else 5e-5
        up, down = (float(model(crystal(e)[0])["total_energy"].detach()) for e in (strain, -strain))
        assert float(stress[i, j]) == pytest.approx((up - down) / 2e-4 / volume, abs=1e-6)


@pytest.mark.parametrize("which", ["nequip", "painn"])
def test_compiled_training_computes_what_eager_does(which):
    """Energies, forces and the gradients of a loss, in float32, by the graph that nequip-train compiles."""
    import warnings

    from nequip.data import AtomicDataDict

    frames = [molecule(), molecule(), molecule()]
    frames[1]["pos"] = frames[1]["pos"] * 1.03
    data, models = AtomicDataDict.batched_from_list(frames), []
    for mode in ("eager", "compile"):
        model = lora(which, {"model_dtype": "float32"}, rank=2, compile_mode=mode).train()
        randomise(model)
        models.append(model)
    assert models[1].is_compile_graph_model
    found = []
    for model in models:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = model(dict(data))
        (out["forces"].square().sum() + out["total_energy"].sum()).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append(({k: out[k].detach() for k in ("total_energy", "forces")}, gradients))
    for key in found[0][0]:
        torch.testing.assert_close(found[1][0][key], found[0][0][key], atol=2e-5, rtol=1e-5)
    assert found[0][1].keys() == found[1][1].keys() and any(".lora_A." in n for n in found[0][1])
    for n, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][n], gradient, atol=1e-4 * float(gradient.abs().max()) + 1e-6, rtol=0)


def test_equivariance_and_inversion(name):
    model = lora(name, rank=2)
    randomise(model)
    energy, forces = energy_forces(model, molecule())
    for sign in (1.0, -1.0):
        rotation = sign * o3.rand_matrix().double()
        energy_r, forces_r = energy_forces(model, molecule(rotation))
        torch.testing.assert_close(energy_r, energy, atol=1e-9, rtol=0)
        torch.testing.assert_close(forces_r, forces @ rotation.T, atol=1e-9, rtol=0)


def test_adapter_file_on_the_same_base_and_on_another(name, tmp_path):
    data, model = molecule(), lora(name, rank=2)
    randomise(model)
    config = LoraConfig.from_dict(model.equitune_config)
    save_adapter(model, tmp_path, config=config, metadata=model.equitune_metadata, dtype=torch.float64)
    again = lora(name, adapter=str(tmp_path))
    torch.testing.assert_close(energy_forces(again, data), energy_forces(model, data), **TIGHT)
    with pytest.raises(ValueError, match="trained on another base model: expected fingerprint"):
        lora(name, {"seed": 7}, adapter=str(tmp_path))
    with pytest.raises(ValueError, match=r"type_names: expected \['H', 'C', 'O'\], got \['C', 'H', 'O'\]"):
        lora(name, {"type_names": ["C", "H", "O"]}, adapter=str(tmp_path))
    with pytest.raises(ValueError, match=r"r_max: expected 4.0, got 4.5"):
        lora(name, {"r_max": 4.5}, adapter=str(tmp_path))
    with pytest.raises(ValueError, match="rank: the adapter given by 'adapter' brings its own"):
        lora(name, adapter=str(tmp_path), rank=4)


def test_refused_adapter_leaves_the_model_as_it_was(tmp_path):
    """An adapter brings the shifts of its base, but not to a model that it does not belong to."""
    from nequip.model import modify

    change = {"modifier": "modify_PerTypeScaleShift", "shifts": {"H": -13.0, "C": -1000.0, "O": -2000.0}}
    model = nequip_ext.LoRA(model=modify(build("nequip"), [change]), rank=2)
    save_adapter(model, tmp_path, config=LoraConfig.from_dict(model.equitune_config), metadata=model.equitune_metadata)
    own = build("nequip")
    load_adapter(own, tmp_path)
    assert energy_forces(own, molecule())[0] < -4000
    other = build("nequip", seed=7)
    before = {n: v.clone() for n, v in other.state_dict().items()}
    for attempt in (
        lambda: load_adapter(other, tmp_path), lambda: nequip_ext.LoRA(model=other, adapter=str(tmp_path)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="trained on another base model"):
            attempt()
        after = other.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(v, after[n]) for n, v in before.items())


def test_adapter_of_a_mace_base_is_refused(tmp_path):
    """A real one of rank 1 for the small MACE of the tests, as save_adapter writes it without more."""
    mace = Path(__file__).parent / "mace_adapter"
    with pytest.raises(ValueError, match=r"NequIP-framework model, got one of a MACE model; adapters do not cross"):
        lora("painn", adapter=str(mace))
    with pytest.raises(
        ValueError, match=r"one of a NequIP-framework model, got one of a MACE model \(None\); adapters"
    ):
        load_adapter(build("nequip"), mace)
    save_adapter(apply_lora(build("painn"), LoraConfig(rank=2)), tmp_path)
    with pytest.raises(ValueError, match=r"NequIP-framework model, got one of another kind of model; adapters do not"):
        lora("painn", adapter=str(tmp_path))
    load_adapter(build("painn"), tmp_path)  # without provenance, but of this base


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank: expected an integer >= 1, got 0"),
        ({"rank": "a"}, "rank: expected an integer >= 1, got 'a'"),
        ({"rank": None}, "rank: expected an integer >= 1, got None"),
        ({"alpha": True}, "alpha: expected a positive number, got True"),
        ({"targets": [1]}, "targets: expected regular expressions, got 1"),
        ({"rank_pattern": "0e:8"}, "rank_pattern: expected a mapping of names to ranks, got '0e:8'"),
        ({"rank_pattern": {0: 3}}, r"rank_pattern: expected a mapping of names to ranks, got \{0: 3\}"),
        ({"use_rslora": "no"}, "use_rslora: expected true or false, got 'no'"),
        ({"clip_rank": "no"}, "clip_rank: expected true or false, got 'no'"),
        ({"adapter": 5}, "adapter: expected the folder of an adapter, got 5"),
        ({"seed": None}, "seed: expected a whole number, got None"),
        ({"model_dtype": "float16"}, "model_dtype: expected float32 or float64, got 'float16'"),
        ({"dense": [".*"]}, r"beside what dense=\('\.\*',\) trains in full; adaptable layers are"),
        ({"targets": ["no_such_layer"]}, r"targets: no layer matches 'no_such_layer'; adaptable layers are"),
        ({"rank_pattern": {"7e": 2}}, "rank_pattern: the model has no weights of irrep 7e"),
        ({"dense": ["nothing"]}, "dense: no parameter matches 'nothing'"),
        ({"preset": "other"}, "preset: expected one of"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        lora("nequip", **settings)


def test_references_that_upstreams_modifier_made_trainable(tmp_path):
    """They are trained in full, go into the adapter and onto a base where they are fixed."""
    changes = {"per_type_energy_shifts_trainable": True, "per_type_energy_scales_trainable": True,
               "per_type_energy_scales": {"H": 1.0, "C": 2.0, "O": 3.0}}  # fmt: skip
    model = lora("nequip", changes, rank=2)
    layer = next(la for n, la in adapter_layers(model).items() if n.endswith("scale_shift"))
    updates = layer.lora_dense["default"]
    assert all(updates[k].requires_grad and updates[k].shape == (3, 1) for k in ("scales", "shifts"))
    energy_forces(model, molecule())  # the forces' graph is its own
    model(molecule())["total_energy"].sum().backward()
    assert updates["shifts"].grad.abs().max() > 0 and updates["scales"].grad.abs().max() > 0
    randomise(model)
    save_adapter(model, tmp_path, config=LoraConfig.from_dict(model.equitune_config), metadata=model.equitune_metadata,
                 dtype=torch.float64)  # fmt: skip
    fixed = changes | {"per_type_energy_shifts_trainable": False, "per_type_energy_scales_trainable": False}
    again = lora("nequip", fixed, adapter=str(tmp_path))
    for a, b in zip(energy_forces(again, molecule()), energy_forces(model, molecule()), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    with pytest.raises(ValueError, match=r"shifts_trainable is true, but targets, exclude or dense leave shifts out"):
        lora("nequip", {"per_type_energy_shifts_trainable": True}, dense=["type_embed"])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("nequip", {"polynomial_cutoff_p": 4}), ("painn", {"polynomial_cutoff_p": 4}),
        ("nequip", {"convnet_nonlinearity_scalars": {"e": "tanh", "o": "tanh"}}),
        ("allegro", {"allegro_mlp_nonlinearity": "mish"}), ("nequip", {"avg_num_neighbors": 9.0}),
        ("allegro", {"forward_normalize": False}),
        ("nequip", {"pair_potential": {"_target_": "nequip.nn.pair_potential.ZBL", "chemical_species": ["H", "C", "O"],
                                       "units": "real"}}),
    ],
)  # fmt: skip
def test_bases_of_equal_weights_that_compute_something_else(name, change):
    if "pair_potential" in change:
        metal = change["pair_potential"] | {"units": "metal"}
        assert fingerprint(build(name, pair_potential=metal)) != fingerprint(build(name, **change))
    assert fingerprint(build(name)) == fingerprint(build(name)) != fingerprint(build(name, **change))


def test_more_settings():
    ranks = {r for la in adapter_layers(lora("nequip", rank=99, clip_rank=True)).values()
             for r in la.r["default"].values()}  # fmt: skip
    assert max(ranks) <= 8
    layer = next(la for la in adapter_layers(lora("nequip", rank=4, use_rslora=True)).values() if la.r["default"])
    assert {*layer.scaling["default"].values()} == {2.0}
    lora("nequip", exclude=None)


def test_models_that_cannot_be_built():
    for wrong in ("nequip.model.NequIPGNNModel", None, [1]):
        with pytest.raises(ValueError, match="model: expected the config of a model or a built one, got"):
            nequip_ext.LoRA(model=wrong)
    with pytest.raises(ValueError, match="model_dtype: a model from a file brings its own; drop 'float64'"):
        nequip_ext.LoRA(model={"_target_": "nequip.model.ModelFromCheckpoint", "checkpoint_path": "x.ckpt"},
                        model_dtype="float64")  # fmt: skip
    with pytest.raises(ValueError, match="model: expected a config with a '_target_'"):
        nequip_ext.LoRA(model={"r_max": 4.0})
    with pytest.raises(ValueError, match=r"model: cannot import _target_ 'nequip.model.Nothing'"):
        nequip_ext.LoRA(model={"_target_": "nequip.model.Nothing"})
    with pytest.raises(ValueError, match="it has LoRA adapters already"):
        nequip_ext.LoRA(model=lora("painn"))
    with pytest.raises(
        ValueError, match=r"expected a NequIP-framework model \(GraphModel\) or its builder, got Linear"
    ):
        nequip_ext.LoRA(model=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"nequip_ext.LoRA adapts one model, got"):
        nequip_ext.LoRA(model=torch.nn.ModuleDict({"a": build("painn"), "b": build("painn")}))


def test_dense_part_can_be_chosen():
    model = lora("nequip", dense=["type_embed"])
    trained = [n for n, p in model.named_parameters() if p.requires_grad and ".lora_dense." in n]
    assert [n for n in trained if "type_embed" in n]
    assert not [n for n in trained if "bessel" in n]


def test_allegro_contraction_blocks_are_its_paths_by_irrep():
    pytest.importorskip("allegro")
    module = next(m for m in build("allegro").modules() if type(m).__name__ == "Contracter")
    spec = describe(module)
    weights = module.weights.detach()
    matrices = block_matrices(spec, {"weights": weights})
    outs = [str(module.irreps_out[o].ir) for _, _, o in spec_instructions(module)]
    for irrep, matrix in matrices.items():
        columns = [i for i, out in enumerate(outs) if out == irrep]
        torch.testing.assert_close(matrix, weights[:, columns].double())


def spec_instructions(module):
    from nequip_ext.lora.blocks import _instructions

    found = _instructions(module)
    assert len(found) == module.num_paths
    return found
