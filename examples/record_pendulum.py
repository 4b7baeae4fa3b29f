"""Record a dataset once: a scripted swing-up controller on Pendulum-v1, at three levels of noise, kept by Minari.

    python examples/record_pendulum.py

Environment -> TorchRL collector -> Minari's local store (``MINARI_DATASETS_PATH``, ``~/.minari`` if not set).
"""

from __future__ import annotations

import logging
import warnings

import minari
import torch
from minari.data_collector import EpisodeBuffer
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.envs import GymEnv
from tqdm import tqdm

DATASET_ID = "torchrl-bcq/pendulum/swing-up-v0"
EPISODE_STEPS = 200  # Pendulum-v1 ends by time alone
NOISE_LEVELS = (1.0, 4.0, 10.0)  # standard deviation of the torque, N m; the torque limit is 2


def swing_up(observation: torch.Tensor, noise: float) -> torch.Tensor:
    """Pump energy until the pole is nearly upright, then balance it. ``[*B, 3] -> [*B, 1]``, torque in N m.

    The energy is that of Gymnasium's rod (mass 1 kg, length 1 m, g = 10 m/s^2) over the upright one's 5 J.
    """
    cos, sin, speed = observation.unbind(-1)
    missing_energy = 5 - (speed.square() / 6 + 5 * cos)
    pump = 2 * torch.sign(speed) * torch.sign(missing_energy)
    balance = -10 * torch.atan2(sin, cos) - 2 * speed
    torque = torch.where(cos > 0.9, balance, pump)
    return (torque + noise * torch.randn_like(torque)).clamp(-2, 2).unsqueeze(-1)


def to_minari(episode: TensorDictBase) -> EpisodeBuffer:
    """One finished episode ``[T]`` in Minari's layout: ``T + 1`` observations and ``T`` of all else."""
    last = episode["next", "observation"][-1:]
    return EpisodeBuffer(
        observations=torch.cat([episode["observation"], last]).numpy(),
        actions=episode["action"].numpy(),
        rewards=episode["next", "reward"].squeeze(-1).numpy(),
        terminations=episode["next", "terminated"].squeeze(-1).numpy(),
        truncations=episode["next", "truncated"].squeeze(-1).numpy(),
    )


def record(steps: int = 30_000, seed: int = 0) -> None:
    """Record ``steps`` transitions, a third at each level of noise."""
    torch.manual_seed(seed)
    episodes = []
    progress = tqdm(total=steps, desc="recording Pendulum-v1", unit="step")
    for level, noise in enumerate(NOISE_LEVELS):
        env = GymEnv("Pendulum-v1")
        env.set_seed(seed + level)
        policy = TensorDictModule(
            lambda x, noise=noise: swing_up(x, noise), in_keys=["observation"], out_keys=["action"]
        )
        frames = steps // len(NOISE_LEVELS)
        collector = Collector(
            env, policy, frames_per_batch=EPISODE_STEPS, total_frames=frames, auto_register_policy_transforms=False
        )
        for episode in collector:
            episodes.append(to_minari(episode))
            progress.update(len(episode))
        collector.shutdown()
    progress.close()
    warnings.filterwarnings("ignore", module="minari")  # it asks for an author's e-mail address
    minari.create_dataset_from_buffers(
        DATASET_ID,
        buffer=episodes,
        env="Pendulum-v1",
        eval_env="Pendulum-v1",
        algorithm_name=f"energy pumping and PD balance with Gaussian noise of {NOISE_LEVELS} N m",
        author="torchrl_bcq",
        code_permalink="examples/record_pendulum.py",
        description="Recorded by torchrl_bcq's example, 200 steps an episode, weakest noise first.",
    )


if __name__ == "__main__":
    logging.getLogger("torchrl").setLevel("WARNING")
    record()
    print(f"recorded {DATASET_ID}")
