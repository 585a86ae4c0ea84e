"""tempflow_grpo.py's weights, and what its grouping does to the advantages."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import common
import tempflow_grpo
from conftest import metrics
from tempflow_grpo import step_weights
from test_gradients import DRAWN, brightness, train_on
from test_sampler import gaussian_velocity, sd3_sigmas


def levels(sigmas, kind, level):
    return sigmas[:-2], sigmas[1:-1], common.noise_scale(sigmas, kind, level)


def test_normalisers_that_the_released_code_has_as_numbers():
    sigma, sigma_next, s = levels(sd3_sigmas(10).double(), "flow", 0.7)
    raw = s * (sigma - sigma_next).sqrt()
    assert 1 / raw.mean().item() == pytest.approx(2.252, abs=1e-3)  # 2.25 there
    torch.testing.assert_close(step_weights(sigma, sigma_next, s, "flow", "noise"), raw * (1 / raw.mean()))

    flux = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    family = common.Flux(SimpleNamespace(scheduler=flux, vae_scale_factor=8))
    sigma, sigma_next, s = levels(family.sigmas(10, 1024).double(), "flow", 0.9)
    raw = s * (sigma - sigma_next).sqrt()
    assert 1 / raw.mean().item() == pytest.approx(1.726, abs=1e-3)  # 1.73 there
    assert step_weights(sigma, sigma_next, s, "flow", "noise").mean().item() == pytest.approx(1, abs=1e-9)
    assert step_weights(sigma, sigma_next, s, "flow", "none").tolist() == [1.0] * 9


@pytest.mark.parametrize("level", [0.3, 0.8, 1.5])
@pytest.mark.parametrize("kind", ["flow", "dance", "cps", "precise"])
def test_weights_make_the_gradient_proportional_to_the_step_length(kind, level):
    """Autograd on a Gaussian: E |d logp / d velocity| of each step against Delta, weighted and not."""
    sigmas = sd3_sigmas(10).double()
    sigma, sigma_next, s = levels(sigmas, kind, level)
    norms = []
    for k in range(9):
        x = torch.randn(4000, 8, dtype=torch.float64)
        velocity = gaussian_velocity(x, sigma[k], 0.3, 0.5)
        velocity.requires_grad_()
        mean, std = common.sde_mean_std(x, velocity, sigma[k], sigma_next[k], s[k], kind)
        sample = (mean + std * torch.randn_like(mean)).detach()
        (gradient,) = torch.autograd.grad(common.log_prob(sample, mean, std).sum(), velocity)
        norms.append(gradient.norm(dim=1).mean())
    norms, delta = torch.stack(norms), sigma - sigma_next
    first = 1 if kind == "flow" else 0  # the bracket, which [TF] leaves out, is 1 at sigma = 1
    # the mean of 4,000 norms of 8 numbers is off by 0.4% or so
    weighted = (norms * step_weights(sigma, sigma_next, s, kind, "noise") / delta)[first:]
    assert (weighted / weighted.mean() - 1).abs().max() < 0.03
    plain = (norms / delta)[first:]
    assert (plain / plain.mean() - 1).abs().max() > 0.2
    scale = tempflow_grpo.gradient_scale(sigma, sigma_next, s, kind)
    assert (norms / scale / (norms / scale).mean() - 1).abs().max() < 0.03


def test_groups_of_start_and_prompt(record):
    """The branches of a start, or all branches of a prompt, at that step."""
    for group, members in (("seed", 3), ("prompt", 6)):
        seen = record(tempflow_grpo, "--iterations", "1", "--group", group, double=False)
        (grouped, _, _), (advantage, _) = seen.advantages[0]
        assert grouped.shape == (4 * 2 * 2 * 3 // members, members)  # (K P S B / members, members)
        assert advantage.mean(1).abs().max() < 1e-5  # float32, numbers up to 5


def test_reward_of_a_branch_goes_to_its_own_step_start_and_prompt(record, monkeypatch):
    """A reward that tells which image it was given: the order of images, prompts and rewards must agree."""
    asked = []

    def order(images, prompts):
        asked.append((images, prompts))
        return brightness(images)

    train_on(monkeypatch, order)
    seen = record(tempflow_grpo, "--iterations", "1", "--adv-clip", "100")
    (policy, *_), (_, _, _, ends) = seen.rollouts[0]
    batch = common.iteration_prompts(common.read_prompts(seen.args.prompts), 2, 1, 0)
    rewards = seen.advantages[0][0][0].view(4, 4, 3)
    captions = sum((prompts for _, prompts in asked[1:-1]), [])  # between the two evaluations
    for k in range(4):
        for n in range(4):
            images = policy.decode(ends.view(4, 4, 3, 8, 8, 8)[k, n])
            torch.testing.assert_close(rewards[k, n], brightness(images), atol=1e-6, rtol=0)  # float32
            assert captions[(k * 4 + n) * 3] == batch[n // 2]


def test_metrics_by_step():
    """Against loops: two steps, two starts, three branches."""
    rewards = [[[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]], [[5.0, 5.0, 5.0], [1.0, 3.0, 5.0]]]
    gradient, weight = torch.tensor([3.0, 1.0]), torch.tensor([0.5, 1.5])
    found = tempflow_grpo.step_metrics([0, 4], torch.tensor(rewards), gradient, weight)
    spread = []
    for step in rewards:
        stds = [(sum((r - sum(start) / 3) ** 2 for r in start) / 3) ** 0.5 for start in step]
        spread.append(sum(stds) / 2)
    assert found["branch_steps"] == [0, 4]
    assert found["reward_std_by_step"] == pytest.approx(spread, rel=1e-6)
    assert found["gradient_by_step"] == pytest.approx([1.5, 0.5])  # over their mean, 2
    assert found["gradient_by_step_weighted"] == pytest.approx([1.0, 1.0])  # 1.5 and 1.5


def test_branch_steps(record):
    """Drawn in each iteration, and logged."""
    seen = record(tempflow_grpo, "--iterations", "2", "--sde-steps", *DRAWN.split(), double=False)
    for line, (inputs, _) in zip(metrics(seen.folder)[1:], seen.rollouts, strict=True):
        steps = line["branch_steps"]
        assert steps == inputs[7] and len(steps) == 2 and steps == sorted(set(steps))
