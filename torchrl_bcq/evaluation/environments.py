"""Makes Gymnasium environments for evaluation and recording."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from tensordict import unravel_key
from tensordict.utils import NestedKey
from torchrl.data import Bounded, Composite, TensorSpec, Unbounded
from torchrl.data.tensor_specs import ContinuousBox
from torchrl.envs import (
    ActionMask,
    CatFrames,
    CatTensors,
    DoubleToFloat,
    DTypeCastTransform,
    EnvBase,
    GymWrapper,
    PermuteTransform,
    RemoveEmptySpecs,
    RenameTransform,
    SelectTransform,
    SerialEnv,
    TransformedEnv,
    UnaryTransform,
    UnsqueezeTransform,
)

from torchrl_bcq.actions import number_of
from torchrl_bcq.bounds import round_inwards
from torchrl_bcq.data.frame_layout import layout_of
from torchrl_bcq.data.sources.dict_spaces import MASK, check_entries, entries_of, holds_mask, split_image
from torchrl_bcq.data.sources.environment import Environment
from torchrl_bcq.errors import RunError

_REST = 0.005  # episodes should continue until the weight gamma**t of a reward is at most this number
_LONGEST = 1_000  # steps_to_compare raises a time limit to at most this many steps; more steps take too long
_DEFAULT_LIMIT = 1_000  # time limit in steps of an environment that has none
_CODING = {"categorical_action_encoding": True}  # discrete actions are indices, as the readers return them
_logger = logging.getLogger(__name__)


class _ToFloat(DoubleToFloat):
    """TorchRL's ``DoubleToFloat``, but float32 action bounds lie within the environment's float64 bounds.

    Rounded to nearest, 0.1 becomes 0.10000000149 in float32, which an environment with the bound 0.1 may refuse.
    """

    def transform_input_spec(self, input_spec: Composite) -> Composite:
        """Convert the spec to float32, and round its action bounds inwards."""
        input_spec = super().transform_input_spec(input_spec)
        for key, exact in self.parent.full_action_spec_unbatched.items(True, True):
            space = input_spec["full_action_spec", key].space
            if isinstance(space, ContinuousBox):
                low, high = round_inwards(exact.space.low, exact.space.high, space.low.dtype)
                space.low, space.high = low.expand_as(space.low), high.expand_as(space.high)
        return input_spec


def make_env(env: str | Environment, *, remedy: str = "choose another environment", **settings: Any) -> EnvBase:
    """Make a Gymnasium environment with observations, rewards and continuous actions in float32.

    Discrete actions are indices. The bounds of continuous actions in ``made.action_spec`` are rounded inwards;
    ``made.base_env.action_spec`` holds the exact bounds. If the observation is a ``Dict``, its vectors are joined to
    one vector, as ``env.observation`` says. The entry ``action_mask`` is not joined; it holds booleans. Frames of bytes
    are ``[C, H, W]``, in the entry ``observation``, or in ``pixels`` if there are vectors. If ``env.stack`` is above 1,
    TorchRL's ``CatFrames`` joins the last observations of the episode; of frames, it joins the channels.

    Args:
        env: the environment or its Gymnasium id. If the id is ``MODULE:ID``, Gymnasium imports the module, from the
            current folder if the module is not installed.
        remedy: advice to the user at the end of the error message.
        settings: further arguments of ``gymnasium.make``, which replace those of ``env``.

    Raises:
        RunError: if the environment cannot be made; the error's ``__cause__`` is the original error.
    """
    import gymnasium

    env = Environment.of(env)
    made = TransformedEnv(make_base_env(env, remedy=remedy, **settings), _ToFloat())
    _cast_integers(made)
    if isinstance(made.observation_space, gymnasium.spaces.Dict):
        try:
            names = check_entries(made.observation_space, env.observation)
        except ValueError as error:
            how = "evaluation.observation=[...] in torchrl-bcq train, --observation in other commands"
            raise RunError(f"environment {env.id}: {error}; name them with {how}.") from error
        _choose_entries(made, *split_image(made.observation_space, names))
        if holds_mask(made.observation_space):
            made.append_transform(UnaryTransform([MASK], [MASK], fn=lambda mask: mask != 0))
            made.append_transform(ActionMask())
    elif "pixels" in made.observation_spec.keys():  # TorchRL's name of frames with the channels last
        made.append_transform(RenameTransform(["pixels"], ["observation"]))
    for key in ("observation", "pixels"):
        if key in made.observation_spec.keys():
            _stack_entry(made, key, env.stack)
    return made


def make_base_env(env: str | Environment, *, remedy: str, **settings: Any) -> EnvBase:
    """Make a Gymnasium environment without the conversions of ``make_env``, which has the same arguments."""
    import gymnasium

    env = Environment.of(env)
    if ":" in env.id and (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    arguments = {"max_episode_steps": env.max_episode_steps, **env.kwargs, **settings}
    try:
        return GymWrapper(gymnasium.make(env.id, **arguments), **_CODING)
    except Exception as error:  # the code of an environment raises any exception, TorchRL a KeyError for a space
        raise RunError(f"environment {str(env)!r} cannot be made: {error or repr(error)}; {remedy}.") from error


def _cast_integers(made: TransformedEnv) -> None:
    """Convert integer vectors to float32, as the readers do. Otherwise, joined entries would become integers."""
    leaves = made.observation_spec.items(True, True)
    vectors = {key: spec.dtype for key, spec in leaves if isinstance(spec, Bounded | Unbounded) and spec.ndim < 2}
    for dtype in {*vectors.values()} - {torch.float32, torch.bool}:
        keys = [key for key, own in vectors.items() if own == dtype and key != MASK]
        made.append_transform(DTypeCastTransform(dtype, torch.float32, in_keys=keys))


def _choose_entries(made: TransformedEnv, vectors: list[str], image: str | None) -> None:
    """Join the vectors of a Dict observation to the entry ``observation``, rename the image, and keep the mask."""
    # TorchRL renames the entry state to observation
    renamed = {} if "observation" in made.observation_space.spaces else {"state": "observation"}

    def key_of(name: str) -> NestedKey:
        first, *others = name.split("/")
        return unravel_key((renamed.get(first, first), *others))

    keys = [key_of(name) for name in vectors]
    kept, mask = ["observation"] if vectors else [], [MASK] if holds_mask(made.observation_space) else []
    if image is not None:  # renamed twice, because a vector may have the final name
        made.append_transform(RenameTransform([key_of(image)], ["frames_of_image"]))
    if vectors:
        made.append_transform(CatTensors(keys, "observation", sort=False))
    if image is not None:
        kept.append("pixels" if vectors else "observation")
        made.append_transform(SelectTransform(*kept[:-1], *mask, "frames_of_image"))
        made.append_transform(RenameTransform(["frames_of_image"], kept[-1:]))
    made.append_transform(SelectTransform(*kept, *mask))
    made.append_transform(RemoveEmptySpecs())


def _stack_entry(made: TransformedEnv, key: str, stack: int) -> None:
    """Move the channels of frames to the front; join the last vectors, or the last frames, of the episode."""
    spec, is_frames = made.observation_spec[key], False
    if spec.dtype == torch.uint8 and len(spec.shape) in (2, 3):
        is_frames, layout = True, layout_of(spec.shape)
        if layout == "HW":
            made.append_transform(UnsqueezeTransform(-3, in_keys=[key]))
        elif layout == "HWC":
            made.append_transform(PermuteTransform((-1, -3, -2), in_keys=[key]))
    if stack > 1:
        made.append_transform(CatFrames(stack, dim=-3 if is_frames else -1, in_keys=[key]))


def make_envs(env: str | Environment, episodes: int, device: Any = None, *, max_steps: int | None = None) -> EnvBase:
    """Return a ``SerialEnv`` of environments from ``make_env``, one for each episode.

    ``max_steps`` replaces the time limit of the environment.
    """
    limit: dict[str, Any] = {} if max_steps is None else {"max_episode_steps": max_steps}
    return SerialEnv(episodes, lambda: make_env(env, **limit), device=device)


def steps_to_compare(limit: int | None, gamma: float) -> int | None:
    """Return how long episodes must be, so that their discounted return can be compared with a critic's estimate.

    A critic estimates the return without a time limit, but a short episode leaves out the rewards of later steps. So a
    time ``limit`` below ``log(0.005) / log(gamma)`` steps is raised to this number, but not above 1,000 steps. After
    this number of steps, the weight of a reward, ``gamma^t``, is below 0.5 %. The result is None if ``limit`` is None.
    """
    if limit is None or not 0 < gamma < 1:
        return limit
    return max(limit, min(_LONGEST, math.ceil(math.log(_REST) / math.log(gamma))))


def time_limit(env: str | Environment) -> int | None:
    """Return the number of steps after which Gymnasium ends an episode, or None without a time limit."""
    made = make_env(env)
    made.close()
    return made.spec.max_episode_steps


def with_time_limit(env: Environment, made: EnvBase, remedy: str) -> Environment:
    """Return ``env``, with a time limit of 1,000 steps if ``env`` has none, because its episodes might never end.

    ``made`` is the environment, made by ``make_env(env)``. If its time limit is the one that is registered for its id,
    the result has ``max_episode_steps=None``.
    """
    import gymnasium

    if (limit := made.spec.max_episode_steps) is not None:
        spec = gymnasium.registry.get(env.id.rpartition(":")[2])
        return env if spec is None or spec.max_episode_steps != limit else replace(env, max_episode_steps=None)
    message = "%s has no time limit, so evaluation ends its episodes after %d steps; %s"
    _logger.warning(message, env, _DEFAULT_LIMIT, remedy)
    return replace(env, max_episode_steps=_DEFAULT_LIMIT)


def check_fits(
    made: EnvBase,
    env: str | Environment,
    remedy: str,
    *,
    whose: str,
    shapes: Mapping[str, tuple[int, ...]],
    action_spec: TensorSpec | None = None,
    has_mask: bool = False,
    setting: str = "evaluation.observation=[...]",
) -> None:
    """Raise a RunError if the environment does not fit a dataset or a run.

    Args:
        made: the environment, made by ``make_env(env)``.
        env, remedy: as for ``make_env``; used in the message.
        whose: owner of the required observations and actions, such as "the dataset"; used in the message.
        shapes: shape of ``observation``, and of ``pixels`` if there are frames beside vectors.
        action_spec: spec of one action; None if the actions are not checked.
        has_mask: whether the policy needs masks of the available actions.
        setting: how the user names the entries of a Dict observation; used in the message.
    """
    from gymnasium.spaces import Dict

    if isinstance(made.observation_space, Dict) and Environment.of(env).observation is None:
        entries = f"the observation of {env} has the entries {list(entries_of(made.observation_space))}"
        raise RunError(f"{entries}; name those that {whose} has, in the same order, with {setting}, or {remedy}.")
    if not isinstance(made.observation_space, Dict) and (joined := Environment.of(env).observation) is not None:
        message = "the observation of %s is one vector; its numbers must be those of the entries %s, in this order"
        _logger.warning(message, Environment.of(env).id, list(joined))
    if (shape := tuple(made.observation_spec["observation"].shape)) != shapes["observation"]:
        raise RunError(f"{env} has observations of shape {shape}, but {whose} has {shapes['observation']}; {remedy}.")
    spec, pixels = made.observation_spec.get("pixels", None), shapes.get("pixels")
    if (frames := None if spec is None else tuple(spec.shape)) != pixels:
        found = [f"frames of shape {shape}" if shape else "no frames" for shape in (frames, pixels)]
        raise RunError(f"{env} has {found[0]} beside its vectors, but {whose} has {found[1]}; {remedy}.")
    check_steps(made, env, remedy)
    masked = MASK in made.observation_spec.keys()
    if masked and not has_mask:
        message = "%s has masks of the available actions, but %s has none: the policy may choose other actions, too"
        _logger.warning(message, env, whose)
    if has_mask and not masked:
        raise RunError(f"{whose} has masks of the available actions, but {env} has no entry {MASK}; {remedy}.")
    sizes = [None if spec is None else _size(spec) for spec in (made.action_spec, action_spec)]
    if sizes[1] is not None and sizes[0] != sizes[1]:
        raise RunError(f"{env} has {sizes[0]}, but {whose} has {sizes[1]}; {remedy}.")


def _size(action_spec: TensorSpec) -> str:
    number = number_of(action_spec)
    return f"actions of shape {tuple(action_spec.shape)}" if number is None else f"{number} discrete actions"


def check_steps(made: EnvBase, env: str | Environment, remedy: str) -> None:
    """Raise a RunError if the actions of the environment cannot be used, or if its first step fails."""
    from gymnasium.spaces import Box, Discrete

    space = made.action_space
    if not isinstance(space, (Box, Discrete)) or getattr(space, "start", 0) != 0:
        found = f"{env} has the action space {space}"
        raise RunError(f"{found}, but a Box, or a Discrete whose first action is 0, is needed; {remedy}.")
    try:
        made.step(made.reset().set("action", made.action_spec.project(made.action_spec.zero())))
    except Exception as error:  # the code of an environment may raise any exception
        raise RunError(f"{env} fails in its first step: {error or repr(error)}; {remedy}.") from error
