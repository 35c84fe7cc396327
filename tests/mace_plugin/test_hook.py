"""Start-up hook, kill switch, contract and installation."""

import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytest.importorskip("mace")

from mace_lora.mace_plugin import contract, energies, startup
from mace_lora.mace_plugin.protocol import load_plugins

pytestmark = pytest.mark.mace
ROOT = Path(__file__).parents[2]
STATE = """
import sys
from mace_lora.mace_plugin import startup
import mace.tools.arg_parser as a
print(startup.is_installed(), hasattr(a.build_default_arg_parser, "__wrapped__"))
"""


def python(code: str, *flags: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *flags, "-W", "ignore", "-c", code], env=os.environ | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_active_by_itself_and_switched_off():
    assert python(STATE) == "True True"
    assert python(STATE, EQUITUNE_DISABLE="1") == "False False"


def test_start_up_imports_nothing_heavy():
    code = "import sys; print(sorted(m for m in ('torch', 'e3nn', 'peft', 'mace', 'numpy', 'ase') if m in sys.modules))"
    assert python(code) == "[]"


def test_hook_and_start_file_name_the_same_function():
    folder = Path(startup.__file__).parent
    assert (folder / "equitune_hook.pth").read_text().strip() == f"import {startup.__name__}"
    assert (folder / "equitune_hook.start").read_text().strip() == f"{startup.__name__}:install"


def test_mace_keeps_its_contract():
    problems = [problem for _, problem in contract.check() if problem]
    assert problems == []


def test_every_patched_module_is_in_the_contract():
    assert set(startup.PATCHED) <= set(contract.EXPECTED)


def test_changed_upstream_gives_a_clear_message(monkeypatch):
    import mace.modules.lora as module

    monkeypatch.setattr(module, "inject_LoRAs", lambda network, r: network)
    with pytest.raises(
        contract.ContractError,
        match=r"relies on mace.modules.lora.inject_LoRAs\(model, rank, alpha…\), got \(network, r\)",
    ):
        contract.require(module, "inject_LoRAs")
    monkeypatch.delattr(module, "inject_LoRAs")
    with pytest.raises(contract.ContractError, match=r"got nothing callable.*EQUITUNE_DISABLE=1"):
        contract.require(module, "inject_LoRAs")
    assert any(problem for _, problem in contract.check())


def test_registered_plugins():
    assert [p.name for p in load_plugins()] == [
        "autotune",
        "multiscale",
        "launched",
        "lora",
    ]  # in the order they are called


@pytest.mark.usefixtures("double")
def test_energy_references_are_restored():
    from models import build_mace

    model = build_mace()
    wanted = [[-1.0, -2.0, -3.0]]
    assert energies.restore_energy_references(model, wanted)
    assert model.atomic_energies_fn.atomic_energies.reshape(1, -1).tolist() == wanted
    assert not energies.restore_energy_references(model, wanted)
    # elements that the data lacks keep the base's reference
    assert energies.restore_energy_references(model, [[-9.0, 0.0, -8.0]], {1, 8})
    assert model.atomic_energies_fn.atomic_energies.reshape(-1).tolist() == [-9.0, -2.0, -8.0]


def test_doctor_sees_that_the_hook_is_not_read():
    """Without site-packages' start files (python -S) there is no hook."""
    paths = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-S", "-W", "ignore", "-c", "from mace_lora.cli import main; main()", "doctor"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 1 and "NOT active" in done.stdout and "equitune run mace_run_train" in done.stdout


def test_doctor():
    done = subprocess.run([Path(sys.executable).parent / "equitune", "doctor"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "all checks passed" in done.stdout


def files_of(package: str) -> dict[str, str]:
    folder = Path(importlib.util.find_spec(package).origin).parent
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.py")}


@pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="building a wheel needs hatchling")
def test_wheel_install_and_uninstall_leave_mace_untouched(tmp_path):
    """Real wheel, in an environment that borrows MACE from this one."""
    before = files_of("mace")
    builder = venv.EnvBuilder(with_pip=True)
    builder.create(tmp_path / "env")
    new = tmp_path / "env" / "bin" / "python"
    site = Path(
        subprocess.check_output(
            [new, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    listing = {p.name for p in site.iterdir()}
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--no-input"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("equitune-*.whl")
    subprocess.run([new, "-m", "pip", "-q", "install", "--no-deps", "--no-index", wheel], check=True)
    new_names = {p.name.partition("-")[0] for p in site.iterdir()} - {n.partition("-")[0] for n in listing}
    assert new_names == {"mace_lora", "nequip_ext", "equitune_hook.pth", "equitune_hook.start", "equitune"}
    code = "import mace.tools.arg_parser as a; print(hasattr(a.build_default_arg_parser, '__wrapped__'))"
    run = lambda: subprocess.check_output([new, "-W", "ignore", "-c", code], text=True).splitlines()[-1]  # noqa: E731
    assert run() == "True"
    subprocess.run([new, "-m", "pip", "-q", "uninstall", "-y", "equitune"], check=True)
    assert {p.name for p in site.iterdir()} - {"__pycache__"} == listing - {"__pycache__"}
    assert run() == "False"
    # without installation, through the launcher
    command = [new, "-W", "ignore", "-m", "mace_lora.cli", "run", "mace_run_train", "--help"]
    shown = subprocess.check_output(command, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert "--lora_preset" in shown
    assert files_of("mace") == before
