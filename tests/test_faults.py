"""Whatever happens to a run, its last complete state resumes, and the end is that of a run that was left alone."""

import errno
import fcntl
import math
import multiprocessing
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import common
import rewards
from conftest import ROOT, SCRIPTS, assert_same_run, errors, metrics, run_main, slow, small, state
from shapes import shapes

import pytest
import torch
from safetensors import SafetensorError

PRELOAD = ["conftest", *SCRIPTS, "peft", "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3"]


def options(folder, iterations, *more):
    return [*small("grpo"), "--ema-decay", "0.9", "--iterations", iterations, "--output", folder, *more]


@pytest.fixture
def whole(tmp_path):
    """A run of 4 iterations that was left alone."""
    assert run_main("grpo", *options(tmp_path / "whole", 4)) == 0
    return tmp_path / "whole"


def one_error(capsys):
    lines = errors(capsys.readouterr().err)
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def no_half_files(folder):
    assert not [path for path in Path(folder).rglob("*") if ".tmp" in path.name]


# ---------------------------------------------------------------- a reward that fails


def explode(images, prompts):
    raise RuntimeError("no\ngrader")


BAD = {
    "raises": (explode, "RuntimeError: no grader"),
    "nan": (lambda images, prompts: torch.full((len(prompts),), torch.nan), "nan"),
    "wrong count": (lambda images, prompts: torch.ones(len(prompts) - 1), "one an image"),
    "no numbers": (lambda images, prompts: ["good"] * len(prompts), "failed with"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_reward_that_fails_at_iteration_3(kind, whole, monkeypatch, tmp_path, capsys):
    calls, (bad, words) = [], BAD[kind]

    def reward(images, prompts):
        calls.append(1)
        return (bad if len(calls) == 5 else shapes)(images, prompts)  # two calls are of the first evaluation

    monkeypatch.setitem(rewards.REWARDS, "shapes", rewards.Entry(reward))
    capsys.readouterr()
    assert run_main("grpo", *options(tmp_path / "run", 4)) == 1
    error = one_error(capsys)
    prompt = common.iteration_prompts(common.read_prompts(common.TINY / "prompts.txt"), 2, 3, 0)[0]
    assert "reward shapes" in error and prompt in error and words in error
    assert [line["iteration"] for line in metrics(tmp_path / "run")] == [0, 1, 2]
    assert dict(state(tmp_path / "run"))[".counters.iteration"] == 2
    assert run_main("grpo", "--resume", tmp_path / "run") == 0
    assert_same_run(whole, tmp_path / "run")


def test_a_reward_that_fails_in_an_evaluation_loses_no_training(monkeypatch, tmp_path):
    fails = rewards.Entry(lambda i, p: explode(i, p) if len(p) > 8 else shapes(i, p))
    monkeypatch.setitem(rewards.REWARDS, "shapes", fails)
    monkeypatch.setattr(common, "MAX_EVAL_PROMPTS", 8)  # so only the later evaluations, of more, will fail
    assert run_main("grpo", *options(tmp_path / "run", 2, "--iterations", 1)) == 0
    monkeypatch.setattr(common, "MAX_EVAL_PROMPTS", 9)
    assert run_main("grpo", "--resume", tmp_path / "run", "--iterations", 3) == 1
    assert dict(state(tmp_path / "run"))[".counters.iteration"] == 3
    assert len(metrics(tmp_path / "run")) == 4 and "eval_reward" not in metrics(tmp_path / "run")[-1]


def test_a_reward_that_fails_at_the_first_evaluation_resumes_from_the_start(whole, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setitem(rewards.REWARDS, "shapes", rewards.Entry(explode))
        assert run_main("grpo", *options(tmp_path / "run", 4)) == 1
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    assert run_main("grpo", "--resume", tmp_path / "run") == 0
    assert_same_run(whole, tmp_path / "run")


# ---------------------------------------------------------------- gradients that are not finite


def spoil(monkeypatch, which):
    """Make the gradients of those updates NaN, counted from 1."""
    original, calls = common.Policy.clip_gradients, []

    def clip_gradients(self, max_norm):
        calls.append(1)
        if len(calls) in which:
            self.parameters[3].grad[0] = torch.nan
        return original(self, max_norm)

    monkeypatch.setattr(common.Policy, "clip_gradients", clip_gradients)


def test_updates_without_a_finite_gradient_are_skipped_and_counted(monkeypatch, tmp_path):
    spoil(monkeypatch, {2, 3, 4, 5})  # four in a row are borne
    assert run_main("grpo", *options(tmp_path / "run", 4)) == 0
    assert [line.get("skipped_updates") for line in metrics(tmp_path / "run")] == [None, 1, 3, 4, 4]
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()  # which is not JSON
    tensors = [value for _, value in state(tmp_path / "run") if isinstance(value, torch.Tensor)]
    assert all(tensor.isfinite().all() for tensor in tensors)
    assert dict(state(tmp_path / "run"))[".optimizer.state.0.step"] == 4


def test_five_in_a_row_stop_the_run_and_it_is_saved(whole, monkeypatch, tmp_path, capsys):
    capsys.readouterr()
    with monkeypatch.context() as patch:
        spoil(patch, {3, 4, 5, 6, 7})  # the last of iteration 4 would be fine again
        assert run_main("grpo", *options(tmp_path / "run", 9)) == 1
    assert "5 updates in a row" in one_error(capsys)
    assert dict(state(tmp_path / "run"))[".counters.iteration"] == 4
    assert metrics(tmp_path / "run")[-1]["skipped_updates"] == 5
    assert run_main("grpo", "--resume", tmp_path / "run", "--iterations", 5) == 0


# ---------------------------------------------------------------- files


def test_a_checkpoint_that_is_cut_or_foreign_is_one_line(monkeypatch, tmp_path, capsys):
    run = tmp_path / "run"
    assert run_main("grpo", *options(run, 1)) == 0
    assert run_main("grpo", *options(tmp_path / "other", 1, "--lora-rank", 2)) == 0
    whole = (run / "checkpoint.pt").read_bytes()
    evil = tmp_path / "evil.pt"
    torch.save({"lora": Path("a pickled object")}, evil)  # weights_only refuses what could run code
    contents = [whole[:0], whole[:100], whole[: len(whole) // 2], whole[:-1], b"text", evil.read_bytes()]
    contents.append((tmp_path / "other" / "checkpoint.pt").read_bytes())
    for content in contents:
        (run / "checkpoint.pt").write_bytes(content)
        before = (run / "metrics.jsonl").read_bytes(), (run / "config.json").read_bytes()
        capsys.readouterr()
        assert run_main("grpo", "--resume", run, "--iterations", 2) == 2
        assert "checkpoint.pt cannot be resumed from" in one_error(capsys)
        assert before == ((run / "metrics.jsonl").read_bytes(), (run / "config.json").read_bytes())
        assert (run / "checkpoint.pt").read_bytes() == content  # what is there is left as it is


@pytest.mark.parametrize("tail", ['{"iteration": 3, "rew', '{"iteration": 3}\n{"it', "\0\0\0", "17\n", "\udcff"])
def test_half_a_last_line_of_metrics(tail, whole, monkeypatch, tmp_path):
    run = tmp_path / "run"
    assert run_main("grpo", *options(run, 2)) == 0
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(tail.encode(errors="surrogateescape"))
    assert run_main("grpo", "--resume", run, "--iterations", 4) == 0
    assert_same_run(whole, run)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission(monkeypatch, tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert run_main("grpo", *options(tmp_path / "run", 1)) == 2
    assert "cannot be written" in one_error(capsys)


def test_a_folder_without_write_permission_as_the_system_tells_it(monkeypatch, tmp_path, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(common.os, "access", lambda *a: False)
        assert run_main("grpo", *options(tmp_path / "run", 1)) == 2
    assert "cannot be written" in one_error(capsys) and not (tmp_path / "run").exists()


def test_a_full_disk(whole, monkeypatch, tmp_path, capsys):
    """The limit on a file's size stands for it: the third save does not fit. Then there is room again."""
    run, saves, original = tmp_path / "run", [], common.save_checkpoint

    def save(*args):
        saves.append(args)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if len(saves) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            original(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(common, "save_checkpoint", save)
        patch.setattr(common.Run, "__exit__", lambda self, *error: self.lock.close())  # as if that failed too
        assert run_main("grpo", *options(run, 4, "--save-every", 1)) == 1
    assert "File too large" in one_error(capsys)
    no_half_files(run)
    assert dict(state(run))[".counters.iteration"] == 2
    assert run_main("grpo", "--resume", run) == 0
    assert_same_run(whole, run)


@pytest.mark.parametrize("what, owner, name", [("metrics", "Log", "write"), ("lora", "Policy", "save_lora")])
def test_a_full_disk_elsewhere(what, owner, name, whole, monkeypatch, tmp_path, capsys):
    run, calls = tmp_path / "run", []
    owner = getattr(common, owner)
    original = getattr(owner, name)

    def full(*args, **kwargs):
        calls.append(args)
        if what == "lora":
            raise SafetensorError("No space left")
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left")
        return original(*args, **kwargs)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        assert run_main("grpo", *options(run, 4, "--save-every", 1)) == 1
    assert "No space left" in one_error(capsys)
    assert run_main("grpo", "--resume", run) == 0
    assert_same_run(whole, run)


def test_two_runs_in_one_folder(monkeypatch, tmp_path, capsys):
    run = tmp_path / "run"
    assert run_main("grpo", *options(run, 1)) == 0
    with open(run / ".lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        before = (run / "config.json").read_bytes()
        capsys.readouterr()
        assert run_main("grpo", "--resume", run, "--iterations", 2) == 2
        assert "another process runs in" in one_error(capsys)
        assert before == (run / "config.json").read_bytes() and len(metrics(run)) == 2


# ---------------------------------------------------------------- signals


def wait_for(folder, lines, process=None):
    end = time.time() + 300
    while time.time() < end and (process is None or process.poll() is None):
        path = Path(folder) / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") >= lines:
            return
        time.sleep(0.02)
    raise AssertionError(f"{folder} did not get so far")


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_iteration_and_saves(number, status, monkeypatch, tmp_path):
    command = [sys.executable, str(ROOT / "grpo.py"), *map(str, options(tmp_path / "run", 500))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    wait_for(tmp_path / "run", 3, process)
    process.send_signal(number)
    _, error = process.communicate(timeout=300)
    assert process.returncode == status and "Traceback" not in error and "--resume" in error
    no_half_files(tmp_path / "run")
    done = dict(state(tmp_path / "run"))[".counters.iteration"]
    assert done == metrics(tmp_path / "run")[-1]["iteration"] >= 2
    assert run_main("grpo", "--resume", tmp_path / "run", "--iterations", done + 1) == 0
    assert run_main("grpo", *options(tmp_path / "whole", done + 1)) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_second_signal_stops_at_once(monkeypatch, tmp_path, whole):
    """It comes amid the updates of iteration 3: what is kept is the last checkpoint."""
    original, calls = common.Policy.clip_gradients, []

    def clip_gradients(self, max_norm):
        calls.append(1)
        if len(calls) == 6:  # the second of iteration 3: the first has moved the weights
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, max_norm)

    with monkeypatch.context() as patch:
        patch.setattr(common.Policy, "clip_gradients", clip_gradients)
        assert run_main("grpo", *options(tmp_path / "run", 4, "--save-every", 2)) == 130
    assert dict(state(tmp_path / "run"))[".counters.iteration"] == 2
    assert run_main("grpo", "--resume", tmp_path / "run") == 0
    assert_same_run(whole, tmp_path / "run")


def child(script, options):
    """In a process that forked from one which has all imports behind it."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.exit(run_main(script, *options))


@slow
def test_twenty_kills_at_random_moments(tmp_path, monkeypatch):
    """SIGKILL while it loads, evaluates, samples, updates, saves; resumed each time, the run ends as if left alone."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    numbers, kills, finished, at = random.Random(0), 0, [], []

    def start(*words):
        process = context.Process(target=child, args=("grpo", words))
        process.start()
        return process

    arguments = ["--save-every", "2", "--eval-every", "3"]
    assert_ended(start(*options(tmp_path / "first", 10, *arguments)))  # the fork server has its imports now
    begun = time.time()
    assert_ended(start(*options(tmp_path / "whole", 10, *arguments)))
    length = time.time() - begun
    while kills < 20:
        run = tmp_path / f"run{len(finished)}"
        resuming = (run / "config.json").exists()
        process = start("--resume", run) if resuming else start(*options(run, 10, *arguments))
        process.join(numbers.uniform(0.0, 0.9) * length)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            at.append(len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else -1)
            if (run / "checkpoint.pt").exists():
                state(run)  # readable, always
        else:
            assert process.exitcode == 0
            finished.append(run)
    last = tmp_path / f"run{len(finished)}"
    resuming = (last / "config.json").exists()
    assert_ended(start("--resume", last) if resuming else start(*options(last, 10, *arguments)))
    print("killed with so many lines of metrics:", at, "runs finished:", len(finished) + 1)
    for run in [*finished, last]:
        assert_same_run(tmp_path / "whole", run)
        no_half_files(run)


def assert_ended(process):
    process.join(600)
    assert process.exitcode == 0


# ---------------------------------------------------------------- rollout and training that disagree, a soak


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_ratio_off_one_before_any_update_is_a_warning(script, monkeypatch, tmp_path, capsys):
    original = common.Policy.velocity
    run = [*small(script), "--iterations", 2, "--eval-steps", 1]
    assert run_main(script, *run, "--output", tmp_path / "right") == 0
    assert capsys.readouterr().err.count("the ratio is off 1") == 0
    # like dropout
    faulty = lambda self, x, *a: original(self, x, *a) * (1.01 if torch.is_grad_enabled() else 1.0)  # noqa: E731
    monkeypatch.setattr(common.Policy, "velocity", faulty)
    assert run_main(script, *run, "--output", tmp_path / "wrong") == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "the ratio is off 1" in line]
    error = metrics(tmp_path / "wrong")[1]["ratio_first_error"]
    assert len(told) == 1 and told[0].startswith("warning: ") and f"{error:.1e}" in told[0] and error > 1e-4


@slow
def test_a_long_run_needs_no_more_memory_or_files(tmp_path):
    """300 iterations, with evaluations and saves: resident memory after the first 50 within 5%, files the same.

    Medians of the first and the last third are compared: what a look meets in the middle of a save is chance.
    """
    smallest = "--prompts-per-iteration 1 --group-size 2 --updates-per-iteration 1 --steps 2 --eval-steps 1"
    smallest += " --eval-seeds 1 --eval-every 25 --save-every 10 --micro-batch 2 --lora-rank 1 --iterations 300"
    command = [sys.executable, str(ROOT / "grpo.py"), *smallest.split(), "--output", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_for(tmp_path / "run", 51, process)
    memory, files = [], []
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            memory.append(int(status.split("VmRSS:")[1].split()[0]) / 1000)
            files.append(len(os.listdir(f"/proc/{process.pid}/fd")))
        except (OSError, IndexError):
            break  # it has just ended
        time.sleep(0.1)
    assert process.wait() == 0 and len(metrics(tmp_path / "run")) == 301
    print(f"memory {min(memory):.0f} to {max(memory):.0f} MB, files {min(files)} to {max(files)}")
    third = len(files) // 3
    assert third > 10 and statistics.median(memory[-third:]) < 1.05 * statistics.median(memory[:third])
    assert statistics.median(files[-third:]) <= statistics.median(files[:third])  # a save has some open, for a moment


def test_metrics_are_strict_json(tmp_path, monkeypatch):
    """What is logged is JSON in the strict sense, whatever the numbers."""
    monkeypatch.setattr(common, "run_config", lambda args: {})
    log = common.Log(SimpleNamespace(output=tmp_path, wandb=None), [])
    log.write({"iteration": 0, "a": math.nan, "b": [1.0, math.inf], "c": {"d": -math.inf}})
    assert (
        tmp_path / "metrics.jsonl"
    ).read_text() == '{"iteration": 0, "a": null, "b": [1.0, null], "c": {"d": null}}\n'
