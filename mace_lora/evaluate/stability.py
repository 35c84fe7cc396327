"""How long dynamics with a potential stay physical, and how well they conserve energy."""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ase
import numpy as np
from ase import units
from ase.md.verlet import VelocityVerlet

from mace_lora.atomic import keep_settings, write_text
from mace_lora.augment.dynamics import Schedule, run_trajectory, thermalize_momenta
from mace_lora.augment.executors import open_executor
from mace_lora.augment.journal import frame_key
from mace_lora.augment.labelers import open_labeler
from mace_lora.augment.perturb import bare
from mace_lora.augment.topology import find_bonds

__all__ = ["Survival", "bond_excess", "energy_drift", "stability"]

# what a user gives, under the names it has in settings.json
_GIVEN = {
    "starts": "start frames", "with": "potential", "start": "temperature", "steps": "steps", "timestep": "timestep",
    "friction": "friction", "every": "every", "limit": "limit", "seed": "seed",
}  # fmt: skip


@dataclass(frozen=True)
class Survival:
    """One trajectory.

    Attributes:
        start, replica: which one.
        steps: steps that were sound; all of them where it survived.
        survived: whether no bond came apart.
        why: what ended it; "" where it survived.
    """

    start: int
    replica: int
    steps: int
    survived: bool
    why: str


def bond_excess(reference: ase.Atoms, scale: float = 1.25) -> Callable[[ase.Atoms], float]:
    """A function that gives how far (Å) the worst bond of a frame is from its length in the reference.

    Args:
        reference: frame with bonds at equilibrium.
        scale: what counts as a bond, in sums of covalent radii.
    """
    bonds = find_bonds(reference, scale)
    i, j = bonds.pairs.T if len(bonds.pairs) else np.zeros((2, 0), int)
    lengths = np.linalg.norm(bonds.vectors, axis=1)

    def excess(atoms: ase.Atoms) -> float:
        if not np.isfinite(atoms.positions).all():
            return float("inf")
        if not len(i):
            return 0.0
        # trajectories are not wrapped, so differences are those of the bound images moved along
        change = (atoms.positions[j] - atoms.positions[i]) - (reference.positions[j] - reference.positions[i])
        return float(np.abs(np.linalg.norm(bonds.vectors + change, axis=1) - lengths).max())

    return excess


def stability(
    starts: Sequence[ase.Atoms], folder: str | Path, with_: str, *, temperature: float = 300.0, steps: int = 10_000,
    timestep: float = 0.5, friction: float = 0.01, replicas: int = 5, every: int = 100, limit: float = 5.0,
    seed: int = 0, workers: int = 1, executor: str | None = None, progress: Callable[[int, int], None] | None = None,
) -> list[Survival]:  # fmt: skip
    """Langevin trajectories until they end or collapse: a bond further than ``limit`` from its length at the start.

    The criterion and the 800 K of 50,000 steps are those of MS-MACE's experiments (arXiv 2312.09490). Trajectories
    are kept in the folder and continued from there.

    Args:
        starts: frames with bonds near equilibrium, Å.
        folder: for ``trajectory-*.xyz`` and ``stability.json``.
        with_: potential, as for labelling.
        temperature: K.
        steps: of each trajectory.
        timestep: fs.
        friction: 1/fs.
        replicas: trajectories of every start.
        every: steps between looks.
        limit: Å.
        seed: equal seeds give equal trajectories.
        workers, executor: as for labelling.
        progress: called with (finished, all trajectories).

    Returns:
        one entry for each trajectory.

    Raises:
        ValueError: a setting, a potential that cannot describe a start, or a folder of another run.
    """
    if not starts:
        raise ValueError("starts: expected at least one frame, got none")
    if steps < every or every < 1:
        raise ValueError(f"every: expected between 1 and {steps} steps, got {every}")
    if replicas < 1:
        raise ValueError(f"replicas: expected at least 1, got {replicas}")
    if limit <= 0:
        raise ValueError(f"limit: expected a length > 0 in Å, got {limit}")
    folder = Path(folder)
    schedule = Schedule(
        temperature, temperature, steps // every, every * timestep, timestep, friction, equilibration=every * timestep
    )
    potential = open_labeler(with_)
    for atoms in starts:
        potential.calculator(atoms)
    settings = {
        "with": potential.identity, "seed": seed, "limit": limit, "every": every, "steps": steps // every * every,
        **asdict(schedule),
    }  # fmt: skip
    everything = settings | {"starts": [frame_key(a, potential.identity) for a in starts]}
    keep_settings(folder, {key: everything[key] for key in _GIVEN}, names=_GIVEN)
    jobs = [(s, r) for s in range(len(starts)) for r in range(replicas)]
    found: dict[tuple[int, int], Survival] = {}
    with open_executor(executor, workers, 1) as (pool, _):
        futures = {
            pool.submit(
                _survive, bare(starts[s]), with_, schedule, (seed, s, r), folder / f"trajectory-{s:03d}-{r:03d}.xyz",
                limit,
            ): (s, r)
            for s, r in jobs
        }  # fmt: skip
        for count, future in enumerate(concurrent.futures.as_completed(futures), 1):
            frames, why = future.result()
            s, r = futures[future]
            found[s, r] = Survival(s, r, frames * every, not why, why)
            if progress is not None:
                progress(count, len(futures))
    rows = [found[job] for job in jobs]
    content = {
        **settings, "trajectories": len(rows), "surviving": sum(r.survived for r in rows) / len(rows),
        "runs": [asdict(r) for r in rows],
    }  # fmt: skip
    write_text(folder / "stability.json", json.dumps(content, indent=1) + "\n")
    return rows


def _survive(
    start: ase.Atoms, labeler: str, schedule: Schedule, seed: tuple[int, ...], path: Path, limit: float
) -> tuple[int, str]:
    """Sound frames of one trajectory, and what ended it ("" when nothing did)."""
    excess = bond_excess(start)
    reason = ""

    def collapsed(atoms: ase.Atoms) -> bool:
        nonlocal reason
        worst = excess(atoms)
        if worst > limit:
            reason = f"a bond is {worst:.1f} Å from its length at the start" if np.isfinite(worst) else "not finite"
        return bool(reason)

    frames, failed = run_trajectory(start, labeler, schedule, seed, str(path), collapsed)
    return frames - bool(reason), reason or (f"the potential failed ({failed})" if failed else "")


def energy_drift(
    start: ase.Atoms, with_: str, *, temperature: float = 300.0, steps: int = 2000, timestep: float = 0.5,
    every: int = 10, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Conservation of the total energy in NVE dynamics (velocity Verlet).

    Args:
        start: first frame.
        with_: potential, as for labelling.
        temperature: K of the first velocities.
        steps: number of steps.
        timestep: fs.
        every: steps between energies.
        seed: of the velocities.

    Returns:
        ``drift`` (slope of a line through the total energy, meV/atom/ps), ``fluctuation`` (standard deviation about
        it, meV/atom), ``time`` (ps) and ``energy`` (meV/atom, from the first).

    Raises:
        ValueError: too few steps, or an energy that is not finite.
    """
    if steps < 3 * every:
        raise ValueError(f"steps: expected at least {3 * every}, got {steps}")
    atoms = bare(start)
    thermalize_momenta(atoms, temperature_K=temperature, rng=np.random.default_rng(seed))
    atoms.calc = open_labeler(with_).calculator(atoms)
    dynamics = VelocityVerlet(atoms, timestep * units.fs)
    energy: list[float] = []
    dynamics.attach(lambda: energy.append(1e3 * atoms.get_total_energy() / len(atoms)), interval=every)
    dynamics.run(steps)
    time = np.arange(len(energy)) * every * timestep * 1e-3
    values = np.array(energy) - energy[0]
    if not np.isfinite(values).all():
        at = int(np.flatnonzero(~np.isfinite(values))[0]) * every
        raise ValueError(
            f"NVE dynamics: the energy is not finite at step {at}; take a shorter timestep than "
            f"{timestep:g} fs, or a sound potential"
        )
    slope, offset = np.polyfit(time, values, 1)
    return {
        "drift": float(slope), "fluctuation": float((values - slope * time - offset).std()), "time": time.tolist(),
        "energy": values.tolist(), "timestep": timestep, "temperature": temperature,
    }  # fmt: skip
