"""What all objectives on a fixed dataset share."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType
from torchrl.objectives.common import LossModule

from torchrl_bcq.objectives.inputs import check_choice, check_state_dict, select_inputs
from torchrl_bcq.objectives.ownership import RunOn, find_slots, follow_swapped_weights

_target_dtype: torch.dtype | None = None


@contextmanager
def target_precision(dtype: torch.dtype | None) -> Iterator[None]:
    """Context in which losses evaluate their target networks under autocast to ``dtype``; None changes nothing."""
    global _target_dtype
    before, _target_dtype = _target_dtype, dtype
    try:
        yield
    finally:
        _target_dtype = before


class OfflineLoss(LossModule):
    """Base of objectives that learn from a fixed dataset.

    A subclass passes its networks in the order in which they learn, and defines ``{name}_loss(tensordict)`` for each,
    which returns ``(loss [], metadata)`` and has gradients for that network alone. Metadata are detached tensors that
    start with the batch dimensions. :class:`~torchrl_bcq.OfflineTrainer` trains any such objective. In the losses,
    ``self.{name}_network`` is the network on its present weights; see :meth:`target_networks` and :meth:`detached`.

    Args:
        networks: by name. None stands for a network that this objective does without.
        delayed: names of networks that have a target, moved by a target updater.
        metadata: names of the metadata that each loss returns.
        action_key: entry of the action, which decides the batch size ``*B``.
        reduction: ``"mean"`` (or None), ``"sum"`` or ``"none"`` over the batch.
        use_prioritized_weights: ``"auto"`` weighs each row by ``priority_weight`` if a batch holds it.

    The modules that are passed in are trained themselves: a policy of the same modules acts with what was just learned.
    Names of the constructor's network arguments end with ``_network``.

    Raises:
        ValueError: at construction, if a setting is out of range; later, if a batch lacks an entry, or its shapes or
            dtypes do not fit. Nothing is broadcast.
    """

    @dataclass
    class _AcceptedKeys:
        """Entries of the tensordict. The networks decide the action's; ``set_keys`` renames the others."""

        action: NestedKey = "action"
        priority: NestedKey = "td_error"
        priority_weight: NestedKey = "priority_weight"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    deterministic_sampling_mode = ExplorationType.RANDOM  # TorchRL's default would make all samples alike

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let all losses of a subclass follow weights that are swapped through the objective."""
        super().__init_subclass__(**kwargs)
        for name, method in list(vars(cls).items()):
            if name.endswith("_loss") and not name.startswith("_") and inspect.isfunction(method):
                setattr(cls, name, follow_swapped_weights(method))

    def __init__(
        self,
        networks: Mapping[str, TensorDictModuleBase | None],
        *,
        delayed: Collection[str] = (),
        metadata: Mapping[str, Sequence[str]] | None = None,
        action_key: NestedKey = "action",
        reduction: str | None = "mean",
        use_prioritized_weights: str | bool = "auto",
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, ("mean", "sum", "none", None))
        check_choice("use_prioritized_weights", use_prioritized_weights, (True, False, "auto"))
        self.network_names = tuple(name for name, network in networks.items() if network is not None)
        self._network_arguments = self.network_arguments() or [f"{name}_network" for name in networks]
        self.delayed_names = tuple(name for name in self.network_names if name in delayed)
        with warnings.catch_warnings():  # TorchRL asks for a class annotation of each of these attributes
            warnings.filterwarnings("ignore", ".* wasn't part of the annotations")
            for name, network in networks.items():
                if network is None:
                    setattr(self, f"{name}_network", None)
                    continue
                self.convert_to_functional(network, f"{name}_network", create_target_params=name in delayed)
                if f"{name}_network_params" not in self._modules:  # a network without parameters and buffers
                    setattr(self, f"{name}_network_params", TensorDictParams(TensorDict()))
        self.metadata_keys = {name: tuple((metadata or {}).get(name, ())) for name in self.network_names}
        self.out_keys = [f"loss_{name}" for name in self.network_names]
        self.out_keys += [key for keys in self.metadata_keys.values() for key in keys]
        self.reduction = reduction or "mean"
        self.use_prioritized_weights = use_prioritized_weights
        self._in_keys: list[NestedKey] | None = None
        self._decided_keys = {"action": action_key}
        self.tensor_keys.action = action_key
        self._bind()

    @classmethod
    def network_arguments(cls) -> list[str]:
        """Names of the constructor's arguments that are networks; of the base's if it passes ``*args`` on."""
        signatures = (inspect.signature(vars(each).get("__init__", object.__init__)).parameters for each in cls.__mro__)
        found = ([name for name in parameters if name.endswith("_network")] for parameters in signatures)
        return next(filter(None, found), [])

    @property
    def networks(self) -> tuple[Any, ...]:
        """The modules that were passed in, in the constructor's order; None for one that is absent."""
        return tuple(getattr(self, name) for name in self._network_arguments)

    @property
    def trainable_names(self) -> tuple[str, ...]:
        """Names of the networks that have a parameter to train."""
        return tuple(
            name
            for name in self.network_names
            if any(parameter.requires_grad for parameter in self._modules[f"{name}_network_params"].parameters())
        )

    @property
    def has_values(self) -> bool:
        """Whether the objective learns values."""
        return type(self).value is not OfflineLoss.value

    def value(self, tensordict: TensorDictBase) -> Tensor | None:
        """The value by which the policy acts, of state-action pairs ``[N]``; None for an objective without values."""
        return None

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """All losses at the present parameters, whose sum can be differentiated, and their metadata."""
        out: dict[str, Tensor] = {}
        for name in self.network_names:
            loss, metadata = getattr(self, f"{name}_loss")(tensordict)
            out.update({f"loss_{name}": loss, **metadata})
        return TensorDict(out)

    # what the losses of a subclass use

    def select(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Check and select the states and actions of a batch, ``[*B]``."""
        return self._select(tensordict, self._state_action_keys)

    def _select(self, tensordict: TensorDictBase, keys: list[NestedKey], **outcome: Any) -> TensorDictBase:
        return select_inputs(tensordict, keys, action_key=self.tensor_keys.action, dtype=self._like.dtype, **outcome)

    def target_networks(self) -> AbstractContextManager:
        """Context in which networks use the weights of their targets, if they have one."""
        slots = []
        for name in self.delayed_names:
            params = getattr(self, f"target_{name}_network_params")  # TorchRL warns here of a missing updater
            known, found = self._targets[name]
            slots += found if params._param_td is known else find_slots(params, getattr(self, f"{name}_network"))
        return RunOn(slots)

    def target_autocast(self) -> AbstractContextManager:
        """Context of the precision that :func:`target_precision` asks for."""
        if _target_dtype is None:
            return nullcontext()  # keeps an autocast around the loss
        return torch.autocast(self._like.device.type, _target_dtype)

    def detached(self, name: str) -> AbstractContextManager:
        """Context in which a network's weights have no gradient, but its inputs do."""
        return RunOn(self._own[name][1], detached=True)

    def reduce(self, loss: Tensor, tensordict: TensorDictBase) -> Tensor:
        """Importance weights, mask and reduction as in TorchRL. ``[*B] -> []``, or ``[*B]`` for ``"none"``."""
        weights = self._maybe_get_priority_weight(tensordict)
        if weights is not None and weights.shape != loss.shape:
            key, shape = self.tensor_keys.priority_weight, tuple(weights.shape)
            raise ValueError(f"{key} has shape {shape}, expected {tuple(loss.shape)}, one weight for each row.")
        return self._reduce_loss(loss, tensordict=tensordict, weights=weights)

    # ownership of the networks

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state; entries of the networks that are missing or of another size raise, which tensordict skips."""
        check_state_dict(self.state_dict(), state_dict, strict=strict)
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self._bind()
        return result

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn)
        self._bind()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, whose parameters are those of the copied modules: these keep layers that are shared."""
        super().__setstate__(state)
        for name in self.network_names:
            params = TensorDict.from_module(getattr(self, f"{name}_network"), as_module=True)
            if isinstance(params, TensorDictParams):
                self._modules[f"{name}_network_params"] = params
        self._bind()

    def _bind(self) -> None:
        """Let the modules hold this loss's parameters, and remember where each weight is stored."""
        self._own, self._targets = {}, {}
        for name in self.network_names:
            network = getattr(self, f"{name}_network")
            params = self._modules[f"{name}_network_params"]
            params.to_module(network, preserve_module_state=False)  # the default would unfreeze frozen weights
            self._own[name] = params._param_td, find_slots(params, network)
            if name in self.delayed_names:
                target = self._modules[f"target_{name}_network_params"]
                self._targets[name] = target._param_td, find_slots(target, network)
        self._first = (next(self.parameters()),)  # in a tuple, or it would be registered again
        layers = [layer for name in self.network_names for layer in getattr(self, f"{name}_network").modules()]
        self.mixes_rows = any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in layers)

    @property
    def _like(self) -> Tensor:
        """A parameter, for the dtype and device of what is drawn."""
        return self._first[0]

    def _has_swapped_weights(self) -> bool:
        return any(self._modules[f"{name}_network_params"]._param_td is not own for name, (own, _) in self._own.items())

    def _find_own_slots(self) -> list:
        pairs = ((self._modules[f"{name}_network_params"], getattr(self, f"{name}_network")) for name in self._own)
        return [slot for pair in pairs for slot in find_slots(*pair)]

    # keys

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries that ``forward`` reads, in the order of a call without keywords."""
        if self._in_keys is None:
            self._in_keys = self._find_in_keys()
        return self._in_keys

    @in_keys.setter
    def in_keys(self, values: list[NestedKey]) -> None:
        self._in_keys = values

    def _find_in_keys(self) -> list[NestedKey]:
        return self._state_action_keys

    @property
    def _state_action_keys(self) -> list[NestedKey]:
        return [*self._observation_keys, self.tensor_keys.action]

    @property
    def _observation_keys(self) -> list[NestedKey]:
        read = [getattr(net, "observation_keys", None) or net.in_keys for net in self.networks if net is not None]
        return [key for key in dict.fromkeys(key for keys in read for key in keys) if key != self.tensor_keys.action]

    def _make_vmap(self) -> None:
        """Nothing here is vmapped; TorchRL calls this when ``set_vmap_randomness`` is."""

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        self._in_keys = None
        for name, key in self._decided_keys.items():
            if (asked := getattr(self.tensor_keys, name)) != key:
                setattr(self.tensor_keys, name, key)
                raise ValueError(f"the networks use {key!r} as the {name}; rename it there, not to {asked!r} here.")
