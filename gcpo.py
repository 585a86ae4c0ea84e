"""GCPO for flow-matching text-to-image models: GRPO with one ratio a chunk of steps ([GC], arXiv 2510.21583 v3).

    python gcpo.py                        # the bundled tiny model, minutes on a laptop
    python gcpo.py --prompts data.txt     # Stable Diffusion 3.5 Medium with LoRA, on a CUDA GPU

One iteration: sample a group of images for every prompt with the SDE (rollout), score them (reward), compare each with
its group (advantage), and raise the probability of the chunks of steps that led to the better ones (update).

A transition is one random step of the sampler. Notation: common.py. Sources in brackets, settings, metrics: README.md.
"""

from dataclasses import dataclass

import common
from common import DTYPES, group_advantage, log_prob, noise_scale, option, sde_mean_std
from rewards import get_reward

import torch


@dataclass
class Args:
    """The command line. What is None depends on the model: DEFAULTS, below."""

    prompts: str | None = option(None, "text file, one prompt a line; default: the tiny model's", group="run")
    model: str | None = option(None, "repository or folder; default: SD3.5 Medium with --prompts on CUDA, else tiny")
    reward: str | None = option(None, "name or weighted sum; default: shapes for tiny, else pickscore")
    output: str | None = option(None, "run folder; default: runs/SCRIPT-MODEL-SEED-TIME")
    resume: str | None = option(None, "run folder to go on with, with its settings and random state")
    seed: int = option(0, "everything random follows from it", high=2**31 - 1)
    iterations: int | None = option(None, "rollout-and-update rounds", low=1)
    prompts_per_iteration: int | None = option(None, "P, prompts a rollout", low=1, group="batch")
    group_size: int | None = option(None, "G, images a prompt", low=2)
    updates_per_iteration: int = option(2, "U, optimizer steps a rollout, each on its share of the images", low=1)
    micro_batch: int | None = option(None, "M, latents in one forward; fewer take less memory and more time", low=1)
    steps: int | None = option(None, "T, sampling steps", low=2, high=1000, group="rollout")
    sde_steps: str | None = option(None, "random steps: all, early (first half), or a list without gaps 0,1,2")
    sde: str = option("flow", "the random step: Flow-GRPO's, DanceGRPO's, Flow-CPS's", choices=("flow", "dance", "cps"))
    noise_level: float | None = option(None, "a or eta of --sde; dance 0.3, cps 0.8, flow by model", low=1e-6, high=10)
    guidance: float | None = option(None, "classifier-free guidance, off at 1", high=100)
    resolution: int | None = option(None, "pixels a side", low=8, high=8192)
    shared_noise: bool = option(False, "one initial noise for a whole group, as in DanceGRPO")
    learning_rate: float | None = option(None, "of AdamW", low=1e-12, high=10, group="update")
    clip_range: float | None = option(None, "c, the ratio is clipped to 1 +- c", low=1e-12, high=1)
    adv_clip: float = option(5.0, "advantages are clipped to +- this", low=1e-6)
    adv_std: str = option("group", "divide the advantage by the std of: group, batch", choices=("group", "batch"))
    kl_coef: float = option(0.0, "beta, weight of the KL to the base model; 0 saves its forward passes")
    max_grad_norm: float = option(1.0, "the gradient's norm is clipped to this", low=1e-12)
    ema_decay: float | None = option(None, "decay of the adapter's moving average, off at 0", high=0.999999)
    # GCPO: what is a chunk, and which of them are trained
    chunks: str | None = option(None, "adaptive, or sizes that add up to the random steps: 2,3", group="chunks")
    chunk_max: int = option(4, "size of the longest adaptive chunk; [GC] gives no number", low=1, high=1000)
    chunk_fraction: float | None = option(None, "share of a trajectory's chunks that is trained", low=1e-6, high=1)
    weighted_sampling: bool = option(False, "draw chunks by their mean L1rel, not uniformly")
    eval_hybrid: float = option(1.0, "share of evaluation steps with the adapter, from the first", low=1e-6, high=1)
    lora_rank: int | None = option(None, "of the adapter", low=1, high=4096, group="model")
    lora_alpha: float | None = option(None, "of the adapter, which is scaled by alpha / rank", low=1e-6)
    dtype: str | None = option(None, "of frozen weights; default: bfloat16 on CUDA, else float32", choices=[*DTYPES])
    device: str | None = option(None, "default: cuda if there is one, else cpu")
    gradient_checkpointing: bool = option(False, "less memory in training, a third more time")
    compile: bool = option(False, "torch.compile the transformer's blocks; sampling then takes training's memory")
    eval_prompts: str | None = option(None, "default: held-out ones for tiny's own, else --prompts", group="evaluation")
    eval_every: int | None = option(None, "iterations between evaluations", low=1)
    eval_steps: int | None = option(None, "ODE steps of an evaluation", low=1, high=1000)
    eval_seeds: int | None = option(None, "images a prompt in an evaluation", low=1, high=10000)
    eval_reward: str | None = option(None, "other rewards, for eval/<name> at evaluations; not trained")
    reward_offload: bool = option(False, "move reward models to the CPU while they are not used")
    save_every: int = option(10, "iterations between checkpoints", low=1)
    wandb: str | None = option(None, "project to log to as well; needs the package wandb")


# Settings that depend on the model, as in grpo.py; FLUX.1 has steps, noise, clip range and evaluation of [GC], and the
# LoRA of [DG]. [GC] trains half of the chunks; tiny trains both that it has.
SD3 = dict(
    iterations=210, prompts_per_iteration=16, group_size=16, micro_batch=3,
    steps=10, sde_steps="early", guidance=1.0, resolution=512, noise_level=0.7,
    learning_rate=3e-4, clip_range=1e-4, ema_decay=0.9, lora_rank=32, lora_alpha=64.0,
    chunks="adaptive", chunk_fraction=0.5, eval_every=30, eval_steps=40, eval_seeds=1,
)  # fmt: skip
DEFAULTS = {
    "tiny": dict(
        iterations=180, prompts_per_iteration=8, group_size=12, micro_batch=48,
        steps=10, sde_steps="early", guidance=1.0, resolution=32, noise_level=0.7,
        learning_rate=7e-4, clip_range=1e-3, ema_decay=0.97, lora_rank=16, lora_alpha=32.0,
        chunks="2,3", chunk_fraction=1.0, eval_every=10, eval_steps=10, eval_seeds=4,
    ),
    "sd3": SD3,
    "flux": SD3 | dict(
        iterations=160, prompts_per_iteration=8, group_size=12, micro_batch=2, steps=17, guidance=3.5,
        clip_range=5e-5, ema_decay=0.0, lora_rank=128, lora_alpha=256.0, eval_steps=50
    ),
    "flux2": SD3 | dict(iterations=120, prompts_per_iteration=8, group_size=12, micro_batch=1, eval_steps=50),
}  # fmt: skip


@torch.no_grad()
def rollout(policy, text, owner, noise, sigmas, s, sde, chosen, progress=lambda steps, label: steps):
    """Sample images, with the SDE at the chosen steps and the ODE at all others, and keep the random transitions.

    text: from policy.encode; owner: (N,) the row of text of each image; noise: T draws (N, C, H, W), the first is the
    initial latent; sigmas: (T + 1,); s: (T - 1,) noise scales; sde: of sde_mean_std; chosen: K steps in rising order;
    progress: puts a bar around the steps. Returns x and x_next (K, N, C, H, W), the states before and after each random
    transition, its logp (K, N) under the policy that made it, and the final latents (N, C, H, W).
    """
    latents, x, x_next, logp = noise[0], [], [], []
    for step in progress(range(len(sigmas) - 1), "rollout"):
        velocity = policy.velocity_in_micro_batches(latents, sigmas[step], text, owner)
        if step in chosen:
            mean, std = sde_mean_std(latents, velocity, sigmas[step], sigmas[step + 1], s[step], sde)
            x.append(latents)
            x_next.append(mean + std * noise[step + 1])
            logp.append(log_prob(x_next[-1], mean, std))
            latents = x_next[-1]
        else:  # the ODE's: no noise, no log-prob, never trained; the last step always is one, so that no noise remains
            latents = latents - (sigmas[step] - sigmas[step + 1]) * velocity
    return torch.stack(x), torch.stack(x_next), torch.stack(logp), latents


def transition_logp(policy, text, owner, levels, sde, x, x_next, step, image):
    """Log-prob of stored transitions under the policy as it is now.

    text, owner, sde: as in rollout; levels: sigma, sigma_next and s, (K,) each; x, x_next: (K, N, C, H, W) states
    before and after each transition; step, image: (M,) which transitions. Returns logp (M,), and the Gaussian's mean
    (M, C, H, W) and std (M, 1, 1, 1).
    """
    sigma, sigma_next, scale = (level[step] for level in levels)
    velocity = policy.velocity(x[step, image], sigma, text, owner[image])
    mean, std = sde_mean_std(x[step, image], velocity, sigma, sigma_next, scale, sde)
    return log_prob(x_next[step, image], mean, std), mean, std


# GCPO: where a trajectory is cut, and which chunks are trained
def parse_chunks(args, sde_steps, drawn):
    """--chunks: None for adaptive, or the list of sizes, which must add up to the random steps: consecutive ones."""
    K = len(sde_steps)
    if drawn != K or sde_steps[-1] - sde_steps[0] != K - 1:
        raise common.StopRun(f"--sde-steps {args.sde_steps} must be consecutive steps here, which chunks are cut of")
    if args.chunks == "adaptive":
        return None
    sizes = [int(size) if size.isdecimal() else 0 for size in args.chunks.split(",")]
    if min(sizes) < 1 or sum(sizes) != K:
        wanted = f"a list of sizes from 1 on, which must add up to {K}"
        raise common.StopRun(f"--chunks {args.chunks} is neither adaptive nor {wanted}, the random steps")
    return sizes


def adaptive_chunks(l1rel, longest, order=1):
    """Sizes of the chunks of consecutive steps whose derivative of L1rel has the same sign, [GC] section 4.3.

    l1rel: (n,) tensor. A step has the sign of the order-th difference that ends at it; a zero (up to rounding) keeps
    the sign before, the first steps take the first sign there is. A sign that never changes splits at the midpoint,
    rounded down. Chunks of more than `longest` are cut again, by the next order. ([GC] does not say what holds at the
    edges, and has no `longest`; its code has fixed sizes only.)
    Example: 9 8 6 7 9, longest 3: differences -1 -2 1 2, signs - - - + +, sizes [3, 2].
    """
    if len(l1rel) <= longest:
        return [len(l1rel)]
    differences = torch.diff(l1rel.double(), order)
    differences[differences.abs() < 1e-5 * l1rel.abs().max()] = 0
    signs = [next(filter(None, differences.sign().tolist()), 0.0)] * order
    for sign in differences.sign().tolist():
        signs.append(sign or signs[-1])
    cuts = [i for i in range(1, len(signs)) if signs[i] != signs[i - 1]] or [len(l1rel) // 2]
    return sum((adaptive_chunks(piece, longest, order + 1) for piece in l1rel.tensor_split(cuts)), [])


def draw_chunks(l1rel, sizes, fraction, weighted, dice):
    """Draw chunks of a trajectory without replacement, uniformly or by their mean L1rel [GC] eq. 17.

    l1rel: (K,); sizes: of its chunks; dice: (K,) exponential numbers, one a chunk. Drawn are the chunks with the
    largest weight / number, as torch.multinomial does it.
    Returns (K, K): 1 / size where two steps share a drawn chunk, else 0.
    """
    weight = torch.stack([piece.mean() if weighted else torch.ones(()) for piece in l1rel.split(sizes)])
    drawn = (weight / dice[: len(sizes)]).topk(max(1, int(fraction * len(sizes) + 0.5))).indices.tolist()
    return torch.block_diag(*(torch.full((n, n), (j in drawn) / n) for j, n in enumerate(sizes)))


def chunk_metrics(l1rel, chunks, group_size):
    """What the chunks were. l1rel: (N, K), chunks: N lists of sizes.

    chunk_cuts: share of trajectories with a cut before each step. l1rel_prompt_share: share of the variance of L1rel
    that lies between prompts, 1 / group_size by chance if the curve does not depend on them.
    """
    cut = torch.zeros_like(l1rel)
    for row, sizes in zip(cut, chunks):
        row[torch.tensor(sizes).cumsum(0)[:-1]] = 1
    l1rel, cut = (common.gather(rows.unflatten(0, (-1, group_size))) for rows in (l1rel, cut))  # (P, G, K)
    between = l1rel.mean(1).var(0, correction=0) / l1rel.var((0, 1), correction=0)
    curve, cuts = l1rel.mean((0, 1)).tolist(), cut.mean((0, 1)).tolist()
    return {"l1rel_by_step": curve, "chunk_cuts": cuts, "l1rel_prompt_share": between.tolist()}


def main(args):
    P, G, U = args.prompts_per_iteration, args.group_size, args.updates_per_iteration
    N = common.split_batch(args, G)  # images an iteration
    sde_steps, drawn = common.parse_sde_steps(args)
    sizes = parse_chunks(args, sde_steps, drawn)  # GCPO
    reward, eval_reward = common.load_rewards(args, get_reward)
    prompts = common.read_prompts(args.prompts)

    policy = common.make_policy(args, trajectories=N)
    # eps stays 1e-8, as in published code: it is of the size of SD3's gradients, and halves the updates (README.md)
    optimizer = torch.optim.AdamW(policy.parameters, args.learning_rate, weight_decay=0.0)
    sigmas = policy.sigmas(args.steps)
    s = noise_scale(sigmas, args.sde, args.noise_level)  # (T - 1,)
    all_levels = sigmas[:-2], sigmas[1:-1], s
    owner = torch.arange(N, device=policy.store) // G  # (N,) the prompt of each image
    common.print_plan(args, N, sigmas, s, sde_steps)

    with common.Run(args, policy, optimizer, reward, eval_reward) as run:
        for iteration in run.iterations():
            # rollout
            with run.phase("rollout"):
                batch = common.share(common.iteration_prompts(prompts, P, iteration, args.seed))
                text = policy.encode(batch)
                chosen = common.iteration_steps(sde_steps, drawn, iteration, args.seed)  # K steps
                levels = [level[chosen] for level in all_levels]  # sigma, sigma_next, s: (K,)
                generator = common.generator(args.seed, "noise", iteration)
                noise = [policy.noise(P, G, generator) for _ in range(args.steps)]
                if args.shared_noise:
                    noise[0] = noise[0][owner * G]
                sampled = rollout(policy, text, owner, noise, sigmas, s, args.sde, chosen, run.progress)
                x, x_next, old_logp, latents = sampled
                # GCPO: how much each step changes the latent, where that cuts it, and which chunks are trained
                l1rel = ((x_next - x).flatten(2).norm(1, 2) / x.flatten(2).norm(1, 2)).T.cpu()  # (N, K)
                chunks = [sizes or adaptive_chunks(curve, args.chunk_max) for curve in l1rel]
                dice = common.share(torch.empty(P, G, len(x)).exponential_(generator=generator)).flatten(0, 1)
                options = args.chunk_fraction, args.weighted_sampling
                mates = [draw_chunks(*one, *options, numbers) for *one, numbers in zip(l1rel, chunks, dice)]
                mates = torch.stack(mates).to(x.device)  # (N, K, K) 1 / size where two steps share a drawn chunk
                own = mates.diagonal(dim1=1, dim2=2)  # (N, K) 1 / size of a step's chunk, 0 if it is not trained
                count = own.sum(1).round()  # (N,) chunks trained

            # reward
            with run.phase("reward"):
                captions = [batch[n] for n in owner.tolist()]
                rewards, parts = common.score(policy, reward, latents, captions)

            # advantage
            advantage, zero_std_groups = group_advantage(rewards.view(-1, G), args.adv_std, args.adv_clip)
            advantage = advantage.flatten().to(x.device)  # (N,)

            # update
            stats = common.Stats()
            with run.phase("train"):
                for update, part in enumerate(torch.arange(N, device=x.device).view(U, -1)):
                    # GCPO: steps of drawn chunks. A ratio needs the log-probs of the whole chunk as they are now: in
                    # the first update the old ones; later they take a forward, but not for a chunk of one.
                    step, image = own[part].T.nonzero().T
                    image, new_logp = part[image], old_logp.clone()
                    others = (own[image, step] < 1).nonzero()[:, 0] if update > 0 else step[:0]
                    for mb in filter(len, others.split(policy.micro_batch)):
                        with torch.no_grad():
                            now = transition_logp(policy, text, owner, levels, args.sde, x, x_next, step[mb], image[mb])
                        new_logp[step[mb], image[mb]] = now[0]
                    micro_batches = list(zip(step.split(policy.micro_batch), image.split(policy.micro_batch)))
                    for mb_step, mb_image in run.progress(micro_batches, "update"):
                        transitions = (text, owner, levels, args.sde, x, x_next, mb_step, mb_image)
                        logp, mean, std = transition_logp(policy, *transitions)
                        # In the first update the ratio is 1, exactly: no weight has changed since the rollout, and
                        # policy.velocity gives every batch one shape. The loss's gradient is not 0 but -A * grad log p.
                        # Another ratio here means that rollout and training disagree: later ratios are wrong as well.
                        log_ratio = logp - old_logp[mb_step, mb_image]
                        if update == 0:
                            stats.add(first_log_ratio=log_ratio, first_step=mb_step)
                        mb_advantage = advantage[mb_image]
                        # GCPO: the chunk's ratio, a geometric mean. Only this step's log-prob is live in it: the sum
                        # over steps is the whole gradient, and memory does not grow with the chunk. At ratio 1 a step
                        # weighs 1 / (J size), J chunks drawn: of [2, 3, 4, 7] the first two 3.5 times the last seven.
                        new_logp[mb_step, mb_image] = logp.detach()
                        log_ratios = (new_logp - old_logp)[:, mb_image].T  # (M, K) of all steps, as numbers
                        log_ratio = (mates[mb_image, mb_step] * log_ratios).sum(1)
                        log_ratio = log_ratio + own[mb_image, mb_step] * (logp - logp.detach())  # 0, with a gradient
                        ratio = log_ratio.exp()
                        clipped = ratio.clamp(1 - args.clip_range, 1 + args.clip_range)
                        loss = torch.maximum(-mb_advantage * ratio, -mb_advantage * clipped)  # (M,)
                        if args.kl_coef > 0:  # divided by the sampler's own variance; [FG] leaves Delta out
                            with policy.reference():
                                _, mean_ref, _ = transition_logp(policy, *transitions)
                            kl = ((mean - mean_ref) ** 2 / (2 * std**2)).flatten(1).mean(1)
                            loss = loss + args.kl_coef * kl * own[mb_image, mb_step]  # GCPO: the chunk's mean
                            stats.add(kl_ref=kl)
                        policy.backward((loss / count[mb_image]).sum() / len(part))  # GCPO: mean of chunks, then images
                        stats.add(loss=loss, log_ratio=log_ratio, advantage=mb_advantage)
                    grad_norm = policy.clip_gradients(args.max_grad_norm)
                    if run.can_step(grad_norm):
                        optimizer.step()
                        policy.update_average()
                    optimizer.zero_grad()
                    stats.add(grad_norm=grad_norm)

            # log
            chunk_stats = chunk_metrics(l1rel, chunks, G)  # GCPO
            run.log(iteration, rewards, parts, zero_std_groups, stats, **chunk_stats)


if __name__ == "__main__":
    common.run_script(main, Args, DEFAULTS)
