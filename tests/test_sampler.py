"""The sampler's formulas against closed forms, torch.distributions and diffusers' own pipeline."""

import itertools
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import common
from conftest import parse


def sd3_sigmas(steps, shift=3.0):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas


def gaussian_velocity(x, sigma, m, d):
    """The true velocity E[eps - x0 | x] where images are N(m, d^2)."""
    variance = (1 - sigma) ** 2 * d**2 + sigma**2
    centred = x - (1 - sigma) * m
    return sigma / variance * centred - (m + (1 - sigma) * d**2 / variance * centred)


STDS_AT_THE_END = [  # of 10, 40 and 1,000 steps, for images N(0.7, 0.5^2), worked out apart from this code
    ("flow", 0.0, (0.370, 0.465, 0.499)),  # the ODE
    ("flow", 0.7, (0.419, 0.479, 0.500)),
    ("flow", 1.2, (None, None, 0.500)),
    ("dance", 0.8, (None, None, 0.500)),
    ("cps", 0.8, (0.315, 0.371, 0.401)),
    ("precise", 0.7, (0.359, 0.456, 0.498)),
    ("precise", 1.5, (0.326, 0.427, 0.496)),
]


def marginals(sigmas, sde, level, m, d):
    """Mean, std and a step's fresh std of all states, by recursion, where images are N(m, d^2).

    With the true velocity the mean of a step is a line in x, known from two points.
    """
    x, average, variance = torch.tensor([[0.0], [1.0]]).double(), 0.0, 1.0
    for i, s in enumerate([*common.noise_scale(sigmas, sde, level), 0.0]):
        velocity = gaussian_velocity(x, sigmas[i], m, d)
        mean, std = common.sde_mean_std(x, velocity, sigmas[i], sigmas[i + 1], s, sde)
        start, slope = mean[0].item(), (mean[1] - mean[0]).item()
        average, variance = start + slope * average, slope**2 * variance + std.item() ** 2
        yield average, variance**0.5, std.item()


@pytest.mark.parametrize("sde, levels", [("cps", (0.3, 0.8, 1.0)), ("precise", (0.1, 0.7, 1.5))])
def test_noise_is_exactly_sigma_after_steps_of_any_size(sde, levels):
    """Data of one point, c: states are N((1 - sigma) c, sigma^2), at each of four rough steps."""
    c, sigmas = 0.7, sd3_sigmas(4).double()
    for level in levels:
        for i, (average, std, fresh) in enumerate(marginals(sigmas, sde, level, c, 0.0)):
            sigma, sigma_next = sigmas[i].item(), sigmas[i + 1].item()
            r = sigma_next * (1 - sigma) / sigma / (1 - sigma_next)
            share = math.sin(level * math.pi / 2) if sde == "cps" else (1 - r ** (level**2)) ** 0.5
            # where all noise is renewed, a root of float64's rounding (1e-16) stays
            assert average == pytest.approx((1 - sigma_next) * c, abs=1e-7)
            assert std == pytest.approx(sigma_next, rel=1e-9, abs=1e-12)
            assert fresh == pytest.approx(sigma_next * share if i < 3 else 0.0, rel=1e-9)


@pytest.mark.parametrize("sde, level, ends", STDS_AT_THE_END)
def test_in_many_steps_all_samplers_but_cps_reach_gaussian_data(sde, level, ends):
    for steps, end in zip((10, 40, 1000), ends):
        time = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        sigmas = 3 * time / (1 + 2 * time)  # shift 3
        *_, (average, std, _) = marginals(sigmas, sde, level, 0.7, 0.5)
        assert end is None or std == pytest.approx(end, abs=1e-3)  # three digits
    assert abs(average - 0.7) < 0.005 and (abs(std - 0.5) < 0.005) == (sde != "cps")


def test_precise_goes_to_the_ode_but_in_the_first_step():
    """As eta goes to 0. The first step renews all noise for any eta over 0: its mean is the image's part."""
    sigmas, (x, v) = sd3_sigmas(10).double(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for level in (1e-3, 0.5, 1.5):
        s = common.noise_scale(sigmas, "precise", level)
        mean, std = common.sde_mean_std(x, v, sigmas[0], sigmas[1], s[0], "precise")
        # a root of float64's rounding (1e-16), times the noise
        torch.testing.assert_close(mean, (1 - sigmas[1]) * (x - v), atol=1e-6, rtol=0)
        assert std.item() == pytest.approx(sigmas[1].item(), rel=1e-9)
    s = common.noise_scale(sigmas, "precise", 1e-3)
    for i in range(1, 9):
        mean, std = common.sde_mean_std(x, v, sigmas[i], sigmas[i + 1], s[i], "precise")
        # the drift is near std^2 / (2 sigma_next), under 1e-6
        assert std < 2e-3 and (mean - (x - v * (sigmas[i] - sigmas[i + 1]))).abs().max() < 1e-5


@pytest.mark.parametrize("sde", ["flow", "dance", "cps", "precise"])
def test_noise_zero_is_the_euler_step_exactly(sde):
    x, v = torch.randn(2, 5, 3, 4, 4)
    mean, std = common.sde_mean_std(x, v, 0.6, 0.4, 0.0, sde)
    delta = torch.tensor(0.6) - torch.tensor(0.4)
    assert torch.equal(mean, x - v * delta) and std.abs().max() == 0
    assert common.noise_scale(sd3_sigmas(10), sde, 0.0).abs().max() == 0


@pytest.mark.parametrize("sde", ["flow", "dance", "cps", "precise"])
def test_sde_mean_is_the_papers_formula(sde):
    x, v = torch.randn(2, 6, 2, 3, dtype=torch.float64)
    sigma, sigma_next = torch.rand(2, 6, dtype=torch.float64).sort(0, descending=True).values
    std = sigma_next * torch.rand(6, dtype=torch.float64)
    s = std / (sigma - sigma_next).sqrt()
    mean, got_std = common.sde_mean_std(x, v, sigma, sigma_next, s, sde)
    assert got_std.shape == (6, 1, 1)
    for i in range(6):
        if sde in ("cps", "precise"):  # predicted image and noise, less of it by as much as is added
            image, noise = x[i] - sigma[i] * v[i], x[i] + (1 - sigma[i]) * v[i]
            want = (1 - sigma_next[i]) * image + (sigma_next[i] ** 2 - std[i] ** 2).sqrt() * noise
        else:  # [FG] eq. 9: v plus the score term, times the step
            drift = v[i] + s[i] ** 2 / (2 * sigma[i]) * (x[i] + (1 - sigma[i]) * v[i])
            want = x[i] - drift * (sigma[i] - sigma_next[i])
        alone, _ = common.sde_mean_std(x[i : i + 1], v[i : i + 1], sigma[i], sigma_next[i].item(), s[i], sde)
        torch.testing.assert_close(mean[i], want)
        torch.testing.assert_close(alone[0], want)
        torch.testing.assert_close(got_std[i].item(), std[i].item())


def test_log_prob_is_the_normal_distributions_mean():
    x, mean = torch.randn(2, 7, 4, 5, 5).double()
    std = torch.rand(7, 1, 1, 1).double() + 0.1
    want = torch.distributions.Normal(mean, std).log_prob(x).mean((1, 2, 3))
    torch.testing.assert_close(common.log_prob(x, mean, std), want)
    branches = torch.randn(7, 3, 4, 5, 5).double()
    want = torch.distributions.Normal(mean[:, None], std[:, None]).log_prob(branches).mean((2, 3, 4))
    torch.testing.assert_close(common.log_prob(branches, mean[:, None], std[:, None], batch_dims=2), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_to_float32(dtype):
    x, v = torch.randn(2, 3, 4).to(dtype)
    mean, std = common.sde_mean_std(x, v, 0.5, 0.4, 0.3, "flow")
    assert mean.dtype == std.dtype == common.log_prob(x, mean, std).dtype == torch.float32
    wide, _ = common.sde_mean_std(x.double(), v.double(), 0.5, 0.4, 0.3, "flow")
    # five roundings of float32 (6e-8) of numbers up to 4
    torch.testing.assert_close(mean.double(), wide, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shift, steps", [(1.18, 10), (1.32, 10), (1.32, 28), (3.0, 10)])
@pytest.mark.parametrize("nudge", [0.0, -1e-7, 1e-7])
def test_noise_scale(shift, steps, nudge):
    """The first sigma is 1 but for rounding, to either side, and samplers divide by 1 - sigma."""
    sigmas = sd3_sigmas(steps, shift).double() + nudge * (torch.arange(steps + 1) == 0)
    exact = [1.0, *sigmas[1:].tolist()]
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(exact[:-1])):
        root, r = (sigma - sigma_next) ** 0.5, sigma_next * (1 - sigma) / sigma / (1 - sigma_next)
        want = {"flow": 0.8 * (sigma / (1 - (sigma_next if i == 0 else sigma))) ** 0.5, "dance": 0.8}
        want["cps"] = sigma_next * math.sin(0.4 * math.pi) / root
        want["precise"] = sigma_next * (1 - r**0.64) ** 0.5 / root
        for sde, value in want.items():
            s = common.noise_scale(sigmas, sde, 0.8)
            rel = 1e-9 if i else 1e-5  # the first Delta is 0.02 at least, of which 1e-7 is a share of 5e-6
            assert s.shape == (steps - 1,) and s[i].item() == pytest.approx(value, rel=rel)


@pytest.mark.parametrize("std", ["group", "batch"])
def test_group_advantage_against_a_loop(std):
    rewards = torch.rand(5, 7)
    rewards[2] = 0.25
    rewards[3, 0] = 1e3
    batch = rewards.double().std(correction=0) if std == "batch" else None
    advantage, flat = common.group_advantage(rewards, batch, clip=2.0)
    for group, got in zip(rewards, advantage):
        spread = (group if batch is None else rewards).double().std(correction=0)
        want = [max(-2.0, min(2.0, ((r - group.double().mean()) / (spread + 1e-4)).item())) for r in group]
        assert got.tolist() == pytest.approx(want, rel=1e-6)  # computed in float64, returned in float32
    assert flat == pytest.approx(1 / 5)
    assert advantage[2].abs().max() == 0


@pytest.mark.parametrize("value", [0.1, 731.37, 9731.37, -9731.37, 1e-30, -3.3e37])
def test_equal_rewards_have_no_advantage_at_all(value):
    """Their float32 mean need not be their value: 731.37 twelve times had -0.61."""
    for size in range(2, 50):
        rewards = torch.full((2, size), value)
        rewards[1, 0] = 0.0  # another group, with spread
        for std in (None, torch.tensor(1e-6), 0.3):
            advantage, flat = common.group_advantage(rewards, std)
            assert torch.equal(advantage[0], torch.zeros(size)) and flat == 0.5


def test_metrics_of_the_ratio():
    """Clipped is what the clip takes the gradient from: by the sign of the advantage and the side."""
    log_ratio = torch.tensor([-0.2, -0.2, 0.2, 0.2, 0.05, -0.2, 0.2], dtype=torch.float64)
    advantage = torch.tensor([-0.5, 0.5, -0.5, 0.5, 0.5, 0.0, 0.0])
    got = common.ratio_metrics(log_ratio, advantage, 0.1)
    assert got["clip_low"].tolist() == [True] + [False] * 6
    assert got["clip_high"].tolist() == [False] * 3 + [True] + [False] * 3
    torch.testing.assert_close(got["ratio"], log_ratio.exp())
    torch.testing.assert_close(got["approx_kl"], log_ratio.exp() - 1 - log_ratio)


@pytest.fixture(scope="module")
def tiny():
    return common.make_policy(parse("grpo", "--micro-batch", 4, "--lora-rank", 4), trajectories=4)


def test_hybrid_sampling_switches_to_the_base_model(tiny):
    """60% of 10 steps with the adapter, the rest without, against two calls by hand."""
    (text,), sigmas = tiny.encode(["two red circles"]), tiny.sigmas(10)
    prompt_index = torch.zeros(4, dtype=torch.long)
    with torch.no_grad():
        for parameter in tiny.parameters:
            parameter.add_(0.02 * torch.randn_like(parameter))
    x = torch.randn(4, *tiny.shape)
    got = common.ode_sample(tiny, x, text, prompt_index, sigmas, tuned_share=0.6)
    want = common.ode_sample(tiny, x, text, prompt_index, sigmas[:7])
    tiny.transformer.disable_adapters()
    want = common.ode_sample(tiny, want, text, prompt_index, sigmas[6:], tuned_share=0.0)
    assert torch.equal(got, want)
    assert not torch.equal(got, common.ode_sample(tiny, x, text, prompt_index, sigmas))


def test_moving_average_takes_every_eighth_step():
    """With a decay of (1 + n) / (10 + n) after n optimizer steps, and at most 0.9. Before, it is not used."""
    policy = common.make_policy(parse("grpo", "--ema-decay", 0.9, "--ema-every", 8), trajectories=1)
    want = [parameter.detach().clone() for parameter in policy.parameters]
    for n in range(96):
        for parameter in policy.parameters:
            parameter.data.normal_()
        policy.update_ema()
        trained = [parameter.detach().clone() for parameter in policy.parameters]
        if n % 8 == 7:
            decay = min(0.9, (1 + n) / (10 + n))
            want = [decay * a + (1 - decay) * p for a, p in zip(want, trained)]
        with policy.ema_weights():
            used = zip(want if n >= 7 else trained, policy.parameters)
            assert all((a - p).abs().max() < 1e-5 for a, p in used)  # 12 steps in float32, numbers up to 5
    assert all(torch.equal(p, parameter) for p, parameter in zip(trained, policy.parameters))
