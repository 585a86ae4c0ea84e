"""TempFlow-GRPO for flow-matching text-to-image models: GRPO that credits single steps ([TF], arXiv 2508.04324).

    python tempflow_grpo.py                        # the bundled tiny model, minutes on a laptop
    python tempflow_grpo.py --prompts data.txt     # Stable Diffusion 3.5 Medium with LoRA, on a CUDA GPU

One iteration: sample ODE trajectories with branches of one SDE step (rollout), score those (reward), compare each with
the others from the same state (advantage), and raise the probability of the steps that led to the better ones (update).

A transition is one random step of the sampler. Notation: common.py. Sources in brackets, settings, metrics: README.md.
"""

from dataclasses import dataclass

import common
from common import DTYPES, group_advantage, log_prob, noise_scale, option, sde_drift_std, sde_mean_std
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
    # TempFlow: seeds x branches in place of the group size
    seeds_per_prompt: int | None = option(None, "S, initial noises a prompt", low=1)
    branches: int | None = option(None, "B, branches at each random step of a seed", low=2)
    group: str = option("seed", "compare at a step the branches of: a seed, or a prompt", choices=("seed", "prompt"))
    weighting: str = option("noise", "weigh the losses of steps by their noise, or not", choices=("noise", "none"))
    updates_per_iteration: int = option(2, "U, optimizer steps a rollout, each on its share of the seeds", low=1)
    micro_batch: int | None = option(None, "M, latents in one forward; fewer take less memory and more time", low=1)
    steps: int | None = option(None, "T, sampling steps", low=2, high=1000, group="rollout")
    sde_steps: str | None = option(None, "branch at: all, early (first half), a list 0,1,2, or how many to draw")
    sde: str = option("flow", "the random step: Flow-GRPO's, DanceGRPO's, Flow-CPS's", choices=("flow", "dance", "cps"))
    noise_level: float | None = option(None, "a or eta of --sde; dance 0.3, cps 0.8, flow by model", low=1e-6, high=10)
    guidance: float | None = option(None, "classifier-free guidance, off at 1", high=100)
    resolution: int | None = option(None, "pixels a side", low=8, high=8192)
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


# Settings that depend on the model, as in grpo.py: here [TF]'s. Branches leave at few early steps of the large models,
# as each costs the rest of the way. [TF] has 4 seeds x 6 branches.
SD3 = dict(
    iterations=180, prompts_per_iteration=16, seeds_per_prompt=1, branches=12, micro_batch=3,
    steps=10, sde_steps="0,1,2", guidance=1.0, resolution=512, noise_level=0.7,
    learning_rate=3e-4, clip_range=1e-4, ema_decay=0.9, lora_rank=32, lora_alpha=64.0,
    eval_every=30, eval_steps=40, eval_seeds=1,
)  # fmt: skip
DEFAULTS = {
    "tiny": dict(
        iterations=220, prompts_per_iteration=4, seeds_per_prompt=2, branches=6, micro_batch=48,
        steps=10, sde_steps="all", guidance=1.0, resolution=32, noise_level=0.7,
        learning_rate=1e-3, clip_range=3e-4, ema_decay=0.97, lora_rank=16, lora_alpha=32.0,
        eval_every=10, eval_steps=10, eval_seeds=4,
    ),
    "sd3": SD3,
    "flux": SD3 | dict(iterations=120, prompts_per_iteration=12, micro_batch=2, guidance=3.5, noise_level=0.9),
    "flux2": SD3 | dict(iterations=120, prompts_per_iteration=8, micro_batch=1, sde_steps="0,1", eval_steps=50),
}  # fmt: skip


# TempFlow: the trunk of a seed is an ODE trajectory; B branches leave it at each of the chosen steps
@torch.no_grad()
def rollout(policy, text, owner, noise, sigmas, s, sde, chosen, progress=lambda steps, label: steps):
    """Sample trunks by ODE, and branches that leave them by one SDE step and are finished by ODE.

        noise -- x_0 ---- x_1 ---- x_2 ---- ...       the trunk, by ODE
                    \\ sde  \\ sde  \\
                     x_next --- --- ---> latents      B branches from each state: one random step, then the ODE

    text: from policy.encode; owner: (N,) the row of text of each seed; noise: (N, C, H, W) of the trunks, then K of (N,
    B, C, H, W); sigmas: (T + 1,); s: (T - 1,) noise scales; sde: of sde_mean_std; chosen: K steps in rising order;
    progress: puts a bar around the steps. Trunks and all branches so far go through the network together, in one pass
    over the steps. Returns x (K, N, C, H, W), where branches leave the trunk, x_next (K, N, B, C, H, W), where they are
    after their SDE step, its logp (K, N, B), and the final latents (K N B, C, H, W).
    """
    trunk, branch_noise, B = noise[0], iter(noise[1:]), noise[1].shape[1]
    branches, x, x_next, logp = trunk[:0], [], [], []
    for step in progress(range(len(sigmas) - 1), "rollout"):
        N, latents = len(trunk), torch.cat([trunk, branches])
        owners = torch.cat([owner[:N], owner.repeat_interleave(B).repeat(len(x))])
        velocity = policy.velocity_in_micro_batches(latents, sigmas[step], text, owners)
        ode_next = latents - (sigmas[step] - sigmas[step + 1]) * velocity
        branches = ode_next[N:]
        if step in chosen:
            mean, std = sde_mean_std(trunk, velocity[:N], sigmas[step], sigmas[step + 1], s[step], sde)
            x.append(trunk)
            x_next.append(mean[:, None] + std * next(branch_noise))
            logp.append(log_prob(x_next[-1], mean[:, None], std, batch_dims=2))
            branches = torch.cat([branches, x_next[-1].flatten(0, 1)])
        trunk = ode_next[:N] if step < chosen[-1] else trunk[:0]  # after the last branches nothing needs the trunk
    return torch.stack(x), torch.stack(x_next), torch.stack(logp), branches


def gradient_scale(sigma, sigma_next, s, sde):
    """Size of d logp / d velocity at each of K steps, (K,), up to a factor that all steps share.

    It is |d mean / d velocity| / std; with "flow" and "dance" sqrt(Delta) / s (1 + s^2 (1 - sigma) / (2 sigma)).
    """
    drift, std = sde_drift_std(sigma, sigma_next, s, sde)
    return (sigma - sigma_next + drift * (1 - sigma)) / std


def step_weights(sigma, sigma_next, s, sde, weighting="noise"):
    """Weights of the losses of K steps, (K,), with mean 1 [TF]; sigma, sigma_next, s: (K,).

    Without weights the steps of low noise dominate (gradient_scale). The weight is Delta over that scale, so a step
    pulls by its length Delta. For "dance" that is s sqrt(Delta) / (1 + s^2 (1 - sigma) / (2 sigma)). For "flow" the
    bracket is 1 + a^2 / 2 at each step but the first, and [TF] leaves it out: s sqrt(Delta). Its code has 1 / mean as
    a number, which is right for one schedule only.
    """
    delta = sigma - sigma_next
    weight = s * delta.sqrt() if sde == "flow" else delta / gradient_scale(sigma, sigma_next, s, sde)
    return weight / weight.mean() if weighting == "noise" else torch.ones_like(weight)


def transition_logp(policy, text, owner, levels, sde, x, x_next, step, image):
    """Log-prob of stored transitions under the policy as it is now.

    text, owner, sde: as in rollout; levels: sigma, sigma_next and s, (K,) each; x (K, N, C, H, W) and x_next (K, N, B,
    C, H, W): states before and after each transition; step, image: (M,) which, where image is the number of a seed,
    with B branches. Returns logp (M, B), and the Gaussian's mean (M, C, H, W) and std (M, 1, 1, 1).
    """
    sigma, sigma_next, scale = (level[step] for level in levels)
    velocity = policy.velocity(x[step, image], sigma, text, owner[image])
    mean, std = sde_mean_std(x[step, image], velocity, sigma, sigma_next, scale, sde)
    # TempFlow: branches that left the same state share its velocity: one forward and backward for all B of them
    return log_prob(x_next[step, image], mean[:, None], std[:, None], batch_dims=2), mean, std


# TempFlow: what a step is worth
def step_metrics(chosen, rewards, gradient, weight):
    """Credit by step.

    rewards: (K, N, B). reward_std_by_step: std over the branches of a state, averaged [TF] figure 2. gradient, weight:
    (K,) size of d logp / d velocity, and the steps' weights; logged without and with them, with mean 1.
    """
    spread, pull = common.gather(rewards.std(2, correction=0).T).mean(0), gradient * weight
    metrics = {"reward_std_by_step": spread, "gradient_by_step": gradient / gradient.mean()}
    metrics |= {"gradient_by_step_weighted": pull / pull.mean()}
    metrics = {name: values.tolist() for name, values in metrics.items()}
    return {"branch_steps": chosen} | metrics


def main(args):
    # TempFlow: N trunks, one a seed; B branches at each step; groups of the branches of a seed, or of a prompt
    P, S, U, B = args.prompts_per_iteration, args.seeds_per_prompt, args.updates_per_iteration, args.branches
    G = B if args.group == "seed" else S * B
    N = common.split_batch(args, S, group=G, branches=B, usual=6)
    sde_steps, drawn = common.parse_sde_steps(args)
    reward, eval_reward = common.load_rewards(args, get_reward)
    prompts = common.read_prompts(args.prompts)

    policy = common.make_policy(args, trajectories=N * B)
    # eps stays 1e-8, as in published code: it is of the size of SD3's gradients, and halves the updates (README.md)
    optimizer = torch.optim.AdamW(policy.parameters, args.learning_rate, weight_decay=0.0)
    sigmas = policy.sigmas(args.steps)
    s = noise_scale(sigmas, args.sde, args.noise_level)  # (T - 1,)
    all_levels = sigmas[:-2], sigmas[1:-1], s
    weights = torch.zeros_like(s)  # TempFlow: of every step, with mean 1 where branches may leave
    weights[sde_steps] = step_weights(*(level[sde_steps] for level in all_levels), args.sde, args.weighting)
    owner = torch.arange(N, device=policy.store) // S  # (N,) the prompt of each seed
    common.print_plan(args, N, sigmas, s, sde_steps, weights, B)

    with common.Run(args, policy, optimizer, reward, eval_reward) as run:
        for iteration in run.iterations():
            # rollout
            with run.phase("rollout"):
                batch = common.share(common.iteration_prompts(prompts, P, iteration, args.seed))
                text = policy.encode(batch)
                chosen = common.iteration_steps(sde_steps, drawn, iteration, args.seed)  # K steps
                levels = [level[chosen] for level in all_levels]  # sigma, sigma_next, s: (K,)
                generator = common.generator(args.seed, "noise", iteration)
                weight = weights[chosen]  # TempFlow
                noise = [policy.noise(P, S, generator)]
                noise += [policy.noise(P, S * B, generator).unflatten(0, (N, B)) for _ in chosen]
                sampled = rollout(policy, text, owner, noise, sigmas, s, args.sde, chosen, run.progress)
                x, x_next, old_logp, latents = sampled

            # reward
            with run.phase("reward"):
                captions = [batch[n] for n in owner.repeat_interleave(B).tolist()] * len(chosen)
                rewards, parts = common.score(policy, reward, latents, captions)

            # advantage
            advantage, zero_std_groups = group_advantage(rewards.view(-1, G), args.adv_std, args.adv_clip)
            advantage = advantage.view(-1, N, B).to(x.device)  # TempFlow: (K, N, B), the credit of one step alone

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
                        mb_advantage = advantage[mb_step, mb_image]  # TempFlow: of the step, (M, B)
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
                        policy.backward((loss / len(x)).sum() / len(part))
                        stats.add(loss=loss, log_ratio=log_ratio, advantage=mb_advantage)
                    grad_norm = policy.clip_gradients(args.max_grad_norm)
                    if run.can_step(grad_norm):
                        optimizer.step()
                        policy.update_average()
                    optimizer.zero_grad()
                    stats.add(grad_norm=grad_norm)

            # log
            credit = step_metrics(chosen, rewards.view(-1, N, B), gradient_scale(*levels, args.sde), weight)  # TempFlow
            run.log(iteration, rewards, parts, zero_std_groups, stats, **credit)


if __name__ == "__main__":
    common.run_script(main, Args, DEFAULTS)
