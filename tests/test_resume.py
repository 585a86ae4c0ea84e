"""Resume continues exactly; what would change the past is refused; a damaged run is told."""

import json
import shutil

from conftest import SCRIPTS, here, metrics, small

import pytest
import torch
from safetensors.torch import load_file

LORA = "lora/pytorch_lora_weights.safetensors"
EXTRA = {"grpo": "--kl-coef 0.01", "gcpo": "--weighted-sampling", "tempflow_grpo": "--branch-steps 2"}


def same_weights(a, b):
    one, other = load_file(a / LORA), load_file(b / LORA)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("script", SCRIPTS)
def test_stopped_and_resumed_is_the_same_run(script, tmp_path):
    """6 iterations at once, and 3 and then 6: the same metrics, adapter, optimizer and EMA, bit for bit."""
    options = [*small(script), *EXTRA[script].split(), "--ema-decay", "0.9", "--eval-every", "2"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert here(script, *options, "--iterations", "6", "--output", whole).returncode == 0
    assert here(script, *options, "--iterations", "3", "--output", halves).returncode == 0
    with open(halves / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 4, "rew')  # half a last line
    done = here(script, "--resume", halves, "--iterations", "6")
    assert done.returncode == 0, done.stderr
    assert metrics(whole, times=False) == metrics(halves, times=False)
    assert same_weights(whole, halves)
    one, other = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, halves))
    assert one["counters"] == other["counters"] and one["iteration"] == other["iteration"] == 6
    for a, b in zip(one["optimizer"]["state"].values(), other["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert all(torch.equal(a, b) for a, b in zip(one["ema"]["shadow_params"], other["ema"]["shadow_params"]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("a red circle\ntwo blue squares\n")
    options = [*small("grpo"), "--prompts", prompts, "--iterations", "2", "--output", folder]
    assert here("grpo", *options).returncode == 0
    return folder


@pytest.mark.parametrize(
    "script, options, says",
    [
        ("grpo", "--learning-rate 0.5", "--learning-rate"),
        ("grpo", "--group-size 12", "--group-size"),  # the default, but not that run's
        ("grpo", "--seed 1", "--seed"),
        ("grpo", "--iterations 1", "--iterations"),
        ("gcpo", "", "grpo.py"),
    ],
)
def test_what_would_change_the_past_is_refused_by_name(finished, script, options, says):
    done = here(script, "--resume", finished, *options.split())
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0]


def damaged(finished, tmp_path, damage):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    damage(copy)
    return copy


def cut(folder):
    data = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(data[: len(data) // 2])


def foreign(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    state["lora"] = {key: torch.zeros(3) for key in state["lora"]}
    torch.save(state, folder / "checkpoint.pt")


def other_prompts(folder):
    config = json.loads((folder / "config.json").read_text())
    config["prompts_sha256"]["prompts"] = "0" * 64
    (folder / "config.json").write_text(json.dumps(config))


def old_config(folder):
    config = json.loads((folder / "config.json").read_text())
    config["prompts_sha256"] = "0" * 64  # as it was once, of one file
    (folder / "config.json").write_text(json.dumps(config))


def no_versions(folder):
    config = json.loads((folder / "config.json").read_text())
    config["versions"] = None
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "damage, says",
    [
        (cut, "checkpoint.pt"),
        (foreign, "another model"),
        (other_prompts, "--prompts"),
        (old_config, "another version"),
        (no_versions, "another version"),
    ],
)
def test_damaged_runs_are_told(finished, tmp_path, damage, says):
    done = here("grpo", "--resume", damaged(finished, tmp_path, damage), "--iterations", "3")
    assert done.returncode == 2 and says in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_another_version_of_torch_is_a_warning(finished, tmp_path):
    def older(folder):
        config = json.loads((folder / "config.json").read_text())
        config["versions"]["torch"] = "2.0.0"
        (folder / "config.json").write_text(json.dumps(config))

    done = here("grpo", "--resume", damaged(finished, tmp_path, older), "--iterations", "3")
    assert done.returncode == 0 and "warning: this run began with torch 2.0.0" in done.stderr
