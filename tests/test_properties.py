"""The pure functions, over random shapes and values."""

import random

import pytest
import torch

from common import Stats, group_advantage, noise_scale
from gcpo import adaptive_chunks, draw_chunks
from tempflow_grpo import step_weights

ROUNDS = 300


@pytest.fixture
def draws():
    """ROUNDS generators of numbers, and of tensors, each with its own seed."""
    return [(random.Random(n), torch.Generator().manual_seed(n)) for n in range(ROUNDS)]


def schedule(numbers, steps):
    """Falling noise levels from 1 (or a little less) to 0, (steps + 1,)."""
    inner = sorted((numbers.uniform(0.02, 0.98) for _ in range(steps - 1)), reverse=True)
    return torch.tensor([1.0, *inner, 0.0], dtype=torch.float64)


def test_group_advantage(draws):
    for numbers, gen in draws:
        groups, size = numbers.randint(1, 9), numbers.randint(2, 30)
        scale, clip = 10 ** numbers.uniform(-3, 4), numbers.uniform(0.5, 6)
        rewards = (torch.randn(groups, size, generator=gen) * scale).double()
        flat = numbers.randrange(groups)
        rewards[flat] = rewards[flat, 0]  # a group in which all are alike
        std = rewards.std(correction=0) if numbers.random() < 0.5 else None  # of the batch, or of each group
        advantage, zero = group_advantage(rewards, std, clip)
        assert advantage.shape == rewards.shape and advantage.isfinite().all()
        assert advantage.abs().max() <= clip
        assert advantage[flat].abs().max() == 0 and zero >= 1 / groups - 1e-6
        unclipped, _ = group_advantage(rewards, std, 1e9)
        assert unclipped.sum(1).abs().max() < 1e-9  # centred
        assert torch.equal(unclipped.clamp(-clip, clip), advantage)
        order = torch.randperm(size, generator=gen)  # it does not matter who is which
        permuted, _ = group_advantage(rewards[:, order], std, clip)
        assert torch.allclose(permuted, advantage[:, order], atol=1e-9)
        shift = numbers.uniform(-5, 5)  # nor that all have more
        assert torch.allclose(group_advantage(rewards + shift, std, clip)[0], advantage, atol=1e-9)
        better = rewards.argsort(1)  # a better reward never has less advantage
        assert (advantage.gather(1, better).diff(dim=1) >= -1e-9).all()


def test_adaptive_chunks(draws):
    for numbers, gen in draws:
        steps, longest = numbers.randint(1, 60), numbers.randint(1, 12)
        curve = torch.rand(steps, generator=gen)
        kind = numbers.randrange(4)
        curve = (curve, torch.zeros(steps), curve.sort().values, (curve * 3).round())[kind]
        sizes = adaptive_chunks(curve, longest)
        assert sum(sizes) == steps and min(sizes) >= 1 and max(sizes) <= longest
        if kind in (1, 3):  # elsewhere rounding may move a sign
            assert sizes == adaptive_chunks(curve * 4 + 8, longest)
        assert sizes == adaptive_chunks(curve / 10, longest)  # by the shape of the curve, not its size


def test_draw_chunks(draws):
    for numbers, gen in draws:
        sizes = [numbers.randint(1, 6) for _ in range(numbers.randint(1, 12))]
        steps, fraction, weighted = sum(sizes), numbers.uniform(0.01, 1), numbers.random() < 0.5
        curve = torch.rand(steps, generator=gen) + 0.01
        exponentials = torch.empty(steps).exponential_(generator=gen)
        average = draw_chunks(curve, sizes, fraction, weighted, exponentials)
        assert average.shape == (steps, steps) and torch.equal(average, average.T)
        count = max(1, int(fraction * len(sizes) + 0.5))
        starts = [sum(sizes[:j]) for j in range(len(sizes))]
        drawn = [j for j, start in enumerate(starts) if average[start, start]]
        assert len(drawn) == count
        want = torch.zeros(steps, steps)
        for j in drawn:
            want[starts[j] : starts[j] + sizes[j], starts[j] : starts[j] + sizes[j]] = 1 / sizes[j]
        assert torch.equal(average, want)
        whole = draw_chunks(curve, sizes, 1.0, weighted, exponentials)
        assert abs(whole.trace() - len(sizes)) < 1e-5  # float32


@pytest.mark.parametrize("sde", ["flow", "dance", "cps", "precise"])
def test_step_weights(draws, sde):
    for numbers, gen in draws:
        sigmas = schedule(numbers, numbers.randint(2, 30))
        s = noise_scale(sigmas, sde, numbers.uniform(0.05, 1 if sde == "cps" else 2))
        assert s.shape == (len(sigmas) - 2,) and (s > 0).all() and s.isfinite().all()
        count = numbers.randint(1, len(s))
        steps = torch.randperm(len(s), generator=gen)[:count].sort().values
        levels = [level[steps] for level in (sigmas[:-2], sigmas[1:-1], s)]
        weight = step_weights(*levels, sde, "noise")
        assert weight.shape == (count,) and (weight > 0).all() and abs(weight.mean() - 1) < 1e-9
        assert torch.equal(step_weights(*levels, sde, "none"), torch.ones(count).double())
        if sde == "flow":  # as long as the noise that the step adds
            std = levels[2] * (levels[0] - levels[1]).sqrt()
            assert torch.allclose(weight / weight.max(), std / std.max(), rtol=1e-9)


def test_stats():
    """Over all that was added, not over calls; what was never added is None."""
    stats = Stats()
    stats.add(ratio=torch.tensor([0.5, 1.0]), loss=torch.tensor([[1.0, 3.0]]))
    stats.add(ratio=torch.tensor([2.0]), loss=torch.tensor(8.0))
    stats.add(ratio_first_error=torch.tensor([0.25, 0.5]), mine=torch.tensor(2))
    stats.add(ratio_first_error=torch.tensor([0.125]))
    want = {"ratio_mean": 3.5 / 3, "ratio_min": 0.5, "ratio_max": 2.0, "loss": 4.0, "mine": 2}
    want["ratio_first_error"] = 0.5
    want |= dict.fromkeys(["clip_low", "clip_high", "approx_kl", "grad_norm"])
    assert stats.metrics() == pytest.approx(want)
