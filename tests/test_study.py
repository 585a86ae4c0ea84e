"""The study: statistics, tables and figures on made-up runs; the committed runs and their page."""

import json
import math
import shutil
from dataclasses import asdict

import pytest
import torch
from torch.distributions import StudentT

import gcpo
import study
from conftest import parse

BASE, OTHER = "grpo flow 0.7 early", "grpo flow 0.7 all"


def made_up(folder, name, rewards):
    """A run per seed that goes from 0.5 straight to its reward at the budget, and on at the same pace."""
    records, need = study.read_runs(folder), study.BUDGET / study.evals_of(name)  # iterations
    for seed, reward in rewards.items():
        text, key = "", study.key_of(name, seed)
        for n in range(0, math.ceil(need / 10) * 10 + 1, 10):
            line = {"iteration": n, "images": 96 * n, "seconds": n, "eval/shapes": 0.5}
            text += json.dumps(line | {"eval_reward": 0.5 + (reward - 0.5) * n / need}) + "\n"
        (folder / f"{key}.jsonl").write_text(text)
        records[key] = {"command": study.command(name, seed)}
    (folder / "runs.json").write_text(json.dumps(records))


@pytest.mark.parametrize("freedom", study.T_QUANTILE)
def test_quantiles_of_student_t(freedom):
    """The density, integrated from 0 to the quantile, is 47.5%."""
    x = torch.linspace(0, study.T_QUANTILE[freedom], 200001, dtype=torch.float64)
    density = StudentT(torch.tensor(float(freedom), dtype=torch.float64)).log_prob(x).exp()
    assert torch.trapezoid(density, x).item() == pytest.approx(0.475, abs=2e-5)


def test_an_effect_is_of_pairs_and_the_verdict_of_its_interval(tmp_path):
    """Differences of the common seeds, 0.02, 0.06 and 0.10: mean 0.06, half width 4.303 * 0.04 / sqrt(3)."""
    made_up(tmp_path, BASE, {0: 0.62, 1: 0.66, 2: 0.70, 3: 0.99})
    made_up(tmp_path, OTHER, {0: 0.60, 1: 0.60, 2: 0.60, 4: 0.10})
    runs = study.load(tmp_path)
    found = study.effect(runs, study.Row(BASE, OTHER), range(5))
    mean, half = study.mean_interval(found)
    assert (mean, half) == (pytest.approx(0.06), pytest.approx(4.303 * 0.04 / 3**0.5))
    half_way = study.effect(runs, study.Row(BASE, OTHER), range(5), averaged=True)
    assert half_way == pytest.approx([0.01, 0.03, 0.05])  # of straight lines that begin together
    assert study.words(half_way, "+") == "+0.030 ± 0.050" and study.words(half_way[:2]) == "0.010, 0.030"
    assert study.verdict("better", found) == "inconclusive"
    narrow = [0.059, 0.06, 0.061]
    assert study.verdict("better", narrow) == "holds"
    assert study.verdict("better", [-1, -1.1, -1.2]) == "does not hold"
    assert study.verdict("better", [0.5]) == "inconclusive" and study.verdict("better", []) == "not run"
    with pytest.raises(ValueError):  # a run is not extrapolated
        study.value_at(BASE, runs[BASE, 0], cost=2 * study.BUDGET)


@pytest.mark.parametrize(("name", "seed"), dict(study.jobs()).items())
def test_a_command_is_valid_and_reaches_the_budget(name, seed):
    _, script, *options = study.command(name, seed).split()
    script = script.removesuffix(".py")
    if script != "mixgrpo":  # which the exercise of the README makes
        settings = asdict(parse(script, *options, "--output", "runs/none"))
        assert settings["iterations"] * study.evals_of(name) >= study.BUDGET
        assert study.run_of({"script": script, "command": "", "settings": settings}) == (name, seed)


@pytest.mark.parametrize("script", study.DEFAULT)
def test_committed_runs_with_defaults_have_the_defaults(script):
    """If they are committed: the command of the row means what the name of the script alone means."""
    if (study.DEFAULT[script], 0) not in study.load():
        pytest.skip("not run yet")
    options = study.command(study.DEFAULT[script], 0).split()[2:]
    one, other = parse(script, *options, "--output", "runs/none"), parse(script, "--output", "runs/none")
    if script == "gcpo":  # halves of five steps are 2,3
        assert gcpo.parse_chunks(one, range(5), 5) == gcpo.parse_chunks(other, range(5), 5)
        one.chunks = other.chunks
    assert one == other


def test_a_run_folder_is_added(tmp_path):
    """What is kept of a run. One that is unfinished, or has an option that no row has, is refused."""
    options = "--sde flow --noise-level 0.7 --learning-rate 7e-4 --iterations 160 --output runs/none".split()
    config = {"script": "grpo", "settings": asdict(parse("grpo", *options)), "versions": {}, "commit": None}
    line = {"reward/shapes": 0.1, "train_s": 1.0, "grad_norm": 0.123456789, "clip_by_step": [0.0]}
    lines = [
        line | {"iteration": n} | ({} if n % 10 else {"eval_reward": 0.6, "eval/shapes": 0.6})
        for n in range(161)
    ]

    def add(command, lines, commit="hash"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"command": command}))
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        study.add(tmp_path, tmp_path / "curves", commit)

    for bad in (("grpo.py --lora-rank 3", lines), ("grpo.py", lines[:-1]), ("grpo.py", lines, None)):
        with pytest.raises(SystemExit):
            add(*bad)
    add("grpo.py --resume folder", lines)
    kept = {"grad_norm": 0.12346, "eval_reward": 0.6}
    wanted = [kept | {"iteration": n, "seconds": n + 1} for n in range(0, 161, 10)]
    assert study.load(tmp_path / "curves") == {(BASE, 0): wanted}
    assert study.read_runs(tmp_path / "curves")[study.key_of(BASE, 0)]["commit"] == "hash"


SLOW = ("decided", "way")  # figures that sample with the tiny model


@pytest.mark.parametrize("seeds", [0, 1, 3])
def test_an_incomplete_study_has_a_page_and_figures(tmp_path, seeds):
    for name in dict(study.jobs()) if seeds else ():
        made_up(tmp_path, name, {seed: 0.7 + 0.02 * seed for seed in range(seeds)})
    study.page(tmp_path, [name for name in study.FIGURES if name not in SLOW or seeds == 1])
    text = (tmp_path / "README.md").read_text("utf-8")
    assert ("not run" in text) == (seeds == 0) and "{" not in text and "nan" not in text
    assert len(list(tmp_path.glob("*.png"))) == len(study.FIGURES) - len(SLOW) * (seeds != 1)


def test_committed_runs_and_page_agree(tmp_path):
    """Every line of runs.json has its file; the page is the one that they make."""
    runs, files = study.load(), {path.stem for path in study.CURVES.glob("*.jsonl")}
    assert {study.key_of(*job) for job in runs} <= files == set(study.read_runs())
    for (name, _), lines in runs.items():
        assert lines[-1]["iteration"] * study.evals_of(name) >= study.BUDGET
    shutil.copytree(study.CURVES, tmp_path / "curves")
    study.page(tmp_path / "curves", ())
    assert (tmp_path / "curves" / "README.md").read_text() == (study.CURVES / "README.md").read_text()
