"""The study: which algorithm is better on the tiny model, at equal cost, with error bars.

    python tests/study.py run [--only KEY...]   # missing runs, the most important first; repeat it to resume
    python tests/study.py add FOLDER...         # keep what is to be committed of finished run folders
    python tests/study.py page                  # tests/curves/README.md, the figures, README.md's claims

The text of the page and the rows of its tables are in tests/curves/page.txt: run | other run | claim | by. A
claim marked with * is also one of README.md's. A table compares runs at the budget, or averaged up to it.
A run is a name, `gcpo flow 0.7 all --chunks 9` (script, sampler, noise, random steps, options), and a seed.
While it runs it is in runs/study. Committed are its evaluated iterations, its command and its commit.
"""

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).resolve().parents[1]
CURVES = ROOT / "tests" / "curves"
BUDGET = 360_000  # velocity evaluations at which runs are compared
COSTS = np.linspace(0, BUDGET, 97)  # of curves, and of averages over a run
ADAPTIVE = "flow 0.7 all --chunks adaptive --chunk-max 4 --chunk-fraction 1"
QUIET = 12  # the seed of the runs that are timed, with the machine to themselves

# Set these before the other runs are made. How they were chosen is on the page.
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
    "all": "flow 0.7",  # on all steps, where the others leave the image noisy or stop learning
}
RATE = dict(grpo="0.0007", gcpo="0.0007", mixgrpo="0.0007", tempflow_grpo="0.001")  # of a name without one
HOLE = "--reward tests/tiny/hole.py:colours_and_shapes --eval-reward shapes --kl-coef"


class Row(NamedTuple):  # of a table
    name: str
    other: str = ""  # the run it is compared with
    claim: str = ""  # that the difference is positive
    source: str = ""


def plain(name):
    """A name without the learning rate that it would have anyway."""
    return name.removesuffix(f" --learning-rate {RATE.get(name.split(' ')[0])}")


STEPS = {"grpo": "early", "gcpo": "early --chunks 2,3 --chunk-fraction 1", "tempflow_grpo": "early"}
SCRIPTS = tuple(STEPS)
DEFAULT = {s: plain(f"{s} {TUNED[s][0]} {STEPS[s]} --learning-rate {TUNED[s][1]}") for s in STEPS}
TWICE = f"{DEFAULT['grpo']} --learning-rate 0.0014"  # the default rate of grpo.py until it was found unsteady


def read_page():
    """The text of page.txt with {} for each table, and the tables: (rows, seeds, averaged or not)."""
    places = {name: value if isinstance(value, str) else value[0] for name, value in TUNED.items()}
    places |= dict(zip("GCT", DEFAULT.values())) | {"hole": HOLE, "twice": TWICE}
    tables = []

    def read(match):
        lines = match[3].format(**places).strip().splitlines()
        rows = [Row(*(plain(cell.strip()) for cell in line.split("|"))) for line in lines]
        tables.append((rows, tuple(map(int, match[1].split())), bool(match[2])))
        return f"{{tables[{len(tables) - 1}]}}"

    text = (CURVES / "page.txt").read_text("utf-8")
    return re.sub(r"(?ms)^\[rows ([\d ]+?)( averaged)?$(.*?)^\]$", read, text), tables


TEXT, TABLES = read_page()


def evals_of(name):
    """Velocity evaluations per iteration. Transitions of advantage 0 count, though they are left out."""
    script, _, _, steps, *_ = name.split()
    options = dict(re.findall(r"--(\S+) (?!--)(\S+)", name))
    T = int(options.get("steps", 10))
    K = {"all": T - 1, "early": T // 2}.get(steps) or int(steps)
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


def key_of(name, seed):
    """A run's name in runs.json and of its .jsonl: without dashes, commas and paths."""
    short = name.replace(HOLE, "hole kl").replace("--", "").replace("chunk-fraction", "of").replace(",", "")
    return "-".join([*short.split(), str(seed)])


def jobs():
    """(name, seed) of all runs: tuning, then table by table as on the page, in each seed by seed."""
    found = {}
    for rows, seeds, _ in [TABLES[-1], *TABLES[:-1]]:
        names = dict.fromkeys(name for row in rows for name in row[:2] if name)
        found |= dict.fromkeys((name, seed) for seed in seeds for name in names)
    return [*(found | dict.fromkeys((name, QUIET) for name in DEFAULT.values()))]


def options_of(command):
    """{option: value} of a command line, without those that change no number of an iteration."""
    free, options = ("iterations", "eval-every", "output", "resume"), r"--(\S+)(?: (?!--)(\S+))?"
    return {option: value for option, value in re.findall(options, command) if option not in free}


def read_runs(folder=CURVES):
    """{key: command, commit, machine, ...} of the runs in a folder."""
    path = folder / "runs.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def load(folder=CURVES):
    """{(name, seed): lines of metrics} of the runs in a folder."""
    made, runs = read_runs(folder), {}
    for job, key in [(job, key_of(*job)) for job in jobs() if key_of(*job) in made]:
        if options_of(made[key]["command"]) == options_of(command(*job)):
            lines = (folder / f"{key}.jsonl").read_text("utf-8").splitlines()
            runs[job] = [json.loads(line) for line in lines]
    return runs


# ---------------------------------------------------------------- making runs


def run_of(config):
    """(name, seed) of the run with the settings of a config.json: the one with most options that agrees."""
    given, settings, found = options_of(config["command"]), config["settings"], []

    def agrees(option, value):
        setting = settings.get(option.replace("-", "_"))
        setting = "2,3" if setting == "halves" else setting  # of five steps
        if isinstance(setting, bool) or not isinstance(setting, int | float):
            return setting is True if value == "" else str(setting).endswith(value)  # a path may be absolute
        return setting == float(value)

    for job in jobs():
        options = options_of(command(*job))
        ours = config["script"] in (job[0].split()[0], "grpo" if "window" in job[0] else "")
        if ours and not given.keys() - options.keys() and all(agrees(*pair) for pair in options.items()):
            found.append((len(options), job))
    if not found:
        raise SystemExit(f"error: no row has a run with these settings: {config['command']}")
    return max(found)[1]


def add(folder, curves=CURVES, commit=None, machine=None):
    """Keep what is to be committed of a finished run: its evaluated iterations, and a line in runs.json.

    Numbers have five digits. Left out are seconds of phases, parts of rewards that say the same and, but for
    seed 0 of gcpo.py and tempflow_grpo.py, lists by step. `seconds` is the training up to a line.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (name, seed), settings = run_of(config), config["settings"]
    text = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    lines = [json.loads(line, parse_float=lambda digits: float(f"{float(digits):.5g}")) for line in text]
    commit, last = commit or config["commit"], lines[-1]["iteration"]
    if not commit or last * evals_of(name) < BUDGET or last < settings["iterations"]:
        raise SystemExit(f"error: {folder} is not finished, or has no commit; give --commit")
    lists, kept, seconds = seed == 0 and name.split()[0] != "grpo", "", 0.0

    def keeps(key, value, reward):
        twice = key.startswith(("reward/", "reward_std/")) or (key.startswith("eval/") and value == reward)
        return not (twice or key.endswith("_s") or (isinstance(value, list) and not lists))

    for line in lines:
        seconds += sum(line.get(f"{phase}_s", 0) for phase in ("rollout", "reward", "train"))
        if "eval_reward" in line:
            line = {key: value for key, value in line.items() if keeps(key, value, line["eval_reward"])}
            kept += json.dumps(line | {"seconds": round(seconds)}) + "\n"
    cpu = Path("/proc/cpuinfo")
    cpus = re.findall("model name.*: (.*)", cpu.read_text() if cpu.exists() else "") or [platform.machine()]
    curves.mkdir(parents=True, exist_ok=True)
    (curves / f"{key_of(name, seed)}.jsonl").write_text(kept, "utf-8")
    machine = machine or f"{settings['device']}, {cpus[0]}, one thread"
    exact = re.sub(r"--iterations \d+", f"--iterations {settings['iterations']}", command(name, seed))
    made = {"command": exact, "commit": commit, "machine": machine}
    made |= {"versions": config["versions"], "seconds": round(seconds)}
    runs = read_runs(curves) | {key_of(name, seed): made}
    text = ",\n".join(f"{json.dumps(key)}: {json.dumps(runs[key])}" for key in sorted(runs))
    (curves / "runs.json").write_text(f"{{\n{text}\n}}\n", "utf-8")
    return f"{name}, seed {seed}: {lines[0]['eval_reward']:.3f} -> {lines[-1]['eval_reward']:.3f}"


PROCESSES = []


def make(name, seed, work=ROOT / "runs" / "study"):
    """Make a run in a process with one thread, or resume it. Returns its folder and its status."""
    folder, (_, script, *options) = work / key_of(name, seed), command(name, seed).split()
    if (folder / "checkpoint.pt").exists():
        options = ["--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)
        options += ["--output", str(folder)]
    work.mkdir(parents=True, exist_ok=True)
    more = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "stderr": subprocess.STDOUT}
    log = open(f"{folder}.log", "w", encoding="utf-8")
    PROCESSES.append(process := subprocess.Popen([sys.executable, script, *options], stdout=log, **more))
    return folder, process.wait()


def make_all(todo, workers, curves=CURVES):
    """Make runs, several at a time, and add them. What Ctrl-C stops has saved its last iteration."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ThreadPoolExecutor(workers) as pool:
        try:
            for folder, status in pool.map(make, *zip(*todo)) if todo else ():
                print(f"failed, see {folder}.log" if status else add(folder, curves), flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in PROCESSES:
                process.terminate()
            raise SystemExit("stopped; the same command resumes")


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
    """Whether the whole 95% interval is over 0, as the claim says."""
    if not claim or not differences:
        return "not run" if claim else ""
    mean, half = mean_interval(differences)
    return "holds" if mean > half else "does not hold" if mean < -half else "inconclusive"


def markdown(header, cells):
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *cells])


def claims(runs, mark=""):
    """The table of claims: all of them, or those with the mark."""
    cells = []
    marked = [(row, *rest) for rows, *rest in TABLES for row in rows if row.claim and mark in row.claim]
    for row, seeds, averaged in marked:
        found = effect(runs, row, seeds, averaged)
        images = [[value_at(n, runs[n, s], "images") for s in seeds if (n, s) in runs] for n in row[:2]]
        one, other = (np.mean(numbers or 0) for numbers in images)
        scored = f"{one:,.0f} against {other:,.0f}" if found and abs(one - other) > 0.02 * other else ""
        shown = words(found, "+"), str(len(found) or ""), verdict(row.claim, found), scored
        cells.append([row.claim.removeprefix("*"), row.source, *shown])
    header = "claim|claimed by|effect|seeds|verdict|images scored, if different"
    return markdown(header.split("|"), cells)


def table(runs, rows, seeds, averaged):
    """Held-out reward of the runs of a table, and their effects."""
    others = [Row(row.other) for row in rows if row.other not in ("", *(row.name for row in rows))]
    cells = []
    for row in dict.fromkeys([*others, *rows]):
        reward = list(values(runs, row.name, seeds, averaged).values())
        found = effect(runs, row, seeds, averaged)
        compared = [words(found, "+"), f"`{row.other}`"] if row.other not in ("", row.name) else ["", ""]
        seeds_of = str(len(found if compared[1] else reward) or "")
        cells.append([f"`{row.name}`", words(reward), *compared, seeds_of, verdict(row.claim, found)])
    return markdown(["run", "held-out reward", "effect", "compared with", "seeds", "verdict"], cells)


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


# ---------------------------------------------------------------- the figures


COST, REWARD = "velocity evaluations in training, thousands", "reward of held-out prompts"


def finish(axes, title="", x=COST, y=REWARD, **legend):
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    if not axes.has_data():
        return axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", **legend)


def mean_curve(axes, runs, name, label, seeds=range(8), metric="eval_reward", **style):
    """Mean of a metric over cost, with a thin line per seed."""
    found = [runs[name, seed] for seed in seeds if (name, seed) in runs]
    curves = [value_at(name, lines, metric, COSTS) for lines in found]
    if curves:
        (line,) = axes.plot(COSTS / 1000, np.mean(curves, 0), label=f"{label} ({len(found)} seeds)", **style)
        axes.plot(COSTS / 1000, np.transpose(curves), color=line.get_color(), alpha=0.3, linewidth=0.7)


def draw_curves(axes, runs):
    for script, name in DEFAULT.items():
        mean_curve(axes[0], runs, name, f"{script}.py")
        lines = runs.get((name, QUIET), [])
        points = [(line["seconds"], line["eval_reward"]) for line in lines]
        axes[2].plot(*zip(*points), label=f"{script}.py") if points else None
    mean_curve(axes[0], runs, "grpo flow 0.7 early", "grpo.py, flow 0.7", color="0.6")
    mean_curve(axes[1], runs, "grpo flow 0.7 all", "grpo.py")
    mean_curve(axes[1], runs, f"gcpo {ADAPTIVE}", "gcpo.py, adaptive chunks")
    mean_curve(axes[1], runs, "tempflow_grpo flow 0.7 all", "tempflow_grpo.py")
    finish(axes[0], "early steps random: defaults, and flow 0.7")
    finish(axes[1], "all steps random: flow 0.7")
    finish(axes[2], f"defaults to their end, seed {QUIET}", "seconds of training on one CPU core")
    for one in axes:
        one.set_ylim(0.45, 0.95)


def draw_noise(axes, runs):
    rows, seeds, _ = TABLES[-1]
    for number, (sde, one) in enumerate(zip(("flow", "precise", "dance", "cps"), axes[1:])):
        mean_curve(axes[0], runs, f"grpo {TUNED[sde]} early", TUNED[sde], range(5), color=f"C{number}")
        for steps, style in (("early", "o-"), ("all", "x--")):
            levels = sorted({row.name.split()[2] for row in rows if row.name.split()[1] == sde}, key=float)
            found = {level: values(runs, f"grpo {sde} {level} {steps}", seeds).values() for level in levels}
            found = {level: list(rewards) for level, rewards in found.items() if rewards}
            points = [(float(level), reward) for level, rewards in found.items() for reward in rewards]
            if points:
                means, label = [np.mean(rewards) for rewards in found.values()], f"{steps} steps"
                one.plot(
                    [*map(float, found)],
                    means,
                    style[1:],
                    color=f"C{number}",
                    label=None if number else label,
                )
                one.plot(*zip(*points), style[0], color=f"C{number}")
        one.set_ylim(0.35, 0.95)
        finish(one, f"{sde}, seeds 10 and 11", "a" if sde == "flow" else "eta", "")
    mean_curve(axes[0], runs, "grpo flow 0.7 early", "flow 0.7", range(5), color="0.6")
    finish(axes[0], "grpo.py, early steps")


def draw_hacking(axes, runs):
    for number, name in enumerate(row.name for row in TABLES[-5][0]):
        kl, colour = f"KL {name.split()[-1]}", f"C{number}"
        mean_curve(axes[0], runs, name, f"{kl}, trained reward", color=colour, linestyle="--")
        mean_curve(axes[0], runs, name, f"{kl}, full reward", metric="eval/shapes", color=colour)
    axes[0].set_ylim(0, 1)
    finish(axes[0], loc="lower center", ncols=3)


def draw_chunks(axes, runs):
    rows, seeds, _ = TABLES[-4]
    axes[0].axhline(0, color="0.6")
    for row in (row for row in rows if row.other == rows[0].other):
        if numbers := effect(runs, row, seeds):
            mean, half = mean_interval(numbers)
            sizes = row.name.split("--chunks ")[1].split()[0]
            axes[0].errorbar(sizes, mean, np.nan_to_num(half), fmt="o", capsize=3, color="C0")
    finish(axes[0], "gcpo.py, all steps, flow 0.7: 95% intervals", "chunks", "reward minus that of grpo.py")


def base_model():
    """The tiny model before training: (policy, held-out prompts, their text, sigmas)."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tiny")]
    import common
    import grpo

    args = common.parse_args("grpo", grpo.Args, grpo.DEFAULTS, ["--device", "cpu", "--output", "runs/none"])
    policy, prompts = common.make_policy(args, 48), common.read_prompts(args.eval_prompts)
    return policy, prompts, policy.encode(prompts)[0], policy.sigmas(args.steps)


def chunks_of_the_base_model(each=4, noise=("flow", 0.7), chunk_max=4):
    """Metrics of adaptive chunks on all steps, of some trajectories for each held-out prompt."""
    policy, prompts, text, sigmas = base_model()
    import torch

    import common
    import gcpo

    generator, K = common.generator(0, "chunks", 0), len(sigmas) - 2
    start = [policy.noise(len(prompts), each, generator) for _ in range(1 + K)]
    s, index = common.noise_scale(sigmas, *noise), torch.arange(len(prompts) * each) // each
    x, x_next, *_ = gcpo.rollout(policy, text, index, start, sigmas, s, noise[0], range(K))
    l1rel = ((x_next - x).flatten(2).norm(1, 2) / x.flatten(2).norm(1, 2)).T
    return gcpo.chunk_metrics(l1rel, [gcpo.adaptive_chunks(row, chunk_max) for row in l1rel])


def draw_decided(axes, runs, until=50):
    """By step: spread of the reward over branches, size of the step and its cuts, size of the gradient."""

    def curve(place, name, metric, label):
        early = [line for line in runs.get((name, 0), []) if metric in line and line["iteration"] <= until]
        if early:
            axes[place].plot(np.mean([line[metric] for line in early], 0), "o-", label=label)

    flow, cps = "tempflow_grpo flow 0.7 all", f"tempflow_grpo {TUNED['cps']} all"
    curve(0, flow, "reward_std_by_step", "flow 0.7")
    axes[0].set_ylim(0)
    metrics = chunks_of_the_base_model()
    axes[1].plot(metrics["l1rel_by_step"], "o-", label="L1rel")
    axes[1].plot(metrics["chunk_cuts"], "o-", label="share of images cut before the step")
    axes[1].set_ylim(0, 1.3)
    curve(2, cps, "gradient_by_step", f"{TUNED['cps']}")
    curve(2, flow, "gradient_by_step", "flow 0.7")
    curve(2, flow, "gradient_by_step_weighted", "flow 0.7, with the weight")
    axes[2].set_yscale("log")
    finish(axes[0], "does the reward depend on the step?", "step", "std of the reward over branches")
    finish(axes[1], "how much does the step change the latent?", "step", "L1rel, or share")
    finish(axes[2], "how large is the gradient of log p?", "step", "size over the mean of all steps")


def draw_way(axes, runs, leave=(-1, 1, 6), shown=3, noise=("flow", 0.7)):
    """What the base model would draw if it stopped at each step: an ODE trajectory, and two branches of it.

    Shown are the first prompts whose final reward the early branch changes by over 0.1, and the late one not.
    """
    policy, captions, text, sigmas = base_model()
    import torch

    import common
    from shapes import shapes

    T = len(sigmas) - 1
    s, generator = common.noise_scale(sigmas, *noise), common.generator(0, "way", 0)
    start, index = policy.noise(len(captions), 1, generator), torch.arange(len(captions))
    images, score = {}, torch.zeros(len(leave), T, len(captions))
    for row, branch in enumerate(leave):
        x = start
        for step in range(T):
            with torch.no_grad():
                velocity = policy.velocity_in_micro_batches(x, sigmas[step], text, index)
            images[row, step] = policy.decode(x - sigmas[step] * velocity)
            score[row, step] = shapes(images[row, step], captions)
            levels = sigmas[step], sigmas[step + 1], s[step] if step == branch else 0.0  # 0: an ODE step
            mean, std = common.sde_mean_std(x, velocity, *levels, noise[0])
            x = mean + std * torch.randn(x.shape, generator=generator)
    early, late = (score[1:, -1] - score[0, -1]).abs() > 0.1
    chosen = (early & ~late).nonzero().flatten()[:shown].tolist()
    tiles = np.ones((len(chosen), len(leave), 40, T, 36, 3))
    for n, row, step in np.ndindex(len(chosen), len(leave), T):
        if step > leave[row]:
            tiles[n, row, :32, step, :32] = images[row, step][chosen[n]].permute(1, 2, 0)
            place = 36 * step + 16, 40 * (len(leave) * n + row) + 36
            axes[0].text(*place, f"{score[row, step, chosen[n]]:.2f}", fontsize=7, ha="center", va="center")
    axes[0].imshow(tiles.reshape(-1, 36 * T, 3))
    kinds = ["", *(f"branch at step {step}" for step in leave[1:])]
    labels = [kind or f"{captions[n]}\nODE trajectory" for n in chosen for kind in kinds]
    axes[0].set_yticks(40 * np.arange(len(labels)) + 16, labels, fontsize=8)
    axes[0].set_xticks(36 * np.arange(T) + 16, range(T))
    better = score[0, :-1].amax(0) > score[0, -1] + 0.05
    title = (
        f"final reward changed by over 0.1: by the early branch for {early.sum()} of {len(captions)} prompts"
    )
    title += f", by the late one for {late.sum()}\nbest of the first {T - 1} predictions better than the last"
    axes[0].set_title(f"{title} by over 0.05: {better.sum()}", fontsize=9)
    axes[0].set_xlabel("step at which the image is predicted")


def draw_algorithms(axes, runs, steps=6):
    """What differs between the three algorithms."""

    def path(place, points, random):
        for n in range(len(points) - 1):
            colour, width = ("tab:red", 2.2) if n in random else ("0.6", 1.1)
            arrow = dict(arrowstyle="-|>", color=colour, lw=width, shrinkA=3, shrinkB=3)
            axes[place].annotate("", points[n + 1], points[n], arrowprops=arrow)
        axes[place].plot(*zip(*points), "o", color="0.2", ms=3.5)

    for place in (0, 1):
        for y in range(4):
            points = [(n, y + 0.13 * (-1) ** n * (0 < n < steps)) for n in range(steps + 1)]
            path(place, points, range(steps - 1))
            for x, size in ((0.05, 1.9), (2.05, 2.9)) if place else ():
                axes[place].add_patch(FancyBboxPatch((x, y - 0.22), size, 0.44, "round,pad=0.03", fc="0.93"))
    path(2, [(n, 3.4) for n in range(steps + 1)], ())
    axes[2].text(0.1, 3.6, "trunk, by ODE", fontsize=8, color="0.3")
    for leave, low in ((0, 1.7), (3, -0.1)):
        for y in (low, low + 0.45, low + 0.9):
            path(2, [(leave, 3.4), *((n, y) for n in range(leave + 1, steps + 1))], [0])
    groups = (0, 0, 3, ""), (1, 0, 3, ""), (2, 1.7, 2.6, "of\nstep 0"), (2, -0.1, 0.8, "of\nstep 3")
    for place, low, high, text in groups:
        axes[place].plot(steps + np.array([0.15, 0.3, 0.3, 0.15]), [low, low, high, high], color="tab:blue")
        axes[place].text(
            steps + 0.4, (low + high) / 2, f"group {text}", color="tab:blue", va="center", fontsize=8
        )
    axes[0].set_title("GRPO: the reward of an image goes\nto each of its random steps alike", fontsize=9)
    axes[1].set_title("GCPO: the steps of a chunk (box)\nhave one ratio together", fontsize=9)
    axes[2].set_title("TempFlow-GRPO: a branch has one random\nstep with all of its reward", fontsize=9)
    for one in axes:
        one.set(xlim=(-0.3, steps + 1.5), ylim=(-0.5, 3.9), yticks=[], xticks=[0, steps])
        one.set_xticklabels(["noise", "image"])
    axes[1].set_xlabel("red: a random step (SDE), trained    grey: an ODE step    blue: compared rewards")


FIGURES = {  # width, height, columns
    "curves": (13, 4, 3, draw_curves),
    "noise": (14, 3.6, 5, draw_noise),
    "hacking": (9, 4, 1, draw_hacking),
    "chunks": (6, 4, 1, draw_chunks),
    "decided": (12, 3.5, 3, draw_decided),
    "way": (10, 8.6, 1, draw_way),
    "algorithms": (12, 3.2, 3, draw_algorithms),
}


def page(folder=CURVES, figures=FIGURES):
    """Write the page and the figures. A missing run leaves a blank."""
    runs, wanted, missing = load(folder), jobs(), {}
    for name, seed in [job for job in wanted if job not in runs]:
        missing.setdefault(name, []).append(str(seed))
    lines = "".join(f"- `{name}`: {', '.join(seeds)}\n" for name, seeds in missing.items())
    values = {"have": len(runs), "count": len(wanted), "missing": lines or "None."}
    values |= {"budget": BUDGET, "claims": claims(runs), "ends": ends(runs)}
    values |= {"tables": [table(runs, *which) for which in TABLES]}
    (folder / "README.md").write_text(TEXT.format(**values), "utf-8")
    if folder == CURVES:
        readme, rows = ROOT / "README.md", re.sub(r" *\| *", "|", claims(runs, "*"))
        text = re.sub(r"(?s)\|claim\|.*?(?=\n\n)", rows, readme.read_text("utf-8"))
        readme.write_text(text, "utf-8")
    for name in figures:
        *size, columns, draw = FIGURES[name]
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots(1, columns, squeeze=False)[0], runs)
        figure.savefig(folder / f"{name}.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)
    options = commands.add_parser("run", help="make missing runs")
    options.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    options.add_argument("--only", nargs="+", default=[""], help="parts of their keys, such as grpo-flow-1.5")
    options = commands.add_parser("add", help="keep finished run folders")
    options.add_argument("folders", nargs="+", type=Path)
    options.add_argument("--commit", help="of the code that made them, if config.json does not know it")
    options.add_argument("--machine", help="that made them, if not this one")
    commands.add_parser("page", help="write page and figures")
    args = parser.parse_args()
    if args.what == "page":
        page()
    elif args.what == "add":
        print(*(add(folder, CURVES, args.commit, args.machine) for folder in args.folders), sep="\n")
    else:
        have, wanted = load(), [job for job in jobs() if any(part in key_of(*job) for part in args.only)]
        make_all([job for job in wanted if job not in have], args.jobs)


if __name__ == "__main__":
    main()
