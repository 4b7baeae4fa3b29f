"""Trains on images with one convolutional encoder for all networks. Only the critics' loss trains the encoder.
python examples/swap_image_observations.py
"""

import argparse

import torch
from pendulum_data import SMALL, mean_return, record, run
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch.nn import LayerNorm, Linear, Sequential
from torchrl.data import Composite, Unbounded
from torchrl.envs import GymEnv, TransformedEnv, UnaryTransform
from torchrl.modules import ConvNet
from torchrl.objectives import SoftUpdate
from tqdm import trange

from torchrl_bcq import BCQLoss, BCQPolicy, make_bcq_modules, make_replay_buffer


def draw(observation):
    """Draw the tip of the pole now and one step before: ``[*B, 3] -> [*B, 2, 24, 24]``."""
    cos, sin, speed = observation[..., None, None, None].unbind(-4)  # [*B, 1, 1, 1]
    angle = torch.atan2(sin, cos) - speed * torch.tensor([0.0, 0.05]).view(2, 1, 1)
    grid = torch.linspace(-1.2, 1.2, 24)
    return torch.exp(-((grid - angle.sin()) ** 2 + (grid[:, None] - angle.cos()) ** 2) / 0.03)


def losses(encoder, loss, batch):
    encoder(batch)
    with torch.no_grad():
        encoder(batch["next"])
    features = batch.detach()  # the losses of VAE and actor do not train the encoder
    return loss.qvalue_loss(batch)[0], loss.vae_loss(features)[0], loss.actor_loss(features)[0]


def main(steps: int) -> dict[str, float]:
    torch.manual_seed(0)
    env = TransformedEnv(GymEnv("Pendulum-v1"), UnaryTransform(["observation"], ["pixels"], fn=draw))
    transitions = record(env)
    network = Sequential(ConvNet(2, num_cells=[16, 16], kernel_sizes=4, strides=2), Linear(256, 32), LayerNorm(32))
    encoder = TensorDictModule(network, in_keys=["pixels"], out_keys=["features"])
    vae, actor, critics = make_bcq_modules(Composite(features=Unbounded((32,))), env.action_spec, **SMALL)
    loss = BCQLoss(vae, actor, critics).make_value_estimator(gamma=0.95)
    optimizer = torch.optim.Adam([*encoder.parameters(), *loss.parameters()], lr=3e-3)
    updater = SoftUpdate(loss, tau=0.02)
    buffer = make_replay_buffer(transitions, batch_size=64, seed=0)
    for _ in trange(steps):
        optimizer.zero_grad()
        sum(losses(encoder, loss, buffer.sample())).backward()
        optimizer.step()
        updater.step()
    policy = TensorDictSequential(encoder, BCQPolicy(vae, actor, critics))
    return {"behaviour": mean_return(transitions), "bcq": mean_return(run(env, policy))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="gradient steps (default: %(default)s)")
    print(main(parser.parse_args().steps))
