"""The figures of the study's page and of README.md. `python tests/study.py page` draws all but one of them.

    python tests/study_figures.py runs/mine    # README.md's first picture, from a finished run of grpo.py

They are as wide as a page on GitHub, 830 pixels, at twice the resolution.
"""

import sys
import textwrap
from functools import cache
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch

import study
from study import COSTS, DEFAULT, ROOT, TABLES, TUNED, mean_interval, value_at, values

sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tiny")]

import common  # noqa: E402
import gcpo  # noqa: E402
import grpo  # noqa: E402
from shapes import shapes  # noqa: E402

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
        _, power, _ = study.search(runs, script)
        label = f"{script}.py, rate {study.rate(script, power)}"
        mean_curve(axes[1], runs, study.at_rate(script, power), label, range(5), color=f"C{number}")
    mean_curve(axes[0], runs, "grpo flow 0.7 early", "grpo.py, flow 0.7", color="0.5")
    finish(axes[0], "early steps random: defaults, and flow 0.7", loc="lower right")
    finish(axes[1], "all steps random, flow 0.7, each at its best learning rate", y="", loc="upper left")
    for one in axes:
        one.set_ylim(0.45, 0.95)


def draw_noise(axes, runs):
    rows, seeds = TABLES["tuning"]
    for number, (sde, one) in enumerate(zip(("flow", "precise", "dance", "cps"), axes)):
        for steps, style in (("early", "o-"), ("all", "x--")):
            levels = sorted({row.name.split()[2] for row in rows if row.name.split()[1] == sde}, key=float)
            found = {level: values(runs, f"grpo {sde} {level} {steps}", seeds).values() for level in levels}
            found = {float(level): list(rewards) for level, rewards in found.items() if rewards}
            means = [np.mean(rewards) for rewards in found.values()]
            one.plot([*found], means, style[1:], color=f"C{number}")
            for level, rewards in found.items():
                one.plot([level] * len(rewards), rewards, style[0], color=f"C{number}")
        one.axhline(0.502, color="0.6", linewidth=0.8, linestyle=":")
        one.set_ylim(0.35, 0.95)
        symbol = "a" if sde == "flow" else "η"
        finish(one, f"--sde {sde}", f"--noise-level ({symbol})", "" if number else REWARD)
    kinds = ("o", "-", "early steps random"), ("x", "--", "all nine steps random"), ("", ":", "base model")
    handles = [Line2D([], [], color="0.3", marker=m, linestyle=line, label=label) for m, line, label in kinds]
    title = "grpo.py: a mark is one run (random seeds 10 and 11), a line their mean"
    axes[0].figure.legend(handles=handles, title=title, loc="outside lower center", ncols=3)


def draw_hacking(axes, runs):
    for number, name in enumerate(row.name for row in TABLES["hacking"][0]):
        kl, colour = f"--kl-coef {name.split()[-1]}", f"C{number}"
        mean_curve(axes[0], runs, name, kl, color=colour)
        mean_curve(axes[1], runs, name, kl, metric="eval/shapes", color=colour)
    finish(axes[0], "trained reward (ignores the number of objects)", loc="lower right")
    finish(axes[1], "full reward (not trained)", y="", loc="lower left")
    for one in axes:
        one.set_ylim(0, 1)


def draw_chunks(axes, runs):
    rows, seeds = TABLES["chunks"]
    axes[0].axhline(0, color="0.6")
    for row in (row for row in rows if row.other == rows[0].other):
        if numbers := study.effect(runs, row, seeds):
            mean, half = mean_interval(numbers)
            sizes = row.name.split("--chunks ")[1].split()[0]
            axes[0].errorbar(sizes, mean, np.nan_to_num(half), fmt="o", capsize=3, color="C0")
    finish(axes[0], "gcpo.py, all steps, flow 0.7: 95% intervals", "chunks", "reward minus that of grpo.py")


# Everything that the figures take from the project's code is between here and draw_samplers.


@cache
def base_model():
    """The tiny model before training: (policy, held-out prompts, their text, sigmas)."""
    args = common.parse_args("grpo", grpo.Args, grpo.DEFAULTS, ["--device", "cpu", "--output", "runs/none"])
    policy, prompts = common.make_policy(args, 48), common.held_out_prompts(args)
    return policy, prompts, policy.encode(prompts)[0], policy.sigmas(args.steps)


def walk(policy, text, index, x, sigmas, noise, sde="flow", level=0.7):
    """Yield (x, predicted image) before each step, and the final x; noise: {random step: its noise}."""
    s = common.noise_scale(sigmas, sde, level)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        with torch.no_grad():
            velocity = policy.velocity_batched(x, sigma, text, index)
        yield x, x - sigma * velocity
        scale = s[step] if step in noise else 0.0
        mean, std = common.sde_mean_std(x, velocity, sigma, sigma_next, scale, sde)
        x = mean + std * noise[step] if step in noise else mean
    yield x, x


def chunks_of_the_base_model(each=4, chunk_max=4):
    """By step: mean L1rel, and how often adaptive chunks cut before it; `each` images per held-out prompt."""
    policy, prompts, text, sigmas = base_model()
    generator, index = common.generator(0, "chunks", 0), torch.arange(len(prompts) * each) // each
    start, *noise = (policy.draw_noise(len(prompts), each, generator) for _ in range(len(sigmas) - 1))
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
    start, images = policy.draw_noise(len(captions), 1, generator), []
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
        axis.plot(forgotten, "kx:", label="flow 0.7, no noise removed")
        axis.set_ylim(0.5, 2.8)
        finish(axis, f"first {count} of 10 steps random", "steps taken")
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
    trunk = 1.75  # it ends at the last branch point: its image is not scored
    path(2, [(n, trunk) for n in range(4)], ())
    axes[2].text(3.15, trunk, "trunk, ODE steps", fontsize=7.5, color="0.3", va="center")
    for leave, low in ((0, 2.5), (3, -0.1)):  # branches of step 0 above the trunk, of step 3 below it
        for y in (low, low + 0.5, low + 1):
            path(2, [(leave, trunk), *((n, y) for n in range(leave + 1, steps + 1))], [0])
    groups = [(0, 0, 3, "group"), (1, 0, 3, "group")]
    groups += [(2, 2.5, 3.5, "group of\nstep 0"), (2, -0.1, 0.9, "group of\nstep 3")]
    for place, low, high, text in groups:
        axes[place].plot(steps + np.array([0.15, 0.3, 0.3, 0.15]), [low, low, high, high], color="tab:blue")
        where = steps + 0.45, (low + high) / 2
        axes[place].text(*where, text, color="tab:blue", va="center", fontsize=7.5)
    axes[0].set_title("GRPO: every random step of an image\ngets the same advantage", fontsize=8.5)
    axes[1].set_title("GCPO: the steps of a chunk (box)\nshare one ratio", fontsize=8.5)
    axes[2].set_title("TempFlow-GRPO: a branch has one\nrandom step, which gets all the credit", fontsize=8.5)
    for one in axes:
        one.set(xlim=(-0.3, steps + 2.1), ylim=(-0.5, 3.9), yticks=[], xticks=[0, steps])
        one.set_xticklabels(["noise", "image"])
    axes[1].set_xlabel("red: a random step (SDE), trained    grey: an ODE step    blue: compared rewards")


def draw_compare(run, picture=ROOT / "tests" / "tiny" / "compare.png", every=8):
    """Images of the base model (above) and of a run's last adapter (below): the first of every eighth prompt.

    Prompts and noise are those of the run's evaluations.
    """
    policy, prompts, text, sigmas = base_model()
    noise = policy.draw_noise(len(prompts) * 4, 1, common.generator(0, "evaluation", 0))
    shown = torch.arange(0, len(prompts), every)
    images = []
    for trained in (False, True):
        if trained:
            policy.transformer.delete_adapters("default")
            last = max((run / "lora").iterdir(), key=lambda folder: int(folder.name))
            policy.pipe.load_lora_weights(last)
        images.append(policy.decode(common.ode_sample(policy, noise[shown * 4], text, shown, sigmas)))
    figure = Figure(figsize=(8.3, 3.75), layout="constrained")
    for axes, image, n in zip(figure.subplots(2, len(shown)).flat, torch.cat(images), [*shown, *shown]):
        axes.imshow(image.permute(1, 2, 0))
        axes.set(xticks=[], yticks=[], xlabel=f"reward {shapes(image[None], [prompts[n]]).item():.2f}")
        if axes.get_subplotspec().is_first_row():
            axes.set_title("\n".join(textwrap.wrap(prompts[n], 17)), fontsize=8.5)
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("before" if axes.get_subplotspec().is_first_row() else "after", fontsize=11)
    figure.savefig(picture, dpi=200)


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


def draw(folder=study.CURVES, names=FIGURES):
    """Draw figures from runs.jsonl in a folder. A missing run leaves a blank."""
    runs = study.load(folder / "runs.jsonl")
    for name in names:
        height, *shape, draw_axes = FIGURES[name]
        figure = Figure(figsize=(8.3, height), layout="constrained")
        draw_axes([*figure.subplots(*shape, squeeze=False).flat], runs)
        figure.savefig(folder / f"{name}.png", dpi=200)


if __name__ == "__main__":
    draw_compare(Path(sys.argv[1]))
