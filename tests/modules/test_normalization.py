"""Scaling inside the networks: the statistics, the layers, and how losses, copies and casts keep them."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.modules import MLP
from torchrl.objectives import SoftUpdate

from torchrl_bcq import BCQLoss, Normalization, Standardize, make_bcq_modules
from torchrl_bcq.modules.normalization import Rescale

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC

SMALL = {"hidden": (16, 16), "vae_hidden": (16, 16)}
FITTED = Normalization(
    {"observation": (torch.tensor([2.0, -1.0, 0.5]).double(), torch.tensor([4.0, 0.5, 1.0]).double())}, 10.0
)
STATISTICS = ("loc", "scale", "low", "high")


def transitions(observation, reward=(0.0, 1.0), dtype=torch.float32) -> TensorDict:
    observation = torch.as_tensor(observation, dtype=dtype)
    reward = torch.as_tensor(reward, dtype=dtype).repeat(len(observation))[: len(observation), None]
    return TensorDict({"observation": observation, "next": {"reward": reward}}, [len(observation)])


@pytest.fixture
def normalized():
    return make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, normalization=FITTED, **SMALL)


@pytest.fixture
def chunk_rows(request, monkeypatch):
    monkeypatch.setattr("torchrl_bcq.modules.normalization.CHUNK_ROWS", request.param)


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 4, 100], indirect=True)
@pytest.mark.parametrize("memmap", [False, True])
def test_statistics_by_hand(chunk_rows, memmap):
    data = transitions([[1, 10], [3, 10], [5, 10], [7, 10]], [0, 0, 0, 4])
    fitted = Normalization.fit(data.memmap() if memmap else data)
    loc, scale = fitted.observations["observation"]
    # variances: (9 + 1 + 1 + 9) / 4 = 5, 0 and (1 + 1 + 1 + 9) / 4 = 3
    torch.testing.assert_close(loc, torch.tensor([4.0, 10.0], dtype=torch.float64), rtol=1e-14, atol=0)
    torch.testing.assert_close(scale, torch.tensor([5**0.5, 1.0], dtype=torch.float64), rtol=1e-14, atol=0)
    assert fitted.reward_scale == pytest.approx(3**0.5, rel=1e-14)


@pytest.mark.parametrize("chunk_rows", [7, 1000], indirect=True)
def test_small_noise_on_a_large_offset(chunk_rows):
    """Sums of squares, or sums in float32, would lose the noise."""
    x = np.float32(1e6) + np.random.default_rng(0).normal(size=(1000, 2)).astype(np.float32)
    loc, scale = Normalization.fit(transitions(x)).observations["observation"]
    np.testing.assert_allclose(loc, x.mean(0, dtype=np.float64), rtol=1e-14)
    np.testing.assert_allclose(scale, x.std(0, dtype=np.float64), rtol=1e-10)
    scaled = Standardize(loc.float(), scale.float())(torch.from_numpy(x))
    exact = (x.astype(np.float64) - loc.numpy()) / scale.numpy()
    np.testing.assert_allclose(scaled, exact, atol=0.04)  # half a float32 at 1e6


def test_columns_that_do_not_vary_are_not_stretched():
    """Zeros, a constant, neighbouring floats and denormals get scale 1; half a unit at 1e6 is more than rounding."""
    million = np.float32(1e6)
    even = [0, 1e6, million, 0.0, million - 0.5]
    odd = [0, 1e6, np.nextafter(million, np.float32(np.inf)), 1e-40, million + 0.5]
    fitted = Normalization.fit(transitions(np.array([even, odd] * 4, np.float32), reward=[1e4]))
    loc, scale = fitted.observations["observation"]
    assert scale.tolist() == [1, 1, 1, 1, 0.5]
    assert fitted.reward_scale == 1
    networks = make_bcq_modules(Unbounded((5,)), ACTION_SPEC, normalization=fitted, **SMALL)
    unseen = TensorDict({"observation": loc.float() + torch.tensor([1e3, -1e3, 1e3, -1e3, 0])}, [])
    value = networks[2](networks[1](networks[0].decode(unseen)))["state_action_value"]
    assert value.abs().max() < 1e5


def test_scaling_can_be_switched_off():
    data = transitions([[1, 10], [3, 20]], [0, 4])
    assert Normalization.fit(data).reward_scale == 2
    fitted = Normalization.fit(data.exclude("next"), scale_rewards=False)
    assert [part.tolist() for part in fitted.observations["observation"]] == [[2, 15], [1, 5]]
    assert fitted.reward_scale == 1


def test_keys_of_your_own():
    spec = Composite(arm=Composite(angle=Unbounded((2,))), goal=Unbounded((1,)))
    data = TensorDict(
        {
            "arm": {"angle": torch.tensor([[0.0, 2], [2, 4]])},
            "goal": torch.tensor([[5.0], [7]]),
            "next": {"reward": torch.ones(2, 1)},
        },
        [2],
    )
    fitted = Normalization.fit(data, observation_keys=[("arm", "angle"), "goal"])
    assert fitted.observations.keys() == Normalization.identity(spec).observations.keys()
    vae, _, _ = make_bcq_modules(spec, ACTION_SPEC, normalization=fitted, **SMALL)
    assert vae.observation_keys == [("arm", "angle"), "goal"]
    assert vae.encoder[0].loc.tolist() == [1, 3, 6, 0, 2]  # those of the observations, then the actions' centres
    with pytest.raises(
        ValueError, match=r"the networks read \('arm', 'angle'\), but the normalization was fitted on \['observation'\]"
    ):
        make_bcq_modules(spec, ACTION_SPEC, normalization=FITTED)
    with pytest.raises(ValueError, match="'observation' has 4 features, but the normalization was fitted on 3"):
        make_bcq_modules(Unbounded((4,)), ACTION_SPEC, normalization=FITTED)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("chunk_rows", [2, 100], indirect=True)
def test_rows_that_are_not_finite_are_counted(bad, chunk_rows):
    data = transitions(torch.ones(9, 2))
    data["observation"][5:7, 1] = bad
    with pytest.raises(ValueError, match=r"'observation' has 2 rows \(first: 5\) that are not finite; drop or repair"):
        Normalization.fit(data)
    data = transitions(torch.ones(9, 2))
    data["next", "reward"][8] = bad
    with pytest.raises(ValueError, match=r"\('next', 'reward'\) has 1 row \(first: 8\) that are not finite"):
        Normalization.fit(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (transitions(torch.ones(2, 1)).exclude("next"), r"lack \[\('next', 'reward'\)\]; they hold \['observation'\]"),
        (
            transitions(torch.ones(2, 3, 8, 8)),
            r"shape \(2, 3, 8, 8\) and dtype torch.float32, expected floats \[N, D\]",
        ),
        (
            transitions(torch.ones(2, 1), [1, 2], torch.int64),
            r"'observation' has .* dtype torch.int64, expected floats",
        ),
        (transitions(torch.ones(0, 1)), r"batch size \(0,\), expected \[N\] with N at least 1"),
        (TensorDict({"observation": torch.ones(2, 3, 1)}, [2, 3]), r"batch size \(2, 3\), expected \[N\]"),
    ],
)
def test_transitions_that_cannot_be_fitted(data, message):
    with pytest.raises(ValueError, match=message):
        Normalization.fit(data)


def test_layers_refuse_bad_statistics_and_inputs():
    one = torch.ones(2)
    with pytest.raises(ValueError, match=r"loc has shape \(2,\), scale has \(1,\); both must be \[D\]"):
        Standardize(one, torch.ones(1))
    with pytest.raises(ValueError, match=r"scale is \[0.0, nan\] in columns \[1, 2\]"):
        Standardize(torch.ones(3), torch.tensor([1.0, 0.0, float("nan")]))
    with pytest.raises(ValueError, match="loc is .* must be finite"):
        Standardize(torch.tensor([0.0, float("inf")]), one)
    with pytest.raises(ValueError, match=r"input has shape \(5, 1\), but the layer scales 2 features"):
        Standardize(one, one)(torch.ones(5, 1))
    with pytest.raises(ValueError, match=r"scale is \[0.0\] in columns \[0\] \(in torch.float32\)"):
        Rescale(1e-50)  # positive in float64 alone


def test_inputs_of_the_networks_by_hand(normalized):
    vae, actor, critics = normalized
    observation, action = torch.tensor([[2.0, -1.0, 0.5], [6.0, 0.0, 1.5]]), torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    seen = torch.tensor([[0.0, 0, 0, 0, 0], [1, 2, 1, 1, -1]])
    for net in (vae.encoder, actor.network, *(critic.module for critic in critics.critics)):
        torch.testing.assert_close(net[0](torch.cat([observation, action], -1)), seen)
    latent = torch.randn(2, 4)
    read = vae.decoder[0](torch.cat([observation, latent], -1))
    torch.testing.assert_close(read, torch.cat([seen[:, :3], latent], -1), rtol=0, atol=0)
    for critic in critics.critics:
        assert critic.module[-1](torch.tensor([[3.0]])).item() == 30


def test_without_normalization_the_networks_are_as_before():
    """No layer is added, the weights are drawn in the same order, and scaling changes none of them."""
    torch.manual_seed(3)
    plain = make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, **SMALL)
    torch.manual_seed(3)
    sizes = [(5, 8), (7, 2), (5, 2), (5, 1), (5, 1)]  # encoder, decoder, actor, two critics
    by_hand = [MLP(in_features=i, out_features=o, num_cells=[16, 16], activation_class=torch.nn.ReLU) for i, o in sizes]
    nets = [plain[0].encoder, plain[0].decoder, plain[1].network, *(critic.module for critic in plain[2].critics)]
    for net, expected in zip(nets, by_hand, strict=True):
        assert [type(layer) for layer in net] == [type(layer) for layer in expected]
        torch.testing.assert_close(net.state_dict(), expected.state_dict(), rtol=0, atol=0)
    torch.manual_seed(3)
    scaled = make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, normalization=FITTED, **SMALL)
    for one, other in zip(plain, scaled, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_identity_on_a_unit_box_is_the_papers_network(make_batch):
    losses, batch, unit = [], make_batch(6), Bounded(-1, 1, (2,))
    for normalization in (None, Normalization.identity(OBSERVATION_SPEC)):
        torch.manual_seed(0)
        loss = BCQLoss(*make_bcq_modules(OBSERVATION_SPEC, unit, normalization=normalization, **SMALL))
        SoftUpdate(loss, tau=0.005)
        losses.append(loss(batch.clone()))
    torch.testing.assert_close(losses[0], losses[1])


def test_dtype_device_copies_and_pickles(normalized, make_batch):
    names = [name for name in normalized[2].state_dict() if name.endswith(STATISTICS)]
    assert len(names) == 6
    double = make_bcq_modules(
        Unbounded((3,), dtype=torch.float64), ACTION_SPEC, normalization=FITTED, dtype=torch.float64, **SMALL
    )
    meta = make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, normalization=FITTED, device="meta", **SMALL)
    for wide, empty in zip(double, meta, strict=True):
        assert {value.dtype for value in wide.state_dict().values()} == {torch.float64}
        assert {value.device.type for value in empty.state_dict().values()} == {"meta"}
    batch = make_batch(5)
    expected = normalized[2](batch.clone())["state_action_value"]
    for twin in (copy.deepcopy(normalized[2]), pickle.loads(pickle.dumps(normalized[2]))):
        assert torch.equal(twin(batch.clone())["state_action_value"], expected)
    cast = copy.deepcopy(normalized[2]).double()(batch.double())["state_action_value"]
    torch.testing.assert_close(cast.float(), expected)


def test_loss_keeps_the_statistics(normalized, make_batch):
    """Also in its targets, after the updater's steps and after the parameters are reset."""
    loss = BCQLoss(*normalized)
    updater = SoftUpdate(loss, tau=0.3)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    statistics = [name for name in before if name.endswith(STATISTICS)]
    weights = [name for name in before if name.endswith(("weight", "bias"))]
    assert len(statistics) == 27  # the VAE's 7, and twice, with targets, the actor's 4 and the critics' 6
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        sum(value for name, value in loss(make_batch(8)).items() if name.startswith("loss_")).backward()
        optimizer.step()
        updater.step()
    assert not any(torch.equal(loss.state_dict()[name], before[name]) for name in weights)
    loss.reset_parameters_recursive()
    assert all(torch.equal(loss.state_dict()[name], before[name]) for name in statistics)


@pytest.mark.filterwarnings("ignore:torch._dynamo.config.inline_inbuilt_nn_modules:FutureWarning")  # read by tensordict
@pytest.mark.parametrize("name", ["vae", "qvalue", "actor"])
def test_losses_compile_as_one_graph(normalized, make_batch, name):
    loss, batch = BCQLoss(*normalized), make_batch(6)
    SoftUpdate(loss, tau=0.005)
    noise = torch.randn(6, 10, 4) if name == "qvalue" else torch.randn(6, 4)
    eager = getattr(loss, f"{name}_loss")(batch.clone(), noise)[0]
    torch._dynamo.reset()
    compiled = torch.compile(getattr(loss, f"{name}_loss"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch.clone(), noise)[0], eager)


def test_other_types_of_normalization_are_refused():
    with pytest.raises(
        TypeError, match=r"^normalization is a bool, expected the result of Normalization.fit\(transitions\), or"
    ):
        make_bcq_modules(Unbounded((3,)), Bounded(-1, 1, (2,)), normalization=True)
