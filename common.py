"""What the scripts share: the sampler's formulas, a pipeline with LoRA, the command line and the run folder.

The first part is pure functions that can be copied anywhere; the scripts and tests import this file, and it imports
none of them. Notation as in the papers: sigma in [0, 1] is the noise level (1 noise, 0 image), x_sigma =
(1 - sigma) image + sigma noise, velocity = noise - image, s a noise scale, Delta = sigma - sigma_next. [FG] is
Flow-GRPO (arXiv 2505.05470), [DG] DanceGRPO (2505.07818), [GC] GCPO (2510.21583), [TF]
TempFlow-GRPO (2508.04324).
"""

import dataclasses
import fcntl
import hashlib
import importlib.util
import io
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from argparse import ArgumentDefaultsHelpFormatter
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.hf_argparser import HfArgumentParser

TINY = Path(__file__).resolve().parent / "tests" / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class StopRun(Exception):
    """A clear end: one line for the user and an exit status.

    2: bad input; 1: the run cannot go on; 128 + its number: a signal.
    """

    def __init__(self, message, exit_status=2):
        super().__init__(message)
        self.exit_status = exit_status


# ---------------------------------------------------------------- the sampler


def noise_scale(sigmas, kind, level):
    """Noise scale s of every stochastic step.

    sigmas: (T + 1,) from 1 down to 0. kind: "flow", s = level sqrt(sigma / (1 - sigma)) [FG] eq. 9, where sigma = 1
    the denominator has sigma_1 instead; or "dance", s = level [DG]. Returns (T - 1,): the last step is an ODE step.
    """
    if kind == "dance":
        return torch.full_like(sigmas[:-2], level)
    inner = torch.where(sigmas == 1, sigmas[1], sigmas)
    return level * (sigmas / (1 - inner)).sqrt()[:-2]


def wide(x):
    """float16 and bfloat16 as float32, in which all of the sampler is computed; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sde_mean_std(x, velocity, sigma, sigma_next, s):
    """Mean and standard deviation of one SDE step with the ODE's marginals, for any noise scale s >= 0 [FG] eq. 9.

    x, velocity: (B, ...) latents and velocity at sigma; sigma, sigma_next, s: numbers or (B,) tensors. Returns mean
    like x and std as (B or 1, 1, ...), float32 or wider. With s = 0 the mean is the ODE's Euler step, exactly.
    """
    x, velocity = wide(x), wide(velocity)
    sigma, sigma_next, s = (
        torch.as_tensor(value, dtype=x.dtype, device=x.device).view(-1, *[1] * (x.dim() - 1))
        for value in (sigma, sigma_next, s)
    )
    delta = sigma - sigma_next
    drift = s**2 * delta / (2 * sigma)
    mean = (x - velocity * delta) - drift * (x + velocity * (1 - sigma))
    return mean, s * delta.sqrt()


def log_prob(x, mean, std, batch_dims=1):
    """Log-density of x under a Gaussian, AVERAGED over the latent's dimensions: (B, ...) -> (B,), float32 or wider.

    mean and std (a tensor, over 0) broadcast against x, whose first batch_dims dimensions are kept.

    The sum is the true log-probability of the step. Every published implementation takes the mean instead, which makes
    ratios independent of the resolution, and is the reason why clip ranges are 1e-5 to 1e-3 and not 0.2.
    """
    logp = -((wide(x) - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return logp.flatten(batch_dims).mean(-1)


def group_advantage(rewards, std="group", clip=5.0):
    """A = (r - mean of the group) / (std + 1e-4), clipped to +-clip.

    rewards: (..., G), a group in the last dimension. std: "group" [DG], or "batch" [FG], that of all rewards; both are
    the population's (divided by the count). Returns advantages like rewards, and the share of groups without spread:
    those have advantage 0 and teach nothing.
    """
    spread = rewards.std(-1, keepdim=True, correction=0)
    centred = rewards - rewards.mean(-1, keepdim=True)
    scale = spread if std == "group" else rewards.std(correction=0)
    return (centred / (scale + 1e-4)).clamp(-clip, clip), (spread < 1e-6).float().mean().item()


@torch.no_grad()
def ode_sample(policy, x, text, owner, sigmas, tuned_share=1.0):
    """Deterministic Euler sampling from x (B, ...) at sigmas[0], as at inference; text and owner as in velocity.

    sigmas: (T + 1,) or some consecutive ones of them. tuned_share < 1 is hybrid inference [GC]: the adapter is on for
    that first share of the steps only. It is on when this returns.
    """
    for step in range(len(sigmas) - 1):
        if step == math.ceil(tuned_share * (len(sigmas) - 1)):
            policy.transformer.disable_adapters()
        velocity = policy.velocity_in_micro_batches(x, sigmas[step], text, owner)
        x = x - (sigmas[step] - sigmas[step + 1]) * velocity
    policy.transformer.enable_adapters()
    return x


# ---------------------------------------------------------------- the policy: a diffusers pipeline with a LoRA adapter


class SD3:
    """Stable Diffusion 3 and 3.5, and what every other family must provide.

    Another family is a class with the same names: targets (of LoRA), max_sequence_length, two_pass_guidance, encode,
    sigmas, latent_shape, predict, decode. It goes into FAMILIES, under the class name in the repository's
    model_index.json. What the pipeline can do itself, it does: so plain inference gives the same pictures.
    """

    # [FG]: the projections of both streams' attention
    targets = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
    max_sequence_length = 256  # T5 tokens: the pipeline's default
    two_pass_guidance = True  # False: the transformer takes guidance as an input, or none

    def __init__(self, pipe):
        self.pipe, self.ids = pipe, None

    @staticmethod
    def latent_shape(vae, transformer, resolution):
        """(C, H, W) from the two configs, before any weight is loaded; StopRun where the model cannot do it."""
        scale, patch = 2 ** (len(vae["block_out_channels"]) - 1), transformer["patch_size"]
        check_resolution(resolution, scale * patch, transformer["pos_embed_max_size"] * scale * patch)
        return transformer["in_channels"], resolution // scale, resolution // scale

    def encode(self, prompts):
        """Text of B prompts: a list of tensors (B, ...), as the pipeline makes them."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        return [embeds, pooled]

    def sigmas(self, steps, resolution):
        """(steps + 1,) noise levels of the pipeline's scheduler, from 1 to 0."""
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        scheduler, tokens = self.pipe.scheduler, resolution // (self.pipe.vae_scale_factor * self.pipe.patch_size)
        mu = calculate_shift(tokens**2, **shift_settings(scheduler, max_shift=1.16))
        scheduler.set_timesteps(steps, mu=mu if scheduler.config.use_dynamic_shifting else None)
        return scheduler.sigmas

    def predict(self, x, sigma, text, guidance):
        """The transformer's velocity: x (B, C, H, W), sigma (B,), text as from encode. guidance is for FLUX."""
        embeds, pooled = text
        return self.pipe.transformer(x, embeds, pooled, sigma * 1000, return_dict=False)[0]

    def decode(self, x):
        """Latents (B, C, H, W) -> images (B, 3, H, W) in [0, 1]."""
        vae = self.pipe.vae
        image = vae.decode((x / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)).sample
        return self.pipe.image_processor.postprocess(image, output_type="pt")


class Flux(SD3):
    """FLUX.1: guidance is an input of the transformer, which sees the latents packed, as tokens of 2 x 2."""

    # [FG], for FLUX: attention and feed-forward of both streams, and the attention of the single stream
    targets = SD3.targets + "ff.net.0.proj ff.net.2 ff_context.net.0.proj ff_context.net.2".split()
    max_sequence_length = 512
    two_pass_guidance = False

    @staticmethod
    def latent_shape(vae, transformer, resolution):
        scale = 2 ** (len(vae["block_out_channels"]) - 1)
        check_resolution(resolution, 2 * scale)
        return transformer["in_channels"] // 4, resolution // scale, resolution // scale

    def encode(self, prompts):
        embeds, pooled, _ = self.pipe.encode_prompt(prompts, None, max_sequence_length=self.max_sequence_length)
        return [embeds, pooled]

    def sigmas(self, steps, resolution):
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        scheduler, tokens = self.pipe.scheduler, (resolution // (2 * self.pipe.vae_scale_factor)) ** 2
        return shifted_sigmas(scheduler, steps, calculate_shift(tokens, **shift_settings(scheduler, max_shift=1.15)))

    def predict(self, x, sigma, text, guidance):
        pipe, (embeds, pooled), (B, C, H, W) = self.pipe, text, x.shape
        if self.ids is None:  # made once: they are the same for every latent and step
            image_ids = pipe._prepare_latent_image_ids(B, H // 2, W // 2, x.device, x.dtype)
            self.ids = x.new_zeros(embeds.shape[1], 3), image_ids
        velocity = pipe.transformer(
            hidden_states=pipe._pack_latents(x, B, C, H, W),
            timestep=(sigma * 1000).to(x.dtype) / 1000,  # rounded as the pipeline does
            guidance=x.new_full((B,), guidance, dtype=torch.float32)
            if pipe.transformer.config.guidance_embeds
            else None,
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=self.ids[0],
            img_ids=self.ids[1],
            return_dict=False,
        )[0]
        return pipe._unpack_latents(
            velocity, H * pipe.vae_scale_factor, W * pipe.vae_scale_factor, pipe.vae_scale_factor
        )


class Flux2Klein(SD3):
    """FLUX.2 klein: patches of 2 x 2 are channels of the latent, which the VAE's batch norm has normalised."""

    # as for FLUX; here the single stream has one layer for attention and feed-forward in, and one out
    targets = (
        r".*\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|to_qkv_mlp_proj)|ff(_context)?\.linear_(in|out))"
        r"|single_transformer_blocks\.\d+\.attn\.to_out"
    )
    max_sequence_length = 512

    def __init__(self, pipe):
        super().__init__(pipe)
        self.two_pass_guidance = not pipe.config.is_distilled  # the pipeline has none for distilled models

    @staticmethod
    def latent_shape(vae, transformer, resolution):
        scale = 2 ** (len(vae["block_out_channels"]) - 1)
        check_resolution(resolution, 2 * scale)
        return transformer["in_channels"], resolution // (2 * scale), resolution // (2 * scale)

    def encode(self, prompts):
        return [self.pipe.encode_prompt(prompts, max_sequence_length=self.max_sequence_length)[0]]

    def sigmas(self, steps, resolution):
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        tokens = (resolution // (2 * self.pipe.vae_scale_factor)) ** 2
        return shifted_sigmas(self.pipe.scheduler, steps, compute_empirical_mu(tokens, steps))

    def predict(self, x, sigma, text, guidance):
        pipe, (embeds,) = self.pipe, text
        if self.ids is None:  # of one latent, as the transformer looks at the first alone
            text_ids, image_ids = pipe._prepare_text_ids(embeds[:1]), pipe._prepare_latent_ids(x[:1])
            self.ids = text_ids.to(x.device), image_ids.to(x.device)
        velocity = pipe.transformer(
            hidden_states=pipe._pack_latents(x),
            timestep=(sigma * 1000).to(x.dtype) / 1000,
            encoder_hidden_states=embeds,
            txt_ids=self.ids[0],
            img_ids=self.ids[1],
            return_dict=False,
        )[0]
        return velocity.transpose(1, 2).reshape(x.shape)

    def decode(self, x):
        vae = self.pipe.vae
        mean, variance = vae.bn.running_mean.view(1, -1, 1, 1), vae.bn.running_var.view(1, -1, 1, 1)
        x = x * (variance + vae.config.batch_norm_eps).sqrt().to(x.dtype) + mean.to(x.dtype)
        image = vae.decode(self.pipe._unpatchify_latents(x).to(vae.dtype)).sample
        return self.pipe.image_processor.postprocess(image, output_type="pt")


def check_resolution(resolution, multiple, most=None):
    if resolution % multiple:
        raise StopRun(f"--resolution {resolution} does not fit this model; give a multiple of {multiple}")
    if most and resolution > most:
        raise StopRun(f"--resolution {resolution} is more than this model's position table has; {most} is the most")


def shift_settings(scheduler, max_shift):
    """The scheduler's settings for calculate_shift, with the pipelines' defaults."""
    names = {"base_seq_len": "base_image_seq_len", "max_seq_len": "max_image_seq_len"}
    usual = {"base_seq_len": 256, "max_seq_len": 4096, "base_shift": 0.5, "max_shift": max_shift}
    return {name: scheduler.config.get(names.get(name, name), value) for name, value in usual.items()}


def shifted_sigmas(scheduler, steps, mu):
    """(steps + 1,) noise levels, as FLUX's pipelines make them: evenly spaced ones, shifted by the scheduler."""
    even = None if scheduler.config.get("use_flow_sigmas") else [1 - n / steps for n in range(steps)]
    scheduler.set_timesteps(steps, sigmas=even, mu=mu)
    return scheduler.sigmas


FAMILIES = {
    "StableDiffusion3Pipeline": ("sd3", SD3),
    "FluxPipeline": ("flux", Flux),
    "Flux2KleinPipeline": ("flux2", Flux2Klein),
}


def find_family(model):
    """Which defaults a model takes ("tiny", "sd3", ...), and its pipeline's class name. StopRun: it is none of ours."""
    folder = str(TINY) if model == "tiny" else model
    index = Path(folder, "model_index.json") if Path(folder).exists() else fetch_index(model)
    try:
        name = json.loads(Path(index).read_text("utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise StopRun(f"--model {model} is no diffusers pipeline, its model_index.json cannot be read; give its folder")
    if name not in FAMILIES:
        raise StopRun(f"{model} is a {name}; this code knows {', '.join(FAMILIES)}")
    return ("tiny" if find_tiny(model) else FAMILIES[name][0]), name


def find_tiny(model):
    return model == "tiny" or Path(model).resolve() == TINY


def fetch_index(model):
    """The path of a repository's model_index.json, from the cache or the hub."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        cached = try_to_load_from_cache(model, "model_index.json")
        if isinstance(cached, str):
            return cached
        HfApi().model_info(model, timeout=10)  # fails at once where a download would try again and again
        return hf_hub_download(model, "model_index.json")
    except HFValidationError:
        raise StopRun(f"--model {model} is no folder here and no name of a repository; give one of them")
    except (GatedRepoError, RepositoryNotFoundError):
        raise StopRun(
            f"--model {model} is not there or is gated; check the spelling, accept the licence on its page "
            f"https://huggingface.co/{model} and log in with `hf auth login`"
        )
    except Exception as error:  # whatever the network does
        reason = " ".join(str(error).split())[:150]
        raise StopRun(f"--model {model} is no folder here and cannot be fetched; check name and network ({reason})")


def trajectory_device(device, numbers):
    """Where an iteration's latents live: on the device if so many float32 are under an eighth of its memory."""
    large = device.type == "cuda" and 32 * numbers > torch.cuda.get_device_properties(device).total_memory
    return torch.device("cpu") if large else device


def score(policy, reward, latents, prompts, at_once=64):
    """Decode and score: reward(policy.decode(latents), prompts), but never with many more than at_once pictures.

    Returns scores (N,) and {name: scores (N,)} of the parts, for N latents.
    TempFlow-GRPO's 10,000 branches an iteration would be 32 GB of pictures at 512 px.
    """
    size = -(-at_once // policy.micro_batch) * policy.micro_batch
    slices = [slice(start, start + size) for start in range(0, len(latents), size)]
    scored = [reward(policy.decode(latents[part]), prompts[part]) for part in slices]
    return torch.cat([s for s, _ in scored]), {n: torch.cat([parts[n] for _, parts in scored]) for n in scored[0][1]}


def load_pipeline(args):
    """The pipeline of args.model in args.dtype; a resolution that it cannot do is refused before weights are read."""
    import transformers

    transformers.utils.logging.set_verbosity_error()  # diffusers imports parts that tell of packages unused here
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        diffusers.utils.logging.disable_progress_bar()
    folder = str(TINY) if args.model == "tiny" else args.model
    _, class_name = find_family(args.model)
    pipe_class = getattr(diffusers, class_name)
    config = pipe_class.load_config(folder)
    absent = {name: None for name, value in config.items() if isinstance(value, list) and value[0] is None}
    try:
        parts = [diffusers.AutoencoderKL.load_config(folder, subfolder=name) for name in ("vae", "transformer")]
        FAMILIES[class_name][1].latent_shape(*parts, args.resolution)
        # weights as safetensors only, never a repository's own code
        return pipe_class.from_pretrained(
            folder, dtype=DTYPES[args.dtype], use_safetensors=True, trust_remote_code=False, **absent
        )
    except (OSError, ValueError) as error:
        raise StopRun(f"{args.model} cannot be loaded; {' '.join(str(error).split())[:300]}")


class Policy:
    """The model that is trained: a pipeline whose transformer has a LoRA adapter.

    Only the adapter trains, in float32; all else is frozen, in args.dtype. `velocity` is the one way to the network,
    for rollout, training, reference and evaluation alike.

    latents: how many an iteration keeps. They live, with noise and schedule, on `store`: the device, or the CPU if they
    are large. Tensors made from them stay there; velocity takes its micro-batch to the device and brings it back.
    pipe: a pipeline that is there already, in place of args.model.
    """

    def __init__(self, args, latents=0, pipe=None):
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig

        pipe = pipe or load_pipeline(args)
        family = FAMILIES[type(pipe).__name__][1]
        pipe.set_progress_bar_config(disable=True)
        self.family, self.pipe, self.transformer = family(pipe), pipe, pipe.transformer
        self.shape = family.latent_shape(pipe.vae.config, pipe.transformer.config, args.resolution)
        if find_tiny(args.model):
            self.family.max_sequence_length = 0  # trained without the zero tokens that stand for T5
        self.device, self.guidance, self.micro_batch = torch.device(args.device), args.guidance, args.micro_batch
        self.resolution = args.resolution
        self.store = trajectory_device(self.device, latents * math.prod(self.shape))
        if self.device.type == "cuda" and args.dtype != "float32":  # TF32, or LoRA takes as long as the rest
            torch.set_float32_matmul_precision("high")
        self.velocity_evals = 0

        for part in (pipe.vae, pipe.transformer, *self.encoders()):
            part.requires_grad_(False).eval()
        pipe.vae.to(self.device)
        pipe.transformer.to(self.device)
        torch.manual_seed(args.seed)  # LoRA's A is random, its B is zero: the first policy is the base model
        self.transformer.add_adapter(
            LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=family.targets)
        )
        cast_training_params(self.transformer, torch.float32)
        self.parameters = [p for p in self.transformer.parameters() if p.requires_grad]
        if args.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        if args.compile:
            if not self.transformer._repeated_blocks:  # SD3's class does not name them
                self.transformer._repeated_blocks = self.transformer._no_split_modules
            self.transformer.compile_repeated_blocks()

    def encoders(self):
        names = ("text_encoder", "text_encoder_2", "text_encoder_3")
        return [part for name in names if (part := getattr(self.pipe, name, None)) is not None]

    @torch.no_grad()
    def encode(self, prompts):
        """Text embeddings of n prompts: a list of tensors (n + 1, ...), the last row for guidance's empty prompt.

        The encoders visit the GPU for this and leave it; so memory does not grow with the number of prompts in a file.
        """
        for encoder in self.encoders():
            encoder.to(self.device)
        unique = list(dict.fromkeys([*prompts, ""]))
        index = [unique.index(prompt) for prompt in [*prompts, ""]]
        text = [
            torch.cat(rows) for rows in zip(*(self.family.encode(unique[i : i + 8]) for i in range(0, len(unique), 8)))
        ]
        text = [rows[torch.tensor(index, device=rows.device)].to(self.device) for rows in text]
        if self.device.type != "cpu":
            for encoder in self.encoders():
                encoder.to("cpu")
            torch.cuda.empty_cache()
        return text

    def velocity(self, x, sigma, text, owner):
        """Velocity at x, with classifier-free guidance if it is on: (B, ...) -> (B, ...) float32.

        x: latents; sigma: a number or (B,); text: from encode; owner: (B,) which row of text each latent belongs to.
        The batch is filled up to micro_batch rows with copies of its last, which are dropped again: matrix products
        round differently for different shapes, and with one shape for all of them the log-probs of rollout and training
        agree to the last bit. Counts velocity evaluations: one a latent, three where a backward follows;
        twice as many where guidance takes two passes.
        """
        count, store, device = len(x), x.device, self.device
        row = torch.arange(max(count, self.micro_batch), device=device).clamp(max=count - 1)
        owner, sigma = owner.to(device)[row], torch.as_tensor(sigma, device=device).expand(count)[row]
        x = x.to(device)[row].to(self.transformer.dtype)
        two_pass = self.guidance > 1 and self.family.two_pass_guidance
        if two_pass:  # one call for both
            owner = torch.cat([torch.full_like(owner, -1), owner])
            x, sigma = torch.cat([x, x]), torch.cat([sigma, sigma])
        velocity = self.family.predict(x, sigma, [rows[owner] for rows in text], self.guidance)
        if two_pass:
            without, with_text = velocity.chunk(2)
            velocity = without + self.guidance * (with_text - without)
        self.velocity_evals += count * (2 if two_pass else 1) * (3 if torch.is_grad_enabled() else 1)
        return wide(velocity[:count]).to(store)

    def sigmas(self, steps):
        """(steps + 1,) noise levels of the pipeline's own scheduler, from 1 to 0."""
        return self.family.sigmas(steps, self.resolution).to(self.store)

    def noise(self, count, generator):
        """Standard normal latents (count, ...), drawn on the CPU, so that every device has the same."""
        return torch.randn(count, *self.shape, generator=generator).to(self.store)

    def velocity_in_micro_batches(self, x, sigma, text, owner):
        parts = zip(x.split(self.micro_batch), owner.split(self.micro_batch))
        return torch.cat([self.velocity(x_part, sigma, text, owner_part) for x_part, owner_part in parts])

    @contextmanager
    def reference(self):
        """Inside, the adapter is off and no gradient is kept: the frozen model that the KL is measured to."""
        self.transformer.disable_adapters()
        try:
            with torch.no_grad():
                yield
        finally:
            self.transformer.enable_adapters()

    @torch.no_grad()
    def decode(self, x):
        """Latents -> images (B, 3, H, W) in [0, 1], float32, a micro-batch at a time."""
        return torch.cat([self.family.decode(part.to(self.device)).float() for part in x.split(self.micro_batch)])

    def lora(self):
        from peft import get_peft_model_state_dict

        return {name: value.detach().cpu() for name, value in get_peft_model_state_dict(self.transformer).items()}

    def save_lora(self, folder):
        """The adapter as diffusers saves it: `pipe.load_lora_weights(folder)` reads it."""
        config = self.transformer.peft_config["default"].to_dict()
        self.pipe.save_lora_weights(
            folder, transformer_lora_layers=self.lora(), transformer_lora_adapter_metadata=config
        )


# ---------------------------------------------------------------- command line


class Help(ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(HfArgumentParser):
    def error(self, message):
        raise StopRun(f"{message.removeprefix('argument ')}; see --help")


RANGES = {  # name: smallest, largest
    "seed": (0, 2**31 - 1),
    "iterations": (1, 10**9),
    "prompts_per_iteration": (1, 10**6),
    "group_size": (2, 10**6),
    "seeds_per_prompt": (1, 10**6),
    "branches": (2, 10**6),
    "updates_per_iteration": (1, 10**6),
    "micro_batch": (1, 10**6),
    "steps": (2, 1000),
    "eval_steps": (1, 1000),
    "guidance": (0.0, 100.0),
    "resolution": (8, 8192),
    "noise_level": (0.0, 10.0),
    "learning_rate": (0.0, 10.0),
    "clip_range": (0.0, 1.0),
    "adv_clip": (0.0, 1e6),
    "kl_coef": (0.0, 1e6),
    "max_grad_norm": (0.0, 1e9),
    "ema_decay": (0.0, 0.9999999),
    "lora_rank": (1, 4096),
    "lora_alpha": (0.0, 1e6),
    "eval_every": (1, 10**9),
    "eval_seeds": (1, 10**4),
    "save_every": (1, 10**9),
    "chunk_max": (1, 1000),
    "chunk_fraction": (0.0, 1.0),
    "eval_hybrid": (0.0, 1.0),
}
POSITIVE = (
    "learning_rate",
    "clip_range",
    "adv_clip",
    "max_grad_norm",
    "lora_alpha",
    "noise_level",
    "chunk_fraction",
    "eval_hybrid",
)
MAX_TRAJECTORIES = 10**6
FREE_ON_RESUME = ("resume", "iterations", "save_every", "wandb")


def option(name):
    return "--" + name.replace("_", "-")


def parse_args(args_class, defaults, argv=None):
    """The command line as an instance of the dataclass args_class, checked; no model is loaded, nothing is written.

    defaults: {"tiny": {...}, "sd3": {...}} for the settings that are None in args_class. With --resume the settings
    are those of that run, and a setting given that would change its past is refused.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(args_class, allow_abbrev=False, formatter_class=Help)
    for action in parser._actions:
        known = {model: settings[action.dest] for model, settings in defaults.items() if action.dest in settings}
        if known:
            values = ", ".join(f"{value} for {model}" for model, value in known.items())
            action.help = action.help.replace("by model", values)
    try:
        args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[0]
    except ValueError as error:
        raise StopRun(f"unknown option {' '.join(str(error).split(': ')[-1].strip('[]').split())}; see --help")
    if args.resume:
        words = {word.split("=")[0] for word in argv}
        given = {action.dest for action in parser._actions if words & set(action.option_strings)}
        args = resumed_args(args, given)
    if args.model is None:
        args.model = "stabilityai/stable-diffusion-3.5-medium" if args.prompts and torch.cuda.is_available() else "tiny"
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        raise StopRun(f"--device {args.device} cannot be used here; {str(error).splitlines()[0][:150]}")
    check_ranges(args)
    args.prompts = args.prompts or (str(TINY / "prompts.txt") if args.model == "tiny" else None)
    if args.prompts is None:
        raise StopRun("a model other than tiny needs --prompts FILE, one prompt a line")
    read_prompts(args.prompts)
    args.family, _ = find_family(args.model)
    if args.noise_level is None and args.sde == "dance":
        args.noise_level = 0.3  # eta of [DG]
    for name, value in defaults[args.family].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") and args.family != "tiny" else "float32")
    args.reward = args.reward or ("shapes" if args.family == "tiny" else "pickscore")
    if args.eval_prompts is None and args.family == "tiny" and args.prompts == str(TINY / "prompts.txt"):
        args.eval_prompts = str(TINY / "eval_prompts.txt")
    if args.eval_prompts:
        read_prompts(args.eval_prompts)
    if not args.output:
        script, model = Path(sys.argv[0]).stem, Path(args.model).name
        args.output = f"runs/{script}-{model}-{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_output(args)
    if args.wandb and not importlib.util.find_spec("wandb"):
        raise StopRun("--wandb needs a package that is not installed; pip install wandb")
    check_ranges(args)
    return args


def resumed_args(args, given):
    """The settings of the run in args.resume, with those in `given` that may change; refuses the others by name."""
    try:
        config = json.loads((Path(args.resume) / "config.json").read_text("utf-8"))
        saved, script = dict(config["settings"]), config["script"]
    except (OSError, ValueError, KeyError, TypeError):
        raise StopRun(f"--resume {args.resume} is no run: its config.json cannot be read; give the folder of a run")
    if script != Path(sys.argv[0]).stem:
        raise StopRun(f"--resume {args.resume} is a run of {script}.py; go on with that script")
    if changed := saved.keys() ^ dataclasses.asdict(args).keys():
        raise StopRun(
            f"--resume {args.resume} is of another version of {script}.py, which differs in {option(min(changed))}; "
            f"use commit {config.get('commit')} or start a new run"
        )
    for name in sorted(given - set(FREE_ON_RESUME)):
        if getattr(args, name) != saved[name]:
            raise StopRun(
                f"{option(name)} {getattr(args, name)} would change the past of {args.resume}, which has {saved[name]};"
                " leave it out or start a new run"
            )
    for name, value in saved.items():
        if name not in given or name not in FREE_ON_RESUME:
            setattr(args, name, value)
    args.output = args.resume
    if not all(isinstance(config.get(name), dict) for name in ("prompts_sha256", "versions")):
        raise StopRun(f"--resume {args.resume} has a config.json of another version of {script}.py; start a new run")
    for name, digest in prompts_hashes(args).items():
        if digest != config["prompts_sha256"].get(name):
            raise StopRun(
                f"{option(name)} {getattr(args, name)} has changed since {args.resume} began; restore it or start a new"
                " run"
            )
    return args


def check_output(args):
    """--output is a folder that is not there, or empty, and can be written: seen before any model is loaded."""
    folder = Path(args.output)
    try:
        if os.stat(folder) and not args.resume and (not folder.is_dir() or any(folder.iterdir())):
            raise StopRun(f"--output {folder} is in the way; give a new folder, or go on with --resume {folder}")
    except FileNotFoundError:
        folder = next(parent for parent in folder.absolute().parents if parent.exists())
    except OSError as error:
        raise StopRun(f"--output {str(folder)[:200]} cannot be used ({error.strerror}); give another folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StopRun(f"{folder} cannot be written (Permission denied); give another --output")


def check_ranges(args):
    for name, (low, high) in RANGES.items():
        value = getattr(args, name, None)
        if value is not None and not (isinstance(value, int | float) and low <= value <= high):  # also refuses nan
            raise StopRun(f"{option(name)} {value} is out of range; give a number from {low} to {high}")
        if value == 0 and name in POSITIVE:
            raise StopRun(f"{option(name)} must be more than 0")


def settle_batch(args, count, group, branches=1, usual=8):
    """The batch arithmetic: count trajectories an iteration, which must divide into the updates. Returns count.

    group: how many are compared with each other, warned of under `usual`. branches: of each trajectory. Lowers
    args.micro_batch to all of them.
    """
    if count % args.updates_per_iteration:
        raise StopRun(
            f"{args.prompts_per_iteration} prompts x {count // args.prompts_per_iteration} = {count} trajectories do "
            f"not divide into --updates-per-iteration {args.updates_per_iteration}; change one of them"
        )
    if count * branches > MAX_TRAJECTORIES:
        raise StopRun(
            f"{count * branches} trajectories an iteration are more than {MAX_TRAJECTORIES}; lower one of its factors"
        )
    args.micro_batch = min(args.micro_batch, count * branches)
    if group < usual:
        print(f"warning: groups of {group} give noisy advantages; {usual} or more are usual", file=sys.stderr)
    return count


def parse_chunks(args):
    """--chunks of gcpo.py: None for adaptive, or the list of sizes, which must add up to the T - 1 transitions."""
    if args.chunks == "adaptive":
        return None
    try:
        sizes = [int(size) for size in args.chunks.split(",")]
    except ValueError:
        raise StopRun(f"--chunks {args.chunks!r} is neither adaptive nor a list of sizes; write --chunks 2,3,4")
    if min(sizes) < 1 or sum(sizes) != args.steps - 1:
        raise StopRun(
            f"--chunks {args.chunks} adds up to {sum(sizes)}; sizes from 1 on must add up to {args.steps - 1}, the "
            f"trained transitions of --steps {args.steps}"
        )
    return sizes


def parse_branch_steps(args):
    """--branch-steps of tempflow_grpo.py: the steps where branches may be, and how many of them an iteration takes.

    "3" is three steps drawn in each iteration, "3," is step 3.
    """
    every = list(range(args.steps - 1))
    if args.branch_steps == "all":
        return every, len(every)
    try:
        numbers = [int(part) for part in args.branch_steps.rstrip(",").split(",")]
    except ValueError:
        raise StopRun(f"--branch-steps {args.branch_steps!r} is neither all, a list such as 0,1,2, nor a number")
    if "," not in args.branch_steps and 1 <= numbers[0] <= len(every):
        return every, numbers[0]
    if "," in args.branch_steps and sorted(set(numbers)) == numbers and set(numbers) <= set(every):
        return numbers, len(numbers)
    raise StopRun(
        f"--branch-steps {args.branch_steps} is no number from 1 to {len(every)}, and no rising list within 0 to "
        f"{every[-1]}"
    )


def prepare_rewards(args, get_reward):
    """args.reward and args.eval_reward (or None), after checking that both can read every prompt."""
    options = args.device, args.reward_offload
    rewards = [get_reward(spec, *options) if spec else None for spec in (args.reward, args.eval_reward)]
    for reward in rewards:
        if reward:
            reward.check(read_prompts(args.prompts) + read_prompts(args.eval_prompts or args.prompts))
    return rewards


def print_plan(args, count, sigmas, s, weight=None, branches=0):
    """One line of batch arithmetic, and a table of the steps. weight: {step: weight of its loss}, if they have one."""
    branching = f" with {branches} branches a step" if branches else ""
    print(
        f"{args.iterations} iterations of {args.prompts_per_iteration} prompts x "
        f"{count // args.prompts_per_iteration} = {count} trajectories{branching}; {args.updates_per_iteration} "
        f"updates of {count // args.updates_per_iteration} trajectories; {args.micro_batch} latents at a time"
    )
    print("step   sigma   Delta       s     std" + ("  weight" if weight else ""))
    for n, scale in enumerate(s):
        delta = sigmas[n] - sigmas[n + 1]
        row = f"{n:4d}  {sigmas[n]:6.4f}  {delta:6.4f}  {scale:6.4f}  {scale * delta.sqrt():6.4f}"
        print(row + (f"  {weight.get(n, 0.0):6.4f}" if weight else ""))
    print(f"{len(s):4d}  {sigmas[-2]:6.4f}  {sigmas[-2]:6.4f}     ODE step, not trained", flush=True)


def read_prompts(path):
    """Prompts of a UTF-8 text file, one a line; blank lines and lines that start with # are skipped."""
    try:
        text = Path(path).read_text("utf-8-sig")
    except OSError as error:
        raise StopRun(f"prompts file {path} cannot be read ({error.strerror}); give a text file, one prompt a line")
    except UnicodeDecodeError as error:
        raise StopRun(f"prompts file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8")
    if "\0" in text:
        raise StopRun(f"prompts file {path} has a NUL character, so it is no text; save it as UTF-8")
    prompts = [line.strip() for line in text.split("\n")]
    prompts = [line for line in prompts if line and not line.startswith("#")]
    if not prompts:
        raise StopRun(f"prompts file {path} has no prompts; write one a line")
    return prompts


def prompts_hashes(args):
    files = {name: getattr(args, name) for name in ("prompts", "eval_prompts")}
    return {n: hashlib.sha256("\n".join(read_prompts(path)).encode()).hexdigest() for n, path in files.items() if path}


def iteration_prompts(prompts, count, iteration, seed):
    """The prompts of an iteration (1, 2, ...): the file in a new random order each time it has been gone through."""
    places = [divmod(position, len(prompts)) for position in range((iteration - 1) * count, iteration * count)]
    epochs = {epoch for epoch, _ in places}
    order = {n: torch.randperm(len(prompts), generator=generator(seed, "prompts", n)) for n in epochs}
    return [prompts[order[epoch][index]] for epoch, index in places]


def generator(seed, purpose, number):
    """A random generator that depends on just these three: so a resumed run draws what it would have drawn."""
    digest = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# ---------------------------------------------------------------- the run folder


def self_test(args, policy, text):
    """See on the user's own model, before anything is written, that rollout and training agree; prints one line.

    text: of some prompts, the first is used. Raises StopRun where the model cannot run or train like this. Leaves no
    gradient, no count and no random state behind.
    """
    evals, owner = policy.velocity_evals, torch.zeros(1, dtype=torch.long)
    noise = [policy.noise(1, generator(args.seed, "self-test", n)) for n in range(3)]
    sigmas = policy.sigmas(args.steps)
    s = noise_scale(sigmas, args.sde, args.noise_level)
    levels = [(sigmas[step], sigmas[step + 1], s[step]) for step in (0, len(s) - 1)]  # the first transition, the last
    try:
        with torch.no_grad():
            size = tuple(policy.decode(noise[0]).shape[-2:])
            x, x_next, old_logp, logp, off_ode = [noise[0]], [], [], [], 0.0
            for n, (sigma, sigma_next, scale) in enumerate(levels):
                velocity = policy.velocity_in_micro_batches(x[n], sigma, text, owner)
                mean, std = sde_mean_std(x[n], velocity, sigma, sigma_next, scale)
                x_next.append(mean + std * noise[n + 1])
                old_logp.append(log_prob(x_next[n], mean, std))
                still, _ = sde_mean_std(x[n], velocity, sigma, sigma_next, 0.0)
                ode = ode_sample(policy, x[n], text, owner, torch.stack([sigma, sigma_next]))
                off_ode = max(off_ode, (still - ode).abs().max().item())
                x.append(x_next[n])
        for n, level in enumerate(levels):  # one at a time, as little as training needs
            velocity = policy.velocity(x[n], level[0], text, owner)
            mean, std = sde_mean_std(x[n], velocity, *level)
            logp.append(log_prob(x_next[n], mean, std))
            logp[n].sum().backward()
    except (ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise StopRun(f"the model cannot run with these settings ({' '.join(str(error).split())[:200]}); change them")
    if size != (args.resolution, args.resolution):
        raise StopRun(f"--resolution {args.resolution} gives pictures of {size[0]} x {size[1]}; give that")
    off_ratio = ((torch.cat(logp).detach() - torch.cat(old_logp)).exp() - 1).abs().max().item()
    parts = [policy.transformer, policy.pipe.vae, *policy.encoders()]
    named = [pair for part in parts for pair in part.named_parameters()]
    stray = [name for name, p in named if (p.requires_grad or p.grad is not None) and "lora_" not in name]
    grads = [p.grad for p in policy.parameters if p.grad is not None]
    norm = torch.stack([grad.norm() for grad in grads]).norm().item() if grads else 0.0
    for parameter in policy.parameters:
        parameter.grad = None
    policy.velocity_evals = evals
    count, total = sum(p.numel() for p in policy.parameters), sum(p.numel() for _, p in named)
    print(
        f"self-test: a step without noise is off the ODE's by {off_ode:.1e}, the ratio of stored transitions off 1 by "
        f"{off_ratio:.1e}; {count} of {total} parameters train, with a gradient of norm {norm:.2e}",
        flush=True,
    )
    if stray:
        raise StopRun(f"{stray[0]} trains, and only the adapter should; this is a bug, please report it", 1)
    if not 0 < norm < math.inf:
        raise StopRun(f"the adapter's gradient has norm {norm}; use another --dtype or --noise-level")
    if not max(off_ode, off_ratio) < 1e-4:  # also tells of nan
        print(
            "warning: rollout and training disagree on this model, so every ratio is wrong by as much; likely causes: "
            "--compile, --dtype float16, dropout, an attention kernel that is not deterministic",
            file=sys.stderr,
        )


class Run:
    """A run and its folder: config.json, metrics.jsonl, samples/, lora/, checkpoint.pt. Use it in a `with` statement.

    reward, eval_reward: (images, prompts) -> (scores, {name: scores}); eval_reward may be None. It evaluates, logs and
    saves; keeps time and peak memory of the phases; and ends cleanly at a signal or an error. What is saved then is the
    last complete iteration; amid updates, the last checkpoint stands.
    """

    def __init__(self, args, policy, optimizer, reward, eval_reward):
        from diffusers.training_utils import EMAModel

        self.args, self.policy, self.optimizer = args, policy, optimizer
        self.ema = EMAModel(policy.parameters, args.ema_decay) if args.ema_decay else None
        self.reward, self.eval_reward = reward, eval_reward
        self.folder, self.samples = Path(args.output), Path(args.output) / "samples"
        self.iteration = 0  # the last complete one
        self.whole = True  # whether the weights in memory are those after that iteration: not amid updates
        self.images = self.skipped_updates = self.skipped_in_a_row = 0
        self.counters = [0, 0, 0, 0]  # as they were after that iteration
        self.hopeless, self.signal = False, None
        self.phases, self.shown = {}, {}
        prompts = read_prompts(args.eval_prompts or args.prompts)[:MAX_EVAL_PROMPTS]
        self.eval_prompts = [prompt for prompt in prompts for _ in range(args.eval_seeds)]
        self.eval_text = [rows.cpu() for rows in policy.encode(prompts)]
        self_test(args, policy, [rows.to(policy.device) for rows in self.eval_text])

    def __enter__(self):
        try:
            self.samples.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / ".lock", "w")
        except OSError as error:
            raise StopRun(f"the run folder {self.folder} cannot be written ({error.strerror}); give another --output")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StopRun(f"another process runs in {self.folder}; wait for it or give another --output")
        path, config = self.folder / "config.json", run_config(self.args)
        if self.args.resume:
            self.load()
            first, now = json.loads(path.read_text("utf-8")), config
            for name, version in now["versions"].items():
                if first["versions"].get(name) != version:
                    print(
                        f"warning: this run began with {name} {first['versions'].get(name)} and goes on with {version};"
                        " its numbers may differ from those of a run with one version",
                        file=sys.stderr,
                    )
            start = {"iteration": self.iteration} | {name: now[name] for name in ("versions", "commit", "command")}
            config = first | {"settings": now["settings"], "resumed": [*first.get("resumed", []), start]}
        elif path.exists():  # since the command line was checked
            raise StopRun(f"--output {self.folder} is in the way; give a new folder")
        write_atomically(path, json.dumps(config, indent=1).encode())
        print(f"run folder {self.folder}", flush=True)
        self.handlers = {n: signal.signal(n, self.on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        if self.args.wandb:
            import wandb

            wandb.init(project=self.args.wandb, name=self.folder.name, config=config)
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.whole and self.iteration:
            self.save()
        self.lock.close()

    def on_signal(self, number, frame):
        if self.signal:  # the second time: now
            raise StopRun(f"stopped at once; go on with --resume {self.folder}", exit_status=128 + number)
        self.signal = number
        tqdm.write("stopping after this iteration; the same signal again stops at once", file=sys.stderr)

    def iterations(self):
        """The numbers of the iterations to run. Evaluates the base model first, saves when it is time to."""
        if self.iteration == 0:
            self.log({"iteration": 0})
        first, last = self.iteration + 1, self.args.iterations
        if first > last:
            print(f"all {last} iterations are done; raise --iterations to go on")
        for iteration in self.progress("iterations", leave=True, initial=first - 1, total=last)(range(first, last + 1)):
            if self.signal:
                raise StopRun(f"stopped; go on with --resume {self.folder}", exit_status=128 + self.signal)
            yield iteration
            if self.hopeless:
                raise StopRun(
                    "loss or gradient were not finite in 5 updates in a row; lower --learning-rate or use another "
                    f"--dtype; what was trained is saved in {self.folder}",
                    exit_status=1,
                )
            if iteration % self.args.save_every == 0:
                self.save()
        if self.signal:
            raise StopRun("stopped, after the last iteration", exit_status=128 + self.signal)

    def progress(self, label, **options):
        """A function that puts a tqdm bar around an iterable, with the latest rewards in it."""
        return partial(tqdm, desc=label, postfix=self.shown, **{"leave": False, "disable": None} | options)

    @contextmanager
    def phase(self, name):
        """Times a phase, for the metrics as <name>_s, and notes its peak memory on CUDA."""
        cuda = self.policy.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        self.whole = self.whole and name != "train"
        start = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize()
            peak = self.phases.setdefault("peak_memory_gb_by_phase", {})
            peak[name] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
            self.phases["peak_memory_gb"] = max(peak.values())
        self.phases[f"{name}_s"] = round(time.perf_counter() - start, 3)

    def update(self):
        """One optimizer step with the gradients that are there: their norm before clipping.

        Where it is not finite, and a loss that is not gives such a norm, the step is skipped and counted instead.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters, self.args.max_grad_norm).item()
        if math.isfinite(norm):
            self.optimizer.step()
            if self.ema:
                self.ema.step(self.policy.parameters)
            self.skipped_in_a_row = 0
        else:
            self.skipped_updates += 1
            self.skipped_in_a_row += 1
            self.hopeless |= self.skipped_in_a_row >= 5
        self.optimizer.zero_grad()
        return torch.tensor(norm)

    def log(self, metrics):
        """Evaluate if it is time to; then one line of metrics.jsonl, flushed at once: the iteration is complete."""
        iteration = metrics["iteration"]
        counters = [self.images, self.policy.velocity_evals, self.skipped_updates, self.skipped_in_a_row]
        if iteration:
            metrics = metrics | dict(zip(("images", "velocity_evals", "skipped_updates"), counters))
        try:
            if iteration % self.args.eval_every == 0 or iteration == self.args.iterations:
                metrics = metrics | self.evaluate(iteration)
        finally:  # where an evaluation fails, what was trained is kept all the same
            metrics = finite(metrics | self.phases)
            self.phases = {}
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
            self.iteration, self.whole, self.counters = iteration, True, counters
        if self.args.wandb:
            import wandb

            wandb.log(metrics, step=iteration)
        self.shown |= {key: f"{metrics[key]:.3f}" for key in ("reward_mean", "eval_reward") if metrics.get(key)}
        text = [f"{key} {metrics[key]:.4g}" for key in SHOWN if metrics.get(key) is not None]
        tqdm.write(f"iteration {iteration:4d}  " + "  ".join(text))

    @torch.no_grad()
    def evaluate(self, iteration):
        """Mean rewards of ODE samples for the evaluation prompts, from always the same noise; saves a picture grid."""
        args, policy, count = self.args, self.policy, len(self.eval_prompts)
        evals, text = policy.velocity_evals, [rows.to(policy.device) for rows in self.eval_text]
        sigmas, hybrid = policy.sigmas(args.eval_steps), getattr(args, "eval_hybrid", 1.0)
        noise = policy.noise(count, generator(0, "evaluation", 0))
        with self.phase("eval"), self.ema_weights():
            images = [
                policy.decode(ode_sample(policy, noise[rows], text, rows // args.eval_seeds, sigmas, hybrid)).cpu()
                for rows in self.progress("evaluation")(torch.arange(count).split(args.micro_batch))
            ]
        policy.velocity_evals = evals  # evaluation is not part of the cost
        images = torch.cat(images)
        scores, parts = self.reward(images, self.eval_prompts)
        if iteration == 0:
            print(*self.reward.self_check(images, self.eval_prompts, parts), sep="\n")
        if self.eval_reward:
            parts = parts | self.eval_reward(images, self.eval_prompts)[1]
        shown = range(0, count, max(args.eval_seeds, -(-count // 32)))  # at most 32 pictures
        captions = [f"{scores[n]:.2f} {self.eval_prompts[n]}" for n in shown]
        picture_grid(images[list(shown)], captions, self.samples / f"{iteration}.png")
        first = min(self.samples.glob("[0-9]*.png"), key=lambda path: int(path.stem))
        side_by_side(first, self.samples / f"{iteration}.png", self.samples / "compare.png")
        return {"eval_reward": scores.mean().item()} | {f"eval/{k}": v.mean().item() for k, v in parts.items()}

    def chunk_metrics(self, l1rel, chunks, group_size):
        """What gcpo.py's chunks were, also as samples/chunks.png. l1rel: (N, T - 1), chunks: N lists of sizes.

        chunk_cuts: share of trajectories with a cut before each step but the first. l1rel_prompt_share: share of the
        variance of L1rel that lies between prompts, 1 / group_size by chance if the curve does not depend on them.
        """
        starts = torch.zeros_like(l1rel)
        for row, sizes in zip(starts, chunks):
            row[torch.tensor(sizes).cumsum(0)[:-1]] = 1
        between = l1rel.view(-1, group_size, l1rel.shape[1]).mean(1).var(0, correction=0) / l1rel.var(0, correction=0)
        curve, cuts = l1rel.mean(0).tolist(), starts.mean(0).tolist()[1:]
        charts = {"mean L1rel of the step": curve, "share of trajectories cut before the step": [0.0, *cuts]}
        line_chart(charts, self.samples / "chunks.png")
        return {"l1rel_by_step": curve, "chunk_cuts": cuts, "l1rel_prompt_share": between.tolist()}

    def step_metrics(self, branch_at, rewards, gradient, weight):
        """tempflow_grpo.py's credit by step, also as samples/steps.png.

        rewards: (K, N, B). reward_std_by_step: std over the branches of a state, averaged [TF] figure 2. gradient,
        weight: (K,) size of d logp / d velocity, and the steps' weights; logged without and with them, with mean 1.
        """
        spread, pull = rewards.std(2, correction=0).mean(1), gradient * weight
        metrics = {"reward_std_by_step": spread, "gradient_by_step": gradient / gradient.mean()}
        metrics |= {"gradient_by_step_weighted": pull / pull.mean()}
        metrics = {name: values.tolist() for name, values in metrics.items()}
        line_chart(metrics, self.samples / "steps.png", branch_at)
        return {"branch_steps": branch_at} | metrics

    def save(self):
        """checkpoint.pt and lora/, written aside and renamed, so that a crash never leaves half a file."""
        from safetensors import SafetensorError

        state = {
            "iteration": self.iteration,
            "lora": self.policy.lora(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "counters": self.counters,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        try:
            with self.ema_weights():
                self.policy.save_lora(self.folder / "lora.tmp")
        except SafetensorError as error:  # its word for a full disk
            raise OSError(str(error))
        (self.folder / "lora").mkdir(exist_ok=True)
        for file in (self.folder / "lora.tmp").iterdir():
            os.replace(file, self.folder / "lora" / file.name)
        (self.folder / "lora.tmp").rmdir()
        write_atomically(self.folder / "checkpoint.pt", buffer.getbuffer())

    def load(self):
        """Take up the run where its checkpoint was made, or its start; later lines of metrics.jsonl are dropped."""
        from peft import set_peft_model_state_dict

        path, log, done = self.folder / "checkpoint.pt", self.folder / "metrics.jsonl", -1
        try:
            if path.exists():
                state = torch.load(path, map_location="cpu", weights_only=True)
                if {k: v.shape for k, v in state["lora"].items()} != {
                    k: v.shape for k, v in self.policy.lora().items()
                }:
                    raise ValueError("its adapter is another model's")
                set_peft_model_state_dict(self.policy.transformer, state["lora"])
                self.optimizer.load_state_dict(state["optimizer"])
                if self.ema:
                    self.ema.load_state_dict(state["ema"])
                    self.ema.to(self.policy.device)
                self.iteration = done = state["iteration"]
                self.images, self.policy.velocity_evals, self.skipped_updates, self.skipped_in_a_row = state["counters"]
                self.counters = state["counters"]
        except Exception as error:  # what a cut or foreign file raises is of many kinds
            raise StopRun(f"{path} cannot be resumed from ({' '.join(str(error).split())[:150]}); start a new run")
        if self.args.iterations < done:
            raise StopRun(f"--iterations {self.args.iterations} is less than the {done} that {self.folder} has done")
        kept = []
        for line in log.read_text("utf-8", "replace").splitlines() if log.exists() else []:
            with suppress(ValueError, KeyError, TypeError):  # half a last line
                line = json.loads(line)
                if line["iteration"] <= done:
                    kept.append(line)
        if kept and done < self.args.iterations and done % self.args.eval_every:
            # it was evaluated as the last one, which it is no more
            kept[-1] = {k: v for k, v in kept[-1].items() if not k.startswith("eval")}
        write_atomically(log, "".join(json.dumps(line) + "\n" for line in kept).encode())

    @contextmanager
    def ema_weights(self):
        """Inside, the averaged weights are in the model, if there are any: for evaluation and for lora/."""
        if not self.ema:
            yield
            return
        self.ema.store(self.policy.parameters)
        self.ema.copy_to(self.policy.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.policy.parameters)


MAX_EVAL_PROMPTS = 64
SHOWN = (
    "reward_mean",
    "eval_reward",
    "ratio_first_error",
    "clip_low",
    "clip_high",
    "kl_ref",
    "grad_norm",
    "skipped_updates",
)


def run_config(args):
    """What config.json holds: every setting as used, versions, commit, command."""
    import diffusers
    import peft
    import transformers

    git, commit = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"], None
    with suppress(OSError):  # no git here
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    return {
        "script": Path(sys.argv[0]).stem,
        "settings": dataclasses.asdict(args) | {"resume": None},
        "prompts_sha256": prompts_hashes(args),
        "versions": {m.__name__: m.__version__ for m in (torch, diffusers, transformers, peft)},
        "commit": commit,
        "command": " ".join(sys.argv),
    }


class Stats:
    """Collects tensors over the updates of an iteration, without waiting for the device; averages them at the end."""

    def __init__(self):
        self.values = {}

    def add(self, **values):
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach().flatten())

    def metrics(self, clip_range):
        """Metrics of an iteration. Needs log_ratio and advantage, first_log_ratio and first_step; averages all others.

        clip_low: share of ratios under 1 - clip_range with a negative advantage; clip_high: over 1 + clip_range with a
        positive one. Those are the transitions whose gradient the clip cuts off. approx_kl: E[ratio - 1 - log ratio].
        """
        value = {name: torch.cat(parts).float().cpu() for name, parts in self.values.items()}
        log_ratio, advantage, step = value.pop("log_ratio"), value.pop("advantage"), value.pop("first_step").long()
        ratio, first_error = log_ratio.exp(), (value.pop("first_log_ratio").exp() - 1).abs().view(len(step), -1)
        by_step = [first_error[step == n].max().item() for n in step.unique()]
        return {
            "ratio_mean": ratio.mean().item(),
            "ratio_min": ratio.min().item(),
            "ratio_max": ratio.max().item(),
            "ratio_first_error": first_error.max().item(),
            "ratio_first_error_by_step": by_step,
            "clip_low": ((ratio < 1 - clip_range) & (advantage < 0)).float().mean().item(),
            "clip_high": ((ratio > 1 + clip_range) & (advantage > 0)).float().mean().item(),
            "approx_kl": (ratio - 1 - log_ratio).mean().item(),
            **{name: values.mean().item() for name, values in value.items()},
        }


def write_atomically(path, data):
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_picture(sheet, path):
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_atomically(path, buffer.getbuffer())


def finite(value):
    """NaN and infinity as None, in lists and dicts too: JSON has no word for them."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def picture_grid(images, captions, path, size=144, columns=8):
    """Save images (B, 3, H, W) in [0, 1] as a grid, each with its caption below it."""
    from diffusers.image_processor import VaeImageProcessor
    from PIL import Image, ImageDraw

    rows, pictures = -(-len(images) // columns), VaeImageProcessor.pt_to_numpy(images.clamp(0, 1))
    sheet = Image.new("RGB", (columns * (size + 8), rows * (size + 44)), (235, 235, 235))
    for n, (picture, caption) in enumerate(zip(VaeImageProcessor.numpy_to_pil(pictures), captions)):
        x, y = n % columns * (size + 8) + 4, n // columns * (size + 44) + 4
        filter = Image.Resampling.NEAREST if picture.width < size else Image.Resampling.LANCZOS
        sheet.paste(picture.resize((size, size), filter), (x, y))
        ImageDraw.Draw(sheet).text((x, y + size + 2), "\n".join(textwrap.wrap(caption, 24)[:3]), "black")
    write_picture(sheet, path)


def side_by_side(left, right, path):
    from PIL import Image

    pictures = [Image.open(left), Image.open(right)]
    sheet = Image.new("RGB", (sum(p.width for p in pictures) + 24, max(p.height for p in pictures)), "grey")
    sheet.paste(pictures[0], (0, 0))
    sheet.paste(pictures[1], (pictures[0].width + 24, 0))
    write_picture(sheet, path)


def line_chart(series, path, labels=None, size=(520, 220)):
    """Save {title: [values]} as charts over the steps, one below the other, each from 0 to its maximum."""
    from PIL import Image, ImageDraw

    width, height = size
    sheet = Image.new("RGB", (width, height * len(series)), "white")
    draw = ImageDraw.Draw(sheet)
    for n, (title, values) in enumerate(series.items()):
        top, bottom, step = n * height + 30, (n + 1) * height - 30, (width - 80) / max(len(values) - 1, 1)
        largest = max(values) or 1.0
        points = [(50 + i * step, bottom - (bottom - top) * value / largest) for i, value in enumerate(values)]
        draw.text((50, top - 24), f"{title} (largest {largest:.3g})", "black")
        draw.line([(50, top), (50, bottom), (width - 30, bottom)], "grey")
        draw.line(points, "blue", 2)
        for i, (x, y) in enumerate(points):
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], "blue")
            draw.text((x - 3, bottom + 6), str(labels[i] if labels else i), "black")
    write_picture(sheet, path)


def run_script(main, args_class, defaults):
    """Run a script's main; every end but a bug is one line on standard error and an exit status, no traceback."""
    try:
        main(parse_args(args_class, defaults))
    except torch.OutOfMemoryError:
        used = torch.cuda.max_memory_allocated() / 1e9
        sys.exit(
            fail(
                f"out of GPU memory, {used:.1f} GB were in use; lower --micro-batch or set --gradient-checkpointing", 1
            )
        )
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        sys.exit(fail(f"{error.strerror or error}{where}; the last checkpoint stands, see --resume", 1))
    except KeyboardInterrupt:
        sys.exit(fail("stopped", 130))
    except Exception as error:
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
            sys.exit(fail("out of memory; lower --micro-batch or the size of the batch, see --resume", 1))
        if not hasattr(error, "exit_status"):
            raise
        sys.exit(fail(str(error), error.exit_status))


def fail(message, exit_status):
    print(("error: " if exit_status < 128 else "") + " ".join(message.split()), file=sys.stderr)
    return exit_status
