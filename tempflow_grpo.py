"""TempFlow-GRPO for flow-matching text-to-image models: GRPO that credits single steps ([TF], arXiv 2508.04324).

    python tempflow_grpo.py                        # the bundled tiny model, minutes on a laptop
    python tempflow_grpo.py --prompts data.txt     # Stable Diffusion 3.5 Medium with LoRA, on a CUDA GPU

One iteration: sample ODE trajectories with branches of one SDE step (rollout), score those (reward), compare each with
the others from the same state (advantage), and raise the probability of the steps that led to the better ones (update).

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
    # TempFlow: seeds x branches in place of the group size
    seeds_per_prompt: int | None = HfArg(default=None, help="S, initial noises a prompt; default: by model")
    branches: int | None = HfArg(default=None, help="B, branches at each step of a seed; default: by model")
    branch_steps: str = HfArg(default="all", help="where to branch: all, a list 0,1,2, or how many at random")
    group: Literal["seed", "prompt"] = HfArg(default="seed", help="whose branches a branch is compared with")
    weighting: Literal["noise", "none"] = HfArg(default="noise", help="the loss of a step times s sqrt(Delta), or 1")
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
    # update
    learning_rate: float | None = HfArg(default=None, help="of AdamW; default: by model")
    clip_range: float | None = HfArg(default=None, help="c, the ratio is clipped to 1 +- c; default: by model")
    adv_clip: float = HfArg(default=5.0, help="largest advantage")
    adv_std: Literal["group", "batch"] = HfArg(default="group", help="what the advantage is divided by")
    kl_coef: float = HfArg(default=0.0, help="beta, weight of the KL to the base model; 0 saves its forward passes")
    max_grad_norm: float = HfArg(default=1.0, help="gradient norm is clipped to this")
    ema_decay: float | None = HfArg(default=None, help="moving average of the adapter, off at 0; default: by model")
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
        iterations=60, prompts_per_iteration=4, seeds_per_prompt=2, branches=6,
        micro_batch=48, steps=10, guidance=1.0, resolution=32, noise_level=0.7,
        learning_rate=1e-3, clip_range=3e-4, ema_decay=0.0, lora_rank=16, lora_alpha=32.0,
        eval_every=10, eval_steps=10, eval_seeds=4,
    ),
    "sd3": dict(
        iterations=1000, prompts_per_iteration=48, seeds_per_prompt=4, branches=6,
        micro_batch=2, steps=10, guidance=4.5, resolution=512, noise_level=0.7,
        learning_rate=3e-4, clip_range=1e-4, ema_decay=0.9, lora_rank=32, lora_alpha=64.0,
        eval_every=30, eval_steps=40, eval_seeds=1,
    ),
    "flux": dict(  # [TF]'s for FLUX.1-dev, and where it tells none, those for SD3
        iterations=1000, prompts_per_iteration=48, seeds_per_prompt=4, branches=6,
        micro_batch=1, steps=10, guidance=3.5, resolution=1024, noise_level=0.9,
        learning_rate=3e-4, clip_range=1e-4, ema_decay=0.9, lora_rank=32, lora_alpha=64.0,
        eval_every=30, eval_steps=40, eval_seeds=1,
    ),
    "flux2": dict(  # in no paper: as SD3, with the pipeline's own guidance and evaluation steps
        iterations=1000, prompts_per_iteration=48, seeds_per_prompt=4, branches=6,
        micro_batch=1, steps=10, guidance=4.0, resolution=512, noise_level=0.7,
        learning_rate=3e-4, clip_range=1e-4, ema_decay=0.9, lora_rank=32, lora_alpha=64.0,
        eval_every=30, eval_steps=50, eval_seeds=1,
    ),
}  # fmt: skip


# TempFlow: the trunk of a seed is an ODE trajectory; B branches leave it at each of the steps branch_at
@torch.no_grad()
def rollout(policy, text, owner, noise, sigmas, s, branch_at, progress=lambda steps: steps):
    """Sample trunks by ODE, and branches that leave them by one SDE step and are finished by ODE.

    text: from policy.encode; owner: (N,) the row of text of each seed; noise: (N, C, H, W) of the trunks, then K of (N,
    B, C, H, W); sigmas: (T + 1,); s: (T - 1,) noise scales; branch_at: K steps in order; progress: a bar around the
    steps. Trunks and all branches so far go through the network together, in one pass over the steps. Returns x (K, N,
    C, H, W), where branches leave the trunk, x_next (K, N, B, C, H, W), where they are after their SDE step, its logp
    (K, N, B), and the final latents (K N B, C, H, W).
    """
    trunk, (N, B) = noise[0], noise[1].shape[:2]
    x, x_next, logp, live, live_owner = [], [], [], trunk[:0], owner[:0]
    for step in progress(range(len(s) + 1)):
        stem = trunk if step <= branch_at[-1] else trunk[:0]  # after the last branches nothing needs the trunk
        latents, owners = torch.cat([stem, live]), torch.cat([owner[: len(stem)], live_owner])
        velocity = policy.velocity_in_micro_batches(latents, sigmas[step], text, owners)
        moved = latents - (sigmas[step] - sigmas[step + 1]) * velocity
        live = moved[len(stem) :]
        if step in branch_at:
            mean, std = sde_mean_std(trunk, velocity[:N], sigmas[step], sigmas[step + 1], s[step])
            x.append(trunk)
            x_next.append(mean[:, None] + std * noise[len(x)])  # the len(x)-th branching
            logp.append(log_prob(x_next[-1], mean[:, None], std, batch_dims=2))
            live = torch.cat([live, x_next[-1].flatten(0, 1)])
            live_owner = torch.cat([live_owner, owner.repeat_interleave(B)])
        trunk = moved[: len(stem)]
    return torch.stack(x), torch.stack(x_next), torch.stack(logp), live


def gradient_scale(sigma, sigma_next, s):
    """Size of d logp / d velocity at each of K steps, (K,), but for a factor that all steps share."""
    return (sigma - sigma_next).sqrt() / s * (1 + s**2 * (1 - sigma) / (2 * sigma))


def step_weights(sigma, sigma_next, s, sde, weighting="noise"):
    """Weights of the losses of K steps, (K,), with mean 1 [TF]; sigma, sigma_next, s: (K,).

    Without weights the steps of low noise dominate (gradient_scale). Delta over that scale, s sqrt(Delta) / (1 + s^2
    (1 - sigma) / (2 sigma)), makes a step's pull its length Delta. For `flow` the bracket is constant (but at sigma =
    1), and [TF] leaves it out: s sqrt(Delta). Its code has 1 / mean as a number, right for one schedule only.
    """
    delta = sigma - sigma_next
    weight = s * delta.sqrt() if sde == "flow" else delta / gradient_scale(sigma, sigma_next, s)
    return weight / weight.mean() if weighting == "noise" else torch.ones_like(weight)


def transition_logp(policy, text, owner, levels, x, x_next, step, image):
    """Log-prob of stored transitions under the policy as it is now.

    text, owner: as in rollout; levels: sigma, sigma_next and s, (K,) each; x (K, N, C, H, W) and x_next (K, N, B, C, H,
    W): states before and after each transition; step, image: (M,) which, where an image is a seed, with B branches.
    Returns logp (M, B), and the Gaussian's mean (M, C, H, W) and std (M, 1, 1, 1).
    """
    sigma, sigma_next, scale = (level[step] for level in levels)
    velocity = policy.velocity(x[step, image], sigma, text, owner[image])
    mean, std = sde_mean_std(x[step, image], velocity, sigma, sigma_next, scale)
    # TempFlow: branches that left the same state share its velocity: one forward and backward for all B of them
    return log_prob(x_next[step, image], mean[:, None], std[:, None], batch_dims=2), mean, std


def main(args):
    # TempFlow: N trunks, one a seed; B branches at each step; groups of the branches of a seed, or of a prompt
    P, S, U, B = args.prompts_per_iteration, args.seeds_per_prompt, args.updates_per_iteration, args.branches
    G = B if args.group == "seed" else S * B
    N = common.settle_batch(args, P * S, G, B, usual=6)
    branch_steps, drawn = common.parse_branch_steps(args)
    reward, eval_reward = common.prepare_rewards(args, get_reward)
    prompts = common.read_prompts(args.prompts)

    policy = common.Policy(args, latents=3 * args.steps * N * B)
    optimizer = torch.optim.AdamW(policy.parameters, args.learning_rate, weight_decay=0.0)
    sigmas = policy.sigmas(args.steps)
    s = noise_scale(sigmas, args.sde, args.noise_level)  # (T - 1,)
    all_levels = [level[branch_steps] for level in (sigmas[:-2], sigmas[1:-1], s)]  # where branches may be
    all_weights = step_weights(*all_levels, args.sde, args.weighting)
    owner = torch.arange(N, device=policy.store) // S  # (N,) the prompt of each seed
    common.print_plan(args, N, sigmas, s, dict(zip(branch_steps, all_weights.tolist())), B)

    with common.Run(args, policy, optimizer, reward, eval_reward) as run:
        for iteration in run.iterations():
            # rollout
            with run.phase("rollout"):
                batch = common.iteration_prompts(prompts, P, iteration, args.seed)
                text = policy.encode(batch)
                generator = common.generator(args.seed, "noise", iteration)
                # TempFlow: K steps to branch at, all of them or as many drawn
                dice = common.generator(args.seed, "branches", iteration)
                chosen = torch.randperm(len(branch_steps), generator=dice)[:drawn].sort().values
                branch_at, levels = [branch_steps[n] for n in chosen], [level[chosen] for level in all_levels]
                weight = all_weights[chosen]
                noise = [policy.noise(N, generator)]
                noise += [policy.noise(N * B, generator).unflatten(0, (N, B)) for _ in branch_at]
                progress = run.progress("rollout")
                x, x_next, old_logp, latents = rollout(policy, text, owner, noise, sigmas, s, branch_at, progress)

            # reward
            with run.phase("reward"):
                captions = [batch[n] for n in owner.repeat_interleave(B).tolist()] * len(branch_at)
                rewards, parts = common.score(policy, reward, latents, captions)

            # advantage
            advantage, zero_std_groups = group_advantage(rewards.view(-1, G), args.adv_std, args.adv_clip)
            advantage = advantage.view(-1, N, B).to(x.device)  # TempFlow: (K, N, B), the credit of one step alone

            # update
            stats = common.Stats()
            with run.phase("train"):
                for update, part in enumerate(torch.arange(N, device=x.device).view(U, -1)):
                    step, image = torch.cartesian_prod(torch.arange(len(x), device=x.device), part).T
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
                        mb_advantage = advantage[mb_step, mb_image]
                        ratio = log_ratio.exp()
                        clipped = ratio.clamp(1 - args.clip_range, 1 + args.clip_range)
                        loss = torch.maximum(-mb_advantage * ratio, -mb_advantage * clipped)
                        loss = loss.mean(1) * weight[mb_step]  # (M,) TempFlow: mean of the branches, weight of the step
                        if args.kl_coef > 0:  # divided by the sampler's own variance; [FG] leaves Delta out
                            with policy.reference():
                                _, mean_ref, _ = transition_logp(policy, *transitions)
                            kl = ((mean - mean_ref) ** 2 / (2 * std**2)).flatten(1).mean(1)
                            loss = loss + args.kl_coef * kl
                            stats.add(kl_ref=kl)
                        (loss / len(x)).sum().div(len(part)).backward()
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
                    **run.step_metrics(branch_at, rewards.view(-1, N, B), gradient_scale(*levels), weight),  # TempFlow
                }
            )


if __name__ == "__main__":
    common.run_script(main, Args, DEFAULTS)
