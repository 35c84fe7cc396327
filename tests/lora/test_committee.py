"""Committees of adapters and the calculator that switches them, against separate stock calculators."""

import copy
import subprocess
import sys

import ase
import ase.build
import ase.io
import numpy as np
import pytest
import torch
from models import FAMILIES, build_mace, energy_forces, molecules, randomise

pytest.importorskip("mace")

from mace.calculators import MACECalculator

from mace_lora import LoraConfig, adapter_names, apply_lora, fingerprint, load_adapter, merge_lora, save_adapter
from mace_lora.lora import calculator as calculator_module
from mace_lora.lora.calculator import load_calculator
from mace_lora.lora.committee import Committee, committee_predict, load_committee
from mace_lora.lora.energies import difference, reference_plan
from mace_lora.lora.inject import (
    adapter_layers,
    apply_plan,
    disabled_adapters,
    merge_adapters,
    plan_lora,
    set_adapter,
)
from mace_lora.mace_plugin.base_model import describe_base, embedded_base, prepare_base, save_base

pytestmark = [pytest.mark.mace, pytest.mark.usefixtures("double")]
# the third leaves layers out and has other ranks: members need not have the same shape
CONFIGS = {
    "a": LoraConfig(rank=2, alpha=3.0),
    "b": LoraConfig(rank=3, use_rslora=True),
    "c": LoraConfig(rank=1, preset="upstream", rank_pattern={"1o": 0}),
}
CLOSE = {"atol": 1e-10, "rtol": 0}


def ethanol(seed: int = 0) -> ase.Atoms:
    atoms = ase.build.molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=seed)
    return atoms


def ice(seed: int = 0) -> ase.Atoms:
    """A small periodic cell with edges across its faces."""
    atoms = ase.Atoms("OHHOHH", cell=[3.3, 3.5, 3.7], pbc=True)
    atoms.positions = [[0, 0, 0], [0.8, 0.6, 0], [-0.8, 0.6, 0], [1.6, 1.7, 1.8], [2.4, 2.3, 1.8], [0.9, 2.3, 1.8]]
    atoms.rattle(0.05, seed=seed)
    return atoms


def make_folders(base, path):
    """One adapter folder per configuration, in float64."""
    folders = {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        model = apply_lora(copy.deepcopy(base), config)
        randomise(model, std=0.02, seed=seed)
        folders[name] = save_adapter(model, path / f"run.{name}", config=config, dtype=torch.float64)
    return folders


def stock(base, folder, dtype="float64"):
    """MACE's own calculator of the merged model."""
    model = merge_lora(load_adapter(copy.deepcopy(base), folder))
    return MACECalculator(models=[model], device="cpu", default_dtype=dtype)


def evaluate(calculator, atoms):
    atoms = atoms.copy()
    atoms.calc = calculator
    return atoms.get_potential_energy(), atoms.get_forces()


def assert_same(got, expected, atol=1e-10):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=0)


@pytest.fixture()
def base():
    return build_mace()


@pytest.fixture()
def folders(base, tmp_path):
    return make_folders(base, tmp_path)


@pytest.fixture()
def model(base, folders):
    model = copy.deepcopy(base)
    for name, folder in folders.items():
        load_adapter(model, folder, adapter_name=name)
    return model


# -- committee -----------------------------------------------------------------------------------


def assert_committee(committee, calculators, atoms):
    separate = [evaluate(c, atoms) for c in calculators]
    energies, forces = np.array([e for e, _ in separate]), np.array([f for _, f in separate])
    deviation = np.sqrt(((forces - forces.mean(0)) ** 2).sum(-1).mean(0))
    assert energies.std() > 1e-3
    assert deviation.max() > 1e-3
    assert_same(evaluate(committee, atoms), (energies.mean(), forces.mean(0)))
    expected = {
        "energy": energies.mean(), "free_energy": energies.mean(), "forces": forces.mean(0),
        "energy_comm": energies, "energy_std": energies.std(), "forces_comm": forces, "forces_std": deviation,
        "max_forces_std": deviation.max(),
    }  # fmt: skip
    assert committee.results.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(committee.results[name], value, atol=1e-10, rtol=0, err_msg=name)


@pytest.mark.parametrize("strategy", ["auto", "batched", "passes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_separate_calculators(family, strategy, tmp_path):
    base = build_mace(family)
    folders = make_folders(base, tmp_path)
    committee = load_committee(base, list(folders.values()), strategy=strategy)
    assert committee.members == ("run_a", "run_b", "run_c")
    calculators = [stock(base, folder) for folder in folders.values()]
    for atoms in (ethanol(), ice(), ethanol(1)):
        assert_committee(committee, calculators, atoms)


@pytest.mark.parametrize("strategy", ["auto", "batched", "passes"])
def test_embedded_base_by_name(strategy, tmp_path):
    base = embedded_base(torch.float64)
    folders = make_folders(base, tmp_path)
    committee = load_committee("embedded", folders, default_dtype="float64", strategy=strategy)
    assert committee.members == ("a", "b", "c")
    acetamide = ase.build.molecule("CH3CONH2")
    assert_committee(committee, [stock(base, folder) for folder in folders.values()], acetamide)


def test_one_atom_alone(model):
    for strategy in ("batched", "passes"):
        committee = Committee(model, strategy=strategy)
        energy, forces = evaluate(committee, ase.Atoms("O"))
        assert np.isfinite(energy)
        np.testing.assert_array_equal(forces, np.zeros((1, 3)))


@pytest.mark.parametrize("strategy", ["auto", "batched", "passes"])
def test_predict_many_frames(base, folders, model, strategy):
    frames = [ethanol(0), ice(), ethanol(1), ethanol(2), ice(3)]
    found = committee_predict(model, frames, ["c", "a"], strategy=strategy, batch_size=2)
    separate = [[evaluate(stock(base, folders[n]), f) for f in frames] for n in ("c", "a")]
    assert found.names == ("c", "a")
    energies = torch.tensor([[e for e, _ in row] for row in separate])
    forces = torch.tensor(np.array([np.concatenate([f for _, f in row]) for row in separate]))
    torch.testing.assert_close(found.energies, energies, **CLOSE)
    torch.testing.assert_close(found.forces_comm, forces, **CLOSE)
    torch.testing.assert_close(found.energy, energies.mean(0), **CLOSE)
    torch.testing.assert_close(found.energy_std, (energies[0] - energies[1]).abs() / 2, **CLOSE)
    deviation = (forces[0] - forces[1]).norm(dim=-1) / 2
    torch.testing.assert_close(found.forces_std, deviation, **CLOSE)
    sizes = [len(f) for f in frames]
    assert found.frame.tolist() == [i for i, n in enumerate(sizes) for _ in range(n)]
    largest = torch.stack([part.max() for part in deviation.split(sizes)])
    torch.testing.assert_close(found.max_forces_std, largest, **CLOSE)


def test_predict_takes_a_batch_and_leaves_everything_alone(model):
    batch = molecules()
    expected = {}
    for name in CONFIGS:
        set_adapter(model, name)
        expected[name] = [t.detach() for t in energy_forces(model, batch)]
    base_result = None
    with disabled_adapters(model):
        base_result = energy_forces(model, batch)[0].detach()
    set_adapter(model, ["a", "b"])
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    given = {k: v.detach().clone() if torch.is_tensor(v) else v for k, v in batch.items()}

    def check(strategy):
        found = committee_predict(model, given, strategy=strategy)
        for k, name in enumerate(CONFIGS):
            torch.testing.assert_close(found.energies[k], expected[name][0], **CLOSE)
            torch.testing.assert_close(found.forces_comm[k], expected[name][1], **CLOSE)

    for strategy in ("batched", "passes"):
        check(strategy)
        with disabled_adapters(model):  # members act whatever the model's own state is
            check(strategy)
            torch.testing.assert_close(energy_forces(model, batch)[0], base_result, **CLOSE)
    assert not given["positions"].requires_grad
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
    assert all(layer.active_adapters == [n for n in "ab" if n in layer.lora_A] for layer in layers(model))
    merge_adapters(model, "b")
    for strategy in ("batched", "passes"):
        check(strategy)
    torch.testing.assert_close(energy_forces(model, batch)[0], expected["b"][0], **CLOSE)


def layers(model):
    return adapter_layers(model).values()


def test_weights_follow_the_factors(model):
    committee = Committee(model, ["a", "b"])
    first = evaluate(committee, ethanol())
    with torch.no_grad():  # the committee has its own copy
        for parameter in model.parameters():
            parameter.mul_(1.1)
    committee.reset()
    assert_same(evaluate(committee, ethanol()), first, atol=0)
    formed = committee._weights
    evaluate(committee, ethanol(1))
    assert committee._weights is formed  # nothing changed, nothing is formed again
    with torch.no_grad():
        for layer in layers(committee.model):
            for factor in layer.lora_B["a"].values():
                factor.zero_()
            for update in layer.lora_dense["a"].values():
                update.zero_()
    committee.reset()
    evaluate(committee, ethanol())
    base_energy = energy_of_base(committee.model)
    np.testing.assert_allclose(committee.results["energy_comm"][0], base_energy, atol=1e-10)
    assert abs(committee.results["energy_comm"][1] - base_energy) > 1e-3


def energy_of_base(model):
    with disabled_adapters(copy.deepcopy(model)) as plain:
        return evaluate(MACECalculator(models=[plain], device="cpu", default_dtype="float64"), ethanol())[0]


def test_float32_committee(base, folders):
    single = load_committee(base, folders, default_dtype="float32")
    double = load_committee(base, folders)
    assert next(double.model.parameters()).dtype == torch.float64
    assert next(base.parameters()).dtype == torch.float64
    assert_same(evaluate(single, ethanol()), evaluate(double, ethanol()), atol=1e-4)
    assert single.results["forces"].dtype == np.float32


def test_results_can_be_written(model, tmp_path):
    atoms = ethanol()
    atoms.calc = Committee(model)
    energy = atoms.get_potential_energy()
    ase.io.write(tmp_path / "x.xyz", atoms, format="extxyz")
    assert ase.io.read(tmp_path / "x.xyz").get_potential_energy() == pytest.approx(energy, abs=1e-8)


# -- calculator ----------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [False, True])
def test_switching_equals_fresh_calculators(base, folders, merge):
    calc = load_calculator(base, folders, merge=merge)
    assert isinstance(calc, MACECalculator)
    assert isinstance(calc, calculator_module.AdapterCalculator)
    assert calc.adapter_names == ["a", "b", "c"]
    assert calc.active_adapters == ["a"]
    expected = {name: evaluate(stock(base, folder), ethanol()) for name, folder in folders.items()}
    atoms = ethanol()
    atoms.calc = calc
    for name in ("a", "c", "b", "a"):
        calc.set_adapter(name)
        assert not calc.results
        assert_same((atoms.get_potential_energy(), atoms.get_forces()), expected[name])
        assert not any(p.requires_grad for p in calc.models[0].parameters())
    assert adapter_names(base) == []  # the caller's model is left alone
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("merge", [False, True])
def test_disabled_is_the_base(base, folders, merge):
    calc = load_calculator(base, folders, merge=merge)
    expected = evaluate(MACECalculator(models=[copy.deepcopy(base)], device="cpu", default_dtype="float64"), ethanol())
    atoms = ethanol()
    atoms.calc = calc
    adapted = atoms.get_potential_energy()
    with calc.disabled() as inside:
        assert inside is calc
        assert calc.active_adapters == []
        assert_same((atoms.get_potential_energy(), atoms.get_forces()), expected)
    assert calc.active_adapters == ["a"]
    assert atoms.get_potential_energy() == pytest.approx(adapted, abs=1e-10)
    assert abs(adapted - expected[0]) > 1e-3
    with pytest.raises(RuntimeError, match="inside"), calc.disabled():
        raise RuntimeError("inside")
    assert atoms.get_potential_energy() == pytest.approx(adapted, abs=1e-10)


def test_sum_of_adapters(base, folders, model):
    calc = load_calculator(base, folders)
    calc.set_adapter(["a", "c"])
    both = merge_lora(set_adapter(model, ["a", "c"]))
    expected = evaluate(MACECalculator(models=[both], device="cpu", default_dtype="float64"), ethanol())
    assert_same(evaluate(calc, ethanol()), expected)


def test_every_form_of_base_and_adapter(base, folders, tmp_path):
    save_base(base, tmp_path / "base")
    torch.save(base, tmp_path / "base.model")
    expected = evaluate(stock(base, folders["b"]), ethanol())
    for source in (base, tmp_path / "base", str(tmp_path / "base.json"), tmp_path / "base.model"):
        calc = load_calculator(source, folders["b"], default_dtype="float64")
        assert calc.adapter_names == ["default"]
        assert_same(evaluate(calc, ethanol()), expected)
    plain = load_calculator(tmp_path / "base")
    assert plain.adapter_names == []
    reference = MACECalculator(models=[copy.deepcopy(base)], device="cpu", default_dtype="float64")
    assert_same(evaluate(plain, ethanol()), evaluate(reference, ethanol()))


@pytest.mark.parametrize("merge", [False, True])
def test_adapters_follow_the_dtype(base, folders, merge):
    calc = load_calculator(base, folders, default_dtype="float32", merge=merge)
    assert {p.dtype for p in calc.models[0].parameters()} == {torch.float32}
    for name in ("b", "a"):
        calc.set_adapter(name)
        assert_same(evaluate(calc, ethanol()), evaluate(stock(base, folders[name], "float32"), ethanol()), atol=2e-5)
        with calc.disabled():
            evaluate(calc, ethanol())


def foundation_adapters(tmp_path, settings, references=False):
    """A foundation model and one adapter folder for each preparation of it."""
    foundation = build_mace(zs=(1, 6, 7, 8))
    folders = {}
    for seed, (name, (elements, hydrogen)) in enumerate(settings.items()):
        energies = {str(z): -10.0 * z for z in elements} | {"1": hydrogen}
        wanted = {"elements": elements, "heads": ["Default"], "E0s": {"Default": energies}, "dtype": "float64"}
        prepared = prepare_base(foundation, wanted)
        metadata = describe_base(prepared) | {"foundation_fingerprint": fingerprint(foundation)}
        plan = plan_lora(prepared, CONFIGS["a"]) + ([reference_plan()] if references else [])
        model = apply_plan(prepared, plan, CONFIGS["a"], "default")
        randomise(model, std=0.02, seed=seed)
        folders[name] = save_adapter(
            model, tmp_path / name, config=CONFIGS["a"], metadata=metadata, dtype=torch.float64
        )
    return foundation, folders


def test_foundation_model_is_prepared_once(tmp_path):
    foundation, folders = foundation_adapters(tmp_path, {"a": ([1, 6, 8], -13.5), "b": ([1, 6, 8], -13.5)})
    calculators = {name: stock(foundation, folder) for name, folder in folders.items()}
    calc = load_calculator(foundation, folders)
    for name, single in calculators.items():
        calc.set_adapter(name)
        assert_same(evaluate(calc, ethanol()), evaluate(single, ethanol()))
    assert_committee(load_committee(foundation, folders), list(calculators.values()), ethanol())


def test_adapters_of_one_foundation_keep_their_own_energy_references(tmp_path):
    """Data sets of two methods have other E0s: the difference belongs to the adapter."""
    settings = {"a": ([1, 6, 8], -13.5), "b": ([1, 6, 8], -14.25)}
    foundation, folders = foundation_adapters(tmp_path, settings, references=True)
    calculators = {name: stock(foundation, folder) for name, folder in folders.items()}
    calc = load_calculator(foundation, folders)
    for name, single in calculators.items():
        calc.set_adapter(name)
        assert_same(evaluate(calc, ethanol()), evaluate(single, ethanol()))
    assert_committee(load_committee(foundation, folders), list(calculators.values()), ethanol())


def test_differences_of_references_follow_the_heads_of_the_model():
    """Files have their heads in alphabetical order."""
    before, now = ({h: {"8": a + b, "1": a} for h, b in (("Default", 0.5), ("pt_head", 2.0))} for a in (1.0, 0.0))
    now["pt_head"]["8"] = 1.0
    expected = [[1.0, 2.0], [1.0, 1.0]]
    np.testing.assert_allclose(difference(before, now, ["pt_head", "Default"]), expected)
    assert difference(before, now, ["Default"]) is None and difference(None, now, ["Default"]) is None


def test_second_adapter_in_another_precision(tmp_path):
    """Selecting elements scales weights: in another precision than in training the last digits differ."""
    foundation, folders = foundation_adapters(tmp_path, {"a": ([1, 6, 8], -13.5), "b": ([1, 6, 8], -13.5)})
    single = foundation.float()
    for dtype in ("float32", "float64"):
        calc = load_calculator(single, folders, default_dtype=dtype)
        assert calc.adapter_names == ["a", "b"]


# -- errors --------------------------------------------------------------------------------------


def test_adapters_of_different_bases(tmp_path):
    settings = {"a": ([1, 6, 8], -13.5), "elements": ([1, 8], -13.5), "energies": ([1, 6, 8], -13.25)}
    foundation, folders = foundation_adapters(tmp_path, settings)
    with pytest.raises(
        ValueError, match=r"'a' and 'elements' belong to different prepared bases: elements \[1, 6, 8\] and"
    ):
        load_calculator(foundation, {n: folders[n] for n in ("a", "elements")})
    with pytest.raises(
        ValueError, match=r"'a' and 'energies' belong to different prepared bases: E0s \(eV\).*-13\.5.*-13\.25"
    ):
        load_committee(foundation, {n: folders[n] for n in ("a", "energies")})
    _, others = foundation_adapters(tmp_path / "other", {"other": ([1, 6, 8], -13.5)})
    with pytest.raises(ValueError, match=r"different prepared bases: foundation_fingerprint \w{64} and \w{64}"):
        load_committee(foundation, {"a": folders["a"], **others})
    with pytest.raises(ValueError, match=r"base: it has adapters already \(default\) and is not the prepared base"):
        load_calculator(apply_lora(copy.deepcopy(foundation), CONFIGS["a"]), folders["a"])
    with pytest.raises(ValueError, match="it was trained on another base model"):
        load_calculator(build_mace(), folders["a"])


def test_wrong_names(model, base, folders):
    calc = load_calculator(base, folders)
    with pytest.raises(ValueError, match="adapter 'x' is not in the model; expected one of a, b, c"):
        calc.set_adapter("x")
    assert calc.active_adapters == ["a"]
    for call in (Committee, lambda m, names: committee_predict(m, ethanol(), names)):
        with pytest.raises(ValueError, match="adapter 'x' is not in the model; expected one of a, b, c"):
            call(model, ["a", "x"])
        with pytest.raises(ValueError, match=r"needs at least two different adapters, got \['a'\]"):
            call(model, ["a"])
        with pytest.raises(ValueError, match=r"needs at least two different adapters, got \['a', 'a'\]"):
            call(model, ["a", "a"])
        with pytest.raises(ValueError, match=r"needs at least two different adapters, got \[\]"):
            call(model, [])
    with pytest.raises(ValueError, match=r"needs at least two adapter folders, got \[\]"):
        load_committee(base, [])
    with pytest.raises(ValueError, match=r"needs at least two adapter folders"):
        load_committee(base, folders["a"])
    with pytest.raises(ValueError, match="adapter: expected at least one adapter folder, got none"):
        load_calculator(base, {})


def test_wrong_values(model, base, folders, tmp_path):
    with pytest.raises(ValueError, match="strategy: expected one of auto, batched, passes, got 'vmap'"):
        Committee(model, strategy="vmap")
    with pytest.raises(ValueError, match="default_dtype: expected one of float32, float64 or '', got 'half'"):
        load_calculator(base, folders["a"], default_dtype="half")
    with pytest.raises(ValueError, match="head: the model has no head 'x'; expected one of Default"):
        load_calculator(base, folders["a"], head="x")
    with pytest.raises(ValueError, match="head: the model has several; choose one of p, q"):
        load_calculator(build_mace(heads=("p", "q")))
    with pytest.raises(ValueError, match="enable_cueq=True rebuilds the model without its adapters"):
        load_calculator(base, folders["a"], enable_cueq=True)
    with pytest.raises(ValueError, match="frames: expected at least one, got 0"):
        committee_predict(model, [])
    with pytest.raises(ValueError, match=r"does not know the atomic numbers \[7\], only \[1, 6, 8\]"):
        committee_predict(model, ase.Atoms("N"))
    assert torch.get_default_dtype() == torch.float64
    with pytest.raises(FileNotFoundError, match="no model"):
        load_calculator(tmp_path / "none", folders["a"])
    with pytest.raises(FileNotFoundError, match=r"expected a file adapter_config\.json"):
        load_calculator(base, tmp_path / "none")


def test_head_of_a_multi_head_model(tmp_path):
    base = build_mace(heads=("p", "q"))
    folders = make_folders(base, tmp_path)
    for head in ("p", "q"):
        committee = load_committee(base, folders, head=head)
        calculators = [load_calculator(base, folder, head=head) for folder in folders.values()]
        assert_committee(committee, calculators, ethanol())
    assert abs(evaluate(load_committee(base, folders, head="p"), ethanol())[0] - evaluate(committee, ethanol())[0]) > 1


def test_importing_needs_no_mace():
    code = "import sys, mace_lora.lora.committee; assert 'mace' not in sys.modules and 'e3nn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
