"""What is checked of a distillation before anything is computed: flags, files, frames."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import ase
import ase.io
import numpy as np

from mace_lora.augment import open_labeler
from mace_lora.mace_plugin.launch import check_flags

from .config import Distillation

__all__ = ["check_flags_of", "check_frames", "geometry_key"]


def check_flags_of(config: Distillation, path: Path) -> None:
    """Refuse flags, potentials and NequIP configs that a training would refuse hours later."""
    if config.teacher.potential is not None:
        open_labeler(config.teacher.potential)
    elif config.teacher.labelled is None:
        for flag in ("foundation_model", "max_num_epochs", "lr", "E0s"):
            if flag not in config.teacher.flags:
                raise ValueError(
                    f"{path}: teacher.flags: expected {flag}; equitune export-base writes a foundation model"
                )
        if importlib.util.find_spec("mace") is None:
            raise ValueError(
                f"{path}: teacher.flags: MACE is not installed in this environment; label the synthetic frames in "
                "MACE's and give teacher.labelled, or take a potential"
            )
        model = str(config.teacher.flags["foundation_model"])
        if ("/" in model or "." in model) and not Path(model).is_file():
            raise FileNotFoundError(f"{path}: teacher.flags.foundation_model: no file {model}")
        check_flags(config.teacher.flags, f"{path}: teacher.flags")
    if config.student.nequip is not None:
        _check_nequip(config, path)
        return
    check_flags(config.student.flags, f"{path}: student.flags")
    for name in ("pretrain", "finetune", "direct"):
        training = getattr(config.student, name)
        if training is not None:
            check_flags(config.student.flags | training.flags, f"{path}: student.{name}.flags")


def _check_nequip(config: Distillation, path: Path) -> None:
    if importlib.util.find_spec("nequip") is None:
        raise ValueError(
            f"{path}: student.nequip: NequIP is not installed in this environment (it cannot share one with MACE); run "
            "the command in NequIP's, with teacher.potential or teacher.labelled"
        )
    from nequip_ext.distill import check_config

    assert config.student.nequip is not None
    for training in (config.student.pretrain, config.student.finetune, config.student.direct):
        if training is not None:
            check_config(config.student.nequip, config.student.flags | training.flags)


def check_frames(config: Distillation, path: Path) -> None:
    """Quantum frames must be sound, and no test frame may be among those that are learnt from."""
    from mace_lora.data.check import require_sound

    seen: dict[bytes, str] = {}
    for name in ("train", "valid", "test"):
        frames = ase.io.read(getattr(config, name), ":")
        require_sound(getattr(config, name), say=lambda text: print(text))
        for index, atoms in enumerate(frames):
            if len(atoms) == 1 and not atoms.pbc.any():
                continue  # isolated atoms may be everywhere
            place, where = geometry_key(atoms), f"frame {index} of {name}"
            if place in seen and not seen[place].endswith(f"of {name}"):
                raise ValueError(
                    f"{path}: {where} is also {seen[place]}: labels leak between them; make the parts disjoint"
                )
            seen[place] = where
    if config.teacher.labelled is not None:
        # hot synthetic frames may fail the statistical tests of quantum data, so only what must be there is asked for
        bad = [i for i, a in enumerate(ase.io.iread(config.teacher.labelled, ":")) if not _has_labels(a)]
        if bad:
            raise ValueError(
                f"{path}: teacher.labelled: frame {bad[0]}: expected finite labels REF_energy and REF_forces in all"
            )
    if config.filter.duplicates is not None and not (
        config.teacher.flags or (config.teacher.potential or "").startswith("mace:")
    ):
        raise ValueError(f"{path}: filter.duplicates: needs the features of a MACE teacher; leave it out")
    if config.synthetic.strain and not all(a.pbc.all() for a in ase.io.read(config.train, ":")):
        raise ValueError(f"{path}: synthetic.strain: expected periodic training frames")


def _has_labels(atoms: ase.Atoms) -> bool:
    labels = (atoms.info.get("REF_energy"), atoms.arrays.get("REF_forces"))
    return all(x is not None and np.isfinite(x).all() for x in labels)


def geometry_key(atoms: ase.Atoms, digits: int = 5) -> bytes:
    """What two frames of equal atoms in equal places have in common; lengths rounded to ``digits`` in Å."""
    cell = atoms.cell.array if atoms.pbc.any() else np.zeros((3, 3))
    places = np.concatenate([atoms.positions, cell]).round(digits) + 0.0  # no negative zeros
    return bytes(atoms.numbers.tobytes() + atoms.pbc.tobytes() + places.tobytes())
