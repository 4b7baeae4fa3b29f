"""The trainer of BCQ."""

from __future__ import annotations

from torchrl_bcq.trainers.offline import OfflineTrainer


class BCQTrainer(OfflineTrainer):
    """The ``OfflineTrainer``, under BCQ's name.

    For each batch, the VAE makes one gradient step, then the critics, then the actor.

    Example:
        >>> import numpy as np
        >>> from torchrl.data import Bounded, Unbounded
        >>> from torchrl.objectives import SoftUpdate
        >>> from torchrl_bcq import BCQLoss, BCQTrainer, from_arrays, make_bcq_modules, make_replay_buffer
        >>> draw = np.random.default_rng(0).uniform
        >>> flags = {"terminated": np.arange(90) % 30 == 29, "truncated": np.zeros(90)}
        >>> data = from_arrays(draw(size=(90, 3)), draw(size=(90, 1)), draw(size=90), **flags)
        >>> loss = BCQLoss(*make_bcq_modules(Unbounded((3,)), Bounded(-1, 1, (1,)), hidden=[8], vae_hidden=[8]))
        >>> buffer, updater = make_replay_buffer(data, batch_size=10), SoftUpdate(loss, tau=0.005)
        >>> trainer = BCQTrainer(loss, buffer, target_net_updater=updater, total_steps=20, progress_bar=False)
        >>> trainer.train()
        >>> sorted(trainer.metrics)[:3]
        ['loss_actor', 'loss_qvalue', 'loss_vae']
    """
