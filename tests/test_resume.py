"""However a run ends, its last complete iteration resumes to the end of a run that was left alone, bit for
bit.
"""

import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

import common
import rewards
from conftest import ROOT, SCRIPTS, adapter, all_equal, assert_same_run, metrics, run_main, slow, small, state
from shapes import shapes

EXTRA = {
    "grpo": "--kl-coef 0.01",
    "gcpo": "--weighted-sampling",
    "tempflow_grpo": "--sde-steps-per-iteration 2",
}
PRELOAD = ["conftest", *SCRIPTS, "peft", "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3"]


def options(folder, iterations, *more):
    return [*small("grpo"), "--ema-decay", "0.9", "--iterations", iterations, "--output", folder, *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 4 iterations that was left alone."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run_main("grpo", *options(folder, 4)) is None
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 2 iterations, with a prompts file that was named relative to the working directory."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "prompts.txt").write_text("a red circle\ntwo blue squares\n")
    with contextlib.chdir(folder):
        assert run_main("grpo", *options("run", 2), "--prompts", "prompts.txt") is None
    return folder / "run"


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def done(folder):
    """The iteration of the checkpoint."""
    return state(folder)["lines"][-1]["iteration"]


@pytest.fixture
def stop(whole, tmp_path):
    """stop(patch, *options) -> (message, last line, checkpoint) of a run that ends in the patch, the two as
    numbers of iterations. Without the patch the run is resumed, to the end of the run that was left alone.
    """

    def run_twice(patch, *more):
        run = tmp_path / "run"
        with patch:
            message = run_main("grpo", *options(run, 4, *more))
        last, saved = metrics(run)[-1]["iteration"], done(run)
        assert run_main("grpo", "--resume", run) is None
        assert_same_run(whole, run)
        return message, last, saved

    return run_twice


@pytest.mark.parametrize("script", SCRIPTS)
def test_stopped_and_resumed_is_the_same_run(script, tmp_path):
    """6 iterations at once, and 3 and then 6: the same metrics, adapters, optimizer and average."""
    more = [*small(script), *EXTRA[script].split(), "--ema-decay", "0.9", "--eval-every", "3"]
    one, other = tmp_path / "whole", tmp_path / "halves"
    assert run_main(script, *more, "--iterations", "6", "--output", one) is None
    assert run_main(script, *more, "--iterations", "3", "--output", other) is None
    with open(other / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 4, "rew')  # half a last line
    assert run_main(script, "--resume", other, "--iterations", "6") is None
    assert_same_run(one, other)
    for iteration in (3, 6):
        assert all_equal(adapter(one, iteration), adapter(other, iteration))
    file = one / "lora" / "6" / "pytorch_lora_weights.safetensors"
    assert file.stat().st_mode & 0o777 == (one / "metrics.jsonl").stat().st_mode & 0o777


def test_lines_behind_the_checkpoint_are_dropped(stop, tmp_path):
    """The run ends between the line of iteration 4 and its checkpoint, two iterations after the last one."""
    original = common.write

    def write(path, data):
        if "checkpoint" in str(path) and len(metrics(tmp_path / "run")) == 5:
            raise KeyboardInterrupt
        original(path, data)

    assert stop(mock.patch.object(common, "write", write), "--save-every", 2)[1:] == (4, 2)


@pytest.mark.parametrize(
    "end, words",
    [
        (KeyboardInterrupt, "stopped; resume with: python grpo.py --resume"),
        (torch.OutOfMemoryError("CUDA out of memory"), "error: out of memory; .*; resume with"),
        (None, "error: the gradient is not finite"),
    ],
)
def test_a_run_that_ends_amid_updates(end, words, stop):
    """The first update of iteration 3 has moved the weights; the checkpoint of iteration 2 is kept."""
    original, calls = common.Policy.clip_gradients, []

    def clip_gradients(self, max_norm):
        calls.append(1)
        if len(calls) == 6 and end:
            raise end
        if len(calls) == 6:
            self.parameters[3].grad[0] = torch.nan
        return original(self, max_norm)

    message, last, saved = stop(mock.patch.object(common.Policy, "clip_gradients", clip_gradients))
    assert re.match(words, message) and "\n" not in message and last == saved == 2


def test_a_reward_that_fails_at_iteration_3(stop, capfd):
    """A traceback with a note that names the reward and the first prompt; then the line that says resume."""
    calls = []
    prompts = common.iteration_prompts(common.read_prompts(None), 2, 3, 0)

    def reward(images, captions):
        calls.append(1)
        if captions[0] == prompts[0] and len(calls) > 4:
            raise RuntimeError("no\ngrader")
        return shapes(images, captions)

    message, last, saved = stop(mock.patch.dict(rewards.REWARDS, shapes=reward))
    assert message.startswith("error: RuntimeError") and "--resume" in message and last == saved == 2
    printed = capfd.readouterr().err
    assert "reward shapes" in printed and prompts[0] in printed and "no\ngrader" in printed


def test_a_full_disk(stop, tmp_path, capfd):
    """A limit on the size of files, at the checkpoint of iteration 2; then there is room again."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    original = common.write

    def write(path, data):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if "checkpoint" in str(path) and len(metrics(tmp_path / "run")) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            original(path, data)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert not list((tmp_path / "run").glob("*.tmp"))

    message, _, saved = stop(mock.patch.object(common, "write", write))
    assert "OSError" in message and "--resume" in message and saved == 1
    assert "File too large" in capfd.readouterr().err  # the traceback


def test_a_missing_or_damaged_checkpoint_is_one_line_and_not_replaced(copy, tmp_path):
    """weights_only refuses what could run code."""
    content, file = (copy / "checkpoint.pt").read_bytes(), tmp_path / "damaged.pt"
    damaged = {"No such file": None, "": b"text", "central directory": content[: len(content) // 2]}
    renamed = state(copy)
    renamed["lora"] = {name.replace("to_q", "to_query"): weight for name, weight in renamed["lora"].items()}
    for word, pickled in (("Unsupported", Path()), ("lines", {"a": 1}), (".to_q", renamed)):
        torch.save(pickled, file)
        damaged[word] = file.read_bytes()
    before = (copy / "metrics.jsonl").read_bytes()
    for word, content in damaged.items():
        (copy / "checkpoint.pt").unlink(missing_ok=True)
        if content is not None:
            (copy / "checkpoint.pt").write_bytes(content)
        message = run_main("grpo", "--resume", copy, "--iterations", 3)
        assert "cannot be resumed" in message and word in message and "start a new run" in message
        assert content is None or (copy / "checkpoint.pt").read_bytes() == content
        assert (copy / "metrics.jsonl").read_bytes() == before


def test_metrics_are_those_of_the_checkpoint(finished, copy):
    """Whatever became of metrics.jsonl and of the pictures."""
    (copy / "metrics.jsonl").write_text((finished / "metrics.jsonl").read_text()[:300])
    shutil.rmtree(copy / "samples")
    assert run_main("grpo", "--resume", copy, "--iterations", 3) is None
    assert metrics(copy)[:3] == metrics(finished) and len(metrics(copy)) == 4
    assert (copy / "samples" / "3.png").exists() and not (copy / "samples" / "compare.png").exists()


# ---------------------------------------------------------------- overriding settings


@pytest.mark.parametrize(
    "script, given, says",
    [
        ("grpo", "--output other", "--output"),
        ("grpo", "--lora-rank 2", "--lora-rank"),
        ("gcpo", "", "grpo.py"),
    ],
)
def test_what_resume_cannot_change(finished, script, given, says):
    before = (finished / "config.json").read_bytes()
    message = run_main(script, "--resume", finished, *given.split())
    assert message.startswith("error: ") and says in message
    assert (finished / "config.json").read_bytes() == before


def test_options_beside_resume_override_and_paths_are_absolute(finished, copy, monkeypatch):
    """From another folder; the optimizer and the average must not bring their old settings back."""
    seen, original = [], common.Run.__init__

    def keep(self, args, policy, optimizer, *more, **counts):
        original(self, args, policy, optimizer, *more, **counts)
        seen.append((policy, optimizer))

    monkeypatch.setattr(common.Run, "__init__", keep)
    monkeypatch.chdir(copy.parent)
    more = "--iterations 3 --micro-batch 2 --gradient-checkpointing --eval-every 1 --device cpu:0"
    more += " --learning-rate 5e-5 --ema-decay 0.5 --output copy"  # the same folder
    assert run_main("grpo", "--resume", "copy", *more.split()) is None
    (policy, optimizer) = seen[0]
    assert optimizer.param_groups[0]["lr"] == 5e-5 and policy.ema.decay == 0.5 and policy.micro_batch == 2
    assert policy.transformer.is_gradient_checkpointing
    settings = json.loads((copy / "config.json").read_text())["settings"]
    assert settings["prompts"] == str(finished.parent / "prompts.txt") and settings["micro_batch"] == 2
    assert "eval_reward" in metrics(copy)[3]


def test_the_average_is_evaluated_whatever_ema_every_becomes(copy):
    assert run_main("grpo", "--resume", copy, "--iterations", 3, "--ema-every", 8) is None
    weights, saved = state(copy)["lora"], adapter(copy, 3)
    name = next(name for name in weights if "lora_A" in name)
    assert not torch.equal(weights[name], saved[f"transformer.{name}"])


def test_a_run_moves_with_its_files(tmp_path, monkeypatch):
    """Model, prompts, evaluation prompts and reward were elsewhere: they are given again."""
    there, moved = tmp_path / "there", tmp_path / "moved"
    there.mkdir()
    shutil.copytree(common.TINY, there / "model", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (there / "p.txt").write_text("a red circle\ntwo blue squares\n")
    (there / "e.txt").write_text("a green square\n")
    (there / "r.py").write_text("def f(images, prompts):\n    return images.mean((1, 2, 3))\n")
    files = "--model model --prompts p.txt --eval-prompts e.txt --reward r.py:f".split()
    more = [*small("grpo"), "--resolution", 32, "--dtype", "float32", "--output", "run"]
    monkeypatch.chdir(there)
    assert run_main("grpo", *more, *files, "--iterations", 1) is None
    assert "reward_std/r.py:f" in metrics("run")[1]  # by what was typed
    monkeypatch.chdir(tmp_path)
    there.rename(moved)
    assert str(there) in run_main("grpo", "--resume", moved / "run", "--iterations", 2)
    monkeypatch.chdir(moved)
    assert run_main("grpo", "--resume", "run", "--iterations", 2, *files) is None
    assert metrics("run")[2]["reward/r.py:f"] > 0


def test_bundled_files_are_stored_by_name(tmp_path):
    assert run_main("grpo", *options(tmp_path / "run", 1, "--eval-prompts", "None")) is None
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert settings["model"] == "tiny" and settings["reward"] == "shapes"
    assert settings["prompts"] is None and settings["eval_prompts"] is None
    settings.pop("sde_steps")
    config = {"script": "grpo", "settings": settings | {"branch_steps": "all"}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    message = run_main("grpo", "--resume", tmp_path / "run")
    assert "branch_steps, sde_steps" in message


def test_the_adapter_of_each_evaluation_is_kept(monkeypatch, tmp_path, capsys):
    """Evaluations of 0.5, 0.6, 0.9, 0.7, 0.9: the best is that of iteration 2, also after resuming."""
    scores, original = iter([0.5, 0.6, 0.9, 0.7, 0.9]), common.Run.evaluate
    patched = lambda self, *args: original(self, *args) | {"eval_reward": next(scores)}  # noqa: E731
    monkeypatch.setattr(common.Run, "evaluate", patched)
    run = tmp_path / "run"
    assert run_main("grpo", *options(run, 2, "--eval-every", 1)) is None
    assert run_main("grpo", "--resume", run, "--iterations", 4) is None
    result, where = capsys.readouterr().out.splitlines()[-2:]
    assert "0.500 -> 0.900, best 0.900 at 2" in result and where.endswith("lora/2")
    for iteration in (2, 3, 4):
        assert not all_equal(adapter(run, 1), adapter(run, iteration))


# ---------------------------------------------------------------- processes that are killed


def child(script, options):
    """In a process that forked from one which has all imports behind it."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.exit(run_main(script, *options))


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signal")
def test_a_closed_terminal_costs_the_iteration_at_hand(tmp_path):
    command = [sys.executable, str(ROOT / "grpo.py"), *map(str, options(tmp_path / "run", 500))]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # under nohup it would be ignored
    )
    while not (tmp_path / "run" / "metrics.jsonl").exists() or len(metrics(tmp_path / "run")) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) != 0
    at = done(tmp_path / "run")
    assert at >= 1
    assert run_main("grpo", "--resume", tmp_path / "run", "--iterations", at + 1) is None
    assert run_main("grpo", *options(tmp_path / "whole", at + 1)) is None
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@slow
def test_twenty_kills_at_random_moments(tmp_path, monkeypatch):
    """SIGKILL while it loads, evaluates, samples, updates, saves: resumed, the run ends as if left alone."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    numbers, kills, finished = random.Random(0), 0, []

    def start(run, timeout=None):
        resuming = (run / "checkpoint.pt").exists()  # killed before the first one, it starts again
        words = ["--resume", run] if resuming else options(run, 6, "--save-every", 2, "--eval-every", 3)
        process = context.Process(target=child, args=("grpo", words))
        process.start()
        process.join(timeout)
        return process

    assert start(tmp_path / "first").exitcode == 0  # the fork server has its imports now
    begun = time.time()
    assert start(tmp_path / "whole").exitcode == 0
    length = time.time() - begun
    while kills < 20:
        run = tmp_path / f"run{len(finished)}"
        process = start(run, numbers.uniform(0.0, 0.9) * length)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0
            finished.append(run)
    last = tmp_path / f"run{len(finished)}"
    assert start(last).exitcode == 0
    for run in [*finished, last]:
        assert_same_run(tmp_path / "whole", run)


def test_importing_does_nothing_and_needs_nothing_posix():
    code = """
import sys, signal, os
before = sys.excepthook, signal.getsignal(signal.SIGINT), dict(os.environ)
for name in ("fcntl", "resource", "pwd"):
    sys.modules[name] = None
import grpo, gcpo, tempflow_grpo, rewards, common
assert (sys.excepthook, signal.getsignal(signal.SIGINT), dict(os.environ)) == before
assert "diffusers" not in sys.modules and "peft" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
