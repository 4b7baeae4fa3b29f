"""The equations of BCQ and of off-policy evaluation as pure functions of tensors. This module needs only torch.

Shapes: ``*B`` is any batch shape, ``n`` the number of sampled actions, ``A`` the size of an action, ``L`` the size of a
latent, ``C`` the number of critics, and ``K`` the number of discrete actions. Episodes have the shape ``[E, T]``; after
the end of an episode, rewards are 0, ratios are 1, and values are 0.

Sources: Fujimoto, Meger, Precup, "Off-Policy Deep Reinforcement Learning without Exploration", arXiv:1812.02900.
Discrete actions: Fujimoto, Conti, Ghavamzadeh, Pineau, "Benchmarking Batch Deep Reinforcement Learning Algorithms",
arXiv:1910.01708.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def clipped_normal(shape: Sequence[int], clip: float, like: Tensor) -> Tensor:
    """Draw random latents for the VAE: standard normal numbers, clipped to ``[-clip, clip]`` (appendix D.1).

    Args:
        shape: shape of the result.
        clip: largest magnitude, in standard deviations.
        like: tensor that has the dtype and device of the result.
    """
    return torch.randn(shape, dtype=like.dtype, device=like.device).clamp_(-clip, clip)


def spread_normal(num: int, dim: int, clip: float, seed: int, like: Tensor) -> Tensor:
    """Return points ``[num, dim]`` that cover the distribution of ``clipped_normal`` more evenly than random draws.

    The points are scrambled Sobol points, mapped by the inverse normal distribution function. The same seed gives the
    same points. PyTorch's random state does not change.
    """
    uniform = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed).draw(num, dtype=torch.float64)
    normal = torch.special.ndtri(uniform.clamp_min(torch.finfo(uniform.dtype).eps))
    return normal.clamp_(-clip, clip).to(like)


def squash_to_bounds(logits: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Scale ``tanh(logits)`` to ``[low, high]``. ``[*B, A], [A], [A] -> [*B, A]``."""
    return scale_to_bounds(torch.tanh(logits), low, high)


def scale_to_bounds(scaled: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Scale numbers from [-1, 1] to ``[low, high]``. ``[*B, A], [A], [A] -> [*B, A]``."""
    return ((high + low) / 2 + (high - low) / 2 * scaled).clamp(low, high)  # rounding may exceed a bound


def perturb(action: Tensor, logits: Tensor, phi: float, low: Tensor, high: Tensor) -> Tensor:
    """Change an action by at most ``phi`` times half the action range, within the bounds (eq. 11, appendix D.1).

    The result is ``clip(a + phi * (high - low) / 2 * tanh(logits), low, high)``. For symmetric bounds, ``(high - low) /
    2`` is the variable ``max_action`` of the BCQ author's code. ``[*B, A], [*B, A], scalar, [A], [A] -> [*B, A]``.
    """
    return (action + phi * (high - low) / 2 * torch.tanh(logits)).clamp(low, high)


def gaussian_kl(loc: Tensor, log_std: Tensor) -> Tensor:
    """``KL(N(loc, exp(log_std)) || N(0, 1))`` of each latent dimension, in nats. ``[*B, L], [*B, L] -> [*B, L]``."""
    return 0.5 * (loc.square() + (2 * log_std).exp() - 1) - log_std


def soft_clipped_double_q(qvalue: Tensor, lmbda: float) -> Tensor:
    """Return ``lmbda * min + (1 - lmbda) * max`` over the critics (part of eq. 13). ``[*B, C] -> [*B]``."""
    return lmbda * qvalue.amin(-1) + (1 - lmbda) * qvalue.amax(-1)


def best_sample_value(qvalue: Tensor, lmbda: float) -> Tensor:
    """Return the value of the best of ``n`` actions (the maximum in eq. 13). ``[*B, n, C] -> [*B, 1]``."""
    return soft_clipped_double_q(qvalue, lmbda).amax(-1, keepdim=True)


def available_logits(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Set the logits of actions that are not available to minus infinity. ``[*B, K], [*B, K] -> [*B, K]``."""
    return logits if mask is None else logits.masked_fill(~mask, -math.inf)


def likely_actions(logits: Tensor, threshold: float, mask: Tensor | None = None) -> Tensor:
    """Return which actions the behaviour policy takes often enough: ``p(a|s) / max_b p(b|s) > threshold``.

    The ratio of two probabilities is the exponential of the difference of their logits. The most likely available
    action always passes, and with the threshold 0, each available action passes. ``[*B, K], [*B, K] -> [*B, K]``.

    Args:
        logits: logits of the behaviour policy.
        threshold: the ratio must be above this number; at least 0 and below 1.
        mask: True for each available action; None means that all are available.
    """
    logits = available_logits(logits, mask)
    lowest = math.log(threshold) if threshold > 0 else -math.inf
    return logits - logits.amax(-1, keepdim=True) > lowest


def best_allowed(value: Tensor, allowed: Tensor) -> Tensor:
    """Return the index of the largest value among the allowed actions. ``[*B, K], [*B, K] -> [*B, 1]``."""
    return value.masked_fill(~allowed, -math.inf).argmax(-1, keepdim=True)


def imitation_nll(logits: Tensor, action: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return ``-log p(a|s)`` of the dataset's action. ``[*B, K], [*B, 1], [*B, K] -> [*B]``."""
    return -available_logits(logits, mask).log_softmax(-1).gather(-1, action).squeeze(-1)


def logit_penalty(logits: Tensor) -> Tensor:
    """Return the mean square of a state's logits, which the author's code adds to the loss. ``[*B, K] -> [*B]``."""
    return logits.square().mean(-1)


def change_reward(reward: Tensor, shift: float = 0.0, scale: float = 1.0, clip: float | None = None) -> Tensor:
    """Return ``(reward + shift) * scale``, clipped to ``[-clip, clip]`` unless ``clip`` is None. ``[*B] -> [*B]``."""
    changed = (reward + shift) * scale
    return changed if clip is None else changed.clamp(-clip, clip)


def discounted_sum(rewards: Tensor, gamma: float) -> Tensor:
    """Return the discounted return ``sum_t gamma^t r_t``. ``[*B, T] -> [*B]``."""
    steps = torch.arange(rewards.shape[-1], dtype=rewards.dtype, device=rewards.device)
    return (rewards * gamma**steps).sum(-1)


def log_importance_weights(ratio: Tensor) -> Tensor:
    """Return the logarithms of the importance weights in float64. ``[E, T] -> [E, T]``.

    The weight of a step is the product of the ratios ``pi(a|s) / b(a|s)`` of all steps up to it. In long episodes, this
    product can overflow or become 0, but its logarithm cannot.
    """
    return ratio.double().log().cumsum(-1)


def normalized_weights(log_weights: Tensor) -> Tensor:
    """Return the weights of each step, divided by their mean over episodes. ``[E, T] -> [E, T]``.

    If all weights of a step are 0, the policy takes none of the recorded actions, and these weights remain 0.
    """
    weights = _relative_weights(log_weights)
    mean = weights.mean(0, keepdim=True)
    return weights / torch.where(mean > 0, mean, 1.0)


def per_decision_values(weights: Tensor, reward: Tensor, gamma: float) -> Tensor:
    """Return the importance-sampling estimate of each episode, ``sum_t gamma^t w_t r_t``. ``[E, T], [E, T] -> [E]``.

    The mean over episodes estimates the value of the policy. ``w_t`` are the importance weights,
    ``log_importance_weights(ratio).exp()``, or ``normalized_weights`` for weighted importance sampling, which has a
    bias but usually a smaller variance.

    Source: Precup, Sutton, Singh, "Eligibility Traces for Off-Policy Policy Evaluation", 2000.
    """
    return discounted_sum(weights * reward, gamma)


def doubly_robust_values(
    weights: Tensor, reward: Tensor, qvalue: Tensor, state_value: Tensor, next_value: Tensor, gamma: float
) -> Tensor:
    """Return the doubly robust estimate of each episode. All tensors are ``[E, T]``; the result is ``[E]``.

    The estimate is ``V(s_0) + sum_t gamma^t w_t (r_t + gamma V(s_{t+1}) - Q(s_t, a_t))``. The mean
    over episodes has no bias if the ratios or the values are exact. With ``normalized_weights``, the estimate is the
    weighted one, which has a bias.

    Args:
        weights: as in ``per_decision_values``.
        reward: rewards; 0 after the end.
        qvalue, state_value: values of the recorded actions and of the states, under the policy.
        next_value: values of the next states; 0 after a terminal step.
        gamma: discount factor.

    Source: Jiang, Li, "Doubly Robust Off-policy Value Evaluation for Reinforcement Learning", arXiv:1511.03722; in the
    form of Thomas, Brunskill, arXiv:1604.00923.
    """
    correction = weights * (reward + gamma * next_value - qvalue)
    return state_value[..., 0] + discounted_sum(correction, gamma)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """Return ``(sum w)^2 / sum w^2``: the number of equally weighted episodes with the same variance. ``[E] -> []``."""
    weights = _relative_weights(log_weights)
    return weights.sum().square() / weights.square().sum().clamp_min(torch.finfo(weights.dtype).tiny)


def _relative_weights(log_weights: Tensor) -> Tensor:
    """Return the weights, divided by the largest one of each step, so that they do not overflow."""
    largest = log_weights.amax(0, keepdim=True)
    return (log_weights - largest.clamp_min(torch.finfo(log_weights.dtype).min)).exp()  # all may be minus infinity


def merge_moments(
    count: Tensor, mean: Tensor, square: Tensor, other_count: Tensor, other_mean: Tensor, other_square: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the count, mean and sum of squared deviations of the union of two sets of numbers.

    ``square`` is the sum of squared deviations, and ``square / count`` is the variance. For an empty set, pass the
    count 0, the square 0 and any finite mean. Counts have the shape ``[]`` or ``[*B]``; means and squares have the
    shape ``[*B]``. With counts ``[*B]``, all six arguments and all three results have the shape ``[*B]``.

    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    total, shift = count + other_count, other_mean - mean
    rows = total.clamp(min=1)  # avoids 0 / 0 if both sets are empty
    square = square + other_square + shift.square() * (count * other_count / rows)
    return total, mean + shift * (other_count / rows), square
