"""Each row of the page for users of Tianshou runs, and does what the row says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torchrl.envs.utils import ExplorationType, set_exploration_type

PAGE = (Path(__file__).parents[2] / "examples" / "guides" / "coming_from_tianshou.md").read_text()
CONTINUOUS, _, DISCRETE = PAGE.partition("\n## Discrete BCQ\n")
TABLES = {
    "continuous": CONTINUOUS.partition("\n## Where Tianshou departs")[0],
    "discrete": DISCRETE.partition("\n### Differences of")[0],
}
SETUPS = {kind: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for kind, text in TABLES.items()}
ROWS = {kind: dict(re.findall(r"^\| (`.+?) \| `(.+?)` \| .*\|$", text, re.MULTILINE)) for kind, text in TABLES.items()}

IN_BOUNDS = "action.abs().max() <= 2 and action.shape == (400, 1)"
WEIGHTS = "torch.cat([p.flatten() for p in loss.parameters()])"
TARGETS = "torch.cat([p.flatten() for p in loss.target_qvalue_network_params.values(True, True)])"
NOISY = "{}((torch.manual_seed(0), states.select('observation'))[1])['action']"
# what is true after a row has run; ``before`` is the first expression's value before it
CONTINUOUS_CLAIMS = {
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
    "`train(mode)`": (None, "not any(layer.training for layer in loss.networks[0].modules())"),
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
OUTPUTS = "network(states['observation'])"
DISCRETE_CLAIMS = {
    "`model`, `imitator`": (None, "bcq.DiscreteBCQLoss(network, delay_qvalue=False)(states)['loss_imitation'] > 0"),
    "`preprocess_net` shared by both": (
        None,
        "[output.shape for output in network(states['observation'])] == [(400, 2), (400, 2)] and "
        "network.trunk(states['observation']).shape == (400, 8)",
    ),
    "`policy` (2.x)": (None, "loss.qvalue_network is policy.network"),
    "`optim`": (
        WEIGHTS,
        "stepper.step(trainer, buffer.sample()) is not None and not torch.equal(before, " + WEIGHTS + ")",
    ),
    "`lr_scheduler`": (
        None,
        "trainer.train() or abs(stepper.optimizers['qvalue'].param_groups[0]['lr'] - 6.25e-7) < 1e-12",
    ),
    "`discount_factor=0.99`, `gamma=0.99` (2.x)": (None, "abs(loss.value_estimator.gamma.item() - 0.99) < 1e-6"),
    "`estimation_step=1`, `n_step_return_horizon=1` (2.x)": (
        None,
        "buffer.sample()['steps_to_next_obs'].max() == 3 and loss(buffer.sample())['loss_qvalue'] > 0",
    ),
    "`target_update_freq=8000`": (
        None,
        "[p.data.add_(1) for p in loss.parameters()] and (old := " + TARGETS + ") is not None and "
        "8000 == next(n for n in range(1, 9000) if updater.step() or not torch.equal(old, " + TARGETS + "))",
    ),
    "`eval_eps=0.001`, `eps_inference=0.0` (2.x)": (None, "policy.epsilon == 0.001"),
    "`unlikely_action_threshold=0.3`": (
        None,
        "loss.unlikely_action_threshold == policy.unlikely_action_threshold == 0.3",
    ),
    "`imitation_logits_penalty=0.01`": (None, "loss.imitation_logits_penalty == 0.01"),
    "`action_space`": (None, "spec.space.n == 2"),
    "`observation_space`": (None, "spec['observation'].shape == (4,)"),
    "`reward_normalization=False`": (OUTPUTS + "[0]", "not torch.equal(before, " + OUTPUTS + "[0])"),
    "`is_double=True`, `clip_loss_grad=False`": (None, "loss.loss_function == 'smooth_l1'"),
    "`device`": (None, "{p.device.type for p in network.parameters()} == {'cpu'}"),
    "`forward(batch).act`": (None, "action.shape == (400,) and set(action.tolist()) <= {0, 1}"),
    "`forward(batch).q_value`, `.imitation_logits`, `.logits` (2.x)": (
        None,
        "q_value.shape == imitation_logits.shape == (400, 2) and not torch.equal(q_value, imitation_logits)",
    ),
    "`forward(batch, model=model_old)` (2.x)": (
        "(" + OUTPUTS + "[0], [p.data.add_(1) for p in loss.parameters()])[0].clone()",
        "torch.allclose(before, q_value) and not torch.allclose(q_value, " + OUTPUTS + "[0])",
    ),
    "`compute_action(obs)`": (None, "action.shape == () and int(action) in (0, 1)"),
    "`compute_q_value(logits, mask)`": (
        None,
        "policy.act({'observation': states['observation'][:2], 'action_mask': [[True, False]] * 2}).tolist() == [0, 0]",
    ),
    "`learn(batch)`": (WEIGHTS, "not torch.equal(before, " + WEIGHTS + ") and logs['loss_qvalue'] > 0"),
    "`update(sample_size, buffer)`": (WEIGHTS, "not torch.equal(before, " + WEIGHTS + ") and updater.counter == 1"),
    "`sync_weight()`": (
        "[p.data.add_(1) for p in loss.parameters()] and " + TARGETS,
        "torch.allclose(" + TARGETS + " - before, torch.tensor(1.0), atol=1e-5)",
    ),
    "`soft_update(tgt, src, tau)`": (
        "[p.data.add_(1) for p in loss.parameters()] and " + TARGETS,
        "torch.allclose(" + TARGETS + " - before, torch.tensor(1.0), atol=1e-5)",
    ),
    "`DiscreteBCQ.run_training(params)`, `OfflineTrainer(...).run()`": (
        WEIGHTS,
        "trainer.collected_frames == 5 and not torch.equal(before, " + WEIGHTS + ")",
    ),
    "`train(mode)`": (None, "not any(layer.training for layer in loss.networks[0].modules())"),
    "`eval()`": ("(exec(ROW), action)[1]", "action.shape == (400,) and (before == action).all()"),
    "`set_eps(eps)`, `set_eps_inference(eps)` (2.x)": (None, "policy.epsilon == 0.05"),
    "`exploration_noise(act, batch)`, `add_exploration_noise(act, batch)` (2.x)": (
        None,
        # half of the actions are random, and half of these differ
        "0.15 < (" + NOISY.format("policy") + " != " + NOISY.format("noisy") + ").float().mean() < 0.35",
    ),
    "`map_action(act)`, `map_action_inverse(act)`": (
        None,
        "policy.act(states['observation']).shape == (400, 2) and policy.act(states['observation']).sum() == 400",
    ),
    "`process_fn(batch, buffer, indices)`, `compute_nstep_return(...)`": (None, "rows['steps_to_next_obs'].max() == 3"),
    "`process_buffer(buffer)`": (None, "abs(buffer.sample()['next', 'reward'].mean() - 0.1) < 1e-6"),
    "`post_process_fn(batch, buffer, indices)`": (None, "(batch['td_error'] > 0).all()"),
    "`compute_episodic_return(...)`": (None, "loss.qvalue_loss(states.reshape(2, 200))[0] > 0"),
    "`value_mask(buffer, indices)`": (None, "0.5 < bootstraps.float().mean() < 1"),
    "`state_dict()`, `load_state_dict(state)`": (WEIGHTS, "torch.equal(before, " + WEIGHTS + ")"),
    "`loss`": (None, "value > 0"),
    "`q_loss`": (None, "value > 0"),
    "`i_loss`": (None, "value > 0"),
    "`reg_loss`": (
        "torch.manual_seed(7)",  # the row and the claim draw the same batch
        "torch.manual_seed(7) and "
        "torch.isclose(value, network(buffer.sample()['observation'])[1].square().mean(), rtol=1e-5)",
    ),
}
CLAIMS = {"continuous": CONTINUOUS_CLAIMS, "discrete": DISCRETE_CLAIMS}


@pytest.mark.parametrize("kind", TABLES)
def test_every_row_is_checked(kind):
    assert set(ROWS[kind]) == set(CLAIMS[kind])
    assert len(ROWS[kind]) == TABLES[kind].count("\n| ") - 6  # all lines of the three tables but their headings


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in TABLES for name in ROWS[kind]])
def test_row(kind, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict = {"ROW": ROWS[kind][name]}
    (setup,) = SETUPS[kind]
    exec(setup, namespace)
    before, claim = CLAIMS[kind][name]
    namespace["before"] = eval(before, namespace) if before else None
    exec(ROWS[kind][name], namespace)
    with set_exploration_type(ExplorationType.RANDOM):
        assert eval(claim, namespace), claim
