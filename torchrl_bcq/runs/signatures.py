"""Settings that follow from signatures: names, types and defaults of arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, make_dataclass
from functools import partial, reduce
from operator import or_
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from omegaconf import MISSING

Settings = dict[str, Any]  # by name: (type, default), or the settings of a section
_SIMPLE = (bool, int, float, str)


def arguments_of(call: Callable) -> dict[str, inspect.Parameter]:
    """The arguments of a class or a function, with evaluated annotations; without ``*args`` and ``**kwargs``."""
    is_class = isinstance(call, type)
    function = getattr(call, "__init__", call) if is_class else call  # TorchRL's metaclasses hide signatures
    parameters = list(inspect.signature(function).parameters.values())
    named = [p for p in parameters[1 if is_class else 0 :] if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return {p.name: p.replace(annotation=_evaluate(p, function)) for p in named}


def settings_of(call: Callable, *names: str) -> Settings:
    """Type and default of each setting among the arguments of a class or a function, or of the named ones.

    A setting has a plain type: a number, text, a flag, or a sequence or mapping of them. Modules, specs, devices and
    positional arguments without a default are no settings. Without an annotation, the type is the default's.
    """
    found = {
        name: (kind, _default(p))
        for name, p in arguments_of(call).items()
        if (kind := _plain(p.annotation)) and (p.default is not p.empty or p.kind is p.KEYWORD_ONLY)
    }
    return {name: found[name] for name in names or found}


def fields_of(call: Callable) -> Settings:
    """Type and default of each argument of a class or a function; only settings have a type that is checked."""
    return {name: (_plain(p.annotation) or Any, _default(p)) for name, p in arguments_of(call).items()}


def make_section(name: str, settings: Settings, *bases: type) -> type:
    """Make a dataclass of settings and sections, whose names and types OmegaConf checks."""
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
    """The type of an argument, whose annotation may be text."""
    kind = parameter.annotation
    try:
        kind = eval(kind, getattr(inspect.unwrap(function), "__globals__", {})) if isinstance(kind, str) else kind
    except NameError:  # a name imported for type checkers only
        kind = parameter.empty
    return type(parameter.default) if kind is parameter.empty else kind


def _plain(kind: Any) -> Any:
    """A plain type as OmegaConf checks it; None for another one."""
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
    """The values of the settings that a class or a function takes."""
    return {name: settings[name] for name in settings_of(call) if name in settings}
