"""Base class of policies; ``act`` computes actions for NumPy observations without a TorchRL environment."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import TensorSpec
from torchrl.envs.utils import ExplorationType, exploration_type, set_exploration_type


class Policy(TensorDictModuleBase):
    """Base class of policies: a TensorDictModule whose first out-key is the action. ``act`` accepts NumPy arrays.

    Args:
        observation_specs: spec of one observation for each key; if given, ``act`` checks the shape of its input.
    """

    stack: int = 1  # number of observations that a state joins; load_policy sets the number of the run
    mask_key: NestedKey | None = None  # entry of the available actions, booleans, among in_keys
    latent_shape: tuple[int, ...] | None = None  # of one state, if forward takes the argument latents
    latent_clip: float = math.inf  # largest magnitude of a latent, which is a standard normal number
    largest_batch: int | None = None  # number of states that are evaluated at once, if it is limited
    action_spec: TensorSpec | None = None  # spec of one action, if known; load_policy sets that of the run

    def __init__(self, observation_specs: Mapping[NestedKey, TensorSpec] | None = None) -> None:
        """Store the specs."""
        super().__init__()
        self.observation_specs = observation_specs

    def act(self, observation: Any, *, deterministic: bool = True) -> np.ndarray:
        """Choose an action for each state, in the units of the environment.

        Args:
            observation: array or tensor of one state, ``[D]``, or of several states, ``[B, D]``. If ``self.stack`` is
                above 1, a state joins the last observations; ``History`` makes such states. If the policy reads
                several entries, pass a mapping from the keys of the entries to arrays. Numbers are converted to the
                networks' dtype; frames of bytes stay bytes. A mask of available actions holds booleans.
            deterministic: if True, the same state always gets the same action; if False, a policy that uses latents
                draws them at random, and a policy that has an ``epsilon`` explores.

        Returns:
            Actions ``[A]`` for one state, ``[B, A]`` for several states; indices have the shapes ``[]`` and ``[B]``.

        Raises:
            ValueError: if an entry is missing, has a wrong shape, or has values that are not real, finite numbers.
        """
        states = self._to_states(observation)
        mode = ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM
        try:
            with torch.no_grad(), set_exploration_type(mode):
                action = self(states).get(self.out_keys[0])
        except RuntimeError as error:
            if self.observation_specs is not None:
                raise
            shapes = {key: tuple(states.get(key).shape) for key in self.in_keys}
            raise ValueError(f"the networks cannot process observations of shape {shapes}: {error}") from error
        return (action.float() if action.dtype == torch.bfloat16 else action).cpu().numpy()

    def _to_states(self, observation: Any) -> TensorDictBase:
        """Convert observations to a TensorDict of batch size ``[]`` or ``[B]`` on the networks' device."""
        is_mapping = isinstance(observation, (Mapping, TensorDictBase))
        if not is_mapping and len(self.in_keys) > 1:
            raise ValueError(f"the policy reads {self.in_keys}; pass a mapping with an array for each of these keys.")
        like = tensor_like(self, default=torch.empty(0))
        specs = self.observation_specs or {}
        found = {key: _find(observation, key) if is_mapping else observation for key in self.in_keys}
        entries = {
            key: _to_mask(key, value).to(like.device)
            if key == self.mask_key
            else _to_tensor(key, value, specs.get(key), like)
            for key, value in found.items()
        }
        batches = {key: _batch_of(key, value, specs.get(key), self.stack) for key, value in entries.items()}
        if len(set(batches.values())) > 1:
            raise ValueError(f"the entries hold different numbers of states: {batches}; make the numbers equal.")
        return TensorDict(entries, next(iter(batches.values())))


def tensor_like(networks: nn.Module, default: Tensor) -> Tensor:
    """Return a tensor that has the networks' dtype and device: a parameter, a buffer or ``default``."""
    for kind in ("_parameters", "_buffers"):  # faster than parameters(), which collects all names
        for module in networks.modules():
            for tensor in getattr(module, kind).values():
                if tensor is not None and tensor.is_floating_point():
                    return tensor
    return default


def rows_of(tensordict: TensorDictBase, keys: Sequence[NestedKey]) -> torch.Size:
    """Return the batch size ``*B`` of the states. If all entries lie in one group, such as "agents", it is its size."""
    groups = {key[:-1] if isinstance(key, tuple) else () for key in keys}
    group = groups.pop() if len(groups) == 1 else ()
    return (tensordict.get(group) if group else tensordict).batch_size


def check_dtype(key: NestedKey, value: Tensor, wanted: torch.dtype) -> None:
    """Raise a ValueError if an observation of floats has another dtype than the networks."""
    if value.dtype != wanted and value.dtype.is_floating_point:
        how = "wrap the environment in TransformedEnv(env, DoubleToFloat())" if wanted == torch.float32 else "cast it"
        raise ValueError(
            f"{key} has dtype {value.dtype}, but the networks have dtype {wanted}: {how}, or build the networks with "
            f"dtype={value.dtype}."
        )


def check_latents(latents: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return ``latents``. Raise a ValueError if their shape is not ``shape``."""
    if tuple(latents.shape) != tuple(shape):
        raise ValueError(f"latents has shape {tuple(latents.shape)}, expected {tuple(shape)}.")
    return latents


def is_random() -> bool:
    """Whether policies draw at random: under ``ExplorationType.RANDOM`` or without an exploration type."""
    return exploration_type() in (ExplorationType.RANDOM, None)


def _find(given: Any, key: NestedKey) -> Any:
    """Return the entry ``key`` of a mapping. If ``key`` is a tuple, the mapping is nested."""
    value = given
    for part in (key,) if isinstance(key, str) else key:
        if part not in value:
            raise ValueError(f"the observation lacks {key!r}; it has {sorted(map(str, value))}. Add the missing entry.")
        value = value[part]
    return value


def _to_tensor(key: NestedKey, value: Any, spec: TensorSpec | None, like: Tensor) -> Tensor:
    """Check ``value`` and convert it to a tensor of the networks' dtype. uint8 stays uint8 if ``spec`` allows uint8.

    The conversion uses NumPy, because NumPy needs only a third of PyTorch's time for a single state.
    """
    if isinstance(value, Tensor):
        value = (value.float() if value.dtype == torch.bfloat16 else value).detach().cpu().numpy()
    if isinstance(value, np.ma.MaskedArray):
        raise ValueError(f"{key!r} is a masked array; fill in its values, for example with value.filled(0).")
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # lists of unequal lengths, or of tensors with gradients
        advice = "if it is the result of env.reset() or env.step(), pass the first value only"
        raise ValueError(f"{key!r} is not an array of numbers ({error}); {advice}.") from error
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{key!r} has dtype {array.dtype}, expected real numbers.")
    is_image = array.dtype == np.uint8 and (spec is None or spec.dtype == torch.uint8)
    wanted = array.dtype if is_image else np.dtype(np.float64 if like.dtype == torch.float64 else np.float32)
    if array.dtype != wanted:
        with np.errstate(over="ignore"):  # no warning, because the check below raises an error for infinite numbers
            array = array.astype(wanted)
    if not np.isfinite(array).all():
        at = np.argwhere(~np.isfinite(array))[0].tolist()
        example = f"{array[tuple(at)]} at {at}"
        raise ValueError(f"{key!r} has values that are not finite in {array.dtype}, such as {example}; repair them.")
    if not (array.flags.c_contiguous and array.flags.writeable):  # PyTorch needs a contiguous, writeable array
        array = array.copy()
    tensor = torch.from_numpy(array)
    if is_image:
        return tensor.to(like.device)
    return tensor if tensor.dtype == like.dtype and tensor.device == like.device else tensor.to(like)


def _to_mask(key: NestedKey, value: Any) -> Tensor:
    """Convert booleans, or the numbers 0 and 1, to a tensor of booleans."""
    array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
    if array.dtype.kind not in "biu" or not np.isin(array, (0, 1)).all():
        raise ValueError(f"{key!r} has dtype {array.dtype}, expected booleans: True for each available action.")
    return torch.from_numpy(array.astype(bool))


def _batch_of(key: NestedKey, value: Tensor, spec: TensorSpec | None, stack: int) -> tuple[int, ...]:
    """Return the batch size of ``value``, ``()`` or ``(B,)``. Raise a ValueError if its shape is wrong."""
    shape = tuple(value.shape)
    features = shape[-1:] if spec is None else tuple(spec.shape)
    batch = shape[: len(shape) - len(features)]
    if not features or len(batch) > 1 or shape[len(batch) :] != features:
        sizes = "D" if spec is None else ", ".join(map(str, features))
        expected = f"[{sizes}] or [B, {sizes}]"
        hint = f" The policy was trained with stack={stack}: join the last {stack} observations with History({stack})."
        raise ValueError(
            f"{key!r} has shape {shape}, expected {expected}: one state or several.{hint if stack > 1 else ''}"
        )
    return batch


def weights_digest(policy: nn.Module) -> str:
    """Return the SHA-256 digest of the weights: names, dtypes, shapes and numbers of the state_dict."""
    digest = hashlib.sha256()
    for name, value in sorted(policy.state_dict().items()):
        if isinstance(value, Tensor):
            array = value.detach().cpu().contiguous()
            digest.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
            digest.update(array.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
