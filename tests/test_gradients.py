"""The loops of the scripts, run for real in float64, against the algorithms written out naively."""

import gcpo
import grpo
import tempflow_grpo
from conftest import gradients, metrics, put_weights, relative_error

import pytest
import torch
from torch.distributions import Normal


def naive_logp(policy, text, owner, x, x_next, sigmas, s, step, n, row=None):
    """log-prob of one transition, one forward, straight from the formula; row: where in x the step is."""
    state = x[step if row is None else row, n]
    sigma, delta = sigmas[step].double(), (sigmas[step] - sigmas[step + 1]).double()
    scale = s[step].double()
    text = [rows[owner[n]][None] for rows in text]
    v = policy.family.predict(state[None], sigma[None], text, policy.guidance)[0]
    mean = state * (1 - scale**2 * delta / (2 * sigma))
    mean = mean - v * delta * (1 + scale**2 * (1 - sigma) / (2 * sigma))
    return Normal(mean, scale * delta.sqrt()).log_prob(x_next)


def clipped(advantage, ratio, eps):
    return torch.maximum(-advantage * ratio, -advantage * torch.clamp(ratio, 1 - eps, 1 + eps))


OPTIONS = "--iterations 1 --updates-per-iteration 2 --learning-rate 3e-3 --clip-range 2e-4".split()


def test_grpo(record):
    seen = record(grpo, *OPTIONS)
    (_, text, owner, _, sigmas, s, *_), (x, x_next, old, _) = seen.rollouts[0]
    advantage = seen.advantages[0][1][0].flatten().double()
    share_clipped = []
    for update, images in enumerate(torch.arange(8).view(2, 4)):
        weights, got = seen.updates[update]
        put_weights(seen.policy, weights)
        total = 0.0
        for n in images.tolist():
            for step in range(4):
                logp = naive_logp(seen.policy, text, owner, x, x_next[step, n], sigmas, s, step, n).mean()
                ratio = torch.exp(logp - old[step, n])
                share_clipped.append((abs(ratio.item() - 1) > 2e-4) if update else 0)
                # at ratio 1 the gradient is that of -A * logp
                term = -advantage[n] * logp if update == 0 else clipped(advantage[n], ratio, 2e-4)
                total = total + term / (4 * 4)
        assert relative_error(got, gradients(seen.policy, total)) < 1e-6
    assert 0 < sum(share_clipped) < 16  # clipping was at work for some


def test_grpo_in_float32_points_where_the_naive_gradient_in_float64_does(record):
    seen = record(grpo, *OPTIONS, double=False)
    (_, text, owner, _, sigmas, s, *_), (x, x_next, _, _) = seen.rollouts[0]
    advantage = seen.advantages[0][1][0].flatten().double()
    weights, got = seen.updates[0]
    seen.policy.transformer.double()
    put_weights(seen.policy, weights)
    text = [rows.double() for rows in text]
    logp = [
        naive_logp(seen.policy, text, owner, x.double(), x_next[step, n].double(), sigmas, s, step, n).mean()
        * advantage[n]
        for n in range(4)
        for step in range(4)
    ]
    assert relative_error([g.double() for g in got], gradients(seen.policy, -torch.stack(logp).mean())) < 1e-4


def test_kl_to_the_reference(record):
    """With beta, the second update's gradient is that of surrogate + beta KL; KL is 0 before the first update."""
    seen = record(grpo, *OPTIONS, "--kl-coef", "5")
    (_, text, owner, _, sigmas, s, *_), (x, x_next, old, _) = seen.rollouts[0]
    advantage = seen.advantages[0][1][0].flatten().double()
    weights, got = seen.updates[1]
    base = record(grpo, *OPTIONS).policy  # the same model, with other weights
    put_weights(base, [torch.zeros_like(w) for w in weights])
    put_weights(seen.policy, weights)
    total = 0.0
    for n in range(4, 8):
        for step in range(4):
            sigma, delta, scale = (a.double() for a in (sigmas[step], sigmas[step] - sigmas[step + 1], s[step]))
            rows = [r[owner[n]][None] for r in text]
            v = seen.policy.family.predict(x[step, n][None], sigma[None], rows, 1.0)[0]
            with torch.no_grad():
                v_ref = base.family.predict(x[step, n][None], sigma[None], rows, 1.0)[0]
            difference = (v - v_ref) * delta * (1 + scale**2 * (1 - sigma) / (2 * sigma))
            kl = (difference**2 / (2 * scale**2 * delta)).mean()
            logp = naive_logp(seen.policy, text, owner, x, x_next[step, n], sigmas, s, step, n).mean()
            total = total + (clipped(advantage[n], torch.exp(logp - old[step, n]), 2e-4) + 5 * kl) / 16
    assert relative_error(got, gradients(seen.policy, total)) < 1e-6


@pytest.mark.parametrize("chunks", ["adaptive", "1,3", "4", "1,1,2"])
@pytest.mark.parametrize("fraction", ["1.0", "0.5"])
def test_gcpo(record, chunks, fraction):
    """All transitions of a chunk in one graph, one ratio a chunk."""
    options = ["--chunks", chunks, "--chunk-fraction", fraction, "--chunk-max", "2", "--clip-range", "1e-4"]
    seen = record(gcpo, *OPTIONS, *options)
    (_, text, owner, _, sigmas, s, *_), (x, x_next, old, _) = seen.rollouts[0]
    advantage = seen.advantages[0][1][0].flatten().double()
    off = []
    for update, images in enumerate(torch.arange(8).view(2, 4)):
        weights, got = seen.updates[update]
        put_weights(seen.policy, weights)
        total = 0.0
        for n in images.tolist():
            average = seen.chunks[n][1]
            drawn = {tuple(row.nonzero()[:, 0].tolist()) for row in average if row.any()}
            assert len(drawn) == max(1, int(float(fraction) * len(seen.chunks[n][0][1]) + 0.5))
            for steps in drawn:
                logp = [naive_logp(seen.policy, text, owner, x, x_next[t, n], sigmas, s, t, n).mean() for t in steps]
                product = torch.stack([torch.exp(new - old[t, n]) for new, t in zip(logp, steps)]).prod()
                ratio = product ** (1 / len(steps))
                off.append(abs(ratio.item() - 1) > 1e-4)
                total = total + clipped(advantage[n], ratio, 1e-4) / len(drawn) / 4
        assert relative_error(got, gradients(seen.policy, total)) < 1e-6
    assert any(off)


def test_gcpo_at_ratio_one_weighs_a_step_by_one_over_count_and_size(record):
    seen = record(gcpo, *OPTIONS, "--chunks", "1,3", "--chunk-fraction", "1")
    (_, text, owner, _, sigmas, s, *_), (x, x_next, _, _) = seen.rollouts[0]
    advantage = seen.advantages[0][1][0].flatten().double()
    weights, got = seen.updates[0]
    put_weights(seen.policy, weights)
    total = 0.0
    for n in range(4):
        for step, weight in enumerate([1 / 2, 1 / 6, 1 / 6, 1 / 6]):  # 1 / (K size), K = 2 chunks of 1 and 3
            logp = naive_logp(seen.policy, text, owner, x, x_next[step, n], sigmas, s, step, n).mean()
            total = total - weight * advantage[n] * logp / 4
    assert relative_error(got, gradients(seen.policy, total)) < 1e-6


@pytest.mark.parametrize("group", ["seed", "prompt"])
@pytest.mark.parametrize("steps", ["all", "0,2"])
def test_tempflow(record, group, steps):
    """States repeated for each branch: one forward a branch, weights from the schedule."""
    options = [*OPTIONS, "--group", group, "--branch-steps", steps, "--clip-range", "2e-4"]
    seen = record(tempflow_grpo, *options)
    (_, text, owner, _, sigmas, s, at, *_), (x, x_next, old, _) = seen.rollouts[0]
    advantage = seen.advantages[0][1][0].view(len(at), 4, 3).double()
    raw = torch.tensor([s[k] * (sigmas[k] - sigmas[k + 1]).sqrt() for k in at]).double()
    weight, off = raw / raw.mean(), []
    for update, seeds in enumerate(torch.arange(4).view(2, 2)):
        weights, got = seen.updates[update]
        put_weights(seen.policy, weights)
        total = 0.0
        for n in seeds.tolist():
            for i, k in enumerate(at):
                for b in range(3):
                    logp = naive_logp(seen.policy, text, owner, x, x_next[i, n, b], sigmas, s, k, n, row=i).mean()
                    ratio = torch.exp(logp - old[i, n, b])
                    off.append(abs(ratio.item() - 1) > 2e-4)
                    total = total + weight[i] * clipped(advantage[i, n, b], ratio, 2e-4) / (2 * len(at) * 3)
        assert relative_error(got, gradients(seen.policy, total)) < 1e-6
    assert any(off)


def test_tempflow_rollout_is_the_nested_loops(record):
    """One branch at a time, each from the start, with the same noise."""
    seen = record(tempflow_grpo, *OPTIONS)
    (policy, text, owner, noise, sigmas, s, at, *_), (x, x_next, old, ends) = seen.rollouts[0]
    ends = ends.view_as(x_next)
    put_weights(policy, seen.updates[0][0])

    @torch.no_grad()
    def euler(latent, step, n):
        v = policy.family.predict(latent[None], sigmas[step].double()[None], [r[owner[n]][None] for r in text], 1.0)[0]
        return latent - (sigmas[step] - sigmas[step + 1]).double() * v, v

    for n in range(4):
        for k in at:
            for b in range(3):
                latent = noise[0][n].double()
                for step in range(k):
                    latent, _ = euler(latent, step, n)
                assert (latent - x[k, n]).abs().max() < 1e-6
                sigma, delta, scale = sigmas[k].double(), (sigmas[k] - sigmas[k + 1]).double(), s[k].double()
                _, v = euler(latent, k, n)
                mean = latent - delta * (v + scale**2 / (2 * sigma) * (latent + (1 - sigma) * v))
                latent = mean + scale * delta.sqrt() * noise[1 + k][n, b].double()
                assert (latent - x_next[k, n, b]).abs().max() < 1e-6
                logp = Normal(mean, scale * delta.sqrt()).log_prob(latent).mean()
                assert abs(logp - old[k, n, b]) < 1e-6
                for step in range(k + 1, 5):
                    latent, _ = euler(latent, step, n)
                assert (latent - ends[k, n, b]).abs().max() < 1e-6


@pytest.mark.parametrize("module", [grpo, gcpo, tempflow_grpo], ids=lambda m: m.__name__)
def test_velocity_evaluations_are_the_formula(record, module):
    options = [
        "--iterations",
        "1",
        *(["--chunk-fraction", "1"] if module is gcpo else []),
        "--updates-per-iteration",
        "1",
    ]
    seen = record(module, *options)
    T, P, S, B, G = 5, 2, 2, 3, 4
    if module is tempflow_grpo:
        want = P * (S * (T - 1) + S * B * T * (T - 1) // 2 + 3 * S * (T - 1))  # spec section 4
    else:
        want = P * (G * T + 3 * G * (T - 1))
    assert metrics(seen.folder)[-1]["velocity_evals"] == want  # evaluations, as before iteration 1, are not counted
