"""Layer-wise learning rates and gradual unfreezing in NequIP, Allegro, PaiNN and the multiscale model."""

import itertools

import pytest

pytest.importorskip("nequip")

import lightning
import torch
from nequip_models import build, lora, molecule

from nequip_ext import GradualUnfreezing, LayerwiseRates
from nequip_ext.autotune.schedule import depths

pytestmark = pytest.mark.nequip

EXPECTED = {
    "nequip": {
        "type_embed.embed_module.weight": 3, "bessel_encode.bessel_weights": 3,
        "layer0_convnet.conv.linear_1.weight": 2, "layer1_convnet.conv.sc.weight": 1,
        "per_atom_energy_readout.mlp_module.mlp.0.weight": 0,
    },
    "allegro": {
        "tensor_embed.env_embed_linear.mlp.0.weight": 3, "scalar_embed_mlp.mlp_module.mlp.0.weight": 3,
        "allegro.latents.0.mlp.0.weight": 2, "allegro.tps.1.weights": 1, "edge_readout.mlp_module.mlp.0.weight": 0,
    },
    "multiscale": {
        "long_type_embed.embed_module.weight": 3, "long_layer0_convnet.conv.linear_1.weight": 2,
        "layer1_convnet.conv.linear_1.weight": 1, "long_energy_readout.mlp_module.mlp.0.weight": 0,
    },
    "painn": {"type_embed.embed_module.weight": 3, "layer0_painn.filter.mlp.0.weight": 2,
              "per_atom_energy_readout.mlp.mlp.0.bias": 0},
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_depths_and_groups(name):
    model = build(name)
    level = depths(n for n, _ in model.named_parameters())
    assert {n: level[f"model.func.{n}"] for n in EXPECTED[name]} == EXPECTED[name]
    assert {*level.values()} == {0, 1, 2, 3}
    groups = LayerwiseRates(model, lr=0.08, decay=0.5)
    assert [g["lr"] for g in groups] == pytest.approx([0.08, 0.04, 0.02, 0.01])
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters())


def test_groups_of_an_adapter():
    model = lora("nequip", rank=2)
    groups = LayerwiseRates(model, lr=0.08, decay=0.5)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, trained))
    assert len(groups) > 2


@pytest.mark.parametrize("decay", [0.0, 1.5])
def test_bad_factors(decay):
    with pytest.raises(ValueError, match=f"decay: expected a factor above 0 and up to 1, got {decay}"):
        LayerwiseRates(build("painn"), lr=0.1, decay=decay)


def test_nothing_that_trains():
    with pytest.raises(ValueError, match="expected parameters that train, got none"):
        LayerwiseRates(build("painn").requires_grad_(False), lr=0.1)


class Energies(lightning.LightningModule):
    """A few steps on one molecule; keeps the weights of every epoch's start."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = torch.nn.ModuleDict({"sole_model": build(name)})
        self.seen: list[dict[str, torch.Tensor]] = []

    def training_step(self, batch):
        return self.model["sole_model"](molecule())["total_energy"].square().sum()

    def on_train_epoch_start(self):
        self.seen.append({n: p.detach().clone() for n, p in self.model.named_parameters()})

    def configure_optimizers(self):
        return torch.optim.AdamW(LayerwiseRates(self.model, lr=0.01), weight_decay=0.1)

    def train_dataloader(self):
        return [0, 1]


def fit(name: str, every: int | None, epochs: int, frozen: str = "nothing") -> Energies:
    module = Energies(name)
    for parameter_name, parameter in module.model.named_parameters():
        parameter.requires_grad_(frozen not in parameter_name)
    trainer = lightning.Trainer(
        max_epochs=epochs, callbacks=[GradualUnfreezing(every)], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(module)
    module.on_train_epoch_start()
    return module


@pytest.mark.parametrize("name", ["nequip", "painn"])
def test_layers_learn_one_after_the_other(name):
    seen = fit(name, every=1, epochs=4).seen
    level = depths(seen[0])
    moved = [{n for n in a if not torch.equal(a[n], b[n])} for a, b in itertools.pairwise(seen)]
    for epoch, names in enumerate(moved):  # weight decay, too, waits
        assert names and {level[n] for n in names} == set(range(epoch + 1))


def test_frozen_layers_take_no_turn():
    seen = fit("painn", every=1, epochs=3, frozen="readout").seen
    level = depths(seen[0])
    moved = [{level[n] for n in a if not torch.equal(a[n], b[n])} for a, b in itertools.pairwise(seen)]
    assert moved == [{1}, {1, 2}, {1, 2, 3}]


def test_all_at_once():
    seen = fit("painn", every=None, epochs=1).seen
    assert {depths(seen[0])[n] for n in seen[0] if not torch.equal(seen[0][n], seen[1][n])} == {0, 1, 2, 3}


def test_lowest_layer_never_reached():
    with pytest.raises(ValueError, match="would begin to learn at epoch 6, but max_epochs is 6; lower 'every'"):
        fit("painn", every=2, epochs=6)
    with pytest.raises(ValueError, match="every: expected at least 1 epoch, got 0"):
        GradualUnfreezing(0)
