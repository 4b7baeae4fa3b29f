"""Reads the transitions of a run, and finds the bounds or the number of its actions."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDictBase
from torchrl.data import Bounded, Categorical, TensorSpec, Unbounded

from torchrl_bcq.actions import DiscreteActions, number_of
from torchrl_bcq.data import DatasetError, load_transitions, stack_observations
from torchrl_bcq.data.frames import stack_in_folder
from torchrl_bcq.data.registry import has_discrete_actions
from torchrl_bcq.errors import RunError
from torchrl_bcq.runs import processes
from torchrl_bcq.runs.algorithms import algorithms_of, find_algorithm
from torchrl_bcq.runs.bounds import DATA, check_actions, choose_bounds, clip_actions
from torchrl_bcq.runs.overrides import check_reader, set_value

Specs = Mapping[str, TensorSpec | None]  # action specs by the names of their sources; the first has priority
EARLIER = "run of init_from"  # the name of this source
_KINDS = ("continuous", "discrete")
_ONE_HOT = DiscreteActions.of("one-hot")
_logger = logging.getLogger(__name__)


def suitable_algorithm(values: Mapping[str, Any]) -> str:
    """Return the main algorithm for the actions of the dataset that the settings ``values`` name.

    The dataset is read only as far as this needs; its errors are those of ``load_transitions``. Without a dataset,
    return the main algorithm for continuous actions.
    """
    if "dataset" not in values:
        return algorithms_of(discrete=False)[0]
    given = OmegaConf.create({"reader": {}})
    for name, value in values.items():
        if name.partition(".")[0] == "reader":
            set_value(given, name, value)
    reader: Any = OmegaConf.to_container(given)["reader"]  # type: ignore[index, call-overload]
    reader = check_reader(values["dataset"], reader)
    return algorithms_of(has_discrete_actions(values["dataset"], **reader))[0]


def read(settings: DictConfig, specs: Specs, reader: Mapping[str, Any]) -> tuple[TensorDictBase, dict[str, Any]]:
    """Read the transitions of a run, and return facts about its actions, which are fields of ``Task``.

    Raises:
        RunError: if the actions are not of the kind that the algorithm needs, or a setting is invalid.
        DatasetError: if the dataset cannot be read or has defects, or an action is not one of those expected.
    """
    discrete = find_algorithm(settings.algorithm).discrete
    return (_read_discrete if discrete else _read_continuous)(settings, specs, reader)


def check_kinds(algorithm: str, specs: Specs) -> None:
    """Raise a RunError if an action spec is not of the kind that the algorithm needs."""
    for source, spec in specs.items():
        if spec is not None and (number_of(spec) is not None) != find_algorithm(algorithm).discrete:
            raise _wrong_kind(source, algorithm)


def _wrong_kind(where: str, algorithm: str) -> RunError:
    needed = find_algorithm(algorithm).discrete
    if where == EARLIER:
        found = f"the run of init_from has {_KINDS[not needed]} actions, but algorithm={algorithm} needs"
        return RunError(f"{found} {_KINDS[needed]} actions; choose another run, or leave init_from out.")
    other = "choose another environment with evaluation.env=ID"
    if not where.startswith("environment"):
        other = f"set reader.action_type={_KINDS[needed]} if the actions are {_KINDS[needed]}"
    return RunError(
        f"{where}: the actions are {_KINDS[not needed]}, but algorithm={algorithm} needs {_KINDS[needed]} actions; set "
        f"algorithm={' or '.join(algorithms_of(not needed))}, or {other}."
    )


def _load(settings: DictConfig, spec: TensorSpec | None, reader: Mapping[str, Any]) -> TensorDictBase:
    """Read the transitions, and stack their observations."""
    transitions = load_transitions(settings.dataset, action_spec=spec, root=settings.root, **reader)
    if (not transitions["action"].is_floating_point()) != find_algorithm(settings.algorithm).discrete:
        raise _wrong_kind(f"dataset {settings.dataset}", settings.algorithm)
    if settings.stack > 1 and settings.root is not None and transitions.is_memmap():
        return stack_in_folder(transitions, settings.stack)
    return stack_observations(transitions, settings.stack) if settings.stack > 1 else transitions


def _read_discrete(settings: DictConfig, specs: Specs, reader: Mapping[str, Any]) -> tuple[TensorDictBase, dict]:
    """Read transitions with discrete actions. A number of actions that no source has is taken from the data."""
    known = {"setting n_actions": settings.n_actions}
    known |= {source: number_of(spec) for source, spec in specs.items() if spec is not None}
    if settings.n_actions is not None and settings.n_actions < 2:
        raise RunError(f"n_actions is {settings.n_actions}, expected at least 2, or null.")
    origin, number = next(((origin, found) for origin, found in known.items() if found), (DATA, None))
    transitions = _load(settings, None if number is None else Categorical(number), reader)
    masks, stored = transitions.get("action_mask", None), transitions["action"]
    if stored.ndim == 2:  # copies of rollouts hold indices [N, 1], or one-hot vectors [N, K]
        width = stored.shape[1]
        index = stored if width == 1 else _ONE_HOT.to_index(stored, transitions.batch_size, width)
        transitions = transitions.copy().set("action", index.reshape(-1).long())
        origin, number = ("one-hot actions", width) if width > 1 and number is None else (origin, number)
    if number is None:
        origin, number = (DATA, int(transitions["action"].max()) + 1) if masks is None else ("masks", masks.shape[-1])
    if masks is not None and masks.shape[-1] != number:
        found = f"action_mask has {masks.shape[-1]} columns, but there are {number} actions ({origin})"
        raise DatasetError(f"{found}; store one column for each action, or correct n_actions.")
    if processes.is_first():
        _logger.info("number of actions: %d (%s)", number, origin)
        if origin == DATA:
            message = "the number of actions is that of the largest recorded action, %d, plus 1; %s."
            _logger.warning(message, number - 1, "if there are more actions, set n_actions")
    return transitions, {"n_actions": number, "has_mask": masks is not None}


def _read_continuous(settings: DictConfig, specs: Specs, reader: Mapping[str, Any]) -> tuple[TensorDictBase, dict]:
    """Read the transitions; check or clip their actions. Bounds that no source has are the range of the data."""
    box, spec = choose_bounds(settings, specs), None
    chosen = box
    if box is not None:
        box.check()
        spec = Unbounded(box.low.shape) if settings.action_clip else box.spec
    try:
        transitions = _load(settings, spec, reader)
        low, high = transitions["action"].aminmax(dim=0)
        chosen = choose_bounds(settings, {**specs, DATA: Bounded(low, high, low.shape)})
        assert chosen is not None
        chosen.check()
        if settings.action_clip:
            transitions = clip_actions(transitions, chosen)
        elif box is None:
            check_actions(transitions, chosen)
    except DatasetError as error:
        message = str(error)
        if chosen is not None and "action bounds" in message:
            origins = " and ".join(dict.fromkeys(source for side in chosen.origins for source in side))
            message += f" These bounds come from: {origins}."
        raise DatasetError(message) from error.__cause__
    if processes.is_first():
        chosen.report(low, high)
    return transitions, {"action_low": chosen.low.tolist(), "action_high": chosen.high.tolist()}
