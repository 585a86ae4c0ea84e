"""tempflow_grpo.py's weights, and what its grouping does to the advantages."""

import common
import tempflow_grpo
from conftest import metrics
from tempflow_grpo import step_weights

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift


def levels(sigmas, kind, level):
    return sigmas[:-2], sigmas[1:-1], common.noise_scale(sigmas, kind, level)


def test_normalisers_that_the_released_code_has_as_numbers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    sigma, sigma_next, s = levels(scheduler.sigmas, "flow", 0.7)
    raw = s * (sigma - sigma_next).sqrt()
    assert 1 / raw.mean().item() == pytest.approx(2.252, abs=1e-3)  # 2.25 there
    torch.testing.assert_close(step_weights(sigma, sigma_next, s, "flow"), raw * (1 / raw.mean()))

    flux = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    flux.set_timesteps(sigmas=torch.linspace(1, 0.1, 10).tolist(), mu=calculate_shift(4096))
    sigma, sigma_next, s = levels(flux.sigmas, "flow", 0.9)
    raw = s * (sigma - sigma_next).sqrt()
    assert 1 / raw.mean().item() == pytest.approx(1.726, abs=1e-3)  # 1.73 there
    assert step_weights(sigma, sigma_next, s, "flow").mean().item() == pytest.approx(1, abs=1e-6)
    assert step_weights(sigma, sigma_next, s, "flow", "none").tolist() == [1.0] * 9


@pytest.mark.parametrize("kind, level", [("flow", 0.7), ("dance", 0.3), ("dance", 0.9), ("cps", 0.3), ("cps", 0.8)])
def test_weights_make_the_gradient_proportional_to_the_step_length(kind, level):
    """Autograd on a Gaussian toy: E |d logp / d velocity| of each step, with and without weights, against Delta."""
    torch.manual_seed(0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    sigmas = scheduler.sigmas.double()
    sigma, sigma_next, s = levels(sigmas, kind, level)
    norms = []
    for k in range(9):
        x = torch.randn(4000, 8, dtype=torch.float64)
        centre = 0.3 * (1 - sigma[k])
        variance = (1 - sigma[k]) ** 2 * 0.25 + sigma[k] ** 2  # data N(0.3, 0.25): the true velocity at x
        velocity = (sigma[k] - (1 - sigma[k]) * 0.25) / variance * (x - centre) - 0.3
        velocity.requires_grad_()
        mean, std = common.sde_mean_std(x, velocity, sigma[k], sigma_next[k], s[k], kind)
        sample = (mean + std * torch.randn_like(mean)).detach()
        (gradient,) = torch.autograd.grad(common.log_prob(sample, mean, std).sum(), velocity)
        norms.append(gradient.norm(dim=1).mean())
    norms, delta = torch.stack(norms), sigma - sigma_next
    first = 1 if kind == "flow" else 0  # at sigma = 1 the paper's weight leaves out the bracket, which is 1 there
    weighted = (norms * step_weights(sigma, sigma_next, s, kind) / delta)[first:]
    assert (weighted / weighted.mean() - 1).abs().max() < 0.03
    plain = (norms / delta)[first:]
    assert (plain / plain.mean() - 1).abs().max() > 0.2
    scale = tempflow_grpo.gradient_scale(sigma, sigma_next, s, kind)
    assert (norms / scale / (norms / scale).mean() - 1).abs().max() < 0.03


def test_groups_of_seed_and_prompt_and_flat_groups(record, monkeypatch):
    """The seed's branches, or all branches of a prompt at that step; a group without spread teaches nothing."""
    for group, members in (("seed", 3), ("prompt", 6)):
        seen = record(tempflow_grpo, "--iterations", "1", "--group", group, double=False)
        (grouped, _, _), (advantage, _) = seen.advantages[0]
        assert grouped.shape == (4 * 2 * 2 * 3 // members, members)  # (K P S B / members, members)
        assert advantage.mean(1).abs().max() < 1e-5
    monkeypatch.setattr(tempflow_grpo, "get_reward", lambda spec, *options: FlatReward())
    seen = record(tempflow_grpo, "--iterations", "1", double=False)
    assert metrics(seen.folder)[-1]["zero_std_groups"] == 1.0
    assert all(g.abs().max() == 0 for _, update in [seen.updates[0]] for g in update)


class FlatReward:
    def check(self, prompts):
        pass

    def self_check(self, images, prompts, parts):
        return []

    def __call__(self, images, prompts):
        return torch.ones(len(prompts)), {"flat": torch.ones(len(prompts))}


def test_reward_of_a_branch_goes_to_its_own_step_seed_and_prompt(record, monkeypatch):
    """A reward that tells which image it was given: the order of images, prompts and rewards must agree."""
    asked = []

    class Order(FlatReward):
        def __call__(self, images, prompts):
            asked.append((images, prompts))
            return images.flatten(1).mean(1), {}

    monkeypatch.setattr(tempflow_grpo, "get_reward", lambda spec, *options: Order())
    seen = record(tempflow_grpo, "--iterations", "1", "--adv-clip", "100", double=False)
    (policy, *_), (_, _, _, ends) = seen.rollouts[0]
    batch = common.iteration_prompts(common.read_prompts(seen.args.prompts), 2, 1, 0)
    rewards = seen.advantages[0][0][0].view(4, 4, 3)
    captions = [prompt for images, prompts in asked[1:-1] for prompt in prompts]  # between the two evaluations
    for k in range(4):
        for n in range(4):
            images = policy.decode(ends.view(4, 4, 3, 8, 8, 8)[k, n])
            torch.testing.assert_close(rewards[k, n], images.flatten(1).mean(1), atol=1e-5, rtol=0)
            assert captions[(k * 4 + n) * 3] == batch[n // 2]


@pytest.mark.parametrize("choice, want", [("2", 2), ("1,3", [1, 3]), ("2,", [2]), ("early", [0, 1])])
def test_branch_steps(record, choice, want):
    seen = record(tempflow_grpo, "--iterations", "2", "--sde-steps", choice, double=False)
    drawn = [line["branch_steps"] for line in metrics(seen.folder)[1:]]
    if isinstance(want, int):
        assert all(len(steps) == want and steps == sorted(set(steps)) for steps in drawn)
    else:
        assert drawn == [want, want]
