"""Recording: what a policy did, step by step, on disk, and what the command says."""

from __future__ import annotations

import argparse
import math
import re
import sys
from types import SimpleNamespace

import gymnasium
import h5py
import minari
import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule

from torchrl_bcq import load_hdf5, load_minari
from torchrl_bcq.cli import record as module
from torchrl_bcq.cli.errors import RunError
from torchrl_bcq.cli.record import add_parser, record, record_swing_up, swing_up, write_hdf5, write_minari

LOW, HIGH = [-1.0, 0.0], [3.0, 1.0]  # centre (1, 0.5), half-ranges (2, 0.5)


class Walk(gymnasium.Env):
    """``[position, time]``: an action's first number is added to the position, and is the reward; 4 is the end."""

    def __init__(self, bound=1.0):
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = gymnasium.spaces.Box(np.float32(LOW), np.float32(HIGH) * np.float32(bound), (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = np.zeros(2)
        return self.state.copy(), {}

    def step(self, action):
        self.state += [action[0], 1]
        return self.state.copy(), float(action[0]), bool(self.state[0] >= 4), False, {}


@pytest.fixture
def walk():
    """An environment that ends at position 4, or is cut off after 6 steps."""
    for name, settings in (("Walk-v0", {}), ("Boundless-v0", {"bound": np.inf})):
        gymnasium.register(name, f"{__name__}:Walk", max_episode_steps=6, kwargs=settings)
    yield "Walk-v0"
    for name in ("Walk-v0", "Boundless-v0"):
        del gymnasium.registry[name]


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "store"


def always(*action: float) -> TensorDictModule:
    return TensorDictModule(lambda x: torch.tensor(action).expand(*x.shape[:-1], 2), ["observation"], ["action"])


def ends(transitions, name: str) -> list[int]:
    return transitions["next", name].squeeze(-1).nonzero().squeeze(-1).tolist()


def test_swing_up_by_hand():
    states = {  # cos, sin, speed: torque
        (1.0, 0.0, 0.5): -1.0,  # upright: -2 * speed
        (math.cos(0.1), math.sin(0.1), 0.0): -1.0,  # -10 * angle
        (-1.0, 0.0, 0.5): 2.0,  # hangs: pumps with the speed
        (-1.0, 0.0, -0.5): -2.0,
        (0.0, 1.0, 8.0): -2.0,  # 64 / 6 > 5: too much energy, brakes
        (0.95, 0.0, 3.0): -2.0,  # at the limit
    }
    torques = swing_up(torch.tensor(list(states)), noise=0.0)
    assert torques.flatten().tolist() == pytest.approx(list(states.values()), abs=1e-6)


@pytest.fixture(scope="module")
def swings():
    return record_swing_up(steps=3000)


def test_swing_up_dataset_is_what_its_actions_do(swings):
    """A new environment for each level, their seeds 0, 1, 2, and whole episodes."""
    actions = iter(swings["action"].numpy())
    steps = []
    for seed in range(3):
        env = gymnasium.make("Pendulum-v1")
        env.reset(seed=seed)
        for _ in range(5):
            state = env.reset()[0]
            for _ in range(200):
                after, reward, *_ = env.step(next(actions))
                steps.append((state, after, [reward]))
                state = after
    keys = ("observation", ("next", "observation"), ("next", "reward"))
    for key, values in zip(keys, zip(*steps, strict=True), strict=True):
        assert torch.equal(swings[key], torch.tensor(np.stack(values), dtype=torch.float32)), key
    assert ends(swings, "truncated") == ends(swings, "done") == list(range(199, 3000, 200))


def test_noise_of_the_swing_up_dataset(swings):
    """Pumping is +-2 before the noise; it is turned round where the noise exceeds 4: P(z > 4 / sigma)."""
    pumps = swings["observation"][:, 0] < 0.9
    reversed_ = swings["action"] == -swing_up(swings["observation"], noise=0.0)
    levels = zip(reversed_.split(1000), pumps.split(1000), strict=True)
    shares = [part[pump].float().mean().item() for part, pump in levels]
    assert shares == pytest.approx([0.00003, 0.1587, 0.3446], abs=0.05)  # 3 standard errors


@pytest.mark.parametrize(("speed", "length", "terminated"), [(1.0, 4, [3, 7]), (0.0, 6, [])])
def test_ends_are_kept_and_the_last_episode_is_cut_off(walk, speed, length, terminated):
    transitions = record(walk, always(speed, 0.5), 10)
    cut = [9] if terminated else [5, 9]
    assert transitions.batch_size == (10,)
    assert ends(transitions, "terminated") == terminated
    assert ends(transitions, "truncated") == cut
    assert ends(transitions, "done") == sorted(terminated + cut)
    time = [step % length for step in range(10)]
    assert transitions["observation"].tolist() == [[speed * t, t] for t in time]
    assert transitions["next", "observation"].tolist() == [[speed * (t + 1), t + 1] for t in time]  # never the reset
    assert transitions["next", "reward"].flatten().tolist() == [speed] * 10
    assert transitions["observation"].dtype == torch.float32


def test_a_step_that_ends_an_episode_is_not_marked_as_cut_off(walk):
    assert ends(record(walk, always(1.0, 0.5), 8), "truncated") == []


def test_noise_is_in_half_ranges_and_keeps_the_bounds(walk):
    action = record(walk, always(1.0, 0.5), 2000, noise=0.25)["action"]
    assert action.mean(0).tolist() == pytest.approx([1.0, 0.5], abs=0.05)  # 4 standard errors of the first
    assert action.std(0).tolist() == pytest.approx([0.25 * 2.0, 0.25 * 0.5], rel=0.06)
    wild = record(walk, always(1.0, 0.5), 400, noise=20.0)["action"]
    assert (wild.amin(0).tolist(), wild.amax(0).tolist()) == (LOW, HIGH)
    assert torch.equal(record(walk, always(1.0, 0.5), 5)["action"], torch.tensor([[1.0, 0.5]] * 5))


def test_random_actions_are_uniform_over_their_bounds(walk):
    action = record(walk, None, 2000)["action"]
    assert action.amin(0).tolist() == pytest.approx(LOW, abs=0.03)
    assert action.amax(0).tolist() == pytest.approx(HIGH, abs=0.03)
    assert action.mean(0).tolist() == pytest.approx([1.0, 0.5], abs=0.1)
    assert action.std(0).tolist() == pytest.approx([4 / math.sqrt(12), 1 / math.sqrt(12)], rel=0.05)


def test_a_seed_decides_everything_and_disturbs_nobody():
    torch.manual_seed(7)
    one, after = record("Pendulum-v1", None, 30, seed=3), torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(after, torch.rand(1))
    again, other = record("Pendulum-v1", None, 30, seed=3), record("Pendulum-v1", None, 30, seed=4)
    assert (one == again).all()
    assert (one["observation"] != other["observation"]).any()
    assert (one["action"] != other["action"]).all()


def test_hdf5_is_in_d4rls_layout(walk, tmp_path):
    transitions = record(walk, None, 50)
    path = tmp_path / "new" / "walk.hdf5"
    write_hdf5(path, transitions, walk)
    with h5py.File(path) as file:
        assert dict(file.attrs) == {"env_id": "Walk-v0"}
        kinds = {name: (field.shape, field.dtype.kind, field.compression) for name, field in file.items()}
    pairs = dict.fromkeys(["observations", "actions", "next_observations"], ((50, 2), "f", "gzip"))
    flags = dict.fromkeys(["terminals", "timeouts"], ((50,), "b", "gzip"))
    assert kinds == {**pairs, **flags, "rewards": ((50,), "f", "gzip")}
    assert (load_hdf5(path).exclude("episode") == transitions).all()
    assert [entry.name for entry in path.parent.iterdir()] == ["walk.hdf5"]


def test_hdf5_that_fails_leaves_the_file_that_was_there(walk, tmp_path, monkeypatch):
    transitions, path = record(walk, None, 10), tmp_path / "walk.hdf5"
    write_hdf5(path, transitions[:5], walk)
    before = path.read_bytes()
    with pytest.raises(RunError, match=r"walk.hdf5 is there already; name another, or pass --overwrite.$"):
        write_hdf5(path, transitions, walk)
    with monkeypatch.context() as patch:
        patch.setattr(h5py.File, "create_dataset", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_hdf5(path, transitions, walk, overwrite=True)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["walk.hdf5"]
    write_hdf5(path, transitions, walk, overwrite=True)
    assert len(load_hdf5(path)) == 10


def test_minari_gives_back_what_was_recorded(store, monkeypatch):
    transitions = record("Pendulum-v1", None, 450)
    write_minari("mine/swing-v0", transitions, "Pendulum-v1", algorithm="none")
    assert (load_minari("mine/swing-v0").exclude("episode") == transitions).all()
    assert [len(episode) for episode in minari.load_dataset("mine/swing-v0")] == [200, 200, 50]
    with pytest.raises(RunError, match=r"^minari:mine/swing-v0 is there already"):
        write_minari("mine/swing-v0", transitions, "Pendulum-v1", algorithm="none")
    gymnasium.register("Nameless-v0", lambda: gymnasium.make("Pendulum-v1"))
    with pytest.raises(RunError, match=r"^Minari cannot keep mine/less-v0 \(.*entry_point.*\); record it into a file."):
        write_minari("mine/less-v0", transitions, "Nameless-v0", algorithm="none")
    del gymnasium.registry["Nameless-v0"]
    with monkeypatch.context() as patch:
        patch.setattr(minari.dataset.minari_storage.MinariStorage, "update_metadata", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_minari("mine/swing-v0", transitions, "Pendulum-v1", algorithm="none", overwrite=True)
    assert (load_minari("mine/swing-v0").exclude("episode") == transitions).all()  # the one that was there
    write_minari("mine/swing-v0", transitions[200:], "Pendulum-v1", algorithm="none", overwrite=True)
    assert len(load_minari("mine/swing-v0")) == 250
    assert [entry.name for entry in (store / "mine").iterdir() if entry.is_dir()] == ["swing-v0"]


def command(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["record", *arguments])
    args.run(args)


def test_without_an_environment_the_default_dataset_is_recorded_once(store, monkeypatch, capsys):
    monkeypatch.setattr(module, "record_swing_up", lambda: record_swing_up(steps=600))
    command()
    assert capsys.readouterr() == ("recorded minari:torchrl-bcq/pendulum/swing-up-v0\n", "")
    assert len(load_minari("torchrl-bcq/pendulum/swing-up-v0")) == 600
    monkeypatch.setattr(module, "record_swing_up", lambda: record_swing_up(steps=1200))
    command()
    assert capsys.readouterr().out.endswith("swing-up-v0 is there; --overwrite records it anew\n")
    assert len(load_minari("torchrl-bcq/pendulum/swing-up-v0")) == 600
    command("--overwrite")
    assert len(load_minari("torchrl-bcq/pendulum/swing-up-v0")) == 1200
    with pytest.raises(RunError, match=r"^--steps, --seed needs --env; without it, the default dataset is recorded as"):
        command("--seed", "1", "--steps", "5")


def test_random_actions_into_a_file_and_into_minari(walk, store, capsys):
    command("--env", walk, "--steps", "12", "--seed", "5", "--out", "walks/a.hdf5")
    transitions = record(walk, None, 12, seed=5)
    episodes, mean = len(ends(transitions, "done")), transitions["next", "reward"].sum().item()
    assert capsys.readouterr().out == (
        f"walks/a.hdf5: 12 steps of Walk-v0 in {episodes} episodes, mean return {mean / episodes:.1f}\n"
    )
    assert (load_hdf5("walks/a.hdf5").exclude("episode") == transitions).all()
    command("--env", walk, "--policy", "random", "--steps", "12", "--seed", "5", "--out", "minari:walks/a-v0")
    assert (load_minari("walks/a-v0").exclude("episode") == transitions).all()
    command("--env", walk, "--steps", "3")
    assert len(load_hdf5("Walk-v0.hdf5")) == 3


@pytest.fixture
def learned(monkeypatch):
    """Stands in for what loads a run's policy; gives the runs that were asked for."""
    asked, policies = [], {"good": always(1.0, 0.5)}
    policies["wide"] = TensorDictModule(torch.nn.Linear(5, 2), ["observation"], ["action"])
    policies["single"] = TensorDictModule(torch.nn.Linear(2, 1), ["observation"], ["action"])

    def load_policy(run, checkpoint="best", device="auto"):
        asked.append((str(run), checkpoint, device))
        return policies[run.name]

    monkeypatch.setitem(sys.modules, "torchrl_bcq.cli.run", SimpleNamespace(load_policy=load_policy))
    return asked


def test_a_learned_policy(walk, store, learned):
    command("--env", walk, "--policy", "runs/good", "--steps", "12", "--out", "a.hdf5")
    assert learned == [("runs/good", "best", "cpu")]
    assert load_hdf5("a.hdf5")["action"].tolist() == [[1.0, 0.5]] * 12
    command("--env", walk, "--policy", "runs/good", "--noise", "0.1", "--steps", "12", "--out", "b.hdf5")
    noisy = load_hdf5("b.hdf5")["action"]
    assert torch.equal(noisy, record(walk, always(1.0, 0.5), 12, noise=0.1)["action"])
    assert noisy.unique(dim=0).shape == (12, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--env Nonsense-v1", "environment 'Nonsense-v1' cannot be made: "),
        ("--env CartPole-v1", "CartPole-v1 has action space Discrete(2); only boxes of one dimension can be recorded."),
        ("--env Boundless-v0", "without bounds there is no range to draw from."),
        ("--env Walk-v0 --steps 0", "steps is 0, expected at least 1."),
        ("--env Walk-v0 --seed -1", "seed is -1, expected at least 0."),
        ("--env Walk-v0 --noise 0.1", "--noise needs a --policy to disturb"),
        ("--env Walk-v0 --policy runs/good --noise nan", "noise is nan, expected a number of half-ranges from 0."),
        ("--env Walk-v0 --policy runs/wide", "the policy of runs/wide does not fit the observations of Walk-v0: "),
        ("--env Walk-v0 --policy runs/single", "the policy of runs/single gives actions [1], and Walk-v0 takes [2]."),
        ("--env Walk-v0 --out walk.npz", "walk.npz is neither FILE.hdf5 nor minari:NAMESPACE/DATASET-v0."),
        ("--env Walk-v0 --out minari:walk", "'walk' is no id of Minari's; those look like 'mine/hopper/noisy-v0'."),
        ("--env Walk-v0 --out minari:../walk-v0", "'../walk-v0' is no id of Minari's"),
        ("--env Walk-v0 --out there.hdf5", "there.hdf5 is there already; name another, or pass --overwrite."),
        ("--env Walk-v0 --overwrite --out folder.h5", "folder.h5 is a folder; name a file."),
    ],
)
def test_refusals_come_before_anything_is_recorded(walk, store, learned, monkeypatch, arguments, message):
    (store.parent / "there.hdf5").touch()
    (store.parent / "folder.h5").mkdir()
    monkeypatch.setattr(module, "_collect", lambda *_: pytest.fail("it was recorded"))
    with pytest.raises(RunError, match=re.escape(message)):
        command(*arguments.split())
    assert {path.name for path in store.parent.iterdir()} <= {"there.hdf5", "folder.h5", "store"}
