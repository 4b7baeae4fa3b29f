"""Several critics as one module, so that a loss, its targets and a policy share the very same weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchrl.modules import MLP

from torchrl_bcq.modules.normalization import Rescale, Standardize
from torchrl_bcq.modules.stacked import StackedLinear

_ELEMENTWISE = (nn.ELU, nn.GELU, nn.LeakyReLU, nn.Mish, nn.ReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Tanh)


class QEnsemble(TensorDictModuleBase):
    """``C`` independent critics; writes all their values. The first one guides the actor and the policy.

    Critics that are equal :class:`~torchrl.modules.MLP` s of linear layers and elementwise activations, without hooks,
    are evaluated in one batched pass, others one after the other. A :class:`~torchrl_bcq.Standardize` and what undoes
    it may be among the layers, of equal or unequal statistics.

    Args:
        critics: modules that read the same entries and write ``[*B, 1]`` to the same, last out-key.

    Writes: the critics' out-key, ``state_action_value [*B, C]`` by default.

    Raises:
        TypeError: if a critic is no TensorDictModule.
        ValueError: if there is no critic, if keys differ, or if two critics hold equal weights: their minimum and
            maximum would be the same, and the mixture of both would do nothing; when called, if a critic writes
            anything but ``[*B, 1]``.

    Source: arXiv:1812.02900, eq. 13.
    """

    def __init__(self, critics: Sequence[TensorDictModuleBase]) -> None:
        super().__init__()
        _check_critics(critics)
        self.critics = nn.ModuleList(critics)
        self.in_keys = list(critics[0].in_keys)
        self.out_keys = [critics[0].out_keys[-1]]
        self._batched = len(critics) > 1 and _are_equal_mlps(critics)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the value of each critic, ``[*B, C]``."""
        key = self.out_keys[0]
        if self._batched and not _have_hooks(self.critics):
            inputs = torch.cat([tensordict.get(in_key) for in_key in self.in_keys], -1)
            return tensordict.set(key, self._batched_values(inputs))
        inputs = tensordict.select(*self.in_keys)
        values = [self._column(critic(inputs.copy()), i) for i, critic in enumerate(self.critics)]
        return tensordict.set(key, torch.cat(values, -1))

    def first(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the value of the first critic alone, ``[*B, 1]``."""
        critic: Any = self.critics[0]
        if self._batched and not (critic._forward_hooks or critic._forward_pre_hooks):
            # TensorDictModule's own call takes as long as the network does for one state
            return tensordict.set(self.out_keys[0], critic.module(*map(tensordict.get, self.in_keys)))
        out = critic(tensordict)
        self._column(out, 0)
        return out

    def _column(self, out: TensorDictBase, i: int) -> Tensor:
        """The value of critic ``i``, which must be ``[*B, 1]``."""
        value = out.get(self.out_keys[0])
        if value.shape != (*out.batch_size, 1):
            raise ValueError(
                f"critic {i} writes values of shape {tuple(value.shape)}, expected one for each row, "
                f"{(*out.batch_size, 1)}."
            )
        return value

    def _batched_values(self, inputs: Tensor) -> Tensor:
        batch, critics = inputs.shape[:-1], len(self.critics)
        linear = next(layer for layer in self.critics[0].modules() if isinstance(layer, (nn.Linear, StackedLinear)))
        agents = linear.weight.shape[:-2].numel()  # K, 1 where the layers are not stacked
        # rows last: gradients of weights then come in the weights' own layout, and need no copy
        x = inputs.reshape(1, agents, -1, inputs.shape[-1]).mT.expand(critics, -1, -1, -1)  # [*B, in] -> [C, K, in, N]
        for layers in zip(*(critic.module for critic in self.critics), strict=True):
            if isinstance(layers[0], (nn.Linear, StackedLinear)):
                weight = torch.stack([layer.weight for layer in layers]).flatten(0, -3)  # [CK, out, in]
                bias = torch.stack([layer.bias for layer in layers]).flatten(0, -2).unsqueeze(-1)  # [CK, out, 1]
                x = torch.baddbmm(bias, weight, x.flatten(0, 1)).unflatten(0, (critics, agents))  # [C, K, out, N]
            elif isinstance(layers[0], Standardize):
                loc, scale = (_stack([getattr(layer, name) for layer in layers]) for name in ("loc", "scale"))
                x = (x - loc) / scale
            elif isinstance(layers[0], Rescale):
                x = x * _stack([layer.scale for layer in layers])
            else:
                x = layers[0](x)
        return x.squeeze(-2).movedim(0, -1).reshape(*batch, critics)  # [C, K, 1, N] -> [*B, C]


def _stack(columns: Sequence[Tensor]) -> Tensor:
    """One of each critic, ``[D] -> [C, 1, D, 1]``."""
    return torch.stack(list(columns))[:, None, :, None]


def _check_critics(critics: Sequence[TensorDictModuleBase]) -> None:
    if not critics:
        raise ValueError("critics is empty; a QEnsemble needs at least one.")
    for i, critic in enumerate(critics):
        if not isinstance(critic, TensorDictModuleBase):
            raise TypeError(
                f"critic {i} is a {type(critic).__name__}; wrap it, as in TensorDictModule(network, "
                "in_keys=['observation', 'action'], out_keys=['state_action_value'])."
            )
        if any(map(is_lazy, critic.parameters())):
            raise ValueError(
                f"critic {i} has lazy layers without weights yet; call it once on data, or give in_features."
            )
        if critic.in_keys != critics[0].in_keys or critic.out_keys[-1] != critics[0].out_keys[-1]:
            raise ValueError(
                f"critic {i} maps {critic.in_keys} to {critic.out_keys[-1]!r}, but critic 0 maps "
                f"{critics[0].in_keys} to {critics[0].out_keys[-1]!r}; give all critics the same keys."
            )
    for (i, one), (j, other) in combinations(enumerate(critics), 2):
        pairs = list(zip(one.parameters(), other.parameters(), strict=False))
        if pairs and all(a is b or (a.shape == b.shape and not a.is_meta and torch.equal(a, b)) for a, b in pairs):
            raise ValueError(f"critics {i} and {j} hold equal weights (a deep copy?); initialise each on its own.")


def _are_equal_mlps(critics: Sequence[TensorDictModuleBase]) -> bool:
    """Whether all critics are MLPs of linear layers with bias and elementwise activations, of equal sizes."""

    def signature(critic: TensorDictModuleBase) -> list[str] | None:
        if not isinstance(critic, TensorDictModule) or type(critic.module) is not MLP:
            return None
        plain = [
            isinstance(layer, _ELEMENTWISE)
            or type(layer) in (Standardize, Rescale)
            or (type(layer) is nn.Linear and layer.bias is not None)
            for layer in critic.module
        ]
        widths = [layer.out_features for layer in critic.module if isinstance(layer, nn.Linear)]
        one_value = widths[-1:] == [1]
        return [repr(layer) for layer in critic.module] if all(plain) and one_value else None

    signatures = [signature(critic) for critic in critics]
    return signatures[0] is not None and all(other == signatures[0] for other in signatures)


def _have_hooks(critics: Iterable[Any]) -> bool:
    """Whether an MLP does more than its layers say: hooks, which old-style weight and spectral norms use too."""
    modules = (module for critic in critics for module in (critic, critic.module, *critic.module))
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)
