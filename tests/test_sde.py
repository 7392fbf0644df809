"""One denoising step: closed forms of every rule, marginals on a Gaussian target, log-probabilities, the stops of a completion."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmalign import sde

# FlowMatchEulerDiscreteScheduler(shift=3), ten steps: the sigmas of SD3, and the spread at noise level 0.7, as public code injects it.
SIGMAS = [1.0, 0.960138, 0.913349, 0.857666, 0.790389, 0.707317, 0.602191, 0.464883, 0.277966, 0.008929, 0.0]
SPREADS = [0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225, 0.0063]
RULES = ["flow", "constant", "coefficient"]


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", range(10))
def test_each_of_the_ten_steps_has_the_closed_form(k):
    x, v, after = noise(3, 4, 8, 8), noise(3, 4, 8, 8, seed=1), noise(3, 4, 8, 8, seed=2)
    sigma, following = SIGMAS[k], SIGMAS[k + 1]
    got = sde.step(x, v, sigma, following, 0.7, "flow")
    dt = following - sigma
    s = 0.7 * math.sqrt(sigma / (1 - (SIGMAS[1] if k == 0 else sigma)))
    # The drift of the SDE written with its score: dx = (v - s^2/2 score) dt + s dw, score = -(x + (1 - sigma) v) / sigma.
    score = -(x.double() + (1 - sigma) * v.double()) / sigma
    mean = x.double() + (v.double() - s**2 / 2 * score) * dt
    std = s * math.sqrt(-dt)
    assert torch.allclose(got.mean.double(), mean, atol=3e-6)
    assert got.std.tolist() == pytest.approx([std] * 3, rel=1e-6) and std == pytest.approx(SPREADS[k], rel=6e-3)
    assert got.rate.tolist() == pytest.approx([s] * 3, rel=1e-6)
    expected = torch.distributions.Normal(mean, std).log_prob(after.double()).mean((1, 2, 3))
    assert torch.allclose(sde.log_prob(after, got).double(), expected, rtol=2e-5)


def test_rows_may_have_times_of_their_own():
    x, v = noise(10, 4, 4), noise(10, 4, 4, seed=1)
    together = sde.step(x, v, torch.tensor(SIGMAS[:-1]), torch.tensor(SIGMAS[1:]), torch.linspace(0.1, 0.9, 10), "flow")
    for k in range(10):
        alone = sde.step(x[k : k + 1], v[k : k + 1], SIGMAS[k], SIGMAS[k + 1], 0.1 + 0.8 * k / 9, "flow")
        assert torch.allclose(together.mean[k], alone.mean[0], atol=1e-6) and together.std[k] == pytest.approx(
            float(alone.std[0]), rel=1e-5
        )


@pytest.mark.parametrize("k", range(10))
def test_one_kernel_gives_flow_grpo_dance_grpo_and_psi(k):
    sigma, following = SIGMAS[k], SIGMAS[k + 1]
    x, v = noise(2, 4, 4), noise(2, 4, 4, seed=1)
    rate = 0.7 * math.sqrt(sigma / (1 - (following if k == 0 else sigma)))
    flow, psi = sde.step(x, v, sigma, following, 0.7, "flow"), sde.step(x, v, sigma, following, rate, "constant")
    assert torch.equal(flow.mean, psi.mean) and torch.equal(flow.std, psi.std)
    # DanceGRPO writes the mean with the predicted clean image: x + v dt - eta^2/2 score dt, score = -(x - (1 - sigma) x0) / sigma^2.
    eta, dt = 0.3, following - sigma
    clean = x - sigma * v
    dance = x + v * dt + 0.5 * eta**2 * (x - (1 - sigma) * clean) / sigma**2 * dt
    got = sde.step(x, v, sigma, following, eta, "constant")
    assert torch.allclose(got.mean, dance, atol=2e-6) and float(got.std[0]) == pytest.approx(eta * math.sqrt(-dt))


@pytest.mark.parametrize("rule", RULES)
def test_without_noise_every_flow_rule_is_eulers_step(rule):
    x, v = noise(2, 4, 4), noise(2, 4, 4, seed=1)
    for before, after in zip(SIGMAS, SIGMAS[1:], strict=False):
        got = sde.step(x, v, before, after, 0.0, rule)
        assert torch.allclose(got.mean, x + (after - before) * v, atol=1e-6) and not got.std.any()
        assert not sde.log_prob(x, got).any()


def marginal(rule, steps, level, centre=1.5, width=0.4):
    """Mean and deviation at sigma 0 when the steps start from N(0, 1), for the exact velocity of the target N(centre, width^2).

    A step is affine in a one-dimensional state, so its action on a Gaussian is exact: two evaluations give slope and offset.
    """
    mean, variance = 0.0, 1.0
    for k in range(steps):
        sigma, following = 1 - k / steps, 1 - (k + 1) / steps
        x = torch.tensor([[0.0], [1.0]], dtype=torch.float32)
        spread = (1 - sigma) ** 2 * width**2 + sigma**2
        v = -centre + (sigma - (1 - sigma) * width**2) / spread * (x - (1 - sigma) * centre)
        got = sde.step(x, v, sigma, following, level, rule)
        offset, slope = float(got.mean[0]), float(got.mean[1] - got.mean[0])
        mean, variance = slope * mean + offset, slope**2 * variance + float(got.std[0]) ** 2
    return mean, math.sqrt(variance)


@pytest.mark.parametrize(("rule", "level"), [("flow", 0.7), ("constant", 0.5)])
def test_marginals_of_the_sde_approach_those_of_the_ode(rule, level):
    errors = []
    for steps in (10, 40, 160):
        got, ode = marginal(rule, steps, level), marginal("flow", steps, 0.0)
        errors.append(max(abs(got[0] - 1.5), abs(got[1] - 0.4)))
        assert abs(ode[0] - 1.5) < 1e-3 and abs(ode[1] - 0.4) < 4 / steps
    assert all(later < earlier / 3 for earlier, later in zip(errors, errors[1:], strict=False)), errors
    # From here on the first step's clamp is what is left of flow's error; it falls with the square root of the steps.
    assert abs(marginal(rule, 640, level)[1] - 0.4) < 1e-3


def test_coefficient_preserving_steps_keep_the_amounts_of_image_and_noise():
    image, eps, fresh = noise(2, 64, 64), noise(2, 64, 64, seed=1), noise(2, 64, 64, seed=2)
    for before, after in zip(SIGMAS, SIGMAS[1:], strict=False):
        x = (1 - before) * image + before * eps
        got = sde.step(x, eps - image, before, after, 0.6, "coefficient")
        drawn = got.mean + got.std.reshape(-1, 1, 1) * fresh
        assert float((drawn - (1 - after) * image).std()) == pytest.approx(after, rel=0.02, abs=1e-5)
        assert float(got.std[0]) == pytest.approx(after * math.sin(0.3 * math.pi), abs=1e-6)


def test_ddim_steps_are_those_of_diffusers():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    scheduler.set_timesteps(10)
    x, eps, z = noise(2, 4, 8, 8), noise(2, 4, 8, 8, seed=1), noise(2, 4, 8, 8, seed=2)
    for t in scheduler.timesteps.tolist():
        former = t - 1000 // 10
        before = float(scheduler.alphas_cumprod[t])
        after = float(scheduler.alphas_cumprod[former] if former >= 0 else scheduler.final_alpha_cumprod)
        for eta in (0.0, 1.0):
            got = sde.step(x, eps, before, after, eta, "ddim")
            expected = scheduler.step(eps, t, x, eta=eta, variance_noise=z).prev_sample
            assert torch.allclose(got.mean + got.std.reshape(-1, 1, 1, 1) * z, expected, atol=2e-5)


def test_the_divergence_is_the_kl_of_the_gaussians_and_flow_grpos_leaves_dt_out():
    x, v, other = noise(2, 4, 4), noise(2, 4, 4, seed=1), noise(2, 4, 4, seed=2)
    first, second = (sde.step(x, prediction, 0.8, 0.7, 0.7, "flow") for prediction in (v, other))
    normals = [torch.distributions.Normal(each.mean, each.std.reshape(-1, 1, 1)) for each in (first, second)]
    expected = torch.distributions.kl_divergence(*normals).mean((1, 2))
    assert torch.allclose(sde.divergence(first.mean, second.mean, first.std), expected, rtol=1e-4)
    assert torch.allclose(sde.divergence(first.mean, second.mean, first.rate), expected * 0.1, rtol=1e-4)


def test_gradients_flow_through_the_mean_alone():
    v = noise(2, 4, 4).requires_grad_()
    after = noise(2, 4, 4, seed=1).requires_grad_()
    sde.log_prob(after, sde.step(noise(2, 4, 4, seed=2), v, 0.8, 0.7, 0.7, "flow")).sum().backward()
    assert v.grad is not None and v.grad.abs().min() > 0 and after.grad is None


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # neither is about the code
@given(left=st.integers(0, 40), n=st.integers(1, 50))
def test_stops_fall_to_the_end_and_the_last_is_the_papers(left, n):
    found = sde.stops(left, n)
    assert found[0] == left and found[-1] == 0 and len(found) == min(left, n) + 1
    assert all(later < earlier for earlier, later in zip(found, found[1:], strict=False))
    if left:
        assert found[-2] == left // min(n, left)
