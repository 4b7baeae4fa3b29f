"""Uses your own nested keys: pass action_key and value_key to make_bcq_modules, the other keys to loss.set_keys.

python examples/swap_keys.py
"""

import argparse

import torch
from pendulum_data import SMALL, mean_return, record, run, train
from torchrl.envs import GymEnv, RenameTransform, TransformedEnv

from torchrl_bcq import BCQLoss, BCQPolicy, make_bcq_modules

NAMES = {
    "observation": ("robot", "sensors", "pole"),
    "reward": ("robot", "payoff"),
    "done": ("robot", "over"),  # env.reset() renews only entries under "robot", next to this flag
    "terminated": ("robot", "fell"),
    "truncated": ("robot", "timeout"),
}
ACTION, VALUE = ("robot", "torque"), ("critics", "values")


def make_env() -> TransformedEnv:
    rename = RenameTransform(list(NAMES), list(NAMES.values()), in_keys_inv=["action"], out_keys_inv=[ACTION])
    return TransformedEnv(GymEnv("Pendulum-v1"), rename)


def make_loss(vae, actor, critics) -> BCQLoss:
    loss = BCQLoss(vae, actor, critics)
    loss.set_keys(**{name: NAMES[name] for name in ("reward", "done", "terminated")})
    return loss


def main(steps: int) -> dict[str, float]:
    torch.manual_seed(0)
    env = make_env()
    transitions = record(env, [NAMES["observation"]], ACTION)
    names = {"action_key": ACTION, "value_key": VALUE}
    vae, actor, critics = make_bcq_modules(env.observation_spec, env.full_action_spec[ACTION], **names, **SMALL)
    train(make_loss(vae, actor, critics), transitions, steps)
    rollout = run(env, BCQPolicy(vae, actor, critics))
    return {"behaviour": mean_return(transitions, NAMES["reward"]), "bcq": mean_return(rollout, NAMES["reward"])}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="gradient steps (default: %(default)s)")
    print(main(parser.parse_args().steps))
