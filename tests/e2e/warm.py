"""Commands without their imports: the console script, run in a fork of a process that has made them.

Most of a short training's time is the import of torch and MACE or NequIP. Start-up itself (the hook, ``python -m``,
torchrun), compiled training and packaging are tested with processes of their own.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import tempfile
from pathlib import Path

_SERVER = r"""
import atexit, importlib, json, os, runpy, sys, traceback

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # imports print
for name in sys.argv[1:]:
    importlib.import_module(name)

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
        continue
    output = os.open(job["output"], os.O_WRONLY | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    sys.argv = job["argv"]
    sys.path[0] = os.path.dirname(sys.argv[0])
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
"""

_servers: dict[tuple[str, ...], subprocess.Popen[str]] = {}


def run(
    arguments: list[str],
    env: dict[str, str],
    imports: tuple[str, ...] = ("mace.cli.run_train",),
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a Python script by path; as ``subprocess.run`` with its output and errors in one.

    Args:
        arguments: script, then its arguments.
        env: its environment.
        imports: modules that the process to fork from has imported.
        cwd: folder to run in, by default this process's.
    """
    server = _servers.get(imports)
    if server is None or server.poll() is not None:
        server = _servers[imports] = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _SERVER, *imports], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=env,
        )  # fmt: skip
        atexit.register(server.kill)
    assert server.stdin and server.stdout
    with tempfile.NamedTemporaryFile() as output:
        job = {"argv": arguments, "env": env, "cwd": str(cwd or Path.cwd()), "output": output.name}
        print(json.dumps(job), file=server.stdin, flush=True)
        try:
            answer = server.stdout.readline()
        except BaseException:  # a test's time is up
            server.kill()
            raise
        assert answer, "the process that runs commands has ended"
        return subprocess.CompletedProcess(arguments, int(answer), Path(output.name).read_text())


__all__ = ["run"]
