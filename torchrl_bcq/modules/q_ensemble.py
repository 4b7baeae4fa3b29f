"""Combines several critics into one module, which a loss and a policy share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn
from torchrl.modules import MLP

from torchrl_bcq.modules.dispatch import accepts_tensors
from torchrl_bcq.modules.normalization import Rescale, Standardize
from torchrl_bcq.protocols import check_initialized, has_batch_norm

_ELEMENTWISE = (nn.ELU, nn.GELU, nn.LeakyReLU, nn.Mish, nn.ReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Tanh,
                Standardize, Rescale)  # fmt: skip
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class QEnsemble(TensorDictModuleBase):
    """Ensemble of ``C`` independent critics. The actor and, by default, the policy use the first critic only.

    The ensemble evaluates all critics in one batched pass if they are ``torchrl.modules.MLP`` networks of the same
    sizes. All layers must be linear with bias, elementwise activations, ``Standardize`` or ``Rescale``, and must have
    no hooks. Otherwise, the ensemble evaluates the critics one after the other. For critics with BatchNorm, the
    ensemble flattens the batch to ``[N]``.

    Args:
        critics: modules with the same in-keys and the same last out-key; each writes values ``[*B, 1]`` to this
            out-key.

    Writes: the values of all critics, ``[*B, C]``, to the critics' last out-key, such as ``state_action_value``.

    Raises:
        TypeError: if a critic is not a TensorDictModule.
        ValueError: if there is no critic, if the critics' keys differ, if a critic has uninitialised lazy layers, or if
            two critics have equal weights. A call of the ensemble also raises this error if a critic's values do not
            have the shape ``[*B, 1]``.

    Example:
        >>> import torch
        >>> from tensordict.nn import TensorDictModule
        >>> from torchrl.modules import MLP
        >>> from torchrl_bcq.modules import QEnsemble
        >>> networks = [MLP(in_features=3 + 1, out_features=1, num_cells=[64]) for _ in range(2)]
        >>> keys = {"in_keys": ["observation", "action"], "out_keys": ["state_action_value"]}
        >>> critics = QEnsemble([TensorDictModule(network, **keys) for network in networks])
        >>> critics(observation=torch.zeros(5, 3), action=torch.zeros(5, 1)).shape
        torch.Size([5, 2])

    Source: arXiv:1812.02900, eq. 13.
    """

    flattens_rows = True  # critics with BatchNorm get a flat batch

    def __init__(self, critics: Sequence[TensorDictModuleBase]) -> None:
        """Build the ensemble from its critics."""
        super().__init__()
        _check_critics(critics)
        self.critics = nn.ModuleList(critics)
        self.in_keys = list(critics[0].in_keys)
        self.out_keys = [critics[0].out_keys[-1]]
        self._batched = len(critics) > 1 and _are_equal_mlps(critics)
        self._layers = [type(layer) for layer in critics[0].module] if self._batched else []
        self._have_batch_norm = [has_batch_norm(critic) for critic in critics]

    @accepts_tensors
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the value of each critic, ``[*B, C]``."""
        if self._batched and _are_unchanged(self.critics, self._layers):
            inputs = torch.cat([tensordict.get(key) for key in self.in_keys], -1)
            values = self._batched_values(inputs)
        else:
            values = torch.cat([self._value(tensordict, i) for i in range(len(self.critics))], -1)
        return tensordict.set(self.out_keys[0], values)

    def first(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the value of the first critic alone, ``[*B, 1]``."""
        critic: Any = self.critics[0]
        if self._batched and not (critic._forward_hooks or critic._forward_pre_hooks):
            # call the network directly: for one state, TensorDictModule's call would double the time
            return tensordict.set(self.out_keys[0], critic.module(*map(tensordict.get, self.in_keys)))
        return tensordict.set(self.out_keys[0], self._value(tensordict, 0))

    def _value(self, tensordict: TensorDictBase, i: int) -> Tensor:
        """Call critic ``i`` on its own and return its values ``[*B, 1]``."""
        inputs = tensordict.select(*self.in_keys)
        if self._have_batch_norm[i] and inputs.ndim != 1:
            inputs = inputs.reshape(-1)  # [*B] -> [N], only for BatchNorm, because reshape copies expanded states
        value = self.critics[i](inputs).get(self.out_keys[0])
        if value.shape != (*inputs.batch_size, 1):
            raise ValueError(
                f"critic {i} writes values of shape {tuple(value.shape)}, expected one value for each row: "
                f"{(*inputs.batch_size, 1)}."
            )
        return value.reshape(*tensordict.batch_size, 1)

    def _batched_values(self, inputs: Tensor) -> Tensor:
        """Compute the values of all critics with one batched product per layer. ``[*B, in] -> [*B, C]``."""
        batch, critics = inputs.shape[:-1], len(self.critics)
        # transpose to [features, rows]: otherwise autograd would copy the gradients of the weights
        x = inputs.reshape(-1, inputs.shape[-1]).mT.expand(critics, -1, -1)  # [*B, in] -> [C, in, N]
        for layers in zip(*(critic.module for critic in self.critics), strict=True):
            if isinstance(layers[0], nn.Linear):
                weight = torch.stack([layer.weight for layer in layers])  # [C, out, in]
                x = torch.baddbmm(_stack([layer.bias for layer in layers]), weight, x)  # [C, out, N]
            elif isinstance(layers[0], Standardize):
                x = (x - _stack([layer.loc for layer in layers])) / _stack([layer.scale for layer in layers])
            elif isinstance(layers[0], Rescale):
                x = x * _stack([layer.scale for layer in layers])
            else:
                x = layers[0](x)
        return x.squeeze(1).mT.reshape(*batch, critics)  # [C, 1, N] -> [*B, C]


def _stack(columns: Sequence[Tensor]) -> Tensor:
    """Stack ``C`` vectors ``[D]``, one for each critic, and return a tensor ``[C, D, 1]``."""
    return torch.stack(list(columns)).unsqueeze(-1)


def _check_critics(critics: Sequence[TensorDictModuleBase]) -> None:
    if not critics:
        raise ValueError("critics is empty; a QEnsemble needs at least one.")
    for i, critic in enumerate(critics):
        if not isinstance(critic, TensorDictModuleBase):
            raise TypeError(
                f"critic {i} is a {type(critic).__name__}; wrap it as TensorDictModule(network, "
                "in_keys=['observation', 'action'], out_keys=['state_action_value'])."
            )
        check_initialized(f"critic {i}", critic)
        if critic.in_keys != critics[0].in_keys or critic.out_keys[-1] != critics[0].out_keys[-1]:
            raise ValueError(
                f"critic {i} maps {critic.in_keys} to {critic.out_keys[-1]!r}, but critic 0 maps "
                f"{critics[0].in_keys} to {critics[0].out_keys[-1]!r}; give all critics the same keys."
            )
    for (i, one), (j, other) in combinations(enumerate(critics), 2):
        if _have_equal_weights(one, other):
            raise ValueError(f"critics {i} and {j} have equal weights, like copies; initialise each critic separately.")


def _have_equal_weights(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = list(one.parameters()), list(other.parameters())
    return 0 < len(ours) == len(theirs) and all(
        a is b or (a.shape == b.shape and not a.is_meta and torch.equal(a, b))
        for a, b in zip(ours, theirs, strict=True)
    )


def _are_equal_mlps(critics: Sequence[Any]) -> bool:
    """Whether all critics are MLPs with one output and equal layers, which the batched pass supports."""
    mlps = [critic.module for critic in critics if _is_plain(critic) and type(critic.module) is MLP]
    if len(mlps) < len(critics) or len({repr(mlp) for mlp in mlps}) > 1:
        return False
    linear = [layer for layer in mlps[0] if type(layer) is nn.Linear and layer.bias is not None]
    elementwise = [layer for layer in mlps[0] if type(layer) in _ELEMENTWISE]
    return len(linear) + len(elementwise) == len(mlps[0]) and linear[-1].out_features == 1


def _is_plain(critic: Any) -> bool:
    """Whether a critic only calls its network; a subclass of TensorDictModule may do more."""
    return isinstance(critic, TensorDictModule) and type(critic).forward is TensorDictModule.forward


def _are_unchanged(critics: Iterable[Any], layers: list[type]) -> bool:
    """Whether all critics still have these layers, and no hooks, which the batched pass would not call."""
    if any([type(layer) for layer in critic.module] != layers for critic in critics):
        return False
    modules = (module for critic in critics for module in (critic, critic.module, *critic.module))
    return not any(getattr(module, kind) for module in modules for kind in _HOOKS)
