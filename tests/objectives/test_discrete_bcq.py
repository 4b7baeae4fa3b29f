"""DiscreteBCQLoss: mistakes of other implementations, by numbers computed by hand; keys, masks, actions and targets."""

from __future__ import annotations

import math
import re

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, Categorical, Composite, MultiStep, OneHot, TensorDictPrioritizedReplayBuffer
from torchrl.data.replay_buffers import LazyTensorStorage
from torchrl.objectives import HardUpdate, SoftUpdate
from torchrl.objectives.utils import ValueEstimators

from torchrl_bcq import DiscreteBCQLoss, MultiHeadNetwork

from ..conftest import skip_without_extension
from .conftest import NUM_ACTIONS, discrete_modules, make_loss, with_updater

GAMMA = 0.9


class Table(nn.Module):
    """Values ``[S, K]`` and logits ``[S, K]`` of numbered states; the observation ``[*B, 1]`` is the number."""

    def __init__(self, value: list, logits: list) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float64))

    def forward(self, observation):
        state = observation.squeeze(-1).long()
        return self.value[state], self.logits[state]


def table(value: list, logits: list) -> TensorDictModule:
    return TensorDictModule(Table(value, logits), ["observation"], ["action_value", "imitation_logits"])


def log(*probabilities: float) -> list[float]:
    return [math.log(p) for p in probabilities]


# State 0 is the state, state 1 the next one. There the value prefers action 0, which is unlikely: ratio 0.2.
VALUE = [[1.0, 2.0, 3.0], [9.0, 5.0, 4.0]]
LOGITS = [log(0.25, 0.5, 0.25), log(0.1, 0.5, 0.4)]
TARGET_VALUE = [[0.0, 0.0, 0.0], [100.0, 10.0, 20.0]]  # of the target network


def make_table_loss(value=VALUE, logits=LOGITS, target=TARGET_VALUE, action_space="categorical", **settings):
    """A loss whose target network has the values ``target``."""
    loss = DiscreteBCQLoss(table(value, logits), action_space=action_space, **settings).make_value_estimator(
        gamma=GAMMA
    )
    if loss.delay_qvalue:
        SoftUpdate(loss, tau=0.5)
        loss.target_qvalue_network_params["module", "value"].data.copy_(torch.tensor(target))
        loss.target_qvalue_network_params["module", "logits"].data.zero_()  # never read
    return loss


def batch_of(action: int = 1, reward: float = 1.0, rows: int = 1, **flags: bool) -> TensorDict:
    column = torch.ones(rows, 1, dtype=torch.float64)
    outcome = {name: torch.full((rows, 1), flags.get(name, False)) for name in ("done", "terminated", "truncated")}
    return TensorDict(
        {
            "observation": 0 * column,
            "action": torch.full((rows,), action),
            "next": {"observation": column, "reward": reward * column, **outcome},
        },
        [rows],
    )


def target_of(loss: DiscreteBCQLoss, batch: TensorDict) -> list[float]:
    return loss.qvalue_loss(batch)[1]["target_value"].tolist()


# the target


def test_double_q_target_of_the_best_likely_action():
    """Of actions 1 and 2 the current value prefers 1, whose target value is 10. Each slip would give another number."""
    assert target_of(make_table_loss(), batch_of()) == [1 + GAMMA * 10]
    slips = {
        "unfiltered": 1 + GAMMA * 100,
        "largest likely target value": 1 + GAMMA * 20,
        "current network evaluates": 1 + GAMMA * 5,
    }
    assert 10.0 not in slips.values()
    assert target_of(make_table_loss(unlikely_action_threshold=0.0), batch_of()) == [slips["unfiltered"]]
    assert target_of(make_table_loss(delay_qvalue=False), batch_of()) == [slips["current network evaluates"]]


@pytest.mark.parametrize(
    ("threshold", "chosen"),
    [(0.0, 100), (0.19, 100), (0.2, 10), (0.3, 10), (0.79, 10), (0.8, 10), (0.99, 10)],
)
def test_the_threshold_is_strict(threshold, chosen):
    """The ratios are 0.2, 1 and 0.8. An action whose ratio equals the threshold does not pass."""
    logits = [LOGITS[0], log(0.2, 1.0, 0.8)]  # not those of a softmax, so that rounding changes no ratio
    loss = make_table_loss(logits=logits, unlikely_action_threshold=threshold)
    value, metadata = loss.qvalue_loss(batch_of())
    assert metadata["target_value"].tolist() == [1 + GAMMA * chosen]
    share = sum(ratio > threshold for ratio in (0.2, 1.0, 0.8)) / 3
    assert metadata["allowed_share"].tolist() == [share]
    assert value.isfinite()


def test_logits_are_read_as_they_are():
    """All logits are negative: a ReLU would make the actions equally likely. A second softmax would do nearly so."""
    loss = make_table_loss(logits=[LOGITS[0], [-12.0, -2.0, -4.0]], unlikely_action_threshold=0.3)
    assert target_of(loss, batch_of()) == [1 + GAMMA * 10]
    metadata = loss.qvalue_loss(batch_of())[1]
    assert metadata["allowed_share"].tolist() == [1 / 3]


def test_values_are_unbounded():
    """A softmax over the values would keep them in [0, 1]."""
    metadata = make_table_loss(value=[[-50.0, 70.0, 0.0], VALUE[1]]).qvalue_loss(batch_of(action=1))[1]
    assert metadata["pred_value"].tolist() == [[70.0]]


@pytest.mark.parametrize(
    ("flags", "target"), [({"terminated": True, "done": True}, 1), ({"truncated": True, "done": True}, 10)]
)
def test_terminated_ends_the_bootstrap_and_truncated_does_not(flags, target):
    assert target_of(make_table_loss(), batch_of(**flags)) == [target if target == 1 else 1 + GAMMA * 10]


def test_target_of_a_row_depends_on_that_row_alone(make_batch):
    loss, batch = make_loss("discrete bcq"), make_batch(6)
    before = loss.qvalue_loss(batch)[1]["target_value"]
    batch["next", "observation"][0] += 1
    batch["next", "reward"][0] += 1
    after = loss.qvalue_loss(batch)[1]["target_value"]
    assert before[0] != after[0]
    assert torch.equal(before[1:], after[1:])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_multi_step_returns_of_torchrl(n):
    """A chain of three steps with rewards 1, 2, 4; all later states are state 1, whose target value is 10."""
    steps = batch_of(rows=3)
    steps["next", "reward"] = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64)
    batch = MultiStep(GAMMA, n)(steps.unsqueeze(0))[0]
    rewards = [1.0, 2.0, 4.0]
    expected = [
        sum(GAMMA**k * rewards[t + k] for k in range(ahead)) + GAMMA**ahead * 10
        for t, ahead in ((t, min(n, 3 - t)) for t in range(3))
    ]
    assert batch["steps_to_next_obs"].max() == n
    assert target_of(make_table_loss(), batch) == pytest.approx(expected)


def test_lambda_returns():
    """r + 0.9 * (0.3 * 10 + 0.7 * next return), from the last step backwards."""
    loss = make_table_loss().make_value_estimator(ValueEstimators.TDLambda, gamma=GAMMA, lmbda=0.7)
    last = 1 + GAMMA * 10
    second = 1 + GAMMA * (0.3 * 10 + 0.7 * last)
    batch = batch_of(rows=2).unsqueeze(0)
    assert loss.qvalue_loss(batch)[1]["target_value"][0].tolist() == pytest.approx([second, last])


# the terms


@pytest.mark.parametrize(("function", "distance"), [("smooth_l1", 7.5), ("l1", 8.0), ("l2", 64.0)])
def test_terms_by_hand(function, distance):
    """Q(s, 1) = 2, the target is 10; p(1|s) = 0.5; the mean square of log 0.25, log 0.5, log 0.25."""
    loss, batch = make_table_loss(loss_function=function), batch_of()
    out = loss(batch)
    penalty = 0.01 * (2 * math.log(4) ** 2 + math.log(2) ** 2) / 3
    assert out["loss_qvalue"].item() == pytest.approx(distance)
    assert out["loss_imitation"].item() == pytest.approx(math.log(2))
    assert out["loss_penalty"].item() == pytest.approx(penalty)
    assert loss.qvalue_loss(batch)[0].item() == pytest.approx(distance + math.log(2) + penalty)
    assert out["td_error"].tolist() == [[8.0]]
    assert batch["td_error"].tolist() == [8.0]
    assert [out[key].tolist() for key in ("pred_value", "target_value", "imitation_accuracy")] == [[[2]], [10], [1]]
    assert loss(batch_of(action=0))["imitation_accuracy"].tolist() == [0]


def test_weight_of_the_penalty():
    logits = [[1.0, -3.0, 2.0], LOGITS[1]]
    assert make_table_loss(logits=logits)(batch_of())["loss_penalty"].item() == pytest.approx(0.01 * 14 / 3)
    loss = make_table_loss(logits=logits, imitation_logits_penalty=0.5)
    assert loss(batch_of())["loss_penalty"].item() == pytest.approx(0.5 * 14 / 3)


def test_gradients_by_hand():
    """smooth_l1 has the gradient -1 at Q(s, a), nll has p - onehot, the penalty 2 * 0.01 * logits / 3."""
    loss = make_table_loss(imitation_logits_penalty=0.03)
    loss.qvalue_loss(batch_of(action=1))[0].backward()
    network = loss.qvalue_network.module
    assert network.value.grad.tolist() == [[0, -1, 0], [0, 0, 0]]  # no gradient through the target or the choice
    expected = torch.tensor([0.25, -0.5, 0.25]) + 0.02 * torch.tensor(LOGITS[0])
    torch.testing.assert_close(network.logits.grad[0], expected.double())
    assert not network.logits.grad[1].any()


def test_the_sum_of_the_terms_has_the_gradient_of_the_loss(make_batch):
    loss, batch = make_loss("discrete bcq"), make_batch(8)
    total = loss.qvalue_loss(batch)[0]
    total.backward()
    expected = {name: parameter.grad.clone() for name, parameter in loss.named_parameters()}
    loss.zero_grad()
    out = loss(batch)
    terms = [value for key, value in out.items() if key.startswith("loss_")]
    assert len(terms) == 3
    torch.testing.assert_close(sum(terms), total)
    sum(terms).backward()
    torch.testing.assert_close({name: p.grad for name, p in loss.named_parameters()}, expected)


def test_prioritised_replay_reads_the_td_error(make_batch):
    skip_without_extension()
    buffer = TensorDictPrioritizedReplayBuffer(alpha=1.0, beta=1.0, storage=LazyTensorStorage(20), batch_size=20)
    buffer.extend(make_batch(20))
    loss, batch = make_loss("discrete bcq"), buffer.sample()
    expected = loss(batch)["td_error"].squeeze(-1)
    torch.testing.assert_close(batch["td_error"], expected)
    buffer.update_tensordict_priority(batch)
    sampled = buffer.sample()
    assert sampled["priority_weight"].unique().numel() > 3
    assert loss(sampled)["loss_qvalue"].isfinite()


# masks


def masked(available: list, following: list, **settings) -> tuple[DiscreteBCQLoss, TensorDict]:
    loss, batch = make_table_loss(**settings), batch_of()
    loss.set_keys(action_mask="action_mask")
    batch["action_mask"], batch["next", "action_mask"] = torch.tensor([available]), torch.tensor([following])
    return loss, batch


@pytest.mark.parametrize(
    ("following", "chosen"),
    [
        ([True, True, True], 10),
        ([True, False, True], 20),  # ratio 0.25 of action 0: to the most likely available action, 2
        ([False, False, True], 20),
        ([True, False, False], 100),  # the only one is the most likely one
    ],
)
def test_an_action_that_is_not_available_is_never_the_next_one(following, chosen):
    loss, batch = masked([True] * 3, following)
    value, metadata = loss.qvalue_loss(batch)
    assert metadata["target_value"].tolist() == pytest.approx([1 + GAMMA * chosen])
    assert value.isfinite()


def test_imitation_is_relative_to_the_available_actions():
    """Of p = 0.25, 0.5, 0.25 the third is not available: p(1|s) = 0.5 / 0.75."""
    loss, batch = masked([True, True, False], [True] * 3)
    assert loss(batch)["loss_imitation"].item() == pytest.approx(-math.log(0.5 / 0.75))
    loss, batch = masked([True, True, False], [True] * 3, logits=[log(0.2, 0.3, 0.5), LOGITS[1]])
    assert loss(batch)["imitation_accuracy"].item() == 1.0


def test_a_final_state_needs_no_available_action():
    loss, batch = masked([True] * 3, [False] * 3)
    batch["next", "terminated"][:] = True
    out = loss(batch)
    assert out["target_value"].tolist() == [1.0]
    assert all(value.isfinite().all() for value in out.values())
    batch["next", "terminated"][:] = False
    with pytest.raises(ValueError, match=r"action_mask allows no action in 1 states that do not end .*first: \[0\]"):
        loss(batch)


def test_masks_that_do_not_fit_are_refused():
    loss, batch = masked([True, False, True], [True] * 3)
    with pytest.raises(ValueError, match=r"1 actions of the batch are not available \(first: at \[0\]\)"):
        loss(batch)
    loss, batch = masked([True] * 3, [True] * 3)
    with pytest.raises(ValueError, match=r"the batch lacks \[\('next', 'action_mask'\)\]"):
        loss(batch.exclude(("next", "action_mask")))
    batch["action_mask"] = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(
        ValueError, match=r"action_mask has shape \(1, 2\) and dtype torch.bool, expected booleans \(1, 3\)"
    ):
        loss(batch)
    batch["action_mask"] = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"action_mask has shape \(1, 3\) and dtype torch.int64, expected booleans"):
        loss(batch)


def test_masks_pass_through_multi_step_returns():
    loss, batch = masked([True] * 3, [True, False, True])
    two = torch.cat([batch, batch])
    two["next", "action_mask"][0] = True
    joined = MultiStep(GAMMA, 2)(two.unsqueeze(0))[0]
    assert target_of(loss, joined) == pytest.approx([1 + GAMMA + GAMMA**2 * 20, 1 + GAMMA * 20])


# actions


@pytest.mark.parametrize(
    ("action_space", "action"),
    [
        ("categorical", [1, 2]),
        ("categorical", [[1], [2]]),
        (Categorical(3), [1, 2]),
        (Categorical(3), [[1], [2]]),
        (Categorical(3, shape=(1,)), [[1], [2]]),
        ("one-hot", [[0, 1, 0], [0, 0, 1]]),
        ("one_hot", [[0, 1, 0], [0, 0, 1]]),
        (OneHot(3), [[False, True, False], [False, False, True]]),
        (OneHot(3, dtype=torch.float64), [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]),
    ],
)
def test_actions_of_each_kind(action_space, action):
    loss, batch = make_table_loss(action_space=action_space), batch_of(rows=2)
    batch["action"] = torch.tensor(action)
    if batch["action"].dtype.is_floating_point:
        batch["action"] = batch["action"].double()
    assert loss(batch)["pred_value"].tolist() == [[2.0], [3.0]]
    assert loss.value(batch).tolist() == [2.0, 3.0]
    assert loss(batch)["loss_imitation"].item() == pytest.approx((math.log(2) + math.log(4)) / 2)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_indices_of_any_integer_dtype(dtype):
    batch = batch_of(action=2)
    batch["action"] = batch["action"].to(dtype)
    assert make_table_loss()(batch)["pred_value"].tolist() == [[3.0]]


@pytest.mark.parametrize(
    ("action_space", "action", "message"),
    [
        ("categorical", [3], "the actions are 3 to 3, expected 0 to 2: the networks have 3 actions"),
        ("categorical", [-100], "the actions are -100 to -100, expected 0 to 2"),
        ("categorical", [1.0], "the action has dtype torch.float64, expected indices"),
        ("categorical", [True], "the action has dtype torch.bool, expected indices"),
        ("categorical", [[0, 1, 0]], r"observation has shape \(1, 1\), but the action has shape \(1, 3\)"),
        ("one-hot", [[0, 1]], r"the action has shape \(1, 2\), expected one-hot vectors \(1, 3\): the networks have 3"),
        ("one-hot", [[0, 0, 0]], r"the action at \[0\] is no one-hot vector; it must have exactly one 1"),
        ("one-hot", [[1, 1, 0]], r"the action at \[0\] is no one-hot vector"),
    ],
)
def test_actions_that_do_not_fit_are_refused(action_space, action, message):
    batch = batch_of()
    batch["action"] = torch.tensor(action)
    if batch["action"].dtype.is_floating_point:
        batch["action"] = batch["action"].double()
    with pytest.raises(ValueError, match=message):
        make_table_loss(action_space=action_space)(batch)


@pytest.mark.parametrize(
    ("action_space", "message"),
    [
        (None, "action_space is None, expected one discrete action for each step"),
        ("discrete", "action_space is 'discrete', expected one discrete action for each step"),
        (Bounded(-1, 1, (3,)), "action_space is a Bounded"),
        (
            Categorical(3, shape=(4,)),
            r"action_space has shape \(4,\), expected the spec of one action; for a vectorised",
        ),
        (OneHot(3, shape=(4, 3)), r"action_space has shape \(4, 3\)"),
        (Composite(action=OneHot(3)), r"action_space is a Composite; pass one of its leaves \['action'\]"),
    ],
)
def test_action_spaces_that_are_not_discrete_are_refused(action_space, message):
    with pytest.raises(ValueError, match=message):
        DiscreteBCQLoss(table(VALUE, LOGITS), action_space=action_space)


# networks, settings, keys


def test_settings_out_of_range_are_refused():
    for threshold in (1.0, -0.1, math.nan):
        with pytest.raises(
            ValueError, match=f"unlikely_action_threshold is {threshold}, expected at least 0 and below"
        ):
            make_table_loss(unlikely_action_threshold=threshold)
    with pytest.raises(ValueError, match="imitation_logits_penalty is -1, expected 0 or more"):
        make_table_loss(imitation_logits_penalty=-1)
    with pytest.raises(ValueError, match="loss_function is 'huber', expected one of"):
        make_table_loss(loss_function="huber")


def test_networks_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match="qvalue_network is a Linear, which lacks .*protocols.DiscreteNetwork"):
        DiscreteBCQLoss(nn.Linear(1, 3), action_space="categorical")
    one = TensorDictModule(nn.Linear(1, 3), ["observation"], ["action_value"])
    with pytest.raises(
        ValueError, match=r"qvalue_network writes \['action_value'\], expected 2 entries: the values and"
    ):
        DiscreteBCQLoss(one, action_space="categorical")
    lazy = TensorDictModule(nn.LazyLinear(3), ["observation"], ["action_value", "imitation_logits"])
    with pytest.raises(ValueError, match="qvalue_network has uninitialised lazy layers"):
        DiscreteBCQLoss(lazy, action_space="categorical")


@pytest.mark.parametrize("logits", [[[0.0] * 2] * 2, [0.0] * 2])
def test_outputs_that_would_broadcast_are_refused(logits):
    loss = with_updater(DiscreteBCQLoss(table(VALUE, logits), action_space="categorical"))
    with pytest.raises(ValueError, match=re.escape("the network writes 'imitation_logits' of shape")):
        loss(batch_of())


def test_a_network_without_an_action_key_leaves_the_key_to_the_loss():
    loss, batch = make_table_loss(), batch_of()
    expected = loss(batch)
    loss.set_keys(action=("its", "choice"))
    batch.rename_key_("action", ("its", "choice"))
    torch.testing.assert_close(loss(batch), expected)


def test_soft_and_hard_updates_find_the_target(make_batch):
    loss = DiscreteBCQLoss(*discrete_modules())
    soft = SoftUpdate(loss, tau=0.25)
    source, target = loss.qvalue_network_params, loss.target_qvalue_network_params
    start = target.clone()
    source.data.apply_(lambda p: p.add_(1))
    soft.step()
    for key, p in target.items(True, True):
        torch.testing.assert_close(p.data, start[key].data + 0.25)
    hard = HardUpdate(loss, value_network_update_interval=3)
    source.data.apply_(lambda p: p.add_(1))
    for _ in range(3):
        hard.step()
        assert not any(torch.equal(p.data, source[key].data) for key, p in target.items(True, True))
    hard.step()
    assert all(torch.equal(p.data, source[key].data) for key, p in target.items(True, True))


def test_vmap_over_batches(make_batch):
    """Inside vmap, the values of the actions cannot be checked."""
    loss = make_loss("discrete bcq")
    batches = torch.stack([make_batch(4) for _ in range(3)])
    found = torch.vmap(lambda batch: loss.qvalue_loss(batch)[0])(batches)
    torch.testing.assert_close(found, torch.stack([loss.qvalue_loss(batch)[0] for batch in batches.unbind(0)]))


def test_values_of_state_action_pairs(make_batch):
    loss, batch = make_loss("discrete bcq"), make_batch(4)
    expected = loss.qvalue_network(batch.copy())["action_value"][torch.arange(4), batch["choice"]]
    assert torch.equal(loss.value(batch), expected)
    assert loss.qvalue_network(batch.copy())["action_value"].shape[-1] == NUM_ACTIONS


@pytest.mark.filterwarnings("ignore:torch._dynamo.config.inline_inbuilt_nn_modules:FutureWarning")  # read by tensordict
@pytest.mark.parametrize("name", ["discrete bcq", "discrete bcq, masked", "discrete bcq, one-hot", "discrete cloning"])
def test_compiles_as_one_graph(make_batch, name):
    loss, batch = make_loss(name), make_batch(6)
    method = getattr(loss, f"{loss.network_names[0]}_loss")
    eager, metadata = method(batch.clone())
    eager.backward()
    expected = {key: p.grad.clone() for key, p in loss.named_parameters() if p.grad is not None}
    loss.zero_grad()
    torch._dynamo.reset()
    value, compiled_metadata = torch.compile(method, fullgraph=True, backend="aot_eager")(batch.clone())
    value.backward()
    torch.testing.assert_close(value, eager)
    torch.testing.assert_close(compiled_metadata, metadata)
    torch.testing.assert_close({k: p.grad for k, p in loss.named_parameters() if p.grad is not None}, expected)


def test_a_layer_may_be_called_first():
    """TensorDictModule shows the layers of its network as its own attributes."""
    network = table(VALUE, LOGITS)
    network.module.first = nn.Linear(1, 1)
    loss = with_updater(DiscreteBCQLoss(network, action_space="categorical"))
    assert loss(batch_of())["loss_qvalue"].isfinite()


def test_a_network_of_another_number_of_actions_is_refused():
    loss = with_updater(DiscreteBCQLoss(table(VALUE, LOGITS), action_space=Categorical(2)))
    with pytest.raises(ValueError, match="the network scores 3 actions, but action_space has 2"):
        loss(batch_of())


def test_batch_norm_with_a_time_dimension_is_refused():
    value = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    network = MultiHeadNetwork({"action_value": value, "imitation_logits": nn.Linear(3, 2)}, Categorical(2))
    flags = {name: torch.zeros(4, 2, 1, dtype=torch.bool) for name in ("done", "terminated")}
    after = {"observation": torch.rand(4, 2, 3), "reward": torch.rand(4, 2, 1), **flags}
    batch = TensorDict({"observation": torch.rand(4, 2, 3), "action": torch.ones(4, 2).long(), "next": after}, [4, 2])
    loss = DiscreteBCQLoss(network)
    SoftUpdate(loss, tau=0.1)
    loss(batch.reshape(-1))
    with pytest.raises(ValueError, match=r"the batch has size \(4, 2\), but a network has BatchNorm"):
        loss(batch)
