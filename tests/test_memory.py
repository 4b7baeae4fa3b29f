"""Memory that is freed is kept by who trains and by who acts, in processes in which nothing has been freed before."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

NEW_PAGES = """
import resource, torch
from torchrl.data import Bounded, Unbounded
from torchrl_bcq import BCQLoss, BCQPolicy, make_bcq_modules
from torchrl_bcq.trainers.execution import Execution

def new_pages(sizes):  # in MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in sizes:
        torch.ones(size, 2**20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

networks = make_bcq_modules(Unbounded((17,)), Bounded(-1, 1, (6,)))
loss = BCQLoss(*networks)
given_back = new_pages(range(12, 20))  # each larger than all that glibc has adapted to
{keeper}
new_pages([28])
print(given_back, new_pages(range(27, 19, -1)))  # each fits where the one before was
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that adapts")
@pytest.mark.parametrize("keeper", ["Execution(loss)", "BCQPolicy(*networks)"])
def test_freed_memory_is_kept(keeper):
    command = [sys.executable, "-W", "ignore", "-c", NEW_PAGES.format(keeper=keeper)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    given_back, kept = map(int, out.stdout.split())
    assert given_back > sum(range(12, 20)) * 256 / 2  # of 4 KiB each, else it would prove nothing
    assert kept < given_back / 100
