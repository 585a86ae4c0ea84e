"""TempFlow-GRPO for flow-matching text-to-image models: GRPO with an advantage per step ([TF],
arXiv 2508.04324).

    python tempflow_grpo.py                        # the bundled tiny model, minutes on a laptop
    python tempflow_grpo.py --prompts data.txt     # Stable Diffusion 3.5 Medium with LoRA, on a CUDA GPU

One iteration: sample ODE trajectories with branches of one SDE step (rollout), score the branches (reward),
compare each branch with the others from the same state (advantage), and make the steps to the better ones
more probable, those to the others less (update).

A transition is one random step of the sampler. The notation and the sources in brackets are explained in
common.py, the settings in Args, and the metrics in README.md.
"""

import sys
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

import common
from common import group_advantage, log_prob, noise_scale, ratio_metrics, sde_drift_std, sde_mean_std
from rewards import get_reward


@dataclass
class RolloutArgs:
    iterations: int = 180  # rounds of rollout and update
    prompts_per_iteration: int = 16  # P, prompts per rollout
    steps: int = 10  # T, sampling steps
    sde_steps: str = "0,1,2"  # where branches split off: all, early (first half) or a list 0,1,2
    sde_steps_per_iteration: int = 0  # how many of --sde-steps each iteration draws; 0 uses all
    sde: Literal["flow", "dance", "cps", "precise"] = "flow"  # sampler, how random steps add noise
    noise_level: float = 0.7  # noise level of random steps: a for flow, eta for the others
    guidance: float = 1.0  # classifier-free guidance, off at 1


# TempFlow: starts and branches replace the group size
@dataclass
class BranchArgs:
    seeds_per_prompt: int = 1  # S, initial noises (starts) per prompt
    branches: int = 12  # B, branches per start and random step
    group: Literal["seed", "prompt"] = "seed"  # compare branches of one start, or of all starts of a prompt
    weighting: Literal["noise", "none"] = "noise"  # weights of the steps' losses: by noise, or all 1


@dataclass
class UpdateArgs:
    updates_per_iteration: int = 2  # U, optimizer steps per rollout, each on different starts
    learning_rate: float = 3e-4  # AdamW learning rate
    clip_range: float = 1e-4  # the ratio is clipped to 1 +- clip_range
    adv_clip: float = 5.0  # advantages are clipped to +- adv_clip
    adv_std: Literal["group", "batch"] = "group"  # whose std divides advantages: each group's or the batch's
    kl_coef: float = 0.0  # beta, coefficient of the KL penalty to the base model, off at 0
    max_grad_norm: float = 1.0  # gradient clipping: larger norms are scaled down to this norm
    ema_decay: float = 0.9  # EMA decay of the adapter's weights, off at 0
    ema_every: int = 8  # optimizer steps between updates of the EMA


@dataclass
class Args(common.RunArgs, common.ModelArgs, RolloutArgs, BranchArgs, UpdateArgs, common.EvaluationArgs):
    """Train a text-to-image model with TempFlow-GRPO. Example: python tempflow_grpo.py --prompts data.txt"""


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

    text: list  # tensors from policy.encode: one row per prompt, then one of the empty prompt
    prompt_index: torch.Tensor  # (N,) which row of text each start uses
    sde: str  # the sampler, as in sde_mean_std
    sigma: torch.Tensor  # (K,) noise level before each random step
    sigma_next: torch.Tensor  # (K,) noise level after the step
    s: torch.Tensor  # (K,) noise scale
    x: torch.Tensor  # (K, N, C, H, W) latents before the step
    x_next: torch.Tensor  # (K, N, B, C, H, W) latents after the step
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
    trunk, trunk_index = noise[0], prompt_index
    branches, branch_index = noise[0][:0], prompt_index[:0]  # none yet
    x, x_next, logp = [], [], []
    for step in common.progress(range(len(sigmas) - 1), "rollout"):
        latents, index = torch.cat([trunk, branches]), torch.cat([trunk_index, branch_index])
        n = len(trunk)  # these rows are trained, so they are padded to the shape of training
        velocity = policy.velocity_batched(latents, sigmas[step], text, index, pad_first=n)
        ode_next = latents - (sigmas[step] - sigmas[step + 1]) * velocity
        branches = ode_next[n:]
        if step in chosen:
            mean, std = sde_mean_std(trunk, velocity[:n], sigmas[step], sigmas[step + 1], s[step], sde)
            mean, std = mean[:, None], std[:, None]  # for B branches of each state
            branched = mean + std * noise[1 + chosen.index(step)]  # (N, B, C, H, W)
            x.append(trunk)
            x_next.append(branched)
            logp.append(log_prob(branched, mean, std, batch_dims=2))
            branches = torch.cat([branches, branched.flatten(0, 1)])
            branch_index = torch.cat([branch_index, prompt_index.repeat_interleave(branched.shape[1])])
        trunk = ode_next[:n]
        if step >= chosen[-1]:  # no trunk is needed after the last branches
            trunk, trunk_index = trunk[:0], trunk_index[:0]
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
    return branches, rollout


def gradient_scale(sigma, sigma_next, s, sde):
    """Size of d logp / d velocity at each of K steps, (K,), up to a factor that all steps share.

    It is |d mean / d velocity| / std. For "flow" and "dance" this is f sqrt(Delta) / s with the factor
    f = 1 + s^2 (1 - sigma) / (2 sigma).
    """
    drift, std = sde_drift_std(sigma, sigma_next, s, sde)
    return (sigma - sigma_next + drift * (1 - sigma)) / std


def step_weights(sigma, sigma_next, s, sde, weighting):
    """Weights of the losses of K steps, (K,), with mean 1 [TF]; sigma, sigma_next, s: (K,).

    Without weights low-noise steps dominate (gradient_scale). The weight is Delta / gradient_scale, so each
    step contributes in proportion to its length Delta. With the factor f of gradient_scale, this is
    s sqrt(Delta) / f for "dance". For "flow", f is 1 + a^2 / 2 at every step but the first, and [TF] omits
    it. [TF]'s code divides by a constant instead of by the mean, which is right for one schedule only.
    """
    if weighting == "none":
        return torch.ones_like(s)
    delta = sigma - sigma_next
    if sde == "flow":
        weight = s * delta.sqrt()
    else:
        weight = delta / gradient_scale(sigma, sigma_next, s, sde)
    return weight / weight.mean()


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
    """PPO's clipped loss, to be minimised, shaped like log_ratio = logp - old_logp."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped)


# TempFlow
def step_metrics(chosen, rewards, gradient, weight):
    """Metrics with one value per chosen step.

    rewards: (K, N, B). reward_std_by_step: std over the branches of a state, averaged [TF] figure 2.
    gradient, weight: (K,) size of d logp / d velocity, and the weights of the steps; the size is logged with
    and without the weights, with mean 1.
    """
    spread = common.gather(rewards.std(2, correction=0).T).mean(0)
    weighted = gradient * weight
    return {
        "branch_steps": chosen,
        "reward_std_by_step": spread.tolist(),
        "gradient_by_step": (gradient / gradient.mean()).tolist(),
        "gradient_by_step_weighted": (weighted / weighted.mean()).tolist(),
    }


def update(policy, optimizer, args, rollout, weight, advantage, starts, stats, on_policy):
    """One optimizer step on the transitions of some starts. Returns whether there was anything to learn.

    weight: (K,) of the steps; advantage: (K, N, B) and starts: (n,) which starts, both on the CPU; on_policy:
    whether the network's weights are still those of the rollout.
    """
    K = len(rollout.logp)
    live = torch.ones(K, len(starts), dtype=torch.bool)
    if args.kl_coef == 0:  # a state has no gradient then if all of its branches have advantage 0
        live = (advantage[:, starts] != 0).any(2)
    nothing_to_learn = common.total(live.sum().item()) == 0  # in all processes
    if nothing_to_learn:  # a step would still move the weights, by Adam's momentum
        return False
    step, column = live.nonzero(as_tuple=True)  # sorted by step; column: of starts
    start = starts[column]
    advantage = advantage.to(policy.device)
    for mb_step, mb_start in policy.micro_batches(step, start):
        logp, mean, std = transition_logp(policy, rollout, mb_step, mb_start)
        # In the first update the ratio is exactly 1: no weight has changed since the rollout, and the network
        # is always called with one shape (Policy.velocity). The loss is then -A, but its gradient is not 0:
        # it is -A * grad logp. If this ratio is not 1, rollout and training disagree; later ratios are wrong.
        log_ratio = logp - rollout.logp[mb_step, mb_start]
        if on_policy:
            stats.add(ratio_first_error=(log_ratio.exp() - 1).abs())
        mb_advantage = advantage[mb_step, mb_start]  # (M, B) TempFlow: each step has its own advantages
        loss = policy_loss(log_ratio, mb_advantage, args.clip_range)  # (M, B)
        loss = loss.mean(1) * weight[mb_step]  # (M,) TempFlow: mean over branches, times the step's weight
        if args.kl_coef > 0:
            with policy.reference():
                _, mean_ref, _ = transition_logp(policy, rollout, mb_step, mb_start)
            kl = common.gaussian_kl(mean, mean_ref, std)  # (M,)
            stats.add(kl_ref=kl)
            loss = loss + args.kl_coef * kl
        # the mean over the K steps and over the update's starts: skipped states count as zeros
        policy.backward((loss / K).sum() / len(starts))
        stats.add(loss=loss, **ratio_metrics(log_ratio, mb_advantage, args.clip_range))
    grad_norm = policy.clip_gradients(args.max_grad_norm)
    optimizer.step()
    policy.update_ema()
    optimizer.zero_grad(set_to_none=False)  # a process without a share in a step adds zeros
    stats.add(grad_norm=grad_norm)
    return True


def main(args):
    # TempFlow: N starts with a trunk each; a group is the branches of a start, or of a prompt, at one step
    P, S, B = args.prompts_per_iteration, args.seeds_per_prompt, args.branches
    U = args.updates_per_iteration
    G = B if args.group == "seed" else S * B
    N = common.split_batch(args, S, group=G)  # starts per iteration on this process
    sde_steps, K = common.parse_sde_steps(args)  # an iteration uses K of them
    reward, eval_reward = common.load_rewards(args, get_reward)
    policy = common.make_policy(args, trajectories=N * B)
    # Adam's default eps is as large as SD3's gradients, so it about halves the updates, as in published code
    optimizer = torch.optim.AdamW(policy.parameters, args.learning_rate, weight_decay=0.0)
    sigmas = policy.sigmas(args.steps)
    s = noise_scale(sigmas, args.sde, args.noise_level)  # (T - 1,)
    before, after = sigmas[:-1][sde_steps], sigmas[1:][sde_steps]  # noise levels
    all_weights = torch.zeros_like(s)  # TempFlow: (T - 1,) with mean 1 over --sde-steps
    all_weights[sde_steps] = step_weights(before, after, s[sde_steps], args.sde, args.weighting)
    prompt_index = torch.arange(N, device=policy.device) // S  # (N,) the prompt of each start
    images = f"{P} prompts x {S} starts x {K} steps x {B} branches = {P * S * K * B} images"
    common.print_plan(args, sigmas, s, sde_steps, images, all_weights)

    run = common.Run(args, policy, optimizer, reward, eval_reward, trajectories=N * B)
    if not run.lines:  # a new run: evaluate the base model
        run.record({"iteration": 0} | run.evaluate(0))
    for iteration in run.remaining():
        # Only random steps have a probability, so only they can be made more probable.
        run.phase("rollout")
        prompts, text = run.text(iteration)
        chosen = common.iteration_steps(sde_steps, K, iteration, args.seed)  # K steps
        generator = common.generator(args.seed, "noise", iteration)
        weight = all_weights[chosen]  # (K,) TempFlow
        noise = [policy.draw_noise(P, S, generator)]
        for _ in range(K):  # TempFlow: for the branches at each step
            noise.append(policy.draw_noise(P, S * B, generator).unflatten(0, (N, B)))
        latents, rollout = sample(policy, text, prompt_index, noise, sigmas, s, args.sde, chosen)

        # Branches of a state differ in one random step only. By default they are compared with each other, so
        # this step gets all the credit.
        run.phase("reward")
        captions = [prompts[n] for n in prompt_index.repeat_interleave(B).tolist()]
        captions = captions * K  # latents are in the order of step, start, branch
        rewards, parts = common.score(policy, reward, latents, captions)
        batch_std = None  # each group has its own
        if args.adv_std == "batch":
            batch_std = common.gather(rewards).std(correction=0)
        advantage, zero_std_groups = group_advantage(rewards.view(-1, G), batch_std, args.adv_clip)
        advantage = advantage.view(K, N, B)

        # From the second update on, the weights differ from those of the rollout. The ratio corrects for it,
        # and clipping keeps the difference small.
        run.phase("train")
        stats, on_policy = common.Stats(), True
        for starts in torch.arange(N).view(U, -1):
            stepped = update(policy, optimizer, args, rollout, weight, advantage, starts, stats, on_policy)
            on_policy = on_policy and not stepped
        gradient = gradient_scale(rollout.sigma, rollout.sigma_next, rollout.s, args.sde)  # TempFlow
        del noise, latents, rollout  # the next rollout needs the memory

        metrics = {"iteration": iteration} | stats.metrics()
        metrics |= common.reward_metrics(rewards, parts, G, zero_std_groups)
        metrics |= step_metrics(chosen, rewards.view(K, N, B), gradient, weight)
        if iteration % args.eval_every == 0 or iteration == args.iterations:
            metrics |= run.evaluate(iteration)
        run.record(metrics)
    run.summary()


if __name__ == "__main__":
    # TempFlow: for those who come from grpo.py
    common.require("--group-size" not in " ".join(sys.argv), "there is no --group-size here; use --branches")
    common.run_script("tempflow_grpo", main, Args, DEFAULTS)
