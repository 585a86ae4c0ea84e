"""The study: which algorithm is better on the tiny model, at equal cost, with error bars.

    python tests/study.py run             # make missing runs; stop it at any time, the next call resumes
    python tests/study.py add FOLDER...   # add finished run folders to runs.jsonl
    python tests/study.py page            # write tests/curves/README.md, the figures, README.md's claims

All results come from tests/curves/runs.jsonl. It has one line per run: name, random seed, command, commit,
machine, versions, seconds of training, and the evaluated iterations. A name is script, sampler, noise, random
steps and options: `gcpo flow 0.7 all --chunks 9`. The text of the page and the rows of its tables are in
tests/curves/page.txt: run | other run | claim | claimed by. A row that goes on with | setting | comparison is
also a row of README.md's table.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
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
    setting: str = ""  # in README.md's table, as the next one
    comparison: str = ""


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


def compared(runs):
    """(row, random seeds, differences, verdict) of every row with a claim."""
    for which, (rows, seeds) in TABLES.items():
        for row in rows:
            if row.claim:
                found = effect(runs, row, seeds, which == "averaged")
                yield row, seeds, found, verdict(row.claim, found)


def claims(runs):
    """The table of all claims."""
    cells = []
    for row, seeds, found, result in compared(runs):
        images = [[value_at(n, runs[n, s], "images") for s in seeds if (n, s) in runs] for n in row[:2]]
        one, other = (np.mean(numbers or 0) for numbers in images)
        scored = f"{one:,.0f} against {other:,.0f}" if found and abs(one - other) > 0.02 * other else ""
        cells.append([row.claim, row.source, words(found, "+"), str(len(found) or ""), result, scored])
    header = "claim|claimed by|effect|seeds|verdict|images scored, if different"
    return markdown(header.split("|"), cells)


def readme_table(runs):
    """The table of README.md."""
    cells = []
    for row, _, found, result in compared(runs):
        if row.setting:
            cells.append([row.setting, row.comparison, words(found, "+"), str(len(found)), result])
    header = ["setting", "comparison", "difference", "seeds", "verdict"]
    return re.sub(r" *\| *", "|", markdown(header, cells))


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
    lines = config["command"], command(name, seed)
    both = (re.findall(r"--(\S+)(?: (?!--)(\S+))?", line) for line in lines)
    given, wanted = ({option: value for option, value in line if option not in free} for line in both)

    def differs(option):
        setting, value = config["settings"].get(option.replace("-", "_")), wanted[option]
        if value == "":  # a flag
            return setting is not True
        if not isinstance(setting, int | float):
            return not str(setting).endswith(value)  # an absolute path
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


def page(folder=CURVES):
    """Write the page from runs.jsonl in a folder; for that of the study, README.md's table as well."""
    runs, missing = load(folder / "runs.jsonl"), {}
    for name, seed in [job for job in jobs(runs) if job not in runs]:
        missing.setdefault(name, []).append(str(seed))
    lines = "".join(f"- `{name}`: {', '.join(seeds)}\n" for name, seeds in missing.items())
    count = sum(map(len, missing.values()))
    absent = f"{count} runs of this page are missing; they are listed at its end." if count else ""
    values = {"have": len(runs), "absent": absent or "All runs that this page asks for are here."}
    values |= {"missing": lines or "None.", "search": searches(runs)}
    values |= {"budget": BUDGET, "claims": claims(runs), "ends": ends(runs)}
    values |= {"tables": {which: table(runs, which) for which in TABLES}}
    (folder / "README.md").write_text(TEXT.format(**values), "utf-8")
    if folder == CURVES:
        readme = ROOT / "README.md"
        text = re.sub(r"(?s)\|setting\|.*?(?=\n\n)", readme_table(runs), readme.read_text("utf-8"))
        readme.write_text(text, "utf-8")


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
        import study_figures  # which imports this file

        page()
        study_figures.draw()
    if args.what == "add":
        print(*(add(folder, RUNS, args.commit, args.machine) for folder in args.folders), sep="\n")
    runs = load()
    if args.what == "run" and (todo := [job for job in jobs(runs) if job not in runs]):
        make(*todo[0])
        # from the start: the result may choose the next
        os.execv(sys.executable, [sys.executable, *sys.argv])


if __name__ == "__main__":
    main()
