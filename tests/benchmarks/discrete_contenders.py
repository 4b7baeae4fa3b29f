"""Discrete BCQ of this package and of other libraries, and cloning, with the settings of the author's code for vectors.

A function of CONTENDERS takes ``(data, seed)`` and returns ``update(steps)``, which makes gradient steps on batches
from the contender's own buffer, and ``act``, a function from states ``[S, D]`` to actions ``[S]``, both NumPy arrays.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from peers import make_buffer
from tensordict import TensorDict
from torchrl.data import Categorical, Unbounded
from torchrl.objectives import SoftUpdate

from torchrl_bcq import (
    DiscreteBCQLoss,
    DiscreteBCQPolicy,
    DiscreteCloningLoss,
    DiscreteCloningPolicy,
    OfflineOptimizationStepper,
    OfflineTrainer,
    load_hdf5,
    make_discrete_bcq_modules,
    make_discrete_cloning_modules,
    make_replay_buffer,
)

HIDDEN = [256, 256]  # of the values and of the imitation, two networks
LR = 3e-4
BATCH = 64
GAMMA = 0.99
TAU = 0.005
THRESHOLD = 0.3
PENALTY = 0.01
# The peers copy all weights to the target after a number of steps, and cannot average the weights. With 200, the
# weights of their targets are 100 steps old on average, and those of the averaged targets 200 steps.
TARGET_INTERVAL = round(1 / TAU)

Update = Callable[[int], None]
Act = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Data:
    """Transitions of a file, with the name of the environment and the number of actions."""

    env_id: str
    actions: int
    transitions: TensorDict


def read(path: Path) -> Data:
    """Read a file with discrete actions."""
    with h5py.File(path) as file:
        return Data(str(file.attrs["env_id"]), int(file.attrs["n_actions"]), load_hdf5(path))


def specs(data: Data) -> tuple[Unbounded, Categorical]:
    return Unbounded(data.transitions["observation"].shape[1:]), Categorical(data.actions)


def train_own(data: Data, seed: int, cloning: bool = False) -> tuple[Update, Act]:
    """This package, through its Python interface."""
    torch.manual_seed(seed)
    if cloning:
        networks = make_discrete_cloning_modules(*specs(data), hidden=HIDDEN)
        loss, policy = DiscreteCloningLoss(*networks), DiscreteCloningPolicy(*networks)
    else:
        networks = make_discrete_bcq_modules(*specs(data), hidden=HIDDEN)
        settings = {"unlikely_action_threshold": THRESHOLD}
        loss = DiscreteBCQLoss(*networks, imitation_logits_penalty=PENALTY, **settings)
        loss.make_value_estimator(gamma=GAMMA)
        policy = DiscreteBCQPolicy(*networks, **settings)
    trainer = OfflineTrainer(
        loss,
        make_replay_buffer(data.transitions, batch_size=BATCH, seed=seed),
        target_net_updater=None if cloning else SoftUpdate(loss, tau=TAU),
        optimization_stepper=OfflineOptimizationStepper.adam(loss, lr=LR),
        total_steps=10**9,  # never reached
        progress_bar=False,
    )

    def act(states: np.ndarray) -> np.ndarray:
        return policy(TensorDict({"observation": torch.from_numpy(states)}, [len(states)]))["action"].numpy()

    return lambda steps: trainer.optim_steps(TensorDict({}, [steps])), act


def train_tianshou(data: Data, seed: int) -> tuple[Update, Act]:
    """Tianshou's DiscreteBCQ, whose target bootstraps after a time limit, as that of this package."""
    import gymnasium
    from tianshou.algorithm import DiscreteBCQ
    from tianshou.algorithm.imitation.discrete_bcq import DiscreteBCQPolicy as TianshouPolicy
    from tianshou.algorithm.optim import AdamOptimizerFactory
    from tianshou.data import Batch
    from tianshou.utils.net.common import Net
    from tianshou.utils.torch_utils import policy_within_training_step

    np.random.seed(seed)
    torch.manual_seed(seed)
    shape = data.transitions["observation"].shape[1:]
    value, imitation = (Net(state_shape=shape, action_shape=data.actions, hidden_sizes=HIDDEN) for _ in range(2))
    policy = TianshouPolicy(
        model=value,
        imitator=imitation,
        action_space=gymnasium.spaces.Discrete(data.actions),
        unlikely_action_threshold=THRESHOLD,
    )
    algorithm = DiscreteBCQ(
        policy=policy,
        optim=AdamOptimizerFactory(lr=LR),
        gamma=GAMMA,
        target_update_freq=TARGET_INTERVAL,
        imitation_logits_penalty=PENALTY,
    )
    buffer = make_buffer(data.transitions)

    def update(steps: int) -> None:
        with policy_within_training_step(policy):
            for _ in range(steps):
                algorithm.update(buffer, BATCH)

    @torch.no_grad()
    def act(states: np.ndarray) -> np.ndarray:
        return policy(Batch(obs=states, info={})).act.numpy()

    return update, act


def train_d3rlpy(data: Data, seed: int) -> tuple[Update, Act]:
    """d3rlpy's DiscreteBCQ with two separate networks and the author's penalty, which are not its defaults.

    Its dataset drops the last row of an episode that a time limit cut off, because it stores no next observation. Its
    target bootstraps in all rows but those of ``terminals``.
    """
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        import d3rlpy
        from d3rlpy.algos import DiscreteBCQConfig
        from d3rlpy.constants import ActionSpace
        from d3rlpy.dataset import MDPDataset
        from d3rlpy.models.encoders import VectorEncoderFactory

        d3rlpy.seed(seed)
        algorithm = DiscreteBCQConfig(
            learning_rate=LR,
            encoder_factory=VectorEncoderFactory(HIDDEN),
            batch_size=BATCH,
            gamma=GAMMA,
            action_flexibility=THRESHOLD,
            beta=PENALTY,
            target_update_interval=TARGET_INTERVAL,
            share_encoder=False,
        ).create(device="cpu")
        rows, following = data.transitions, data.transitions["next"]
        dataset = MDPDataset(
            rows["observation"].numpy(),
            rows["action"].numpy()[:, None],
            following["reward"].numpy(),
            terminals=following["terminated"].squeeze(-1).numpy().astype(np.float32),
            timeouts=following["truncated"].squeeze(-1).numpy().astype(np.float32),
            action_space=ActionSpace.DISCRETE,
            action_size=data.actions,
        )
        algorithm.build_with_dataset(dataset)

    def update(steps: int) -> None:
        for _ in range(steps):
            algorithm.update(dataset.sample_transition_batch(BATCH))

    return update, algorithm.predict


def train_cloning(data: Data, seed: int) -> tuple[Update, Act]:
    return train_own(data, seed, cloning=True)


CONTENDERS: dict[str, Callable[[Data, int], tuple[Update, Act]]] = {
    "cloning": train_cloning,
    "BCQ": train_own,
    "tianshou": train_tianshou,
    "d3rlpy": train_d3rlpy,
}
PEERS = ["tianshou", "d3rlpy"]
