"""Describes environments by plain values: the environment that a dataset names, and changes that a user makes to it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torchrl_bcq.errors import RunError


@dataclass(frozen=True)
class Environment:
    """The arguments of ``gymnasium.make`` for one environment.

    Args:
        id: Gymnasium id, or ``MODULE:ID`` if a Python module must be imported first.
        kwargs: arguments of the environment.
        max_episode_steps: time limit in steps; None for the time limit that is registered for the id.
        observation: names of the entries of a Dict observation that are joined to one vector, in this order; ``"a/b"``
            is the entry ``b`` of the entry ``a``. None for all entries, in the order of the environment.
        stack: number of last observations that an observation of the made environment joins.

    Example:
        >>> str(Environment("Pendulum-v1", {"g": 9.8}, max_episode_steps=100))
        'Pendulum-v1 (g=9.8, at most 100 steps)'
    """

    id: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_episode_steps: int | None = None
    observation: Sequence[str] | None = None
    stack: int = 1

    def __str__(self) -> str:
        """Return the id, followed by the arguments and the time limit in brackets."""
        facts = [f"{name}={value!r}" for name, value in self.kwargs.items()]
        facts += [] if self.max_episode_steps is None else [f"at most {self.max_episode_steps} steps"]
        facts += [] if self.observation is None else [f"observation of {' + '.join(self.observation)}"]
        facts += [] if self.stack == 1 else [f"states of {self.stack} observations"]
        return f"{self.id} ({', '.join(facts)})" if facts else self.id

    @classmethod
    def of(cls, env: str | Environment) -> Environment:
        """Return ``env``, or the environment with the id ``env``."""
        return cls(env) if isinstance(env, str) else env

    @property
    def named_code(self) -> dict[str, Any]:
        """The id and the arguments that can make Gymnasium import a module: those that contain a colon."""
        named = {"id": self.id} if ":" in self.id else {}
        return named | {name: value for name, value in self.kwargs.items() if _has_colon(value)}


@dataclass(frozen=True)
class RecordedEnvironment(Environment):
    """The environment that a dataset names for evaluation. Its id names no module.

    Args:
        module: package that contains the code of the environment, according to the dataset; it is never imported.
        notes: sentences about differences between this environment and the recorded one.
    """

    module: str | None = None
    notes: tuple[str, ...] = ()


def recorded_environment(
    env_id: object, kwargs: object = None, max_episode_steps: object = None, *, entry_point: object = None,
    wrappers: Iterable[Any] = (),
) -> RecordedEnvironment | None:  # fmt: skip
    """Read the description of an environment in a file; returns None if the file contains no valid id.

    Nothing that the file names is imported: neither a module in the id, nor ``entry_point``, nor ``wrappers``.
    """
    name = env_id.decode(errors="replace") if isinstance(env_id, bytes) else env_id
    if not isinstance(name, str) or not (parts := re.fullmatch(r"(?:([\w.]+):)?([\w./-]+)", name)):
        return None
    module, notes = parts[1], []
    if module is None and isinstance(entry_point, str):
        module = re.split(r"[.:]", entry_point)[0]
    try:
        found: Any = json.loads(kwargs) if isinstance(kwargs, (str, bytes)) else kwargs or {}
        arguments = {str(name): value for name, value in found.items() if name != "render_mode"}
    except (ValueError, AttributeError, RecursionError):  # no JSON, no dictionary, or thousands of brackets
        arguments, notes = {}, ["its arguments cannot be read"]
    if unsafe := [name for name, value in arguments.items() if _has_colon(value)]:
        notes.append(f"its arguments {unsafe} are not used, because a text with a colon can name code")
        arguments = {name: value for name, value in arguments.items() if name not in unsafe}
    if names := [str(wrapper.get("name", wrapper)) for wrapper in wrappers]:
        notes.append(f"its wrappers {names} are not used, because code that a dataset names is not loaded")
    try:
        limit = int(max_episode_steps)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        limit = 0
    return RecordedEnvironment(parts[2], arguments, limit if limit > 0 else None, module=module, notes=tuple(notes))


def change_environment(
    known: Environment | None, env_id: str | None, kwargs: Mapping[str, Any], max_episode_steps: int | None = None,
    observation: Sequence[str] | None = None,
) -> Environment | None:  # fmt: skip
    """Return the environment that a user chose.

    Args:
        known: the environment of the dataset or of the run.
        env_id: id that the user named; None for the id of ``known``. The arguments and the time limit of ``known``
            remain if the user named the same id, with or without a module.
        kwargs: arguments that the user changes. ``max_episode_steps`` among them changes the time limit.
        max_episode_steps: time limit, if the user changes the time limit.
        observation: entries of the observation, if the user names them. Otherwise, the entries of ``known`` remain.

    Returns:
        The environment, or None if there is neither a known environment nor an ``env_id``.
    """
    observation = observation or (None if known is None else known.observation)
    if env_id is not None and (known is None or env_id.rpartition(":")[2] != known.id.rpartition(":")[2]):
        known = Environment(env_id)
    if known is None:
        return None
    changed = {**known.kwargs, **kwargs}
    limit = changed.pop("max_episode_steps", None)
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise RunError(f"max_episode_steps is {limit!r}, expected a whole number of at least 1.")
    limit = limit or max_episode_steps or known.max_episode_steps
    return Environment(env_id or known.id, changed, limit, observation)


def recorded_in_hdf5(attributes: Mapping[str, Any]) -> RecordedEnvironment | None:
    """Read the environment from the attributes of an HDF5 file, as ``write_hdf5`` writes them."""
    found = recorded_environment(*(attributes.get(name) for name in ("env_id", "env_kwargs", "max_episode_steps")))
    if found is None or "observation_entries" not in attributes:
        return found
    try:
        entries = json.loads(attributes["observation_entries"])
    except (TypeError, ValueError, RecursionError):  # no text, or no JSON
        entries = None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, str) for entry in entries):
        return replace(found, notes=(*found.notes, "the entries of its observation cannot be read"))
    return replace(found, observation=tuple(entries))


def recorded_in_minari(metadata: Mapping[str, Any]) -> RecordedEnvironment | None:
    """Read the environment for evaluation of a Minari dataset, by default the recorded one, from its metadata."""
    recorded, evaluated = (_from_spec(metadata.get(name)) for name in ("env_spec", "eval_env_spec"))
    if evaluated is None or recorded is None:
        return evaluated or recorded
    if str(evaluated) == str(recorded):
        return evaluated
    note = f"the dataset was recorded in another environment, {recorded}"
    return replace(evaluated, notes=(*evaluated.notes, note))


def _from_spec(text: Any) -> RecordedEnvironment | None:
    """Read the JSON form of Gymnasium's ``EnvSpec``."""
    try:
        spec = json.loads(text)
        facts = (spec.get(name) for name in ("id", "kwargs", "max_episode_steps"))
        wrappers = spec.get("additional_wrappers") or ()
        return recorded_environment(*facts, entry_point=spec.get("entry_point"), wrappers=wrappers)
    except (TypeError, ValueError, AttributeError, RecursionError):  # no text, no JSON, or no dictionary
        return None


def _has_colon(value: Any) -> bool:
    """Return whether a text in ``value``, also in lists and dictionaries, contains a colon."""
    if isinstance(value, Mapping):
        return any(_has_colon(item) for pair in value.items() for item in pair)
    return any(map(_has_colon, value)) if isinstance(value, (list, tuple)) else isinstance(value, str) and ":" in value
