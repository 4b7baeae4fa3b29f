"""The options ``--env`` and ``--env-kwargs``, which choose an environment and its arguments."""

from __future__ import annotations

import argparse
from typing import Any

from torchrl_bcq.data.sources.environment import Environment, change_environment
from torchrl_bcq.errors import RunError

REMEDY = "choose another with --env ID, or set its arguments with --env-kwargs NAME=VALUE"


def add_options(command: argparse.ArgumentParser, text: str) -> None:
    """Add the options to the parser of a command; ``text`` is the help of ``--env``."""
    command.add_argument("--env", metavar="ID", help=f"{text}; MODULE:ID imports a Python module first")
    arguments = "arguments of the environment, such as g=9.8, or its time limit: max_episode_steps=500"
    command.add_argument("--env-kwargs", nargs="+", metavar="NAME=VALUE", help=arguments)


def choose_environment(args: argparse.Namespace, trained: Any = None) -> Environment | None:
    """Return the environment that the user chose, by default the environment of the run ``trained``."""
    kwargs = _parse(args.env_kwargs or [])
    env = change_environment(None if trained is None else trained.task.env, args.env, kwargs)
    if env is None and kwargs:
        raise RunError("--env-kwargs needs an environment; name it with --env ID.")
    if env is not None and trained is not None:
        from torchrl_bcq.runs.environment import check_trusted

        check_trusted(env, trained.path, {"id": args.env, **kwargs})
    return env


def _parse(words: list[str]) -> dict[str, Any]:
    """Convert words such as ``g=9.8`` and ``size=[1,2]`` to arguments; values are written as in YAML."""
    if odd := [word for word in words if not word.partition("=")[0] or "=" not in word]:
        raise RunError(f"--env-kwargs has {odd}, expected NAME=VALUE, such as g=9.8.")
    if not words:
        return {}
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.from_dotlist(words))  # type: ignore[return-value]
