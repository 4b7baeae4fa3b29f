"""Checks that losses and weights stay finite, and reports the step, the loss and the rows if not."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer

from torchrl_bcq.files import write_whole
from torchrl_bcq.objectives import OfflineLoss

_REMEDY = "If the dataset is finite, lower the learning rate, set clip_norm, or scale the rewards."
_SHOWN = 10  # rows in a message


class LossWatch:
    """Remembers the losses and the rows (of a replay buffer) of several gradient steps, and checks them together.

    This waits for a device once per log interval, and still knows the step, the loss and the rows.
    """

    def __init__(self, replay_buffer: ReplayBuffer) -> None:
        self._buffer = replay_buffer
        self.begin(0)

    def begin(self, steps_before: int) -> None:
        """Forget all steps; the next one is the one after ``steps_before``."""
        self._before = steps_before
        self._rows: list[Tensor | None] = []
        self._losses: list[tuple[int, str, Tensor]] = []

    def next_step(self, batch: TensorDictBase) -> None:
        """Begin a gradient step on a batch, whose ``index`` names its rows."""
        self._rows.append(batch.get("index", None))

    def add(self, losses: Mapping[str, Any]) -> None:
        """Remember the values ``[]`` of losses in the present step."""
        for name, value in losses.items():
            if name.startswith("loss_") or name.endswith("_loss"):
                self._losses.append((len(self._rows), name, value.detach()))

    def find(self) -> int | None:
        """Position of the first remembered loss that is not finite; None if all are."""
        values = [value for *_, value in self._losses]
        if not values or (finite := torch.stack(values).isfinite()).all():
            return None
        return int((~finite).nonzero()[0])

    def describe(self, place: int, folder: Path | None, last_good: str) -> str:
        """Describe the loss at a position from :meth:`find`, and write its batch to a folder, for inspection."""
        step, name, value = self._losses[place]
        rows = self._describe_rows(self._rows[step - 1], step, folder)
        return f"{name} is {value.item()} in gradient step {self._before + step}{rows}. {last_good} {_REMEDY}"

    def _describe_rows(self, rows: Tensor | None, step: int, folder: Path | None) -> str:
        if rows is None:
            return ", on rows that the replay buffer does not name"
        rows = rows.flatten()
        shown = ", ".join(map(str, rows[:_SHOWN].tolist())) + (" ..." if len(rows) > _SHOWN else "")
        found = f", on the {len(rows)} rows {shown} of the replay buffer"
        if folder is None:
            return found
        target = folder / f"not-finite-{self._before + step}.pt"
        try:
            self._write(rows, target)
        except OSError as error:
            return f"{found} (they could not be written to {target}: {error})"
        return f"{found}, kept for inspection: torch.load({str(target)!r})"

    def _write(self, rows: Tensor, target: Path) -> None:
        content = io.BytesIO()
        torch.save(self._buffer.storage[rows].clone().set("index", rows).cpu().to_dict(), content)
        with write_whole(target) as aside:
            aside.write_bytes(content.getbuffer())


def check_parameters(loss_module: OfflineLoss, steps: int, last_good: str) -> None:
    """Raise a FloatingPointError if a weight or target is not finite: a gradient was not, though the losses were."""
    state = {name: value for name, value in loss_module.state_dict().items() if value.is_floating_point()}
    finite = torch.stack([value.isfinite().all() for value in state.values()])
    if not finite.all():
        broken = [name for name, is_finite in zip(state, finite.tolist(), strict=True) if not is_finite]
        raise FloatingPointError(
            f"{len(broken)} of the weights are not finite after {steps} gradient steps, such as {broken[0]}. "
            f"{last_good} {_REMEDY}"
        )
