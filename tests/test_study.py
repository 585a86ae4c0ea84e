"""The study: statistics and the search on made-up runs; the page against the committed runs."""

import json
import math
import re
import shutil
import subprocess
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
from torch.distributions import StudentT

import common
import study
import study_figures
from conftest import parse
from test_sampler import STDS_AT_THE_END

BASE, OTHER = "grpo flow 0.7 early", "grpo flow 0.7 all"
LINES = (study.CURVES / "runs.jsonl").read_text("utf-8").splitlines()
RUNS = {(run["name"], run["seed"]): run for run in map(json.loads, LINES)}


def made_up(folder, name, rewards):
    """Add a run per seed that goes from 0.5 straight to its reward at the budget, and on at the same pace."""
    need = study.BUDGET / study.evals_of(name)  # iterations
    with open(folder / "runs.jsonl", "a", encoding="utf-8") as file:
        for seed, reward in rewards.items():
            lines = []
            for n in range(0, min(999, math.ceil(need) + 10), 10):
                line = {"iteration": n, "images": 96 * n, "seconds": n, "eval/shapes": 0.5}
                lines.append(line | {"eval_reward": 0.5 + (reward - 0.5) * n / need})
            file.write(json.dumps({"name": name, "seed": seed, "evaluated": lines}) + "\n")
    return study.load(folder / "runs.jsonl")


@pytest.mark.parametrize("freedom", study.T_QUANTILE)
def test_quantiles_of_student_t(freedom):
    """The density, integrated from 0 to the quantile, is 47.5%."""
    x = torch.linspace(0, study.T_QUANTILE[freedom], 200001, dtype=torch.float64)
    density = StudentT(torch.tensor(float(freedom), dtype=torch.float64)).log_prob(x).exp()
    assert torch.trapezoid(density, x).item() == pytest.approx(0.475, abs=2e-5)  # quantiles have 3 digits


def test_an_effect_is_of_pairs_and_the_verdict_of_its_interval(tmp_path):
    """Differences of the common seeds, 0.02, 0.06 and 0.10: mean 0.06, half width 4.303 * 0.04 / sqrt(3)."""
    made_up(tmp_path, BASE, {0: 0.62, 1: 0.66, 2: 0.70, 3: 0.99})
    runs = made_up(tmp_path, OTHER, {0: 0.60, 1: 0.60, 2: 0.60, 4: 0.10})
    found = study.effect(runs, study.Row(BASE, OTHER), range(5))
    mean, half = study.mean_interval(found)
    assert (mean, half) == (pytest.approx(0.06), pytest.approx(4.303 * 0.04 / 3**0.5))
    half_way = study.effect(runs, study.Row(BASE, OTHER), range(5), averaged=True)
    assert half_way == pytest.approx([0.01, 0.03, 0.05])  # of straight lines that begin together
    assert study.words(half_way, "+") == "+0.030 ± 0.050" and study.words(half_way[:2]) == "0.010, 0.030"
    assert study.verdict("better", found) == "unclear"
    assert study.verdict("better", [0.059, 0.06, 0.061]) == "better"
    assert study.verdict("better", [-1, -1.1, -1.2]) == "worse"
    assert study.verdict("better", [0.5]) == "unclear" and study.verdict("better", []) == "not run"
    with pytest.raises(ValueError):  # a run is not extrapolated
        study.value_at(BASE, runs[BASE, 0], cost=2 * study.BUDGET)


def test_the_search_ends_with_two_worse_rates_on_either_side(tmp_path):
    """It goes up from the present rate to 16 times, and comes back to 4 times. Nothing below needs a run."""
    rewards, asked, runs = {0: 0.6, 1: 0.7, 2: 0.8, 3: 0.75, 4: 0.55}, [], {}
    while todo := study.search(runs, "grpo")[2]:
        asked.append(todo[0])
        name = study.at_rate("grpo", todo[0])
        runs = made_up(tmp_path, name, {seed: rewards[todo[0]] + 0.01 * (seed - 10.5) for seed in (10, 11)})
    assert asked == [0, 1, 2, 3, 4] and study.search(runs, "grpo")[1] == 2
    assert study.at_rate("grpo", 0) == OTHER and study.at_rate("grpo", 2) == f"{OTHER} --learning-rate 0.0028"


def test_closed_form_of_the_samplers():
    """The std of the samples of Gaussian images of std 0.5 with shift 3, worked out apart from this code.

    And if there is one image, what README.md says: the noise left before the last step by nine and by five
    random steps.
    """
    for sde, level, ends in STDS_AT_THE_END:
        for T, end in zip((10, 40, 1000), ends):
            even = torch.linspace(1, 0, T + 1, dtype=torch.float64)
            std = study_figures.latent_std(3 * even / (1 + 2 * even), sde, level, T)
            assert end is None or std[-1].item() == pytest.approx(end, abs=6e-4)  # of three digits
    sigmas = study_figures.base_model()[-1].double()
    left = [study_figures.latent_std(sigmas, "flow", 0.7, count, data=0.0)[-2].item() for count in (9, 5)]
    assert left == [pytest.approx(0.25, abs=5e-3), pytest.approx(0.0097, abs=5e-5)]
    # the first step, by hand
    forgotten = study_figures.latent_std(sigmas, "flow", 0.7, 1, score=False)[1].item()
    s = common.noise_scale(sigmas, "flow", 0.7)[0].item()
    delta = (sigmas[0] - sigmas[1]).item()  # at sigma = 1 the velocity is the latent
    assert forgotten == pytest.approx(math.hypot(1 - delta, s * delta**0.5), rel=1e-12)


# ---------------------------------------------------------------- runs and commands


@pytest.mark.parametrize("name", dict(study.jobs(study.load())))
def test_a_command_is_valid_and_reaches_the_budget(name):
    _, script, *options = study.command(name, 3).split()
    script = script.removesuffix(".py")
    if script != "mixgrpo":  # which the exercise of the README makes
        settings = asdict(parse(script, *options, "--output", "runs/none"))
        assert settings["iterations"] * study.evals_of(name) >= study.BUDGET and settings["seed"] == 3
        study.check({"command": study.command(name, 3), "settings": settings}, name, 3)
        with pytest.raises(SystemExit):
            study.check({"command": "", "settings": settings | {"learning_rate": 1.0}}, name, 3)


@pytest.mark.parametrize("script", study.DEFAULT)
def test_the_runs_with_defaults_have_the_defaults(script):
    """The command of the row means what the name of the script alone means."""
    options = study.command(study.DEFAULT[script], 0).split()[2:]
    one, other = parse(script, *options, "--output", "runs/none"), parse(script, "--output", "runs/none")
    if script == "gcpo":  # the halves of five steps
        assert (one.chunks, other.chunks) == ("2,3", "halves")
        one.chunks = "halves"
    assert one == other


@pytest.fixture
def checkout(tmp_path):
    """A git repository with one commit, and runs/study in it."""
    (tmp_path / "grpo.py").write_text("")
    for words in ("init -q", "add grpo.py", "-c user.name=x -c user.email=x@x.x commit -qm x"):
        subprocess.run(["git", "-C", str(tmp_path), *words.split()], check=True)
    (tmp_path / "runs" / "study").mkdir(parents=True)
    return tmp_path


def test_a_run_folder_is_added(checkout):
    """What is kept of a run. Refused: unfinished, with an option that no row has, or made by changed code."""
    folder = checkout / "runs" / "study" / study.key_of(BASE, 0)
    folder.mkdir()
    options = "--sde flow --noise-level 0.7 --learning-rate 7e-4 --iterations 160 --output runs/none".split()
    config = {"script": "grpo", "settings": asdict(parse("grpo", *options)), "versions": {}}
    line = {"reward/shapes": 0.1, "train_s": 1.0, "grad_norm": 0.123456789, "clip_by_step": [0.0]}
    lines = [line | {"iteration": n} for n in range(161)]
    for line in lines[::10]:
        line |= {"eval_reward": 0.6, "eval/shapes": 0.6}

    def add(command, lines):
        (folder / "config.json").write_text(json.dumps(config | {"command": command}))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        study.add(folder, checkout / "runs.jsonl")

    for bad in (("grpo.py --lora-rank 3", lines), ("grpo.py", lines[:-1])):
        with pytest.raises(SystemExit):
            add(*bad)
    (checkout / "grpo.py").write_text("changed")
    with pytest.raises(SystemExit):
        add("grpo.py", lines)
    (checkout / "grpo.py").write_text("")
    add("grpo.py --resume folder", lines)
    kept = {"grad_norm": 0.12346, "eval_reward": 0.6}
    wanted = [kept | {"iteration": n, "seconds": n + 1} for n in range(0, 161, 10)]
    run = study.read_runs(checkout / "runs.jsonl")[BASE, 0]
    head = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert run["evaluated"] == wanted and run["commit"] == head.stdout.strip()
    assert study.command(BASE, 0).replace("150", "160") == run["command"].replace("150", "160")


# ---------------------------------------------------------------- the committed runs and their page


def test_committed_runs_are_those_of_their_names():
    """But for iterations, the command is that of the name. Every run has a commit and passes the budget."""
    assert len(RUNS) == len(LINES)
    for (name, seed), run in RUNS.items():
        commands = run["command"], study.command(name, seed)
        one, other = (sorted(re.sub(r"--iterations \d+", "", text).split()) for text in commands)
        assert one == other
        assert run["evaluated"][-1]["iteration"] * study.evals_of(name) >= study.BUDGET
        assert re.fullmatch("[0-9a-f]{40}", run["commit"]) and run["machine"] and run["versions"]


def test_nominal_costs_are_those_that_were_counted():
    """Code that still logged `skipped_updates` trained on all transitions; its counts are nominal."""
    counted = 0
    for (name, _), run in RUNS.items():
        last = run["evaluated"][-1]
        if "skipped_updates" in last:  # where chunks are drawn, the count varies
            random = 4e-3 if "adaptive" in name or "--chunk-fraction 0.5" in name else 1e-9
            evals = last["velocity_evals"] / last["iteration"]
            assert evals == pytest.approx(study.evals_of(name), rel=random)
            counted += 1
    assert counted > 100


def test_claims_recomputed():
    """Every effect and verdict on the page, by loops over the lines of runs.jsonl."""

    def at(points, cost):
        for (x, y), (x_next, y_next) in pairwise(points):
            if x <= cost <= x_next:
                return y + (y_next - y) * (cost - x) / (x_next - x)
        raise AssertionError("the run ends before this cost")

    def reward(name, seed, averaged):
        metric = "eval/shapes" if "hole.py" in name else "eval_reward"
        lines = RUNS[name, seed]["evaluated"]
        cost = study.evals_of(name)
        points = [(line["iteration"] * cost, line.get(metric, line["eval_reward"])) for line in lines]
        costs = [360_000 * n / 96 for n in range(97)] if averaged else [360_000]
        return sum(at(points, cost) for cost in costs) / len(costs)

    page = (study.CURVES / "README.md").read_text("utf-8").split("## Claims\n\n")[1].split("\n\n")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()[2:]]
    rows = []
    for table, (all_rows, seeds) in study.TABLES.items():
        rows += [(row, seeds, table) for row in all_rows if row.claim]
    assert len(cells) == len(rows) > 30
    for (row, seeds, table), (claim, _, effect, count, verdict, _) in zip(rows, cells):
        assert row.claim == claim
        seeds = [seed for seed in seeds if (row.name, seed) in RUNS and (row.other, seed) in RUNS]
        averaged = table == "averaged"
        found = [reward(row.name, s, averaged) - reward(row.other, s, averaged) for s in seeds]
        n = len(found)
        if n < 3:
            assert verdict in ("not run", "unclear")
            continue
        mean = sum(found) / n
        half = study.T_QUANTILE[n - 1] * (sum((x - mean) ** 2 for x in found) / (n - 1) / n) ** 0.5
        shown = [float(number) for number in effect.split(" ± ")]
        assert shown == pytest.approx([mean, half], abs=5.1e-4) and count == str(n)  # of three digits
        assert verdict == ("better" if mean - half > 0 else "worse" if mean + half < 0 else "unclear")


SLOW = ("decided", "samplers", "way")  # figures that load the tiny model


@pytest.mark.parametrize("seeds", [0, 1, 3])
def test_an_incomplete_study_has_a_page_and_figures(tmp_path, monkeypatch, seeds):
    held_out = common.read_prompts(str(common.TINY / "eval_prompts.txt"))
    monkeypatch.setattr(common, "held_out_prompts", lambda args: held_out[::4])  # to save time
    study_figures.base_model.cache_clear()
    for name in dict(study.jobs({})) if seeds else ():
        made_up(tmp_path, name, {seed: 0.7 + 0.02 * seed for seed in range(seeds)})
    study.page(tmp_path)
    study_figures.draw(tmp_path, [n for n in study_figures.FIGURES if n not in SLOW or seeds == 1])
    text = (tmp_path / "README.md").read_text("utf-8")
    assert "{" not in text and "nan" not in text
    assert len(list(tmp_path.glob("*.png"))) == len(study_figures.FIGURES) - len(SLOW) * (seeds != 1)


def test_the_page_is_the_one_that_the_committed_runs_make(tmp_path):
    shutil.copy(study.RUNS, tmp_path)
    study.page(tmp_path)
    assert (tmp_path / "README.md").read_text() == (study.CURVES / "README.md").read_text()
