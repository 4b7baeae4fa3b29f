"""The trainer is made of what the settings say, or they are refused with what could be said."""

from __future__ import annotations

import json

import pytest
import torch
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR
from torchrl.data import PrioritizedSampler, RandomSampler, SamplerWithoutReplacement

from torchrl_bcq.cli.build import build, check_numbers, make_stepper, split
from torchrl_bcq.cli.errors import RunError
from torchrl_bcq.cli.run import make_loss, make_networks, open_dataset
from torchrl_bcq.data import episode_weights, make_replay_buffer, return_weights
from torchrl_bcq.data.episodes import episode_numbers, episode_returns
from torchrl_bcq.data.sampling import WeightedSampler
from torchrl_bcq.trainers import NetworkLRScheduler

from ..conftest import skip_without_extension


@pytest.fixture
def make_trainer(make_config):
    """The trainer of these overrides, without a logger or an environment unless they say so."""

    def make(*overrides):
        config = make_config("logger=[]", "evaluation.env=null", *overrides)
        return build(config, *open_dataset(config))

    return make


@pytest.fixture
def make_optimizers(make_config):
    """The optimizers of these overrides, by network."""

    def make(*overrides):
        config = make_config(*overrides)
        _, task = open_dataset(config)
        loss = make_loss(config, make_networks(config, task, None, "cpu"))
        return make_stepper(config, loss).optimizers

    return make


# optimizers and schedules


def test_optimizers_are_the_papers(make_optimizers):
    optimizers = make_optimizers()
    assert list(optimizers) == ["vae", "qvalue", "actor"]
    for optimizer in optimizers.values():
        assert type(optimizer) is Adam
        assert optimizer.defaults["fused"]
        assert {**optimizer.defaults, "fused": None} == Adam([torch.zeros(1)]).defaults


def test_each_network_may_have_its_own_optimizer(make_optimizers):
    common = ["optim.optimizer=AdamW", "optim.lr=0.01", "optim.kwargs={betas: [0.5, 0.75], eps: 1e-3}"]
    own = [
        "optim.vae.optimizer=SGD",
        "optim.vae.kwargs.momentum=0.5",
        "optim.qvalue.lr=0",
        "optim.actor.kwargs.eps=0.5",
    ]
    made = make_optimizers(*common, *own)  # common arguments are not those of the SGD
    assert [type(optimizer) for optimizer in made.values()] == [SGD, AdamW, AdamW]
    assert [optimizer.defaults["lr"] for optimizer in made.values()] == [0.01, 0.0, 0.01]
    assert (made["vae"].defaults["momentum"], made["vae"].defaults["fused"]) == (0.5, None)
    assert (made["qvalue"].defaults["betas"], made["qvalue"].defaults["eps"]) == ((0.5, 0.75), 1e-3)
    made = make_optimizers(*common, "optim.actor.kwargs.eps=0.5")
    assert [optimizer.defaults["eps"] for optimizer in made.values()] == [1e-3, 1e-3, 0.5]
    assert {optimizer.defaults["betas"] for optimizer in made.values()} == {(0.5, 0.75)}


def test_an_optimizer_holds_the_parameters_of_its_network(make_trainer):
    trainer = make_trainer()
    loss, optimizers = trainer.loss_module, trainer.optimization_stepper.optimizers
    for name, optimizer in optimizers.items():
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in getattr(loss, f"{name}_network_params").parameters()}


def schedulers_of(trainer) -> dict:
    hooks = [module for module in trainer._modules.values() if isinstance(module, NetworkLRScheduler)]
    return {hook.name: hook.scheduler for hook in hooks}


def test_each_network_may_have_its_own_schedule(make_trainer):
    common = ["optim.scheduler=CosineAnnealingLR", "optim.scheduler_kwargs.T_max=50"]
    own = ["optim.actor.scheduler=StepLR", "optim.actor.scheduler_kwargs={step_size: 5, gamma: 0.5}"]
    assert schedulers_of(make_trainer()) == {}
    made = schedulers_of(make_trainer(*common, "optim.vae.scheduler_kwargs.eta_min=0.0005"))
    assert {type(one) for one in made.values()} == {CosineAnnealingLR}
    assert {name: (one.T_max, one.eta_min) for name, one in made.items()} == {
        "vae": (50, 0.0005),
        "qvalue": (50, 0),
        "actor": (50, 0),
    }
    made = schedulers_of(make_trainer(*common, *own))
    assert [type(one) for one in made.values()] == [CosineAnnealingLR, CosineAnnealingLR, StepLR]
    trainer = make_trainer(*own, "optim.actor_update_interval=2")
    (name, one), = schedulers_of(trainer).items()  # fmt: skip
    assert (name, type(one), one.optimizer) == ("actor", StepLR, trainer.optimization_stepper.optimizers["actor"])
    trainer.train()  # 20 steps, 10 of the actor: the rate is halved twice
    rates = [o.param_groups[0]["lr"] for o in trainer.optimization_stepper.optimizers.values()]
    assert rates == pytest.approx([1e-3, 1e-3, 0.25e-3])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.optimizer=Adm", "optim.vae is 'Adm', expected one of torch.optim: ['ASGD', 'Adadelta', "),
        ("optim.qvalue.optimizer=Adm", "optim.qvalue is 'Adm', expected one of torch.optim: "),
        ("optim.optimizer=Optimizer", "expected one of torch.optim: "),
        ("optim.optimizer=LBFGS", "expected one of torch.optim: "),
        ("optim.optimizer=SparseAdam", "expected one of torch.optim: "),
        ("optim.optimizer=lr_scheduler", "expected one of torch.optim: "),
        ("optim.kwargs.betta=1", "optim.vae cannot be made: Adam with {'lr': 0.001, 'fused': True, 'betta': 1}: "),
        ("optim.lr=-1", "Invalid learning rate: -1.0"),
        ("optim.actor.kwargs.betas=[2,0]", "optim.actor cannot be made: Adam with "),
        ("optim.scheduler=Step", "optim.vae.scheduler is 'Step', expected one of torch.optim.lr_scheduler: ['Chained"),
        ("optim.scheduler=ReduceLROnPlateau", "expected one of torch.optim.lr_scheduler: "),
        ("optim.scheduler=LRScheduler", "expected one of torch.optim.lr_scheduler: "),
        ("optim.scheduler=StepLR", "optim.vae.scheduler cannot be made: StepLR with {}: "),
        ("optim.actor.scheduler=LinearLR optim.actor.scheduler_kwargs.x=1", "optim.actor.scheduler cannot be made: "),
    ],
)
def test_what_cannot_be_made_is_refused(make_trainer, setting, message):
    with pytest.raises(RunError) as error:
        make_trainer(*setting.split())
    assert message in str(error.value)


@pytest.mark.parametrize(
    "name", ["ASGD", "Adadelta", "Adafactor", "Adagrad", "Adamax", "NAdam", "RAdam", "Rprop", "SGD"]
)
def test_the_optimizers_that_are_offered_work(make_trainer, name):
    trainer = make_trainer(f"optim.optimizer={name}", "steps=5")
    before = {key: value.clone() for key, value in trainer.loss_module.state_dict().items() if "target" not in key}
    trainer.train()
    after = trainer.loss_module.state_dict()
    assert any(not torch.equal(after[key], value) for key, value in before.items())
    with pytest.raises(RunError) as error:
        make_trainer("optim.optimizer=none")
    assert repr(name) in str(error.value)


def test_clipping_and_schedule_reach_the_trainer(make_trainer):
    trainer = make_trainer()
    stepper = trainer.optimization_stepper
    assert (trainer.clip_norm, stepper.vae_warmup_steps, stepper.freeze_vae_after) == (None, 0, None)
    numbers = ["optim.vae_warmup_steps=3", "optim.freeze_vae_after=7", "optim.actor_update_interval=4"]
    trainer = make_trainer("optim.clip_norm=1e-3", "optim.optimizer=SGD", "optim.lr=1", *numbers)
    stepper = trainer.optimization_stepper
    assert (stepper.vae_warmup_steps, stepper.freeze_vae_after, stepper.actor_update_interval) == (3, 7, 4)
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


# how steps are executed


def test_execution_reaches_the_trainer(make_trainer):
    plain = make_trainer()
    assert plain._execution._settings is None
    assert plain.loss_module.target_dtype is None
    compiled = make_trainer("compile=true", "precision=bf16-target")
    assert compiled._execution._settings == {"fullgraph": True}
    assert compiled.loss_module.target_dtype == torch.bfloat16


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
    with pytest.raises(ValueError, match="cudagraph=True needs a loss on a CUDA device, this one is on cpu"):
        make_trainer("cudagraph=true", "device=cpu")


# numbers with which nothing would be learned


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        *(
            (f"{name}=0", f"{name} is 0, expected at least 1.")
            for name in ("steps", "batch_size", "threads", "n_step", "log_interval", "evaluation.episodes")
        ),
        ("evaluation.max_rows=0", "evaluation.max_rows is 0, expected at least 1."),
        ("checkpoint.keep=0", "checkpoint.keep is 0, expected at least 1."),
        ("network.vae_hidden=[8,0]", "network.vae_hidden is [8, 0], expected sizes of at least 1."),
        ("loss.gamma=1.5", "loss.gamma is 1.5, expected a number between 0 and 1."),
        ("loss.tau=-1", "loss.tau is -1.0, expected a number between 0 and 1."),
        ("optim.clip_norm=0", "optim.clip_norm is 0.0, expected more than 0; null does not clip."),
        (
            "precision=bf16",
            "precision is 'bf16', expected null or one of ['highest', 'high', 'medium', 'bf16-target', 'bf16-mixed'].",
        ),
        ("log_interval=3", "evaluation.interval is 10, no multiple of log_interval 3; change one of them."),
        ("checkpoint.interval=12", "checkpoint.interval is 12, no multiple of log_interval 5; change one of them."),
        ("evaluation.interval=0", "evaluation.interval is 0, no multiple of log_interval 5; change one of them."),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make_config, setting, message):
    check_numbers(make_config())
    with pytest.raises(RunError) as error:
        check_numbers(make_config(setting))
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
def test_held_out_episodes_are_not_learned_from(make_trainer, make_config, how):
    config = make_config("held_out=0.3", how)
    transitions, _ = open_dataset(config)
    numbers, learned = episode_numbers(transitions), split(config, transitions)
    kept, held_out = set(numbers[learned].tolist()), set(numbers[~learned].tolist())
    assert (len(kept), len(held_out), kept & held_out) == (7, 3, set())
    trainer = make_trainer("held_out=0.3", how)
    assert learned_episodes(trainer, transitions) == kept
    assert len(trainer._replay.replay_buffer) == (140 if "sampler" in how else 200)
    other = make_trainer("held_out=0.3", how, "seed=1")
    assert learned_episodes(other, transitions) != kept


def test_of_several_steps_none_is_held_out(make_trainer, make_config):
    """Rewards of three steps are summed within what is learned from, and never across an episode's end."""
    config = make_config("held_out=0.3")
    transitions, _ = open_dataset(config)
    learned = split(config, transitions)
    trainer = make_trainer("held_out=0.3", "n_step=3", "loss.gamma=0.5")
    held = trainer._replay.replay_buffer[:]
    rewards = transitions["next", "reward"][learned].view(7, 20)
    padded = torch.nn.functional.pad(rewards, (0, 2))
    expected = rewards + 0.5 * padded[:, 1:21] + 0.25 * padded[:, 2:22]
    torch.testing.assert_close(held["next", "reward"].view(7, 20), expected)


def test_normalization_is_fitted_to_what_is_learned_from(make_trainer, make_config):
    config = make_config("held_out=0.3")
    transitions, _ = open_dataset(config)
    states = transitions["observation"][split(config, transitions)]
    trainer = make_trainer("held_out=0.3", "normalize=true")
    buffers = [buffer for buffer in trainer.loss_module.state_dict().values() if buffer.shape[-1:] == (4,)]
    assert any(torch.allclose(buffer[..., :3].flatten(), states.mean(0), atol=1e-6) for buffer in buffers)
    plain = make_trainer("held_out=0.3").loss_module.state_dict()
    assert len(plain) < len(trainer.loss_module.state_dict())


@pytest.mark.parametrize(("kind", "weigh"), [("episode", episode_weights), ("return", return_weights)])
def test_rows_are_drawn_in_proportion_to_weights(make_trainer, make_config, kind, weigh):
    config = make_config()
    transitions, _ = open_dataset(config)
    expected = make_replay_buffer(transitions, weights=weigh(transitions), batch_size=8, seed=0)
    buffer = make_trainer(f"weights={kind}")._replay.replay_buffer
    assert isinstance(buffer.sampler, WeightedSampler)
    for _ in range(20):
        assert torch.equal(buffer.sample()["index"], expected.sample()["index"])


def test_good_episodes_are_preferred(make_trainer, make_config):
    transitions, _ = open_dataset(make_config())
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
        ("weights=return sampler=prioritized", "both say which rows to draw"),
        ("sampler=random", "sampler is 'random', expected one of "),
        ("held_out=1", "fraction is 1.0, expected a number between 0 and 1"),
    ],
)
def test_rows_that_cannot_be_drawn_are_refused(make_trainer, setting, message):
    with pytest.raises(ValueError, match=".") as error:
        make_trainer(*setting.split())
    assert message in str(error.value)


# what is watched


def test_the_seed_decides_everything(make_trainer):
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(states))
        trainer = make_trainer(f"seed={seed}")
        trainer.train()
        states.append(torch.cat([value.flatten() for value in trainer.loss_module.state_dict().values()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("section", ["checkpoint", "early_stopping"])
@pytest.mark.parametrize("monitor", ["retrun", "return", "held_out_td_error", "normalized_score"])
def test_a_metric_that_is_not_measured_is_refused(make_trainer, section, monitor):
    with pytest.raises(RunError) as error:
        make_trainer(f"{section}.monitor={monitor}")
    assert str(error.value).startswith(f"{section}.monitor is '{monitor}', but this run measures ['action_distance', ")


@pytest.mark.parametrize("section", ["checkpoint", "early_stopping"])
def test_metrics_that_are_offered_are_measured(make_trainer, make_file, tmp_path, section):
    make_file(ref_min_score=0.0, ref_max_score=1.0)
    with_all = ["evaluation.env=auto", "held_out=0.3", "steps=10"]
    with pytest.raises(RunError) as error:
        make_trainer(*with_all, f"{section}.monitor=x")
    offered = eval(str(error.value).partition("measures ")[2].removesuffix(" only."))
    trainer = make_trainer(*with_all)
    trainer.train()
    assert set(offered) == set(trainer.metrics)
    assert len(offered) == 18


@pytest.mark.parametrize(("env", "kept"), [("auto", "return"), ("null", None)])
def test_the_best_is_by_return_if_there_is_one(make_trainer, tmp_path, env, kept):
    make_trainer(f"evaluation.env={env}").train()
    best = [json.loads(file.read_text()) for file in (tmp_path / "run").glob("best/*/manifest.json")]
    assert [one["metadata"]["best_of"] for one in best] == ([[kept, "max"]] if kept else [])


def test_early_stopping_ends_a_run(make_trainer):
    trainer = make_trainer("early_stopping={monitor: loss_vae, mode: max, patience: 10}", "steps=1000", "optim.lr=0.01")
    trainer.train()
    assert 15 <= trainer.collected_frames < 500
    assert trainer._stop_reason.startswith("Monitored metric 'loss_vae' did not improve for ")
    waits = make_trainer("early_stopping={monitor: loss_vae, patience: 0, wait_for: 35}", "steps=1000", "optim.lr=0")
    waits.train()
    assert waits.collected_frames >= 40


def test_early_stopping_waits_for_what_a_warm_up_does_not_log(make_trainer):
    trainer = make_trainer("early_stopping={monitor: td_error, mode: min, patience: 5}", "optim.vae_warmup_steps=12")
    trainer.train()
    assert trainer.collected_frames == 20
    assert "td_error" in trainer.metrics


def test_progress_shows_on_a_terminal_only(make_trainer, monkeypatch):
    assert make_trainer().progress_bar is False
    assert make_trainer("progress_bar=true").progress_bar is True
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert make_trainer().progress_bar is True
    assert make_trainer("progress_bar=false").progress_bar is False
