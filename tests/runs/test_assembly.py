"""The trainer of a run has the data, metrics and hooks of the settings, or they are refused."""

from __future__ import annotations

import ast
import json
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torchrl.data import PrioritizedSampler, RandomSampler, SamplerWithoutReplacement

from torchrl_bcq.data import episode_weights, make_replay_buffer, return_weights
from torchrl_bcq.data.episodes import episode_numbers, episode_returns
from torchrl_bcq.data.sampling import WeightedSampler
from torchrl_bcq.errors import RunError
from torchrl_bcq.evaluation import DatasetMetrics, FQEMetrics
from torchrl_bcq.modules import ActionFlow, ActionMixture
from torchrl_bcq.runs.algorithms import ALGORITHMS
from torchrl_bcq.runs.assembly import _mode, assemble, check_numbers, split
from torchrl_bcq.runs.dataset import open_dataset
from torchrl_bcq.runs.settings import default_settings
from torchrl_bcq.trainers import NetworkLRScheduler

from ..conftest import skip_without_extension

MINE = ". If a script defines it, run this script in place of torchrl-bcq."


@pytest.fixture
def make_trainer(make_settings):
    """The trainer of these overrides, without a logger or an environment unless they say so."""

    def make(*overrides):
        settings = make_settings("logger=[]", "evaluation.env=null", *overrides)
        return assemble(settings, *open_dataset(settings))

    return make


# how networks learn


def test_settings_of_networks_and_loss_reach_them(make_trainer):
    trainer = make_trainer(
        *("network.num_critics=3", "network.phi=0.25", "network.hidden=[6]", "network.vae_hidden=[7]"),
        *("loss.lmbda=0.5", "loss.gamma=0.75", "loss.delay_actor=false", "loss.reduction=sum", "loss.tau=0.125"),
    )
    loss = trainer.loss_module
    assert len(loss.qvalue_network.critics) == 3
    assert loss.actor_network.phi == 0.25
    assert (loss.lmbda, loss.delayed_names, loss.reduction) == (0.5, ("qvalue",), "sum")
    assert float(loss.value_estimator.gamma) == 0.75
    assert trainer.target_net_updater.eps == 0.875
    assert {6, 7} <= {size for parameter in loss.parameters() for size in parameter.shape}


def test_a_loss_without_targets_has_no_updater(make_trainer):
    trainer = make_trainer("loss.delay_actor=false", "loss.delay_qvalue=false")
    assert trainer.target_net_updater is None
    trainer.train()
    assert trainer.collected_frames == 20


def test_cloning_trains(make_trainer, make_file):
    """The actions are the first number of the state, whose variance is 1/3."""
    states = np.random.default_rng(1).uniform(-1, 1, (200, 3))
    make_file(observations=states, actions=states[:, :1])
    trainer = make_trainer("algorithm=cloning", "steps=300", "optim.lr=0.01")
    assert list(trainer.optimization_stepper.optimizers) == ["actor"]
    assert trainer.target_net_updater is None
    trainer.train()
    assert trainer.metrics["loss_actor"] < 1 / 30
    with pytest.raises(RunError, match="n_step is 3, but cloning has no discount; use n_step=1"):
        make_trainer("algorithm=cloning", "n_step=3")


def test_learning_rates_follow_the_steps_of_their_network(make_trainer):
    own = ["optim.actor.scheduler=StepLR", "optim.actor.scheduler_kwargs={step_size: 5, gamma: 0.5}"]
    trainer = make_trainer(*own, "optim.actor.every=2")
    (hook,) = [module for module in trainer._modules.values() if isinstance(module, NetworkLRScheduler)]
    assert hook.name == "actor"
    trainer.train()  # 20 steps, 10 of the actor: the rate is halved twice
    rates = [o.param_groups[0]["lr"] for o in trainer.optimization_stepper.optimizers.values()]
    assert rates == pytest.approx([1e-3, 1e-3, 0.25e-3])


def test_clipping_and_schedules_reach_the_trainer(make_trainer):
    assert make_trainer().clip_norm is None
    numbers = [
        "optim.vae.stop_after=7",
        "optim.qvalue.start_after=3",
        "optim.actor.start_after=3",
        "optim.actor.every=4",
    ]
    trainer = make_trainer("optim.clip_norm=1e-3", "optim.optimizer=SGD", "optim.lr=1", *numbers)
    names = ("vae", "qvalue", "actor")
    before = {
        n: [p.detach().clone() for p in trainer.loss_module.get_submodule(f"{n}_network_params").parameters()]
        for n in names
    }
    trainer.train()
    for name, steps in zip(names, (7, 17, 4), strict=True):  # of 20; a step of SGD is as long as the clipped gradient
        after = trainer.loss_module.get_submodule(f"{name}_network_params").parameters()
        moved = sum((a - b).square().sum() for a, b in zip(after, before[name], strict=True)).sqrt().item()
        assert 0 < moved <= steps * 1e-3 * 1.001
    assert moved > 1e-4


def test_the_seed_decides_everything(make_trainer):
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(states))
        trainer = make_trainer(f"seed={seed}")
        trainer.train()
        states.append(torch.cat([value.flatten() for value in trainer.loss_module.state_dict().values()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


# how steps are executed


def test_execution_reaches_the_trainer(make_trainer):
    assert make_trainer()._execution._settings is None
    assert make_trainer("compile=true")._execution._settings == {"fullgraph": True}


def test_a_precision_changes_the_run_a_little(make_trainer):
    exact, rough = (make_trainer(setting) for setting in ("precision=null", "precision=bf16-target"))
    for trainer in (exact, rough):
        torch.manual_seed(0)
        trainer.train()
    names = ("loss_vae", "loss_qvalue")
    (vae, critics), (rough_vae, rough_critics) = ([t.metrics[name] for name in names] for t in (exact, rough))
    assert vae == rough_vae
    assert critics == pytest.approx(rough_critics, rel=0.05)
    assert critics != rough_critics


def test_cuda_graphs_need_a_gpu(make_trainer):
    with pytest.raises(ValueError, match="CUDA graphs need a GPU, but the loss is on cpu; move it"):
        make_trainer("cudagraph=true", "device=cpu")


# numbers with which nothing would be learned


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        *(
            (f"{name}=0", f"{name} is 0, expected at least 1.")
            for name in ("steps", "batch_size", "n_step", "log_interval", "evaluation.episodes")
        ),
        ("threads=0", "threads is 0, expected auto, a number of at least 1, or null for PyTorch's default."),
        ("evaluation.max_rows=0", "evaluation.max_rows is 0, expected at least 1."),
        ("checkpoint.keep=0", "checkpoint.keep is 0, expected at least 1."),
        ("network.vae_hidden=[8,0]", "network.vae_hidden is [8, 0], expected sizes of at least 1."),
        ("loss.gamma=1.5", "loss.gamma is 1.5, expected a number between 0 and 1."),
        ("loss.tau=-1", "loss.tau is -1.0, expected a number between 0 and 1."),
        (
            "loss.reduction=none",
            "loss.reduction is 'none', expected mean or sum, because a gradient step needs one number.",
        ),
        ("optim.clip_norm=0", "optim.clip_norm is 0.0, expected more than 0, or null for no clipping."),
        ("baseline=bqc", f"algorithm is 'bqc', expected one of {[*ALGORITHMS]}{MINE}"),
        (
            "precision=bf16",
            "precision is 'bf16', expected null or one of ['highest', 'high', 'medium', 'bf16-target', 'bf16-mixed'].",
        ),
        ("log_interval=3", "evaluation.interval is 10, not a positive multiple of log_interval 3; change one of them."),
        (
            "checkpoint.interval=12",
            "checkpoint.interval is 12, not a positive multiple of log_interval 5; change one of them.",
        ),
        (
            "evaluation.interval=0",
            "evaluation.interval is 0, not a positive multiple of log_interval 5; change one of them.",
        ),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make_settings, setting, message):
    check_numbers(make_settings())
    check_numbers(make_settings("algorithm=cloning"))
    with pytest.raises(RunError) as error:
        check_numbers(make_settings(setting))
    assert str(error.value) == message


# rows


def rows_drawn(trainer, draws=100) -> torch.Tensor:
    return torch.cat([trainer._replay.sample(None)["index"].flatten() for _ in range(draws)])


def learned_episodes(trainer, transitions) -> set[int]:
    """Numbers in the file of the episodes of the rows that were drawn, found by their rewards."""
    numbers = dict(
        zip(transitions["next", "reward"].flatten().tolist(), episode_numbers(transitions).tolist(), strict=True)
    )
    samples = torch.cat([trainer._replay.sample(None)["next", "reward"].flatten() for _ in range(100)])
    return {numbers[reward] for reward in samples.tolist()}


@pytest.mark.parametrize("how", ["weights=null", "weights=episode", "sampler=without_replacement"])  # mask, mask, copy
def test_held_out_episodes_are_not_learned_from(make_trainer, make_settings, how):
    settings = make_settings("held_out=0.3", how)
    transitions, _ = open_dataset(settings)
    numbers, learned = episode_numbers(transitions), split(settings, transitions)
    kept, held_out = set(numbers[learned].tolist()), set(numbers[~learned].tolist())
    assert (len(kept), len(held_out), kept & held_out) == (7, 3, set())
    trainer = make_trainer("held_out=0.3", how)
    assert learned_episodes(trainer, transitions) == kept
    assert len(trainer._replay.replay_buffer) == (140 if "sampler" in how else 200)
    other = make_trainer("held_out=0.3", how, "seed=1")
    assert learned_episodes(other, transitions) != kept


def test_of_several_steps_none_is_held_out(make_trainer, make_settings):
    """Rewards of three steps are summed within what is learned from, and never across an episode's end."""
    settings = make_settings("held_out=0.3")
    transitions, _ = open_dataset(settings)
    learned = split(settings, transitions)
    trainer = make_trainer("held_out=0.3", "n_step=3", "loss.gamma=0.5")
    buffer = trainer._replay.replay_buffer
    assert learned[torch.cat([buffer.sample()["index"] for _ in range(20)])].all()
    held = buffer[:][learned]
    rewards = transitions["next", "reward"][learned].view(7, 20)
    padded = torch.nn.functional.pad(rewards, (0, 2))
    expected = rewards + 0.5 * padded[:, 1:21] + 0.25 * padded[:, 2:22]
    torch.testing.assert_close(held["next", "reward"].view(7, 20), expected)


def test_normalization_is_fitted_to_what_is_learned_from(make_trainer, make_settings):
    settings = make_settings("held_out=0.3")
    transitions, _ = open_dataset(settings)
    states = transitions["observation"][split(settings, transitions)]
    trainer = make_trainer("held_out=0.3", "normalize=true")
    buffers = [buffer for buffer in trainer.loss_module.state_dict().values() if buffer.shape[-1:] == (4,)]
    assert any(torch.allclose(buffer[..., :3].flatten(), states.mean(0), atol=1e-6) for buffer in buffers)
    plain = make_trainer("held_out=0.3").loss_module.state_dict()
    assert len(plain) < len(trainer.loss_module.state_dict())


@pytest.mark.parametrize(("kind", "weigh"), [("episode", episode_weights), ("return", return_weights)])
def test_rows_are_drawn_in_proportion_to_weights(make_trainer, make_settings, kind, weigh):
    settings = make_settings()
    transitions, _ = open_dataset(settings)
    expected = make_replay_buffer(transitions, weights=weigh(transitions), batch_size=8, seed=0)
    buffer = make_trainer(f"weights={kind}")._replay.replay_buffer
    assert isinstance(buffer.sampler, WeightedSampler)
    for _ in range(20):
        assert torch.equal(buffer.sample()["index"], expected.sample()["index"])


def test_good_episodes_are_preferred(make_trainer, make_settings):
    transitions, _ = open_dataset(make_settings())
    returns = episode_returns(transitions)
    counts = torch.bincount(rows_drawn(make_trainer("weights=return"), 500) // 20, minlength=10)
    assert counts[returns.argmax()] > 2 * counts[returns.argmin()]


@pytest.mark.parametrize(
    ("name", "kind"), [("uniform", RandomSampler), ("without_replacement", SamplerWithoutReplacement)]
)
def test_samplers(make_trainer, name, kind):
    trainer = make_trainer(f"sampler={name}")
    assert type(trainer._replay.replay_buffer.sampler) is kind
    once = len(rows_drawn(trainer, 25).unique()) == 200
    assert once == (name == "without_replacement")


def test_prioritized_rows_get_their_priorities(make_trainer):
    skip_without_extension()
    trainer = make_trainer("sampler=prioritized")
    sampler = trainer._replay.replay_buffer.sampler
    assert isinstance(sampler, PrioritizedSampler)
    trainer.train()
    assert len({round(sampler._sum_tree[row], 6) for row in range(200)}) > 10


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("weights=returns", "weights is 'returns', expected null or one of ['episode', 'return']."),
        ("weights=return sampler=prioritized", "both choose the rows to draw"),
        ("sampler=random", "sampler is 'random', expected one of "),
        ("held_out=1", "fraction is 1.0, expected a number between 0 and 1"),
    ],
)
def test_rows_that_cannot_be_drawn_are_refused(make_trainer, setting, message):
    with pytest.raises(ValueError, match=".") as error:
        make_trainer(*setting.split())
    assert message in str(error.value)


# what is watched


@pytest.mark.parametrize("section", ["checkpoint", "early_stopping"])
@pytest.mark.parametrize("monitor", ["retrun", "return", "held_out_td_error", "normalized_score"])
def test_a_metric_that_is_not_measured_is_refused(make_trainer, section, monitor, monkeypatch):
    """The loggers are closed, because a service such as MLflow could otherwise not start the next run of a sweep."""
    logger = Mock()
    monkeypatch.setattr("torchrl_bcq.runs.assembly.make_loggers", lambda *_: logger)
    with pytest.raises(RunError) as error:
        make_trainer(f"{section}.monitor={monitor}")
    logger.close.assert_called_once()
    found = str(error.value)
    assert found.startswith(f"{section}.monitor is '{monitor}', expected one of ['action_distance', ")
    assert "'fqe'" in found


@pytest.mark.parametrize("section", ["checkpoint", "early_stopping"])
@pytest.mark.parametrize(("algorithm", "number"), [("bcq", 24), ("cloning", 7)])
def test_metrics_that_are_offered_are_measured(make_trainer, make_file, section, algorithm, number):
    make_file(ref_min_score=0.0, ref_max_score=1.0)
    with_all = ["evaluation.env=auto", "held_out=0.3", "steps=10", f"algorithm={algorithm}"]
    with pytest.raises(RunError) as error:
        make_trainer(*with_all, f"{section}.monitor=x")
    offered = ast.literal_eval(str(error.value).partition("expected one of ")[2].removesuffix(" in this run."))
    trainer = make_trainer(*with_all)
    trainer.train()
    assert set(offered) - {*FQEMetrics.names} == set(trainer.metrics)
    assert len(offered) == number + len(FQEMetrics.names)


@pytest.mark.parametrize(("env", "kept"), [("auto", "return"), ("null", None)])
def test_the_best_is_by_return_if_there_is_one(make_trainer, tmp_path, env, kept):
    make_trainer(f"evaluation.env={env}").train()
    best = [json.loads(file.read_text()) for file in (tmp_path / "run").glob("best/*/manifest.json")]
    assert [one["metadata"]["best_of"] for one in best] == ([[kept, "max"]] if kept else [])


def test_the_mode_follows_from_the_metric():
    """Errors, losses and distances are better if they are lower; a name that the user gave remains."""
    lower = ["loss_vae", "action_distance", "held_out_td_error", "return_std"]
    lower += [
        f"held_out_{key}" for key in (*ActionMixture.loss_keys, *ActionFlow.loss_keys, "vae_kl", "vae_reconstruction")
    ]
    assert {_mode("auto", name) for name in lower} == {"min"}
    higher = ["return", "normalized_score", "initial_value", "action_agreement", *FQEMetrics.names]
    assert {_mode("auto", name) for name in higher} == {"max"}
    assert [_mode(mode, "td_error") for mode in ("min", "max")] == ["min", "max"]


@pytest.mark.parametrize(("algorithm", "wrong"), [("bcq", "discrete_cloning"), ("discrete_bcq", "cloning")])
def test_a_baseline_for_other_actions_is_refused(algorithm, wrong):
    settings = default_settings(algorithm)
    settings.baseline = wrong
    with pytest.raises(RunError, match=f"baseline is '{wrong}', which does not fit the actions of {algorithm}; choose"):
        check_numbers(settings)


def test_early_stopping_ends_a_run(make_trainer):
    trainer = make_trainer("early_stopping={monitor: loss_vae, mode: max, patience: 10}", "steps=1000", "optim.lr=0.01")
    trainer.train()
    assert 15 <= trainer.collected_frames < 500
    assert trainer._stop_reason.startswith("Monitored metric 'loss_vae' did not improve for ")
    waits = make_trainer("early_stopping={monitor: loss_vae, patience: 0, wait_for: 35}", "steps=1000", "optim.lr=0")
    waits.train()
    assert waits.collected_frames >= 40


@pytest.mark.parametrize(("mode", "beyond", "steps"), [("max", -1e9, 10), ("min", 1e9, 10), ("max", 1e9, 40)])
def test_a_run_stops_at_a_threshold(make_trainer, mode, beyond, steps):
    words = f"early_stopping={{monitor: initial_value, mode: {mode}, threshold: {beyond}}}"
    trainer = make_trainer(words, "evaluation.interval=10", "steps=40")
    trainer.train()
    assert trainer.collected_frames == steps
    if steps < 40:
        assert trainer._stop_reason.endswith(f"and reached early_stopping.threshold {beyond:g}.")


def test_early_stopping_waits_for_what_a_warm_up_does_not_log(make_trainer):
    trainer = make_trainer("early_stopping={monitor: td_error, mode: min, patience: 5}", "optim.qvalue.start_after=12")
    trainer.train()
    assert trainer.collected_frames == 20
    assert "td_error" in trainer.metrics


def test_early_stopping_counts_only_steps_at_which_the_metric_was_measured(make_trainer):
    """Measured at steps 10, 20 and 30: the first value is the best, and 20 steps later there was no better one."""
    words = [
        "early_stopping={monitor: initial_value, patience: 15}",
        "evaluation.interval=10",
        "steps=100",
        "optim.lr=0",
    ]
    trainer = make_trainer(*words)
    trainer.train()
    assert trainer.collected_frames == 30


def test_early_stopping_counts_a_measurement_once(make_trainer, tmp_path):
    """With patience 0, a second look at the best value would stop the resumed run."""
    words = ["early_stopping={monitor: initial_value, patience: 0}", "evaluation.interval=10", "steps=20"]
    trainer, again = (make_trainer(*words, "optim.lr=0", f"out={tmp_path}") for _ in range(2))
    trainer.register_op("post_steps_log", lambda _: trainer.request_stop("interrupted"))
    trainer.train()
    assert trainer.collected_frames == 5
    trainer.forget_stop()
    trainer.train()
    assert trainer.collected_frames == 10
    again.load_from_file(again.last_checkpoint)
    again.train()
    assert again.collected_frames == 20


def test_a_threshold_without_a_metric_is_refused(make_trainer):
    with pytest.raises(RunError, match="early_stopping.threshold needs a metric; set early_stopping.monitor, such as"):
        make_trainer("early_stopping.threshold=5")


@pytest.mark.parametrize("cut_off", [True, False])
def test_early_stopping_counts_a_measurement_during_which_a_stop_was_requested_once(make_trainer, monkeypatch, cut_off):
    """At step 10, the stop cuts off the measurement or not. The next call of ``train`` repeats it, and ends at 30."""
    words = ["early_stopping={monitor: initial_value, patience: 15}", "evaluation.interval=10", "steps=100"]
    trainer = make_trainer(*words, "optim.lr=0")
    measure = DatasetMetrics.measure

    def stop(metrics):
        at_ten = trainer.collected_frames == 10
        if at_ten:
            trainer.request_stop("interrupted")
        return None if at_ten and cut_off else measure(metrics)

    with monkeypatch.context() as patch:
        patch.setattr(DatasetMetrics, "measure", stop)
        trainer.train()
    assert (trainer.collected_frames, trainer._modules["early_stopping"].best_score) == (10, None)
    trainer.forget_stop()
    trainer.train()
    assert trainer.collected_frames == 30


@pytest.mark.parametrize(
    ("changed", "kept"),
    [("log_interval=5", True), ("evaluation.max_rows=50", False), ("early_stopping.mode=min", False)],
)
def test_early_stopping_forgets_scores_that_were_measured_in_another_way(make_trainer, tmp_path, changed, kept):
    words = ["early_stopping={monitor: initial_value, patience: 500}", "evaluation.interval=10", f"out={tmp_path}"]
    trainer = make_trainer(*words)
    trainer.train()
    again = make_trainer(*words, changed)
    again.load_from_file(trainer.last_checkpoint)
    assert (again._modules["early_stopping"].best_score is not None) == kept


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("optim.scheduler_kwargs.T_max=9", "optim.scheduler_kwargs or optim.vae.scheduler_kwargs is set, but there is"),
        ("network.phi=null optim.actor.lr=0.1", "optim.actor.lr has no effect, because actor does not learn; leave it"),
    ],
)
def test_settings_of_optimizers_without_an_effect_are_refused(make_trainer, words, message):
    with pytest.raises(RunError, match=message):
        make_trainer(*words.split())


def test_progress_shows_on_a_terminal_only(make_trainer, monkeypatch):
    assert make_trainer().progress_bar is False
    assert make_trainer("progress_bar=true").progress_bar is True
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert make_trainer().progress_bar is True
    assert make_trainer("progress_bar=false").progress_bar is False
