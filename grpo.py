"""GRPO for flow-matching text-to-image models ([FG] Flow-GRPO, arXiv 2505.05470; [DG] DanceGRPO, arXiv 2505.07818).

    python grpo.py                        # the bundled tiny model, minutes on a laptop
    python grpo.py --prompts data.txt     # Stable Diffusion 3.5 Medium with LoRA, on a CUDA GPU

One iteration: sample a group of images for every prompt with the SDE (rollout), score them (reward), compare each with
its group (advantage), and raise the probability of the transitions that led to the better ones (update).

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
    sde_steps: str | None = option(None, "random steps: all, early (first half), a list 0,1,2, or how many to draw")
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


# Settings that depend on the model. tiny: what tuning found (README.md). The others: learning rate, clip range,
# adapter, noise and evaluation as [FG] has them for SD3 and FLUX.1; the batch is what one GPU does in 12 hours, by
# count (tests/bench.py plan): SD3 and FLUX.2 in 24 GB, FLUX.1 in 80 GB. So SD3 and FLUX.2 have no guidance (two passes
# a step; [FG]'s fast runs do without), and only early steps are random. The papers' batches: README.md.
SD3 = dict(
    iterations=180, prompts_per_iteration=16, group_size=16, micro_batch=3,
    steps=10, sde_steps="early", guidance=1.0, resolution=512, noise_level=0.7,
    learning_rate=3e-4, clip_range=1e-4, ema_decay=0.9, lora_rank=32, lora_alpha=64.0,
    eval_every=30, eval_steps=40, eval_seeds=1,
)  # fmt: skip
DEFAULTS = {
    "tiny": dict(
        iterations=160, prompts_per_iteration=8, group_size=12, micro_batch=48,
        steps=10, sde_steps="early", guidance=1.0, resolution=32, noise_level=0.7,
        learning_rate=7e-4, clip_range=1e-3, ema_decay=0.97, lora_rank=16, lora_alpha=32.0,
        eval_every=10, eval_steps=10, eval_seeds=4,
    ),
    "sd3": SD3,
    "flux": SD3 | dict(iterations=110, group_size=12, micro_batch=2, guidance=3.5, noise_level=0.9),
    "flux2": SD3 | dict(
        iterations=150, prompts_per_iteration=8, group_size=12, micro_batch=1, sde_steps="0,1,2", eval_steps=50
    ),
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


def main(args):
    P, G, U = args.prompts_per_iteration, args.group_size, args.updates_per_iteration
    N = common.split_batch(args, G)  # images an iteration
    sde_steps, drawn = common.parse_sde_steps(args)
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
                    step, image = torch.cartesian_prod(torch.arange(len(x), device=x.device), part).T
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
                        ratio = log_ratio.exp()
                        clipped = ratio.clamp(1 - args.clip_range, 1 + args.clip_range)
                        loss = torch.maximum(-mb_advantage * ratio, -mb_advantage * clipped)  # (M,)
                        if args.kl_coef > 0:  # divided by the sampler's own variance; [FG] leaves Delta out
                            with policy.reference():
                                _, mean_ref, _ = transition_logp(policy, *transitions)
                            kl = ((mean - mean_ref) ** 2 / (2 * std**2)).flatten(1).mean(1)
                            loss = loss + args.kl_coef * kl
                            stats.add(kl_ref=kl)
                        policy.backward((loss / len(x)).sum() / len(part))
                        stats.add(loss=loss, log_ratio=log_ratio, advantage=mb_advantage)
                    grad_norm = policy.clip_gradients(args.max_grad_norm)
                    if run.can_step(grad_norm):
                        optimizer.step()
                        policy.update_average()
                    optimizer.zero_grad()
                    stats.add(grad_norm=grad_norm)

            # log
            run.log(iteration, rewards, parts, zero_std_groups, stats)


if __name__ == "__main__":
    common.run_script(main, Args, DEFAULTS)
