"""Whole runs, through the command line or a script's main, on the bundled model."""

import difflib
import importlib
import inspect
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import common
import gcpo
import grpo
from conftest import ROOT, SCRIPTS, cli, here, metrics, small

import diffusers
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file

VARIANTS = [
    ("grpo", "--updates-per-iteration 1 --sde dance --kl-coef 0.01"),
    ("grpo", "--updates-per-iteration 4 --adv-std batch --shared-noise --sde-steps 2 --sde cps"),
    ("grpo", "--reward jpeg_compressibility --guidance 2"),
    ("grpo", "--reward shapes=0.7,jpeg_incompressibility=0.3 --eval-reward jpeg_compressibility"),
    ("gcpo", "--weighted-sampling --eval-hybrid 0.6 --sde-steps early --ema-decay 0.9"),
    ("gcpo", "--chunks 2,2 --kl-coef 0.01 --sde cps"),
    ("tempflow_grpo", "--weighting none --group prompt --sde dance"),
    ("tempflow_grpo", "--sde-steps 2 --sde cps --guidance 2 --kl-coef 0.01"),
]


@pytest.mark.parametrize("script, options", VARIANTS)
def test_options_run_and_the_first_ratio_is_one(script, options, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# mine\n\na red circle\ntwo blue squares\na green circle above a red square\n")
    options = [*small(script), *options.split(), "--iterations", 2, "--prompts", prompts, "--output", tmp_path / "run"]
    done = here(script, *options)
    assert done.returncode == 0, done.stderr
    lines = metrics(tmp_path / "run")
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    for line in lines[1:]:
        assert line["ratio_first_error"] == 0.0 and line["skipped_updates"] == 0
        assert set(line["ratio_first_error_by_step"]) == {0.0}
        if "--kl-coef" in options:
            assert line["kl_ref"] > 0 or line["iteration"] == 1
    if "--reward" in options and "shapes=0.7" in str(options):
        parts = lines[1]["reward/shapes"] * 0.7 + lines[1]["reward/jpeg_incompressibility"] * 0.3
        assert lines[1]["reward_mean"] == pytest.approx(parts, rel=1e-5)
        assert "eval/jpeg_compressibility" in lines[0]


def test_kl_is_zero_before_the_first_update(record):
    seen = record(grpo, "--iterations", "1", "--updates-per-iteration", "1", "--kl-coef", "0.01", double=False)
    assert metrics(seen.folder)[1]["kl_ref"] == 0.0


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_seed_same_files_and_the_run_folder(script, tmp_path):
    """The second run is a process of its own: its sets have another order."""
    options = [*small(script), "--iterations", 2, "--seed", 3, "--output"]
    one, other = here(script, *options, tmp_path / "a"), cli(script, *options, tmp_path / "b")
    assert one.returncode == other.returncode == 0, one.stderr + other.stderr
    lines = metrics(tmp_path / "a", times=False)
    assert lines == metrics(tmp_path / "b", times=False)
    lora, *_ = (tmp_path / "a" / "lora").iterdir()
    assert lora.read_bytes() == (tmp_path / "b" / "lora" / lora.name).read_bytes()
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["settings"]["seed"] == 3 and config["settings"]["steps"] == 5 and config["versions"]["torch"]
    samples = tmp_path / "a" / "samples"
    names = {"0.png", "2.png", "compare.png", "progress.png", "steps.png"}
    assert {path.name for path in samples.iterdir()} == names
    with Image.open(samples / "2.png") as sheet, Image.open(samples / "compare.png") as both:
        assert both.width >= 2 * sheet.width and sheet.getextrema() != ((255, 255),) * 3
    interface = """iteration reward_mean reward_std reward/shapes zero_std_groups ratio_mean ratio_min ratio_max
        ratio_first_error ratio_first_error_by_step clip_low clip_high approx_kl loss grad_norm skipped_updates images
        velocity_evals rollout_s reward_s train_s eval_reward eval/shapes""".split()
    assert set(interface) <= set(metrics(tmp_path / "a")[-1])
    # the three closing lines: what came out, where to look, how to use it
    result, where, code = one.stdout.splitlines()[-3:]
    words = f"{lines[0]['eval_reward']:.3f} -> {lines[2]['eval_reward']:.3f}", f"{lines[2]['velocity_evals']:,}"
    assert all(word in result for word in words) and "minutes" in result
    assert f"{samples}/compare.png" in where and f"{tmp_path}/a/lora" in where
    namespace = {"diffusers": diffusers}
    exec(code, namespace)
    weights = get_peft_model_state_dict(namespace["pipe"].transformer, adapter_name="default_0")
    assert sum(map(torch.numel, weights.values())) == sum(map(torch.numel, load_file(lora).values()))


@pytest.mark.parametrize("steps, script", [("0,1,2,3", "grpo"), ("0,1,2,3", "gcpo"), ("4", "tempflow_grpo")])
def test_all_sde_steps_are_the_list_of_them_number_for_number(steps, script, tmp_path):
    for name, spec in (("all", "all"), ("list", steps)):
        run = here(script, *small(script), "--iterations", 1, "--sde-steps", spec, "--output", tmp_path / name)
        assert run.returncode == 0, run.stderr
    assert metrics(tmp_path / "all", times=False) == metrics(tmp_path / "list", times=False)
    one, other = (next((tmp_path / name / "lora").iterdir()).read_bytes() for name in ("all", "list"))
    assert one == other


@pytest.mark.parametrize("script", SCRIPTS)
def test_micro_batch_changes_nothing(script, tmp_path):
    runs = []
    for size in (1, 3, 8):
        options = [*small(script), "--iterations", "2", "--micro-batch", size, "--output", tmp_path / str(size)]
        assert here(script, *options).returncode == 0
        runs.append(metrics(tmp_path / str(size), times=False))
    for line, *others in zip(*runs):
        for other in others:
            for key, value in line.items():
                tolerance = 1e-4 if key == "reward_mean" else 1e-5
                assert other[key] == pytest.approx(value, abs=tolerance, rel=1e-5), key


def test_gcpo_with_chunks_of_one_is_grpo(tmp_path):
    own = ["--chunks", "1,1,1,1", "--chunk-fraction", "1"]
    for script, options in (("grpo", []), ("gcpo", own)):
        done = here(
            script, *small(script), *options, "--iterations", "3", "--kl-coef", "0.01", "--output", tmp_path / script
        )
        assert done.returncode == 0, done.stderr
    one, other = metrics(tmp_path / "grpo", times=False), metrics(tmp_path / "gcpo", times=False)
    for line, with_chunks in zip(one, other, strict=True):
        assert line == {key: value for key, value in with_chunks.items() if key in line}
    a, b = (load_file(tmp_path / name / "lora" / "pytorch_lora_weights.safetensors") for name in ("grpo", "gcpo"))
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-6


@pytest.mark.parametrize("ema", ["0", "0.9"])
def test_lora_in_a_plain_diffusers_script_gives_the_pictures_of_the_evaluation(record, ema):
    options = ["--eval-prompts", common.TINY / "eval_prompts.txt", "--ema-decay", ema]
    seen = record(gcpo, "--iterations", "2", "--learning-rate", "1e-2", *options, double=False)
    pipe = StableDiffusion3Pipeline.from_pretrained(common.TINY, text_encoder_3=None, tokenizer_3=None)
    prompts = common.read_prompts(common.TINY / "eval_prompts.txt")
    noise = torch.randn(len(prompts), 8, 8, 8, generator=common.generator(0, "evaluation", 0))
    options = dict(num_inference_steps=2, guidance_scale=1.0, max_sequence_length=0, latents=noise, output_type="pt")
    base = pipe(prompts, **options).images
    pipe.load_lora_weights(seen.folder / "lora")
    tuned = pipe(prompts, **options).images
    shown = list(range(16))  # the grid shows the first ones
    assert (tuned[shown] - seen.images[-1]).abs().max() < 1e-4
    assert (base[shown] - seen.images[0]).abs().max() < 1e-4
    assert (tuned - base).abs().max() > 1e-2


def test_the_tiny_model_is_competent_and_has_room():
    """By diffusers' own pipeline, 10 ODE steps, every prompt: a mean reward of 0.45 to 0.70."""
    from shapes import shapes

    pipe = StableDiffusion3Pipeline.from_pretrained(common.TINY, text_encoder_3=None, tokenizer_3=None)
    train, held_out = (common.read_prompts(common.TINY / name) for name in ("prompts.txt", "eval_prompts.txt"))
    generator = torch.Generator().manual_seed(5)
    options = dict(num_inference_steps=10, guidance_scale=1.0, max_sequence_length=0, generator=generator)
    images = pipe(train + held_out, output_type="pt", **options).images
    assert 0.45 <= shapes(images, train + held_out).mean().item() <= 0.70


def test_held_out_prompts_share_no_scene_with_training():
    from shapes import parse_scene

    scenes = []
    for name in ("prompts.txt", "eval_prompts.txt"):
        prompts = common.read_prompts(common.TINY / name)
        assert len(set(prompts)) == len(prompts)
        scenes.append({tuple(sorted(parse_scene(prompt)[0])) for prompt in prompts})
    assert not scenes[0] & scenes[1]


def test_without_a_gpu_the_tiny_model_is_trained_and_the_run_says_so(tmp_path):
    (tmp_path / "data.txt").write_text("a red circle\ntwo blue squares\n")
    done = here(
        "gcpo", "--prompts", tmp_path / "data.txt", *small("gcpo"), "--iterations", 1, "--output", tmp_path / "r"
    )
    assert done.returncode == 0 and "no CUDA GPU here: training the bundled tiny model" in done.stdout
    assert json.loads((tmp_path / "r" / "config.json").read_text())["settings"]["model"] == "tiny"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_the_options_in_groups_with_their_defaults(script):
    text = here(script, "--help").stdout
    module = importlib.import_module(script)
    for name in module.Args.__dataclass_fields__:
        assert f"--{name.replace('_', '-')} " in text.replace("\n", " "), name
    assert not re.search(r"--\w+_", text)
    for group in ("run", "batch", "rollout", "update", "model", "evaluation"):
        assert f"\n{group}:\n" in text
    text = " ".join(text.split())
    kind = "seeds" if script == "tempflow_grpo" else "images"
    assert f"U, optimizer steps a rollout, each on its share of the {kind} (default: 2)" in text
    default = ", ".join(f"{values['learning_rate']} for {model}" for model, values in module.DEFAULTS.items())
    assert f"of AdamW (default: {default})" in text


def test_ctrl_c_while_the_imports_run_is_one_line(tmp_path):
    """In the middle of torch's own import: its libraries are mapped, and the import takes seconds from there."""
    command = [sys.executable, str(ROOT / "grpo.py"), "--output", str(tmp_path / "run")]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error == "stopped\n"
    assert not (tmp_path / "run").exists()


FUNCTIONS = "rollout", "transition_logp", "main"


@pytest.mark.parametrize("script, most", [("gcpo", 45), ("tempflow_grpo", 95)])
def test_the_scripts_differ_in_few_lines_of_the_functions_that_they_share(script, most):
    """So that their diff is the explanation of the algorithm."""
    changed = 0
    for name in FUNCTIONS:
        sources = [inspect.getsource(getattr(importlib.import_module(s), name)).splitlines() for s in ("grpo", script)]
        for tag, a, b, c, d in difflib.SequenceMatcher(None, *sources, autojunk=False).get_opcodes():
            changed += (b - a) + (d - c) if tag != "equal" else 0
    assert 0 < changed <= most
