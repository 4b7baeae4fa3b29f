"""A process for each contender: memory, threads, settings and compiled code are its own, for as long as it is measured.

A contender waits for calls and answers them, one after the other. It works only while it is called.
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
from typing import Any

import torch
from kernels import profile_kernels
from rounds import Run, Stopwatch

PATIENCE = 5  # seconds in which one that is closed ends by itself


class ContenderError(Exception):
    """A contender's own error, or its end; ``reason`` is one without the traceback."""

    def __init__(self, reason: str, trace: str = "") -> None:
        super().__init__(f"{reason}\n{trace}".rstrip())
        self.reason = reason


class Contender:
    """Stands for one in a process of its own, with the methods of its Stopwatch."""

    def __init__(self, threads: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._calls, theirs = spawn.Pipe()
        # a daemon is ended with this process
        self._process = spawn.Process(target=_serve, args=(theirs, threads), daemon=True)
        heeds = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for this process alone
        self._process.start()
        signal.signal(signal.SIGINT, heeds)
        theirs.close()  # so that its end is noticed here

    def set_up(self, make: Callable[[], Run], device: str, parts: int = 1) -> None:
        """Drop what was measured before, make a run and try a step of it."""
        self._call("set_up", make, device, parts)

    def calibrate(self, seconds: float) -> int:
        return self._call("calibrate", seconds)

    def time(self, steps: int) -> float:
        return self._call("time", steps)

    def profile_kernels(self, step_seconds: float) -> dict[str, float]:
        return self._call("profile_kernels", step_seconds)

    def close(self) -> None:
        self._calls.close()  # at rest, it ends by itself
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
def in_processes(names: Iterable[str], threads: int) -> Iterator[dict[str, Contender]]:
    """Contenders whose processes start at once, and end with the block."""
    contenders: dict[str, Contender] = {}
    try:
        for name in names:
            contenders[name] = Contender(threads)
        yield contenders
    finally:
        for contender in contenders.values():
            contender.close()


class _Held:
    """What a contender's process holds."""

    def set_up(self, make: Callable[[], Run], device: str, parts: int) -> None:
        self.stopwatch = None
        gc.collect()
        torch.cuda.empty_cache()
        torch.compiler.reset()  # else other sizes than the first would be compiled for any size
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
    """Answer calls, with a result or an error, until the other end is closed."""
    hush()
    torch.set_num_threads(threads)
    held = _Held()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            method, arguments = calls.recv()
            try:
                answer = getattr(held, method)(*arguments), None
            except Exception as error:
                answer = None, (f"{type(error).__name__}: {error}", traceback.format_exc())
            calls.send(answer)


def hush() -> None:
    """Nobody reads warnings between the tables."""
    warnings.simplefilter("ignore")
    logging.getLogger("torchrl").setLevel(logging.ERROR)
