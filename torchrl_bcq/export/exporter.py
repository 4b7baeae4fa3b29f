"""Writes a policy to an ONNX file, and compares the file with the policy."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import io
import json
import logging
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
from torchrl_bcq.errors import RunError
from torchrl_bcq.export.check import largest_difference
from torchrl_bcq.export.exported_policy import CONTRACT, FORMAT
from torchrl_bcq.export.graph import PolicyGraph, Port, current
from torchrl_bcq.files import home, write_whole

CHECKED = (1, 3, 257)  # numbers of states for which the file is compared with the policy
TOLERANCE = 1e-4
_CHUNK_ROWS = 65_536


@dataclass(frozen=True)
class Export:
    """What ``export_policy`` wrote.

    Args:
        path: the file.
        contract: description of the inputs and outputs, which is also in the file.
        differences: for each number of states, the largest difference between an output of the file and of the policy:
            ``|file - policy| / max(1, |policy|)``.
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
    latents: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> Export:
    """Write a policy to an ONNX file, from raw observations to actions in the units of the environment.

    The file contains the whole policy: the scaling of the observations, the short history if ``policy.stack`` is above
    1, and the fixed latents. It accepts any batch size, and always gives the same action for the same state.
    ``ExportedPolicy`` runs it without PyTorch. Before this function returns, it compares the file with the policy.
    Needs ``torchrl-bcq[export]``.

    Args:
        policy: policy of this package, or another TensorDict policy that draws no random numbers under
            ``ExplorationType.DETERMINISTIC``. The file has an output for each of its ``out_keys``.
        path: file to write; an existing file is replaced.
        observations: states of the dataset, ``[N]``, such as the transitions. Their smallest and largest values are
            stored in the file, and the check uses some of them. By default, the check uses random states.
        action_spec: spec of one action, whose bounds are stored in the file; by default, ``policy.action_spec``.
        latents: if True, the latents are an input of the file: for a policy that acts at random.
        facts: other facts to store in the file, such as the name of the dataset; plain values.

    Raises:
        RunError: if an output of the file differs by more than 1e-4 from that of the policy. No file is written then.
        ValueError: if the shapes of the observations are not known, or ``latents`` is True for a policy without
            latents.
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
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}; to export a policy: pip install 'torchrl-bcq[export]'") from error
    own = copy.deepcopy(policy).cpu().eval()
    states = _states(own, observations)
    graph = PolicyGraph(own, states, latents)
    contract = {
        "format": FORMAT,
        "policy": type(policy).__name__,
        "stack": graph.stack,
        "inputs": [_with_range(port, graph.stack, observations) for port in graph.inputs],
        "outputs": [port.describe() for port in graph.outputs],
        "weights_sha256": _digest(own),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "tensordict", "torchrl", "onnx")},
        **(facts or {}),
    }
    spec = getattr(policy, "action_spec", None) if action_spec is None else action_spec
    contract["outputs"][0].update(_bounds(spec))
    example = graph.example({key: value[:3] for key, value in states.items()})
    batch = torch.export.Dim("batch")
    names: Any = {"input_names": [port.name for port in graph.inputs], "output_names": graph.output_names}
    shapes = (tuple({0: batch} for _ in example),)
    try:
        with _quiet():
            program: Any = torch.onnx.export(graph, example, dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
    except torch.onnx.errors.OnnxExporterError as error:
        raise RunError(f"PyTorch cannot export a layer or operation of this policy: {_cause(error)}") from error
    model = program.model_proto
    model.metadata_props.add(key=CONTRACT, value=json.dumps(contract, sort_keys=True))
    with write_whole(home(path)) as aside:
        onnx.save(model, aside)
        differences = {number: largest_difference(aside, graph, states, number) for number in CHECKED}
        largest = max(differences.values())
        if not largest <= TOLERANCE:
            raise RunError(
                f"the outputs of the file differ by {largest:.3g} from those of the policy, more than {TOLERANCE}; no "
                "file is written. Use networks whose layers the exporter of PyTorch supports."
            )
    return Export(home(path), contract, differences)


def _states(policy: TensorDictModuleBase, observations: TensorDictBase | None) -> dict[NestedKey, Tensor]:
    """Return 257 states of the dataset, or random ones, ``{key: [257, ...]}``."""
    number = max(CHECKED)
    if observations is not None:
        lacking = [key for key in policy.in_keys if key not in observations.keys(True)]
        if lacking:
            raise ValueError(f"observations lacks {lacking}, which the policy reads; pass the transitions.")
        rows = torch.arange(number) * len(observations) // number
        chosen = observations[rows].select(*policy.in_keys)
        return {key: chosen.get(key).to("cpu", copy=True) for key in policy.in_keys}
    specs = getattr(policy, "observation_specs", None) or {}
    lacking = [key for key in policy.in_keys if key not in specs]
    if lacking:
        raise ValueError(f"the shapes of {lacking} are not known; pass observations, such as the transitions.")
    random = torch.Generator().manual_seed(0)
    return {key: _random_state(specs[key], number, random) for key in policy.in_keys}


def _random_state(spec: TensorSpec, number: int, random: torch.Generator) -> Tensor:
    shape = (number, *spec.shape)
    if spec.dtype == torch.bool:
        return torch.ones(shape, dtype=torch.bool)
    if spec.dtype == torch.uint8:
        return torch.randint(256, shape, dtype=torch.uint8, generator=random)
    return torch.randn(shape, dtype=spec.dtype, generator=random)


def _with_range(port: Port, stack: int, observations: TensorDictBase | None) -> dict[str, Any]:
    """Describe an input, with the range of its values in the dataset if it is a vector of floats."""
    described = port.describe()
    if observations is None or port.kind != "observation" or not port.dtype.is_floating_point:
        return described
    parts = [
        current(rows.get(port.key), port, stack).aminmax(dim=0)
        for rows in observations.select(port.key).split(_CHUNK_ROWS)
    ]
    low, high = torch.stack([part.min for part in parts]).amin(0), torch.stack([part.max for part in parts]).amax(0)
    return {**described, "low": low.tolist(), "high": high.tolist()}


def _bounds(spec: TensorSpec | None) -> dict[str, Any]:
    """Return the bounds or the number of actions of a spec."""
    if spec is None:
        return {}
    space: Any = spec.space
    if hasattr(space, "low"):
        return {"low": space.low.tolist(), "high": space.high.tolist()}
    actions = DiscreteActions.of(spec)
    return {"n_actions": actions.number, "one_hot": actions.one_hot}


def _digest(policy: TensorDictModuleBase) -> str:
    """Return the SHA-256 digest of the weights: names, dtypes, shapes and numbers of the state_dict."""
    digest = hashlib.sha256()
    for name, value in sorted(policy.state_dict().items()):
        if isinstance(value, Tensor):
            array = value.detach().cpu().contiguous()
            digest.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
            digest.update(array.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
