"""The adapter on single layers of e3nn and torch, in float64, with both e3nn versions."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from e3nn import o3
from e3nn.nn import FullyConnectedNet
from torch import nn

from mace_lora import (
    LoraConfig,
    adapter_names,
    apply_lora,
    combine_adapters,
    coverage,
    delete_adapter,
    disabled_adapters,
    merge_adapters,
    merge_lora,
    set_adapter,
    unmerge_adapters,
)

pytestmark = pytest.mark.usefixtures("double")
IN, OUT = "3x0e+2x1o+2x0e+1x1e+2x2e", "2x0e+4x1o+1x0e+3x1e+1x0o"


class Single(nn.Module):
    """A layer in a model, with inputs that fit it."""

    def __init__(self, layer: nn.Module, *irreps: str) -> None:
        super().__init__()
        self.layer, self.irreps = layer, [o3.Irreps(i) for i in irreps]

    def inputs(self, n: int = 7):
        return [i.randn(n, -1) for i in self.irreps]

    def forward(self, *x):
        return self.layer(*x)


def linear(**kwargs):
    layer = o3.Linear(IN, OUT, **kwargs)
    if layer.bias_numel:
        nn.init.normal_(layer.bias)
    return Single(layer, IN)


KINDS = {
    "o3.Linear": linear,
    "o3.Linear biased": lambda: linear(biases=True),
    # 3x0e -> 2x0e, 2x1o -> 4x1o, 2x0e -> 1x0e only
    "o3.Linear restricted": lambda: linear(instructions=[(0, 0), (1, 1), (2, 2)], biases=True),
    "FullyConnectedTensorProduct": lambda: Single(
        o3.FullyConnectedTensorProduct("2x0e+3x1o+2x2e", "3x0e", "4x0e+2x1o+1x2e"), "2x0e+3x1o+2x2e", "3x0e"
    ),
    "FullyConnectedTensorProduct, l > 0 attributes": lambda: Single(
        o3.FullyConnectedTensorProduct("2x0e+1x1o", "1x0e+1x1o", "2x0e+2x1o+1x1e"), "2x0e+1x1o", "1x0e+1x1o"
    ),
    "FullyConnectedNet": lambda: Single(FullyConnectedNet([5, 6, 4], torch.nn.functional.silu), "5x0e"),
    "nn.Linear": lambda: Single(nn.Linear(5, 3), "5x0e"),
    "radial MLP": lambda: Single(nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.SiLU(), nn.Linear(6, 4)), "5x0e"),
}


@pytest.fixture(params=list(KINDS))
def single(request):
    return KINDS[request.param]()


def randomised(model, rank=2, **kwargs):
    apply_lora(model, LoraConfig(rank=rank, alpha=3.0, **kwargs))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    return model


def test_identity_at_start(single):
    x = single.inputs()
    before = single(*x)
    apply_lora(single, LoraConfig(rank=2))
    assert torch.equal(single(*x), before)


def test_update_changes_the_output_and_disabling_restores_it(single):
    x = single.inputs()
    before = single(*x)
    randomised(single)
    assert (single(*x) - before).abs().max() > 1e-3
    with disabled_adapters(single):
        assert torch.equal(single(*x), before)


@pytest.mark.parametrize("kind", [k for k in KINDS if "Tensor" in k or "o3" in k])
def test_equivariance_with_inversion(kind):
    single = randomised(KINDS[kind]())
    layer = single.layer.base_layer
    x = single.inputs()
    for inversion in (0, 1):
        rotation = o3.rand_matrix() * (-1) ** inversion
        rotated = [v @ i.D_from_matrix(rotation).T for v, i in zip(x, single.irreps, strict=True)]
        expected = single(*x) @ o3.Irreps(str(layer.irreps_out)).D_from_matrix(rotation).T
        torch.testing.assert_close(single(*rotated), expected, atol=1e-10, rtol=0)


def test_merged_equals_unmerged_and_is_stock_again(single):
    stock = {n: type(m).__qualname__ for n, m in single.named_modules()}
    randomised(single)
    x = single.inputs()
    unmerged = single(*x)
    merged = merge_lora(copy.deepcopy(single))
    torch.testing.assert_close(merged(*x), unmerged, atol=1e-10, rtol=0)
    assert {n: type(m).__qualname__ for n, m in merged.named_modules()} == stock
    assert all(p.requires_grad for p in merged.parameters())


def test_merge_in_place_and_exact_unmerge(single):
    x = single.inputs()
    base = single(*x)
    randomised(single)
    unmerged = single(*x)
    weights = {n: v.clone() for n, v in single.state_dict().items()}
    merge_adapters(single, "default")
    torch.testing.assert_close(single(*x), unmerged, atol=1e-10, rtol=0)
    with disabled_adapters(single):
        assert torch.equal(single(*x), base)
    unmerge_adapters(single)
    assert all(torch.equal(v, weights[n]) for n, v in single.state_dict().items())
    assert torch.equal(single(*x), unmerged)


def test_only_adapter_tensors_change_in_a_training_step(single):
    apply_lora(single, LoraConfig(rank=2))
    before = {n: v.clone() for n, v in single.named_parameters()}
    optimiser = torch.optim.Adam([p for p in single.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # the first step moves B only, because B starts at zero
        optimiser.zero_grad()
        single(*single.inputs()).square().sum().backward()
        optimiser.step()
    changed = {n for n, v in single.named_parameters() if not torch.equal(v, before[n])}
    assert changed == {n for n in before if ".lora_A." in n or ".lora_B." in n}


def test_gradients_of_gradients(single):
    randomised(single)
    x = [v.requires_grad_() for v in single.inputs(2)]
    assert torch.autograd.gradgradcheck(lambda *v: single(*v), tuple(x))
    factors = [p for p in single.parameters() if p.requires_grad]
    force = torch.autograd.grad(single(*x).square().sum(), x[0], create_graph=True)[0]
    assert all(g is not None for g in torch.autograd.grad(force.square().sum(), factors, allow_unused=True))


def test_deepcopy_pickle_and_dtype(single):
    randomised(single)
    x = single.inputs()
    expected = single(*x)
    assert torch.equal(copy.deepcopy(single)(*x), expected)
    if hasattr(single.layer, "base_layer") or isinstance(single.layer, nn.Sequential):
        assert torch.equal(pickle.loads(pickle.dumps(single))(*x), expected)
    low = copy.deepcopy(single).to(torch.float32)
    torch.testing.assert_close(low(*[v.float() for v in x]).double(), expected, atol=1e-3, rtol=1e-4)


def test_no_stale_state_after_switching_between_modes(single):
    randomised(single)
    x = single.inputs()
    with torch.no_grad():
        first = single(*x)
        for p in single.parameters():
            if p.requires_grad:
                p.mul_(2)
        second = single(*x)
    assert (second - first).abs().max() > 1e-3
    assert torch.equal(single(*x), second)


def test_several_adapters_switch_delete_combine(single):
    x = single.inputs()
    base = single(*x)
    randomised(single)
    first = single(*x)
    apply_lora(single, LoraConfig(rank=3, alpha=1.0), "second")
    assert adapter_names(single) == ["default", "second"]
    with torch.no_grad():
        for p in single.parameters():
            if p.requires_grad:
                p.normal_()
    second = single(*x)
    set_adapter(single, "default")
    assert torch.equal(single(*x), first)
    trained = [n for n, p in single.named_parameters() if p.requires_grad]
    assert trained
    assert all(".default." in n for n in trained)
    combine_adapters(single, {"default": 0.5, "second": 2.0}, "both")
    if not isinstance(single.layer, nn.Sequential):  # linear in the weights
        torch.testing.assert_close(single(*x), base + 0.5 * (first - base) + 2 * (second - base), atol=1e-9, rtol=0)
    set_adapter(single, ["default", "second"])
    if not isinstance(single.layer, nn.Sequential):
        torch.testing.assert_close(single(*x), first + second - base, atol=1e-9, rtol=0)
    delete_adapter(single, "both")
    delete_adapter(single, "second")
    set_adapter(single, "default")
    assert torch.equal(single(*x), first)


def test_each_irrep_is_independent():
    model = randomised(linear())
    layer = model.layer
    assert set(layer.lora_A["default"]) == {"0e", "1o", "1e"}
    before = layer.delta("weight").clone()
    with torch.no_grad():
        layer.lora_A["default"]["1o"].add_(1.0)
    moved = (layer.delta("weight") - before) != 0
    expected = torch.zeros_like(moved)
    offset = 0
    for ins in layer.base_layer.instructions:
        size = ins.path_shape[0] * ins.path_shape[1]
        expected[offset : offset + size] = str(layer.base_layer.irreps_in[ins.i_in].ir) == "1o"
        offset += size
    assert torch.equal(moved, expected)


def test_repeated_irreps_share_one_stacked_pair():
    model = randomised(linear())
    block = next(b for b in model.layer.spec.blocks if b.name == "0e")
    assert (block.m, block.n) == (5, 3)  # 3 + 2 input and 2 + 1 output channels
    a, b = (getattr(model.layer, s)["default"]["0e"] for s in ("lora_A", "lora_B"))
    full = 1.5 * a @ b  # alpha/r = 3/2
    offset, delta = 0, model.layer.delta("weight")
    rows, cols = {0: (0, 3), 2: (3, 5)}, {0: (0, 2), 2: (2, 3)}
    for ins in model.layer.base_layer.instructions:
        size = ins.path_shape[0] * ins.path_shape[1]
        if ins.i_in in rows:
            tile = full[slice(*rows[ins.i_in]), slice(*cols[ins.i_out])]
            torch.testing.assert_close(delta[offset : offset + size], tile.reshape(-1))
        offset += size


def test_rank_patterns_and_clipping():
    model = apply_lora(linear(), LoraConfig(rank=4, rank_pattern={"1o": 1, "1e": 0}))
    assert {b: a.shape[1] for b, a in model.layer.lora_A["default"].items()} == {"0e": 4, "1o": 1}
    clipped = apply_lora(linear(), LoraConfig(rank=4, clip_rank=True))
    assert {b: a.shape[1] for b, a in clipped.layer.lora_A["default"].items()} == {"0e": 3, "1o": 2, "1e": 1}
    by_module = apply_lora(KINDS["radial MLP"](), LoraConfig(rank=4, module_rank_pattern={r"\.3$": 2}))
    assert by_module.layer[3].lora_A["default"]["0e"].shape[1] == 2
    assert by_module.layer[0].lora_A["default"]["0e"].shape[1] == 4


def test_targets_and_dense():
    model = apply_lora(KINDS["radial MLP"](), LoraConfig(rank=2, targets=(r"\.0$",), dense=(r"\.1\.weight",)))
    report = coverage(model)
    assert [(r.module, r.rank) for r in report.rows] == [("layer.0", 2), ("layer.1.weight", None)]
    assert report.trainable == 2 * (5 + 6) + 6
    assert {r.module for r in report.unreached} == {"layer.0.bias", "layer.1.bias", "layer.3.weight", "layer.3.bias"}
    assert "layer.0" in str(report)


def test_coverage_counts_what_is_trained():
    model = apply_lora(linear(biases=True), LoraConfig(rank=2))
    report = coverage(model)
    assert report.trainable == sum(r.parameters for r in report.rows) == 2 * ((5 + 3) + (2 + 4) + (1 + 3))
    assert report.total == model.layer.base_layer.weight.numel() + model.layer.base_layer.bias.numel()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(targets=("nowhere",)), r"targets: no layer matches 'nowhere'; adaptable layers are"),
        (LoraConfig(rank_pattern={"3o": 4}), r"rank_pattern: the model has no weights of irrep 3o; expected irreps"),
        (LoraConfig(dense=("nothing",)), r"dense: no parameter matches 'nothing'"),
        (LoraConfig(rank_pattern={"0e": 0, "1o": 0, "1e": 0}), r"targets: no layer matches"),
    ],
)
def test_plans_that_do_not_fit(config, message):
    with pytest.raises(ValueError, match=message):
        apply_lora(linear(), config)


def test_names_are_checked():
    model = apply_lora(linear())
    with pytest.raises(ValueError, match=r"adapter_name: the model already has an adapter 'default'"):
        apply_lora(model)
    with pytest.raises(ValueError, match=r"adapter_name: expected a name without dots .* got 'a.b'"):
        apply_lora(model, adapter_name="a.b")
    with pytest.raises(ValueError, match=r"adapter 'x' is not in the model; expected one of default"):
        set_adapter(model, "x")
    with pytest.raises(ValueError, match=r"adapter 'x' is not in the model"):
        delete_adapter(model, "x")
    with pytest.raises(ValueError, match=r"weights: adapters \['x'\] are not in the model"):
        combine_adapters(model, {"x": 1.0}, "y")
    with pytest.raises(ValueError, match=r"name: the model already has an adapter 'default'"):
        combine_adapters(model, {"default": 1.0}, "default")
    merge_adapters(model, "default")
    with pytest.raises(ValueError, match=r"adapter 'default' is merged; unmerge it before deleting it"):
        delete_adapter(model, "default")
    with pytest.raises(ValueError, match=r"coverage: the model has no adapter"):
        coverage(linear())


def test_initial_scale():
    torch.manual_seed(0)
    wide = Single(nn.Linear(4000, 3), "4000x0e")
    a = apply_lora(wide, LoraConfig(rank=16, init="elora")).layer.lora_A["default"]["0e"]
    assert abs(float(a.detach().std()) - 1) < 0.02
    wide = Single(nn.Linear(4000, 3), "4000x0e")
    a = apply_lora(wide, LoraConfig(rank=16)).layer.lora_A["default"]["0e"]
    assert abs(float(a.detach().std()) - 0.1**0.5 / 4) < 0.002


def test_switching_undoes_a_merge():
    model = randomised(linear())
    x = model.inputs()
    first = model(*x)
    apply_lora(model, LoraConfig(rank=1), "second")
    torch.nn.init.normal_(model.layer.lora_B["second"]["0e"])
    second = model(*x)
    merge_adapters(model, "default")
    torch.testing.assert_close(model(*x), first, atol=1e-10, rtol=0)
    set_adapter(model, "second")
    assert torch.equal(model(*x), second)
    merge_adapters(model, "default")
    merged = merge_lora(model)
    torch.testing.assert_close(merged(*x), first, atol=1e-10, rtol=0)
    with pytest.raises(ValueError, match=r"adapter 'x' is not in the model; expected one of default"):
        merge_adapters(randomised(linear()), "x")


DDP = """
import sys, torch
from e3nn import o3
from torch.nn.parallel import DistributedDataParallel
from mace_lora import LoraConfig, apply_lora

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
layer = torch.nn.Sequential(o3.Linear("4x0e+2x1o", "3x0e+2x1o"))
apply_lora(layer, LoraConfig(rank=2))
parallel = DistributedDataParallel(layer)
optimiser = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
torch.manual_seed(rank)
for _ in range(3):
    optimiser.zero_grad()
    parallel(torch.randn(5, 10)).square().sum().backward()
    optimiser.step()
torch.save({n: p.detach() for n, p in layer.named_parameters()}, f"{out}{rank}.pt")
torch.distributed.barrier()
del parallel
torch.distributed.destroy_process_group()
"""


def test_distributed_data_parallel(tmp_path):
    """Two processes with different data end with the same adapter, the base unchanged."""
    prologue = "import importlib.util\nif importlib.util.find_spec('mace'): import mace\n"
    command = [sys.executable, "-W", "ignore", "-c", prologue + DDP]
    ranks = [subprocess.Popen([*command, str(r), str(tmp_path / "store"), str(tmp_path / "out")]) for r in (0, 1)]
    assert [p.wait(timeout=120) for p in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"out{r}.pt") for r in (0, 1))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert first["0.lora_B.default.1o"].abs().max() > 0
