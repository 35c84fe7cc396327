"""What is checked of a distillation before anything is computed: flags, files, frames."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np

from mace_lora.augment import open_labeler
from mace_lora.mace_plugin.launch import check_flags

from .config import Distillation

__all__ = ["Places", "check_flags_of", "check_frames", "is_atom"]

_PLACES = {"model_dir", "results_dir", "checkpoints_dir", "log_dir", "downloads_dir", "config", "num_workers_test"}
_ARCHITECTURE = {
    "model", "hidden_irreps", "num_channels", "max_L", "max_ell", "correlation", "r_max", "num_interactions",
    "num_radial_basis", "num_cutoff_basis", "radial_type", "radial_MLP", "MLP_irreps", "interaction",
    "interaction_first", "gate", "foundation_model", "r_short", "multiscale_coupling",
    "multiscale_split",
}  # fmt: skip
_SAME = 1e-4  # Å, largest difference of the distances in equal frames
_SHOWN = 256  # distances that a frame is compared by


def check_flags_of(config: Distillation, path: Path) -> None:
    """Refuse flags, potentials and NequIP configs that a training would refuse hours later."""
    from .students import MaceStudent

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
        files = {"train_file": config.train, "valid_file": config.valid}
        _check(config.teacher.flags | files, config.teacher.flags, f"{path}: teacher.flags", ("lora", "multiscale"))
    if config.student.nequip is not None:
        _check_nequip(config, path)
        return
    new = config.student.flags
    _check(new, new, f"{path}: student.flags", ("lora", "multiscale"))
    for name in ("pretrain", "finetune", "direct"):
        training = getattr(config.student, name)
        if training is None:
            continue
        where, mine = f"{path}: student.{name}.flags", training.flags
        for key in _ARCHITECTURE & mine.keys():
            raise ValueError(f"{where}: {key} belongs to student.flags: all trainings are of one architecture")
        if name == "finetune":
            every = MaceStudent(config).settings(training, training.lrs[0], Path("pretrained"))
            _check(every, mine, where, ("lora",))
            continue
        _check(new | mine, new | mine, where, ("lora", "multiscale"))
        if "E0s" not in new | mine:
            raise ValueError(f"{path}: student.flags: expected E0s, e.g. average, or isolated-atom energies")


def _check(flags: dict[str, Any], given: dict[str, Any], where: str, plugins: tuple[str, ...]) -> None:
    """Flags that upstream takes, and refuses or misunderstands after an hour."""
    for key in given:
        if key in _PLACES or key.startswith("autotune_"):
            raise ValueError(f"{where}: {key} is not possible here; leave it out")
    args = check_flags(flags, where, plugins)
    if args.swa:
        raise ValueError(f"{where}: swa: the model of the second stage would not be used; leave it out")
    import mace  # noqa: F401  before e3nn: it sets the environment that e3nn 0.4.4 needs
    from e3nn import o3

    for key in ("hidden_irreps", "MLP_irreps"):
        if key in given:
            try:
                o3.Irreps(given[key])
            except (ValueError, AttributeError) as err:
                raise ValueError(f"{where}: {key}: expected irreps such as 32x0e+32x1o, got {given[key]!r}") from err
    e0s = str(given.get("E0s", "average"))
    if e0s.lower() not in ("average", "estimated", "foundation") and not e0s.endswith(".json"):
        try:
            good = isinstance(ast.literal_eval(e0s), dict)
        except (ValueError, SyntaxError):
            good = False
        if not good:
            raise ValueError(f"{where}: E0s: expected average, estimated, foundation, a .json file or energies by "
                             f"atomic number, got {e0s!r}")  # fmt: skip


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
    """Quantum frames must be sound and enough, and no test frame may be among those that are learnt from."""
    from mace_lora.data.check import require_sound

    frames = {name: ase.io.read(getattr(config, name), ":") for name in ("train", "valid", "test")}
    for name in frames:
        require_sound(getattr(config, name), say=lambda text: print(text))
    _check_sizes(config, path, [a for a in frames["train"] if not is_atom(a)])
    known = {s for a in frames["train"] for s in a.get_chemical_symbols()}
    for name in ("valid", "test"):
        missing = sorted({s for a in frames[name] for s in a.get_chemical_symbols()} - known)
        if missing:
            raise ValueError(f"{path}: {name}: {', '.join(missing)} is in none of the training frames")
    earlier = ""
    seen = Places()
    for name, part in frames.items():
        for index, atoms in enumerate(part):
            where = f"frame {index} of {name}"
            same = None if is_atom(atoms) or not earlier else seen.find(atoms)
            if same is not None:
                raise ValueError(f"{path}: {where} is also {same}: labels leak between them; make the parts disjoint")
        for index, atoms in enumerate(part):
            seen.add(atoms, f"frame {index} of {name}")
        earlier = name
    if config.teacher.labelled is not None:
        # hot synthetic frames may fail the statistical tests of quantum data, so only what must be there is asked for
        for i, atoms in enumerate(ase.io.iread(config.teacher.labelled, ":")):
            if not _has_labels(atoms):
                raise ValueError(
                    f"{path}: teacher.labelled: frame {i}: expected finite labels REF_energy and REF_forces in all"
                )
    if config.filter.duplicates is not None and not (
        config.teacher.flags or (config.teacher.potential or "").startswith("mace:")
    ):
        raise ValueError(f"{path}: filter.duplicates: needs the features of a MACE teacher; leave it out")
    if config.synthetic.strain and not all(a.pbc.all() for a in frames["train"] if not is_atom(a)):
        raise ValueError(f"{path}: synthetic.strain: expected periodic training frames")


def _check_sizes(config: Distillation, path: Path, train: list[ase.Atoms]) -> None:
    """``mace_run_train`` leaves an incomplete batch out, so that fewer frames than a batch are none."""
    from .students import default_flags

    usual = default_flags(config, 1)["batch_size"]
    sizes = {"teacher.flags": config.teacher.flags.get("batch_size", usual)} if config.teacher.flags else {}
    if config.student.nequip is None:
        for name in ("finetune", "direct"):
            training = getattr(config.student, name)
            if training is not None:
                flags = config.student.flags | training.flags
                sizes[f"student.{name}.flags"] = flags.get("batch_size", usual)
    for where, size in sizes.items():
        if len(train) < int(size):
            raise ValueError(
                f"{path}: {where}: batch_size: expected at most the {len(train)} training frames, got {size}"
            )


def is_atom(atoms: ase.Atoms) -> bool:
    """Whether a frame is an isolated atom, which may be in every file."""
    return atoms.info.get("config_type") == "IsolatedAtom" or (len(atoms) == 1 and not atoms.pbc.any())


def _has_labels(atoms: ase.Atoms) -> bool:
    labels = (atoms.info.get("REF_energy"), atoms.arrays.get("REF_forces"))
    return all(x is not None and np.isfinite(x).all() for x in labels)


class Places:
    """Frames by their geometry: finds equal ones, also when moved, turned, wrapped or renumbered."""

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], list[tuple[np.ndarray, ase.Atoms, str]]] = {}
        self.stacked: dict[tuple[Any, ...], np.ndarray] = {}

    def add(self, atoms: ase.Atoms, name: str) -> None:
        """Remember a frame."""
        kind, values = _geometry(atoms)
        self.known.setdefault(kind, []).append((values, atoms, name))
        self.stacked.pop(kind, None)

    def find(self, atoms: ase.Atoms) -> str | None:
        """Name of an equal frame, or None."""
        kind, values = _geometry(atoms)
        if kind not in self.known:
            return None
        if kind not in self.stacked:
            self.stacked[kind] = np.array([v for v, _, _ in self.known[kind]])
        near = np.nonzero(np.abs(self.stacked[kind] - values).max(axis=1) <= _SAME)[0]
        found = (self.known[kind][i] for i in near)
        return next((name for _, other, name in found if len(atoms) <= 3 or _equal(atoms, other)), None)


def _equal(one: ase.Atoms, other: ase.Atoms) -> bool:
    """Whether all distances agree for each pair of elements: a lattice may be occupied in several ways."""
    (kinds, distances), (their_kinds, theirs) = _pairs(one), _pairs(other)
    return np.array_equal(kinds, their_kinds) and np.allclose(distances, theirs, rtol=0, atol=2 * _SAME)


def _pairs(atoms: ase.Atoms) -> tuple[np.ndarray, np.ndarray]:
    """Kinds of all pairs of atoms and their distances in Å, sorted by both."""
    i, j = np.triu_indices(len(atoms), 1)
    z = atoms.numbers
    kind = 1000 * np.minimum(z[i], z[j]) + np.maximum(z[i], z[j])
    distance = _distances(atoms)
    order = np.lexsort((distance, kind))
    return kind[order], distance[order]


def _distances(atoms: ase.Atoms) -> np.ndarray:
    """Distances of all pairs, nearest images, Å."""
    found: np.ndarray = atoms.get_all_distances(mic=bool(atoms.pbc.any()))[np.triu_indices(len(atoms), 1)]
    return found


def _geometry(atoms: ase.Atoms) -> tuple[tuple[Any, ...], np.ndarray]:
    """What equal frames share exactly, and in numbers (Å): sorted distances, at most 256 of them, and the cell's size.

    Up to three atoms have so few distances that others may share them by chance: their positions count.
    """
    if len(atoms) <= 3:
        cell = atoms.cell.array if atoms.pbc.any() else np.zeros((3, 3))
        return (tuple(atoms.numbers), tuple(atoms.pbc)), np.concatenate([atoms.positions, cell]).ravel()
    kind = (atoms.get_chemical_formula(), tuple(sorted(atoms.pbc)))
    distances = np.sort(_distances(atoms))
    shown = distances[np.linspace(0, len(distances) - 1, min(_SHOWN, len(distances))).astype(int)]
    return kind, np.append(shown, np.cbrt(abs(atoms.cell.volume)) if atoms.pbc.any() else 0.0)
