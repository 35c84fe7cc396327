"""Classical-to-quantum transfer on QM9 molecules: error against the number of quantum labels, scratch and autotuned.

Purpose:  the QM9 experiment of T-PaiNN (arXiv 2603.24752) in kind, for MACE, NequIP and PaiNN: a model pre-trained on
          MMFF94 (or UFF) labels of sampled conformations is fine-tuned on N quantum labels (GFN2-xTB here; any file of
          quantum frames by --quantum); against the same model from scratch. Both at the best of three learning rates on
          validation frames (a fifth of N, at least 5, counted as labels), equal steps on the quantum labels. The mean
          classical energy of each composition is taken off. Test frames are of every tenth molecule, which neither
          stage has seen (a file given by --quantum is split at random). Controls: --same, pre-trained on classical
          labels of the N quantum configurations alone; --long, scratch with as many steps as both stages.
Command:  python recipes/t_painn_qm9.py prepare --molecules QM9.xyz --scale laptop   # [chem]
          python recipes/t_painn_qm9.py run --model mace         # or nequip, painn, in their environment
          python recipes/t_painn_qm9.py table
Data:     one geometry of each molecule in any format of ASE, e.g. QM9's (doi 10.6084/m9.figshare.c.978904); H C N O.
Cost:     laptop on one CPU thread: prepare 25 minutes, run of MACE 6 hours a seed; smoke: 6 minutes in all.
Writes:   t-painn-qm9/: classical.xyz, quantum.xyz, one folder per model and seed, report.md, curves.png. Stopped, every
          command goes on; settings.json keeps a folder to one scale and one pair of methods.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import ase
import ase.io
import numpy as np
import typer
import yaml

from mace_lora.atomic import atomic_path, content_digest, keep_settings, write_text
from mace_lora.augment import Schedule, keep_sound, label, open_labeler, rattle, sample_md
from mace_lora.augment.perturb import bare
from mace_lora.autotune.advice import with_labels
from mace_lora.autotune.levels import read_source
from mace_lora.autotune.offsets import by_composition, write_without
from mace_lora.data import require_sound
from mace_lora.evaluate.machine import machine

# molecules, frames of dynamics and rattled copies of each, quantum frames and test frames, numbers of labels,
# epochs of pre-training, steps and least epochs of the quantum stage
SCALES = {
    "smoke": {
        "molecules": 40, "md": 6, "rattle": 4, "quantum": 70, "test": 20, "counts": [25], "pretrain": 2, "steps": 60,
        "epochs": 1,
    },
    "laptop": {
        "molecules": 1000, "md": 18, "rattle": 10, "quantum": 1600, "test": 400, "counts": [25, 50, 100, 400],
        "pretrain": 10, "steps": 2000, "epochs": 60,
    },
    "paper": {
        "molecules": 5000, "md": 20, "rattle": 20, "quantum": 3000, "test": 1000,
        "counts": [25, 50, 100, 200, 400, 1000], "pretrain": 50, "steps": 20000, "epochs": 100,
    },
}  # fmt: skip
WORDS = {"same": "pre-trained on the same configurations", "long": "scratch as long as both stages"}
CONFIGS = Path(__file__).parent / "configs"
MODELS = {  # student of equitune distill
    "mace": {"flags": {"hidden_irreps": "32x0e+32x1o", "max_ell": 2, "correlation": 2, "r_max": 4.5, "E0s": "average"}},
    "nequip": {"nequip": "student.yaml", "flags": {"types": ["H", "C", "N", "O"], "r_max": 4.5}},
    "painn": {"nequip": "student.yaml", "flags": {"types": ["H", "C", "N", "O"], "r_max": 4.5}},
}
HELD = 10  # every tenth molecule is for tests only
app = typer.Typer(add_completion=False, no_args_is_help=True)
Folder = Annotated[Path, typer.Option(help="results")]
Scale = Annotated[str, typer.Option(help=f"one of {', '.join(SCALES)}")]


def write(path: Path, frames: list[ase.Atoms]) -> Path:
    with atomic_path(path) as temporary:
        ase.io.write(temporary, frames, format="extxyz", write_results=False)
    return path


def settings_of(folder: Path) -> dict[str, Any]:
    """Scale and methods of a folder."""
    file = folder / "settings.json"
    if not file.is_file():
        raise typer.BadParameter(f"no {file}: run the command prepare first", param_hint="--folder")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@app.command()
def prepare(
    molecules: Annotated[Path, typer.Option(help="geometries, any format ASE reads")],
    classical: Annotated[str, typer.Option(help="classical potential, as for equitune label")] = "mmff94",
    quantum: Annotated[
        str, typer.Option(help="quantum method, as for equitune label, or a file of labelled frames")
    ] = ("gfn2-xtb"),
    scale: Scale = "laptop",
    workers: Annotated[int, typer.Option(help="processes")] = max(1, len(os.sched_getaffinity(0))),
    folder: Folder = Path("t-painn-qm9"),
) -> None:
    """Sample conformations with the classical potential; label them by it, and others by the quantum method."""
    if scale not in SCALES:
        raise typer.BadParameter(f"expected one of {', '.join(SCALES)}, got {scale!r}", param_hint="--scale")
    if not molecules.is_file():
        raise typer.BadParameter(f"no file {molecules}", param_hint="--molecules")
    sizes: dict[str, Any] = SCALES[scale]
    for method in (classical, *([] if Path(quantum).is_file() else [quantum])):
        open_labeler(method)  # a wrong name before the folder is claimed
    if Path(quantum).is_file():
        known = with_labels(ase.io.read(quantum, ":"))  # standard labels too
        require_sound(known)
    starts = [bare(a) for a in ase.io.read(molecules, ":") if {*a.get_chemical_symbols()} <= {*"HCNO"}]
    for atoms in starts:
        atoms.set_cell(None)
        atoms.pbc = False
    starts = starts[: sizes["molecules"]]
    settings: dict[str, Any] = {"scale": scale, "classical": classical, "quantum": quantum, "sizes": sizes}
    settings["molecules_sha256"] = content_digest(molecules)
    if Path(quantum).is_file():
        settings["quantum_sha256"] = content_digest(quantum)
    names = {"molecules_sha256": "--molecules", "quantum_sha256": "--quantum"}
    keep_settings(folder, settings, names=names, error=typer.BadParameter)
    if not (folder / "start.xyz").exists():  # those that the classical potential can describe
        label(starts, folder / "start.xyz", classical, workers=workers)
    starts = [bare(a) for a in ase.io.read(folder / "start.xyz", ":")]
    if not (folder / "md.xyz").exists():
        schedules = [Schedule(t, t, -(-sizes["md"] // 3), 50.0, 0.5, 0.02, 200.0) for t in (300.0, 500.0, 800.0)]
        sample_md(starts, folder / "md.xyz", classical, schedules, seed=1, workers=workers, keep_bonds=True)
    rng = np.random.default_rng(2)
    seen, unseen = [], []
    for atoms in ase.io.read(folder / "md.xyz", ":"):
        (unseen if int(atoms.info["start"]) % HELD == 0 else seen).append(bare(atoms))
    # a few more, for labels that fail
    order, last = rng.permutation(len(seen)), rng.permutation(len(unseen))[: sizes["test"] * 11 // 10]
    learnt = sizes["quantum"] - sizes["test"]
    few, many = [seen[i] for i in order[:learnt]], [seen[i] for i in order[learnt:]]
    for i in last:
        unseen[i].info["unseen"] = True
        few.append(unseen[i])
    many += keep_sound(rattle(a, 0.08, rng) for k, a in enumerate(starts) if k % HELD for _ in range(sizes["rattle"]))
    label(write(folder / "many.xyz", many), folder / "classical.xyz", classical, workers=workers)
    if Path(quantum).is_file():
        write(folder / "quantum.xyz", known)
    else:
        label(write(folder / "few.xyz", few), folder / "quantum.xyz", quantum, workers=workers)
    for name in ("classical", "quantum"):
        print(f"{name}: {len(ase.io.read(folder / f'{name}.xyz', ':'))} frames")
    # force fields have no common zero of different molecules, nor one for each element
    source = read_source("classical.xyz", folder / "classical.xyz")
    offsets = by_composition([source], "REF_energy")
    write_without(source, offsets, "REF_energy", folder / "pretrain.xyz")
    twins = write(folder / "twins.xyz", [bare(a) for a in ase.io.read(folder / "quantum.xyz", ":")])
    label(twins, folder / "quantum_classical.xyz", classical, workers=workers)  # for the control
    twin = read_source("quantum_classical.xyz", folder / "quantum_classical.xyz")
    known = [a for a in twin.frames if a.get_chemical_formula() in offsets]  # not a test molecule's alone
    write_without(replace(twin, frames=known), offsets, "REF_energy", folder / "pretrain_same.xyz")
    print(f"written: {folder / 'pretrain.xyz'}, {folder / 'quantum.xyz'}")


def config(folder: Path, model: str, seed: int, count: int, sizes: dict[str, Any], same: bool, long: bool) -> Path:
    """Frames and config of one run of equitune distill, whose teacher are the classical labels."""
    for name in ("quantum", "pretrain", "pretrain_same"):
        if not (folder / f"{name}.xyz").is_file():
            raise typer.BadParameter(f"no {folder / name}.xyz: run prepare first, or to its end", param_hint="--folder")
    place = folder / f"{model}-s{seed}"
    place.mkdir(parents=True, exist_ok=True)
    frames = ase.io.read(folder / "quantum.xyz", ":")
    fixed = np.random.default_rng(0).permutation(len(frames))
    unseen = [i for i in fixed if frames[i].info.get("unseen", False)]  # a user's file has none
    pool = fixed[sizes["test"] :] if not unseen else np.array([i for i in fixed if i not in {*unseen}])
    test = [frames[i] for i in (unseen or fixed)[: sizes["test"]]]
    if len(test) < sizes["test"]:
        print(f"test: {len(test)} frames instead of {sizes['test']}, of molecules that no stage has seen")
    held = max(5, count // 5)
    if len(pool) < count:
        raise ValueError(f"quantum.xyz: expected {count} frames beside {len(test)} for tests, got {len(pool)}")
    order = np.random.default_rng(seed).permutation(pool)  # smaller sets are parts of the larger ones
    parts = {"train": order[held:count], "valid": order[:held]}
    for name, which in parts.items():
        write(place / f"{name}_{count}.xyz", [frames[i] for i in which])
    write(place / "test.xyz", test)
    labelled, name = (folder / "pretrain.xyz").resolve(), f"n{count}"
    known = ase.io.read(labelled, ":")
    if same:
        wanted = {*parts["train"].tolist()}
        known = [a for a in ase.io.read(folder / "pretrain_same.xyz", ":") if int(a.info["input_index"]) in wanted]
        labelled, name = write(place / f"same_{count}.xyz", known).resolve(), f"n{count}_same"
    epochs = max(sizes["epochs"], sizes["steps"] * 5 // (count - held))
    scratch = epochs + (round(sizes["pretrain"] * len(known) / (count - held)) if long else 0)
    student: dict[str, Any] = dict(MODELS[model]) | {
        "pretrain": {"epochs": epochs if same else sizes["pretrain"], "lrs": [0.01]},
        "finetune": {"epochs": epochs, "lrs": [0.002, 0.005, 0.01]},
        "direct": {"epochs": scratch, "lrs": [0.005, 0.01, 0.02]},
    }
    name += "_long" if long else ""
    if model != "mace":
        few = [frames[i] for i in parts["train"]]
        energies, gamma = (
            "training_module.model.model.per_type_energy_shifts",
            "training_module.lr_scheduler.scheduler.gamma",
        )
        for stage, some in (("pretrain", known), ("finetune", few), ("direct", few)):
            student[stage]["flags"] = {energies: shifts(some), gamma: 0.05 ** (1 / student[stage]["epochs"])}
        write_text(place / "nequip_data.yaml", (CONFIGS / "nequip_data.yaml").read_text())
        write_text(place / "student.yaml", student_config(model))
    content = {
        "folder": ".", "train": f"train_{count}.xyz", "valid": f"valid_{count}.xyz", "test": "test.xyz", "seed": seed,
        "report": name, "teacher": {"labelled": str(labelled)}, "filter": {"force": 50}, "student": student,
    }  # fmt: skip
    write_text(place / f"{name}.yaml", yaml.safe_dump(content, sort_keys=False))
    return place / f"{name}.yaml"


def shifts(frames: list[ase.Atoms]) -> dict[str, float]:
    """Energies of the elements by least squares, eV."""
    counts = np.array([[(a.numbers == z).sum() for z in (1, 6, 7, 8)] for a in frames], float)
    found = np.linalg.lstsq(counts, np.array([a.info["REF_energy"] for a in frames]), rcond=None)[0]
    return dict(zip("HCNO", found.tolist(), strict=True))


def student_config(model: str) -> str:
    """The shipped NequIP config, or the same with PaiNN as its model."""
    content = yaml.safe_load((CONFIGS / "nequip_autotune.yaml").read_text())
    if model == "painn":
        inner = content["training_module"]["model"]["model"]
        content["training_module"]["model"]["model"] = {
            "_target_": "nequip_ext.PaiNN", "num_layers": 3, "num_features": 64, "num_bessels": 20,
            **{k: inner[k] for k in ("seed", "model_dtype", "type_names", "r_max", "avg_num_neighbors",
                                     "per_type_energy_shifts", "per_type_energy_scales")},
        }  # fmt: skip
    return yaml.safe_dump(content, sort_keys=False)


@app.command()
def run(
    model: Annotated[str, typer.Option(help=f"one of {', '.join(MODELS)}")] = "mace",
    seeds: Annotated[str, typer.Option(help="comma-separated")] = "0,1,2",
    counts: Annotated[str, typer.Option(help="numbers of labels; default those of the scale")] = "",
    same: Annotated[bool, typer.Option(help="only the control: pre-training on the quantum configurations")] = False,
    long: Annotated[
        bool, typer.Option(help="only the control: scratch with the steps of pre-training added to its own")
    ] = False,
    folder: Folder = Path("t-painn-qm9"),
) -> None:
    """Train from scratch and autotuned for every number of labels."""
    if model not in MODELS:
        raise typer.BadParameter(f"expected one of {', '.join(MODELS)}, got {model!r}", param_hint="--model")
    settings = settings_of(folder)
    sizes: dict[str, Any] = SCALES[settings["scale"]]
    for seed in seeds.split(","):
        for count in map(int, counts.split(",")) if counts else sizes["counts"]:
            print(f"{model}, seed {seed}, {count} labels", flush=True)
            file = config(folder, model, int(seed), count, sizes, same, long)
            subprocess.run([Path(sys.executable).parent / "equitune", "distill", file], check=True)
    table(folder)


@app.command()
def table(folder: Folder = Path("t-painn-qm9")) -> None:
    """Write report.md and curves.png from the runs that are there."""
    settings = settings_of(folder)
    found: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*-s*/n*.json")):
        model, (count, _, control) = path.parent.name.rpartition("-s")[0], path.stem[1:].partition("_")
        found.setdefault((model, int(count), control), []).append(json.loads(path.read_text()))
    lines = [
        "# Classical to quantum on QM9 molecules", "",
        f"Classical labels: {settings['classical']}; quantum: {settings['quantum']}; scale `{settings['scale']}`, "
        f"{datetime.date.today()}, {machine()}. Commands: `python recipes/t_painn_qm9.py "
        f"prepare --molecules FILE --scale {settings['scale']}`, `… run --model MODEL`. Medians over seeds; E in "
        "meV/atom, raw and with constant offsets of the elements removed for both; F in meV/Å; fewer: steps on quantum "
        "labels to the best validation force error of scratch, ratio. Target: 2 on forces at 50 labels, 5 fewer steps; "
        "the paper reports 25 and more on raw energies. Test frames: "
        + ("a part of --quantum." if "quantum_sha256" in settings else "of molecules that no stage has seen."), "",
        "| model | labels | seeds | E scratch | E autotuned | E offsets removed | F scratch | F autotuned | ratio F | "
        "ratio E raw | ratio E | fewer |", "|" + "---|" * 12,
    ]  # fmt: skip
    for (model, count, control), contents in sorted(found.items()):

        def middle(get: Any, contents: list[dict[str, Any]] = contents) -> float:
            return median(get(c) for c in contents)

        def of(key: str, what: str) -> Any:
            return lambda c: c["evaluations"][key]["errors"].get(what, c["evaluations"][key].get(what))

        e = [middle(of(k, "mae_e")) for k in ("direct", "finetune")]
        r = [middle(of(k, "mae_e_refit")) for k in ("direct", "finetune")]
        f = [middle(of(k, "mae_f")) for k in ("direct", "finetune")]
        fewer = middle(lambda c: c["comparison"]["direct_steps"] / c["comparison"]["finetune_steps"])
        name = ", ".join([model, *(WORDS[word] for word in control.split("_") if word)])
        lines.append(
            f"| {name} | {count} | {len(contents)} | {e[0]:.1f} | {e[1]:.1f} | {r[0]:.1f} → {r[1]:.1f} | {f[0]:.1f} | "
            f"{f[1]:.1f} | {f[0] / f[1]:.2f} | {e[0] / e[1]:.2f} | {r[0] / r[1]:.2f} | {fewer:.1f} |"
        )
    plot(found, folder / "curves.png")
    write_text(folder / "report.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"written: {folder / 'report.md'}, {folder / 'curves.png'}")


def plot(found: dict[tuple[str, int, str], list[dict[str, Any]]], path: Path) -> None:
    """Force and energy error against the number of labels, log-log."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, model in enumerate(sorted({m for m, _, control in found if not control})):
        counts = sorted(c for m, c, control in found if m == model and not control)
        for key, style in (("direct", "o--"), ("finetune", "s-")):
            rows = [found[model, c, ""] for c in counts]
            label_of = f"{model}, {'scratch' if key == 'direct' else 'autotuned'}"
            for axis, get in (
                (left, lambda c, key=key: c["evaluations"][key]["mae_e_refit"]),
                (right, lambda c, key=key: c["evaluations"][key]["errors"]["mae_f"]),
            ):
                axis.plot(counts, [median(map(get, r)) for r in rows], style, color=f"C{number}", label=label_of)
    left.set(xscale="log", yscale="log", xlabel="quantum labels", ylabel="E MAE, offsets removed (meV/atom)")
    right.set(xscale="log", yscale="log", xlabel="quantum labels", ylabel="F MAE (meV/Å)")
    right.legend(fontsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


if __name__ == "__main__":
    app()
