"""The options that choose an environment and its observation, and the help of ``--dataset``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from torchrl_bcq.data.sources.environment import Environment, change_environment
from torchrl_bcq.errors import RunError

DATASET = "new path or name of the dataset, if it has moved"
REMEDY = "choose another with --env ID, or set its arguments with --env-kwargs NAME=VALUE"


def add_options(command: argparse.ArgumentParser, text: str) -> None:
    """Add the options to the parser of a command; ``text`` is the help of ``--env``."""
    command.add_argument("--env", metavar="ID", help=f"{text}; MODULE:ID imports a Python module first")
    arguments = "arguments of the environment, such as g=9.8, or its time limit: max_episode_steps=500"
    command.add_argument("--env-kwargs", nargs="+", metavar="NAME=VALUE", help=arguments)
    entries = "entries of a Dict observation that are joined to one vector, in this order"
    command.add_argument("--observation", nargs="+", metavar="ENTRY", help=entries)


def choose_environment(args: argparse.Namespace, trained: Any = None) -> Environment | None:
    """Return the environment that the user chose, by default the environment of the run ``trained``."""
    kwargs = _parse(args.env_kwargs or [])
    known, entries = (None, None) if trained is None else (trained.task.env, trained.task.observation)
    if args.observation is not None and entries not in (None, args.observation):
        raise RunError(f"--observation is {args.observation}, but the run was trained on {entries}; leave it out.")
    env = change_environment(known, args.env, kwargs, observation=args.observation or entries)
    if env is None and kwargs:
        raise RunError("--env-kwargs needs an environment; name it with --env ID.")
    if env is not None and trained is not None:
        from torchrl_bcq.runs.environment import check_trusted

        check_trusted(env, trained.path, {"id": args.env, **kwargs})
        env = replace(env, stack=trained.task.stack)
    return env


def _parse(words: list[str]) -> dict[str, Any]:
    """Convert words such as ``g=9.8`` and ``size=[1,2]`` to arguments; values are written as in YAML."""
    if odd := [word for word in words if not word.partition("=")[0] or "=" not in word]:
        raise RunError(f"--env-kwargs has {odd}, expected NAME=VALUE, such as g=9.8.")
    if not words:
        return {}
    from omegaconf import OmegaConf

    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist(words), resolve=True)  # type: ignore[return-value]
    except Exception as error:  # the YAML parser and OmegaConf raise errors of many kinds
        expected = "NAME=VALUE with a value as in YAML, such as g=9.8 or size=[1,2]; put text in quotes"
        raise RunError(f"--env-kwargs {' '.join(words)} cannot be read, expected {expected}.") from error
