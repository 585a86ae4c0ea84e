"""The sampler's formulas against closed forms, torch.distributions and diffusers' own pipeline."""

import itertools
import math

import common
import grpo

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline


def sd3_sigmas(steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas


def gaussian_velocity(x, sigma, m, d):
    """The true velocity E[eps - x0 | x] where images are N(m, d^2)."""
    variance = (1 - sigma) ** 2 * d**2 + sigma**2
    centred = x - (1 - sigma) * m
    return sigma / variance * centred - (m + (1 - sigma) * d**2 / variance * centred)


@pytest.mark.parametrize("sde, level", [("flow", 0.7), ("flow", 1.2), ("dance", 0.8)])
def test_sde_keeps_the_marginals_of_gaussian_data(sde, level):
    """Many small SDE steps must end in the data's N(m, d^2)."""
    torch.manual_seed(0)
    m, d, count = 0.7, 0.5, 20_000
    sigmas = torch.linspace(1, 0, 401, dtype=torch.float64)
    s = common.noise_scale(sigmas, sde, level)
    x = torch.randn(count, 1, dtype=torch.float64)
    for i in range(400):
        velocity = gaussian_velocity(x, sigmas[i], m, d)
        mean, std = common.sde_mean_std(x, velocity, sigmas[i], sigmas[i + 1], s[i] if i < 399 else 0.0, sde)
        x = mean + std * torch.randn_like(x)
    assert abs(x.mean().item() - m) < 0.015
    assert abs(x.var().item() - d**2) < 0.01


@pytest.mark.parametrize("level", [0.3, 0.8, 1.0])
def test_cps_leaves_noise_of_exactly_sigma_whatever_the_step(level):
    """Data of one point, c: states are N((1 - sigma) c, sigma^2) in closed form, at each of four rough steps.

    There the true velocity is (x - c) / sigma, so mean and variance of the next state follow from those of the last.
    """
    c, sigmas = 0.7, sd3_sigmas(4).double()
    s = common.noise_scale(sigmas, "cps", level)
    average, variance = torch.tensor([[0.0]]).double(), torch.tensor(1.0).double()
    for i in range(3):
        levels = sigmas[i], sigmas[i + 1], s[i], "cps"
        x = torch.cat([average, average + 1])  # a step's mean is linear in x: its slope by two points
        mean, std = common.sde_mean_std(x, (x - c) / sigmas[i], *levels)
        slope = mean[1] - mean[0]
        average, variance = mean[:1], slope**2 * variance + std**2
        assert average.item() == pytest.approx(((1 - sigmas[i + 1]) * c).item(), abs=1e-12)
        assert variance.sqrt().item() == pytest.approx(sigmas[i + 1].item(), rel=1e-9)
        assert std.item() == pytest.approx((sigmas[i + 1] * math.sin(level * math.pi / 2)).item(), rel=1e-9)


def test_ode_keeps_the_marginals_of_gaussian_data():
    m, d = 0.7, 0.5
    x = torch.linspace(-2, 2, 101, dtype=torch.float64)[:, None]
    start, sigmas = x.clone(), torch.linspace(1, 0, 4001, dtype=torch.float64)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x, _ = common.sde_mean_std(x, gaussian_velocity(x, sigma, m, d), sigma, sigma_next, 0.0)
    torch.testing.assert_close(x, m + d * start, atol=2e-3, rtol=0)  # the ODE maps noise to data linearly


@pytest.mark.parametrize("sde", ["flow", "dance", "cps"])
def test_noise_zero_is_the_euler_step_exactly(sde):
    x, v = torch.randn(2, 5, 3, 4, 4)
    mean, std = common.sde_mean_std(x, v, 0.6, 0.4, 0.0, sde)
    delta = torch.tensor(0.6) - torch.tensor(0.4)
    assert torch.equal(mean, x - v * delta) and std.abs().max() == 0
    assert common.noise_scale(sd3_sigmas(10), sde, 0.0).abs().max() == 0


@pytest.mark.parametrize("sde", ["flow", "cps"])
def test_sde_mean_is_the_papers_formula(sde):
    x, v = torch.randn(2, 6, 2, 3, dtype=torch.float64)
    sigma, sigma_next = torch.rand(2, 6, dtype=torch.float64).sort(0, descending=True).values
    std = sigma_next * torch.rand(6, dtype=torch.float64)
    s = std / (sigma - sigma_next).sqrt()
    mean, got_std = common.sde_mean_std(x, v, sigma, sigma_next, s, sde)
    for i in range(6):
        if sde == "cps":  # [CPS]: predicted image and noise, less of it by as much as is added
            image, noise = x[i] - sigma[i] * v[i], x[i] + (1 - sigma[i]) * v[i]
            want = (1 - sigma_next[i]) * image + (sigma_next[i] ** 2 - std[i] ** 2).sqrt() * noise
        else:  # [FG] eq. 9: v plus the score term, times the step
            drift = v[i] + s[i] ** 2 / (2 * sigma[i]) * (x[i] + (1 - sigma[i]) * v[i])
            want = x[i] - drift * (sigma[i] - sigma_next[i])
        torch.testing.assert_close(mean[i], want)
        torch.testing.assert_close(got_std[i].item(), std[i].item())


def test_log_prob_is_the_normal_distributions_mean():
    x, mean = torch.randn(2, 7, 4, 5, 5)
    std = torch.rand(7, 1, 1, 1) + 0.1
    want = torch.distributions.Normal(mean, std).log_prob(x).mean((1, 2, 3))
    torch.testing.assert_close(common.log_prob(x, mean, std), want)
    branches = torch.randn(7, 3, 4, 5, 5)
    want = torch.distributions.Normal(mean[:, None], std[:, None]).log_prob(branches).mean((2, 3, 4))
    torch.testing.assert_close(common.log_prob(branches, mean[:, None], std[:, None], batch_dims=2), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_to_float32(dtype):
    x, v = torch.randn(2, 3, 4).to(dtype)
    mean, std = common.sde_mean_std(x, v, 0.5, 0.4, 0.3)
    assert mean.dtype == std.dtype == common.log_prob(x, mean, std).dtype == torch.float32
    wide, _ = common.sde_mean_std(x.double(), v.double(), 0.5, 0.4, 0.3)
    torch.testing.assert_close(mean.double(), wide, atol=1e-6, rtol=1e-6)


def test_noise_scale():
    sigmas = sd3_sigmas(10)
    s = common.noise_scale(sigmas, "flow", 0.7)
    assert s.shape == (9,)
    for i in range(9):
        inside = sigmas[1] if i == 0 else sigmas[i]
        assert s[i].item() == pytest.approx(0.7 * (sigmas[i] / (1 - inside)).item() ** 0.5, rel=1e-6)
    assert common.noise_scale(sigmas, "dance", 0.3).tolist() == pytest.approx([0.3] * 9)
    std = common.noise_scale(sigmas, "cps", 0.8) * (sigmas[:-2] - sigmas[1:-1]).sqrt()
    assert std.tolist() == pytest.approx((sigmas[1:-1] * 0.9510565).tolist(), rel=1e-5)  # sin 72 degrees


@pytest.mark.parametrize("std", ["group", "batch"])
def test_group_advantage_against_a_loop(std):
    rewards = torch.rand(5, 7)
    rewards[2] = 0.25
    rewards[3, 0] = 1e3
    advantage, flat = common.group_advantage(rewards, std, clip=2.0)
    everything = [r for group in rewards.tolist() for r in group]
    for group, got in zip(rewards.tolist(), advantage.tolist()):
        mean = sum(group) / 7
        values = group if std == "group" else everything
        centre = sum(values) / len(values)
        spread = (sum((v - centre) ** 2 for v in values) / len(values)) ** 0.5
        want = [max(-2.0, min(2.0, (r - mean) / (spread + 1e-4))) for r in group]
        assert got == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert flat == pytest.approx(1 / 5)
    assert advantage[2].abs().max() == 0


@pytest.fixture(scope="module")
def tiny():
    args = common.parse_args(grpo.Args, grpo.DEFAULTS, ["--micro-batch", "4", "--lora-rank", "4"])
    return common.make_policy(args, trajectories=4)


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_rollout_without_noise_is_the_pipeline(tiny, guidance):
    prompts = ["two red circles", "a green square left of a blue circle", "a yellow triangle"]
    x0 = torch.randn(3, *tiny.shape, generator=torch.Generator().manual_seed(1))
    tiny.guidance = guidance
    sigmas = tiny.sigmas(10)
    noise = [x0] + [torch.randn_like(x0) for _ in range(9)]
    text, owner = tiny.encode(prompts), torch.arange(3)
    *_, rolled = grpo.rollout(tiny, text, owner, noise, sigmas, torch.zeros(9), "cps", range(9))
    ode = common.ode_sample(tiny, x0, text, owner, sigmas)
    tiny.guidance = 1.0
    pipe = StableDiffusion3Pipeline.from_pretrained(common.TINY, text_encoder_3=None, tokenizer_3=None)
    options = dict(num_inference_steps=10, guidance_scale=guidance, max_sequence_length=0, latents=x0)
    latents = pipe(prompts, output_type="latent", **options).images
    assert (rolled - latents).abs().max() < 1e-5
    assert (ode - latents).abs().max() < 1e-5
    images = pipe(prompts, output_type="pt", **options).images
    assert (tiny.decode(ode) - images).abs().max() < 1e-4


def test_micro_batches_and_filling_change_nothing(tiny):
    text, x = tiny.encode(["two red circles", "a yellow triangle"]), torch.randn(7, *tiny.shape)
    owner = torch.tensor([0, 1, 0, 1, 1, 0, 1])
    with torch.no_grad():
        by_four = tiny.velocity_in_micro_batches(x, torch.tensor(0.5), text, owner)
        tiny.micro_batch = 1
        by_one = tiny.velocity_in_micro_batches(x, torch.tensor(0.5), text, owner)
        tiny.micro_batch = 4
    assert (by_four - by_one).abs().max() < 1e-5
    assert by_four.shape == x.shape


def test_reference_is_the_base_model(tiny):
    text, x, owner = tiny.encode(["two red circles"]), torch.randn(4, *tiny.shape), torch.zeros(4, dtype=torch.long)
    with torch.no_grad():
        base = tiny.velocity(x, 0.5, text, owner)
        for parameter in tiny.parameters:
            parameter.add_(0.02 * torch.randn_like(parameter))
        tuned = tiny.velocity(x, 0.5, text, owner)
        with tiny.reference():
            reference = tiny.velocity(x, 0.5, text, owner)
    assert torch.equal(base, reference) and not torch.equal(base, tuned)


def test_hybrid_sampling_switches_to_the_base_model(tiny):
    """60% of 10 steps with the adapter, the rest without, against two calls by hand."""
    text, owner, sigmas = tiny.encode(["two red circles"]), torch.zeros(4, dtype=torch.long), tiny.sigmas(10)
    with torch.no_grad():
        for parameter in tiny.parameters:
            parameter.add_(0.02 * torch.randn_like(parameter))
    x = torch.randn(4, *tiny.shape)
    got = common.ode_sample(tiny, x, text, owner, sigmas, tuned_share=0.6)
    want = common.ode_sample(tiny, x, text, owner, sigmas[:7])
    tiny.transformer.disable_adapters()
    want = common.ode_sample(tiny, want, text, owner, sigmas[6:], tuned_share=0.0)
    assert torch.equal(got, want)
    assert not torch.equal(got, common.ode_sample(tiny, x, text, owner, sigmas))
