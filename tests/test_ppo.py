"""The losses, against autograd and the analytic gradient of a Gaussian.

Run: python -m pytest tests/test_ppo.py -n 0
"""

import numpy as np
import pytest
import torch
from helpers import generator
from torch.distributions import Normal

from ddpo_tutorial.checks import check_pairs
from ddpo_tutorial.ppo import clipped_surrogate, diagnostics, ppo_loss, reinforce_loss

OLD = torch.tensor([-1.0, -2.0, 0.5, 3.0])
ADVANTAGES = torch.tensor([1.0, -2.0, 0.5, -0.1])


def gradient_at(log_probs, loss):
    "The gradient of a loss with respect to the log-probs."
    leaf = log_probs.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


# gradients


def test_reinforce_gradient_is_minus_advantage():
    "A sign, or a sum for a mean."
    torch.testing.assert_close(
        gradient_at(OLD, lambda lp: reinforce_loss(lp, ADVANTAGES)), -ADVANTAGES / 4
    )


def test_first_ppo_gradient_is_reinforces():
    "On fresh samples the ratio is 1: a ratio upside down or an advantage lost shows here."
    ppo = gradient_at(OLD, lambda lp: ppo_loss(lp, OLD, ADVANTAGES, clip_range=0.1)[0])
    torch.testing.assert_close(ppo, gradient_at(OLD, lambda lp: reinforce_loss(lp, ADVANTAGES)))


def test_ratio_weights_the_gradient():
    "Off policy the gradient is the ratio times REINFORCE's (autograd oracle, clip far away)."
    new = OLD + torch.tensor([0.3, -0.2, 0.1, 0.0])
    ours = gradient_at(new, lambda lp: ppo_loss(lp, OLD, ADVANTAGES, clip_range=9.0)[0])
    torch.testing.assert_close(ours, -ADVANTAGES * (new - OLD).exp() / 4)


def test_nothing_flows_into_the_past():
    """A gradient through the old log-probs cancels the new one; one through advantages trains the
    wrong thing."""
    old, advantages, new = (x.clone().requires_grad_() for x in (OLD, ADVANTAGES, OLD))
    (ppo_loss(new, old, advantages, clip_range=0.1)[0] + reinforce_loss(new, advantages)).backward()
    assert old.grad is None and advantages.grad is None and new.grad.abs().sum() > 0


@pytest.mark.parametrize('behaviour', [0.3, 0.8], ids=['on policy', 'off policy'])
@pytest.mark.parametrize('name', ['mean', 'log_std'])
def test_gaussian_gradient_within_its_standard_error(behaviour, name):
    """E[-(x-2)^2] under N(m, s) has a known gradient: -2(m-2) for m, -2s^2 for log s.
    The estimate must lie within 4 standard errors."""
    n = 200_000
    mean = torch.tensor(0.3, requires_grad=True)
    log_std = torch.tensor(-0.1, requires_grad=True)
    wanted = dict(mean=-2 * (mean - 2), log_std=-2 * (2 * log_std).exp())[name].item()
    sampler = Normal(torch.tensor(behaviour), log_std.detach().exp())
    x = sampler.mean + sampler.stddev * torch.randn(n, generator=generator())
    rewards = -((x - 2) ** 2)
    old = sampler.log_prob(x)
    policy = Normal(mean, log_std.exp())
    parameter = dict(mean=mean, log_std=log_std)[name]
    loss = ppo_loss(policy.log_prob(x), old, rewards, clip_range=1e9, adv_clip_max=1e9)[0]
    estimate = -torch.autograd.grad(loss, parameter)[0].item()
    with torch.no_grad():
        z = (x - mean) / log_std.exp()
        each = (
            (policy.log_prob(x) - old).exp()
            * rewards
            * (z / log_std.exp() if name == 'mean' else z**2 - 1)
        )
    error = each.std().item() / n**0.5
    assert abs(estimate - each.mean().item()) < 1e-3 * max(1, abs(wanted))
    assert abs(estimate - wanted) < 4 * error < abs(wanted) / 2


# the clip


@pytest.mark.parametrize(
    'advantage, ratio, loss, flows',
    [
        (1.0, 1.5, -1.2, False),  # better and already likelier: enough
        (1.0, 0.5, -0.5, True),  # better, yet less likely: pull back
        (-1.0, 0.5, 0.8, False),  # worse and already less likely: enough
        (-1.0, 1.5, 1.5, True),  # worse, yet likelier: push away
        (1.0, 1.1, -1.1, True),
        (-1.0, 0.9, 0.9, True),
        (2.0, 1.5, -2.4, False),
    ],
)
def test_clip_stops_what_has_gone_far_enough(advantage, ratio, loss, flows):
    """The gradient is zero only for A > 0, r > 1 + eps and A < 0, r < 1 - eps.
    A minimum for the maximum, or a plain clamp, fails here."""
    r = torch.tensor([ratio], requires_grad=True)
    out = clipped_surrogate(r, torch.tensor([advantage]), 0.2)
    assert out.item() == pytest.approx(loss)
    assert torch.autograd.grad(out.sum(), r)[0].item() == (-advantage if flows else 0)


def test_advantages_are_clipped():
    "One outlier would rule the update."

    def loss(a, top):
        return ppo_loss(OLD, OLD, torch.tensor(a), clip_range=0.1, adv_clip_max=top)[0]

    assert (
        loss([50.0, -30.0, 1.0, 0.0], 5.0)
        == loss([5.0, -5.0, 1.0, 0.0], 100.0)
        != loss([50.0, -30.0, 1.0, 0.0], 100.0)
    )


def test_mean_over_pairs():
    "A sum over timesteps makes the gradient T times longer, and the norm's clip T times harsher."
    many = ppo_loss(OLD.repeat(10), OLD.repeat(10), ADVANTAGES.repeat(10), clip_range=0.1)[0]
    torch.testing.assert_close(many, ppo_loss(OLD, OLD, ADVANTAGES, clip_range=0.1)[0])


def test_advantages_as_the_tracker_returns_them():
    "A float64 array is taken as it is, and does not turn the loss into float64."
    loss = ppo_loss(OLD, OLD - 0.01, ADVANTAGES.double().numpy(), clip_range=0.1)[0]
    assert (
        loss.dtype == torch.float32
        and loss == ppo_loss(OLD, OLD - 0.01, ADVANTAGES, clip_range=0.1)[0]
    )
    with pytest.raises(ValueError, match=r"one length.*'advantages': \(2,\)"):
        ppo_loss(OLD, OLD, np.zeros(2), clip_range=0.1)


# diagnostics


def test_untouched_policy():
    "The first look at a fresh batch: ratio 1, nothing clipped, no distance."
    stats = ppo_loss(OLD, OLD, ADVANTAGES, clip_range=1e-4)[1]
    assert {k: v.item() for k, v in stats.items()} == dict(approx_kl=0, clipfrac=0, ratio=1)


def test_kl_averages_squares():
    "The square of the mean is 0 for a policy that moved both ways."
    log_ratio = torch.tensor([0.1, -0.1, 0.1, -0.1])
    stats = diagnostics(log_ratio, 0.05)
    assert stats['approx_kl'].item() == pytest.approx(0.005)
    assert 0.5 * log_ratio.mean() ** 2 == 0  # the fault


def test_kl_is_the_gaussians():
    "The estimate against the exact KL divergence of two normals."
    p = Normal(torch.tensor(0.0), torch.tensor(1.0))
    q = Normal(torch.tensor(0.05), torch.tensor(1.0))
    x = torch.randn(100_000, generator=generator())
    exact = torch.distributions.kl_divergence(p, q).item()
    assert diagnostics(q.log_prob(x) - p.log_prob(x), 0.1)['approx_kl'].item() == pytest.approx(
        exact, rel=0.05
    )


def test_small_kl_keeps_its_digits():
    "r - 1 - log r loses all digits in float32 at log-ratios of 1e-4, the size of the clip range."
    log_ratio = torch.full((8,), 1e-4)
    assert diagnostics(log_ratio, 1.0)['approx_kl'].item() == pytest.approx(5e-9, rel=1e-3)
    at_fault = (log_ratio.exp() - 1 - log_ratio).mean().item()
    assert at_fault != pytest.approx(5e-9, rel=0.05)


def test_clipfrac_counts_both_sides():
    "Only ratios above 1 + eps counted, or the clip range ignored."
    stats = diagnostics(torch.tensor([1.3, 0.7, 1.1, 0.95]).log(), 0.2)
    assert stats['clipfrac'] == 0.5 and stats['ratio'].item() == pytest.approx(1.0125)


def test_diagnostics_are_detached():
    "Kept statistics must not keep the graph."
    leaf = OLD.clone().requires_grad_()
    assert not any(
        v.requires_grad for v in ppo_loss(leaf, OLD, ADVANTAGES, clip_range=0.1)[1].values()
    )


# shapes


@pytest.mark.parametrize(
    'shapes',
    [
        ((4, 1), (4,), (4,)),
        ((4,), (4, 1), (4,)),
        ((4,), (4,), (4, 1)),
        ((4,), (4,), (1,)),
        ((), (), ()),
        ((2, 4),) * 3,
    ],
)
def test_shapes_that_would_broadcast(shapes):
    "(4, 1) against (4,) makes 16 ratios, and trains on nonsense."
    new, old, advantages = (torch.zeros(s) for s in shapes)
    with pytest.raises(ValueError, match=r'\(N,\) tensors of one length.*log_probs.*advantages'):
        ppo_loss(new, old, advantages, clip_range=0.1)
    if shapes[0] != shapes[2]:
        with pytest.raises(ValueError, match=r'\(N,\) tensors of one length'):
            reinforce_loss(new, advantages)


@pytest.mark.parametrize(
    'shapes',
    [
        [(4,), (3,)],
        [(4,), (1,)],
        [(4, 1), (4, 1)],
        [(4,), (4, 1)],
        [(), ()],
        [(4,), ()],
        [(2, 2)],
        [()],
        [],
    ],
)
def test_pairs_are_of_one_length(shapes):
    "Also when all shapes are equal: one entry is one pair."
    tensors = {f'tensor_{i}': torch.zeros(shape) for i, shape in enumerate(shapes)}
    with pytest.raises(ValueError, match=r'\(N,\) tensors of one length, an entry a pair'):
        check_pairs(**tensors)


@pytest.mark.parametrize('count', [0, 1, 4])
def test_equal_lengths_are_pairs(count):
    check_pairs(a=torch.zeros(count))
    check_pairs(
        a=torch.zeros(count), b=torch.ones(count, requires_grad=True), c=torch.arange(count)
    )
