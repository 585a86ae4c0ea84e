"""bench.py: what it counts, against closed forms, PyTorch's own counter and real runs."""

import importlib
import itertools
import sys
from unittest import mock

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
import common
import gcpo
import grpo
import small_pipelines
from conftest import SCRIPTS, metrics, parse, slow

CARDS = {"sd3": (24e9, 65e12), "flux": (80e9, 250e12), "flux2": (24e9, 65e12)}  # that the defaults are for


def test_flops_kernels_and_bytes_of_a_small_case():
    """Two linear layers without bias, a view and a sum: at most the two hidden tensors live at a time."""
    a, b = (torch.empty(n, m, device="meta") for n, m in ((32, 16), (8, 32)))
    x = torch.empty(4, 16, device="meta")

    def function():
        hidden = x @ a.T
        hidden = hidden.relu()  # both are there while it is made: 2 x 4 x 32 numbers of 4 bytes
        return (hidden @ b.T).view(-1).sum()

    assert bench.count(function) == (2 * 4 * 16 * 32 + 2 * 4 * 32 * 8, 4, 2 * 4 * 32 * 4)


def flops(function, *kernel):
    """By PyTorch's own counter, which does not count the CPU's own kernel of attention."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel([*kernel] or SDPBackend.FLASH_ATTENTION):
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("family, guidance", [("sd3", 1.0), ("flux", 3.0), ("flux2", 3.0)])
def test_flops_are_those_of_a_real_model(family, guidance):
    options = dict(resolution=16, guidance=guidance, lora_rank=2, lora_alpha=4.0)
    policy = common.Policy(small_pipelines.MAKERS[family](), device="cpu", micro_batch=2, **options)
    (text,) = policy.encode(["a", "b"])
    functions = bench.calls(policy, text)
    real = {name: flops(function, SDPBackend.MATH) for name, function in functions.items()}
    forward, both = (real[name] - flops(functions[name]) for name in ("rollout", "train"))  # of attention
    counted = bench.count_model(family, "float32", True, gradient_checkpointing=False, **options).calls
    again = bench.count_model(family, "float32", True, gradient_checkpointing=True, **options).calls
    # CUDA's kernel does not keep the weights of attention: its backward makes them again, half of a forward
    real["train"] += (both - forward) // 4
    assert {name: call[0] for name, call in counted.items()} == real
    assert real["train"] < again["train"][0] < real["train"] + real["rollout"]


def settings(script, options):
    group = "--seeds-per-prompt 2 --branches 3" if script == "tempflow_grpo" else "--group-size 4"
    return parse(script, *f"--prompts-per-iteration 2 --steps 5 --lora-rank 2 {group} {options}".split())


@pytest.mark.parametrize(
    "script, options",
    [
        ("grpo", "--sde-steps all --sde-steps-per-iteration 2 --kl-coef 0.1 --guidance 3"),
        ("gcpo", "--sde-steps all --chunks 2,2 --chunk-fraction 0.5 --guidance 3"),
        ("gcpo", "--sde-steps 1,2,3 --chunks 1,2 --chunk-fraction 1 --updates-per-iteration 4 --kl-coef 0.1"),
        ("gcpo", "--sde-steps 0,1,2 --chunks adaptive --chunk-max 3 --chunk-fraction 0.5"),
        ("tempflow_grpo", "--sde-steps all --guidance 3"),
        ("tempflow_grpo", "--sde-steps 0,2 --kl-coef 0.1 --updates-per-iteration 4"),
        ("tempflow_grpo", "--sde-steps 3,"),
    ],
)
def test_work_is_that_of_a_real_iteration(script, options, tmp_path):
    module = importlib.import_module(script)
    (tmp_path / "reward.py").write_text("def mean(images, prompts):\n    return images.mean((1, 2, 3))\n")
    quick = "--iterations 1 --eval-every 9 --eval-seeds 1 --eval-steps 1 --micro-batch 5"
    quick += f" --output {tmp_path}/run --reward {tmp_path}/reward.py:mean"
    args = settings(script, f"{options} {quick}")
    with mock.patch.object(common, "plot_progress"):
        module.main(args)
    run, does = metrics(tmp_path / "run")[-1], bench.work(module, args)
    passes = 2 if args.guidance > 1 else 1
    assert passes * (sum(does.forward) + 3 * sum(does.train)) == run["velocity_evals"]
    assert does.images == run["images"]


def test_what_is_drawn_counts_with_its_mean():
    def evaluations(script, options):
        does = bench.work(importlib.import_module(script), settings(script, options))
        return sum(does.forward) + 3 * sum(does.train)

    for script in ("grpo", "tempflow_grpo"):
        each = [evaluations(script, f"--sde-steps {a},{b}") for a, b in itertools.combinations(range(4), 2)]
        drawn = evaluations(script, "--sde-steps all --sde-steps-per-iteration 2")
        assert drawn == pytest.approx(sum(each) / len(each))
    dice = torch.empty(4000, 4).exponential_(generator=torch.Generator().manual_seed(0))
    drawn = [gcpo.draw_chunks(torch.ones(4), [1, 3], 0.5, False, numbers).diagonal() > 0 for numbers in dice]
    N, trained = 8, torch.stack(drawn).float().mean(0)  # the share of trajectories that train each step
    want = 5 * N + 3 * N * trained.sum() + N / 2 * trained[1:].sum()
    got = evaluations("gcpo", "--sde-steps all --chunks 1,3 --chunk-fraction 0.5")
    # the share of 4,000 draws is off by 0.008 or so, and the sum by 0.5%
    assert got == pytest.approx(want.item(), rel=0.02)


@pytest.mark.parametrize(
    "family", ["sd3", pytest.param("flux", marks=slow), pytest.param("flux2", marks=slow)]
)
def test_defaults_are_for_one_gpu(family, tmp_path):
    """An iteration in 6 minutes, the run in 12 hours, in the memory of the card."""
    for script in SCRIPTS:
        module = importlib.import_module(script)
        args = bench.script_args(module, family, tmp_path, ["--dtype", "bfloat16", "--compile"])
        args.micro_batch = 0  # what fits, as on CUDA
        result = bench.plan(module, args, family, *CARDS[family])
        assert result["seconds without eval"] <= 360 and result["hours"] <= 12, script
        assert result["largest micro-batch"] >= 1, script


def test_time_and_memory_by_hand(tmp_path):
    """16 latents in 2 steps, one of them trained; a call takes its FLOPs or its kernels, the longer."""
    call = 2e12, 1000, 2e9  # of two latents
    model = bench.Model(dict.fromkeys(("rollout", "train", "decode"), call), 5e9, 9e9, 0, 0, 1, 1)
    line = "--prompts-per-iteration 2 --group-size 8 --steps 2 --sde-steps 0, --ema-decay 0 --micro-batch 2"
    with mock.patch.object(bench, "count_model", lambda *_, **__: model):
        cases = (10e12, "", 0.2 / bench.EAGER), (1e15, "", 0.025), (10e12, "--compile", 0.2)
        for rate, compiled, seconds in (*cases, (1e15, "--compile", 0.0125)):
            args = bench.script_args(grpo, "sd3", tmp_path, f"{line} {compiled}".split())
            result = bench.plan(grpo, args, "sd3", 20e9, rate)
            assert result["train_s"] == pytest.approx(8 * seconds)
            trip = 2 * (9e9 + 5e9) / bench.BUS / bench.TRIP + 9e9 * 3 / rate
            assert result["rollout_s"] == pytest.approx(16 * seconds + trip)
            # PickScore, with the network and two latents, or with the encoders
            live = 2 * bench.LIVE if compiled else 2
            assert result["peak_memory_gb/train"] == pytest.approx(5 + 2 + live)
        assert result["peak_memory_gb/rollout"] == pytest.approx(2 + 9)
        # beside a tenth, 5 + 2 GB and CUDA's 0.7: 19.3 for 16 latents; 10.3 for 10 after 16, 14, 12; 0.4
        for gigabytes, largest in ((30, 16), (20, 10), (9, 0)):
            assert bench.plan(grpo, args, "sd3", gigabytes * 1e9, rate)["largest micro-batch"] == largest


def test_an_iteration_beside_its_plan(monkeypatch, capsys):
    """A script as it is on small networks: it makes the evaluations that were counted."""
    small = "iteration --tiny --device cpu --scripts grpo --prompts-per-iteration 2 --group-size 4 --steps 4"
    monkeypatch.setattr(sys, "argv", ["bench.py", *small.split(), "--sde-steps", "0,1,2"])
    bench.main()
    rows = {line[:32].strip(): line[32:].split() for line in capsys.readouterr().out.splitlines()}
    assert rows["velocity_evals"] == ["104", "104"]  # 8 x 4 steps, and 3 x 8 x 3 that train
    assert float(rows["ratio_first_error"][0]) == 0 and float(rows["grad_norm"][0]) > 0
    assert all(float(rows[f"{phase}_s"][0]) > 0 for phase in ("rollout", "reward", "train", "eval"))
