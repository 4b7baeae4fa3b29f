"""Loads the policy of a run."""

from __future__ import annotations

from pathlib import Path

from torchrl_bcq.modules.acting import Policy


def load_policy(run: str | Path, checkpoint: str = "best", device: str = "auto") -> Policy:
    """Load a policy of ``torchrl-bcq train``, and set the policy to evaluation mode. Needs ``torchrl-bcq[hydra]``.

    Nothing in the checkpoint is executed or unpickled.

    Args:
        run: folder of the run, or folder of a checkpoint of the run.
        checkpoint: ``"best"`` or ``"last"``. ``"best"`` loads the checkpoint with the best value of the metric that the
            run monitored. If the run kept no best checkpoint, ``"best"`` loads the last checkpoint.
        device: any torch device; ``"auto"`` selects cuda if it is available.

    Raises:
        RunError: if there is no checkpoint, if it cannot be loaded, or if ``checkpoint`` is another word.

    Example:
        >>> policy = load_policy("runs/first")  # folder made by: torchrl-bcq train out=runs/first
        >>> policy.act([1.0, 0.0, 0.0]).shape
        (1,)
    """
    from torchrl_bcq.runs.folder import load  # imported here, because omegaconf is an optional package

    return load(Path(run), checkpoint, device).policy.eval()
