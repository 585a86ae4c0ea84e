"""Counts and measurements. Each command is a function below; `python tests/bench.py COMMAND --help` tells its options.

python tests/bench.py plan --model sd3 --memory 24 --tflops 65   # time and memory of the scripts, by count
python tests/bench.py plan --model sd3 --sde-steps 3 --guidance 1    # the same, with options of theirs
python tests/bench.py model --model sd3             # the same calls measured with random weights, on CUDA
python tests/bench.py iteration --model sd3         # an iteration of each script with random weights, on CUDA
python tests/bench.py model --model flux --tiny     # the same lines from a toy, on a CPU; iteration has it too
python tests/bench.py tempflow                      # the savings of tempflow_grpo.py, on the tiny model
python tests/bench.py processes                     # two processes against one, on a CPU
python tests/bench.py curves                        # the study of the README; --plot makes its figures
"""

import argparse
import dataclasses
import gc
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import common  # noqa: E402
import gcpo  # noqa: E402
import grpo  # noqa: E402
import study  # noqa: E402
import tempflow_grpo  # noqa: E402

SCRIPTS = (grpo, gcpo, tempflow_grpo)

# ---------------------------------------------------------------- the networks in their true sizes

CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768)
CLIP_G = dict(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
)
T5_XXL = dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
QWEN3_4B = dict(
    hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128, tie_word_embeddings=True,
)  # fmt: skip
PICKSCORE = dict(  # CLIP ViT-H/14
    text_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16),
    vision_config=dict(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14
    ),
    projection_dim=1024,
)

# For each family: its pipeline, the transformer's class and settings, its parameters in billions, the text encoders,
# the shapes of a prompt's text, and what --tiny changes.
SIZES = {
    "sd3": dict(
        pipeline="StableDiffusion3Pipeline",
        transformer="SD3Transformer2DModel",
        config=dict(
            sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
            num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
            pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
        ),
        parameters=2.243,
        encoders=dict(
            text_encoder=("CLIPTextModelWithProjection", CLIP_L),
            text_encoder_2=("CLIPTextModelWithProjection", CLIP_G | dict(hidden_act="gelu")),
            text_encoder_3=("T5EncoderModel", T5_XXL),
        ),
        text=[(77 + 256, 4096), (2048,)],
        vae=dict(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609),
        tiny=dict(num_layers=2, num_attention_heads=2, caption_projection_dim=128, dual_attention_layers=(0,)),
    ),
    "flux": dict(
        pipeline="FluxPipeline",
        transformer="FluxTransformer2DModel",
        config=dict(
            patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128,
            num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True,
        ),
        parameters=11.90,
        encoders=dict(text_encoder=("CLIPTextModel", CLIP_L), text_encoder_2=("T5EncoderModel", T5_XXL)),
        text=[(512, 4096), (768,)],
        vae=dict(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
        tiny=dict(num_layers=1, num_single_layers=1, num_attention_heads=2),
    ),
    "flux2": dict(
        pipeline="Flux2KleinPipeline",
        transformer="Flux2Transformer2DModel",
        config=dict(
            in_channels=128, num_layers=5, num_single_layers=20, attention_head_dim=128, num_attention_heads=24,
            joint_attention_dim=7680, guidance_embeds=False,
        ),
        parameters=3.88,
        encoders=dict(text_encoder=("Qwen3ForCausalLM", QWEN3_4B)),
        text=[(512, 7680)],
        vae=dict(latent_channels=32),
        tiny=dict(num_layers=1, num_single_layers=1, num_attention_heads=2),
    ),
}  # fmt: skip


def make_transformer(name, tiny=False):
    import diffusers

    size = SIZES[name]
    return getattr(diffusers, size["transformer"])(**size["config"] | (size["tiny"] if tiny else {}))


def make_vae(name, tiny=False):
    import diffusers

    options = dict(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4 if tiny else (128, 256, 512, 512),
        layers_per_block=1 if tiny else 2,
    )
    if name != "flux2":
        options |= dict(use_quant_conv=False, use_post_quant_conv=False)
    vae_class = diffusers.AutoencoderKLFlux2 if name == "flux2" else diffusers.AutoencoderKL
    return vae_class(**options, **SIZES[name]["vae"])


def make_encoder(class_name, config, tiny=False):
    import transformers

    if tiny:  # few layers, but as wide outside; FLUX.2 reads Qwen3's states up to the 27th
        config = config | dict(vocab_size=1000, intermediate_size=64, d_ff=64, num_hidden_layers=1)
        config |= dict(num_hidden_layers=27) if class_name.startswith("Qwen3") else {}
    model_class = getattr(transformers, class_name)
    return model_class(model_class.config_class(**config)).eval()


def make_on(device, dtype, make, *args):
    """A network made at once on a device in a dtype: in float32 on the CPU some would not fit."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return make(*args).to(dtype)  # SD3's table of positions is made in float32
    finally:
        torch.set_default_dtype(before)


def make_pipeline(name, device, dtype, tiny=False, encoders=False):
    """A pipeline with transformer and VAE, and text encoders if asked, of the true sizes with random weights.

    All else is that of small_pipelines.py: tokenizers of a few letters, the scheduler.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    import small_pipelines

    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    pipe = small_pipelines.MAKERS[name]()
    networks = dict(
        transformer=make_on(device, dtype, make_transformer, name, tiny),
        vae=make_on(device, dtype, make_vae, name, tiny),
    )
    if encoders:
        for part, size in SIZES[name]["encoders"].items():
            networks[part] = make_on(device, dtype, make_encoder, *size, tiny)
        pipe.tokenizer_max_length = 77 if name != "flux2" else pipe.tokenizer_max_length
        for tokenizer in (pipe.tokenizer, getattr(pipe, "tokenizer_2", None)):
            if type(tokenizer).__name__.startswith("CLIP"):
                tokenizer.model_max_length = 77
    pipe.register_modules(**networks)
    pipe.vae_scale_factor, pipe.patch_size = 8, networks["transformer"].config.patch_size
    return pipe


def fill(pipe):
    """The pipeline, all weights of its transformer drawn: some are zero at first, and would hide what rounding does."""
    for weight in pipe.transformer.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.02)
    return pipe


def policy_of(args, pipe, device, **settings):
    """The Policy of a script's settings, with this pipeline and device in place of the model's."""
    names = "resolution guidance micro_batch lora_rank lora_alpha ema_decay gradient_checkpointing compile".split()
    return common.Policy(pipe, **{name: getattr(args, name) for name in names} | settings, device=device)


# ---------------------------------------------------------------- plan: time and memory by count


class Meter(TorchDispatchMode):
    """Counts FLOPs, kernels, and the bytes of all tensors that are made inside and live at a time, on the meta device.

    A kernel is an operation that is no view and no allocation. kept: tensors that are there already.
    """

    seen: ClassVar[dict] = {}  # the layers of a network are alike, and to work out shapes takes long

    def __init__(self, kept=()):
        super().__init__()
        self.flops = self.kernels = self.bytes = self.peak = 0
        self.live = {tensor.untyped_storage()._cdata: 0 for tensor in kept}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, flops = self.run(func, args, kwargs or {})
        self.flops += flops
        self.kernels += not (
            func.is_view or func.name().startswith(("aten::empty", "aten::_unsafe_view", "aten::detach"))
        )
        for tensor in (x for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            if tensor.is_meta and tensor.untyped_storage()._cdata not in self.live:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = storage.nbytes()
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata)
        self.peak = max(self.peak, self.bytes)
        return out

    def run(self, func, args, kwargs):
        """What an operation returns, and its FLOPs."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False, 0  # no padding, says Qwen3's attention, and takes the causal kernel
        leaves = tree_leaves((args, kwargs))
        shapes = [(*x.shape, *x.stride(), x.dtype, x.device) if isinstance(x, torch.Tensor) else x for x in leaves]
        key = func, len(args), *kwargs, *shapes
        if key in self.seen:
            shape, stride, dtype, flops = self.seen[key]
            return torch.empty_strided(shape, stride, dtype=dtype, device="meta"), flops
        out, count = func(*args, **kwargs), flop_registry.get(func._overloadpacket)
        flops = count(*args, **kwargs, out_val=out) if count else 0
        if isinstance(out, torch.Tensor) and out.is_meta and not func._schema.is_mutable:
            there = [x.untyped_storage()._cdata for x in leaves if isinstance(x, torch.Tensor)]
            if out.untyped_storage()._cdata not in there:  # no view
                self.seen[key] = out.shape, out.stride(), out.dtype, flops
        return out, flops

    def free(self, key):
        self.bytes -= self.live.pop(key)


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """The kernel that scaled_dot_product_attention takes on CUDA, for tensors of which only the shape is known."""
    aten = torch.ops.aten
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    if query.dtype != torch.float32 and attn_mask is None and query.shape[-1] <= 256:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2]).to(query.dtype)
    needs = torch.is_grad_enabled() and query.requires_grad
    options = attn_mask, needs, dropout_p, is_causal
    return aten._scaled_dot_product_efficient_attention(query, key, value, *options, scale=scale)[0]


def tensors(network):
    return [*network.parameters(), *network.buffers()]


def count(function, kept=()):
    """(FLOPs, kernels, peak bytes) of a call on the meta device."""
    kept = [tensor for part in kept for tensor in (tensors(part) if isinstance(part, torch.nn.Module) else [part])]
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", attention), Meter(kept) as meter:
        function()
    return meter.flops, meter.kernels, meter.peak


def calls(policy, text):
    """What a run does over and over: {name: function}, a call with a full micro-batch each, on the policy's device."""
    M, device = policy.micro_batch, policy.device
    x, x_next = (torch.randn(M, *policy.shape, device=device) for _ in range(2))
    owner, sigma, std = (torch.full((M,), value, device=device) for value in (0, 0.5, 0.1))
    logps = []

    def logp():
        mean, _ = common.sde_mean_std(x, policy.velocity(x, sigma, text, owner), sigma, 0.8 * sigma, std)
        return common.log_prob(x_next, mean, std.view(-1, 1, 1, 1))

    def rollout():
        with torch.no_grad():
            logps.append(logp())

    def train():
        value = logp()
        value.sum().backward()
        logps.append(value.detach())

    return {"rollout": rollout, "train": train, "decode": lambda: policy.decode(x)}, logps


# What the plan takes for granted about the machine.
KERNEL = 25e-6  # seconds to launch a kernel from Python: 22 to 29 measured on an H200, torch 2.11
HOST = 0.02  # seconds to bring a picture of 512 x 512 to the CPU and to make it ready for the reward
BUS = 3e9  # bytes a second between the memory of the CPU, not pinned, and that of the GPU; 2 to 3 measured
FREE = 0.05  # share of the memory that is left over; a card of "24 GB" has 24 GiB, 7% more, for what CUDA itself takes
SCORED = 16  # pictures that PickScore takes at once
ENCODED = 8  # prompts that Policy.encode takes at once
HELD = 64  # pictures that common.score holds at a time


def script_args(module, model, options):
    """The settings of a script by its own command line, for a model that need not be there."""
    fields = {script: {field.name for field in dataclasses.fields(script.Args)} for script in SCRIPTS}
    line, own = [], True
    for word in options:
        if word.startswith("--"):  # what only another script has is left out, and its value with it
            name = word[2:].split("=")[0].replace("-", "_")
            own = name in fields[module] or not any(name in names for names in fields.values())
        line += [word] if own else []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model_index.json").write_text(json.dumps({"_class_name": SIZES[model]["pipeline"]}))
        usual = f"--model {folder} --prompts {common.TINY / 'prompts.txt'} --device cpu --dtype bfloat16"
        return common.parse_args(module.Args, module.DEFAULTS, usual.split() + line)


def work(module, args):
    """What an iteration does, on average: a namespace of counts.

    rollout, train: sizes of the batches of latents that take a forward, or a forward and a backward, each taken a
    micro-batch at a time; evaluations: of the velocity, as a run counts them, for one pass of the network; images: that
    are scored; trajectories: as common.make_policy counts them; latents: that are kept. Where chance decides, as which
    chunks gcpo.py draws, it is the mean. Adaptive chunks are taken to be as few as --chunk-max allows.
    """
    P, U, T = args.prompts_per_iteration, args.updates_per_iteration, args.steps
    steps, drawn = common.parse_sde_steps(args)
    if module is tempflow_grpo:
        N, B = P * args.seeds_per_prompt, args.branches
        before = [sum(step < now for step in steps) for now in range(T)]
        trunk = [1 - Fraction(math.comb(n, drawn), math.comb(len(steps), drawn)) for n in before]  # still has branches
        forward = [N * (alive + B * Fraction(n * drawn, len(steps))) for n, alive in zip(before, trunk)]
        images, trajectories, latents = N * B * drawn, N * B, N * (1 + drawn + 3 * B * drawn)
    else:
        N = images = trajectories = P * args.group_size
        forward, latents = [N] * T, N * (T + 2 * drawn)
    train = [Fraction(drawn * N, U)] * U
    if module is gcpo:
        few = -(-drawn // args.chunk_max)
        sizes = gcpo.parse_chunks(args, steps, drawn) or [drawn // few + (n < drawn % few) for n in range(few)]
        share = Fraction(max(1, int(args.chunk_fraction * len(sizes) + 0.5)), len(sizes))
        train = [share * rows for rows in train]
        # later updates need the log-probs of the whole chunk as they are now
        forward += [share * sum(size for size in sizes if size > 1) * N / U] * (U - 1)
    forward += train if args.kl_coef > 0 else []  # the reference
    return SimpleNamespace(
        rollout=forward, train=train, evaluations=float(sum(forward) + 3 * sum(train)), images=images,
        trajectories=trajectories, latents=latents,
    )  # fmt: skip


def count_calls(policy, text):
    """{call: (FLOPs, kernels, peak bytes)} of a policy on the meta device, with its micro-batch."""
    policy.family.ids = None  # FLUX.1 keeps those of one size
    for parameter in policy.parameters:
        parameter.grad = torch.empty_like(parameter)
    kept = [policy.transformer, policy.pipe.vae, *text, *(parameter.grad for parameter in policy.parameters)]
    functions, _ = calls(policy, text)
    counts = {name: count(function, kept) for name, function in functions.items()}
    policy.transformer.enable_gradient_checkpointing()
    counts["checkpointed"] = count(functions["train"], kept)
    policy.transformer.disable_gradient_checkpointing()
    return counts


def count_model(model, args, tiny=False):
    """A function (call, rows) -> (FLOPs, kernels, peak bytes), {part: bytes of its weights}, shape, passes.

    All three are linear in the rows, so they are counted for one row and for two.
    """
    import transformers

    dtype = common.DTYPES[args.dtype]
    pipe = make_pipeline(model, "meta", dtype, tiny, encoders=True)
    with torch.device("meta"):
        policy = policy_of(args, pipe, "meta", gradient_checkpointing=False, compile=False)
        text = [torch.empty(3, *shape, dtype=dtype) for shape in SIZES[model]["text"]]
    counts = []
    for policy.micro_batch in (1, 2):
        counts.append(count_calls(policy, text))

    clip = make_on("meta", torch.float16, transformers.CLIPModel, transformers.CLIPConfig(**PICKSCORE))
    pixels = torch.empty(SCORED, 3, 224, 224, dtype=torch.float16, device="meta")
    tokens = torch.ones(SCORED, 77, dtype=torch.long, device="meta")
    encoders = torch.nn.ModuleList(policy.encoders)
    with torch.no_grad():
        fixed = {
            "encode": count(lambda: policy.family.encode([""] * ENCODED), [encoders]),
            "score": count(lambda: [clip.get_image_features(pixels), clip.get_text_features(tokens)], [clip, pixels]),
        }

    def cost(call, rows):
        if call in fixed:
            return fixed[call]
        return tuple(one + (rows - 1) * (two - one) for one, two in zip(*(count[call] for count in counts)))

    parts = {"transformer": policy.transformer, "vae": pipe.vae, "encoders": encoders, "reward": clip}
    weights = {name: sum(w.nbytes for w in tensors(part)) for name, part in parts.items()}
    weights["adapter"] = sum(w.nbytes for w in policy.parameters)
    passes = 2 if policy.guidance > 1 and policy.family.two_pass_guidance else 1
    return cost, weights, policy.shape, passes


def plan(module, args, memory, tflops, counted):
    """{what: number} of a script's run on a GPU with `memory` bytes that computes `tflops` FLOPs a second.

    counted: what count_model returns.
    """
    cost, weights, shape, passes = counted
    does = work(module, args)
    M, train = min(args.micro_batch, does.trajectories), "checkpointed" if args.gradient_checkpointing else "train"

    def seconds(call, sizes, rows=M):
        """Of batches of these sizes, taken `rows` at a time: the last, smaller one takes as long."""
        flops, kernels, _ = cost(call, rows)
        return float(sum(math.ceil(size / rows) for size in sizes) * max(flops / tflops, KERNEL * kernels))

    def scoring(count):
        return seconds("score", [count], SCORED) + HOST * (args.resolution / 512) ** 2 * count

    shown = 64 * args.eval_seeds  # pictures of an evaluation
    evaluation = seconds("rollout", [shown] * args.eval_steps) + seconds("decode", [shown]) + scoring(shown)
    time = {
        "rollout": seconds("rollout", does.rollout),
        "training": seconds(train, does.train),
        "decoding": seconds("decode", [does.images]),
        "scoring": scoring(does.images),
        "encoding": seconds("encode", [args.prompts_per_iteration + 1], ENCODED) + 2 * weights["encoders"] / BUS,
    }
    hours = args.iterations * sum(time.values()) + (1 + math.ceil(args.iterations / args.eval_every)) * evaluation
    flops = {"rollout": sum(does.rollout), train: sum(does.train), "decode": does.images}
    flops = (
        sum(rows * cost(call, M)[0] / M for call, rows in flops.items()) + does.images * cost("score", 1)[0] / SCORED
    )

    large = 8 * 3 * args.steps * does.trajectories * math.prod(shape) * 4 > memory  # as Policy has it
    stays = weights["transformer"] + weights["vae"] + weights["adapter"] * (3 + (args.ema_decay > 0))  # gradient, AdamW
    stays += (0 if args.reward_offload else weights["reward"]) + (0 if large else 4 * math.prod(shape) * does.latents)
    pictures = 2 * min(HELD, does.images) * 3 * args.resolution**2 * 4  # two, while they are put together

    def peaks(rows, train):
        """Bytes in each phase, with so many latents a call."""
        reference = cost("rollout", rows)[2] if args.kl_coef > 0 else 0
        return {
            "rollout": stays + cost(train if args.compile else "rollout", rows)[2],  # see Policy.velocity
            "training": stays + cost(train, rows)[2] + reference,
            "decoding": stays + cost("decode", rows)[2] + pictures,
            "scoring": stays + cost("score", 1)[2] + pictures + args.reward_offload * weights["reward"],
            "encoding": stays + cost("encode", 1)[2] + weights["encoders"],
        }

    def largest(train):
        """The most latents a call, by the two phases that grow with them."""
        one, two = (max(peaks(rows, train)[phase] for phase in ("training", "decoding")) for rows in (1, 2))
        return max(0, int(((1 - FREE) * memory - one) / (two - one) + 1))

    return {
        "images": does.images,
        "velocity evaluations": passes * does.evaluations,
        "PFLOP": float(flops) / 1e15,
        "minutes": sum(time.values()) / 60,
        **{f"  {phase}": value / 60 for phase, value in time.items()},
        "iterations": args.iterations,
        "hours, with evaluations": hours / 3600,
        **{f"GB in {phase}": value / 1e9 for phase, value in peaks(M, train).items()},
        "largest --micro-batch": largest("train"),
        "  --gradient-checkpointing": largest("checkpointed"),
    }


def bench_plan(args, options):
    """Time and memory of an iteration and a run of each script, by count: needs no GPU. It takes their options too."""
    memory, counted, columns = args.memory * 1e9, {}, []
    for module in SCRIPTS:
        own = script_args(module, args.model, options)
        work(module, own)  # refuses what cannot be, before anything is counted
        key = own.resolution, own.guidance > 1, own.lora_rank
        counted[key] = counted.get(key) or count_model(args.model, own)
        names = "resolution steps sde_steps guidance prompts_per_iteration micro_batch".split()
        told = {"--" + name.replace("_", "-"): getattr(own, name) for name in names}
        columns.append(told | plan(module, own, memory, args.tflops * 1e12, counted[key]))
    print(f"{args.model} on {args.memory:g} GB at {args.tflops:g} TFLOP/s; counted, not measured")
    print(f"{'':28s}" + "".join(f"{module.__name__ + '.py':>18s}" for module in SCRIPTS))
    for name in columns[0]:
        values = [f"{column[name]:.2f}" if isinstance(column[name], float) else column[name] for column in columns]
        full = name.startswith("GB") and max(column[name] for column in columns) > (1 - FREE) * args.memory
        print(f"{name:28s}" + "".join(f"{value:>18}" for value in values) + ("  too much" if full else ""))
    print(
        f"A call takes the longer of its FLOPs and of launching its kernels, {KERNEL * 1e6:g} microseconds each; a "
        f"picture {HOST * 1e3:g} ms\nof the CPU for PickScore; text encoders move at {BUS / 1e9:g} GB/s. Weights, "
        f"adapter, optimizer, PickScore, and latents under an\neighth of the memory, stay on the GPU; {FREE:.0%} of it "
        "are left free."
    )


# ---------------------------------------------------------------- model: the same calls, measured


def timed(device, function):
    """Seconds of a call, and its peak memory in GB (nan on a CPU). A call before pays for compiling and allocating."""
    cuda = torch.device(device).type == "cuda"
    function()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    function()
    settle(device)
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() / 1e9 if cuda else math.nan


def bench_model(args, options):
    """Time and memory of each call at the true size with random weights, beside the plan's. Options as of grpo.py."""
    own = script_args(grpo, args.model, options)
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    pipe = make_pipeline(args.model, args.device, dtype, args.tiny)
    policy = policy_of(own, fill(pipe), args.device)
    text = [torch.randn(3, *shape).to(args.device, dtype) for shape in SIZES[args.model]["text"]]
    functions, logps = calls(policy, text)
    with torch.device("meta"):
        meta = policy_of(own, make_pipeline(args.model, "meta", dtype, args.tiny), "meta", compile=False)
        meta_text = [torch.empty_like(rows, device="meta") for rows in text]
    counts = count_calls(meta, meta_text)
    stays = sum(w.nbytes for w in [*tensors(pipe.transformer), *tensors(pipe.vae), *policy.parameters])  # and gradients
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    print(f"{args.model} at {own.resolution} px, {own.micro_batch} latents a call, {dtype}, {name}")
    print(f"{'call':10s} {'seconds':>10s} {'TFLOP/s':>10s} {'GB':>8s} {'GB counted':>12s} {'kernels':>9s}")
    for call, function in functions.items():
        seconds, peak = timed(args.device, function)
        flops, kernels, extra = counts["checkpointed" if call == "train" and own.gradient_checkpointing else call]
        counted = (stays + extra) / 1e9
        print(f"{call:10s} {seconds:10.4f} {flops / seconds / 1e12:10.3f} {peak:8.2f} {counted:12.2f} {kernels:9d}")
    error = (logps[-1] - logps[0]).abs().max().item()
    print(f"largest |log ratio| before any update {error:.1e}")


def random_pickscore(device, tiny):
    """PickScore's CLIP with random weights, as rewards.py keeps a model that it has loaded."""
    import small_pipelines

    import transformers

    config = transformers.CLIPConfig(**({} if tiny else PICKSCORE))
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    clip = make_on(device, dtype, transformers.CLIPModel, config).eval().requires_grad_(False)
    return clip, small_pipelines.clip_tokenizer(), transformers.CLIPImageProcessorPil(), 100.0


def run_iteration(module, model, device, tiny, options):
    """Run a script for an iteration with random weights; returns its settings, and the last line of its metrics."""
    import rewards

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "prompts.txt").write_text("".join(f"picture {number}\n" for number in range(48)), "utf-8")
        Path(folder, "one.txt").write_text("a picture\n", "utf-8")
        files = f"--prompts {folder}/prompts.txt --eval-prompts {folder}/one.txt --output {folder}/run"
        line = f"{files} --device {device} --iterations 1 --eval-seeds 1 --eval-steps 1"
        args = script_args(module, model, [*line.split(), *options])
        pipe = fill(make_pipeline(model, device, common.DTYPES[args.dtype], tiny, encoders=True))
        for name, part in pipe.components.items():
            if part and name.startswith("text_encoder"):
                part.to("cpu")
        scorer = {("load_clip", device, rewards.PICKSCORE): random_pickscore(device, tiny)}
        with (
            mock.patch.dict(rewards.LOADED, scorer),
            mock.patch.object(rewards.Reward, "check"),  # would look for it on the hub
            mock.patch.object(common, "load_pipeline", lambda *_: pipe),
            mock.patch.object(common, "print_ending"),
        ):
            module.main(args)
        return args, json.loads(Path(folder, "run", "metrics.jsonl").read_text("utf-8").splitlines()[-1])


def bench_iteration(args, options):
    """An iteration of each script at the true size with random weights, measured and planned. Options as of theirs.

    It is the first one, after an evaluation of one picture. With --compile, compiling is in its seconds.
    """
    cuda, counted = args.device.startswith("cuda"), {}
    memory = torch.cuda.get_device_properties(args.device).total_memory if cuda else 24e9
    name = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    for module in SCRIPTS:
        if module.__name__ in args.scripts:
            own, measured = run_iteration(module, args.model, args.device, args.tiny, options)
            gc.collect()
            key = own.resolution, own.guidance > 1, own.lora_rank
            counted[key] = counted.get(key) or count_model(args.model, own, args.tiny)
            planned = plan(module, own, memory, args.tflops * 1e12, counted[key])
            print(f"{module.__name__}.py, {args.model} on {name}: measured, and counted at {args.tflops:g} TFLOP/s")
            for row in compare(measured, planned):
                print(row, flush=True)
    print("What gcpo.py looks up again, and the KL's reference, are measured in training and counted in the rollout.")


def compare(measured, planned):
    """Rows of what an iteration took: a line of metrics.jsonl (where nan is None), and what plan returns."""
    phases = {"rollout": ("rollout", "encoding"), "reward": ("decoding", "scoring"), "train": ("training",)}
    seconds = {f"{phase}_s": 60 * sum(planned[f"  {name}"] for name in names) for phase, names in phases.items()}
    peaks = {f"peak_memory_gb/{p}": max(planned[f"GB in {name}"] for name in names) for p, names in phases.items()}
    total = sum(measured[phase] for phase in seconds)
    yield f"{'seconds':24s} {total:10.1f} {60 * planned['minutes']:10.1f}"
    for name, value in (seconds | peaks | {"velocity_evals": planned["velocity evaluations"]}).items():
        yield f"{name:24s} {measured.get(name, math.nan):10.1f} {value:10.1f}"
    yield f"{'TFLOP/s over all':24s} {1e3 * planned['PFLOP'] / total:10.1f}"
    for name in ("ratio_first_error", "grad_norm", "skipped_updates"):
        yield f"{name:24s} {math.nan if measured[name] is None else measured[name]:10.2g}"


# ---------------------------------------------------------------- tempflow, curves


def bench_tempflow(args):
    """TempFlow-GRPO's rollout and training on the tiny model, ours against the released code's way, in one process."""
    options = ["--model", "tiny", "--device", args.device]
    settings = common.parse_args(tempflow_grpo.Args, tempflow_grpo.DEFAULTS, options)
    P, S, B = settings.prompts_per_iteration, settings.seeds_per_prompt, settings.branches
    N, sde, steps = P * S, settings.sde, list(range(settings.steps - 1))
    policy = common.make_policy(settings, N * B)
    M, sigmas = policy.micro_batch, policy.sigmas(settings.steps)
    s = common.noise_scale(sigmas, sde, settings.noise_level)
    levels, owner = (sigmas[:-2], sigmas[1:-1], s), torch.arange(N, device=policy.store) // S
    text = policy.encode(common.read_prompts(settings.prompts)[:P])
    generator = torch.Generator().manual_seed(0)
    noise = [policy.noise(P, S, generator), *(policy.noise(P, S * B, generator).unflatten(0, (N, B)) for _ in steps)]
    advantage = torch.randn(len(s), N, B, generator=generator).to(policy.store)

    def lockstep():
        return tempflow_grpo.rollout(policy, text, owner, noise, sigmas, s, sde, steps)

    def nested():
        """Each branching step by itself: the trunk once, then its branches to the end."""
        trunk, repeated = noise[0], owner.repeat_interleave(B)
        for k in steps:
            with torch.no_grad():
                velocity = policy.velocity_in_micro_batches(trunk, sigmas[k], text, owner)
                mean, std = common.sde_mean_std(trunk, velocity, sigmas[k], sigmas[k + 1], s[k], sde)
                branches = (mean[:, None] + std * noise[1 + k]).flatten(0, 1)
                common.ode_sample(policy, branches, text, repeated, sigmas[k + 1 :])
                trunk = trunk - (sigmas[k] - sigmas[k + 1]) * velocity

    x, x_next, *_ = lockstep()

    def shared():
        step, seed = torch.cartesian_prod(torch.arange(len(s)), torch.arange(N)).T
        for mb in torch.arange(len(step)).split(M):
            inputs = (text, owner, levels, sde, x, x_next, step[mb], seed[mb])
            logp, _, _ = tempflow_grpo.transition_logp(policy, *inputs)
            (logp * advantage[step[mb], seed[mb]]).sum().backward()

    def repeated():
        step, seed, branch = torch.cartesian_prod(torch.arange(len(s)), torch.arange(N), torch.arange(B)).T
        for mb in torch.arange(len(step)).split(M):
            k, n, b = step[mb], seed[mb], branch[mb]
            inputs = (text, owner[n], levels, sde, x[:, n], x_next[:, n, b], k, torch.arange(len(mb)))
            logp, _, _ = grpo.transition_logp(policy, *inputs)
            (logp * advantage[k, n, b]).sum().backward()

    print(f"tiny model, {P} prompts x {S} seeds x {B} branches, {settings.steps} steps, on {args.device}")
    gradients = []
    pairs = (
        ("rollout: lockstep / nested loops", lockstep, nested),
        ("training: shared / repeated states", shared, repeated),
    )
    for name, ours, theirs in pairs:
        seconds, evals = {ours: [], theirs: []}, {}
        for _ in range(args.repeats):  # in turns, so that a disturbance meets both
            for run in (ours, theirs):
                policy.velocity_evals, start = 0, time.perf_counter()
                run()
                settle(args.device)
                seconds[run].append(time.perf_counter() - start)
                evals[run] = policy.velocity_evals
                if run in (shared, repeated):
                    gradients.append(torch.cat([p.grad.flatten().clone() for p in policy.parameters]))
                    policy.transformer.zero_grad()
        ratio = min(seconds[theirs]) / min(seconds[ours])
        print(f"{name}: {evals[ours]} / {evals[theirs]} velocity evaluations, {ratio:.2f} times as fast")
    error = (gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max()
    print(f"largest difference of the gradients, relative: {error:.1e}")


def bench_processes(args):
    """Images a second of two processes over those of one: grpo.py, tiny model, CPU, a thread each, in turns."""
    options = "--device cpu --iterations 4 --eval-every 100 --eval-seeds 1 --eval-steps 1 --micro-batch 24".split()
    speeds = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat, processes in itertools.product(range(args.repeats), speeds):
            output = Path(folder, f"{processes}-{repeat}")
            launch = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
            subprocess.run(
                [sys.executable, *(launch if processes == 2 else []), "grpo.py", *options, "--output", str(output)],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                check=True,
                capture_output=True,
            )
            lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()[1:]]
            seconds = [line["rollout_s"] + line["reward_s"] + line["train_s"] for line in lines]
            speeds[processes].append(lines[0]["images"] / statistics.median(seconds))
            print(f"{processes} processes: {speeds[processes][-1]:.1f} images a second", flush=True)
    ratios = [two / one for one, two in zip(*speeds.values())]
    print(f"{statistics.median(ratios):.2f} times as many ({min(ratios):.2f} to {max(ratios):.2f})")


def bench_curves(args):
    """The three algorithms and their ablations over seeds on the tiny model, at equal cost; stop and go on at will."""
    every = study.jobs_of(args.seeds)
    unknown = [name for name in args.only if not any(job[0].startswith(name) for job in every)]
    if unknown or min(args.seeds, args.jobs) < 1:
        sys.exit(
            f"error: --only {' '.join(unknown)}: no such run" if unknown else "error: --seeds and --jobs are 1 or more"
        )
    if args.plot:
        study.report()
        study.plot()
        return 0
    jobs = [job for job in every if not args.only or any(job[0].startswith(o) for o in args.only)]
    return study.run_study(jobs, args.jobs)


def settle(device):
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("plan", help=bench_plan.__doc__)
    command.set_defaults(function=bench_plan)
    command.add_argument("--model", choices=list(SIZES), default="sd3")
    command.add_argument("--memory", type=float, default=24, help="GB of the GPU")
    command.add_argument("--tflops", type=float, default=65, help="what it computes in practice, not its data sheet's")

    command = commands.add_parser("model", help=bench_model.__doc__)
    command.set_defaults(function=bench_model)
    command.add_argument("--model", choices=list(SIZES), default="sd3")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--tiny", action="store_true", help="one or two narrow layers, to try this out on a CPU")

    command = commands.add_parser("iteration", help=bench_iteration.__doc__)
    command.set_defaults(function=bench_iteration)
    command.add_argument("--model", choices=list(SIZES), default="sd3")
    command.add_argument("--scripts", nargs="+", choices=study.SCRIPTS, default=study.SCRIPTS)
    command.add_argument("--tflops", type=float, default=190, help="what the GPU computes in practice, for the plan")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--tiny", action="store_true", help="one or two narrow layers, to try this out on a CPU")

    command = commands.add_parser("tempflow", help=bench_tempflow.__doc__)
    command.set_defaults(function=bench_tempflow)
    command.add_argument("--repeats", type=int, default=5)
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")

    command = commands.add_parser("processes", help=bench_processes.__doc__)
    command.set_defaults(function=bench_processes)
    command.add_argument("--repeats", type=int, default=5)

    command = commands.add_parser("curves", help=bench_curves.__doc__)
    command.set_defaults(function=bench_curves)
    command.add_argument("--seeds", type=int, default=5, help="of each script and ablation; tuning has its own")
    command.add_argument("--only", nargs="*", default=[], help="runs whose names begin so: tuning, grpo, gcpo-fixed")
    command.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    command.add_argument("--plot", action="store_true", help="tables and figures from tests/curves; needs matplotlib")

    args, options = parser.parse_known_args()
    if args.function not in (bench_plan, bench_model, bench_iteration):
        parser.parse_args()  # refuses what is left
        sys.exit(args.function(args))
    try:
        args.function(args, options)
    except common.StopRun as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
