"""Adapter files: PEFT's layout, exact round trip, and what happens to broken ones."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from models import build_mace, energy_forces, molecules, randomise

pytest.importorskip("mace")

from mace_lora import (
    LoraConfig,
    apply_lora,
    combine_adapters,
    delete_adapter,
    fingerprint,
    load_adapter,
    merge_adapters,
    merge_lora,
    read_adapter,
    save_adapter,
)
from mace_lora.mace_plugin.base_model import describe_base, load_base, prepare_base, save_base

pytestmark = [pytest.mark.mace, pytest.mark.usefixtures("double")]
CONFIG = LoraConfig(rank=2, alpha=3.0, rank_pattern={"1o": 1})


@pytest.fixture()
def base():
    return build_mace()


@pytest.fixture()
def folder(base, tmp_path):
    model = apply_lora(copy.deepcopy(base), CONFIG)
    randomise(model)
    return save_adapter(model, tmp_path / "adapter", config=CONFIG, dtype=torch.float64)


def test_fingerprint_ignores_adapters_and_dtype(base):
    print_of_base = fingerprint(base)
    model = apply_lora(copy.deepcopy(base), CONFIG)
    randomise(model)
    assert fingerprint(model) == print_of_base
    merge_adapters(model, "default")
    assert fingerprint(model) == print_of_base
    assert fingerprint(copy.deepcopy(base).float()) == print_of_base
    assert fingerprint(merge_lora(model)) != print_of_base
    other = copy.deepcopy(base)
    other.interactions[0].avg_num_neighbors = 5.0
    assert fingerprint(other) != print_of_base
    other = copy.deepcopy(base)
    other.atomic_energies_fn.atomic_energies[0] += 1.0
    assert fingerprint(other) != print_of_base


def test_round_trip_is_exact_in_a_fresh_process(base, folder, tmp_path):
    batch = molecules()
    model = load_adapter(copy.deepcopy(base), folder)
    results = [t.detach() for t in energy_forces(model, batch)]
    torch.save((base, batch, model.state_dict(), *results), tmp_path / "expected.pt")
    code = (
        "import mace, torch, sys; torch.set_default_dtype(torch.float64)\n"
        "base, batch, state, energy, forces = torch.load(sys.argv[1], weights_only=False)\n"
        "from mace_lora import load_adapter\n"
        "model = load_adapter(base, sys.argv[2])\n"
        "got = model.state_dict()\n"
        "assert got.keys() == state.keys() and all(torch.equal(got[k], state[k]) for k in state)\n"
        "out = model(dict(batch), compute_force=True)\n"
        # the JIT may fuse differently in another process, hence not bit for bit
        "torch.testing.assert_close(out['energy'], energy, atol=1e-12, rtol=1e-14)\n"
        "torch.testing.assert_close(out['forces'], forces, atol=1e-12, rtol=1e-14)\n"
        "assert 'peft' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, tmp_path / "expected.pt", folder], check=True)


def test_stored_as_float32_and_small_by_default(base, folder, tmp_path):
    model = load_adapter(copy.deepcopy(base), folder)
    small = save_adapter(model, tmp_path / "small")
    assert {t.dtype for t in read_adapter(small).tensors.values()} == {torch.float32}
    sizes = [(f / "adapter_model.safetensors").stat().st_size for f in (small, folder)]
    assert sizes[0] < sizes[1]
    card = (small / "README.md").read_text()
    assert "base fingerprint" in card
    assert fingerprint(base) in card


def test_combination_round_trip(base, tmp_path):
    model = apply_lora(copy.deepcopy(base), CONFIG)
    randomise(model)
    apply_lora(model, LoraConfig(rank=3), "b")
    randomise(model, seed=5)
    combine_adapters(model, {"default": 0.25, "b": 0.75}, "mixed")
    batch = molecules()
    expected = energy_forces(model, batch)
    folder = save_adapter(model, tmp_path / "mixed", adapter_name="mixed", dtype=torch.float64)
    loaded = load_adapter(copy.deepcopy(base), folder, adapter_name="other")
    for a, b in zip(energy_forces(loaded, batch), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match=r"adapter_name: the model has adapters \['default', 'b', 'mixed'\]"):
        save_adapter(model, tmp_path / "x")


def test_saved_again_it_keeps_settings_and_provenance(base, folder, tmp_path):
    """An adapter that was loaded and saved is known by what its training wrote, and so is a combination."""
    told = {"elements": ["H", "C"], "E0s": {"H": -1.0}, "base_model": "some/model"}
    model = load_adapter(copy.deepcopy(base), folder)
    first = save_adapter(model, tmp_path / "first", config=CONFIG, metadata=told, dtype=torch.float64)
    other = save_adapter(model, tmp_path / "other", config=CONFIG, metadata=told | {"E0s": {"H": -2.0}})
    model = load_adapter(copy.deepcopy(base), first)
    again = save_adapter(model, tmp_path / "again", dtype=torch.float64)
    for name in ("adapter_config.json", "README.md"):
        assert (again / name).read_text() == (first / name).read_text()
    assert read_adapter(again).config == CONFIG
    model = load_adapter(model, other, adapter_name="other")
    combine_adapters(model, {"default": 0.5, "other": 0.5}, "both")
    found = read_adapter(save_adapter(model, tmp_path / "both", adapter_name="both")).metadata
    assert found == {
        "elements": ["H", "C"], "base_model": "some/model", "base_fingerprint": fingerprint(base),
        "combined": {"default": 0.5, "other": 0.5},
    }  # fmt: skip
    delete_adapter(model, "default")
    apply_lora(model, LoraConfig(rank=3), "default")
    assert "elements" not in read_adapter(save_adapter(model, tmp_path / "new", adapter_name="default")).metadata
    merge_lora(model)
    assert not any("lora" in key for key in vars(model))


def test_peft_reads_and_writes_the_same_files(base, folder, tmp_path):
    peft = pytest.importorskip("peft")
    from mace_lora import register_peft
    from mace_lora.lora.peft_bridge import peft_config

    register_peft()
    batch = molecules()
    expected = energy_forces(load_adapter(copy.deepcopy(base), folder), batch)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    for a, b in zip(energy_forces(theirs, batch), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    with theirs.disable_adapter():
        torch.testing.assert_close(energy_forces(theirs, batch)[0], energy_forces(base, batch)[0], atol=1e-12, rtol=0)
    theirs.load_adapter(folder, "second")
    theirs.set_adapter("second")
    torch.testing.assert_close(energy_forces(theirs, batch)[0], expected[0], atol=1e-12, rtol=0)
    theirs.delete_adapter("second")
    merged = theirs.merge_and_unload()
    assert list(merged.state_dict()) == list(base.state_dict())
    torch.testing.assert_close(energy_forces(merged, batch)[0], expected[0], atol=1e-10, rtol=0)

    new = peft.get_peft_model(copy.deepcopy(base), peft_config(base, CONFIG))
    torch.testing.assert_close(energy_forces(new, batch)[0], energy_forces(base, batch)[0], atol=1e-12, rtol=0)
    randomise(new)
    new.save_pretrained(tmp_path / "theirs")
    again = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(energy_forces(again, batch)[0], energy_forces(new, batch)[0], atol=1e-12, rtol=0)


def test_peft_options_that_would_be_ignored_are_errors(base):
    pytest.importorskip("peft")
    from mace_lora.lora.peft_bridge import EquituneLoraConfig, peft_config

    good = peft_config(base, CONFIG)
    for option, value in {"use_dora": True, "init_lora_weights": "pissa", "lora_dropout": 0.1}.items():
        with pytest.raises(ValueError, match=f"{option}: equivariant LoRA layers cannot honour"):
            EquituneLoraConfig(equitune=good.equitune, target_modules=good.target_modules, **{option: value})
    EquituneLoraConfig(use_dora=True, target_modules=["q"])  # other users' configs are left alone


def test_contract_with_peft():
    pytest.importorskip("peft")
    from mace_lora.lora.peft_bridge import check_peft

    assert [problem for _, problem in check_peft() if problem] == []


def test_wrong_base_names_both_fingerprints(base, folder):
    other = build_mace()
    with pytest.raises(ValueError, match=f"expected fingerprint {fingerprint(base)}.*got {fingerprint(other)}"):
        load_adapter(other, folder)
    content = json.loads((folder / "adapter_config.json").read_text())
    content["equitune"]["metadata"] |= {"framework": "nequip", "base_fingerprint": "0", "base_model": "x.nequip.zip"}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"of a MACE model, got one of a NequIP-framework model \(x.nequip.zip\)"):
        load_adapter(base, folder)
    smaller = build_mace(hidden="2x0e+2x1o")
    with pytest.raises(ValueError, match=r"expected shape .* from the model, got .*; wrong base model"):
        load_adapter(smaller, folder, check_base=False)
    peft = pytest.importorskip("peft")
    from mace_lora import register_peft

    register_peft()
    with pytest.raises(ValueError, match=r"trained on another base model: weights of .* have fingerprint .*, expected"):
        peft.PeftModel.from_pretrained(copy.deepcopy(other), folder)
    with pytest.raises(ValueError, match=r"the model has no layer for it"):
        load_adapter(torch.nn.Linear(2, 2), folder, check_base=False)


def test_foundation_model_is_prepared_like_in_training(tmp_path):
    foundation = build_mace(zs=(1, 6, 7, 8))
    wanted = {
        "elements": [1, 8], "heads": ["Default"], "E0s": {"Default": {"1": -13.5, "8": -2000.25}}, "dtype": "float64",
    }  # fmt: skip
    prepared = prepare_base(foundation, wanted)
    assert describe_base(prepared)["E0s"] == wanted["E0s"]
    model = apply_lora(copy.deepcopy(prepared), CONFIG)
    randomise(model)
    metadata = describe_base(prepared) | {"foundation_fingerprint": fingerprint(foundation)}
    folder = save_adapter(model, tmp_path / "a", config=CONFIG, metadata=metadata, dtype=torch.float64)
    batch = molecules(zs=(1, 8))
    loaded = load_adapter(foundation, folder)
    torch.testing.assert_close(energy_forces(loaded, batch)[0], energy_forces(model, batch)[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", ["agnostic", "density", "nonlinear"])
def test_base_as_safetensors(family, tmp_path):
    base = build_mace(family)
    save_base(base, tmp_path / "base")
    loaded = load_base(tmp_path / "base")
    batch = molecules()
    assert fingerprint(loaded) == fingerprint(base)
    torch.testing.assert_close(energy_forces(loaded, batch)[0], energy_forces(base, batch)[0], atol=1e-12, rtol=0)


def damage_truncate(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def damage_garbage(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"not a safetensors file")


def damage_json(folder):
    (folder / "adapter_config.json").write_text("{")


def damage_foreign(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')


def damage_weights_missing(folder):
    (folder / "adapter_model.safetensors").unlink()


def damage_nan(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, folder / "adapter_model.safetensors")


def damage_mismatch(folder):
    content = json.loads((folder / "adapter_config.json").read_text())
    content["equitune"]["modules"].popitem()
    (folder / "adapter_config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (damage_truncate, ValueError, "adapter_model.safetensors is corrupt or truncated"),
        (damage_garbage, ValueError, "adapter_model.safetensors is corrupt or truncated"),
        (damage_json, ValueError, "adapter_config.json is not readable JSON"),
        (damage_foreign, ValueError, "expected key 'equitune' with format 1"),
        (damage_weights_missing, FileNotFoundError, "expected a file adapter_model.safetensors"),
        (damage_nan, ValueError, "contains NaN or infinity; the adapter is unusable"),
        (damage_mismatch, ValueError, "do not belong together"),
    ],
)
def test_broken_files(folder, base, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message):
        load_adapter(copy.deepcopy(base), folder)


def test_an_adapter_with_nan_is_not_saved_and_the_old_one_stays(folder, base):
    before = (folder / "adapter_model.safetensors").read_bytes()
    model = load_adapter(copy.deepcopy(base), folder)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("inf"))
    with pytest.raises(ValueError, match=r"contains NaN or infinity in .*; it was not saved"):
        save_adapter(model, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="the model has no adapter 'x'"):
        save_adapter(model, folder, adapter_name="x")
