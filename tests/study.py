"""The study: which algorithm is better on the tiny model, at equal cost, with error bars.

    python tests/bench.py curves             # every run that is missing, the most wanted first; stop it when you like
    python tests/bench.py curves --plot      # tests/curves/README.md with all tables, and the figures

A run is a script's command line, from TABLES, and a seed. Runs in progress are in runs/curves/; a finished one leaves
tests/curves/NAME-SEED.jsonl, its evaluated iterations, and a line in tests/curves/runs.json: command, commit, machine
and a fingerprint of its settings. It counts while command and fingerprint are those of the scripts as they are now.
"""

import dataclasses
import hashlib
import importlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import common

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
CURVES = ROOT / "tests" / "curves"
SCRIPTS = ("grpo", "gcpo", "tempflow_grpo")
BUDGET, IMAGES = 360_000, 10_000  # where runs are compared: velocity evaluations, and images scored
SEEDS, TUNING_SEEDS = 5, (10, 11)
RATES = {  # half, the script's own, and double
    "grpo": ("0.00035", "0.0007", "0.0014"),
    "gcpo": ("0.00035", "0.0007", "0.0014"),
    "tempflow_grpo": ("0.0005", "0.001", "0.002"),
}
ALL_RATES = ("0.0007", "0.0014", "0.0028")  # GRPO's own was found on early steps; on all nine it may want another
NOISES = {"dance": ("0.3", "0.5", "0.8", "1.2", "2", "3"), "cps": ("0.5", "0.65", "0.8")}
NOISE = {"dance": "3", "cps": "0.65"}  # what the study takes of these: the tuning's best
FIRST = {"GRPO": 0.650, "GCPO": 0.589, "TempFlow-GRPO": 0.707}  # what the study said before, at 140,000 evaluations
FIRST_BUDGET, FIRST_RATE = 140_000, 2e-3


class Row(NamedTuple):
    """A line of a table: a run, and what it is compared with."""

    name: str
    line: str = ""  # script and options; empty where another table has them
    evals: int = 0  # velocity evaluations an iteration; where chunks are drawn, or cut by the curve, their mean
    other: str = ""  # the run that it is compared with
    claim: str = ""  # what a paper says of the two: "better ..." or "worse ..."


# An iteration of grpo.py and gcpo.py has 96 trajectories of 10 steps, K of them random: 960 + 3 * 96 K evaluations. In
# its second update gcpo.py makes one more for each trained step of a chunk: 48 K if all are trained.
FIXED, ADAPTIVE = (f"gcpo --sde-steps all --chunks {chunks} --chunk-fraction" for chunks in ("2,3,4", "adaptive"))
COST = {"grpo": 2400, "gcpo": 2640, "tempflow_grpo": 2448}
# The most wanted first; what depends on the tuning comes after it.
TABLES = {
    "main": [
        Row("grpo", "grpo", COST["grpo"]),
        Row("gcpo", "gcpo", COST["gcpo"], "grpo", "better [GC]"),
        Row("tempflow_grpo", "tempflow_grpo", COST["tempflow_grpo"], "grpo", "better [TF]"),
    ],
    "like for like": [
        Row("grpo-all", "grpo --sde-steps all", 3552),
        Row("grpo", other="grpo-all"),
        Row("grpo-5", "grpo --sde-steps 5", 2400, "grpo-all"),
        Row("gcpo-fixed-all", f"{FIXED} 1", 3984, "grpo-all", "better: one ratio a chunk [GC]"),
        Row("gcpo-fixed-half", f"{FIXED} 0.5", 2976, "gcpo-fixed-all"),
        Row("gcpo-fixed-half", other="grpo-5", claim="better: one ratio a chunk, same share [GC]"),
        Row("gcpo-adaptive-all", f"{ADAPTIVE} 1", 3958, "gcpo-fixed-all", "better: adaptive chunks [GC]"),
        Row("gcpo-adaptive-half", f"{ADAPTIVE} 0.5", 2862, "gcpo-fixed-half", "better: adaptive chunks [GC]"),
        Row("gcpo-weighted", f"{ADAPTIVE} 0.5 --weighted-sampling", 2850, "gcpo-adaptive-half",
            "better: weighted sampling [GC]"),
        Row("gcpo-one-chunk", "gcpo --sde-steps all --chunks 9 --chunk-fraction 1", 3984, "gcpo-adaptive-all",
            "worse: one chunk of all steps [GC]"),
    ],
    "TempFlow-GRPO": [
        Row("tempflow_grpo", other="grpo-all", claim="better: all steps in both [TF]"),
        Row("tempflow-unweighted", "tempflow_grpo --weighting none", 2448, "tempflow_grpo", "worse: no weights [TF]"),
        Row("tempflow-prompt-group", "tempflow_grpo --group prompt", 2448, "tempflow_grpo",
            "worse: groups of a prompt [TF]"),
        Row("tempflow-early", "tempflow_grpo --sde-steps early", 1840, "tempflow_grpo",
            "better, if early steps decide most [TF]"),
        Row("tempflow-early", other="grpo", claim="better: early steps in both [TF]"),
    ],
    "17 steps": [
        Row("grpo-17", "grpo --steps 17 --sde-steps all", 6240),
        Row("gcpo-17", "gcpo --steps 17 --sde-steps all --chunks 2,3,4,7 --chunk-fraction 0.5", 4320, "grpo-17",
            "better [GC]"),
    ],
    "tuning": [
        *(Row(f"tuning-{script}-{rate}", f"{script} --learning-rate {rate}", COST[script],
              f"tuning-{script}-{rates[1]}") for script, rates in RATES.items() for rate in rates),
        *(Row(f"tuning-grpo-all-{rate}", f"grpo --sde-steps all --learning-rate {rate}", 3552,
              f"tuning-grpo-all-{ALL_RATES[0]}") for rate in ALL_RATES),
        *(Row(f"tuning-{sde}-{a}", f"grpo --sde {sde} --noise-level {a}", 2400, f"tuning-{sde}-{NOISE[sde]}")
          for sde in NOISES for a in NOISES[sde]),
    ],
    "noise": [
        Row("grpo"),
        Row("grpo-3", "grpo --sde-steps 3", 1824, "grpo"),
        Row("grpo-dance", f"grpo --sde dance --noise-level {NOISE['dance']}", 2400, "grpo"),
        Row("grpo-cps", f"grpo --sde cps --noise-level {NOISE['cps']}", 2400, "grpo", "better [CPS]"),
    ],
}  # fmt: skip
RUNS = {row.name: row for rows in TABLES.values() for row in rows if row.line}
QUESTIONS = {
    "main": "The three scripts with their defaults.",
    "like for like": "What is the effect of the chunk, and what that of the share of steps that is trained? All nine "
    "steps are random, but in `grpo` the first five, and in `grpo-5` five drawn in each iteration. Half of the chunks "
    "are six steps, or a little less.",
    "TempFlow-GRPO": "Against GRPO on the same steps; what its parts add; branches at the first five of nine steps.",
    "17 steps": "The steps and chunks of [GC] on this model, half of the chunks trained.",
    "tuning": "Against the value that the study has; where the difference is positive, another is better. Seeds 10 and "
    "11, which are not the study's; two seeds make wide intervals. The runs on all nine steps have "
    "the rate that was found on early ones; `tuning-grpo-all` asks whether they want another.",
    "noise": "Other random steps, with a noise level tuned for each, and three steps drawn in each iteration.",
}


def command(name, seed):
    """The command line of a run, without its --output. Its iterations are those that pass BUDGET, at an evaluation.

    The three scripts themselves run with nothing but their names: to the end of their defaults, which is later.
    """
    script, _, options = RUNS[name].line.partition(" ")
    if not options:
        return f"python {script}.py --seed {seed}"
    iterations = -(-BUDGET // (10 * RUNS[name].evals)) * 10
    return f"python {script}.py {options} --iterations {iterations} --eval-every 10 --seed {seed}".replace("  ", " ")


def jobs_of(seeds):
    """(name, seed) of every run, the most wanted first: table by table, and seed by seed in each."""
    seeds_in = {title: TUNING_SEEDS if title == "tuning" else range(seeds) for title in TABLES}
    return [(row.name, seed) for title, rows in TABLES.items() for seed in seeds_in[title] for row in rows if row.line]


def settings_of(name, seed):
    """The settings that the command means now, with the script's defaults, and the hashes of its prompts."""
    _, script, *options = command(name, seed).split()
    module = importlib.import_module(script.removesuffix(".py"))
    args = common.parse_args(module.Args, module.DEFAULTS, [*options, "--output", "runs/none"])
    return dataclasses.asdict(args), common.prompts_hashes(args)


def fingerprint(settings, prompts):
    """A hash of what decides a run's numbers. What is off does not count: a new option leaves old runs as they are.

    prompts: hashes of the prompts, which stand for the paths of the files.
    """
    free = "output resume wandb device micro_batch save_every prompts eval_prompts".split()
    counted = {name: value for name, value in settings.items() if value and name not in free}
    return hashlib.sha256(json.dumps([counted, prompts], sort_keys=True).encode()).hexdigest()[:12]


def read_runs(folder=CURVES):
    """{name-seed: command, fingerprint, commit, machine ...} of the runs that are there, whatever their settings."""
    path = folder / "runs.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def load(folder=CURVES):
    """{name: {seed: its lines of metrics}} of the runs that are there with the command and settings of now."""
    runs = {name: {} for name in RUNS}
    for key, run in read_runs(folder).items():
        name, seed = key.rsplit("-", 1)
        current = name in RUNS and run["command"] == command(name, seed)
        if current and run["settings"] == fingerprint(*settings_of(name, seed)):
            text = (folder / f"{key}.jsonl").read_text("utf-8")
            runs[name][int(seed)] = [json.loads(line) for line in text.splitlines()]
    return runs


# ---------------------------------------------------------------- the runs


def start(name, seed, work):
    """Start a run in a process of its own with one thread, or go on with it where it was stopped."""
    folder = work / f"{name}-{seed}"
    config, (settings, prompts) = folder / "config.json", settings_of(name, seed)
    config = json.loads(config.read_text("utf-8")) if config.exists() else {}
    if config.get("settings") == settings | {"output": str(folder)} and config["prompts_sha256"] == prompts:
        options = ["--resume", str(folder)]
    else:  # nothing is there, or the command or the script's defaults have changed since
        shutil.rmtree(folder, ignore_errors=True)
        options = [*command(name, seed).split()[2:], "--output", str(folder)]
    work.mkdir(parents=True, exist_ok=True)
    with open(work / f"{name}-{seed}.log", "w", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, command(name, seed).split()[1], *options],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,  # a Ctrl-C reaches the runs once, through run_study
        )


def keep(name, seed, work, curves):
    """Copy what is to be committed of a finished run: its evaluated iterations, and how it was made.

    Numbers have five digits. Seconds are left out, what is there twice, and lists by step. Of seed 0 of each script
    the lists are kept, and its seconds in all. Returns in words what came out.
    """
    folder, by_step, cpu = work / f"{name}-{seed}", name in SCRIPTS and seed == 0, Path("/proc/cpuinfo")

    def wanted(key, value):
        return not (key.endswith("_s") or "/" in key or (isinstance(value, list) and not by_step))

    config = json.loads((folder / "config.json").read_text("utf-8"))
    text = (folder / "metrics.jsonl").read_text("utf-8")
    lines = [json.loads(line, parse_float=lambda digits: float(f"{float(digits):.5g}")) for line in text.splitlines()]
    seconds = sum(value for line in lines for key, value in line.items() if key.endswith("_s"))
    lines = [{k: v for k, v in line.items() if wanted(k, v)} for line in lines if "eval_reward" in line]
    curves.mkdir(parents=True, exist_ok=True)
    (curves / f"{name}-{seed}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    processor = re.findall("model name.*: (.*)", cpu.read_text() if cpu.exists() else "") or [platform.machine()]
    runs = read_runs(curves)
    runs[f"{name}-{seed}"] = {
        "command": command(name, seed),
        "settings": fingerprint(config["settings"], config["prompts_sha256"]),
        "commit": config["commit"],
        "machine": f"{config['settings']['device']}, {processor[0]}, one thread",
        "versions": config["versions"],
        "resumed": len(config.get("resumed", [])),
        "seconds": round(seconds) if by_step else None,
    }
    text = ",\n".join(f"{json.dumps(key)}: {json.dumps(runs[key])}" for key in sorted(runs))
    (curves / "runs.json").write_text(f"{{\n{text}\n}}\n", "utf-8")
    first, last = lines[0], lines[-1]
    return f"{first['eval_reward']:.3f} -> {last['eval_reward']:.3f} at {last['velocity_evals']:,} evaluations"


def run_study(jobs, workers, work=ROOT / "runs" / "curves", curves=CURVES):
    """Do the jobs that curves does not have, several at a time. Returns the exit status."""
    have, running, failed = load(curves), {}, 0
    todo = [(name, seed) for name, seed in jobs if seed not in have[name]]
    print(f"{len(jobs) - len(todo)} runs are there, {len(todo)} to do, {workers} at a time", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tqdm(total=len(todo), desc="runs") as bar:
            while todo or running:
                while todo and len(running) < workers:
                    job = todo.pop(0)
                    running[job] = start(*job, work)
                time.sleep(0.1)
                for job in [job for job, process in running.items() if process.poll() is not None]:
                    status, log = running.pop(job).returncode, work / "{}-{}.log".format(*job)
                    failed += status != 0
                    ended = f"ended with status {status}: {log.read_text('utf-8')[-300:]}"
                    bar.write("{}-{}: ".format(*job) + (ended if status else keep(*job, work, curves)))
                    bar.update()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # seconds until all have saved
        for process in running.values():
            process.terminate()  # it saves and ends
        for process in running.values():
            process.wait()
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 1 if failed else 0


# ---------------------------------------------------------------- what came out


# 97.5% quantiles of Student's t by degrees of freedom: the half width of a 95% interval in standard errors
T_QUANTILE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def at(lines, budget=BUDGET, axis="velocity_evals", value="eval_reward"):
    """A metric where a cost is reached, on the straight line between the two evaluations around it.

    budget: a cost or an array of them; axis: velocity_evals or images, which begin at 0.
    """
    cost = [line.get(axis, 0) for line in lines]
    if cost[-1] < np.max(budget):
        raise ValueError(f"a run ended at {cost[-1]} {axis}, before {np.max(budget)}")
    return np.interp(budget, cost, [line.get(value, 0) for line in lines])


def mean_interval(values):
    """Mean over the first axis, of one to ten seeds, and half width of its 95% interval; that of one seed is nan."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 1:
        return values[0], values[0] * np.nan
    return values.mean(0), T_QUANTILE[len(values) - 1] * values.std(0, ddof=1) / len(values) ** 0.5


def words(values, sign=""):
    """Mean and interval as text; one seed has no interval."""
    if not values:
        return "missing"
    mean, half = mean_interval(values)
    return f"{mean:{sign}.3f}" + ("" if np.isnan(half) else f" ± {half:.3f}")


def verdict(claim, differences):
    """Whether a claim, "better ..." or "worse ...", holds: whether the whole interval is on its side of 0."""
    if not claim or not differences:
        return "missing" if claim else ""
    mean, half = mean_interval(differences)
    mean = mean if claim.startswith("better") else -mean
    return "holds" if mean > half else "does not hold" if mean < -half else "cannot be told"


def markdown(header, rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def tables(folder=CURVES):
    """{title: a table of results in markdown}. The README at the top has "main" as it stands here."""
    runs, found = load(folder), {}
    reward = {name: {seed: at(lines) for seed, lines in seeds.items()} for name, seeds in runs.items()}
    for title, rows in TABLES.items():
        header, cells = "run|held-out reward|difference, same seeds|from|seeds|images scored|claim|verdict", []
        header += f"|reward at {IMAGES:,} images|seconds on one core" if title == "main" else ""
        for name, _, _, other, claim in rows:
            both = [seed for seed in reward[name] if seed in reward.get(other, {})]
            differences = [reward[name][seed] - reward[other][seed] for seed in both]
            images = [at(lines, value="images") for lines in runs[name].values()]
            row = [f"`{name}`", words(list(reward[name].values()))]
            row += [words(differences, "+"), f"`{other}`"] if other not in ("", name) else ["", ""]
            row += [str(len(images)), f"{np.mean(images):,.0f}" if images else "missing"]
            row += [claim, verdict(claim, differences)]
            if title == "main":
                row.append(words([at(lines, IMAGES, "images") for lines in runs[name].values()]))
                one = runs[name].get(0)
                seconds = one and read_runs(folder)[f"{name}-0"].get("seconds")
                row.append(f"{seconds * BUDGET / one[-1]['velocity_evals']:.0f}" if seconds else "missing")
            cells.append(row)
        found[title] = markdown(header.split("|"), cells)
    return found


README = """# The study: three algorithms on the tiny model, at equal cost

Written by `python tests/bench.py curves --plot` from {count} runs of `python tests/bench.py curves`: `NAME-SEED.jsonl`
has a run's evaluated iterations, `runs.json` its command, commit, machine and versions.

![Held-out reward over velocity evaluations, the three scripts](curves.png)

- *Held-out reward*: of 48 prompts that are never trained on, four images each, by ODE, when a run has made {budget:,}
  velocity evaluations in training; 0.502 before. *±*: half of a 95% interval, Student's t over the seeds.
- *Verdict* on what a paper claims: it holds where the difference's whole interval is on its side of 0, does not hold
  where the whole is on the other, and else cannot be told. By chance one interval in twenty misses the truth.
- *Seconds on one core*: to {budget:,} evaluations, from seed 0 of each script, one thread on a core of its own.
- The defaults of the three scripts were tuned by hand on seeds 0 to 2, so their table tells what tuning can do.
- Letters in brackets are references of the README at the top.

{first}

{tables}
![Held-out reward over velocity evaluations, table by table](ablations.png)

## Missing

{missing}

## Commands

`S` is a seed: 0 to {last}, or {tuning} where the name begins with tuning. Evaluations are those of an iteration.

{commands}
"""


def report(folder=CURVES):
    """Write the page of all results, README.md beside the metrics. What is not there is told as missing."""
    before = ", ".join(f"{name} {reward:.3f}" for name, reward in FIRST.items())
    first = (
        f"The first study had a learning rate of {FIRST_RATE:g}, no moving average of the adapter and half of GCPO's "
        f"chunks, and said at {FIRST_BUDGET:,} velocity evaluations: {before}. Now the rate is "
        "half of that or less, the average is on, early steps are the default, and like is compared with like: the "
        "second table asks what of GCPO's deficit was the share of steps left out."
    )
    runs, have, missing = load(folder), read_runs(folder), {}
    for name, seed in jobs_of(SEEDS):
        if seed not in runs[name]:
            old = " (made with other settings)" if f"{name}-{seed}" in have else ""
            missing.setdefault(name, []).append(f"{seed}{old}")
    missing = [f"- `{name}`: seeds {', '.join(seeds)}" for name, seeds in missing.items()]
    found, fill = tables(folder), partial(textwrap.fill, width=120)
    titled = [f"## {title}\n\n{fill(QUESTIONS[title])}\n\n{table}\n" for title, table in found.items()]
    commands = [[f"`{name}`", f"`{command(name, 'S')}`", f"{RUNS[name].evals:,}"] for name in RUNS]
    text = README.format(
        budget=BUDGET,
        count=sum(map(len, runs.values())),
        first=fill(first),
        tables="\n".join(titled),
        missing="\n".join(missing or ["Nothing."]),
        last=SEEDS - 1,
        tuning=" and ".join(map(str, TUNING_SEEDS)),
        commands=markdown(["run", "command", "evaluations"], commands),
    )
    (folder / "README.md").write_text(text, "utf-8")
    print(f"wrote {folder}/README.md; missing: {len(missing) or 'nothing'}")


def draw(axes, runs, names, seeds=False):
    """Mean curves of the runs that are there, and thin lines for their seeds, or 95% intervals at the end."""
    cost, lines = np.linspace(0, BUDGET, 97), []
    for name in filter(runs.get, names):
        middle, half = mean_interval([at(run, cost) for run in runs[name].values()])
        lines += axes.plot(cost / 1000, middle, label=f"{name}, {len(runs[name])} seeds")
        colour = lines[-1].get_color()
        if seeds:
            for run in runs[name].values():
                axes.plot(cost / 1000, at(run, cost), color=colour, alpha=0.4, linewidth=0.8)
        else:
            axes.errorbar(BUDGET / 1000 + 5 * len(lines), middle[-1], half[-1], color=colour, fmt="o", capsize=2)
    axes.set(xlabel="velocity evaluations in training, thousands", ylabel="reward of held-out prompts")
    axes.grid(alpha=0.3)
    axes.legend(handles=lines, loc="upper left", fontsize="small")


def plot(folder=CURVES):
    """Write curves.png, the three scripts, and ablations.png, the other tables: held-out reward over cost."""
    from matplotlib.figure import Figure

    runs = load(folder)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    draw(figure.subplots(), runs, SCRIPTS, seeds=True)
    figure.savefig(folder / "curves.png", dpi=120)
    figure = Figure(figsize=(13, 10), layout="constrained")
    titles = [title for title in TABLES if title not in ("main", "tuning")]
    for axes, title in zip(figure.subplots(2, 2, sharex=True, sharey=True).flat, titles):
        draw(axes, runs, dict.fromkeys(row.name for row in TABLES[title]))
        axes.set_title(title)
    figure.savefig(folder / "ablations.png", dpi=90)
