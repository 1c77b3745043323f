"""The other end of `loading_turns.py`: starts a process, asks it, and gives up on one that does not answer."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

SCRIPT: Final = Path(__file__).with_name("loading_turns.py")
QUIET: Final = {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# Seconds that a start, and any other request, may take.
START: Final = 120
PATIENCE: Final = 600


class MissingError(Exception):
    """A library that cannot be imported, or a loader that fails or does not answer."""


class Process:
    """A process that takes turns.

    Args:
        module: Its module of loaders.
        folder: Where the works and files are.
        label: Name of its files and of its log; the module's if None.
        python: The interpreter of its environment.
        checkout: A folder with `collate` and `samplers`, for our loaders.
        keep: Keep freed memory, as `harness.keep_pages` says.

    Raises:
        MissingError: The module cannot be imported there.
    """

    def __init__(
        self,
        module: str,
        folder: Path,
        *,
        label: str | None = None,
        python: str | Path = sys.executable,
        checkout: Path | None = None,
        keep: bool = True,
    ) -> None:
        self.label = label or module
        self.log = folder / f"{self.label}.log"
        self._command = [python, SCRIPT, module, folder, self.label, "keep" if keep else "free"]
        # Libraries leave files in the folder for temporary files, which so goes with the others.
        temporary = folder / "temporary"
        temporary.mkdir(exist_ok=True)
        self._environment = os.environ | QUIET | {"TMPDIR": str(temporary)}
        self._environment.pop("PYTHONPATH", None)
        if checkout is not None:
            self._environment["PYTHONPATH"] = str(checkout)
        self._process = self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, do: str, *, patience: float = PATIENCE, **arguments: Any) -> dict[str, Any]:
        """The result of one method of `loading_turns.Turns`. A process that has ended is started again.

        Raises:
            MissingError: The method fails, or has not answered in time. The process has ended then.
        """
        if self._process.poll() is not None:
            self._process = self._start()
        line = json.dumps({"do": do} | arguments).encode() + b"\n"
        return self._answer(self._process, patience, line)

    def close(self) -> None:
        """End the process and its workers."""
        self._end(self._process)

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("a") as log:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        started = self._answer(process, START)
        if "missing" in started:
            self._end(process)
            raise MissingError(started["missing"])
        return process

    def _answer(self, process: subprocess.Popen[bytes], patience: float, line: bytes = b"") -> dict[str, Any]:
        output = _pipe(process.stdout)
        with contextlib.suppress(BrokenPipeError):
            _pipe(process.stdin).write(line)
            _pipe(process.stdin).flush()
        ready, _, _ = select.select([output], [], [], patience)
        answer = output.readline() if ready else b""
        if not answer:
            self._end(process)
            last = self.log.read_text().strip().splitlines()[-1:] or ["no message"]
            reason = "has ended" if ready else f"has not answered in {patience:.0f} s"
            raise MissingError(f"{self.label} {reason}: {last[0]}")
        result: dict[str, Any] = json.loads(answer)
        return result

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            with contextlib.suppress(BrokenPipeError):
                _pipe(process.stdin).close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        # Workers that are left belong to its session.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _pipe(process.stdout).close()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise ValueError("a process is started with pipes")
    return pipe
