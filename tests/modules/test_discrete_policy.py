"""DiscreteBCQPolicy and DiscreteCloningPolicy: choices by hand, masks, exploration, act, environments, collectors."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import pickle
import re

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Binary, Categorical, Composite, OneHot, Unbounded
from torchrl.envs import EnvBase, GymEnv, SerialEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import LSTMModule

from torchrl_bcq import (
    DiscreteBCQLoss,
    DiscreteBCQPolicy,
    DiscreteCloningPolicy,
    make_discrete_bcq_modules,
    make_discrete_cloning_modules,
)

from ..exporters import EXPORTERS

VALUE = torch.tensor([9.0, 5.0, 4.0])
LOGITS = torch.tensor([math.log(0.1), math.log(0.5), math.log(0.4)])


class Scores(nn.Module):
    """The same values and logits in each state."""

    def forward(self, observation):
        shape = (*observation.shape[:-1], 3)
        return VALUE.expand(shape), LOGITS.expand(shape)


def scores(outputs: int = 2) -> TensorDictModule:
    if outputs == 1:
        return TensorDictModule(lambda observation: Scores()(observation)[1], ["observation"], ["imitation_logits"])
    return TensorDictModule(Scores(), ["observation"], ["action_value", "imitation_logits"])


def act(policy, batch=(4,), **entries) -> torch.Tensor:
    states = TensorDict({"observation": torch.zeros(*batch, 1), **entries}, batch)
    return policy(states)["action"]


@pytest.mark.parametrize(("threshold", "chosen"), [(0.0, 0), (0.19, 0), (0.21, 1), (0.3, 1), (0.99, 1)])
def test_filtered_argmax_by_hand(threshold, chosen):
    policy = DiscreteBCQPolicy(scores(), unlikely_action_threshold=threshold, action_space="categorical")
    assert act(policy).tolist() == [chosen] * 4
    assert int(policy.act([0.0])) == chosen


def test_cloning_takes_the_most_likely_action():
    policy = DiscreteCloningPolicy(scores(1), action_space="categorical")
    assert act(policy).tolist() == [1] * 4
    policy = DiscreteCloningPolicy(scores(1), action_space="categorical", action_mask_key="free")
    assert act(policy, free=torch.tensor([True, False, True]).expand(4, 3)).tolist() == [2] * 4


@pytest.mark.parametrize(
    ("mask", "chosen"),
    [([True] * 3, 1), ([True, False, True], 2), ([True, False, False], 0), ([False, False, True], 2)],
)
def test_an_action_that_is_not_available_is_never_chosen(mask, chosen):
    policy = DiscreteBCQPolicy(scores(), action_space="categorical", action_mask_key="free")
    assert policy.in_keys == ["observation", "free"]
    assert act(policy, free=torch.tensor(mask).expand(4, 3)).tolist() == [chosen] * 4
    assert policy.act({"observation": [0.0], "free": mask}).tolist() == chosen
    assert policy.act({"observation": [[0.0]] * 2, "free": np.array([mask] * 2).astype(int)}).tolist() == [chosen] * 2
    assert policy(observation=torch.zeros(2, 1), free=torch.tensor([mask] * 2)).tolist() == [chosen] * 2
    explorer = DiscreteBCQPolicy(scores(), action_space="categorical", action_mask_key="free", epsilon=1.0)
    drawn = act(explorer, (300,), free=torch.tensor(mask).expand(300, 3))
    assert set(drawn.tolist()) == {i for i in range(3) if mask[i]}


def test_masks_that_do_not_fit_are_refused():
    policy = DiscreteBCQPolicy(scores(), action_space="categorical", action_mask_key="free")
    with pytest.raises(ValueError, match=r"free has shape \(4, 2\) and dtype torch.bool, expected booleans \(4, 3\)"):
        act(policy, free=torch.ones(4, 2, dtype=torch.bool))
    nothing = torch.zeros(4, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"free allows no action in 4 states that do not end .* \(first: \[0\]\)"):
        act(policy, free=nothing)
    assert act(policy, free=nothing, done=torch.ones(4, 1, dtype=torch.bool)).shape == (4,)  # as in a batch of rollouts
    with pytest.raises(ValueError, match="'free' has dtype float64, expected booleans"):
        policy.act({"observation": [0.0], "free": [0.5, 1, 0]})
    with pytest.raises(ValueError, match=re.escape("the policy reads ['observation', 'free']; pass a mapping")):
        policy.act([0.0])


@pytest.mark.parametrize(
    ("action_space", "shape", "dtype"),
    [
        ("categorical", (), torch.int64),
        ("one-hot", (3,), torch.int64),
        (Categorical(3), (), torch.int64),
        (Categorical(3, shape=(1,), dtype=torch.int32), (1,), torch.int32),
        (OneHot(3), (3,), torch.bool),
        (OneHot(3, dtype=torch.int64), (3,), torch.int64),
    ],
)
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_actions_have_the_shape_and_dtype_of_their_spec(action_space, shape, dtype, batch):
    action = act(DiscreteBCQPolicy(scores(), action_space=action_space), batch)
    assert action.shape == (*batch, *shape)
    assert action.dtype == dtype
    if not isinstance(action_space, str):
        assert action_space.is_in(action[(0,) * len(batch)])
    assert (action.long().argmax(-1) if shape == (3,) else action.reshape(batch)).eq(1).all()


def test_outputs_on_demand():
    policy = DiscreteBCQPolicy(
        scores(), action_space="categorical", return_value=True, return_candidates=True, action_mask_key="free"
    )
    states = TensorDict(
        {"observation": torch.zeros(2, 1), "free": torch.tensor([[True] * 3, [True, False, True]])}, [2]
    )
    out = policy(states)
    assert set(out.keys()) == {"observation", "free", *policy.out_keys}
    assert out["chosen_action_value"].tolist() == [[5.0], [4.0]]
    assert out["candidates"].tolist() == [[False, True, True], [False, False, True]]
    assert out["action_value"].tolist() == [VALUE.tolist()] * 2
    torch.testing.assert_close(out["imitation_probability"], torch.tensor([[0.1, 0.5, 0.4], [0.2, 0.0, 0.8]]))
    policy.select_out_keys("action")
    assert set(policy(states.select("observation", "free")).keys()) == {"observation", "free", "action"}
    plain = DiscreteBCQPolicy(scores(), action_space="categorical")
    assert set(plain(TensorDict({"observation": torch.zeros(2, 1)}, [2])).keys()) == {"observation", "action"}


# exploration


def test_epsilon_under_random_exploration_only():
    policy = DiscreteBCQPolicy(scores(), action_space="categorical", epsilon=0.3)
    for mode in (ExplorationType.DETERMINISTIC, ExplorationType.MODE, ExplorationType.MEAN):
        with set_exploration_type(mode):
            assert act(policy, (1000,)).tolist() == [1] * 1000
    assert policy.act(np.zeros((1000, 1))).tolist() == [1] * 1000
    for mode in (ExplorationType.RANDOM, None):
        with set_exploration_type(mode):
            shares = act(policy, (20_000,)).bincount(minlength=3) / 20_000
        # 0.1 for each action by chance, the rest for the best; 5 standard errors
        assert shares.tolist() == pytest.approx([0.1, 0.8, 0.1], abs=0.015)
    assert len(set(policy.act(np.zeros((100, 1)), deterministic=False).tolist())) == 3
    for epsilon in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"epsilon is {epsilon}, expected a probability between 0 and 1"):
            DiscreteBCQPolicy(scores(), action_space="categorical", epsilon=epsilon)


def test_without_epsilon_no_random_number_is_drawn():
    policy, state = DiscreteBCQPolicy(scores(), action_space="categorical"), torch.get_rng_state()
    with set_exploration_type(ExplorationType.RANDOM):
        act(policy)
    assert torch.equal(torch.get_rng_state(), state)


# what it is built from


def test_a_network_in_a_sequence_keeps_its_mask_and_keys():
    spec = Composite(state=Unbounded((3,)), action_mask=Binary(4, dtype=torch.bool))
    keys = {"action_key": "choice", "action_mask_key": "action_mask"}
    (network,) = make_discrete_bcq_modules(spec, Categorical(4), hidden=(8,), **keys)
    scale = TensorDictModule(lambda raw: raw / 10, ["raw"], ["state"])
    whole = TensorDictSequential(scale, network).select_out_keys(*network.out_keys)
    policy, loss = DiscreteBCQPolicy(whole), DiscreteBCQLoss(whole)
    assert (policy.mask_key, policy.action_key, loss.tensor_keys.action_mask) == (
        "action_mask",
        "choice",
        "action_mask",
    )
    assert loss.tensor_keys.action == "choice"
    assert {"raw", "action_mask", "choice"} <= {*loss.in_keys}


def test_settings_and_networks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="unlikely_action_threshold is 1, expected at least 0 and below 1"):
        DiscreteBCQPolicy(scores(), action_space="categorical", unlikely_action_threshold=1)
    with pytest.raises(ValueError, match="action_space is None, expected one discrete action for each step"):
        DiscreteBCQPolicy(scores())
    with pytest.raises(ValueError, match=r"network writes \['imitation_logits'\], expected 2 entries: the values"):
        DiscreteBCQPolicy(scores(1), action_space="categorical")
    with pytest.raises(ValueError, match=r"network writes \[.*\], expected 1 entry: the logits, each \[\*B, K\]"):
        DiscreteCloningPolicy(scores(), action_space="categorical")
    (network,) = make_discrete_bcq_modules(Unbounded((3,)), Categorical(2), hidden=(8,))
    memory = LSTMModule(input_size=1, hidden_size=4, in_key="observation", out_key="memory")
    heads = TensorDictModule(Scores(), ["memory"], ["action_value", "imitation_logits"])
    recurrent = TensorDictSequential(memory, heads).select_out_keys("action_value", "imitation_logits")
    with pytest.raises(ValueError, match=r"a recurrent layer \(LSTMModule\), whose memory the policy would lose; put"):
        DiscreteBCQPolicy(recurrent, action_space="categorical")
    states = TensorDict({"observation": torch.zeros(2, 3, dtype=torch.float64)}, [2])
    with pytest.raises(ValueError, match="observation has dtype torch.float64, but the networks have dtype"):
        DiscreteBCQPolicy(network)(states)


def test_policy_acts_with_what_was_just_learned(make_batch):
    (network,) = make_discrete_bcq_modules(Unbounded((3,)), Categorical(2), hidden=(8,))
    policy, loss, batch = DiscreteBCQPolicy(network), DiscreteBCQLoss(network, delay_qvalue=False), make_batch(64)
    batch["action"] = torch.ones(64, dtype=torch.int64)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    for action in (1, 0):
        batch["action"].fill_(action)
        for _ in range(60):
            optimizer.zero_grad()
            loss.qvalue_loss(batch)[0].backward()
            optimizer.step()
        assert policy(batch.select("observation"))["action"].tolist() == [action] * 64


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))])
def test_copies_act_alike(make_copy):
    (network,) = make_discrete_bcq_modules(Unbounded((3,)), OneHot(5), hidden=(8,))
    policy, states = DiscreteBCQPolicy(network), torch.randn(20, 3)
    assert torch.equal(make_copy(policy)(states), policy(states))


@pytest.mark.parametrize("convert", EXPORTERS)
@pytest.mark.parametrize("spec", [Categorical(5), OneHot(5)])
def test_exported_graph_takes_any_number_of_states(convert, spec):
    mask = Binary(5, dtype=torch.bool)
    observations = Composite(observation=Unbounded((3,)), action_mask=mask)
    policy = DiscreteBCQPolicy(*make_discrete_bcq_modules(observations, spec, hidden=(8,)), return_candidates=True)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        graph = EXPORTERS[convert](policy, torch.randn(4, 3), torch.ones(4, 5, dtype=torch.bool))
        for number in (1, 4, 640):
            states = torch.randn(number, 3), torch.rand(number, 5) < 0.5
            states[1][:, 2] = True
            torch.testing.assert_close(graph(*states), policy(*states))


# acting on arrays


@pytest.mark.parametrize("batch", [(), (1,), (5,)])
@pytest.mark.parametrize("kind", [Categorical, OneHot])
def test_act_gives_the_actions_of_the_tensordict_call(batch, kind):
    spec = Composite(observation=Unbounded((3,)), action_mask=Binary(4, dtype=torch.bool))
    policy = DiscreteBCQPolicy(*make_discrete_bcq_modules(spec, kind(4), hidden=(8,)))
    rng = np.random.default_rng(0)
    observation, mask = rng.normal(size=(*batch, 3)), rng.uniform(size=(*batch, 4)) < 0.5
    mask[..., 2] = True
    states = {"observation": torch.from_numpy(observation).float(), "action_mask": torch.from_numpy(mask)}
    expected = policy(TensorDict(states, batch))["action"].numpy()
    for given in ({"observation": observation, "action_mask": mask}, states):
        np.testing.assert_array_equal(policy.act(given), expected)
    with pytest.raises(ValueError, match=re.escape(f"'action_mask' has shape {(*batch, 3)}, expected [4] or [B, 4]")):
        policy.act({"observation": observation, "action_mask": mask[..., :3]})
    with pytest.raises(ValueError, match="lacks 'action_mask'"):
        policy.act({"observation": observation})


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("make", [make_discrete_bcq_modules, make_discrete_cloning_modules])
def test_act_on_frames(batch, make):
    spec = Unbounded((2, 36, 40), dtype=torch.uint8)
    policy_class = DiscreteBCQPolicy if make is make_discrete_bcq_modules else DiscreteCloningPolicy
    policy = policy_class(*make(spec, Categorical(6), frame_hidden=(8,)))
    frames = np.random.default_rng(0).integers(256, size=(*batch, 2, 36, 40), dtype=np.uint8)
    action = policy.act(frames)
    assert action.shape == batch
    assert torch.equal(policy(torch.from_numpy(frames)), torch.as_tensor(action))  # a call with a tensor
    states = TensorDict({"observation": torch.from_numpy(frames)}, batch)
    assert torch.equal(policy(states)["action"], torch.as_tensor(action))
    with pytest.raises(ValueError, match="a frame has dtype torch.float32, expected torch.uint8"):
        policy.act(frames / 255)
    with pytest.raises(ValueError, match=r"expected \[2, 36, 40\] or \[B, 2, 36, 40\]"):
        policy.act(np.zeros((40, 36, 2), np.uint8))


# environments


def make_env(one_hot: bool) -> EnvBase:
    return GymEnv("CartPole-v1", categorical_action_encoding=not one_hot)


@pytest.mark.parametrize("one_hot", [False, True])
def test_rollouts_and_training_in_an_environment(one_hot):
    env = make_env(one_hot)
    (network,) = make_discrete_bcq_modules(env.observation_spec, env.action_spec, hidden=(8,))
    policy = DiscreteBCQPolicy(network, epsilon=0.5, return_value=True)
    rollout = env.rollout(30, policy, break_when_any_done=False)
    assert rollout.batch_size == (30,)
    assert rollout["action"].shape == ((30, 2) if one_hot else (30,))
    assert env.action_spec.is_in(rollout["action"][0])
    out = DiscreteBCQLoss(network, delay_qvalue=False)(rollout)
    assert all(value.isfinite().all() for value in out.values())
    assert out["td_error"].shape == (30, 1)


@pytest.mark.parametrize("one_hot", [False, True])
def test_vectorised_environments(one_hot):
    env = SerialEnv(3, functools.partial(make_env, one_hot))
    env.set_seed(0)
    actions = env.action_spec_unbatched
    (network,) = make_discrete_bcq_modules(env.observation_spec_unbatched, actions, hidden=(8,))
    policy = DiscreteBCQPolicy(network)
    rollout = env.rollout(15, policy, break_when_any_done=False)
    assert rollout.batch_size == (3, 15)
    alone = policy(rollout[1, 7].select("observation"))["action"]
    assert torch.equal(rollout["action"][1, 7], alone)
    assert rollout["action"].shape == ((3, 15, 2) if one_hot else (3, 15))
    with pytest.raises(ValueError, match="for a vectorised environment, pass env.action_spec_unbatched"):
        make_discrete_bcq_modules(env.observation_spec_unbatched, env.action_spec)
    env.close()


@pytest.mark.parametrize("one_hot", [False, True])
def test_collectors_receive_new_weights(one_hot):
    env = make_env(one_hot)
    (network,) = make_discrete_bcq_modules(env.observation_spec, env.action_spec, hidden=(8,))
    policy = DiscreteBCQPolicy(network, unlikely_action_threshold=0.0)
    network.heads[0][-1].bias.data.copy_(torch.tensor([100.0, 0.0]))
    learned = copy.deepcopy(policy)
    learned.network.heads[0][-1].bias.data.copy_(torch.tensor([0.0, 100.0]))
    settings = {"frames_per_batch": 20, "total_frames": 60}
    if "auto_register_policy_transforms" in inspect.signature(Collector.__init__).parameters:
        settings["auto_register_policy_transforms"] = False
    collector = Collector(functools.partial(make_env, one_hot), policy, **settings)
    found = []
    for i, batch in enumerate(collector):
        action = batch["action"].argmax(-1) if one_hot else batch["action"]
        found.append(set(action.tolist()))
        if i == 0:
            collector.update_policy_weights_(TensorDict.from_module(learned))
    collector.shutdown()
    assert found[0] == {0}
    assert found[2] == {1}


def test_masks_move_to_the_device_of_the_networks():
    spec = Composite(observation=Unbounded((1,)), free=Binary(3, dtype=torch.bool))
    (network,) = make_discrete_bcq_modules(spec, Categorical(3), hidden=(8,), action_mask_key="free")
    policy = DiscreteBCQPolicy(network.to("meta"))
    states = policy._to_states({"observation": [0.0], "free": [1, 0, 1]})
    assert {value.device.type for value in states.values()} == {"meta"}
