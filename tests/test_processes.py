"""Two processes (CPU, gloo) make the run that one makes, and end together if one of them fails."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import common
from conftest import ROOT, DoublePolicy, adapter, here, metrics, parse, slow, state

# A micro-batch that both one and two processes fill: the network then sees the same shapes in each.
SMALL = "--seed 3 --prompts-per-iteration 4 --eval-seeds 1 --lora-rank 4 --micro-batch 4 --steps 4"
SMALL += " --eval-steps 3 --sde flow --noise-level 0.7 --learning-rate 7e-4 --ema-decay 0.5"
OF_SCRIPT = {  # with what all processes agree on: the std of all rewards, steps drawn, groups of a prompt
    "grpo": "--group-size 4 --adv-std batch --kl-coef 0.1",
    "gcpo": "--group-size 4 --sde-steps all --chunks adaptive --chunk-fraction 0.5 --weighted-sampling"
    " --shared-noise",
    "tempflow_grpo": "--seeds-per-prompt 2 --branches 3 --group prompt --sde-steps-per-iteration 2",
}


def options(script, *more):
    return [*SMALL.split(), *OF_SCRIPT[script].split(), *map(str, more)]


def torchrun(logs, script, *arguments, within=600):
    """A script in two processes: exit status, output, torchrun's report, error lines of each process."""
    file = script if script.endswith(".py") else str(ROOT / f"{script}.py")
    engine = "-m torch.distributed.run --standalone --nproc-per-node 2 --redirects 2 --log-dir".split()
    command = [sys.executable, *engine, *map(str, [logs, file, *arguments])]
    done = subprocess.run(command, timeout=within, capture_output=True, text=True)
    texts = [path.read_text() for path in sorted(logs.glob("*/attempt_0/?/stderr.log"))]
    errors = [[line for line in text.splitlines() if line.startswith("error: ")] for text in texts]
    return done.returncode, done.stdout, done.stderr, errors


def run_twice(folder, script, *arguments, driver=None):
    """The runs `one` (one process) and `two` (two processes) in a folder. Returns what the second printed.

    driver: a file to start in place of the script, in the two processes.
    """
    result = here(script, *arguments, "--output", folder / "one")
    assert result.returncode == 0, result.stderr
    output = "--output", folder / "two"
    status, out, report, errors = torchrun(folder / "logs", driver or script, *arguments, *output)
    assert status == 0 and errors == [[], []], (report, errors)
    return out


def assert_same_adapter(one, other, last):
    """To 1e-4 relative, as vectors.

    Adam divides a gradient by its size: where a gradient is no larger than its rounding error, the step is as
    large as any other and has any sign. How many weights that concerns depends on the CPU: vectors differed
    by 8e-7 on one and by 1.8e-5 on another. In float64 every single weight agrees, see below.
    """
    one, other = ([rows.flatten() for rows in adapter(folder, last).values()] for folder in (one, other))
    one, other = torch.cat(one).double(), torch.cat(other).double()
    assert (one - other).norm() < 1e-4 * one.norm()


def assert_trained(run):
    weights = torch.cat([rows.flatten() for name, rows in adapter(run, 2).items() if "lora_B" in name])
    assert weights.abs().max() > 1e-3  # B began at 0


def assert_same_metrics(one, other, rel=2e-4):
    """Metrics are the same to rounding, counts and evaluations exactly; the ratio starts at 1 in both.

    rel: of what depends on the weights, which differ by up to 1e-4; kl_ref is of their squares.
    """
    one, other = metrics(one, times=False), metrics(other, times=False)
    assert len(one) == len(other)
    for a, b in zip(one, other):
        assert a.keys() == b.keys()
        assert a.get("ratio_first_error", 0.0) == b.get("ratio_first_error", 0.0) == 0.0
        for name, value in a.items():
            if name in ("iteration", "images", "velocity_evals", "branch_steps"):
                assert value == b[name], name
            elif name.startswith(("eval", "reward", "grad_norm", "zero", "l1rel", "gradient", "kl_ref")):
                assert b[name] == pytest.approx(value, rel=rel), name
    assert one[0]["eval_reward"] == other[0]["eval_reward"]


@pytest.mark.parametrize("script", ["grpo", "tempflow_grpo"])
def test_two_processes_make_the_run_of_one(script, tmp_path):
    out = run_twice(tmp_path, script, *options(script, "--iterations", 2, "--eval-every", 2))
    assert out.count("eval_reward") == out.count("step   sigma") == 1  # one of them prints
    assert_same_adapter(tmp_path / "one", tmp_path / "two", 2)
    assert_same_metrics(tmp_path / "one", tmp_path / "two")
    assert_trained(tmp_path / "two")


DRIVER = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import common, gcpo, conftest
folder = sys.argv[sys.argv.index("--output") + 1]

def hook(event, args):
    writes = event == "open" and any(mode in str(args[1]) for mode in "wax+")
    if writes and isinstance(args[0], str) and folder in args[0]:
        descriptor = os.open(folder + "." + os.environ["RANK"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, args[0].encode() + b"\\n")

sys.addaudithook(hook)
common.Policy, sys.argv[0] = conftest.DoublePolicy, "gcpo.py"
common.run_script("gcpo", gcpo.main, gcpo.Args, gcpo.DEFAULTS)
"""


def test_every_weight_in_float64_and_one_process_writes(monkeypatch, tmp_path):
    """As above for gcpo.py, where rounding is out of the way: every single weight is that of one process.

    The second process opens no file for writing: neither checkpoint nor adapter, picture, metrics.
    """
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    more = ["--iterations", 2, "--eval-every", 2, "--ema-decay", 0]  # the average is float32
    monkeypatch.setattr(common, "Policy", DoublePolicy)
    run_twice(tmp_path, "gcpo", *options("gcpo", *more), driver=str(driver))
    # its pictures are rounded: one number may round the other way, by 6e-8 of 3,072
    assert_same_metrics(tmp_path / "one", tmp_path / "two", rel=1e-6)
    assert_trained(tmp_path / "two")
    one, two = adapter(tmp_path / "one", 2), adapter(tmp_path / "two", 2)
    for name, weight in one.items():
        assert weight.dtype == torch.float64
        assert (weight - two[name]).abs().max() <= 1e-9 * weight.abs().max(), name
    assert (tmp_path / "two.0").read_text() and not (tmp_path / "two.1").exists()


@slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """An iteration of one process, one of two, one of one, as in a run of one process for all three."""
    arguments = options("grpo", "--eval-every", 1)
    for name, iterations in (("whole", 3), ("parts", 1)):
        more = "--output", tmp_path / name, "--iterations", iterations
        assert here("grpo", *arguments, *more).returncode == 0
    more = ["--resume", tmp_path / "parts", "--iterations", 2]
    status, _, report, errors = torchrun(tmp_path / "logs", "grpo", *more)
    assert status == 0, (report, errors)
    assert here("grpo", "--resume", tmp_path / "parts", "--iterations", 3).returncode == 0
    assert_same_adapter(tmp_path / "whole", tmp_path / "parts", 3)
    assert_same_metrics(tmp_path / "whole", tmp_path / "parts")


@slow
def test_flat_groups_on_one_of_two_processes(tmp_path):
    """A reward that is constant for the second process's prompts:

    it computes nothing and still joins the updates.
    """
    (tmp_path / "r.py").write_text(
        "import torch\n"
        "def half(images, prompts):\n"
        "    scores = images.mean((1, 2, 3)).cpu()\n"
        "    equal = torch.tensor(731.37)\n"
        "    return torch.stack([s if 'red' in p else equal for s, p in zip(scores, prompts)])\n"
    )
    names = ["a red circle", "a blue circle", "two red squares", "two blue squares"]
    order = common.iteration_prompts(range(4), 4, 1, seed=3)
    by_place = dict(zip(order, names))  # places 0 and 2 of the iteration, the first process's, are red
    (tmp_path / "p.txt").write_text("\n".join(by_place[n] for n in range(4)))
    arguments = [*options("grpo", "--iterations", 1), "--reward", f"{tmp_path / 'r.py'}:half", "--kl-coef", 0]
    arguments += ["--adv-std", "group", "--prompts", tmp_path / "p.txt", "--model", "tiny"]
    run_twice(tmp_path, "grpo", *arguments)
    assert metrics(tmp_path / "two")[1]["zero_std_groups"] == 0.5
    assert_same_adapter(tmp_path / "one", tmp_path / "two", 1)
    assert_same_metrics(tmp_path / "one", tmp_path / "two")


def test_reward_that_fails_in_one_process(tmp_path):
    """Traceback, note and line come from that process, torchrun ends the other; the checkpoint is kept."""
    (tmp_path / "mine.py").write_text(
        "import os\n"
        "calls = []\n"
        "def picky(images, prompts):\n"
        "    calls.append(0)\n"
        "    if os.environ['RANK'] == '1' and len(calls) == 4:\n"  # loading, evaluation, iterations 1, 2
        "        raise ValueError('will not look at this')\n"
        "    return images.mean((1, 2, 3))\n"
    )
    arguments = options("grpo", "--eval-every", 1000, "--reward", f"{tmp_path / 'mine.py'}:picky")
    output = "--output", tmp_path / "run"
    status, _, _, (_, second) = torchrun(tmp_path / "logs", "grpo", *arguments, *output, within=180)
    assert status != 0
    (line,) = second
    assert "ValueError" in line and "--resume" in line
    (log,) = (tmp_path / "logs").glob("*/attempt_0/1/stderr.log")
    text = log.read_text()
    assert "will not look at this" in text and "in the reward mine.py:picky" in text
    saved = state(tmp_path / "run")["lines"]
    assert metrics(tmp_path / "run")[-1]["iteration"] == saved[-1]["iteration"] == 1


def test_numbers_that_two_processes_cannot_share(monkeypatch, tmp_path):
    (tmp_path / "one.txt").write_text("a red circle\n")
    args = parse("grpo", *options("grpo"))
    several = SimpleNamespace(num_processes=2, process_index=0, is_main_process=True)
    monkeypatch.setattr(common, "PartialState", lambda: several)
    assert common.split_batch(args, each=4, group=4) == 8
    args.prompts_per_iteration = 6
    with pytest.raises(SystemExit, match="cannot be split into 2 equal updates on 2 processes"):
        common.split_batch(args, each=4, group=4)
    args.prompts_per_iteration, args.eval_prompts = 4, str(tmp_path / "one.txt")
    with pytest.raises(SystemExit, match="1 evaluation images for 2 processes"):
        common.split_batch(args, each=4, group=4)
