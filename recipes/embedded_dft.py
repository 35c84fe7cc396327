"""Make the embedded DFT sets: labelled frames of glycolamide, 2-fluoroethanol and thioacetamide.

Command:  OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 python recipes/embedded_dft.py [MOLECULE ...]
Needs:    ase, rdkit, tblite, pyscf, typer, tqdm.
Cost:     per molecule sampling about 1 minute, labelling 25-40 minutes on one thread (8-10 s a frame).

Frames come from GFN2-xTB Langevin dynamics at 500 K (independent trajectories) and are labelled
with PBE0/def2-SVP and density fitting by PySCF. Labels are appended one by one to a work file, so a
stopped run continues where it was. The final order is a fixed seeded shuffle: the first 50 frames
are `train`, the next 50 `valid`, the rest `test`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from ase import Atoms, units
from ase.data import covalent_radii
from ase.io import read, write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from tqdm import tqdm

from mace_lora.atomic import write_text
from mace_lora.data import require_sound

# name: (SMILES, frames per trajectory); none of them is among the molecules of the embedded base
MOLECULES = {"glycolamide": ("OCC(=O)N", 50), "2_fluoroethanol": ("OCCF", 38), "thioacetamide": ("CC(N)=S", 38)}
LEVEL = "PBE0/def2-SVP (DF)"
TEMPERATURE_K = 500.0
TIMESTEP_FS = 0.5
FRICTION_PER_FS = 0.02
EQUILIBRATION_FS = 1000.0
SPACING_FS = 50.0
TRAJECTORY_SEEDS = (101, 102, 103, 104)
SHUFFLE_SEED = 20240
N_TRAIN = N_VALID = 50
ATOM_SPINS = {"H": 1, "C": 2, "N": 3, "O": 2, "F": 1, "S": 2}
XC, BASIS, AUXBASIS = "pbe0", "def2-svp", "def2-universal-jkfit"
GRID_LEVEL, CONV_TOL = 3, 1e-9

app = typer.Typer(add_completion=False)


def start_geometry(smiles: str, seed: int) -> Atoms:
    """Return an MMFF-relaxed RDKit conformer (Å), no cell, no periodicity."""
    from rdkit import Chem
    from rdkit.Chem import AllChem

    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    if AllChem.EmbedMolecule(mol, randomSeed=seed) != 0:
        raise RuntimeError(f"no conformer for {smiles}")
    AllChem.MMFFOptimizeMolecule(mol)
    symbols = [atom.GetSymbol() for atom in mol.GetAtoms()]
    return Atoms(symbols, positions=mol.GetConformer().GetPositions(), pbc=False)


def bonds(atoms: Atoms, scale: float = 1.3) -> set[tuple[int, int]]:
    """Return pairs closer than `scale` times the sum of covalent radii."""
    limit = scale * np.add.outer(*[covalent_radii[atoms.numbers]] * 2)
    close = np.triu(atoms.get_all_distances() < limit, k=1)
    return {(int(i), int(j)) for i, j in np.argwhere(close)}


def sample_trajectory(molecule: str, index: int, seed: int) -> list[Atoms]:
    """Run one GFN2-xTB Langevin trajectory and return its frames (Å), unlabelled."""
    from tblite.ase import TBLite

    smiles, count = MOLECULES[molecule]
    atoms = start_geometry(smiles, seed)
    atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
    rng = np.random.default_rng(seed)
    MaxwellBoltzmannDistribution(atoms, temperature_K=TEMPERATURE_K, rng=rng)
    dyn = Langevin(
        atoms,
        TIMESTEP_FS * units.fs,
        temperature_K=TEMPERATURE_K,
        friction=FRICTION_PER_FS / units.fs,
        fixcm=False,
        rng=rng,
    )
    reference = bonds(atoms)
    dyn.run(int(EQUILIBRATION_FS / TIMESTEP_FS))
    frames: list[Atoms] = []
    dropped = 0
    while len(frames) < count:
        dyn.run(int(SPACING_FS / TIMESTEP_FS))
        if bonds(atoms) != reference:
            dropped += 1
            continue
        frame = Atoms(atoms.numbers, positions=atoms.positions - atoms.get_center_of_mass())
        frame.info.update(trajectory=index, trajectory_seed=seed, frame=len(frames))
        frame.info["time_fs"] = float(dyn.nsteps * TIMESTEP_FS)
        frames.append(frame)
    print(f"trajectory {index} (seed {seed}): {len(frames)} frames, {dropped} dropped (bonds)")
    return frames


def split_counts(frames: int) -> dict[str, int]:
    """Number of frames of each part."""
    return {"train": N_TRAIN, "valid": N_VALID, "test": frames - N_TRAIN - N_VALID}


def sample(molecule: str, path: Path) -> list[Atoms]:
    """Return the frames in their final shuffled order, sampling them when absent."""
    if not path.exists():
        frames = []
        for index, seed in enumerate(TRAJECTORY_SEEDS):
            frames += sample_trajectory(molecule, index, seed)
        order = np.random.default_rng(SHUFFLE_SEED).permutation(len(frames))
        frames = [frames[i] for i in order]
        counts = split_counts(len(frames))
        splits = [name for name, count in counts.items() for _ in range(count)]
        for key, (frame, split) in enumerate(zip(frames, splits, strict=True)):
            frame.info.update(key=key, split=split)
        partial = path.with_name("sampled.part.extxyz")
        write(partial, frames, format="extxyz")
        partial.replace(path)
    return read(path, ":", format="extxyz")


def label_frame(atoms: Atoms) -> tuple[float, np.ndarray]:
    """Return the PBE0 energy (eV) and forces (eV/Å) of a closed-shell frame."""
    from pyscf import dft, gto

    mol = gto.M(
        atom=[(s, tuple(p)) for s, p in zip(atoms.symbols, atoms.positions, strict=True)],
        basis=BASIS,
        unit="Angstrom",
        verbose=0,
    )
    mf = dft.RKS(mol, xc=XC).density_fit(auxbasis=AUXBASIS)
    mf.grids.level = GRID_LEVEL
    mf.conv_tol = CONV_TOL
    energy = mf.kernel()
    if not mf.converged:
        raise RuntimeError("SCF did not converge")
    gradient = mf.nuc_grad_method().kernel()
    return float(energy) * units.Hartree, -np.asarray(gradient) * units.Hartree / units.Bohr


def label_atom(symbol: str) -> float:
    """Return the spin-polarised PBE0 energy (eV) of one isolated atom."""
    from pyscf import dft, gto

    mol = gto.M(atom=f"{symbol} 0 0 0", basis=BASIS, spin=ATOM_SPINS[symbol], verbose=0)
    mf = dft.UKS(mol, xc=XC).density_fit(auxbasis=AUXBASIS)
    mf.grids.level = GRID_LEVEL
    mf.conv_tol = CONV_TOL
    mf.max_cycle = 200
    energy = mf.kernel()
    if not mf.converged:
        mf = mf.newton()
        energy = mf.kernel(mf.mo_coeff, mf.mo_occ)
    if not mf.converged:
        raise RuntimeError(f"SCF of the {symbol} atom did not converge")
    return float(energy) * units.Hartree


def label_all(frames: list[Atoms], path: Path) -> dict[int, dict[str, Any]]:
    """Label frames not yet in the work file (JSON lines; eV, eV/Å) and return all labels."""
    done: dict[int, dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # a line cut off by a stopped run
            done[row["key"]] = row
        path.write_text("".join(json.dumps(row) + "\n" for row in done.values()))
    with path.open("a") as handle:
        for atoms in tqdm(frames, desc="PBE0", mininterval=10):
            key = int(atoms.info["key"])
            if key in done:
                continue
            start = time.perf_counter()
            energy, forces = label_frame(atoms)
            seconds = time.perf_counter() - start
            row = {"key": key, "energy": energy, "forces": forces.tolist(), "seconds": seconds}
            handle.write(json.dumps(row) + "\n")
            handle.flush()
            done[key] = row
    return done


def labelled(molecule: str, atoms: Atoms, row: dict[str, Any]) -> Atoms:
    """Return the frame with REF_energy (eV), REF_forces (eV/Å) and provenance."""
    out = atoms.copy()
    out.info.update(
        REF_energy=row["energy"],
        config_type=molecule,
        molecule=molecule,
        level=LEVEL,
        label_source=f"pyscf {version('pyscf')}",
        temperature_K=TEMPERATURE_K,
    )
    out.arrays["REF_forces"] = np.asarray(row["forces"])
    return out


def write_outputs(molecule: str, frames: list[Atoms], e0s: dict[str, float], seconds: float, out: Path) -> None:
    """Write the compressed frames, the isolated atoms and the JSON description."""
    out.mkdir(parents=True, exist_ok=True)
    buffer = io.StringIO()
    write(buffer, frames, format="extxyz")
    data = gzip.compress(buffer.getvalue().encode(), compresslevel=9, mtime=0)
    target = out / f"{molecule}_pbe0.extxyz.gz"
    partial = target.with_name(target.name + ".part")
    partial.write_bytes(data)
    partial.replace(target)

    singles = []
    for symbol, energy in e0s.items():
        atom = Atoms(symbol, positions=[[0.0, 0.0, 0.0]], pbc=False)
        atom.info.update(REF_energy=energy, config_type="IsolatedAtom", level=LEVEL)
        atom.info["label_source"] = f"pyscf {version('pyscf')}"
        atom.arrays["REF_forces"] = np.zeros((1, 3))
        singles.append(atom)
    write(out / f"{molecule}_pbe0_atoms.extxyz", singles, format="extxyz")

    forces = np.concatenate([f.arrays["REF_forces"] for f in frames])
    energies = np.array([f.info["REF_energy"] for f in frames])
    info = {
        "molecule": molecule,
        "smiles": MOLECULES[molecule][0],
        "level": LEVEL,
        "settings": {
            "xc": XC,
            "basis": BASIS,
            "auxbasis": AUXBASIS,
            "grid_level": GRID_LEVEL,
            "conv_tol_hartree": CONV_TOL,
        },
        "units": {"REF_energy": "eV", "REF_forces": "eV/Å", "positions": "Å"},
        "E0s_eV": {str(Atoms(s).numbers[0]): e for s, e in e0s.items()},
        "atom_unpaired_electrons": {s: ATOM_SPINS[s] for s in e0s},
        "sampling": {
            "method": "GFN2-xTB Langevin",
            "temperature_K": TEMPERATURE_K,
            "timestep_fs": TIMESTEP_FS,
            "friction_per_fs": FRICTION_PER_FS,
            "equilibration_fs": EQUILIBRATION_FS,
            "spacing_fs": SPACING_FS,
            "trajectory_seeds": list(TRAJECTORY_SEEDS),
            "shuffle_seed": SHUFFLE_SEED,
        },
        "counts": {"total": len(frames), **split_counts(len(frames))},
        "spread": {
            "energy_std_eV": float(energies.std()),
            "force_rms_eV_per_A": float(np.sqrt((forces**2).mean())),
            "force_max_eV_per_A": float(np.linalg.norm(forces, axis=1).max()),
        },
        "label_seconds_median_per_frame": round(seconds, 1),
        "versions": {name: version(name) for name in ("pyscf", "ase", "tblite", "rdkit", "numpy")},
        "sha256": {target.name: hashlib.sha256(data).hexdigest()},
    }
    write_text(out / f"{molecule}_pbe0.json", json.dumps(info, indent=2, ensure_ascii=False) + "\n")
    print(f"wrote {target} ({len(data) / 1000:.0f} kB), JSON and atoms in {out}")


@app.command()
def main(
    molecules: Annotated[list[str] | None, typer.Argument(help="default: all")] = None,
    workdir: Annotated[Path, typer.Option(help="Work files.")] = Path("build/embedded_dft"),
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("mace_lora/embedded"),
) -> None:
    """Sample, label and write the sets."""
    from pyscf import lib

    lib.num_threads(1)
    for molecule in molecules or MOLECULES:
        if molecule not in MOLECULES:
            raise SystemExit(f"molecule: expected one of {', '.join(MOLECULES)}, got {molecule!r}")
        folder = workdir / molecule
        folder.mkdir(parents=True, exist_ok=True)
        frames = sample(molecule, folder / "sampled.extxyz")
        symbols = sorted({s for f in frames for s in f.get_chemical_symbols()}, key=list(ATOM_SPINS).index)
        e0s = {symbol: label_atom(symbol) for symbol in symbols}
        print("isolated atoms (eV):", e0s, flush=True)
        rows = label_all(frames, folder / "labels.jsonl")
        seconds = float(np.median([row["seconds"] for row in rows.values()]))
        finished = [labelled(molecule, atoms, rows[int(atoms.info["key"])]) for atoms in frames]
        require_sound(finished)
        write_outputs(molecule, finished, e0s, seconds, out)


if __name__ == "__main__":
    app()
