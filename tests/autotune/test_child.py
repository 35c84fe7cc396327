"""A stage's process ends with the one that started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mace_lora.autotune.child import run_child

PARENT = """
import sys
from mace_lora.autotune.child import run_child
inner = "import os, time; open('new', 'w').write(str(os.getpid())); os.rename('new', 'pid'); time.sleep(100)"
run_child([sys.executable, "-S", "-c", inner])
"""


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_child_ends_with_its_parent(tmp_path, sent, code):
    process = subprocess.Popen([sys.executable, "-c", PARENT], cwd=tmp_path, start_new_session=True)
    end = time.time() + 60
    while not (tmp_path / "pid").exists() and time.time() < end:
        time.sleep(0.02)
    child = int((tmp_path / "pid").read_text())
    assert alive(child)
    os.kill(process.pid, sent)  # to the parent alone
    assert process.wait(60) == code
    while alive(child) and time.time() < end:
        time.sleep(0.02)
    assert not alive(child)


def test_exit_code_environment_and_handler():
    before = signal.getsignal(signal.SIGTERM)
    assert run_child([sys.executable, "-S", "-c", "import os; os._exit(int(os.environ['CODE']))"], {"CODE": "7"}) == 7
    assert signal.getsignal(signal.SIGTERM) is before
