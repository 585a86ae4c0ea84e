"""Resume continues exactly; what would change the past is refused; a damaged run is told."""

import json
import shutil

from conftest import SCRIPTS, assert_same_run, errors, here, small

import pytest
import torch

LORA = "lora/pytorch_lora_weights.safetensors"
EXTRA = {"grpo": "--kl-coef 0.01", "gcpo": "--weighted-sampling", "tempflow_grpo": "--sde-steps 2"}


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
    assert_same_run(whole, halves)
    assert (whole / LORA).read_bytes() == (halves / LORA).read_bytes()


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
        ("grpo", "--learning-rate 0.5", "--learning-rate cannot stand beside --resume"),
        ("grpo", "--group-size 4", "--group-size cannot stand beside --resume"),  # though it is that run's
        ("grpo", "--output other", "--output cannot stand beside --resume"),
        ("grpo", "--iterations 1", "--iterations 1 is less than the 2"),
        ("gcpo", "", "grpo.py"),
    ],
)
def test_resume_takes_every_setting_from_the_run(finished, script, options, says):
    done = here(script, "--resume", finished, *options.split())
    (line,) = errors(done.stderr)
    assert done.returncode == 2 and line.startswith("error: ") and says in line


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
    config["prompts_sha256"][0] = "0" * 64
    (folder / "config.json").write_text(json.dumps(config))


def no_versions(folder):
    config = json.loads((folder / "config.json").read_text())
    config["versions"] = None
    (folder / "config.json").write_text(json.dumps(config))


def another_setting(folder):
    config = json.loads((folder / "config.json").read_text())
    config["settings"]["branch_steps"] = config["settings"].pop("sde_steps")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "damage, says",
    [
        (cut, "checkpoint.pt cannot be resumed from"),
        (foreign, "another model"),
        (other_prompts, "--prompts or --eval-prompts have changed"),
        (no_versions, "no run that grpo.py can go on with"),
        (another_setting, "another version"),
    ],
)
def test_damaged_runs_are_told(finished, tmp_path, damage, says):
    done = here("grpo", "--resume", damaged(finished, tmp_path, damage), "--iterations", "3")
    assert done.returncode == 2 and len(errors(done.stderr)) == 1 and says in done.stderr, done.stderr


def test_another_version_of_torch_is_a_warning(finished, tmp_path):
    def older(folder):
        config = json.loads((folder / "config.json").read_text())
        config["versions"]["torch"] = "2.0.0"
        (folder / "config.json").write_text(json.dumps(config))

    done = here("grpo", "--resume", damaged(finished, tmp_path, older), "--iterations", "3")
    assert done.returncode == 0 and "warning: this run began with {'torch': '2.0.0'" in done.stderr
