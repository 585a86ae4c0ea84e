"""Every script and family on a GPU that is not there (pretend_gpu.py), small and in true sizes."""

import importlib
import json
import os
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bench  # noqa: E402
import common  # noqa: E402
import pretend_gpu  # noqa: E402
import small_pipelines  # noqa: E402

slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="half a minute; SLOW=1 runs it, as CI does")
FAMILIES, SCRIPTS = list(small_pipelines.MAKERS), ["grpo", "gcpo", "tempflow_grpo"]
# a small learning rate: AdamW's first step is as large where a gradient is nothing but rounding
QUICK = """--iterations 1 --eval-every 9 --eval-seeds 1 --eval-steps 1 --reward jpeg_compressibility --lora-rank 2
    --prompts-per-iteration 2 --steps 3 --sde-steps 0,1 --updates-per-iteration 2 --learning-rate 1e-5"""
GROUP = {
    "grpo": "--group-size 2",
    "gcpo": "--group-size 2 --chunks 2 --chunk-fraction 1",
    "tempflow_grpo": "--seeds-per-prompt 1 --branches 2",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(script, family, device, options): the metrics of a run of a small pipeline, without times."""
    folder = tmp_path_factory.mktemp("dry")
    (folder / "prompts.txt").write_text("a cat\ntwo dogs\nthe sea\n")

    @cache
    def model(family):
        small_pipelines.save(folder / family, family)
        return folder / family

    @cache
    def metrics(script, family, device, options=""):
        module, output = importlib.import_module(script), tmp_path_factory.mktemp("run") / "run"
        line = f"{QUICK} {GROUP[script]} --resolution 16 --micro-batch 4 --guidance 3 --kl-coef 0.1 {options}"
        line += f" --model {model(family)} --prompts {folder}/prompts.txt --device {device} --output {output}"
        module.main(common.parse_args(module.Args, module.DEFAULTS, line.split()))
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in one.items() if not key.endswith("_s")} for one in lines]

    return metrics


@contextmanager
def trajectories_on(store):
    """Policies with their latents there, as where they are large."""
    original = common.make_policy

    def make_policy(*args, **options):
        policy = original(*args, **options)
        policy.store = torch.device(store)
        return policy

    with mock.patch("common.make_policy", make_policy):
        yield


@pytest.mark.parametrize("store", ["gpu", "cpu"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_is_that_of_the_cpu(run, script, family, store):
    """Nothing mixes devices or dtypes, wherever the trajectories are; and the numbers are the same."""
    options = "--dtype bfloat16"
    want = run(script, family, "cpu", options)
    with pretend_gpu.card(), trajectories_on(store):
        got = run(script, family, "gpu:0" if store == "gpu" else "gpu", options)
    assert got[0] == want[0]  # the evaluation of the base model
    exact = "reward_mean reward_std ratio_first_error images velocity_evals"
    for name in exact.split():
        assert got[1][name] == want[1][name], name
    for name in "kl_ref grad_norm eval_reward".split():  # in bfloat16 gradients may be added up in another order
        assert got[1][name] == pytest.approx(want[1][name], rel=0.02, abs=1e-6), name


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_and_float16(run, family):
    options = "--dtype float16 --gradient-checkpointing --kl-coef 0"
    want = run("grpo", family, "cpu", options)
    with pretend_gpu.card():
        got = run("grpo", family, "gpu", options)
    assert got[1]["grad_norm"] == pytest.approx(want[1]["grad_norm"], rel=0.02)


def test_mixing_devices_raises():
    with pretend_gpu.card():
        here, there = torch.ones(2, 3), torch.ones(2, 3, device="gpu")
        layer = torch.nn.Linear(3, 3)
        mixed = [
            lambda: here + there,
            lambda: there.copy_(here) @ here.T,
            lambda: layer(there),
            lambda: torch.cat([here, there]),
            lambda: here[torch.zeros(1, dtype=torch.long, device="gpu")],  # an index on the CPU is allowed, not so here
            lambda: there.scatter(1, torch.zeros(2, 1, dtype=torch.long), 0.0),
            lambda: torch.nn.functional.scaled_dot_product_attention(there, here, there),
            lambda: torch.where(there > 0, there, here),
            lambda: torch.randn(2, device="gpu", generator=torch.Generator()),
        ]
        for operation in mixed:
            with pytest.raises(RuntimeError, match="GPU"):
                operation()
        with pytest.raises(RuntimeError, match="dtype"):
            there.bfloat16() @ there.T
        there[torch.zeros(1, dtype=torch.long)] *= torch.tensor(2.0)  # what a GPU allows
        assert torch.equal(there.cpu(), torch.tensor([[2.0] * 3, [1.0] * 3]))


def test_a_mistake_is_seen(run):
    """A velocity that is left on the GPU, where the trajectories are on the CPU."""
    original = common.Policy.velocity

    def velocity(self, *inputs):
        return original(self, *inputs).to(self.device)

    with (
        pretend_gpu.card(),
        trajectories_on("cpu"),
        mock.patch.object(common.Policy, "velocity", velocity),
        pytest.raises(RuntimeError, match="tensors on the CPU and on the GPU"),
    ):
        run("grpo", "sd3", "gpu", "--seed 1")


@pytest.mark.parametrize("script, family, options", [
    ("grpo", "sd3", "--guidance 4.5 --micro-batch 2 --group-size 2"),
    ("tempflow_grpo", "flux2", "--guidance 1 --micro-batch 1 --seeds-per-prompt 1 --branches 2"),
    pytest.param("gcpo", "flux", "--gradient-checkpointing --micro-batch 2 --group-size 2 --chunks 1", marks=slow),
])  # fmt: skip
def test_true_sizes_take_the_memory_of_the_plan(script, family, options):
    """The parts of an iteration with networks in their true sizes, without numbers: peaks within 10% of the plan's."""
    module = importlib.import_module(script)
    line = (
        f"--prompts-per-iteration 2 --steps 2 --sde-steps 0, --resolution 512 --lora-rank 32 --ema-decay 0.9 {options}"
    )
    args = bench.script_args(module, family, line.split())
    counted = bench.count_model(family, args)
    planned, peaks = bench.plan(module, args, 100e9, 1e15, counted), {}

    with pretend_gpu.card(limit=4096) as memory:
        pipe = bench.make_pipeline(family, "gpu", torch.bfloat16, encoders=True)
        for name in bench.SIZES[family]["encoders"]:
            getattr(pipe, name).to("cpu")
        pickscore = torch.empty(counted[1]["reward"], dtype=torch.uint8, device="gpu")
        policy = bench.policy_of(args, pipe, "gpu")
        optimizer = torch.optim.AdamW(policy.parameters)
        for parameter in policy.parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes its moments
        policy.update_average()
        sigmas, generator, sde, chosen = policy.sigmas(args.steps), torch.Generator(), args.sde, [0]
        s = common.noise_scale(sigmas, sde, 0.7)
        levels = [level[chosen] for level in (sigmas[:-2], sigmas[1:-1], s)]
        P = args.prompts_per_iteration
        noise = [policy.noise(P, 1 if script == "tempflow_grpo" else 2, generator) for _ in range(args.steps)]
        if script == "tempflow_grpo":
            noise[1] = policy.noise(P, 2, generator).unflatten(0, (P, 2))
        owner = torch.arange(len(noise[0]), device="gpu") % P

        @contextmanager
        def measured(phase):
            memory.peak = memory.now
            yield
            peaks[phase] = memory.peak / 1e9

        with measured("encoding"):
            text = policy.encode(list("abcdefg"))
        with measured("rollout"):
            sampled = module.rollout(policy, text, owner, noise, sigmas, s, sde, chosen)
        with measured("decoding"):
            policy.decode(sampled[-1])
        with measured("training"):
            for image in torch.arange(len(owner), device="gpu").split(args.micro_batch)[:2]:
                step = torch.zeros_like(image)
                logp, *_ = module.transition_logp(policy, text, owner, levels, sde, *sampled[:2], step, image)
                policy.backward(logp.mean())
        assert pickscore.device.type == "gpu"  # it has stayed until now
    for phase, peak in peaks.items():
        assert planned[f"GB in {phase}"] == pytest.approx(peak, rel=0.1), phase
