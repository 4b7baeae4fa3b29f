"""Small specs, networks and transitions for all tests, and figures that are printed after a run."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
import torchrl
from tensordict import TensorDict
from torchrl.data import Bounded, Unbounded

from torchrl_bcq import make_bcq_modules

pytest_plugins = ["tests.small_runs"]
OBSERVATION_SPEC = Unbounded((3,))
ACTION_SPEC = Bounded(low=torch.tensor([-1.0, 0.0]), high=torch.tensor([1.0, 4.0]), shape=(2,))  # asymmetric
torchrl._THREAD_POOL_INIT = 1  # TorchRL sets this number of threads when an environment is closed or collected


def skip_without_extension() -> None:
    """Skip a test of prioritised replay where TorchRL's compiled extension does not fit the installed torch."""
    try:
        importlib.import_module("torchrl._torchrl")
    except (ImportError, OSError) as error:
        pytest.skip(f"TorchRL's compiled extension does not fit torch {torch.__version__}: {error}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Run each test in one thread, also after a test that set more: the tensors are small."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def modules():
    """``(vae, actor, critics)`` with small layers."""
    return make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(16, 16), vae_hidden=(16, 16))


def random_transitions(*batch: int, dtype: torch.dtype = torch.float32) -> TensorDict:
    """Transitions of any batch size, with actions in bounds and no episode end."""
    outcome = {
        "observation": torch.randn(*batch, 3, dtype=dtype),
        "reward": torch.randn(*batch, 1, dtype=dtype),
        "done": torch.zeros(*batch, 1, dtype=torch.bool),
        "terminated": torch.zeros(*batch, 1, dtype=torch.bool),
    }
    action = torch.rand(*batch, 2, dtype=dtype) * torch.tensor([2, 4]) - torch.tensor([1, 0])
    columns = {"observation": torch.randn(*batch, 3, dtype=dtype), "action": action, "next": outcome}
    return TensorDict(columns, batch_size=batch)


@pytest.fixture
def make_batch() -> Callable[..., TensorDict]:
    """Random transitions of any batch size."""
    return random_transitions


@pytest.fixture
def show_figure(record_property) -> Callable[[str], None]:
    """Print a line at the end of the run."""
    return lambda line: record_property("figure", line)


def pytest_terminal_summary(terminalreporter) -> None:
    passed = terminalreporter.stats.get("passed", [])
    if figures := [line for report in passed for name, line in report.user_properties if name == "figure"]:
        terminalreporter.section("figures")
        for line in figures:
            terminalreporter.write_line(line)


@pytest.fixture
def check_count(request, show_figure) -> Callable[..., None]:
    """Check how many malformed inputs the tests of this file tried; skip if some of these tests were not selected."""

    def check(counts: Counter[str], kinds: Sequence[str], at_least: int) -> None:
        if missing := [kind for kind in kinds if not counts[kind]]:
            pytest.skip(f"the tests of {missing} in this file were not selected")
        found = {kind: counts[kind] for kind in kinds}
        show_figure(f"malformed inputs in {request.path.name}: {sum(found.values())}: {found}")
        assert sum(found.values()) >= at_least

    return check
