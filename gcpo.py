"""GCPO for flow-matching text-to-image models: GRPO with one ratio a chunk of steps ([GC], arXiv 2510.21583 v3).

    python gcpo.py                        # the bundled tiny model, minutes on a laptop
    python gcpo.py --prompts data.txt     # Stable Diffusion 3.5 Medium with LoRA, on a CUDA GPU

One iteration: sample a group of images for every prompt with the SDE (rollout), score them (reward), compare each with
its group (advantage), and raise the probability of the chunks of steps that led to the better ones (update).

A transition is one random step of the sampler. Notation: common.py. Sources in brackets, settings, metrics: README.md.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from transformers.hf_argparser import HfArg

import common
from common import group_advantage, log_prob, noise_scale, sde_mean_std
from rewards import get_reward


@dataclass
class Args:
    prompts: str | None = HfArg(default=None, help="text file, one prompt a line; default: the tiny model's")
    model: str | None = HfArg(default=None, help="diffusers repository or folder; default: SD3.5-Medium or tiny")
    reward: str | None = HfArg(default=None, help="name or weighted sum; default: shapes for tiny, else pickscore")
    output: str | None = HfArg(default=None, help="run folder; default: runs/<script>-<model>-<seed>-<time>")
    resume: str | None = HfArg(default=None, help="run folder to go on with, with its settings and random state")
    seed: int = HfArg(default=0, help="everything random follows from it")
    iterations: int | None = HfArg(default=None, help="rollout-and-update rounds; default: by model")
    # batch: all of it
    prompts_per_iteration: int | None = HfArg(default=None, help="P; default: by model")
    group_size: int | None = HfArg(default=None, help="G, images a prompt; default: by model")
    updates_per_iteration: int = HfArg(default=2, help="U, optimizer steps a rollout, each on its share of the images")
    micro_batch: int | None = HfArg(default=None, help="M, latents in one forward: time for memory; default: by model")
    # rollout
    steps: int | None = HfArg(default=None, help="T, sampling steps; default: by model")
    guidance: float | None = HfArg(default=None, help="classifier-free guidance, off at 1; default: by model")
    resolution: int | None = HfArg(default=None, help="pixels a side; default: by model")
    noise_level: float | None = HfArg(
        default=None, help="a of flow, eta of dance; default: 0.3 for dance, else by model"
    )
    sde: Literal["flow", "dance"] = HfArg(default="flow", help="noise scale of the steps: Flow-GRPO's or DanceGRPO's")
    shared_noise: bool = HfArg(default=False, help="one initial noise for a whole group, as DanceGRPO has it")
    # update
    learning_rate: float | None = HfArg(default=None, help="of AdamW; default: by model")
    clip_range: float | None = HfArg(default=None, help="c, the ratio is clipped to 1 +- c; default: by model")
    adv_clip: float = HfArg(default=5.0, help="largest advantage")
    adv_std: Literal["group", "batch"] = HfArg(default="group", help="what the advantage is divided by")
    kl_coef: float = HfArg(default=0.0, help="beta, weight of the KL to the base model; 0 saves its forward passes")
    max_grad_norm: float = HfArg(default=1.0, help="gradient norm is clipped to this")
    ema_decay: float | None = HfArg(default=None, help="moving average of the adapter, off at 0; default: by model")
    # GCPO: what is a chunk, and which of them are trained
    chunks: str = HfArg(default="adaptive", help="adaptive, or the sizes, which add up to T - 1: 2,3,4")
    chunk_max: int = HfArg(default=4, help="adaptive chunks are cut until no longer; [GC] gives no number")
    chunk_fraction: float = HfArg(default=0.5, help="share of a trajectory's chunks that is trained, at least one")
    weighted_sampling: bool = HfArg(default=False, help="draw chunks by their mean L1rel, not uniformly")
    eval_hybrid: float = HfArg(default=1.0, help="evaluate with the adapter in this first share of steps; [GC]: 0.6")
    # model
    lora_rank: int | None = HfArg(default=None, help="default: by model")
    lora_alpha: float | None = HfArg(default=None, help="default: by model")
    dtype: Literal["float32", "bfloat16", "float16"] | None = HfArg(
        default=None, help="of the frozen weights; default: bfloat16 on CUDA, float32 for tiny and on a CPU"
    )
    device: str | None = HfArg(default=None, help="default: cuda if there is one, else cpu")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory in training, a third more time")
    compile: bool = HfArg(default=False, help="torch.compile the transformer's blocks")
    # evaluation and saving
    eval_prompts: str | None = HfArg(default=None, help="text file; default: --prompts, held-out ones for tiny's own")
    eval_every: int | None = HfArg(default=None, help="iterations between evaluations; default: by model")
    eval_steps: int | None = HfArg(default=None, help="ODE steps of an evaluation; default: by model")
    eval_seeds: int | None = HfArg(default=None, help="images a prompt in an evaluation; default: by model")
    eval_reward: str | None = HfArg(default=None, help="held-out rewards to log beside the trained one")
    reward_offload: bool = HfArg(default=False, help="move reward models to the CPU while they are not used")
    save_every: int = HfArg(default=10, help="iterations between checkpoints")
    wandb: str | None = HfArg(default=None, help="project to log to as well")


# Settings that depend on the model: [FG]'s for SD3; for tiny what tuning found (README.md). micro_batch: as many as
# fit in training without --gradient-checkpointing, by count (tests/bench.py): SD3 and FLUX.2 in 24 GB.
DEFAULTS = {
    "tiny": dict(
        iterations=80, prompts_per_iteration=8, group_size=12,
        micro_batch=48, steps=10, guidance=1.0, resolution=32, noise_level=0.7,
        learning_rate=2e-3, clip_range=1e-3, ema_decay=0.0, lora_rank=16, lora_alpha=32.0,
        eval_every=10, eval_steps=10, eval_seeds=4,
    ),
    "sd3": dict(
        iterations=1000, prompts_per_iteration=48, group_size=24,
        micro_batch=2, steps=10, guidance=4.5, resolution=512, noise_level=0.7,
        learning_rate=3e-4, clip_range=1e-4, ema_decay=0.9, lora_rank=32, lora_alpha=64.0,
        eval_every=30, eval_steps=40, eval_seeds=1,
    ),
    "flux": dict(  # [GC]'s for FLUX.1-dev, which has --shared-noise and trains all weights; LoRA as [DG]
        iterations=150, prompts_per_iteration=24, group_size=12,
        micro_batch=1, steps=17, guidance=3.5, resolution=720, noise_level=0.7,
        learning_rate=3e-4, clip_range=5e-5, ema_decay=0.0, lora_rank=128, lora_alpha=256.0,
        eval_every=30, eval_steps=50, eval_seeds=1,
    ),
    "flux2": dict(  # in no paper: as SD3, with the pipeline's own guidance and evaluation steps
        iterations=1000, prompts_per_iteration=48, group_size=24,
        micro_batch=1, steps=10, guidance=4.0, resolution=512, noise_level=0.7,
        learning_rate=3e-4, clip_range=1e-4, ema_decay=0.9, lora_rank=32, lora_alpha=64.0,
        eval_every=30, eval_steps=50, eval_seeds=1,
    ),
}  # fmt: skip


@torch.no_grad()
def rollout(policy, text, owner, noise, sigmas, s, progress=lambda steps: steps):
    """Sample images with the SDE and keep the way there.

    text: from policy.encode; owner: (N,) the row of text of each image; noise: T draws (N, C, H, W), the first is the
    initial latent; sigmas: (T + 1,); s: (T - 1,) noise scales; progress: puts a bar around the steps. Returns x and
    x_next (T - 1, N, C, H, W), the states before and after each stochastic transition, its logp (T - 1, N) under the
    policy that made it, and the final latents (N, C, H, W).
    """
    x, logp = [noise[0]], []
    for step in progress(range(len(s))):
        velocity = policy.velocity_in_micro_batches(x[step], sigmas[step], text, owner)
        mean, std = sde_mean_std(x[step], velocity, sigmas[step], sigmas[step + 1], s[step])
        x.append(mean + std * noise[step + 1])
        logp.append(log_prob(x[step + 1], mean, std))
    # The last step is the ODE's: it adds no noise, has no log-prob and is never trained.
    latents = common.ode_sample(policy, x[-1], text, owner, sigmas[-2:])
    x = torch.stack(x)
    return x[:-1], x[1:], torch.stack(logp), latents


def transition_logp(policy, text, owner, levels, x, x_next, step, image):
    """Log-prob of stored transitions under the policy as it is now.

    text, owner: as in rollout; levels: sigma, sigma_next and s, (T - 1,) each; x, x_next: (T - 1, N, C, H, W) states
    before and after each transition; step, image: (M,) which transitions. Returns logp (M,), and the Gaussian's mean
    (M, C, H, W) and std (M, 1, 1, 1).
    """
    sigma, sigma_next, scale = (level[step] for level in levels)
    velocity = policy.velocity(x[step, image], sigma, text, owner[image])
    mean, std = sde_mean_std(x[step, image], velocity, sigma, sigma_next, scale)
    return log_prob(x_next[step, image], mean, std), mean, std


# GCPO: where a trajectory is cut, and which chunks are trained
def adaptive_chunks(l1rel, longest, order=1):
    """Sizes of the chunks of consecutive steps whose derivative of L1rel has the same sign, [GC] section 4.3.

    l1rel: (n,) tensor. A step has the sign of the order-th difference that ends at it; a zero keeps the sign before,
    the first steps take the first sign there is. A sign that never changes splits at the midpoint. Chunks of more than
    `longest` are cut again, by the next order. ([GC] tells no edges and no `longest`; its code has fixed sizes only.)
    Example: 9 8 6 7 9, longest 3: differences -1 -2 1 2 give signs - - - + +, so sizes [3, 2].
    """
    if len(l1rel) <= longest:
        return [len(l1rel)]
    differences = torch.diff(l1rel, order).sign().tolist()
    signs = [next(filter(None, differences), 0.0)] * order
    for sign in differences:
        signs.append(sign or signs[-1])
    cuts = [i for i in range(1, len(signs)) if signs[i] != signs[i - 1]] or [len(l1rel) // 2]
    return sum((adaptive_chunks(piece, longest, order + 1) for piece in l1rel.tensor_split(cuts)), [])


def draw_chunks(l1rel, sizes, fraction, weighted, generator):
    """Draw chunks of a trajectory without replacement, uniformly or by their mean L1rel [GC] eq. 17.

    l1rel: (T - 1,); sizes: K of them. Returns (T - 1, T - 1): 1 / size where two steps share a drawn chunk, else 0.
    """
    weight = torch.stack([piece.mean() if weighted else torch.ones(()) for piece in l1rel.split(sizes)])
    drawn = weight.multinomial(max(1, int(fraction * len(sizes) + 0.5)), generator=generator).tolist()
    return torch.block_diag(*(torch.full((n, n), (j in drawn) / n) for j, n in enumerate(sizes)))


def main(args):
    sizes = common.parse_chunks(args)  # GCPO
    P, G, U = args.prompts_per_iteration, args.group_size, args.updates_per_iteration
    N = common.settle_batch(args, P * G, G)
    reward, eval_reward = common.prepare_rewards(args, get_reward)
    prompts = common.read_prompts(args.prompts)

    policy = common.Policy(args, latents=3 * args.steps * N)
    optimizer = torch.optim.AdamW(policy.parameters, args.learning_rate, weight_decay=0.0)
    sigmas = policy.sigmas(args.steps)
    s = noise_scale(sigmas, args.sde, args.noise_level)  # (T - 1,)
    levels = sigmas[:-2], sigmas[1:-1], s  # sigma, sigma_next and s of every stochastic step
    owner = torch.arange(N, device=policy.store) // G  # (N,) the prompt of each image
    common.print_plan(args, N, sigmas, s)

    with common.Run(args, policy, optimizer, reward, eval_reward) as run:
        for iteration in run.iterations():
            # rollout
            with run.phase("rollout"):
                batch = common.iteration_prompts(prompts, P, iteration, args.seed)
                text = policy.encode(batch)
                generator = common.generator(args.seed, "noise", iteration)
                noise = [policy.noise(N, generator) for _ in range(args.steps)]
                if args.shared_noise:
                    noise[0] = noise[0][owner * G]
                progress = run.progress("rollout")
                x, x_next, old_logp, latents = rollout(policy, text, owner, noise, sigmas, s, progress)

                # GCPO: how much each step changes the latent, where that cuts it, and which chunks are trained
                l1rel = ((x_next - x).flatten(2).norm(1, 2) / x.flatten(2).norm(1, 2)).T.cpu()  # (N, T - 1)
                chunks = [sizes or adaptive_chunks(curve, args.chunk_max) for curve in l1rel]
                options = args.chunk_fraction, args.weighted_sampling, generator
                average = torch.stack([draw_chunks(*trajectory, *options) for trajectory in zip(l1rel, chunks)])
                average = average.to(x.device)  # (N, T - 1, T - 1)
                own = average.diagonal(dim1=1, dim2=2)  # (N, T - 1) 1 / size of a step's chunk, 0 if not trained
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
                    others = (own[image, step] < 1).nonzero()[:, 0] if update > 0 else ()
                    for start in range(0, len(others), args.micro_batch):
                        mb = others[start : start + args.micro_batch]
                        with torch.no_grad():
                            found = transition_logp(policy, text, owner, levels, x, x_next, step[mb], image[mb])
                        new_logp[step[mb], image[mb]] = found[0]
                    micro_batches = list(zip(step.split(args.micro_batch), image.split(args.micro_batch)))
                    for mb_step, mb_image in run.progress("update")(micro_batches):
                        transitions = (text, owner, levels, x, x_next, mb_step, mb_image)
                        logp, mean, std = transition_logp(policy, *transitions)
                        # In the first update the ratio is 1, exactly: no weight has changed since the rollout, and
                        # policy.velocity gives every batch one shape. Its gradient is not 0 but A * grad log p. Another
                        # ratio here means that rollout and training disagree, and that later ratios are wrong as well.
                        log_ratio = logp - old_logp[mb_step, mb_image]
                        if update == 0:
                            stats.add(first_log_ratio=log_ratio, first_step=mb_step)
                        # GCPO: the chunk's ratio, a geometric mean. Only this step's log-prob is live in it: the sum
                        # over steps is the whole gradient, and memory does not grow with the chunk. At ratio 1 a step
                        # weighs 1 / (J size), J chunks drawn: of [2, 3, 4, 7] the first two 3.5 times the last seven.
                        log_ratios = (new_logp - old_logp).T[mb_image].scatter(1, mb_step[:, None], log_ratio[:, None])
                        log_ratio = (log_ratios * average[mb_image, mb_step]).sum(1)
                        mb_advantage = advantage[mb_image]
                        ratio = log_ratio.exp()
                        clipped = ratio.clamp(1 - args.clip_range, 1 + args.clip_range)
                        loss = torch.maximum(-mb_advantage * ratio, -mb_advantage * clipped)  # (M,)
                        if args.kl_coef > 0:  # divided by the sampler's own variance; [FG] leaves Delta out
                            with policy.reference():
                                _, mean_ref, _ = transition_logp(policy, *transitions)
                            kl = ((mean - mean_ref) ** 2 / (2 * std**2)).flatten(1).mean(1)
                            loss = loss + args.kl_coef * kl * own[mb_image, mb_step]  # GCPO: the chunk's mean
                            stats.add(kl_ref=kl)
                        (loss / count[mb_image]).sum().div(len(part)).backward()  # GCPO: mean of chunks, then of images
                        stats.add(loss=loss, log_ratio=log_ratio, advantage=mb_advantage)
                    stats.add(grad_norm=run.update())

            # log
            run.images += len(latents)
            run.log(
                {
                    "iteration": iteration,
                    "reward_mean": rewards.mean().item(),
                    "reward_std": rewards.std().item(),
                    **{f"reward/{name}": scores.mean().item() for name, scores in parts.items()},
                    "zero_std_groups": zero_std_groups,
                    **stats.metrics(args.clip_range),
                    **run.chunk_metrics(l1rel, chunks, G),  # GCPO
                }
            )


if __name__ == "__main__":
    common.run_script(main, Args, DEFAULTS)
