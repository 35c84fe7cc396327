"""Energy references (E0s): what the user asked for is what the model has."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import torch

__all__ = ["restore_energy_references"]


@torch.no_grad()
def restore_energy_references(model: Any, requested: Any, elements: Collection[int] | None = None) -> bool:
    """Put the requested E0s into the model if upstream overwrote them.

    mace-torch 0.3.16 copies the whole foundation state, E0s included, when elements and heads are
    the same, so ``--E0s`` is silently ignored.

    Args:
        model: MACE model as built by upstream.
        requested: E0s (eV), shape (heads, elements) or (elements,).
        elements: atomic numbers for which E0s were requested; others keep the base's. Default all.

    Returns:
        whether something had to be corrected.
    """
    buffer: torch.Tensor = model.atomic_energies_fn.atomic_energies
    wanted = torch.as_tensor(requested, dtype=buffer.dtype, device=buffer.device).reshape(buffer.shape)
    if elements is not None:
        asked = torch.tensor([int(z) in elements for z in model.atomic_numbers], device=buffer.device)
        wanted = torch.where(asked, wanted, buffer)
    error = float((buffer - wanted).abs().max())
    if error <= 1e-6:
        return False
    logging.info(
        "equitune: upstream replaced the requested E0s by the foundation model's (up to %.6g eV apart); restored", error
    )
    buffer.copy_(wanted)
    return True
