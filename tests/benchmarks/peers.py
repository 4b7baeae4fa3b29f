"""BCQ of other libraries, with the author's settings.

Each draws batches from its own library's buffer, and acts on NumPy arrays.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from floor import GAMMA, LMBDA, LR, PHI, TARGET_SAMPLES, TAU
from tensordict import TensorDict
from transitions import Sizes, make_transitions

EPISODE = 1000  # rows


def make_tianshou(device: str, sizes: Sizes, samples: int):
    """Tianshou's BCQ, built as in its example.

    Differences from the author's code: the target does not use the target actor; the actor's loss also computes
    gradients of decoder and critic, which are not used (with both, the matrix products of an update for a batch of 100
    still take 3.06 GFLOP); latents are drawn on the CPU; four losses are copied from the device in each step;
    truncation ends the bootstrap. The policy evaluates one state after the other.
    """
    from gymnasium.spaces import Box
    from tianshou.algorithm import BCQ
    from tianshou.algorithm.imitation.bcq import BCQPolicy
    from tianshou.algorithm.optim import AdamOptimizerFactory
    from tianshou.utils.net.common import MLP, Net
    from tianshou.utils.net.continuous import VAE, ContinuousCritic, Perturbation

    hidden, vae_hidden = list(sizes.hidden), list(sizes.vae_hidden)
    states, actions = sizes.observations, sizes.actions

    def critic() -> ContinuousCritic:
        net = Net(state_shape=(states,), action_shape=(actions,), hidden_sizes=hidden, concat=True)
        return ContinuousCritic(preprocess_net=net)

    # the example has an MLP, of whose output Perturbation takes the first row for all states
    actor = Net(state_shape=(states + actions,), action_shape=(actions,), hidden_sizes=hidden)
    vae = VAE(
        encoder=MLP(input_dim=states + actions, hidden_sizes=vae_hidden),
        decoder=MLP(input_dim=states + sizes.latents, output_dim=actions, hidden_sizes=vae_hidden),
        hidden_dim=vae_hidden[-1],
        latent_dim=sizes.latents,
        max_action=sizes.bound,
    )
    policy = BCQPolicy(
        actor_perturbation=Perturbation(preprocess_net=actor, max_action=sizes.bound, phi=PHI),
        action_space=Box(-sizes.bound, sizes.bound, (actions,)),
        critic=critic(),
        vae=vae,
        forward_sampled_times=samples,
    )
    adam = {f"{name}_optim": AdamOptimizerFactory(lr=LR) for name in ("actor_perturbation", "critic", "vae")}
    settings = {"gamma": GAMMA, "tau": TAU, "lmbda": LMBDA, "num_sampled_action": TARGET_SAMPLES}
    return BCQ(policy=policy, critic2=critic(), **adam, **settings).to(device)


def train_tianshou(batch_size: int, device: str, sizes: Sizes) -> Callable[[int], None]:
    from tianshou.utils.torch_utils import policy_within_training_step

    algorithm = make_tianshou(device, sizes, samples=1)
    buffer = make_buffer(make_transitions())

    def update(steps: int) -> None:
        with policy_within_training_step(algorithm.policy):
            for _ in range(steps):
                algorithm.update(buffer, batch_size)

    return update


def make_buffer(data: TensorDict):
    """Tianshou's buffer."""
    from tianshou.data import ReplayBuffer

    terminated, done = (data["next", name].squeeze(-1).numpy() for name in ("terminated", "done"))
    return ReplayBuffer.from_data(
        obs=data["observation"].numpy(),
        act=data["action"].numpy(),
        rew=data["next", "reward"].squeeze(-1).numpy(),
        terminated=terminated,
        truncated=done & ~terminated,
        done=done,
        obs_next=data["next", "observation"].numpy(),
    )


def act_tianshou(device: str, sizes: Sizes, samples: int) -> Callable[[np.ndarray], np.ndarray]:
    from tianshou.data import Batch

    policy = make_tianshou(device, sizes, samples).policy.eval()

    @torch.no_grad()  # as its Collector does
    def act(states: np.ndarray) -> np.ndarray:
        return policy(Batch(obs=states, info={})).act

    return act


def make_d3rlpy(device: str, sizes: Sizes, batch_size: int, samples: int, graph: bool, data: TensorDict | None = None):
    """d3rlpy's BCQ and its dataset, of random transitions unless ``data`` is given.

    Differences from the author's code: decoded actions are not squashed by tanh; the actor's loss computes gradients of
    decoder and critics, which are not used; the actor's loss and the policy evaluate both critics (3.40 GFLOP in place
    of 3.06 for an update on a batch of 100, 0.196 in place of 0.170 for an action); three losses are copied from the
    device in each step. Target and policy share one number of candidates: 10 to train, 100 to act. The next state in
    its buffer is always the next row, and it draws row by row. ``graph`` sets ``compile_graph``, for CUDA.
    """
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from d3rlpy.algos import BCQConfig
        from d3rlpy.models.encoders import VectorEncoderFactory
        from d3rlpy.preprocessing import MinMaxActionScaler

        ends = [[sizes.bound * sign] * sizes.actions for sign in (-1, 1)]
        hidden, vae_hidden = (VectorEncoderFactory(list(units)) for units in (sizes.hidden, sizes.vae_hidden))
        algorithm = BCQConfig(
            **{f"{name}_learning_rate": LR for name in ("actor", "critic", "imitator")},
            actor_encoder_factory=hidden,
            critic_encoder_factory=hidden,
            imitator_encoder_factory=vae_hidden,
            batch_size=batch_size,
            gamma=GAMMA,
            tau=TAU,
            lam=LMBDA,
            n_action_samples=samples,
            action_flexibility=PHI,
            compile_graph=graph,
            action_scaler=None if sizes.bound == 1 else MinMaxActionScaler(*map(np.array, ends)),
        ).create(device="cuda:0" if device == "cuda" else device)
        dataset = make_dataset(make_transitions() if data is None else data)
        algorithm.build_with_dataset(dataset)
    return algorithm, dataset


def make_dataset(data: TensorDict):
    """d3rlpy's dataset; transitions without ends are split into episodes of equal length."""
    from d3rlpy.dataset import MDPDataset

    terminated, done = (data["next", name].squeeze(-1).numpy() for name in ("terminated", "done"))
    ends = done if done.any() else np.arange(len(data)) % EPISODE == EPISODE - 1
    return MDPDataset(
        data["observation"].numpy(),
        data["action"].numpy(),
        data["next", "reward"].numpy(),
        terminals=terminated.astype(np.float32),
        timeouts=(ends & ~terminated).astype(np.float32),
    )


def train_d3rlpy(batch_size: int, device: str, sizes: Sizes, graph: bool = False) -> Callable[[int], None]:
    algorithm, dataset = make_d3rlpy(device, sizes, batch_size, TARGET_SAMPLES, graph)

    def update(steps: int) -> None:
        for _ in range(steps):
            algorithm.update(dataset.sample_transition_batch(batch_size))

    return update


def act_d3rlpy(device: str, sizes: Sizes, samples: int) -> Callable[[np.ndarray], np.ndarray]:
    algorithm, _ = make_d3rlpy(device, sizes, 1, samples, graph=False)
    return algorithm.predict


def act_d3rlpy_onnx(device: str, sizes: Sizes, samples: int) -> Callable[[np.ndarray], np.ndarray]:
    """d3rlpy's ONNX file. Its candidates are random, and it takes one number of states, one.

    d3rlpy 2.8.1 cannot write it with the default of PyTorch 2.9 and later, so this function chooses the older exporter.
    """
    import onnxruntime

    algorithm, _ = make_d3rlpy(device, sizes, 1, samples, graph=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        file = f"{folder}/policy.onnx"
        with patch("torch.onnx.export", partial(torch.onnx.export, dynamo=False)):
            algorithm.save_policy(file)
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    (name,) = (port.name for port in session.get_inputs())
    return lambda states: session.run(None, {name: states})[0]
