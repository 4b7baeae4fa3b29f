"""Learning with normalization does not depend on units; policies act equally after saving and loading."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.checkpoint import Checkpoint, CheckpointError
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase, ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate

from torchrl_bcq import (
    BCQLoss,
    BCQPolicy,
    BCQTrainer,
    Normalization,
    OfflineOptimizationStepper,
    make_bcq_modules,
    make_replay_buffer,
)

from ..conftest import ACTION_SPEC

SMALL = {"hidden": (32, 32), "vae_hidden": (32, 32)}


def test_units_do_not_matter(make_batch):
    """Twenty steps on data in other units give the same actions and values, in those units.

    In float64, and with an ``eps`` of Adam far below any gradient.
    """
    data, unseen = make_batch(200, dtype=torch.float64), make_batch(50, dtype=torch.float64)["observation"]
    outcomes = []
    for stretch, shift, reward, action, centre in ((1, 0, 1, 1, 0), (1000, 500, 100, 50, -7)):
        own = data.clone()
        own["observation"], own["next", "observation"] = (
            x * stretch + shift for x in (data["observation"], data["next", "observation"])
        )
        own["action"], own["next", "reward"] = data["action"] * action + centre, data["next", "reward"] * reward
        bounds = (bound.double() * action + centre for bound in (ACTION_SPEC.space.low, ACTION_SPEC.space.high))
        specs = Unbounded((3,), dtype=torch.float64), Bounded(*bounds, (2,), dtype=torch.float64)
        torch.manual_seed(0)
        networks = make_bcq_modules(*specs, normalization=Normalization.fit(own), dtype=torch.float64, **SMALL)
        loss = BCQLoss(*networks)
        updater = SoftUpdate(loss, tau=0.1)
        optimizers = [torch.optim.Adam(net.parameters(), lr=1e-2, eps=1e-60) for net in networks]
        for step in range(20):
            batch = own[step * 10 : step * 10 + 10]
            for net, name in ((0, "vae"), (2, "qvalue"), (1, "actor")):
                optimizers[net].zero_grad()
                getattr(loss, f"{name}_loss")(batch)[0].backward()
                optimizers[net].step()
            updater.step()
        states = TensorDict({"observation": unseen * stretch + shift}, [50])
        out = BCQPolicy(*networks, num_action_samples=20, return_value=True)(states)
        outcomes.append(((out["action"] - centre) / action, out["chosen_action_value"] / reward))
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-7, atol=1e-7)


class Plant(EnvBase):
    """Draws a new state at each step, of values in the thousands; its best action is known, rewards are up to 1e4.

    The second column of the observation never changes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.observation_spec = Composite(observation=Unbounded((2,)))
        self.action_spec = Bounded(-50, 50, (1,))
        self.reward_spec = Unbounded((1,))

    @staticmethod
    def best_action(observation):
        """20 to 40."""
        return 30 + (observation[..., :1] - 5000) / 100

    @classmethod
    def reward(cls, observation, action):
        return 1e4 - 100 * (action - cls.best_action(observation)).abs()

    @staticmethod
    def draw(*batch):
        return torch.cat([4000 + 2000 * torch.rand(*batch, 1), torch.full((*batch, 1), 7000.0)], -1)

    def _reset(self, tensordict=None):
        self.state = self.draw()
        return TensorDict({"observation": self.state})

    def _step(self, tensordict):
        reward = self.reward(self.state, tensordict["action"])
        self.state = self.draw()
        return TensorDict({"observation": self.state, "reward": reward, "done": torch.zeros(1, dtype=torch.bool)})

    def _set_seed(self, seed):
        torch.manual_seed(seed)


def recordings(rows: int) -> TensorDict:
    """Half of the actions are near the best one, half 60 below."""
    observation = Plant.draw(rows)
    action = Plant.best_action(observation) - 60 * (torch.rand(rows, 1) < 0.5) + 4 * torch.rand(rows, 1) - 2
    never = torch.zeros(rows, 1, dtype=torch.bool)
    outcome = {"observation": Plant.draw(rows), "reward": Plant.reward(observation, action)}
    outcome |= {"done": never, "terminated": never.clone()}
    return TensorDict({"observation": observation, "action": action, "next": outcome}, [rows])


def train(data: TensorDict, networks, steps: int, **settings) -> BCQLoss:
    loss = BCQLoss(*networks)
    loss.make_value_estimator(gamma=0.5)
    updater = SoftUpdate(loss, tau=0.05)
    stepper = OfflineOptimizationStepper.adam(loss, lr=3e-3)
    buffer = make_replay_buffer(data, batch_size=64, seed=0)
    settings = {"target_net_updater": updater, "optimization_stepper": stepper, "progress_bar": False, **settings}
    BCQTrainer(loss, buffer, total_steps=steps, seed=0, **settings).train()
    return loss


def mean_error(env: EnvBase, networks, steps: int = 200) -> float:
    """Distance from the best action along a rollout."""
    env.set_seed(0)
    rollout = env.rollout(steps, BCQPolicy(*networks))
    return (rollout["action"] - env.best_action(rollout["observation"])).abs().mean().item()


@pytest.mark.no_cover
def test_policy_acts_in_the_raw_environment_after_save_and_load(tmp_path, show_figure):
    """Observations in thousands, actions in tens, rewards in ten thousands; only the networks scale them."""
    env, data, steps = Plant(), recordings(2000), 500
    specs = env.observation_spec, env.action_spec
    fitted = Normalization.fit(data)
    networks = make_bcq_modules(*specs, normalization=fitted, **SMALL)
    trained = train(data, networks, steps, save_trainer_file=tmp_path / "checkpoint")
    plain = make_bcq_modules(*specs, **SMALL)
    train(data, plain, steps)

    torch.manual_seed(1)
    fresh = make_bcq_modules(*specs, normalization=Normalization.identity(env.observation_spec), **SMALL)
    loss = BCQLoss(*fresh)
    SoftUpdate(loss, tau=0.05)
    Checkpoint(loss_module=loss).load(tmp_path / "checkpoint")
    errors = {"saved": mean_error(env, networks), "loaded": mean_error(env, fresh), "plain": mean_error(env, plain)}
    show_figure(f"mean distance from the best action, in a range of 100: {errors}")
    assert errors["loaded"] == errors["saved"] < 3
    assert errors["plain"] > 10  # the paper's networks fail here
    values = BCQPolicy(*fresh, return_value=True)(TensorDict({"observation": Plant.draw(50)}, [50]))
    exact = 1e4 / (1 - 0.5)  # the sum of the best rewards, discounted by one half
    assert (values["chosen_action_value"] / exact - 1).abs().max() < 0.1
    for name, value in trained.state_dict().items():  # targets included
        assert torch.equal(loss.state_dict()[name], value), name
    torch.testing.assert_close(
        fresh[0].encoder[0].loc[:2].double(), fitted.observations["observation"][0], rtol=1e-6, atol=0
    )


def test_fixed_latents_act_alike_after_load(tmp_path):
    env = Plant()
    networks = make_bcq_modules(
        env.observation_spec, env.action_spec, normalization=Normalization.fit(recordings(100)), **SMALL
    )
    Checkpoint(policy=BCQPolicy(*networks)).save(tmp_path / "policy")
    identity = Normalization.identity(env.observation_spec)
    fresh = BCQPolicy(*make_bcq_modules(env.observation_spec, env.action_spec, normalization=identity, **SMALL))
    Checkpoint(policy=fresh).load(tmp_path / "policy")
    states = TensorDict({"observation": Plant.draw(20)}, [20])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert torch.equal(fresh(states.clone())["action"], BCQPolicy(*networks)(states.clone())["action"])


@pytest.mark.parametrize("normalized_first", [True, False])
def test_checkpoint_of_the_other_kind_is_refused(tmp_path, normalized_first):
    spec, losses = Unbounded((3,)), []
    for normalization in (Normalization.identity(spec), None)[:: 1 if normalized_first else -1]:
        losses.append(BCQLoss(*make_bcq_modules(spec, ACTION_SPEC, normalization=normalization, **SMALL)))
        SoftUpdate(losses[-1], tau=0.05)
    Checkpoint(loss_module=losses[0]).save(tmp_path / "checkpoint")
    before = {name: value.clone() for name, value in losses[1].state_dict().items()}
    with pytest.raises(CheckpointError, match="entries of this loss .* and with normalization"):
        Checkpoint(loss_module=losses[1]).load(tmp_path / "checkpoint")
    assert all(torch.equal(value, before[name]) for name, value in losses[1].state_dict().items())
    for name in ("vae_network", "actor_network", "qvalue_network"):
        saved, other = (getattr(loss, name) for loss in losses)
        with pytest.raises(RuntimeError, match="Missing key"):
            other.load_state_dict(saved.state_dict())
