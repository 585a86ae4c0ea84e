"""The study: runs are kept, stopped and continued; tables, intervals and verdicts are right, on made-up metrics."""

import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import common
import gcpo
import study
from conftest import ROOT, SCRIPTS, metrics, small

import pytest
import torch
from PIL import Image
from torch.distributions import StudentT

PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = [".", "tests"]
import study
study.RUNS["grpo"] = study.Row("grpo", sys.argv[1], study.BUDGET // 10)  # ten iterations
sys.exit(study.run_study([("grpo", 0)], 2, Path(sys.argv[2], "work"), Path(sys.argv[2], "curves")))
"""


def begin(folder, *options):
    line = [sys.executable, "-c", PROGRAM, " ".join(["grpo", *small("grpo"), *options]), str(folder)]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_study_is_stopped_and_continued(tmp_path, monkeypatch):
    process = begin(tmp_path / "stopped")
    log = tmp_path / "stopped" / "work" / "grpo-0" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (log.exists() and len(log.read_text().splitlines()) > 2):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130 and "the same command goes on" in errors and "Traceback" not in errors
    assert not (tmp_path / "stopped" / "curves" / "grpo-0.jsonl").exists()
    for process in [begin(tmp_path / name) for name in ("stopped", "whole")]:
        assert "1 to do" in process.communicate(timeout=600)[0] and process.returncode == 0
    work, curves = tmp_path / "stopped" / "work", tmp_path / "stopped" / "curves"
    assert study.read_runs(curves)["grpo-0"]["resumed"] == 1
    stopped, whole = (metrics(tmp_path / name / "work" / "grpo-0", times=False) for name in ("stopped", "whole"))
    assert stopped == whole and len(whole) == 11
    timed = sum(value for line in metrics(work / "grpo-0") for key, value in line.items() if key.endswith("_s"))
    assert study.read_runs(curves)["grpo-0"]["seconds"] == round(timed)
    shutil.copytree(work / "grpo-0", work / "grpo-1")
    study.keep("grpo", 1, work, curves)
    for seed in (0, 1):
        text = (curves / f"grpo-{seed}.jsonl").read_text()
        first, last = (json.loads(line) for line in text.splitlines())
        assert first["iteration"] == 0 and last["iteration"] == 10
        for key, value in last.items():
            if isinstance(value, float):
                assert value == pytest.approx(whole[10][key], rel=1e-4) and value == float(f"{value:.5g}")
        assert {"eval_reward", "images", "grad_norm"} <= last.keys()
        assert not any(key.endswith("_s") or "/" in key for key in last)
        assert ("ratio_first_error_by_step" in last) == (seed == 0)
    monkeypatch.setitem(study.RUNS, "grpo", study.Row("grpo", " ".join(["grpo", *small("grpo")]), study.BUDGET // 10))
    assert list(study.load(curves)["grpo"]) == [0]  # it is not made again; the copy has another seed's settings


def test_a_run_that_fails_is_told(tmp_path):
    process = begin(tmp_path, "--sde-steps", "99")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "status 2" in out and "--sde-steps 99" in out
    assert "Traceback" not in errors and not (tmp_path / "curves").exists()


@pytest.mark.parametrize("options", ["--only nonsense", "--jobs 0"])
def test_what_cannot_be_run_is_one_line(options):
    line = [sys.executable, "tests/bench.py", "curves", *options.split()]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode in (1, 2) and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


# ---------------------------------------------------------------- which runs there are


def test_the_most_wanted_come_first():
    jobs = study.jobs_of(5)
    assert jobs[:15] == [(script, seed) for seed in range(5) for script in SCRIPTS]
    assert len(jobs) == len(set(jobs)) == 5 * 19 + 21 * 2
    named = [name for name, _ in jobs]
    for earlier, later in [("gcpo", "grpo-all"), ("gcpo-one-chunk", "tempflow-early"), ("tempflow-early", "grpo-17")]:
        assert max(n for n, name in enumerate(named) if name == earlier) < named.index(later)
    for sde in study.NOISE:  # which is to be known by then
        assert named.index(f"grpo-{sde}") > max(n for n, name in enumerate(named) if name.startswith(f"tuning-{sde}"))
    assert {seed for name, seed in jobs if name.startswith("tuning")} == {10, 11}


@pytest.mark.parametrize("name", study.RUNS)
def test_a_command_is_valid_and_passes_the_budget(name):
    """The evaluations of an iteration, from the settings that the command means, by the counts of the algorithms."""
    args, row = SimpleNamespace(**study.settings_of(name, 0)[0]), study.RUNS[name]
    steps, K = common.parse_sde_steps(args)
    T, P = args.steps, args.prompts_per_iteration
    if row.line.startswith("tempflow_grpo"):
        trunks = P * args.seeds_per_prompt
        evals = trunks * ((K + 3 * K) + args.branches * sum(T - 1 - step for step in steps))
    else:
        N, trained, forwards = P * args.group_size, K, 0
        if row.line.startswith("gcpo"):
            sizes = gcpo.parse_chunks(args, steps, K) or [3, 3, 3]
            trained = K * math.floor(args.chunk_fraction * len(sizes) + 0.5) / len(sizes)  # each chunk as often
            forwards = trained / 2  # of the second half of the images
        evals = N * (T + 3 * trained + forwards)
    assert row.evals == pytest.approx(evals, rel=0.05 if getattr(args, "chunks", "") == "adaptive" else 1e-9)
    assert args.eval_every == 10 and args.iterations % 10 == 0 and args.iterations * row.evals >= study.BUDGET
    if name in SCRIPTS:  # these run to the end of their defaults
        assert args.learning_rate == float(study.RATES[name][1])
    else:
        assert (args.iterations - 10) * row.evals < study.BUDGET
    assert study.command(name, 3).endswith("--seed 3")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_changed_default_is_noticed(script, tmp_path, monkeypatch):
    """A finished run does not count any more, one in progress is begun anew; with a default put back both go on."""
    started = []
    monkeypatch.setattr(study.subprocess, "Popen", lambda line, **more: started.append(line))
    made_up(tmp_path, script, {0: 0.6})
    settings, prompts = study.settings_of(script, 0)
    folder = tmp_path / "work" / f"{script}-0"
    folder.mkdir(parents=True)
    config = {"settings": settings | {"output": str(folder)}, "prompts_sha256": prompts}
    (folder / "config.json").write_text(json.dumps(config))
    assert list(study.load(tmp_path)[script]) == [0]
    study.start(script, 0, tmp_path / "work")
    assert started[-1][2:] == ["--resume", str(folder)] and folder.exists()
    monkeypatch.setitem(importlib.import_module(script).DEFAULTS["tiny"], "clip_range", 0.7)
    assert list(study.load(tmp_path)[script]) == []
    study.start(script, 0, tmp_path / "work")
    assert started[-1][-2:] == ["--output", str(folder)] and "--resume" not in started[-1] and not folder.exists()
    study.report(tmp_path)
    assert f"- `{script}`: seeds 0 (made with other settings), 1, 2, 3, 4" in (tmp_path / "README.md").read_text()


def test_a_fingerprint_is_of_what_decides_the_numbers():
    settings = {"learning_rate": 1e-3, "kl_coef": 0.0, "device": "cpu", "output": "here", "prompts": "/a/file"}
    same = settings | {"device": "cuda", "output": "there", "prompts": "/another", "save_every": 3, "new_option": False}
    print_of = study.fingerprint(settings, ["hash"])
    assert study.fingerprint(same, ["hash"]) == print_of
    for other in ({"learning_rate": 2e-3}, {"kl_coef": 0.1}, {"learning_rate": 0}, {"new_option": True}):
        assert study.fingerprint(settings | other, ["hash"]) != print_of
    assert study.fingerprint(settings, ["another"]) != print_of


# ---------------------------------------------------------------- what came out, on made-up metrics


def made_up(folder, name, rewards):
    """Files of a run: from 0.5 at no cost straight to {seed: reward} at BUDGET, with 5 images for 100 evaluations."""
    folder.mkdir(exist_ok=True)
    runs = study.read_runs(folder)
    for seed, reward in rewards.items():
        lines = [{"iteration": 0, "eval_reward": 0.5}]
        for n in (0.5, 1.25):
            cost = int(n * study.BUDGET)
            reached = 0.5 + n * (reward - 0.5)
            lines.append({"iteration": n, "eval_reward": reached, "velocity_evals": cost, "images": cost // 20})
        (folder / f"{name}-{seed}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        settings = study.fingerprint(*study.settings_of(name, seed))
        runs[f"{name}-{seed}"] = {"command": study.command(name, seed), "settings": settings}
    (folder / "runs.json").write_text(json.dumps(runs))


def row_of(table, name, other=""):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    (row,) = [row for row in rows if row[0] == f"`{name}`" and row[3] == (f"`{other}`" if other else "")]
    return dict(zip(rows[0], row))


def test_tables_from_files(tmp_path):
    """Rewards 0.7 and 0.7 +- 0.02 with three seeds: the half width is t 0.02 / sqrt(3), t = 4.303 with two degrees."""
    made_up(tmp_path, "grpo", {0: 0.68, 1: 0.70, 2: 0.72, 3: 0.74})
    made_up(tmp_path, "gcpo", {0: 0.66, 1: 0.64, 2: 0.62})
    made_up(tmp_path, "tempflow_grpo", {0: 0.781, 1: 0.80, 2: 0.819})
    made_up(tmp_path, "tempflow-unweighted", {0: 0.80, 1: 0.80, 2: 0.80})
    made_up(tmp_path, "tempflow-early", {2: 0.85})
    runs = study.read_runs(tmp_path)
    runs["gcpo-0"]["seconds"] = 300  # to the end, which is 1.25 times the budget
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    found = study.tables(tmp_path)
    assert list(found) == list(study.TABLES)
    assert row_of(found["noise"], "grpo")["held-out reward"] == "0.710 ± 0.041"  # 3.182 0.02582 / 2
    gcpo_row = row_of(found["main"], "gcpo", "grpo")
    assert gcpo_row["held-out reward"] == "0.640 ± 0.050"  # 4.303 0.02 / 1.732 = 0.0497
    # of the seeds that both have: -0.02, -0.06, -0.10, so -0.06 with a std of 0.04
    assert gcpo_row["difference, same seeds"] == "-0.060 ± 0.099" and gcpo_row["seeds"] == "3"
    assert gcpo_row["verdict"] == "cannot be told" and gcpo_row["images scored"] == f"{study.BUDGET / 20:,.0f}"
    assert gcpo_row["seconds on one core"] == "240"
    # 10,000 images are 200,000 evaluations: 0.5 + (0.64 - 0.5) 200 / 360, with an interval 200 / 360 as wide
    assert gcpo_row["reward at 10,000 images"] == "0.578 ± 0.028"
    tempflow = row_of(found["main"], "tempflow_grpo", "grpo")
    assert tempflow["difference, same seeds"] == "+0.100 ± 0.002" and tempflow["verdict"] == "holds"
    assert tempflow["seconds on one core"] == "missing"
    unweighted = row_of(found["TempFlow-GRPO"], "tempflow-unweighted", "tempflow_grpo")
    assert unweighted["difference, same seeds"] == "+0.000 ± 0.047" and unweighted["verdict"] == "cannot be told"
    early = row_of(found["TempFlow-GRPO"], "tempflow-early", "tempflow_grpo")  # one seed has no interval
    assert early["held-out reward"] == "0.850" and early["difference, same seeds"] == "+0.031"
    assert early["verdict"] == "cannot be told" and early["seeds"] == "1"
    prompt = row_of(found["TempFlow-GRPO"], "tempflow-prompt-group", "tempflow_grpo")
    assert prompt["held-out reward"] == prompt["difference, same seeds"] == prompt["verdict"] == "missing"
    assert row_of(found["TempFlow-GRPO"], "tempflow_grpo", "grpo-all")["difference, same seeds"] == "missing"
    assert row_of(found["main"], "grpo")["difference, same seeds"] == ""


def test_the_page_tells_what_is_missing(tmp_path):
    made_up(tmp_path, "grpo", {0: 0.68, 3: 0.70})
    made_up(tmp_path, "tuning-cps-0.65", {10: 0.7, 11: 0.7})
    study.report(tmp_path)
    page, found = (tmp_path / "README.md").read_text(), study.tables(tmp_path)
    assert "from 4 runs" in page and all(table in page for table in found.values())
    missing = page.split("## Missing")[1].split("##")[0]
    assert "- `grpo`: seeds 1, 2, 4\n" in missing and "- `gcpo`: seeds 0, 1, 2, 3, 4\n" in missing
    assert "tuning-cps-0.65" not in missing
    assert all(f"`{study.command(name, 'S')}`" in page for name in study.RUNS)
    assert max(map(len, page.split("| run")[0].splitlines())) <= 120 and "GCPO 0.589" in " ".join(page.split())


@pytest.mark.parametrize(
    ("claim", "differences", "says"),
    [
        ("better", [0.1, 0.11, 0.12], "holds"),
        ("worse", [0.1, 0.11, 0.12], "does not hold"),
        ("worse: no weights", [-0.1, -0.11, -0.12], "holds"),
        ("better", [-0.1, -0.11, -0.12], "does not hold"),
        ("better", [0.1, 0.11, -0.12], "cannot be told"),
        ("better", [0.01, 0.02], "cannot be told"),  # 0.015 +- 12.706 0.005
        ("better", [0.5], "cannot be told"),
        ("better", [], "missing"),
        ("", [0.1, 0.11, 0.12], ""),
    ],
)
def test_a_verdict_is_of_the_interval(claim, differences, says):
    assert study.verdict(claim, differences) == says


@pytest.mark.parametrize("freedom", study.T_QUANTILE)
def test_quantiles_of_student_t(freedom):
    """The density, integrated from 0 to the quantile, is 47.5%."""
    x = torch.linspace(0, study.T_QUANTILE[freedom], 200001, dtype=torch.float64)
    density = StudentT(torch.tensor(float(freedom), dtype=torch.float64)).log_prob(x).exp()
    assert torch.trapezoid(density, x).item() == pytest.approx(0.475, abs=2e-5)


def test_a_run_that_ended_early_is_not_extrapolated():
    lines = [{"eval_reward": 0.5}, {"eval_reward": 0.6, "velocity_evals": 200, "images": 30}]
    assert study.at(lines, 150) == pytest.approx(0.575) and study.at(lines, 10, "images") == pytest.approx(
        0.5333, abs=1e-4
    )
    with pytest.raises(ValueError, match="ended at 200"):
        study.at(lines, 201)


def test_figures_are_drawn(tmp_path):
    """With runs there are coloured lines, without none; seeds that differ have lines of their own."""

    def colours(name):
        saturation = Image.open(tmp_path / name).convert("HSV").getchannel(1)
        return sum(saturation.histogram()[20:])

    study.plot(tmp_path)
    assert colours("curves.png") == colours("ablations.png") == 0
    made_up(tmp_path, "grpo", {0: 0.7})
    study.plot(tmp_path)
    line = colours("curves.png")
    assert line > 500 and colours("ablations.png") > 200  # grpo's is a line of the table of noise as well
    made_up(tmp_path, "grpo", {0: 0.7, 1: 0.8, 2: 0.75})
    study.plot(tmp_path)
    assert colours("curves.png") > 1.5 * line


# ---------------------------------------------------------------- the committed runs, as many as there are


def test_committed_runs_pass_the_budget_at_the_cost_that_is_told():
    for name, seeds in study.load().items():
        for lines in seeds.values():
            last = lines[-1]
            assert lines[0]["iteration"] == 0 and last["velocity_evals"] >= study.BUDGET
            assert last["velocity_evals"] / last["iteration"] == pytest.approx(study.RUNS[name].evals, rel=0.03)
            assert last["images"] >= study.IMAGES or name not in SCRIPTS


def test_committed_noise_levels_are_the_best_of_the_tuning():
    runs = study.load()
    for sde, levels in study.NOISES.items():
        seeds = {level: runs[f"tuning-{sde}-{level}"].values() for level in levels}
        if all(len(lines) == 2 for lines in seeds.values()):
            means = {level: sum(map(study.at, lines)) / 2 for level, lines in seeds.items()}
            assert study.NOISE[sde] == max(means, key=means.get), f"{means}: set study.NOISE"


def test_the_committed_page_is_of_the_committed_runs(tmp_path):
    """Unless a study is in progress: then the page is of fewer runs."""
    page = (study.CURVES / "README.md").read_text("utf-8")
    if f" {sum(map(len, study.load().values()))} runs " not in page:
        pytest.skip("tests/curves/README.md is of fewer runs; python tests/bench.py curves --plot")
    shutil.copytree(study.CURVES, tmp_path / "curves", ignore=shutil.ignore_patterns("*.png", "*.md"))
    study.report(tmp_path / "curves")
    assert (tmp_path / "curves" / "README.md").read_text("utf-8") == page
