"""Recipes keep apart what is of other data, and count what failed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("mace")
import typer

pytestmark = pytest.mark.mace


def script(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "recipes" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lora_27_names_what_is_not_counted(tmp_path):
    """One method alone is no win, and sets of equal names and other data are two."""
    recipe = script("lora_27")

    def row(digest, method, force):
        errors = {"mae_e_refit": 1.0, "errors": {"mae_f": force}}
        content = {
            "set": "set", "base": "b", "method": method, "lr": 0.01, "seed": 0, "epochs": 5, "digest": digest,
            "valid": errors, "test": errors,
        }  # fmt: skip
        (tmp_path / f"{digest}-{method}.json").write_text(json.dumps(content))

    full, lora = recipe.METHODS
    for digest, forces in {"one": (10.0, 8.0), "two": (10.0, 30.0), "half": (10.0, None)}.items():
        for method, force in zip((full, lora), forces, strict=True):
            if force is not None:
                row(digest, method, force)
    (tmp_path / "settings").mkdir()
    left = {"set (half)": "lora failed", "set (one)": "failed at first"}
    (tmp_path / "settings" / "b.json").write_text(json.dumps({"commands": ["run"], "left": left}))
    recipe.table(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "Forces: LoRA better on 1 of 2 sets" in text and "| set (two) | b | 0 |" in text
    assert "Left out: set (half) (lora failed)." in text


def test_carbon_folder_keeps_its_structures(tmp_path):
    recipe, files = script("synthetic_pretraining_carbon"), {n: tmp_path / n for n in "ab"}
    for name, path in files.items():
        path.write_text(name)
    for _ in range(2):
        recipe.keep_data(tmp_path / "carbon", data=files["a"], test=None)
    with pytest.raises(typer.BadParameter, match=r"data: it was begun with other settings .--data."):
        recipe.keep_data(tmp_path / "carbon", data=files["b"])
    with pytest.raises(typer.BadParameter, match=r"test: it was begun with other settings .--test."):
        recipe.keep_data(tmp_path / "carbon", data=files["a"], test=files["b"])
