"""Losses and weights stay finite, or it is said which one did not, and when, and on which rows."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer

from torchrl_bcq.objectives import BCQLoss

_REMEDY = "If the dataset is finite, lower the learning rate, set clip_norm, or scale the rewards."
_SHOWN = 10  # rows in a message


class LossWatch:
    """Remembers the losses and rows of some gradient steps, and checks all of them at once.

    So a device that works ahead is waited for once, and the step, the loss and the rows are known all the same.

    Args:
        replay_buffer: where the rows come from.
    """

    def __init__(self, replay_buffer: ReplayBuffer) -> None:
        self._buffer = replay_buffer
        self.begin(0)

    def begin(self, steps_before: int) -> None:
        """Forget what was remembered; the next step is the one after ``steps_before``."""
        self._before = steps_before
        self._rows: list[Tensor | None] = []
        self._losses: list[tuple[int, str, Tensor]] = []

    @property
    def steps(self) -> int:
        """Gradient steps since the beginning."""
        return len(self._rows)

    def next_step(self, batch: TensorDictBase) -> None:
        """Begin a gradient step on a batch, whose ``index`` names its rows."""
        self._rows.append(batch.get("index", None))

    def add(self, losses: Mapping[str, Any]) -> None:
        """Remember the values ``[]`` of losses in the present step."""
        for name, value in losses.items():
            if name.startswith("loss_") or name.endswith("_loss"):
                self._losses.append((self.steps, name, value.detach()))

    def find(self) -> int | None:
        """Check all losses that are remembered: the place of the first that is not finite, None if all are."""
        values = [value for *_, value in self._losses]
        if not values or (finite := torch.stack(values).isfinite()).all():
            return None
        return int((~finite).nonzero()[0])

    def describe(self, place: int, folder: Path | None, last_good: str) -> str:
        """Say which loss it is.

        Args:
            place: where it was found.
            folder: where its batch is written, for inspection.
            last_good: names the last good checkpoint.
        """
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
        content, aside = io.BytesIO(), target.with_name(f".{target.name}")
        torch.save(self._buffer.storage[rows].clone().set("index", rows).cpu().to_dict(), content)
        aside.write_bytes(content.getbuffer())
        aside.replace(target)


def check_parameters(loss_module: BCQLoss, steps: int, last_good: str) -> None:
    """Whether all weights and targets are finite.

    Raises:
        FloatingPointError: if not: a gradient was not, though the losses were.
    """
    state = {name: value for name, value in loss_module.state_dict().items() if value.is_floating_point()}
    finite = torch.stack([value.isfinite().all() for value in state.values()])
    if not finite.all():
        broken = [name for name, is_finite in zip(state, finite.tolist(), strict=True) if not is_finite]
        raise FloatingPointError(
            f"{len(broken)} of the weights are not finite after {steps} gradient steps, such as {broken[0]}. "
            f"{last_good} {_REMEDY}"
        )
