"""bench.py plan: its FLOPs and evaluations against real forwards and runs, and the defaults for one GPU."""

import importlib
import itertools
import json
import re
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bench  # noqa: E402
import common  # noqa: E402
import gcpo  # noqa: E402
import grpo  # noqa: E402
import small_pipelines  # noqa: E402
import tempflow_grpo  # noqa: E402

CARDS = {"sd3": (24, 65), "flux": (80, 250), "flux2": (24, 65)}  # GB and TFLOP/s that the defaults are for


def flops_of(function):
    """By PyTorch's own counter, with attention as two matrix products, which it can count on a CPU."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("family", CARDS)
def test_flops_are_those_of_a_real_forward(family, guidance):
    settings = dict(resolution=16, guidance=guidance, micro_batch=2, lora_rank=2, lora_alpha=4.0)
    policy = common.Policy(small_pipelines.MAKERS[family](), device="cpu", **settings)
    text = policy.encode(["a", "b"])
    functions, _ = bench.calls(policy, text)
    real = {name: flops_of(function) for name, function in functions.items()}
    with FlopCounterMode(display=False) as counter:  # the CPU's kernel of attention is not in its list
        functions["rollout"]()
    attention = real["rollout"] - counter.get_total_flops()
    policy.transformer.enable_gradient_checkpointing()
    real["checkpointed"] = flops_of(functions["train"])

    with torch.device("meta"):
        meta = common.Policy(small_pipelines.MAKERS[family](), device="meta", **settings)
    counted = bench.count_calls(meta, [torch.empty_like(rows, device="meta") for rows in text])
    assert counted["rollout"][0] == real["rollout"]
    # CUDA's kernel does not keep the weights of attention: its backward makes them again, half of a forward
    assert counted["train"][0] == real["train"] + attention // 2
    assert counted["checkpointed"][0] == real["checkpointed"] + attention // 2
    assert real["train"] < real["checkpointed"] < real["train"] + real["rollout"]
    assert counted["decode"][0] == real["decode"]


def settings(module, options):
    group = "--seeds-per-prompt 2 --branches 3" if module is tempflow_grpo else "--group-size 4"
    line = f"--model tiny --device cpu --prompts-per-iteration 2 --steps 5 --lora-rank 2 {group} {options}"
    return common.parse_args(module.Args, module.DEFAULTS, line.split())


@pytest.mark.parametrize(
    "script, options",
    [
        ("grpo", "--sde-steps all --updates-per-iteration 1"),
        ("grpo", "--sde-steps 2 --kl-coef 0.1 --guidance 3"),
        ("gcpo", "--sde-steps all --chunks 2,2 --chunk-fraction 0.5 --guidance 3"),
        ("gcpo", "--sde-steps 1,2,3 --chunks 1,2 --chunk-fraction 1 --updates-per-iteration 4 --kl-coef 0.1"),
        ("gcpo", "--sde-steps 0,1,2 --chunks adaptive --chunk-max 3 --chunk-fraction 0.5"),
        ("tempflow_grpo", "--sde-steps all --guidance 3"),
        ("tempflow_grpo", "--sde-steps 0,2 --kl-coef 0.1 --updates-per-iteration 4"),
        ("tempflow_grpo", "--sde-steps 3,"),
    ],
)
def test_evaluations_are_those_of_a_real_iteration(script, options, tmp_path):
    module = importlib.import_module(script)
    quick = f"--iterations 1 --eval-every 9 --eval-seeds 1 --eval-steps 1 --micro-batch 5 --output {tmp_path}/run"
    args = settings(module, f"{options} {quick}")
    module.main(args)
    run = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    does = bench.work(module, args)
    passes = 2 if args.guidance > 1 else 1
    assert passes * does.evaluations == run["velocity_evals"]
    assert does.images == run["images"]


def test_what_is_drawn_counts_with_its_mean():
    """Of all choices of two of the four steps, and of the draws of chunks of different sizes."""
    for module in (grpo, tempflow_grpo):
        lists = [f"{a},{b}" for a, b in itertools.combinations(range(4), 2)]
        each = [bench.work(module, settings(module, f"--sde-steps {steps}")).evaluations for steps in lists]
        drawn = bench.work(module, settings(module, "--sde-steps 2")).evaluations
        assert drawn == pytest.approx(sum(each) / len(each), rel=1e-9)
    args = settings(gcpo, "--sde-steps all --chunks 1,3 --chunk-fraction 0.5")
    dice = torch.empty(4000, 4).exponential_(generator=torch.Generator().manual_seed(0))
    drawn = [gcpo.draw_chunks(torch.ones(4), [1, 3], 0.5, False, numbers).diagonal() > 0 for numbers in dice]
    N, trained = 8, torch.stack(drawn).float().mean(0)  # the share of trajectories that train each step
    both = 5 * N + 3 * N * trained.sum() + N / 2 * trained[1:].sum()
    assert bench.work(gcpo, args).evaluations == pytest.approx(both.item(), rel=0.02)


@cache
def count(family, resolution, guided, rank):
    options = f"--resolution {resolution} --guidance {3 if guided else 1} --lora-rank {rank}"
    return bench.count_model(family, bench.script_args(grpo, family, options.split()))


def plan(script, family, options=""):
    module = importlib.import_module(script)
    args, (memory, tflops) = bench.script_args(module, family, options.split()), CARDS[family]
    counted = count(family, args.resolution, args.guidance > 1, args.lora_rank)
    return args, bench.plan(module, args, memory * 1e9, tflops * 1e12, counted)


@pytest.mark.parametrize("family", CARDS)
@pytest.mark.parametrize("script", ["grpo", "gcpo", "tempflow_grpo"])
def test_defaults_are_for_one_gpu(script, family):
    """An iteration in 6 minutes, the run in 12 hours, in the memory of the card; groups of 12, 8 prompts."""
    args, result = plan(script, family)
    assert result["minutes"] <= 6 and result["hours, with evaluations"] <= 12
    assert max(value for name, value in result.items() if name.startswith("GB")) <= CARDS[family][0] * (1 - bench.FREE)
    assert args.micro_batch <= result["largest --micro-batch"]
    assert args.prompts_per_iteration >= 8
    assert (args.branches if script == "tempflow_grpo" else args.group_size) >= 12


@pytest.mark.parametrize("family", CARDS)
def test_the_readme_has_the_plan(family):
    """Minutes, iterations, hours and peak memory of the three scripts, in this order."""
    memory, tflops = CARDS[family]
    told = {"sd3": "SD3.5 Medium", "flux": "`black-forest-labs/FLUX.1", "flux2": "`black-forest-labs/FLUX.2"}[family]
    row = re.search(rf"^\| {re.escape(told)}.*$", (ROOT / "README.md").read_text("utf-8"), re.M).group(0).split("|")
    results = [plan(script, family)[1] for script in ("grpo", "gcpo", "tempflow_grpo")]
    assert f"{memory} GB at {tflops} TFLOP/s" in row[1]
    assert row[2].split()[:-1] == ", ".join(f"{result['minutes']:.1f}" for result in results).split()
    runs = [f"{result['iterations']} in {result['hours, with evaluations']:.1f}" for result in results]
    assert row[3].strip() == ", ".join(runs)
    peaks = [max(value for name, value in result.items() if name.startswith("GB")) for result in results]
    digits = 0 if min(peaks) > 50 else 1
    assert row[4].strip() == ", ".join(f"{peak:.{digits}f}" for peak in peaks) + " GB"


def test_larger_settings_cost_what_they_should():
    """Twice the prompts twice the work; guidance twice the evaluations; checkpointing another forward, less memory."""
    args, one = plan("grpo", "sd3")
    _, two = plan("grpo", "sd3", f"--prompts-per-iteration {2 * args.prompts_per_iteration}")
    assert two["PFLOP"] == pytest.approx(2 * one["PFLOP"]) and two["images"] == 2 * one["images"]
    _, less = plan("grpo", "sd3", "--gradient-checkpointing")
    assert less["GB in training"] < one["GB in training"] - 5 and less["  training"] > 1.3 * one["  training"]
    _, few = plan("grpo", "sd3", f"--micro-batch {one['largest --micro-batch']}")
    _, many = plan("grpo", "sd3", f"--micro-batch {one['largest --micro-batch'] + 1}")
    room = CARDS["sd3"][0] * (1 - bench.FREE)
    assert few["GB in training"] <= room < many["GB in training"]


def test_small_calls_wait_for_the_host():
    """The seconds of a call are its FLOPs or its kernels, whichever takes longer."""

    def cost(call, rows):
        return rows * 1e12, 1000, rows * 1e9

    args = bench.script_args(grpo, "sd3", "--prompts-per-iteration 1 --group-size 8 --micro-batch 1 --steps 2".split())
    weights = dict.fromkeys("transformer vae encoders reward adapter".split(), 0)
    for tflops, seconds in ((20, 2 * 8 * 0.05), (1000, 2 * 8 * 0.025)):  # 50 and 1 ms of FLOPs, 25 ms of launching
        result = bench.plan(grpo, args, 80e9, tflops * 1e12, (cost, weights, (16, 64, 64), 1))
        assert result["  rollout"] * 60 == pytest.approx(seconds)


@pytest.fixture
def command(monkeypatch, capsys):
    """command(options): exit status, output and errors of bench.py plan."""

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["bench.py", "plan", "--model", "flux2", *options])
        try:
            bench.main()
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def test_the_command(command, monkeypatch):
    """A line for each number, a column for each script, with the options that a script has."""
    monkeypatch.setattr(bench, "count_model", lambda model, args: count(model, args.resolution, False, args.lora_rank))
    status, out, errors = command("--memory", "16", "--sde-steps", "0,1", "--branches", "3", "--guidance=1")
    assert (status, errors) == (0, "")
    rows = {line[:28].strip(): line[28:].split() for line in out.splitlines()}
    assert rows["--sde-steps"] == ["0,1"] * 3 and rows["--guidance"] == ["1.00"] * 3
    args, result = plan("tempflow_grpo", "flux2", "--sde-steps 0,1 --branches 3 --guidance 1")
    assert rows["images"][2] == str(args.prompts_per_iteration * args.seeds_per_prompt * 3 * 2)
    assert rows["velocity evaluations"][2] == f"{result['velocity evaluations']:.2f}"
    assert rows["GB in training"][3:] == ["too", "much"] and len(rows["GB in rollout"]) == 3


def test_an_iteration_beside_its_plan(monkeypatch, capsys):
    """A script runs as it is on networks with random weights: it makes the evaluations that were counted."""
    small = "--resolution 32 --prompts-per-iteration 2 --group-size 4 --steps 4 --sde-steps 0,1,2 --scripts grpo"
    monkeypatch.setattr(sys, "argv", ["bench.py", "iteration", "--tiny", "--device", "cpu", *small.split()])
    bench.main()
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["velocity_evals"].split() == ["104.0", "104.0"]  # 8 x 4 steps, and 3 x 8 x 3 that train
    assert float(rows["ratio_first_error"]) == 0 and float(rows["grad_norm"]) > 0
    assert all(float(rows[f"{phase}_s"].split()[0]) > 0 for phase in ("rollout", "reward", "train"))


@pytest.mark.parametrize("options", ["--sde-steps 99", "--branch 3", "--resolution 100", "--micro-batch 0"])
def test_what_cannot_be_is_one_line(command, options):
    status, _, errors = command(*options.split())
    assert status == 2 and errors.startswith("error: ") and errors.count("\n") == 1
