"""Whole runs, through the command line or a script's main, on the bundled model."""

import json
import re

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

import common
import gcpo
import grpo
import tempflow_grpo
from conftest import SCRIPTS, TWO_PROMPTS, adapter, all_equal, cli, here, metrics, quick, small
from shapes import parse_scene, shapes

VARIANTS = [
    ("grpo", "--updates-per-iteration 1 --sde dance --kl-coef 0.01"),
    ("grpo", "--updates-per-iteration 4 --adv-std batch --shared-noise --sde-steps-per-iteration 2"),
    ("grpo", "--reward jpeg_compressibility --guidance 2"),
    ("grpo", "--reward shapes=0.7,jpeg_incompressibility=0.3 --eval-reward jpeg_compressibility"),
    ("gcpo", "--weighted-sampling --eval-hybrid 0.6 --sde-steps early --ema-decay 0.9"),
    ("gcpo", "--chunks 2,2 --kl-coef 0.01 --sde cps"),
    ("gcpo", "--chunks halves --sde precise"),
    ("tempflow_grpo", "--weighting none --group prompt --sde dance"),
    ("tempflow_grpo", "--sde-steps-per-iteration 2 --sde cps --guidance 2 --kl-coef 0.01"),
]


@pytest.mark.parametrize("script, options", VARIANTS)
def test_options_run_and_the_first_ratio_is_one(script, options, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# mine\n\na red circle\ntwo blue squares\na green circle above a red square\n")
    quick(script, tmp_path / "run", f"{options} --iterations 2 --prompts {prompts}")
    lines = metrics(tmp_path / "run")
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    for line in lines[1:]:
        # null where all images of the first update are in groups without spread
        assert line["ratio_first_error"] in (0.0, None)
        if "--kl-coef" in options:
            assert line["kl_ref"] > 0 or line["iteration"] == 1
    if options.startswith("--updates-per-iteration 1"):
        assert lines[1]["kl_ref"] == 0  # before any update
    if "shapes=0.7" in options:
        assert lines[1]["reward_std/jpeg_incompressibility"] > 0 and lines[1]["reward_std/shapes"] > 0
        parts = lines[1]["reward/shapes"] * 0.7 + lines[1]["reward/jpeg_incompressibility"] * 0.3
        assert lines[1]["reward_mean"] == pytest.approx(parts, rel=1e-5)  # float32
        assert "eval/jpeg_compressibility" in lines[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_seed_same_files_and_the_run_folder(script, tmp_path):
    """The second run of gcpo.py is a process of its own: its sets have another order."""
    options = [*small(script), "--iterations", 2, "--seed", 3, "--output"]
    again = cli if script == "gcpo" else here
    one, other = here(script, *options, tmp_path / "a", plot=True), again(script, *options, tmp_path / "b")
    assert one.returncode == other.returncode == 0, one.stderr + other.stderr
    lines = metrics(tmp_path / "a", times=False)
    assert lines == metrics(tmp_path / "b", times=False)
    assert all_equal(adapter(tmp_path / "a", 2), adapter(tmp_path / "b", 2))
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["settings"]["seed"] == 3 and config["versions"]["torch"]
    samples = tmp_path / "a" / "samples"
    assert (samples / "progress.png").exists()
    with Image.open(samples / "2.png") as sheet, Image.open(samples / "compare.png") as both:
        assert both.width >= 2 * sheet.width and sheet.getextrema() != ((255, 255),) * 3
    interface = """iteration reward_mean reward_std reward/shapes reward_std/shapes zero_std_groups
        ratio_mean ratio_min ratio_max ratio_first_error clip_low clip_high approx_kl loss grad_norm images
        velocity_evals rollout_s reward_s train_s eval_reward eval/shapes""".split()
    assert set(interface) <= set(metrics(tmp_path / "a")[-1])
    # the two closing lines: what came out, where to look
    result, where = one.stdout.splitlines()[-2:]
    assert f"{lines[0]['eval_reward']:.3f} -> {lines[2]['eval_reward']:.3f}" in result
    assert f"{lines[2]['velocity_evals']:,}" in result
    assert where.split() == [str(tmp_path / "a" / part) for part in ("samples/compare.png", "lora/2")]
    assert f"run folder: {tmp_path / 'a'}" in one.stdout.splitlines()[0]


@pytest.mark.parametrize("module", (grpo, gcpo, tempflow_grpo))
def test_micro_batch_changes_nothing(record, module):
    """In float64, but for pictures: one number may round the other way, by 6e-8 of 3,072."""
    runs = []
    for size in (1, 3):
        seen = record(module, "--iterations", 2, "--micro-batch", size)
        runs.append(metrics(seen.folder, times=False))
    for line, other in zip(*runs, strict=True):
        for key, value in line.items():
            assert other[key] == pytest.approx(value, abs=1e-7, rel=1e-7), key


def test_gcpo_with_chunks_of_one_is_grpo(tmp_path):
    for script, options in (("grpo", ""), ("gcpo", " --chunks 1,1,1,1 --chunk-fraction 1")):
        quick(script, tmp_path / script, "--iterations 3 --kl-coef 0.01" + options)
    one, other = metrics(tmp_path / "grpo", times=False), metrics(tmp_path / "gcpo", times=False)
    for line, with_chunks in zip(one, other, strict=True):
        assert line == {key: value for key, value in with_chunks.items() if key in line}
    assert all_equal(adapter(tmp_path / "grpo", 3), adapter(tmp_path / "gcpo", 3))


def test_lora_in_a_plain_diffusers_script_gives_the_pictures_of_the_evaluation(record):
    options = ["--eval-prompts", common.TINY / "eval_prompts.txt", "--ema-decay", "0.9"]
    seen = record(gcpo, "--iterations", "2", "--learning-rate", "1e-2", *options, double=False)
    pipe = StableDiffusion3Pipeline.from_pretrained(common.TINY, text_encoder_3=None, tokenizer_3=None)
    prompts = common.read_prompts(str(common.TINY / "eval_prompts.txt"))
    noise = torch.randn(len(prompts), 8, 8, 8, generator=common.generator(0, "evaluation", 0))
    options = dict(num_inference_steps=2, guidance_scale=1.0, max_sequence_length=0, output_type="pt")
    options["latents"] = noise
    base = pipe(prompts, **options).images
    pipe.load_lora_weights(seen.folder / "lora" / "2")
    tuned = pipe(prompts, **options).images
    shown = list(range(16))  # the grid shows the first ones; float32, in batches of 8 and 48
    assert (tuned[shown] - seen.images[-1]).abs().max() < 1e-4
    assert (base[shown] - seen.images[0]).abs().max() < 1e-4
    assert (tuned - base).abs().max() > 1e-2


def test_the_tiny_model_is_competent_and_has_room():
    """By diffusers' own pipeline, 10 ODE steps, every prompt: a mean reward of 0.45 to 0.70."""
    pipe = StableDiffusion3Pipeline.from_pretrained(common.TINY, text_encoder_3=None, tokenizer_3=None)
    prompts = [*common.read_prompts(None), *common.read_prompts(str(common.TINY / "eval_prompts.txt"))]
    generator = torch.Generator().manual_seed(5)
    options = dict(num_inference_steps=10, guidance_scale=1.0, max_sequence_length=0, generator=generator)
    images = pipe(prompts, output_type="pt", **options).images
    assert 0.45 <= shapes(images, prompts).mean().item() <= 0.70


def test_held_out_prompts_share_no_scene_with_training():
    scenes = []
    for name in ("prompts.txt", "eval_prompts.txt"):
        prompts = common.read_prompts(str(common.TINY / name))
        assert len(set(prompts)) == len(prompts)
        scenes.append({tuple(sorted(parse_scene(prompt)[0])) for prompt in prompts})
    assert not scenes[0] & scenes[1]


def test_without_a_gpu_the_tiny_model_is_trained_and_the_run_says_so(tmp_path):
    printed = quick("gcpo", tmp_path / "r", f"--prompts {TWO_PROMPTS} --iterations 1")
    assert "No CUDA GPU here" in printed
    assert json.loads((tmp_path / "r" / "config.json").read_text())["settings"]["model"] == "tiny"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_groups_and_the_defaults_of_the_model(script):
    text = " ".join(here(script, "--help").stdout.replace("│", " ").split())
    own = {"gcpo": ["chunk"], "tempflow_grpo": ["branch"]}
    boxes = ["run", "model", "rollout", *own.get(script, []), "update", "evaluation"]
    assert re.findall(r" (\w+) options [-─]", text) == boxes
    assert f"python {script}.py --prompts data.txt" in text and "AdamW learning rate (default: 0.00" in text
    # tyro loses the comment of a split line
    bare = re.findall(r"--[a-z-]+ (?:\{None\}\|)?[A-Z]+ \(default", text)
    assert text.count("(default:") > 35 and not bare
    assert "optimizer steps per rollout" in text and "(default: 48)" in text  # tiny's micro-batch


def test_tensorboard_has_metrics_and_pictures_and_a_resumed_run_continues(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    quick("grpo", tmp_path / "run", "--iterations 1 --log-with tensorboard --eval-every 1")
    done = here("grpo", "--resume", tmp_path / "run", "--iterations", 2)
    assert done.returncode == 0, done.stderr
    found = {}
    for file in (tmp_path / "run" / "tensorboard").glob("events*"):
        events = EventAccumulator(str(file))
        events.Reload()
        assert events.Tags()["images"] == ["samples"]
        found |= {event.step: event.value for event in events.Scalars("eval_reward")}
    lines = metrics(tmp_path / "run")
    assert found == pytest.approx({n: lines[n]["eval_reward"] for n in range(3)}, rel=1e-6)  # float32 there
