"""The group of processes: a single one, and those of torch.distributed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torchrl.checkpoint import GlobalRNGState
from torchrl.trainers.trainers import OptimizationStepper

from torchrl_bcq import make_replay_buffer
from torchrl_bcq.trainers.checkpoints import SamplerState
from torchrl_bcq.trainers.distributed import Processes
from torchrl_bcq.trainers.random_states import RankStates

from .conftest import assert_same_run, make_trainer, random_state


def test_a_missing_process_group_is_named(make_batch):
    message = r"a process group: start .* with torchrun --nproc-per-node N, and let it call torch.distributed.init"
    with pytest.raises(ValueError, match=message):
        make_trainer(make_batch(50), data_parallel=True)


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_group_of_one_process_trains_as_a_single_process(make_batch, tmp_path):
    transitions, trainers = make_batch(100), []
    for data_parallel in (False, True):
        for total, start in ((10, None), (30, tmp_path / str(data_parallel))):
            settings = {"data_parallel": data_parallel, "save_trainer_file": tmp_path / str(data_parallel)}
            trainers.append(make_trainer(transitions, total, **settings))
            if start is not None:
                trainers[-1].load_from_file(start)
            trainers[-1].train()
    assert_same_run(trainers[1], trainers[3])
    assert trainers[1].metrics == trainers[3].metrics
    assert random_state(tmp_path / "True")["ranks"] == {}


class Other(OptimizationStepper):
    """Steps nothing."""


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stepper": lambda loss: Other()}, "data_parallel=True needs an OfflineOptimizationStepper, not a Other"),
        ({"cudagraph": True}, "several processes cannot train with CUDA graphs; set data_parallel=False"),
    ],
)
def test_settings_that_cannot_be_combined_are_refused(make_batch, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(make_batch(50), data_parallel=True, **settings)


@pytest.mark.usefixtures("one_process")
def test_the_random_state_of_the_used_gpu_alone_is_saved(make_batch, monkeypatch):
    """It is loaded into another GPU."""
    buffer = make_replay_buffer(make_batch(50), seed=0)
    first, second = (
        RankStates(Processes(torch.device("cpu")), buffer, SamplerState(buffer), torch.device("cuda", gpu))
        for gpu in (1, 2)
    )
    states = {"cuda:0": torch.tensor([0]), "cuda:1": torch.tensor([1]), "cuda:2": torch.tensor([2])}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [*states.values()])
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[str(device)])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({str(device): state}))
    state = first.state_dict()
    assert state["torch_cuda"] == [torch.tensor([1])]
    second.load_state_dict(state)
    assert {name: value.item() for name, value in states.items()} == {"cuda:0": 0, "cuda:1": 1, "cuda:2": 1}


@pytest.mark.usefixtures("one_process")
def test_the_random_state_of_a_mac_is_neither_saved_nor_loaded_by_a_run_on_the_cpu(make_batch, monkeypatch):
    """On a Mac, TorchRL adds the state of MPS, which a Linux machine cannot load."""
    buffer = make_replay_buffer(make_batch(50), seed=0)
    states = RankStates(Processes(torch.device("cpu")), buffer, SamplerState(buffer), torch.device("cpu"))
    inner = GlobalRNGState.state_dict
    monkeypatch.setattr(GlobalRNGState, "state_dict", lambda self: {**inner(self), "torch_mps": torch.zeros(4)})
    state = states.state_dict()
    assert "torch_mps" not in state
    states.load_state_dict({**state, "torch_mps": torch.zeros(4)})  # of an earlier checkpoint


@pytest.mark.usefixtures("one_process")
def test_gradients_of_any_layout_and_dtype_are_averaged_in_place():
    parallel = Processes(torch.device("cpu"))
    parallel.world_size = 4  # the other three would send zeros
    wide = torch.zeros(3, 2).t().requires_grad_()
    parameters = [wide, torch.zeros(2, dtype=torch.float64, requires_grad=True), torch.zeros(1, requires_grad=True)]
    wide.grad = torch.arange(6.0).reshape(3, 2).t()
    parameters[1].grad = torch.tensor([8.0, 1.0], dtype=torch.float64)
    gradients = [parameter.grad for parameter in parameters]
    parallel.average_gradients(parameters)
    assert [parameter.grad for parameter in parameters] == gradients  # the third has none
    assert wide.grad.tolist() == [[0, 0.5, 1], [0.25, 0.75, 1.25]]
    assert parameters[1].grad.tolist() == [2, 0.25]


def test_a_single_process_gives_back_its_own_values():
    alone, parameter = Processes(), torch.ones(2, requires_grad=True)
    parameter.grad = torch.tensor([1.0, 3.0])
    alone.average_gradients([parameter])
    alone.replicate([parameter])
    assert parameter.grad.tolist() == [1, 3]
    assert parameter.tolist() == [1, 1]
    assert alone.mean(parameter).tolist() == [1, 1]
    assert alone.agree(True, False) == [True, False]
    assert alone.gather("a") == alone.collect("a") == ["a"]
    assert alone.on_first(lambda: 5) == 5
    assert (alone.rank, alone.world_size, alone.is_first) == (0, 1, True)


@pytest.mark.usefixtures("one_process")
def test_a_group_of_one_process_gives_the_same_values():
    group, values = Processes(torch.device("cpu")), torch.tensor([1.0, 3.0])
    assert group.mean(values).tolist() == [1, 3]
    assert group.agree(True, False) == [True, False]
    assert group.gather("a") == group.collect("a") == ["a"]
    assert group.on_first(lambda: 5) == 5
    assert (group.rank, group.world_size, group.is_first) == (0, 1, True)
    with pytest.raises(ZeroDivisionError):
        group.on_first(lambda: 1 / 0)
