"""Discrete BCQ of other libraries, with the sizes and settings of the author's code.

Each draws batches from its own library's buffer. Both copy the target network at intervals, also for vectors.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable

from discrete_floor import GAMMA, PENALTY, THRESHOLD
from peers import make_buffer, make_dataset
from transitions import ACTIONS, DISCRETE, FRAME, OBSERVATIONS, make_discrete_transitions


def train_tianshou(batch_size: int, device: str, kind: str) -> Callable[[int], None]:
    """Tianshou's DiscreteBCQ, built as in its example for Atari; for vectors, as two separate MLPs.

    Differences from the author's code: for frames, each of the two heads evaluates the shared trunk again; the batch is
    copied to the device by each network that reads it; four losses are copied from the device in each step.
    """
    from gymnasium.spaces import Discrete
    from tianshou.algorithm import DiscreteBCQ
    from tianshou.algorithm.imitation.discrete_bcq import DiscreteBCQPolicy
    from tianshou.algorithm.optim import AdamOptimizerFactory
    from tianshou.env.atari.atari_network import DQNet, ScaledObsInputActionReprNet
    from tianshou.utils.net.common import Net
    from tianshou.utils.net.discrete import DiscreteActor
    from tianshou.utils.torch_utils import policy_within_training_step

    settings = DISCRETE[kind]
    hidden = list(settings.hidden)
    if kind == "frames":
        trunk = ScaledObsInputActionReprNet(DQNet(*FRAME, ACTIONS, features_only=True))
        head = {"preprocess_net": trunk, "action_shape": ACTIONS, "hidden_sizes": hidden, "softmax_output": False}
        networks = [DiscreteActor(**head) for _ in range(2)]
    else:
        networks = [Net(state_shape=(OBSERVATIONS,), action_shape=(ACTIONS,), hidden_sizes=hidden) for _ in range(2)]
    algorithm = DiscreteBCQ(
        policy=DiscreteBCQPolicy(
            model=networks[0],
            imitator=networks[1],
            unlikely_action_threshold=THRESHOLD,
            action_space=Discrete(ACTIONS),
        ),
        optim=AdamOptimizerFactory(lr=settings.lr, eps=settings.eps),
        gamma=GAMMA,
        target_update_freq=settings.copy_every,
        imitation_logits_penalty=PENALTY,
    ).to(device)
    buffer = make_buffer(make_discrete_transitions(kind))

    def update(steps: int) -> None:
        with policy_within_training_step(algorithm.policy):
            for _ in range(steps):
                algorithm.update(buffer, batch_size)

    return update


def train_d3rlpy(batch_size: int, device: str, kind: str, graph: bool = False) -> Callable[[int], None]:
    """d3rlpy's DiscreteBCQ and its dataset.

    Differences from the author's code: for frames, values and logits share the hidden layer too, so an update needs
    fewer products; the trunk is evaluated again for the logits; three losses are copied from the device in each step.
    The next state in its buffer is always the next row, and it draws row by row. ``graph`` sets ``compile_graph``, for
    CUDA.
    """
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from d3rlpy.algos import DiscreteBCQConfig
        from d3rlpy.models.encoders import PixelEncoderFactory, VectorEncoderFactory
        from d3rlpy.optimizers import AdamFactory
        from d3rlpy.preprocessing import PixelObservationScaler

        settings, frames = DISCRETE[kind], kind == "frames"
        encoder = PixelEncoderFactory(feature_size=settings.hidden[0]) if frames else None
        algorithm = DiscreteBCQConfig(
            learning_rate=settings.lr,
            optim_factory=AdamFactory(eps=settings.eps),
            encoder_factory=encoder or VectorEncoderFactory(list(settings.hidden)),
            observation_scaler=PixelObservationScaler() if frames else None,
            batch_size=batch_size,
            gamma=GAMMA,
            action_flexibility=THRESHOLD,
            beta=PENALTY,
            target_update_interval=settings.copy_every,
            share_encoder=frames,
            compile_graph=graph,
        ).create(device="cuda:0" if device == "cuda" else device)
        dataset = make_dataset(make_discrete_transitions(kind))
        algorithm.build_with_dataset(dataset)

    def update(steps: int) -> None:
        for _ in range(steps):
            algorithm.update(dataset.sample_transition_batch(batch_size))

    return update
