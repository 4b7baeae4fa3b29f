"""Runs a policy from the ONNX file of ``export_policy``.

This file needs only Python 3.10, NumPy and onnxruntime. You can copy it to a machine without PyTorch.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

CONTRACT, FORMAT = "torchrl_bcq", 1  # entry of the file's metadata, and the version of its content
_ABSENT = object()  # stands for an entry that a mapping lacks


class ExportedPolicy:
    """Policy from an ONNX file of ``export_policy`` or ``torchrl-bcq export``.

    The file contains the whole computation from raw observations to the action in the units of the environment. It also
    describes its inputs and outputs; ``contract`` holds this description. If a number of an observation lies outside
    its range in the training data, widened by 5 % on each side, the policy warns once for this number.

    Args:
        path: file of the policy.
        threads: number of CPU threads for one call.
        seed: seed of the random latents; used only for a file that was exported with ``latents=True``.

    Use one object per thread if the policy keeps a history or draws latents.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is not an exported policy, or a newer version of this class is needed.
        ImportError: if onnxruntime is not installed.

    Example:
        >>> policy = ExportedPolicy("policy.onnx")  # made by: torchrl-bcq export RUN policy.onnx
        >>> policy.act([1.0, 0.0, 0.0]).shape
        (1,)
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int = 1, seed: int = 0) -> None:
        if not os.path.isfile(path := os.path.expanduser(path)):
            raise FileNotFoundError(f"{path} does not exist, or is not a file; write the name of an exported policy.")
        if threads < 1:
            raise ValueError(f"threads is {threads}, expected at least 1.")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has an exception class for each cause, without a common base class
            raise ValueError(f"{path} is not an ONNX file that onnxruntime can run: {error}") from error
        self.contract: dict[str, Any] = _read_contract(path, self._session)
        inputs = self.contract["inputs"]
        self._read = [port for port in inputs if port["kind"] in ("observation", "mask")]
        self._histories = [port for port in inputs if port["kind"] == "history"]
        self._joined = self.contract.get("observation_entries")
        self._latents = next((port for port in inputs if port["kind"] == "latents"), None)
        self._outputs = [port["name"] for port in self.contract["outputs"]]
        self._ranges = {port["name"]: _range(port) for port in self._read if "low" in port}
        self._random = np.random.default_rng(seed)
        self._past: dict[str, np.ndarray] = {}
        self._starts = np.zeros(0, bool)

    def act(self, observation: Any, latents: Any = None) -> np.ndarray:
        """Choose an action for each state.

        Args:
            observation: array of one observation, ``[D]``, or of several, ``[B, D]``. If the policy reads several
                entries, pass a mapping from their keys to arrays. A mask of available actions holds booleans.
            latents: random numbers of each state, for a file with this input; by default, drawn by ``seed``.

        Returns:
            Actions ``[A]`` for one observation, ``[B, A]`` for several. Indices of discrete actions have the shapes
            ``[]`` and ``[B]``.

        Raises:
            ValueError: if an entry is missing or empty, has a wrong shape, or has values that are not real, finite
                numbers.
        """
        return self._run(observation, latents)[self._outputs[0]]

    def __call__(self, observation: Any, latents: Any = None) -> dict[str, np.ndarray]:
        """Return all outputs of the file by name; arguments and errors are those of ``act``."""
        return self._run(observation, latents)

    def _run(self, observation: Any, latents: Any) -> dict[str, np.ndarray]:
        feeds, batch = self._read_observation(observation)
        number = batch[0] if batch else 1
        if self._latents is not None:
            drawn = self._draw(number) if latents is None else self._check_latents(latents, batch)
            feeds[self._latents["name"]] = drawn
        elif latents is not None:
            raise ValueError("the file has no input for latents; export the policy with latents=True (--latents).")
        if self._histories:
            self._feed_history(feeds, number)
        values = self._compute(feeds, number)
        outputs = dict(zip(self._outputs, values, strict=False))  # the histories come last
        if self._histories:
            nexts = values[len(self._outputs) :]
            self._past = {port["name"]: value for port, value in zip(self._histories, nexts, strict=True)}
            self._starts = np.zeros(number, bool)
        return outputs if batch else {name: value[0, ...] for name, value in outputs.items()}

    def _compute(self, feeds: dict[str, np.ndarray], number: int) -> list[np.ndarray]:
        """Run the graph, in parts if there are more states than the policy evaluates at once."""
        size = self.contract["largest_batch"] or number
        if number <= size:
            return self._session.run(None, feeds)
        parts = [
            self._session.run(None, {name: value[start : start + size] for name, value in feeds.items()})
            for start in range(0, number, size)
        ]
        return [np.concatenate(each) for each in zip(*parts, strict=True)]

    def reset(self, mask: Any = None) -> None:
        """Start a new episode with the next observation. This matters only for a policy that reads a short history.

        Args:
            mask: booleans ``[B]``: True for each environment that starts a new episode. By default, all do.

        Raises:
            ValueError: if ``mask`` holds no booleans or has another size than the batch.
        """
        if mask is None:
            self._past = {}
        elif self._past:
            starts = np.asarray(mask)
            if starts.dtype != bool or starts.shape != self._starts.shape:
                found = f"has shape {starts.shape} and dtype {starts.dtype}"
                raise ValueError(f"mask {found}, expected booleans {self._starts.shape}, one for each environment.")
            self._starts = self._starts | starts

    def _read_observation(self, observation: Any) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
        """Return the input arrays ``[B, ...]`` by name, and the batch size, ``()`` or ``(B,)``."""
        ports = self._read
        if not isinstance(observation, Mapping):
            if len(ports) > 1:
                keys = ", ".join(_shown(port["key"]) for port in ports)
                raise ValueError(f"the policy reads {keys}; pass a mapping with an array for each of these keys.")
            observation = {ports[0]["name"]: observation}
        feeds, batches = {}, {}
        for port in ports:
            array = _to_array(port, _find(port, observation, self._joined))
            shape, features = array.shape, tuple(port["shape"])
            batch = shape[: len(shape) - len(features)]
            if 0 in batch:
                raise ValueError(f"{_shown(port['key'])} has shape {shape}: it holds no observation.")
            if len(batch) > 1 or shape[len(batch) :] != features:
                sizes = ", ".join(map(str, features))
                expected = f"[{sizes}] for one observation, or [B, {sizes}] for several" if sizes else "[] or [B]"
                raise ValueError(f"{_shown(port['key'])} has shape {shape}, expected {expected}.")
            self._check_values(port, array)
            feeds[port["name"]], batches[port["name"]] = array if batch else array[None], batch
        if len(set(batches.values())) > 1:
            raise ValueError(f"the entries hold different numbers of states: {batches}; make the numbers equal.")
        return feeds, next(iter(batches.values()))

    def _check_values(self, port: dict[str, Any], array: np.ndarray) -> None:
        """Raise a ValueError if a number is not finite. Warn if a number is outside its range in training."""
        if port["kind"] == "mask":
            if not array.any(-1).all():
                rows = np.flatnonzero(~array.any(-1)).tolist()
                raise ValueError(f"{_shown(port['key'])} allows no action in the states {rows}; repair the mask.")
            return
        if array.dtype.kind in "iu":
            return
        limits = self._ranges.get(port["name"])
        if limits is not None and ((array >= limits[0]) & (array <= limits[1])).all():
            return  # such numbers are finite, too
        finite = np.isfinite(array)
        if not finite.all():
            at = np.argwhere(~finite)[0].tolist()
            found = f"{array[tuple(at)]} at {at}"
            raise ValueError(
                f"{_shown(port['key'])} has values that are not finite in {array.dtype}, such as {found}; repair them."
            )
        if limits is not None:
            at = np.argwhere((array < limits[0]) | (array > limits[1]))[0]
            feature = tuple(at[array.ndim - limits[0].ndim :].tolist())
            low, high = (np.asarray(port[end])[feature] for end in ("low", "high"))
            value = array[tuple(at)]
            limits[0][feature], limits[1][feature] = np.finfo(array.dtype).min, np.finfo(array.dtype).max
            warnings.warn(
                f"{_shown(port['key'])}{[*feature]} is {value:.6g}, but in the training data it was between {low:.6g} "
                f"and {high:.6g}; the action may be wrong. There are no more warnings about this number.",
                stacklevel=5,
            )

    def _feed_history(self, feeds: dict[str, np.ndarray], number: int) -> None:
        """Add the observations of the steps before. The graph replaces them where an episode starts."""
        if not self._past:
            self._past = {port["name"]: np.zeros((number, *port["shape"]), port["dtype"]) for port in self._histories}
            self._starts = np.ones(number, bool)
        if len(self._starts) != number:
            found = f"there are {number} observations, but there were {len(self._starts)} in the call before"
            raise ValueError(f"{found}; call reset() before the number of environments changes.")
        feeds.update(self._past, start=self._starts)

    def _draw(self, number: int) -> np.ndarray:
        port: Any = self._latents
        drawn = self._random.standard_normal((number, *port["shape"]))
        if port["clip"] is not None:
            drawn = drawn.clip(-port["clip"], port["clip"])
        return drawn.astype(port["dtype"])

    def _check_latents(self, latents: Any, batch: tuple[int, ...]) -> np.ndarray:
        port: Any = self._latents
        array = np.asarray(latents, port["dtype"])
        if array.shape != (*batch, *port["shape"]) or not np.isfinite(array).all():
            expected = f"finite numbers of shape {(*batch, *port['shape'])}"
            raise ValueError(f"latents has shape {array.shape}, expected {expected}.")
        return array if batch else array[None]


def _read_contract(path: Any, session: Any) -> dict[str, Any]:
    """Read the description in the file's metadata, and compare it with the graph."""
    text = session.get_modelmeta().custom_metadata_map.get(CONTRACT)
    if text is None:
        raise ValueError(f"{path} is an ONNX file, but it was not written by torchrl-bcq export.")
    contract = json.loads(text)
    if contract["format"] > FORMAT:
        raise ValueError(f"{path} has format {contract['format']}, but this class reads {FORMAT}; use a newer version.")
    found, expected = {port.name for port in session.get_inputs()}, {port["name"] for port in contract["inputs"]}
    if found != expected:
        raise ValueError(f"{path} has the inputs {sorted(found)}, but describes {sorted(expected)}; export it again.")
    return contract


def _range(port: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the range in the training data, wider by 5 % on each side, and by rounding errors."""
    low, high = (np.asarray(port[end], port["dtype"]) for end in ("low", "high"))
    margin = 0.05 * (high - low) + 1e-6 * np.maximum(1, np.maximum(np.abs(low), np.abs(high)))
    return (low - margin).astype(low.dtype), (high + margin).astype(high.dtype)


def _shown(key: list[str]) -> str:
    """Return the key of an entry as it is written in Python."""
    return repr(key[0] if len(key) == 1 else tuple(key))


def _find(port: dict[str, Any], given: Mapping[str, Any], joined: list[str] | None) -> Any:
    """Return the entry of a mapping, which may be nested. Join ``joined``, the entries of a Dict observation."""
    if masked := [name for name, value in given.items() if isinstance(value, np.ma.MaskedArray)]:
        raise ValueError(f"{masked[0]!r} is a masked array; fill in its values, for example with value.filled(0).")
    parts = [_entry(given, [name] if name in given else name.split("/")) for name in joined or ()]
    if parts and port["name"] == "observation" and not any(part is _ABSENT for part in parts):
        try:
            arrays = [np.atleast_1d(np.asarray(part, np.float64)) for part in parts]
            all_scalar = len(arrays) == port["shape"][-1] < sum(map(len, arrays))
            most = max(1 + all_scalar, *(array.ndim for array in arrays))  # in a batch, scalars are [B], others [B, D]
            return np.concatenate([array if array.ndim == most else array[..., None] for array in arrays], -1)
        except ValueError as error:  # texts, or other batch sizes
            raise ValueError(f"the entries {joined} cannot be joined to one vector: {error}") from error
    value = _entry(given, [port["name"]] if port["name"] in given else port["key"])
    if value is _ABSENT:
        has, more = sorted(map(str, given)), f", or the entries {joined}" if joined else ""
        raise ValueError(f"the observation lacks {_shown(port['key'])}; it has {has}. Add the missing entry{more}.")
    return value


def _entry(given: Any, path: Sequence[str]) -> Any:
    """Return the entry of nested mappings, or ``_ABSENT``."""
    for name in path:
        given = given.get(name, _ABSENT) if isinstance(given, Mapping) else _ABSENT
    return given


def _to_array(port: dict[str, Any], value: Any) -> np.ndarray:
    """Convert ``value`` to the dtype of the input, if this is possible without a change of its meaning."""
    wanted = np.dtype(port["dtype"])
    if type(value) is np.ndarray and value.dtype == wanted:
        return value
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # lists of different lengths, tensors with gradients
        advice = "if it is the result of env.reset() or env.step(), pass the first value only"
        raise ValueError(f"{_shown(port['key'])} is not an array of numbers ({error}); {advice}.") from error
    if wanted.kind == "b":
        if array.dtype.kind not in "biu" or not ((array == 0) | (array == 1)).all():
            how = "expected booleans: True for each available action"
            raise ValueError(f"{_shown(port['key'])} has dtype {array.dtype}, {how}.")
    elif array.dtype.kind not in ("iu" if wanted.kind in "iu" else "fiu"):
        what = "whole numbers" if wanted.kind in "iu" else "real numbers"
        raise ValueError(f"{_shown(port['key'])} has dtype {array.dtype}, expected {what} ({wanted}).")
    elif (
        wanted.kind in "iu"
        and array.size
        and not (np.iinfo(wanted).min <= array.min() and array.max() <= np.iinfo(wanted).max)
    ):
        raise ValueError(f"{_shown(port['key'])} has values outside the range of {wanted}.")
    with np.errstate(over="ignore"):  # _check_values finds infinite numbers
        return array.astype(wanted)
