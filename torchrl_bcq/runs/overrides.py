"""Reads settings that a user types as ``NAME=VALUE``: their values, and the nearest name of an unknown setting."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import product
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from torchrl_bcq.data.registry import NOT_SETTINGS, find_reader
from torchrl_bcq.errors import RunError
from torchrl_bcq.files import home
from torchrl_bcq.runs.signatures import fields_of, make_section

_EXPECTED = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}  # by OmegaConf's name
PATHS = ("dataset", "root", "resume", "init_from")  # settings whose values are paths of existing files or folders


def read_words(words: Iterable[str], texts: Collection[str], *, sweep: bool | None = False) -> list[dict[str, Any]]:
    """Return the settings of each run as a dict from names to values; values are written in Hydra's syntax.

    The value of a setting in ``texts`` is text. Hydra's syntax is used for it only if the value has quotes, brackets,
    ``$`` or a backslash, and is not the path of an existing file. Any other value that is not in Hydra's syntax is a
    list or dictionary as in YAML, or text. ``sweep`` is None for a command that cannot make several runs.

    Raises:
        RunError: if a word is not a setting or has no value that can be read, or if a setting has several values and
            ``sweep`` is not True.
    """
    from hydra.core.utils import setup_globals

    setup_globals()  # defines ${now:...}
    choices: dict[str, list[Any]] = {}
    for word in words:
        name, sign, raw = word.partition("=")
        name = re.sub(r"^\+{1,2}", "", name)
        if not (name and sign) or name.startswith("~"):
            example = f", such as dataset={word}" if not sign and _exists(word) else ""
            raise RunError(f"{word} is not a setting; write a setting as NAME=VALUE{example}.")
        if not raw and name in (*PATHS, "out"):
            raise RunError(f"{name} has no value; write a setting as NAME=VALUE.")
        values = _read(name, raw, name in texts, bool(sweep))
        if name in (*PATHS, "out"):  # shells do not expand ~ after =
            try:
                values = [str(home(value)) if str(value).startswith("~") else value for value in values]
            except FileNotFoundError as error:
                raise RunError(f"{name}: {error}") from None
        if len(values) > 1 and not sweep:
            *others, last = _remedies(name, raw, name in texts)[sweep is None :]
            how = f"{', '.join(others)}, or {last}" if others else last
            raise RunError(f"{word} has {len(values)} values; {how}.")
        choices.pop(name, None)  # of two values of a setting, the last one counts
        choices[name] = values
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


def _read(name: str, raw: str, text: bool, sweep: bool) -> list[Any]:
    """Return the values of a setting: one value, or all the values that a sweep takes in turn."""
    if name == "resume" and raw.lower() in ("true", "false"):
        return [raw.lower() == "true"]
    parts = raw.split(",")
    if name in PATHS and _exists(raw) and not (sweep and len(parts) > 1 and all(map(_exists, parts))):
        return [raw.replace("${", "\\${")]
    if text and not set(raw) & set("'\"([{$\\"):
        return [None if part.strip().lower() == "null" else part.strip() for part in parts]
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    try:
        part = parser.parse_override(f"value={raw}")
        if not part.is_sweep_override():
            return [part.value()]
        return [parser.parse_override(f"value={value}").value() for value in part.sweep_string_iterator()]
    except Exception as error:  # Hydra raises errors of many classes, whose texts describe its grammar
        return _read_otherwise(name, raw, text, sweep, error)


def _read_otherwise(name: str, raw: str, text: bool, sweep: bool, error: Exception) -> list[Any]:
    """Return the values of a setting if ``raw`` is not in Hydra's syntax."""
    if raw.lstrip()[:1] in ("[", "{"):
        try:
            return [OmegaConf.to_container(OmegaConf.create(raw))]
        except Exception:  # the YAML parser and OmegaConf raise errors of many kinds
            if not text:
                advice = "write a list as [A, B], a dictionary as {NAME: VALUE}, and put other characters in quotes"
                raise RunError(f"the value of {name} cannot be read: {raw}; {advice}.") from error
    return [part.strip() for part in raw.split(",")] if sweep and raw.strip(", ") else [raw]


def _exists(path: str) -> bool:
    return bool(path) and os.path.exists(os.path.expanduser(path))


def _remedies(name: str, raw: str, text: bool) -> list[str]:
    """Return the ways to write a setting that has a comma in its value; the first one makes several runs."""
    ways = ["add -m to make a run for each value"]
    if name == "reader":
        ways.append("write a dictionary, as in 'reader={NAME: VALUE}'")
    elif not text:
        ways.append(f"write a list as {name}=[{raw}]")
    if text or name.startswith("reader."):
        quoted = '{}="{}"'.format(name, raw.replace('"', '\\"'))
        ways.append(f"write text that contains a comma in quotes, as {shlex.quote(quoted)}")
    return ways


def nearest(name: str, known: Sequence[str]) -> list[str]:
    """Return the names that a user may have meant by ``name``: at most three, with the most likely first."""
    last = name.rpartition(".")[2]
    ends = {other.rpartition(".")[2]: other for other in reversed(known)}
    alike = [other for other in known if other.startswith(f"{name}.") or name.startswith(f"{other}.")]
    alike = alike or [other for other in known if other.rpartition(".")[2] == last]
    close = get_close_matches(name, known, 1, 0.75) or [ends[end] for end in get_close_matches(last, ends, 1, 0.75)]
    return alike[:3] or close


def check_name(name: str, known: Sequence[str]) -> None:
    """Raise a RunError that names the nearest settings if ``name`` is not in ``known``."""
    if name not in known:
        near, section = nearest(name, known), name.rpartition(".")[0]
        advice = f"did you mean {' or '.join(near)}?" if near else "see torchrl-bcq train --help."
        if not near and (others := [other for other in known if section and other.rpartition(".")[0] == section]):
            advice = f"the settings of {section} are {', '.join(others)}."
        raise RunError(f"there is no setting {name}; {advice}")


def set_value(settings: DictConfig, name: str, value: Any, *, merge: bool = True) -> None:
    """Set a setting; raise a RunError if it cannot have this value. An unknown name raises OmegaConf's errors.

    A dictionary is merged into the current one, unless ``merge`` is False.
    """
    try:
        OmegaConf.update(settings, name, value, merge=merge)
    except (ConfigAttributeError, ConfigKeyError):
        raise
    except OmegaConfBaseException as error:
        if "to Integer" in str(error) and isinstance(value, float) and value.is_integer():  # such as 1e5
            return set_value(settings, name, int(value))
        raise _refusal(name, value, error) from error
    except (ValueError, IndexError) as error:  # OmegaConf expects the number of an item, or finds no name
        raise RunError(f"{name}={value} cannot be set: it names a part of a list; set the whole list.") from error


def _refusal(name: str, value: Any, error: OmegaConfBaseException) -> RunError:
    """Return the error for a setting that cannot have a value."""
    why = str(error).splitlines()[0]
    expected = next((text for kind, text in _EXPECTED.items() if f"converted to {kind}" in why), None)
    if expected is not None and not isinstance(value, (list, dict)):
        return RunError(f"{name} is {value!r}, expected {expected}.")
    why = f"write a list, such as {name}=[{value}]." if "is not a ListConfig" in why else why
    return RunError(f"{name} cannot be {value!r}: {why}")


def check_reader(dataset: str | Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the names and types of the settings in ``reader``, and return them with these types.

    The settings are the arguments of the function that reads the format of ``dataset``. Nothing is checked if the
    format is unknown, because then TorchRL's ``load_dataset`` gets the arguments.

    Raises:
        RunError: if the reader has no such setting, or the setting has another type.
    """
    if not isinstance(given, Mapping):
        raise RunError(f"reader is {given!r}, expected settings of the reader, such as reader.max_episode_steps=100.")
    if not given or (reader := find_reader(dataset)) is None:
        return dict(given)
    _, *others = fields_of(reader).items()  # the first argument is the path or id
    settings = {name: setting for name, setting in others if name not in NOT_SETTINGS}
    checked = OmegaConf.structured(make_section("reader", settings))
    for name, value in given.items():
        if name not in settings:
            names = dataset if isinstance(dataset, str) else ", ".join(dataset)
            near = get_close_matches(str(name), settings, 1)
            advice = f"did you mean reader.{near[0]}?" if near else f"expected one of {[*settings]}."
            raise RunError(f"there is no setting reader.{name} for {names}; {advice}")
        try:
            is_one = isinstance(value, str) and "list[" in str(settings[name][0])
            checked[name] = [value] if is_one else value
        except OmegaConfBaseException as error:
            raise _refusal(f"reader.{name}", value, error) from error
    typed: Any = OmegaConf.to_container(checked)
    return {name: typed[name] for name in given}
