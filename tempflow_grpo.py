"""TempFlow-GRPO for flow-matching text-to-image models: GRPO with an advantage per step ([TF],
arXiv 2508.04324).

    python tempflow_grpo.py                        # the bundled tiny model, minutes on a laptop
    python tempflow_grpo.py --prompts data.txt     # Stable Diffusion 3.5 Medium with LoRA, on a CUDA GPU

One iteration: sample ODE trajectories with branches of one SDE step (rollout), score the branches (reward),
compare each branch with the others from the same state (advantage), and raise the probability of the steps
that led to the better branches (update).

A transition is one random step of the sampler. The notation and the sources in brackets are explained in
common.py, the settings in Args, and the metrics in README.md.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

import common
from common import group_advantage, log_prob, noise_scale, ratio_metrics, sde_drift_std, sde_mean_std
from rewards import get_reward


@dataclass
class Args(common.Args):
    """Train a text-to-image model by TempFlow-GRPO. Example: python tempflow_grpo.py --prompts data.txt"""

    iterations: int = 180  # rounds of rollout and update
    prompts_per_iteration: int = 16  # P, prompts per rollout
    # TempFlow: starts and branches replace the group size
    seeds_per_prompt: int = 1  # S, initial noises (starts) per prompt
    branches: int = 12  # B, branches at each random step of a start
    group: Literal["seed", "prompt"] = "seed"  # compare branches of a start, or of all starts of a prompt
    weighting: Literal["noise", "none"] = "noise"  # scale the loss of each step by its noise, or not
    updates_per_iteration: int = 2  # U, optimizer steps per rollout, each on different starts
    steps: int = 10  # T, sampling steps
    sde_steps: str = "0,1,2"  # where branches split off: all, early (the first half), or a list 0,1,2
    sde_steps_per_iteration: int = 0  # draw this many of them anew in each iteration; 0 uses all
    sde: Literal["flow", "dance", "cps", "precise"] = "flow"  # how random steps add noise
    noise_level: float = 0.7  # how much noise they add: a of flow, eta of the others
    guidance: float = 1.0  # classifier-free guidance, off at 1
    resolution: int = 512  # pixels per side
    learning_rate: float = 3e-4  # AdamW learning rate
    clip_range: float = 1e-4  # the ratio is clipped to 1 +- clip_range
    adv_clip: float = 5.0  # advantages are clipped to +- adv_clip
    adv_std: Literal["group", "batch"] = "group"  # divide advantages by the std of each group or of the batch
    kl_coef: float = 0.0  # beta, coefficient of the KL to the base model; 0 skips the KL
    max_grad_norm: float = 1.0  # gradients with a larger norm are scaled down to this norm
    ema_decay: float = 0.9  # decay of the moving average of the adapter's weights, off at 0
    ema_every: int = 8  # optimizer steps between updates of the moving average


# The defaults above are for SD3.5 Medium; these are the differences for other models: as in grpo.py, with the
# settings of [TF]. Large models branch at a few early steps only, because each branch must be completed. [TF]
# uses 4 starts x 6 branches.
DEFAULTS = {
    "tiny": dict(
        iterations=200, prompts_per_iteration=4, seeds_per_prompt=2, branches=6, micro_batch=48,
        sde="dance", noise_level=3.0, learning_rate=1e-3, clip_range=3e-4, ema_decay=0.97, ema_every=1,
        lora_rank=16, lora_alpha=32.0, eval_every=10, eval_steps=10, eval_seeds=4,
        sde_steps="early", resolution=32,
    ),
    "sd3": dict(),
    "flux": dict(iterations=120, prompts_per_iteration=12, guidance=3.5, noise_level=0.9, save_every=5),
    "flux2": dict(iterations=120, prompts_per_iteration=8, sde_steps="0,1", eval_steps=50),
}  # fmt: skip


class Rollout(NamedTuple):
    """The transitions of an iteration: N starts, K random steps, B branches at each."""

    text: list  # tensors from policy.encode, one row per prompt
    prompt_index: torch.Tensor  # (N,) which row of text each start uses
    sde: str  # the sampler, as in sde_mean_std
    sigma: torch.Tensor  # (K,) noise level before each random step
    sigma_next: torch.Tensor  # (K,) noise level after it
    s: torch.Tensor  # (K,) noise scale
    x: torch.Tensor  # (K, N, C, H, W) latents before it
    x_next: torch.Tensor  # (K, N, B, C, H, W) latents after it
    logp: torch.Tensor  # (K, N, B) log-prob of x_next under the weights that sampled it


# TempFlow: from each start runs an ODE trajectory, the trunk; B branches split off at each chosen step
@torch.no_grad()
def sample(policy, text, prompt_index, noise, sigmas, s, sde, chosen):
    """Sample trunks with ODE steps, and branches that split off with one SDE step and end with ODE steps.

        noise -- x_0 ---- x_1 ---- x_2 ---- ...       the trunk, by ODE
                    \\ sde  \\ sde  \\
                     x_next --- --- ---> latents      B branches per state: a random step, then the ODE

    text, prompt_index, sde: as in Rollout; noise: the starts (N, C, H, W), then (N, B, C, H, W) per chosen
    step; sigmas: (T + 1,); s: (T - 1,) noise scales; chosen: K steps in rising order. Trunks and all branches
    so far go through the network together, in one pass over the steps. Returns the final latents of the
    branches (K N B, C, H, W) and the Rollout.
    """
    trunk, B, x, x_next, logp = noise[0], noise[1].shape[1], [], [], []
    branches = trunk[:0]
    for step in common.progress(range(len(sigmas) - 1), "rollout"):
        N, latents = len(trunk), torch.cat([trunk, branches])
        index = torch.cat([prompt_index[:N], prompt_index.repeat_interleave(B).repeat(len(x))])
        velocity = policy.velocity_batched(latents, sigmas[step], text, index, pad_first=N)
        ode_next = latents - (sigmas[step] - sigmas[step + 1]) * velocity
        branches = ode_next[N:]
        if step in chosen:
            mean, std = sde_mean_std(trunk, velocity[:N], sigmas[step], sigmas[step + 1], s[step], sde)
            x.append(trunk)
            x_next.append(mean[:, None] + std * noise[len(x)])
            logp.append(log_prob(x_next[-1], mean[:, None], std, batch_dims=2))
            branches = torch.cat([branches, x_next[-1].flatten(0, 1)])
        trunk = ode_next[:N] if step < chosen[-1] else trunk[:0]  # not needed after the last branches
    levels = sigmas[:-2][chosen], sigmas[1:-1][chosen], s[chosen]
    states = torch.stack(x), torch.stack(x_next), torch.stack(logp)
    return branches, Rollout(text, prompt_index, sde, *levels, *states)


def gradient_scale(sigma, sigma_next, s, sde):
    """Size of d logp / d velocity at each of K steps, (K,), up to a factor that all steps share.

    It is |d mean / d velocity| / std. For "flow" and "dance" this is the factor sqrt(Delta) / s times the
    bracket 1 + s^2 (1 - sigma) / (2 sigma).
    """
    drift, std = sde_drift_std(sigma, sigma_next, s, sde)
    return (sigma - sigma_next + drift * (1 - sigma)) / std


def step_weights(sigma, sigma_next, s, sde, weighting="noise"):
    """Weights of the losses of K steps, (K,), with mean 1 [TF]; sigma, sigma_next, s: (K,).

    Without weights low-noise steps dominate (gradient_scale). The weight is Delta / gradient_scale, so that
    each step contributes in proportion to its length Delta. For "dance" this is s sqrt(Delta) / bracket. For
    "flow" the bracket is 1 + a^2 / 2 at every step but the first, and [TF] omits it: s sqrt(Delta). [TF]'s
    code has the normaliser 1 / mean as a constant, which is right for one schedule only.
    """
    delta = sigma - sigma_next
    weight = s * delta.sqrt() if sde == "flow" else delta / gradient_scale(sigma, sigma_next, s, sde)
    return weight / weight.mean() if weighting == "noise" else torch.ones_like(weight)


def transition_logp(policy, rollout, step, start):
    """Log-prob of transitions of the rollout under the current weights.

    step, start: (M,) indices into K and N. Returns logp (M, B), and the mean (M, C, H, W) and std
    (M, 1, 1, 1) of the Gaussian.
    """
    x, sigma = rollout.x[step, start], rollout.sigma[step]
    velocity = policy.velocity(x, sigma, rollout.text, rollout.prompt_index[start])
    mean, std = sde_mean_std(x, velocity, sigma, rollout.sigma_next[step], rollout.s[step], rollout.sde)
    # TempFlow: the B branches of a state share its velocity, so all B need one forward and backward only
    return log_prob(rollout.x_next[step, start], mean[:, None], std[:, None], batch_dims=2), mean, std


def policy_loss(log_ratio, advantage, clip_range):
    """PPO's clipped loss of each element, to be minimised. log_ratio: logp - old_logp."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped)


# TempFlow: metrics of each step
def step_metrics(chosen, rewards, gradient, weight):
    """Metrics of each step.

    rewards: (K, N, B). reward_std_by_step: std over the branches of a state, averaged [TF] figure 2.
    gradient, weight: (K,) size of d logp / d velocity, and the weights of the steps; the size is logged with
    and without the weights, with mean 1.
    """
    spread, weighted = common.gather(rewards.std(2, correction=0).T).mean(0), gradient * weight
    return {
        "branch_steps": chosen,
        "reward_std_by_step": spread.tolist(),
        "gradient_by_step": (gradient / gradient.mean()).tolist(),
        "gradient_by_step_weighted": (weighted / weighted.mean()).tolist(),
    }


def update(policy, optimizer, args, rollout, weight, advantage, starts, stats, first):
    """One optimizer step on the transitions of some starts. Returns whether there was anything to learn.

    weight: (K,) weights of the steps; advantage: (K, N, B) and starts: (n,) which starts, both on the CPU;
    first: whether the weights are still those of the rollout.
    """
    K = len(rollout.logp)
    # a state with advantage 0 adds no gradient: unless the KL is on, skipping it changes nothing
    live = (advantage[:, starts] != 0).any(2) | (args.kl_coef > 0)  # (K, n) TempFlow: any of its branches
    step, place = live.nonzero().T
    start = starts[place]
    if common.total(len(step)) == 0:  # without a gradient Adam's momentum alone would move the weights
        return False
    advantage = advantage.to(policy.device)
    for mb_step, mb_start in policy.micro_batches(step, start):
        logp, mean, std = transition_logp(policy, rollout, mb_step, mb_start)
        # In the first update the ratio is exactly 1: no weight has changed since the rollout, and every call
        # has the same shape. The loss is -A then, and its gradient is not 0 but -A * grad logp. If the ratio
        # differs from 1 here, rollout and training disagree, and later ratios are wrong as well.
        log_ratio = logp - rollout.logp[mb_step, mb_start]
        if first:
            stats.add(ratio_first_error=(log_ratio.exp() - 1).abs())
        mb_advantage = advantage[mb_step, mb_start]  # (M, B) TempFlow: of this step only
        loss = policy_loss(log_ratio, mb_advantage, args.clip_range)  # (M, B)
        loss = loss.mean(1) * weight[mb_step]  # (M,) TempFlow: mean over branches, times the step's weight
        if args.kl_coef > 0:  # KL of the sampler's Gaussians; [FG] omits Delta from the variance
            with policy.reference():
                _, mean_ref, _ = transition_logp(policy, rollout, mb_step, mb_start)
            kl = ((mean - mean_ref) ** 2 / (2 * std**2)).flatten(1).mean(1)
            stats.add(kl_ref=kl)
            loss = loss + args.kl_coef * kl
        policy.backward((loss / K).sum() / len(starts))
        stats.add(loss=loss, **ratio_metrics(log_ratio, mb_advantage, args.clip_range))
    stats.add(grad_norm=policy.clip_gradients(args.max_grad_norm))
    optimizer.step()
    policy.update_average()
    optimizer.zero_grad(set_to_none=False)  # clip_gradients needs every .grad
    return True


def main(args):
    # TempFlow: N starts with a trunk each; a group is the branches of a start at a step, or of a prompt
    P, S, U, B = args.prompts_per_iteration, args.seeds_per_prompt, args.updates_per_iteration, args.branches
    G = B if args.group == "seed" else S * B
    N = common.split_batch(args, S, group=G)  # starts per iteration on this process
    sde_steps, K = common.parse_sde_steps(args)  # K of them are random in an iteration
    reward, eval_reward = common.load_rewards(args, get_reward)
    policy = common.make_policy(args, trajectories=N * B)
    # eps is 1e-8, as in published code. SD3's gradients are of that size, so it about halves their updates
    optimizer = torch.optim.AdamW(policy.parameters, args.learning_rate, weight_decay=0.0)
    sigmas = policy.sigmas(args.steps)
    s = noise_scale(sigmas, args.sde, args.noise_level)  # (T - 1,)
    weights = torch.zeros_like(s)  # TempFlow: of all steps, with mean 1 over those of --sde-steps
    levels = sigmas[:-2][sde_steps], sigmas[1:-1][sde_steps], s[sde_steps]
    weights[sde_steps] = step_weights(*levels, args.sde, args.weighting)
    prompt_index = torch.arange(N, device=policy.device) // S  # (N,) the prompt of each start
    batch = f"{P} prompts x {S} starts x {K} steps x {B} branches = {P * S * K * B} images"
    common.print_plan(args, sigmas, s, sde_steps, batch, weights)

    run = common.Run(args, policy, optimizer, reward, eval_reward, trajectories=N * B)
    if not run.lines:  # a new run: evaluate the base model
        run.record({"iteration": 0} | run.evaluate(0))
    for iteration in run.remaining():
        # The sampler is deterministic but for the random steps: only they have a probability to change.
        run.phase("rollout")
        prompts, text = run.text(iteration)
        chosen = common.iteration_steps(sde_steps, K, iteration, args.seed)  # K steps
        generator = common.generator(args.seed, "noise", iteration)
        weight = weights[chosen]  # TempFlow
        noise = [policy.draw_noise(P, S, generator)]
        noise += [policy.draw_noise(P, S * B, generator).unflatten(0, (N, B)) for _ in range(K)]
        latents, rollout = sample(policy, text, prompt_index, noise, sigmas, s, args.sde, chosen)

        # Branches of a state differ in one random step only. They are compared with each other, so that this
        # step gets all the credit.
        run.phase("reward")
        captions = [prompts[n] for n in prompt_index.repeat_interleave(B).tolist()] * K
        rewards, parts = common.score(policy, reward, latents, captions)
        batch_std = common.gather(rewards).std(correction=0) if args.adv_std == "batch" else None
        advantage, zero_std_groups = group_advantage(rewards.view(-1, G), batch_std, args.adv_clip)
        advantage = advantage.view(K, N, B)  # TempFlow: each step has its own

        # From the second update on, the weights are not those that sampled: the ratio corrects for this, and
        # its clip keeps them near.
        run.phase("train")
        stats, stepped = common.Stats(), False
        batch = rollout, weight, advantage
        for starts in torch.arange(N).view(U, -1):
            stepped |= update(policy, optimizer, args, *batch, starts, stats, first=not stepped)
        gradient = gradient_scale(rollout.sigma, rollout.sigma_next, rollout.s, args.sde)  # TempFlow
        del noise, latents, rollout, batch  # the next rollout needs the memory

        metrics = {"iteration": iteration} | stats.metrics()
        metrics |= common.reward_metrics(rewards, parts, G, zero_std_groups)
        metrics |= step_metrics(chosen, rewards.view(K, N, B), gradient, weight)
        if iteration % args.eval_every == 0 or iteration == args.iterations:
            metrics |= run.evaluate(iteration)
        run.record(metrics)
    run.summary()


if __name__ == "__main__":
    common.run_script("tempflow_grpo", main, Args, DEFAULTS)
