"""Reads the settings of a class or function from the names, types and defaults of its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, make_dataclass
from functools import partial, reduce
from operator import or_
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from omegaconf import MISSING

Settings = dict[str, Any]  # maps the name of a setting to (type, default), and the name of a section to its Settings
_SIMPLE = (bool, int, float, str)


def arguments_of(call: Callable) -> dict[str, inspect.Parameter]:
    """Return all arguments except ``*args`` and ``**kwargs``, by name; annotations in quotes become types."""
    is_class = isinstance(call, type)
    function = getattr(call, "__init__", call) if is_class else call  # TorchRL's metaclasses hide __init__'s signature
    parameters = list(inspect.signature(function).parameters.values())
    named = [p for p in parameters[1 if is_class else 0 :] if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return {p.name: p.replace(annotation=_evaluate(p, function)) for p in named}


def settings_of(call: Callable, *names: str) -> Settings:
    """Return the ``(type, default)`` of each argument that is a setting, or only of those in ``names``.

    A setting has a plain type: a number, text, a flag, or a sequence or mapping of these. Modules, specs, devices and
    positional arguments without a default are not settings. If an argument has no annotation, its type is the type of
    its default.
    """
    found = {
        name: (kind, _default(p))
        for name, p in arguments_of(call).items()
        if (kind := _plain(p.annotation)) and (p.default is not p.empty or p.kind is p.KEYWORD_ONLY)
    }
    return {name: found[name] for name in names or found}


def fields_of(call: Callable) -> Settings:
    """Return the ``(type, default)`` of each argument; a type that OmegaConf cannot check becomes ``Any``."""
    return {name: (_plain(p.annotation) or Any, _default(p)) for name, p in arguments_of(call).items()}


def make_section(name: str, settings: Settings, *bases: type) -> type:
    """Make a dataclass from settings and sections; OmegaConf uses this dataclass to check names and types."""
    fields: list[Any] = []
    for key, setting in settings.items():
        if isinstance(setting, dict):
            kind = make_section(key, setting)
            default = field(default_factory=kind)
        else:
            kind, default = setting
        if isinstance(default, (list, tuple, Mapping)):
            default = field(default_factory=partial(dict if isinstance(default, Mapping) else list, default))
        fields.append((key, kind, default))
    return make_dataclass(name, fields, bases=bases)


def _default(parameter: inspect.Parameter) -> Any:
    return MISSING if parameter.default is parameter.empty else parameter.default


def _evaluate(parameter: inspect.Parameter, function: Any) -> Any:
    """Return the type of an argument; evaluate its annotation if the annotation is a string."""
    kind = parameter.annotation
    try:
        kind = eval(kind, getattr(inspect.unwrap(function), "__globals__", {})) if isinstance(kind, str) else kind
    except NameError:  # a name that is imported only for type checkers; use the type of the default
        kind = parameter.empty
    return type(parameter.default) if kind is parameter.empty else kind


def _plain(kind: Any) -> Any:
    """Return the type that OmegaConf can check in place of ``kind``, or None if there is no such type."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind in _SIMPLE:
        return kind
    if origin is Literal:
        return type(inner[0])
    if origin in (Union, UnionType):
        members = [_plain(member) for member in inner if member is not NoneType]
        checked = None not in members and (len(members) == 1 or set(members) <= {*_SIMPLE})
        kinds = tuple(members) + ((NoneType,) if NoneType in inner else ())
        return reduce(or_, kinds) if checked else None
    if origin in (Sequence, list, tuple) and _plain(inner[0]):
        return list[_plain(inner[0])]  # type: ignore[misc]
    if origin in (Mapping, dict):
        return dict[str, _plain(inner[1]) or Any]  # type: ignore[misc]
    return None


def taken_by(call: Callable, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of ``settings`` that a class or function accepts as arguments."""
    return {name: settings[name] for name in settings_of(call) if name in settings}
