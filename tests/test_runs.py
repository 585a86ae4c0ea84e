"""Whole runs, through the command line or a script's main, on the bundled model."""

import json

import common
import gcpo
import grpo
from conftest import SCRIPTS, here, metrics, small

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file

VARIANTS = [
    *(
        ("grpo", options)
        for options in ("--kl-coef 0.01", "--sde dance --noise-level 0.3", "--updates-per-iteration 1")
    ),
    ("grpo", "--updates-per-iteration 4 --adv-std batch --shared-noise"),
    ("grpo", "--reward jpeg_compressibility --guidance 2"),
    ("grpo", "--reward shapes=0.7,jpeg_incompressibility=0.3 --eval-reward jpeg_compressibility"),
    ("gcpo", "--weighted-sampling --eval-hybrid 0.6"),
    ("gcpo", "--chunks 2,2 --kl-coef 0.01"),
    ("tempflow_grpo", "--weighting none --group prompt --sde dance --noise-level 0.3"),
    ("tempflow_grpo", "--branch-steps 2 --guidance 2 --kl-coef 0.01"),
]


@pytest.mark.parametrize("script, options", VARIANTS)
def test_options_run_and_the_first_ratio_is_one(script, options, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# mine\n\na red circle\ntwo blue squares\na green circle above a red square\n")
    options = [
        *small(script),
        *options.split(),
        "--iterations",
        "2",
        "--prompts",
        prompts,
        "--output",
        tmp_path / "run",
    ]
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
def test_same_seed_same_run_and_the_run_folder(script, tmp_path):
    for name in "ab":
        done = here(script, *small(script), "--iterations", "2", "--output", tmp_path / name, "--seed", "3")
        assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "a", times=False) == metrics(tmp_path / "b", times=False)
    a, b = (load_file(tmp_path / name / "lora" / "pytorch_lora_weights.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["settings"]["seed"] == 3 and config["settings"]["steps"] == 5 and config["versions"]["torch"]
    pictures = sorted(path.name for path in (tmp_path / "a" / "samples").glob("*.png"))
    assert {"0.png", "2.png", "compare.png"} <= set(pictures)
    with (
        Image.open(tmp_path / "a" / "samples" / "2.png") as sheet,
        Image.open(tmp_path / "a/samples/compare.png") as both,
    ):
        assert both.width > 2 * sheet.width and sheet.getextrema() != ((255, 255),) * 3
    interface = """iteration reward_mean reward_std reward/shapes zero_std_groups ratio_mean ratio_min ratio_max
        ratio_first_error ratio_first_error_by_step clip_low clip_high approx_kl loss grad_norm skipped_updates images
        velocity_evals rollout_s reward_s train_s eval_reward eval/shapes""".split()
    assert set(interface) <= set(metrics(tmp_path / "a")[-1])


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
    seen = record(gcpo, "--iterations", "2", "--learning-rate", "1e-2", "--ema-decay", ema, double=False)
    pipe = StableDiffusion3Pipeline.from_pretrained(common.TINY, text_encoder_3=None, tokenizer_3=None)
    prompts = common.read_prompts(common.TINY / "eval_prompts.txt")
    noise = torch.randn(len(prompts), 8, 8, 8, generator=common.generator(0, "evaluation", 0))
    options = dict(num_inference_steps=2, guidance_scale=1.0, max_sequence_length=0, latents=noise, output_type="pt")
    base = pipe(prompts, **options).images
    pipe.load_lora_weights(seen.folder / "lora")
    tuned = pipe(prompts, **options).images
    shown = list(range(0, len(prompts), 2))  # the grid shows every second
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


def test_self_test_where_trajectories_are_kept_off_the_device(monkeypatch):
    """The network on one device, latents and schedule on the CPU, as with a large batch on CUDA; here it is "meta"."""
    args = common.parse_args(grpo.Args, grpo.DEFAULTS, ["--steps", "5", "--micro-batch", "2"])
    policy = common.Policy(args)
    text = policy.encode(["a red circle"])

    def on_the_cpu(method):
        def call(*inputs):
            monkeypatch.setattr(policy, "device", torch.device("cpu"))
            try:
                return method(*inputs)
            finally:
                monkeypatch.setattr(policy, "device", torch.device("meta"))

        return call

    for name in ("velocity", "decode"):
        monkeypatch.setattr(policy, name, on_the_cpu(getattr(policy, name)))
    monkeypatch.setattr(policy, "device", torch.device("meta"))
    common.self_test(args, policy, text)
    assert policy.velocity_evals == 0 and all(p.grad is None for p in policy.parameters)
