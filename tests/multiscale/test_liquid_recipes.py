"""Folders of recipes/multiscale_liquid.py and active_liquid.py: one set of settings, data that are whole."""

import sys
from pathlib import Path

import pytest
import typer
from ase.build import molecule

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(params=["multiscale_liquid", "active_liquid"])
def recipe(request, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    __import__(request.param)
    return sys.modules[request.param]


class Begun(Exception):
    """The first step of the work was reached."""


def test_another_scale_needs_another_folder(recipe, monkeypatch, tmp_path):
    def begin(*_):
        raise Begun

    monkeypatch.setattr(recipe, "make_data" if hasattr(recipe, "make_data") else "start_frames", begin)
    options = {"folder": tmp_path / "out", "workers": 1}
    options |= {"nequip_bin": None} if hasattr(recipe, "make_data") else {"scratch": False}
    for _ in range(2):  # the same settings go on
        with pytest.raises(Begun):
            recipe.main(scale="smoke", **options)
    other = r"begun with other settings \(scale: 'smoke' before, 'laptop' now.*give those again, or another folder"
    with pytest.raises(typer.BadParameter, match=other):
        recipe.main(scale="laptop", **options)
    if "scratch" in options:
        with pytest.raises(typer.BadParameter, match="scratch: False before, True now"):
            recipe.main(scale="smoke", **options | {"scratch": True})


def test_data_stopped_on_the_way_are_made_again(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(RECIPES))
    import multiscale_liquid as recipe

    frames = [molecule("CH3CH2OH") for _ in range(8)]
    recipe.write(tmp_path / "start.xyz", frames)
    calls = []

    def label(source, target, *_, **__):
        target.write_text(source.read_text())

    def unsound(path):
        calls.append(path.name)
        if len(calls) == 5:  # the last of the files
            raise ValueError("not sound")

    monkeypatch.setattr(recipe, "start_frames", lambda *_: tmp_path / "start.xyz")
    monkeypatch.setattr(recipe, "label", label)
    monkeypatch.setattr(recipe, "require_sound", unsound)
    sizes = {"frames": 8, "molecules": 1, "test": 2, "stretched": 2}
    with pytest.raises(ValueError, match="not sound"):
        recipe.make_data(tmp_path, sizes, 1)
    assert (tmp_path / "stretched.xyz").is_file() and not (tmp_path / "data.done").exists()
    recipe.make_data(tmp_path, sizes, 1)
    assert (tmp_path / "data.done").is_file() and len(calls) == 10
    recipe.make_data(tmp_path, sizes, 1)
    assert len(calls) == 10
