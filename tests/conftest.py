"""What the tests share: a script as a process or in this process, its recorded loop, a policy in float64."""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import threading
from copy import deepcopy
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process per core; PyTorch reads it when it is imported

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_flatten

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tiny"), str(ROOT / "tests")]

import common  # noqa: E402

SCRIPTS = ("grpo", "gcpo", "tempflow_grpo")
TWO_PROMPTS = ROOT / "tests" / "two_prompts.txt"
QUICK = "--prompts-per-iteration 2 --micro-batch 8 --steps 5 --sde-steps all --ema-decay 0 --lora-rank 4"
QUICK += f" --eval-prompts {TWO_PROMPTS}"
QUICK += " --eval-seeds 1 --eval-every 100 --eval-steps 2 --sde flow --noise-level 0.7 --learning-rate 7e-4"
OWN = {"grpo": "--group-size 4", "gcpo": "--group-size 4 --chunks adaptive --chunk-fraction 0.5"}
OWN["tempflow_grpo"] = "--seeds-per-prompt 2 --branches 3"


slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="minutes; SLOW=1 runs it, as CI does")


def small(script):
    """Options of a run that takes seconds."""
    return [*QUICK.split(), *OWN.get(script, OWN["grpo"]).split()]


def cli(script, *options, cwd=ROOT, **kwargs):
    """Run a script as a user does: returns the finished process, with text output."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=600, **kwargs)


@cache
def tiny_pipeline(dtype):
    return load_pipeline(str(common.TINY), dtype)


def load_tiny_once(model, dtype):
    """In place of common.load_pipeline: a copy of the tiny model, which was read from its files once."""
    if model != str(common.TINY):
        return load_pipeline(model, dtype)
    pipe = tiny_pipeline(dtype)
    parts = {name: part if "tokenizer" in name else deepcopy(part) for name, part in pipe.components.items()}
    return type(pipe)(**parts)


load_pipeline = common.load_pipeline
common.load_pipeline = load_tiny_once


def run_main(script, *options, plot=False):
    """Run a script in this process, as its command line does:

    returns None, or the message that it ended with. plot: whether it draws progress.png, which takes as long
    as two iterations.
    """
    module, argv = importlib.import_module(script), sys.argv
    sys.argv = [f"{script}.py", *map(str, options)]
    plotting = contextlib.nullcontext() if plot else mock.patch.object(common, "plot_progress")
    try:
        common.read_prompts.cache_clear()
        with plotting:
            common.run_script(script, module.main, module.Args, module.DEFAULTS)
    except SystemExit as end:
        return end.code or None
    finally:
        sys.argv = argv


def here(script, *options, **kwargs):
    """Like cli, in this process, which saves the time of the imports."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        message = run_main(script, *options, **kwargs)
    done = SimpleNamespace(returncode=0 if message is None else 1, stdout=out.getvalue())
    done.stderr = f"{errors.getvalue()}{message or ''}"
    return done


def quick(script, output, options=""):
    """A run of a few seconds in this process, which must succeed. Returns what it printed."""
    done = here(script, *small(script), *options.split(), "--output", output)
    assert done.returncode == 0, done.stderr
    return done.stdout


def parse(script, *options):
    """The settings that a command line means, with the script's defaults."""
    module = importlib.import_module(script)
    common.read_prompts.cache_clear()
    return common.parse_args(script, module.Args, module.DEFAULTS, [str(option) for option in options])


def metrics(folder, times=True):
    """The lines of a run's metrics.jsonl; without times, what must be the same in two runs."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return lines if times else [{k: v for k, v in line.items() if not k.endswith("_s")} for line in lines]


def state(folder):
    """What is in a run's checkpoint."""
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def adapter(folder, iteration):
    """The weights of the adapter that a run saved after an iteration."""
    return load_file(Path(folder) / "lora" / str(iteration) / "pytorch_lora_weights.safetensors")


def all_equal(one, other):
    """Whether two dicts of tensors are the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_same_run(one, other):
    """Two run folders hold the same metrics (but for times), weights, optimizer, average and counters, bit
    for bit.
    """
    assert metrics(one, times=False) == metrics(other, times=False)
    one, other = state(one), state(other)
    for checkpoint in (one, other):
        for line in checkpoint["lines"]:
            for name in [name for name in line if name.endswith("_s")]:
                del line[name]
    (one, names), (other, other_names) = tree_flatten(one), tree_flatten(other)
    assert names == other_names
    for a, b in zip(one, other):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


class DoublePolicy(common.Policy):
    """The policy in float64, so that a gradient can be compared to many digits."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.dtype = torch.float64
        for part in (self.transformer, self.pipe.vae, *self.encoders):
            part.double()

    def draw_noise(self, *args):
        return super().draw_noise(*args).double()

    def encode(self, *batches):
        torch.set_default_dtype(torch.float64)  # or CLIP's mask overflows in transformers 4
        try:
            return super().encode(*batches)
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """model("sd3") is the folder of a small pipeline, made once."""
    import small_pipelines  # here, since it imports all of diffusers

    @cache
    def make(name, **options):
        folder = tmp_path_factory.mktemp(name) / "model"
        small_pipelines.save(folder, name, **options)
        return folder

    return make


def make_policy(folder, dtype="float32", resolution=16, **settings):
    """A policy of a small pipeline."""
    usual = dict(device="cpu", guidance=3.0, micro_batch=2, lora_rank=2, lora_alpha=4.0)
    return common.Policy(common.load_pipeline(str(folder), dtype), resolution, **usual | settings)


@pytest.fixture
def record(monkeypatch, tmp_path):
    """A function that runs a script's main in this process and records what its loop did.

    record(module, *options) -> namespace with args, folder, policy; rollouts: (arguments, (x, x_next, logp,
    final latents)) of each call of sample; advantages, chunks: (arguments, result) of each call of
    group_advantage and draw_chunks; updates: for each optimizer step the weights before it and the gradients;
    images: the pictures of each grid.
    """

    def run(module, *options, double=True):
        seen = SimpleNamespace(rollouts=[], advantages=[], chunks=[], updates=[], policy=None, images=[])

        def keep(owner, name, into):
            original = getattr(owner, name)

            def wrapped(*args, **kwargs):
                result = original(*args, **kwargs)
                into.append((args, result))
                return result

            monkeypatch.setattr(owner, name, wrapped)

        keep(module, "sample", samples := [])
        keep(module, "group_advantage", seen.advantages)
        keep(common, "save_pictures", grids := [])
        if hasattr(module, "draw_chunks"):
            keep(module, "draw_chunks", seen.chunks)
        policy_class = DoublePolicy if double else common.Policy
        original_clip = policy_class.clip_gradients

        def make(*args, **kwargs):
            seen.policy = policy_class(*args, **kwargs)
            return seen.policy

        def clip_gradients(self, max_norm):
            weights = [p.detach().clone() for p in self.parameters]
            seen.updates.append((weights, [p.grad / self.loss_scale for p in self.parameters]))
            return original_clip(self, max_norm)

        monkeypatch.setattr(policy_class, "clip_gradients", clip_gradients)
        monkeypatch.setattr(common, "Policy", make)
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py"])
        seen.folder = tmp_path / f"{module.__name__}{len(os.listdir(tmp_path))}"
        monkeypatch.setattr(common, "plot_progress", lambda *args: None)  # as in run_main
        options = [*small(module.__name__), "--output", seen.folder, *options]
        seen.args = parse(module.__name__, *options)
        module.main(seen.args)
        for inputs, (latents, rollout) in samples:
            seen.rollouts.append((inputs, (rollout.x, rollout.x_next, rollout.logp, latents)))
        seen.images = [args[0] for args, _ in grids]
        monkeypatch.undo()
        return seen

    return run


def gradients(policy, loss):
    return torch.autograd.grad(loss, policy.parameters)


def put_weights(policy, weights):
    with torch.no_grad():
        for parameter, weight in zip(policy.parameters, weights):
            parameter.copy_(weight)


def relative_error(got, want):
    """Largest difference of two lists of tensors, relative to the largest value of the second."""
    difference = max((a - b).abs().max().item() for a, b in zip(got, want))
    return difference / max(b.abs().max().item() for b in want)


@pytest.fixture
def serve():
    """serve(answer) starts a server on the loopback; answer(request) -> (status, text of a message, None for
    none, or bytes). Returns it, with .url, .requests (bodies) and .most (the most requests at a time)."""
    servers = []

    def start(answer):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                data = json.dumps({"data": [{"id": "first-model"}, {"id": "second"}]}).encode()
                self.reply(server.models, data)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.requests.append(body | {"path": self.path, "key": self.headers["Authorization"]})
                    server.now += 1
                    server.most = max(server.most, server.now)
                status, text = answer(body)
                with server.lock:
                    server.now -= 1
                if not isinstance(text, bytes):
                    message = {"role": "assistant", "content": text}
                    text = json.dumps({"choices": [{"message": message}]}).encode()
                self.reply(status, text)

            def reply(self, status, data):
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json" if data[:1] == b"{" else "text/html")
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # the client has given up

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads, server.block_on_close = True, False
        server.lock, server.requests, server.now, server.most = threading.Lock(), [], 0, 0
        server.models = 200  # the status of the list of models
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
