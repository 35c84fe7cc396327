"""How fast the layers of a handed-over NequIP-framework model learn: layer-wise rates and gradual unfreezing.

As for MACE (mace_lora/autotune/schedule.py), after ULMFiT (arXiv 1801.06146).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any

import lightning
import torch
from torch import nn

from mace_lora.autotune.schedule import by_depth

__all__ = ["GradualUnfreezing", "LayerwiseRates", "depths"]

_LOG = logging.getLogger("equitune")
# convolutions of NequIP (both paths of the multiscale model) and PaiNN; Allegro's latent layers and tensor products
_LAYER = re.compile(r"(?:^|\.)((?:\w+_)?layer|latents\.|tps\.)(\d+)[_.]")


def depths(names: Iterable[str]) -> dict[str, int]:
    """Layers between each parameter and the energy.

    Args:
        names: of all parameters of a model.

    Returns:
        0 for readouts, 1 for the last layer, and so on; embeddings are below the first layer.
    """
    names = list(names)
    found = {n: m for n in names if (m := _LAYER.search(n))}
    layers: dict[str, int] = {}
    for match in found.values():
        layers[match[1]] = max(layers.get(match[1], 0), int(match[2]) + 1)
    bottom = max(layers.values(), default=0) + 1
    return {
        n: layers[found[n][1]] - int(found[n][2]) if n in found
        else bottom if any(word in n for word in ("embed", "bessel")) else 0
        for n in names
    }  # fmt: skip


def LayerwiseRates(model: nn.Module, lr: float, decay: float = 1.0) -> list[dict[str, Any]]:
    """Parameter groups whose learning rate falls from layer to layer, from the readouts down.

    Args:
        model: what the Lightning module passes.
        lr: of the readouts.
        decay: factor from a layer to the one below it, above 0 and up to 1.

    Raises:
        ValueError: decay is no such factor, or nothing trains.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay: expected a factor above 0 and up to 1, got {decay}")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("LayerwiseRates: expected parameters that train, got none")
    level = depths(n for n, _ in model.named_parameters())
    named = {id(p): level[n] for n, p in model.named_parameters()}
    groups = by_depth([{"params": trained}], named, lr, decay)
    if decay < 1:
        rates = ", ".join(f"{g['lr']:.3g}" for g in groups)
        _LOG.info("learning rates from the readouts down: %s", rates)
    return groups


class GradualUnfreezing(lightning.Callback):
    """Lets one more layer learn every few epochs, from the readouts down.

    A layer that does not learn yet has no gradients, so that optimisers skip it with its weight decay and momenta.

    Args:
        every: epochs between layers; None: all learn from the start.
    """

    def __init__(self, every: int | None = None) -> None:
        super().__init__()
        if every is not None and every < 1:
            raise ValueError(f"every: expected at least 1 epoch, got {every}")
        self.every, self._depth, self._deepest, self._level = every, {}, 0, 0  # type: ignore[var-annotated]

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Find the layers.

        Raises:
            ValueError: the optimiser changes weights without gradients, or the lowest layer would never learn.
        """
        if self.every is None:
            return
        parameters = dict(pl_module.model.named_parameters())
        level = {n: d for n, d in depths(parameters).items() if parameters[n].requires_grad}
        order = sorted({*level.values()})  # layers of which nothing trains take no turn
        self._depth = {n: order.index(d) for n, d in level.items()}
        self._deepest, last = max(self._depth.values(), default=0), trainer.max_epochs
        if any(type(o).__name__ == "MuonWithAuxAdam" for o in trainer.optimizers):
            raise ValueError(
                "GradualUnfreezing: MuonWithAuxAdam decays weights without gradients; take another optimizer"
            )
        if last is not None and 0 <= last <= self.every * self._deepest:
            raise ValueError(
                f"GradualUnfreezing: the lowest of {self._deepest + 1} groups of layers would begin to learn at epoch "
                f"{self.every * self._deepest}, but max_epochs is {last}; lower 'every' or train longer"
            )

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.every is None:
            return
        before, self._level = self._level, min(trainer.current_epoch // self.every, self._deepest)
        if self._level != before or trainer.current_epoch == 0:
            _LOG.info("epoch %d: layers 0 to %d of %d learn (0: readouts)", trainer.current_epoch, self._level,
                      self._deepest)  # fmt: skip

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.every is None or self._level == self._deepest:
            return
        for name, parameter in pl_module.model.named_parameters():
            if self._depth.get(name, 0) > self._level:
                parameter.grad = None
