"""Export and verify the embedded base model trained by embedded_base.py.

Command:  python recipes/embedded_base.py export
          (verification alone: python recipes/embedded_export.py WORKDIR OUT)
Needs:    mace-torch, ase, safetensors.
Cost:     about 1 minute on one thread.

Writes organic_small.safetensors (weights), organic_small.json (architecture, provenance, errors),
organic_small.md (model card) and organic_small_frames.extxyz.gz (200 training frames for replay and
10 frames of each held-out molecule).
"""

from __future__ import annotations

import gzip
import io
import json
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import typer
from ase import Atoms
from ase.data import chemical_symbols
from ase.io import read, write

from mace_lora.atomic import atomic_path, write_text
from mace_lora.mace_plugin.base_model import describe_base, load_base, save_base

NAME, LEVEL, SEED = "organic_small", "GFN2-xTB", 7
N_REPLAY, N_PER_HELDOUT = 200, 10
CONFIGS = Path(__file__).parent / "configs"


def predict(model: Any, frames: list[Atoms], dtype: str) -> list[tuple[float, np.ndarray]]:
    """Return (energy in eV, forces in eV/Å) of each frame."""
    from mace.calculators import MACECalculator

    calc = MACECalculator(models=[model], device="cpu", default_dtype=dtype)
    out = []
    for frame in frames:
        atoms = Atoms(frame.numbers, positions=frame.positions, calculator=calc)
        out.append((atoms.get_potential_energy(), atoms.get_forces()))
    return out


def errors(model: Any, frames: list[Atoms]) -> dict[str, float]:
    """Return MAE and RMSE of the energy per atom (meV) and the forces (meV/Å)."""
    results = predict(model, frames, "float64")
    e = [(r[0] - f.info["REF_energy"]) / len(f) for r, f in zip(results, frames, strict=True)]
    f = [(r[1] - f.arrays["REF_forces"]).ravel() for r, f in zip(results, frames, strict=True)]
    table = {"frames": len(frames)}
    for key, values in (("E_per_atom_meV", np.array(e)), ("F_meV_per_A", np.concatenate(f))):
        table[f"MAE_{key}"] = round(1000 * float(np.abs(values).mean()), 2)
        table[f"RMSE_{key}"] = round(1000 * float(np.sqrt((values**2).mean())), 2)
    return table


def load_trained(workdir: Path) -> Any:
    """Return the model that `train` wrote (a pickle of this recipe's own making)."""
    import mace  # noqa: F401  (before e3nn)
    import torch

    return torch.load(workdir / "train" / f"{NAME}.model", weights_only=False)


def verify(workdir: Path, out: Path) -> None:
    """Compare the rebuilt model with the trained one on ten frames, in float32 and float64."""
    import torch

    frames = read(workdir / "heldout.extxyz", "::40")[:10]
    for dtype, limit in (("float32", 1e-3), ("float64", 1e-9)):
        original = load_trained(workdir).to(getattr(torch, dtype))
        copy = load_base(out / NAME, getattr(torch, dtype)).eval()
        ours, theirs = copy.state_dict(), original.state_dict()
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert value.dtype == ours[key].dtype and torch.equal(value, ours[key]), key
        pairs = zip(predict(copy, frames, dtype), predict(original, frames, dtype), strict=True)
        worst = [(abs(a[0] - b[0]), np.abs(a[1] - b[1]).max()) for a, b in pairs]
        d_energy, d_forces = np.max(worst, axis=0)
        print(f"verify {dtype}: max difference {d_energy:.1e} eV, {d_forces:.1e} eV/Å")
        assert max(d_energy, d_forces) < limit
    print(f"verify: state_dict equal; files in {out}")


def export(workdir: Path, out: Path) -> None:
    """Write weights, description and model card of the trained model, and verify them."""
    model = load_trained(workdir).float().eval()
    out.mkdir(parents=True, exist_ok=True)
    counts = json.loads((workdir / "counts.json").read_text())
    heldout = read(workdir / "heldout.extxyz", ":")
    names = dict.fromkeys(frame.info["molecule"] for frame in heldout)
    precise = load_trained(workdir).double()
    table = {"validation": errors(precise, read(workdir / "valid.extxyz", ":"))}
    table["held-out molecules"] = errors(precise, heldout)
    for name in names:
        table[name] = errors(precise, [f for f in heldout if f.info["molecule"] == name])
    command = json.loads((workdir / "train" / "command.json").read_text())
    base = describe_base(model)
    info = {
        "name": NAME,
        "elements": [chemical_symbols[z] for z in base["elements"]],
        "r_max_A": base["r_max"],
        "E0s_eV": base["E0s"]["Default"],
        "level": LEVEL,
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": int(command[command.index("--max_num_epochs") + 1]),
        "seeds": {"training_and_split": SEED, "molecules_first": 1000},
        "counts": counts,
        "errors": table,
        "versions": {n: version(n) for n in ("mace-torch", "torch", "e3nn", "ase", "tblite")},
    }
    save_base(model, out / NAME, info)
    info = json.loads((out / f"{NAME}.json").read_text(encoding="utf-8"))
    export_frames(workdir, out)
    write_text(out / f"{NAME}.md", model_card(info))
    print(f"export: wrote {NAME}.safetensors, .json, .md and {NAME}_frames.extxyz.gz in {out}")


def export_frames(workdir: Path, out: Path) -> None:
    """Write a few of the base's own frames: for replay (trained on) and of held-out molecules."""
    trained = [f for f in read(workdir / "train.extxyz", ":") if len(f) > 1]
    rng = np.random.default_rng(SEED)
    parts = [("replay", trained[i]) for i in rng.choice(len(trained), N_REPLAY, replace=False)]
    heldout = read(workdir / "heldout.extxyz", ":")
    for name in dict.fromkeys(f.info["molecule"] for f in heldout):
        own = [f for f in heldout if f.info["molecule"] == name]
        parts += [("heldout", own[i]) for i in sorted(rng.choice(len(own), N_PER_HELDOUT, replace=False))]
    frames = []
    for part, frame in parts:
        small = Atoms(frame.numbers, positions=frame.positions.round(6))
        small.info.update({k: frame.info[k] for k in ("molecule", "level", "label_source")}, part=part)
        # the labels belong to the positions before rounding: 1e-6 Å changes them by less than 1e-4 eV/Å
        small.info["REF_energy"] = frame.info["REF_energy"]
        small.arrays["REF_forces"] = frame.arrays["REF_forces"].round(6)
        frames.append(small)
    buffer = io.StringIO()
    write(buffer, frames, format="extxyz")
    with atomic_path(out / f"{NAME}_frames.extxyz.gz") as temporary:
        temporary.write_bytes(gzip.compress(buffer.getvalue().encode(), compresslevel=9, mtime=0))


def model_card(info: dict[str, Any]) -> str:
    """Return the model card (Markdown) of the exported model."""
    columns = ("frames", "MAE_E_per_atom_meV", "RMSE_E_per_atom_meV")
    columns += ("MAE_F_meV_per_A", "RMSE_F_meV_per_A")
    lines = ["| set | frames | MAE E | RMSE E | MAE F | RMSE F |", "|---|---|---|---|---|---|"]
    for name, row in info["errors"].items():
        lines.append(f"| {name} | " + " | ".join(str(row[c]) for c in columns) + " |")
    config = info["config"]
    architecture = (
        f"ScaleShiftMACE, hidden irreps {config['hidden_irreps']}, "
        f"{config['num_interactions']} interactions, correlation {config['correlation']}, "
        f"max_ell {config['max_ell']}, radial MLP {config['radial_MLP']}"
    )
    template = Template((CONFIGS / f"{NAME}_card.md").read_text(encoding="utf-8"))
    return template.substitute(
        **info["counts"],
        level=info["level"],
        tblite=info["versions"]["tblite"],
        mace=info["versions"]["mace-torch"],
        architecture=architecture,
        parameters=info["parameters"],
        r_max=info["r_max_A"],
        epochs=info["epochs"],
        seed=info["seeds"]["training_and_split"],
        table="\n".join(lines),
    )


def is_current(workdir: Path, out: Path) -> bool:
    """Return whether the exported weights are newer than the trained model."""
    trained = workdir / "train" / f"{NAME}.model"
    weights, card = out / f"{NAME}.safetensors", out / f"{NAME}.md"
    return card.exists() and weights.stat().st_mtime > trained.stat().st_mtime


if __name__ == "__main__":
    typer.run(verify)
