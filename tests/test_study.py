"""The study behind the README's results: runs are kept, stopped and continued; intervals and tables are right."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import study
from conftest import ROOT, metrics, small

import pytest
import torch
from PIL import Image, ImageStat
from torch.distributions import StudentT

OPTIONS = " ".join(["--iterations 8", *small("grpo")])
PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
import study
study.RUNS["grpo"] = "grpo", sys.argv[1]
sys.exit(study.run_study([("grpo", 0), ("grpo", 1)], 2, Path(sys.argv[2], "work"), Path(sys.argv[2], "curves")))
"""


def start(folder, options=OPTIONS):
    line = [sys.executable, "-c", PROGRAM, options, str(folder)]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_study_is_stopped_and_continued(tmp_path):
    process = start(tmp_path / "stopped")
    log = tmp_path / "stopped" / "work" / "grpo-0" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (log.exists() and len(log.read_text().splitlines()) > 2):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130 and "the same command goes on" in errors and "Traceback" not in errors
    assert not (tmp_path / "stopped" / "curves" / "grpo-0.jsonl").exists()
    for folder in ("stopped", "whole"):
        process = start(tmp_path / folder)
        assert process.communicate(timeout=600) and process.returncode == 0
    runs = study.read_runs(tmp_path / "stopped" / "curves")
    assert runs["grpo-0"]["resumed"] == 1  # the other may not have come so far as to have a folder
    for seed in (0, 1):
        stopped, whole = (metrics(tmp_path / f / "work" / f"grpo-{seed}", times=False) for f in ("stopped", "whole"))
        assert stopped == whole
    kept = study.read_run("grpo", 0, tmp_path / "stopped" / "curves")
    assert len(kept) == 9 and kept[8]["eval_reward"] == pytest.approx(stopped_reward(tmp_path), rel=1e-4)
    process = start(tmp_path / "stopped")  # all is there
    assert "2 runs are there, 0 to do" in process.communicate(timeout=300)[0]


def stopped_reward(tmp_path):
    return metrics(tmp_path / "stopped" / "work" / "grpo-0")[8]["eval_reward"]


@pytest.mark.parametrize("options", ["--only nonsense", "--seeds 0", "--jobs 0", "--plot --seeds 9"])
def test_what_cannot_be_run_is_one_line(options):
    line = [sys.executable, "tests/bench.py", "curves", *options.split()]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_a_run_that_fails_is_told(tmp_path):
    process = start(tmp_path, "--iterations 0")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "--iterations" in out + errors and not (tmp_path / "curves").exists()


@pytest.mark.parametrize("freedom", study.T_QUANTILE)
def test_quantiles_of_student_t(freedom):
    """The density, integrated from 0 to the quantile, is 47.5%."""
    x = torch.linspace(0, study.T_QUANTILE[freedom], 200001, dtype=torch.float64)
    density = StudentT(torch.tensor(float(freedom), dtype=torch.float64)).log_prob(x).exp()
    assert torch.trapezoid(density, x).item() == pytest.approx(0.475, abs=2e-5)


def test_mean_and_interval():
    mean, half = study.mean_interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3))


def test_reward_at_a_cost_lies_between_two_evaluations(tmp_path):
    assert study.at_budget([0, 100, 200], [0.5, 0.6, 0.8], 150) == pytest.approx(0.7)
    with pytest.raises(ValueError, match="ended at 200"):
        study.at_budget([0, 100, 200], [0.5, 0.6, 0.8], 201)


def test_every_run_passes_the_budget_and_has_its_command_and_commit():
    runs = study.read_runs()
    assert {f"{script}-{seed}" for script in study.SCRIPTS for seed in range(5)} <= runs.keys()
    for key, run in runs.items():
        name, seed = key.rsplit("-", 1)
        assert run["command"] == study.command(name, int(seed)) and run["commit"] and run["machine"]
        cost, _ = study.curve(name, int(seed))
        assert cost[0] == 0 and cost[-1] >= study.BUDGET
        assert f"--iterations {study.read_run(name, int(seed))[-1]['iteration']} " in run["command"]


def test_the_study_has_every_run_and_no_other():
    assert study.read_runs().keys() == {f"{name}-{seed}" for name, seed in study.jobs_of(5)}
    assert study.LABELS.keys() == study.RUNS.keys()


def test_runs_outside_of_the_tables_are_in_the_readme_as_they_are():
    text = " ".join((ROOT / "README.md").read_text("utf-8").split())
    found = study.others()
    for name in ("gcpo-lr1e-3", "tempflow_grpo-lr2e-3", "tempflow-unweighted-lr2e-3", "tempflow-early-lr2e-3"):
        assert len(found[name]) in (3, 5) and "{:.3f} ± {:.3f}".format(*study.mean_interval(found[name])) in text
    for name in ("grpo-lr3e-3-clip1e-2", "gcpo-rounded-down-lr2e-3"):
        assert f"({found[name][0]:.3f}" in text


def test_rewards_at_a_cost_from_files(tmp_path):
    """Two seeds, written by hand: at 30 evaluations, 6 images or 3 seconds, the reward is as worked out beside."""
    for seed, (middle, end) in enumerate([(0.6, 0.8), (0.5, 0.9)]):
        lines = [
            {"iteration": 0, "eval_reward": 0.5, "eval_s": 9.0},
            {"iteration": 1, "velocity_evals": 10, "images": 2, "rollout_s": 0.5, "reward_s": 0.25, "train_s": 0.25},
            {"iteration": 2, "velocity_evals": 20, "images": 4, "rollout_s": 1.0, "eval_reward": middle, "eval_s": 9.0},
            {"iteration": 3, "velocity_evals": 40, "images": 8, "train_s": 2.0, "eval_reward": end, "eval_s": 9.0},
        ]
        (tmp_path / f"grpo-{seed}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "runs.json").write_text(json.dumps({"grpo-0": {}, "grpo-1": {}}))
    for axis, cost in (("velocity_evals", 30), ("images", 6), ("seconds", 3.0)):  # half way from middle to end
        assert study.rewards_at("grpo", cost, axis, tmp_path) == {0: pytest.approx(0.7), 1: pytest.approx(0.7)}
    assert study.rewards_at("grpo", 20, folder=tmp_path) == {0: 0.6, 1: 0.5}
    assert study.curve("grpo", 0, tmp_path, "seconds")[0] == [0.0, 2.0, 4.0]


def test_figures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    shutil.copytree(study.CURVES, tmp_path / "curves", ignore=shutil.ignore_patterns("*.png"))
    study.plot(tmp_path / "curves")
    for name in ("curves.png", "steps.png"):
        assert ImageStat.Stat(Image.open(tmp_path / "curves" / name).convert("L")).stddev[0] > 10
