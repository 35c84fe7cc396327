"""What SaveAdapter looks at before and while a NequIP run trains an adapter."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from nequip.data import AtomicDataDict

from mace_lora.atomic import content_digest
from mace_lora.lora.fingerprint import fingerprint
from mace_lora.lora.inject import adapter_layers

from .builder import ADAPTER

__all__ = [
    "adapted_model", "check_base", "check_identity", "check_optimizers", "checkpoint_callback", "data_files",
    "is_fresh",
]  # fmt: skip

_LOG = logging.getLogger("equitune")
# a fresh adapter is exactly its base; energies (per atom) are float64 in NequIP whatever the model_dtype
_TOLERANCE = {"float32": (1e-6, 1e-4), "float64": (1e-9, 1e-9)}


def is_fresh(model: Any) -> bool:
    """Whether the adapter is as it was initialised: all B are zero."""
    return all(bool((b == 0).all()) for la in adapter_layers(model).values() for b in la.lora_B[ADAPTER].values())


def data_files(datamodule: Any) -> dict[str, str]:
    """Hash of every file of training and validation data."""
    waiting, found = [datamodule.train_dataset, *datamodule.val_dataset], dict[str, str]()
    while waiting:
        dataset = waiting.pop()
        if isinstance(dataset, list):
            waiting += dataset
        elif hasattr(dataset, "dataset"):  # a part of another
            waiting.append(dataset.dataset)
        elif Path(str(getattr(dataset, "file_path", ""))).is_file():
            path, digest = Path(dataset.file_path), content_digest(dataset.file_path)
            # no more of the path than tells files apart: the card may go to a hub
            found[path.name if found.get(path.name, digest) == digest else f"{path.parent.name}/{path.name}"] = digest
    return found


def adapted_model(pl_module: Any) -> Any:
    """The one adapted model of a Lightning module.

    Raises:
        ValueError: there is none, or several; NequIP takes the model of a continued run from its checkpoint.
    """
    found = [m for m in pl_module.model.values() if hasattr(m, "equitune_metadata")]
    if len(found) != 1:
        raise ValueError(
            f"SaveAdapter: expected one model built by nequip_ext.LoRA, got {len(found)}; wrap 'model' in "
            "'_target_: nequip_ext.LoRA'. 'ckpt_path' continues a run, with the model of that run and not the "
            "config's: give a base as 'checkpoint_path' of nequip.model.ModelFromCheckpoint instead"
        )
    return found[0]


def check_identity(model: Any, out: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> None:
    """A fresh adapter must change nothing."""
    keys = (AtomicDataDict.TOTAL_ENERGY_KEY, AtomicDataDict.FORCE_KEY)
    largest = [float((out[k] - base[k]).abs().max()) for k in keys if k in out]
    _LOG.info("identity at start: largest difference of energies and forces %s", largest)
    atoms = len(base[AtomicDataDict.ATOM_TYPE_KEY])
    sizes = (atoms, 1 + float(base[keys[1]].abs().max()) if keys[1] in base else 1.0)
    allowed = [t * s for t, s in zip(_TOLERANCE[str(model.model_dtype).rpartition(".")[2]], sizes, strict=True)]
    if any(found > limit for found, limit in zip(largest, allowed, strict=False)):
        raise ValueError(f"nequip_ext.LoRA: the adapted model differs from its base before training: {largest}")


def check_base(model: Any) -> None:
    """The base must still be the one that the adapter is written for."""
    expected, got = model.equitune_metadata["base_fingerprint"], fingerprint(model)
    if got != expected:
        raise ValueError(
            f"SaveAdapter: the base changed since the model was built (fingerprint {expected}, now {got}): a continued "
            "run whose base file is another by now, a modifier outside nequip_ext.LoRA (move it inside, around the "
            "base), or a callback that writes to frozen weights; start from that base"
        )


def check_optimizers(trainer: lightning.Trainer, pl_module: Any) -> None:
    """What updates parameters without gradients must not get the frozen base: Muon's optimiser, ConFIG's solver."""
    if hasattr(pl_module, "ConFIG_model_param_names"):
        raise ValueError(
            f"training_module: {type(pl_module).__name__} solves for all weights at once, the frozen ones too, and "
            "would train nothing of an adapter; take nequip.train.EMALightningModule or NequIPLightningModule"
        )
    for optimizer in trainer.optimizers:
        muon = any("use_muon" in group for group in optimizer.param_groups)
        if muon and not all(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                f"optimizer: {type(optimizer).__name__} would decay and update the frozen base; expected groups of "
                "trained parameters only; set 'param_groups: {_target_: nequip_ext.MuonParamGroups, muon: …, adam: …}'"
            )


def checkpoint_callback(trainer: lightning.Trainer) -> ModelCheckpoint:
    found = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor]
    if not found:
        raise ValueError(
            "SaveAdapter: expected a ModelCheckpoint callback with 'monitor' in trainer.callbacks, got none"
        )
    return found[0]
