"""nequip-train with nequip_ext.LoRA: a packaged base, compilation, two processes."""

import pytest
from test_lora_lifecycle import BIN, ROOT, call, close, predict, train

pytest.importorskip("nequip")
pytestmark = pytest.mark.nequip

CONFIGS = ROOT / "recipes" / "configs"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A base as checkpoint and package, and the LoRA config on the package."""
    folder = tmp_path_factory.mktemp("modes")
    train("nequip_scratch", "epochs=1", f"folder={folder}/base", "training_module.model.num_layers=2")
    call(BIN / "nequip-package", "build", folder / "base" / "best.ckpt", folder / "base.nequip.zip")
    text = (CONFIGS / "nequip_lora.yaml").read_text()
    text = text.replace("ModelFromCheckpoint", "ModelFromPackage").replace("checkpoint_path:", "package_path:")
    (folder / "configs").mkdir()
    (folder / "configs" / "packaged.yaml").write_text(text)
    (folder / "configs" / "nequip_data.yaml").write_text((CONFIGS / "nequip_data.yaml").read_text())
    return folder


def lora(work, name: str, *overrides: str, config: str = "nequip_lora", base: str = "base/best.ckpt") -> str:
    places = work / "configs" if config == "packaged" else CONFIGS
    return train(config, "epochs=2", f"folder={work}/{name}", f"base={work}/{base}", *overrides, folder=places)


@pytest.fixture(scope="module")
def eager(work):
    lora(work, "eager")
    return predict(work / "eager" / "best.ckpt", "")


def test_base_from_a_package_packaged_again(work, eager):
    lora(work, "packaged", config="packaged", base="base.nequip.zip")
    trained = predict(work / "packaged" / "best.ckpt", "")
    assert close(trained, eager, 1e-3, 0.1)  # the same model and order of frames
    for kind in ("merged", "unmerged"):
        target = work / f"{kind}.nequip.zip"
        call(BIN / "nequip-package", "build", work / "packaged" / "best.ckpt", target, EQUITUNE_PACKAGE=kind)
        assert close(predict(target, "block"), trained, 1e-5, 1e-3)


def test_compiled_training(work, eager):
    log = lora(work, "compiled", "+training_module.model.compile_mode=compile")
    assert "identity at start" in log
    assert close(predict(work / "compiled" / "best.ckpt", ""), eager, 1e-3, 0.1)
    assert close(predict(work / "base" / "best.ckpt", "", work / "compiled" / "adapter"), eager, 1e-3, 0.1)


def test_two_processes(work):
    log = lora(
        work, "two", "trainer.accelerator=cpu", "+trainer.devices=2",
        "+trainer.strategy._target_=nequip.train.SimpleDDPStrategy",
        "+trainer.strategy.process_group_backend=gloo",
    )  # fmt: skip
    assert log.count("adapter written to") == 2  # two epochs, by one of the two processes
    trained = predict(work / "two" / "best.ckpt", "")
    assert close(trained, predict(work / "base" / "best.ckpt", "", work / "two" / "adapter"), 9e-6, 1e-3)
