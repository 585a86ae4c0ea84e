"""The README's worked exercise, MixGRPO's sliding window as a patch of grpo.py: it applies, and does what it says."""

import importlib.util
import re
import subprocess

import common
from conftest import ROOT, gradients, metrics, put_weights, relative_error
from test_gradients import OPTIONS, clipped, naive_logp
from test_readme import README

import pytest
import torch


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
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_window_moves_and_begins_again(mixgrpo):
    got = [mixgrpo.window_steps(iteration, 2, 3, 4).tolist() for iteration in range(1, 13)]
    assert got == [[0, 1]] * 3 + [[1, 2]] * 3 + [[2, 3]] * 3 + [[0, 1]] * 3


def test_steps_outside_the_window_are_the_odes(mixgrpo, record):
    options = "--iterations 3 --updates-per-iteration 2 --window 2 --window-every 1".split()
    seen = record(mixgrpo, *options)
    for iteration, window in enumerate(([0, 1], [1, 2], [2, 3])):
        (_, text, owner, _, sigmas, *_), (x, x_next, _, _) = seen.rollouts[iteration]
        put_weights(seen.policy, seen.updates[2 * iteration][0])
        for step in range(4):
            with torch.no_grad():
                rows = [part[owner] for part in text]
                velocity = seen.policy.family.predict(x[step], sigmas[step].double().expand(8), rows, 1.0)
            ode = x[step] - (sigmas[step] - sigmas[step + 1]).double() * velocity
            difference = (x_next[step] - ode).abs().max()
            assert difference > 0.05 if step in window else difference < 1e-6
    for line in metrics(seen.folder)[1:]:
        assert len(line["ratio_first_error_by_step"]) == 2 and line["ratio_first_error"] < 1e-12
        # rollout: 8 images x 5 steps; training: 8 images x the window's 2 steps, backward counts two
        assert line["velocity_evals"] == line["iteration"] * (8 * 5 + 3 * 8 * 2)


def test_gradient_is_that_of_grpo_on_the_window(mixgrpo, record):
    seen = record(mixgrpo, *OPTIONS, "--window", "2", "--window-every", "1")
    (_, text, owner, _, sigmas, s, *_), (x, x_next, old, _) = seen.rollouts[0]
    advantage = seen.advantages[0][1][0].flatten().double()
    for update, images in enumerate(torch.arange(8).view(2, 4)):
        weights, got = seen.updates[update]
        put_weights(seen.policy, weights)
        total = 0.0
        for n in images.tolist():
            for step in (0, 1):
                logp = naive_logp(seen.policy, text, owner, x, x_next[step, n], sigmas, s, step, n).mean()
                total = total + clipped(advantage[n], torch.exp(logp - old[step, n]), 2e-4) / (4 * 2)
        assert relative_error(got, gradients(seen.policy, total)) < 1e-6


@pytest.mark.parametrize("options", ["--window 0", "--window 5", "--window-every 0"])
def test_a_window_that_does_not_fit_is_one_line(mixgrpo, record, options):
    with pytest.raises(common.StopRun, match="--window is 1 to 4"):
        record(mixgrpo, "--iterations", "1", *options.split())
