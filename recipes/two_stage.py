"""Two-stage framework on data of your own: a small fast student from a foundation model and few quantum labels.

Purpose:  LoRA adapts a foundation model to the labels (teacher); it labels synthetic frames; a small MACE is
          pre-trained on them, fine-tuned on the same labels and compared with direct training (Hu et al., JCST 2026,
          doi 10.1007/s11390-026-6106-z). Writes a config for `equitune distill` and runs it; edit the config for more.
Command:  python recipes/two_stage.py labelled.xyz --labels 50 [--base MACE-OFF23_small.model --scale laptop]
Data:     frames with REF_energy (eV) and REF_forces (eV/Å); those that are not learnt from are the test (up to 500).
Cost:     one CPU thread, 10 to 20 atoms: smoke 3 minutes, laptop 1 to 2 hours, paper a day.
Writes:   two-stage-own/: frames, config.yaml, one folder per stage, report.md with plots. Stopped, the same
          command goes on.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import ase.io
import numpy as np
import typer
import yaml

from mace_lora.atomic import atomic_path, write_text
from mace_lora.data import require_sound

# frames of each of eight trajectories, rattled copies; epochs of teacher, pre-training, fine-tuning, direct training
SCALES = {
    "smoke": {"frames": 5, "rattle": 1, "teacher": 2, "pretrain": 2, "finetune": 4, "direct": 4},
    "laptop": {"frames": 125, "rattle": 20, "teacher": 60, "pretrain": 40, "finetune": 150, "direct": 300},
    "paper": {"frames": 600, "rattle": 20, "teacher": 200, "pretrain": 200, "finetune": 500, "direct": 1000},
}


def split(data: Path, labels: int, seed: int, folder: Path) -> None:
    """Write train.xyz, valid.xyz (a fifth of the labels) and test.xyz."""
    frames: list[Any] = ase.io.read(data, ":")
    require_sound(frames)
    if labels < 10 or len(frames) < labels + 10:
        raise typer.BadParameter(f"expected 10 to {len(frames) - 10} labels, got {labels}", param_hint="--labels")
    order = np.random.default_rng(seed).permutation(len(frames))
    held = max(2, labels // 5)
    parts = {"train": order[held:labels], "valid": order[:held], "test": order[labels : labels + 500]}
    for name, which in parts.items():
        with atomic_path(folder / f"{name}.xyz") as temporary:
            ase.io.write(temporary, [frames[i] for i in which], format="extxyz", write_results=False)


def settings(base: str, sizes: dict[str, int], seed: int) -> dict[str, Any]:
    """Config of ``equitune distill``."""
    teacher = {
        "foundation_model": base,
        "E0s": "estimated",
        "lora": True,
        "lr": 0.02,
        "max_num_epochs": sizes["teacher"],
    }
    return {
        "folder": ".", "train": "train.xyz", "valid": "valid.xyz", "test": "test.xyz", "seed": seed,
        "teacher": {"members": 2, "flags": teacher},
        "synthetic": {
            "temperatures": [300, 600], "starts": 4, "frames": sizes["frames"], "spacing_fs": 10, "timestep_fs": 0.5,
            "equilibration_fs": 200, "rattle": sizes["rattle"], "rattle_std": 0.05, "keep_bonds": True,
        },
        "filter": {"deviation": 500, "force": 50, "energy": 2.0},
        "student": {
            "flags": {"hidden_irreps": "24x0e+24x1o", "max_ell": 2, "correlation": 2, "r_max": 4.5, "E0s": "average"},
            "pretrain": {"epochs": sizes["pretrain"], "lrs": [0.01]},
            "finetune": {"epochs": sizes["finetune"], "lrs": [0.001, 0.003, 0.01]},
            "direct": {"epochs": sizes["direct"], "lrs": [0.005, 0.01, 0.02]},
        },
    }  # fmt: skip


def main(
    data: Annotated[Path, typer.Argument(help="labelled frames")],
    labels: Annotated[int, typer.Option(help="frames to learn from; a fifth of them for validation")] = 50,
    base: Annotated[
        str, typer.Option(help="MACE foundation model (a pickle: only from sources you trust), or embedded")
    ] = "embedded",
    seed: Annotated[int, typer.Option(help="of the split and of everything else")] = 0,
    scale: Annotated[str, typer.Option(help=f"one of {', '.join(SCALES)}")] = "laptop",
    folder: Annotated[Path, typer.Option(help="results")] = Path("two-stage-own"),
) -> None:
    """Write frames and config, then run equitune distill."""
    if scale not in SCALES:
        raise typer.BadParameter(f"expected one of {', '.join(SCALES)}, got {scale!r}", param_hint="--scale")
    if base != "embedded" and not Path(base).is_file():
        raise typer.BadParameter(f"no file {base}", param_hint="--base")
    if not data.is_file():
        raise typer.BadParameter(f"no file {data}", param_hint="DATA")
    program, config = Path(sys.executable).parent / "equitune", folder / "config.yaml"
    split(data, labels, seed, folder)
    if base == "embedded" and not (folder / "base.model").exists():
        subprocess.run([program, "export-base", folder / "base.model"], check=True)
    model = "base.model" if base == "embedded" else str(Path(base).resolve())
    write_text(config, yaml.safe_dump(settings(model, SCALES[scale], seed), sort_keys=False))
    raise typer.Exit(subprocess.run([program, "distill", config], check=False).returncode)


if __name__ == "__main__":
    typer.run(main)
