"""The three families against diffusers' own pipelines, on small ones with random weights."""

import json
import math
import re
import shutil
from copy import deepcopy

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bench
import common
import grpo
import small_pipelines
from conftest import SCRIPTS, TWO_PROMPTS, adapter, make_policy, metrics, parse, quick, slow
from rewards import get_reward

PROMPTS = ["a red circle", "two blue squares"]
FAMILIES = list(small_pipelines.MAKERS)


def rollout_images(policy, noise, steps=4):
    """The end of a rollout without noise, and its pictures."""
    sigmas, (text,) = policy.sigmas(steps), policy.encode(PROMPTS)
    draws = [noise] + [torch.ones_like(noise)] * (steps - 1)
    s, chosen = torch.zeros(steps - 1), list(range(steps - 1))
    x, _ = grpo.sample(policy, text, torch.arange(len(noise)), draws, sigmas, s, "flow", chosen)
    return x, policy.decode(x)


def pipeline_images(pipe, family, noise, guidance, steps=4):
    """The same from the pipeline itself: latents as it gives them, pictures (B, 3, H, W)."""
    latents = noise
    if family == "flux":
        latents = pipe._pack_latents(noise, *noise.shape)
    options = dict(prompt=PROMPTS, latents=latents, guidance_scale=guidance, num_inference_steps=steps)
    pipe.set_progress_bar_config(disable=True)
    options |= dict(height=16, width=16, return_dict=False)
    return pipe(**options, output_type="latent")[0], pipe(**options, output_type="pt")[0]


def as_pipeline(policy, family, x):
    """Latents of a rollout in the form in which the pipeline gives them."""
    if family == "flux":
        return policy.pipe._pack_latents(x, *x.shape)
    if family == "flux2":
        bn = policy.pipe.vae.bn
        std = (bn.running_var + policy.pipe.vae.config.batch_norm_eps).sqrt()
        return policy.pipe._unpatchify_latents(x * std.view(1, -1, 1, 1) + bn.running_mean.view(1, -1, 1, 1))
    return x


def difference(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


OPTIONS = [(family, {}) for family in FAMILIES] + [("sd3", {"dynamic_shifting": True})]
OPTIONS += [("flux", {"guidance_embeds": False}), ("flux2", {"is_distilled": True})]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(("family", "options"), OPTIONS)
def test_rollout_without_noise_is_the_pipeline(model, family, options, guidance):
    policy = make_policy(model(family, **options), guidance=guidance)
    noise = policy.draw_noise(2, 1, torch.Generator().manual_seed(3))
    x, images = rollout_images(policy, noise)
    evals = policy.velocity_evals
    latents, expected = pipeline_images(policy.pipe, family, noise, guidance)
    # four steps of float32 networks in other batches, latents up to 5
    assert difference(as_pipeline(policy, family, x), latents) < 1e-5
    assert difference(images, expected) < 1e-5
    assert expected.std() > 0.01  # pictures of something
    two_pass = guidance > 1 and family != "flux" and not options.get("is_distilled")
    assert evals == 2 * 4 * (2 if two_pass else 1)
    distilled = options.get("is_distilled", False) or not options.get("guidance_embeds", True)
    assert policy.family.distilled == distilled


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_round_trip(model, family, tmp_path):
    """A saved adapter gives the pictures of the policy that saved it, without any metadata."""
    policy = make_policy(model(family))
    noise = policy.draw_noise(2, 1, torch.Generator().manual_seed(3))
    before = rollout_images(policy, noise)[1]
    torch.manual_seed(1)
    for parameter in policy.parameters:
        torch.nn.init.normal_(parameter, std=0.2)
    images = rollout_images(policy, noise)[1]
    assert difference(images, before) > 1e-2
    policy.save_lora(tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}
    for name, weight in policy.lora().items():
        assert torch.equal(tensors[f"transformer.{name}"], weight * (4 / 2 if "lora_B" in name else 1))
    for source in (tmp_path, tensors):
        pipe = type(policy.pipe).from_pretrained(str(model(family)))
        pipe.load_lora_weights(source)
        # float32 as above, and the weights are large
        assert difference(pipeline_images(pipe, family, noise, 3.0)[1], images) < 1e-4
    assert difference(rollout_images(policy, noise)[1], images) == 0  # saving has not changed the policy


def run(script, folder, output, dtype="float32"):
    """One iteration of a script with a small pipeline. Returns its metrics."""
    options = f"--model {folder} --prompts {TWO_PROMPTS} --dtype {dtype} --reward jpeg_compressibility"
    quick(script, output, f"{options} --device cpu --guidance 3 --resolution 16 --iterations 1")
    line = metrics(output)[-1]
    assert line["iteration"] == 1 and line["ratio_first_error"] == 0.0 and line["grad_norm"] > 0
    assert adapter(output, 1)
    return line


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_iteration(model, tmp_path, family, script):
    line = run(script, model(family), tmp_path / "run")
    rollout, train = (4 * (4 + 3 * 10), 4 * 4 * 3) if "temp" in script else (8 * 5, 8 * 4 * 3)
    if script != "gcpo":  # which draws its chunks
        assert line["velocity_evals"] == (rollout + train) * (1 if family == "flux" else 2)


def test_a_distilled_model_says_that_guidance_does_nothing(model, capsys):
    for said, options in ((False, {}), (True, {"is_distilled": True})):
        folder = model("flux2", **options)
        command = f"--model {folder} --prompts {TWO_PROMPTS} --resolution 16 --device cpu"
        common.make_policy(parse("grpo", *command.split()), trajectories=2)
        assert ("--steps 4 --eval-steps 4" in capsys.readouterr().out) == said


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_weights_and_float32_mathematics(model, family, dtype):
    """Latents, Gaussians, log-probs and LoRA are float32, and the ratio is 1."""
    policy = make_policy(model(family), dtype=dtype)
    parts = (policy.transformer, policy.pipe.vae, policy.encoders[0])  # T5 keeps some in float32
    frozen = {p.dtype for part in parts for p in part.parameters() if not p.requires_grad}
    assert policy.transformer.dtype == getattr(torch, dtype)
    assert frozen == {getattr(torch, dtype)} and {p.dtype for p in policy.parameters} == {torch.float32}
    sigmas, (text,), prompt_index = policy.sigmas(4), policy.encode(PROMPTS), torch.arange(4) // 2
    s, generator = common.noise_scale(sigmas, "flow", 0.7), torch.Generator().manual_seed(0)
    noise = [policy.draw_noise(2, 2, generator) for _ in range(4)]
    latents, rollout = grpo.sample(policy, text, prompt_index, noise, sigmas, s, "flow", [0, 1, 2])
    step, image = torch.tensor([1, 1]), torch.tensor([2, 3])
    logp, mean, std = grpo.transition_logp(policy, rollout, step, image)
    assert {t.dtype for t in (latents, *rollout[3:], logp, mean, std, sigmas)} == {torch.float32}
    assert torch.equal(logp, rollout.logp[step, image])
    logp.sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in policy.parameters)
    assert policy.decode(latents).isfinite().all()


@pytest.mark.parametrize(("family", "dtype"), [("sd3", "float16"), ("flux", "bfloat16")])
def test_one_iteration_in_half_precision(model, tmp_path, family, dtype):
    run("grpo", model(family), tmp_path / "run", dtype)


def test_halves_have_the_gradient_of_float32_at_the_true_latent_size():
    """SD3's 16 x 64 x 64 latents and a large batch: float16's gradients would be 0 without loss_scale."""
    torch.manual_seed(0)
    pipe = small_pipelines.sd3()
    pipe.vae = diffusers.AutoencoderKL.from_config(pipe.vae.config, latent_channels=16)
    pipe.transformer = diffusers.SD3Transformer2DModel.from_config(
        pipe.transformer.config, sample_size=64, in_channels=16, out_channels=16, pos_embed_max_size=64
    )
    x, noise = torch.randn(2, 1, 2, 16, 64, 64)
    text = [torch.randn(3, 20, 32), torch.randn(3, 32)]
    levels, where = torch.tensor([[0.9], [0.8], [0.7]]), (torch.zeros(2, dtype=torch.long), torch.arange(2))
    logp = torch.zeros(1, 2)  # of the rollout: not read here
    found = {}
    for dtype, scaled in (("float32", True), ("bfloat16", True), ("float16", True), ("float16", False)):
        copy = small_pipelines.sd3()
        copy.register_modules(vae=pipe.vae, transformer=deepcopy(pipe.transformer).to(getattr(torch, dtype)))
        policy = common.Policy(copy, 128, device="cpu", micro_batch=2, lora_rank=4)
        assert policy.shape == (16, 64, 64)
        torch.manual_seed(1)
        for parameter in policy.parameters:
            torch.nn.init.normal_(parameter, std=0.02)
        assert math.frexp(policy.loss_scale)[0] == 0.5  # a power of two, which changes no digit
        policy.loss_scale = policy.loss_scale if scaled else 1.0
        rows = [part.to(getattr(torch, dtype)) for part in text]
        rollout = grpo.Rollout(rows, torch.arange(2), "flow", *levels, x, x + 0.1 * noise, logp)
        logp, _, _ = grpo.transition_logp(policy, rollout, *where)
        loss = -torch.tensor([1.0, -0.5]) * (logp - logp.detach()).exp()
        policy.backward((loss / 9).sum() / (48 * 24 / 2))  # 9 steps, half of 48 prompts x 24 images
        norm = policy.clip_gradients(1e9)
        found[dtype, scaled] = norm, torch.cat([parameter.grad.flatten() for parameter in policy.parameters])
    true_norm, true = found["float32", True]
    cosine = {key: torch.cosine_similarity(true, gradient, 0).item() for key, (_, gradient) in found.items()}
    assert cosine["bfloat16", True] > 0.99 and cosine["float16", True] > 0.99
    # float16 rounds to 5e-4 in each of some 50 products
    assert found["float16", True][0].item() == pytest.approx(true_norm.item(), rel=0.05)
    assert cosine["float16", False] < 0.9  # it is the scale that does it


def test_cudnn_attention_stays_off(model):
    """FLUX.1's backward fails with it on an H200, which no CPU can show."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    make_policy(model("flux"))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@slow
def test_compiled_ratio_is_one_before_any_update(model):
    """Compiled without gradients, the network rounds otherwise: off by 0.08 in this one, in bfloat16."""
    policy = make_policy(model("flux2"), "bfloat16")
    (text,), x = policy.encode(PROMPTS), policy.draw_noise(2, 1, torch.Generator().manual_seed(0))
    policy.compile(text)
    assert policy.compiled
    with torch.no_grad():
        sampled = policy.velocity(x, 0.5, text, torch.arange(2))
    trained = policy.velocity(x, 0.5, text, torch.arange(2))
    assert torch.equal(sampled, trained) and trained.requires_grad and not sampled.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(model, family):
    gradients = []
    for checkpointing in (False, True):
        policy = make_policy(model(family), gradient_checkpointing=checkpointing)
        torch.manual_seed(1)
        for parameter in policy.parameters:
            torch.nn.init.normal_(parameter, std=0.2)
        noise = policy.draw_noise(2, 1, torch.Generator().manual_seed(0))
        policy.velocity(noise, 0.7, *policy.encode(PROMPTS), torch.arange(2)).square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in policy.parameters]))
    # the same products once more, in float32 (6e-8)
    assert gradients[0].norm() > 0 and difference(*gradients) < 1e-6 * gradients[0].abs().max()


@pytest.mark.parametrize(
    ("family", "resolution", "allowed"),
    [("sd3", 18, "multiple of 4"), ("sd3", 64, "to 32"), ("flux", 18, "of 4"), ("flux2", 18, "of 4")],
)
def test_resolution_the_model_cannot_do(model, family, resolution, allowed):
    with pytest.raises(SystemExit, match=f"error: .*{resolution}.*{allowed}"):
        make_policy(model(family), resolution=resolution)


JOINT = "attn.to_q attn.to_k attn.to_v attn.to_out.0 attn.add_q_proj attn.add_k_proj attn.add_v_proj"
TARGETS = {"sd3": JOINT + " attn.to_add_out"}
TARGETS["flux"] = TARGETS["sd3"] + " ff.net.0.proj ff.net.2 ff_context.net.0.proj ff_context.net.2"
TARGETS["flux"] += " single_attn.to_q single_attn.to_k single_attn.to_v"
TARGETS["flux2"] = TARGETS["sd3"] + " ff.linear_in ff.linear_out ff_context.linear_in ff_context.linear_out"
TARGETS["flux2"] += " single_attn.to_qkv_mlp_proj single_attn.to_out"


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_targets(family):
    """The adapter alone trains. It is in attention, for FLUX in feed-forward too; never in SD3.5's attn2."""
    policy = common.Policy(small_pipelines.MAKERS[family](), 16, device="cpu", lora_rank=2)
    parts = (policy.pipe.vae, policy.transformer, *policy.encoders)
    trained = [name for part in parts for name, p in part.named_parameters() if p.requires_grad]
    layers = [re.sub(r"transformer_blocks\.\d+\.|\.lora_[AB]\..*", "", name) for name in trained]
    assert len(trained) == len(policy.parameters) and set(layers) == set(TARGETS[family].split())
    assert all(".lora_" in name for name in trained)
    assert any("attn2" in name for name, _ in policy.transformer.named_parameters()) == (family == "sd3")


def test_ten_thousand_prompts():
    """Each epoch is a permutation of the file."""
    prompts = [f"prompt {n}" for n in range(10_000)]
    drawn = sum((common.iteration_prompts(prompts, 48, iteration, seed=3) for iteration in range(1, 418)), [])
    first, second = drawn[:10_000], drawn[10_000:20_000]
    assert sorted(first) == sorted(second) == sorted(prompts) and first != second and first != prompts


def test_scores_in_slices_are_the_scores(model):
    policy = make_policy(model("flux"))
    latents, prompts = policy.draw_noise(7, 1, torch.Generator().manual_seed(0)), [*"aaabbcd"]
    reward, calls = get_reward("jpeg_compressibility=0.5"), []
    whole, parts = common.score(policy, reward, latents, prompts)

    def watched(images, prompts):
        calls.append("".join(prompts))
        return reward(images, prompts)

    sliced, sliced_parts = common.score(policy, watched, latents, prompts, at_once=2)
    assert calls == ["aaa", "bb", "cd"]  # the images of a prompt stay together
    assert torch.equal(whole, sliced) and torch.equal(parts["jpeg_compressibility"], whole / 0.5)
    assert parts.keys() == sliced_parts.keys() and len(whole) == 7


@pytest.mark.parametrize("family", FAMILIES)
def test_benchmark_has_the_true_sizes(family):
    """Parameters as in the published weights, counted without memory."""
    with torch.device("meta"):
        transformer = bench.make_transformer(family)
    billions = sum(parameter.numel() for parameter in transformer.parameters()) / 1e9
    assert billions == pytest.approx(bench.SIZES[family]["parameters"], rel=2e-3)


def changed(folder, copy, file, **settings):
    """A copy of a pipeline's folder with other settings in one of its files."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(config | settings))
    return copy


@pytest.mark.parametrize(
    ("file", "settings", "word"),
    [
        ("transformer/config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}, "cannot be"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "AutoencoderTiny"),
        ("scheduler/scheduler_config.json", {"invert_sigmas": True}, "invert_sigmas"),
    ],
)
def test_a_model_that_cannot_be_trained_is_one_line(model, tmp_path, file, settings, word):
    folder = changed(model("sd3"), tmp_path / "model", file, **settings)
    with pytest.raises(SystemExit, match=f"^error: --model .*{word}"):
        common.load_pipeline(str(folder), "float32")


def test_a_model_without_some_of_its_weights_is_refused(model, tmp_path):
    shutil.copytree(model("sd3"), tmp_path / "model")
    file = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["proj_out.weight"]
    save_file(weights, file)
    with pytest.raises(SystemExit, match=r"proj_out\.weight"):
        common.load_pipeline(str(tmp_path / "model"), "float32")


def test_a_model_without_t5(model, tmp_path):
    """A part that is null in model_index.json, as the tiny model's T5."""
    folder = changed(model("sd3"), tmp_path / "model", "model_index.json", tokenizer_3=[None, None])
    folder = changed(folder, tmp_path / "other", "model_index.json", text_encoder_3=[None, None])
    run("grpo", folder, tmp_path / "run")
