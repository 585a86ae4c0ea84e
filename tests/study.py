"""The study: which algorithm is better on the tiny model, at equal cost, with error bars.

    python tests/study.py run             # make missing runs; stop it at any time, the next call resumes
    python tests/study.py add FOLDER...   # add finished run folders to runs.jsonl
    python tests/study.py page            # write tests/curves/README.md, the figures, README.md's claims

All results come from tests/curves/runs.jsonl. It has one line per run: name, random seed, command, commit,
machine, versions, seconds of training, and the evaluated iterations. A name is script, sampler, noise, random
steps and options: `gcpo flow 0.7 all --chunks 9`. The text of the page and the rows of its tables are in
tests/curves/page.txt: run | other run | claim | claimed by. A claim marked with * is also one of README.md's.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tiny")]

import common  # noqa: E402
import gcpo  # noqa: E402
import grpo  # noqa: E402
from shapes import shapes  # noqa: E402

CURVES = ROOT / "tests" / "curves"
RUNS = CURVES / "runs.jsonl"
BUDGET = 360_000  # velocity evaluations at which runs are compared
COSTS = np.linspace(0, BUDGET, 97)  # of curves, and of averages over a run
QUIET = 12  # the random seed of the runs that are timed, with the machine to themselves

# What was chosen for these tables. The page tells how.
TUNED = {
    # the scripts' defaults for the tiny model: noise, learning rate, iterations
    "grpo": ("dance 3", "0.0007", 150),
    "gcpo": ("dance 3", "0.0007", 180),
    "tempflow_grpo": ("dance 3", "0.001", 200),
    # the noise level of each sampler, for grpo.py on early steps
    "flow": "flow 1.5",
    "precise": "precise 1.5",
    "dance": "dance 3",
    "cps": "cps 0.65",
    "all": "flow 0.7",  # on all steps
}
RATE = dict(grpo="0.0007", gcpo="0.0007", mixgrpo="0.0007", tempflow_grpo="0.001")  # of a name without one
HOLE = "--reward tests/tiny/hole.py:colours_and_shapes --eval-reward shapes --kl-coef"
ADAPTIVE = "gcpo flow 0.7 all --chunks adaptive --chunk-max 4 --chunk-fraction 1"
SEARCH = {"grpo": "grpo flow 0.7 all", "gcpo": ADAPTIVE, "tempflow_grpo": "tempflow_grpo flow 0.7 all"}


def plain(name):
    """A name without the learning rate that it would have anyway."""
    return name.removesuffix(f" --learning-rate {RATE.get(name.split(' ')[0])}")


STEPS = {"grpo": "early", "gcpo": "early --chunks 2,3 --chunk-fraction 1", "tempflow_grpo": "early"}
SCRIPTS = tuple(STEPS)
DEFAULT = {s: plain(f"{s} {TUNED[s][0]} {STEPS[s]} --learning-rate {TUNED[s][1]}") for s in STEPS}
TWICE = f"{DEFAULT['grpo']} --learning-rate 0.0014"  # the default rate of grpo.py until it was found unsteady


def evals_of(name):
    """Velocity evaluations per iteration. Transitions of advantage 0 count, though they are left out."""
    script, _, _, steps, *_ = name.split()
    options = dict(re.findall(r"--(\S+) (?!--)(\S+)", name))
    T = int(options.get("steps", 10))
    K = int(options.get("sde-steps-per-iteration", {"all": T - 1, "early": T // 2}[steps]))
    if script == "tempflow_grpo":  # 8 trunks with 6 branches at each step
        return 8 * (4 * K + 6 * sum(T - 1 - step for step in range(K)))
    if script != "gcpo":
        return 96 * (T + 3 * K + K * (float(options.get("kl-coef", 0)) > 0))
    if options["chunks"] == "adaptive":  # the mean of the runs, as their number varies
        return 3958 if options["chunk-fraction"] == "1" else 2850 if "weighted" in name else 2862
    sizes = [int(size) for size in options["chunks"].split(",")]
    share = int(float(options["chunk-fraction"]) * len(sizes) + 0.5) / len(sizes)
    # gcpo.py's second update takes one more for each step that shares a chunk
    return int(96 * (T + share * (3 * K + 0.5 * sum(size for size in sizes if size > 1))))


def command(name, seed):
    """A run's command line. It ends at the first evaluation past the budget, a run with defaults later."""
    script, sde, level, steps, *more = name.split()
    own = name in DEFAULT.values()
    iterations = TUNED[script][2] if own else -(-BUDGET // (10 * evals_of(name))) * 10
    rate = [] if "--learning-rate" in name else ["--learning-rate", RATE[script]]
    fixed = f"python {script}.py --sde {sde} --noise-level {level} --sde-steps {steps}"
    return " ".join([fixed, *rate, *more, f"--iterations {iterations} --eval-every 10 --seed {seed}"])


def read_runs(path=RUNS):
    """{(name, seed): line of runs.jsonl}."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return {(run["name"], run["seed"]): run for run in map(json.loads, lines)}


def load(path=RUNS):
    """{(name, seed): evaluated iterations}."""
    return {job: run["evaluated"] for job, run in read_runs(path).items()}


# ---------------------------------------------------------------- what came out

# 97.5% quantiles of Student's t by degrees of freedom: half the width of a 95% interval in standard errors
T_QUANTILE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def value_at(name, lines, metric="eval_reward", cost=BUDGET):
    """A metric of a run at a cost (or an array of them), by default the budget, between evaluations."""
    reached = [line["iteration"] * evals_of(name) for line in lines]
    if reached[-1] < np.max(cost):
        raise ValueError(f"a run of {name} ended at {reached[-1]} evaluations, before {np.max(cost)}")
    return np.interp(cost, reached, [line.get(metric, 0) for line in lines])


def values(runs, name, seeds, averaged=False):
    """{seed: reward} of the runs that are there, at the budget or averaged; if it is hacked, the full one."""
    metric, cost = "eval/shapes" if HOLE in name else "eval_reward", COSTS if averaged else BUDGET
    return {s: np.mean(value_at(name, runs[name, s], metric, cost)) for s in seeds if (name, s) in runs}


def mean_interval(numbers):
    """Mean over the first axis, of at most ten seeds, and half of its 95% interval: nan for a single seed."""
    numbers = np.asarray(numbers, dtype=np.float64)
    quantile = T_QUANTILE[len(numbers) - 1] if len(numbers) > 1 else np.nan
    return numbers.mean(0), quantile * numbers.std(0, ddof=len(numbers) > 1) / len(numbers) ** 0.5


def words(numbers, sign=""):
    """Mean and half interval as text; up to two numbers as they are."""
    if len(numbers) < 3:
        return ", ".join(f"{number:{sign}z.3f}" for number in numbers)
    mean, half = mean_interval(numbers)
    return f"{mean:{sign}z.3f} ± {half:.3f}"


def effect(runs, row, seeds, averaged=False):
    """The differences of a row over the random seeds that both runs have."""
    one, other = (values(runs, name, seeds, averaged) for name in row[:2])
    return [one[seed] - other[seed] for seed in one if seed in other]


def verdict(claim, differences):
    """Whether the whole 95% interval is above 0, below 0, or neither."""
    if not claim or not differences:
        return "not run" if claim else ""
    mean, half = mean_interval(differences)
    return "better" if mean > half else "worse" if mean < -half else "unclear"


def rate(script, power):
    """The present learning rate times 2^power, as text."""
    return f"{float(RATE[script]) * 2.0**power:g}"


def at_rate(script, power):
    """The run of the search with this learning rate."""
    return plain(f"{SEARCH[script]} --learning-rate {rate(script, power)}")


def search(runs, script, seeds=(10, 11)):
    """The search for a learning rate: {power of two: rewards}, the best power, and what is still to try."""
    found = {power: [*values(runs, at_rate(script, power), seeds).values()] for power in range(-8, 9)}
    tried = {power: rewards for power, rewards in found.items() if len(rewards) == len(seeds)}
    best = max(tried, key=lambda power: np.mean(tried[power]), default=0)
    return tried, best, [best + n for n in (0, 1, 2, -1, -2) if best + n not in tried]


# ---------------------------------------------------------------- the rows of the page


class Row(NamedTuple):  # of a table
    name: str
    other: str = ""  # the run it is compared with
    claim: str = ""  # that the difference is positive
    source: str = ""


def read_page():
    """The text of page.txt with {tables[NAME]} for each table, and the tables: {name: (rows, seeds)}."""
    places = {name: value if isinstance(value, str) else value[0] for name, value in TUNED.items()}
    places |= dict(zip("GCT", DEFAULT.values())) | {"hole": HOLE, "twice": TWICE, "adaptive": ADAPTIVE}
    runs, tables = load(), {}
    places["best"] = {script: at_rate(script, search(runs, script)[1]) for script in SEARCH}

    def read(match):
        lines = match[3].format(**places).strip().splitlines()
        rows = [Row(*(plain(cell.strip()) for cell in line.split("|"))) for line in lines]
        tables[match[1]] = rows, tuple(map(int, match[2].split()))
        return f"{{tables[{match[1]}]}}"

    text = (CURVES / "page.txt").read_text("utf-8")
    return re.sub(r"(?ms)^\[(\w+) ([\d ]+)$(.*?)^\]$", read, text), tables


TEXT, TABLES = read_page()


def jobs(runs):
    """(name, seed) of all runs: the search's next ones, tuning, then table by table and seed by seed."""
    found = [(at_rate(script, n), s) for script in SEARCH for n in search(runs, script)[2] for s in (10, 11)]
    for rows, seeds in [TABLES["tuning"], *TABLES.values()]:
        names = dict.fromkeys(name for row in rows for name in row[:2] if name)
        found += [(name, seed) for seed in seeds for name in names]
    return [*dict.fromkeys(found + [(name, QUIET) for name in DEFAULT.values()])]


def markdown(header, cells):
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *cells])


def claims(runs, mark=""):
    """The table of claims: all of them, or those with the mark."""
    cells = []
    marked = [(table, row) for table in TABLES for row in TABLES[table][0] if row.claim and mark in row.claim]
    for table, row in marked:
        seeds = TABLES[table][1]
        found = effect(runs, row, seeds, table == "averaged")
        images = [[value_at(n, runs[n, s], "images") for s in seeds if (n, s) in runs] for n in row[:2]]
        one, other = (np.mean(numbers or 0) for numbers in images)
        scored = f"{one:,.0f} against {other:,.0f}" if found and abs(one - other) > 0.02 * other else ""
        shown = words(found, "+"), str(len(found) or ""), verdict(row.claim, found), scored
        cells.append([row.claim.removeprefix("*"), row.source, *shown])
    header = "claim|claimed by|effect|seeds|verdict|images scored, if different"
    return markdown(header.split("|"), cells)


def table(runs, which):
    """Held-out reward of the runs of a table, and their effects."""
    (rows, seeds), averaged = TABLES[which], which == "averaged"
    others = [Row(row.other) for row in rows if row.other not in ("", *(row.name for row in rows))]
    cells = []
    for row in dict.fromkeys([*others, *rows]):
        reward = list(values(runs, row.name, seeds, averaged).values())
        found = effect(runs, row, seeds, averaged)
        compared = [words(found, "+"), f"`{row.other}`"] if row.other not in ("", row.name) else ["", ""]
        seeds_of = str(len(found if compared[1] else reward) or "")
        cells.append([f"`{row.name}`", words(reward), *compared, seeds_of, verdict(row.claim, found)])
    return markdown(["run", "held-out reward", "effect", "compared with", "seeds", "verdict"], cells)


def searches(runs):
    """The learning rates that the search tried, and those that it has still to try."""
    cells = []
    for script in SEARCH:
        tried, best, todo = search(runs, script)
        for power in sorted({*tried, *todo}):
            rewards = tried.get(power, [])
            mean = f"{np.mean(rewards):.3f}" if rewards else "not run yet"
            note = "" if power != best else "best so far" if todo else "best"
            cells.append([f"`{script}.py`", rate(script, power), words(rewards), mean, note])
    return markdown(["script", "learning rate", "seeds 10, 11", "mean", ""], cells)


def ends(runs):
    """The scripts with nothing but their names, to the end of their defaults."""
    cells = []
    for script, name in DEFAULT.items():
        curves = [[line["eval_reward"] for line in runs[name, s]] for s in range(8) if (name, s) in runs]
        quiet, last = runs.get((name, QUIET), []), [curve[-1] for curve in curves]
        cost = f"{int(TUNED[script][2]) * evals_of(name):,}"
        cells.append([f"`python {script}.py`", cost, str(len(curves) or ""), words(last)])
        fall = max([max(curve) - curve[-1] for curve in curves], default=0)
        cells[-1] += [f"{min(last):.3f}", f"{fall:.3f}"] if last else ["", ""]
        for when in [line for line in quiet if line["eval_reward"] >= 0.85][:1], quiet[-1:]:
            cells[-1] += ["".join(f"{line['eval_reward']:.3f} in {line['seconds']} s" for line in when)]
    header = "command|evaluations|seeds|reward at the end|lowest|largest fall from the best|over 0.85|its end"
    return markdown(header.split("|"), cells)


# ---------------------------------------------------------------- making runs


def key_of(name, seed):
    """The name of a run's folder: without dashes, commas and paths."""
    short = name.replace(HOLE, "hole kl").replace("--", "").replace("chunk-fraction", "of").replace(",", "")
    return "-".join([*short.split(), str(seed)])


def commit_of(folder):
    """The commit of the checkout that a run folder lies in, if its code is the code that made the run."""

    def git(*words):
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True).stdout

    commit, _, time = git("log", "-1", "--format=%H %ct").strip().partition(" ")
    changed = git("status", "--porcelain", "--untracked-files=no", ":(top,glob)*.py", ":(top)tests/tiny")
    if not commit or changed or int(time) > (folder / "config.json").stat().st_mtime:
        why = "changed files" if changed else "a newer commit" if commit else "no commit"
        raise SystemExit(f"error: the checkout of {folder} has {why}; give --commit")
    return commit


def check(config, name, seed):
    """SystemExit if a config.json has other settings than the run's command, or other options besides."""
    free = ("iterations", "eval-every", "output", "resume", "device")  # they change no number of an iteration
    both = (
        re.findall(r"--(\S+)(?: (?!--)(\S+))?", line) for line in (config["command"], command(name, seed))
    )
    given, wanted = ({option: value for option, value in line if option not in free} for line in both)

    def differs(option):
        setting, value = config["settings"].get(option.replace("-", "_")), wanted[option]
        if isinstance(setting, bool) or not isinstance(setting, int | float):
            return (
                setting is not True if value == "" else not str(setting).endswith(value)
            )  # an absolute path
        return setting != float(value)

    if wrong := [*(given.keys() - wanted), *filter(differs, wanted)]:
        raise SystemExit(f"error: this is not a run of {name}: --{', --'.join(wrong)}")


def add(folder, path=RUNS, commit=None, machine=None):
    """Add a finished run folder of `study.py run` to runs.jsonl: its evaluated iterations.

    Numbers have five digits. Left out are seconds of phases, parts of rewards that say the same and, but for
    seed 0 of gcpo.py and tempflow_grpo.py, lists by step. `seconds` is the training up to a line.
    """
    runs, config = read_runs(path), json.loads((folder / "config.json").read_text("utf-8"))
    names = [at_rate(script, power) for script in SEARCH for power in range(-8, 9)]
    known = [*jobs(load(path)), *((name, seed) for name in names for seed in (*range(5), 10, 11))]
    name, seed = {key_of(*job): job for job in known}.get(folder.name, (None, 0))
    if name is None:
        raise SystemExit(f"error: {folder.name} is not the name of a run")
    check(config, name, seed)
    settings, commit = config["settings"], commit or commit_of(folder)
    text = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    lines = [json.loads(line, parse_float=lambda digits: float(f"{float(digits):.5g}")) for line in text]
    last = lines[-1]["iteration"]
    if last * evals_of(name) < BUDGET or last < settings["iterations"]:
        raise SystemExit(f"error: {folder} is not finished")
    lists, kept, seconds = seed == 0 and name.split()[0] != "grpo", [], 0.0
    for line in lines:
        seconds += sum(line.get(f"{phase}_s", 0) for phase in ("rollout", "reward", "train"))
        if "eval_reward" in line:
            twice = {key for key in line if key.startswith("eval/") and line[key] == line["eval_reward"]}
            twice |= {key for key in line if key.endswith("_s") or key.startswith(("reward/", "reward_std/"))}
            line = {k: v for k, v in line.items() if k not in twice and (lists or not isinstance(v, list))}
            kept.append(line | {"seconds": round(seconds)})
    cpu = Path("/proc/cpuinfo")
    cpus = re.findall("model name.*: (.*)", cpu.read_text() if cpu.exists() else "") or [platform.machine()]
    exact = re.sub(r"--iterations \d+", f"--iterations {settings['iterations']}", command(name, seed))
    run = {"name": name, "seed": seed, "command": exact, "commit": commit}
    run |= {"machine": machine or f"{settings['device']}, {cpus[0]}, one thread"}
    run |= {"versions": config["versions"], "seconds": round(seconds), "evaluated": kept}
    runs[name, seed] = run
    path.write_text("".join(json.dumps(runs[job]) + "\n" for job in sorted(runs)), "utf-8")
    return f"{name}, seed {seed}: {kept[0]['eval_reward']:.3f} -> {kept[-1]['eval_reward']:.3f}"


def make(name, seed, work=ROOT / "runs" / "study"):
    """Make a run in a process with one thread, or resume it, and add it. Ctrl-C keeps its last checkpoint."""
    folder, (_, script, *options) = work / key_of(name, seed), command(name, seed).split()
    if (folder / "checkpoint.pt").exists():
        options = ["--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)
        options += ["--device", "cpu", "--output", str(folder)]
    work.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(f"{folder}.log", "w", encoding="utf-8") as log:
        made = subprocess.run([sys.executable, script, *options], cwd=ROOT, env=env, stdout=log, stderr=log)
    if made.returncode:
        raise SystemExit(f"error: the run failed, see {folder}.log")
    print(add(folder), flush=True)


# ---------------------------------------------------------------- the figures, as wide as GitHub's page

COST, REWARD = "velocity evaluations in training, thousands", "reward of held-out prompts"
SIZES = {"font.size": 8.5, "axes.titlesize": 9, "axes.labelsize": 8.5, "legend.fontsize": 8}
matplotlib.rcParams.update(SIZES | {"legend.framealpha": 0.9})


def finish(axes, title="", x=COST, y=REWARD, **legend):
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    if not axes.has_data():
        return axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**legend)


def mean_curve(axes, runs, name, label, seeds=range(8), metric="eval_reward", **style):
    """Mean of a metric over cost, and its 95% interval as a band."""
    found = [runs[name, seed] for seed in seeds if (name, seed) in runs]
    if found:
        mean, half = mean_interval([value_at(name, lines, metric, COSTS) for lines in found])
        (line,) = axes.plot(COSTS / 1000, mean, label=f"{label} ({len(found)} seeds)", **style)
        band = dict(color=line.get_color(), alpha=0.2, linewidth=0)
        axes.fill_between(COSTS / 1000, mean - half, mean + half, **band)


def draw_curves(axes, runs):
    for number, (script, name) in enumerate(DEFAULT.items()):
        mean_curve(axes[0], runs, name, f"{script}.py", color=f"C{number}")
        power = search(runs, script)[1]
        label = f"{script}.py, rate {rate(script, power)}"
        mean_curve(axes[1], runs, at_rate(script, power), label, range(5), color=f"C{number}")
    mean_curve(axes[0], runs, "grpo flow 0.7 early", "grpo.py, flow 0.7", color="0.5")
    finish(axes[0], "early steps random: defaults, and flow 0.7", loc="lower right")
    finish(axes[1], "all steps random, flow 0.7: tuned learning rates", y="", loc="lower right")
    for one in axes:
        one.set_ylim(0.45, 0.95)


def draw_noise(axes, runs):
    rows, seeds = TABLES["tuning"]
    for number, (sde, one) in enumerate(zip(("flow", "precise", "dance", "cps"), axes)):
        for steps, style in (("early", "o-"), ("all", "x--")):
            levels = sorted({row.name.split()[2] for row in rows if row.name.split()[1] == sde}, key=float)
            found = {level: values(runs, f"grpo {sde} {level} {steps}", seeds).values() for level in levels}
            found = {float(level): list(rewards) for level, rewards in found.items() if rewards}
            one.plot(
                [*found], [np.mean(rewards) for rewards in found.values()], style[1:], color=f"C{number}"
            )
            for level, rewards in found.items():
                one.plot([level] * len(rewards), rewards, style[0], color=f"C{number}")
        one.axhline(0.502, color="0.6", linewidth=0.8, linestyle=":")
        one.set_ylim(0.35, 0.95)
        finish(
            one, f"--sde {sde}", f"--noise-level ({'a' if sde == 'flow' else 'η'})", "" if number else REWARD
        )
    kinds = ("o", "-", "early steps random"), ("x", "--", "all nine steps random"), ("", ":", "base model")
    handles = [Line2D([], [], color="0.3", marker=m, linestyle=line, label=label) for m, line, label in kinds]
    title = "grpo.py: a mark is one run (random seeds 10 and 11), a line their mean"
    axes[0].figure.legend(handles=handles, title=title, loc="outside lower center", ncols=3)


def draw_hacking(axes, runs):
    for number, name in enumerate(row.name for row in TABLES["hacking"][0]):
        kl, colour = f"KL {name.split()[-1]}", f"C{number}"
        mean_curve(axes[0], runs, name, kl, color=colour)
        mean_curve(axes[1], runs, name, kl, metric="eval/shapes", color=colour)
    finish(axes[0], "the trained reward ignores the number of objects", loc="lower right")
    finish(axes[1], "the full reward, not trained", y="", loc="lower left")
    for one in axes:
        one.set_ylim(0, 1)


def draw_chunks(axes, runs):
    rows, seeds = TABLES["chunks"]
    axes[0].axhline(0, color="0.6")
    for row in (row for row in rows if row.other == rows[0].other):
        if numbers := effect(runs, row, seeds):
            mean, half = mean_interval(numbers)
            sizes = row.name.split("--chunks ")[1].split()[0]
            axes[0].errorbar(sizes, mean, np.nan_to_num(half), fmt="o", capsize=3, color="C0")
    finish(axes[0], "gcpo.py, all steps, flow 0.7: 95% intervals", "chunks", "reward minus that of grpo.py")


# Everything that the figures take from the project's code is between here and draw_samplers.


def base_model():
    """The tiny model before training: (policy, held-out prompts, their text, sigmas)."""
    args = common.parse_args("grpo", grpo.Args, grpo.DEFAULTS, ["--device", "cpu", "--output", "runs/none"])
    policy, prompts = common.make_policy(args, 48), common.read_prompts(args.eval_prompts)
    return policy, prompts, policy.encode(prompts)[0], policy.sigmas(args.steps)


def walk(policy, text, index, x, sigmas, noise, sde="flow", level=0.7):
    """Yield (x, predicted image) before each step, and the final x; noise: {random step: its noise}."""
    s = common.noise_scale(sigmas, sde, level)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        with torch.no_grad():
            velocity = policy.velocity_in_micro_batches(x, sigma, text, index)
        yield x, x - sigma * velocity
        mean, std = common.sde_mean_std(
            x, velocity, sigma, sigma_next, s[step] if step in noise else 0.0, sde
        )
        x = mean + std * noise[step] if step in noise else mean
    yield x, x


def chunks_of_the_base_model(each=4, chunk_max=4):
    """By step: mean L1rel, and how often adaptive chunks cut before it; `each` images per held-out prompt."""
    policy, prompts, text, sigmas = base_model()
    generator, index = common.generator(0, "chunks", 0), torch.arange(len(prompts) * each) // each
    start, *noise = (policy.noise(len(prompts), each, generator) for _ in range(len(sigmas) - 1))
    states = [x for x, _ in walk(policy, text, index, start, sigmas, dict(enumerate(noise)))]
    x = torch.stack(states[:-1]).flatten(2)  # without the last step
    l1rel, cut = ((x[1:] - x[:-1]).norm(1, 2) / x[:-1].norm(1, 2)).T, np.zeros(len(noise))
    for row in l1rel:
        cut[np.cumsum(gcpo.adaptive_chunks(row, chunk_max))[:-1]] += 1 / len(l1rel)
    return l1rel.mean(0), cut


def stops_of_the_base_model(leave):
    """Images (row, step, prompt) that it would draw if it stopped, their rewards, and the prompts.

    A row is an ODE trajectory (-1), or its branch with one random step, flow 0.7, at the step in `leave`.
    """
    policy, captions, text, sigmas = base_model()
    T, generator, index = len(sigmas) - 1, common.generator(0, "way", 0), torch.arange(len(captions))
    start, images = policy.noise(len(captions), 1, generator), []
    for branch in leave:
        noise = {step: torch.randn(start.shape, generator=generator) for step in range(T)}
        way = walk(policy, text, index, start, sigmas, {n: noise[n] for n in noise if n == branch})
        images.append(torch.stack([policy.decode(image) for _, image in way][:-1]))
    images = torch.stack(images)
    scores = torch.stack([torch.stack([shapes(step, captions) for step in row]) for row in images])
    return images.permute(0, 1, 2, 4, 5, 3).numpy(), scores.numpy(), captions


def latent_std(sigmas, sde, level, count, data=0.5, score=True):
    """Std of the latent before and after each of T steps, of which the first `count` are random.

    Closed form, with the exact velocity for images that are Gaussian noise of std `data`: that velocity is a
    multiple of the latent, so a step multiplies the std by a number and adds noise. sigmas: (T + 1,) in
    float64. score=False forgets the score term: a random step is an ODE step plus noise.
    """
    one, s = torch.ones(1, dtype=sigmas.dtype), common.noise_scale(sigmas, sde, level)
    std = [one]
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        velocity = one * (sigma - (1 - sigma) * data**2) / ((1 - sigma) ** 2 * data**2 + sigma**2)
        scale = s[step] if step < min(count, len(s)) else 0.0
        mean, noise = common.sde_mean_std(one, velocity, sigma, sigma_next, scale, sde)
        mean = mean if score else one - velocity * (sigma - sigma_next)
        std.append(((mean * std[-1]) ** 2 + noise**2).sqrt())
    return torch.cat(std)


def draw_samplers(axes, runs):
    sigmas = base_model()[-1].double()
    right = ((1 - sigmas) ** 2 * 0.5**2 + sigmas**2).sqrt()
    names = ("flow", 0.7), ("dance", 0.3), ("dance", 3), ("cps", 0.8), ("precise", 1.5)
    for axis, count in zip(axes, (9, 5)):
        axis.axhline(1, color="k", linewidth=0.8)
        ode = latent_std(sigmas, "flow", 0.7, 0) / right
        axis.plot(ode, color="0.7", linewidth=5, label="ODE steps only")
        for (sde, level), style in zip(names, ("o-", "s-", "D-", "v-", "^--")):
            axis.plot(latent_std(sigmas, sde, level, count) / right, style, ms=4, label=f"{sde} {level}")
        forgotten = latent_std(sigmas, "flow", 0.7, count, score=False) / right
        axis.plot(forgotten, "kx:", label="flow 0.7, no score term")
        axis.set_ylim(0.5, 2.8)
        finish(axis, f"the first {count} of ten steps are random", "steps taken")
        axis.set_ylabel("std of the latent / the right std" if count == 9 else "")
    end = (latent_std(sigmas, "dance", 3, 9) / right)[-1]
    axes[0].text(6.9, 2.6, f"dance 3 ends at {end:.0f}", color="C2", ha="right")
    axes[0].get_legend().remove()
    axes[1].legend(loc="upper center", ncols=2)


def draw_decided(axes, runs, until=50):
    """By step: spread of the reward over branches, length of the step, cuts, and size of the gradient."""

    def curve(axis, name, metric, label=None):
        early = [line for line in runs.get((name, 0), []) if metric in line and line["iteration"] <= until]
        if early:
            axis.plot(np.mean([line[metric] for line in early], 0), "o-", label=label)

    flow, cps = "tempflow_grpo flow 0.7 all", f"tempflow_grpo {TUNED['cps']} all"
    curve(axes[0], flow, "reward_std_by_step")
    l1rel, cut = chunks_of_the_base_model()
    axes[1].plot(l1rel, "o-")
    axes[2].plot(cut, "o-")
    curve(axes[3], cps, "gradient_by_step", f"{TUNED['cps']}")
    curve(axes[3], flow, "gradient_by_step", "flow 0.7")
    curve(axes[3], flow, "gradient_by_step_weighted", "flow 0.7, with the weight")
    for axis, top in zip(axes, (0.35, 1, 1)):
        axis.set_ylim(0, top)
    axes[3].set_yscale("log")
    finish(axes[0], "how much of the reward does the step decide?", "", "std of the reward over branches")
    finish(axes[1], "how much does the step change the latent?", "", "L1rel")
    finish(axes[2], "where do adaptive chunks begin?", "step", "share of images with a cut before it")
    finish(axes[3], "how large is the gradient of log p?", "step", "size / mean of all steps")


def draw_way(axes, runs, leave=(-1, 1, 6), shown=3):
    """The first prompts whose final reward the early branch changes by over 0.1, and the late one not."""
    images, score, captions = stops_of_the_base_model(leave)
    T = score.shape[1]
    early, late = np.abs(score[1:, -1] - score[0, -1]) > 0.1
    chosen = np.flatnonzero(early & ~late)[:shown].tolist()
    tiles = np.ones((len(chosen), len(leave), 42, T, 36, 3))
    for n, row, step in np.ndindex(len(chosen), len(leave), T):
        if step > leave[row]:
            tiles[n, row, :32, step, :32] = images[row, step, chosen[n]]
            place = 36 * step + 16, 42 * (len(leave) * n + row) + 37
            axes[0].text(*place, f"{score[row, step, chosen[n]]:.2f}", fontsize=7.5, ha="center", va="center")
    axes[0].imshow(tiles.reshape(-1, 36 * T, 3))
    kinds = ["", *(f"branch at step {step}" for step in leave[1:])]
    labels = [kind or f"“{captions[n]}”\nODE trajectory" for n in chosen for kind in kinds]
    axes[0].set_yticks(42 * np.arange(len(labels)) + 16, labels, fontsize=8)
    axes[0].set_xticks(36 * np.arange(T) + 16, range(T))
    axes[0].tick_params(length=0)
    axes[0].spines[:].set_visible(False)
    title = "The image that the base model would draw if it stopped at a step, and its reward.\n"
    title += f"A random step {leave[1]} changes the final reward of {early.sum()} of {len(captions)} prompts"
    axes[0].set_title(f"{title} by over 0.1, a random step {leave[2]} that of {late.sum()}.")
    axes[0].set_xlabel("step")


def draw_algorithms(axes, runs, steps=6):
    """What differs between the three algorithms."""

    def path(place, points, random):
        for n in range(len(points) - 1):
            colour, width = ("tab:red", 2) if n in random else ("0.6", 1.1)
            arrow = dict(arrowstyle="-|>", color=colour, lw=width, shrinkA=2, shrinkB=2)
            axes[place].annotate("", points[n + 1], points[n], arrowprops=arrow)
        axes[place].plot(*zip(*points), "o", color="0.2", ms=3)

    for place in (0, 1):
        for y in range(4):
            points = [(n, y + 0.13 * (-1) ** n * (0 < n < steps)) for n in range(steps + 1)]
            path(place, points, range(steps - 1))
            for x, size in ((0.05, 1.9), (2.05, 2.9)) if place else ():
                axes[place].add_patch(FancyBboxPatch((x, y - 0.22), size, 0.44, "round,pad=0.03", fc="0.93"))
    path(2, [(n, 3.4) for n in range(steps + 1)], ())
    axes[2].text(0.1, 3.6, "trunk, by ODE", fontsize=7.5, color="0.3")
    for leave, low in ((0, 1.7), (3, -0.1)):
        for y in (low, low + 0.45, low + 0.9):
            path(2, [(leave, 3.4), *((n, y) for n in range(leave + 1, steps + 1))], [0])
    groups = (0, 0, 3, "group"), (1, 0, 3, "group"), (2, 1.7, 2.6, "of\nstep 0"), (2, -0.1, 0.8, "of\nstep 3")
    for place, low, high, text in groups:
        axes[place].plot(steps + np.array([0.15, 0.3, 0.3, 0.15]), [low, low, high, high], color="tab:blue")
        where = steps + 0.45, (low + high) / 2
        axes[place].text(*where, text, color="tab:blue", va="center", fontsize=7.5)
    axes[0].set_title("GRPO: the reward of an image goes\nto each of its random steps alike", fontsize=8.5)
    axes[1].set_title("GCPO: the steps of a chunk (box)\nhave one ratio together", fontsize=8.5)
    axes[2].set_title("TempFlow-GRPO: a branch has one\nrandom step with all of its reward", fontsize=8.5)
    for one in axes:
        one.set(xlim=(-0.3, steps + 2.1), ylim=(-0.5, 3.9), yticks=[], xticks=[0, steps])
        one.set_xticklabels(["noise", "image"])
    axes[1].set_xlabel("red: a random step (SDE), trained    grey: an ODE step    blue: compared rewards")


FIGURES = {  # height in inches, rows, columns
    "curves": (3.6, 1, 2, draw_curves),
    "samplers": (3.6, 1, 2, draw_samplers),
    "noise": (3.2, 1, 4, draw_noise),
    "hacking": (3.4, 1, 2, draw_hacking),
    "chunks": (3.2, 1, 1, draw_chunks),
    "decided": (5, 2, 2, draw_decided),
    "way": (8.4, 1, 1, draw_way),
    "algorithms": (2.7, 1, 3, draw_algorithms),
}


def page(folder=CURVES, figures=FIGURES):
    """Write the page and the figures from runs.jsonl in a folder. A missing run leaves a blank."""
    runs, missing = load(folder / "runs.jsonl"), {}
    for name, seed in [job for job in jobs(runs) if job not in runs]:
        missing.setdefault(name, []).append(str(seed))
    lines = "".join(f"- `{name}`: {', '.join(seeds)}\n" for name, seeds in missing.items())
    values = {"have": len(runs), "missing_count": sum(map(len, missing.values()))}
    values |= {"missing": lines or "None.", "search": searches(runs)}
    values |= {"budget": BUDGET, "claims": claims(runs), "ends": ends(runs)}
    values |= {"tables": {which: table(runs, which) for which in TABLES}}
    (folder / "README.md").write_text(TEXT.format(**values), "utf-8")
    if folder == CURVES:
        readme, rows = ROOT / "README.md", re.sub(r" *\| *", "|", claims(runs, "*"))
        text = re.sub(r"(?s)\|claim\|.*?(?=\n\n)", rows, readme.read_text("utf-8"))
        readme.write_text(text, "utf-8")
    for name in figures:
        height, *shape, draw = FIGURES[name]
        figure = Figure(figsize=(8.3, height), layout="constrained")
        draw([*figure.subplots(*shape, squeeze=False).flat], runs)
        figure.savefig(folder / f"{name}.png", dpi=200)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("run", help="make missing runs")
    options = commands.add_parser("add", help="add finished run folders")
    options.add_argument("folders", nargs="+", type=Path)
    options.add_argument("--commit", help="of the code that made them, if their checkout has moved on")
    options.add_argument("--machine", help="that made them, if not this one")
    commands.add_parser("page", help="write page and figures")
    args = parser.parse_args()
    if args.what == "page":
        page()
    if args.what == "add":
        print(*(add(folder, RUNS, args.commit, args.machine) for folder in args.folders), sep="\n")
    runs = load()
    if args.what == "run" and (todo := [job for job in jobs(runs) if job not in runs]):
        make(*todo[0])
        os.execv(
            sys.executable, [sys.executable, *sys.argv]
        )  # from the start: the result may choose the next


if __name__ == "__main__":
    main()
