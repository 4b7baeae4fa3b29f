"""Each row of the page for users of Tianshou runs, and does what the row says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torchrl.envs.utils import ExplorationType, set_exploration_type

PAGE = (Path(__file__).parents[2] / "examples" / "guides" / "coming_from_tianshou.md").read_text()
(SETUP,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
TABLES = PAGE.split("## Where Tianshou departs")[0]
ROWS = dict(re.findall(r"^\| (`.+?) \| `(.+?)` \| .*\|$", TABLES, re.MULTILINE))

IN_BOUNDS = "action.abs().max() <= 2 and action.shape == (400, 1)"
WEIGHTS = "torch.cat([p.flatten() for p in loss.parameters()])"
TARGETS = "torch.cat([p.flatten() for p in loss.target_qvalue_network_params.values(True, True)])"
NOISY = "{}((torch.manual_seed(0), states.select('observation'))[1])['action']"
# what is true after a row has run; ``before`` is the first expression's value before it
CLAIMS = {
    "`gamma=0.99`": (None, "abs(loss.value_estimator.gamma.item() - 0.99) < 1e-6"),
    "`tau=0.005`": (None, "abs(updater.eps - 0.995) < 1e-9"),
    "`lmbda=0.75`": (None, "loss.lmbda == 0.75"),
    "`num_sampled_action=10`": (None, "loss.num_target_samples == 10"),
    "`forward_sampled_times=100`": (None, "len(policy.latents) == 100"),
    "`vae`": (
        "id(vae)",
        "id(vae) != before and vae.decode(states, torch.full((400, 2), 9.0))['action'].abs().max() <= 2",
    ),
    "`actor_perturbation`": (None, "(actor(states.clone())['action'] - states['action']).abs().max() <= 0.1 + 1e-6"),
    "`critic`": (None, "critic(states)['state_action_value'].std() > 0"),
    "`critic2`": (
        None,
        "(critics(states)['state_action_value'][:, 1:] - critic2(states)['state_action_value']).abs().max() < 1e-6",
    ),
    "`vae_optim`, `critic_optim`, `critic2_optim`, `actor_perturbation_optim`": (
        WEIGHTS,
        "stepper.step(trainer, buffer.sample()) is not None and not torch.equal(before, " + WEIGHTS + ")",
    ),
    "`lr_scheduler`": (None, "trainer.train() or stepper.optimizers['vae'].param_groups[0]['lr'] == 1e-5"),
    "`action_space`": (None, "spec.space.high.item() == 2"),
    "`observation_space`": (None, "spec['observation'].shape == (3,)"),
    "`action_scaling=True`": (None, "env.action_spec.space.high.item() == 1"),
    '`action_bound_method="clip"`': (None, "env.action_spec.is_in(policy(states.select('observation'))['action'])"),
    '`action_bound_method="tanh"`': (None, "action.abs().item() == 2"),
    "`action_bound_method=None`": (None, "vae.high == actor.high == states['action'].max() and vae.high < 2"),
    "`device`": (None, "{p.device.type for p in vae.parameters()} == {'cpu'}"),
    "`forward(batch)`": (None, IN_BOUNDS),
    "`compute_action(obs)`": (None, "action.shape == (1,) and abs(action.item()) <= 2"),
    "`learn(batch)`": (WEIGHTS, "not torch.equal(before, " + WEIGHTS + ") and logs['loss_vae'] > 0"),
    "`sync_weight()`": (
        "[p.data.add_(1) for p in loss.parameters()] and " + TARGETS,
        "torch.allclose(" + TARGETS + " - before, torch.tensor(0.005), atol=1e-5)",
    ),
    "`soft_update(tgt, src, tau)`": (
        "[p.data.add_(1) for p in loss.parameters()] and " + TARGETS,
        # a new updater starts from targets that equal the weights
        "torch.allclose(" + TARGETS + " - before, torch.tensor(1.0), atol=1e-5)",
    ),
    "`update(sample_size, buffer)`": (TARGETS, "not torch.equal(before, " + TARGETS + ")"),
    "`BCQ.run_training(params)`, `OfflineTrainer(...).run()`": (
        WEIGHTS,
        "trainer.collected_frames == 5 and not torch.equal(before, " + WEIGHTS + ")",
    ),
    "`train(mode)`": (None, "not loss.training"),
    "`eval()`": (
        "(exec(ROW), action)[1]",
        "abs(action).max() <= 2 and action.shape == (400, 1) and (before == action).all()",
    ),
    "`map_action(act)`": (None, "action.item() == 2"),
    "`map_action_inverse(act)`": (None, "action.item() == 0.5"),
    "`exploration_noise(act, batch)`": (
        None,
        "0.05 < (" + NOISY.format("policy") + " - " + NOISY.format("noisy") + ").std() < 0.12",
    ),
    "`process_fn`, `process_buffer`": (
        "buffer.sample()['next', 'reward'].mean()",
        "buffer.sample()['next', 'reward'].mean() > before / 5",
    ),
    "`post_process_fn(batch, buffer, indices)`": (None, "(batch['td_error'] > 0).all()"),
    "`compute_nstep_return(...)`": (None, "rows['steps_to_next_obs'].max() == 3"),
    "`compute_episodic_return(...)`": (None, "loss.qvalue_loss(states.reshape(2, 200))[0] > 0"),
    "`state_dict()`, `load_state_dict(state)`": (WEIGHTS, "torch.equal(before, " + WEIGHTS + ")"),
    "`actor_loss`": (None, "value.isfinite() and value.grad_fn is not None"),
    "`critic1_loss`": (None, "value > 0"),
    "`critic2_loss`": (None, "value > 0"),
    "`vae_loss`": (None, "value > 0"),
    "`train_time`, `smoothed_loss`": (None, "trainer.train() is None"),
}


def test_every_row_is_checked():
    assert set(ROWS) == set(CLAIMS)
    assert len(ROWS) == TABLES.count("\n| ") - 6  # all lines of the three tables but their headings


@pytest.mark.parametrize("name", ROWS)
def test_row(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict = {"ROW": ROWS[name]}
    exec(SETUP, namespace)
    before, claim = CLAIMS[name]
    namespace["before"] = eval(before, namespace) if before else None
    exec(ROWS[name], namespace)
    with set_exploration_type(ExplorationType.RANDOM):
        assert eval(claim, namespace), claim
