"""Writes a policy to an ONNX file, and compares the file with the policy."""

from __future__ import annotations

import copy
import importlib.metadata
import io
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data import TensorSpec

from torchrl_bcq.actions import DiscreteActions
from torchrl_bcq.data.frame_stack import gather_frames
from torchrl_bcq.errors import RunError
from torchrl_bcq.export.check import largest_difference
from torchrl_bcq.export.exported_policy import CONTRACT, FORMAT
from torchrl_bcq.export.graph import PolicyGraph, Port, current
from torchrl_bcq.files import home, write_whole
from torchrl_bcq.modules.acting import Policy, tensor_like, weights_digest
from torchrl_bcq.version import __version__

CHECKED = (1, 3, 257)  # numbers of states for which the file is compared with the policy
TOLERANCE = 1e-4
_CHUNK_ROWS = 65_536
_VERSIONS = ("torch", "tensordict", "torchrl", "onnx", "onnxscript")


@dataclass(frozen=True)
class Export:
    """Result of ``export_policy``.

    Args:
        path: the file.
        contract: description of the inputs and outputs, which is also in the file.
        differences: for each number of states, the largest difference between the outputs of the file and of the
            policy: for the action, divided by the range of the actions if it is known, otherwise by the size of the
            output.
    """

    path: Path
    contract: dict[str, Any]
    differences: dict[int, float]


def export_policy(
    policy: TensorDictModuleBase,
    path: str | os.PathLike[str],
    observations: TensorDictBase | None = None,
    *,
    action_spec: TensorSpec | None = None,
    action_key: NestedKey | None = None,
    latents: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> Export:
    """Write a policy to an ONNX file, from raw observations to actions in the units of the environment.

    The file contains the whole policy: the scaling of the observations, the short history if ``policy.stack`` is above
    1, and the fixed latents. It accepts any batch size. Without ``latents``, equal states give equal actions.
    ``ExportedPolicy`` runs it without PyTorch. Before this function returns, it compares the file with the policy.
    Needs ``torchrl-bcq[export]``.

    Args:
        policy: policy of this package, or another TensorDict policy. Under ``ExplorationType.DETERMINISTIC``, it must
            not draw random numbers. The file has an output for each of its ``out_keys``.
        path: file to write, whose name ends with ``.onnx``; an existing file is replaced.
        observations: states of the dataset, ``[N]``, such as the transitions. Their smallest and largest values are
            stored in the file, and the check uses some of them. By default, the check uses random states.
        action_spec: spec of one action, whose bounds are stored in the file; by default, ``policy.action_spec`` of a
            policy of this package.
        action_key: entry of the action; by default, the first out-key of a policy of this package, or ``"action"``.
        latents: if True, the file has the latents as an input. Each call can then use new random latents.
        facts: other facts to store in the file, such as the name of the dataset; values that JSON can hold.

    Raises:
        TypeError: if ``policy`` or ``observations`` is no TensorDict module or TensorDict.
        RunError: if PyTorch cannot export the policy, onnxruntime cannot run the file, or an output of the file
            differs by more than 1e-4 from that of the policy. No file is written then.
        ValueError: if the shapes of the observations are not known, the observations are not finite or have a wrong
            shape, the policy does not write the action, ``latents`` is True for a policy without latents, or the
            networks have a dtype that onnxruntime cannot run.
        ImportError: if onnx, onnxscript or onnxruntime is not installed.

    Example:
        >>> from torchrl.data import Bounded, Unbounded
        >>> from torchrl_bcq import BCQPolicy, ExportedPolicy, export_policy, make_bcq_modules
        >>> policy = BCQPolicy(*make_bcq_modules(Unbounded((3,)), Bounded(-2, 2, (1,)), hidden=(8,), vae_hidden=(8,)))
        >>> export = export_policy(policy, "policy.onnx")
        >>> max(export.differences.values()) < 1e-4
        True
        >>> ExportedPolicy("policy.onnx").act([1.0, 0.0, 0.0]).shape
        (1,)
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}; to export a policy: pip install 'torchrl-bcq[export]'") from error
    if not isinstance(policy, TensorDictModuleBase):
        found = type(policy).__name__
        raise TypeError(f"policy is a {found}, expected a TensorDict policy, such as load_policy(RUN).")
    if observations is not None and not isinstance(observations, TensorDictBase):
        raise TypeError(f"observations is a {type(observations).__name__}, expected a TensorDict of transitions.")
    file = home(path)
    if file.suffix.lower() != ".onnx" or file.is_dir():
        found = " which is a folder," if file.is_dir() else ""
        raise ValueError(f"path is {str(path)!r},{found} expected the name of an ONNX file, such as policy.onnx.")
    own, is_known = copy.deepcopy(policy).cpu().eval(), isinstance(policy, Policy)
    states = _states(own, observations)
    if action_key is None:
        action_key = policy.out_keys[0] if is_known else "action"
    spec = policy.action_spec if action_spec is None and isinstance(policy, Policy) else action_spec
    graph = PolicyGraph(own, states, action_key, _bounds(spec), latents)
    versions = {name: importlib.metadata.version(name) for name in _VERSIONS}  # onnxruntime-gpu is another package
    contract = {
        "format": FORMAT,
        "policy": type(policy).__name__,
        "stack": graph.stack,
        "largest_batch": policy.largest_batch if isinstance(policy, Policy) else None,
        "inputs": [_with_range(port, graph.stack, observations) for port in graph.inputs],
        "outputs": [port.describe() for port in graph.outputs],
        "weights_sha256": weights_digest(own),
        "versions": {"torchrl_bcq": __version__, **versions, "onnxruntime": onnxruntime.__version__},
    }
    if reserved := sorted(contract.keys() & {*(facts or {})}):
        raise ValueError(f"facts has {reserved}, which the file already describes; use other names.")
    text = json.dumps({**contract, **(facts or {})}, sort_keys=True, allow_nan=False)
    model = _to_onnx(graph, {key: value[:3] for key, value in states.items()})
    model.metadata_props.add(key=CONTRACT, value=text)
    with write_whole(file) as aside:
        onnx.save(model, aside)
        differences = {number: largest_difference(aside, graph, states, number) for number in CHECKED}
        if not max(differences.values()) <= TOLERANCE:
            raise RunError(
                f"the outputs of the file differ by {max(differences.values()):.3g} of their range from those of the "
                f"policy, more than {TOLERANCE}; no file is written. If the policy draws random numbers under "
                "ExplorationType.DETERMINISTIC, remove them; otherwise, report this as a bug, with the versions of "
                "torch and onnxruntime."
            )
    return Export(file, json.loads(text), differences)


def _to_onnx(graph: PolicyGraph, states: Mapping[NestedKey, Tensor]) -> Any:
    """Return the graph as an ONNX model with a free batch size."""
    example, batch = graph.example(states), torch.export.Dim("batch")
    names: Any = {"input_names": [port.name for port in graph.inputs], "output_names": graph.output_names}
    shapes = (tuple({0: batch} for _ in example),)
    try:
        with _quiet():
            program: Any = torch.onnx.export(graph, example, dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
    except torch.onnx.errors.OnnxExporterError as error:
        raise RunError(f"PyTorch cannot export a layer or operation of this policy: {_cause(error)}") from error
    return program.model_proto


def _states(policy: TensorDictModuleBase, observations: TensorDictBase | None) -> dict[NestedKey, Tensor]:
    """Return 257 states of the dataset, or random ones, ``{key: [257, ...]}``. Masks are random in both cases."""
    number, random = max(CHECKED), torch.Generator().manual_seed(0)
    dtype = tensor_like(policy, default=torch.empty(0)).dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the policy has dtype {dtype}, which onnxruntime cannot run; export policy.float().")
    if observations is not None:
        if observations.ndim != 1 or not len(observations):
            found = tuple(observations.batch_size)
            raise ValueError(f"observations has batch size {found}, expected [N]; use observations.reshape(-1).")
        lacking = [key for key in policy.in_keys if key not in observations.keys(True)]
        if lacking:
            raise ValueError(f"observations lacks {lacking}, which the policy reads; pass the transitions.")
        for key, spec in (getattr(policy, "observation_specs", None) or {}).items():
            if observations.get(key).shape[1:] != spec.shape:
                found = tuple(observations.get(key).shape)
                raise ValueError(f"observations has {key!r} of shape {found}, expected {('N', *spec.shape)}.")
        chosen = gather_frames(observations.select(*policy.in_keys)[torch.arange(number) * len(observations) // number])
        states = {key: chosen.get(key).to("cpu", copy=True) for key in policy.in_keys}
    else:
        specs = getattr(policy, "observation_specs", None) or {}
        lacking = [key for key in policy.in_keys if key not in specs]
        if lacking:
            raise ValueError(f"the shapes of {lacking} are not known; pass observations, such as the transitions.")
        states = {key: _random_state(specs[key], number, dtype, random) for key in policy.in_keys}
    for key, mask in states.items():
        if mask.dtype == torch.bool:
            drawn = mask & (torch.rand(mask.shape, generator=random) < 0.5)
            states[key] = torch.where(drawn.any(-1, keepdim=True), drawn, mask)
    return states


def _random_state(spec: TensorSpec, number: int, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    shape = (number, *spec.shape)
    if spec.dtype.is_floating_point:
        return torch.randn(shape, dtype=dtype, generator=random)
    if spec.dtype == torch.bool:
        return torch.ones(shape, dtype=torch.bool)
    return torch.randint(256 if spec.dtype == torch.uint8 else 2, shape, generator=random).to(spec.dtype)


def _with_range(port: Port, stack: int, observations: TensorDictBase | None) -> dict[str, Any]:
    """Describe an input, with the range of its values in the dataset if it is a vector of floats.

    Raises:
        ValueError: if an observation is not finite.
    """
    described = port.describe()
    if observations is None or port.kind != "observation" or not port.dtype.is_floating_point:
        return described
    parts = [
        current(rows.get(port.key), port, stack).aminmax(dim=0)
        for rows in observations.select(port.key).split(_CHUNK_ROWS)
    ]
    low, high = torch.stack([part.min for part in parts]).amin(0), torch.stack([part.max for part in parts]).amax(0)
    if not (low.isfinite() & high.isfinite()).all():
        raise ValueError(f"observations has values in {port.key!r} that are not finite; repair them.")
    return {**described, "low": low.tolist(), "high": high.tolist()}


def _bounds(spec: TensorSpec | None) -> dict[str, Any]:
    """Return the finite bounds of a spec, or the number of its actions, as plain values."""
    if spec is None:
        return {}
    space: Any = spec.space
    if not hasattr(space, "low"):
        actions = DiscreteActions.of(spec)
        return {"n_actions": actions.number, "one_hot": actions.one_hot}
    largest = torch.finfo(spec.dtype).max if spec.dtype.is_floating_point else math.inf
    if (space.low > -largest).all() and (space.high < largest).all():
        return {"low": space.low.tolist(), "high": space.high.tolist()}
    return {}


def _cause(error: BaseException) -> str:
    """Return the first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).partition("\n")[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress messages and the warnings of PyTorch's exporter."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
