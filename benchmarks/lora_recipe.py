"""Which LoRA recipe: scale of A, rank, learning rate, layers, decay, …, one knob at a time, in process.

The loop is mace_run_train's (loss 1:100, batches of 5, Adam with amsgrad, clipping, EMA 0.99, best epoch by
the validation loss) with an exponentially decaying learning rate, so that knobs without a flag can be
turned too. An epoch is ten steps at any number of frames. Chosen on the validation frames (as many as for training,
50 at most); test frames (300) are only reported. One JSON per run.

Command:  python benchmarks/lora_recipe.py run --data DIR --set ethanol --lr 0.02 --a-scale 0.3
          python benchmarks/lora_recipe.py table
Cost:     2 minutes a run of 70 epochs on one CPU thread (9 atoms).
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from datasets import load_split
from finetune import aligned_E0s, evaluate

from mace_lora.atomic import write_text

RESULTS = Path(__file__).parent / "results" / "lora_recipe"
BASES = {"ethanol": "off", "uracil": "off", "glycolamide": "embedded"}
app = typer.Typer(add_completion=False, no_args_is_help=True)


@dataclass(frozen=True)
class Knobs:
    """One recipe; ``a_scale`` multiplies A ~ N(0, 1/rank), ``layers`` restricts it to matching layer kinds."""

    set: str
    method: str = "lora"
    lr: float = 0.02
    a_scale: float = 0.32
    layers: str = ""
    rank: int = 16
    decay: float = 0.0
    lr_ratio: float = 1.0
    dense: bool = True
    epochs: int = 70
    seed: int = 0
    warmup: int = 0
    ema: float = 0.99
    rslora: bool = False
    frames: int = 50

    @property
    def name(self) -> str:
        """File name: what differs from the defaults."""
        changed = {k: v for k, v in asdict(self).items() if v != Knobs.__dataclass_fields__[k].default}
        return "__".join(f"{k}-{v}" for k, v in changed.items()).replace(" ", "").replace("/", "-")


def prepared(model: Any, frames: list[Any]) -> Any:
    """The base with the data's elements and aligned energy references, float32."""
    from mace_lora.mace_plugin.base_model import describe_base, prepare_base

    about = describe_base(model)
    e0s = {str(z): e for z, e in aligned_E0s(model, frames).items()}
    head = about["heads"][0]
    return prepare_base(model, about | {"elements": sorted(map(int, e0s)), "heads": [head], "E0s": {head: e0s}}).float()


def adapted(model: Any, knobs: Knobs) -> list[dict[str, Any]]:
    """Make the model trainable by the recipe; returns the optimiser's groups."""
    import torch

    from mace_lora import LoraConfig, apply_lora
    from mace_lora.lora.by_element import enable
    from mace_lora.lora.inject import adapter_layers
    from mace_lora.mace_plugin.by_element import KERNELS

    if knobs.method == "full":
        model.requires_grad_(True)
        return [{"params": list(model.parameters()), "lr": knobs.lr}]
    torch.manual_seed(knobs.seed)
    dense = None if knobs.dense else ()
    apply_lora(
        model,
        LoraConfig(rank=knobs.rank, alpha=float(knobs.rank), init="elora", dense=dense, use_rslora=knobs.rslora),
    )
    enable(model, KERNELS)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            scale = knobs.a_scale if re.search(knobs.layers, layer.spec.kind) else Knobs.a_scale
            for a in layer.lora_A["default"].values():
                a.mul_(scale / knobs.rank**0.5)
    a_factors = [p for n, p in model.named_parameters() if ".lora_A." in n]
    others = [p for n, p in model.named_parameters() if p.requires_grad and ".lora_A." not in n]
    return [
        {"params": others, "lr": knobs.lr, "weight_decay": knobs.decay},
        {"params": a_factors, "lr": knobs.lr / knobs.lr_ratio},
    ]


def shuffled(count: int, seed: int) -> Iterator[Any]:
    """Batches of 5 of the first ``count`` numbers without end, shuffled anew whenever all have been seen."""
    import torch

    order = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=order).split(5)


def train(model: Any, groups: list[dict[str, Any]], knobs: Knobs, parts: list[list[Any]]) -> tuple[Any, list[float]]:
    """Best model by the validation loss, and the validation force MAE (meV/Å) at every evaluation."""
    import torch
    from mace.tools import torch_geometric
    from torch_ema import ExponentialMovingAverage

    def loss_of(items: list[Any]) -> tuple[Any, float]:
        batch = torch_geometric.Batch.from_data_list(items)
        out = model(batch.to_dict(), training=True, compute_force=True)
        atoms = batch.ptr[1:] - batch.ptr[:-1]
        energy = ((out["energy"] - batch.energy) / atoms).square().mean()
        difference = out["forces"] - batch.forces
        return energy + 100 * difference.square().mean(), 1e3 * float(difference.detach().abs().mean())

    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, amsgrad=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    ema = ExponentialMovingAverage(trained, decay=knobs.ema)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: 0.2 ** (epoch / knobs.epochs) * min(1.0, (epoch + 1) / (knobs.warmup + 1))
    )
    batches = shuffled(len(parts[0]), knobs.seed)
    best, curve = (math.inf, {}), []
    for epoch in range(knobs.epochs):
        for chosen in itertools.islice(batches, 10):
            optimizer.zero_grad(set_to_none=True)
            loss_of([parts[0][int(i)] for i in chosen])[0].backward()
            torch.nn.utils.clip_grad_norm_(trained, 10.0)
            optimizer.step()
            ema.update()
        schedule.step()
        if epoch % 5 == 4 or epoch == knobs.epochs - 1:
            with ema.average_parameters():
                loss, mae = loss_of(parts[1])
                curve.append(mae)
                if float(loss) < best[0]:
                    best = (float(loss), copy.deepcopy(model.state_dict()))
    model.load_state_dict(best[1])
    return model, curve


@app.command()
def run(
    data: Annotated[Path, typer.Option(help="folder of the public data sets")],
    set_name: Annotated[str, typer.Option("--set", help=f"of {', '.join(BASES)}")] = "ethanol",
    method: Annotated[str, typer.Option(help="lora or full")] = "lora",
    lr: Annotated[float, typer.Option(help="learning rate at the start")] = 0.02,
    a_scale: Annotated[float, typer.Option(help="standard deviation of A times sqrt(rank)")] = 0.32,
    layers: Annotated[str, typer.Option(help="give a-scale only to layer kinds that match")] = "",
    rank: Annotated[int, typer.Option(help="rank")] = 16,
    decay: Annotated[float, typer.Option(help="decoupled weight decay of B and dense updates")] = 0.0,
    lr_ratio: Annotated[float, typer.Option(help="learning rate of B over that of A (LoRA+)")] = 1.0,
    dense: Annotated[bool, typer.Option(help="train the preset's dense part")] = True,
    epochs: Annotated[int, typer.Option(help="epochs of 10 steps")] = 70,
    seed: Annotated[int, typer.Option(help="frames, order and A")] = 0,
    warmup: Annotated[int, typer.Option(help="epochs of a linear warm-up")] = 0,
    ema: Annotated[float, typer.Option(help="decay of the moving average")] = 0.99,
    rslora: Annotated[bool, typer.Option(help="scale by alpha/sqrt(rank)")] = False,
    number: Annotated[int, typer.Option("--frames", help="training frames")] = 50,
    results: Annotated[Path, typer.Option(help="one JSON per run")] = RESULTS,
) -> None:
    """Train one recipe and store its errors."""
    warnings.filterwarnings("ignore")
    import torch
    from mace import data as mace_data
    from mace.tools import AtomicNumberTable

    from mace_lora.mace_plugin.base_model import load_model

    knobs = Knobs(
        set_name, method, lr, a_scale, layers, rank, decay, lr_ratio, dense, epochs, seed, warmup, ema, rslora, number
    )  # fmt: skip
    target = results / f"{knobs.name}.json"
    if target.is_file():
        print(target.read_text())
        return
    torch.set_num_threads(1)
    frames = load_split(set_name, data, seed, number)
    base = data / "models" / "MACE-OFF23_small.model" if BASES[set_name] == "off" else "embedded"
    model = prepared(load_model(base), frames.train)
    keys = mace_data.utils.KeySpecification(info_keys={"energy": "REF_energy"}, arrays_keys={"forces": "REF_forces"})
    table, cutoff = AtomicNumberTable([int(z) for z in model.atomic_numbers]), float(model.r_max)
    parts = [
        [
            mace_data.AtomicData.from_config(
                mace_data.config_from_atoms(f, key_specification=keys), z_table=table, cutoff=cutoff
            )
            for f in part
        ]
        for part in (frames.train, frames.valid)
    ]
    parts = [[_float32(item) for item in part] for part in parts]
    model, curve = train(model, adapted(model, knobs), knobs, parts)
    from finetune import energy_offsets

    offsets = energy_offsets(model, frames.train)
    row = asdict(knobs) | {"curve": curve}
    for part, some in (("train", frames.train), ("valid", frames.valid), ("test", frames.test[:300])):
        row[part] = evaluate(model, some, offsets)
    write_text(target, json.dumps(row) + "\n")
    print(f"{knobs.name}: test F {row['test']['mae_f']:.1f} meV/Å, E {row['test']['mae_e']:.1f} meV; {target}")


def _float32(item: Any) -> Any:
    import torch

    return item.apply(lambda v: v.float() if torch.is_tensor(v) and v.is_floating_point() else v)


@app.command()
def table(results: Annotated[Path, typer.Option(help="one JSON per run")] = RESULTS) -> None:
    """Write lora_recipe.md from the finished runs."""
    found = [json.loads(p.read_text()) for p in sorted(results.glob("*.json"))]
    # runs of before a knob was there had its default
    rows = [{f.name: f.default for f in fields(Knobs)} | r for r in found]
    rows.sort(key=lambda r: (r["set"], r["frames"], r["method"]))
    head = ["set", "recipe", "train F", "valid F", "valid E, refit", "test F", "test E", "test E, refit"]
    lines = ["# LoRA recipes", "", __doc__.split("\n\n")[1].replace("\n", " "), ""]
    lines += ["F MAE in meV/Å, E MAE in meV of the whole frame. LoRA's defaults: lr 0.02, A scale 0.32, rank 16.", ""]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for r in rows:
        label = r["method"] + "".join(
            f", {k} {r[k]:g}" if isinstance(r[k], float) else f", {k} {r[k]}"
            for k in (f.name for f in fields(Knobs) if f.name not in ("set", "method"))
            if (k == "lr" or r[k] != Knobs.__dataclass_fields__[k].default)
        )
        values = [r["train"]["mae_f"], r["valid"]["mae_f"], r["valid"]["mae_e_refit"]]
        values += [r["test"][k] for k in ("mae_f", "mae_e", "mae_e_refit")]
        lines.append(f"| {r['set']} | {label} | " + " | ".join(f"{v:.2f}" for v in values) + " |")
    write_text(results.parent / "lora_recipe.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"written: {results.parent / 'lora_recipe.md'}")


if __name__ == "__main__":
    app()
