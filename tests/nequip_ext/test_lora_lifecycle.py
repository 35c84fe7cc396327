"""nequip-train, restart, nequip-package, nequip-compile and ASE with nequip_ext.LoRA, end to end."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from warm import run as run_warm

pytest.importorskip("nequip")
pytestmark = pytest.mark.nequip

WARM = ("nequip.scripts.train", "nequip_ext.lora.builder", "nequip_ext.lora.callback")
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
# Energies (eV) and forces (eV/Å) of three frames; with "block" as where equitune is not installed.
PREDICT = """
import importlib.metadata as metadata, json, sys
if sys.argv[2] == "block":
    for name in ("mace_lora", "nequip_ext"):
        sys.modules[name] = None
    found = metadata.entry_points
    metadata.entry_points = lambda **k: (
        [e for e in found(**k) if e.value.split(".")[0] not in ("mace_lora", "nequip_ext")] if k else found()
    )
import ase.io, torch
from nequip.data import compute_neighborlist_, from_ase
from nequip.utils.global_state import set_global_state
set_global_state()
if len(sys.argv) > 3:
    import nequip_ext
    base = {"_target_": "nequip.model.ModelFromCheckpoint", "checkpoint_path": sys.argv[1]}
    model = nequip_ext.LoRA(model=base, adapter=sys.argv[3])["sole_model"]
elif sys.argv[1].endswith(".pt2"):
    from nequip.integrations.ase import NequIPCalculator
    model = None
else:
    from nequip.model.saved_models import load_saved_model
    model = load_saved_model(sys.argv[1])
rows = []
for atoms in ase.io.read("mace_lora/embedded/glycolamide_pbe0.extxyz.gz", "0:3", format="extxyz"):
    if model is None:
        atoms.calc = NequIPCalculator.from_compiled_model(sys.argv[1], device="cpu")
        rows.append([atoms.get_potential_energy(), atoms.get_forces().ravel().tolist()])
        continue
    data = compute_neighborlist_(from_ase(atoms), r_max=float(model.metadata["r_max"]))
    data["atom_types"] = torch.tensor([model.type_names.index(s) for s in atoms.get_chemical_symbols()])
    out = model(data)
    rows.append([float(out["total_energy"]), out["forces"].flatten().tolist()])
print(json.dumps(rows))
"""


def call(*arguments: object, check: bool = True, warm: bool = False, **environment: str) -> str:
    """Run a command with one thread; returns its output."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment}
    words = [str(a) for a in arguments]
    if warm or words[1] in ("info", "evaluate", "diff"):
        done = run_warm(words, env, WARM, ROOT)
    else:
        done = subprocess.run(
            words, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )  # fmt: skip
    if check:
        assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def train(config: str, *overrides: str, check: bool = True, folder: object = "recipes/configs") -> str:
    """nequip-train with a config of a folder; compiled or by two processes in a process of its own."""
    cold = any(word in o for o in overrides for word in ("compile", "devices"))
    return call(BIN / "nequip-train", "-cd", folder, "-cn", config, *overrides, check=check, warm=not cold)


def predict(model: Path, block: str, *adapter: object) -> list:
    """Energies and forces of three frames; block: "block" or ""."""
    if block:
        return json.loads(call(sys.executable, "-c", PREDICT, model, block, *adapter).splitlines()[-1])
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(PREDICT)
        script.flush()
        return json.loads(call(script.name, model, block, *adapter, warm=True).splitlines()[-1])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A base and a LoRA run by the configs of recipes/, shortened."""
    folder = tmp_path_factory.mktemp("nequip")
    train("nequip_scratch", "epochs=1", f"folder={folder}/base")
    log = train("nequip_lora", "epochs=3", f"folder={folder}/lora", f"base={folder}/base/best.ckpt")
    (folder / "lora.log").write_text(log)
    return folder


def close(a, b, energy: float, forces: float) -> bool:
    """Energies (eV) and every component of the forces (eV/Å) agree."""
    return all(
        abs(x[0] - y[0]) < energy and max(abs(f - g) for f, g in zip(x[1], y[1], strict=True)) < forces
        for x, y in zip(a, b, strict=True)
    )


def test_what_training_prints_and_writes(work):
    log = (work / "lora.log").read_text()
    assert "LoRA coverage" in log
    assert "identity at start: largest difference of energies and forces [0.0, 0.0]" in log
    assert "energy reference check: mean (label - model)" in log
    assert "energy shifts refitted on 50 frames" in log
    assert {p.name for p in (work / "lora" / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md",
    }  # fmt: skip


def test_adapter_in_a_fresh_process_is_the_trained_model(work):
    """1e-6 eV per atom, 9 atoms; energies near -7725 eV are float64 in NequIP. The adapter restores the
    shifts that training had set on the base."""
    trained = predict(work / "lora" / "best.ckpt", "")
    again = predict(work / "base" / "best.ckpt", "", work / "lora" / "adapter")
    assert close(trained, again, 9e-6, 1e-5)


def test_restart_continues_from_the_last_epoch(work, tmp_path):
    log = train(
        "nequip_lora", "epochs=4", f"folder={tmp_path}", f"base={work}/base/best.ckpt",
        f"++ckpt_path={work}/lora/last.ckpt",
    )  # fmt: skip
    assert "identity at start" not in log
    assert "best epoch 3" in log
    assert "best epoch 0" not in log


def test_packages_need_nothing_of_ours(work):
    trained = predict(work / "lora" / "best.ckpt", "")
    for kind in ("merged", "unmerged"):
        package = work / f"{kind}.nequip.zip"
        call(BIN / "nequip-package", "build", work / "lora" / "best.ckpt", package, EQUITUNE_PACKAGE=kind)
        assert close(predict(package, "block"), trained, 1e-5, 1e-5)
    shown = call(
        BIN / "equitune", "merge", work / "unmerged.nequip.zip", work / "lora" / "adapter", "-o", "x.nequip.zip",
        check=False,
    )  # fmt: skip
    assert "it holds an unmerged adapter already; give the base of the adapter" in shown
    code = (
        "from nequip.utils.global_state import set_global_state; set_global_state(); import nequip_ext\n"
        f"package = '{work}/unmerged.nequip.zip'\n"
        "nequip_ext.LoRA(model=dict(_target_='nequip.model.ModelFromPackage', package_path=package))"
    )
    log = call(sys.executable, "-c", code, check=False)
    assert "model: it has LoRA adapters already (a package made with EQUITUNE_PACKAGE=unmerged" in log
    listing = call(BIN / "nequip-package", "list", work / "merged.nequip.zip")
    assert "mace_lora" not in listing
    assert "nequip_ext" not in listing


def test_merge_of_checkpoint_and_package(work):
    adapter, trained = work / "lora" / "adapter", predict(work / "lora" / "best.ckpt", "")
    package = work / "base.nequip.zip"
    call(BIN / "nequip-package", "build", work / "base" / "best.ckpt", package)
    for base in (work / "base" / "best.ckpt", package):
        merged = work / f"from{base.suffix}.nequip.zip"
        assert "merged package written to" in call(BIN / "equitune", "merge", base, adapter, "-o", merged)
        assert close(predict(merged, "block"), trained, 1e-5, 1e-5)
        assert "mace_lora" not in call(BIN / "nequip-package", "list", merged)
    shown = call(BIN / "equitune", "merge", package, adapter, "-o", "x.model", check=False)
    assert "output: expected a file name ending in .nequip.zip, got x.model" in shown


def test_card(work):
    """What a reader needs to use the adapter, with NequIP."""
    card = (work / "lora" / "adapter" / "README.md").read_text()
    assert "tags: [lora, nequip, interatomic-potential, equitune]" in card
    assert "| type names | `['H', 'C', 'N', 'O', 'F', 'S']` |" in card and "| energy shifts | `[" in card
    assert "_target_: nequip_ext.LoRA" in card and "from mace_lora" not in card
    assert "| command | `" in card and "nequip-train" in card and "| e3nn convention | `" in card
    assert re.search(r"\| data \| `\{'glycolamide_pbe0.extxyz.gz': '[0-9a-f]{64}'\}`", card)
    assert re.search(r"\| val0 epoch forces mae \| [\d.]+", card.replace("_", " "))


def test_adapter_from_a_checkpoint(work, tmp_path):
    """For runs without the callback."""
    from mace_lora import save_adapter
    from mace_lora.lora.adapter import read_adapter
    from nequip_ext.lora.saved import load_nequip

    save_adapter(load_nequip(work / "lora" / "best.ckpt"), tmp_path)
    old, new = read_adapter(work / "lora" / "adapter"), read_adapter(tmp_path)
    assert (new.config, new.plan) == (old.config, old.plan)
    assert new.metadata["base_fingerprint"] == old.metadata["base_fingerprint"]
    assert all((new.tensors[k] - v).abs().max() < 1e-5 for k, v in old.tensors.items())


def test_adapter_of_another_run_stays(work):
    before = (work / "lora" / "adapter" / "adapter_model.safetensors").read_bytes()
    log = train("nequip_lora", f"folder={work}/lora", f"base={work}/base/best.ckpt", "epochs=1", check=False)
    assert "holds the adapter of another run; choose another folder, remove it, or continue" in " ".join(log.split())
    assert (work / "lora" / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_files_that_are_none(work, tmp_path):
    from ase import Atoms, io

    for name in ("x.ckpt", "x.nequip.zip"):
        (tmp_path / name).write_text("no model")
        shown = call(BIN / "equitune", "info", tmp_path / name, check=False)
        assert f"{name}: cannot be read as a NequIP package or checkpoint" in " ".join(shown.split())
    gold = Atoms("Au2", [[0, 0, 0], [0, 0, 2.5]], info={"REF_energy": 0.0})
    io.write(tmp_path / "gold.xyz", gold)
    shown = call(BIN / "equitune", "evaluate", work / "base" / "best.ckpt", tmp_path / "gold.xyz", check=False)
    assert "frame 0: best.ckpt does not know Au; it knows C, F, H, N, O, S" in " ".join(shown.split())


def test_info_and_evaluate(work, tmp_path):
    shown = json.loads(call(BIN / "equitune", "info", work / "base" / "best.ckpt", "--json"))
    assert shown["type_names"] == ["H", "C", "N", "O", "F", "S"]
    adapter = json.loads(call(BIN / "equitune", "info", work / "lora" / "adapter", "--json"))
    assert adapter["framework"] == "nequip"
    frames = ROOT / "mace_lora" / "embedded" / "glycolamide_pbe0.extxyz.gz"
    call(
        BIN / "equitune", "evaluate", work / "base" / "best.ckpt", frames, "--adapter", work / "lora" / "adapter",
        "--index", "0:3", "-o", tmp_path / "a",
    )  # fmt: skip
    call(BIN / "equitune", "evaluate", work / "lora" / "best.ckpt", frames, "--index", "0:3", "-o", tmp_path / "b")
    adapted, trained = (json.loads((tmp_path / f / "errors.json").read_text()) for f in ("a", "b"))
    assert adapted["frames"] == 3
    assert adapted["errors"] == pytest.approx(trained["errors"], rel=1e-3)


def test_compiled_model_in_ase(work):
    compiled = work / "lora.nequip.pt2"
    call(
        BIN / "nequip-compile", work / "lora" / "best.ckpt", compiled, "--mode", "aotinductor", "--device", "cpu",
        "--target", "ase",
    )  # fmt: skip
    assert close(predict(compiled, "block"), predict(work / "lora" / "best.ckpt", ""), 1e-3, 1e-4)


def base_weights(checkpoint: Path) -> dict:
    import torch

    state = torch.load(checkpoint, map_location="cpu", weights_only=False)["state_dict"]
    return {n: v for n, v in state.items() if ".base_layer." in n and n.startswith("model.")}


def test_muon_leaves_the_base_alone(work, tmp_path):
    def optimizer(groups: str) -> str:
        settings = "muon: {lr: 0.01, weight_decay: 0.1}, adam: {lr: 0.01}"
        content = f"{{_target_: nequip.train.MuonWithAuxAdam, param_groups: {{_target_: {groups}, {settings}}}}}"
        return f"+training_module.optimizer={content}"

    common = (
        "epochs=1", f"folder={tmp_path}", f"base={work}/base/best.ckpt", "run=[train]", "~training_module.optimizer",
    )  # fmt: skip
    log = train("nequip_lora", *common, optimizer("nequip.model.MuonParamGroups"), check=False)
    assert "optimizer: MuonWithAuxAdam would decay and update the frozen base" in log
    train("nequip_lora", *common, optimizer("nequip_ext.MuonParamGroups"))
    before, after = (base_weights(p) for p in (work / "lora" / "best.ckpt", tmp_path / "best.ckpt"))
    assert before.keys() == after.keys()
    assert all((before[n] == after[n]).all() for n in before)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("types=[C,H,N,O,F,S]", "data: model_type_names: expected ['H', 'C', 'N', 'O', 'F', 'S'], in this order"),
        ("r_max=3.0", "data: r_max of NeighborListTransform: expected at least the model's 5 Å, got 3 Å"),
        (
            "+training_module.model.targets=sc",
            "targets: expected a sequence of regular expressions, got the str",
        ),
        ("+training_module.model.targets=[sc,edge_mpl]", "targets: no layer matches 'edge_mpl'; adaptable layers are"),
        (
            "training_module._target_=nequip.train.ConFIGLightningModule ~training_module.ema_decay "
            "~training_module.lr_scheduler",
            "training_module: ConFIGLightningModule solves for all weights at once",
        ),
        ("lr=0.0", "SaveAdapter: nothing of the adapter has moved in 10 steps"),
        (
            "trainer.callbacks.1._target_=nequip_ext.AlignEnergies ~trainer.callbacks.1.path",
            "AlignEnergies: the shifts of a LoRA model belong",
        ),
    ],
)
def test_settings_that_would_be_wrong_silently(work, tmp_path, override, message):
    log = train("nequip_lora", f"folder={tmp_path}", f"base={work}/base/best.ckpt", "epochs=1",
                *override.split(), check=False)  # fmt: skip
    assert message in " ".join(log.split())
    assert not (tmp_path / "adapter").exists()


def test_another_base_under_a_continued_run(work, tmp_path):
    """The adapter would not know its true base."""
    import shutil

    base = tmp_path / "base.ckpt"
    shutil.copy(work / "base" / "best.ckpt", base)
    common = (f"folder={tmp_path}", f"base={base}")
    train("nequip_lora", *common, "epochs=1")
    train("nequip_scratch", "epochs=1", "seed=5", f"folder={tmp_path}/other")
    shutil.copy(tmp_path / "other" / "best.ckpt", base)
    log = train("nequip_lora", *common, "epochs=2", f"++ckpt_path={tmp_path}/last.ckpt", check=False)
    assert "SaveAdapter: the base changed since the model was built" in log


def test_callback_without_lora_or_checkpoint(work, tmp_path):
    common = (f"folder={tmp_path}", f"base={work}/base/best.ckpt", "epochs=1")
    log = train("nequip_lora", *common, "training_module.model._target_=nequip.model.modify",
                "~training_module.model.rank", "+training_module.model.modifiers=[]", check=False)  # fmt: skip
    assert "SaveAdapter: expected one model built by nequip_ext.LoRA, got 0" in log
    log = train("nequip_lora", *common, "trainer.callbacks.0.monitor=null", "+trainer.callbacks.0.save_top_k=1",
                check=False)  # fmt: skip
    assert "SaveAdapter: expected a ModelCheckpoint callback with 'monitor'" in log
