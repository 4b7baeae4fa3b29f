"""Training and acting keep freed memory, tested in processes in which no large block was freed before."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

NEW_PAGES = """
import resource, torch
from torchrl.data import Bounded, Unbounded
from torchrl_bcq.modules import BCQPolicy, make_bcq_modules
from torchrl_bcq.objectives import BCQLoss
from torchrl_bcq.trainers.execution import Execution

def new_pages(sizes):  # in MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in sizes:
        torch.ones(size, 2**20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

networks = make_bcq_modules(Unbounded((17,)), Bounded(-1, 1, (6,)))
loss = BCQLoss(*networks)
returned = new_pages(range(12, 20))  # each is larger than glibc's threshold so far
{keeper}
new_pages([28])
print(returned, new_pages(range(27, 19, -1)))  # each fits into the memory of the one before
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc adapts its thresholds")
@pytest.mark.parametrize("keeper", ["Execution(loss)", "BCQPolicy(*networks)"])
def test_freed_memory_is_kept(keeper):
    command = [sys.executable, "-W", "ignore", "-c", NEW_PAGES.format(keeper=keeper)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    returned, kept = map(int, out.stdout.split())
    assert returned > sum(range(12, 20)) * 256 / 2  # pages of 4 KiB: without the call, memory is returned
    assert kept < returned / 100
