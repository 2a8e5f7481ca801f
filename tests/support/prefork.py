"""Programs that start at once: a server process has imported their modules, and forks a process for each program.

A test gets a separate process with its own arguments, environment, output and exit status. Only the imports, which take
most of a short program's time, were done before. Tests of a program's start do not use this module.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Program:
    """A Python program, and the modules that the server imports for it. These modules must not start threads."""

    def __init__(self, path: Path, *modules: str) -> None:
        self._command = [sys.executable, "-W", "ignore", __file__, str(path), *modules]
        self._server: subprocess.Popen[str] | None = None
        self._folder = Path()
        self._count = 0

    def start(
        self,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        output: Path | None = None,
    ) -> Started:
        """Runs the program, by default in the environment and the folder of the tests.

        All output is appended to the file `output`, if given; otherwise `communicate` returns the output.
        """
        server = self._running()
        self._count += 1
        place = self._folder / str(self._count)
        files = [str(output)] * 2 if output else [f"{place}.out", f"{place}.err"]
        for file in files:
            Path(file).touch()  # like Popen's: these files exist before the program prints anything
        request = {"arguments": arguments, "environment": dict(environment or os.environ), "place": str(place)}
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(request | {"files": files, "cwd": os.fspath(cwd or os.getcwd())}) + "\n")
        server.stdin.flush()
        return Started(int(server.stdout.readline()), place, *map(Path, files))

    def _running(self) -> subprocess.Popen[str]:
        if self._server is None or self._server.poll() is not None:
            self._folder = Path(tempfile.mkdtemp(prefix="dist_t2i-tests-"))
            atexit.register(shutil.rmtree, self._folder, ignore_errors=True)
            self._server = subprocess.Popen(
                self._command,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,  # its end is the server's
                stdout=subprocess.PIPE,
                text=True,
            )
        return self._server


class Started:
    """A program that runs or has run, with the part of `subprocess.Popen` that tests need."""

    def __init__(self, pid: int, place: Path, out: Path, err: Path) -> None:
        self.pid, self._place, self._out, self._err = pid, place, out, err
        self.returncode: int | None = None

    def __enter__(self) -> Started:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.kill()
        self.wait()

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        if self.returncode is None:
            with contextlib.suppress(FileNotFoundError):
                self.returncode = int(self._place.with_suffix(".status").read_text())
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        """Its exit status. Raises TimeoutError."""
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise TimeoutError(f"process {self.pid} runs on after {timeout} seconds: {_text(self._err)[-2000:]}")
            time.sleep(0.005)
        return status

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Waits for the end; returns the program's stdout and stderr. Raises TimeoutError."""
        self.wait(timeout)
        return _text(self._out), _text(self._err)

    def send_signal(self, number: int) -> None:
        """Sends a signal if the program still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Sends SIGKILL if the program still runs."""
        self.send_signal(signal.SIGKILL)


def _text(file: Path) -> str:
    return file.read_text(errors="replace")


def _serve() -> dict[str, Any]:
    """Fork for each request; returns it in the process that shall run the program."""
    for line in sys.stdin:
        request = json.loads(line)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if os.fork():
            continue
        pid = os.fork()
        if not pid:
            return request
        print(pid, flush=True)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        part = Path(f"{request['place']}.part")
        part.write_text(str(status))
        part.replace(f"{request['place']}.status")
        os._exit(0)
    sys.exit()


def _become(program: str, request: dict[str, Any]) -> None:
    """Applies the request: folder, environment, arguments, files for the output."""
    for number, name in enumerate(["/dev/null", *request["files"]]):
        descriptor = os.open(name, os.O_RDONLY if not number else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None
    sys.argv[:] = [program, *request["arguments"]]
    sys.path[:1] = [str(Path(program).parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # some modules print a message when they are imported
        for module in sys.argv[2:]:
            importlib.import_module(module)
    request = _serve()
    program = sys.argv[1]
    _become(program, request)
    runpy.run_path(program, run_name="__main__")
