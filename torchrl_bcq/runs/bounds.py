"""Chooses the bounds of the actions of a run: from the settings, the environment, the dataset's spec or the data."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, TensorSpec

from torchrl_bcq.bounds import action_box
from torchrl_bcq.data.checks import Checks
from torchrl_bcq.errors import RunError

DATA = "range of the data"
REMEDY = "set action_low and action_high"
_SIDES = ("low", "high")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Box:
    """The bounds of an action in float64, and where each bound comes from. A missing bound is infinite."""

    low: Tensor  # [A]
    high: Tensor  # [A]
    origins: tuple[list[str], list[str]]  # of the lower and of the upper bound of each dimension

    @property
    def spec(self) -> Bounded:
        """Action spec with these bounds."""
        return Bounded(self.low, self.high, self.low.shape, dtype=torch.float64)

    def check(self, remedy: str = REMEDY) -> None:
        """Raise a RunError if a lower bound is not below its upper bound."""
        for at in (self.low >= self.high).nonzero().flatten().tolist():
            found = [f"{side} {getattr(self, side)[at]:.6g} ({origin[at]})" for side, origin in self._sides()]
            raise RunError(
                f"the bounds of action dimension {at} are {' and '.join(found)}, but the lower bound must be below the "
                f"upper bound; {remedy}."
            )

    def report(self, low: Tensor, high: Tensor) -> None:
        """Log the bounds and where they come from, with warnings if they may not fit the data's range ``[A]``."""
        if len({*self.origins[0], *self.origins[1]}) == 1:
            _logger.info("action bounds: %s to %s (%s)", *map(_listed, (self.low, self.high)), self.origins[0][0])
        else:
            sides = (f"{side} {_listed(getattr(self, side))} ({', '.join(origin)})" for side, origin in self._sides())
            _logger.info("action bounds: %s", ", ".join(sides))
        if taken := [at for at, pair in enumerate(zip(*self.origins, strict=True)) if DATA in pair]:
            _logger.warning(
                "the bounds of the action dimensions %s come from the range of the data, because the settings, the "
                "environment and the dataset have none; if actions beyond this range are possible, %s.",
                taken,
                REMEDY,
            )

        if bool(((low >= -1) & (high <= 1) & (self.low < -1) & (self.high > 1)).all()):
            _logger.warning(
                "all recorded actions lie between -1 and 1, but the bounds are wider. If they were recorded before "
                "scaling, as by Tianshou with action_scaling=True, scale them to the units of the bounds."
            )

    def _sides(self) -> list[tuple[str, list[str]]]:
        return list(zip(_SIDES, self.origins, strict=True))


def choose_bounds(
    settings: Mapping[str, Any] | DictConfig, specs: Mapping[str, TensorSpec | None], names: Sequence[str] = _SIDES
) -> Box | None:
    """Choose each bound of each action dimension from the first source that has one.

    Args:
        settings: ``action_low`` and ``action_high``. Each is a number for all dimensions, or a list with one number per
            dimension, or None. None in a list leaves the bound of this dimension to ``specs``.
        specs: action specs by the names of their sources; the first has priority. A spec may be None.
        names: names of the two settings, for error messages.

    Returns:
        The bounds, or None if the number of action dimensions is unknown.

    Raises:
        RunError: if a setting is not finite numbers, a spec is not a float vector, or the numbers of dimensions differ.
    """
    given = [_read(settings[f"action_{side}"], name) for side, name in zip(_SIDES, names, strict=True)]
    boxes: dict[str, tuple[Tensor, ...]] = {}
    for source, spec in specs.items():
        try:
            boxes |= {} if spec is None else {source: tuple(bound.cpu().double() for bound in action_box(spec))}
        except ValueError as error:
            raise RunError(f"{source}: {error}") from error
    sizes = {name: len(values) for name, values in zip(names, given, strict=True) if values.ndim}
    sizes |= {source: len(low) for source, (low, _) in boxes.items()}
    if len({*sizes.values()}) > 1:
        raise RunError(f"the number of action dimensions differs: {sizes}; give one number for each dimension.")
    if not sizes:
        return None
    size = next(iter(sizes.values()))
    boxes = {"setting": tuple(values.expand(size) for values in given), **boxes}
    chosen, origins = [], []
    for side in (0, 1):
        bounds, origin = torch.full((size,), (-1, 1)[side] * math.inf, dtype=torch.float64), ["unbounded"] * size
        for at in range(size):
            for source, box in boxes.items():
                if box[side][at].isfinite():
                    bounds[at], origin[at] = box[side][at], source
                    break
        chosen.append(bounds)
        origins.append(origin)
    return Box(chosen[0], chosen[1], (origins[0], origins[1]))


def clip_actions(transitions: TensorDictBase, box: Box) -> TensorDictBase:
    """Return the transitions with clipped actions; log how many rows were clipped."""
    low, high = box.low.float(), box.high.float()  # rounded like the actions of the data
    action = transitions["action"]
    beyond = ((action < low) | (action > high)).any(-1)
    if not beyond.any():
        return transitions
    rows, first = int(beyond.sum()), int(beyond.long().argmax())
    _logger.warning("action_clip: clipped the actions of %d of %d transitions (first: %d)", rows, len(beyond), first)
    return transitions.copy().set("action", action.clamp(low, high))


def check_actions(transitions: TensorDictBase, box: Box) -> None:
    """Raise a DatasetError if an action lies outside the bounds."""
    Checks(box.spec).check_all({"actions": transitions["action"], "rewards": transitions["next", "reward"]})


def _read(value: Any, name: str) -> Tensor:
    """Return a number as a tensor ``[]``, or a list of numbers as a tensor ``[A]``; NaN stands for None."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    values = list(value) if is_list else [value]
    if not values or not all(one is None or (type(one) in (int, float) and math.isfinite(one)) for one in values):
        raise RunError(f"{name} is {value!r}, expected a number, or a list with one number for each action dimension.")
    numbers = torch.tensor([math.nan if one is None else one for one in values], dtype=torch.float64)
    return numbers if is_list else numbers[0]


def _listed(bounds: Tensor) -> str:
    return f"[{', '.join(f'{bound:.6g}' for bound in bounds.tolist())}]"
