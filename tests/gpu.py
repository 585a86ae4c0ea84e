"""What only a GPU can show: real command lines at true size, with random weights, on cards of several sizes.

    python tests/gpu.py                       # all parts, one after the other, on a large CUDA GPU
    python tests/gpu.py gcpo klein --seconds 300 --options="--prompts-per-iteration 4"
    python tests/gpu.py --small --device cpu  # the same path with toys

Each part is a process with its own time limit, so one that fails or hangs does not stop the next. A smaller
card is emulated: PyTorch's allocator gets what a card of that size has left beside CUDA's context, and is
told that this is all. That shows what fits and which micro-batch is found; the seconds are those of the large
card. Each part's result is written to --out at once: results.json; now.json, what a running part has measured
so far; and log.txt, everything that was printed. Compiled graphs are counted by phase, and TORCH_LOGS says in
the log why one was compiled again.
"""

import argparse
import contextlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = 0.7 * 2**30  # bytes that CUDA takes for itself, outside PyTorch's allocator

Part = namedtuple("Part", "model script gb seconds options", defaults=[""])
PARTS = {  # in the order in which they matter. gb: GiB of the emulated card, 0: the card as it is
    "16gb": Part("sd3", "grpo", 15.6, 300),
    "24gb": Part("sd3", "grpo", 23.6, 240),
    "gcpo": Part("sd3", "gcpo", 0, 200),
    "attention": Part("sd3", None, 0, 200),
    "klein": Part("flux2", "grpo", 23.6, 200, "--prompts-per-iteration 1"),
    "flux1": Part("flux", "gcpo", 79.6, 300, "--prompts-per-iteration 1"),
}
RUN = "--iterations 1 --eval-steps 2"
METRICS = "rollout_s reward_s train_s eval_s ratio_first_error zero_std_groups grad_norm".split()
SMALL = "--resolution 16 --steps 4 --prompts-per-iteration 2 --group-size 6 --lora-rank 4"
PROMPTS = [f"a {colour} {thing} in the early morning" for colour, thing in product(
    ("red", "green", "blue", "black", "white"), ("fox", "boat", "house", "lamp", "tree"))]  # fmt: skip

# ---------------------------------------------------------------- in a part's own process


class Record:
    """What a part has measured so far, also in a file, as the process may be killed.

    phases: {name: seconds, peaks of memory in GB, graphs compiled}, summed over all times it was entered.
    """

    def __init__(self, path):
        import torch

        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        self.path, self.torch = path, torch
        self.result = {"card": card, "torch": torch.__version__, "phases": {}}
        self.name, self.start, self.graphs = "imports", time.perf_counter(), 0

    def save(self):
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.result))
        temporary.replace(self.path)

    def enter(self, name):
        """End a phase and begin another. Returns the name of the one that ended."""
        cuda, ended = self.torch.cuda, self.name
        phase = self.result["phases"].setdefault(ended, {"seconds": 0.0, "graphs": 0})
        if cuda.is_available():
            cuda.synchronize()
            peaks = {"allocated": cuda.max_memory_allocated(), "reserved": cuda.max_memory_reserved()}
            for key, peak in peaks.items():
                phase[key] = max(phase.get(key, 0.0), round(peak / 1e9, 3))
            cuda.reset_peak_memory_stats()
        now, graphs = time.perf_counter(), self.torch._dynamo.utils.counters["stats"]["unique_graphs"]
        phase["seconds"] = round(phase["seconds"] + now - self.start, 3)
        phase["graphs"] += graphs - self.graphs
        self.name, self.start, self.graphs = name, now, graphs
        self.result["last phase"] = name if name != "end" else ended
        self.save()
        return ended

    def wrap(self, owner, method, name):
        """Make a method of a class, or a function of a module, a phase of its own."""
        original = getattr(owner, method)

        def wrapper(*args, **options):
            before = self.enter(name)
            result = original(*args, **options)  # if it raises, the phase in which it did stays
            self.enter(before)
            return result

        setattr(owner, method, wrapper)


def emulate(gb):
    """Make this GPU one of gb GiB."""
    import torch

    total = int(gb * 2**30)
    torch.cuda.set_per_process_memory_fraction((total - CONTEXT) / torch.cuda.mem_get_info()[1])
    torch.cuda.mem_get_info = lambda *_: (int(total - CONTEXT) - torch.cuda.memory_reserved(), total)


def write_model(model, folder, device, small):
    """A pipeline with random weights, and a CLIP-H for pickscore, as folders that the scripts can load."""
    import torch
    import transformers

    import bench
    import small_pipelines

    clip = Path(folder, "clip")
    if not clip.exists():
        torch.set_default_dtype(torch.float32 if small else torch.float16)
        with torch.device(device):
            config = bench.TINY_CLIP if small else bench.SIZES["pickscore"]
            bench.make("CLIPModel", config).save_pretrained(clip)
        torch.set_default_dtype(torch.float32)
        vocabulary = small_pipelines.clip_tokenizer().get_vocab()
        vocabulary |= {f"unused{n}": n for n in range(len(vocabulary), 49408)}
        transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(clip)
        transformers.CLIPImageProcessorPil().save_pretrained(clip)
    dtype = torch.float32 if small else torch.bfloat16
    bench.make_pipeline(model, device, dtype, small).save_pretrained(Path(folder, model))


def command(part, folder, args):
    """The command line of a part's script."""
    reward = f"pickscore:{folder / 'clip'}"
    files = f"--model {folder / part.model} --reward {reward} --output {folder / 'run'}"
    files += f" --prompts {folder / 'prompts.txt'} --eval-prompts {folder / 'two.txt'} --device {args.device}"
    options = f"{files} {RUN} {SMALL if args.small else part.options} {args.options}"
    return [f"{part.script}.py", *options.split()]


def run_script(part, line, record):
    """Run a script as it is, with the functions of common.py that are phases wrapped."""
    import common

    if part.gb and "cuda" in line:
        emulate(part.gb)
    record.wrap(common, "load_rewards", "load reward")
    record.wrap(common, "make_policy", "load model")
    for method in ("encode", "compile"):
        record.wrap(common.Policy, method, method)
    record.wrap(common.Policy, "fit_micro_batch", "fit")
    fits, phase = common.Policy.fits, common.Run.phase

    def tried(policy, rows, *args):
        result = fits(policy, rows, *args)
        record.result.setdefault("tried", []).append([rows, result])
        return result

    def next_phase(run, name):
        policy = run.policy
        record.result["micro_batch"] = policy.micro_batch
        record.result["checkpointing"] = policy.transformer.is_gradient_checkpointing
        record.enter(name or "save")
        phase(run, name)

    common.Policy.fits, common.Run.phase = tried, next_phase
    sys.argv = line
    runpy.run_path(str(ROOT / line[0]), run_name="__main__")


def attention(device, small, record):
    """Train SD3 with the attention that the scripts use, and with cuDNN's; and see that nothing compiles
    again after the networks went to the CPU and back.

    cosine, difference (relative): of the gradient to the first one, whose second measurement shows what
    rounding alone does. cuDNN's comes last, as it may end the process.
    """
    import torch

    import bench
    import common
    import grpo

    pipe = bench.make_pipeline("sd3", device, torch.float32 if small else torch.bfloat16, small)
    policy = common.Policy(pipe, 16 if small else 512, micro_batch=4 if small else 46, device=device)
    for parameter in policy.parameters:  # as B is zero at first, A would have no gradient
        torch.nn.init.normal_(parameter, std=0.01)
    rows, sigmas = policy.micro_batch, policy.sigmas(10)
    generator, image = common.generator(0, "noise", 0), torch.arange(rows, device=device)
    noise = [policy.draw_noise(rows, 1, generator) for _ in range(2)]
    advantage = torch.ones(rows, device=device)
    advantage[::2] = -1.0
    gradients, results = [], record.result.setdefault("attention", {})

    def text():
        return [part.to(device) for part in policy.encode(PROMPTS[:2])[0]]

    def measure(label, text):
        record.enter(label)
        settings = common.noise_scale(sigmas, "flow", 0.7), "flow", [0]
        _, rollout = grpo.sample(policy, text, image % 2, noise, sigmas[:4], *settings)
        logp, _, _ = grpo.transition_logp(policy, rollout, torch.zeros_like(image), image)
        log_ratio = logp - rollout.logp[0]
        policy.backward(grpo.policy_loss(log_ratio, advantage, 1e-4).mean())
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters]).double().cpu())
        calls, sync = bench.calls(policy, text), torch.cuda.synchronize if device == "cuda" else int
        rollout_s = bench.median_seconds(lambda: (calls["rollout"](), sync()))
        train_s = bench.median_seconds(lambda: (calls["train"](), sync()))
        with torch.profiler.profile() as profile:
            calls["train"]()
            sync()
        kernels = {e.key: e.count for e in profile.key_averages() if "scaled_dot_product" in e.key}
        for parameter in policy.parameters:
            parameter.grad.zero_()
        error = log_ratio.expm1().abs().max().item()
        cosine = torch.nn.functional.cosine_similarity(gradients[0], gradients[-1], 0).item()
        difference = ((gradients[-1] - gradients[0]).norm() / gradients[0].norm()).item()
        results[label] = {"ratio_error": error, "cosine": cosine, "difference": difference}
        results[label] |= {"rollout_s": rollout_s, "train_s": train_s, "kernels": kernels}
        record.save()

    record.enter("compile")
    first = text()
    policy.compile(first)
    measure("as it is", first)
    measure("as it is, again", first)
    measure("after the trip", text())
    record.enter("compile again")
    torch.compiler.reset()
    torch._functorch.config.enable_autograd_cache = False  # whose key lacks the choice of attention
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cuda.enable_flash_sdp(False)  # leaves cuDNN's, or the plain one
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    policy.compile(first)
    measure("cuDNN", first)


def child(args):
    """A part, or the writing of a model, in this process."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    record, part = Record(args.out / "now.json"), PARTS.get(args.child)
    try:
        if part is None:
            model = args.child.removeprefix("write ")
            write_model(model, args.folder, "cpu" if args.small else args.device, args.small)
        elif part.script is None:
            attention(args.device, args.small, record)
        else:
            run_script(part, command(part, args.folder, args), record)
    finally:
        record.enter("end")


# ---------------------------------------------------------------- in the first process


def run_child(name, folder, args, seconds):
    """Run a part. Returns its result: status (ok, exit N, timeout), seconds, what it measured and printed."""
    now, log = args.out / "now.json", args.out / "log.txt"
    now.unlink(missing_ok=True)
    shutil.rmtree(folder / "run", ignore_errors=True)
    options = ["--child", name, "--folder", folder, "--out", args.out, "--device", args.device]
    options += [f"--options={args.options}", *["--small"] * args.small]
    line = [sys.executable, __file__, *map(str, options)]
    start, place = time.perf_counter(), log.stat().st_size if log.exists() else 0
    with open(log, "ab") as file:
        quiet = {"TORCH_LOGS": "recompiles", "PYTHONUNBUFFERED": "1", **os.environ}
        process = subprocess.Popen(line, stdout=file, stderr=file, env=quiet, start_new_session=True)
        try:
            status = process.wait(max(seconds, 1))
            status = "ok" if status == 0 else f"exit {status}"
        except subprocess.TimeoutExpired:
            status = "timeout"
        with contextlib.suppress(ProcessLookupError):  # also the processes that compile
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    printed = log.read_bytes()[place:].decode(errors="replace").splitlines()
    result = {"status": status, "seconds": round(time.perf_counter() - start, 1)}
    if name in PARTS and PARTS[name].script:
        result["command"] = " ".join(command(PARTS[name], Path("FOLDER"), args))
    result |= json.loads(now.read_text()) if now.exists() else {}
    metrics = folder / "run" / "metrics.jsonl"
    result["metrics"] = [json.loads(row) for row in open(metrics)] if metrics.exists() else []
    return result | {"recompiles": [row for row in printed if "Recompiling" in row], "tail": printed[-8:]}


def show(name, result):
    print(f"\n{name}: {result['status']}, {result['seconds']} s", flush=True)
    if "tried" in result:
        print("micro-batches tried:", *(f"{rows}{'' if fits else ' (no)'}" for rows, fits in result["tried"]))
    if "micro_batch" in result:
        checkpointing = ", with gradient checkpointing" * result["checkpointing"]
        print(f"micro-batch {result['micro_batch']}{checkpointing}")
    print(*result["recompiles"], sep="\n", end="\n" * bool(result["recompiles"]))
    if result["status"] != "ok":
        print("in", result.get("last phase", "its imports"), *result["tail"], sep="\n")
    names = "seconds", "allocated", "reserved", "graphs"
    print(f"{'phase':20s}", *(f"{name:>10s}" for name in names))
    for phase, values in result.get("phases", {}).items():
        print(f"{phase:20s}", *(f"{values.get(name, float('nan')):10.4g}" for name in names))
    for label, values in result.get("attention", {}).items():
        print(label, values)
    for line in result["metrics"]:
        print({name: line[name] for name in METRICS if line.get(name) is not None})


def run_parts(args):
    """Run the parts one after the other. A model is written when it is needed, and deleted before another."""
    args.out.mkdir(parents=True, exist_ok=True)
    results, end = {}, time.perf_counter() + args.seconds
    kept = contextlib.nullcontext(args.models) if args.models else tempfile.TemporaryDirectory()
    with kept as folder:
        folder = Path(folder).absolute()
        folder.mkdir(exist_ok=True)
        (folder / "prompts.txt").write_text("\n".join(PROMPTS))
        (folder / "two.txt").write_text("\n".join(PROMPTS[:2]))

        def run(name, seconds):
            results[name] = run_child(name, folder, args, min(seconds, end - time.perf_counter()))
            (args.out / "results.json").write_text(json.dumps(results, indent=1))
            show(name, results[name])
            return results[name]["status"] == "ok"

        for name in args.parts or PARTS:
            part = PARTS[name]
            if part.script and not (folder / part.model).exists():
                for other in PARTS.values():  # two would not fit on a small disk
                    shutil.rmtree(folder / other.model, ignore_errors=True)
                if not run(f"write {part.model}", 150):
                    shutil.rmtree(folder / part.model, ignore_errors=True)
                    continue
            run(name, args.limit or part.seconds)
    (args.out / "now.json").unlink(missing_ok=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)}; all, if none is named")
    parser.add_argument("--seconds", type=float, default=3600, help="for all parts together")
    parser.add_argument("--limit", type=float, help="seconds for each part, instead of its own")
    parser.add_argument("--options", default="", help="more options for the scripts")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder of the results")
    parser.add_argument("--models", type=Path, help="folder where the last model is kept for another call")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="toys, to try it on a CPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out.absolute()
    if args.child:
        child(args)
    elif unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"there is no part {unknown[0]}; the parts are {', '.join(PARTS)}")
    else:
        run_parts(args)


if __name__ == "__main__":
    main()
