"""Files of export_policy: the outputs of every kind of policy, and the description in the file."""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Binary, Bounded, Categorical, Composite, OneHot, Unbounded
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_bcq import (
    BCQPolicy,
    BehaviorCloningPolicy,
    DeterministicActor,
    DiscreteBCQPolicy,
    DiscreteCloningPolicy,
    ExportedPolicy,
    History,
    Normalization,
    export_policy,
    make_bcq_modules,
    make_cloning_modules,
    make_discrete_bcq_modules,
    make_discrete_cloning_modules,
)
from torchrl_bcq.errors import RunError
from torchrl_bcq.export import exported_policy, exporter

VECTOR, BOX = Unbounded((3,)), Bounded(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 4.0]), (2,))
FRAMES = Unbounded((2, 36, 36), dtype=torch.uint8)
NESTED = Composite(agent=Composite(place=Unbounded((3,)), speed=Unbounded((2,))))
MASKED = Composite(observation=VECTOR, action_mask=Binary(4, dtype=torch.bool))
SIZES = {"hidden": (8,), "vae_hidden": (8,)}


def bcq(observation=VECTOR, **settings) -> BCQPolicy:
    return BCQPolicy(*make_bcq_modules(observation, BOX, **SIZES, **settings), num_action_samples=5)


def scaled() -> BCQPolicy:
    rows = TensorDict({"observation": 3 + 5 * torch.randn(50, 3), "action": torch.ones(50, 2)}, [50])
    return bcq(normalization=Normalization.fit(rows, scale_rewards=False))


def trained_batch_norm() -> DeterministicActor:
    """BatchNorm after a few batches, in training mode; the file needs its running means."""
    policy = DeterministicActor(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.Dropout(0.5)), BOX)
    policy(2 + torch.randn(50, 3))
    return policy


POLICIES = {
    "bcq": bcq,
    "bcq without perturbation": lambda: BCQPolicy(
        *[part if number != 1 else None for number, part in enumerate(make_bcq_modules(VECTOR, BOX, **SIZES))]
    ),
    "bcq with a mixture": lambda: bcq(behavior="mixture"),
    "bcq with a flow, without perturbation": lambda: bcq(behavior="flow", phi=None),
    "bcq by the minimum": lambda: BCQPolicy(
        *make_bcq_modules(VECTOR, BOX, layer_norm=True, **SIZES), num_action_samples=5, choose_by="min"
    ),
    "bcq on scaled vectors": scaled,
    "bcq on nested entries": lambda: bcq(NESTED),
    "bcq on frames beside a vector": lambda: bcq(Composite(observation=VECTOR, pixels=FRAMES)),
    "bcq in float64": lambda: BCQPolicy(
        *make_bcq_modules(Unbounded((3,), dtype=torch.float64), BOX, dtype=torch.float64, **SIZES)
    ),
    "VAE": lambda: BehaviorCloningPolicy(make_bcq_modules(VECTOR, BOX, **SIZES)[0]),
    "cloning": lambda: make_cloning_modules(VECTOR, BOX, hidden=(8,))[0],
    "cloning with BatchNorm and dropout": trained_batch_norm,
    "discrete": lambda: DiscreteBCQPolicy(*make_discrete_bcq_modules(VECTOR, Categorical(4), hidden=(8,))),
    "discrete, one-hot": lambda: DiscreteBCQPolicy(*make_discrete_bcq_modules(VECTOR, OneHot(4), hidden=(8,))),
    "discrete, mask": lambda: DiscreteBCQPolicy(*make_discrete_bcq_modules(MASKED, Categorical(4), hidden=(8,))),
    "discrete, epsilon": lambda: DiscreteBCQPolicy(
        *make_discrete_bcq_modules(VECTOR, Categorical(4), hidden=(8,)), epsilon=0.9
    ),
    "discrete, frames": lambda: DiscreteBCQPolicy(*make_discrete_bcq_modules(FRAMES, Categorical(3))),
    "discrete cloning": lambda: DiscreteCloningPolicy(
        *make_discrete_cloning_modules(VECTOR, Categorical(4), hidden=(8,))
    ),
}


def states_of(policy, number: int) -> TensorDict:
    states = TensorDict({}, [number])
    for key in policy.in_keys:
        spec = (policy.observation_specs or {"observation": VECTOR})[key]
        if spec.dtype == torch.bool:
            value = torch.rand(number, *spec.shape) < 0.5
            value[:, 1] = True
        elif spec.dtype == torch.uint8:
            value = torch.randint(256, (number, *spec.shape), dtype=torch.uint8)
        else:
            value = torch.randn(number, *spec.shape, dtype=spec.dtype)
        states[key] = value
    return states


def arrays_of(states: TensorDict) -> dict:
    return {key: arrays_of(v) if isinstance(v, TensorDict) else v.numpy() for key, v in states.items()}


def greedy(policy, states: TensorDict, **latents) -> TensorDict:
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        return policy.eval()(states.clone(), **latents)


@pytest.mark.parametrize("name", POLICIES)
def test_the_file_gives_the_outputs_of_the_policy(name, tmp_path):
    policy = POLICIES[name]()
    if hasattr(policy, "set_outputs"):
        policy.set_outputs(value=True, candidates=True)
    made = export_policy(policy, tmp_path / "policy.onnx", None if policy.observation_specs else states_of(policy, 9))
    assert [*made.differences] == [1, 3, 257]
    assert max(made.differences.values()) < 1e-5
    exported = ExportedPolicy(made.path)
    exported._ranges = {}  # no warnings
    for number in (1, 7, 1000):
        states = states_of(policy, number)
        found = exported(arrays_of(states))
        expected = greedy(policy, states)
        assert [*found] == [key if isinstance(key, str) else ".".join(key) for key in policy.out_keys]
        for key, values in found.items():
            wanted = expected[key].numpy()
            assert (values.shape, values.dtype) == (wanted.shape, wanted.dtype)
            same = np.isclose(values, wanted, atol=1e-5, rtol=1e-5).reshape(number, -1).all(1)
            # rounding may choose another candidate of equal value
            assert same.mean() >= (0.998 if key == "action" else 1), key


def test_action_by_hand(tmp_path):
    """2 + tanh(x @ w), between the bounds 1 and 3."""
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[0.5, -1.0]])
    policy = DeterministicActor(layer, Bounded(1, 3, (1,)))
    states = TensorDict({"observation": torch.tensor([[-1.0, -1.0], [1.0, 3.0]])}, [2])
    made = export_policy(policy, tmp_path / "policy.onnx", states, action_spec=Bounded(1, 3, (1,)))
    action = ExportedPolicy(made.path).act([1.0, 2.0])
    assert (action.shape, action.dtype) == ((1,), np.float32)
    np.testing.assert_allclose(action, [2 + math.tanh(0.5 - 2)], rtol=1e-6)


def test_what_the_file_says_of_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "_CHUNK_ROWS", 1)
    policy = bcq()
    states = TensorDict({"observation": torch.tensor([[0.0, 1.0, 2.0], [4.0, -1.0, 2.0]])}, [2])
    facts = {"dataset": "swings.hdf5", "step": 20}
    made = export_policy(policy, tmp_path / "policy.onnx", states, action_spec=BOX, facts=facts)
    contract = ExportedPolicy(made.path).contract
    assert contract == made.contract
    assert (contract["dataset"], contract["step"], contract["policy"]) == ("swings.hdf5", 20, "BCQPolicy")
    port = {"name": "observation", "key": ["observation"], "shape": [3], "dtype": "float32"}
    assert contract["inputs"] == [{**port, "kind": "observation", "low": [0, -1, 2], "high": [4, 1, 2]}]
    port = {"name": "action", "key": ["action"], "shape": [2], "dtype": "float32"}
    assert contract["outputs"] == [{**port, "kind": "action", "low": [-1, 0], "high": [1, 4]}]
    names = {"torchrl_bcq": "torchrl-bcq", "onnxruntime": "onnxruntime", "torch": "torch"}
    assert {name: contract["versions"][name] for name in names} == {
        name: importlib.metadata.version(package) for name, package in names.items()
    }
    assert [*tmp_path.iterdir()] == [made.path]  # one file, without external data
    model = onnx.load(made.path)
    onnx.checker.check_model(model, full_check=True)
    assert not [node.op_type for node in model.graph.node if "Random" in node.op_type]

    again = export_policy(policy, tmp_path / "again.onnx", action_spec=BOX)
    assert again.contract["weights_sha256"] == contract["weights_sha256"]
    assert "low" not in again.contract["inputs"][0]  # random states have no range
    with torch.no_grad():
        next(policy.critics.parameters()).flatten()[0] += 1e-3
    other = export_policy(policy, tmp_path / "other.onnx")
    assert other.contract["weights_sha256"] != contract["weights_sha256"]


def test_discrete_actions_are_described(tmp_path):
    made = export_policy(POLICIES["discrete, mask"](), tmp_path / "policy.onnx", action_spec=Categorical(4))
    assert [port["kind"] for port in made.contract["inputs"]] == ["observation", "mask"]
    assert made.contract["inputs"][1]["dtype"] == "bool"
    (action,) = made.contract["outputs"]
    assert (action["n_actions"], action["one_hot"], action["dtype"], action["shape"]) == (4, False, "int64", [])


def test_the_policy_does_not_change(tmp_path):
    policy = bcq()
    policy.train()
    export_policy(policy, tmp_path / "policy.onnx")
    assert policy.training
    assert policy.out_keys == ["action"]


# Latents


def test_latents_as_an_input(tmp_path):
    policy = bcq()
    policy.set_outputs(value=False, candidates=True)
    made = export_policy(policy, tmp_path / "policy.onnx", latents=True)
    states = states_of(policy, 20)
    observation, latents = states["observation"].numpy(), torch.randn(20, *policy.latent_shape)
    exported = ExportedPolicy(made.path, seed=1)
    found = exported(observation, latents.numpy())
    expected = greedy(policy, states, latents=latents)
    np.testing.assert_allclose(found["candidates"], expected["candidates"], atol=1e-5)
    first, second = exported.act(observation), exported.act(observation)
    assert not np.array_equal(first, second)
    assert np.array_equal(ExportedPolicy(made.path, seed=1).act(observation), first)  # the same random numbers
    assert exported.act(observation[0], latents[0].numpy()).shape == (2,)
    drawn = ExportedPolicy(made.path)._draw(10_000)
    assert (np.abs(drawn).max(), drawn.dtype) == (0.5, np.float32)  # clipped, as 62% of normal numbers are
    assert 0.6 < (np.abs(drawn) == 0.5).mean() < 0.64


def test_a_policy_without_latents(tmp_path):
    with pytest.raises(ValueError, match="latents is True, but DeterministicActor has no latents"):
        export_policy(POLICIES["cloning"](), tmp_path / "policy.onnx", latents=True)
    assert not [*tmp_path.iterdir()]


# Short histories


@pytest.mark.parametrize("spec", [Unbounded((6,)), Unbounded((3, 36, 36), dtype=torch.uint8)], ids=["vector", "frames"])
def test_the_history_is_inside(spec, tmp_path):
    policy = DiscreteBCQPolicy(*make_discrete_bcq_modules(spec, Categorical(4), hidden=(8,)), return_candidates=True)
    policy.stack, size = 3, spec.shape[0] // 3
    made = export_policy(policy, tmp_path / "policy.onnx", states_of(policy, 9) if len(spec.shape) == 1 else None)
    assert made.contract["inputs"][0]["shape"] == [size, *spec.shape[1:]]
    assert max(made.differences.values()) < 1e-5
    exported, history = ExportedPolicy(made.path), History(3, -len(spec.shape))
    exported._ranges = {}
    for step in range(8):
        if step == 4:  # a new episode, in the second environment alone
            exported.reset(np.array([False, True]))
            history.reset(np.array([False, True]))
        raw = states_of(policy, 2)["observation"][:, :size]
        expected = greedy(policy, TensorDict({"observation": history(raw)}, [2]))
        found = exported(raw.numpy())
        np.testing.assert_allclose(found["action_value"], expected["action_value"], atol=1e-5)
        np.testing.assert_array_equal(found["action"], expected["action"])
    with pytest.raises(ValueError, match=r"there are 1 observations, but there were 2 in the call before; call reset"):
        exported.act(raw[0].numpy())
    exported.reset()
    assert exported.act(raw[0].numpy()).shape == ()


def test_history_by_hand(tmp_path):
    """tanh(100 x[t-1] + x[t]); the first observation of an episode is repeated."""
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[100.0, 1.0]])
    policy = DeterministicActor(layer, Bounded(-1, 1, (1,)))
    policy.stack = 2
    made = export_policy(policy, tmp_path / "policy.onnx", TensorDict({"observation": torch.randn(9, 2) / 100}, [9]))
    exported = ExportedPolicy(made.path)
    exported._ranges = {}
    for given, seen in (([0.001], 0.101), ([0.003], 0.103), ([-0.2], 0.1), (None, None), ([0.002], 0.202)):
        if given is None:
            exported.reset()
        else:
            np.testing.assert_allclose(exported.act(given), [math.tanh(seen)], rtol=1e-5)


# The file alone


def test_without_torch_and_without_this_package(tmp_path):
    """The module of ExportedPolicy is copied, and a process runs it in which nothing else can be imported."""
    policy = scaled()
    made = export_policy(policy, tmp_path / "policy.onnx")
    states = states_of(policy, 50)
    np.save(tmp_path / "states.npy", states["observation"].numpy())
    shutil.copy(exported_policy.__file__, tmp_path / "exported_policy.py")
    code = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchrl", "tensordict", "torchrl_bcq", "onnx", "onnxscript"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
import numpy as np
from exported_policy import ExportedPolicy
np.save("actions.npy", ExportedPolicy("policy.onnx").act(np.load("states.npy")))
try:
    import torch
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("torch is blocked\n", "")
    expected = greedy(policy, states)["action"].numpy()
    np.testing.assert_allclose(np.load(tmp_path / "actions.npy"), expected, atol=1e-4)
    assert made.path.stat().st_size < 100_000


# Errors


class Noisy(nn.Module):
    def forward(self, observation):
        return observation[..., :1] + torch.rand_like(observation[..., :1])


class Unsupported(nn.Module):
    def forward(self, observation):
        return torch.special.bessel_j0(observation[..., :1])


def test_a_file_that_differs_is_not_written(tmp_path):
    path = tmp_path / "policy.onnx"
    path.write_bytes(b"earlier")
    policy = TensorDictModule(Noisy(), ["observation"], ["action"])
    with pytest.raises(
        RunError, match=r"differ by [0-9.]+ of their range from those of the policy, more than 0.0001; no file is"
    ):
        export_policy(policy, path, TensorDict({"observation": torch.zeros(5, 3)}, [5]))
    assert path.read_bytes() == b"earlier"
    assert [*tmp_path.iterdir()] == [path]


def test_a_file_that_cannot_run_is_not_written(tmp_path, monkeypatch):
    def fail(self, feeds, number):
        return self._session.run(None, {})

    monkeypatch.setattr(ExportedPolicy, "_compute", fail)
    with pytest.raises(RunError, match="onnxruntime cannot run the file, so no file is written"):
        export_policy(bcq(), tmp_path / "policy.onnx")
    assert not [*tmp_path.iterdir()]


def test_a_layer_that_cannot_be_exported(tmp_path):
    policy = TensorDictModule(Unsupported(), ["observation"], ["action"])
    with pytest.raises(RunError, match="PyTorch cannot export a layer or operation of this policy: .*bessel"):
        export_policy(policy, tmp_path / "policy.onnx", TensorDict({"observation": torch.zeros(5, 3)}, [5]))


def test_observations_that_do_not_fit(tmp_path):
    policy = TensorDictModule(nn.Linear(3, 1), ["observation"], ["action"])
    with pytest.raises(ValueError, match=r"the shapes of \['observation'\] are not known; pass observations"):
        export_policy(policy, tmp_path / "policy.onnx")
    with pytest.raises(ValueError, match=r"observations lacks \['observation'\], which the policy reads"):
        export_policy(policy, tmp_path / "policy.onnx", TensorDict({"obs": torch.zeros(5, 3)}, [5]))


def test_without_onnx(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"to export a policy: pip install 'torchrl-bcq\[export\]'"):
        export_policy(bcq(), tmp_path / "policy.onnx")


# Unusual policies and arguments


def test_the_action_is_found_by_its_key(tmp_path):
    """As of TorchRL's ProbabilisticActor, whose first entries are those of the distribution."""
    module = TensorDictModule(lambda x: (x[:, :1] * 5, x[:, :1].clamp(-1, 1)), ["observation"], ["loc", "action"])
    states = TensorDict({"observation": torch.randn(9, 3)}, [9])
    made = export_policy(module, tmp_path / "policy.onnx", states, action_spec=Bounded(-1, 1, (1,)))
    assert [port["name"] for port in made.contract["outputs"]] == ["action", "loc"]
    exported = ExportedPolicy(made.path)
    row = states["observation"][0].numpy()
    np.testing.assert_allclose(exported.act(row), np.clip(row[:1], -1, 1))
    np.testing.assert_allclose(exported(row)["loc"], 5 * row[:1], rtol=1e-6)
    with pytest.raises(ValueError, match=r"writes \['loc', 'action'\], but not 'move'; pass another action_key"):
        export_policy(module, tmp_path / "policy.onnx", states, action_key="move")


def test_attributes_of_other_modules_are_not_read(tmp_path):
    network = nn.Linear(3, 1)
    network.stack = nn.Identity()
    module = TensorDictModule(network, ["observation"], ["action"])
    made = export_policy(module, tmp_path / "policy.onnx", TensorDict({"observation": torch.randn(9, 3)}, [9]))
    assert made.contract["stack"] == 1


def test_many_states_are_evaluated_in_parts(tmp_path):
    policy = BCQPolicy(*make_bcq_modules(VECTOR, BOX, **SIZES), num_action_samples=5, chunk_size=20)
    made = export_policy(policy, tmp_path / "policy.onnx", latents=True)
    exported, sizes = ExportedPolicy(made.path), []
    run = exported._session.run
    exported._session = SimpleNamespace(
        run=lambda names, feeds: sizes.append(len(feeds["latents"])) or run(names, feeds)
    )
    states, latents = torch.randn(10, 3), torch.randn(10, 5, policy.latents.shape[1])
    found = exported.act(states.numpy(), latents.numpy())
    assert sizes == [4, 4, 2]
    expected = policy(TensorDict({"observation": states}, [10]), latents=latents)["action"]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_latents_of_a_policy_on_frames(tmp_path):
    made = export_policy(bcq(FRAMES), tmp_path / "policy.onnx", latents=True)
    assert made.contract["inputs"][1]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "policy.pt"}, "path is 'policy.pt', expected the name of an ONNX file"),
        ({"path": "folder.onnx"}, "path is 'folder.onnx', which is a folder, expected the name of an ONNX file"),
        (
            {"observations": TensorDict({"observation": torch.zeros(4, 2, 3)}, [4, 2])},
            "observations has batch size (4, 2)",
        ),
        ({"observations": TensorDict({"observation": torch.zeros(0, 3)}, [0])}, "observations has batch size (0,)"),
        (
            {"observations": TensorDict({"observation": torch.tensor([[0.0, 1.0, math.inf]] * 300)}, [300])},
            "observations has values in 'observation' that are not finite",
        ),
        (
            {"observations": TensorDict({"observation": torch.zeros(9, 5)}, [9])},
            "observations has 'observation' of shape (9, 5), expected ('N', 3).",
        ),
        ({"facts": {"inputs": 3}}, "facts has ['inputs'], which the file already describes"),
        ({"facts": {"score": math.nan}}, "Out of range float values are not JSON compliant"),
        ({"policy": bcq().bfloat16()}, "the policy has dtype torch.bfloat16, which onnxruntime cannot run"),
        ({"policy": bcq(Composite(latents=VECTOR)), "latents": True}, "have the names ['latents']; rename"),
    ],
)
def test_arguments_that_are_refused(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("folder.onnx").mkdir()
    with pytest.raises(ValueError, match=re.escape(message)):
        export_policy(**{"policy": bcq(), "path": "policy.onnx", **arguments})
    assert [*tmp_path.iterdir()] == [tmp_path / "folder.onnx"]


def test_arguments_of_a_wrong_type(tmp_path):
    for policy, observations, message in (
        ("runs/first", None, "policy is a str, expected a TensorDict policy, such as load_policy(RUN)."),
        (torch.nn.Linear(3, 1), None, "policy is a Linear, expected a TensorDict policy"),
        (bcq(), np.zeros((10, 3)), "observations is a ndarray, expected a TensorDict of transitions."),
    ):
        with pytest.raises(TypeError, match=re.escape(message)):
            export_policy(policy, tmp_path / "policy.onnx", observations)


def test_home_folder_and_float64(tmp_path, monkeypatch):
    """The policy was converted after it was built."""
    monkeypatch.setenv("HOME", str(tmp_path))
    export_policy(bcq().double(), "~/policy.onnx")
    assert ExportedPolicy("~/policy.onnx").act([0.0, 1.0, 2.0]).dtype == np.float64


def test_bounds_that_are_not_finite_are_left_out(tmp_path):
    states = TensorDict({"observation": torch.randn(9, 3)}, [9])
    module = TensorDictModule(nn.Linear(3, 1), ["observation"], ["action"])
    for spec in (Unbounded((1,)), Bounded(-math.inf, 1, (1,))):
        made = export_policy(module, tmp_path / "policy.onnx", states, action_spec=spec)
        assert "low" not in made.contract["outputs"][0]


def test_the_description_is_json(tmp_path):
    made = export_policy(bcq(), tmp_path / "policy.onnx", latents=True)
    (entry,) = [p for p in onnx.load(made.path).metadata_props if p.key == "torchrl_bcq"]
    assert json.loads(entry.value) == made.contract
    assert made.contract["inputs"][1]["clip"] == 0.5
    assert Path(made.path).name == "policy.onnx"
