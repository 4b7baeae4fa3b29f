"""Metrics of a policy: numbers that can be worked out by hand, and no trace of them in the training."""

from __future__ import annotations

import functools
import logging

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Binary, Composite, Unbounded
from torchrl.envs import EnvBase, SerialEnv
from torchrl.record.loggers import CSVLogger

from torchrl_bcq import BCQLoss, BCQPolicy, make_bcq_modules
from torchrl_bcq.functional import clipped_normal
from torchrl_bcq.trainers.metrics import DatasetMetrics, EnvironmentMetrics, evaluate, summarize

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC
from .conftest import assert_same_run, logged, make_trainer, soft_update


class Stairs(EnvBase):
    """An episode of ``height`` steps; step t is worth t, or, by the action, ``t * action[1]``.

    Observes the number of steps made, a number drawn when the episode began, and the height.
    """

    def __init__(self, height: int, by_action: bool = False) -> None:
        super().__init__()
        self.height = height
        self.by_action = by_action
        self.observation_spec = Composite(observation=OBSERVATION_SPEC.clone())
        self.action_spec = ACTION_SPEC.clone()
        self.reward_spec = Unbounded((1,))
        self.full_done_spec = Composite(
            {name: Binary(1, (1,), dtype=torch.bool) for name in ("done", "terminated")}  # type: ignore[arg-type]
        )
        self.generator = torch.Generator()
        self.steps_made = 0

    def _reset(self, tensordict=None, **kwargs) -> TensorDict:
        self.made, self.drawn = 0, torch.rand((), generator=self.generator)
        return TensorDict({"observation": self._observe()})

    def _step(self, tensordict) -> TensorDict:
        self.made += 1
        self.steps_made += 1
        reward = torch.tensor([float(self.made)]) * (tensordict["action"][1] if self.by_action else 1)
        done = torch.tensor([self.made >= self.height])
        return TensorDict({"observation": self._observe(), "reward": reward, "done": done, "terminated": done})

    def _observe(self) -> torch.Tensor:
        return torch.tensor([self.made, self.drawn, self.height], dtype=torch.float32)

    def _set_seed(self, seed: int | None) -> None:
        self.generator.manual_seed(seed)


def stairs(*heights: int, by_action: bool = False) -> SerialEnv:
    return SerialEnv(len(heights), [functools.partial(Stairs, height, by_action) for height in heights])


class Watching(nn.Module):
    """Acts by a rule, and remembers in which mode it acted and what it saw."""

    def __init__(self, rule=lambda observation: torch.full((*observation.shape[:-1], 2), 0.5)) -> None:
        super().__init__()
        self.rule = rule
        self.modes = []
        self.seen = []

    def forward(self, tensordict):
        self.modes.append(self.training)
        self.seen.append(tensordict["observation"].clone())
        return tensordict.set("action", self.rule(tensordict["observation"]))


@pytest.fixture
def policy(modules) -> BCQPolicy:
    return BCQPolicy(*modules, num_action_samples=5)


# --- episodes ---


def test_returns_lengths_and_discounted_returns_by_hand():
    """1; 1 + 2 + 3; 1 + 2 + 3 + 4; at a discount of one half 1; 1 + 2/2 + 3/4; and 4/8 more."""
    found = evaluate(stairs(1, 3, 4), Watching(), gamma=0.5)
    assert found.batch_size == (3,)
    assert found["return"].tolist() == [1, 6, 10]
    assert found["length"].tolist() == [1, 3, 4]
    assert found["discounted_return"].tolist() == [1, 2.75, 3.25]
    assert set(found.keys()) == {"return", "length", "discounted_return"}


def test_the_policy_acts():
    """Twice the reward by an action of 2; without a policy the mean of uniform ones in [0, 4]."""
    found = evaluate(stairs(3, by_action=True), Watching(lambda o: torch.full((*o.shape[:-1], 2), 2.0)))
    assert found["return"].tolist() == [12]
    found = evaluate(stairs(*[1] * 100, by_action=True), None)
    assert found["return"].mean().item() == pytest.approx(2, abs=0.5)
    assert found["return"].unique().numel() == 100
    assert 0 <= found["return"].min() < 0.5 < 3.5 < found["return"].max() <= 4


def test_the_estimate_is_the_first_critics_value_of_the_first_action(modules):
    policy, critics = Watching(lambda observation: observation[..., :2] + 0.25), modules[2]
    found = evaluate(stairs(2, 5), policy, critics=critics)
    first = policy.seen[0]
    inputs = TensorDict({"observation": first, "action": first[:, :2] + 0.25}, [2])
    expected = critics(inputs)["state_action_value"]
    torch.testing.assert_close(found["value_estimate"], expected[:, 0].detach(), rtol=0, atol=1e-6)
    assert (expected[:, 0] - expected[:, 1]).abs().min() > 1e-3  # the critics differ
    assert found["value_estimate"].requires_grad is False


def test_the_random_state_is_left_alone_and_the_seed_decides(policy):
    envs = stairs(2, 3, by_action=True)
    state = torch.get_rng_state()
    runs = [evaluate(envs, policy, seed=seed)["return"].tolist() for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(7)
    assert evaluate(envs, policy, seed=3)["return"].tolist() == runs[0] == runs[1] != runs[2]


def test_the_seed_decides_initial_states_too():
    starts = []
    for seed in (3, 3, 4):
        policy = Watching()
        evaluate(stairs(1, 1), policy, seed=seed)
        starts.append(policy.seen[0][:, 1].tolist())
    assert starts[0] == starts[1] != starts[2]
    assert starts[0][0] != starts[0][1]  # the environments differ from each other


def test_a_stop_breaks_the_episodes_off():
    env, asked = Stairs(10), []
    found = evaluate(SerialEnv(1, lambda: env), Watching(), should_stop=lambda: asked.append(1) or len(asked) > 3)
    assert found is None
    assert len(asked) == 4
    assert env.steps_made <= 5


@pytest.mark.parametrize("training", [True, False])
def test_the_policy_acts_in_eval_mode_and_gets_its_mode_back(training):
    policy = Watching().train(training)
    evaluate(stairs(2), policy)
    assert policy.modes == [False, False]
    assert policy.training is training
    evaluate(stairs(2), policy, should_stop=lambda: True)
    assert policy.training is training
    assert torch.is_grad_enabled()


def test_an_episode_does_not_begin_anew_while_others_run():
    found = evaluate(stairs(1, 9), Watching())
    assert found["length"].tolist() == [1, 9]
    assert found["return"].tolist() == [1, 45]


# --- their means ---


def test_summary_by_hand():
    """Between a random 2 and an expert's 10 a mean of 4 is a quarter of the way."""
    episodes = TensorDict({"return": torch.tensor([1.0, 7.0]), "length": torch.tensor([1, 2])}, [2])
    assert summarize(episodes) == {"return": 4, "return_std": 3, "episode_length": 1.5}
    assert summarize(episodes, (2, 10)) == {
        "return": 4,
        "normalized_score": 25,
        "return_std": 3,
        "episode_length": 1.5,
    }
    episodes["discounted_return"], episodes["value_estimate"] = torch.tensor([[1.0, 2.0], [5.0, 6.0]])
    assert summarize(episodes)["value_estimate"] == 5.5
    assert summarize(episodes)["discounted_return"] == 1.5
    assert next(iter(summarize(episodes))) == "return"  # the one on the progress bar
    assert summarize(episodes[:1])["return_std"] == 0


# --- in the training ---


def run_with(make_batch, tmp_path, name: str, hook=None, total_steps: int = 25, start=None, **settings):
    """A training run with a hook, made from the trainer, and what it logs."""
    torch.manual_seed(0)
    trainer = make_trainer(
        make_batch(50), total_steps, logger=CSVLogger(name, log_dir=str(tmp_path)), log_interval=5, **settings
    )
    if hook is not None:
        hook(trainer).register(trainer)
    if start is not None:
        trainer.load_from_file(start)
    trainer.train()
    return trainer, logged(tmp_path / name)


def policy_of(trainer) -> BCQPolicy:
    loss = trainer.loss_module
    return BCQPolicy(loss.vae_network, loss.actor_network, loss.qvalue_network, num_action_samples=5)


def environment_metrics(trainer) -> EnvironmentMetrics:
    settings = {"critics": trainer.loss_module.qvalue_network, "reference_scores": (0, 10), "gamma": 0.5}
    return EnvironmentMetrics(stairs(1, 3, 4), policy_of(trainer), interval=10, **settings)


def test_environment_metrics_at_the_start_at_multiples_and_at_the_end(make_batch, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="torchrl_bcq"):
        _, lines = run_with(make_batch, tmp_path, "log", environment_metrics)
    mean = (1 + 6 + 10) / 3
    for name, expected in {
        "return": mean,
        "normalized_score": 10 * mean,
        "return_std": (((1 - mean) ** 2 + (6 - mean) ** 2 + (10 - mean) ** 2) / 3) ** 0.5,
        "episode_length": 8 / 3,
        "discounted_return": (1 + 2.75 + 3.25) / 3,
    }.items():
        rows = [line.split(",") for line in lines[name]]
        assert [int(step) for step, _ in rows] == [0, 10, 20, 25]
        assert [float(value) for _, value in rows] == pytest.approx([expected] * 4)
    estimates = [float(line.split(",")[1]) for line in lines["value_estimate"]]
    assert len(set(estimates)) == 4  # the critics learn
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("torchrl_bcq")]
    assert [message.split(":")[0] for message in messages] == ["step 0", "step 10", "step 20", "step 25"]
    assert messages[0].startswith("step 0: return 5.667, normalized_score 56.67, ")


def dataset_metrics(trainer) -> DatasetMetrics:
    return DatasetMetrics(trainer.loss_module, policy_of(trainer), trainer._replay.replay_buffer[:], interval=10)


@pytest.mark.parametrize("hook", [environment_metrics, dataset_metrics])
def test_a_run_that_is_measured_is_bit_by_bit_the_same_run(make_batch, tmp_path, hook):
    plain, plain_lines = run_with(make_batch, tmp_path, "plain")
    measured, measured_lines = run_with(make_batch, tmp_path, "measured", hook)
    assert_same_run(measured, plain)
    assert measured_lines.keys() > plain_lines.keys()
    assert {name: measured_lines[name] for name in plain_lines} == plain_lines
    assert all(not parameter.isnan().any() for parameter in measured.loss_module.parameters())


@pytest.mark.parametrize("hook", [environment_metrics, dataset_metrics])
def test_a_run_with_a_break_logs_the_same_metrics(make_batch, tmp_path, hook):
    _, whole = run_with(make_batch, tmp_path, "whole", hook, 30)
    run_with(make_batch, tmp_path, "broken", hook, 20, save_trainer_file=tmp_path / "checkpoint")
    _, broken = run_with(make_batch, tmp_path, "broken", hook, 30, start=tmp_path / "checkpoint")
    assert broken == whole


def test_an_evaluation_that_is_broken_off_logs_nothing(make_batch, tmp_path):
    def stopping(trainer) -> EnvironmentMetrics:
        def rule(observation):
            if trainer.collected_frames == 10:
                trainer.request_stop("a test")
            return observation[..., :2]

        return EnvironmentMetrics(stairs(3), Watching(rule), interval=10)

    trainer, lines = run_with(make_batch, tmp_path, "log", stopping)
    assert trainer.collected_frames == 10
    assert [line.split(",")[0] for line in lines["return"]] == ["0"]


@pytest.mark.parametrize("kind", ["environment", "dataset"])
def test_intervals_that_do_not_fit_are_refused(make_batch, policy, kind):
    trainer = make_trainer(make_batch(50))  # ticks of 10

    def make(interval: int):
        if kind == "environment":
            return EnvironmentMetrics(stairs(1), policy, interval=interval)
        return DatasetMetrics(trainer.loss_module, policy, make_batch(5), interval=interval)

    name = f"{kind.capitalize()}Metrics"
    with pytest.raises(ValueError, match=f"the interval of {name} is 25, no multiple of log_interval 10; change one"):
        make(25).register(trainer)
    make(30).register(trainer)
    with pytest.raises(ValueError, match="interval is 0, expected at least 1 gradient step"):
        make(0)


# --- without an environment ---


def with_targets(*networks) -> BCQLoss:
    loss = BCQLoss(*networks)
    soft_update(loss)
    return loss


@pytest.fixture
def transitions(make_batch) -> TensorDict:
    """Three episodes, of 3, 2 and 4 steps; the second ends for good, the others are cut."""
    transitions = make_batch(9)
    transitions["next", "done"][[2, 4, 8]] = True
    transitions["next", "terminated"][4] = True
    return transitions


class Constant(nn.Module):
    """Draws nothing, so that any other computation meets the same numbers."""

    def forward(self, tensordict):
        return tensordict.set("action", torch.tensor([0.25, 3.0]).expand(*tensordict.batch_size, 2).clone())


def test_dataset_metrics_by_another_computation(modules, transitions):
    vae, actor, critics = modules
    loss = with_targets(vae, actor, critics)
    for target in loss.target_qvalue_network_params.flatten_keys().values():
        target.data.add_(0.01)  # what is not the live network
    found = DatasetMetrics(loss, Constant(), transitions, interval=10, seed=5).measure()

    torch.manual_seed(5)  # of the measurement: latents of the target, then the noise of the VAE
    latent = clipped_normal((9, 10, vae.latent_dim), vae.latent_clip, like=torch.zeros(1))
    after = transitions["next", "observation"].unsqueeze(1).expand(9, 10, 3)
    candidates = vae.decode(TensorDict({"observation": after}, [9, 10]), latent)
    with torch.no_grad(), loss.target_actor_network_params.to_module(actor):
        candidates = actor(candidates)
    with torch.no_grad(), loss.target_qvalue_network_params.to_module(critics):
        q = critics(candidates)["state_action_value"]  # [9, 10, 2]
    best = (0.75 * q.amin(-1) + 0.25 * q.amax(-1)).amax(1)
    alive = torch.ones(9)
    alive[4] = 0
    target = transitions["next", "reward"].squeeze(1) + 0.99 * alive * best
    predicted = critics(transitions.select("observation", "action"))["state_action_value"]
    td_error = (predicted - target.unsqueeze(1)).abs().mean().item()
    vae_loss = vae.training_loss(transitions.select("observation", "action"))[0].mean().item()

    distance = (transitions["action"] - torch.tensor([0.25, 3.0])).square().sum(1).sqrt().mean().item()
    starts = transitions[torch.tensor([0, 3, 5])].select("observation")
    value = critics(Constant()(starts))["state_action_value"][:, 0].mean().item()
    assert found == pytest.approx(
        {
            "held_out_td_error": td_error,
            "held_out_vae_loss": vae_loss,
            "action_distance": distance,
            "initial_value": value,
        },
        rel=1e-5,
    )
    assert next(iter(found)) == "held_out_td_error"


def test_fewer_metrics_of_transitions_that_were_learned_from(modules, transitions):
    found = DatasetMetrics(with_targets(*modules), Constant(), transitions, interval=10, held_out=False).measure()
    assert set(found) == {"action_distance", "initial_value"}


def test_episodes_by_their_numbers_where_there_are_any(modules, transitions):
    """Then rows 0, 4 and 6 begin one, whatever is done."""
    transitions["episode"] = torch.tensor([8, 8, 8, 8, 2, 2, 5, 5, 5])
    found = DatasetMetrics(with_targets(*modules), Constant(), transitions, interval=10).measure()
    starts = transitions[torch.tensor([0, 4, 6])].select("observation")
    expected = modules[2](Constant()(starts))["state_action_value"][:, 0].mean().item()
    assert found["initial_value"] == pytest.approx(expected, rel=1e-5)


class Counting(Constant):
    """Remembers the rows that it acts in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def forward(self, tensordict):
        self.seen.append(tensordict["observation"].clone())
        return super().forward(tensordict)


def test_of_more_rows_as_many_as_asked_for_and_always_the_same(modules, make_batch):
    transitions = make_batch(200)
    transitions["next", "done"][1::2] = True  # 100 episodes of 2
    rows = {tuple(row) for row in transitions["observation"].tolist()}
    starts = {tuple(row) for row in transitions["observation"][::2].tolist()}
    drawn = []
    for seed in (0, 0, 1):
        policy = Counting()
        metrics = DatasetMetrics(with_targets(*modules), policy, transitions, interval=10, max_rows=30, seed=seed)
        first, second = metrics.measure(), metrics.measure()
        assert first == second
        assert [len(seen) for seen in policy.seen] == [30, 30, 30, 30]  # rows and starts, twice
        torch.testing.assert_close(policy.seen[:2], policy.seen[2:], rtol=0, atol=0)
        of_rows, of_starts = ({tuple(row) for row in seen.tolist()} for seen in policy.seen[:2])
        assert len(of_rows) == len(of_starts) == 30
        assert of_rows <= rows
        assert of_starts <= starts
        drawn.append(of_rows)
    assert drawn[0] == drawn[1] != drawn[2]


def test_chunks_make_no_difference(modules, transitions, monkeypatch):
    """All rows count alike, also where the last chunk is shorter; of what draws nothing."""
    metrics = DatasetMetrics(with_targets(*modules), Constant(), transitions, interval=10, held_out=False)
    whole = metrics.measure()
    monkeypatch.setattr("torchrl_bcq.trainers.metrics._CHUNK", 2)
    assert metrics.measure() == pytest.approx(whole, rel=1e-6)


def test_later_changes_of_the_transitions_change_nothing(modules, transitions):
    metrics = DatasetMetrics(with_targets(*modules), Constant(), transitions, interval=10)
    before = metrics.measure()
    transitions["action"].zero_()
    assert metrics.measure() == before


def test_they_follow_the_networks_that_are_trained(make_batch, tmp_path):
    """The VAE learns to imitate a constant action, so its loss on it must fall, and the policy comes closer to it."""

    def hook(trainer) -> DatasetMetrics:
        held_out = make_batch(50)
        held_out["action"][:] = torch.tensor([0.5, 1.0])
        return DatasetMetrics(trainer.loss_module, policy_of(trainer), held_out, interval=50)

    torch.manual_seed(0)
    transitions = make_batch(200)
    transitions["action"][:] = torch.tensor([0.5, 1.0])
    trainer = make_trainer(transitions, 300, logger=CSVLogger("log", log_dir=str(tmp_path)))
    hook(trainer).register(trainer)
    trainer.train()
    lines = logged(tmp_path / "log")
    for name in ("held_out_vae_loss", "action_distance"):
        values = [float(line.split(",")[1]) for line in lines[name]]
        assert len(values) == 7
        assert values[-1] < 0.5 * values[0]


def test_networks_with_dropout_are_measured_without_it(transitions):
    vae, actor, critics = make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,), vae_hidden=(8,))
    policy = BCQPolicy(vae, actor, critics, num_action_samples=5)
    metrics = DatasetMetrics(with_targets(vae, actor, critics), policy, transitions, interval=10)
    policy.train()
    modes = []
    critics.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    metrics.measure()
    assert modes
    assert not any(modes)
    assert critics.training
    assert policy.training


# --- what a stop did not leave the time for


def test_an_evaluation_that_a_stop_cut_short_is_made_up_for(make_batch, tmp_path):
    """A stop in the very step of an evaluation: the resumed run measures it first, and logs what would have been."""
    transitions, data = make_batch(50), make_batch(30)
    data["episode"] = torch.arange(30) // 10
    settings = {"save_trainer_file": tmp_path / "checkpoint"}

    def watched(total_steps, folder, stop_at=None, **more):
        trainer = make_trainer(transitions, total_steps, logger=CSVLogger(folder, log_dir=str(tmp_path)), **more)
        parts = trainer.loss_module.vae_network, trainer.loss_module.actor_network, trainer.loss_module.qvalue_network
        DatasetMetrics(trainer.loss_module, BCQPolicy(*parts, num_action_samples=5), data, interval=10).register(
            trainer
        )
        step = trainer.optimization_stepper.step

        def stopping(*args):
            logs = step(*args)
            if trainer._optim_count == stop_at:
                trainer.request_stop()
            return logs

        trainer.optimization_stepper.step = stopping
        return trainer

    undisturbed = watched(30, "undisturbed")
    undisturbed.train()
    watched(30, "broken", stop_at=20, **settings).train()
    second = watched(30, "broken").load_from_file(tmp_path / "checkpoint")
    assert second.collected_frames == 20
    second.train()
    for name in ("held_out_td_error", "held_out_vae_loss", "initial_value", "action_distance"):
        logs = [(tmp_path / run / "scalars" / f"{name}.csv").read_text() for run in ("undisturbed", "broken")]
        assert logs[0] == logs[1]
        assert [int(line.split(",")[0]) for line in logs[0].splitlines()] == [0, 10, 20, 30]
