"""torchrun: two processes (CPU, gloo) make the run that one makes, and end together whatever happens to one of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import common
from conftest import ROOT, SCRIPTS, here, metrics

import pytest
import torch
from safetensors.torch import load_file

# A micro-batch that both one and two processes fill: the network then sees the same shapes in each.
SMALL = "--seed 3 --prompts-per-iteration 4 --eval-seeds 1 --lora-rank 4 --micro-batch 4 --steps 4 --eval-steps 3"
OF_SCRIPT = {  # with what must be known of all processes: the std of all rewards, steps drawn, groups of a prompt
    "grpo": "--group-size 4 --adv-std batch --kl-coef 0.1",
    "gcpo": "--group-size 4 --sde-steps all --chunks adaptive --chunk-fraction 0.5 --weighted-sampling"
    " --ema-decay 0.5 --shared-noise",
    "tempflow_grpo": "--seeds-per-prompt 2 --branches 3 --group prompt --sde-steps 2",
}
MINUTE = 60


def options(script, *more):
    return [*SMALL.split(), *OF_SCRIPT[script].split(), *map(str, more)]


class Torchrun:
    """`torchrun --nproc-per-node 2` of a script; what each process writes to standard error is kept apart."""

    def __init__(self, logs, script, *arguments):
        self.logs, engine = logs, [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        file = script if script.endswith(".py") else str(ROOT / f"{script}.py")
        self.process = subprocess.Popen(
            [*engine, "--nproc-per-node", "2", "--redirects", "2", "--log-dir", str(logs), file, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def wait_for(self, folder, lines):
        """Until the run in a folder has written so many lines of metrics."""
        file = Path(folder, "metrics.jsonl")
        while not file.exists() or len(file.read_text().splitlines()) < lines:
            assert self.process.poll() is None, self.errors()
            time.sleep(0.02)

    def pid(self, rank):
        """The process number of a rank, which torchrun's children have in their environment."""
        of = self.process.pid
        for child in Path(f"/proc/{of}/task/{of}/children").read_text().split():
            if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
                return int(child)
        raise AssertionError(f"no process of rank {rank}")

    def errors(self):
        """What the first and the second process wrote to standard error, without the warning of small groups."""
        texts = [path.read_text() for path in sorted(self.logs.glob("*/attempt_0/?/stderr.log"))]
        assert not any("Traceback" in text for text in texts), texts
        return [[line for line in text.splitlines() if "give noisy" not in line] for text in texts]

    def end(self, within=600):
        """Wait; returns the exit status, standard output, torchrun's own report, and errors()."""
        try:
            out, report = self.process.communicate(timeout=within)
        finally:
            self.process.kill()
        return self.process.returncode, out, report, self.errors()


def one_process(script, folder, *arguments):
    torch.set_num_threads(1)
    result = here(script, *arguments, "--output", folder)
    assert result.returncode == 0, result.stderr


def adapter(folder):
    (file,) = Path(folder, "lora").glob("*.safetensors")
    return load_file(file)


def assert_same_adapter(one, other):
    """To 1e-5 relative, as vectors.

    Single weights are not as near: Adam divides a gradient by its size, so where one is no more than its rounding error
    the step is, too. Two processes differ by as much as another --micro-batch does. In float64 single weights agree.
    """
    one, other = ([rows.flatten() for rows in adapter(folder).values()] for folder in (one, other))
    one, other = torch.cat(one).double(), torch.cat(other).double()
    assert (one - other).norm() < 1e-5 * one.norm()


def assert_same_metrics(one, other):
    """Metrics are the same to rounding, counts and what is evaluated exactly; the ratio starts at 1 in both."""
    one, other = metrics(one, times=False), metrics(other, times=False)
    assert len(one) == len(other)
    for a, b in zip(one, other):
        assert a.keys() == b.keys()
        assert a.get("ratio_first_error", 0.0) == b.get("ratio_first_error", 0.0) == 0.0
        for name, value in a.items():
            if name in ("iteration", "images", "velocity_evals", "skipped_updates", "branch_steps"):
                assert value == b[name], name
            elif name.startswith(("eval", "reward", "grad_norm", "zero", "l1rel", "gradient", "kl_ref")):
                assert b[name] == pytest.approx(value, rel=2e-5), name
    assert one[0]["eval_reward"] == other[0]["eval_reward"]
    assert one[-1]["eval_reward"] == pytest.approx(other[-1]["eval_reward"], rel=1e-6)


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_make_the_run_of_one(script, tmp_path):
    arguments = options(script, "--iterations", 2, "--eval-every", 2)
    one_process(script, tmp_path / "one", *arguments)
    run = Torchrun(tmp_path / "logs", script, *arguments, "--output", tmp_path / "two")
    status, out, report, errors = run.end()
    assert status == 0, (report, errors)
    assert errors == [[], []] and out.count("evaluation ") == out.count("step   sigma") == 1  # one of them prints
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}
    assert_same_adapter(tmp_path / "one", tmp_path / "two")
    assert_same_metrics(tmp_path / "one", tmp_path / "two")
    travelled = torch.cat([rows.flatten() for name, rows in adapter(tmp_path / "two").items() if "lora_B" in name])
    assert travelled.abs().max() > 1e-3  # B began at 0


class DoublePolicy(common.Policy):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for part in (self.transformer, self.pipe.vae, *self.encoders):
            part.double()


IN_FLOAT64 = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import common, gcpo, test_processes
common.Policy, sys.argv[0] = test_processes.DoublePolicy, "gcpo.py"
common.run_script(gcpo.main, gcpo.Args, gcpo.DEFAULTS)
"""


def test_every_weight_in_float64(monkeypatch, tmp_path):
    """Where rounding is out of the way, every single weight of two processes is that of one."""
    driver = tmp_path / "driver.py"
    driver.write_text(IN_FLOAT64)
    arguments = options("gcpo", "--iterations", 2, "--eval-every", 2, "--ema-decay", 0)  # the average is float32
    monkeypatch.setattr(common, "Policy", DoublePolicy)
    one_process("gcpo", tmp_path / "one", *arguments)
    run = Torchrun(tmp_path / "logs", str(driver), *arguments, "--output", tmp_path / "two")
    status, _, report, errors = run.end()
    assert status == 0, (report, errors)
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    for name, weight in one.items():
        assert weight.dtype == torch.float64
        assert (weight - two[name]).abs().max() <= 1e-9 * weight.abs().max(), name


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """One iteration of one process, one of two, one of one again, as in a run of one process for all three."""
    arguments = options("grpo", "--eval-every", 3)
    one_process("grpo", tmp_path / "whole", *arguments, "--iterations", 3)
    one_process("grpo", tmp_path / "parts", *arguments, "--iterations", 1)
    run = Torchrun(tmp_path / "logs", "grpo", "--resume", tmp_path / "parts", "--iterations", 2)
    status, _, report, errors = run.end()
    assert status == 0, (report, errors)
    assert here("grpo", "--resume", tmp_path / "parts", "--iterations", 3).returncode == 0
    assert_same_adapter(tmp_path / "whole", tmp_path / "parts")
    assert_same_metrics(tmp_path / "whole", tmp_path / "parts")


def saved(folder):
    """The last iteration in checkpoint.pt, after a look at whether lora/ can be read."""
    assert adapter(folder)
    return torch.load(folder / "checkpoint.pt", weights_only=True)["counters"]["iteration"]


def test_killed_process_ends_the_run(tmp_path):
    run = Torchrun(
        tmp_path / "logs", "tempflow_grpo", *options("tempflow_grpo", "--save-every", 1), "--output", tmp_path / "run"
    )
    run.wait_for(tmp_path / "run", 3)  # the base model and two iterations
    os.kill(run.pid(1), signal.SIGKILL)
    status, _, _, (first, second) = run.end(within=MINUTE)
    assert status != 0 and second == []
    assert [line[:33] for line in first if "stopping" not in line] == ["error: another process has ended "]
    assert saved(tmp_path / "run") >= 1


def test_first_process_killed_ends_the_run(tmp_path):
    run = Torchrun(tmp_path / "logs", "grpo", *options("grpo", "--save-every", 1), "--output", tmp_path / "run")
    run.wait_for(tmp_path / "run", 3)
    os.kill(run.pid(0), signal.SIGKILL)
    status, _, report, errors = run.end(within=MINUTE)
    assert status != 0 and "SIGKILL" in report
    assert errors == [[], []]  # torchrun tells it
    assert saved(tmp_path / "run") >= 1


@pytest.mark.parametrize("to", ["torchrun", "second process"])
def test_signal_ends_all_after_the_iteration(to, tmp_path):
    run = Torchrun(tmp_path / "logs", "gcpo", *options("gcpo", "--eval-every", 1000), "--output", tmp_path / "run")
    run.wait_for(tmp_path / "run", 2)
    os.kill(run.process.pid if to == "torchrun" else run.pid(1), signal.SIGTERM)
    status, _, report, (first, second) = run.end(within=MINUTE)
    assert status != 0 and second == []
    assert first[-1] == f"stopped; go on with --resume {tmp_path / 'run'}"
    assert len(first) == (2 if to == "torchrun" else 1)
    done = metrics(tmp_path / "run")[-1]["iteration"]
    assert saved(tmp_path / "run") == done >= 1
    if to != "torchrun":
        assert "exitcode  : 143" in report


def test_reward_that_fails_in_one_process(tmp_path):
    """Its line comes from that process; the first tells that it has ended, and saves what was trained."""
    (tmp_path / "rewards_of_mine.py").write_text(
        "import torch\n"
        "def picky(images, prompts):\n"
        "    if 'a bad prompt' in prompts:\n"
        "        raise ValueError('will not look at this')\n"
        "    return images.mean((1, 2, 3))\n"
    )
    names = [f"a {colour} circle" for colour in ("red", "green", "blue", "yellow")] * 2
    arguments = options("grpo", "--eval-every", 1000, "--eval-prompts", ROOT / "tests" / "tiny" / "eval_prompts.txt")
    # the second iteration's second prompt, of which every process knows the place beforehand
    order = common.iteration_prompts(range(len(names)), 4, 2, seed=3)
    names[order[1]] = "a bad prompt"
    (tmp_path / "prompts.txt").write_text("\n".join(names))
    reward = f"{tmp_path / 'rewards_of_mine.py'}:picky"
    run = Torchrun(
        tmp_path / "logs", "grpo", *arguments, "--prompts", tmp_path / "prompts.txt", "--model", "tiny",
        "--reward", reward, "--output", tmp_path / "run",
    )  # fmt: skip
    status, _, _, (first, second) = run.end(within=3 * MINUTE)
    assert status != 0
    (line,) = second
    assert line.startswith("error: ") and "picky" in line and "will not look at this" in line
    assert [line[:33] for line in first if "stopping" not in line] == ["error: another process has ended "]
    assert metrics(tmp_path / "run")[-1]["iteration"] == saved(tmp_path / "run") == 1


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--prompts-per-iteration", "6"], "72 trajectories in 2 updates on 2 processes do not divide"),
        (["--device", "cuda"], f"cannot be used by 2 processes on a machine with {torch.cuda.device_count()} GPUs"),
    ],
)
@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="two processes have their GPUs here")
def test_bad_input_is_told_once(arguments, told, tmp_path):
    run = Torchrun(tmp_path / "logs", "grpo", *arguments, "--output", tmp_path / "run")
    status, _, report, (first, second) = run.end(within=MINUTE)
    assert status != 0 and "exitcode  : 2 " in report
    assert second == [] and len(first) == 1 and first[0].startswith("error: ") and told in first[0]
    assert not (tmp_path / "run").exists()


def test_a_gpu_for_each_process(monkeypatch):
    """The third of four processes takes the third of four GPUs; three GPUs are too few, and one named is not each's."""
    taken = []
    monkeypatch.setattr(common, "PROCESSES", 8)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    common.take_gpu("cpu")
    assert taken == []
    common.take_gpu("cuda")
    assert taken == [2]
    with pytest.raises(common.StopRun):
        common.take_gpu("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(common.StopRun) as error:
        common.take_gpu("cuda")
    assert error.value.exit_status == 2 and taken == [2]


def test_one_process_makes_no_group():
    assert common.PROCESSES == 1 and not torch.distributed.is_initialized()
    rows = torch.arange(6).view(3, 2)
    assert torch.equal(common.gather(common.share(rows)), rows)
