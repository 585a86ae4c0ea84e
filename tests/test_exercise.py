"""The README's exercise, MixGRPO's sliding window as a patch of grpo.py, applies and is right."""

import importlib.util
import re
import shlex
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, gradients, metrics, parse, put_weights, relative_error
from test_gradients import OPTIONS, naive_logp
from test_readme import COMMANDS, README


@pytest.fixture(scope="module")
def mixgrpo(tmp_path_factory):
    """The patched script as a module, made by the README's own command."""
    folder = tmp_path_factory.mktemp("exercise")
    command = re.search(r"^cp grpo.py mixgrpo.py && .*git apply$", README, re.M).group(0)
    for name in ("README.md", "grpo.py"):
        (folder / name).write_text((ROOT / name).read_text("utf-8"), "utf-8")
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "mixgrpo.py").read_text("utf-8") != (ROOT / "grpo.py").read_text("utf-8")
    spec = importlib.util.spec_from_file_location("mixgrpo", folder / "mixgrpo.py")
    module = sys.modules["mixgrpo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mixgrpo"]


def test_window_moves_and_begins_again(mixgrpo):
    got = [mixgrpo.window_steps([0, 1, 2, 3], 2, iteration, 3) for iteration in range(1, 13)]
    assert got == [[0, 1]] * 3 + [[1, 2]] * 3 + [[2, 3]] * 3 + [[0, 1]] * 3


def test_the_window_is_what_is_random_and_trained(mixgrpo, record):
    """The gradient of each iteration is the naive one on its window; counted as the README says."""
    options = "--iterations 3 --sde-steps all --sde-steps-per-iteration 2 --window-every 1".split()
    seen = record(mixgrpo, *OPTIONS, *options)
    for iteration, window in enumerate(([0, 1], [1, 2], [2, 3])):
        (*_, chosen), _ = rollout = seen.rollouts[iteration]
        assert chosen == window
        weights, got = seen.updates[2 * iteration]
        put_weights(seen.policy, weights)
        advantage = seen.advantages[iteration][1][0].flatten().double()
        logp = [advantage[n] * naive_logp(seen.policy, rollout, k, n) for n in range(4) for k in range(2)]
        assert relative_error(got, gradients(seen.policy, -torch.stack(logp).mean())) < 1e-10
    for line in metrics(seen.folder)[1:]:
        assert line["ratio_first_error"] < 1e-10
        # rollout: 8 images x 5 steps; training: 8 images x the window's 2 steps, a backward counts as two
        assert line["velocity_evals"] == line["iteration"] * (8 * 5 + 3 * 8 * 2)


def test_the_command_of_the_readme_parses(mixgrpo):
    (command,) = [command for command in COMMANDS if "mixgrpo.py" in command]
    args = parse("mixgrpo", *shlex.split(command)[2:])
    assert (args.script, args.sde_steps, args.sde_steps_per_iteration) == ("mixgrpo", "all", 4)
    assert (args.sde, args.noise_level) == ("flow", 0.7)


def test_a_window_that_does_not_fit_is_one_line(mixgrpo, record):
    with pytest.raises(SystemExit, match="--sde-steps-per-iteration"):
        record(mixgrpo, "--iterations", "1", "--sde-steps-per-iteration", "5")
