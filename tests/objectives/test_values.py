"""Value estimators: by name, class and instance, against sums by hand."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.objectives.utils import ValueEstimators
from torchrl.objectives.value import GAE, TD0Estimator, TD1Estimator, TDLambdaEstimator, ValueEstimatorBase

from torchrl_bcq import BCQLoss, make_replay_buffer
from torchrl_bcq.trainers.execution import Execution

from ..own_objective import OwnLoss
from .conftest import bcq_modules, make_loss, with_updater

REWARDS, VALUE, GAMMA = [1.0, 2.0, 3.0], 10.0, 0.5
TARGETS = {  # of a slice of three steps, at whose next states the value is 10
    "TD0": [1 + 0.5 * 10, 2 + 0.5 * 10, 3 + 0.5 * 10],
    "TD1": [1 + 0.5 * (2 + 0.5 * 8), 2 + 0.5 * 8, 8],
    # lambda 0.8: r + 0.5 * (0.2 * 10 + 0.8 * next return)
    "TDLambda": [1 + 0.5 * (2 + 0.8 * 6.2), 2 + 0.5 * (2 + 0.8 * 8), 3 + 0.5 * 10],
}
CLASSES = {"TD0": TD0Estimator, "TD1": TD1Estimator, "TDLambda": TDLambdaEstimator}


@pytest.fixture
def loss() -> OwnLoss:
    """All values are 10."""
    loss = make_loss("own")
    last = list(loss.target_critic_network_params.flatten_keys(".").items())[-2:]
    for _, tensor in last:
        tensor.data.zero_()
    dict(last)["critics.0.module.2.bias"].data.fill_(VALUE)
    return loss


@pytest.fixture
def trajectory(make_batch) -> TensorDict:
    """One slice of three steps that does not end."""
    batch = make_batch(1, 3)
    batch["next", "reward"] = torch.tensor(REWARDS).reshape(1, 3, 1)
    return batch


def targets(loss: OwnLoss, batch: TensorDict) -> list[float]:
    return loss.critic_loss(batch)[1]["target_value"].flatten().tolist()


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("kind", ["name", "class", "instance"])
def test_targets_by_hand(loss, trajectory, name, kind):
    decay = {"lmbda": 0.8} if name == "TDLambda" else {}
    if kind == "name":
        chosen = loss.make_value_estimator(ValueEstimators[name], gamma=GAMMA, **decay)
    elif kind == "class":
        chosen = loss.make_value_estimator(CLASSES[name], gamma=GAMMA, **decay)
    else:
        estimator = CLASSES[name](gamma=GAMMA, value_network=None, **decay)
        chosen = loss.make_value_estimator(estimator)
        assert loss.value_estimator is estimator
    assert chosen is loss
    summed = TDLambdaEstimator if name == "TD1" and kind != "instance" else CLASSES[name]
    assert isinstance(loss.value_estimator, summed)
    assert targets(loss, trajectory) == pytest.approx(TARGETS[name])


@pytest.mark.parametrize("kind", ["default", "class", "instance"])
def test_renamed_keys_reach_the_estimator(loss, trajectory, kind):
    loss.set_keys(reward="gain", terminated="end")
    if kind == "class":
        loss.make_value_estimator(TD0Estimator, gamma=GAMMA)
    elif kind == "instance":
        loss.make_value_estimator(TD0Estimator(gamma=GAMMA, value_network=None))
    else:
        loss.make_value_estimator(gamma=GAMMA)
    trajectory["next"].rename_key_("reward", "gain").rename_key_("terminated", "end")
    trajectory["next", "end"][0, 1] = True
    assert targets(loss, trajectory) == pytest.approx([6, 2, 8])


def test_default_discount(loss, trajectory):
    assert targets(loss, trajectory) == pytest.approx([10.9, 11.9, 12.9])
    loss.make_value_estimator(TD0Estimator)
    assert targets(loss, trajectory) == pytest.approx([10.9, 11.9, 12.9])


@pytest.mark.parametrize("estimator", [ValueEstimators.TDLambda, TDLambdaEstimator])
def test_discount_and_decay_have_the_precision_of_the_loss(loss, estimator):
    """TorchRL rounds them to float32, and a cast rounds buffers: in bfloat16, 0.999 would be 1."""
    loss.double().make_value_estimator(estimator, gamma=0.999, lmbda=0.7)
    assert loss.value_estimator.gamma.item() == 0.999
    assert loss.value_estimator.lmbda.item() == 0.7
    assert loss.bfloat16().value_estimator.gamma.item() == pytest.approx(0.999, rel=1e-6)
    assert loss.double().value_estimator.gamma.item() == 0.999


def test_the_discount_is_a_setting_that_loaded_weights_do_not_change(loss):
    other = make_loss("own").make_value_estimator(gamma=0.9)
    other.load_state_dict(loss.state_dict())
    assert other.value_estimator.gamma.item() == pytest.approx(0.9)
    assert not [name for name in loss.state_dict() if "gamma" in name]


def test_the_discount_of_an_own_estimator_is_a_plain_attribute(loss, trajectory):
    class OneStep(TD0Estimator):
        def __init__(self, *, gamma, **settings):
            super().__init__(gamma=gamma, **settings)
            del self.gamma
            self.gamma = gamma

    loss.make_value_estimator(OneStep, gamma=GAMMA)
    assert targets(loss, trajectory) == pytest.approx(TARGETS["TD0"])


@pytest.mark.parametrize("name", CLASSES)
def test_the_kind_of_estimator_is_remembered(loss, trajectory, name):
    """TorchRL's way to change only the discount."""
    decay = {"lmbda": 0.8} if name == "TDLambda" else {}
    loss.make_value_estimator(ValueEstimators[name], gamma=0.9, **decay)
    loss.make_value_estimator(loss.value_type, gamma=GAMMA, **decay)
    assert targets(loss, trajectory) == pytest.approx(TARGETS[name])


@pytest.mark.parametrize("name", CLASSES)
def test_estimators_by_their_names(loss, name):
    for written in (name, name.lower()):
        loss.make_value_estimator(written)
        assert type(loss.value_estimator) is {"TD0": TD0Estimator}.get(name, TDLambdaEstimator)
        assert loss.value_type == ValueEstimators[name]


@pytest.mark.parametrize(("decay", "equal"), [(0, "TD0"), (1e-8, "TD0"), (1, "TD1")])
def test_td_lambda_at_the_ends_of_its_range(loss, trajectory, decay, equal):
    loss.make_value_estimator(ValueEstimators.TDLambda, gamma=GAMMA, lmbda=decay)
    assert targets(loss, trajectory) == pytest.approx(TARGETS[equal])
    with pytest.raises(ValueError, match="lmbda is 1.5, expected a number from 0 to 1"):
        loss.make_value_estimator(ValueEstimators.TDLambda, lmbda=1.5)


@pytest.mark.parametrize("name", CLASSES)
def test_compiled_targets_by_hand(loss, trajectory, name):
    """TorchRL's TD1Estimator would give sums without a discount."""
    loss.make_value_estimator(ValueEstimators[name], gamma=GAMMA, **({"lmbda": 0.8} if name == "TDLambda" else {}))
    _, metadata = Execution(loss, compile={"backend": "eager"}).compute(trajectory, "critic_loss")
    assert metadata["target_value"].flatten().tolist() == pytest.approx(TARGETS[name])


def test_compiling_an_own_estimator_that_would_ignore_the_discount_is_refused(loss, trajectory):
    loss.make_value_estimator(TD1Estimator(gamma=GAMMA, value_network=None))
    with pytest.raises(ValueError, match="a compiled TD1Estimator ignores gamma; use ValueEstimators.TD1 or compile"):
        Execution(loss, compile=True).compute(trajectory, "critic_loss")


@pytest.mark.parametrize("estimator", [TD1Estimator, TDLambdaEstimator])
@pytest.mark.parametrize("kind", ["class", "instance"])
def test_multi_step_estimators_refuse_a_flat_batch(loss, trajectory, estimator, kind):
    """They would take its rows for one trajectory."""
    settings = {"gamma": GAMMA, **({"lmbda": 0.8} if estimator is TDLambdaEstimator else {})}
    if kind == "class":
        loss.make_value_estimator(estimator, **settings)
    else:
        loss.make_value_estimator(estimator(value_network=None, **settings))
    with pytest.raises(
        ValueError, match=r"the batch has size \(3,\), but TD\(1\) and TD\(lambda\) need a time dimension"
    ):
        loss.critic_loss(trajectory[0])


@pytest.mark.parametrize("kind", ["TD1", "TDLambda"])
def test_returns_of_several_agents_are_summed_over_time(loss, make_batch, kind):
    """The entries are [B, T, agents, ...], and the batch has the size [B, T], as in TorchRL's multi-agent layout."""
    batch = make_batch(1, 3, 2)
    batch["next", "reward"] = torch.tensor(REWARDS).reshape(1, 3, 1, 1).expand(1, 3, 2, 1)
    batch["next"].batch_size = batch.batch_size = [1, 3]
    loss.make_value_estimator(kind, gamma=GAMMA, **({"lmbda": 0.8} if kind == "TDLambda" else {}))
    assert targets(loss, batch) == pytest.approx([target for target in TARGETS[kind] for _ in range(2)])
    with pytest.raises(ValueError, match=r"the batch has size \(3,\), but TD\(1\) and TD\(lambda\) need a time"):
        targets(loss, batch[0])  # [3, agents, ...]: the agents are not steps


def test_estimators_of_advantages_are_refused(loss):
    loss.make_value_estimator(gamma=1 / 3)
    for kind in (ValueEstimators.GAE, "GAE"):
        with pytest.raises(NotImplementedError, match=r"ValueEstimators.GAE.* is not implemented for loss OwnLoss"):
            loss.make_value_estimator(kind, gamma=0.9)
        assert loss.double().value_estimator.gamma.item() == 1 / 3  # the one before stays, in full precision
    value = TensorDictModule(nn.Linear(3, 1), ["observation"], ["state_value"])
    for other in (GAE, GAE(gamma=0.9, lmbda=0.9, value_network=None)):
        with pytest.raises(NotImplementedError, match="GAE.value_estimate ignores the values that the loss computes"):
            loss.make_value_estimator(other, gamma=0.9, **({"lmbda": 0.9} if other is GAE else {}))
    with pytest.raises(KeyError):  # TorchRL: the key of the values is that of the value network
        loss.make_value_estimator(TD0Estimator(gamma=0.9, value_network=value))
    assert loss.value_estimator.gamma.item() == 1 / 3


def test_unknown_loss_function_is_refused():
    with pytest.raises(ValueError, match=r"loss_function is 'l3', expected one of \['l2', 'smooth_l1', 'l1'\]"):
        BCQLoss(*bcq_modules(), loss_function="l3")


@pytest.mark.parametrize(("name", "expected"), [("l2", 25 + 0.25), ("l1", 5 + 0.5), ("smooth_l1", 4.5 + 0.125)])
def test_distance_and_priority_by_hand(loss, make_batch, name, expected):
    """Errors of 5 and -0.5 in the two columns of one row."""
    loss.loss_function = name
    batch = make_batch(1)
    value, metadata = loss.td_distance(torch.tensor([[6.0, 0.5]]), torch.tensor([[1.0]]), batch)
    assert value.item() == expected
    assert metadata["td_error"].tolist() == [[5, 0.5]]
    assert metadata["target_value"].tolist() == [1]
    assert batch["td_error"].tolist() == [5]


@pytest.mark.parametrize("gamma", [-0.1, 1.5, float("nan")])
def test_a_discount_out_of_range_is_refused(loss, gamma):
    with pytest.raises(ValueError, match=f"gamma is {gamma}, expected a number from 0 to 1"):
        loss.make_value_estimator(gamma=gamma)


def test_rows_of_a_replay_buffer_are_not_a_trajectory(loss, trajectory):
    """A rollout names its dimension "time", but the rows of a batch are not in the order of time."""
    buffer = make_replay_buffer(trajectory[0].refine_names("time"), batch_size=3, seed=0)
    loss.make_value_estimator(ValueEstimators.TDLambda, gamma=GAMMA)
    with pytest.raises(ValueError, match="need a time dimension"):
        loss.critic_loss(buffer.sample())


@pytest.mark.parametrize("name", ["TD1", "TDLambda"])
def test_rows_of_several_steps_do_not_fit_estimators_of_several_steps(loss, trajectory, name):
    loss.make_value_estimator(CLASSES[name], gamma=GAMMA, **({"lmbda": 0.8} if name == "TDLambda" else {}))
    trajectory["steps_to_next_obs"] = torch.ones(1, 3, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="the batch has 'steps_to_next_obs', so its rewards are already sums"):
        targets(loss, trajectory)


@pytest.mark.parametrize("name", CLASSES)
def test_targets_keep_their_precision_under_autocast(loss, trajectory, name):
    """Sums of rewards of 1001 to 1003 would be multiples of 4 or 8 in bfloat16."""
    loss.make_value_estimator(ValueEstimators[name], gamma=GAMMA)
    trajectory["next", "reward"] += 1000
    expected = targets(loss, trajectory)
    with torch.autocast("cpu", torch.bfloat16):
        assert targets(loss, trajectory) == pytest.approx(expected, rel=1e-6)


def test_an_own_estimator_of_one_step_accepts_a_flat_batch(loss, trajectory):
    class OneStep(ValueEstimatorBase):
        def forward(self, tensordict, *args, **kwargs):
            raise NotImplementedError

        def value_estimate(self, tensordict, next_value=None, **kwargs):
            return tensordict["next", "reward"] + GAMMA * next_value

    loss.make_value_estimator(OneStep(value_network=None))
    assert targets(loss, trajectory.reshape(-1)) == TARGETS["TD0"]


@pytest.mark.parametrize("name", CLASSES)
def test_networks_in_bfloat16(make_batch, name):
    """The discount is not rounded: in bfloat16, 0.999 would be 1."""
    loss = with_updater(BCQLoss(*(module.to(torch.bfloat16) for module in bcq_modules())))
    loss.make_value_estimator(ValueEstimators[name], gamma=0.999)
    assert loss.value_estimator.gamma.item() == pytest.approx(0.999, rel=1e-6)
    batch = make_batch(2, 3).apply(lambda entry: entry.bfloat16() if entry.is_floating_point() else entry)
    if name == "TD0":
        batch["steps_to_next_obs"] = torch.ones(2, 3, 1, dtype=torch.long)
    value, metadata = loss.qvalue_loss(batch)
    assert metadata["target_value"].dtype == torch.bfloat16
    value.backward()
