"""The contenders: this package in each of its modes, other libraries, and bare PyTorch.

A function of TRAINING takes ``(batch_size, device, sizes)`` and returns ``update(steps)``, which makes gradient steps,
each on a batch from the contender's own buffer of the same transitions. A function of DISCRETE_TRAINING takes
``(batch_size, device, kind)``, with the kind of the observations, and does the same for discrete BCQ. A function of
ACTING takes ``(device, sizes)`` and returns a function from states ``[S, D]`` to actions ``[S, A]``, both NumPy arrays,
as environments use them.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import discrete_peers
import numpy as np
import torch
from discrete_floor import DiscreteFloor
from floor import TAU, Floor
from peers import act_d3rlpy, act_d3rlpy_onnx, act_tianshou, train_d3rlpy, train_tianshou
from rounds import Run
from tensordict import TensorDict
from torch.optim import Adam
from torchrl.data import Bounded, Categorical, Unbounded
from torchrl.objectives import HardUpdate, SoftUpdate
from transitions import ACTIONS, DISCRETE, FRAME, OBSERVATIONS, Sizes, make_discrete_transitions, make_transitions

from torchrl_bcq import (
    BCQLoss,
    BCQPolicy,
    BCQTrainer,
    DiscreteBCQLoss,
    ExportedPolicy,
    OfflineOptimizationStepper,
    OfflineTrainer,
    export_policy,
    make_bcq_modules,
    make_discrete_bcq_modules,
    make_replay_buffer,
)

Train = Callable[[int, str, Sizes], Run]
Act = Callable[[str, Sizes], Callable[[np.ndarray], np.ndarray]]
SetUp = Callable[[], Run]  # called in another process, so it can be pickled

CANDIDATES = 100  # for each state, when acting

CPU_MODES: dict[str, dict[str, Any]] = {  # arguments of BCQTrainer
    "eager": {},
    "medium": {"precision": "medium"},
    "compiled": {"compile": True},
    "compiled medium": {"compile": True, "precision": "medium"},
    "bf16-target": {"precision": "bf16-target"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "compiled bf16": {"compile": True, "precision": "bf16-mixed"},
}
CUDA_MODES: dict[str, dict[str, Any]] = {
    "cudagraph": {"cudagraph": True},
    "cudagraph high": {"cudagraph": True, "precision": "high"},
    "cudagraph bf16": {"cudagraph": True, "precision": "bf16-mixed"},
    "cudagraph compiled": {"cudagraph": True, "compile": True},
}
MODES = CPU_MODES | CUDA_MODES
ACTING_MODES: dict[str, Callable[[BCQPolicy], Callable]] = {"eager": lambda policy: policy, "compiled": torch.compile}


def make_modules(device: str, sizes: Sizes):
    torch.manual_seed(0)
    specs = Unbounded((OBSERVATIONS,)), Bounded(-1, 1, (ACTIONS,))
    return make_bcq_modules(*specs, hidden=sizes.hidden, vae_hidden=sizes.vae_hidden, device=device)


def train_own(batch_size: int, device: str, sizes: Sizes, *, mode: str) -> Callable[[int], None]:
    """One trainer for all rounds, so that nothing is compiled twice; a call is one log interval of its loop."""
    loss = BCQLoss(*make_modules(device, sizes))
    buffer = make_replay_buffer(make_transitions(), batch_size=batch_size, device=device, seed=0)
    settings = {"total_steps": 10**9, "progress_bar": False, **MODES[mode]}  # the total is never reached
    trainer = BCQTrainer(loss, buffer, target_net_updater=SoftUpdate(loss, tau=TAU), **settings)
    return lambda steps: trainer.optim_steps(TensorDict({}, [steps]))


def train_own_discrete(batch_size: int, device: str, kind: str, *, mode: str) -> Callable[[int], None]:
    torch.manual_seed(0)
    author = DISCRETE[kind]
    observation = Unbounded(FRAME, dtype=torch.uint8) if kind == "frames" else Unbounded((OBSERVATIONS,))
    loss = DiscreteBCQLoss(*make_discrete_bcq_modules(observation, Categorical(ACTIONS), device=device))
    copied = author.tau is None
    updater = HardUpdate(loss, value_network_update_interval=author.copy_every) if copied else SoftUpdate(loss, tau=TAU)
    adam = Adam(loss.qvalue_network_params.parameters(), lr=author.lr, eps=author.eps, fused=True)
    buffer = make_replay_buffer(make_discrete_transitions(kind), batch_size=batch_size, device=device, seed=0)
    stepper = OfflineOptimizationStepper({"qvalue": adam})
    settings = {"optimization_stepper": stepper, "total_steps": 10**9, "progress_bar": False, **MODES[mode]}
    trainer = OfflineTrainer(loss, buffer, target_net_updater=updater, **settings)
    return lambda steps: trainer.optim_steps(TensorDict({}, [steps]))


def act_own(device: str, sizes: Sizes, *, mode: str) -> Callable[[np.ndarray], np.ndarray]:
    policy = ACTING_MODES[mode](BCQPolicy(*make_modules(device, sizes), num_action_samples=CANDIDATES))

    def act(states: np.ndarray) -> np.ndarray:
        batch = TensorDict({"observation": torch.from_numpy(states).to(device)}, [len(states)])
        return policy(batch)["action"].cpu().numpy()

    return act


def act_numpy(device: str, sizes: Sizes) -> Callable[[np.ndarray], np.ndarray]:
    return BCQPolicy(*make_modules(device, sizes), num_action_samples=CANDIDATES).act


def act_file(device: str, sizes: Sizes) -> Callable[[np.ndarray], np.ndarray]:
    """The policy as an ONNX file, on the CPU."""
    policy = BCQPolicy(*make_modules(device, sizes), num_action_samples=CANDIDATES)
    with tempfile.TemporaryDirectory() as folder:
        file = export_policy(policy, f"{folder}/policy.onnx").path
        return ExportedPolicy(file, threads=torch.get_num_threads()).act


def train_discrete_floor(batch_size: int, device: str, kind: str) -> Callable[[int], None]:
    return DiscreteFloor(make_discrete_transitions(kind), batch_size, device, kind).update


def train_floor(batch_size: int, device: str, sizes: Sizes) -> Callable[[int], None]:
    return Floor(make_transitions(), batch_size, device, sizes).update


def act_floor(device: str, sizes: Sizes) -> Callable[[np.ndarray], np.ndarray]:
    floor = Floor(make_transitions(), 1, device, sizes)
    return lambda states: floor.act(torch.from_numpy(states).to(device), CANDIDATES).cpu().numpy()


TRAINING: dict[str, Train] = {
    **{mode: partial(train_own, mode=mode) for mode in MODES},
    "tianshou": train_tianshou,
    "d3rlpy": train_d3rlpy,
    "d3rlpy-graph": partial(train_d3rlpy, graph=True),
    "floor": train_floor,
}
ACTING: dict[str, Act] = {
    "file": act_file,
    "policy.act": act_numpy,
    **{mode: partial(act_own, mode=mode) for mode in ACTING_MODES},
    "tianshou": partial(act_tianshou, samples=CANDIDATES),
    "d3rlpy": partial(act_d3rlpy, samples=CANDIDATES),
    "d3rlpy-onnx": partial(act_d3rlpy_onnx, samples=CANDIDATES),
    "floor": act_floor,
}
DISCRETE_TRAINING: dict[str, Callable[[int, str, str], Run]] = {
    **{mode: partial(train_own_discrete, mode=mode) for mode in MODES},
    "tianshou": discrete_peers.train_tianshou,
    "d3rlpy": discrete_peers.train_d3rlpy,
    "d3rlpy-graph": partial(discrete_peers.train_d3rlpy, graph=True),
    "floor": train_discrete_floor,
}
NAMES = {"training": TRAINING.keys(), **dict.fromkeys(DISCRETE, DISCRETE_TRAINING.keys()), "acting": ACTING.keys()}
INSTALL = "pip install -e '.[bench]' && pip install --no-deps d3rlpy==2.8.1"
PEERS = {"tianshou": "tianshou", **dict.fromkeys(["d3rlpy", "d3rlpy-graph", "d3rlpy-onnx"], "d3rlpy")}  # -> package
ON_CPU = ("file", "d3rlpy-onnx")  # ONNX files run on the CPU


def set_ups(kind: str, size: int, device: str, sizes: Sizes) -> dict[str, SetUp]:
    """For each contender, a function that sets it up to train on batches of ``size``, or to act in ``size`` states."""
    if kind == "training":
        return {name: partial(train, size, device, sizes) for name, train in TRAINING.items()}
    if kind in DISCRETE:
        return {name: partial(train, size, device, kind) for name, train in DISCRETE_TRAINING.items()}
    return {name: partial(repeat, act, size, device, sizes) for name, act in ACTING.items()}


def repeat(make: Act, number: int, device: str, sizes: Sizes) -> Run:
    """Set up a contender to act in the same states in each step."""
    states = np.random.default_rng(0).standard_normal((number, OBSERVATIONS), dtype=np.float32)
    act = make(device, sizes)

    def run(steps: int) -> None:
        for _ in range(steps):
            act(states)

    return run


def absent(device: str) -> dict[str, str]:
    """Contenders that cannot be measured here, and the reasons."""
    missing = {
        name: f"{package} is not installed: {INSTALL}"
        for name, package in PEERS.items()
        if importlib.util.find_spec(package) is None
    }
    if device.startswith("cuda"):
        return {**dict.fromkeys(ON_CPU, "it runs on the CPU"), **missing}
    return {**dict.fromkeys(["d3rlpy-graph", *CUDA_MODES], "it needs CUDA"), **missing}
