"""Checks that losses and weights stay finite; reports the step and rows of a loss that is not finite."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer

from torchrl_bcq.data.frame_stack import gather_frames
from torchrl_bcq.errors import remedy
from torchrl_bcq.files import write_whole
from torchrl_bcq.objectives import OfflineLoss

_SHOWN = 10  # largest number of rows that a message lists


def _advice() -> str:
    settings = remedy("set clip_norm, or scale the rewards", "set optim.clip_norm, or set reward.scale")
    return f"If the dataset has finite values only, lower the learning rate, {settings}."


class LossWatch:
    """Stores losses and replay-buffer rows of several gradient steps, and checks all losses at once.

    The trainer checks only once per log interval, because each check waits for the device. The error message
    still names the step, the loss and the rows of the batch.
    """

    def __init__(self, replay_buffer: ReplayBuffer) -> None:
        self._buffer = replay_buffer
        self.begin(0)

    def begin(self, steps_before: int) -> None:
        """Delete all stored losses and rows; the next gradient step has the number ``steps_before + 1``."""
        self._before = steps_before
        self._rows: list[Tensor | None] = []
        self._losses: list[tuple[int, str, Tensor]] = []

    def next_step(self, batch: TensorDictBase) -> None:
        """Begin a new gradient step and store the row numbers of its batch, ``batch["index"]``."""
        self._rows.append(batch.get("index", None))

    def add(self, losses: Mapping[str, Any]) -> None:
        """Store the losses of the current step. Each loss is a scalar of shape ``[]``."""
        for name, value in losses.items():
            if name.startswith("loss_") or name.endswith("_loss"):
                self._losses.append((len(self._rows), name, value.detach()))

    def find(self) -> int | None:
        """Return the index of the first stored loss that is not finite, or None if all are finite."""
        values = [value for *_, value in self._losses]
        if not values or (finite := torch.stack(values).isfinite()).all():
            return None
        return int((~finite).nonzero()[0])

    def describe(self, place: int, folder: Path | None, last_good: str) -> str:
        """Return an error message about the stored loss number ``place``; save its batch in ``folder``."""
        step, name, value = self._losses[place]
        rows = self._describe_rows(self._rows[step - 1], step, folder)
        return f"{name} is {value.item()} in gradient step {self._before + step}{rows}. {last_good} {_advice()}"

    def _describe_rows(self, rows: Tensor | None, step: int, folder: Path | None) -> str:
        if rows is None:
            return ", on rows whose numbers the replay buffer does not return"
        rows = rows.flatten()
        shown = ", ".join(map(str, rows[:_SHOWN].tolist())) + (" ..." if len(rows) > _SHOWN else "")
        found = f", on the {len(rows)} rows {shown} of the replay buffer"
        if folder is None:
            return found
        target = folder / f"not-finite-{self._before + step}.pt"
        try:
            self._write(rows, target)
        except Exception as error:  # a disk, or a storage of another kind; the loss is more important
            return f"{found} (the rows could not be written to {target}: {error})"
        command = f"{target} holds these rows; torchrl-bcq describe lists defects of a dataset"
        return f"{found}; {remedy(f'to inspect them, call torch.load({str(target)!r})', command)}"

    def _write(self, rows: Tensor, target: Path) -> None:
        content = io.BytesIO()
        found = self._buffer.storage[rows]
        batch = gather_frames(torch.stack(found) if isinstance(found, list) else found).clone()
        torch.save(batch.set("index", rows).cpu().to_dict(), content)
        with write_whole(target) as aside:
            aside.write_bytes(content.getbuffer())


def check_parameters(loss_module: OfflineLoss, steps: int, last_good: str) -> None:
    """Raise a FloatingPointError if a weight of the loss module's networks is NaN or infinite."""
    state = {name: value for name, value in loss_module.state_dict().items() if value.is_floating_point()}
    finite = torch.stack([value.isfinite().all() for value in state.values()])
    if not finite.all():
        broken = [name for name, is_finite in zip(state, finite.tolist(), strict=True) if not is_finite]
        raise FloatingPointError(
            f"{len(broken)} of {len(state)} weight tensors, such as {broken[0]}, have values that are not finite after "
            f"{steps} gradient steps. {last_good} {_advice()}"
        )
