"""The NequIP extension is registered, light, and the LoRA core works with NequIP's e3nn."""

import importlib.metadata
import subprocess
import sys

import pytest

pytest.importorskip("nequip")

pytestmark = pytest.mark.nequip


def test_registered_for_every_import_of_nequip():
    found = importlib.metadata.entry_points(group="nequip.extension")
    assert ("init_always", "nequip_ext") in {(e.name, e.value) for e in found}


def test_import_stays_light_and_is_done_by_nequip():
    code = """
import sys
class Spy:  # whether a package is installed or not: what our files ask for
    asked = []
    def find_spec(self, name, path=None, target=None):
        frame = sys._getframe(1)
        while "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        if {"mace_lora", "nequip_ext"} & {*frame.f_code.co_filename.split("/")}:
            self.asked.append(name)
sys.meta_path.insert(0, Spy())
import nequip
assert "nequip_ext" in sys.modules and "mace_lora.lora.layers" not in sys.modules
print(Spy.asked)
exec(compile("import json.tool", "x/nequip_ext/y.py", "exec"))
print(Spy.asked[-1])
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    *_, asked, seen = done.stdout.strip().splitlines()
    assert seen == "json.tool"  # the spy sees what our files import
    assert not any(name in asked for name in ("peft", "transformers", "hydra", "lightning"))


def test_nothing_heavy_comes_along():
    """torchmetrics, which nequip imports, imports transformers wherever it is installed: we must not bring it."""
    required = [r for r in importlib.metadata.requires("equitune") or () if "extra ==" not in r]
    assert required and not [r for r in required if r.startswith(("peft", "transformers", "accelerate"))]


def test_core_adapts_a_real_nequip_model():
    """Coverage of a NequIP GNN by the e3nn-level core: identity, training and merge."""
    import torch
    from nequip.data import AtomicDataDict, compute_neighborlist_, from_ase
    from nequip.model import NequIPGNNModel
    from nequip.utils.global_state import set_global_state

    from mace_lora import LoraConfig, apply_lora, coverage, disabled_adapters, merge_lora

    set_global_state()
    torch.manual_seed(0)
    model = NequIPGNNModel(
        seed=1, model_dtype="float64", r_max=4.0, type_names=["H", "C", "O"], num_layers=2, l_max=1, parity=True,
        num_features=4, radial_mlp_depth=1, radial_mlp_width=8, avg_num_neighbors=4.0,
    )  # fmt: skip
    from ase.build import molecule

    data = compute_neighborlist_(from_ase(molecule("CH3CHO")), r_max=4.0)
    data[AtomicDataDict.ATOM_TYPE_KEY] = torch.tensor([{6: 1, 8: 2, 1: 0}[int(z)] for z in molecule("CH3CHO").numbers])
    data[AtomicDataDict.POSITIONS_KEY] = data[AtomicDataDict.POSITIONS_KEY].double()

    def energy(net):
        return net(dict(data))[AtomicDataDict.TOTAL_ENERGY_KEY].detach()

    before = energy(model)
    apply_lora(model, LoraConfig(rank=2))
    assert torch.equal(energy(model), before)
    kinds = {r.kind for r in coverage(model).rows}
    assert {"o3.Linear", "o3.FullyConnectedTensorProduct"} <= kinds
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    after = energy(model)
    assert (after - before).abs().max() > 1e-6
    with disabled_adapters(model):
        assert torch.equal(energy(model), before)
    torch.testing.assert_close(energy(merge_lora(model)), after, atol=1e-10, rtol=0)


def test_import_of_nequip_costs_under_5_percent_more():
    """CPU time of our part alone (with the start-up hook) against all of ``import nequip``; the least of three."""
    code = "import time; start = time.process_time(); import {}; print(time.process_time() - start)"
    seconds = []
    for modules in ("nequip_ext, mace_lora, mace_lora.mace_plugin.startup", "nequip"):
        runs = [
            subprocess.run([sys.executable, "-W", "ignore", "-c", code.format(modules)], capture_output=True, text=True)
            for _ in range(3)
        ]
        seconds.append(min(float(r.stdout.split()[-1]) for r in runs))
    assert seconds[0] < 0.05 * seconds[1]
