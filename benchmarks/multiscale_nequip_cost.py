"""Cost of MultiScaleNequIP against NequIP of the short and of the long cutoff: energy and forces by system size.

Models are interleaved in one process, one thread, eager. Boxes are water at 1 g/cm^3 on a grid.

Command:  OMP_NUM_THREADS=1 python benchmarks/multiscale_nequip_cost.py [--sizes 1,2]
Cost:     5 minutes on one CPU thread (in the environment of NequIP).
"""

from __future__ import annotations

import datetime
import pkgutil
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

warnings.filterwarnings("ignore")

import ase  # noqa: E402
import nequip  # noqa: E402, F401  loads the extension
import numpy as np  # noqa: E402
import torch  # noqa: E402
import typer  # noqa: E402
from ase.build import molecule  # noqa: E402
from nequip.data import AtomicDataDict, compute_neighborlist_, from_ase  # noqa: E402
from nequip.utils.global_state import set_global_state  # noqa: E402

from mace_lora.atomic import write_text  # noqa: E402

RESULTS = Path(__file__).parent / "results"
SHORT, LONG = 4.5, 9.0
COMMON = {
    "seed": 0, "model_dtype": "float32", "type_names": ["H", "O"], "num_layers": 3, "l_max": 2, "parity": False,
    "num_features": 32, "radial_mlp_width": 64, "per_type_energy_scales": 1.0,
    "per_type_energy_shifts": {"H": 0.0, "O": 0.0},
}  # fmt: skip
MODELS = {
    "NequIP, short": ("nequip.model.NequIPGNNModel", {"r_max": SHORT, "avg_num_neighbors": 38.0}),
    "MS-NequIP": ("nequip_ext.MultiScaleNequIP", {"r_max": LONG, "r_short": SHORT, "avg_num_neighbors": 300.0}),
    "NequIP, long": ("nequip.model.NequIPGNNModel", {"r_max": LONG, "avg_num_neighbors": 300.0}),
}


def water(repeat: int) -> ase.Atoms:
    """40 randomly turned molecules on a grid at 1 g/cm^3, repeated in each direction."""
    rng, side = np.random.default_rng(0), 10.615
    box = ase.Atoms(cell=[side] * 3, pbc=True)
    places = list(np.ndindex(4, 4, 3))[:40]
    for place in places:
        one = molecule("H2O")
        one.rotate(rng.uniform(0, 360), rng.normal(size=3))
        one.translate(np.array(place) * [side / 4, side / 4, side / 3])
        box += one
    return box.repeat(repeat)


def graph(atoms: ase.Atoms, r_max: float) -> dict[str, Any]:
    data = compute_neighborlist_(from_ase(atoms), r_max=r_max)
    data[AtomicDataDict.ATOM_TYPE_KEY] = torch.tensor([["H", "O"].index(s) for s in atoms.get_chemical_symbols()])
    return data


def main(
    sizes: Annotated[str, typer.Option(help="repeats of the box of 120 atoms in each direction")] = "1,2",
    rounds: Annotated[int, typer.Option(help="timings of each")] = 5,
) -> None:
    """Measure and write multiscale_nequip_cost.md."""
    torch.set_num_threads(1)
    set_global_state()
    models = {n: pkgutil.resolve_name(t)(**COMMON, **c) for n, (t, c) in MODELS.items()}
    lines = [
        "# Cost of MS-NequIP",
        "",
        f"r_short {SHORT} Å, r_long {LONG} Å; 3 layers, l_max 2, 32 features; long path: the defaults; eager, float32, "
        "energy and forces, one CPU thread; median (min–max) of interleaved timings. Parameters: "
        + ", ".join(f"{n} {sum(p.numel() for p in m.parameters()):,}" for n, m in models.items())
        + ".",
        f"Command: `python benchmarks/multiscale_nequip_cost.py --sizes {sizes}` ({datetime.date.today()}, nequip "
        f"{version('nequip')}, torch {torch.__version__}).",
        "",
        "| atoms | model | edges | E+F (s) | against short | long / this |",
        "|---|---|---|---|---|---|",
    ]
    for repeat in [int(s) for s in sizes.split(",")]:
        atoms = water(repeat)
        graphs = {n: graph(atoms, float(m.metadata["r_max"])) for n, m in models.items()}
        times: dict[str, list[float]] = {n: [] for n in models}
        for turn in range((rounds if repeat == 1 else 2) + 1):
            for name, model in models.items():
                begin = time.perf_counter()
                model(dict(graphs[name]))
                times[name] += [time.perf_counter() - begin] if turn else []  # the first one warms up
        short, far = (median(times[n]) for n in ("NequIP, short", "NequIP, long"))
        for name, values in times.items():
            lines.append(
                f"| {len(atoms):,} | {name} | {graphs[name]['edge_index'].shape[1]:,} | {median(values):.3f} "
                f"({min(values):.3f}–{max(values):.3f}) | {median(values) / short:.2f} | {far / median(values):.1f}× |"
            )
            print(lines[-1], flush=True)
    write_text(RESULTS / "multiscale_nequip_cost.md", "\n".join(lines) + "\n")
    print(f"written: {RESULTS / 'multiscale_nequip_cost.md'}")


if __name__ == "__main__":
    typer.run(main)
