"""Options and files that equitune evaluate, stability, rdf and learning-curve refuse, by name."""

import json
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from typer.testing import CliRunner

from mace_lora.cli import app
from mace_lora.evaluate.cli import evaluate
from mace_lora.evaluate.curves import read_points
from mace_lora.evaluate.md_cli import rdf, stability
from mace_lora.evaluate.metrics import predict
from mace_lora.evaluate.reading import read_frames
from mace_lora.evaluate.structure import radial_distribution

SMALL = {"steps": 10, "every": 10, "replicas": 1, "nve": 0}


@pytest.fixture()
def copper(tmp_path) -> Path:
    frames = [bulk("Cu", cubic=True) for _ in range(5)]
    for seed, atoms in enumerate(frames):
        atoms.rattle(0.05, seed=seed)
        atoms.info["REF_energy"] = float(seed)
    ase.io.write(tmp_path / "cu.xyz", frames)
    return tmp_path / "cu.xyz"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("7", r"--index: .*cu\.xyz has no frame 7"),
        ("7:", r"--index: .*cu\.xyz has no frames in '7:'; expected a slice with at least one"),
        *((bad, f"--index: expected a number or a slice such as 0:100 or ::10, got '{bad}'")
          for bad in ("abc", "::0", "-:2", "")),
    ],
)  # fmt: skip
def test_index(index, message, copper, tmp_path):
    with pytest.raises(ValueError, match=message):
        rdf([copper], ["Cu-Cu"], tmp_path / "a.png", index=index)
    with pytest.raises(ValueError, match=message):
        evaluate("emt", copper, output=tmp_path / "out", index=index)


@pytest.mark.parametrize(
    ("option", "key"), [("energy", "dft_energy"), ("forces", "dft_forces"), ("stress", "dft_stress")]
)
def test_a_key_that_no_frame_has(option, key, copper, tmp_path):
    frames = ase.io.read(copper, ":")
    for atoms in frames:
        atoms.arrays["REF_forces"] = atoms.positions * 0.0
    ase.io.write(copper, frames)
    message = rf"--{option}-key {key}: no frame has it; frame 0 has \['REF_energy', 'REF_forces'\]"
    with pytest.raises(ValueError, match=message):
        evaluate("emt", copper, output=tmp_path / "out", **{f"{option}_key": key})


def test_labels_that_are_not_there_are_named(copper, tmp_path):
    done = CliRunner().invoke(app, ["evaluate", "emt", str(copper), "-o", str(tmp_path / "out")])
    assert "no frame has forces labels under REF_forces: no errors of forces" in " ".join(done.output.split())


def test_one_frame_is_a_list(copper, tmp_path):
    assert [len(a) for a in read_frames(copper, "-1")] == [4]
    assert len(read_frames(copper, "::2")) == 3
    rdf([copper], ["Cu-Cu"], tmp_path / "a.png", r_max=1.5, index="2")
    assert json.loads((tmp_path / "a.json").read_text())[0]["frames"] == 1


def test_files_without_frames(tmp_path):
    empty, blank = tmp_path / "empty.xyz", tmp_path / "blank.xyz"
    empty.touch()
    blank.write_text("\n")
    for call in (lambda p: stability(p, "emt", tmp_path / "out"), lambda p: evaluate("emt", p)):
        with pytest.raises(ValueError, match=r"empty\.xyz is empty; expected frames in a format that ASE reads"):
            call(empty)
        with pytest.raises(ValueError, match=r"blank\.xyz has no frames; expected at least one"):
            call(blank)
        with pytest.raises(FileNotFoundError, match=r"no file .*gone\.xyz"):
            call(tmp_path / "gone.xyz")


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        *(("stability", f"--{name}", "0") for name in ("workers", "replicas", "steps", "every")),
        ("stability", "--nve", "-1"), ("stability", "--seed", "-1"), ("rdf", "--bins", "0"),
    ],
)  # fmt: skip
def test_numbers_out_of_range(command, option, value, copper):
    needed = ["--with", "emt"] if command == "stability" else ["--pair", "Cu-Cu"]
    done = CliRunner().invoke(app, [command, str(copper), *needed, option, value])
    assert done.exit_code == 2 and f"Invalid value for '{option}'" in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({name: value}, f"--{name}: expected a number > 0, got {value}")
          for name in ("temperature", "timestep", "friction", "limit") for value in (0.0, float("nan"))),
        ({"every": 20}, r"--every: expected at most --steps \(10\), got 20"),
        ({"nve": 29}, "--nve: expected 0 or at least 30 steps, got 29"),
    ],
)  # fmt: skip
def test_settings_of_stability(options, message, copper, tmp_path):
    with pytest.raises(ValueError, match=message):
        stability(copper, "emt", tmp_path / "out", **(SMALL | options))


def test_settings_of_distributions(copper, tmp_path):
    with pytest.raises(ValueError, match=r"--r-max: expected a length > 0 in Å, got 0\.0"):
        rdf([copper], ["Cu-Cu"], tmp_path / "a.png", r_max=0.0)
    frames = read_frames(copper)
    with pytest.raises(ValueError, match="bins: expected at least 1, got 0"):
        radial_distribution(frames, ("Cu", "Cu"), 1.5, 0)
    with pytest.raises(ValueError, match="r_max: expected a length > 0 in Å, got -1"):
        radial_distribution(frames, ("Cu", "Cu"), -1)


def test_folder_of_another_run(tmp_path):
    """Trajectories of other starts are no result for these."""
    for name, atoms in (("n2", Atoms("N2", [[0, 0, 0], [0, 0, 1.1]])), ("ethanol", molecule("CH3CH2OH"))):
        ase.io.write(tmp_path / f"{name}.xyz", atoms)
    out = tmp_path / "out"
    stability(tmp_path / "n2.xyz", "emt", out, **SMALL)
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    message = r"out: it was begun with other settings \({}\); give those again, or another folder"
    with pytest.raises(ValueError, match=message.format("start frames")):
        stability(tmp_path / "ethanol.xyz", "emt", out, **SMALL)
    changed = "temperature: .* before, 200.0 now; steps: 10 before, 20 now; seed: 0 before, 1 now"
    with pytest.raises(ValueError, match=message.format(changed)):
        stability(tmp_path / "n2.xyz", "emt", out, **(SMALL | {"steps": 20}), temperature=200.0, seed=1)
    assert before == {f.name: f.read_bytes() for f in out.iterdir()}
    stability(tmp_path / "n2.xyz", "emt", out, **SMALL)  # the same again


def test_labels_that_are_no_numbers(copper, tmp_path):
    frames = read_frames(copper)
    frames[3].info["REF_energy"] = "abc"
    ase.io.write(copper, frames)
    message = r"cu\.xyz: frame {}: REF_energy: expected one number \(eV\), got 'abc'; correct the label"
    with pytest.raises(ValueError, match=message.format(3)):
        evaluate("emt", copper, output=tmp_path / "out")
    with pytest.raises(ValueError, match=message.format(1) + r".* \(counted within --index 2:\)"):
        evaluate("emt", copper, output=tmp_path / "out", index="2:")
    frames[3].info |= {"REF_energy": 1.0, "REF_stress": np.zeros(4)}
    with pytest.raises(ValueError, match=r"frame 3: REF_stress: expected 6 or 9 \(3x3\) numbers .*, got shape \(4,\)"):
        predict(None, frames)


def test_device(copper, tmp_path):
    with pytest.raises(ValueError, match="--device: expected cpu, or cuda on a machine with a GPU, got 'gpu'"):
        evaluate("embedded", copper, output=tmp_path / "out", device="gpu")


@pytest.mark.parametrize("content", [{"mae_e": 1.0, "mae_f": None}, {"mae_e": "low", "mae_f": 1.0}])
def test_points_of_other_files(content, tmp_path):
    intervals = {"intervals": {"mae_e": [1, 2], "mae_f": [1, 2]}} if content["mae_e"] == "low" else {}
    (tmp_path / "errors.json").write_text(json.dumps({"errors": content, **intervals}))
    with pytest.raises(ValueError, match=r"expected an errors\.json of equitune evaluate"):
        read_points([f"a:5={tmp_path}"])
    with pytest.raises(ValueError, match=r"expected NAME:N=errors\.json"):
        read_points([f"a:²={tmp_path}"])
