"""The three scripts share this file: sampler, model families, policy, processes, run, command line.

To read the algorithms you need the sampler and the policy. This file imports none of the scripts, and
importing it does no work. As in the papers, sigma is the noise level, from 1 (noise) to 0 (image); velocity =
noise - image; x_sigma = (1 - sigma) image + sigma noise; Delta = sigma - sigma_next; and s is a noise scale.
[FG] is Flow-GRPO (arXiv 2505.05470), [DG] DanceGRPO (2505.07818), [CPS] Flow-CPS (2509.05952),
[PR] Precise (2605.23522), [GC] GCPO (2510.21583), [TF] TempFlow-GRPO (2508.04324).
"""

import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys
import textwrap
import time
from argparse import ArgumentParser
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch.nn.functional import adaptive_avg_pool2d, pad, pixel_shuffle, pixel_unshuffle
from tqdm import tqdm

TINY = Path(__file__).resolve().parent / "tests" / "tiny"

# ---------------------------------------------------------------- sampler, advantages, metrics of the ratio


def noise_scale(sigmas, sde, noise_level):
    """Noise scale s of every step that can be random; the noise of such a step has std s sqrt(Delta).

    sigmas: (T + 1,) from 1 down to 0. noise_level: a or eta, at least 0. sde: the sampler.
        "flow"     s = a sqrt(sigma / (1 - sigma)) [FG] eq. 9; the first step divides by 1 - sigma_1, not by 0
        "dance"    s = eta [DG]
        "cps"      std = sigma_next sin(eta pi / 2) [CPS]
        "precise"  std = sigma_next sqrt(1 - r^(eta^2)) [PR], where r = sigma_next (1 - sigma) / (sigma (1 -
                   sigma_next)); r = 0 in the first step, which replaces all noise
    Returns (T - 1,): the last step is always an ODE step.
    """
    sigma, sigma_next = sigmas[:-2], sigmas[1:-1]
    if sde == "dance":
        return torch.full_like(sigma, noise_level)
    if sde == "flow":
        return noise_level * (sigma / (1 - torch.cat([sigmas[1:2], sigma[1:]]))).sqrt()
    if sde == "cps":
        std = sigma_next * math.sin(noise_level * math.pi / 2)
    else:
        r = sigma_next * (1 - sigma) / (sigma * (1 - sigma_next))
        r[0] = 0.0
        std = sigma_next * (1 - r ** (noise_level**2)).sqrt()
    return std / (sigma - sigma_next).sqrt()


def wide(x):
    """Cast half precision to float32, in which the sampler computes; float32 and float64 stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sde_drift_std(sigma, sigma_next, s, sde="flow"):
    """How much predicted noise a step removes beyond the ODE step, and the std of the noise that it adds.

    sigma, sigma_next, s: tensors that broadcast. "flow" and "dance" keep the marginals of the ODE if steps
    are small [FG]. With "cps" and "precise" the noise level after a step of any size is exactly sigma_next,
    if the predicted image is right [CPS], [PR].
    """
    delta = sigma - sigma_next
    std = s * delta.sqrt()
    if sde in ("cps", "precise"):
        return sigma_next - (sigma_next**2 - std**2).clamp(min=0).sqrt(), std
    return s**2 * delta / (2 * sigma), std


def sde_mean_std(x, velocity, sigma, sigma_next, s, sde="flow"):
    """Mean and standard deviation of one SDE step, for any noise scale s >= 0 [FG] eq. 9, [CPS], [PR].

    x, velocity: (B, ...) latents and velocity at sigma; sigma, sigma_next, s: numbers or (B,) tensors.
    Returns the mean, shaped like x, and the std as (B or 1, 1, ...), in float32 or wider. With s = 0 the mean
    is exactly the Euler step of the ODE. A new sampler only needs its own drift and std. The predicted
    noise is x + velocity (1 - sigma).
    """
    x, velocity = wide(x), wide(velocity)
    levels = [torch.as_tensor(level, dtype=x.dtype, device=x.device) for level in (sigma, sigma_next, s)]
    sigma, sigma_next, s = (level.view(-1, *[1] * (x.dim() - 1)) for level in levels)
    drift, std = sde_drift_std(sigma, sigma_next, s, sde)
    mean = (x - velocity * (sigma - sigma_next)) - drift * (x + velocity * (1 - sigma))
    return mean, std


def log_prob(x, mean, std, batch_dims=1):
    """Log-density of x under a Gaussian, AVERAGED over the dimensions: (B, ...) -> (B,), float32 or wider.

    mean and std (a tensor, over 0) broadcast against x; the first batch_dims dimensions of x are kept. The
    true log-probability is the sum. Every published implementation averages, which divides the log-ratio by
    the number of dimensions (65,536 at 512 px). That is why clip ranges are 1e-5 to 1e-3. The ratio still
    depends on the resolution: for equal changes per element its std falls as 1 / sqrt(dimensions).
    """
    logp = -((wide(x) - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return logp.flatten(batch_dims).mean(-1)


@torch.no_grad()
def ode_sample(policy, x, text, prompt_index, sigmas, tuned_share=1.0):
    """Euler sampling from x (B, ...) at sigmas[0], as at inference; other arguments as in velocity.

    sigmas: (T + 1,) or a consecutive part of them. tuned_share < 1 is hybrid inference [GC]: the adapter is
    on only in the first tuned_share of the steps. It is always on afterwards.
    """
    for step in range(len(sigmas) - 1):
        if step == math.ceil(tuned_share * (len(sigmas) - 1) - 1e-9):
            policy.transformer.disable_adapters()
        velocity = policy.velocity_in_micro_batches(x, sigmas[step], text, prompt_index)
        x = x - (sigmas[step] - sigmas[step + 1]) * velocity
    policy.transformer.enable_adapters()
    return x


def group_advantage(rewards, std=None, clip=5.0):
    """A = (r - mean of the group) / (std + 1e-4), clipped to +-clip; exactly 0 in a group of equal rewards.

    rewards: (..., G), a group in the last dimension. std: None to use the std of each group [DG], or the std
    of the whole batch [FG], as a number; both with correction=0. Returns advantages shaped like rewards, and
    the share of groups with equal rewards, from which nothing is learned.
    """
    r = rewards.double()
    equal = r.amax(-1, keepdim=True) == r.amin(-1, keepdim=True)  # their mean may differ by rounding
    scale = r.std(-1, keepdim=True, correction=0) if std is None else std
    advantage = ((r - r.mean(-1, keepdim=True)) / (scale + 1e-4)).clamp(-clip, clip)
    return advantage.masked_fill(equal, 0.0).to(rewards.dtype), equal.double().mean().item()


def generator(seed, purpose, number):
    """A random generator that depends only on these three: a resumed run draws the same numbers."""
    digest = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def iteration_prompts(prompts, count, iteration, seed):
    """The prompts of an iteration (1, 2, ...): all are used, in random order, before any is used again."""
    places = [divmod(n, len(prompts)) for n in range((iteration - 1) * count, iteration * count)]
    epochs = {epoch for epoch, _ in places}
    order = {n: torch.randperm(len(prompts), generator=generator(seed, "prompts", n)) for n in epochs}
    return [prompts[order[epoch][index]] for epoch, index in places]


def iteration_steps(steps, count, iteration, seed):
    """Which `count` of the `steps` are random and trained in an iteration, in rising order."""
    chosen = torch.randperm(len(steps), generator=generator(seed, "sde-steps", iteration))[:count]
    return [steps[n] for n in sorted(chosen.tolist())]


class Stats:
    """Collects tensors over an iteration's updates without waiting for the device, and averages them."""

    def __init__(self):
        self.values = {}

    def add(self, **values):
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach().flatten())

    def metrics(self, clip_range, steps, transitions):
        """Metrics of an iteration, over all processes.

        Needs first_log_ratio and first_step of the first update, and loss, log_ratio, advantage, grad_norm of
        all. steps: K. transitions: the number of losses, including skipped ones, which count as 0 in the
        averages. ratio_* exclude skipped ones, and are None if all are skipped. clip_low, clip_high: share of
        ratios whose gradient is clipped to 0: under 1 - clip_range with a negative advantage, over 1 +
        clip_range with a positive one. approx_kl: E[ratio - 1 - log ratio].
        """
        names = "log_ratio advantage first_log_ratio first_step loss"
        value = {name: [torch.zeros(0)] for name in names.split()}
        mine = {name: torch.cat(parts).float().cpu() for name, parts in self.values.items()}
        for name, values in ((name, process[name]) for process in gather_object([mine]) for name in process):
            value.setdefault(name, []).append(values)
        value = {name: torch.cat(parts) for name, parts in value.items()}
        share = len(value["loss"]) / sum(gather_object([transitions]))

        def of(function, values, empty=None):
            return function(values.double()).item() if values.numel() else empty

        ratio, advantage, step = value["log_ratio"].exp(), value.pop("advantage"), value.pop("first_step")
        error = (value.pop("first_log_ratio").exp() - 1).abs().view(len(step), -1 if len(step) else 1)
        metrics = {f"ratio_{name}": of(getattr(torch, name), ratio) for name in ("mean", "min", "max")}
        metrics["ratio_first_error"] = of(torch.max, error)
        metrics["ratio_first_error_by_step"] = [of(torch.max, error[step == n]) for n in range(steps)]
        metrics["grad_norm"] = of(torch.mean, value.pop("grad_norm"))
        value["approx_kl"] = ratio - 1 - value.pop("log_ratio")
        value["clip_low"] = (ratio < 1 - clip_range) & (advantage < 0)
        value["clip_high"] = (ratio > 1 + clip_range) & (advantage > 0)
        return metrics | {name: share * of(torch.mean, values, 0.0) for name, values in value.items()}


# ---------------------------------------------------------------- the model families


class SD3:
    """Stable Diffusion 3 and 3.5, and the interface of every other family.

    To add a family, write a class with the same names and register it in FAMILIES. Call the pipeline's own
    methods where possible, so that plain inference gives the same pictures.
    """

    name = "sd3"  # key in DEFAULTS
    # [FG]: the joint attention. The bare name "to_q" would also match SD3.5's second attention, attn2
    targets = r".*\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    max_sequence_length = 256  # T5 tokens, as in the pipeline; [FG] uses 128
    two_pass_guidance = True  # False: guidance is an input of the transformer, or absent
    even_sigmas = False  # whether the pipeline shifts evenly spaced noise levels

    def __init__(self, pipe):
        self.pipe, self.ids = pipe, None

    @staticmethod
    def latent_shape(vae, transformer, resolution):
        """(C, H, W) from the configs of VAE and transformer. SystemExit if the resolution does not fit."""
        scale = 2 ** (len(vae["block_out_channels"]) - 1)  # pixels per latent; 2 x 2 latents are one token
        most = transformer.get("pos_embed_max_size", math.inf) * 2 * scale
        fits = resolution % (2 * scale) == 0 and resolution <= most
        require(fits, f"--resolution {resolution} must be a multiple of {2 * scale} up to {most}")
        return vae["latent_channels"], resolution // scale, resolution // scale

    def encode(self, prompts):
        """Text embeddings of B prompts as the pipeline makes them: a list of tensors (B, ...)."""
        options = {"do_classifier_free_guidance": False, "max_sequence_length": self.max_sequence_length}
        embeds, _, pooled, _ = self.pipe.encode_prompt(prompts, None, None, **options)
        return [embeds, pooled]

    def shift(self, tokens, steps):
        """How far the schedule is shifted towards noise, by the number of image tokens."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        config = self.pipe.scheduler.config
        lengths = config.base_image_seq_len, config.max_image_seq_len
        return calculate_shift(tokens, *lengths, config.base_shift, config.max_shift)

    def sigmas(self, steps, resolution):
        """(steps + 1,) noise levels of the pipeline's scheduler, from 1 to 0."""
        scheduler, tokens = self.pipe.scheduler, (resolution // (2 * self.pipe.vae_scale_factor)) ** 2
        even = [1 - n / steps for n in range(steps)] if self.even_sigmas else None
        mu = self.shift(tokens, steps) if scheduler.config.use_dynamic_shifting else None
        scheduler.set_timesteps(steps, sigmas=even, mu=mu)
        return scheduler.sigmas

    def predict(self, x, sigma, text, guidance):
        """Velocity: x (B, C, H, W), sigma (B,), text as from encode; only FLUX.1 reads guidance."""
        embeds, pooled = text
        return self.pipe.transformer(x, embeds, pooled, sigma * 1000, return_dict=False)[0]

    def decode(self, x):
        """Latents (B, C, H, W) -> images (B, 3, H, W) in [0, 1]."""
        vae = self.pipe.vae
        image = vae.decode((x / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)).sample
        return self.pipe.image_processor.postprocess(image, output_type="pt")


class Flux(SD3):
    """FLUX.1: guidance is an input of the transformer, which sees the latents as tokens of 2 x 2."""

    name = "flux"
    # [FG]: also the feed-forward layers of both streams
    targets = SD3.targets + r"|.*\.ff(_context)?\.net\.(0\.proj|2)"
    max_sequence_length, two_pass_guidance = 512, False
    even_sigmas = True
    patch = 2

    def encode(self, prompts):
        return list(self.pipe.encode_prompt(prompts, None, max_sequence_length=self.max_sequence_length)[:2])

    def positions(self, embeds, x):
        """Position ids of text and image tokens, the same for every prompt and latent."""
        height, width = x.shape[2] // 2, x.shape[3] // 2
        image = self.pipe._prepare_latent_image_ids(1, height, width, x.device, x.dtype)
        return {"txt_ids": x.new_zeros(embeds.shape[1], 3), "img_ids": image}

    def predict(self, x, sigma, text, guidance):
        patches = pixel_unshuffle(x, self.patch)
        tokens, timestep = patches.flatten(2).transpose(1, 2), (sigma * 1000).to(x.dtype) / 1000
        self.ids = self.ids or self.positions(text[0], x)  # made once
        options = dict(zip(("encoder_hidden_states", "pooled_projections"), text)) | self.ids
        if self.pipe.transformer.config.guidance_embeds:
            options["guidance"] = x.new_full((len(x),), guidance, dtype=torch.float32)
        velocity = self.pipe.transformer(tokens, timestep=timestep, return_dict=False, **options)[0]
        return pixel_shuffle(velocity.transpose(1, 2).reshape(patches.shape), self.patch)


class Flux2Klein(Flux):
    """FLUX.2 klein: the latent's channels are patches of 2 x 2, normalised by the VAE's batch norm."""

    name = "flux2"
    # as for FLUX.1; the single stream has one layer into attention and feed-forward, and one out of them
    targets = SD3.targets + r"|.*\.(ff(_context)?\.linear_(in|out)|attn\.to_qkv_mlp_proj)"
    targets += r"|single_transformer_blocks\.\d+\.attn\.to_out"
    patch = 1

    def __init__(self, pipe):
        super().__init__(pipe)
        self.two_pass_guidance = not pipe.config.is_distilled  # distilled models have no guidance

    @staticmethod
    def latent_shape(vae, transformer, resolution):
        channels, height, width = SD3.latent_shape(vae, transformer, resolution)
        return 4 * channels, height // 2, width // 2

    def encode(self, prompts):
        return [self.pipe.encode_prompt(prompts, max_sequence_length=self.max_sequence_length)[0]]

    def shift(self, tokens, steps):
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        return compute_empirical_mu(tokens, steps)

    def positions(self, embeds, x):
        ids = self.pipe._prepare_text_ids(embeds[:1]), self.pipe._prepare_latent_ids(x[:1])
        return {"txt_ids": ids[0].to(x.device), "img_ids": ids[1].to(x.device)}

    def decode(self, x):
        vae = self.pipe.vae
        mean, variance = vae.bn.running_mean.view(1, -1, 1, 1), vae.bn.running_var.view(1, -1, 1, 1)
        x = x * (variance + vae.config.batch_norm_eps).sqrt().to(x.dtype) + mean.to(x.dtype)
        image = vae.decode(self.pipe._unpatchify_latents(x).to(vae.dtype)).sample
        return self.pipe.image_processor.postprocess(image, output_type="pt")


FAMILIES = {"StableDiffusion3Pipeline": SD3, "FluxPipeline": Flux, "Flux2KleinPipeline": Flux2Klein}


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


def model_index(model):
    """The model_index.json of a folder or repository. SystemExit if it is missing or not supported."""
    from huggingface_hub import hf_hub_download

    try:
        here = Path(model).exists() or Path(model).is_absolute()
        file = Path(model, "model_index.json") if here else hf_hub_download(model, "model_index.json")
        index = json.loads(Path(file).read_text("utf-8"))
        family, scheduler = index["_class_name"], index["scheduler"][1]
    except (OSError, ValueError, KeyError) as error:  # misspelt, gated, no network, another folder
        hint = "check spelling and network; for a gated model accept its licence and run `hf auth login`"
        require(False, f"--model {model} is not a diffusers pipeline: {one_line(error)}; {hint}")
    known = family in FAMILIES and scheduler == "FlowMatchEulerDiscreteScheduler"
    hint = f"use one of {', '.join(FAMILIES)} with FlowMatchEulerDiscreteScheduler"
    require(known, f"--model {model} is a {family} with {scheduler}; {hint}")
    return index


def load_pipeline(model, dtype, resolution):
    """The pipeline of a folder or repository; dtype: a name. SystemExit if it cannot be loaded."""
    import transformers

    transformers.logging.set_verbosity_error()  # it warns of packages that are not needed
    transformers.logging.disable_progress_bar()
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    index = model_index(model)
    absent = {name: None for name, value in index.items() if isinstance(value, list) and value[0] is None}
    try:
        load_config = diffusers.AutoencoderKL.load_config
        configs = load_config(model, subfolder="vae"), load_config(model, subfolder="transformer")
        FAMILIES[index["_class_name"]].latent_shape(*configs, resolution)  # before any weights are loaded
        # safetensors only, and never code from a repository
        options = {"use_safetensors": True, "trust_remote_code": False, "dtype": getattr(torch, dtype)}
        return diffusers.DiffusionPipeline.from_pretrained(model, **options, **absent)
    except (OSError, ValueError) as error:
        require(False, f"--model {model} cannot be loaded: {one_line(error)}")


# ---------------------------------------------------------------- the policy: a pipeline with a LoRA adapter


class Policy:
    """The trained model: a diffusers pipeline whose transformer has a LoRA adapter.

    Only the adapter is trained, in float32; everything else is frozen, in its own dtype. `velocity` is the
    only path to the network: rollout, training, reference and evaluation all use it. ema_every: optimizer
    steps per step of the moving average. max_sequence_length: T5 tokens, if different from the family's.
    """

    def __init__(
        self, pipe, resolution, guidance=1.0, micro_batch=1, lora_rank=32, lora_alpha=64.0, ema_decay=0.0,
        ema_every=1, device="cuda", seed=0, gradient_checkpointing=False, max_sequence_length=None,
    ):  # fmt: skip
        from diffusers.training_utils import EMAModel, cast_training_params
        from peft import LoraConfig

        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.transformer, self.device = pipe, pipe.transformer, torch.device(device)
        self.family = FAMILIES[type(pipe).__name__](pipe)
        if max_sequence_length is not None:
            self.family.max_sequence_length = max_sequence_length
        self.shape = self.family.latent_shape(pipe.vae.config, pipe.transformer.config, resolution)
        self.resolution, self.guidance, self.micro_batch = resolution, guidance, micro_batch
        self.velocity_evals, self.compiled = 0, False
        self.dtype = self.transformer.dtype  # diffusers walks all modules for this: 8.5 ms for SD3.5
        if self.dtype != torch.float32:  # TF32 for the float32 adapter, otherwise as slow as all the rest
            torch.set_float32_matmul_precision("high")
        # cuDNN's attention is off: FLUX.1's backward pass accessed illegal memory with it (H200, torch 2.11)
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.encoders = [part for name, part in pipe.components.items() if part and "text_encoder" in name]
        for part in (pipe.vae, pipe.transformer, *self.encoders):
            part.requires_grad_(False).eval()
        pipe.vae.to(self.device)
        pipe.transformer.to(self.device)
        torch.manual_seed(seed)  # LoRA's A is random and its B is zero: the first policy is the base model
        config = LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules=self.family.targets)
        self.transformer.add_adapter(config)
        cast_training_params(self.transformer, torch.float32)
        self.parameters = [p for p in self.transformer.parameters() if p.requires_grad]
        for parameter in self.parameters:  # stays zero if an update skips everything
            parameter.grad = torch.zeros_like(parameter)
        self.ema, self.ema_every = EMAModel(self.parameters, ema_decay) if ema_decay else None, ema_every
        # The loss is averaged over the latent's elements and the update's transitions (1,024, say), so its
        # gradients are tiny: they would be 0 in a float16 network. So the loss is multiplied by a power of
        # two, which changes no digit.
        self.loss_scale = 1024 * 2.0 ** round(math.log2(math.prod(self.shape)))
        if gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()

    def training_call(self, rows, text):
        """Set micro_batch to `rows`, do one forward and backward pass, and zero the gradients again."""
        self.micro_batch, evals = rows, self.velocity_evals
        index = torch.zeros(rows, dtype=torch.long, device=self.device)
        x = torch.zeros(rows, *self.shape, device=self.device)
        try:
            self.velocity(x, 0.5, text, index).mean().backward()
        finally:  # it may run out of memory halfway
            torch._foreach_zero_([parameter.grad for parameter in self.parameters])
            self.velocity_evals = evals
        return x

    def compile(self, text):
        """Compile the transformer's blocks for this micro_batch; if that fails, go on without."""
        print("compiling, about a minute")
        if not self.transformer._repeated_blocks:  # SD3's class does not name them
            self.transformer._repeated_blocks = self.transformer._no_split_modules
        try:
            self.compiled = True
            self.transformer.compile_repeated_blocks(dynamic=False)
            self.training_call(self.micro_batch, text)
        except Exception as error:  # no Triton, no C compiler, no headers
            self.compiled = False
            for module in self.transformer.modules():
                module._compiled_call_impl = None
            print(f"not compiled: {one_line(error)[:200]}")

    def fit_micro_batch(self, text, held, most):
        """Set micro_batch to what fits on the GPU beside `held` bytes that are not allocated yet.

        The size is extrapolated from the peak memory of 1 and 2 latents, in training and decoding, with 5%
        left free, and tested. It is at most `most`, the latents of an update, split into equal calls.
        """

        def peaks(rows):
            try:
                torch.cuda.reset_peak_memory_stats()
                x = self.training_call(rows, text)
                training = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                self.decode(x)
                return training, torch.cuda.max_memory_allocated()
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                torch.cuda.empty_cache()

        one = peaks(1)
        if not one:
            print("one latent does not fit: gradient checkpointing is on")
            self.transformer.enable_gradient_checkpointing()
            one = peaks(1)
        require(one, "out of memory with one latent; use a smaller --resolution or --reward-offload")
        two, free = peaks(2), torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
        size = min(1 + int((0.95 * free - held - a) / max(b - a, 1)) for a, b in zip(one, two)) if two else 1
        size = min(max(size, 1), most)
        while size > 1 and not peaks(size):
            size -= max(1, size // 4)
        size = min(gather_object([size]))
        self.micro_batch = math.ceil(most / math.ceil(most / size))

    @torch.no_grad()
    def encode(self, *batches):
        """Text embeddings of lists of prompts: for each list of n, tensors (n + 1, ...) on the CPU.

        The last row is the empty prompt, for guidance. The encoders are on the GPU only during this call.
        Each list is encoded in its own groups of eight, so the result does not depend on the other lists.
        """
        texts, encoders = [], torch.nn.ModuleList(self.encoders).to(self.device)
        for prompts in batches:
            unique = list(dict.fromkeys([*prompts, ""]))
            index = torch.tensor([unique.index(prompt) for prompt in [*prompts, ""]])
            parts = [self.family.encode(unique[start : start + 8]) for start in range(0, len(unique), 8)]
            texts.append([torch.cat(rows).cpu()[index] for rows in zip(*parts)])
        encoders.to("cpu")
        torch.cuda.empty_cache()
        return texts

    def print_cut_prompts(self, prompts):
        """Print how many prompts are longer than the text encoders read."""
        parts = self.pipe.components.items()
        for name, tokenizer in ((name, part) for name, part in parts if part and "tokenizer" in name):
            clip = "CLIP" in type(tokenizer).__name__
            limit = tokenizer.model_max_length if clip else self.family.max_sequence_length
            if tokenizer.chat_template:  # FLUX.2 reads prompts as messages
                messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
                prompts = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
            cut = sum(len(ids) > limit for ids in tokenizer(prompts, verbose=False)["input_ids"])
            if cut:
                print(f"{name} cuts {cut} of {len(prompts)} prompts after {limit} tokens")

    def velocity(self, x, sigma, text, prompt_index, fill=True):
        """Velocity at x, with classifier-free guidance if it is on: (B, ...) -> (B, ...) float32.

        x: latents; sigma: a number or (B,); text: one of encode's, on the device; prompt_index: (B,) rows of
        text. The batch is filled up to micro_batch rows with copies of the last row, which are dropped again:
        matrix products round differently for different shapes. With one shape for all calls, the log-probs of
        rollout and training agree to the last bit. Counts velocity evaluations: one per latent, three if a
        backward pass follows; twice as many if guidance takes two passes.
        """
        count = len(x)
        rows = max(count, self.micro_batch) if fill or self.compiled else count
        row = torch.arange(rows, device=self.device).clamp(max=count - 1)
        sigma = torch.as_tensor(sigma, device=self.device).expand(count)[row]
        prompt_index, x = prompt_index[row], x[row].to(self.dtype)
        two_pass = self.guidance > 1 and self.family.two_pass_guidance
        if two_pass:  # one call for both
            prompt_index = torch.cat([torch.full_like(prompt_index, -1), prompt_index])
            x, sigma = torch.cat([x, x]), torch.cat([sigma, sigma])
        grad = torch.is_grad_enabled()
        with torch.set_grad_enabled(grad or self.compiled):  # a graph without gradients rounds differently
            velocity = self.family.predict(x, sigma, [part[prompt_index] for part in text], self.guidance)
        velocity = velocity if grad else velocity.detach()
        if two_pass:
            without, with_text = velocity.chunk(2)
            velocity = without + self.guidance * (with_text - without)
        self.velocity_evals += count * (2 if two_pass else 1) * (3 if grad else 1)
        return wide(velocity[:count])

    def velocity_in_micro_batches(self, x, sigma, text, prompt_index, exact=math.inf):
        """Like velocity, for any number of latents. exact: the first `exact` get the shape of training."""
        M, starts = self.micro_batch, range(0, len(x), self.micro_batch)
        parts = [(x[n : n + M], sigma, text, prompt_index[n : n + M], n < exact) for n in starts]
        return torch.cat([self.velocity(*part) for part in parts])

    def micro_batches(self, *tensors):
        """Split tensors of n rows into [(part, part), ...] of micro_batch rows, on the device."""
        parts = [rows.to(self.device).split(self.micro_batch) for rows in tensors]
        return progress(list(zip(*parts)) if len(tensors[0]) else [], "micro-batches")

    def sigmas(self, steps):
        """(steps + 1,) noise levels of the pipeline's own scheduler, from 1 to 0."""
        return self.family.sigmas(steps, self.resolution).to(self.device)

    def noise(self, prompts, each, generator):
        """Standard normal latents of this process's prompts, `each` per prompt: (n * each, C, H, W).

        Drawn on the CPU for the prompts of all processes, so that it depends on neither device nor processes.
        """
        noise = torch.randn(prompts, each, *self.shape, generator=generator)
        return share(noise).flatten(0, 1).to(self.device)

    @torch.no_grad()
    def decode(self, x):
        """Latents -> images (B, 3, H, W) in [0, 1], float32, a micro-batch at a time."""
        return torch.cat([self.family.decode(part).float() for part in x.split(self.micro_batch)])

    @contextmanager
    def reference(self):
        """Inside, the adapter is off and no gradients are kept: this is the base model of the KL."""
        self.transformer.disable_adapters()
        with torch.no_grad():
            yield
        self.transformer.enable_adapters()

    def backward(self, loss):
        """Add the gradient of the loss, multiplied by loss_scale; clip_gradients divides by it again."""
        (loss * self.loss_scale).backward()

    def clip_gradients(self, max_norm):
        """Average the gradients over processes, undo loss_scale, clip. Returns the norm before clipping."""
        gradients, processes = [p.grad for p in self.parameters], PartialState().num_processes
        if processes > 1:  # one message; hundreds of small ones are slow
            summed = reduce(torch.nn.utils.parameters_to_vector(gradients), "sum")
            torch.nn.utils.vector_to_parameters(summed, gradients)
        torch._foreach_div_(gradients, self.loss_scale * processes)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, max_norm)
        hint = "resume from the last checkpoint with a lower --learning-rate or another --dtype"
        require(norm.isfinite(), f"the gradient is not finite; {hint}")
        return norm

    def update_average(self):
        """Update the moving average of the weights, if there is one. Call after each optimizer step."""
        if self.ema and (self.ema.optimization_step + 1) % self.ema_every:
            self.ema.optimization_step += 1  # counts only: the warm-up goes by optimizer steps, as in [FG]
        elif self.ema:
            self.ema.step(self.parameters)

    @contextmanager
    def averaged(self):
        """Inside, the weights are replaced by their moving average, once it has taken a step."""
        average = self.ema and self.ema.optimization_step >= self.ema_every
        if average:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
        yield
        if average:
            self.ema.restore(self.parameters)

    def lora(self):
        """The adapter's weights on the CPU, {name: tensor}."""
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(self.transformer)
        return {name: weight.detach().cpu() for name, weight in state.items()}

    def save_lora(self, folder):
        """Save the adapter as diffusers does, in a form that also works if its metadata are ignored.

        For this, B is multiplied by alpha / rank, and alpha = rank is written to the metadata.
        """
        from safetensors.torch import save

        config = self.transformer.peft_config["default"]
        scale, metadata = config.lora_alpha / config.r, config.to_dict() | {"lora_alpha": config.r}
        weights = {name: w * scale if "lora_B" in name else w for name, w in self.lora().items()}
        metadata = json.dumps({f"transformer.{k}": value for k, value in metadata.items()}, default=list)
        metadata = {"format": "pt", "lora_adapter_metadata": metadata}
        self.pipe.save_lora_weights(folder, weights, save_function=lambda w, p: write(p, save(w, metadata)))


def make_policy(args, trajectories):
    """The Policy for a script's settings. trajectories: most latents that are sampled together."""
    names = "guidance lora_rank lora_alpha ema_decay ema_every device seed gradient_checkpointing"
    pipe = load_pipeline(str(TINY) if args.model == "tiny" else args.model, args.dtype, args.resolution)
    return Policy(
        pipe,
        args.resolution,
        **{name: getattr(args, name) for name in names.split()},
        micro_batch=min(args.micro_batch, trajectories) or 1,
        max_sequence_length=0 if args.model == "tiny" else None,  # trained without T5 tokens
    )


# ---------------------------------------------------------------- several processes, as torchrun starts them


def join_processes(device):
    """Make the PartialState, once, for a run's device. Afterwards only the first process prints."""
    options, local, gpus = {}, int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if device.startswith("cuda") and "LOCAL_RANK" in os.environ:
        fits = device == "cuda" and local <= gpus
        require(fits, f"{local} processes need {local} GPUs and --device cuda; there are {gpus}")
        options["backend"] = "cuda:nccl,cpu:gloo"
    if not PartialState(cpu=not device.startswith("cuda"), **options).is_main_process:
        sys.stdout = open(os.devnull, "w")


def share(rows):
    """This process's part of the rows of all processes: with n processes, every n-th row."""
    return rows[PartialState().process_index :: PartialState().num_processes]


def gather(rows):
    """The rows of all processes, in the order they had before share, on the CPU."""
    parts = gather_object([rows.cpu()])
    whole = torch.cat(parts)
    for process, part in enumerate(parts):
        whole[process :: len(parts)] = part
    return whole


def progress(items, label, **options):
    """A progress bar around an iterable, in the terminal of the first process."""
    hidden = None if PartialState().is_main_process else True
    return tqdm(items, desc=label, **{"leave": False, "disable": hidden} | options)


# ---------------------------------------------------------------- the run: evaluation, checkpoint, log


def score(policy, reward, latents, prompts, at_once=64):
    """Decode and score N latents, about at_once at a time, as 10,000 branches would be 32 GB of images.

    Returns scores (N,), and {name: scores (N,)} of the reward's parts.
    """
    size = -(-at_once // policy.micro_batch) * policy.micro_batch
    slices = [slice(start, start + size) for start in range(0, len(latents), size)]
    scores, parts = zip(*[reward(policy.decode(latents[part]), prompts[part]) for part in slices])
    return torch.cat(scores), {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def reward_metrics(rewards, parts, group_size, zero_std_groups):
    """Metrics of the rollout's rewards (N,) and of their parts {name: (N,)}, over all processes.

    reward_std/<name>: std within a group, averaged over groups; shows how much each part of a sum counts.
    """
    rewards, shares = gather(rewards), gather_object([zero_std_groups])
    metrics = {"images": len(rewards)}
    metrics |= {"reward_mean": rewards.mean().item(), "reward_std": rewards.std().item()}
    for name, scores in parts.items():
        metrics[f"reward/{name}"] = gather(scores).mean().item()
        spread = scores.view(-1, group_size).std(-1, correction=0)
        metrics[f"reward_std/{name}"] = gather(spread).mean().item()
    return metrics | {"zero_std_groups": sum(shares) / len(shares)}


def save_pictures(images, captions, folder, iteration, size=192, columns=4):
    """Save images (B, 3, H, W) in [0, 1] as a grid, and the first grid beside this one as compare.png."""
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.utils import make_image_grid
    from PIL import Image, ImageDraw, ImageOps

    images = adaptive_avg_pool2d(images.clamp(0, 1), size)  # enlarges small ones without blur
    images = VaeImageProcessor.pt_to_numpy(pad(images, (4, 4, 4, 52), value=1.0))
    tiles = VaeImageProcessor.numpy_to_pil(images)
    for tile, caption in zip(tiles, captions):
        text = "\n".join(textwrap.wrap(caption, 30)[:3])
        ImageDraw.Draw(tile).text((4, size + 6), text, "black", font_size=13)
    tiles += [Image.new("RGB", tiles[0].size, "white")] * (-len(tiles) % columns)
    make_image_grid(tiles, len(tiles) // columns, columns).save(folder / f"{iteration}.png")
    both = [ImageOps.expand(Image.open(folder / f"{n}.png"), 6, "grey") for n in (0, iteration)]
    make_image_grid(both, rows=1, cols=2).save(folder / "compare.png")


def plot_progress(lines, path):
    """Save the rewards of rollout and evaluation over iterations as a chart."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for key, label in {"reward_mean": "rollout (SDE)", "eval_reward": "evaluation (ODE)"}.items():
        points = {line["iteration"]: line[key] for line in lines if key in line}
        axes.plot(points.keys(), points.values(), ".-", label=label)
    axes.set(title="reward", xlabel="iteration")
    axes.legend()
    figure.savefig(path)


def write(path, data):
    """Write bytes to a file. After a crash the file is complete: the old one or the new one."""
    with open(f"{path}.tmp", "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


class Run:
    """A run and its folder: everything but the algorithm. The first process writes and prints.

    With --resume, restores weights, optimizer and counters from the last checkpoint. iteration: the last
    complete iteration, None before the base model is evaluated. stored: number of latents that a rollout
    keeps; states: number of latents that an update trains on.
    """

    def __init__(self, args, policy, optimizer, reward, eval_reward, stored, states):
        self.args, self.policy, self.optimizer, self.folder = args, policy, optimizer, Path(args.output)
        self.reward, self.eval_reward, self.prompts = reward, eval_reward, read_prompts(args.prompts)
        self.iteration, self.images, self.best, self.lines = None, 0, None, []
        self.texts, self.measured, self.current = {}, {}, ("", 0.0)
        self.eval_prompts = read_prompts(args.eval_prompts)[:64]
        names = "reward eval_steps eval_seeds eval_hybrid guidance resolution"  # what eval_reward depends on
        self.measure = [self.eval_prompts, *(getattr(args, name, None) for name in names.split())]
        self.header = "iteration    reward evaluated   clipped  gradient\n"
        policy.print_cut_prompts(self.prompts)
        if args.resume:
            self.load()
        (self.eval_text,) = policy.encode(self.eval_prompts)
        text = self.text((self.iteration or 0) + 1)[1] if self.iteration != args.iterations else None
        if args.micro_batch == 0 and text:
            adamw = 2 * sum(parameter.nbytes for parameter in policy.parameters)
            policy.fit_micro_batch(text, 4 * math.prod(policy.shape) * stored + adamw, states)
            args.micro_batch = policy.micro_batch
            args.gradient_checkpointing = policy.transformer.is_gradient_checkpointing
        if args.compile and text:
            policy.compile(text)
        print(f"{policy.micro_batch} latents at a time")
        if PartialState().is_main_process:
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            write(self.folder / "config.json", json.dumps(run_config(args), indent=1).encode())
            lines = "".join(json.dumps(line) + "\n" for line in self.lines)
            write(self.folder / "metrics.jsonl", lines.encode())

    def remaining(self):
        """The iterations still to run, with a progress bar."""
        done, total = self.iteration, self.args.iterations
        return progress(range(done + 1, total + 1), "iterations", initial=done, total=total, leave=True)

    def text(self, iteration):
        """This process's prompts of an iteration, and their text. Encodes ten iterations at once."""
        if iteration not in self.texts:
            count, seed = self.args.prompts_per_iteration, self.args.seed
            ahead = range(iteration, min(iteration + 10, self.args.iterations + 1))
            batches = [share(iteration_prompts(self.prompts, count, n, seed)) for n in ahead]
            self.texts = dict(zip(ahead, zip(batches, self.policy.encode(*batches))))
        prompts, text = self.texts[iteration]
        return prompts, [rows.to(self.policy.device) for rows in text]

    def phase(self, name):
        """End the previous phase, log its seconds as <phase>_s, and begin another."""
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize()
        before, start = self.current
        self.measured[f"{before}_s"] = round(time.perf_counter() - start, 3)
        self.current = name, time.perf_counter()

    @torch.no_grad()
    def evaluate(self, iteration, tuned_share=1.0):
        """Evaluate the averaged weights on fixed prompts and noise by ODE steps, which are not counted.

        Writes samples/<iteration>.png and samples/compare.png. tuned_share: as in ode_sample.
        """
        self.phase("eval")
        args, policy, evals = self.args, self.policy, self.policy.velocity_evals
        prompts = [prompt for prompt in self.eval_prompts for _ in range(args.eval_seeds)]
        noise = policy.noise(len(prompts), 1, generator(0, "evaluation", 0))
        index = share(torch.arange(len(prompts), device=policy.device) // args.eval_seeds)
        text = [rows.to(policy.device) for rows in self.eval_text]
        sigmas, latents = policy.sigmas(args.eval_steps), []
        with policy.averaged():
            for x, rows in policy.micro_batches(noise, index):
                latents.append(ode_sample(policy, x, text, rows, sigmas, tuned_share))
        latents, policy.velocity_evals = torch.cat(latents), evals
        scores, parts = score(policy, self.reward, latents, share(prompts))
        if self.eval_reward:
            parts |= score(policy, self.eval_reward, latents, share(prompts))[1]
        scores, latents = gather(scores), gather(latents)
        parts = {name: gather(values) for name, values in parts.items()}
        if PartialState().is_main_process:
            if iteration == 0:
                print(*self.reward.self_check(prompts, parts, args.resolution), sep="\n")
            shown = list(range(0, len(prompts), args.eval_seeds))[:16]  # always the first prompts
            images = policy.decode(latents[shown].to(policy.device)).cpu()
            captions = [f"{scores[n]:.2f}  {prompts[n]}" for n in shown]
            save_pictures(images, captions, self.folder / "samples", iteration)
        metrics = {f"eval/{name}": values.mean().item() for name, values in parts.items()}
        return {"eval_reward": scores.mean().item()} | metrics

    def save(self, iteration, metrics):
        """Save a complete iteration: its metrics, the adapter if it was evaluated, then the checkpoint.

        In this order no line of metrics is missing after a crash; lines after the checkpoint are dropped.
        """
        self.phase("")
        evals = sum(gather_object([self.policy.velocity_evals]))
        self.measured.pop("_s")
        if self.policy.device.type == "cuda":
            self.measured["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
            torch.cuda.reset_peak_memory_stats()
        self.images += metrics.get("images", 0)
        metrics |= self.measured | {"images": self.images, "velocity_evals": evals}
        self.measured, self.iteration = {}, iteration
        if not PartialState().is_main_process:
            return
        self.lines.append(json.loads(json.dumps(metrics), parse_constant=lambda _: None))  # nan is not JSON
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(self.lines[-1]) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if iteration and "eval_reward" in metrics:
            with self.policy.averaged():
                self.policy.save_lora(self.folder / "lora")
                if self.best is None or metrics["eval_reward"] > self.best[0]:
                    self.best = [metrics["eval_reward"], iteration, self.measure]
                    self.policy.save_lora(self.folder / "lora_best")
        if iteration % self.args.save_every == 0 or iteration == self.args.iterations:
            state = {"iteration": iteration, "images": self.images, "velocity_evals": evals}
            state |= {"best": self.best, "lora": self.policy.lora(), "optimizer": self.optimizer.state_dict()}
            state |= {"ema": self.policy.ema and self.policy.ema.state_dict()}
            torch.save(state, buffer := io.BytesIO())  # written to a file, a full disk is no OSError
            write(self.folder / "checkpoint.pt", buffer.getbuffer())

    def load(self):
        """Restore what save stored. Settings given together with --resume are kept."""
        from peft import set_peft_model_state_dict

        policy, path, file = self.policy, self.folder / "checkpoint.pt", self.folder / "metrics.jsonl"
        lines = file.read_text("utf-8", errors="replace").splitlines() if file.exists() else []
        if not path.exists() and len(lines) < 2:  # it ended before its first checkpoint
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.iteration, self.images, self.best = state["iteration"], state["images"], state["best"]
            self.lines = [json.loads(line) for line in lines[: self.iteration + 1]]
            complete = len(self.lines) == self.iteration + 1
        except Exception as error:  # damaged files raise errors of many kinds
            require(False, f"{path} or metrics.jsonl cannot be read: {one_line(error)}; start a new run")
        require(complete, f"{file} has fewer lines than {self.iteration + 1}; start a new run")
        done, asked = self.iteration, self.args.iterations
        require(asked >= done, f"--iterations {asked} must be at least {done}, which are done")
        if self.best and self.best[2] != self.measure:
            self.best = None
            print("evaluations differ from those before: the best adapter is chosen anew")
        policy.velocity_evals = state["velocity_evals"] if PartialState().is_main_process else 0
        set_peft_model_state_dict(policy.transformer, state["lora"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:  # load_state_dict restored the old one
            group["lr"] = self.args.learning_rate
        if policy.ema and state["ema"]:
            policy.ema.load_state_dict(state["ema"] | {"decay": self.args.ema_decay})
            policy.ema.to(policy.device)
        elif policy.ema:  # a new average, of the weights as they are now
            policy.ema.shadow_params = [parameter.detach().clone() for parameter in policy.parameters]

    def log(self, iteration, metrics):
        """Show a saved iteration: in the terminal, in samples/progress.png if evaluated, on wandb."""
        if not PartialState().is_main_process:
            return
        off = metrics.get("ratio_first_error") or 0.0
        if iteration == 1 and not off < 0.1 * self.args.clip_range:
            print(f"warning: before any update the ratio differs from 1 by {off:.1e}: rollout and training")
            print("disagree, so later ratios are wrong as well. Try --no-compile and another --dtype.")
        clipped = metrics["clip_low"] + metrics["clip_high"] if iteration else None
        row = metrics.get("reward_mean"), metrics.get("eval_reward"), clipped, metrics.get("grad_norm")
        cells = "".join(f"{'' if value is None else format(value, '.4g'):>10}" for value in row)
        tqdm.write(f"{self.header}{iteration:9d}{cells}")
        self.header = ""
        if "eval_reward" in metrics:
            plot_progress(self.lines, self.folder / "samples" / "progress.png")
        if self.args.wandb:
            sys.modules["wandb"].log(self.lines[-1], step=iteration)

    def summary(self):
        """Print two lines: the results of the run, and its files."""
        scores = [line["eval_reward"] for line in self.lines if "eval_reward" in line]
        minutes = sum(line[name] for line in self.lines for name in line if name.endswith("_s")) / 60
        if self.best:
            best, at, _ = self.best
            print(f"eval_reward {scores[0]:.3f} -> {scores[-1]:.3f}, best {best:.3f} at {at};", end=" ")
            print(f"{minutes:.1f} minutes, {self.lines[-1]['velocity_evals']:,} velocity evaluations")
            print(*(self.folder / name for name in ("samples/compare.png", "lora", "lora_best")), sep="  ")


def run_config(args):
    """The content of config.json: script, all settings as used, versions, commit, command."""
    try:
        git = ["git", "-C", str(TINY.parents[1]), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # git is not installed
        commit = None
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}
    config = {"script": args.script, "settings": asdict(args) | {"resume": None}, "versions": versions}
    wandb_id = sys.modules["wandb"].run.id if args.wandb else None
    return config | {"commit": commit, "command": " ".join(sys.argv), "wandb_id": wandb_id}


# ---------------------------------------------------------------- the command line


@dataclass
class Args:
    """Settings shared by all scripts; comments are help texts. Defaults of None are set in parse_args."""

    prompts: str | None = None  # text file with one prompt per line, or .jsonl; default: the tiny model's
    model: str | None = None  # repository or folder; default: SD3.5 Medium if --prompts and CUDA, else tiny
    reward: str | None = None  # name, or a sum pickscore=0.7,ocr=0.3; default: pickscore, shapes for tiny
    output: str | None = None  # run folder; default: runs/SCRIPT-MODEL-SEED-TIME
    resume: str | None = None  # run folder to resume; options given with it override that run's settings
    seed: int = 0  # random seed for everything
    device: str | None = None  # cuda or cpu; default: cuda if there is a GPU
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # frozen weights; default: bfloat16 on CUDA
    compile: bool = False  # compile the transformer's blocks; default: on for real models on CUDA
    gradient_checkpointing: bool = False  # saves memory, takes a third longer to train
    micro_batch: int = 3  # M, latents per forward pass; 0 finds what fits (default of real models on CUDA)
    lora_rank: int = 32  # LoRA rank
    lora_alpha: float = 64.0  # LoRA alpha; the adapter is scaled by alpha / rank
    eval_prompts: str | None = None  # file, of which 64 are used; default: --prompts, or tiny's held-out ones
    eval_every: int = 30  # iterations between evaluations
    eval_steps: int = 40  # ODE steps of an evaluation
    eval_seeds: int = 1  # images per prompt in an evaluation
    eval_reward: str | None = None  # other rewards, logged as eval/<name>, not used in training
    reward_offload: bool = False  # keep unused reward models on the CPU
    save_every: int = 1  # iterations between checkpoints
    wandb: str | None = None  # also log to this wandb project; needs wandb installed


NOISE_LEVELS = {"flow": 0.7, "dance": 0.3, "cps": 0.8, "precise": 1.5}  # [FG], [DG], [CPS], [PR]


def parse_args(script, args_class, defaults, argv=None):
    """The command line as an args_class, checked. Loads no model and writes nothing.

    script: its name. defaults: {"tiny": {...}, "sd3": {...}}, settings of a model that differ from the class
    defaults. With --resume the settings of that run are the defaults.
    """
    import tyro

    first = ArgumentParser(add_help=False, allow_abbrev=False)  # options that decide the other defaults
    for name in ("model", "prompts", "resume", "sde", "device"):
        first.add_argument(f"--{name}")
    given, _ = first.parse_known_args(argv)
    stored = {} if given.resume is None else resumed_settings(script, args_class, given.resume)
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.startswith("cuda")
    default = "stabilityai/stable-diffusion-3.5-medium" if given.prompts and cuda else "tiny"
    model = given.model or stored.get("model", default)
    model = model if model == "tiny" else absolute(model)
    require(model != "tiny" or TINY.is_dir(), f"the tiny model is not there: copy {TINY}, or give --model")
    family = "tiny" if model == "tiny" else FAMILIES[model_index(model)["_class_name"]].name
    settings = {"device": device, "reward": "shapes" if family == "tiny" else "pickscore"} | defaults[family]
    own = args_class(**settings)
    if cuda and family != "tiny":
        settings = {"dtype": "bfloat16", "compile": True} | settings | {"micro_batch": 0}
    settings |= stored | {"model": model}
    if given.sde and given.sde != settings.get("sde", own.sde):  # each sampler has its own noise level
        settings["noise_level"] = (
            own.noise_level if given.sde == own.sde else NOISE_LEVELS.get(given.sde, 0.7)
        )
    args = tyro.cli(args_class, default=args_class(**settings), args=argv, prog=f"{script}.py")
    args.script, args.model = script, model
    args.micro_batch = args.micro_batch or (0 if args.device.startswith("cuda") else own.micro_batch)
    for name in ("model", "seed", "lora_rank", "lora_alpha", "output") if stored else ():
        same = getattr(args, name) == stored[name]
        require(same, f"--resume cannot change --{name.replace('_', '-')}; start a new run")
    require(args.prompts or family == "tiny", "a model other than tiny needs --prompts FILE")
    args.prompts, args.eval_prompts = absolute(args.prompts), absolute(args.eval_prompts)
    args.eval_prompts = args.eval_prompts or args.prompts or "tiny:eval_prompts.txt"
    args.prompts = args.prompts or "tiny:prompts.txt"
    args.reward, args.eval_reward = absolute_files(args.reward), absolute_files(args.eval_reward)
    check_numbers(args)
    read_prompts(args.prompts), read_prompts(args.eval_prompts)
    now = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    default = f"runs/{script}-{Path(model).name}-{args.seed}-{now}"
    folder = Path(os.path.expanduser(args.output or default))
    try:
        new = not folder.exists() or not any(folder.iterdir())
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        fits = (stored or new) and parent.is_dir() and os.access(parent, os.W_OK)
    except OSError:  # it is a file, or has too long a name
        fits = False
    require(fits, f"--output {folder} already exists or cannot be written; give another, or --resume it")
    args.output = str(folder)
    join_processes(args.device)
    try:
        torch.zeros(1, device=args.device).item()
        if args.device.startswith("cuda:"):  # so that memory is measured there, too
            torch.cuda.set_device(args.device)
    except (RuntimeError, AssertionError) as error:
        require(False, f"--device {args.device} cannot be used: {one_line(error)}; try cpu")
    if family == "tiny" and given.prompts and not given.model and not stored:
        print("No CUDA GPU here: training the tiny model, which can only draw a few coloured shapes.")
    if args.wandb and PartialState().is_main_process:
        start_wandb(args)
    return args


def require(condition, message):
    """End the script with a one-line message unless the condition holds."""
    if not condition:
        raise SystemExit(f"error: {message}")


def absolute(path):
    """The absolute path of a file or folder that exists, so that resume works from anywhere."""
    full = os.path.expanduser(path or "")
    return str(Path(full).absolute()) if os.path.exists(full) else path


def absolute_files(spec):
    """A reward spec with absolute paths of its files and folders."""
    return spec and re.sub(r"[^,:=]*[/.~][^,:=]*", lambda match: absolute(match[0].strip()), spec)


def resumed_settings(script, args_class, folder):
    """The settings of the run in a folder. SystemExit if this script cannot resume it."""
    folder = Path(os.path.expanduser(folder))
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        owner, settings = config["script"], config["settings"]
        differ = sorted(settings.keys() ^ args_class.__dataclass_fields__.keys())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        require(False, f"--resume {folder} is not a run folder: {one_line(error)}")
    require(owner == script, f"--resume {folder} is a run of {owner}.py; start a new run")
    require(not differ, f"--resume {folder} is of another version, with other settings: {', '.join(differ)}")
    if settings["eval_prompts"] == settings["prompts"]:  # the default, if --prompts is given again, too
        settings["eval_prompts"] = None
    return settings | {"resume": str(folder), "output": str(folder)}


def check_numbers(args):
    """SystemExit for numbers that would silently train nonsense."""
    shares = {"ema_decay", "clip_range", "chunk_fraction", "eval_hybrid"}
    shares |= {"noise_level"} if args.sde == "cps" else set()
    for name, value in asdict(args).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            lowest = 0 if name in ("seed", "kl_coef", "ema_decay", "guidance", "micro_batch") else 1e-30
            lowest = 1e-3 if name == "noise_level" else lowest  # a random step without noise has no log-prob
            highest = 1 if name in shares else 2**31
            fits = lowest <= value <= highest  # false for nan
            limits = f"{'over 0' if lowest == 1e-30 else f'at least {lowest}'} and at most {highest}"
            require(fits, f"--{name.replace('_', '-')} {value} must be {limits}")
    require(args.steps > 1, "--steps must be at least 2, as the last step is never random")


def start_wandb(args):
    """Start logging to wandb; with --resume, to the same wandb run again."""
    try:
        import wandb

        config = Path(args.output, "config.json")
        run_id = json.loads(config.read_text("utf-8"))["wandb_id"] if args.resume else None
        options = {"name": config.parent.name, "config": asdict(args), "id": run_id, "resume": "allow"}
        wandb.init(project=args.wandb, **options)
    except Exception as error:  # not installed, not logged in, no network
        require(False, f"--wandb: {one_line(error)}; pip install wandb; wandb login")


@cache
def read_prompts(path):
    """Prompts of a UTF-8 file: one per line, or the field `prompt` of each line of a .jsonl.

    Blank lines and lines that start with # are skipped. tiny:...: a file of the tiny model. A file is
    read only once, so a pipe works.
    """
    path = TINY / path[5:] if path.startswith("tiny:") else Path(path)
    where = ""
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").split("\n")]
        prompts = [line for line in lines if line and not line.startswith("#")]
        if path.suffix.lower() in (".json", ".jsonl"):
            prompts = [json.loads(where := line)["prompt"].strip() for line in prompts]
        valid = prompts and all(prompts) and "\0" not in "".join(prompts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        where = f"{one_line(error)} {where[:80]}".strip()
        require(False, f"prompts file {path} cannot be read: {where}; give UTF-8 text or .jsonl")
    require(valid, f"prompts file {path}: no prompts, an empty prompt or a NUL; write one prompt per line")
    return prompts


def parse_sde_steps(args):
    """--sde-steps: the steps that may be random, and how many of them each iteration draws.

    "early" means the first half of --steps, "0,1,2" these three, "3" three drawn anew in each iteration, "3,"
    only step 3.
    """
    spec, last = args.sde_steps, args.steps - 2
    steps = list(range(args.steps // 2 if spec == "early" else last + 1))
    if "," in spec and re.fullmatch(r"[\d,]+", spec):
        steps = [int(step) for step in spec.split(",") if step]
    count = int(spec) if spec.isdecimal() else len(steps)
    known = spec in ("all", "early") or re.fullmatch(r"[\d,]+", spec)
    fits = known and steps == sorted({*steps} & {*range(last + 1)}) and 1 <= count <= len(steps)
    allowed = f"all, early, a rising list within 0 to {last}, or how many to draw"
    require(fits, f"--sde-steps {spec} must be {allowed}")
    return steps, count


def out_of_memory(error):
    found = re.search("out of memory|DefaultCPUAllocator", str(error))
    return isinstance(error, MemoryError) or bool(found)


def load_rewards(args, get_reward):
    """Load args.reward and args.eval_reward (or None), and check that they can read their prompts."""
    specs = args.reward, args.eval_reward
    rewards = [get_reward(x, args.device, args.reward_offload) if x is not None else None for x in specs]
    held_out = read_prompts(args.eval_prompts)[:64]
    for reward, prompts in zip(rewards, ([*read_prompts(args.prompts), *held_out], held_out)):
        if reward:
            reward.load(prompts)
    return rewards


def split_batch(args, each, group):
    """How many trajectories this process samples, `each` per prompt. group: number of images compared."""
    P, U, processes = args.prompts_per_iteration, args.updates_per_iteration, PartialState().num_processes
    require(group > 1, "a group of one image has no advantage; compare at least two")
    divides = P * each % U == 0 and (processes == 1 or P % (processes * U) == 0)
    numbers = f"{P} prompts x {each} = {P * each} trajectories into {U} updates on {processes} processes"
    hint = "change --prompts-per-iteration or --updates-per-iteration"
    require(divides, f"cannot divide {numbers} (of equally many prompts); {hint}")
    shown = min(64, len(read_prompts(args.eval_prompts))) * args.eval_seeds
    require(shown >= processes, f"{shown} evaluation images for {processes} processes; raise --eval-seeds")
    if group < 6:
        print(f"warning: in groups of {group} the advantage is noisy; use 8 or more if you can")
    return P * each // processes


def print_plan(args, sigmas, s, sde_steps, each, weight=None):
    """Print the batch arithmetic and a table of steps. each: trajectories per prompt. weight: (T - 1,)"""
    P, U, weight = args.prompts_per_iteration, args.updates_per_iteration, s / s if weight is None else weight
    print(f"{args.iterations} iterations of {P} prompts x {each} = {P * each} trajectories in {U} updates")
    print("step   sigma   Delta       s     std  weight")
    for n, delta in enumerate(-sigmas.diff()):
        random = f"{s[n]:6.4f}  {s[n] * delta.sqrt():6.4f}  {weight[n]:6.4f}" if n in sde_steps else "ODE"
        print(f"{n:4d}  {sigmas[n]:6.4f}  {delta:6.4f}  {random}")


def run_script(script, main, args_class, defaults):
    """Run a script's main. On Ctrl-C or out of memory, print one line; on a bug, a traceback."""
    args = None
    try:
        args = parse_args(script, args_class, defaults)
        main(args)
    except (KeyboardInterrupt, RuntimeError, MemoryError) as error:
        saved = args and Path(args.output, "checkpoint.pt").exists()
        hint = f"; resume with: python {script}.py --resume {args.output}" if saved else ""
        if isinstance(error, KeyboardInterrupt):
            raise SystemExit(f"stopped{hint}")
        if out_of_memory(error):
            advice = "use a smaller --micro-batch, --gradient-checkpointing or --reward-offload"
            raise SystemExit(f"error: out of memory; {advice}{hint}")
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
