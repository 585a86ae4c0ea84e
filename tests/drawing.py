"""Draw what differs between the three algorithms: `python tests/drawing.py` writes tests/curves/algorithms.png."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

RANDOM, ODE, SAME = "tab:red", "0.6", "tab:blue"
STEPS = 6  # as drawn; the last is always the ODE's


def step(axes, start, end, random):
    """One step of the sampler, from (x, y) to (x, y): thick and red where it is random and trained."""
    style = dict(arrowstyle="-|>", color=RANDOM if random else ODE, lw=2.2 if random else 1.1, shrinkA=3, shrinkB=3)
    axes.annotate("", end, start, arrowprops=style)


def trajectory(axes, y, wiggle):
    heights = [y, *(y + wiggle * (-1) ** n for n in range(STEPS - 1)), y]
    for n in range(STEPS):
        step(axes, (n, heights[n]), (n + 1, heights[n + 1]), random=n < STEPS - 1)
    axes.plot(range(STEPS + 1), heights, "o", color="0.2", ms=4)


def compare(axes, low, high, x, text):
    """A bracket around the images whose rewards are compared."""
    axes.plot([x, x + 0.15, x + 0.15, x], [low, low, high, high], color=SAME, lw=1.6)
    axes.text(x + 0.28, (low + high) / 2, text, color=SAME, va="center", fontsize=8)


def grpo(axes):
    for n in range(4):
        trajectory(axes, n, 0.13)
    compare(axes, 0, 3, STEPS + 0.15, "one\ngroup")
    axes.set_title("GRPO: an image's reward goes\nto each of its random steps alike", fontsize=9)


def gcpo(axes):
    for n in range(4):
        for start, size in ((0, 2), (2, 3)):
            box = FancyBboxPatch((start + 0.05, n - 0.22), size - 0.1, 0.44, "round,pad=0.03", fc="0.93", ec="0.5")
            axes.add_patch(box)
        trajectory(axes, n, 0.13)
    compare(axes, 0, 3, STEPS + 0.15, "one\ngroup")
    axes.set_title("GCPO: the steps of a chunk (box)\nhave one ratio together", fontsize=9)


def tempflow(axes):
    trunk = 3.4
    for n in range(STEPS):
        step(axes, (n, trunk), (n + 1, trunk), random=False)
    axes.plot(range(STEPS + 1), [trunk] * (STEPS + 1), "o", color="0.2", ms=4)
    axes.text(0.1, trunk + 0.2, "trunk, by ODE", fontsize=8, color="0.3")
    for leave, low in ((0, 1.7), (3, -0.1)):
        for branch in range(3):
            y = low + 0.45 * branch
            step(axes, (leave, trunk), (leave + 1, y), random=True)
            for n in range(leave + 1, STEPS):
                step(axes, (n, y), (n + 1, y), random=False)
            axes.plot(range(leave + 1, STEPS + 1), [y] * (STEPS - leave), "o", color="0.2", ms=3)
        compare(axes, low, low + 0.9, STEPS + 0.15, f"group of\nstep {leave}")
    axes.set_title("TempFlow-GRPO: a branch has one random\nstep, which gets all of its reward", fontsize=9)


def main():
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for axes, draw in zip(figure.subplots(1, 3), (grpo, gcpo, tempflow)):
        draw(axes)
        axes.set(xlim=(-0.3, STEPS + 1.5), ylim=(-0.5, 3.9), yticks=[], xticks=[0, STEPS])
        axes.set_xticklabels(["noise", "image"])
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.supxlabel("red: a random step (SDE), trained      grey: an ODE step      blue: rewards compared", fontsize=9)
    figure.savefig(Path(__file__).parent / "curves" / "algorithms.png", dpi=130)


if __name__ == "__main__":
    main()
