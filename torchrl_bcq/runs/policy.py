"""The policy of a run."""

from __future__ import annotations

from pathlib import Path

from tensordict.nn import TensorDictModuleBase


def load_policy(run: str | Path, checkpoint: str = "best", device: str = "auto") -> TensorDictModuleBase:
    """The policy of a run of ``torchrl-bcq train``, ready to act. Needs ``torchrl-bcq[hydra]``.

    Args:
        run: its folder, or that of one of its checkpoints.
        checkpoint: ``"best"`` (by the metric that the run monitored) or ``"last"``.
        device: any torch device; ``"auto"`` is cuda if it is available.

    Raises:
        RunError: if there is no checkpoint, or it cannot be loaded. Nothing in it is executed or unpickled.
    """
    from torchrl_bcq.runs.folder import load  # omegaconf is an optional package

    return load(Path(run), checkpoint, device).policy
