"""The loops of the scripts, run for real in float64, against the algorithms written out naively."""

import math
from itertools import product

import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Normal

import common
import gcpo
import grpo
import tempflow_grpo
from conftest import gradients, metrics, put_weights, relative_error

OPTIONS = "--iterations 1 --updates-per-iteration 2 --learning-rate 3e-3 --clip-range 2e-4".split()
CPS, PRECISE = "--sde cps --noise-level 0.8".split(), "--sde precise --noise-level 1.5".split()
HALVES = ["--chunks", "1,3", "--chunk-fraction", "1"]
EACH = {grpo: [], gcpo: HALVES, tempflow_grpo: []}


def train_on(monkeypatch, function):
    """Train on function (images, prompts) -> scores."""

    def score(policy, reward, latents, prompts):
        scores = function(policy.decode(latents), prompts)
        return scores, {"shapes": scores}

    monkeypatch.setattr(common, "score", score)


def brightness(images, prompts=None):
    return images.flatten(1).mean(1)


def naive_velocity(policy, text, prompt_index, x, sigma, n):
    rows = [part[prompt_index[n]][None] for part in text]
    return policy.family.predict(x[None], sigma.double()[None], rows, policy.guidance)[0]


def naive_step(x, v, sigmas, s, step, sde):
    """Mean and std of one random step from x (C, H, W), straight from the papers' formulas."""
    sigma, sigma_next, scale = sigmas[step].double(), sigmas[step + 1].double(), s[step].double()
    delta = sigma - sigma_next
    if sde in ("cps", "precise"):
        r = sigma_next * (1 - sigma) / (sigma * (1 - sigma_next))
        std = sigma_next * (math.sin(0.8 * math.pi / 2) if sde == "cps" else (1 - r**2.25).sqrt())
        assert abs(std - scale * delta.sqrt()) < 1e-6  # s is float32
        std = scale * delta.sqrt()
        image, noise = x - sigma * v, x + (1 - sigma) * v
        return (1 - sigma_next) * image + (sigma_next**2 - std**2).clamp(min=0).sqrt() * noise, std
    mean = x * (1 - scale**2 * delta / (2 * sigma)) - v * delta * (1 + scale**2 * (1 - sigma) / (2 * sigma))
    return mean, scale * delta.sqrt()


def naive_gaussian(policy, rollout, k, n):
    """Mean and std of the k-th random transition of image n, one forward."""
    (_, text, prompt_index, _, sigmas, s, sde, chosen), (x, *_) = rollout
    v = naive_velocity(policy, text, prompt_index, x[k, n], sigmas[chosen[k]], n)
    return naive_step(x[k, n], v, sigmas, s, chosen[k], sde)


def naive_logp(policy, rollout, k, n, branch=()):
    mean, std = naive_gaussian(policy, rollout, k, n)
    return Normal(mean, std).log_prob(rollout[1][1][(k, n, *branch)]).mean()


def naive_ratio(seen, k, n, branch=()):
    old = seen.rollouts[0][1][2]
    return torch.exp(naive_logp(seen.policy, seen.rollouts[0], k, n, branch) - old[(k, n, *branch)])


def drawn_chunks(seen, n):
    return {tuple(row.nonzero()[:, 0].tolist()) for row in seen.chunks[n][1] if row.any()}


def terms(module, seen, part):
    """(advantage, ratio, its share of the update's loss) for all ratios of some images.

    One forward per transition. GCPO: all transitions of a chunk in one graph. TempFlow: one per branch.
    """
    (*_, sigmas, s, _, chosen), (_, _, old, _) = seen.rollouts[0]
    advantage, K = seen.advantages[0][1][0].double(), len(old)
    assert seen.advantages[0][0][1] is None  # so it is divided by the std of each group
    std = torch.stack([s[k] * (sigmas[k] - sigmas[k + 1]).sqrt() for k in chosen]).double()
    for n in part:
        if module is gcpo:
            chunks = drawn_chunks(seen, n)
            for chunk in chunks:
                ratio = torch.stack([naive_ratio(seen, k, n) for k in chunk]).prod() ** (1 / len(chunk))
                yield advantage.flatten()[n], ratio, 1 / len(chunks) / len(part)
        elif module is grpo:
            for k in range(K):
                yield advantage.flatten()[n], naive_ratio(seen, k, n), 1 / K / len(part)
        else:
            for k, b in product(range(K), range(3)):
                share = std[k] / std.mean() / (3 * K) / len(part)
                yield advantage.view(K, -1, 3)[k, n, b], naive_ratio(seen, k, n, (b,)), share


def naive_loss(module, seen, part, off=None):
    """The loss of one update. off: a list that gets whether each ratio is outside the clip range."""
    eps, total, off = seen.args.clip_range, 0.0, [] if off is None else off
    for advantage, ratio, share in terms(module, seen, part):
        off.append(abs(ratio.item() - 1) > eps)
        surrogate = torch.maximum(-advantage * ratio, -advantage * torch.clamp(ratio, 1 - eps, 1 + eps))
        total = total + share * surrogate
    return total


def updates(seen, images):
    """(number of the update, its images, the gradient that the loop had), with the weights of then."""
    for number, part in enumerate(torch.arange(images).view(2, -1).tolist()):
        weights, got = seen.updates[number]
        put_weights(seen.policy, weights)
        yield number, part, got


def assert_gradient(seen, got, loss):
    """In float64, but that 1 / n of GCPO and TempFlow's weights are float32 (6e-8)."""
    limit = 1e-10 if seen.args.script == "grpo" else 1e-6
    assert relative_error(got, gradients(seen.policy, loss)) < limit


@pytest.mark.parametrize(
    "steps, chosen, sde",
    [("all", range(4), []), ("0,2", [0, 2], []), ("all", range(4), CPS), ("all", range(4), PRECISE)],
)
def test_grpo(record, steps, chosen, sde):
    seen = record(grpo, *OPTIONS, "--sde-steps", steps, *sde)
    old, share_clipped = seen.rollouts[0][1][2], []
    advantage = seen.advantages[0][1][0].flatten().double()
    assert len(old) == len(chosen) and metrics(seen.folder)[1]["ratio_first_error"] < 1e-10
    for update, images, got in updates(seen, 8):
        total = naive_loss(grpo, seen, images, share_clipped)
        if update == 0:  # at ratio 1 the gradient is that of -A * logp
            pairs = list(product(range(len(old)), images))
            logp = [naive_logp(seen.policy, seen.rollouts[0], *pair) for pair in pairs]
            total = -sum(advantage[n] * new for new, (_, n) in zip(logp, pairs)) / len(pairs)
        assert_gradient(seen, got, total)
    assert 0 < sum(share_clipped) < len(share_clipped) / 2  # clipping acted on some of the second update


def test_grpo_in_float32_points_where_the_naive_gradient_in_float64_does(record):
    seen = record(grpo, *OPTIONS, double=False)
    inputs, sampled = seen.rollouts[0]
    inputs = (inputs[0], [rows.double() for rows in inputs[1]], *inputs[2:])
    rollout = inputs, [part.double() for part in sampled]
    advantage = seen.advantages[0][1][0].flatten().double()
    seen.policy.transformer.double()
    _, images, got = next(updates(seen, 8))
    logp = [naive_logp(seen.policy, rollout, k, n) * advantage[n] for n in images for k in range(4)]
    want = gradients(seen.policy, -torch.stack(logp).mean())
    assert relative_error([g.double() for g in got], want) < 1e-5  # measured: 1e-6


@pytest.mark.parametrize("module", EACH)
def test_advantages_are_divided_by_the_std_of_the_batch(record, module):
    seen = record(module, "--iterations", "1", "--adv-std", "batch", double=False)
    rewards, std, _ = seen.advantages[0][0]
    assert std == rewards.flatten().std(correction=0)


@pytest.mark.parametrize("module", EACH)
def test_kl_to_the_reference(record, monkeypatch, module):
    """The gradient is that of surrogate + beta KL, also where there is no advantage."""
    count = 48 if module is tempflow_grpo else 8

    def flat(images, prompts):
        scores = brightness(images)
        if len(scores) == count:
            scores[count // 2 :] = 1.0  # a whole group; in TempFlow the later steps of all starts
        return scores

    train_on(monkeypatch, flat)
    seen = record(module, *OPTIONS, *EACH[module], "--kl-coef", "5")
    want = evaluations(module, seen, live=[8, 8] if module is tempflow_grpo else [16, 16], passes=4)
    assert metrics(seen.folder)[1]["velocity_evals"] == want
    base = record(module, *OPTIONS).policy  # the same model, with other weights
    put_weights(base, [torch.zeros_like(weight) for weight in base.parameters])
    _, part, got = list(updates(seen, 4 if module is tempflow_grpo else 8))[1]
    total = naive_loss(module, seen, part)
    for n, k in product(part, range(4)):
        mean, std = naive_gaussian(seen.policy, seen.rollouts[0], k, n)
        with torch.no_grad():
            mean_ref, _ = naive_gaussian(base, seen.rollouts[0], k, n)
        share = 1 / [2, 6, 6, 6][k] if module is gcpo else 1 / 4  # two chunks, of 1 and 3 steps
        total = total + 5 * share / len(part) * ((mean - mean_ref) ** 2 / (2 * std**2)).mean()
    assert_gradient(seen, got, total)


@pytest.mark.parametrize(
    "chunks, steps, fraction",
    [
        *(("adaptive", "all", 1.0), ("adaptive", "all", 0.5), ("1,3", "all", 0.5), ("4", "all", 1.0)),
        *(("1,1,2", "all", 0.5), ("2,1", "1,2,3", 1.0), ("halves", "1,2,3", 1.0), ("adaptive", "1,2", 1.0)),
    ],
)
def test_gcpo(record, chunks, steps, fraction):
    options = ["--chunks", chunks, "--chunk-fraction", fraction, "--chunk-max", "2", "--sde-steps", steps]
    seen = record(gcpo, *OPTIONS, *options, "--clip-range", "1e-4")
    old, off = seen.rollouts[0][1][2], []
    assert len(old) == (4 if steps == "all" else len(steps.split(",")))
    for n in range(8):
        sizes = seen.chunks[n][0][1]
        assert sum(sizes) == len(old) and (chunks != "halves" or sizes == [1, 2])
        assert len(drawn_chunks(seen, n)) == max(1, int(fraction * len(sizes) + 0.5))
    for _, images, got in updates(seen, 8):
        assert_gradient(seen, got, naive_loss(gcpo, seen, images, off))
    assert any(off)


@pytest.mark.parametrize("group", ["seed", "prompt"])
@pytest.mark.parametrize("steps", ["all", "0,2"])
def test_tempflow(record, group, steps):
    seen = record(tempflow_grpo, *OPTIONS, "--group", group, "--sde-steps", steps)
    assert seen.rollouts[0][0][7] == ([0, 1, 2, 3] if steps == "all" else [0, 2])
    off = []
    for _, starts, got in updates(seen, 4):
        assert_gradient(seen, got, naive_loss(tempflow_grpo, seen, starts, off))
    assert any(off)


@pytest.mark.parametrize("module, chosen", [(grpo, [1, 3]), (gcpo, [1, 2]), (tempflow_grpo, [0, 2])])
def test_rollout_is_a_loop_over_images_with_ode_steps_where_none_is_chosen(record, module, chosen):
    """One image or branch at a time, with the same noise: states, log-probs and ends."""
    seen = record(module, *OPTIONS, "--sde-steps", ",".join(map(str, chosen)))
    (policy, text, prompt_index, noise, sigmas, s, sde, steps), (x, x_next, old, ends) = seen.rollouts[0]
    put_weights(policy, seen.updates[0][0])
    assert list(steps) == chosen and len(x) == 2 and len(noise) == 1 + 2  # no noise is drawn for other steps

    @torch.no_grad()
    def sample(n, draws, branch=()):
        """draws: {step: noise}; all others are Euler's. branch: which one, if one."""
        latent = noise[0][n].double()
        for step in range(5):
            v = naive_velocity(policy, text, prompt_index, latent, sigmas[step], n)
            if step in draws:
                k, place = chosen.index(step), (chosen.index(step), n, *branch)
                assert (latent - x[k, n]).abs().max() < 1e-10
                mean, std = naive_step(latent, v, sigmas, s, step, sde)
                latent = mean + std * draws[step].double()
                assert (latent - x_next[place]).abs().max() < 1e-10
                assert abs(Normal(mean, std).log_prob(latent).mean() - old[place]) < 1e-10
            else:
                latent = latent - (sigmas[step] - sigmas[step + 1]).double() * v
        return latent

    for n in range(len(prompt_index)):
        if module is not tempflow_grpo:
            draws = {step: noise[1 + k][n] for k, step in enumerate(chosen)}
            assert (sample(n, draws) - ends[n]).abs().max() < 1e-10
            continue
        for (k, step), b in product(enumerate(chosen), range(3)):
            latent = sample(n, {step: noise[1 + k][n, b]}, (b,))
            assert (latent - ends.view_as(x_next)[k, n, b]).abs().max() < 1e-10


@pytest.mark.parametrize("module", [grpo, gcpo])
def test_shared_noise(record, module):
    """All images of a prompt begin with the same noise, and go on with noise of their own."""
    seen = record(module, "--iterations", 1, "--shared-noise", double=False)
    start, *later = seen.rollouts[0][0][3]
    assert torch.equal(start[:4], start[:1].expand(4, -1, -1, -1))
    assert torch.equal(start[4:], start[4:5].expand(4, -1, -1, -1)) and not torch.equal(start[0], start[4])
    assert not torch.equal(start[0], later[0][0])
    assert len(later) == 4 and all(len(noise.flatten(1).unique(dim=0)) == 8 for noise in later)


def evaluations(module, seen, live=None, passes=3):
    """Velocity evaluations of iteration 1. live: how many each update trains; None: all, in one."""
    T, B, chosen, N = 5, 3, seen.rollouts[0][0][7], len(seen.rollouts[0][0][2])
    live = live or [N * len(chosen)]
    if module is tempflow_grpo:  # trunks up to the last branches, each branch from the next step on
        rollout = N * (chosen[-1] + 1) + N * B * sum(T - 1 - k for k in chosen)
    else:
        rollout = N * T
    again = sum(live[1:]) * 3 // 4 if module is gcpo else 0  # the chunks of 3 of 4 steps, for their ratio
    return rollout + passes * sum(live) + again


DRAWN = "all --sde-steps-per-iteration 2"


@pytest.mark.parametrize(
    "module, steps", [(grpo, DRAWN), (gcpo, "1,2"), (tempflow_grpo, DRAWN), (grpo, "all")]
)
def test_velocity_evaluations_are_the_formula(record, monkeypatch, module, steps):
    """As before iteration 1, those of an evaluation are not counted."""
    train_on(monkeypatch, brightness)  # no group is flat
    options = ["--chunk-fraction", 1] if module is gcpo else []
    options += ["--sde-steps", *steps.split()]
    seen = record(module, "--iterations", 1, "--updates-per-iteration", 1, *options)
    assert len(seen.rollouts[0][0][7]) == (4 if steps == "all" else 2)
    assert metrics(seen.folder)[-1]["velocity_evals"] == evaluations(module, seen)


@pytest.mark.parametrize("module", EACH)
def test_what_has_no_advantage_is_left_out_with_the_same_gradient(record, monkeypatch, module):
    """Of four groups two are flat; in a third one two images are average. TempFlow: three flat states."""
    temp = module is tempflow_grpo
    count, N, live = (48, 4, [7, 6]) if temp else (16, 16, [4 * 4, 2 * 4])

    def partly_flat(images, prompts):
        scores = brightness(images)
        if len(scores) == count and temp:
            states = scores.view(4, 4, 3)
            states[1, 0] = states[2, 3] = states[1, 2] = 731.37
            states[0, 3] = torch.tensor([0.0, 1.0, 2.0])  # one branch is average, and the state is trained
        elif len(scores) == count:
            scores[4:8] = scores[12:] = 731.37
            scores[8:12] = torch.tensor([0.0, 1.0, 1.0, 2.0])
        return scores

    train_on(monkeypatch, partly_flat)
    seen = record(module, *OPTIONS, *EACH[module], "--prompts-per-iteration", 2 if temp else 4)
    line, off, losses, beyond = metrics(seen.folder)[1], [], [], []
    assert line["velocity_evals"] == evaluations(module, seen, live)
    for _, part, got in updates(seen, N):
        losses.append(naive_loss(module, seen, part, off))
        assert_gradient(seen, got, losses[-1])
        eps = seen.args.clip_range
        beyond += [(a * (ratio - 1) > a.abs() * eps).item() for a, ratio, _ in terms(module, seen, part)]
    assert any(off)
    if module is grpo:  # averages over what was trained; GCPO counts each step of a chunk, TempFlow weighs
        assert line["loss"] == pytest.approx(sum(losses).item() * 8 * 4 / sum(live), rel=1e-9)
        assert 0 < line["clip_low"] + line["clip_high"] == pytest.approx(sum(beyond) / sum(live), rel=1e-9)
    assert line["zero_std_groups"] == (3 / 16 if temp else 1 / 2)


@pytest.mark.parametrize("module", EACH)
def test_weights_average_and_files_are_those_made_by_hand(record, monkeypatch, module):
    """Clipped gradients, AdamW, the moving average, what is evaluated and saved.

    Iteration 2 is flat: it takes no step, for which Adam's momentum alone would move the weights.
    """
    calls, count = [], 48 if module is tempflow_grpo else 8

    def flat_later(images, prompts):
        calls.append(len(images))
        return torch.ones(count) if len(images) == count and calls.count(count) == 2 else brightness(images)

    train_on(monkeypatch, flat_later)
    options = "--iterations 3 --max-grad-norm 1e-6 --ema-decay 0.2 --ema-every 2 --eval-every 1"
    seen = record(module, *OPTIONS, *EACH[module], *options.split(), "--lora-alpha", 2)
    policy, final = seen.policy, [parameter.detach().clone() for parameter in seen.policy.parameters]
    weights, found, averages = [*(before for before, _ in seen.updates), final], {}, []
    assert len(seen.updates) == 4
    for clip in (True, False):
        mine, average = [torch.nn.Parameter(weight.clone()) for weight in weights[0]], weights[0]
        adam = torch.optim.AdamW(mine, 3e-3, weight_decay=0.0)
        for n, (_, gradient) in enumerate(seen.updates, 1):
            norm = torch.cat([g.flatten() for g in gradient]).norm().item()
            for parameter, g in zip(mine, gradient):
                parameter.grad = g * min(1, 1e-6 / (norm + 1e-6)) if clip else g.clone()
            adam.step()
            found[clip, n] = relative_error(mine, weights[n])
            if n % 2 == 0:
                decay = min(0.2, n / (9 + n))
                average = [decay * a + (1 - decay) * p.detach() for a, p in zip(average, mine)]
                averages += [average] if clip else []
    assert all(found[True, n] < 1e-10 and (n == 1 or found[False, n] > 1e-3) for n in range(1, 5))
    one, two, three = metrics(seen.folder)[1:]
    assert one["grad_norm"] > 1e-5 and two["zero_std_groups"] == 1 and three["ratio_first_error"] < 1e-10
    names = "ratio_mean ratio_min ratio_max ratio_first_error clip_low clip_high approx_kl loss grad_norm"
    assert all(two[name] is None for name in names.split())
    assert two["velocity_evals"] - one["velocity_evals"] == evaluations(module, seen, [0])

    (text,) = policy.encode(common.read_prompts(seen.args.eval_prompts))
    noise, pictures = policy.draw_noise(2, 1, common.generator(0, "evaluation", 0)), []
    for used in (averages[0], averages[0], averages[1], final):
        put_weights(policy, used)
        x = common.ode_sample(policy, noise, text, torch.arange(2), policy.sigmas(2))
        pictures.append(policy.decode(x))
    for iteration, average in enumerate((averages[0], averages[0], averages[1]), 1):
        saved = load_file(seen.folder / "lora" / str(iteration) / "pytorch_lora_weights.safetensors")
        put_weights(policy, average)
        for name, weight in policy.lora().items():
            weight = weight * (2 / 4 if "lora_B" in name else 1)  # alpha / rank
            assert (saved[f"transformer.{name}"] - weight).abs().max() < 1e-7  # averages are float32
    for shown, wanted in zip(seen.images[1:], pictures, strict=False):
        assert (shown - wanted).abs().max() < 1e-6  # pictures are float32
    assert (pictures[3] - pictures[2]).abs().max() > 1e-4 and relative_error(averages[-1], final) > 1e-3
