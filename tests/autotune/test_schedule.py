"""Layer-wise learning rates and gradual unfreezing."""

import pytest
import torch
from models import build_mace

from mace_lora.autotune.schedule import Unfreezing, depth, layerwise


def test_depth_of_parameters():
    names = ("readouts.1.linear_1.weight", "products.1.linear.weight", "interactions.1.linear_up.weight")
    assert [depth(n, 2) for n in names] == [0, 1, 1]
    assert depth("interactions.0.linear_up.base_layer.weight", 2) == 2
    assert depth("long.products.0.linear.weight", 2) == 2
    assert depth("node_embedding.linear.weight", 2) == 3
    assert depth("charges.weight", 2) == 0
    assert all(0 <= depth(n, 2) <= 3 for n, _ in build_mace().named_parameters())


def groups_of(model):
    return [
        {"name": "embedding", "params": model.node_embedding.parameters(), "weight_decay": 0.0, "lr": 0.01},
        {"name": "interactions", "params": model.interactions.parameters(), "weight_decay": 0.1, "lr": 0.01},
        {"name": "products", "params": model.products.parameters(), "weight_decay": 0.1},
        {"name": "readouts", "params": model.readouts.parameters(), "weight_decay": 0.0, "lr": 0.04},
    ]


def test_layerwise_groups_keep_every_parameter_and_setting():
    model = build_mace()
    before = {id(p): g for g in groups_of(model) for p in g["params"]}
    groups = layerwise(model, groups_of(model), lr=0.02, decay=0.5)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(before)
    names = {id(p): n for n, p in model.named_parameters()}
    for group in groups:
        for p in group["params"]:
            old = before[id(p)]
            assert group["weight_decay"] == old["weight_decay"]
            assert group["lr"] == pytest.approx(old.get("lr", 0.02) * 0.5 ** depth(names[id(p)], 2))
    assert len({g["name"] for g in groups}) == len(groups)
    torch.optim.Adam(groups, lr=0.02)


def test_blocks_learn_one_after_the_other():
    """Adam with weight decay leaves a block alone to the last digit until its epoch."""
    model = build_mace()
    schedule = Unfreezing(model, every=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1, amsgrad=True)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert schedule.deepest == 3
    for epoch in range(8):
        said = schedule.start(epoch)
        assert (said is not None) == (epoch in (0, 2, 4, 6))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.zero_grad()
        sum((p**2).sum() for p in model.parameters()).backward()
        optimizer.step()
        changed = {depth(n, 2) for n in names if not torch.equal(before[n], dict(model.named_parameters())[n])}
        assert changed == set(range(epoch // 2 + 1))
    resumed = Unfreezing(build_mace(), every=2)
    assert resumed.start(5) == "blocks 0 to 2 of 3 learn (0: readouts)"
