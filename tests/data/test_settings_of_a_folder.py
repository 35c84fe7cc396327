"""A folder that is worked on in several goes keeps to its settings."""

import json

import pytest

from mace_lora.atomic import keep_settings

FIRST = {"scale": "smoke", "sizes": (1, 2), "frames": ["a" * 40, "b" * 40]}


def test_the_same_settings_again(tmp_path):
    for _ in range(2):
        keep_settings(tmp_path / "new", FIRST)
    assert json.loads((tmp_path / "new" / "settings.json").read_text()) == FIRST | {"sizes": [1, 2]}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scale": "laptop"}, r"new: it was begun with other settings \(scale: 'smoke' before, 'laptop' now\); give"),
        ({"frames": ["a" * 40, "c" * 40], "sizes": [1]}, r"\(sizes: \[1, 2\] before, \[1\] now; start frames\)"),
        ({"device": "cuda"}, r"\(device: None before, 'cuda' now\)"),
    ],
)
def test_other_settings(tmp_path, change, message):
    keep_settings(tmp_path / "new", FIRST)
    before = (tmp_path / "new" / "settings.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        keep_settings(tmp_path / "new", FIRST | change, names={"frames": "start frames"})
    with pytest.raises(SystemExit, match=message):
        keep_settings(tmp_path / "new", FIRST | change, names={"frames": "start frames"}, error=SystemExit)
    assert (tmp_path / "new" / "settings.json").read_bytes() == before
