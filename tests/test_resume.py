"""Resume continues exactly; what would change the past is refused; what a crash leaves behind is resumed from."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, SCRIPTS, cli, here, metrics, small

LORA = "lora/pytorch_lora_weights.safetensors"
EXTRA = {"grpo": "--kl-coef 0.01", "gcpo": "--weighted-sampling", "tempflow_grpo": "--branch-steps 2"}


def same_weights(a, b):
    one, other = load_file(a / LORA), load_file(b / LORA)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("script", SCRIPTS)
def test_stopped_and_resumed_is_the_same_run(script, tmp_path):
    """6 iterations at once, and 3 and then 6: the same metrics, adapter, optimizer and EMA, bit for bit."""
    options = [*small(script), *EXTRA[script].split(), "--ema-decay", "0.9", "--eval-every", "2"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert here(script, *options, "--iterations", "6", "--output", whole).returncode == 0
    assert here(script, *options, "--iterations", "3", "--output", halves).returncode == 0
    with open(halves / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 4, "rew')  # half a last line
    done = here(script, "--resume", halves, "--iterations", "6")
    assert done.returncode == 0, done.stderr
    assert metrics(whole, times=False) == metrics(halves, times=False)
    assert same_weights(whole, halves)
    one, other = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, halves))
    assert one["counters"] == other["counters"] and one["iteration"] == other["iteration"] == 6
    for a, b in zip(one["optimizer"]["state"].values(), other["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert all(torch.equal(a, b) for a, b in zip(one["ema"]["shadow_params"], other["ema"]["shadow_params"]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("a red circle\ntwo blue squares\n")
    options = [*small("grpo"), "--prompts", prompts, "--iterations", "2", "--output", folder]
    assert here("grpo", *options).returncode == 0
    return folder


@pytest.mark.parametrize(
    "script, options, says",
    [
        ("grpo", "--learning-rate 0.5", "--learning-rate"),
        ("grpo", "--group-size 12", "--group-size"),  # the default, but not that run's
        ("grpo", "--seed 1", "--seed"),
        ("grpo", "--iterations 1", "--iterations"),
        ("gcpo", "", "grpo.py"),
    ],
)
def test_what_would_change_the_past_is_refused_by_name(finished, script, options, says):
    done = here(script, "--resume", finished, *options.split())
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0]


def damaged(finished, tmp_path, damage):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    damage(copy)
    return copy


def cut(folder):
    data = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(data[: len(data) // 2])


def foreign(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    state["lora"] = {key: torch.zeros(3) for key in state["lora"]}
    torch.save(state, folder / "checkpoint.pt")


def other_prompts(folder):
    config = json.loads((folder / "config.json").read_text())
    config["prompts_sha256"]["prompts"] = "0" * 64
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "damage, says", [(cut, "checkpoint.pt"), (foreign, "another model"), (other_prompts, "--prompts")]
)
def test_damaged_runs_are_told(finished, tmp_path, damage, says):
    done = here("grpo", "--resume", damaged(finished, tmp_path, damage), "--iterations", "3")
    assert done.returncode == 2 and says in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_another_version_of_torch_is_a_warning(finished, tmp_path):
    def older(folder):
        config = json.loads((folder / "config.json").read_text())
        config["versions"]["torch"] = "2.0.0"
        (folder / "config.json").write_text(json.dumps(config))

    done = here("grpo", "--resume", damaged(finished, tmp_path, older), "--iterations", "3")
    assert done.returncode == 0 and "warning: this run began with torch 2.0.0" in done.stderr


def start(script, *options, **kwargs):
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **kwargs)


def wait_for_line(folder, iteration, process):
    while process.poll() is None:
        if (folder / "metrics.jsonl").exists() and len((folder / "metrics.jsonl").read_text().splitlines()) > iteration:
            return
        time.sleep(0.05)
    raise AssertionError(process.stderr.read())


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_after_the_iteration_saved(number, status, tmp_path):
    process = start("grpo", *small("grpo"), "--iterations", "500", "--output", tmp_path / "run")
    wait_for_line(tmp_path / "run", 1, process)
    second = here("grpo", "--resume", tmp_path / "run")  # two in one folder
    assert (second.returncode == 2 and "another process" in second.stderr) or "checkpoint" in second.stderr
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in errors
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["iteration"] == metrics(tmp_path / "run")[-1]["iteration"] >= 1
    assert (tmp_path / "run" / LORA).exists()


def test_killed_at_twenty_moments_ends_with_the_same_weights(tmp_path):
    """SIGKILL at any moment; the run is resumed each time, or begun again where nothing was written yet."""
    options = [*small("grpo"), "--eval-prompts", tmp_path / "eval.txt", "--save-every", "1", "--iterations", "60"]
    (tmp_path / "eval.txt").write_text("a red circle\n")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.time()
    assert here("grpo", *options, "--output", whole).returncode == 0
    duration, rng, kills = time.time() - began, random.Random(0), 0
    while kills < 20:
        resume = (killed / "config.json").exists()
        process = start("grpo", *(["--resume", killed] if resume else [*options, "--output", killed]))
        # from before the first file to a little of training, so that 20 of them do not finish the run
        time.sleep(rng.uniform(0.5, 1.0) * min(duration, 7.0))
        if process.poll() is not None and process.returncode != 0:
            raise AssertionError(process.stderr.read())
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        for path in (killed / "metrics.jsonl", killed / LORA, killed / "checkpoint.pt"):
            if path.exists() and path.suffix == ".pt":
                torch.load(path, weights_only=True)
            elif path.exists() and path.suffix == ".safetensors":
                load_file(path)
    done = here("grpo", "--resume", killed)
    assert done.returncode == 0, done.stderr
    assert same_weights(whole, killed)
    assert metrics(whole, times=False) == metrics(killed, times=False)


REWARDS = """
import torch
calls = 0
def bad(images, prompts):
    global calls
    calls += 1
    scores = images.mean((1, 2, 3))
    if calls >= 6:
        {what}
    return scores
"""


@pytest.mark.parametrize(
    "what, says",
    [("scores[0] = float('nan')", "nan"), ("scores = scores[1:]", "shape"), ("raise KeyError('oops')", "KeyError")],
)
def test_a_reward_that_fails_in_the_midst_stops_the_run_saved(what, says, tmp_path):
    (tmp_path / "mine.py").write_text(REWARDS.format(what=what))
    spec = f"{tmp_path / 'mine.py'}:bad"
    done = cli("grpo", *small("grpo"), "--reward", spec, "--iterations", "9", "--output", tmp_path / "run")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: ") and "bad" in last and says in last, done.stderr
    assert any(prompt in last for prompt in (ROOT / "tests/tiny/prompts.txt").read_text().splitlines())
    assert "Traceback" not in done.stderr
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["iteration"] == metrics(tmp_path / "run")[-1]["iteration"] >= 1


def test_gradients_that_are_not_finite_are_skipped_and_five_in_a_row_stop(tmp_path):
    """A clip range cannot make them, so the learning rate does: weights so large that the velocity overflows."""
    options = ["--learning-rate", "10", "--iterations", "40", "--lora-alpha", "1000000", "--max-grad-norm", "1000000"]
    done = here("grpo", *small("grpo"), *options, "--dtype", "float16", "--output", tmp_path / "run")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "not finite" in done.stderr.splitlines()[-1]


def test_a_folder_that_cannot_be_written(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("root writes anywhere")
    done = cli("grpo", *small("grpo"), "--output", locked / "run")
    assert done.returncode == 2 and "cannot be written" in done.stderr


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stands(finished, tmp_path):
    """A limit on the size of files stands for the disk: the first save after it fails."""
    copy = damaged(finished, tmp_path, lambda folder: None)
    before = (copy / "checkpoint.pt").read_bytes()
    code = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000)); sys.argv = sys.argv[1:];"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(ROOT / "grpo.py"), "--resume", str(copy), "--iterations", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    assert (copy / "checkpoint.pt").read_bytes() == before
