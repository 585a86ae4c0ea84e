"""GRPO for flow-matching text-to-image models ([FG] Flow-GRPO, arXiv 2505.05470; [DG] DanceGRPO, arXiv
2505.07818).

    python grpo.py                        # the bundled tiny model, minutes on a laptop
    python grpo.py --prompts data.txt     # Stable Diffusion 3.5 Medium with LoRA, on a CUDA GPU

One iteration: sample a group of images for every prompt with the SDE (rollout), score them (reward), compare
each with its group (advantage), and make the transitions of the better ones more probable, those of the
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
    iterations: int = 180  # rounds of rollout and update
    prompts_per_iteration: int = 16  # P, prompts per rollout
    group_size: int = 16  # G, images per prompt
    steps: int = 10  # T, sampling steps
    sde_steps: str = "early"  # which steps are random and trained: all, early (first half) or a list 0,1,2
    sde_steps_per_iteration: int = 0  # how many of --sde-steps each iteration draws; 0 uses all
    sde: Literal["flow", "dance", "cps", "precise"] = "flow"  # sampler, how random steps add noise
    noise_level: float = 0.7  # noise level of random steps: a for flow, eta for the others
    guidance: float = 1.0  # classifier-free guidance, off at 1
    shared_noise: bool = False  # one initial noise for a whole group, as in DanceGRPO


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
class Args(common.RunArgs, common.ModelArgs, RolloutArgs, UpdateArgs, common.EvaluationArgs):
    """Train a text-to-image model with GRPO. Example: python grpo.py --prompts data.txt --reward pickscore"""


# The defaults above are for SD3.5 Medium; these are the differences for other models. tiny: found by tuning.
# Others: learning rate, clip range, LoRA, noise level and moving average are from [FG]; with these batches a
# run takes an estimated 12 hours (tests/bench.py plan) on one GPU, of 24 GB for SD3 and FLUX.2, of 80 GB for
# FLUX.1. To save time, SD3 runs without guidance, as in [FG]'s fast runs, and only early steps are trained.
DEFAULTS = {
    "tiny": dict(
        iterations=150, prompts_per_iteration=8, group_size=12, micro_batch=48, resolution=32,
        sde="dance", noise_level=3.0, learning_rate=7e-4, clip_range=1e-3, ema_decay=0.97, ema_every=1,
        lora_rank=16, lora_alpha=32.0, eval_every=10, eval_steps=10, eval_seeds=4,
    ),
    "sd3": dict(),
    "flux": dict(
        iterations=110, group_size=12, guidance=3.5, noise_level=0.9, lora_rank=64, lora_alpha=128.0,
        save_every=5,
    ),
    "flux2": dict(iterations=150, prompts_per_iteration=8, group_size=12, sde_steps="0,1,2", eval_steps=50),
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


def update(policy, optimizer, args, rollout, advantage, images, stats, on_policy):
    """One optimizer step on the transitions of some images. Returns whether there was anything to learn.

    advantage: (N,) and images: (n,) which images, both on the CPU; on_policy: whether the weights are still
    those of the rollout.
    """
    K = len(rollout.logp)
    live = images
    if args.kl_coef == 0:  # an image with advantage 0 has no gradient then, so it can be skipped
        live = images[advantage[images] != 0]
    nothing_to_learn = common.total(len(live)) == 0  # in all processes
    if nothing_to_learn:  # a step would still move the weights, by Adam's momentum
        return False
    step = torch.arange(K).repeat_interleave(len(live))  # all steps of all live images
    image = live.repeat(K)
    advantage = advantage.to(policy.device)
    for mb_step, mb_image in policy.micro_batches(step, image):
        logp, mean, std = transition_logp(policy, rollout, mb_step, mb_image)
        # In the first update the ratio is exactly 1: no weight has changed since the rollout, and the network
        # is always called with one shape (Policy.velocity). The loss is then -A, but its gradient is not 0:
        # it is -A * grad logp. If this ratio is not 1, rollout and training disagree; later ratios are wrong.
        log_ratio = logp - rollout.logp[mb_step, mb_image]
        if on_policy:
            stats.add(ratio_first_error=(log_ratio.exp() - 1).abs())
        mb_advantage = advantage[mb_image]
        loss = policy_loss(log_ratio, mb_advantage, args.clip_range)  # (M,)
        if args.kl_coef > 0:
            with policy.reference():
                _, mean_ref, _ = transition_logp(policy, rollout, mb_step, mb_image)
            kl = common.gaussian_kl(mean, mean_ref, std)  # (M,)
            stats.add(kl_ref=kl)
            loss = loss + args.kl_coef * kl
        # the mean over the K steps and over the update's images: skipped images count as zeros
        policy.backward((loss / K).sum() / len(images))
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
    sde_steps, K = common.parse_sde_steps(args)  # an iteration uses K of them
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
        run.record({"iteration": 0} | run.evaluate(0))
    for iteration in run.remaining():
        # Only random steps have a probability, so only they can be made more probable.
        run.phase("rollout")
        prompts, text = run.text(iteration)
        chosen = common.iteration_steps(sde_steps, K, iteration, args.seed)  # K steps
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

        # From the second update on, the weights differ from those of the rollout. The ratio corrects for it,
        # and clipping keeps the difference small.
        run.phase("train")
        stats, on_policy = common.Stats(), True
        for images in torch.arange(N).view(U, -1):
            stepped = update(policy, optimizer, args, rollout, advantage, images, stats, on_policy)
            on_policy = on_policy and not stepped
        del noise, latents, rollout  # the next rollout needs the memory

        metrics = {"iteration": iteration} | stats.metrics()
        metrics |= common.reward_metrics(rewards, parts, G, zero_std_groups)
        if iteration % args.eval_every == 0 or iteration == args.iterations:
            metrics |= run.evaluate(iteration)
        run.record(metrics)
    run.summary()


if __name__ == "__main__":
    common.run_script("grpo", main, Args, DEFAULTS)
