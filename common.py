"""What the scripts share, in this order: sampler, model families, policy, several processes, run, command line.

Who reads the algorithms needs the sampler and the policy. The scripts import this file, and it imports none of them.
Notation as in the papers: sigma in [0, 1] is the noise level (1 noise, 0 image), x_sigma = (1 - sigma) image + sigma
noise, velocity = noise - image, s a noise scale, Delta = sigma - sigma_next. [FG] is Flow-GRPO (arXiv 2505.05470), [DG]
DanceGRPO (2505.07818), [CPS] Flow-CPS (2509.05952), [GC] GCPO (2510.21583), [TF] TempFlow-GRPO (2508.04324).
"""

import atexit
import dataclasses
import fcntl
import gc
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from argparse import SUPPRESS, ArgumentParser
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import get_args


def no_traceback(kind, error, traceback):
    """Ctrl-C where nobody has caught it, in the seconds that the imports take for instance: one line, status 130."""
    if kind is not KeyboardInterrupt:
        return sys.__excepthook__(kind, error, traceback)
    print("stopped", file=sys.stderr, flush=True)
    os._exit(130)


sys.excepthook = no_traceback
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # or it tells of packages that are not used here
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if not sys.stderr.isatty():
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch  # noqa: E402
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch.nn.functional import adaptive_avg_pool2d, pad, pixel_shuffle, pixel_unshuffle  # noqa: E402
from tqdm import tqdm  # noqa: E402

MAX_EVAL_PROMPTS = 64
TINY = Path(__file__).resolve().parent / "tests" / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class StopRun(Exception):
    """A clear end: one line for the user and an exit status. 2: bad input; 1: the run cannot go on; 128 + a signal."""

    def __init__(self, message, exit_status=2):
        super().__init__(message)
        self.exit_status = exit_status


def brief(error):
    """An exception's text on one line, with its type where it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def warn(message):
    print(f"warning: {message}", file=sys.stderr)


# ---------------------------------------------------------------- the sampler, advantages, metrics of the ratio


def noise_scale(sigmas, sde, noise_level):
    """Noise scale s of every step that can be random; its noise has std s sqrt(Delta).

    sigmas: (T + 1,) from 1 down to 0. sde: "flow", s = a sqrt(sigma / (1 - sigma)) [FG] eq. 9, where sigma = 1 the
    denominator has sigma_1, or it would be 0; "dance", s = eta [DG]; or "cps", std = sigma_next sin(eta pi / 2) [CPS].
    noise_level: a or eta. Returns (T - 1,): the last step is an ODE step.
    """
    if sde == "dance":
        return torch.full_like(sigmas[:-2], noise_level)
    if sde == "cps":
        return sigmas[1:-1] * math.sin(noise_level * math.pi / 2) / (sigmas[:-2] - sigmas[1:-1]).sqrt()
    inner = torch.where(sigmas == 1, sigmas[1], sigmas)
    return noise_level * (sigmas / (1 - inner)).sqrt()[:-2]


def wide(x):
    """float16 and bfloat16 as float32, in which all of the sampler is computed; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sde_drift_std(sigma, sigma_next, s, sde="flow"):
    """How much of the predicted noise a step takes out beyond the ODE's step, and the std of the noise that it puts in.

    sigma, sigma_next, s: tensors that broadcast. "flow" and "dance" keep the ODE's marginals where steps are small
    [FG]; "cps" keeps the noise of the next state at exactly sigma_next for steps of any size [CPS].
    """
    delta = sigma - sigma_next
    std = s * delta.sqrt()
    if sde == "cps":
        return sigma_next - (sigma_next**2 - std**2).clamp(min=0).sqrt(), std
    return s**2 * delta / (2 * sigma), std


def sde_mean_std(x, velocity, sigma, sigma_next, s, sde="flow"):
    """Mean and standard deviation of one SDE step, for any noise scale s >= 0 [FG] eq. 9, [CPS].

    x, velocity: (B, ...) latents and velocity at sigma; sigma, sigma_next, s: numbers or (B,) tensors. Returns mean
    like x and std as (B or 1, 1, ...), float32 or wider. With s = 0 the mean is the ODE's Euler step, exactly.
    A new sampler is another drift and std: the mean has the predicted image times 1 - sigma_next in it, whatever they
    are, since x + velocity (1 - sigma) is the predicted noise.
    """
    x, velocity = wide(x), wide(velocity)
    levels = [torch.as_tensor(level, dtype=x.dtype, device=x.device) for level in (sigma, sigma_next, s)]
    sigma, sigma_next, s = (level.view(-1, *[1] * (x.dim() - 1)) for level in levels)
    drift, std = sde_drift_std(sigma, sigma_next, s, sde)
    mean = (x - velocity * (sigma - sigma_next)) - drift * (x + velocity * (1 - sigma))
    return mean, std


def log_prob(x, mean, std, batch_dims=1):
    """Log-density of x under a Gaussian, AVERAGED over the latent's dimensions: (B, ...) -> (B,), float32 or wider.

    mean and std (a tensor, over 0) broadcast against x, whose first batch_dims dimensions are kept. The sum is the true
    log-probability of the step. Every published implementation takes the mean instead: ratios then do not depend on the
    resolution, and differ from 1 by as much less (65,536 dimensions at 512 px), so clip ranges are 1e-5 to 1e-3.
    """
    logp = -((wide(x) - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return logp.flatten(batch_dims).mean(-1)


@torch.no_grad()
def ode_sample(policy, x, text, owner, sigmas, tuned_share=1.0):
    """Deterministic Euler sampling from x (B, ...) at sigmas[0], as at inference; text and owner as in velocity.

    sigmas: (T + 1,) or some consecutive ones of them. tuned_share < 1 is hybrid inference [GC]: the adapter is on for
    that first share of the steps only. It is on when this returns.
    """
    for step in range(len(sigmas) - 1):
        if step == math.ceil(tuned_share * (len(sigmas) - 1) - 1e-9):
            policy.transformer.disable_adapters()
        velocity = policy.velocity_in_micro_batches(x, sigmas[step], text, owner)
        x = x - (sigmas[step] - sigmas[step + 1]) * velocity
    policy.transformer.enable_adapters()
    return x


def group_advantage(rewards, std="group", clip=5.0):
    """A = (r - mean of the group) / (std + 1e-4), clipped to +-clip.

    rewards: (..., G), a group in the last dimension. std: "group" [DG], or "batch" [FG], that of all rewards; both are
    the population's (divided by the count). Returns advantages like rewards, and the share of groups without spread:
    those have advantage 0 and teach nothing.
    """
    spread = rewards.std(-1, keepdim=True, correction=0)
    centred = rewards - rewards.mean(-1, keepdim=True)
    scale = spread if std == "group" else gather(rewards).std(correction=0)
    return (centred / (scale + 1e-4)).clamp(-clip, clip), (spread < 1e-6).float().mean().item()


def generator(seed, purpose, number):
    """A random generator that depends on just these three: so a resumed run draws what it would have drawn."""
    digest = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def iteration_prompts(prompts, count, iteration, seed):
    """The prompts of an iteration (1, 2, ...): the file in a new random order each time it has been gone through."""
    places = [divmod(position, len(prompts)) for position in range((iteration - 1) * count, iteration * count)]
    epochs = {epoch for epoch, _ in places}
    order = {n: torch.randperm(len(prompts), generator=generator(seed, "prompts", n)) for n in epochs}
    return [prompts[order[epoch][index]] for epoch, index in places]


def iteration_steps(steps, count, iteration, seed):
    """`count` of the `steps` in rising order: those that are random and trained in an iteration; all, if so many."""
    chosen = torch.randperm(len(steps), generator=generator(seed, "sde-steps", iteration))[:count]
    return [steps[n] for n in sorted(chosen.tolist())]


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
        value = {name: torch.cat(everywhere(torch.cat(parts).float().cpu())) for name, parts in self.values.items()}
        log_ratio, advantage, step = value.pop("log_ratio"), value.pop("advantage"), value.pop("first_step").long()
        ratio, first_error = log_ratio.exp(), (value.pop("first_log_ratio").exp() - 1).abs().view(len(step), -1)
        return {
            "ratio_mean": ratio.mean().item(),
            "ratio_min": ratio.min().item(),
            "ratio_max": ratio.max().item(),
            "ratio_first_error": first_error.max().item(),
            "ratio_first_error_by_step": [first_error[step == n].max().item() for n in step.unique()],
            "clip_low": ((ratio < 1 - clip_range) & (advantage < 0)).float().mean().item(),
            "clip_high": ((ratio > 1 + clip_range) & (advantage > 0)).float().mean().item(),
            "approx_kl": (ratio - 1 - log_ratio).mean().item(),
            **{name: values.mean().item() for name, values in value.items()},
        }


# ---------------------------------------------------------------- the model families


class SD3:
    """Stable Diffusion 3 and 3.5, and what every other family must provide.

    Another family is a class with the same names, in FAMILIES under the class name in the repository's
    model_index.json. What the pipeline can do itself, it does: so plain inference gives the same pictures.
    """

    # [FG]: the projections of both streams' attention
    targets = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
    max_sequence_length = 256  # T5 tokens: the pipeline's default
    two_pass_guidance = True  # False: the transformer takes guidance as an input, or none
    max_shift, even_sigmas = 1.16, False  # the pipeline's default; whether it shifts evenly spaced noise levels

    def __init__(self, pipe):
        self.pipe, self.ids = pipe, None

    @staticmethod
    def latent_shape(vae, transformer, resolution):
        """(C, H, W) from the two configs, before any weight is loaded; StopRun where the model cannot do it."""
        scale = 2 ** (len(vae["block_out_channels"]) - 1)  # pixels a latent; two latents a side are one token
        most = transformer.get("pos_embed_max_size", math.inf) * 2 * scale
        if resolution % (2 * scale) or resolution > most:
            raise StopRun(f"--resolution {resolution} does not fit; give a multiple of {2 * scale}, {most} at most")
        return vae["latent_channels"], resolution // scale, resolution // scale

    def encode(self, prompts):
        """Text of B prompts: a list of tensors (B, ...), as the pipeline makes them."""
        options = {"do_classifier_free_guidance": False, "max_sequence_length": self.max_sequence_length}
        embeds, _, pooled, _ = self.pipe.encode_prompt(prompts, None, None, **options)
        return [embeds, pooled]

    def shift(self, tokens, steps):
        """How far the schedule is shifted towards noise, by the number of the image's tokens."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        get = self.pipe.scheduler.config.get
        lengths = get("base_image_seq_len", 256), get("max_image_seq_len", 4096)
        return calculate_shift(tokens, *lengths, get("base_shift", 0.5), get("max_shift", self.max_shift))

    def sigmas(self, steps, resolution):
        """(steps + 1,) noise levels of the pipeline's scheduler, from 1 to 0."""
        scheduler, get = self.pipe.scheduler, self.pipe.scheduler.config.get
        mu = self.shift((resolution // (2 * self.pipe.vae_scale_factor)) ** 2, steps)
        even = [1 - n / steps for n in range(steps)] if self.even_sigmas and not get("use_flow_sigmas") else None
        scheduler.set_timesteps(steps, sigmas=even, mu=mu if get("use_dynamic_shifting") else None)
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
    """FLUX.1: guidance is an input of the transformer, which sees the latents as tokens of 2 x 2."""

    # [FG], for FLUX: attention and feed-forward of both streams, and the attention of the single stream
    targets = SD3.targets + "ff.net.0.proj ff.net.2 ff_context.net.0.proj ff_context.net.2".split()
    max_sequence_length = 512
    two_pass_guidance = False
    max_shift, even_sigmas = 1.15, True
    patch = 2

    def encode(self, prompts):
        embeds, pooled, _ = self.pipe.encode_prompt(prompts, None, max_sequence_length=self.max_sequence_length)
        return [embeds, pooled]

    def positions(self, embeds, x):
        """Position ids of the tokens of text and image, the same for every prompt and latent."""
        height, width = x.shape[2] // 2, x.shape[3] // 2
        image = self.pipe._prepare_latent_image_ids(1, height, width, x.device, x.dtype)
        return {"txt_ids": x.new_zeros(embeds.shape[1], 3), "img_ids": image}

    def predict(self, x, sigma, text, guidance):
        transformer, patches = self.pipe.transformer, pixel_unshuffle(x, self.patch)
        self.ids = self.ids or self.positions(text[0], x)  # made once
        embedded = transformer.config.guidance_embeds
        velocity = transformer(
            hidden_states=patches.flatten(2).transpose(1, 2),  # (B, tokens, channels)
            timestep=(sigma * 1000).to(x.dtype) / 1000,  # rounded as the pipeline does
            guidance=x.new_full((len(x),), guidance, dtype=torch.float32) if embedded else None,
            return_dict=False,
            **dict(zip(("encoder_hidden_states", "pooled_projections"), text)),
            **self.ids,
        )[0]
        return pixel_shuffle(velocity.transpose(1, 2).reshape(patches.shape), self.patch)


class Flux2Klein(Flux):
    """FLUX.2 klein: patches of 2 x 2 are channels of the latent, which the VAE's batch norm has normalised."""

    # as for FLUX; here the single stream has one layer for attention and feed-forward in, and one out
    targets = (
        r".*\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|to_qkv_mlp_proj)|ff(_context)?\.linear_(in|out))"
        r"|single_transformer_blocks\.\d+\.attn\.to_out"
    )
    patch = 1

    def __init__(self, pipe):
        super().__init__(pipe)
        self.two_pass_guidance = not pipe.config.is_distilled  # the pipeline has none for distilled models

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


FAMILIES = {  # the pipeline's class: the name of its settings in DEFAULTS, and what it can do
    "StableDiffusion3Pipeline": ("sd3", SD3),
    "FluxPipeline": ("flux", Flux),
    "Flux2KleinPipeline": ("flux2", Flux2Klein),
}


def find_family(model):
    """Which settings a model takes ("tiny", "sd3", ...), its folder or repository, and its pipeline's class name.

    Reads model_index.json, from the folder, the cache or the hub. StopRun: it is none of ours, or out of reach.
    """
    source = str(TINY) if model == "tiny" else model
    try:
        index = Path(source, "model_index.json")
        if not Path(source).exists():
            index = try_to_load_from_cache(source, "model_index.json")
            if not isinstance(index, str):
                HfApi().model_info(source, timeout=10)  # fails at once where a download would try again and again
                index = hf_hub_download(source, "model_index.json")
        name = json.loads(Path(index).read_text("utf-8"))["_class_name"]
    except Exception as error:  # of many kinds: misspelt, gated, no network, a folder of something else
        hint = "check spelling and network; for a gated one accept its licence and log in with `hf auth login`"
        raise StopRun(f"--model {model} is no diffusers pipeline in a folder or on the hub ({brief(error)}); {hint}")
    if name not in FAMILIES:
        raise StopRun(f"--model {model} is a {name}; this code knows {', '.join(FAMILIES)}")
    return "tiny" if Path(source).resolve() == TINY else FAMILIES[name][0], source, name


def load_pipeline(model, dtype, resolution):
    """The pipeline of a model in a dtype (its name); a resolution that it cannot do is refused before weights load."""
    import diffusers

    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
    _, source, class_name = find_family(model)
    pipe_class = getattr(diffusers, class_name)
    try:
        config = pipe_class.load_config(source)
        absent = {name: None for name, value in config.items() if isinstance(value, list) and value[0] is None}
        parts = [diffusers.AutoencoderKL.load_config(source, subfolder=name) for name in ("vae", "transformer")]
        FAMILIES[class_name][1].latent_shape(*parts, resolution)
        # weights as safetensors only, never a repository's own code
        safe = {"use_safetensors": True, "trust_remote_code": False}
        return pipe_class.from_pretrained(source, dtype=DTYPES[dtype], **safe, **absent)
    except (OSError, ValueError) as error:
        raise StopRun(f"--model {model} cannot be loaded ({brief(error)}); check its folder or fetch it again")


# ---------------------------------------------------------------- the policy: a diffusers pipeline with a LoRA adapter


class Policy:
    """The model that is trained: a pipeline whose transformer has a LoRA adapter.

    Only the adapter trains, in float32; all else is frozen, in its own dtype. `velocity` is the one way to the network,
    for rollout, training, reference and evaluation alike.

    latents: how many an iteration keeps. They live, with noise and schedule, on `store`: the device, or the CPU if
    their float32 take over an eighth of its memory. Tensors made from them stay there; velocity takes its micro-batch
    to the device and brings it back. max_sequence_length: T5 tokens, if other than the family's.
    """

    def __init__(
        self, pipe, resolution, guidance=1.0, micro_batch=1, lora_rank=32, lora_alpha=64.0, ema_decay=0.0,
        device="cuda", seed=0, gradient_checkpointing=False, compile=False, latents=0, max_sequence_length=None,
    ):  # fmt: skip
        from diffusers.training_utils import EMAModel, cast_training_params
        from peft import LoraConfig

        family = FAMILIES[type(pipe).__name__][1]
        pipe.set_progress_bar_config(disable=True)
        self.family, self.pipe, self.transformer = family(pipe), pipe, pipe.transformer
        if max_sequence_length is not None:
            self.family.max_sequence_length = max_sequence_length
        self.shape = family.latent_shape(pipe.vae.config, pipe.transformer.config, resolution)
        self.device, self.resolution, self.guidance = torch.device(device), resolution, guidance
        self.micro_batch, self.velocity_evals, self.compiled = micro_batch, 0, compile
        cuda = self.device.type == "cuda"
        memory = torch.cuda.get_device_properties(self.device).total_memory if cuda else math.inf
        self.store = torch.device("cpu") if 32 * latents * math.prod(self.shape) > memory else self.device
        if cuda and self.transformer.dtype != torch.float32:  # TF32, or LoRA takes as long as the rest
            torch.set_float32_matmul_precision("high")
        # cuDNN's attention is off: FLUX.1's backward made an illegal memory access with it (H200, torch 2.11)
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.encoders = [part for name, part in pipe.components.items() if part and name.startswith("text_encoder")]
        for part in (pipe.vae, pipe.transformer, *self.encoders):
            part.requires_grad_(False).eval()
        pipe.vae.to(self.device)
        pipe.transformer.to(self.device)
        torch.manual_seed(seed)  # LoRA's A is random, its B is zero: the first policy is the base model
        self.transformer.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules=family.targets))
        cast_training_params(self.transformer, torch.float32)
        self.parameters = [p for p in self.transformer.parameters() if p.requires_grad]
        self.ema = EMAModel(self.parameters, ema_decay) if ema_decay else None
        # The loss is averaged over the latent's numbers and an update's transitions (1,024, say), and so small are its
        # gradients: in float16 they would be 0 inside the network, so they go through it multiplied. A power of two
        # changes no digit.
        self.loss_scale = 1024 * 2.0 ** round(math.log2(math.prod(self.shape)))
        if gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        if compile:
            if not self.transformer._repeated_blocks:  # SD3's class does not name them
                self.transformer._repeated_blocks = self.transformer._no_split_modules
            self.transformer.compile_repeated_blocks()

    @torch.no_grad()
    def encode(self, prompts):
        """Text embeddings of n prompts: a list of tensors (n + 1, ...), the last row for guidance's empty prompt.

        The encoders visit the GPU for this and leave it; so memory does not grow with the number of prompts in a file.
        """
        for encoder in self.encoders:
            encoder.to(self.device)
        unique = list(dict.fromkeys([*prompts, ""]))
        index = torch.tensor([unique.index(prompt) for prompt in [*prompts, ""]])
        parts = [self.family.encode(unique[start : start + 8]) for start in range(0, len(unique), 8)]
        for encoder in self.encoders:
            encoder.to("cpu")
        torch.cuda.empty_cache()
        return [torch.cat(rows)[index].to(self.device) for rows in zip(*parts)]

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
        grad = torch.is_grad_enabled()
        with torch.set_grad_enabled(grad or self.compiled):  # compiled without gradients it would round differently
            velocity = self.family.predict(x, sigma, [rows[owner] for rows in text], self.guidance)
        velocity = velocity if grad else velocity.detach()
        if two_pass:
            without, with_text = velocity.chunk(2)
            velocity = without + self.guidance * (with_text - without)
        self.velocity_evals += count * (2 if two_pass else 1) * (3 if grad else 1)
        return wide(velocity[:count]).to(store)

    def velocity_in_micro_batches(self, x, sigma, text, owner):
        parts = zip(x.split(self.micro_batch), owner.split(self.micro_batch))
        return torch.cat([self.velocity(x_part, sigma, text, owner_part) for x_part, owner_part in parts])

    def sigmas(self, steps):
        """(steps + 1,) noise levels of the pipeline's own scheduler, from 1 to 0."""
        return self.family.sigmas(steps, self.resolution).to(self.store)

    def noise(self, prompts, each, generator):
        """Standard normal latents of this process's prompts, `each` of them for a prompt: (prompts * each, C, H, W).

        Drawn for the prompts of all processes, on the CPU: every device and any number of processes has the same.
        """
        return share(torch.randn(prompts, each, *self.shape, generator=generator)).flatten(0, 1).to(self.store)

    @torch.no_grad()
    def decode(self, x):
        """Latents -> images (B, 3, H, W) in [0, 1], float32, a micro-batch at a time."""
        return torch.cat([self.family.decode(part.to(self.device)).float() for part in x.split(self.micro_batch)])

    @contextmanager
    def reference(self):
        """Inside, the adapter is off and no gradient is kept: the frozen model that the KL is measured to."""
        self.transformer.disable_adapters()
        try:
            with torch.no_grad():
                yield
        finally:
            self.transformer.enable_adapters()

    def backward(self, loss):
        """Add the loss's gradient to the adapter's, multiplied by loss_scale, which clip_gradients takes out again."""
        (loss * self.loss_scale).backward()

    def clip_gradients(self, max_norm):
        """Average the gradients over the processes, take loss_scale out, clip; returns the norm before clipping."""
        gradients = [parameter.grad for parameter in self.parameters]
        if PROCESSES > 1:
            summed = torch.nn.utils.parameters_to_vector(gradients)  # one message; hundreds of small ones are slow
            collective(torch.distributed.all_reduce, summed)
            torch.nn.utils.vector_to_parameters(summed, gradients)
        for gradient in gradients:
            gradient /= self.loss_scale * PROCESSES
        return torch.nn.utils.clip_grad_norm_(self.parameters, max_norm)

    def update_average(self):
        """After an optimizer step: the moving average of the weights, if there is one."""
        if self.ema:
            self.ema.step(self.parameters)

    @contextmanager
    def averaged(self):
        """Inside, the weights are their moving average, if there is one: for evaluation and for what is saved."""
        if self.ema:
            self.ema.store(self.parameters)
        try:
            if self.ema:
                self.ema.copy_to(self.parameters)
            yield
        finally:
            if self.ema:
                self.ema.restore(self.parameters)

    def lora(self):
        """The adapter's weights on the CPU, {name: tensor}."""
        from peft import get_peft_model_state_dict

        return {name: value.detach().cpu() for name, value in get_peft_model_state_dict(self.transformer).items()}

    def save_lora(self, folder):
        """The adapter as diffusers saves it: `pipe.load_lora_weights(folder)` reads it. Equal runs, equal files."""
        config = self.transformer.peft_config["default"].to_dict()
        config = {f"transformer.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.items()}
        # the entry that diffusers reads; it would write two of them, and safetensors those in another order each time
        metadata = {"lora_adapter_metadata": json.dumps(config, sort_keys=True)}
        self.pipe.save_lora_weights(folder, self.lora(), save_function=partial(save_file, metadata=metadata))


def make_policy(args, trajectories):
    """The Policy of a script's settings. trajectories: how many latents it has in flight at most."""
    names = "resolution guidance lora_rank lora_alpha ema_decay seed gradient_checkpointing compile".split()
    return Policy(
        load_pipeline(args.model, args.dtype, args.resolution),
        **{name: getattr(args, name) for name in names},
        device=args.device,
        micro_batch=min(args.micro_batch, trajectories),
        latents=3 * args.steps * trajectories,  # a step keeps its noise, and the states before and after it
        max_sequence_length=0 if args.family == "tiny" else None,  # which was trained without T5's tokens
    )


# ---------------------------------------------------------------- several processes, as torchrun starts them


RANK, PROCESSES = 0, 1
if torch.distributed.is_torchelastic_launched():
    RANK, PROCESSES = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def take_gpu(device):
    """Make torchrun's processes on this machine use a GPU each; "cuda" is from then on the GPU of this process."""
    if PROCESSES > 1 and device.startswith("cuda"):
        local, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if local > gpus or device != "cuda":
            raise StopRun(
                f"--device {device} cannot be used by {local} processes on a machine with {gpus} GPUs; give torchrun "
                "--nproc-per-node as many as there are, or --device cpu"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


@contextmanager
def quiet():
    """Inside, the first process alone prints."""
    out, err = (sys.stdout, sys.stderr) if RANK == 0 else [open(os.devnull, "w")] * 2
    with redirect_stdout(out), redirect_stderr(err):
        yield


def join_processes(args):
    """Let the processes find each other. A run knows just one: what the others write goes to a folder that is lost."""
    if PROCESSES > 1:
        collective(torch.distributed.init_process_group)  # gloo for what is on a CPU, nccl for what is on CUDA
        everywhere(None)  # none goes on before all have looked at args.output
    if RANK > 0:
        args.output, args.wandb = tempfile.mkdtemp(), None
        atexit.register(shutil.rmtree, args.output, ignore_errors=True)


def collective(operation, *values):
    """One of torch.distributed's operations. Where a process has ended they fail in the others, which end as well."""
    try:
        operation(*values)
    except RuntimeError as error:
        if RANK > 0:
            sys.exit(1)
        raise StopRun(f"another process has ended ({brief(error)}); find out why, go on with --resume", exit_status=1)


def share(rows):
    """This process's part of the rows of all: every PROCESSES-th. All of them where there is one process."""
    return rows[RANK::PROCESSES]


def everywhere(value):
    """The list of all processes' values, tensors on the CPU or other objects, the same in each process."""
    values = [value] * PROCESSES
    if PROCESSES > 1:
        collective(torch.distributed.all_gather_object, values, value)
    return values


def gather(rows):
    """The rows of all processes in the order in which share dealt them out: (n, ...) -> (n of all, ...)."""
    parts = everywhere(rows.cpu())
    whole = torch.cat(parts)
    for rank, part in enumerate(parts):
        whole[rank::PROCESSES] = part
    return whole.to(rows.device)


# ---------------------------------------------------------------- the run: evaluation, checkpoint, log, the loop


def score(policy, reward, latents, prompts, at_once=64):
    """Decode and score N latents, about at_once at a time: TempFlow's 10,000 branches would be 32 GB of pictures.

    Returns scores (N,), and {name: scores (N,)} of the reward's parts.
    """
    size = -(-at_once // policy.micro_batch) * policy.micro_batch
    slices = [slice(start, start + size) for start in range(0, len(latents), size)]
    scored = [reward(policy.decode(latents[part]), prompts[part]) for part in slices]
    return torch.cat([s for s, _ in scored]), {n: torch.cat([parts[n] for _, parts in scored]) for n in scored[0][1]}


class Evaluation:
    """Images of fixed prompts from fixed noise by the ODE, as at inference: their rewards, and some as pictures."""

    def __init__(self, args, policy, reward, eval_reward):
        prompts = read_prompts(args.eval_prompts or args.prompts)[:MAX_EVAL_PROMPTS]
        self.args, self.policy, self.reward, self.eval_reward = args, policy, reward, eval_reward
        self.text = [rows.cpu() for rows in policy.encode(prompts)]
        self.prompts = [prompt for prompt in prompts for _ in range(args.eval_seeds)]
        if len(self.prompts) < PROCESSES:
            raise StopRun(f"less than one picture a process to evaluate: {len(self.prompts)}; raise --eval-seeds")

    @torch.no_grad()
    def __call__(self, iteration, progress):
        """Returns the metrics of an evaluation, and writes samples/<iteration>.png and samples/compare.png."""
        args, policy, count, evals = self.args, self.policy, len(self.prompts), self.policy.velocity_evals
        text, sigmas = [rows.to(policy.device) for rows in self.text], policy.sigmas(args.eval_steps)
        noise = policy.noise(count, 1, generator(0, "evaluation", 0)).split(policy.micro_batch)
        owner = share(torch.arange(count) // args.eval_seeds).split(policy.micro_batch)
        hybrid, latents = getattr(args, "eval_hybrid", 1.0), []
        with policy.averaged():
            for mb_noise, mb_owner in progress(list(zip(noise, owner)), "evaluation"):
                latents.append(ode_sample(policy, mb_noise, text, mb_owner, sigmas, hybrid))
        policy.velocity_evals = evals  # evaluation is not part of the cost
        images, prompts = torch.cat([policy.decode(x).cpu() for x in latents]), share(self.prompts)
        scores, parts = self.reward(images, prompts)
        if self.eval_reward:
            parts = parts | self.eval_reward(images, prompts)[1]
        images, scores, parts = gather(images), gather(scores), {name: gather(part) for name, part in parts.items()}
        if iteration == 0:
            print(*self.reward.self_check(images, self.prompts, parts), sep="\n")
        shown = list(range(0, count, args.eval_seeds))[:16]  # the first prompts, whatever came out
        captions = [f"{scores[n]:.2f}  {self.prompts[n]}" for n in shown]
        save_pictures(images[shown], captions, Path(args.output, "samples"), iteration)
        return {"eval_reward": scores.mean().item()} | {f"eval/{name}": x.mean().item() for name, x in parts.items()}


def save_pictures(images, captions, folder, iteration, size=192, columns=4):
    """Save images (B, 3, H, W) in [0, 1] as a grid, and the first grid beside this one, as compare.png."""
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.utils import make_image_grid
    from PIL import Image, ImageDraw, ImageOps

    images = adaptive_avg_pool2d(images.clamp(0, 1), size)  # small ones are enlarged without blur, pixel by pixel
    tiles = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pad(images, (4, 4, 4, 52), value=1.0)))
    for tile, caption in zip(tiles, captions):
        ImageDraw.Draw(tile).text((4, size + 6), "\n".join(textwrap.wrap(caption, 30)[:3]), "black", font_size=13)
    tiles += [Image.new("RGB", tiles[0].size, "white")] * (-len(tiles) % columns)
    make_image_grid(tiles, len(tiles) // columns, columns).save(folder / f"{iteration}.png")
    first = min(folder.glob("[0-9]*.png"), key=lambda path: int(path.stem))
    both = [ImageOps.expand(Image.open(path), 6, "grey") for path in (first, folder / f"{iteration}.png")]
    make_image_grid(both, rows=1, cols=2).save(folder / "compare.png")


def plot(charts, x_label, path):
    """Save {title: {label: [(x, y), ...]}} as line charts, one below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2.5 * len(charts)), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(len(charts), squeeze=False)[:, 0], charts.items()):
        for label, points in lines.items():
            axes.plot(*zip(*points), marker=".", label=label)
        axes.set(title=title, xlabel=x_label)
        if len(lines) > 1:
            axes.legend()
    figure.savefig(path)
    del figure, axes
    gc.collect()  # a figure is a circle of references, which would stay for long


@contextmanager
def aside(folder):
    """A folder for files that are to be written whole or not at all: at the end they take their place in `folder`."""
    place = Path(folder, "save.tmp")
    shutil.rmtree(place, ignore_errors=True)  # left by a process that was killed
    try:
        place.mkdir()
        yield place
        for file in list(place.rglob("*.*")):
            with open(file) as written:
                os.fsync(written)
            (folder / file.relative_to(place)).parent.mkdir(exist_ok=True)
            os.replace(file, folder / file.relative_to(place))
    finally:
        shutil.rmtree(place, ignore_errors=True)


def save_checkpoint(folder, policy, optimizer, counters, lines):
    """checkpoint.pt and lora/, so that a crash never leaves half a file."""
    ema, buffer = policy.ema.state_dict() if policy.ema else None, io.BytesIO()
    state = {"lora": policy.lora(), "optimizer": optimizer.state_dict(), "ema": ema}
    with aside(folder) as place:
        torch.save(state | {"counters": counters, "lines": lines}, buffer)
        (place / "checkpoint.pt").write_bytes(buffer.getbuffer())  # which tells of a full disk as the system does
        with policy.averaged():
            policy.save_lora(place / "lora")


def load_checkpoint(path, policy, optimizer):
    """Put back what save_checkpoint kept; returns counters and lines. StopRun: the file is cut, or another model's."""
    from peft import set_peft_model_state_dict

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if {k: v.shape for k, v in state["lora"].items()} != {k: v.shape for k, v in policy.lora().items()}:
            raise ValueError("its adapter is another model's")
        set_peft_model_state_dict(policy.transformer, state["lora"])
        optimizer.load_state_dict(state["optimizer"])
        if policy.ema:
            policy.ema.load_state_dict(state["ema"])
            policy.ema.to(policy.device)
        return state["counters"], state["lines"]
    except Exception as error:  # what a cut or foreign file raises is of many kinds
        raise StopRun(f"{path} cannot be resumed from ({brief(error)}); start a new run")


class Log:
    """What each iteration was: metrics.jsonl, terminal, wandb, samples/progress.png, steps.png. lines: those before."""

    def __init__(self, args, lines):
        config, self.folder, self.lines, self.wandb = run_config(args), Path(args.output), lines, None
        with aside(self.folder) as place:
            (place / "config.json").write_text(json.dumps(config, indent=1), "utf-8")
            (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        if args.wandb:
            import wandb

            self.wandb = wandb.init(project=args.wandb, name=self.folder.name, config=config)
        self.header = "iteration    reward evaluated   clipped  gradient\n"  # goes before the first row

    def write(self, metrics):
        """One more iteration. What is not finite is null: JSON has no word for it."""
        metrics = json.loads(json.dumps(metrics), parse_constant=lambda _: None)
        self.lines.append(metrics)
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        if self.wandb:
            self.wandb.log(metrics, step=metrics["iteration"])
        clipped = metrics["clip_low"] + metrics["clip_high"] if metrics["iteration"] else None
        row = metrics.get("reward_mean"), metrics.get("eval_reward"), clipped, metrics.get("grad_norm")
        cells = ["" if value is None else f"{value:.4g}" for value in row]
        tqdm.write(f"{self.header}{metrics['iteration']:9d}" + "".join(f"{cell:>10}" for cell in cells))
        self.header = ""
        if "eval_reward" in metrics:
            names = {"reward_mean": "rollout (SDE)", "eval_reward": "evaluation (ODE)"}
            curves = {names[key]: [(m["iteration"], m[key]) for m in self.lines if key in m] for key in names}
            plot({"reward": curves}, "iteration", self.folder / "samples" / "progress.png")
            by_step = {name: {"": list(enumerate(row))} for name, row in metrics.items() if name.endswith("_by_step")}
            if by_step:
                plot(by_step, "random step", self.folder / "samples" / "steps.png")


class Run:
    """A run and its folder, in a `with` statement: what the loop of a script calls around the algorithm.

    It evaluates, logs and saves when it is time to, and measures the phases. At a signal or an error it ends in order:
    what is saved then is the last complete iteration; amid updates, the checkpoint before it stands.
    """

    def __init__(self, args, policy, optimizer, reward, eval_reward):
        self.args, self.policy, self.optimizer, self.folder = args, policy, optimizer, Path(args.output)
        self.evaluate = Evaluation(args, policy, reward, eval_reward)
        # of iteration 0 nothing is done yet, not even the evaluation of the base model
        self.counters = {"iteration": -1, "images": 0, "velocity_evals": 0, "skipped_updates": 0, "skipped_in_a_row": 0}
        self.complete = True  # whether weights and counters are those after an iteration: not amid updates
        self.signal, self.hopeless, self.measured = 0, False, {}

    def __enter__(self):
        args, lines, checkpoint = self.args, [], Path(self.args.resume or self.folder, "checkpoint.pt")
        try:
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / ".lock", "w")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # the lock is another's, or the folder read-only
            raise StopRun(f"another process runs in {self.folder}, or it cannot be written ({error.strerror}); wait")
        if checkpoint.exists():
            self.counters, lines = load_checkpoint(checkpoint, self.policy, self.optimizer)
            self.policy.velocity_evals = self.counters["velocity_evals"] if RANK == 0 else 0
            done = self.counters["iteration"]
            if args.iterations < done:
                raise StopRun(f"--iterations {args.iterations} is less than the {done} that {args.resume} has done")
            if done < args.iterations and done % args.eval_every:  # evaluated as the last one, which it is no more
                lines[-1] = {name: value for name, value in lines[-1].items() if not name.startswith("eval")}
        self.log_file = Log(args, lines)
        self.handlers = {n: signal.signal(n, self.on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        try:  # before the handlers go: torchrun ends every process where one has ended
            if self.complete and self.counters["iteration"] > 0:
                self.save()
        finally:
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            self.lock.close()

    def on_signal(self, number, frame):
        if self.signal:  # the second time: now
            raise StopRun(f"stopped at once; go on with --resume {self.folder}", exit_status=128 + number)
        self.signal = number
        tqdm.write("stopping after this iteration; the same signal again stops at once", file=sys.stderr)

    def save(self):
        save_checkpoint(self.folder, self.policy, self.optimizer, self.counters, self.log_file.lines)

    def iterations(self):
        """The numbers of the iterations to run. Evaluates the base model first, saves when it is time to."""
        if self.counters["iteration"] < 0:
            self.finish({"iteration": 0})
        first, last = self.counters["iteration"] + 1, self.args.iterations
        for iteration in self.progress(range(first, last + 1), "iterations", initial=first - 1, total=last, leave=True):
            if stop := max(everywhere(self.signal)):  # whichever process it was sent to
                raise StopRun(f"stopped; go on with --resume {self.folder}", exit_status=128 + stop)
            yield iteration
            if self.hopeless:
                hint = "lower --learning-rate or use another --dtype; what was trained is saved"
                raise StopRun(f"loss or gradient were not finite in 5 updates in a row; {hint}", exit_status=1)
            if iteration % self.args.save_every == 0:
                self.save()
        if stop := max(everywhere(self.signal)):
            raise StopRun("stopped, after the last iteration", exit_status=128 + stop)
        self.save()
        print_ending(self.args, self.log_file.lines)

    def progress(self, items, label, **options):
        """A bar around an iterable, in a terminal."""
        return tqdm(items, desc=label, **{"leave": False, "disable": None} | options)

    @contextmanager
    def phase(self, name):
        """Measure a phase: its time, for the metrics as <name>_s, and on CUDA its peak memory."""
        cuda, start = self.policy.device.type == "cuda", time.perf_counter()
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.policy.device)
        yield
        if cuda:
            torch.cuda.synchronize(self.policy.device)
            self.measured[f"peak_memory_gb/{name}"] = round(
                torch.cuda.max_memory_allocated(self.policy.device) / 1e9, 3
            )
        self.measured[f"{name}_s"] = round(time.perf_counter() - start, 3)

    def can_step(self, grad_norm):
        """Whether an update may be made. One whose gradient is not finite (nor is its loss) is left out and counted."""
        self.complete, finite = False, math.isfinite(grad_norm)
        self.counters["skipped_updates"] += not finite
        self.counters["skipped_in_a_row"] = 0 if finite else self.counters["skipped_in_a_row"] + 1
        self.hopeless |= self.counters["skipped_in_a_row"] >= 5
        return finite

    def log(self, iteration, rewards, parts, zero_std_groups, stats, **more):
        """An iteration is complete. rewards: of its images; parts: {name: scores}; more: an algorithm's own metrics."""
        rewards = gather(rewards)
        self.counters["images"] += len(rewards)
        metrics = {
            "iteration": iteration,
            "reward_mean": rewards.mean().item(),
            "reward_std": rewards.std().item(),
            **{f"reward/{name}": gather(scores).mean().item() for name, scores in parts.items()},
            "zero_std_groups": sum(everywhere(zero_std_groups)) / PROCESSES,
            **stats.metrics(self.args.clip_range),
            **more,
        }
        if iteration == 1 and not metrics["ratio_first_error"] < 0.1 * self.args.clip_range:  # also tells of nan
            wrong = f"the ratio is off 1 by {metrics['ratio_first_error']:.1e} before any update"
            causes = "--compile, --dtype float16, dropout, an attention kernel that is not deterministic"
            warn(f"{wrong}: rollout and training disagree, every ratio is wrong by as much; likely causes: {causes}")
        self.finish(metrics)

    def finish(self, metrics):
        """Evaluate if it is time to; then write the line, and the iteration is done."""
        iteration, args = metrics["iteration"], self.args
        self.counters |= {"iteration": iteration, "velocity_evals": sum(everywhere(self.policy.velocity_evals))}
        if iteration:
            metrics |= {name: self.counters[name] for name in ("images", "velocity_evals", "skipped_updates")}
        try:
            if iteration % args.eval_every == 0 or iteration == args.iterations:
                with self.phase("eval"):
                    metrics |= self.evaluate(iteration, self.progress)
            measured = everywhere(self.measured)  # the slowest process counts, and the one that takes most memory
            self.measured = {name: max(one[name] for one in measured) for name in self.measured}
        finally:  # where an evaluation fails, what was trained is kept all the same
            metrics |= self.measured
            if peaks := [value for name, value in self.measured.items() if name.startswith("peak_memory_gb/")]:
                metrics["peak_memory_gb"] = max(peaks)
            self.measured = {}
            self.log_file.write(metrics)
            self.complete = True


def run_config(args):
    """What config.json holds: every setting as used, versions, commit, command. A run that goes on keeps its own."""
    git, commit = ["git", "-C", str(TINY), "rev-parse", "HEAD"], None
    with suppress(OSError):  # no git here
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    config = {
        "script": Path(sys.argv[0]).stem,
        "settings": dataclasses.asdict(args) | {"resume": None},
        "prompts_sha256": prompts_hashes(args),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers", "peft")},
        "commit": commit,
        "command": " ".join(sys.argv),
    }
    if args.resume:
        before = json.loads(Path(args.resume, "config.json").read_text("utf-8"))
        if before["versions"] != config["versions"]:
            warn(f"this run began with {before['versions']}; its numbers may differ now")
        config = before | {"settings": config["settings"], "resumed": [*before.get("resumed", []), config["command"]]}
    return config


def print_ending(args, lines):
    """What a run did, where to look, and how to use its adapter: three lines."""
    import diffusers

    _, source, class_name = find_family(args.model)
    config = getattr(diffusers, class_name).load_config(source)
    absent = [f", {name}=None" for name, value in config.items() if isinstance(value, list) and value[0] is None]
    dtype = f"dtype=torch.{args.dtype}"
    load = f'diffusers.{class_name}.from_pretrained("{source}", {dtype}{"".join(absent)})'
    looks = [line["eval_reward"] for line in lines if line.get("eval_reward") is not None]
    minutes = sum(value for line in lines for name, value in line.items() if name.endswith("_s") and value) / 60
    evals = lines[-1].get("velocity_evals", 0)
    print(f"evaluation {looks[0]:.3f} -> {looks[-1]:.3f} in {minutes:.1f} minutes and {evals:,} velocity evaluations")
    print(f"pictures before and after: {args.output}/samples/compare.png; adapter: {args.output}/lora")
    print(f'import diffusers, torch; pipe = {load}; pipe.load_lora_weights("{args.output}/lora")')


# ---------------------------------------------------------------- the command line


def option(default, help, low=0, high=10**6, choices=None, group=None):
    """A field of Args that is an option: a number from low to high, or one of the choices. group: begins a new one."""
    told = {"help": help, "low": low, "high": high, "choices": choices, "group": group}
    return dataclasses.field(default=default, metadata=told)


class Parser(ArgumentParser):
    def error(self, message):
        raise StopRun(f"{message.removeprefix('argument ')}; see --help")


def read_command_line(args_class, defaults, argv):
    """{name: value} of what is given, for a dataclass of `option`s."""
    parser = group = Parser(allow_abbrev=False, argument_default=SUPPRESS)
    for field in dataclasses.fields(args_class):
        name, told, kind = field.name, field.metadata, (get_args(field.type) or (field.type,))[0]
        group = parser.add_argument_group(told["group"]) if told["group"] else group
        by_model = ", ".join(f"{values[name]} for {model}" for model, values in defaults.items() if name in values)
        default = by_model or field.default
        text = told["help"] + (f" (default: {default})" if default is not None and default is not False else "")
        how = {"type": kind, "choices": told["choices"], "metavar": None if told["choices"] else kind.__name__.upper()}
        how = {"action": "store_true"} if kind is bool else how
        group.add_argument(f"--{name.replace('_', '-')}", help=text, **how)
    given = vars(parser.parse_args(argv))
    for field in dataclasses.fields(args_class):
        value, low, high = given.get(field.name), field.metadata["low"], field.metadata["high"]
        if isinstance(value, int | float) and not low <= value <= high:  # refuses nan as well
            parser.error(f"--{field.name.replace('_', '-')} {value} is out of range {low} to {high}")
    return given


def parse_args(args_class, defaults, argv=None):
    """The command line as an instance of the dataclass args_class, checked; no model is loaded, nothing is written.

    defaults: {"tiny": {...}, "sd3": {...}} for the settings that are None in args_class. With --resume the settings
    are those of that run.
    """
    given = read_command_line(args_class, defaults, argv)
    args = resumed_args(args_class, given) if "resume" in given else args_class(**given)
    cuda = torch.cuda.is_available()
    if args.model is None:
        args.model = "stabilityai/stable-diffusion-3.5-medium" if args.prompts and cuda else "tiny"
        if args.prompts and not cuda:
            print("no CUDA GPU here: training the bundled tiny model, which can draw a few coloured shapes and no more")
    args.family, _, _ = find_family(args.model)
    args.device = args.device or ("cuda" if cuda else "cpu")
    try:
        take_gpu(args.device)
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        raise StopRun(f"--device {args.device} cannot be used here ({brief(error)}); give another")
    if args.prompts is None:
        if args.family != "tiny":
            raise StopRun("a model other than tiny needs prompts; give --prompts FILE, one prompt a line")
        args.prompts = str(TINY / "prompts.txt")
        args.eval_prompts = args.eval_prompts or str(TINY / "eval_prompts.txt")
    prompts_hashes(args)  # which reads them
    args.noise_level = args.noise_level or {"dance": 0.3, "cps": 0.8}.get(args.sde)  # [DG], [CPS]; flow: by model
    if args.sde == "cps" and args.noise_level > 1:
        raise StopRun(f"--noise-level {args.noise_level} is over 1, where the noise of --sde cps falls; give 0.8, say")
    for name, value in defaults[args.family].items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") and args.family != "tiny" else "float32")
    args.reward = args.reward or ("shapes" if args.family == "tiny" else "pickscore")
    if args.wandb and not importlib.util.find_spec("wandb"):
        raise StopRun("--wandb needs a package that is not installed; pip install wandb")
    script, model, now = Path(sys.argv[0]).stem, Path(args.model).name, time.strftime("%Y%m%d-%H%M%S")
    folder = Path(args.output or f"runs/{script}-{model}-{args.seed}-{now}")
    if folder.exists() and not args.resume and (not folder.is_dir() or any(folder.iterdir())):
        raise StopRun(f"--output {folder} is in the way; give a new folder, or go on with --resume {folder}")
    if not os.access(next(path for path in (folder, *folder.absolute().parents) if path.exists()), os.W_OK | os.X_OK):
        raise StopRun(f"--output {folder} cannot be written; give another folder")
    args.output = str(folder)
    return args


def resumed_args(args_class, given):
    """The settings of the run in given["resume"]; only --iterations, --save-every and --wandb may stand beside it."""
    folder, script = given.pop("resume"), Path(sys.argv[0]).stem
    if others := sorted(given.keys() - {"iterations", "save_every", "wandb"}):
        raise StopRun(
            f"--{others[0].replace('_', '-')} cannot stand beside --resume, which takes all settings from there"
        )
    try:
        config = json.loads(Path(folder, "config.json").read_text("utf-8"))
        if config["script"] != script:
            raise ValueError(f"a run of {config['script']}.py")
        if config["settings"].keys() != args_class.__dataclass_fields__.keys() or not dict(config["versions"]):
            raise ValueError(f"of another version of {script}.py, commit {config.get('commit')}")
        args = args_class(**config["settings"] | given | {"resume": folder, "output": folder})
        if prompts_hashes(args) != config["prompts_sha256"]:
            raise ValueError("the files of --prompts or --eval-prompts have changed since it began")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StopRun(f"--resume {folder} is no run that {script}.py can go on with ({brief(error)}); start a new one")
    return args


def read_prompts(path):
    """Prompts of a UTF-8 text file, one a line; blank lines and lines that start with # are skipped."""
    try:
        text = Path(path).read_text("utf-8-sig")
        if "\0" in text:
            raise ValueError("it has a NUL character")
    except (OSError, ValueError) as error:
        raise StopRun(f"prompts file {path} cannot be read or is not UTF-8 text ({brief(error)}); give a text file")
    prompts = [prompt for line in text.split("\n") if (prompt := line.strip()) and not prompt.startswith("#")]
    if not prompts:
        raise StopRun(f"prompts file {path} has no prompts; write one a line")
    return prompts


def prompts_hashes(args):
    paths = [path for path in (args.prompts, args.eval_prompts) if path]
    return [hashlib.sha256("\n".join(read_prompts(path)).encode()).hexdigest() for path in paths]


def parse_sde_steps(args):
    """--sde-steps: the steps that may be random, and how many of them an iteration takes.

    "early" is the first half of --steps, "0,1,2" are those three, "3" is three drawn in each iteration, "3," is step 3.
    """
    spec, every = args.sde_steps, list(range(args.steps - 1))
    if spec == "early":
        every, spec = every[: args.steps // 2], "all"
    with suppress(ValueError):  # of what is no number
        steps = [int(part) for part in spec.rstrip(",").split(",")] if "," in spec else every
        count = len(steps) if "," in spec or spec == "all" else int(spec)
        if steps == sorted({*steps} & {*every}) and 1 <= count <= len(steps):
            return steps, count
    raise StopRun(
        f"--sde-steps {spec} is neither all, early, a rising list within 0 to {every[-1]}, nor how many to draw"
    )


def split_batch(args, each, group=None, branches=1, usual=8):
    """How many trajectories are this process's: each ones a prompt, which must divide into updates and processes.

    group: how many are compared with each other, warned of under `usual`. branches: of each trajectory.
    """
    P, U, group = args.prompts_per_iteration, args.updates_per_iteration, group or each
    if P * each % U or (PROCESSES > 1 and P % (PROCESSES * U)):
        numbers = f"{P} prompts x {each} = {P * each} trajectories in {U} updates on {PROCESSES} processes"
        raise StopRun(f"{numbers} do not divide; change --prompts-per-iteration or --updates-per-iteration")
    if P * each * branches > 10**6:
        raise StopRun(f"{P * each * branches} trajectories an iteration are over 1,000,000; lower one of its factors")
    if group < usual:
        warn(f"groups of {group} give noisy advantages; {usual} or more are usual")
    return P * each // PROCESSES


def load_rewards(args, get_reward):
    """args.reward and args.eval_reward (or None), loaded, after checking that both can read every prompt."""
    rewards = [
        get_reward(spec, args.device, args.reward_offload) if spec else None for spec in (args.reward, args.eval_reward)
    ]
    for reward in filter(None, rewards):
        reward.check(read_prompts(args.prompts) + read_prompts(args.eval_prompts or args.prompts))
        reward.load()
    return rewards


def print_plan(args, count, sigmas, s, chosen, weight=None, branches=1):
    """The batch arithmetic in a line, and a table of the steps. chosen: those that may be random; weight: (T - 1,)."""
    P, U, count = args.prompts_per_iteration, args.updates_per_iteration, count * PROCESSES
    each, part, weight = count // P, count // U, torch.ones_like(s) if weight is None else weight
    branching = f" with {branches} branches a step" if branches > 1 else ""
    print(f"{args.iterations} iterations of {P} prompts x {each} = {count} trajectories{branching};")
    print(f"{U} updates of {part} trajectories; {args.micro_batch} latents at a time", flush=True)
    print("step   sigma   Delta       s     std  weight")
    for n, delta in enumerate(-sigmas.diff()):
        random = f"{s[n]:6.4f}  {s[n] * delta.sqrt():6.4f}  {weight[n]:6.4f}" if n in chosen else "ODE"
        print(f"{n:4d}  {sigmas[n]:6.4f}  {delta:6.4f}  {random}", flush=True)


def run_script(main, args_class, defaults):
    """Run a script's main; every end but a bug is one line on standard error and an exit status, no traceback."""
    try:
        with quiet():
            args = parse_args(args_class, defaults)
            join_processes(args)
            main(args)
    except Exception as error:
        message, status = str(error), getattr(error, "exit_status", 1)  # rewards' errors have one too
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in message:
            message = "out of memory; lower --micro-batch, or set --gradient-checkpointing or --reward-offload"
        elif isinstance(error, OSError | SafetensorError):  # the latter is safetensors' word for a full disk
            message = f"{message}; the last checkpoint stands, see --resume"
        elif not hasattr(error, "exit_status"):
            raise
        if RANK > 0 and status > 128:
            sys.exit()  # the first tells it and may still be saving: torchrun ends it where another's status is not 0
        if RANK > 0:
            time.sleep(10)  # the first may find the same and tells it; torchrun then ends this one
        print(("error: " if status < 128 else "") + " ".join(message.split()), file=sys.stderr)
        sys.exit(status)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
