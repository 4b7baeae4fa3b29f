"""Runs each contender in a process of its own, with its own memory, threads, settings and compiled code.

The process answers calls one after the other, and waits in between.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import signal
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
from kernels import profile_kernels
from rounds import Run, Stopwatch

PATIENCE = 5  # seconds that a closed process has to end by itself

Name = TypeVar("Name")


class ContenderError(Exception):
    """An error in a contender's process, or the end of the process; ``reason`` has no traceback."""

    def __init__(self, reason: str, trace: str = "") -> None:
        super().__init__(f"{reason}\n{trace}".rstrip())
        self.reason = reason


class Contender:
    """A contender in another process, with the methods of its Stopwatch."""

    def __init__(self, threads: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._calls, theirs = spawn.Pipe()
        # a daemon ends with this process
        self._process = spawn.Process(target=_serve, args=(theirs, threads), daemon=True)
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited, so that Ctrl-C stops this process only
        self._process.start()
        signal.signal(signal.SIGINT, handler)
        theirs.close()  # else recv() would not notice that the process has ended

    def set_up(self, make: Callable[[], Run], device: str, parts: int = 1) -> None:
        """Replace the previous run by a new one, and try one step of it."""
        self._call("set_up", make, device, parts)

    def calibrate(self, seconds: float) -> int:
        return self._call("calibrate", seconds)

    def time(self, steps: int) -> float:
        return self._call("time", steps)

    def profile_kernels(self, step_seconds: float) -> dict[str, float]:
        return self._call("profile_kernels", step_seconds)

    def close(self) -> None:
        self._calls.close()  # a waiting process ends by itself
        self._process.join(PATIENCE)
        self._process.terminate()
        self._process.join()

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            self._calls.send((method, arguments))
            answer, error = self._calls.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise ContenderError(f"its process ended with exit code {self._process.exitcode}") from None
        if error:
            raise ContenderError(*error)
        return answer


@contextlib.contextmanager
def in_processes(names: Iterable[Name], threads: int) -> Iterator[dict[Name, Contender]]:
    """Start a process for each contender, and end them with the block."""
    contenders: dict[Name, Contender] = {}
    try:
        for name in names:
            contenders[name] = Contender(threads)
        yield contenders
    finally:
        for contender in contenders.values():
            contender.close()


class _Server:
    """The methods of Contender, within its process."""

    def set_up(self, make: Callable[[], Run], device: str, parts: int) -> None:
        self.stopwatch = None
        gc.collect()
        torch.cuda.empty_cache()
        torch.compiler.reset()  # else a second size would be compiled with dynamic shapes
        run = make()
        run(1)
        self.stopwatch = Stopwatch(run, device, parts)

    def calibrate(self, seconds: float) -> int:
        return self.stopwatch.calibrate(seconds)

    def time(self, steps: int) -> float:
        return self.stopwatch.time(steps)

    def profile_kernels(self, step_seconds: float) -> dict[str, float]:
        return profile_kernels(self.stopwatch.run, step_seconds)


def _serve(calls: Connection, threads: int) -> None:
    """Answer each call with a result or an error, until the other end is closed."""
    hush()
    torch.set_num_threads(threads)
    server = _Server()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            method, arguments = calls.recv()
            try:
                answer = getattr(server, method)(*arguments), None
            except Exception as error:
                answer = None, (f"{type(error).__name__}: {error}", traceback.format_exc())
            calls.send(answer)


def hush() -> None:
    """Turn off warnings, which would break up the tables."""
    warnings.simplefilter("ignore")
    logging.getLogger("torchrl").setLevel(logging.ERROR)
