"""Settings of ``equitune distill``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from mace_lora.augment.settings import DynamicsKeys, Strict, read_yaml
from mace_lora.mace_plugin.launch import with_files

__all__ = ["Distillation", "Filter", "Student", "Synthetic", "Teacher", "Training", "read_config"]

_OURS = ("name", "seed", "train_file", "valid_file", "test_file", "work_dir", "restart_latest", "max_num_epochs", "lr")


class Teacher(Strict):
    """What labels the synthetic frames: ``flags`` of a fine-tuning, a ``potential``, or somebody else before.

    Attributes:
        flags: of ``mace_run_train`` without dashes, e.g. foundation_model, E0s, lora, lr, max_num_epochs.
        members: adapters trained with different seeds; two or more make a committee that filters.
        potential: a labeler used as it is, as for ``equitune label``; nothing is trained then.
        labelled: synthetic frames with labels, e.g. of a teacher that needs another environment; nothing is made then.
    """

    flags: dict[str, Any] = {}
    members: int = Field(2, ge=1)
    potential: str | None = None
    labelled: Path | None = None

    @model_validator(mode="after")
    def _check(self) -> Teacher:
        if bool(self.flags) + (self.potential is not None) + (self.labelled is not None) != 1:
            raise ValueError("expected either flags of a fine-tuning, a potential, or labelled frames")
        _none_of_ours({k: v for k, v in self.flags.items() if k not in ("lr", "max_num_epochs")})
        return self


class Synthetic(DynamicsKeys):
    """Frames that the teacher labels. Dynamics with the teacher, and changed copies of the quantum frames.

    Attributes:
        temperatures: none of them: no dynamics.
        starts: quantum frames that dynamics starts from, evenly chosen.
        keep_bonds: drop frames whose bonds are not the start's.
        rattle, rattle_std: copies of every quantum frame, and standard deviation in Å.
        strain, strain_largest: copies of every quantum frame (periodic), and bound of a component.
        stretch, stretch_low, stretch_high: copies with one bond scaled, and bounds of the factor.
    """

    temperatures: list[float | tuple[float, float]] = [300.0, 600.0]
    frames: int = Field(250, ge=1)
    spacing_fs: float = Field(20.0, gt=0)
    equilibration_fs: float = Field(500.0, ge=0)
    starts: int = Field(4, ge=1)
    keep_bonds: bool = False
    rattle: int = Field(0, ge=0)
    rattle_std: float = Field(0.05, gt=0)
    strain: int = Field(0, ge=0)
    strain_largest: float = Field(0.03, gt=0, lt=1)
    stretch: int = Field(0, ge=0)
    stretch_low: float = Field(0.85, gt=0)
    stretch_high: float = Field(2.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Synthetic:
        if not (self.temperatures or self.rattle or self.strain or self.stretch):
            raise ValueError("nothing to make: give temperatures, or copies by rattle, strain or stretch")
        if self.stretch_low >= self.stretch_high:
            raise ValueError(f"stretch_low: expected less than stretch_high, got {self.stretch_low}")
        self.schedules()
        return self


class Filter(Strict):
    """Which labelled frames are left out; None turns a filter off.

    Attributes:
        deviation: largest force deviation of the committee, meV/Å.
        noise: largest ratio of that deviation to the root mean square of the frame's forces; beyond it a label is
            more noise than force.
        net_force: largest sum of a frame's forces per atom, meV/Å; most potentials have none, so it measures the noise
            of labels made elsewhere (electronic structure that is not converged).
        energy: eV per atom above the lowest synthetic frame of the same composition.
        force: largest force of an atom, eV/Å.
        duplicates: distance of the teacher's features below which a frame repeats an earlier one; needs a MACE teacher.
    """

    deviation: float | None = Field(500.0, gt=0)
    noise: float | None = Field(None, gt=0)
    net_force: float | None = Field(10.0, gt=0)
    energy: float | None = Field(None, gt=0)
    force: float | None = Field(50.0, gt=0)
    duplicates: float | None = Field(None, ge=0)


class Training(Strict):
    """One training of the student.

    Attributes:
        epochs: number of epochs.
        lrs: learning rates; the best on the validation frames is kept.
        flags: of ``mace_run_train``, over those of the student, e.g. lora.
    """

    epochs: int = Field(ge=1)
    lrs: list[float] = Field([0.01], min_length=1)
    flags: dict[str, Any] = {}

    @model_validator(mode="after")
    def _check(self) -> Training:
        if min(self.lrs) <= 0 or len(set(self.lrs)) < len(self.lrs):
            raise ValueError(f"lrs: expected different numbers > 0, got {self.lrs}")
        _none_of_ours(self.flags)
        return self


class Student(Strict):
    """The model that is made.

    Attributes:
        flags: of ``mace_run_train``: architecture, batch size, loss and so on; with ``nequip``, Hydra overrides.
        nequip: config of ``nequip-train`` for a student of the NequIP framework (NequIP, Allegro, PaiNN, their
            multiscale forms); it needs NequIP's environment, so that the teacher is a potential or labelled frames.
        pretrain: on the synthetic frames.
        finetune: on the quantum frames, from the pre-trained weights.
        direct: on the quantum frames, from scratch: what the student is compared with. None leaves it out.
    """

    flags: dict[str, Any] = {}
    nequip: Path | None = None
    pretrain: Training
    finetune: Training
    direct: Training | None = None

    @model_validator(mode="after")
    def _check(self) -> Student:
        if self.nequip is not None:
            _none_of_ours({k: v for k, v in self.flags.items() if k != "swa"}, (*_OURS, "folder", "epochs", "run"))
            return self
        if not self.flags:
            raise ValueError("expected flags of a MACE model, or nequip with a config")
        _none_of_ours(self.flags)
        for key in ("foundation_model", "lora"):
            if key in self.flags:
                raise ValueError(
                    f"flags: {key}: the student is a new model; leave it out (finetune.flags may have lora)"
                )
        return self


class Distillation(Strict):
    """Settings of a run; the keys of its YAML file.

    Attributes:
        folder: everything is written here.
        train, valid: quantum frames (REF_energy in eV, REF_forces in eV/Å); the teacher and the student see both.
        test: quantum frames for the report alone.
        teacher, synthetic, filter, student: the stages.
        device, dtype: of trainings.
        workers: processes of dynamics and labels.
        seed: of everything.
        report: name of the report's files, so that several configs can share a folder and with it finished stages.
    """

    folder: Path
    train: Path
    valid: Path
    test: Path
    teacher: Teacher
    synthetic: Synthetic = Field(default_factory=lambda: Synthetic.model_validate({}))
    filter: Filter = Field(default_factory=lambda: Filter.model_validate({}))
    student: Student
    device: Literal["cpu", "cuda", "mps", "xpu"] = "cpu"
    dtype: Literal["float32", "float64"] = "float32"
    workers: int = Field(1, ge=1)
    seed: int = 0
    report: str = Field("report", pattern=r"^[\w.-]+$")

    @model_validator(mode="after")
    def _check(self) -> Distillation:
        committee = bool(self.teacher.flags) and self.teacher.members > 1
        for name in ("noise", "deviation"):
            given = name in self.filter.model_fields_set and getattr(self.filter, name) is not None
            if given and not committee:
                raise ValueError(f"filter: {name}: needs a committee, which is teacher flags with 2 members or more")
        if self.teacher.labelled is not None and "synthetic" in self.model_fields_set:
            raise ValueError("synthetic: nothing is made where teacher.labelled gives the frames; leave it out")
        if "dtype" in self.model_fields_set and self.student.nequip is not None and not self.teacher.flags:
            raise ValueError("dtype: of MACE trainings, of which there is none here; set model_dtype in student.flags")
        return self


def _none_of_ours(flags: dict[str, Any], names: tuple[str, ...] = _OURS) -> None:
    ours = [k for k in flags if k in names]
    if ours:
        raise ValueError(f"flags: {ours[0]} is set by the command; leave it out")
    if flags.get("swa"):
        raise ValueError("flags: swa: the model of the second stage would not be used; leave it out")


def read_config(path: Path) -> Distillation:
    """Read and check a YAML file; paths in it are relative to its folder.

    Raises:
        FileNotFoundError: no such file, or one that it names.
        ValueError: an unknown key, a wrong value, a flag that ``mace_run_train`` refuses, unsound frames.
    """
    config = read_yaml(path, Distillation)
    base = path.parent.resolve()
    for name in ("folder", "train", "valid", "test"):
        setattr(config, name, base / getattr(config, name))
    for file in (config.train, config.valid, config.test):
        if not file.is_file():
            raise FileNotFoundError(f"{path}: no file {file}")
    student = config.student
    for part in (config.teacher, student, student.pretrain, student.finetune, student.direct):
        if part is not None:
            part.flags = with_files(part.flags, str, base)
    config.teacher.potential = _beside(config.teacher.potential, base)
    for part, name in ((config.teacher, "labelled"), (config.student, "nequip")):
        if getattr(part, name) is not None:
            setattr(part, name, base / getattr(part, name))
            if not getattr(part, name).is_file():
                raise FileNotFoundError(f"{path}: {name}: no file {getattr(part, name)}")
    from .checks import check_flags_of, check_frames

    check_flags_of(config, path)
    check_frames(config, path)
    return config


def _beside(potential: str | None, base: Path) -> str | None:
    """A potential with the files in its name looked for beside the config."""
    if potential is None or ":" not in potential:
        return potential
    kind, _, argument = potential.partition(":")
    return f"{kind}:" + "+".join(str(base / part) if (base / part).exists() else part for part in argument.split("+"))
