"""Opens the dataset of a run: its transitions, its environment and the facts about them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDictBase
from torchrl.data import Categorical, TensorSpec

from torchrl_bcq.data.episodes import episode_numbers, episode_returns, last_rows
from torchrl_bcq.data.registry import find_source
from torchrl_bcq.data.sources.source import scores_or_none
from torchrl_bcq.errors import RunError, on_command_line
from torchrl_bcq.evaluation.environments import check_fits, check_steps
from torchrl_bcq.runs.actions import EARLIER, check_kinds, read
from torchrl_bcq.runs.environment import REMEDY, choose_environment
from torchrl_bcq.runs.folder import Task, Trained, find_checkpoint, read_metadata


@on_command_line()  # the user writes settings
def open_dataset(settings: DictConfig, known: TensorSpec | None = None) -> tuple[TensorDictBase, Task]:
    """Read the dataset of a run; returns the transitions and a ``Task``.

    If ``known`` is given, it is the action spec in place of that of the environment.

    Raises:
        RunError: if the environment cannot be made or does not fit the dataset, or if the action bounds or the
            reference scores are invalid.
        DatasetError: if the dataset cannot be read or has defects.
    """
    reader: Any = OmegaConf.to_container(settings.reader, resolve=True)
    source = find_source(settings.dataset, **reader)
    recorded = getattr(source, "env", None)
    env, made = choose_environment(settings.evaluation, recorded)
    specs = {f"environment {env}": None, "trained run": known, "dataset's spec": getattr(source, "action_spec", None)}
    if settings.init_from is not None:
        specs[EARLIER] = _earlier_bounds(settings.out, settings.init_from)
    if made is not None:
        specs[f"environment {env}"] = made.base_env.action_spec  # bounds that are not rounded
    check_kinds(settings.algorithm, specs)
    if made is not None:
        check_steps(made, str(env), REMEDY)
    transitions, actions = read(settings, specs, reader)
    shapes = {name: [*transitions[name].shape[1:]] for name in ("observation", "pixels") if name in transitions.keys()}
    if env is not None and made is not None:
        singles = {name: (shape[0] // settings.stack, *shape[1:]) for name, shape in shapes.items()}
        number = Categorical(actions["n_actions"]) if "n_actions" in actions else None
        fits = {"shapes": singles, "action_spec": number, "has_mask": actions.get("has_mask", False)}
        check_fits(made, env, REMEDY, whose="the dataset", **fits)
    scores = settings.evaluation.reference_scores
    scores = getattr(source, "reference_scores", None) if scores == "auto" else scores
    references = scores_or_none(scores)
    if scores is not None and references is None:
        raise RunError(f"evaluation.reference_scores is {scores}, expected [random, expert], where expert is higher.")
    entries = settings.evaluation.observation or getattr(env or recorded, "observation", None)
    return transitions, Task(
        shapes=shapes,
        env_id=None if env is None else env.id,
        reference_scores=references,
        behaviour=_describe_behaviour(transitions),
        env_kwargs={} if env is None else dict(env.kwargs),
        max_episode_steps=None if env is None else env.max_episode_steps,
        observation=None if entries is None else list(entries),
        stack=settings.stack,
        **actions,
    )


def reopen_dataset(trained: Trained, dataset: str | None = None) -> tuple[TensorDictBase, Task]:
    """Read the dataset of a trained run again; errors are those of ``open_dataset``.

    The environment of the run is not made. If it gave the bounds or the number of the actions, those of the run are
    used. ``dataset`` is the new name of the dataset, if it has moved.

    Raises:
        RunError: also if the dataset does not exist, or ``dataset`` is another dataset.
    """
    settings = copy.deepcopy(trained.settings)
    settings.dataset = settings.dataset if dataset is None else dataset
    from_others = trained.task.env is not None or settings.init_from is not None
    settings.evaluation.env = settings.init_from = None
    try:
        transitions, task = open_dataset(settings, trained.task.exact_action_spec if from_others else None)
    except FileNotFoundError as error:
        found = f"{error} {trained.path} was trained on {trained.settings.dataset}"
        raise RunError(f"{found}; if this dataset has moved, name its new place with --dataset.") from error
    if dataset is not None:
        if (task.shapes, task.n_actions) != (trained.task.shapes, trained.task.n_actions):
            found = f"{dataset} has other observations or actions than the dataset of {trained.path}"
            raise RunError(f"{found}; name the dataset of the run with --dataset.")
        trained.task.check_unchanged(task, f"{dataset} is not the dataset of {trained.path}")
    return transitions, task


def _describe_behaviour(transitions: TensorDictBase) -> dict[str, float]:
    """Return facts about the recorded episodes: their returns and lengths, and how many were cut off, and when."""
    returns, numbers = episode_returns(transitions), episode_numbers(transitions)
    lengths = numbers.bincount().double()
    cut = lengths[~transitions["next", "terminated"].squeeze(-1)[last_rows(numbers)]]
    return {
        "mean": returns.mean().item(),
        "std": returns.std(correction=0).item(),
        "episodes": len(returns),
        "length": lengths.mean().item(),
        "cut_off": len(cut) / len(lengths),
        "cut_off_after": cut.median().item() if len(cut) else 0.0,
    }


def _earlier_bounds(*runs: str) -> TensorSpec | None:
    """Return the action spec of the first run that has a checkpoint, or None."""
    for run in runs:
        try:
            return read_metadata(find_checkpoint(Path(run)))[1].exact_action_spec
        except RunError:
            continue  # load_networks raises this error if the checkpoint is needed
    return None
