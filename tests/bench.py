"""Time and memory of the scripts: counted without a GPU, or measured at true size with random weights.

    python tests/bench.py plan --model sd3 --memory 24 --tflops 65    # counted, for any card
    python tests/bench.py iteration --model sd3                       # measured beside counted, on CUDA
    python tests/bench.py iteration --model sd3 --tiny                # the same with a toy, on a CPU

Further options go to the scripts: `plan --scripts gcpo --chunk-max 2`. What was measured is in bench.md.
"""

import argparse
import gc
import json
import math
import sys
import tempfile
import time
import weakref
from collections import namedtuple
from functools import cache
from pathlib import Path
from statistics import median
from unittest import mock

import diffusers
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import common  # noqa: E402
import gcpo  # noqa: E402
import grpo  # noqa: E402
import rewards  # noqa: E402
import small_pipelines  # noqa: E402
import tempflow_grpo  # noqa: E402

SCRIPTS = {module.__name__: module for module in (grpo, gcpo, tempflow_grpo)}
# configs of the published networks, the transformer's parameters in billions, the shapes of a prompt's text
SIZES = json.loads((ROOT / "tests" / "sizes.json").read_text())
ONE_LAYER = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
TINY_CLIP = {"projection_dim": 16, "text_config": ONE_LAYER}
TINY_CLIP["vision_config"] = ONE_LAYER | {"patch_size": 112}

# ---------------------------------------------------------------- pipelines with random weights


def make(class_name, config):
    """A network of a class of diffusers or transformers."""
    if hasattr(diffusers, class_name):
        return getattr(diffusers, class_name)(**config)
    network = getattr(transformers, class_name)
    return network(network.config_class(**config)).eval()


def make_transformer(model):
    return make(*SIZES[model]["networks"]["transformer"])


def make_pipeline(model, device, dtype, tiny=False):
    """That of small_pipelines.py; if not tiny, with networks of the published sizes."""
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    pipe = small_pipelines.MAKERS[model]()
    if not tiny:
        torch.set_default_dtype(dtype)  # not all would fit in float32
        with torch.device(device):
            for name, size in SIZES[model]["networks"].items():
                part = make(*size)  # text encoders wait on the CPU
                pipe.register_modules(**{name: part.cpu() if "text" in name and device != "meta" else part})
        torch.set_default_dtype(torch.float32)
        pipe.vae_scale_factor, pipe.patch_size = 8, pipe.transformer.config.patch_size
        for tokenizer in (pipe.tokenizer, getattr(pipe, "tokenizer_2", None)):
            if "CLIP" in type(tokenizer).__name__:
                tokenizer.model_max_length = pipe.tokenizer_max_length = 77
    for weight in pipe.transformer.parameters():  # some are zero at first, which would hide rounding
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.02)
    return pipe.to(dtype=dtype)


# ---------------------------------------------------------------- FLOPs, kernels, bytes: on the meta device


class Meter(TorchDispatchMode):
    """Counts FLOPs, kernels (operations that are no view), and the most bytes made inside and alive."""

    def __init__(self):
        super().__init__()
        self.flops = self.kernels = self.bytes = self.peak = 0
        self.live = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out, flops = func(*args, **kwargs), flop_registry.get(func._overloadpacket)
        self.flops += flops(*args, **kwargs, out_val=out) if flops else 0
        free = "aten::empty", "aten::_unsafe_view", "aten::detach"
        self.kernels += not (func.is_view or func.name().startswith(free))
        read, made = (filter(torch.is_tensor, tree_leaves(tree)) for tree in ((args, kwargs), out))
        known = self.live | {tensor.untyped_storage()._cdata for tensor in read}
        for storage in (tensor.untyped_storage() for tensor in made):
            if storage._cdata not in known:
                self.live.add(storage._cdata)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return out

    def free(self, key, size):
        self.live.remove(key)
        self.bytes -= size


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **unused):
    """A kernel of scaled_dot_product_attention on CUDA, which the meta device would not choose."""
    options = attn_mask, torch.is_grad_enabled() and query.requires_grad, dropout_p, is_causal
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, *options, scale=scale)[0]


def count(function):
    """(FLOPs, kernels, peak bytes) of a call on the meta device."""
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", attention), Meter() as meter:
        function()
    return meter.flops, meter.kernels, meter.peak


def calls(policy, text):
    """What a run does over and over: {name: function}, each one call with a full micro-batch."""
    x = torch.randn(policy.micro_batch, *policy.shape, device=policy.device)
    sigma, index = (torch.full((len(x),), value, device=policy.device) for value in (0.5, 0))

    def train():
        policy.velocity(x, sigma, text, index).sum().backward()

    rollout = torch.no_grad()(lambda: policy.velocity(x, sigma, text, index))
    return {"rollout": rollout, "train": train, "decode": lambda: policy.decode(x)}


Model = namedtuple("Model", "calls network encoders adapter latent tokens passes")


@cache
def count_model(model, dtype, tiny, **settings):
    """What plan must know of a model with such a Policy.

    calls: {name: (FLOPs, kernels, peak bytes)} of two latents; network (transformer and VAE), encoders,
    adapter, latent: bytes; tokens: of a prompt; passes: of the network per velocity.
    """
    pipe = make_pipeline(model, "cpu" if tiny else "meta", getattr(torch, dtype), tiny)
    text = [torch.empty(1, *shape, dtype=pipe.dtype) for shape in SIZES[model]["text"]]
    if tiny:
        with torch.no_grad():
            text = common.FAMILIES[type(pipe).__name__](pipe).encode(["a"])
    with torch.device("meta"):
        policy = common.Policy(pipe, micro_batch=2, device="meta", **settings)
    counts = {name: count(call) for name, call in calls(policy, [rows.to("meta") for rows in text]).items()}

    def size(*parts):
        return sum(weight.nbytes for part in parts for weight in (*part.parameters(), *part.buffers()))

    adapter, latent = sum(weight.nbytes for weight in policy.parameters), 4 * math.prod(policy.shape)
    passes = 2 if policy.guidance > 1 and policy.family.two_pass_guidance else 1
    network, encoders = size(pipe.transformer, pipe.vae), size(*policy.encoders)
    return Model(counts, network, encoders, adapter, latent, text[0].shape[1], passes)


# ---------------------------------------------------------------- plan: time and memory by count

KERNEL = 25e-6  # seconds to launch a kernel from Python: 22 to 29 measured on an H200
COMPILED = 0.5  # part of that which --compile leaves: 0.54 in sampling, 0.47 in training, measured there
EAGER = 0.55  # FLOPs per second without --compile: 0.52 in sampling, 0.58 in training, measured there
LIVE = 0.66  # part of a training call's memory that --compile leaves, measured there; M is found without
CONTEXT = 0.7e9  # bytes that CUDA takes for itself
BUS = 3e9  # bytes per second between the memory of the CPU, not pinned, and that of the GPU
TRIP = 10  # iterations per trip of the text encoders
PICTURE = 0.02 / 4 / 512**2  # seconds per pixel to prepare a picture for PickScore: 0.02, in four threads
SCORE_FLOPS, SCORE_BYTES = 0.38e12, 2e9  # PickScore: per picture with its prompt; its weights

Work = namedtuple("Work", "forward train images trajectories latents")


def script_args(module, model, folder, options, device="cpu"):
    """A script's settings by its own command line, with a folder in place of the model."""
    index = {"_class_name": SIZES[model]["pipeline"], "scheduler": ["", "FlowMatchEulerDiscreteScheduler"]}
    Path(folder, "model_index.json").write_text(json.dumps(index))
    line = f"--model {folder} --prompts {common.TINY / 'prompts.txt'} --device {device} --output {folder}/run"
    return common.parse_args(module.__name__, module.Args, module.DEFAULTS, [*line.split(), *options])


def work(module, args):
    """What an iteration does if no advantage is 0, on average over what is drawn.

    forward, train: sizes of the batches that take a forward, or a forward and a backward, a micro-batch at a
    time; images: that are scored; trajectories: as in make_policy; latents: that are kept. Adaptive chunks
    are taken to be as few as --chunk-max allows.
    """
    P, U, T = args.prompts_per_iteration, args.updates_per_iteration, args.steps
    steps, K = common.parse_sde_steps(args)
    if module is tempflow_grpo:
        N, B = P * args.seeds_per_prompt, args.branches
        before = [sum(step < now for step in steps) for now in range(T)]
        trunk = [1 - math.comb(n, K) / math.comb(len(steps), K) for n in before]  # with branches to come
        forward = [N * (alive + B * n * K / len(steps)) for n, alive in zip(before, trunk)]
        images, trajectories, latents = N * B * K, N * B, N * (1 + K + 3 * B * K)
    else:
        N = images = trajectories = P * args.group_size
        forward, latents = [N] * T, N * (2 + 3 * K)  # noise, x, x_next, the final latents
    train = [K * N / U] * U
    if module is gcpo:
        few = -(-K // args.chunk_max)
        sizes = gcpo.parse_chunks(args, steps) or [K // few + (n < K % few) for n in range(few)]
        share = max(1, int(args.chunk_fraction * len(sizes) + 0.5)) / len(sizes)
        train = [share * rows for rows in train]
        # later updates need the current log-probs of whole chunks
        forward += [share * sum(size for size in sizes if size > 1) * N / U] * (U - 1)
    forward += train if args.kl_coef > 0 else []  # the reference
    return Work(forward, train, images, trajectories, latents)


def number_of_calls(sizes, rows):
    return sum(math.ceil(size / rows - 1e-9) for size in sizes)


def plan(module, args, model, memory, rate, tiny=False):
    """{name: number} of a script on a GPU of `memory` bytes and `rate` FLOPs per second if compiled.

    A call takes the longer of its FLOPs and of launching its kernels. Names as in metrics.jsonl.
    """
    names = "resolution guidance lora_rank lora_alpha gradient_checkpointing".split()
    m = count_model(model, args.dtype, tiny, **{name: getattr(args, name) for name in names})
    does, offload = work(module, args), args.reward_offload * SCORE_BYTES
    jobs = {"rollout": ("rollout", does.forward), "reward": ("decode", [does.images])}
    jobs["train"] = "train", does.train
    stays = m.network + m.adapter * 4  # with gradient, AdamW's two, average
    stays += m.latent * does.latents + SCORE_BYTES - offload
    pictures = 2 * min(64, does.images) * 12 * args.resolution**2  # two copies of what common.score holds

    def peaks(rows, compiled):
        """Bytes in each phase, with so many latents per call."""
        most = {phase: stays + m.calls[call][2] / 2 * rows for phase, (call, _) in jobs.items()}
        if compiled:  # sampling has training's graph
            most["rollout"] = most["train"] = stays + LIVE * (most["train"] - stays)
        most["rollout"] = max(most["rollout"], stays - m.network + m.encoders)  # which is on the CPU then
        return most | {"reward": most["reward"] + pictures + offload}

    # as in Policy.fit_micro_batch: before the first iteration, so without AdamW's states and the latents
    kept = m.latent * (1 + 3 * common.parse_sde_steps(args)[1]) * does.trajectories
    resident = m.network + m.adapter * 3 + SCORE_BYTES - offload
    room = memory - CONTEXT - resident - max(kept, memory / 10)
    call, largest = max(m.calls["train"][2], m.calls["decode"][2]) / 2, does.trajectories
    while largest > 0 and largest * call > room:
        largest = largest * 9 // 10
    evenly = math.ceil(does.trajectories / math.ceil(does.trajectories / max(largest, 1)))
    M = min(args.micro_batch or evenly, does.trajectories)

    def seconds(call, sizes):
        flops, kernels, _ = m.calls[call]
        compiled = args.compile and call != "decode"
        launch, speed = KERNEL * kernels * (COMPILED if compiled else 1), rate * (1 if compiled else EAGER)
        return number_of_calls(sizes, M) * max(flops / 2 * M / speed, launch)

    # two FLOPs per token and weight, which has two bytes
    reading = m.encoders * m.tokens * (args.prompts_per_iteration + 1)
    scoring = SCORE_FLOPS * does.images
    flops = sum(sum(sizes) * m.calls[call][0] / 2 for call, sizes in jobs.values()) + reading + scoring
    times = {phase: seconds(*job) for phase, job in jobs.items()}
    times["rollout"] += reading / rate + 2 * (m.encoders + m.network) / BUS / TRIP  # they swap places
    times["reward"] += does.images * PICTURE * args.resolution**2 + scoring / rate
    total, shown = sum(times.values()), len(common.held_out_prompts(args)) * args.eval_seeds
    times["eval"] = seconds("rollout", [shown] * args.eval_steps) + times["reward"] * shown / does.images
    evaluations = 1 + math.ceil(args.iterations / args.eval_every)
    return {
        "images": does.images,
        "velocity_evals": m.passes * (sum(does.forward) + 3 * sum(does.train)),
        "PFLOP": flops / 1e15,
        **{f"{phase}_s": value for phase, value in times.items()},
        "seconds without eval": total,
        "iterations": args.iterations,
        "hours": (args.iterations * total + evaluations * times["eval"]) / 3600,
        **{f"peak_memory_gb/{phase}": value / 1e9 for phase, value in peaks(M, args.compile).items()},
        "micro-batch": M,
        "largest micro-batch": largest,
    }


def print_table(title, columns):
    """columns: {head: {name: number}}; the first decides which names."""
    print(title, "\n" + " " * 32, *(f"{head:>15s}" for head in columns), sep="")
    for name in next(iter(columns.values())):
        values = [f"{column.get(name, math.nan):15.4g}" for column in columns.values()]
        print(f"{name:32s}", *values, sep="", flush=True)


def bench_plan(args, options):
    """With the defaults on CUDA: compiled, and with the largest micro-batch that fits."""
    columns, options = {}, ["--dtype", "bfloat16", "--compile", *options]
    with tempfile.TemporaryDirectory() as folder:
        for script in args.scripts:
            own = script_args(SCRIPTS[script], args.model, folder, options)
            own.micro_batch *= any(word.startswith("--micro-batch") for word in options)  # 0: what fits
            columns[script] = plan(SCRIPTS[script], own, args.model, args.memory * 2**30, args.tflops * 1e12)
    print_table(f"{args.model} on {args.memory:g} GB at {args.tflops:g} TFLOP/s, counted", columns)


# ---------------------------------------------------------------- measurements


def median_seconds(function, repeats=10):
    """Of calls of a function, after two that warm up."""
    seconds = []
    for _ in range(2 + repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return median(seconds[2:])


def run_iteration(module, args, options):
    """Run a script as it is with random weights. Returns its last line of metrics, and its plan."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "one.txt").write_text("a picture\n")
        line = f"--eval-prompts {folder}/one.txt --iterations 1 --eval-seeds 1 --eval-steps 1".split()
        line += ["--resolution", "16"] if args.tiny else []
        own = script_args(module, args.model, folder, [*line, *options], args.device)
        pipe = make_pipeline(args.model, args.device, getattr(torch, own.dtype), args.tiny)
        clip = rewards.frozen(make("CLIPModel", TINY_CLIP if args.tiny else SIZES["pickscore"]), args.device)
        scorer = clip, small_pipelines.clip_tokenizer(), transformers.CLIPImageProcessorPil(), 100.0
        loaded = {("load_clip", args.device, rewards.PICKSCORE): scorer}
        pipeline = mock.patch.object(common, "load_pipeline", lambda *_: pipe)
        with mock.patch.dict(rewards.LOADED, loaded), pipeline:
            module.main(own)
        *_, before, last = map(json.loads, Path(folder, "run", "metrics.jsonl").read_text().splitlines())
        last |= {name: last[name] - before[name] for name in ("images", "velocity_evals")}
        return last, plan(module, own, args.model, args.memory * 2**30, args.tflops * 1e12, args.tiny)


def bench_iteration(args, options):
    """The last iteration of each script; with --iterations 2 without compiling and encoders' trip."""
    cuda = args.device == "cuda"
    card = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    a = torch.randn(8192 if cuda else 512, 8192 if cuda else 512, device=args.device).bfloat16()
    rate = 2 * len(a) ** 3 / median_seconds(lambda: (a @ a)[0, 0].item())
    print(f"{card}, torch {torch.__version__}, products of bfloat16 matrices at {rate / 1e12:.3g} TFLOP/s")
    for script in args.scripts:
        try:
            measured, counted = run_iteration(SCRIPTS[script], args, options)
        except Exception as error:  # the next script may have room
            print(f"{script}: {error!r}", flush=True)
            continue
        total = sum(measured[f"{phase}_s"] for phase in ("rollout", "reward", "train"))
        measured["seconds without eval"] = total
        measured["share of products"] = counted["PFLOP"] * 1e15 / total / rate
        shown = [*counted, "share of products", "ratio_first_error", "grad_norm"]
        measured = {name: measured[name] for name in shown if name in measured}
        print_table(f"{script} {args.model} {' '.join(options)}", {"measured": measured, "counted": counted})
        gc.collect()
        torch.compiler.reset()


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = {"plan": bench_plan, "iteration": bench_iteration}
    parser.add_argument("command", choices=list(commands))
    parser.add_argument("--model", choices=list(small_pipelines.MAKERS), default="sd3")
    parser.add_argument("--memory", type=float, default=24, help="GB of the card, as it is sold")
    parser.add_argument("--tflops", type=float, default=350, help="TFLOP/s of a compiled network in practice")
    parser.add_argument("--scripts", nargs="+", choices=list(SCRIPTS), default=list(SCRIPTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="iteration: a toy, to try it on a CPU")
    args, options = parser.parse_known_args()
    commands[args.command](args, options)


if __name__ == "__main__":
    main()
