from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import MLP, ValueOperator

from torchrl_bcq.modules import QEnsemble, Standardize
from torchrl_bcq.modules.normalization import Rescale


def critic(cells=(16, 8), activation=nn.ReLU, **kwargs) -> TensorDictModule:
    net = MLP(in_features=5, out_features=1, num_cells=list(cells), activation_class=activation, **kwargs)
    return TensorDictModule(net, in_keys=["observation", "action"], out_keys=["state_action_value"])


def one_by_one(critics, batch):
    return torch.stack([c(batch.clone())["state_action_value"].squeeze(-1) for c in critics], -1)


def assert_as_one_by_one(ensemble, critics, batch):
    value = ensemble(batch.clone())["state_action_value"]
    torch.testing.assert_close(value, one_by_one(critics, batch))
    gradients = torch.autograd.grad(value.square().sum(), ensemble.parameters())
    expected = torch.autograd.grad(one_by_one(critics, batch).square().sum(), ensemble.parameters())
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("shape", [(7,), (2, 3), (4, 1, 2)])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_batched_pass_equals_the_critics_one_by_one(make_batch, shape, activation):
    critics = [critic(activation=activation).double() for _ in range(3)]
    ensemble, batch = QEnsemble(critics), make_batch(*shape, dtype=torch.float64)
    assert ensemble._batched
    assert_as_one_by_one(ensemble, critics, batch)


@pytest.mark.parametrize("statistics_differ", [False, True])
def test_batched_pass_scales_as_each_critic_does(make_batch, statistics_differ):
    critics, batch = [critic() for _ in range(3)], make_batch(2, 3, dtype=torch.float64)
    for i, one in enumerate(critics):
        own = 1.0 + i * statistics_differ
        one.module.insert(0, Standardize(own * torch.arange(5), own * torch.arange(1, 6)))
        one.module.append(Rescale(10 * own))
        one.double()
    ensemble = QEnsemble(critics)
    assert ensemble._batched
    assert_as_one_by_one(ensemble, critics, batch)
    critics[1].module[-1].scale *= 3  # as a checkpoint might
    torch.testing.assert_close(ensemble(batch.clone())["state_action_value"], one_by_one(critics, batch))


def test_critics_of_different_architecture(make_batch):
    linear = ValueOperator(MLP(in_features=5, out_features=1, num_cells=[4]), in_keys=["observation", "action"])
    critics = [
        critic(),
        linear,
        critic(norm_class=nn.LayerNorm, norm_kwargs=[{"normalized_shape": n} for n in (16, 8)]),
    ]
    batch = make_batch(6)
    ensemble = QEnsemble(critics)
    assert not ensemble._batched
    torch.testing.assert_close(ensemble(batch.clone())["state_action_value"], one_by_one(critics, batch))


def test_hooks_and_activations_over_features_are_respected(make_batch):
    """Whatever the batched pass would miss is evaluated critic by critic."""
    batch = make_batch(6)
    doubled, normed = [critic(), critic()], [critic(), critic()]
    for one in doubled:
        one.module[0].register_forward_hook(lambda module, args, output: 2 * output)
    softmax = [critic(activation=nn.Softmax, activation_kwargs={"dim": 1}) for _ in range(2)]
    late = QEnsemble(normed)  # made before its hooks
    for one in normed:
        nn.utils.spectral_norm(one.module[0]).eval()
    for ensemble, critics in ((QEnsemble(doubled), doubled), (QEnsemble(softmax), softmax), (late, normed)):
        torch.testing.assert_close(ensemble(batch.clone())["state_action_value"], one_by_one(critics, batch))


class Half(nn.ReLU):
    """A ReLU with its own factor, which ``repr`` does not show."""

    factor = 1.0

    def forward(self, x):
        return self.factor * super().forward(x)


class Scaled(TensorDictModule):
    """A critic that multiplies the values of its network."""

    def forward(self, tensordict):
        written = super().forward(tensordict)
        return written.set("state_action_value", 100 * written["state_action_value"])


def test_layers_that_are_inserted_later_are_called(make_batch):
    ensemble, batch = QEnsemble([critic(), critic()]), make_batch(7)
    for one in ensemble.critics:
        one.module.insert(1, nn.BatchNorm1d(16))
    torch.testing.assert_close(ensemble(batch.clone())["state_action_value"], one_by_one(ensemble.critics, batch))
    only_one = QEnsemble([critic(), critic()])
    only_one.critics[1].module[1] = nn.Tanh()
    torch.testing.assert_close(only_one(batch.clone())["state_action_value"], one_by_one(only_one.critics, batch))


def test_subclasses_of_layers_and_critics_are_called(make_batch):
    batch, halves = make_batch(6), [critic(activation=Half) for _ in range(2)]
    halves[1].module[1].factor = 100.0
    scaled = [Scaled(one.module, one.in_keys, one.out_keys) for one in (critic(), critic())]
    for critics in (halves, scaled):
        ensemble = QEnsemble(critics)
        expected = one_by_one(critics, batch)
        torch.testing.assert_close(ensemble(batch.clone())["state_action_value"], expected)
        torch.testing.assert_close(ensemble.first(batch.clone())["state_action_value"], expected[:, :1])


def test_backward_hooks_are_called(make_batch):
    critics, seen = [critic(), critic()], []
    critics[1].module[2].register_full_backward_hook(lambda *_: seen.append(True))
    QEnsemble(critics)(make_batch(6))["state_action_value"].sum().backward()
    assert seen == [True]


def test_first_is_critic_zero(make_batch):
    critics, batch = [critic(), critic()], make_batch(6)
    ensemble = QEnsemble(critics)
    first = ensemble.first(batch.clone())["state_action_value"]
    torch.testing.assert_close(first, ensemble(batch.clone())["state_action_value"][:, :1])


@pytest.mark.parametrize("where", [lambda one: one, lambda one: one.module[0]], ids=["critic", "layer"])
def test_first_respects_hooks(make_batch, where):
    critics, batch = [critic(), critic()], make_batch(6)
    ensemble, handled = QEnsemble(critics), []
    plain = ensemble.first(batch.clone())["state_action_value"]
    where(critics[0]).register_forward_hook(lambda *_: handled.append(True))
    torch.testing.assert_close(ensemble.first(batch.clone())["state_action_value"], plain, rtol=0, atol=0)
    assert handled == [True]


def test_critics_handed_in_stay_live(make_batch):
    critics, batch = [critic(), critic()], make_batch(2)
    ensemble = QEnsemble(critics)
    before = ensemble(batch.clone())["state_action_value"]
    with torch.no_grad():
        critics[1].module[-1].bias += 2
    after = ensemble(batch.clone())["state_action_value"]
    torch.testing.assert_close(after - before, torch.tensor([[0.0, 2.0], [0.0, 2.0]]))


def test_equal_critics_are_refused():
    """Slip 3: a deep copy has the same weights, and mixing minimum and maximum has no effect."""
    first = critic()
    with pytest.raises(ValueError, match="critics 0 and 2 have equal weights"):
        QEnsemble([first, critic(), copy.deepcopy(first)])
    with pytest.raises(ValueError, match="critics 0 and 1 have equal weights"):
        QEnsemble([first, first])


def test_default_critics_differ_at_the_start(modules, make_batch):
    """Slip 3."""
    value = modules[2](make_batch(20))["state_action_value"]
    assert (value[:, 0] - value[:, 1]).abs().min() > 1e-3


def test_bad_lists_are_refused():
    with pytest.raises(ValueError, match="critics is empty"):
        QEnsemble([])
    other = TensorDictModule(nn.Linear(3, 1), in_keys=["observation"], out_keys=["state_action_value"])
    with pytest.raises(ValueError, match="critic 1 maps \\['observation'\\] to 'state_action_value'"):
        QEnsemble([critic(), other])


# BatchNorm, shared layers, images


class NormedAction(nn.Module):
    """``weight`` times the sum of the normalised action."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, observation, action):
        return self.weight * self.norm(action).sum(-1, keepdim=True)


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 3, 2)])
def test_batch_norm_sees_all_rows_as_one_batch(make_batch, shape):
    """The statistics by hand: mean and population variance over all batch dimensions, eps 1e-5, momentum 0.1."""
    keys = ["observation", "action"], ["state_action_value"]
    normed = [TensorDictModule(NormedAction(weight), *keys) for weight in (1.0, 2.0)]
    ensemble, batch = QEnsemble([*normed, critic()]), make_batch(*shape)
    rows = batch["action"].reshape(-1, 2)
    deviations = rows - rows.sum(0) / len(rows)
    expected = (deviations / (deviations.square().sum(0) / len(rows) + 1e-5).sqrt()).sum(-1).reshape(shape)
    value = ensemble(batch.clone())["state_action_value"]
    torch.testing.assert_close(value[..., :2], torch.stack([expected, 2 * expected], -1))
    torch.testing.assert_close(value[..., 2], one_by_one([ensemble.critics[2]], batch)[..., 0])
    torch.testing.assert_close(ensemble.first(batch.clone())["state_action_value"][..., 0], expected)
    # two updates of the first critic, one of the second
    mean = rows.sum(0) / len(rows)
    torch.testing.assert_close(normed[0].module.norm.running_mean, 0.19 * mean)
    torch.testing.assert_close(normed[1].module.norm.running_mean, 0.1 * mean)


def test_mlp_with_batch_norm_equals_its_rows_one_by_one(make_batch):
    critics = [critic(norm_class=nn.BatchNorm1d, norm_kwargs=[{"num_features": n} for n in (16, 8)]) for _ in range(2)]
    ensemble, batch = QEnsemble(critics), make_batch(50, 10)
    ensemble(batch.clone())  # moves the running statistics
    ensemble.eval()
    value = ensemble(batch.clone())["state_action_value"]
    torch.testing.assert_close(value, one_by_one(critics, batch.reshape(-1)).reshape(50, 10, 2))
    assert (ensemble(batch[3, 4].clone())["state_action_value"] - value[3, 4]).abs().max() < 1e-6


def test_other_critics_get_expanded_states_without_a_copy(make_batch):
    """Images of many candidates would fill the memory."""
    strides = []

    class Watching(nn.Module):
        def forward(self, observation, action):
            strides.append(observation.stride())
            return action[..., :1]

    critics = [TensorDictModule(Watching(), ["observation", "action"], ["value"]) for _ in range(2)]
    states = TensorDict({"observation": torch.randn(4, 3)}, [4]).unsqueeze(-1).expand(4, 10)
    states = TensorDict({"observation": states["observation"], "action": torch.randn(4, 10, 2)}, [4, 10])
    ensemble = QEnsemble(critics)
    ensemble.first(ensemble(states))
    assert strides == [(3, 0, 1)] * 3


def test_shared_layers_and_one_layer_under_two_names(make_batch):
    """With trunk h and heads w, v: values w h and v h; the trunk's gradient is the sum over both critics."""
    batch, critics = make_batch(6), [critic(), critic()]
    critics[1].module[0] = critics[0].module[0]
    critics[1].again = critics[1].module[2]
    ensemble = QEnsemble(critics)
    assert ensemble._batched
    assert_as_one_by_one(ensemble, critics, batch)


def test_critics_whose_common_layers_alone_have_weights_are_accepted():
    trunk = nn.Linear(2, 3)

    def head(layer: nn.Module) -> TensorDictModule:
        return TensorDictModule(nn.Sequential(trunk, layer), in_keys=["action"], out_keys=["value"])

    out = QEnsemble([head(nn.AvgPool1d(3)), head(nn.Linear(3, 1))])(action=torch.zeros(4, 2))
    torch.testing.assert_close(out[:, 0], trunk.bias.mean().expand(4))
