"""Measurements. Each subcommand is a function below; `python tests/bench.py COMMAND --help` tells its options.

python tests/bench.py model --model sd3 --resolution 512            # speed and memory at the true size, on CUDA
python tests/bench.py model --model flux --resolution 512 --tiny    # the same lines from a toy, on a CPU
python tests/bench.py tempflow                                     # the savings of tempflow_grpo.py, on the tiny model
python tests/bench.py curves                                       # the study of the README; --plot makes its figures
"""

import argparse
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import common  # noqa: E402
import gcpo  # noqa: E402
import grpo  # noqa: E402
import study  # noqa: E402
import tempflow_grpo  # noqa: E402

# ---------------------------------------------------------------- model: speed and memory at the true sizes

# For each family: the transformer's class and settings, its parameters in billions, the shapes of a prompt's text, and
# what --tiny changes.
SIZES = {
    "sd3": dict(
        transformer="SD3Transformer2DModel",
        config=dict(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
        parameters=2.243,
        text=[(77 + 256, 4096), (2048,)],
        vae=dict(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609),
        tiny=dict(num_layers=2, num_attention_heads=2, caption_projection_dim=128, dual_attention_layers=(0,)),
    ),
    "flux": dict(
        transformer="FluxTransformer2DModel",
        config=dict(
            patch_size=1,
            in_channels=64,
            num_layers=19,
            num_single_layers=38,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=4096,
            pooled_projection_dim=768,
            guidance_embeds=True,
        ),
        parameters=11.90,
        text=[(512, 4096), (768,)],
        vae=dict(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
        tiny=dict(num_layers=1, num_single_layers=1, num_attention_heads=2),
    ),
    "flux2": dict(
        transformer="Flux2Transformer2DModel",
        config=dict(
            in_channels=128,
            num_layers=5,
            num_single_layers=20,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=7680,
            guidance_embeds=False,
        ),
        parameters=3.88,
        text=[(512, 7680)],
        vae=dict(latent_channels=32),
        tiny=dict(num_layers=1, num_single_layers=1, num_attention_heads=2),
    ),
}
CHUNK = 7  # the longest of [GC]'s fixed sizes 2, 3, 4, 7


def make_transformer(name, tiny=False):
    import diffusers

    size = SIZES[name]
    return getattr(diffusers, size["transformer"])(**size["config"] | (size["tiny"] if tiny else {}))


def make_vae(name, tiny=False):
    import diffusers

    channels = (32,) * 4 if tiny else (128, 256, 512, 512)
    options = dict(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=1 if tiny else 2,
    )
    if name != "flux2":
        options |= dict(use_quant_conv=False, use_post_quant_conv=False)
    vae_class = diffusers.AutoencoderKLFlux2 if name == "flux2" else diffusers.AutoencoderKL
    return vae_class(**options, **SIZES[name]["vae"])


def make_policy(args, dtype, **settings):
    """A Policy whose transformer and VAE have the true sizes and random weights, made on the device in dtype."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    import small_pipelines

    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(args.device):
            transformer, vae = make_transformer(args.model, args.tiny), make_vae(args.model, args.tiny)
    finally:
        torch.set_default_dtype(before)
    for weight in transformer.parameters():  # some are zero at first, and would hide errors of rounding
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.02)
    pipe = small_pipelines.MAKERS[args.model]()  # its scheduler and methods; its encoders are not used
    pipe.register_modules(transformer=transformer.to(dtype), vae=vae.to(dtype))
    pipe.vae_scale_factor, pipe.patch_size = 8, transformer.config.patch_size
    defaults = grpo.DEFAULTS[args.model]
    names = ("guidance", "lora_rank", "lora_alpha")
    usual = {name: defaults[name] for name in names} | dict(model="random", seed=0, dtype=str(dtype).split(".")[1])
    usual |= {name: getattr(args, name) for name in ("device", "resolution", "micro_batch", "compile")}
    usual |= {"gradient_checkpointing": args.gradient_checkpointing}
    return common.Policy(SimpleNamespace(**usual | settings), pipe=pipe)


def make_text(args, policy, rows=2):
    generator = torch.Generator().manual_seed(0)
    dtype, shapes = policy.transformer.dtype, SIZES[args.model]["text"]
    return [torch.randn(rows + 1, *shape, generator=generator).to(policy.device, dtype) for shape in shapes]


def timed(device, function, warm_up=True):
    """Seconds of a call, and its peak memory in GB (nan on a CPU). The warm-up pays for compiling and allocating."""
    cuda = torch.device(device).type == "cuda"
    if warm_up:
        function()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() / 1e9 if cuda else float("nan")


def matrix_rate(device, dtype):
    """FLOP/s of the best of several products of two square matrices."""
    size, rounds = (8192, 20) if torch.device(device).type == "cuda" else (1024, 3)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(timed(device, lambda: a @ b)[0] for _ in range(rounds))


def on_meta(args, policy, dtype):
    """A function that predicts one velocity (one image, one pass) on the meta device, and its transformer."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            transformer = make_transformer(args.model, args.tiny).to(dtype).requires_grad_(False)
            x, text = torch.empty(1, *policy.shape), [torch.empty(1, *shape) for shape in SIZES[args.model]["text"]]
    finally:
        torch.set_default_dtype(default)
    pipe = SimpleNamespace(transformer=transformer, vae_scale_factor=8, config=SimpleNamespace(is_distilled=False))
    for name in "_pack_latents _unpack_latents _prepare_latent_image_ids _prepare_text_ids _prepare_latent_ids".split():
        setattr(pipe, name, getattr(policy.pipe, name, None))

    def predict():
        with torch.device("meta"):
            return type(policy.family)(pipe).predict(x, torch.empty(1), text, 1.0)

    return predict, x, transformer


def count_flops(args, policy):
    """FLOPs of one velocity evaluation (one image, one pass) forward, and forward with backward.

    Without the adapter. Backward has no gradients of the frozen weights, so it is about one forward, not two.
    """
    from torch.utils.flop_counter import FlopCounterMode

    predict, x, _ = on_meta(args, policy, torch.float32)
    x.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        velocity = predict()
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        velocity.sum().backward()
    return forward, forward + counter.get_total_flops()


class FusedAttention(torch.autograd.Function):
    """Stands for a fused kernel on the meta device: it keeps query, key, value and result, and no matrix of weights."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out


def count_kept(args, policy, dtype, checkpointing):
    """Bytes that one velocity evaluation (one image, one pass) keeps for its backward, with the adapter in float32."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    predict, _, transformer = on_meta(args, policy, dtype)
    with torch.device("meta"):
        rank = grpo.DEFAULTS[args.model]["lora_rank"]
        transformer.add_adapter(LoraConfig(r=rank, target_modules=type(policy.family).targets))
    cast_training_params(transformer, torch.float32)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    weights, kept = {p.untyped_storage()._cdata for p in transformer.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # also keeps it alive, so that no other gets its address
        return tensor

    def attention(query, key, value, *args, **options):
        return FusedAttention.apply(query, key, value)

    with (
        mock.patch("torch.nn.functional.scaled_dot_product_attention", attention),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        predict()
    return sum(storage.nbytes() for storage in kept.values())


def phases(policy, text, batches, steps, autocast):
    """Functions that do some of a rollout, of training and of decoding, and a dict that they write results to."""
    M, results = policy.micro_batch, {}
    N = M * batches
    sigmas, owner = policy.sigmas(steps), torch.arange(N, device=policy.store) % 2
    s, generator = common.noise_scale(sigmas, "flow", 0.7), torch.Generator().manual_seed(0)
    noise = [policy.noise(N, generator) for _ in range(steps)]
    optimizer = torch.optim.AdamW(policy.parameters, 0.0)

    def rollout():
        with autocast():
            results["way"] = grpo.rollout(policy, text, owner, noise, sigmas, s)

    def train():
        (x, x_next, old_logp, _), errors = results["way"], []
        levels = sigmas[:-2], sigmas[1:-1], s
        step, image = torch.cartesian_prod(torch.arange(steps - 1), torch.arange(N)).T.to(policy.store)
        for mb_step, mb_image in zip(step.split(M), image.split(M)):
            with autocast():
                logp, _, _ = grpo.transition_logp(policy, text, owner, levels, x, x_next, mb_step, mb_image)
            log_ratio = logp - old_logp[mb_step, mb_image]
            log_ratio.exp().mean().backward()
            errors.append(log_ratio.detach().abs().max())
        optimizer.step()
        optimizer.zero_grad()
        results["ratio_error"] = torch.stack(errors).max().item()

    def decode():
        policy.decode(results["way"][-1])

    return {"rollout": rollout, "train": train, "decode": decode}, results, N


def measure(args, policy, text, flops, rate, autocast=nullcontext):
    """Print the phases of a policy; returns velocity evaluations a second of rollout and training, images of decode."""
    functions, results, images = phases(policy, text, args.batches, 3, autocast)
    speed = {}
    for name, function in functions.items():
        policy.velocity_evals = 0
        seconds, peak = timed(args.device, function)
        evals = policy.velocity_evals / 2  # the warm-up counts too
        if name == "decode":
            speed[name] = images / seconds
            print(f"  {name:8s} {speed[name]:9.3f} images/s{'':29s} peak {peak:7.2f} GB")
            continue
        speed[name] = evals / seconds
        # a backward counts as two evaluations, and its FLOPs are counted as they are
        work = evals / 3 * flops[1] if name == "train" else evals * flops[0]
        share = work / seconds / rate
        print(f"  {name:8s} {speed[name]:9.3f} velocity evals/s  {share:6.1%} of matrix rate  peak {peak:7.2f} GB")
    print(f"  largest |log ratio| before any update {results['ratio_error']:.1e}")
    return speed


def script_evals(model):
    """{script: (velocity evaluations of a rollout, of training, images)} of one iteration, by DEFAULTS.

    GCPO is taken to train chunk_fraction of the transitions; updates after the first take one more forward for the
    chunks' ratio.
    """
    passes = 1 if model == "flux" else 2  # guidance
    d, chunk_fraction = grpo.DEFAULTS[model], gcpo.Args.chunk_fraction
    N, T = d["prompts_per_iteration"] * d["group_size"], d["steps"]
    counts = {"grpo.py": (N * T, 3 * N * (T - 1), N)}
    d, updates = gcpo.DEFAULTS[model], gcpo.Args.updates_per_iteration
    N, T = d["prompts_per_iteration"] * d["group_size"], d["steps"]
    counts["gcpo.py"] = (N * T, chunk_fraction * N * (T - 1) * (3 + (updates - 1) / updates), N)
    d = tempflow_grpo.DEFAULTS[model]
    N, T, B = d["prompts_per_iteration"] * d["seeds_per_prompt"], d["steps"], d["branches"]
    counts["tempflow_grpo.py"] = (N * (T - 1) + N * B * T * (T - 1) // 2, 3 * N * (T - 1), N * B * (T - 1))
    return {script: (passes * r, passes * t, images) for script, (r, t, images) in counts.items()}


def print_iterations(args, speed, repeated=1):
    """Time of one iteration of each script by DEFAULTS, from the speeds measured; resolution and batch are args'."""
    for script, (rollout, train, images) in script_evals(args.model).items():
        if repeated > 1 and "tempflow" not in script:
            continue
        seconds = [rollout / speed["rollout"], repeated * train / speed["train"], images / speed["decode"]]
        told = "  ".join(f"{n} {t:9.1f} s" for n, t in zip(("rollout", "train", "decode"), seconds))
        print(f"  {script:17s} {sum(seconds):9.1f} s an iteration: {told}")


def bench_branches(args, policy, text, branches=6):
    """Training on the branches of a micro-batch of states: one velocity a state, or one a branch as in [TF]'s code."""
    M = policy.micro_batch
    sigmas, owner = policy.sigmas(3), torch.arange(M, device=policy.store) % 2
    s, generator = common.noise_scale(sigmas, "flow", 0.7), torch.Generator().manual_seed(0)
    x, x_next = policy.noise(M, generator)[None], policy.noise(M * branches, generator).unflatten(0, (1, M, branches))
    x, x_next = x.expand(2, *x.shape[1:]), x_next.expand(2, *x_next.shape[1:])
    image, step = torch.arange(M, device=policy.store), torch.zeros(M, dtype=torch.long, device=policy.store)

    levels = sigmas[:-2], sigmas[1:-1], s

    def shared():
        tempflow_grpo.transition_logp(policy, text, owner, levels, x, x_next, step, image)[0].mean().backward()

    def repeated():
        for b in range(branches):
            one = x_next[:, :, b]
            grpo.transition_logp(policy, text, owner, levels, x, one, step, image)[0].mean().backward()

    return {"states shared": timed(args.device, shared), "states repeated": timed(args.device, repeated)}


def bench_chunk(args, policy, text):
    """A chunk of CHUNK transitions of one image: one at a time, or in one graph as in GCPO's released code."""
    sigmas, owner = policy.sigmas(CHUNK + 1), torch.zeros(1, dtype=torch.long, device=policy.store)
    s, generator = common.noise_scale(sigmas, "flow", 0.7), torch.Generator().manual_seed(0)
    x = torch.stack([policy.noise(1, generator) for _ in range(CHUNK + 1)])
    step, M = torch.arange(CHUNK, device=policy.store), policy.micro_batch

    def chunk(size):
        policy.micro_batch = size
        try:
            for part in step.split(size):
                levels, image = (sigmas[:-2], sigmas[1:-1], s), torch.zeros_like(part)
                grpo.transition_logp(policy, text, owner, levels, x[:-1], x[1:], part, image)[0].mean().backward()
        finally:
            policy.micro_batch = M

    return {f"{size} at a time": timed(args.device, lambda size=size: chunk(size)) for size in (1, CHUNK)}


def bench_model(args):
    """Velocity evaluations, share of the matrix rate and memory by phase; time of an iteration of each script."""
    torch.manual_seed(0)
    args.micro_batch = args.micro_batch or grpo.DEFAULTS[args.model]["micro_batch"]
    dtype = common.DTYPES[args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")]
    with torch.device("meta"):
        billions = sum(p.numel() for p in make_transformer(args.model, args.tiny).parameters()) / 1e9
    machine = (
        torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    )
    print(
        f"{args.model} at {args.resolution} px, {billions:.3f} billion parameters, {machine}, torch {torch.__version__}"
    )
    rate = matrix_rate(args.device, dtype)
    print(f"matrix product in {dtype}: {rate / 1e12:.2f} TFLOP/s")
    policy = make_policy(args, dtype)
    text, flops = make_text(args, policy), count_flops(args, policy)
    print(f"one velocity evaluation: {flops[0] / 1e12:.4f} TFLOP forward, {flops[1] / 1e12:.4f} with backward")

    passes = 2 if policy.guidance > 1 and policy.family.two_pass_guidance else 1
    kept = [passes * args.micro_batch * count_kept(args, policy, dtype, on) / 1e9 for on in (False, True)]
    weights = sum(p.numel() * p.element_size() for p in policy.transformer.parameters()) / 1e9
    print(
        f"by count: weights {weights:.2f} GB; a micro-batch keeps {kept[0]:.2f} GB for its backward, or "
        f"{kept[1]:.2f} GB (and what one block needs) with --gradient-checkpointing"
    )
    own = {p.__name__: p.DEFAULTS[args.model]["resolution"] for p in (grpo, gcpo, tempflow_grpo)}
    print(f"iterations are estimates from these speeds, at {args.resolution} px; the scripts' defaults are {own}")
    print(f"weights in {dtype}, adapter in float32, {args.micro_batch} latents at a time")
    speed = measure(args, policy, text, flops, rate)
    print_iterations(args, speed)

    print("branches of one state, 6 each")
    for name, (seconds, peak) in bench_branches(args, policy, text).items():
        print(f"  {name:16s} {seconds:9.3f} s  peak {peak:7.2f} GB")
    print("with states repeated, as in TempFlow-GRPO's code")
    print_iterations(args, speed, repeated=6)

    print(f"a chunk of {CHUNK} transitions")
    try:
        for name, (seconds, peak) in bench_chunk(args, policy, text).items():
            print(f"  {name:16s} {seconds:9.3f} s  peak {peak:7.2f} GB")
    except torch.OutOfMemoryError:
        print("  out of memory")

    print("weights in float32 under autocast, as Flow-GRPO keeps them")
    policy.transformer.to(torch.float32)
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    policy.pipe.vae.to(dtype)
    try:
        autocast = lambda: torch.autocast(policy.device.type, half)  # noqa: E731
        print_iterations(args, measure(args, policy, text, flops, rate, autocast))
    except torch.OutOfMemoryError:
        print("  out of memory")


def bench_tempflow(args):
    """TempFlow-GRPO's rollout and training on the tiny model, ours against the released code's way, in one process."""
    settings = common.parse_args(
        tempflow_grpo.Args, tempflow_grpo.DEFAULTS, ["--model", "tiny", "--device", args.device]
    )
    policy = common.Policy(settings)
    P, S, B = settings.prompts_per_iteration, settings.seeds_per_prompt, settings.branches
    N, sigmas = P * S, policy.sigmas(settings.steps)
    s = common.noise_scale(sigmas, settings.sde, settings.noise_level)
    levels, steps, owner = (sigmas[:-2], sigmas[1:-1], s), list(range(len(s))), torch.arange(N) // S
    text = policy.encode(common.read_prompts(settings.prompts)[:P])
    generator = torch.Generator().manual_seed(0)
    noise = [policy.noise(N, generator), *(policy.noise(N * B, generator).unflatten(0, (N, B)) for _ in steps)]
    advantage = torch.randn(len(s), N, B, generator=generator).to(policy.device)
    rollout = [policy, text, owner, noise, sigmas, s]

    def lockstep():
        return tempflow_grpo.rollout(*rollout, steps)

    def nested():
        """Each branching step by itself: the trunk once, then its branches to the end."""
        trunk, repeated = noise[0], owner.repeat_interleave(B)
        for k in steps:
            with torch.no_grad():
                velocity = policy.velocity_in_micro_batches(trunk, sigmas[k], text, owner)
                mean, std = common.sde_mean_std(trunk, velocity, sigmas[k], sigmas[k + 1], s[k])
                branches = (mean[:, None] + std * noise[1 + k]).flatten(0, 1)
                common.ode_sample(policy, branches, text, repeated, sigmas[k + 1 :])
                trunk = trunk - (sigmas[k] - sigmas[k + 1]) * velocity

    x, x_next, *_ = lockstep()

    def shared():
        step, seed = torch.cartesian_prod(torch.arange(len(s)), torch.arange(N)).T
        for mb in torch.arange(len(step)).split(settings.micro_batch):
            inputs = (text, owner, levels, x, x_next, step[mb], seed[mb])
            logp, _, _ = tempflow_grpo.transition_logp(policy, *inputs)
            (logp * advantage[step[mb], seed[mb]]).sum().backward()

    def repeated():
        step, seed, branch = torch.cartesian_prod(torch.arange(len(s)), torch.arange(N), torch.arange(B)).T
        for mb in torch.arange(len(step)).split(settings.micro_batch):
            k, n, b = step[mb], seed[mb], branch[mb]
            velocity = policy.velocity(x[k, n], sigmas[k], text, owner[n])
            mean, std = common.sde_mean_std(x[k, n], velocity, sigmas[k], sigmas[k + 1], s[k])
            (common.log_prob(x_next[k, n, b], mean, std) * advantage[k, n, b]).sum().backward()

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


def bench_curves(args):
    """The three algorithms and their ablations over seeds on the tiny model, at equal cost; stop and go on at will."""
    every = study.jobs_of(args.seeds)
    unknown = [name for name in args.only if not any(job[0].startswith(name) for job in every)]
    if unknown or min(args.seeds, args.jobs) < 1:
        sys.exit(
            f"error: --only {' '.join(unknown)}: no such run" if unknown else "error: --seeds and --jobs are 1 or more"
        )
    if args.plot:
        have = study.read_runs()
        if lacking := [f"{name}-{seed}" for name, seed in every if f"{name}-{seed}" not in have]:
            sys.exit(
                f"error: tests/curves lacks {len(lacking)} of {len(every)} runs, {lacking[0]} first; run python "
                "tests/bench.py curves"
            )
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

    command = commands.add_parser("model", help=bench_model.__doc__)
    command.set_defaults(function=bench_model)
    command.add_argument("--model", choices=list(SIZES), default="sd3")
    command.add_argument("--resolution", type=int, default=512, help="pixels a side")
    command.add_argument("--micro-batch", type=int, help="latents in one forward; default: as grpo.py")
    command.add_argument("--batches", type=int, default=2, help="micro-batches a step, to measure")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--dtype", choices=list(common.DTYPES), help="default: bfloat16 on CUDA, float32 on a CPU")
    command.add_argument("--gradient-checkpointing", action="store_true")
    command.add_argument("--compile", action="store_true", help="torch.compile the transformer's blocks")
    command.add_argument("--tiny", action="store_true", help="one or two narrow layers, to try this out on a CPU")

    command = commands.add_parser("tempflow", help=bench_tempflow.__doc__)
    command.set_defaults(function=bench_tempflow)
    command.add_argument("--repeats", type=int, default=5)
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")

    command = commands.add_parser("curves", help=bench_curves.__doc__)
    command.set_defaults(function=bench_curves)
    command.add_argument("--seeds", type=int, default=5, help="of each script and ablation; tuning has its own")
    command.add_argument("--only", nargs="*", default=[], help="runs whose names begin so: tuning, grpo, gcpo-fixed")
    command.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    command.add_argument("--plot", action="store_true", help="tables and figures from tests/curves; needs matplotlib")

    args = parser.parse_args()
    sys.exit(args.function(args))


if __name__ == "__main__":
    main()
