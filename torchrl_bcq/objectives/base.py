"""The base class of all objectives that learn from a fixed dataset."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey
from torch import Size, Tensor, autocast, dtype
from torchrl.objectives.common import LossModule

from torchrl_bcq.objectives.inputs import check_choice, check_state_dict, correct_batch_size, row_weights, select_inputs
from torchrl_bcq.objectives.ownership import RunOn, find_slots, follow_swapped_weights
from torchrl_bcq.protocols import has_batch_norm


class OfflineLoss(LossModule):
    """Base class of objectives that learn from a fixed dataset. ``OfflineTrainer`` trains any such objective.

    A subclass passes its networks to ``OfflineLoss.__init__`` in the order in which training updates the networks. For
    each network, the subclass defines a method ``{name}_loss(tensordict)``, which returns ``(loss [], metadata)``. The
    loss has gradients for the network ``{name}`` only. Metadata are detached tensors whose first dimensions are the
    batch dimensions. In a method ``{name}_loss``, ``self.{name}_network`` uses the current weights of the network.
    Inside ``with self.target_networks():``, the network uses its target weights. Inside ``with self.detached(name):``,
    the network uses its detached weights.

    If a loss is a sum, its metadata may also hold the terms, with gradients, under names that begin with ``loss_``; one
    of them is ``loss_{name}``. ``forward`` then returns the terms in place of the sum.

    Args:
        networks: networks by name. The value None means that the objective does not use this network.
        delayed: names of the networks that get a target network. A target updater changes the target networks.
        metadata: for each network name, the names of the metadata that the network's loss returns.
        action_key: entry of the action. The action's shape, ``[*B, A]``, defines the batch size ``*B``.
        reduction: reduction of the loss over the batch: ``"mean"`` (or None), ``"sum"`` or ``"none"``.
        use_prioritized_weights: ``"auto"`` or True weights the rows by ``priority_weight`` if the batch has this entry;
            False ignores the entry. The reduction ``"mean"`` then is the weighted mean, ``sum(w * loss) / sum(w)``.

    The loss trains the given modules, not copies. A policy that holds the same modules therefore always uses the
    current weights. In the constructor of a subclass, the argument for the network ``{name}`` is ``{name}_network``.

    Raises:
        ValueError: if a setting is out of range. A call of a loss also raises this error if the batch lacks an entry or
            an entry has a wrong shape or dtype. The loss never broadcasts an entry.

    Example:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_bcq import OfflineLoss, make_cloning_modules
        >>> class AbsoluteCloning(OfflineLoss):
        ...     def __init__(self, policy_network):
        ...         super().__init__({"policy": policy_network})
        ...     def policy_loss(self, tensordict):
        ...         batch = self.select(tensordict)
        ...         cloned = self.policy_network(batch.exclude("action"))["action"]
        ...         return self.reduce((cloned - batch["action"]).abs().mean(-1), tensordict), {}
        >>> env = GymEnv("Pendulum-v1")
        >>> loss = AbsoluteCloning(*make_cloning_modules(env.observation_spec, env.action_spec))
        >>> loss(env.rollout(100))["loss_policy"].shape
        torch.Size([])
    """

    @dataclass
    class _AcceptedKeys:
        """Keys of the batch's entries. ``set_keys`` can change all of these keys, except the action's key."""

        action: NestedKey = "action"
        priority: NestedKey = "td_error"
        priority_weight: NestedKey = "priority_weight"

    _like: Tensor
    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    target_dtype: dtype | None = None  # autocast to this dtype while targets are computed; None adds no autocast
    action_metric = "action_distance"  # name of the mean of compare_actions

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Wrap the loss methods of a subclass: after ``params.to_module(loss)``, they use ``params``."""
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
        """Build the loss from its networks."""
        super().__init__()
        check_choice("reduction", reduction, ("mean", "sum", "none", None))
        check_choice("use_prioritized_weights", use_prioritized_weights, (True, False, "auto"))
        self.network_names = tuple(name for name, network in networks.items() if network is not None)
        attributes = [f"{name}_network" for name in networks]
        self._network_arguments = arguments = self.network_arguments() or attributes
        if {*arguments} != {*attributes}:
            raise ValueError(f"the constructor's network arguments are {arguments}, expected {attributes}.")
        self.delayed_names = tuple(name for name in self.network_names if name in delayed)
        with warnings.catch_warnings():  # hides TorchRL's warning about missing class annotations
            warnings.filterwarnings("ignore", ".* wasn't part of the annotations")
            for name, network in networks.items():
                if network is None:
                    setattr(self, f"{name}_network", None)
                    continue
                self.convert_to_functional(network, f"{name}_network", create_target_params=name in delayed)
                if f"{name}_network_params" not in self._modules:  # the network has no parameters and no buffers
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
        """List the constructor's arguments ``{name}_network``. If there are none, list those of a base class."""
        signatures = (inspect.signature(vars(each).get("__init__", object.__init__)).parameters for each in cls.__mro__)
        return next(filter(None, ([name for name in names if name.endswith("_network")] for names in signatures)), [])

    @property
    def networks(self) -> tuple[Any, ...]:
        """The given networks, in the order of the constructor's arguments. An absent network is None."""
        return tuple(getattr(self, name) for name in self._network_arguments)

    @property
    def trainable_names(self) -> tuple[str, ...]:
        """Names of the networks that have at least one trainable parameter."""
        weights = {name: self._modules[f"{name}_network_params"].parameters() for name in self.network_names}
        return tuple(name for name, own in weights.items() if any(weight.requires_grad for weight in own))

    @property
    def has_values(self) -> bool:
        """Whether the objective learns state-action values."""
        return type(self).value is not OfflineLoss.value

    def value(self, tensordict: TensorDictBase) -> Tensor | None:
        """Return the values ``[N]`` of ``N`` state-action pairs, or None if the objective learns no values."""
        return None

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute all losses and their metadata. You can add the losses and call ``backward`` on the sum."""
        tensordict = correct_batch_size(tensordict, self.tensor_keys.action, self._batch_of)
        out: dict[str, Tensor] = {}
        for name in self.network_names:
            loss, metadata = getattr(self, f"{name}_loss")(tensordict)
            out.update({f"loss_{name}": loss, **metadata})
        return TensorDict(out)

    def select(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Check a batch and return its observations and actions ``[*B, A]``, with the batch size ``*B``."""
        return self._select(tensordict, self._state_action_keys)

    def _select(self, tensordict: TensorDictBase, keys: list[NestedKey], **outcome: Any) -> TensorDictBase:
        keywords = {"action_key": self.tensor_keys.action, "dtype": self._like.dtype, "batch_of": self._batch_of}
        return select_inputs(tensordict, keys, networks=self.networks, **keywords, **outcome)

    def compare_actions(self, action: Tensor, recorded: Tensor) -> Tensor:
        """Return the distance between each action and the recorded action. ``[*B, A], [*B, A] -> [*B]``."""
        return (action - recorded).norm(dim=-1)

    def _batch_of(self, action: Tensor, ndim: int) -> Size:
        """Return the batch dimensions of actions ``[*B, A]``, the entry of a tensordict of ``ndim`` dimensions."""
        return action.shape[:-1]

    def target_networks(self, *names: str) -> AbstractContextManager:
        """Context manager in which networks use the weights of their target networks, if they have one.

        Without ``names``, these are all networks. A layer that several networks share changes in all of them.
        """
        slots = []
        for name in [name for name in self.delayed_names if not names or name in names]:
            params = getattr(self, f"target_{name}_network_params")  # this access warns if no target updater exists
            known, found = self._targets[name]
            slots += found if params._param_td is known else find_slots(params, getattr(self, f"{name}_network"))
        return RunOn(slots)

    def target_autocast(self) -> AbstractContextManager:
        """Context manager that applies ``target_dtype``."""
        return nullcontext() if self.target_dtype is None else autocast(self._like.device.type, self.target_dtype)

    def detached(self, name: str) -> AbstractContextManager:
        """Context manager in which a network's inputs get gradients, but the network's weights get none."""
        return RunOn(self._own[name][1], detached=True)

    def reduce(self, loss: Tensor, tensordict: TensorDictBase) -> Tensor:
        """Weight, mask and reduce the losses ``[*B]`` of the rows. The reduction ``none`` keeps the shape."""
        weights = tensordict.get(self.tensor_keys.priority_weight, None) if self.use_prioritized_weights else None
        if weights is not None:
            weights = row_weights(weights, loss, self.tensor_keys.priority_weight)
        return self._reduce_loss(loss, tensordict=tensordict, weights=weights)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict. Raise a RuntimeError as PyTorch does, also if the loss is a part of another module."""
        own = self.state_dict()  # if not strict, entries that are missing keep their values
        given = state_dict if strict else {name: state_dict.get(name, value) for name, value in own.items()}
        result = super().load_state_dict(given, assign=assign)
        result.missing_keys.extend(sorted(given.keys() - state_dict.keys()))
        result.unexpected_keys.extend(sorted(state_dict.keys() - given.keys()))
        self._bind()
        return result

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, *found) -> None:
        check_state_dict(self.state_dict(), state_dict, prefix, strict=strict)  # tensordict would ignore other names
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *found)

    def train(self, mode: bool = True):
        """Set the mode of the loss and of its networks, such as that of dropout layers."""
        for network in filter(None, self.networks):
            network.train(mode)
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn)
        self._bind()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied loss. Networks that shared layers before the copy share layers in the copy too."""
        super().__setstate__(state)
        for name in self.network_names:
            params = TensorDict.from_module(getattr(self, f"{name}_network"), as_module=True)
            if isinstance(params, TensorDictParams):
                self._modules[f"{name}_network_params"] = params
        self._bind()

    def _bind(self) -> None:
        """Put the loss's parameters into the user's networks; store the dict and key of each weight."""
        self._own, self._targets = {}, {}
        for name in self.network_names:
            network = getattr(self, f"{name}_network")
            params = self._modules[f"{name}_network_params"]
            params.to_module(network, preserve_module_state=False)  # the default, True, would unfreeze frozen weights
            self._own[name] = params._param_td, find_slots(params, network)
            if name in self.delayed_names:
                target = self._modules[f"target_{name}_network_params"]
                self._targets[name] = target._param_td, find_slots(target, network)
        if (first := next(self.parameters(), None)) is None:
            raise ValueError("no network of the loss has parameters, so there is nothing to learn.")
        self.__dict__["_like"] = first  # its dtype and device; setattr would register it a second time
        self.mixes_rows = has_batch_norm(*(getattr(self, f"{name}_network") for name in self.network_names))

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries that ``forward`` reads, in the order of its positional arguments."""
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
        read = [getattr(net, "observation_keys", getattr(net, "in_keys", ())) for net in filter(None, self.networks)]
        keys = dict.fromkeys(key for keys in [*read, self._other_state_keys()] for key in keys)
        return [key for key in keys if key != self.tensor_keys.action]

    def _other_state_keys(self) -> list[NestedKey]:
        """List entries of a state that no network reads, but the objective does."""
        return []

    def _reset_module_parameters(self, module_name: str, module: Any) -> None:
        if hasattr(module, "reset_parameters_recursive"):  # a behaviour model may be any torch.nn.Module
            super()._reset_module_parameters(module_name, module)

    def _make_vmap(self) -> None:
        """Do nothing: TorchRL's ``set_vmap_randomness`` calls this method, but the loss does not use vmap."""

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        self._in_keys = None
        for name, key in self._decided_keys.items():
            if (asked := getattr(self.tensor_keys, name)) != key:
                setattr(self.tensor_keys, name, key)
                message = f"set_keys cannot change the {name} key to {asked!r}, because the networks use {key!r}"
                raise ValueError(f"{message}; build the networks with the key {asked!r}.")
