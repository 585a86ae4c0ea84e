"""The study of the README: which algorithm is better on the tiny model, at equal cost, with error bars.

    python tests/bench.py curves             # every run that tests/curves/ does not have yet; stop it when you like
    python tests/bench.py curves --plot      # tables and figures of the README, from tests/curves/ alone

A run is a script's command line, as RUNS has it, and a seed. Runs in progress are in runs/curves/; a finished one
leaves tests/curves/NAME-SEED.jsonl, its metrics with five digits (of ablations and tuning the evaluated iterations
only), and a line with command, commit and machine in tests/curves/runs.json.
"""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
CURVES = ROOT / "tests" / "curves"
BUDGET = 140_000  # velocity evaluations, where runs are compared
SCRIPTS = ("grpo", "gcpo", "tempflow_grpo")

# name: (script, options). The iterations are those that pass BUDGET, at the next evaluation.
RUNS = {script: (script, f"--iterations {n}") for script, n in zip(SCRIPTS, (40, 50, 60))}
RUNS |= {
    "grpo-batch-std": ("grpo", "--iterations 40 --adv-std batch"),
    "grpo-1-update": ("grpo", "--iterations 40 --updates-per-iteration 1"),
    "grpo-4-updates": ("grpo", "--iterations 40 --updates-per-iteration 4"),
    "grpo-dance": ("grpo", "--iterations 40 --sde dance"),
    "gcpo-fixed": ("gcpo", "--iterations 50 --chunks 2,3,4"),
    "gcpo-one-chunk": ("gcpo", "--iterations 40 --chunks 9"),
    "gcpo-ones": ("gcpo", "--iterations 60 --chunks 1,1,1,1,1,1,1,1,1"),
    "gcpo-weighted": ("gcpo", "--iterations 50 --weighted-sampling"),
    "gcpo-all-chunks": ("gcpo", "--iterations 40 --chunk-fraction 1"),
    "tempflow-unweighted": ("tempflow_grpo", "--iterations 60 --weighting none"),
    "tempflow-prompt-group": ("tempflow_grpo", "--iterations 60 --group prompt"),
    "tempflow-1x12": ("tempflow_grpo", "--iterations 65 --seeds-per-prompt 1 --branches 12"),
    "tempflow-3x4": ("tempflow_grpo", "--iterations 55 --seeds-per-prompt 3 --branches 4"),
    "tempflow-early": ("tempflow_grpo", "--iterations 80 --branch-steps 0,1,2,3,4"),
}
# The same budget of tuning for each algorithm: six settings of learning rate and clip range, three training seeds,
# which are not the study's; prompts and noise of the evaluation are.
TUNED = [(1e-3, 1e-3), (5e-4, 1e-3), (2e-3, 1e-3), (4e-3, 1e-3), (1e-3, 3e-4), (1e-3, 3e-3)]
TUNING_SEEDS = (10, 11, 12)


def tuning_name(script, rate, clip):
    return f"tuning-{script}-lr{rate:g}-clip{clip:g}"


TUNING = {
    tuning_name(script, rate, clip): (script, f"{RUNS[script][1]} --learning-rate {rate:g} --clip-range {clip:g}")
    for rate, clip in TUNED
    for script in SCRIPTS
}


def command(name, seed):
    """The command line of a run, without its --output."""
    script, options = (RUNS | TUNING)[name]
    return f"python {script}.py {options} --seed {seed} --eval-every 5"


def jobs_of(seeds):
    """(name, seed) of every run, the most wanted first: tuning, the three scripts, then the ablations seed by seed."""
    jobs = [(name, seed) for seed in TUNING_SEEDS for name in TUNING]
    jobs += [(script, seed) for seed in range(seeds) for script in SCRIPTS]
    return jobs + [(name, seed) for seed in range(seeds) for name in RUNS if name not in SCRIPTS]


def machine():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return f"{(models or [platform.machine()])[0]}, one thread"


def short(value):
    """Numbers with five digits, in lists and dicts too: the committed metrics are to be small."""
    if isinstance(value, dict):
        return {name: short(part) for name, part in value.items()}
    if isinstance(value, list):
        return [short(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def read_runs(folder=CURVES):
    """{name-seed: command, commit, machine ...} of the runs that are there."""
    path = folder / "runs.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


class Study:
    """Runs jobs side by side, each in a process of its own with one thread, and keeps what they leave."""

    def __init__(self, work, curves):
        self.work, self.curves, self.stopped = work, curves, threading.Event()
        self.processes, self.lock = set(), threading.Lock()

    def run(self, name, seed):
        """One run to its end, from where it was stopped. Returns its exit status, and the end of what it printed."""
        folder, key = self.work / f"{name}-{seed}", f"{name}-{seed}"
        config = folder / "config.json"
        options = [*command(name, seed).split()[2:], "--output", str(folder)]
        if config.exists():
            done = json.loads(config.read_text("utf-8"))["command"].split()[1:]
            if done == options:
                options = ["--resume", str(folder)]
            else:  # RUNS has changed since
                shutil.rmtree(folder)
        self.work.mkdir(parents=True, exist_ok=True)
        with open(self.work / f"{key}.log", "w", encoding="utf-8") as log, self.lock:
            if self.stopped.is_set():
                return 130, "stopped"
            process = subprocess.Popen(
                [sys.executable, f"{(RUNS | TUNING)[name][0]}.py", *options],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,  # a Ctrl-C reaches the runs once, through stop
            )
            self.processes.add(process)
        status = process.wait()
        self.processes.discard(process)
        if status == 0:
            self.keep(name, seed, folder)
        return status, (self.work / f"{key}.log").read_text("utf-8")[-300:]

    def keep(self, name, seed, folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
        if name not in SCRIPTS:  # of ablations and tuning the evaluated iterations, and what all of them cost
            seconds = 0.0
            for line in lines:
                seconds = line["seconds"] = seconds + sum(line.get(f"{k}_s", 0) for k in ("rollout", "reward", "train"))
            lines = [line for line in lines if "eval_reward" in line]
        config = json.loads((folder / "config.json").read_text("utf-8"))
        with self.lock:
            self.curves.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(short(line)) + "\n" for line in lines)
            (self.curves / f"{name}-{seed}.jsonl").write_text(text, "utf-8")
            runs = read_runs(self.curves) | {
                f"{name}-{seed}": {
                    "command": command(name, seed),
                    "commit": config["commit"],
                    "machine": machine(),
                    "versions": config["versions"],
                    "resumed": len(config.get("resumed", [])),
                }
            }
            text = "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(runs[k])}" for k in sorted(runs)) + "\n}\n"
            (self.curves / "runs.json").write_text(text, "utf-8")

    def stop(self):
        """Ask every run to save and end; the next call goes on from there."""
        self.stopped.set()
        with self.lock:
            for process in self.processes:
                process.send_signal(signal.SIGTERM)


def run_study(jobs, workers, work=ROOT / "runs" / "curves", curves=CURVES):
    """Do the jobs that curves does not have, several at a time. Returns the exit status."""
    have = {key: run["command"] for key, run in read_runs(curves).items()}
    todo = [job for job in jobs if have.get("{}-{}".format(*job)) != command(*job)]
    print(f"{len(jobs) - len(todo)} runs are there, {len(todo)} to do, {workers} at a time")
    study, failed = Study(work, curves), 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(study.run, *job): job for job in todo}
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc="runs"):
                (name, seed), (status, tail) = futures[future], future.result()
                if status == 0:
                    cost, reward = curve(name, seed, curves)
                    tqdm.write(f"{name} seed {seed}: {reward[0]:.3f} -> {reward[-1]:.3f} at {cost[-1]:,} evaluations")
                else:
                    failed += 1
                    tqdm.write(f"{name} seed {seed} ended with status {status}: {tail}")
        except KeyboardInterrupt:
            study.stop()
            pool.shutdown(cancel_futures=True)
            print("stopped; the same command goes on", file=sys.stderr)
            return 130
    return 1 if failed else 0


# ---------------------------------------------------------------- what came out


# 97.5% quantiles of Student's t by degrees of freedom: the half width of a 95% interval in standard errors
T_QUANTILE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
LABELS = {
    "grpo": "`grpo.py`: group std, U = 2, `flow`",
    "grpo-batch-std": "std of the batch",
    "grpo-1-update": "U = 1",
    "grpo-4-updates": "U = 4",
    "grpo-dance": "`dance`, eta = 0.3",
    "gcpo": "`gcpo.py`: adaptive chunks, half of them",
    "gcpo-fixed": "fixed chunks 2, 3, 4",
    "gcpo-one-chunk": "one chunk of 9",
    "gcpo-ones": "chunks of 1: GRPO on half of the steps",
    "gcpo-weighted": "weighted sampling of chunks",
    "gcpo-all-chunks": "all adaptive chunks",
    "tempflow_grpo": "`tempflow_grpo.py`: 2 seeds x 6 branches",
    "tempflow-unweighted": "no weights",
    "tempflow-prompt-group": "groups of a prompt",
    "tempflow-1x12": "1 seed x 12 branches",
    "tempflow-3x4": "3 seeds x 4 branches",
    "tempflow-early": "branches at steps 0 to 4 only",
}
AXES = {"velocity_evals": "velocity evaluations", "images": "images scored", "seconds": "seconds"}
BY_STEP = {
    "gcpo": ("l1rel_by_step", "chunk_cuts", "l1rel_prompt_share"),
    "tempflow_grpo": ("reward_std_by_step", "gradient_by_step", "gradient_by_step_weighted"),
}
HEALTH = (
    "reward_std zero_std_groups ratio_first_error ratio_min ratio_max clip_low clip_high approx_kl grad_norm".split()
)
FAMILIES = {script: [name for name, (of, _) in RUNS.items() if of == script] for script in SCRIPTS}


def read_run(name, seed, folder=CURVES):
    """The lines of a run; `seconds` of rollouts, rewards and updates so far are added where they are not there."""
    lines, total = [], 0.0
    for text in (folder / f"{name}-{seed}.jsonl").read_text("utf-8").splitlines():
        line = json.loads(text)
        total += sum(line.get(f"{k}_s", 0) for k in ("rollout", "reward", "train"))
        lines.append({"velocity_evals": 0, "images": 0, "seconds": total} | line)
    return lines


def curve(name, seed, folder=CURVES, axis="velocity_evals"):
    """Cost and held-out reward of a run's evaluations, two lists. axis: velocity_evals, images or seconds."""
    lines = [line for line in read_run(name, seed, folder) if "eval_reward" in line]
    return [line[axis] for line in lines], [line["eval_reward"] for line in lines]


def at_budget(cost, reward, budget=BUDGET):
    """Held-out reward at a cost, on the straight line between the two evaluations around it."""
    import numpy as np

    if cost[-1] < budget:
        raise ValueError(f"a run ended at {cost[-1]} evaluations, before {budget}")
    return float(np.interp(budget, cost, reward))


def seeds_of(name, folder=CURVES):
    """The seeds that a variant has been run with."""
    return [seed for seed in range(100) if f"{name}-{seed}" in read_runs(folder)]


def mean_interval(values):
    """Mean and half width of its 95% interval, by Student's t, of the values of two to ten seeds."""
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), T_QUANTILE[len(values) - 1] * values.std().item() / len(values) ** 0.5


def rewards_at(name, budget=BUDGET, axis="velocity_evals", folder=CURVES):
    """{seed: held-out reward at a cost}."""
    return {seed: at_budget(*curve(name, seed, folder, axis), budget) for seed in seeds_of(name, folder)}


def others(folder=CURVES):
    """{variant: held-out rewards of its seeds at BUDGET} of the runs in others.json, NAME-SEED or NAME-SEED-lrRATE.

    Their evaluations are kept as [iteration, velocity evaluations, held-out reward].
    """
    found = {}
    for key, run in json.loads((folder / "others.json").read_text("utf-8")).items():
        _, cost, reward = zip(*run["evaluations"])
        found.setdefault(re.sub(r"(?<!e)-\d(?=-lr|$)", "", key), []).append(at_budget(cost, reward))
    return found


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def against(rewards, usual):
    """Mean difference of the seeds that both have, with its 95% interval, as text."""
    return "{:+.3f} ± {:.3f}".format(*mean_interval([rewards[seed] - usual[seed] for seed in rewards if seed in usual]))


def tables(folder=CURVES):
    """The README's tables of results, as they stand there: {title: markdown}."""
    plus_minus = "{:.3f} ± {:.3f}".format
    # the other two ways to be fair: as many images or seconds as every run has
    ends = {axis: [curve(s, n, folder, axis)[0][-1] for s in SCRIPTS for n in seeds_of(s, folder)] for axis in AXES}
    budgets = {"velocity_evals": BUDGET, "images": min(ends["images"]), "seconds": int(min(ends["seconds"]))}
    rows, first = [], rewards_at("grpo", folder=folder)
    for script in SCRIPTS:
        row = [f"`{command(script, 0).removesuffix('--seed 0 --eval-every 5')}--seed S`"]
        for axis, budget in budgets.items():
            row.append(plus_minus(*mean_interval(list(rewards_at(script, budget, axis, folder).values()))))
        row.insert(2, against(rewards_at(script, folder=folder), first) if script != "grpo" else "")
        rows.append(row)
    header = ["command", *(f"at {budget:,} {AXES[axis]}" for axis, budget in budgets.items())]
    header.insert(2, "against `grpo.py`, same seeds")
    found = {"main": markdown(header, rows)}
    for script, names in FAMILIES.items():
        rows, usual = [], rewards_at(script, folder=folder)
        for name in names:
            rewards = rewards_at(name, folder=folder)
            options = RUNS[name][1].split(maxsplit=2)[2:]
            rows.append(
                [
                    LABELS[name] + (f" (`{options[0]}`)" if options else ""),
                    plus_minus(*mean_interval(list(rewards.values()))),
                    against(rewards, usual) if name != script else "",
                    str(len(rewards)),
                ]
            )
        found[script] = markdown(["variant", "held-out reward", "against the first row, same seeds", "seeds"], rows)
    rows = []
    for rate, clip in TUNED:
        row = [f"{rate:g}", f"{clip:g}"]
        for script in SCRIPTS:
            rewards = rewards_at(tuning_name(script, rate, clip), folder=folder).values()
            row.append(f"{sum(rewards) / len(rewards):.3f} ({', '.join(f'{reward:.3f}' for reward in rewards)})")
        rows.append(row)
    found["tuning"] = markdown(["learning rate", "clip range", *(f"`{script}.py`" for script in SCRIPTS)], rows)
    rows = [[f"`{key}`", *(lowest_mean_highest(script, key, folder) for script in SCRIPTS)] for key in HEALTH]
    found["healthy"] = markdown(["mean (smallest to largest)", *(f"`{script}.py`" for script in SCRIPTS)], rows)
    return found


def lowest_mean_highest(name, key, folder=CURVES):
    """Of a metric over all iterations and seeds, as text."""
    values = [line[key] for seed in seeds_of(name, folder) for line in read_run(name, seed, folder)[1:]]
    digits = ".4f" if key in ("ratio_min", "ratio_max") else ".2g"
    mean, low, high = (format(value, digits) for value in (sum(values) / len(values), min(values), max(values)))
    return f"{mean} ({low} to {high})"


def mean_by_step(name, key, folder=CURVES):
    """Mean of a by-step metric over the first ten iterations of all seeds: the model is hardly trained yet."""
    rows = [line[key] for seed in seeds_of(name, folder) for line in read_run(name, seed, folder)[1:11]]
    return torch.tensor(rows).mean(0).tolist()


def plot(folder=CURVES):
    """The README's figures: curves.png, held-out reward over cost, and steps.png, what happens at each step."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    grid = np.linspace(0, BUDGET, 57)

    def draw(axes, name, label, end=None):
        """Mean and 95% interval over the seeds: a band, or a bar at `end`, where bands would hide each other."""
        curves = [np.interp(grid, *curve(name, seed, folder)) for seed in seeds_of(name, folder)]
        middle, half = map(np.array, zip(*(mean_interval(column) for column in zip(*curves))))
        (line,) = axes.plot(grid / 1000, middle, label=f"{label}, {len(curves)} seeds", linewidth=1.6)
        if end is None:
            axes.fill_between(
                grid / 1000, middle - half, middle + half, color=line.get_color(), alpha=0.15, linewidth=0
            )
        else:
            axes.errorbar(end, middle[-1], half[-1], color=line.get_color(), marker="o", markersize=3, capsize=2)

    figure, panels = pyplot.subplots(2, 2, figsize=(12, 9), sharex=True, sharey=True)
    titles = ("the three algorithms", "grpo.py", "gcpo.py", "tempflow_grpo.py")
    for axes, title, names in zip(panels.flat, titles, (SCRIPTS, *FAMILIES.values())):
        for n, name in enumerate(names):
            if names is SCRIPTS:
                draw(axes, name, f"{name}.py")
            else:
                draw(axes, name, LABELS[name].replace("`", ""), BUDGET / 1000 + 3 + 2.5 * n)
        axes.set_title(title)
        axes.legend(fontsize=8, loc="upper left")
        axes.grid(alpha=0.3)
        axes.set_ylim(0.45, 0.85)
    for axes in panels[1]:
        axes.set_xlabel("velocity evaluations, thousands")
    for axes in panels[:, 0]:
        axes.set_ylabel("reward of the held-out prompts")
    figure.tight_layout()
    figure.savefig(folder / "curves.png", dpi=90)

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4))
    steps = np.arange(9)
    left.plot(steps, mean_by_step("tempflow_grpo", "reward_std_by_step", folder), "o-")
    left.set_title("spread (std) of the reward over the branches of a state, by step")
    right.plot(steps, mean_by_step("gcpo", "l1rel_by_step", folder), "o-", label="mean L1rel of the step")
    cuts = mean_by_step("gcpo", "chunk_cuts", folder)
    right.bar(steps[1:] - 0.5, cuts, 0.12, color="C1", label="share of trajectories with a cut there")
    right.set_title("L1rel, and where adaptive chunks are cut")
    right.legend()
    for axes in (left, right):
        axes.set_xticks(steps)
        axes.set_xlabel("step")
        axes.set_ylim(0)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "steps.png", dpi=90)
    pyplot.close("all")


def report(folder=CURVES):
    """Print the README's tables of results, and what its second figure shows."""
    for title, table in tables(folder).items():
        print(f"\n{title}\n\n{table}")
    print(f"\nimages scored at {BUDGET:,} velocity evaluations\n")
    for name in RUNS:
        costs = [[curve(name, seed, folder, axis)[0] for axis in AXES] for seed in seeds_of(name, folder)]
        images = [at_budget(evals, scored) for evals, scored, _ in costs]
        print(f"{name}: {sum(images) / len(images):,.0f}")
    print("\nby step, mean of the first ten iterations of all seeds\n")
    for script, keys in BY_STEP.items():
        for key in keys:
            print(f"{script}.py {key}: {', '.join(f'{value:.3f}' for value in mean_by_step(script, key, folder))}")
    print(f"\nothers.json, earlier settings and exercises, at {BUDGET:,} velocity evaluations\n")
    for name, rewards in others(folder).items():
        spread = f" ± {mean_interval(rewards)[1]:.3f}" if len(rewards) > 1 else ""
        print(f"{name}: {sum(rewards) / len(rewards):.3f}{spread} ({', '.join(f'{r:.3f}' for r in rewards)})")
