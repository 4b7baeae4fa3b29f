"""Online fine-tuning goes on from the offline weights, with half of each batch from either source."""

from __future__ import annotations

from pathlib import Path

import torch
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs import GymEnv

from torchrl_bcq import BCQLoss, BCQPolicy, make_bcq_modules


def test_half_of_each_batch_is_what_the_policy_has_just_done(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    import finetune_online

    env = GymEnv("Pendulum-v1")
    networks = make_bcq_modules(env.observation_spec, env.action_spec, hidden=[8], vae_hidden=[8])
    loss, policy = BCQLoss(*networks), BCQPolicy(*networks, num_action_samples=5)
    recorded = env.rollout(100, break_when_any_done=False).select(*loss.in_keys)
    offline = ReplayBuffer(storage=LazyTensorStorage(100))
    offline.extend(recorded)
    batches, before = [], networks[2].critics[0].module[0].weight.detach().clone()
    loss_of_critics = loss.qvalue_loss
    monkeypatch.setattr(loss, "qvalue_loss", lambda batch: batches.append(batch) or loss_of_critics(batch))
    finetune_online.finetune(loss, policy, offline, frames=400)

    assert len(batches) == 400
    for batch in batches[::50]:
        known = (batch["observation"].unsqueeze(1) == recorded["observation"]).all(-1).any(1)
        assert known.tolist() == [True] * 32 + [False] * 32
    assert not torch.equal(networks[2].critics[0].module[0].weight, before)
    online = torch.cat([batch["action"][32:] for batch in batches])
    assert online.unique().numel() > 250  # of 400 steps
