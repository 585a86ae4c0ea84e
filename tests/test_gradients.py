"""The loops of the scripts, run for real in float64, against the algorithms written out naively."""

import math

import gcpo
import grpo
import tempflow_grpo
from conftest import gradients, metrics, put_weights, relative_error

import pytest
import torch
from torch.distributions import Normal

OPTIONS = "--iterations 1 --updates-per-iteration 2 --learning-rate 3e-3 --clip-range 2e-4".split()
CPS = ["--sde", "cps", "--noise-level", "0.8"]


def naive_velocity(policy, text, owner, x, sigma, n):
    rows = [part[owner[n]][None] for part in text]
    return policy.family.predict(x[None], sigma.double()[None], rows, policy.guidance)[0]


def naive_step(x, v, sigmas, s, step, sde):
    """Mean and std of one random step from x (C, H, W), straight from the papers' formulas."""
    sigma, sigma_next, scale = sigmas[step].double(), sigmas[step + 1].double(), s[step].double()
    if sde == "cps":
        std = sigma_next * math.sin(0.8 * math.pi / 2)
        image, noise = x - sigma * v, x + (1 - sigma) * v
        return (1 - sigma_next) * image + (sigma_next**2 - std**2).sqrt() * noise, std
    delta = sigma - sigma_next
    mean = x * (1 - scale**2 * delta / (2 * sigma)) - v * delta * (1 + scale**2 * (1 - sigma) / (2 * sigma))
    return mean, scale * delta.sqrt()


def naive_logp(policy, rollout, k, n, branch=()):
    """log-prob of the k-th random transition of image n (and of its branch), one forward."""
    (_, text, owner, _, sigmas, s, sde, chosen, *_), (x, x_next, *_) = rollout
    v = naive_velocity(policy, text, owner, x[k, n], sigmas[chosen[k]], n)
    mean, std = naive_step(x[k, n], v, sigmas, s, chosen[k], sde)
    return Normal(mean, std).log_prob(x_next[(k, n, *branch)]).mean()


def clipped(advantage, ratio, eps=2e-4):
    return torch.maximum(-advantage * ratio, -advantage * torch.clamp(ratio, 1 - eps, 1 + eps))


def updates(seen, images):
    """(number of the update, its images, the gradient that the loop had), with the weights as they were then."""
    for number, part in enumerate(torch.arange(images).view(2, -1).tolist()):
        weights, got = seen.updates[number]
        put_weights(seen.policy, weights)
        yield number, part, got


@pytest.mark.parametrize(
    "steps, chosen, sde", [("all", [0, 1, 2, 3], []), ("0,2", [0, 2], []), ("all", [0, 1, 2, 3], CPS)]
)
def test_grpo(record, steps, chosen, sde):
    seen = record(grpo, *OPTIONS, "--sde-steps", steps, *sde)
    old, share_clipped = seen.rollouts[0][1][2], []
    advantage = seen.advantages[0][1][0].flatten().double()
    assert len(old) == len(chosen) == len(metrics(seen.folder)[1]["ratio_first_error_by_step"])
    for update, images, got in updates(seen, 8):
        total = 0.0
        for n in images:
            for k in range(len(chosen)):
                logp = naive_logp(seen.policy, seen.rollouts[0], k, n)
                ratio = torch.exp(logp - old[k, n])
                share_clipped.append(abs(ratio.item() - 1) > 2e-4)
                # at ratio 1 the gradient is that of -A * logp
                term = -advantage[n] * logp if update == 0 else clipped(advantage[n], ratio)
                total = total + term / (4 * len(chosen))
        assert relative_error(got, gradients(seen.policy, total)) < 1e-6
    assert 0 < sum(share_clipped) < len(share_clipped) / 2  # clipping was at work for some of the second update


def test_grpo_in_float32_points_where_the_naive_gradient_in_float64_does(record):
    seen = record(grpo, *OPTIONS, double=False)
    inputs, sampled = seen.rollouts[0]
    inputs = (inputs[0], [rows.double() for rows in inputs[1]], *inputs[2:])
    rollout = inputs, [part.double() for part in sampled]
    advantage = seen.advantages[0][1][0].flatten().double()
    seen.policy.transformer.double()
    _, images, got = next(updates(seen, 8))
    logp = torch.stack([naive_logp(seen.policy, rollout, k, n) * advantage[n] for n in images for k in range(4)])
    assert relative_error([g.double() for g in got], gradients(seen.policy, -logp.mean())) < 1e-4


def test_kl_to_the_reference(record):
    """With beta, the second update's gradient is that of surrogate + beta KL."""
    seen = record(grpo, *OPTIONS, "--kl-coef", "5")
    (_, text, owner, _, sigmas, s, sde, _, *_), (x, _, old, _) = seen.rollouts[0]
    advantage = seen.advantages[0][1][0].flatten().double()
    base = record(grpo, *OPTIONS).policy  # the same model, with other weights
    put_weights(base, [torch.zeros_like(weight) for weight in base.parameters])
    _, images, got = list(updates(seen, 8))[1]
    total = 0.0
    for n in images:
        for k in range(4):
            mean, std = naive_step(
                x[k, n], naive_velocity(seen.policy, text, owner, x[k, n], sigmas[k], n), sigmas, s, k, sde
            )
            with torch.no_grad():
                v = naive_velocity(base, text, owner, x[k, n], sigmas[k], n)
                mean_ref, _ = naive_step(x[k, n], v, sigmas, s, k, sde)
            kl = ((mean - mean_ref) ** 2 / (2 * std**2)).mean()
            logp = naive_logp(seen.policy, seen.rollouts[0], k, n)
            total = total + (clipped(advantage[n], torch.exp(logp - old[k, n])) + 5 * kl) / 16
    assert relative_error(got, gradients(seen.policy, total)) < 1e-6


@pytest.mark.parametrize(
    "chunks, steps, fraction",
    [
        ("adaptive", "all", "1.0"),
        ("adaptive", "all", "0.5"),
        ("1,3", "all", "0.5"),
        ("4", "all", "1.0"),
        ("1,1,2", "all", "0.5"),
        ("2,1", "1,2,3", "1.0"),
        ("adaptive", "1,2", "1.0"),
    ],
)
def test_gcpo(record, chunks, steps, fraction):
    """All transitions of a chunk in one graph, one ratio a chunk."""
    options = ["--chunks", chunks, "--chunk-fraction", fraction, "--chunk-max", "2", "--sde-steps", steps]
    seen = record(gcpo, *OPTIONS, *options, "--clip-range", "1e-4")
    old, off = seen.rollouts[0][1][2], []
    assert len(old) == (4 if steps == "all" else len(steps.split(",")))
    advantage = seen.advantages[0][1][0].flatten().double()
    for _, images, got in updates(seen, 8):
        total = 0.0
        for n in images:
            (_, sizes, *_), average = seen.chunks[n]
            drawn = {tuple(row.nonzero()[:, 0].tolist()) for row in average if row.any()}
            assert sum(sizes) == len(old) and len(drawn) == max(1, int(float(fraction) * len(sizes) + 0.5))
            for chunk in drawn:
                logp = [naive_logp(seen.policy, seen.rollouts[0], k, n) for k in chunk]
                product = torch.stack([torch.exp(new - old[k, n]) for new, k in zip(logp, chunk)]).prod()
                ratio = product ** (1 / len(chunk))
                off.append(abs(ratio.item() - 1) > 1e-4)
                total = total + clipped(advantage[n], ratio, 1e-4) / len(drawn) / 4
        assert relative_error(got, gradients(seen.policy, total)) < 1e-6
    assert any(off)


def test_gcpo_at_ratio_one_weighs_a_step_by_one_over_count_and_size(record):
    seen = record(gcpo, *OPTIONS, "--chunks", "1,3", "--chunk-fraction", "1")
    advantage = seen.advantages[0][1][0].flatten().double()
    _, images, got = next(updates(seen, 8))
    total = 0.0
    for n in images:
        for k, weight in enumerate([1 / 2, 1 / 6, 1 / 6, 1 / 6]):  # 1 / (J size), J = 2 chunks of 1 and 3
            total = total - weight * advantage[n] * naive_logp(seen.policy, seen.rollouts[0], k, n) / 4
    assert relative_error(got, gradients(seen.policy, total)) < 1e-6


@pytest.mark.parametrize("group", ["seed", "prompt"])
@pytest.mark.parametrize("steps", ["all", "0,2"])
def test_tempflow(record, group, steps):
    """States repeated for each branch: one forward a branch, weights from the schedule."""
    seen = record(tempflow_grpo, *OPTIONS, "--group", group, "--sde-steps", steps)
    (*_, sigmas, s, _, chosen, _), (_, _, old, _) = seen.rollouts[0]
    assert chosen == ([0, 1, 2, 3] if steps == "all" else [0, 2])
    advantage = seen.advantages[0][1][0].view(len(chosen), 4, 3).double()
    raw = torch.stack([s[k] * (sigmas[k] - sigmas[k + 1]).sqrt() for k in chosen]).double()
    weight, off = raw / raw.mean(), []
    for _, seeds, got in updates(seen, 4):
        total = 0.0
        for n in seeds:
            for k in range(len(chosen)):
                for b in range(3):
                    ratio = torch.exp(naive_logp(seen.policy, seen.rollouts[0], k, n, (b,)) - old[k, n, b])
                    off.append(abs(ratio.item() - 1) > 2e-4)
                    total = total + weight[k] * clipped(advantage[k, n, b], ratio) / (2 * len(chosen) * 3)
        assert relative_error(got, gradients(seen.policy, total)) < 1e-6
    assert any(off)


@pytest.mark.parametrize("module, chosen", [(grpo, [1, 3]), (gcpo, [1, 2]), (tempflow_grpo, [0, 2])])
def test_rollout_is_a_loop_over_images_with_ode_steps_where_none_is_chosen(record, module, chosen):
    """One image, or one branch from its start, at a time and with the same noise: states, log-probs and ends."""
    seen = record(module, *OPTIONS, "--sde-steps", ",".join(map(str, chosen)))
    (policy, text, owner, noise, sigmas, s, sde, steps, *_), (x, x_next, old, ends) = seen.rollouts[0]
    put_weights(policy, seen.updates[0][0])
    assert list(steps) == chosen and len(x) == 2

    @torch.no_grad()
    def sample(n, draws, branch=()):
        """draws: {step: noise}; all others are Euler's. branch: which one, if one."""
        latent = noise[0][n].double()
        for step in range(5):
            v = naive_velocity(policy, text, owner, latent, sigmas[step], n)
            if step in draws:
                k, place = chosen.index(step), (chosen.index(step), n, *branch)
                assert (latent - x[k, n]).abs().max() < 1e-6
                mean, std = naive_step(latent, v, sigmas, s, step, sde)
                latent = mean + std * draws[step].double()
                assert (latent - x_next[place]).abs().max() < 1e-6
                assert abs(Normal(mean, std).log_prob(latent).mean() - old[place]) < 1e-6
            else:
                latent = latent - (sigmas[step] - sigmas[step + 1]).double() * v
        return latent

    for n in range(len(owner)):
        if module is not tempflow_grpo:
            assert (sample(n, {step: noise[step + 1][n] for step in chosen}) - ends[n]).abs().max() < 1e-6
            continue
        for k, step in enumerate(chosen):
            for b in range(3):
                latent = sample(n, {step: noise[1 + k][n, b]}, (b,))
                assert (latent - ends.view_as(x_next)[k, n, b]).abs().max() < 1e-6


@pytest.mark.parametrize(
    "module, steps",
    [(grpo, "all"), (gcpo, "all"), (tempflow_grpo, "all"), (grpo, "2"), (gcpo, "1,2"), (tempflow_grpo, "2")],
)
def test_velocity_evaluations_are_the_formula(record, module, steps):
    options = ["--iterations", "1", "--updates-per-iteration", "1", "--sde-steps", steps]
    options += ["--chunk-fraction", "1"] if module is gcpo else []
    seen = record(module, *options)
    T, P, S, B, G, chosen = 5, 2, 2, 3, 4, seen.rollouts[0][0][7]
    assert len(chosen) == (4 if steps == "all" else 2)
    if module is tempflow_grpo:  # trunks up to the last branches, each branch from the next step on, training
        want = P * (S * (chosen[-1] + 1) + S * B * sum(T - 1 - k for k in chosen) + 3 * S * len(chosen))
    else:
        want = P * (G * T + 3 * G * len(chosen))
    assert metrics(seen.folder)[-1]["velocity_evals"] == want  # evaluations, as before iteration 1, are not counted
