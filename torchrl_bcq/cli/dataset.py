"""``torchrl-bcq describe`` and ``torchrl-bcq convert``: describe a dataset, or make a memory-mapped copy of it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any

from torchrl.data import Categorical, TensorSpec

from torchrl_bcq.actions import number_of
from torchrl_bcq.data import DatasetError, load_transitions
from torchrl_bcq.data.origins import Origins
from torchrl_bcq.data.registry import find_source
from torchrl_bcq.data.sources.environment import change_environment
from torchrl_bcq.errors import RunError
from torchrl_bcq.evaluation.environments import make_base_env
from torchrl_bcq.files import check_writable, home
from torchrl_bcq.reports.description import describe

_SOURCES = """\
sources:
  FILE.hdf5 FILE.npz       files with the field names of D4RL, or other common names
  FILE.csv FILE.parquet    tables with one step per row; name the columns by reader.observation, reader.action, ...
  minari:ID                a Minari dataset, such as minari:mujoco/hopper/medium-v0
  d4rl:ID                  a D4RL dataset, such as d4rl:hopper-medium-v2; it is downloaded once
  FOLDER                   a memory-mapped copy that torchrl-bcq convert has made, or a folder of files of one format
Several sources are read as one dataset, in which no episode continues from one source to the next.

settings of the reader:
  reader.NAME=VALUE        any argument of the reader, as in torchrl-bcq train: 'reader.observation=[x, v]'
                           'reader.delimiter=;'  reader.names.observations=obs  reader.action_type=discrete
"""
_DESCRIBE = """
examples:
  torchrl-bcq describe hopper.hdf5 --env Hopper-v5
  torchrl-bcq describe trips.csv 'reader={observation: [x, v], action: [u], reward: r, terminated: end, episode: id}'
"""
_CONVERT = """
examples:
  torchrl-bcq convert d4rl:hopper-medium-v2 copies
  torchrl-bcq convert first.hdf5 second.hdf5 copies
"""


def add_parsers(commands: argparse._SubParsersAction) -> None:
    """Add the commands ``describe`` and ``convert`` to the parser. ``args.run(args)`` runs the chosen one."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("source", nargs="+", metavar="SOURCE", help="FILE, PREFIX:ID or FOLDER, as explained below")
    env = "environment whose action bounds, or number of discrete actions, are compared with the data"
    shared.add_argument("--env", metavar="ID", help=env)
    shared.add_argument("--n-actions", type=int, metavar="N", help="number of discrete actions")
    for side in ("low", "high"):
        text = f"{side}er bounds".replace("higher", "upper") + " of the actions, one number for each dimension"
        shared.add_argument(f"--action-{side}", nargs="+", type=float, metavar="NUMBER", help=text)

    def add(name: str, run: Any, what: str, examples: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, parents=[shared], help=what, description=what, epilog=_SOURCES + examples)
        command.set_defaults(run=run)
        return command

    command = add("describe", _describe, "Print and draw the statistics and possible defects of a dataset.", _DESCRIBE)
    picture = "file of the picture (default: ./SOURCE.png, with the name of the first source)"
    command.add_argument("--out", type=home, metavar="PNG", help=picture)
    command.add_argument("--root", metavar="FOLDER", help="folder for a memory-mapped copy of data larger than memory")
    what = "Check a dataset and make a memory-mapped copy of it, if no copy exists yet."
    command = add("convert", _convert, what, _CONVERT)
    command.add_argument("folder", metavar="FOLDER", help="folder in which copies are kept")


def reader_words(arguments: Sequence[str]) -> list[str]:
    """Return the words ``reader.NAME=VALUE`` of these commands; argparse cannot read them between options."""
    own = arguments[:1] in (["describe"], ["convert"])
    return [word for word in arguments if re.match(r"\+{0,2}reader(\.[^=]*)?=", word)] if own else []


def _describe(args: argparse.Namespace) -> None:
    if args.out is not None and args.out.suffix.lower() != ".png":  # the file of a dataset must not be replaced
        raise DatasetError(f"--out is {str(args.out)!r}, expected the name of a picture, such as dataset.png.")
    name = Path(args.source[0].rpartition(":")[2]).name.strip(".") or "dataset"
    out = args.out or Path(f"{re.sub(r'[*?]+', '_', name)}.png")
    settings = _settings(args)
    action_spec = _action_spec(args, settings)
    check_writable(out, "choose another file with --out")
    origins = Origins()
    transitions = load_transitions(args.source, root=args.root, strict=False, origins=origins, **settings)
    if number_of(action_spec) is not None and transitions["action"].is_floating_point():
        found = "the actions of the dataset are continuous, but those of --env or --n-actions are discrete"
        how = "set reader.action_type=discrete if they are indices, or choose another environment or no such option"
        raise RunError(f"{found}; {how}.")
    names = {f"{name}s": settings[name] for name in ("action", "observation") if name in settings}
    description = describe(transitions, action_spec=action_spec, column_names=names, origins=origins)
    print(description)
    description.plot(out)
    print(f"\nThe pictures are in {out}.")


def _convert(args: argparse.Namespace) -> None:
    settings = _settings(args)
    transitions = load_transitions(args.source, action_spec=_action_spec(args, settings), root=args.folder, **settings)
    folder = Path(transitions["action"].filename).parent
    size = sum(file.stat().st_size for file in folder.rglob("*"))
    print(f"{len(transitions):,} transitions, {size / 1e6:.1f} MB, in {folder}")
    named = args.source[0] if len(args.source) == 1 else f"[{','.join(args.source)}]"
    words = f"{quote(f'dataset={named}')} {quote(f'root={args.folder}')}"
    same = "the same settings of the reader and the same bounds or number of actions"
    print(f"torchrl-bcq train uses this copy with {words}, {same}.")
    print(f"In Python, load_memmap({str(folder)!r}) reads it.")


def _action_spec(args: argparse.Namespace, settings: dict[str, Any]) -> TensorSpec | None:
    """Return a spec of the actions in the options, else in the environment or in the dataset; None if unknown."""
    from torchrl_bcq.runs.bounds import choose_bounds

    specs: dict[str, Any] = {}
    if args.env is not None:
        specs[args.env] = make_base_env(args.env, remedy="choose another with --env ID").action_spec
    elif (source := find_source(args.source, **settings)) is not None:
        specs["dataset's spec"] = source.action_spec
        if (env := change_environment(getattr(source, "env", None), None, {})) is not None:
            with suppress(RunError):  # an environment that cannot be made, such as one of a package
                specs[f"environment {env}"] = make_base_env(env, remedy="").action_spec
    if args.n_actions is not None:
        if args.n_actions < 2:
            raise RunError(f"--n-actions is {args.n_actions}, expected at least 2.")
        specs = {"--n-actions": Categorical(args.n_actions), **specs}
    discrete = next((spec for spec in specs.values() if spec is not None and number_of(spec)), None)
    if discrete is not None:
        return discrete
    names = ("--action-low", "--action-high")
    box = choose_bounds(vars(args), specs, names)
    if box is None:
        return None
    box.check(f"set {' and '.join(names)}")
    return box.spec


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of the dataset's reader from the words ``reader.NAME=VALUE``."""
    if not args.reader:
        return {}
    from omegaconf import OmegaConf

    from torchrl_bcq.runs.overrides import check_reader, read_words, set_value

    chosen = OmegaConf.create({"reader": {}})
    for name, value in read_words(args.reader, (), sweep=None)[0].items():
        set_value(chosen, name, value)
    reader: Any = OmegaConf.to_container(chosen)["reader"]  # type: ignore[index, call-overload]
    return check_reader(args.source, reader)
