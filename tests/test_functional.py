"""Each equation against numbers computed by hand and against PyTorch's distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from torchrl_bcq import functional as F

LOW, HIGH = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 4.0])


def test_soft_clipped_double_q():
    q = torch.tensor([[1.0, 3.0], [4.0, 2.0], [5.0, 5.0]])
    # 0.75 * min + 0.25 * max
    torch.testing.assert_close(F.soft_clipped_double_q(q, 0.75), torch.tensor([1.5, 2.5, 5.0]))
    assert F.soft_clipped_double_q(q, 1.0).tolist() == [1.0, 2.0, 5.0]
    assert F.soft_clipped_double_q(q, 0.0).tolist() == [3.0, 4.0, 5.0]
    # five critics: only the extremes count
    assert F.soft_clipped_double_q(torch.tensor([0.0, 9.0, 1.0, 8.0, 4.0]), 0.5).item() == 4.5


def test_best_sample_value_maximises_the_mixture_not_each_critic():
    q = torch.tensor([[[0.0, 8.0], [3.0, 3.0], [8.0, -8.0]]])  # [B=1, n=3, C=2], mixtures 2, 3, -4
    value = F.best_sample_value(q, 0.75)
    assert value.shape == (1, 1)
    assert value.item() == 3.0


def test_squash_to_bounds():
    torch.testing.assert_close(F.squash_to_bounds(torch.zeros(2), LOW, HIGH), torch.tensor([0.0, 2.0]))
    half = math.atanh(0.5)
    torch.testing.assert_close(F.squash_to_bounds(torch.tensor([half, -half]), LOW, HIGH), torch.tensor([0.5, 1.0]))


@pytest.mark.parametrize("logit", [-1e30, -40.0, -1e-3, 0.0, 5.0, 40.0, 1e30])
def test_squash_never_leaves_the_bounds(logit):
    low, high = torch.tensor([-0.1, 0.3, 1e-3]), torch.tensor([0.7, 0.30001, 1e3])
    action = F.squash_to_bounds(torch.full((3,), logit), low, high)
    assert (action >= low).all()
    assert (action <= high).all()


def test_perturb_moves_by_phi_half_ranges_and_clips():
    action = torch.tensor([[0.5, 1.0], [0.99, 0.05]])
    logits = torch.tensor([[1e3, -1e3], [1e3, -1e3]])  # tanh is 1 and -1
    # half-ranges are 1 and 2; phi = 0.05 moves by 0.05 and 0.1
    expected = torch.tensor([[0.55, 0.9], [1.0, 0.0]])
    torch.testing.assert_close(F.perturb(action, logits, 0.05, LOW, HIGH), expected)
    torch.testing.assert_close(F.perturb(action, logits, 0.0, LOW, HIGH), action)


def test_gaussian_kl_equals_the_distribution_librarys():
    loc, log_std = torch.randn(50, 4, dtype=torch.float64), torch.randn(50, 4, dtype=torch.float64)
    expected = kl_divergence(Normal(loc, log_std.exp()), Normal(torch.zeros_like(loc), torch.ones_like(loc)))
    torch.testing.assert_close(F.gaussian_kl(loc, log_std), expected)
    assert F.gaussian_kl(torch.tensor(2.0), torch.tensor(0.0)).item() == 2.0  # mean^2 / 2


def test_clipped_normal():
    like = torch.empty(0, dtype=torch.float64)
    z = F.clipped_normal((100_000,), 0.5, like)
    assert z.dtype == torch.float64
    assert z.abs().max() == 0.5
    # mass at each clip is P(N > 0.5) = 0.3085; 4 standard errors
    assert (z == 0.5).double().mean().item() == pytest.approx(0.3085, abs=0.006)
    assert z.mean().item() == pytest.approx(0.0, abs=0.006)


@pytest.mark.parametrize("seed", [0, 1])
def test_spread_latents_fill_their_distribution_evenly(seed):
    """Of 128 Sobol points as many lie below any bound as should, to within one; of random draws +-5 would be usual."""
    clip, count, dim = 0.5, 128, 6
    points = F.spread_normal(count, dim, clip, seed, like=torch.zeros(()))
    assert points.shape == (count, dim)
    for bound in (-0.4999, -0.2, 0.0, 0.3, 0.4999):
        share = 0.5 * (1 + math.erf(bound / math.sqrt(2)))
        assert ((points <= bound).sum(0) - share * count).abs().max() <= 1
    assert points.abs().max() == clip
    unclipped = F.spread_normal(count, dim, math.inf, seed, like=torch.zeros(()))
    assert unclipped.isfinite().all()
    assert torch.equal(unclipped.clamp(-clip, clip), points)
    assert not torch.equal(F.spread_normal(count, dim, clip, seed + 1, like=torch.zeros(())), points)


# discrete actions; the probabilities 0.5, 0.25, 0.15, 0.1 have the ratios 1, 0.5, 0.3, 0.2 to the largest

LOGITS = torch.tensor([math.log(ratio) for ratio in (1.0, 0.5, 0.3, 0.2)], dtype=torch.float64)
ALL, BUT_FIRST = torch.tensor([True] * 4), torch.tensor([False, True, True, True])


@pytest.mark.parametrize(
    ("threshold", "mask", "expected"),
    [
        (0.3, None, [True, True, False, False]),  # 0.3 itself does not pass
        (0.29, None, [True, True, True, False]),
        (0.0, None, [True, True, True, True]),
        (0.5, None, [True, False, False, False]),  # 0.5 itself does not pass
        (0.99, None, [True, False, False, False]),
        (0.3, ALL, [True, True, False, False]),
        (0.3, BUT_FIRST, [False, True, True, True]),  # ratios to 0.25: 1, 0.6, 0.4
        (0.5, BUT_FIRST, [False, True, True, False]),
        (0.0, BUT_FIRST, [False, True, True, True]),
        (0.3, ~ALL, [False, False, False, False]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_likely_actions_by_hand(threshold, mask, expected, dtype):
    assert F.likely_actions(LOGITS.to(dtype).expand(2, 3, 4), threshold, mask)[1, 2].tolist() == expected


@pytest.mark.parametrize("shift", [7.0, -300.0])
def test_likely_actions_depend_on_differences_of_logits(shift):
    """Logits need not be those of a softmax: negative ones are no less likely."""
    assert F.likely_actions(LOGITS + shift, 0.4).tolist() == [True, True, False, False]


def test_the_threshold_0_admits_an_action_of_the_smallest_probability():
    """In float32 its probability is rounded to 0."""
    assert F.likely_actions(torch.tensor([200.0, 0.0]), 0.0).tolist() == [True, True]
    assert F.likely_actions(torch.tensor([200.0, 0.0]), 1e-9).tolist() == [True, False]


def test_best_allowed_is_the_largest_allowed_value():
    value = torch.tensor([[9.0, -3.0, -2.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    allowed = torch.tensor([[False, True, True], [True, True, False], [False, False, False]])
    assert F.best_allowed(value, allowed).tolist() == [[2], [1], [0]]  # nothing allowed: the first, and no NaN


def test_imitation_nll_by_hand():
    """p = 0.25 of four; without the first action p = 0.25 / 0.5."""
    index = torch.tensor([[1], [1]])
    mask = torch.stack([ALL, BUT_FIRST])
    nll = F.imitation_nll(LOGITS.expand(2, 4) + 3, index, mask)
    torch.testing.assert_close(nll, torch.tensor([math.log(4), math.log(2)], dtype=torch.float64))
    assert F.imitation_nll(LOGITS, torch.tensor([1])).item() == pytest.approx(math.log(4))


def test_imitation_nll_has_a_finite_gradient_under_a_mask():
    logits = torch.tensor([0.0, 0.0, 5.0], requires_grad=True)
    F.imitation_nll(logits, torch.tensor([0]), torch.tensor([True, True, False])).backward()
    assert logits.grad.tolist() == [-0.5, 0.5, 0.0]


def test_logit_penalty_by_hand():
    assert F.logit_penalty(torch.tensor([[3.0, -1.0], [0.0, 2.0]])).tolist() == [5, 2]


def test_merge_moments_by_hand():
    """{1, 3} and {5, 7, 9}: means 2 and 7, squared deviations 2 and 8; together mean 5 and 16 + 4 + 0 + 4 + 16 = 40."""
    one, other = ([2.0, 2.0, 2.0], [3.0, 7.0, 8.0])
    merged = F.merge_moments(*(torch.tensor([value]) for value in (*one, *other)))
    assert [value.tolist() for value in merged] == [[5.0], [5.0], [40.0]]


def test_merge_moments_counts_each_column_and_takes_empty_sets():
    """Columns: {4} and {2, 6}; nothing and {2, 6}; {4} and nothing; nothing at all."""
    count, mean = torch.tensor([1.0, 0, 1, 0]), torch.tensor([4.0, 0, 4, 0])
    other = torch.tensor([2.0, 2, 0, 0]), torch.tensor([4.0, 4, 0, 0]), torch.tensor([8.0, 8, 0, 0])
    merged = F.merge_moments(count, mean, torch.zeros(4), *other)
    assert [value.tolist() for value in merged] == [[3, 2, 1, 0], [4, 4, 4, 0], [8, 8, 0, 0]]


def test_merge_moments_keeps_small_deviations_from_a_large_mean():
    """Sums of squares would lose them: 1e9 squared has no room for 1 in float64."""
    values = 1e9 + torch.arange(6, dtype=torch.float64)
    merged = torch.zeros(3, dtype=torch.float64).unbind()
    for part in values.split(2):
        merged = F.merge_moments(*merged, torch.tensor(2.0), part.mean(), (part - part.mean()).square().sum())
    assert [value.item() for value in merged] == [6, 1e9 + 2.5, 17.5]  # 2 * (0.5^2 + 1.5^2 + 2.5^2)


# off-policy evaluation


def test_importance_weights_by_hand():
    ratio = torch.tensor([[2.0, 0.5, 3.0], [1.0, 0.0, 4.0]])
    logarithms = F.log_importance_weights(ratio)
    assert logarithms.dtype == torch.float64
    weights = logarithms.exp().float()
    torch.testing.assert_close(weights, torch.tensor([[2.0, 1.0, 3.0], [1.0, 0.0, 0.0]]))
    normalized = F.normalized_weights(logarithms).float()
    torch.testing.assert_close(normalized, torch.tensor([[4 / 3, 2.0, 2.0], [2 / 3, 0.0, 0.0]]))
    assert F.normalized_weights(torch.zeros(2, 1).log()).tolist() == [[0], [0]]
    reward = torch.tensor([[1.0, 2.0, 4.0], [8.0, 1.0, 1.0]])
    torch.testing.assert_close(F.per_decision_values(weights, reward, 0.5), torch.tensor([2 + 1 + 3.0, 8.0]))


def test_the_effective_sample_size_by_hand():
    assert F.effective_sample_size(torch.full((7,), 0.1).log()).item() == pytest.approx(7)
    assert F.effective_sample_size(torch.tensor([0.0, 3.0, 0.0]).log()).item() == 1
    assert F.effective_sample_size(torch.tensor([1.0, 3.0]).log()).item() == pytest.approx(1.6)  # 16 / 10
    assert F.effective_sample_size(torch.zeros(3).log()).item() == 0


def test_estimates_have_no_bias():
    """All four episodes of two steps with two actions each, and their probabilities under the recorded policy."""
    gamma, rng = 0.9, torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.rand(shape, generator=rng, dtype=torch.float64)

    first_reward, second_reward = draw(2), draw(2, 2)  # of the first action; of both actions
    recorded, policy = ([draw(2).softmax(0), draw(2, 2).softmax(1)] for _ in range(2))
    one, two = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    occurs, wanted = (p[0][one] * p[1][one, two] for p in (recorded, policy))
    reward = torch.stack([first_reward[one], second_reward[one, two]], 1)
    exact = (wanted * F.discounted_sum(reward, gamma)).sum()
    ratio = torch.stack([policy[0][one] / recorded[0][one], policy[1][one, two] / recorded[1][one, two]], 1)
    weights = F.log_importance_weights(ratio).exp()
    torch.testing.assert_close((occurs * F.per_decision_values(weights, reward, gamma)).sum(), exact)
    second_q = second_reward
    first_q = first_reward + gamma * (policy[1] * second_q).sum(1)
    for wrong in (1.0, 0.0):  # any values, and the exact ones
        q1, q2 = first_q + wrong * draw(2), second_q + wrong * draw(2, 2)
        v1, v2 = (policy[0] * q1).sum(), (policy[1] * q2).sum(1)
        qvalue = torch.stack([q1[one], q2[one, two]], 1)
        state_value = torch.stack([v1.expand(4), v2[one]], 1)
        next_value = torch.stack([v2[one], torch.zeros(4, dtype=torch.float64)], 1)
        found = F.doubly_robust_values(weights, reward, qvalue, state_value, next_value, gamma)
        torch.testing.assert_close((occurs * found).sum(), exact)
    torch.testing.assert_close(found, exact.expand(4))  # with exact values, each episode gives the exact value


@pytest.mark.parametrize("ratio", [0.1, 10.0])
def test_weights_of_long_episodes(ratio):
    """After a thousand steps, the weight is 10^1000 or 10^-1000, which float64 cannot hold."""
    weights = F.log_importance_weights(torch.full((2, 1000), ratio))
    assert weights[0, -1].item() == pytest.approx(1000 * math.log(ratio), rel=1e-6)
    weights[1, -1] += math.log(3)
    assert F.effective_sample_size(weights[:, -1]).item() == pytest.approx(1.6)  # (1 + 3)^2 / (1 + 9)
    normalized = F.normalized_weights(weights)
    assert normalized[:, -1].tolist() == pytest.approx([0.5, 1.5])
    assert normalized[:, -2].tolist() == [1, 1]
