"""Langevin dynamics that samples frames: many trajectories in parallel, each of them resumable to the digit."""

from __future__ import annotations

import concurrent.futures
import io
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import ase
import ase.io
import numpy as np
from ase import units
from ase.io.extxyz import write_extxyz
from ase.md.langevin import Langevin

try:
    from ase.md.velocitydistribution import thermalize_momenta
except ImportError:  # older ASE
    from ase.md.velocitydistribution import MaxwellBoltzmannDistribution as thermalize_momenta

from mace_lora.atomic import atomic_path, keep_settings, only_writer

from .executors import open_executor
from .journal import Journal, frame_key
from .perturb import bare, keep_sound

__all__ = ["Schedule", "run_trajectory", "sample_md", "thermalize_momenta", "trajectory"]


_FASTEST = 1.0  # Å/fs; hydrogen at 10,000 K has 0.16


@dataclass(frozen=True)
class Schedule:
    """How a trajectory runs.

    Attributes:
        start, end: temperatures in K; linear in between, constant when equal.
        frames: number of frames to keep.
        spacing: time between frames, fs.
        timestep: fs.
        friction: 1/fs.
        equilibration: time before the first frame at the starting temperature, fs.
    """

    start: float
    end: float
    frames: int = 100
    spacing: float = 50.0
    timestep: float = 0.5
    friction: float = 0.02
    equilibration: float = 500.0

    def __post_init__(self) -> None:
        for name in ("start", "end", "spacing", "timestep", "friction"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)}")
        if self.frames < 1 or self.equilibration < 0:
            raise ValueError(f"frames, equilibration: expected >= 1 and >= 0, got {self.frames}, {self.equilibration}")
        if self.spacing < self.timestep:
            raise ValueError(f"spacing: expected at least the timestep ({self.timestep} fs), got {self.spacing} fs")

    def temperature(self, frame: int) -> float:
        """Temperature in K before a frame."""
        return self.start + (self.end - self.start) * frame / max(1, self.frames - 1)


def trajectory(
    start: ase.Atoms, labeler: str, schedule: Schedule, seed: Sequence[int], done: Sequence[ase.Atoms] = ()
) -> Iterator[ase.Atoms]:
    """Frames of one NVT trajectory, with momenta.

    The state is rounded to the digits of an extxyz file at every frame and each stretch between frames has random
    numbers of its own, so that a trajectory continued from its file is the one that was never stopped.

    Args:
        start: first frame, Å.
        labeler: name of the potential, see :func:`mace_lora.augment.labelers.open_labeler`.
        schedule: temperatures and times.
        seed: integers; equal seeds give equal frames.
        done: frames that are there already.
    """
    from .labelers import open_labeler

    potential = open_labeler(labeler)
    atoms = _rounded(done[-1], start) if done else start.copy()
    for number in range(len(done), schedule.frames):
        rng = np.random.default_rng([*seed, number])
        temperature = schedule.temperature(number)
        duration = schedule.spacing
        if number == 0:
            thermalize_momenta(atoms, temperature_K=temperature, rng=rng)
            duration = max(schedule.equilibration, schedule.timestep)
        atoms.calc = potential.calculator(start)  # a force field keeps the bonds of the start
        dynamics = Langevin(
            atoms, schedule.timestep * units.fs, temperature_K=temperature, friction=schedule.friction / units.fs,
            fixcm=False, rng=rng,
        )  # fmt: skip
        dynamics.attach(_stop_when_blown_up, 1, atoms, schedule.timestep)
        dynamics.run(max(1, round(duration / schedule.timestep)))
        atoms = _rounded(atoms, start)
        atoms.info.update(frame=number, temperature_K=round(temperature, 6), seed=" ".join(map(str, seed)))
        yield atoms.copy()
        if not np.isfinite(atoms.positions).all():
            return


def _stop_when_blown_up(atoms: ase.Atoms, timestep: float) -> None:
    """A collapsing box has ever more neighbours, until memory is full: end before that."""
    fastest = float(np.linalg.norm(atoms.get_velocities(), axis=1).max()) * units.fs  # Å/fs
    if not fastest < _FASTEST:
        raise ValueError(f"an atom moves by {fastest * timestep:.2g} Å in a step: the dynamics has blown up")


def _rounded(atoms: ase.Atoms, start: ase.Atoms) -> ase.Atoms:
    """What an extxyz file would give back."""

    def digits(values: np.ndarray) -> np.ndarray:
        return np.array([float(f"{x:.8f}") for x in values.reshape(-1)]).reshape(values.shape)

    frame = bare(start)
    frame.positions = digits(atoms.positions)
    frame.set_momenta(digits(atoms.get_momenta()))
    return frame


def run_trajectory(
    start: ase.Atoms, labeler: str, schedule: Schedule, seed: tuple[int, ...], path: str,
    stop: Callable[[ase.Atoms], bool] | None = None,
) -> tuple[int, str]:  # fmt: skip
    """Run or continue one trajectory in a file, to its end or to the first frame where ``stop`` is true.

    Returns:
        its number of frames, and why the potential gave up ("" where it did not).
    """
    with Journal(Path(path), keyed=False) as journal:
        done = ase.io.read(path, ":", format="extxyz") if journal.size else []
        count = len(done)
        if done and stop is not None and stop(done[-1]):
            return count, ""
        frames = trajectory(start, labeler, schedule, seed, done)
        while True:
            try:
                frame = next(frames, None)
            except (MemoryError, OSError, ImportError):  # of the machine, not of the frame
                raise
            except Exception as err:  # any program's own, e.g. no convergence far from equilibrium
                if type(err).__name__ == "OutOfMemoryError":  # torch's
                    raise
                return count, f"{type(err).__name__}: {err}".replace("\n", " ")[:200]
            if frame is None:
                return count, ""
            buffer = io.StringIO()
            write_extxyz(buffer, [frame], columns=["symbols", "positions", "momenta"], write_results=False)
            journal.append(buffer.getvalue(), f"{count:032x}")
            count += 1
            if stop is not None and stop(frame):
                return count, ""


def sample_md(
    starts: Sequence[ase.Atoms], output: str | Path, with_: str, schedules: Sequence[Schedule], *, replicas: int = 1,
    seed: int = 0, workers: int = 1, threads: int = 1, executor: str | None = None, keep_bonds: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Counter[str]:  # fmt: skip
    """Frames from Langevin dynamics: every start at every schedule, ``replicas`` times.

    Trajectories are kept in ``OUTPUT.trajectories`` while the run lasts; a stopped run goes on there.

    Args:
        starts: first frames.
        output: extxyz file to write, without momenta.
        with_: name of the potential.
        schedules: temperatures and times.
        replicas: trajectories of each start and schedule.
        seed: equal seeds give equal frames.
        workers, threads, executor: as for labelling.
        keep_bonds: drop frames whose bonds are not the start's.
        progress: called with (finished trajectories, all trajectories).

    Returns:
        frames dropped, by reason; those that a trajectory lacks because the potential gave up are among them.

    Raises:
        ValueError: unknown potential, one that cannot describe a start, or one that gave no frame or only unsound ones.
    """
    from .labelers import open_labeler

    if replicas < 1:
        raise ValueError(f"replicas: expected at least 1, got {replicas}")
    if not starts:
        raise ValueError("starts: expected at least one frame, got none")
    potential, output = open_labeler(with_), Path(output)
    for atoms in starts:
        potential.calculator(atoms)  # unknown elements show before anything runs
    folder = output.with_name(f"{output.name}.trajectories")
    jobs = [
        (s, schedule, (seed, s, t, r), folder / f"{s:05d}-{t}-{r}.xyz")
        for s in range(len(starts)) for t, schedule in enumerate(schedules) for r in range(replicas)
    ]  # fmt: skip
    dropped: Counter[str] = Counter()
    with only_writer(folder):
        _same_settings(folder, starts, potential.identity, schedules, seed)
        done = 0
        with open_executor(executor, workers, threads) as (pool, _):
            futures = {
                pool.submit(run_trajectory, bare(starts[s]), with_, schedule, own, str(path)): schedule
                for s, schedule, own, path in jobs
            }
            for count, future in enumerate(concurrent.futures.as_completed(futures), 1):
                found, why = future.result()
                done += found
                if why:
                    dropped[f"the potential failed ({why})"] += futures[future].frames - found
                if progress is not None:
                    progress(count, len(futures))
        if not done:
            raise ValueError(f"{with_}: no trajectory gave a frame: {next(iter(dropped))}")
        try:
            _collect([(starts[s], s, path) for s, _, _, path in jobs], output, keep_bonds, dropped)
        except ValueError as err:
            raise ValueError(f"{with_}: {err}, and remove {folder}") from err
        shutil.rmtree(folder)
    return dropped


def _collect(
    trajectories: Sequence[tuple[ase.Atoms, int, Path]], output: Path, keep_bonds: bool, dropped: Counter[str]
) -> None:
    """Write the sound frames of all trajectories to one file, one by one.

    Raises:
        ValueError: there are none; no file is written then.
    """
    count = 0
    with atomic_path(output) as temporary, temporary.open("w", encoding="utf-8") as handle:
        for start, number, path in trajectories:
            if not path.stat().st_size:
                continue
            frames = ase.io.iread(path, ":", format="extxyz")
            for frame in keep_sound(frames, start if keep_bonds else None, dropped=dropped):
                del frame.arrays["momenta"]
                frame.info["start"] = number
                write_extxyz(handle, [frame], write_results=False)
                count += 1
        if not count:
            reasons = ", ".join(f"{number} {why}" for why, number in dropped.items())
            raise ValueError(f"all frames were dropped ({reasons}); lower the temperature or the timestep")


def _same_settings(
    folder: Path, starts: Sequence[ase.Atoms], with_: str, schedules: Sequence[Schedule], seed: int
) -> None:
    """Trajectories of other settings must not be continued with these."""
    content = {
        "with": with_, "seed": seed, "schedules": [asdict(s) for s in schedules],
        "starts": [frame_key(a, with_) for a in starts],
    }  # fmt: skip
    keep_settings(folder, content, names={"with": "potential", "starts": "start frames"})
