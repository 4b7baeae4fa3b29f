"""Replaces the VAE with a mixture density network, which has the members of GenerativeModel.

python examples/swap_generative_model.py
"""

import argparse

import torch
from pendulum_data import SMALL, mean_return, record, run, train
from torch import distributions, nn
from torchrl.envs import GymEnv
from torchrl.modules import MLP

from torchrl_bcq import BCQLoss, BCQPolicy, make_bcq_modules


class MixtureDensityNetwork(nn.Module):
    observation_keys, action_key, loss_keys = ["observation"], "action", ["log_likelihood"]
    latent_clip = torch.inf  # not clipped: the first latent number picks a component, the other A are its noise

    def __init__(self, observations, action_spec, components=4):
        super().__init__()
        actions = action_spec.shape[0]
        self.latent_dim, self.sizes = 1 + actions, [1, actions, actions]  # sizes of weight, mean and deviation
        self.net = MLP(in_features=observations, out_features=[components, sum(self.sizes)], num_cells=[64, 64])
        self.register_buffer("bounds", torch.stack([action_spec.space.low, action_spec.space.high]))

    def mixture(self, tensordict):
        logit, mean, log_std = self.net(tensordict["observation"]).split(self.sizes, -1)  # [*B, K, 1 + 2 * A]
        normals = distributions.Independent(distributions.Normal(mean, log_std.clamp(-3, 1).exp()), 1)
        return distributions.MixtureSameFamily(distributions.Categorical(logits=logit.squeeze(-1)), normals)

    def training_loss(self, tensordict, noise=None):
        log_likelihood = self.mixture(tensordict).log_prob(tensordict["action"])
        return -log_likelihood, {"log_likelihood": log_likelihood.detach()}

    def decode(self, tensordict, latent):
        mixture = self.mixture(tensordict)
        weights, normal = mixture.mixture_distribution.probs, mixture.component_distribution.base_dist
        picked = (weights.cumsum(-1)[..., :-1] < torch.special.ndtr(latent[..., :1])).sum(-1)  # [*B]
        actions = normal.loc + normal.scale * latent[..., None, 1:]  # [*B, K, A]
        action = actions.take_along_dim(picked[..., None, None], -2).squeeze(-2)
        return tensordict.set("action", action.clamp(*self.bounds))


def main(steps: int) -> dict[str, float]:
    torch.manual_seed(0)
    env = GymEnv("Pendulum-v1")
    transitions = record(env)
    behaviour = MixtureDensityNetwork(3, env.action_spec)
    _, actor, critics = make_bcq_modules(env.observation_spec, env.action_spec, **SMALL)
    train(BCQLoss(behaviour, actor, critics), transitions, steps)
    return {"behaviour": mean_return(transitions), "bcq": mean_return(run(env, BCQPolicy(behaviour, actor, critics)))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="gradient steps (default: %(default)s)")
    print(main(parser.parse_args().steps))
