"""How fast frames are labelled, what the pipeline costs on top of the labeler, and whether its memory stays flat.

Command:  OMP_NUM_THREADS=1 python benchmarks/label_throughput.py
Cost:     about 5 minutes on two otherwise idle cores.
"""

from __future__ import annotations

import datetime
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated

import ase
import ase.io
import numpy as np
import typer
from ase.build import bulk, molecule

from mace_lora.atomic import write_text
from mace_lora.augment import open_labeler

app = typer.Typer(add_completion=False)
CHILD = """
import resource, sys, time
from mace_lora.augment import label
if __name__ == "__main__":
    report = label(sys.argv[1], sys.argv[2], sys.argv[3], workers=int(sys.argv[4]))
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(report.labelled, report.wall, time.process_time(), used.ru_maxrss / 1024)
"""


NOTHING = """
import numpy as np
from ase.calculators.calculator import Calculator


class Nothing(Calculator):
    implemented_properties = ["energy", "forces"]

    def calculate(self, atoms=None, properties=None, system_changes=None):
        self.results = {"energy": 0.0, "forces": np.zeros((len(atoms), 3))}


def nothing(atoms):
    return Nothing()
"""


def ethanes(count: int) -> list[ase.Atoms]:
    """Frames of 40 atoms: five ethane molecules 5 Å apart."""
    frames = []
    for seed in range(count):
        rng, cluster = np.random.default_rng(seed), ase.Atoms()
        for place in range(5):
            one = molecule("C2H6")
            one.rotate(rng.uniform(0, 360), rng.normal(size=3))
            one.translate([5.0 * (place % 2), 5.0 * (place // 2), rng.uniform(-1, 1)])
            cluster += one
        cluster.rattle(0.03, seed=seed)
        frames.append(cluster)
    return frames


def copper(count: int) -> list[ase.Atoms]:
    """Frames of 32 atoms for EMT."""
    frames = []
    for seed in range(count):
        atoms = bulk("Cu", cubic=True) * (2, 2, 2)
        atoms.rattle(0.05, seed=seed)
        frames.append(atoms)
    return frames


def pipeline(frames: Path, labeler: str, workers: int) -> tuple[int, float, float, float]:
    """Frames, wall seconds, CPU seconds of the main process and its peak memory in MB; in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "run.py"
        script.write_text(CHILD)
        (Path(folder) / "costs.py").write_text(NOTHING)
        command = [sys.executable, str(script), str(frames), str(Path(folder) / "out.xyz"), labeler, str(workers)]
        shown = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stdout.split()
    return int(shown[0]), float(shown[1]), float(shown[2]), float(shown[3])


@app.command()
def main(
    frames: Annotated[int, typer.Option(help="frames of 40 atoms for GFN2-xTB")] = 400,
    repeats: Annotated[int, typer.Option(help="repetitions of each measurement")] = 3,
    output: Annotated[Path, typer.Option(help="table to write")] = Path("benchmarks/results/label_throughput.md"),
) -> None:
    """Write the table."""
    with tempfile.TemporaryDirectory() as folder:
        path, few = Path(folder) / "frames.xyz", Path(folder) / "few.xyz"
        sample = ethanes(frames)
        ase.io.write(path, sample)
        ase.io.write(few, sample[: frames // 4])  # the difference is without start-up
        labeler = open_labeler("gfn2-xtb")
        rows: dict[str, list[float]] = {"direct": [], "one": [], "two": [], "few": [], "main": [], "null": []}
        for _ in range(repeats):
            start = time.perf_counter()
            for atoms in sample:
                labeler.label(atoms)
            rows["direct"].append(time.perf_counter() - start)
            many, less = pipeline(path, "gfn2-xtb", 1), pipeline(few, "gfn2-xtb", 1)
            rows["one"].append(many[1])
            rows["few"].append(less[1])
            rows["main"].append((many[2] - less[2]) / (many[0] - less[0]))
            empty, fewer = pipeline(path, "costs:nothing", 1), pipeline(few, "costs:nothing", 1)
            rows["null"].append((empty[1] - fewer[1]) / (empty[0] - fewer[0]))
            rows["two"].append(pipeline(path, "gfn2-xtb", 2)[1])
        memory = {}
        for count in (1000, 10000):
            ase.io.write(path, copper(count))
            memory[count] = pipeline(path, "emt", 2)
    direct, one, two = (median(rows[k]) for k in ("direct", "one", "two"))
    efficiency = [a / (2 * b) for a, b in zip(rows["one"], rows["two"], strict=True)]
    own, rest = direct / frames, frames - frames // 4
    overhead = [(a - b) / rest - d / frames for a, b, d in zip(rows["one"], rows["few"], rows["direct"], strict=True)]
    serial = median(rows["main"])
    null = rows["null"]
    workers = 1e6 * (own + median(null)) / 1000
    lines = [
        "# Labelling: throughput, overhead, memory", "",
        f"{frames} frames of 40 atoms, GFN2-xTB by tblite {version('tblite')}, one thread a worker, medians (range) of "
        f"{repeats}; start-up of the processes included. {datetime.date.today()}.", "",
        "| | |", "|---|---|",
        f"| a loop over the frames, no pipeline | {frames / direct:.1f} frames/s, {1e3 * own:.1f} ms each |",
        f"| 1 worker | {frames / one:.1f} frames/s |",
        f"| 2 workers | {frames / two:.1f} frames/s |",
        f"| efficiency of 2 workers | {median(efficiency):.2f} ({min(efficiency):.2f}–{max(efficiency):.2f}) |",
        f"| overhead per frame, 1 worker against the loop, without start-up | {1e3 * median(overhead):.2f} ms "
        f"({1e3 * min(overhead):.2f}–{1e3 * max(overhead):.2f}), {100 * median(overhead) / own:.1f} % |",
        f"| the pipeline around a labeler that does nothing, per frame | {1e3 * median(null):.2f} ms "
        f"({1e3 * min(null):.2f}–{1e3 * max(null):.2f}), {100 * median(null) / own:.1f} % of GFN2-xTB's time |",
        f"| main process, CPU time per frame | {1e3 * serial:.2f} ms |",
        *(f"| {n} EMT frames of 32 atoms, 2 workers | {n / m[1]:.0f} frames/s, main process at most {m[3]:.0f} MB |"
          for n, m in memory.items()),
        "", f"10^6 such labels on 1,000 cores, estimated: {workers:.0f} s of the workers, but {1e6 * serial:.0f} s of "
        "the one main process, which reads, sends and writes. One command keeps "
        f"{own / serial:.0f} workers busy with frames as quick as these; for more, split the input. Labels that "
        "take a second each (DFT) keep 1,000 workers busy.", "",
    ]  # fmt: skip
    write_text(output, "\n".join(lines))
    print("\n".join(lines))
    print(f"written: {output}")


if __name__ == "__main__":
    app()
