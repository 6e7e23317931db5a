"""Programs that tests start: in processes of their own, but without the seconds that each spends on its imports.

Each is a fork of one process that has imported what they all import. How a program starts from nothing is seen where
tests start it as users do, with `subprocess`.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

TIMEOUT = 300

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["deepseek_vl2.models", "deepseek_vl2.utils.io", "deepseek_vl2.serve.inference"])


class Finished(NamedTuple):
    """What a program has left, as `subprocess` names it."""

    returncode: int
    stdout: str
    stderr: str


class Program:
    """A call that is under way in a process of its own.

    Args:
        function: What is called, from a module that can be imported.
        arguments: Its arguments.
        folder: Where it works.
        environment: Variables beside those of the test.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        folder: str | os.PathLike[str] = ".",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._outputs = tempfile.TemporaryDirectory()
        self._files = [Path(self._outputs.name) / name for name in ("stdout", "stderr")]
        variables = {**os.environ, **(environment or {})}
        self._process = _FORKS.Process(
            target=_call, args=(function, arguments, os.fspath(folder), variables, self._files)
        )
        self._process.start()

    @property
    def stdout(self) -> str:
        """What it has written so far."""
        return self._files[0].read_text(encoding="utf-8") if self._files[0].exists() else ""

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.is_alive()

    def send_signal(self, number: int) -> None:
        """Sends it a signal."""
        pid = self._process.pid
        if pid is None:
            raise ProcessLookupError("it was not started")
        os.kill(pid, number)

    def kill(self) -> None:
        """Ends it at once, and waits for that."""
        self._process.kill()
        self.finish()

    def finish(self) -> Finished:
        """Waits for its end.

        Raises:
            TimeoutError: it goes on for minutes; it is ended.
        """
        self._process.join(TIMEOUT)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            raise TimeoutError(f"a program has not ended within {TIMEOUT} seconds")
        texts = [file.read_text(encoding="utf-8") if file.exists() else "" for file in self._files]
        return Finished(code, *texts)


def _call(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    folder: str,
    variables: Mapping[str, str],
    outputs: list[Path],
) -> None:
    """Runs in the new process, which begins as one that a shell starts."""
    # Else its own processes would be forks of the server, too, and not notice that it has died.
    multiprocessing.set_start_method(None, force=True)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    for number, path in enumerate([os.devnull, *outputs]):
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    # A test that runs in the background would hand on that interrupts are ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        function(*arguments)
    except Exception:  # noqa: BLE001 - whatever it is, it ends the program
        sys.excepthook(*sys.exc_info())  # which a program may have replaced
        sys.exit(1)


def run_file(path: str | os.PathLike[str], *arguments: object) -> None:
    """`python PATH ARGUMENTS`, to be called in a `Program`."""
    sys.argv = [os.fspath(path), *map(str, arguments)]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


def run_module(name: str, *arguments: object) -> None:
    """`python -m NAME ARGUMENTS`, to be called in a `Program`."""
    sys.argv = [name, *map(str, arguments)]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
