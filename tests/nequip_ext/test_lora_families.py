"""LoRA on Allegro and PaiNN through the upstream commands, and every config of recipes/configs as written."""

import os

import pytest

pytest.importorskip("nequip")
from test_lora_lifecycle import BIN, call, close, predict, train

pytestmark = pytest.mark.nequip
FULL = os.environ.get("EQUITUNE_FULL") == "1"


@pytest.fixture(scope="module", params=["allegro", "painn"])
def family(request, tmp_path_factory):
    """Base and adapted checkpoint, by the configs that are in recipes/."""
    if request.param == "allegro":
        pytest.importorskip("allegro")
    folder = tmp_path_factory.mktemp(request.param)
    scratch, lora = {"allegro": ("allegro_scratch", "allegro_lora"), "painn": ("painn", "nequip_lora")}[request.param]
    more = ("types=[H,C,N,O,F,S]", "training_module.model.type_names=[H,C,N,O,F,S]",
            "training_module.model.per_type_energy_shifts=${E0s_xtb}") if scratch == "painn" else ()  # fmt: skip
    train(scratch, "epochs=1", f"folder={folder}/base", *more)
    train(lora, "epochs=1", f"folder={folder}/lora", f"base={folder}/base/best.ckpt")
    return folder


def test_adapter_and_packages(family):
    """The adapter in a fresh process, the merged and the unmerged package are the trained model."""
    trained = predict(family / "lora" / "best.ckpt", "")
    base = family / "base" / "best.ckpt"
    assert not close(trained, predict(base, ""), 1e-3, 1e-3)
    assert close(trained, predict(base, "", family / "lora" / "adapter"), 9e-6, 1e-5)
    for kind in ("merged", "unmerged"):
        package = family / f"{kind}.nequip.zip"
        call(BIN / "nequip-package", "build", family / "lora" / "best.ckpt", package, EQUITUNE_PACKAGE=kind)
        assert close(predict(package, "block"), trained, 1e-5, 1e-5)  # PaiNN's own layers travel in the package


@pytest.mark.skipif(not FULL, reason="two minutes each; EQUITUNE_FULL=1")
def test_compiled(family):
    trained = predict(family / "lora" / "best.ckpt", "")
    for kind in ("merged", "unmerged"):
        package, compiled = family / f"c-{kind}.nequip.zip", family / f"{kind}.nequip.pt2"
        call(BIN / "nequip-package", "build", family / "lora" / "best.ckpt", package, EQUITUNE_PACKAGE=kind)
        call(BIN / "nequip-compile", package, compiled, "--mode", "aotinductor", "--device", "cpu", "--target", "ase")
        assert close(predict(compiled, "block"), trained, 1e-3, 1e-4)
    train(
        {True: "allegro_lora", False: "nequip_lora"}["allegro" in str(family)], "epochs=1",
        f"folder={family}/compiled", f"base={family}/base/best.ckpt", "+training_module.model.compile_mode=compile",
    )  # fmt: skip
    assert close(predict(family / "compiled" / "best.ckpt", ""), trained, 1e-2, 1e-2)


def test_full_fine_tuning(tmp_path):
    train("nequip_scratch", "epochs=1", f"folder={tmp_path}/base")
    log = train("nequip_full", "epochs=1", f"folder={tmp_path}/full", f"base={tmp_path}/base/best.ckpt")
    assert "energy shifts refitted on 50 frames" in log and (tmp_path / "full" / "best.ckpt").is_file()
