"""Make the embedded base model: a small MACE trained on GFN2-xTB data of organic molecules.

Command:  OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 python recipes/embedded_base.py [sample|train|export]
          (no stage: all three; a finished stage is skipped, a stopped one continues)
Needs:    mace-torch, ase, rdkit, tblite, safetensors, pyyaml, typer, tqdm.
Cost:     sample 12 to 50 minutes with --jobs 2, by the CPU, train 36-50 minutes on one thread (36 s an epoch),
          export about 1 minute.

`sample` runs GFN2-xTB Langevin dynamics of the molecules in molecules.yaml, `train` calls
`mace_run_train`, and `export` writes the weights as safetensors with a JSON description. Only
`.model` files that `train` wrote itself are unpickled. Export and verification are in
embedded_export.py, the options of `mace_run_train` in configs/organic_small.yaml.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml
from ase import Atoms, units
from ase.data import covalent_radii
from ase.io import read, write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.optimize import BFGS
from tqdm import tqdm

from mace_lora.atomic import keep_settings
from mace_lora.data import require_sound

NAME = "organic_small"
LEVEL = "GFN2-xTB"
TEMPERATURES_K = (300.0, 600.0, 1000.0)
FRAMES_PER_TEMPERATURE = 30
TIMESTEP_FS, FRICTION_PER_FS = 0.5, 0.02
EQUILIBRATION_FS, SPACING_FS = 400.0, 25.0
RATTLES_A = (0.05, 0.065, 0.08, 0.1)
MAX_FORCE = 30.0  # eV/Å
ATOM_SPINS = {"H": 1, "C": 2, "N": 3, "O": 2, "F": 1, "S": 2}
SEED, VALID_FRACTION = 7, 0.05
LR_START, LR_END = 0.01, 0.0001

app = typer.Typer(add_completion=False, invoke_without_command=True)
Workdir = Annotated[Path, typer.Option(help="Work files.")]
Jobs = Annotated[int, typer.Option(help="Sampling processes.")]
Every = Annotated[int, typer.Option(min=1, help="Take every n-th molecule: a smaller set.")]
Epochs = Annotated[int, typer.Option(help="Training epochs.")]
Out = Annotated[Path, typer.Option(help="Output folder.")]
CONFIGS = Path(__file__).parent / "configs"
WORKDIR, OUT, EPOCHS = Path("build/embedded_base"), Path("mace_lora/embedded"), 24


def molecules(every: int = 1) -> list[tuple[str, str, str, int]]:
    """Return (split, name, SMILES, seed) of every n-th molecule in molecules.yaml."""
    path = Path(__file__).with_name("molecules.yaml")
    table = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows = [(s, n, smi) for s in ("train", "heldout") for n, smi in table[s].items()]
    return [(*row, 1000 + i) for i, row in enumerate(rows)][::every]


def bonds(atoms: Atoms, scale: float = 1.3) -> set[tuple[int, int]]:
    """Return pairs closer than `scale` times the sum of covalent radii."""
    limit = scale * np.add.outer(*[covalent_radii[atoms.numbers]] * 2)
    close = np.triu(atoms.get_all_distances() < limit, k=1)
    return {(int(i), int(j)) for i, j in np.argwhere(close)}


def start_geometry(smiles: str, seed: int) -> Atoms:
    """Return an RDKit conformer (Å); the parts of a dimer are put 2.2 Å apart."""
    from rdkit import Chem
    from rdkit.Chem import AllChem

    total = Atoms(pbc=False)
    for part in smiles.split("."):
        mol = Chem.AddHs(Chem.MolFromSmiles(part))
        if AllChem.EmbedMolecule(mol, randomSeed=seed) != 0:
            raise RuntimeError(f"no conformer for {part}")
        fragment = Atoms(
            [atom.GetSymbol() for atom in mol.GetAtoms()],
            positions=mol.GetConformer().GetPositions(),
        )
        if len(total):
            fragment.positions[:, 0] += total.positions[:, 0].max() - fragment.positions[:, 0].min()
            fragment.positions[:, 0] += 2.2
        total += fragment
    return total


def record(atoms: Atoms, **info: Any) -> Atoms:
    """Return a copy with REF_energy (eV), REF_forces (eV/Å) and provenance."""
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    frame = Atoms(atoms.numbers, positions=atoms.positions - atoms.get_center_of_mass())
    frame.info.update(REF_energy=float(energy), level=LEVEL, **info)
    frame.info["label_source"] = f"tblite {version('tblite')}"
    frame.arrays["REF_forces"] = forces.copy()
    return frame


def sample_molecule(task: tuple[str, str, str, int, Path]) -> tuple[str, int]:
    """Sample one molecule into its own file; return its name and the number of frames dropped."""
    from tblite.ase import TBLite

    split, name, smiles, seed, folder = task
    path = folder / f"{name}.extxyz"
    if path.exists():
        return name, int(read(path, 0).info["dropped"])
    atoms = start_geometry(smiles, seed)
    atoms.calc = TBLite(method=LEVEL, verbosity=0)
    BFGS(atoms, logfile=None).run(fmax=0.05, steps=150)
    common = {"molecule": name, "config_type": name, "set": split}
    reference, relaxed = bonds(atoms), atoms.positions.copy()
    frames = [record(atoms, kind="relaxed", seed=seed, **common)]
    for number, temperature in enumerate(TEMPERATURES_K):
        rng = np.random.default_rng([seed, number])
        atoms.positions = relaxed
        MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=rng)
        dyn = Langevin(
            atoms,
            TIMESTEP_FS * units.fs,
            temperature_K=temperature,
            friction=FRICTION_PER_FS / units.fs,
            fixcm=False,
            rng=rng,
        )
        dyn.run(int(EQUILIBRATION_FS / TIMESTEP_FS))
        for _ in range(FRAMES_PER_TEMPERATURE):
            dyn.run(int(SPACING_FS / TIMESTEP_FS))
            info = {"kind": "md", "temperature_K": temperature, "seed": seed}
            frames.append(record(atoms, **info, **common))
    rng = np.random.default_rng([seed, 99])
    for stdev in RATTLES_A:
        atoms.positions = relaxed + rng.normal(scale=stdev, size=relaxed.shape)
        frames.append(record(atoms, kind="rattled", stdev_A=stdev, seed=seed, **common))
    kept = []
    for frame in frames:
        largest = np.linalg.norm(frame.arrays["REF_forces"], axis=1).max()
        if largest <= MAX_FORCE and bonds(frame) == reference:
            kept.append(frame)
    for frame in kept:
        frame.info["dropped"] = len(frames) - len(kept)
    partial = path.with_name(path.name + ".part")
    write(partial, kept, format="extxyz")
    partial.replace(path)
    return name, len(frames) - len(kept)


def isolated_atoms() -> list[Atoms]:
    """Return the isolated atoms with their GFN2-xTB energies (eV)."""
    from tblite.ase import TBLite

    singles = []
    for symbol, unpaired in ATOM_SPINS.items():
        atom = Atoms(symbol, positions=[[0.0, 0.0, 0.0]], pbc=False)
        atom.calc = TBLite(method=LEVEL, multiplicity=unpaired + 1, verbosity=0)
        singles.append(record(atom, config_type="IsolatedAtom"))
    return singles


def check_settings(workdir: Path, every: int) -> None:
    """Refuse a work folder made with other molecules or other sampling settings."""
    now = {
        "molecules": {name: [split, smiles, seed] for split, name, smiles, seed in molecules(every)},
        "temperatures_K": list(TEMPERATURES_K),
        "frames_per_temperature": FRAMES_PER_TEMPERATURE,
        "fs": [TIMESTEP_FS, FRICTION_PER_FS, EQUILIBRATION_FS, SPACING_FS],
        "rattles_A": list(RATTLES_A),
        "max_force": MAX_FORCE,
    }
    keep_settings(workdir, now, error=typer.BadParameter)


@app.command()
def sample(workdir: Workdir = WORKDIR, jobs: Jobs = 1, every: Every = 1) -> None:
    """Sample and label every molecule; write train, valid and heldout files."""
    folder = workdir / "molecules"
    folder.mkdir(parents=True, exist_ok=True)
    check_settings(workdir, every)
    if (workdir / "counts.json").exists():
        print(f"sample: done before, files in {workdir}")
        return
    tasks = [(*row, folder) for row in molecules(every)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs) as pool:
        work = pool.imap_unordered(sample_molecule, tasks)
        dropped = dict(tqdm(work, total=len(tasks), desc="molecules", mininterval=10))
    frames: dict[str, list[Atoms]] = {"train": [], "heldout": []}
    for split, name, *_ in tasks:
        frames[split] += read(folder / f"{name}.extxyz", ":")
    order = np.random.default_rng(SEED).permutation(len(frames["train"]))
    n_valid = round(VALID_FRACTION * len(order))
    shuffled = [frames["train"][i] for i in order]
    singles = isolated_atoms()
    write(workdir / "train.extxyz", singles + shuffled[n_valid:], format="extxyz")
    write(workdir / "valid.extxyz", shuffled[:n_valid], format="extxyz")
    write(workdir / "heldout.extxyz", frames["heldout"], format="extxyz")
    for split in ("train", "valid", "heldout"):
        require_sound(workdir / f"{split}.extxyz")
    counts = {
        "molecules_train": sum(task[0] == "train" for task in tasks),
        "molecules_heldout": sum(task[0] == "heldout" for task in tasks),
        "frames_train": len(shuffled) - n_valid,
        "frames_valid": n_valid,
        "frames_heldout": len(frames["heldout"]),
        "frames_dropped": sum(dropped.values()),
        "dropped_by_molecule": {k: v for k, v in sorted(dropped.items()) if v},
    }
    (workdir / "counts.json").write_text(json.dumps(counts, indent=2) + "\n")
    print(f"sample: {counts}\nsample: wrote train, valid and heldout files in {workdir}")


@app.command()
def train(workdir: Workdir = WORKDIR, epochs: Epochs = EPOCHS) -> None:
    """Train the base model from scratch with `mace_run_train` on one thread."""
    folder = workdir / "train"
    if (folder / f"{NAME}.model").exists():
        print(f"train: done before, model in {folder}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    gamma = (LR_END / LR_START) ** (1.0 / epochs)
    command = [str(Path(sys.executable).parent / "mace_run_train"), "--name", NAME]
    command += ["--train_file", str(workdir / "train.extxyz")]
    command += ["--valid_file", str(workdir / "valid.extxyz")]
    command += ["--work_dir", str(folder), "--seed", str(SEED), "--restart_latest"]
    command += ["--config", str(CONFIGS / f"{NAME}.yaml"), "--lr", str(LR_START)]
    command += ["--lr_scheduler_gamma", f"{gamma:.6f}", "--max_num_epochs", str(epochs)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    (folder / "command.json").write_text(json.dumps(command[1:], indent=1) + "\n")
    subprocess.run(command, check=True, env=env)
    print(f"train: model and logs in {folder}")


@app.command()
def export(workdir: Workdir = WORKDIR, out: Out = OUT) -> None:
    """Write weights, description and model card of the trained model, and verify them."""
    import embedded_export

    if embedded_export.is_current(workdir, out):
        print(f"export: done before, files in {out}")
        return
    embedded_export.export(workdir, out)
    verifier = Path(embedded_export.__file__)
    subprocess.run([sys.executable, str(verifier), str(workdir), str(out)], check=True)


@app.callback()
def main(ctx: typer.Context) -> None:
    """Run all stages when none is named."""
    if ctx.invoked_subcommand is None:
        sample()
        train()
        export()


if __name__ == "__main__":
    app()
