"""GCPO for flow-matching text-to-image models: GRPO with one ratio per chunk of steps ([GC], arXiv 2510.21583
v3).

    python gcpo.py                        # the bundled tiny model, minutes on a laptop
    python gcpo.py --prompts data.txt     # Stable Diffusion 3.5 Medium with LoRA, on a CUDA GPU

One iteration: sample a group of images for every prompt with the SDE (rollout), score them (reward), compare
each with its group (advantage), and make the chunks of steps of the better ones more probable, those of the
others less (update).

A transition is one random step of the sampler. The notation and the sources in brackets are explained in
common.py, the settings in Args, and the metrics in README.md.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

import common
from common import group_advantage, log_prob, noise_scale, ratio_metrics, sde_mean_std
from rewards import get_reward


@dataclass
class RolloutArgs:
    iterations: int = 210  # rounds of rollout and update
    prompts_per_iteration: int = 16  # P, prompts per rollout
    group_size: int = 16  # G, images per prompt
    steps: int = 10  # T, sampling steps
    sde_steps: str = "early"  # which steps are random and trained: all, early (first half) or 2,3,4
    sde: Literal["flow", "dance", "cps", "precise"] = "flow"  # sampler, how random steps add noise
    noise_level: float = 0.7  # noise level of random steps: a for flow, eta for the others
    guidance: float = 1.0  # classifier-free guidance, off at 1
    shared_noise: bool = False  # one initial noise for a whole group, as in DanceGRPO


# GCPO: how trajectories are cut into chunks, and which chunks are trained
@dataclass
class ChunkArgs:
    chunks: str = "adaptive"  # adaptive, halves (of --sde-steps), or a list of sizes 2,3,4
    chunk_max: int = 4  # largest size of an adaptive chunk
    chunk_fraction: float = 0.5  # fraction of each trajectory's chunks that are trained
    weighted_sampling: bool = False  # prefer chunks that change the latent more (L1rel)
    eval_hybrid: float = 1.0  # fraction of evaluation steps, the first ones, that use the adapter


@dataclass
class UpdateArgs:
    updates_per_iteration: int = 2  # U, optimizer steps per rollout, each on different images
    learning_rate: float = 3e-4  # AdamW learning rate
    clip_range: float = 1e-4  # the ratio is clipped to 1 +- clip_range
    adv_clip: float = 5.0  # advantages are clipped to +- adv_clip
    adv_std: Literal["group", "batch"] = "group"  # whose std divides advantages: each group's or the batch's
    kl_coef: float = 0.0  # beta, coefficient of the KL penalty to the base model, off at 0
    max_grad_norm: float = 1.0  # gradient clipping: larger norms are scaled down to this norm
    ema_decay: float = 0.9  # EMA decay of the adapter's weights, off at 0
    ema_every: int = 8  # optimizer steps between updates of the EMA


@dataclass
class Args(common.RunArgs, common.ModelArgs, RolloutArgs, ChunkArgs, UpdateArgs, common.EvaluationArgs):
    """Train a text-to-image model with GCPO. Example: python gcpo.py --prompts data.txt --reward pickscore"""


# The defaults above are for SD3.5 Medium; these are the differences for other models, as in grpo.py. FLUX.1
# uses the steps, clip range and evaluation steps of [GC], and the LoRA of [DG]. [GC] trains half of the
# chunks; for the tiny model there are two chunks, and both are trained.
DEFAULTS = {
    "tiny": dict(
        iterations=180, prompts_per_iteration=8, group_size=12, micro_batch=48, resolution=32,
        sde="dance", noise_level=3.0, learning_rate=7e-4, clip_range=1e-3, ema_decay=0.97, ema_every=1,
        lora_rank=16, lora_alpha=32.0, eval_every=10, eval_steps=10, eval_seeds=4,
        chunks="halves", chunk_fraction=1.0,
    ),
    "sd3": dict(),
    "flux": dict(
        iterations=160, prompts_per_iteration=8, group_size=12, steps=17, guidance=3.5, clip_range=5e-5,
        ema_decay=0.0, lora_rank=128, lora_alpha=256.0, eval_steps=50, save_every=5,
    ),
    "flux2": dict(iterations=120, prompts_per_iteration=8, group_size=12, eval_steps=50),
}  # fmt: skip


class Rollout(NamedTuple):
    """The transitions of an iteration: N images, K random steps."""

    text: list  # tensors from policy.encode: one row per prompt, then one of the empty prompt
    prompt_index: torch.Tensor  # (N,) which row of text each image uses
    sde: str  # the sampler, as in sde_mean_std
    sigma: torch.Tensor  # (K,) noise level before each random step
    sigma_next: torch.Tensor  # (K,) noise level after the step
    s: torch.Tensor  # (K,) noise scale
    x: torch.Tensor  # (K, N, C, H, W) latents before the step
    x_next: torch.Tensor  # (K, N, C, H, W) latents after the step
    logp: torch.Tensor  # (K, N) log-prob of x_next under the weights that sampled it


@torch.no_grad()
def sample(policy, text, prompt_index, noise, sigmas, s, sde, chosen):
    """Sample images with SDE steps at the chosen steps and ODE steps at the others; keep the transitions.

    text, prompt_index, sde: as in Rollout; noise: 1 + K tensors (N, C, H, W), the initial latents and the
    noise of each chosen step; sigmas: (T + 1,); s: (T - 1,) noise scales; chosen: K steps in rising order.
    Returns the final latents (N, C, H, W) and the Rollout.
    """
    latents = noise[0]
    x, x_next, logp = [], [], []
    for step in common.progress(range(len(sigmas) - 1), "rollout"):
        velocity = policy.velocity_batched(latents, sigmas[step], text, prompt_index)
        if step in chosen:
            mean, std = sde_mean_std(latents, velocity, sigmas[step], sigmas[step + 1], s[step], sde)
            x.append(latents)
            latents = mean + std * noise[1 + chosen.index(step)]
            x_next.append(latents)
            logp.append(log_prob(latents, mean, std))
        else:  # no noise, so no log-prob. The last step is always such an ODE step: noise would stay visible.
            latents = latents - (sigmas[step] - sigmas[step + 1]) * velocity
    before = torch.tensor(chosen)
    rollout = Rollout(
        text=text,
        prompt_index=prompt_index,
        sde=sde,
        sigma=sigmas[before],
        sigma_next=sigmas[before + 1],
        s=s[before],
        x=torch.stack(x),
        x_next=torch.stack(x_next),
        logp=torch.stack(logp),
    )
    return latents, rollout


def transition_logp(policy, rollout, step, image):
    """Log-prob of transitions of the rollout under the current weights.

    step, image: (M,) indices into K and N. Returns logp (M,), and the mean (M, C, H, W) and std (M, 1, 1, 1)
    of the Gaussian.
    """
    x, sigma = rollout.x[step, image], rollout.sigma[step]
    velocity = policy.velocity(x, sigma, rollout.text, rollout.prompt_index[image])
    mean, std = sde_mean_std(x, velocity, sigma, rollout.sigma_next[step], rollout.s[step], rollout.sde)
    return log_prob(rollout.x_next[step, image], mean, std), mean, std


def policy_loss(log_ratio, advantage, clip_range):
    """PPO's clipped loss, to be minimised, shaped like log_ratio = logp - old_logp."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped)


# GCPO: where a trajectory is cut, and which chunks are trained
def parse_chunks(args, sde_steps):
    """--chunks: the sizes of the chunks, or None for adaptive ones."""
    K = len(sde_steps)
    consecutive = sde_steps == list(range(sde_steps[0], sde_steps[0] + K))
    common.require(consecutive, f"--sde-steps {args.sde_steps} must be consecutive: chunks are cut from them")
    if args.chunks == "adaptive":
        return None
    if args.chunks == "halves":
        return [K] if K == 1 else [K // 2, K - K // 2]
    sizes = [int(size) if size.isdecimal() else 0 for size in args.chunks.split(",")]
    wanted = f"adaptive, halves, or a list of sizes that add up to {K}, the number of random steps"
    common.require(min(sizes) > 0 and sum(sizes) == K, f"--chunks {args.chunks} must be {wanted}")
    return sizes


def adaptive_chunks(l1rel, chunk_max, order=1):
    """Sizes of the chunks of consecutive steps whose derivative of L1rel has the same sign, [GC] section 4.3.

    Example: l1rel = 9 8 6 7 9 with chunk_max 3: differences -1 -2 1 2, signs - - - + +, sizes [3, 2].

    l1rel: (n,). Each step takes the sign of the order-th difference that ends at this step. A difference of 0
    (up to rounding) keeps the previous sign; steps without a difference take the first sign. If the sign
    never changes, the chunk is split at its midpoint, rounded down. Chunks of more than chunk_max steps are
    cut again with differences of the next order. This is our interpretation: [GC] gives no chunk_max and no
    rule for the first steps, and its code only has fixed sizes.
    """
    if len(l1rel) <= chunk_max:
        return [len(l1rel)]
    differences = torch.diff(l1rel.double(), order)
    differences[differences.abs() < 1e-5 * l1rel.abs().max()] = 0
    nonzero = differences[differences != 0]
    first_sign = nonzero[0].sign().item() if len(nonzero) > 0 else 0.0
    signs = [first_sign] * order
    for sign in differences.sign().tolist():
        signs.append(signs[-1] if sign == 0 else sign)
    cuts = [i for i in range(1, len(signs)) if signs[i] != signs[i - 1]]
    if not cuts:
        cuts = [len(l1rel) // 2]
    sizes = []
    for piece in l1rel.tensor_split(cuts):
        sizes.extend(adaptive_chunks(piece, chunk_max, order + 1))
    return sizes


def draw_chunks(l1rel, sizes, fraction, weighted, exponentials):
    """Draw chunks of a trajectory without replacement, uniformly or in proportion to mean L1rel [GC] eq. 17.

    l1rel: (K,); sizes: chunk sizes; exponentials: (K,) random numbers, Exp(1). The largest of weight / Exp(1)
    is chunk j with a probability proportional to its weight, and the `count` largest are draws without
    replacement (torch.multinomial does the same). Returns chunk_average (K, K): 1 / size if two steps are in
    the same drawn chunk, else 0.
    """
    weight = torch.ones(len(sizes))
    if weighted:
        weight = torch.stack([piece.mean() for piece in l1rel.split(sizes)])
    count = max(1, int(fraction * len(sizes) + 0.5))  # half of 5 is 3
    drawn = (weight / exponentials[: len(sizes)]).topk(count).indices.tolist()
    blocks = []
    for j, n in enumerate(sizes):
        average = 1 / n if j in drawn else 0.0
        blocks.append(torch.full((n, n), average))
    return torch.block_diag(*blocks)


def chunk_log_ratio(logp, new_logp, old_logp, chunk_average, step, image):
    """Log-ratio of the chunk of each of M transitions: the mean log-ratio over the chunk's steps, (M,).

    logp: (M,) with a gradient; new_logp, old_logp: (K, N) log-probs of all transitions under the current
    weights and at the rollout, without gradient; chunk_average: (N, K, K); step, image: (M,) indices.

    Only the transition's own log-prob has a gradient; the other steps of its chunk are constants. That is
    enough: the derivative of the ratio by the log-prob of each of n steps is ratio / n. So the losses of a
    chunk's steps together have the gradient of the whole chunk's loss, with the memory of a single step.
    While the ratio is 1, each step of an n-step chunk has the factor 1 / (J n) if J chunks are drawn.
    """
    difference = (new_logp - old_logp).T[image]  # (M, K)
    average = chunk_average[image, step]  # (M, K) 1 / size for the steps of the chunk
    log_ratio = (average * difference).sum(1)
    own = chunk_average[image, step, step]  # (M,) 1 / size
    return log_ratio + own * (logp - logp.detach())  # adds 0, with the gradient


def chunk_metrics(l1rel, chunks):
    """By step: the mean of L1rel, and the share of images that are cut before it.

    l1rel: (N, K), chunks: N lists of sizes.
    """
    cut = torch.zeros_like(l1rel)
    for n, sizes in enumerate(chunks):
        starts = torch.tensor(sizes).cumsum(0)[:-1]  # the first step of each chunk but the first
        cut[n, starts] = 1
    l1rel, cut = common.gather(l1rel).mean(0), common.gather(cut).mean(0)
    return {"l1rel_by_step": l1rel.tolist(), "chunk_cuts": cut.tolist()}


def update(policy, optimizer, args, rollout, chunk_average, advantage, images, stats, on_policy):
    """One optimizer step on the drawn chunks of some images. Returns whether there was anything to learn.

    chunk_average: (N, K, K), advantage: (N,) and images: (n,) which images, all on the CPU; on_policy:
    whether the weights are still those of the rollout.
    """
    live = images
    if args.kl_coef == 0:  # an image with advantage 0 has no gradient then, so it can be skipped
        live = images[advantage[images] != 0]
    nothing_to_learn = common.total(len(live)) == 0  # in all processes
    if nothing_to_learn:  # a step would still move the weights, by Adam's momentum
        return False
    # GCPO: the steps of drawn chunks
    inverse_size = chunk_average.diagonal(dim1=1, dim2=2)  # (N, K) of a step's chunk; 0 if it was not drawn
    step, column = inverse_size[live].T.nonzero(as_tuple=True)  # sorted by step; column: of live
    image = live[column]
    chunks_drawn = inverse_size.sum(1).round().to(policy.device)  # (N,) n steps of 1 / n, up to rounding
    # GCPO: a ratio needs the current log-probs of the whole chunk. In the first update they equal those of
    # the rollout; later updates compute them with an extra forward pass, except for chunks of one step.
    new_logp = rollout.logp.clone()
    if not on_policy:
        several = inverse_size[image, step] < 1  # steps of chunks of several steps
        with torch.no_grad():
            for mb_step, mb_image in policy.micro_batches(step[several], image[several]):
                logp, _, _ = transition_logp(policy, rollout, mb_step, mb_image)
                new_logp[mb_step, mb_image] = logp
    chunk_average, advantage = chunk_average.to(policy.device), advantage.to(policy.device)
    for mb_step, mb_image in policy.micro_batches(step, image):
        logp, mean, std = transition_logp(policy, rollout, mb_step, mb_image)
        # In the first update the ratio is exactly 1: no weight has changed since the rollout, and the network
        # is always called with one shape (Policy.velocity). The loss is then -A, but its gradient is not 0:
        # it is -A * grad logp. If this ratio is not 1, rollout and training disagree; later ratios are wrong.
        # GCPO: the ratio of the chunk. new_logp takes the value just computed, so that a difference between
        # rollout and training shows in the ratio.
        new_logp[mb_step, mb_image] = logp.detach()
        log_ratio = chunk_log_ratio(logp, new_logp, rollout.logp, chunk_average, mb_step, mb_image)
        if on_policy:
            stats.add(ratio_first_error=(log_ratio.exp() - 1).abs())
        mb_advantage = advantage[mb_image]
        loss = policy_loss(log_ratio, mb_advantage, args.clip_range)  # (M,)
        if args.kl_coef > 0:
            with policy.reference():
                _, mean_ref, _ = transition_logp(policy, rollout, mb_step, mb_image)
            kl = common.gaussian_kl(mean, mean_ref, std)  # (M,)
            stats.add(kl_ref=kl)
            kl = kl * chunk_average[mb_image, mb_step, mb_step]  # GCPO: 1 / size, for the mean over a chunk
            loss = loss + args.kl_coef * kl
        # GCPO: the mean over drawn chunks and over the update's images: skipped images count as zeros
        policy.backward((loss / chunks_drawn[mb_image]).sum() / len(images))
        # GCPO: logged once per step, so long chunks count more in these means
        stats.add(loss=loss, **ratio_metrics(log_ratio, mb_advantage, args.clip_range))
    grad_norm = policy.clip_gradients(args.max_grad_norm)
    optimizer.step()
    policy.update_ema()
    optimizer.zero_grad(set_to_none=False)  # a process without a share in a step adds zeros
    stats.add(grad_norm=grad_norm)
    return True


def main(args):
    P, G, U = args.prompts_per_iteration, args.group_size, args.updates_per_iteration
    N = common.split_batch(args, G, group=G)  # images per iteration on this process
    sde_steps, K = common.parse_sde_steps(args)  # GCPO: an iteration uses all K of them
    sizes = parse_chunks(args, sde_steps)
    reward, eval_reward = common.load_rewards(args, get_reward)
    policy = common.make_policy(args, trajectories=N)
    # Adam's default eps is as large as SD3's gradients, so it about halves the updates, as in published code
    optimizer = torch.optim.AdamW(policy.parameters, args.learning_rate, weight_decay=0.0)
    sigmas = policy.sigmas(args.steps)
    s = noise_scale(sigmas, args.sde, args.noise_level)  # (T - 1,)
    prompt_index = torch.arange(N, device=policy.device) // G  # (N,) the prompt of each image
    common.print_plan(args, sigmas, s, sde_steps, f"{P} prompts x {G} = {P * G} images")

    run = common.Run(args, policy, optimizer, reward, eval_reward, trajectories=N)
    if not run.lines:  # a new run: evaluate the base model
        run.record({"iteration": 0} | run.evaluate(0, args.eval_hybrid))
    for iteration in run.remaining():
        # Only random steps have a probability, so only they can be made more probable.
        run.phase("rollout")
        prompts, text = run.text(iteration)
        chosen = sde_steps  # GCPO: chunks are cut from all of them
        generator = common.generator(args.seed, "noise", iteration)
        noise = [policy.draw_noise(P, G, generator) for _ in range(1 + K)]
        if args.shared_noise:
            noise[0] = noise[0][::G].repeat_interleave(G, dim=0)
        latents, rollout = sample(policy, text, prompt_index, noise, sigmas, s, args.sde, chosen)

        # Prompts differ in difficulty, so an image is compared with the mean of its own prompt's images.
        run.phase("reward")
        captions = [prompts[n] for n in prompt_index.tolist()]
        rewards, parts = common.score(policy, reward, latents, captions)
        batch_std = None  # each group has its own
        if args.adv_std == "batch":
            batch_std = common.gather(rewards).std(correction=0)
        advantage, zero_std_groups = group_advantage(rewards.view(-1, G), batch_std, args.adv_clip)
        advantage = advantage.flatten()  # (N,)

        # GCPO: the relative change of the latent in each step, the chunks, and which chunks are trained
        change = (rollout.x_next - rollout.x).flatten(2).norm(p=1, dim=2)
        l1rel = (change / rollout.x.flatten(2).norm(p=1, dim=2)).T.cpu()  # (N, K)
        generator = common.generator(args.seed, "chunks", iteration)
        exponentials = torch.empty(P, G, K).exponential_(generator=generator)
        exponentials = common.my_rows(exponentials).flatten(0, 1)  # (N, K)
        chunks, chunk_average = [], []
        for n in range(N):
            own_sizes = sizes or adaptive_chunks(l1rel[n], args.chunk_max)
            average = draw_chunks(
                l1rel[n], own_sizes, args.chunk_fraction, args.weighted_sampling, exponentials[n]
            )
            chunks.append(own_sizes)
            chunk_average.append(average)
        chunk_average = torch.stack(chunk_average)  # (N, K, K)

        # From the second update on, the weights differ from those of the rollout. The ratio corrects for it,
        # and clipping keeps the difference small.
        run.phase("train")
        stats, on_policy = common.Stats(), True
        for images in torch.arange(N).view(U, -1):
            stepped = update(
                policy, optimizer, args, rollout, chunk_average, advantage, images, stats, on_policy
            )
            on_policy = on_policy and not stepped
        del noise, latents, rollout  # the next rollout needs the memory

        metrics = {"iteration": iteration} | stats.metrics()
        metrics |= common.reward_metrics(rewards, parts, G, zero_std_groups)
        metrics |= chunk_metrics(l1rel, chunks)
        if iteration % args.eval_every == 0 or iteration == args.iterations:
            metrics |= run.evaluate(iteration, args.eval_hybrid)
        run.record(metrics)
    run.summary()


if __name__ == "__main__":
    common.run_script("gcpo", main, Args, DEFAULTS)
