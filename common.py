"""What the three scripts share: sampler, model families, policy, processes, run, command line.

To read the algorithms you need the first part, the sampler, and Policy.velocity; the rest is plumbing. This
file imports none of the scripts, and importing it does no work. As in the papers, sigma is the noise level,
from 1 (noise) to 0 (image); velocity = noise - image; x_sigma = (1 - sigma) image + sigma noise; Delta =
sigma - sigma_next; and s is a noise scale.
[FG] is Flow-GRPO (arXiv 2505.05470), [DG] DanceGRPO (2505.07818), [CPS] Flow-CPS (2509.05952),
[PR] Precise (2605.23522), [GC] GCPO (2510.21583), [TF] TempFlow-GRPO (2508.04324).
"""

import contextlib
import hashlib
import io
import json
import math
import os
import shlex
import sys
import textwrap
import time
import traceback
import uuid
from argparse import ArgumentParser
from dataclasses import asdict, dataclass, fields, make_dataclass
from datetime import datetime
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from packaging.version import Version
from torch.nn.functional import adaptive_avg_pool2d, pad, pixel_shuffle, pixel_unshuffle
from tqdm import tqdm

TINY = Path(__file__).resolve().parent / "tests" / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

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
        divisor = 1 - sigma
        divisor[0] = 1 - sigmas[1]  # the first sigma is 1 and would divide by 0; [FG]'s code does the same
        return noise_level * (sigma / divisor).sqrt()
    if sde == "cps":
        std = sigma_next * math.sin(noise_level * math.pi / 2)
    else:
        r = sigma_next * (1 - sigma) / (sigma * (1 - sigma_next))
        r[0] = 0.0  # exactly, although the first sigma may differ from 1 by rounding
        std = sigma_next * (1 - r ** (noise_level**2)).sqrt()
    return std / (sigma - sigma_next).sqrt()


def to_float32(x):
    """Cast half precision to float32, in which the sampler computes; float32 and float64 stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sde_drift_std(sigma, sigma_next, s, sde):
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


def sde_mean_std(x, velocity, sigma, sigma_next, s, sde):
    """Mean and standard deviation of one SDE step, for any noise scale s >= 0 [FG] eq. 9, [CPS], [PR].

    x, velocity: (B, ...) latents and velocity at sigma; sigma, sigma_next, s: numbers or (B,) tensors.
    Returns the mean, shaped like x, and the std as (B or 1, 1, ...), in float32 or wider. With s = 0 the mean
    is exactly the Euler step of the ODE. A new sampler only needs its own drift and std.

    To check your own sampler: from sigma 0.5 to 0.4 with "flow" 0.7 (s = 0.7), x = 1 and velocity = 2 give
    mean 0.702 and std 0.221.
    """
    x, velocity = to_float32(x), to_float32(velocity)

    def as_column(level):  # (B, 1, ...), so that it broadcasts against x
        level = torch.as_tensor(level, dtype=x.dtype, device=x.device)
        return level.view(-1, *[1] * (x.dim() - 1))

    sigma, sigma_next, s = as_column(sigma), as_column(sigma_next), as_column(s)
    drift, std = sde_drift_std(sigma, sigma_next, s, sde)
    noise = x + velocity * (1 - sigma)  # the predicted noise
    mean = x - velocity * (sigma - sigma_next) - drift * noise
    return mean, std


def log_prob(x, mean, std, batch_dims=1):
    """Log-density of x under a Gaussian, AVERAGED over the dimensions: (B, ...) -> (B,), float32 or wider.

    mean and std (a tensor, over 0) broadcast against x; the first batch_dims dimensions of x are kept. The
    true log-probability is the sum. The papers' implementations average, which divides the log-ratio by
    the number of dimensions (65,536 at 512 px). That is why clip ranges are 1e-5 to 1e-3. The ratio still
    depends on the resolution: for equal changes per element its std falls as 1 / sqrt(dimensions).
    """
    logp = -((to_float32(x) - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return logp.flatten(batch_dims).mean(-1)


def gaussian_kl(mean, other_mean, std):
    """KL of two Gaussians of equal std, averaged over the dimensions as in log_prob: (B, ...) -> (B,).

    Here std^2 = s^2 Delta. [FG]'s code has s^2 instead, so its beta means another strength.
    """
    return ((mean - other_mean) ** 2 / (2 * std**2)).flatten(1).mean(1)


@torch.no_grad()
def ode_sample(policy, x, text, prompt_index, sigmas, tuned_share=1.0):
    """Euler sampling from x (B, ...) at sigmas[0], as at inference; other arguments as in velocity.

    sigmas: (T + 1,) or a consecutive part of them. tuned_share < 1 is hybrid inference [GC]: the adapter is
    on only in the first tuned_share of the steps. The adapter is switched back on before returning.
    """
    steps = len(sigmas) - 1
    tuned_steps = math.ceil(tuned_share * steps - 1e-9)  # rounded up; 1e-9 since 0.6 * 5 is not exactly 3
    for step in progress(range(steps), "evaluation"):
        if step == tuned_steps:
            policy.transformer.disable_adapters()
        velocity = policy.velocity_batched(x, sigmas[step], text, prompt_index)
        x = x - (sigmas[step] - sigmas[step + 1]) * velocity
    policy.transformer.enable_adapters()
    return x


def group_advantage(rewards, std=None, clip=5.0):
    """A = (r - mean of the group) / (std + 1e-4), clipped to +-clip; exactly 0 in a group of equal rewards.

    rewards: (..., G), a group in the last dimension. std: None to use the std of each group [DG], or the std
    of the whole batch ([FG]'s code) as a number; both with correction=0. Returns advantages shaped like
    rewards, and the share of groups with equal rewards, from which nothing is learned.
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
    chosen, order = [], {}
    for n in range((iteration - 1) * count, iteration * count):
        epoch, place = divmod(n, len(prompts))  # an iteration may end one epoch and begin the next
        if epoch not in order:
            order[epoch] = torch.randperm(len(prompts), generator=generator(seed, "prompts", epoch))
        chosen.append(prompts[order[epoch][place]])
    return chosen


def iteration_steps(steps, count, iteration, seed):
    """Which `count` of the `steps` are random and trained in an iteration, in rising order."""
    chosen = torch.randperm(len(steps), generator=generator(seed, "sde-steps", iteration))[:count]
    return [steps[n] for n in sorted(chosen.tolist())]


def ratio_metrics(log_ratio, advantage, clip_range):
    """What is logged about ratios: ratio, clip_low, clip_high and approx_kl, each shaped like log_ratio.

    log_ratio: logp - old_logp; advantage: broadcasts against it. clip_low, clip_high: 1 for a ratio whose
    gradient is clipped to 0: under 1 - clip_range with a negative advantage, over 1 + clip_range with a
    positive one. approx_kl: ratio - 1 - log_ratio, the mean of which estimates the KL from the policy of the
    rollout. In float32 its few digits would be lost to rounding.
    """
    log_ratio = log_ratio.detach().double()
    ratio = log_ratio.exp()
    clip_low = (ratio < 1 - clip_range) & (advantage < 0)
    clip_high = (ratio > 1 + clip_range) & (advantage > 0)
    approx_kl = log_ratio.expm1() - log_ratio
    return {"ratio": ratio, "clip_low": clip_low, "clip_high": clip_high, "approx_kl": approx_kl}


class Stats:
    """Collects tensors during an iteration's updates without waiting for the device, and averages them."""

    def __init__(self):
        self.values = {}

    def add(self, **values):
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach().flatten())

    def metrics(self):
        """Means over all that was added, in all processes; None for what was never added.

        Skipped images are not added, so `loss` is a mean over trained ones. `ratio` becomes ratio_mean,
        ratio_min and ratio_max; of `ratio_first_error` the maximum is taken.
        """
        mine = {name: torch.cat(values).double().cpu() for name, values in self.values.items()}
        merged = {}
        for values in gather_object([mine]):  # a process with nothing to train has no values
            for name, value in values.items():
                merged.setdefault(name, []).append(value)
        names = "ratio_mean ratio_min ratio_max ratio_first_error clip_low clip_high approx_kl loss grad_norm"
        metrics = dict.fromkeys(names.split())
        for name, parts in merged.items():
            values = torch.cat(parts)
            if name == "ratio":
                metrics["ratio_mean"] = values.mean().item()
                metrics["ratio_min"] = values.min().item()
                metrics["ratio_max"] = values.max().item()
            elif name == "ratio_first_error":
                metrics[name] = values.max().item()
            else:
                metrics[name] = values.mean().item()
        return metrics


# ---------------------------------------------------------------- the model families


class SD3:
    """Stable Diffusion 3 and 3.5, and the interface of every other family.

    To add a family, write a class with the same names, and register it in FAMILIES and in the scripts'
    DEFAULTS. Call the pipeline's own methods where possible, so that plain inference gives the same pictures.
    """

    name = "sd3"  # key in DEFAULTS
    transformer_class, vae_class = "SD3Transformer2DModel", "AutoencoderKL"
    # [FG]: the joint attention. The bare name "to_q" would also match SD3.5's second attention, attn2
    targets = r".*\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    max_sequence_length = 256  # T5 tokens, as in the pipeline; [FG] uses 128
    two_pass_guidance = True  # False: guidance is an input of the transformer, or absent
    distilled = False  # True: made for a few steps without guidance, as far as the checkpoint tells
    even_sigmas = False  # whether the pipeline shifts evenly spaced noise levels

    def __init__(self, pipe):
        self.pipe = pipe

    def latent_shape(self, resolution):
        """(C, H, W) of the latents. SystemExit if the model cannot draw pictures of this resolution."""
        scale = 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)  # pixels per latent
        token = 2 * scale  # pixels: a token is 2 x 2 latents
        largest = self.pipe.transformer.config.get("pos_embed_max_size", math.inf) * token
        fits = resolution % token == 0 and resolution <= largest
        require(fits, f"--resolution {resolution} must be a multiple of {token} up to {largest}")
        return self.pipe.vae.config.latent_channels, resolution // scale, resolution // scale

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
        scheduler = self.pipe.scheduler
        tokens = (resolution // (2 * self.pipe.vae_scale_factor)) ** 2
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
        x = x / vae.config.scaling_factor + vae.config.shift_factor
        return self.pipe.image_processor.postprocess(vae.decode(x.to(vae.dtype)).sample, output_type="pt")


class Flux(SD3):
    """FLUX.1: guidance is an input of the transformer, which sees the latents as tokens of 2 x 2."""

    name = "flux"
    transformer_class, vae_class = "FluxTransformer2DModel", "AutoencoderKL"
    # [FG]: also the feed-forward layers of both streams
    targets = SD3.targets + r"|.*\.ff(_context)?\.net\.(0\.proj|2)"
    max_sequence_length = 512
    two_pass_guidance = False
    even_sigmas = True
    patch = 2

    def __init__(self, pipe):
        super().__init__(pipe)
        self.ids = None

    @property
    def distilled(self):  # FLUX.1-schnell
        return not self.pipe.transformer.config.guidance_embeds

    def encode(self, prompts):
        return list(self.pipe.encode_prompt(prompts, max_sequence_length=self.max_sequence_length)[:2])

    def positions(self, embeds, x):
        """Position ids of text and image tokens, the same for every prompt and latent."""
        image = self.pipe._prepare_latent_image_ids(1, x.shape[2] // 2, x.shape[3] // 2, x.device, x.dtype)
        return {"txt_ids": x.new_zeros(embeds.shape[1], 3), "img_ids": image}

    def predict(self, x, sigma, text, guidance):
        if self.ids is None:  # made once: resolution and number of text tokens are fixed
            self.ids = self.positions(text[0], x)
        patches = pixel_unshuffle(x, self.patch)
        tokens = patches.flatten(2).transpose(1, 2)
        timestep = (sigma * 1000).to(x.dtype) / 1000  # in bfloat16 rounded, as at inference with the pipeline
        inputs = {"encoder_hidden_states": text[0], "timestep": timestep, "return_dict": False, **self.ids}
        if len(text) > 1:
            inputs["pooled_projections"] = text[1]
        if self.pipe.transformer.config.guidance_embeds:
            inputs["guidance"] = torch.full((len(x),), guidance, dtype=torch.float32, device=x.device)
        velocity = self.pipe.transformer(tokens, **inputs)[0]
        return pixel_shuffle(velocity.transpose(1, 2).reshape(patches.shape), self.patch)


class Flux2Klein(Flux):
    """FLUX.2 klein: the latent's channels are patches of 2 x 2, normalised by the VAE's batch norm."""

    name = "flux2"
    transformer_class, vae_class = "Flux2Transformer2DModel", "AutoencoderKLFlux2"
    # as for FLUX.1; the single stream has one layer into attention and feed-forward, and one out of them
    targets = SD3.targets + r"|.*\.(ff(_context)?\.linear_(in|out)|attn\.to_qkv_mlp_proj)"
    targets += r"|single_transformer_blocks\.\d+\.attn\.to_out"
    patch = 1

    @property
    def distilled(self):
        return self.pipe.config.is_distilled

    @property
    def two_pass_guidance(self):
        return not self.distilled

    def latent_shape(self, resolution):
        channels, height, width = super().latent_shape(resolution)
        return 4 * channels, height // 2, width // 2

    def encode(self, prompts):
        return [self.pipe.encode_prompt(prompts, max_sequence_length=self.max_sequence_length)[0]]

    def shift(self, tokens, steps):
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        return compute_empirical_mu(tokens, steps)

    def positions(self, embeds, x):
        text, image = self.pipe._prepare_text_ids(embeds[:1]), self.pipe._prepare_latent_ids(x[:1])
        return {"txt_ids": text.to(x.device), "img_ids": image.to(x.device)}

    def decode(self, x):
        vae = self.pipe.vae
        mean, variance = vae.bn.running_mean.view(1, -1, 1, 1), vae.bn.running_var.view(1, -1, 1, 1)
        x = x * (variance + vae.config.batch_norm_eps).sqrt().to(x.dtype) + mean.to(x.dtype)
        x = self.pipe._unpatchify_latents(x)
        return self.pipe.image_processor.postprocess(vae.decode(x.to(vae.dtype)).sample, output_type="pt")


FAMILIES = {"StableDiffusion3Pipeline": SD3, "FluxPipeline": Flux, "Flux2KleinPipeline": Flux2Klein}


def model_index(model):
    """The model_index.json of a folder or repository. SystemExit if it is missing or not supported.

    Imports nothing that takes long, as the command line needs it to know a model's defaults.
    """
    from huggingface_hub import hf_hub_download

    try:
        folder = Path(absolute(model))
        local = folder.exists() or folder.is_absolute()
        file = folder / "model_index.json" if local else hf_hub_download(model, "model_index.json")
        index = json.loads(Path(file).read_text("utf-8"))
        family, scheduler = index["_class_name"], index["scheduler"][1]
    except (OSError, ValueError, KeyError) as error:  # misspelt, gated, no network, another folder
        hint = "check spelling and network; for a gated model accept its licence and run `hf auth login`"
        fail(f"--model {model} is not a diffusers pipeline: {error}; {hint}")
    known = family in FAMILIES and scheduler == "FlowMatchEulerDiscreteScheduler"
    hint = f"use one of {', '.join(FAMILIES)} with FlowMatchEulerDiscreteScheduler"
    require(known, f"--model {model} is a {family} with {scheduler}; {hint}")
    return index


def load_pipeline(model, dtype):
    """The pipeline of a folder or repository; dtype: a name. SystemExit if it cannot be loaded or trained."""
    import transformers

    transformers.logging.set_verbosity_error()  # it warns of packages that are not needed
    transformers.logging.disable_progress_bar()
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    options = {"use_safetensors": True, "trust_remote_code": False}  # never run code from a repository
    old = Version(diffusers.__version__) < Version("0.37")
    options["torch_dtype" if old else "dtype"] = DTYPES[dtype]
    left_out = {name: None for name, part in model_index(model).items() if part == [None, None]}  # SD3's T5
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(model, **options, **left_out)
    except (OSError, ValueError, ImportError) as error:
        fail(f"--model {model} cannot be loaded: {error}")
    family = FAMILIES[type(pipe).__name__]
    for part, wanted in ((pipe.transformer, family.transformer_class), (pipe.vae, family.vae_class)):
        found = type(part).__name__
        require(found == wanted, f"--model {model} has a {found}; it must be a {wanted}")
        quantised = getattr(part.config, "quantization_config", None)
        require(not quantised, f"--model {model} is quantised; use the original, with --dtype bfloat16")
        absent = [name for name, weight in part.named_parameters() if weight.is_meta]
        require(not absent, f"--model {model} is incomplete: {found} has no weights for {absent[:1]}")
    for option in ("invert_sigmas", "stochastic_sampling", "use_beta_sigmas"):
        problem = f"--model {model}: {option} of the scheduler is not supported; set it to false"
        require(not pipe.scheduler.config.get(option), problem)
    return pipe


# ---------------------------------------------------------------- the policy: a pipeline with a LoRA adapter


class Policy:
    """The trained model: a diffusers pipeline whose transformer has a LoRA adapter.

    Only the adapter is trained, in float32; everything else is frozen, in its own dtype. `velocity` is the
    only path to the network: rollout, training, reference and evaluation all use it. ema_every: optimizer
    steps between updates of the moving average.
    """

    def __init__(
        self, pipe, resolution, guidance=1.0, micro_batch=1, lora_rank=32, lora_alpha=64.0, ema_decay=0.0,
        ema_every=1, device="cuda", seed=0, gradient_checkpointing=False,
    ):  # fmt: skip
        from diffusers.training_utils import EMAModel, cast_training_params
        from peft import LoraConfig

        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.transformer, self.device = pipe, pipe.transformer, torch.device(device)
        self.family = FAMILIES[type(pipe).__name__](pipe)
        self.shape = self.family.latent_shape(resolution)
        self.resolution, self.guidance, self.micro_batch = resolution, guidance, micro_batch
        self.velocity_evals = 0  # counted by velocity
        self.compiled = False
        self.dtype = self.transformer.dtype  # before the adapter is added, which is float32
        if self.dtype != torch.float32:  # TF32 for the float32 adapter, otherwise as slow as all the rest
            torch.set_float32_matmul_precision("high")
        # cuDNN's attention is off: FLUX.1's backward pass accessed illegal memory with it (H200, torch 2.11)
        torch.backends.cuda.enable_cudnn_sdp(False)
        encoders = [part for name, part in pipe.components.items() if name.startswith("text_encoder")]
        self.encoders = torch.nn.ModuleList(part for part in encoders if part is not None)
        self.networks = torch.nn.ModuleList([pipe.transformer, pipe.vae])
        for part in (self.networks, self.encoders):
            part.requires_grad_(False).eval()
        self.networks.to(self.device)
        torch.manual_seed(seed)  # for LoRA's A; its B is zero, so the first policy is the base model
        config = LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules=self.family.targets)
        self.transformer.add_adapter(config)
        cast_training_params(self.transformer, torch.float32)
        self.parameters = [p for p in self.transformer.parameters() if p.requires_grad]
        for parameter in self.parameters:  # a process without anything to train adds zeros
            parameter.grad = torch.zeros_like(parameter)
        self.ema, self.ema_every = EMAModel(self.parameters, ema_decay), ema_every  # not used if decay is 0
        self.averaged = False  # whether the moving average was ever updated
        # The loss is averaged over the latent's elements and the update's transitions (for example 1,024), so
        # its gradients are tiny: they would be 0 in a float16 network. So the loss is multiplied by a power
        # of two, which changes no digit.
        self.loss_scale = 1024 * 2.0 ** round(math.log2(math.prod(self.shape)))
        if gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()

    def training_call(self, rows, text):
        """Set micro_batch to `rows`, and try one forward and backward pass. Returns the latents it used.

        Gradients are zero afterwards, and velocity evaluations are not counted.
        """
        evals, self.micro_batch = self.velocity_evals, rows
        x = torch.zeros(rows, *self.shape, device=self.device)
        prompt_index = torch.zeros(rows, dtype=torch.long, device=self.device)
        try:
            self.velocity(x, 0.5, text, prompt_index).mean().backward()
        finally:  # it may run out of memory halfway
            for parameter in self.parameters:
                parameter.grad.zero_()
            self.velocity_evals = evals
        return x

    def compile(self, text):
        """Compile the transformer's blocks for this micro_batch; if that fails, continue without."""
        print("compiling, about a minute")
        self.transformer._repeated_blocks = self.transformer._no_split_modules  # SD3 has only the second name
        self.transformer.compile_repeated_blocks(dynamic=False)
        self.compiled = True
        try:
            self.training_call(self.micro_batch, text)
        except Exception as error:  # no Triton, no C compiler, no headers
            self.compiled = False
            torch.compiler.set_stance("force_eager")
            print("not compiled:", " ".join(str(error).split())[:200])

    def fits(self, rows, reserved, text):
        """Whether training and decoding of so many latents fit on the GPU beside `reserved` bytes."""
        torch.cuda.empty_cache()
        try:
            ballast = torch.empty(reserved, dtype=torch.uint8, device=self.device)  # held during the trial
            self.decode(self.training_call(rows, text))
            del ballast
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return False
        return True

    def fit_micro_batch(self, text, trajectories, random_steps):
        """Set micro_batch to what fits on the GPU, at most `trajectories`, those of this process.

        What must stay free: the latents that an iteration keeps (noise, before and after each random step),
        and at least a tenth of the card. If not even one latent fits, gradient checkpointing is switched on.
        """
        latents = (1 + 3 * random_steps) * trajectories * math.prod(self.shape) * 4  # bytes
        _, size_of_card = torch.cuda.mem_get_info()
        reserved = max(latents, size_of_card // 10)
        rows = trajectories
        while not self.fits(rows, reserved, text):
            rows = rows * 9 // 10
            if rows == 0:
                advice = "use a smaller --resolution or --reward-offload"
                require(not self.transformer.is_gradient_checkpointing, f"one latent does not fit; {advice}")
                print("one latent does not fit: gradient checkpointing is on")
                self.transformer.enable_gradient_checkpointing()
                rows = trajectories
        torch.cuda.empty_cache()
        rows = min(gather_object([rows]))
        calls = math.ceil(trajectories / rows)
        self.micro_batch = math.ceil(trajectories / calls)  # calls of equal size

    @torch.no_grad()
    def encode(self, *batches):
        """Text embeddings of lists of prompts: for each list of n, tensors (n + 1, ...) on the CPU.

        The last row is the empty prompt, for guidance. While the encoders are on the GPU, the other networks
        wait on the CPU. Each list is encoded in its own groups of eight, so the result does not depend on the
        other lists.
        """
        self.networks.to("cpu")
        torch.cuda.empty_cache()
        self.encoders.to(self.device)
        texts = []
        for prompts in batches:
            unique = list(dict.fromkeys([*prompts, ""]))
            encoded = [self.family.encode(unique[n : n + 8]) for n in range(0, len(unique), 8)]
            row = torch.tensor([unique.index(prompt) for prompt in [*prompts, ""]])
            # encoded: [embeds, pooled] of each group; zip gives all groups' embeds, then all groups' pooled
            texts.append([torch.cat(parts).cpu()[row] for parts in zip(*encoded)])
        self.encoders.to("cpu")
        torch.cuda.empty_cache()
        self.networks.to(self.device)
        return texts

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
        row = torch.arange(rows, device=self.device).clamp(max=count - 1)  # 0, 1, ..., then the last again
        sigma = torch.as_tensor(sigma, device=self.device).expand(count)[row]
        prompt_index, x = prompt_index[row], x[row].to(self.dtype)
        two_pass = self.guidance > 1 and self.family.two_pass_guidance
        if two_pass:  # one call for both
            empty = torch.full_like(prompt_index, -1)  # the last row of text is the empty prompt
            prompt_index = torch.cat([empty, prompt_index])
            x, sigma = torch.cat([x, x]), torch.cat([sigma, sigma])
        grad = torch.is_grad_enabled()
        # compiled code for calls without gradients rounds differently, so the code with gradients is used
        with torch.set_grad_enabled(grad or self.compiled):
            velocity = self.family.predict(x, sigma, [part[prompt_index] for part in text], self.guidance)
        velocity = velocity if grad else velocity.detach()
        if two_pass:
            without, with_text = velocity.chunk(2)
            velocity = without + self.guidance * (with_text - without)
        self.velocity_evals += count * (2 if two_pass else 1) * (3 if grad else 1)
        return to_float32(velocity[:count])

    def velocity_batched(self, x, sigma, text, prompt_index, pad_first=math.inf):
        """Like velocity, for any number of latents, a micro-batch at a time.

        Micro-batches that start before row pad_first are filled, as in training; the others need not be.
        """
        parts = []
        for start in range(0, len(x), self.micro_batch):
            rows = slice(start, start + self.micro_batch)
            parts.append(self.velocity(x[rows], sigma, text, prompt_index[rows], fill=start < pad_first))
        return torch.cat(parts)

    def micro_batches(self, *tensors):
        """Iterate over (part, part, ...) of micro_batch rows of the tensors, on the device.

        Shows a progress bar. The tensors have equally many rows, perhaps none.
        """
        tensors = [rows.to(self.device) for rows in tensors]
        for start in progress(range(0, len(tensors[0]), self.micro_batch), "micro-batches"):
            yield [rows[start : start + self.micro_batch] for rows in tensors]

    def sigmas(self, steps):
        """(steps + 1,) noise levels of the pipeline's own scheduler, from 1 to 0."""
        return self.family.sigmas(steps, self.resolution).to(self.device)

    def draw_noise(self, prompts, each, generator):
        """Standard normal latents of this process's prompts, `each` per prompt: (n * each, C, H, W).

        Drawn on the CPU for the prompts of all processes, so that it depends on neither device nor processes.
        """
        noise = torch.randn(prompts, each, *self.shape, generator=generator)
        return my_rows(noise).flatten(0, 1).to(self.device)

    @torch.no_grad()
    def decode(self, x):
        """Latents -> images (B, 3, H, W) in [0, 1], float32, a micro-batch at a time."""
        return torch.cat([self.family.decode(part).float() for part in x.split(self.micro_batch)])

    @contextlib.contextmanager
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
        gradients = [parameter.grad for parameter in self.parameters]
        processes = PartialState().num_processes
        if processes > 1:  # one message; hundreds of small ones are slow
            summed = reduce(torch.nn.utils.parameters_to_vector(gradients), "sum")
            torch.nn.utils.vector_to_parameters(summed, gradients)
        torch._foreach_div_(gradients, self.loss_scale * processes)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, max_norm)
        require(norm.isfinite(), "the gradient is not finite; try a lower --learning-rate or another --dtype")
        return norm

    def update_ema(self):
        """Update the moving average of the weights. Call after each optimizer step."""
        if (self.ema.optimization_step + 1) % self.ema_every == 0:
            self.ema.step(self.parameters)
            self.averaged = True
        else:
            self.ema.optimization_step += 1  # only counted: the warm-up goes by optimizer steps, as in [FG]

    @contextlib.contextmanager
    def ema_weights(self):
        """Inside, the weights are replaced by their moving average, if there is one yet."""
        average = self.averaged and self.ema.decay > 0
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
        """Save the adapter as diffusers does, with B multiplied by alpha / rank.

        So it needs strength 1 and no metadata, which each version of peft writes and expects differently.
        """
        from safetensors.torch import save

        def write_safetensors(weights, path):  # safetensors' own save_file makes files that only you can read
            write(path, save(weights, {"format": "pt"}))

        config = self.transformer.peft_config["default"]
        weights = self.lora()
        for name in weights:
            if "lora_B" in name:
                weights[name] = weights[name] * (config.lora_alpha / config.r)
        options = {"transformer_lora_layers": weights, "save_function": write_safetensors}
        self.pipe.save_lora_weights(folder, **options)


def make_policy(args, trajectories):
    """The Policy for a script's settings. trajectories: most latents that are sampled together."""
    policy = Policy(
        load_pipeline(str(TINY) if args.model == "tiny" else args.model, args.dtype),
        args.resolution,
        guidance=args.guidance,
        micro_batch=min(args.micro_batch or 1, trajectories),
        lora_rank=args.lora_rank,
        lora_alpha=args.lora_alpha,
        ema_decay=args.ema_decay,
        ema_every=args.ema_every,
        device=args.device,
        seed=args.seed,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    if args.model == "tiny":
        policy.family.max_sequence_length = 0  # trained without T5 tokens
    if policy.family.distilled:
        print("This model is distilled: it has no guidance, so --guidance does nothing, and it is made for")
        print("few steps. Its authors' setting is 4: --steps 4 --eval-steps 4.")
    return policy


# ---------------------------------------------------------------- several processes, as torchrun starts them


def join_processes(device):
    """Join torchrun's processes, if any; only the first prints. SystemExit if the device cannot be used."""
    cuda = device.startswith("cuda")
    options = {}
    if cuda and "LOCAL_RANK" in os.environ:
        local, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        fits = device == "cuda" and local <= gpus
        require(fits, f"{local} processes need {local} GPUs and --device cuda; there are {gpus}")
        options["backend"] = "cuda:nccl,cpu:gloo"  # objects are gathered on the CPU
    state = PartialState(cpu=not cuda, **options)
    if not state.is_main_process:
        sys.stdout = open(os.devnull, "w")
    try:
        torch.zeros(1, device=device).item()
        if device.startswith("cuda:"):  # so that memory is measured there, too
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {device} cannot be used: {str(error)[:200]}; try cpu")


def my_rows(rows):
    """This process's part of the rows of all processes: with n processes, every n-th row."""
    return rows[PartialState().process_index :: PartialState().num_processes]


def gather(rows):
    """The rows of all processes, interleaved, on the CPU.

    This undoes my_rows. Rows made from dealt rows, such as images of prompts, come in another order.
    """
    parts = gather_object([rows.cpu()])
    whole = torch.cat(parts)
    for process, part in enumerate(parts):
        whole[process :: len(parts)] = part
    return whole


def total(number):
    """The sum of a number over all processes."""
    return sum(gather_object([number]))


def progress(items, label, leave=False, **options):
    """A progress bar around an iterable, in the terminal of the first process."""
    disable = None if PartialState().is_main_process else True  # None: if there is no terminal
    return tqdm(items, desc=label, leave=leave, disable=disable, **options)


# ---------------------------------------------------------------- the run: evaluation, checkpoint, log


def score(policy, reward, latents, prompts, at_once=64):
    """Decode and score N latents, about at_once at a time: 10,000 branches would be 32 GB of images.

    Returns scores (N,), and {name: scores (N,)} of the reward's parts.
    """
    size = math.ceil(at_once / policy.micro_batch) * policy.micro_batch
    results, start = [], 0
    while start < len(latents):
        stop = start + size
        while stop < len(latents) and prompts[stop] == prompts[stop - 1]:
            stop += 1  # a reward may compare the images of a prompt, as vlm does
        results.append(reward(policy.decode(latents[start:stop]), prompts[start:stop]))
        start = stop
    scores, parts = zip(*results)
    return torch.cat(scores), {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def reward_metrics(rewards, parts, group_size, zero_std_groups):
    """Metrics of the rollout's rewards (N,) and of their parts {name: (N,)}, over all processes.

    reward_std/<name>: std within a group, averaged over groups; shows how much each part of a sum counts.
    """
    rewards, processes = gather(rewards), PartialState().num_processes
    metrics = {"images": len(rewards)}  # of this iteration; Run.record adds those of all earlier ones
    metrics |= {"reward_mean": rewards.mean().item(), "reward_std": rewards.std().item()}
    for name, scores in parts.items():
        metrics[f"reward/{name}"] = gather(scores).mean().item()
        spread = scores.view(-1, group_size).std(-1, correction=0)
        metrics[f"reward_std/{name}"] = gather(spread).mean().item()
    metrics["zero_std_groups"] = total(zero_std_groups) / processes
    return metrics


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
    while len(tiles) % columns != 0:
        tiles.append(Image.new("RGB", tiles[0].size, "white"))
    make_image_grid(tiles, len(tiles) // columns, columns).save(folder / f"{iteration}.png")
    if (folder / "0.png").exists():  # unless it was deleted
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
    """Write bytes to a file that is always complete: after a crash or on a full disk it is the old one."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class Run:
    """A run and its folder: everything but the algorithm. The first process writes and prints.

    lines: the metrics of all complete iterations, where iteration 0 is the evaluation of the base model.
    With --resume they, weights and optimizer come from the last checkpoint. trajectories: as in make_policy.
    """

    def __init__(self, args, policy, optimizer, reward, eval_reward, trajectories):
        self.args, self.policy, self.optimizer = args, policy, optimizer
        self.reward, self.eval_reward = reward, eval_reward
        self.prompts, self.eval_prompts = read_prompts(args.prompts), held_out_prompts(args)
        self.folder = Path(args.output)
        self.lines = []
        self.texts = {}  # {iteration: (prompts, text)}
        self.phases = []  # (name, start) of this iteration's phases
        self.header = "iteration    reward evaluated   clipped  gradient\n"  # above the first row only
        config = run_config(args)  # keeps the tracker's id of the config.json that is replaced below
        if args.resume:
            self.load()
        (self.eval_text,) = policy.encode(self.eval_prompts)
        if self.done < args.iterations:
            text = self.text(self.done + 1)[1]
            if args.micro_batch == 0 and policy.device.type == "cuda":
                policy.fit_micro_batch(text, trajectories, parse_sde_steps(args)[1])
            if args.compile:
                policy.compile(text)
        print(f"micro-batch: {policy.micro_batch} latents")
        self.tracker = None
        if PartialState().is_main_process:
            # files come last: a start that fails leaves none
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            write(self.folder / "config.json", json.dumps(config, indent=1).encode())
            lines = "".join(json.dumps(line) + "\n" for line in self.lines)
            write(self.folder / "metrics.jsonl", lines.encode())
            if args.log_with:
                self.tracker = start_tracker(args, config["tracker_id"])

    @property
    def done(self):
        """The last complete iteration."""
        return self.lines[-1]["iteration"] if self.lines else 0

    def remaining(self):
        """The iterations still to run, with a progress bar."""
        iterations = range(self.done + 1, self.args.iterations + 1)
        return progress(iterations, "iterations", initial=self.done, total=self.args.iterations, leave=True)

    def text(self, iteration):
        """This process's prompts of an iteration, and their text. Encodes ten iterations at once."""
        if iteration not in self.texts:
            count, last = self.args.prompts_per_iteration, self.args.iterations
            ahead = range(iteration, min(iteration + 10, last + 1))
            batches = [my_rows(iteration_prompts(self.prompts, count, n, self.args.seed)) for n in ahead]
            texts = self.policy.encode(*batches)
            self.texts = {n: (prompts, text) for n, prompts, text in zip(ahead, batches, texts)}
        prompts, text = self.texts[iteration]
        return prompts, [rows.to(self.policy.device) for rows in text]

    def phase(self, name):
        """End the previous phase and begin another. The seconds of each are logged as <phase>_s."""
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize()
        self.phases.append((name, time.perf_counter()))

    @torch.no_grad()
    def evaluate(self, iteration, tuned_share=1.0):
        """Evaluate the averaged weights on fixed prompts and noise by ODE steps, which are not counted.

        Writes samples/<iteration>.png and samples/compare.png. tuned_share: as in ode_sample.
        """
        self.phase("eval")
        args, policy = self.args, self.policy
        evals = policy.velocity_evals
        prompts = [prompt for prompt in self.eval_prompts for _ in range(args.eval_seeds)]
        noise = policy.draw_noise(len(prompts), 1, generator(0, "evaluation", 0))
        index = my_rows(torch.arange(len(prompts), device=policy.device) // args.eval_seeds)
        text = [rows.to(policy.device) for rows in self.eval_text]
        with policy.ema_weights():
            latents = ode_sample(policy, noise, text, index, policy.sigmas(args.eval_steps), tuned_share)
        policy.velocity_evals = evals
        scores, parts = score(policy, self.reward, latents, my_rows(prompts))
        if self.eval_reward:
            _, more = score(policy, self.eval_reward, latents, my_rows(prompts))
            parts |= more
        scores, latents = gather(scores), gather(latents)
        parts = {name: gather(values) for name, values in parts.items()}
        if PartialState().is_main_process:
            if iteration == 0:
                self.reward.self_check(prompts, parts, args.resolution)
            shown = list(range(0, len(prompts), args.eval_seeds))[:16]  # one image of each of 16 prompts
            images = policy.decode(latents[shown].to(policy.device)).cpu()
            captions = [f"{scores[n]:.2f}  {prompts[n]}" for n in shown]
            save_pictures(images, captions, self.folder / "samples", iteration)
        metrics = {f"eval/{name}": values.mean().item() for name, values in parts.items()}
        return {"eval_reward": scores.mean().item()} | metrics

    def record(self, metrics):
        """Save and show a complete iteration: metrics, adapter if it was evaluated, checkpoint.

        Metrics are written before the checkpoint, so a crash loses none; resuming drops newer lines.
        """
        self.phase(None)
        for (name, start), (_, end) in pairwise(self.phases):
            metrics[f"{name}_s"] = round(end - start, 3)
        self.phases = []
        images_before = self.lines[-1]["images"] if self.lines else 0
        metrics["images"] = images_before + metrics.get("images", 0)
        metrics["velocity_evals"] = total(self.policy.velocity_evals)
        if self.policy.device.type == "cuda":
            metrics["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
            torch.cuda.reset_peak_memory_stats()
        for name, value in metrics.items():
            if isinstance(value, float) and not math.isfinite(value):  # JSON has no such numbers
                metrics[name] = None
        self.lines.append(metrics)
        iteration = metrics["iteration"]
        if not PartialState().is_main_process:
            return
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        if iteration > 0 and "eval_reward" in metrics:
            with self.policy.ema_weights():
                self.policy.save_lora(self.folder / "lora" / str(iteration))
        if iteration % self.args.save_every == 0 or iteration == self.args.iterations:
            self.save()
        self.show(metrics)

    def save(self):
        """Write the checkpoint: all that load needs."""
        state = {
            "lines": self.lines,
            "lora": self.policy.lora(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.policy.ema.state_dict(),
            "averaged": self.policy.averaged,
        }
        buffer = io.BytesIO()  # written to a file directly, a full disk is no OSError
        torch.save(state, buffer)
        write(self.folder / "checkpoint.pt", buffer.getbuffer())

    def load(self):
        """Restore what save stored. Settings given together with --resume are kept."""
        from peft import set_peft_model_state_dict

        policy, path = self.policy, self.folder / "checkpoint.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.lines, adapter, policy.averaged = state["lines"], state["lora"], state["averaged"]
        except Exception as error:  # missing and damaged files raise errors of many kinds
            fail(f"{path} cannot be resumed: {error}; start a new run")
        differ = sorted(adapter.keys() ^ policy.lora().keys())
        problem = f"{len(differ)} weights are only in one of adapter and model: {differ[:1]}"
        require(not differ, f"{path} cannot be resumed: {problem}; start a new run")
        if PartialState().is_main_process:  # the stored number is the sum over processes
            policy.velocity_evals = self.lines[-1]["velocity_evals"]
        set_peft_model_state_dict(policy.transformer, adapter)
        policy.ema.load_state_dict(state["ema"] | {"decay": self.args.ema_decay})
        policy.ema.to(policy.device)
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:  # load_state_dict restored the old one
            group["lr"] = self.args.learning_rate

    def show(self, metrics):
        """Show an iteration in the terminal, in samples/progress.png if evaluated, in the tracker."""
        iteration, error = metrics["iteration"], metrics.get("ratio_first_error")
        if error is not None and error > 1e-5:  # a tenth of the default clip range; it should be 0
            tqdm.write(f"warning: before any update the ratio differs from 1 by {error:.1e}: rollout and")
            tqdm.write("training disagree, so later ratios are wrong. Try --no-compile and another --dtype.")
        clipped = None
        if metrics.get("clip_low") is not None:
            clipped = metrics["clip_low"] + metrics["clip_high"]
        values = metrics.get("reward_mean"), metrics.get("eval_reward"), clipped, metrics.get("grad_norm")
        row = f"{self.header}{iteration:9d}"
        for value, digits in zip(values, ("10.4f", "10.4f", "10.1%", "10.1e")):
            row += " " * 10 if value is None else format(value, digits)
        tqdm.write(row)
        self.header = ""
        if "eval_reward" in metrics:
            plot_progress(self.lines, self.folder / "samples" / "progress.png")
        if self.tracker is not None:
            log_to_tracker(self.tracker, metrics, self.folder / "samples" / f"{iteration}.png")

    def summary(self):
        """Print two lines: the results of the run, and its files."""
        if self.tracker is not None:
            self.tracker.finish()
        scores = {line["iteration"]: line["eval_reward"] for line in self.lines if "eval_reward" in line}
        base = scores.pop(0)  # of iteration 0, before training
        if not scores:
            return
        best = max(scores, key=scores.get)
        phases = ("rollout_s", "reward_s", "train_s", "eval_s")
        minutes = sum(line.get(phase, 0.0) for line in self.lines for phase in phases) / 60
        last, evals = scores[max(scores)], self.lines[-1]["velocity_evals"]
        results = f"eval_reward {base:.3f} -> {last:.3f}, best {scores[best]:.3f} at {best}"
        print(f"{results}; {minutes:.1f} minutes, {evals:,} velocity evaluations")
        print(self.folder / "samples" / "compare.png", self.folder / "lora" / str(best), sep="  ")


def run_config(args):
    """The content of config.json: script, all settings as asked, versions, command, the tracker's run."""
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}
    tracker_id = uuid.uuid4().hex[:8]
    if args.resume:
        before = json.loads(Path(args.output, "config.json").read_text("utf-8"))
        tracker_id = before.get("tracker_id", tracker_id)
    config = {"script": args.script, "settings": asdict(args) | {"resume": None}, "versions": versions}
    return config | {"command": " ".join(sys.argv), "tracker_id": tracker_id}


def start_tracker(args, tracker_id):
    """Start one of accelerate's trackers; a resumed run continues the tracker's run of this id."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[args.log_with]
    if args.log_with == "wandb":
        project = os.environ.get("WANDB_PROJECT", "flow-grpo")
        tracker = kind(project, name=Path(args.output).name, dir=args.output, id=tracker_id, resume="allow")
    elif kind.requires_logging_directory:
        tracker = kind(args.log_with, args.output)
    else:
        tracker = kind(Path(args.output).name)
    tracker.start()
    if args.log_with == "wandb":  # its own step must rise, but a resumed run may repeat iterations
        tracker.tracker.define_metric("*", step_metric="iteration")
    tracker.store_init_configuration({k: v for k, v in asdict(args).items() if v is not None})
    return tracker


def log_to_tracker(tracker, metrics, picture):
    """Send the numbers of an iteration, and its pictures (a file) if it was evaluated."""
    from PIL import Image

    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    step = None if tracker.name == "wandb" else metrics["iteration"]
    tracker.log(numbers, step=step)
    if "eval_reward" in metrics and hasattr(tracker, "log_images"):
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        with Image.open(picture) as grid:
            tracker.log_images({"samples": numpy.asarray(grid)[None]}, step=step, **layout)


# ---------------------------------------------------------------- the command line


# Settings shared by all scripts; comments are help texts. default_settings sets what depends on the model.


@dataclass
class RunArgs:
    prompts: str | None = None  # text file with one prompt per line, or .jsonl; None: the tiny model's own
    reward: str | None = None  # name, FILE.py:FUNCTION, or weighted sum such as pickscore=0.7,ocr=0.3
    reward_offload: bool = False  # move reward models to the CPU while they are not scoring
    output: str | None = None  # run folder; None: runs/SCRIPT-MODEL-SEED-TIME
    resume: str | None = None  # run folder to resume; other options override its settings
    seed: int = 0  # random seed of the training
    device: str | None = None  # cuda, cuda:N or cpu
    save_every: int = 1  # iterations between checkpoints
    log_with: str | None = None  # also log to wandb, tensorboard or another tracker that accelerate knows


@dataclass
class ModelArgs:
    model: str | None = None  # diffusers repository or folder, or tiny
    resolution: int = 512  # pixels per side
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # dtype of the frozen weights
    compile: bool = False  # compile the transformer's blocks
    gradient_checkpointing: bool = False  # less memory, training takes a third longer
    micro_batch: int = 3  # latents per forward pass; 0: as many as fit on the GPU (CPU: 1)
    lora_rank: int = 32  # LoRA rank
    lora_alpha: float = 64.0  # LoRA alpha; the adapter is scaled by alpha / rank


@dataclass
class EvaluationArgs:
    eval_prompts: str | None = None  # evaluation prompts (64 at most); None: --prompts, or the tiny model's
    eval_every: int = 30  # iterations between evaluations
    eval_steps: int = 40  # ODE steps of an evaluation
    eval_seeds: int = 1  # images per prompt in an evaluation
    eval_reward: str | None = None  # more rewards for evaluation, logged as eval/<name>, not trained


NOISE_LEVELS = {"flow": 0.7, "dance": 0.3, "cps": 0.8, "precise": 1.5}  # [FG], [DG], [CPS], [PR]


def parse_args(script, args_class, defaults, argv=None):
    """The command line as an args_class, checked. Loads no model and writes nothing, but joins the processes.

    script: its name. defaults: {"tiny": {...}, "sd3": {...}}, settings of a model that differ from the class
    defaults. With --resume the settings of that run are the defaults.
    """
    first = ArgumentParser(add_help=False, allow_abbrev=False)  # options that decide the other defaults
    for name in ("model", "prompts", "resume", "sde", "device"):
        first.add_argument(f"--{name}", nargs="?")  # without a value tyro reports it
    given, _ = first.parse_known_args(argv)
    for name, value in vars(given).items():
        if value == "None":  # tyro reads it as None, too
            setattr(given, name, None)
    stored = {} if given.resume is None else resumed_settings(script, args_class, given.resume)
    settings = default_settings(args_class, defaults, given, stored)
    model = Path(settings["model"]).name
    shown = f"Defaults shown are for the model {model}; for others use --model NAME --help."
    if stored:
        shown = f"Defaults shown are the settings of {given.resume}."
    about = f"{args_class.__doc__}\n\n{shown}"
    args = parse_in_groups(args_class(**settings), argv, prog=f"{script}.py", description=about)
    args.script = script  # not a setting, so not in asdict(args)
    args.model, args.device = settings["model"], settings["device"]
    if not args.output:
        args.output = f"runs/{script}-{model}-{args.seed}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    check_args(args, stored)
    return args


def parse_in_groups(default, argv, **options):
    """The command line as a dataclass like `default`. Each class that it inherits from is a box in --help."""
    import tyro

    boxes, values = {}, {}  # {title: class}, {title: its settings}
    for group in type(default).__bases__:
        title = group.__name__.removesuffix("Args").lower() or "script"
        boxes[title] = tyro.conf.OmitArgPrefixes[group]
        values[title] = group(**{field.name: getattr(default, field.name) for field in fields(group)})
    names = [field.name for group in values.values() for field in fields(group)]
    for field in fields(default):
        once = names.count(field.name) == 1
        require(once, f"put the setting {field.name} into exactly one of the classes that Args inherits from")
    nested = make_dataclass("Settings", boxes.items())
    parsed = tyro.cli(nested, default=nested(**values), args=argv, **options)
    flat = {}
    for group in vars(parsed).values():
        flat |= vars(group)
    return type(default)(**flat)


def default_settings(args_class, defaults, given, stored):
    """The settings of a run to which no more options are given. Joins the processes, on the run's device.

    given: options of the command line that decide other defaults; stored: settings of the run to resume.
    """
    device = given.device or stored.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.startswith("cuda")
    join_processes(device)
    model = given.model or stored.get("model")
    if model is None:
        model = "stabilityai/stable-diffusion-3.5-medium" if given.prompts and cuda else "tiny"
        if given.prompts and model == "tiny":
            print("No CUDA GPU here: training the tiny model, which can only draw a few coloured shapes.")
    require(model != "tiny" or TINY.is_dir(), f"the tiny model is not there: copy {TINY}, or give --model")
    family = "tiny" if model == "tiny" else FAMILIES[model_index(model)["_class_name"]].name
    settings = {"reward": "shapes" if family == "tiny" else "pickscore"}
    if cuda and family != "tiny":
        # a GPU without bfloat16 emulates it slowly; FLUX.1 overflows in float16
        bfloat16 = family == "flux" or torch.cuda.is_bf16_supported(including_emulation=False)
        settings |= {"dtype": "bfloat16" if bfloat16 else "float16", "compile": True, "micro_batch": 0}
    settings |= defaults[family]
    model_default = args_class(**settings)  # before the settings of a resumed run
    noise_levels = NOISE_LEVELS | {model_default.sde: model_default.noise_level}
    settings |= stored | {"model": absolute(model), "device": device}
    # with another sampler comes its noise level, unless --noise-level is given; tyro reports an unknown --sde
    if given.sde in noise_levels and given.sde != args_class(**settings).sde:
        settings["noise_level"] = noise_levels[given.sde]
    return settings


def check_args(args, stored):
    """SystemExit for settings that cannot be used. Makes paths absolute.

    A reward may change the working directory, and a run may be resumed from another one.
    """
    folder = Path(os.path.expanduser(args.output)).absolute()
    allowed = args.resume or not os.path.exists(folder / "checkpoint.pt")
    require(allowed, f"--output {args.output} already holds a run; give another, or --resume it")
    parent = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    usable = parent.is_dir() and os.access(parent, os.W_OK)
    require(usable, f"--output {args.output} cannot be written: {parent} is no folder, or not yours")
    args.output = str(folder)
    for name in ("lora_rank", "lora_alpha", "output"):
        same = name not in stored or getattr(args, name) == stored[name]
        require(same, f"--resume cannot change --{name.replace('_', '-')}; start a new run")
    require(args.prompts or args.model == "tiny", "a model other than tiny needs --prompts FILE")
    require(args.reward, "--reward needs a name or FILE.py:FUNCTION")
    check_numbers(args)
    args.prompts, args.eval_prompts = absolute(args.prompts), absolute(args.eval_prompts)
    args.reward, args.eval_reward = absolute_files(args.reward), absolute_files(args.eval_reward)
    read_prompts(args.prompts)  # errors in files are reported before a model is loaded
    held_out_prompts(args)
    if args.log_with is not None:
        from accelerate.tracking import get_available_trackers

        installed = [tracker.value for tracker in get_available_trackers()]
        hint = f"installed are: {', '.join(installed) or 'none'}; pip install {args.log_with}"
        require(args.log_with in installed, f"--log-with {args.log_with} is unknown or not installed; {hint}")


def require(condition, message):
    """End the script with a one-line message unless the condition holds."""
    if not condition:
        fail(message)


def fail(message):
    """End the script with a one-line message."""
    raise SystemExit("error: " + " ".join(message.split()))


def absolute(path):
    """The absolute path of a file or folder that exists; anything else (a repository, None) is returned."""
    full = os.path.expanduser(path or "")
    return str(Path(full).absolute()) if os.path.exists(full) and path != "tiny" else path


def absolute_files(spec):
    """A reward spec, NAME:FOLDER=0.5,FILE.py:FUNCTION, with absolute paths of its files and folders."""
    parts = []
    for part in (spec or "").split(","):
        name, equals, weight = part.strip().partition("=")
        first, colon, last = name.rpartition(":")
        if first.endswith(".py") and os.path.exists(os.path.expanduser(first)):  # FILE.py:FUNCTION
            name = f"{absolute(first)}:{last}"
        elif colon and os.path.exists(os.path.expanduser(last)):  # NAME:FOLDER
            name = f"{first}:{absolute(last)}"
        parts.append(name + equals + weight)
    return ",".join(parts) or None


def resumed_settings(script, args_class, folder):
    """The settings of the run in a folder. SystemExit if this script cannot resume it."""
    folder = Path(os.path.expanduser(folder)).absolute()
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        owner, settings = config["script"], config["settings"]
        differ = sorted(settings.keys() ^ args_class.__dataclass_fields__.keys())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"--resume {folder} is not a run folder: {error}")
    require(owner == script, f"--resume {folder} is a run of {owner}.py; start a new run")
    require(not differ, f"--resume {folder} is of another version, with other settings: {', '.join(differ)}")
    return settings | {"resume": str(folder), "output": str(folder)}


def check_numbers(args):
    """SystemExit for numbers that would silently train nonsense."""
    lowest = {"ema_decay": 0, "micro_batch": 0, "steps": 2, "guidance": 1}
    lowest["noise_level"] = 1e-3  # a random step without noise has no log-prob
    highest = dict.fromkeys(("ema_decay", "clip_range", "chunk_fraction", "eval_hybrid"), 1)
    highest |= {"noise_level": 1} if args.sde == "cps" else {}
    for name, value in asdict(args).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            off_at_0 = getattr(type(args), name, None) == 0
            low = 0 if off_at_0 else lowest.get(name, 1e-30)  # 1e-30 stands for "over 0"
            high = highest.get(name, 2**31)
            limits = f"{'over 0' if low == 1e-30 else f'at least {low}'} and at most {high}"
            require(low <= value <= high, f"--{name.replace('_', '-')} {value} must be {limits}")  # nan fails


@cache
def read_prompts(path):
    """Prompts of a UTF-8 file: one per line, or the field `prompt` of each line of a .jsonl.

    Blank lines and lines that start with # are skipped. path: None for the tiny model's prompts. A file is
    read only once, so a pipe works. SystemExit names the file, and the line if one is wrong.
    """
    file = TINY / "prompts.txt" if path is None else Path(os.path.expanduser(path))
    try:
        lines = file.read_text("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else f"not UTF-8 text: {error}"
        fail(f"prompts file {file}: {why}")
    prompts = []
    for number, line in enumerate(lines, 1):
        prompt = line.strip()
        if not prompt or prompt.startswith("#"):
            continue
        if file.suffix.lower() in (".json", ".jsonl"):
            try:
                prompt = json.loads(line)["prompt"].strip()
            except (ValueError, KeyError, TypeError, AttributeError):
                wanted = 'a line must be like {"prompt": "a red circle"}'
                fail(f"prompts file {file}, line {number}: {line.strip()[:80]}; {wanted}")
        require(prompt and "\0" not in prompt, f"prompts file {file}, line {number}: empty, or not text")
        prompts.append(prompt)
    require(prompts, f"prompts file {file} has no prompts; write one per line")
    return prompts


def held_out_prompts(args):
    """The prompts of evaluations, at most 64: --eval-prompts, else --prompts, else tiny's held-out ones."""
    return read_prompts(args.eval_prompts or args.prompts or str(TINY / "eval_prompts.txt"))[:64]


def parse_sde_steps(args):
    """--sde-steps as a list: the steps that may be random; and K, how many of them an iteration uses."""
    spec, last = args.sde_steps, args.steps - 2
    allowed = f"--sde-steps {spec} must be all, early, or a rising list within 0 to {last}"
    # a lone number could mean the step or how many steps
    require(not spec.isdecimal(), f"{allowed}; one step: {spec},; to draw some: --sde-steps-per-iteration")
    if spec == "all":
        steps = list(range(last + 1))
    elif spec == "early":
        steps = list(range(args.steps // 2))
    else:
        words = spec.removesuffix(",").split(",")
        steps = [int(word) if word.isdecimal() else -1 for word in words]
        require(steps == sorted(set(steps)) and steps[0] >= 0 and steps[-1] <= last, allowed)
    K = getattr(args, "sde_steps_per_iteration", 0) or len(steps)  # gcpo.py draws none
    require(len(steps) >= K, f"--sde-steps-per-iteration {K} must be at most {len(steps)}")
    return steps, K


def out_of_memory(error):
    """Whether an exception means that memory ran out, on the GPU or not."""
    words = ("out of memory", "ALLOC_FAILED", "DefaultCPUAllocator")  # ALLOC_FAILED: of CUBLAS and CUDNN
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def load_rewards(args, get_reward):
    """Load args.reward and args.eval_reward (or None), and check that they can read their prompts."""
    held_out = held_out_prompts(args)
    reward = get_reward(args.reward, args.device, args.reward_offload)
    eval_reward = None
    if args.eval_reward is not None:
        eval_reward = get_reward(args.eval_reward, args.device, args.reward_offload)
        eval_reward.load(held_out)
    reward.load([*read_prompts(args.prompts), *held_out])
    return reward, eval_reward


def split_batch(args, each, group):
    """How many trajectories this process samples, `each` per prompt. group: number of images compared.

    SystemExit if the batch or the evaluation cannot be split. Warns of small groups.
    """
    P, U, processes = args.prompts_per_iteration, args.updates_per_iteration, PartialState().num_processes
    require(group > 1, "a group of one image has no advantage; compare at least two")
    divides = P * each % U == 0 and (processes == 1 or P % (processes * U) == 0)
    on = f" on {processes} processes" if processes > 1 else ""
    numbers = f"{P} prompts x {each} = {P * each} trajectories cannot be split into {U} equal updates{on}"
    require(divides, f"{numbers}; change --prompts-per-iteration or --updates-per-iteration")
    shown = len(held_out_prompts(args)) * args.eval_seeds
    require(shown >= processes, f"{shown} evaluation images for {processes} processes; raise --eval-seeds")
    if group < 6:
        print(f"warning: in groups of {group} the advantage is noisy; use 8 or more if you can")
    return P * each // processes


def print_plan(args, sigmas, s, sde_steps, batch, weight=None):
    """Print the batch arithmetic and a table of steps. batch: what is scored; weight: (T - 1,) of steps."""
    print(f"{args.iterations} iterations of {batch} in {args.updates_per_iteration} updates")
    weight = torch.ones_like(s) if weight is None else weight
    print("step   sigma   Delta       s     std  weight")
    for n, delta in enumerate(-sigmas.diff()):
        random = f"{s[n]:6.4f}  {s[n] * delta.sqrt():6.4f}  {weight[n]:6.4f}" if n in sde_steps else "ODE"
        print(f"{n:4d}  {sigmas[n]:6.4f}  {delta:6.4f}  {random}")


def run_script(script, main, args_class, defaults):
    """Run a script's main. Ctrl-C and out of memory end in one line; anything else in a traceback.

    Where there is a checkpoint, the last line says how to resume.
    """
    args = None
    try:
        args = parse_args(script, args_class, defaults)
        print(f"run folder: {args.output}")
        main(args)
    except (Exception, KeyboardInterrupt) as error:
        hint = ""
        if args is not None and Path(args.output, "checkpoint.pt").exists():
            hint = f"; resume with: python {script}.py --resume {shlex.quote(args.output)}"
        if isinstance(error, KeyboardInterrupt):
            raise SystemExit(f"stopped{hint}")
        if out_of_memory(error):
            advice = "use a smaller --micro-batch, --gradient-checkpointing or --reward-offload"
            raise SystemExit(f"error: out of memory; {advice}{hint}")
        traceback.print_exc()
        raise SystemExit(f"error: {type(error).__name__} as shown above{hint}")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
