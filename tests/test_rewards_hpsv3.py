"""hpsv3 in rewards.py against a forward by hand, on a small random Qwen2-VL with the published names."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig

try:
    from transformers import Qwen2VLImageProcessorPil
except ImportError:  # transformers 4
    from transformers import Qwen2VLImageProcessor as Qwen2VLImageProcessorPil

import rewards
from rewards import hpsv3

# the sizes: language model; vision
WIDTH, LAYERS, HEADS, KV_HEADS, INNER, HEAD = 32, 2, 4, 2, 48, 8
V_WIDTH, V_DEPTH, V_HEADS, V_INNER = 32, 2, 2, 64
SPECIAL = "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|>".split()
PROMPTS = ["a red car", "two dogs, {and} a cat left of them", "snow on <|Reward|> it", ""]
PACKAGE = '''import no_such_module

INSTRUCTION = """
Rate this.  {text_prompt}

"""

INSTRUCTION_debug = """{text_prompt}"""

prompt_with_special_token = """
So: <|Reward|>

END
"""
'''
BEFORE, AFTER = "\nRate this.  {text_prompt}\n\n", "\nSo: <|Reward|>\n\nEND\n"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pictures(*sizes):
    generator = torch.Generator().manual_seed(3)
    return [F.interpolate(torch.rand(1, 3, 4, 4, generator=generator), size)[0] for size in sizes]


@pytest.fixture(autouse=True)
def nothing_loaded():
    rewards.LOADED.clear()


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    """A package hpsv3 that cannot be imported, as the published one cannot be here."""
    (tmp_path / "hpsv3" / "dataset").mkdir(parents=True)
    (tmp_path / "hpsv3" / "__init__.py").write_text("raise ImportError('not to be imported')")
    (tmp_path / "hpsv3" / "dataset" / "data_collator_qwen.py").write_text(PACKAGE)
    (tmp_path / "hpsv3-1.0.0.dist-info").mkdir()
    (tmp_path / "hpsv3-1.0.0.dist-info" / "METADATA").write_text("Name: hpsv3\nVersion: 1.0.0\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What hpsv3 reads of Qwen2-VL-7B-Instruct: configuration, tokenizer and image processor."""
    folder = tmp_path_factory.mktemp("qwen")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    fast.add_tokens(SPECIAL, special_tokens=True)
    fast.save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder)
    names = ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"]
    image, start, end = fast.convert_tokens_to_ids(names)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    old = transformers.__version__.startswith("4.")
    rope = {"rope_scaling": rope, "rope_theta": 10000.0} if old else {"rope_parameters": rope}
    config = Qwen2VLConfig(
        text_config=dict(
            vocab_size=400, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, rms_norm_eps=1e-6, **rope,
        ),
        vision_config=dict(
            depth=V_DEPTH, embed_dim=V_WIDTH, hidden_size=WIDTH, num_heads=V_HEADS, mlp_ratio=2
        ),
        image_token_id=image, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    config.save_pretrained(folder)
    return str(folder)


def published_weights(words):
    """{name: values} as transformers 4.45 named the parts of that class; exact in bfloat16."""
    kv = WIDTH * KV_HEADS // HEADS
    shapes = {"model.embed_tokens.weight": (words, WIDTH), "lm_head.weight": (words, WIDTH)}
    shapes |= {"visual.patch_embed.proj.weight": (V_WIDTH, 3, 2, 14, 14), "model.norm.weight": (WIDTH,)}
    linear = {"visual.merger.mlp.0": (4 * V_WIDTH, 4 * V_WIDTH), "visual.merger.mlp.2": (WIDTH, 4 * V_WIDTH)}
    linear |= {"rm_head.0": (1024, WIDTH), "rm_head.3": (16, 1024), "rm_head.5": (2, 16)}
    norms = ["visual.merger.ln_q"]
    for n in range(LAYERS):
        layer = f"model.layers.{n}"
        linear |= {f"{layer}.self_attn.{name}_proj": (n, WIDTH) for name, n in zip("qkv", (WIDTH, kv, kv))}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (INNER, WIDTH) for name in ("gate", "up")}
        shapes |= {f"{layer}.self_attn.o_proj.weight": (WIDTH, WIDTH)}
        shapes |= {f"{layer}.mlp.down_proj.weight": (WIDTH, INNER)}
        shapes |= {f"{layer}.{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    for n in range(V_DEPTH):
        block = f"visual.blocks.{n}"
        norms += [f"{block}.norm1", f"{block}.norm2"]
        linear |= {f"{block}.attn.qkv": (3 * V_WIDTH, V_WIDTH), f"{block}.attn.proj": (V_WIDTH, V_WIDTH)}
        linear |= {f"{block}.mlp.fc1": (V_INNER, V_WIDTH), f"{block}.mlp.fc2": (V_WIDTH, V_INNER)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (V_WIDTH,), f"{name}.bias": (V_WIDTH,)}
    generator, weights = torch.Generator().manual_seed(7), {}
    for name, shape in sorted(shapes.items()):
        value = torch.randn(shape, generator=generator)
        fan_in = torch.Size(shape[1:]).numel()
        scale = name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ln_q.weight"))
        value = 1 + 0.2 * value if scale else value / fan_in**0.5
        weights[name] = (value * (3 if re.search("[qk]_proj.weight", name) else 1)).bfloat16()
    return weights


@pytest.fixture(scope="module")
def checkpoint(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hpsv3")
    words = 256 + len(SPECIAL) + 1
    save_file(published_weights(words), folder / "HPSv3.safetensors")
    return str(folder)


# ---------------------------------------------------------------- the forward by hand, for one picture


def target_size(height, width, area=256 * 28 * 28):
    """Multiples of 28 near the picture's shape: at most `area` pixels, or at least, if it is small."""
    h, w = (max(28, round(side / 28) * 28) for side in (height, width))
    factor = (area / (height * width)) ** 0.5
    if h * w > area:
        h, w = (int(side * factor / 28 + 1e-9) * 28 for side in (height, width))
    elif h * w < area:
        h, w = (-int(-(side * factor / 28 - 1e-9) // 1) * 28 for side in (height, width))
    return h, w


def rounded_frequencies(count, theta=10000.0):
    """1 / theta^(n / count), rounded to bfloat16 as the authors' code has them."""
    return np.array([1 / theta ** (n / count) for n in range(count)], np.float32)


def rotate(x, angles):
    """x: (N, heads, D); angles: (N, D / 2): the pairs are (n, n + D / 2)."""
    half = x.shape[-1] // 2
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attention(q, k, v, causal):
    """q: (N, heads, D); k, v: (N, fewer heads, D)."""
    repeat = q.shape[1] // k.shape[1]
    out = []
    for h in range(q.shape[1]):
        scores = q[:, h] @ k[:, h // repeat].T / q.shape[-1] ** 0.5
        if causal:
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)
        out.append(scores.softmax(-1) @ v[:, h // repeat])
    return torch.cat(out, -1)


def by_hand(weights, image, prompt):
    """Mean and sigma, from the published names alone."""
    w = {name: value.double() for name, value in weights.items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def rms(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    # the picture: resized, normalised, in patches of 14 x 14, four neighbours after each other
    picture = Image.fromarray((image.numpy().transpose(1, 2, 0) * 255).round().astype(np.uint8))
    height, width = target_size(*image.shape[1:])
    pixels = np.asarray(picture.resize((width, height), Image.BICUBIC)) / 255
    pixels = (pixels - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    pixels, patches, places = torch.tensor(pixels.transpose(2, 0, 1)), [], []
    for y, x in ((y, x) for y in range(0, height // 14, 2) for x in range(0, width // 14, 2)):
        for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
            patch = pixels[:, (y + dy) * 14 : (y + dy + 1) * 14, (x + dx) * 14 : (x + dx + 1) * 14]
            patches.append(patch)
            places.append((y + dy, x + dx))
    kernel = w["visual.patch_embed.proj.weight"].sum(2)  # the picture stands for two frames
    x = torch.stack(patches).flatten(1) @ kernel.flatten(1).T
    side = V_WIDTH // V_HEADS // 4
    frequencies = torch.tensor(rounded_frequencies(side)).bfloat16().double()
    angles = (torch.tensor(places).double()[:, :, None] * frequencies).flatten(1)
    for n in range(V_DEPTH):
        block = f"visual.blocks.{n}"
        y = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = y.view(len(x), 3, V_HEADS, -1).unbind(1)
        x = x + linear(attention(rotate(q, angles), rotate(k, angles), v, False), f"{block}.attn.proj")
        inner = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        x = x + linear(inner * (1.702 * inner).sigmoid(), f"{block}.mlp.fc2")
    x = norm(x, "visual.merger.ln_q").reshape(-1, 4 * V_WIDTH)
    seen = linear(F.gelu(linear(x, "visual.merger.mlp.0")), "visual.merger.mlp.2")

    # the text: bytes and special tokens
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # byte -> letter of byte-level BPE, in the order of the bytes that can be shown, then the others
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    table = {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    special = {token: 256 + n for n, token in enumerate([*SPECIAL, "<|Reward|>"])}
    text = (
        f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * len(seen)}<|vision_end|>"
        f"{BEFORE.format(text_prompt=prompt)}{AFTER}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = []
    while text:
        token = next((token for token in special if text.startswith(token)), None)
        ids += [special[token]] if token else [letters.index(table[byte]) for byte in text[0].encode()]
        text = text[len(token or " ") :]
    ids = torch.tensor(ids)
    x = w["model.embed_tokens.weight"][ids]
    x[ids == special["<|image_pad|>"]] = seen
    frequencies = torch.tensor(rounded_frequencies(HEAD // 2)).bfloat16().double()
    angles = torch.arange(len(ids)).double()[:, None] * frequencies  # one position a token, in pictures too
    for n in range(LAYERS):
        layer = f"model.layers.{n}"
        y = rms(x, f"{layer}.input_layernorm")
        q, k, v = (linear(y, f"{layer}.self_attn.{name}_proj").view(len(x), -1, HEAD) for name in "qkv")
        x = x + linear(attention(rotate(q, angles), rotate(k, angles), v, True), f"{layer}.self_attn.o_proj")
        y = rms(x, f"{layer}.post_attention_layernorm")
        y = F.silu(linear(y, f"{layer}.mlp.gate_proj")) * linear(y, f"{layer}.mlp.up_proj")
        x = x + linear(y, f"{layer}.mlp.down_proj")
    y = rms(x, "model.norm")[max(n for n, token in enumerate(ids.tolist()) if token == special["<|Reward|>"])]
    return linear(linear(linear(y, "rm_head.0").relu(), "rm_head.3").relu(), "rm_head.5").tolist()


SIZES = [(32, 32), (512, 512), (300, 700), (64, 40)]
# hpsv3 computes in float32 and by_hand in float64: they differed by at most 6e-7 with any CPU's instructions
ROUNDING = 6e-6


def test_hpsv3_is_the_forward_by_hand(base, checkpoint):
    weights = load_file(Path(checkpoint) / "HPSv3.safetensors")
    images = pictures(*SIZES)
    wanted = [by_hand(weights, image, prompt)[0] for image, prompt in zip(images, PROMPTS)]
    score = partial(hpsv3, model=checkpoint, base=base, device="cpu")
    assert one_by_one(score, images, PROMPTS) == pytest.approx(wanted, rel=0, abs=ROUNDING)
    assert np.std(wanted) > 0.02
    # in batches, in which shorter prompts are padded
    image = images[1][None].expand(4, -1, -1, -1)
    alone = [by_hand(weights, image[0], prompt)[0] for prompt in PROMPTS]
    assert score(image, PROMPTS, batch=3).tolist() == pytest.approx(alone, rel=0, abs=ROUNDING)
    file = score(image, PROMPTS, model=f"{checkpoint}/HPSv3.safetensors")
    assert torch.allclose(file, score(image, PROMPTS), rtol=0, atol=ROUNDING)


def one_by_one(score, images, prompts):
    return [score(image[None], [prompt]).item() for image, prompt in zip(images, prompts)]


def test_hpsv3_is_what_the_published_package_gives(base, checkpoint):
    """What the package's own classes gave for these weights, tokens and texts (hpsv3 1.0.0, transformers
    4.45.2; in float32 except for rounded frequencies of the rotary embedding), written down once.

    The last bit of torch.randn depends on the CPU's instructions, so with old ones 20 of the 158,130 weights
    round to another bfloat16. That moves a score by up to 2e-5; the rounded frequencies move it by 5e-4.
    """
    close = partial(pytest.approx, rel=0, abs=1e-4)
    score = partial(hpsv3, model=checkpoint, base=base, device="cpu")
    images, prompts = pictures(*SIZES[:3]), [PROMPTS[0], PROMPTS[1], PROMPTS[3]]
    assert one_by_one(score, images, prompts) == close([-0.4358507, -0.3127409, -0.2426641])
    batch = images[1][None].expand(3, -1, -1, -1)
    assert score(batch, prompts).tolist() == close([-0.3688053, -0.3127409, -0.2986031])


@pytest.mark.parametrize(
    "drop,add,words",
    [
        ("visual.merger.ln_q.bias", "", "no weights for visual.merger.ln_q.bias"),
        ("", "rm_head.7.bias", "7.bias"),
        ("model.norm.weight", "model.norm.scale", "no weights for language_model.norm.weight"),
    ],
)
def test_missing_weights_are_an_error(base, checkpoint, tmp_path, drop, add, words):
    weights = load_file(Path(checkpoint) / "HPSv3.safetensors")
    weights = {name: value for name, value in weights.items() if name != drop}
    if add:
        weights[add] = torch.zeros(5, WIDTH)
    save_file(weights, tmp_path / "HPSv3.safetensors")
    with pytest.raises((ValueError, RuntimeError), match=words):
        rewards.load_hpsv3(str(tmp_path), base, "cpu")
