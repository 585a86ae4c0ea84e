"""The rewards with models of transformers, against their definition, on small random models."""

import json
import shutil
import sys
import types
from collections import OrderedDict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizerFast,
    Mask2FormerConfig,
    Mask2FormerModel,
    SwinConfig,
)

try:
    from transformers import CLIPImageProcessorPil, Mask2FormerImageProcessorPil
except ImportError:  # transformers 4
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil
    from transformers import Mask2FormerImageProcessor as Mask2FormerImageProcessorPil

import rewards
from rewards import aesthetic, clipscore, geneval, get_reward, pickscore

needs_scipy = pytest.mark.skipif(not find_spec("scipy"), reason="Mask2Former needs scipy")

ROUNDING = 1e-5  # of float32 in these models: 1.2e-6 was the most that any CPU's instructions made
PROMPTS = "a red car,a dog,two blue buses,nothing at all,a cat on a mat,a dog and a cat,snow".split(",")


def pictures(count=7, height=40, width=56, seed=0):
    """Random blocks of colour, (B, 3, H, W): pictures that differ in more than noise."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(count, 3, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(small, (height, width), mode="nearest")


def pil(image):
    return Image.fromarray((image.numpy().transpose(1, 2, 0) * 255).round().astype(np.uint8))


@pytest.fixture(autouse=True)
def nothing_loaded():
    rewards.LOADED.clear()


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A CLIP of 32-pixel images and 768-dimensional embeddings (as in L/14), with tokenizer and processor."""
    folder = tmp_path_factory.mktemp("clip")
    characters = [chr(code) for code in range(33, 127)]
    vocab = {token: n for n, token in enumerate(characters + [c + "</w>" for c in characters])}
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    special = dict(bos_token_id=len(vocab) - 2, eos_token_id=len(vocab) - 1, pad_token_id=len(vocab) - 1)
    text = dict(vocab_size=len(vocab), **size, **special)
    vision = dict(image_size=32, patch_size=8, **size)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768))
    for parameter in model.parameters():  # larger than the usual start, so that scores differ
        if parameter.dim() > 1:
            parameter.data = torch.randn_like(parameter) * 0.3
    model.logit_scale.data.fill_(3.3)
    model.save_pretrained(folder)
    CLIPTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**size).save_pretrained(folder)
    return str(folder)


def clip_parts(folder):
    model = CLIPModel.from_pretrained(folder).eval()
    return model, CLIPTokenizerFast.from_pretrained(folder), CLIPImageProcessorPil.from_pretrained(folder)


def features(output):
    """The features that a CLIPModel of transformers 4 or 5 returns."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def naive_logits(folder, image, prompt):
    """The model's own logit of one image and one prompt, and its logit scale."""
    model, tokenizer, processor = clip_parts(folder)
    ids = tokenizer(prompt, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        pixels = processor(pil(image), return_tensors="pt")["pixel_values"]
        return model(**ids, pixel_values=pixels).logits_per_image.item(), model.logit_scale.exp().item()


# ---------------------------------------------------------------- clipscore, pickscore


@pytest.mark.parametrize("size", [(32, 32), (40, 56), (96, 33)])
def test_clipscore_is_the_cosine_of_pairs(clip_folder, size):
    """Also in batches, in which shorter prompts are padded."""
    images, prompts = pictures(7, *size), [*PROMPTS[:-1], "a much longer prompt than the others have"]
    scores = clipscore(images, prompts, clip_folder, batch=3)
    pairs = [naive_logits(clip_folder, image, prompt) for image, prompt in zip(images, prompts)]
    assert scores.tolist() == pytest.approx([logit / scale for logit, scale in pairs], abs=ROUNDING)
    assert scores.dtype == torch.float32 and scores.device.type == "cpu"
    assert scores.std() > 0.01 and scores.abs().max() <= 1


def test_pickscore_is_the_logit_over_26(clip_folder, monkeypatch):
    images = pictures()
    monkeypatch.setenv("HOME", clip_folder)
    scores, _ = get_reward("pickscore:~")(images, PROMPTS)
    naive = [naive_logits(clip_folder, image, prompt)[0] / 26 for image, prompt in zip(images, PROMPTS)]
    assert scores.tolist() == pytest.approx(naive, abs=ROUNDING)


def test_long_prompts_are_cut(clip_folder):
    images, long = pictures(2), "word " * 60
    scores = clipscore(images, [long, "a dog"], clip_folder)
    logit, scale = naive_logits(clip_folder, images[0], long)
    assert scores[0].item() == pytest.approx(logit / scale, abs=ROUNDING)
    other_end = clipscore(images, [long + "and another end", "a dog"], clip_folder)
    assert torch.allclose(scores, other_end, atol=ROUNDING)


def test_rewards_share_a_model(clip_folder):
    images = pictures()
    reward = get_reward(f"clipscore:{clip_folder}=0.5,pickscore:{clip_folder}=0.5", offload=True)
    assert not rewards.LOADED  # nothing is loaded before it is asked for
    reward.load(PROMPTS)
    _, parts = reward(images, PROMPTS)
    ((module, *_),) = rewards.LOADED.values()
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    scaled = parts[f"clipscore:{clip_folder}"] * np.exp(3.3) / 26
    assert torch.allclose(parts[f"pickscore:{clip_folder}"], scaled)


# ---------------------------------------------------------------- aesthetic

LAYERS = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}


def aesthetic_weights():
    torch.manual_seed(1)
    weights = {f"layers.{n}.weight": torch.randn(shape) / shape[1] ** 0.5 for n, shape in LAYERS.items()}
    return weights | {f"layers.{n}.bias": torch.randn(shape[0]) for n, shape in LAYERS.items()}


@pytest.mark.parametrize("name", ["aesthetic-model.pth", "mine.pth", "mine.safetensors"])
def test_aesthetic_is_the_network_on_the_normalised_embedding(clip_folder, tmp_path, name):
    weights, file = aesthetic_weights(), tmp_path / name
    (save_file if file.suffix == ".safetensors" else torch.save)(weights, file)
    source = tmp_path if name.startswith("aesthetic") else file  # a folder with the published name, or a file
    scores = aesthetic(pictures(), PROMPTS, str(source), clip_folder)
    model, _, processor = clip_parts(clip_folder)
    for image, score in zip(pictures(), scores):
        with torch.no_grad():
            vision = model.vision_model(processor(pil(image), return_tensors="pt")["pixel_values"])
        x = model.visual_projection.weight.detach().numpy() @ vision.pooler_output[0].numpy()
        x = x / np.sqrt((x**2).sum())
        for n in LAYERS:
            x = weights[f"layers.{n}.weight"].numpy() @ x + weights[f"layers.{n}.bias"].numpy()
        assert score.item() == pytest.approx(float(x[0]), abs=ROUNDING)
    assert scores.std() > 1e-3


def failure(spec):
    """The message about a reward whose model cannot be loaded."""
    with pytest.raises(SystemExit) as error:
        get_reward(f"jpeg_compressibility,{spec}").load(["a photo of a dog"])
    message = str(error.value)
    assert message.startswith(f"error: cannot load {spec.partition(':')[2]} for a reward: ")
    assert "\n" not in message
    return message


def test_aesthetic_weights_of_another_network_or_with_code_are_refused(tmp_path):
    file = tmp_path / "weights.pth"
    torch.save({"layers.0.weight": torch.zeros(3, 768)}, file)
    assert "size mismatch for 0.weight" in failure(f"aesthetic:{file}")
    torch.save({"layers.0.weight": types.SimpleNamespace(harm=True)}, file)
    assert "UnpicklingError" in failure(f"aesthetic:{file}")
    assert "aesthetic-model.pth" in failure(f"aesthetic:{tmp_path}")


# ---------------------------------------------------------------- hpsv2, a checkpoint of open_clip

WIDTH, DEPTH, HEADS, INNER, EMBEDDING = 32, 2, 2, 48, 768  # those of clip_folder


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.attn = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        layers = {"c_fc": torch.nn.Linear(WIDTH, INNER), "gelu": torch.nn.GELU()}
        self.mlp = torch.nn.Sequential(OrderedDict(layers | {"c_proj": torch.nn.Linear(INNER, WIDTH)}))

    def forward(self, x, mask):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(torch.nn.Module):
    """Half of PlainClip: with blocks under the names of open_clip."""

    def __init__(self, positions):
        super().__init__()
        self.positional_embedding = torch.nn.Parameter(torch.zeros(positions, WIDTH))
        blocks = torch.nn.ModuleList([Block() for _ in range(DEPTH)])
        self.transformer = torch.nn.ModuleDict({"resblocks": blocks})

    def blocks(self, x, mask=None):
        for block in self.transformer.resblocks:
            x = block(x, mask)
        return x


class Vision(Tower):
    def __init__(self):
        super().__init__(17)
        self.class_embedding = torch.nn.Parameter(torch.zeros(WIDTH))
        self.conv1 = torch.nn.Conv2d(3, WIDTH, 8, 8, bias=False)
        self.ln_pre, self.ln_post = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.proj = torch.nn.Parameter(torch.zeros(WIDTH, EMBEDDING))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.blocks(self.ln_pre(x))[:, 0]) @ self.proj


class PlainClip(Tower):
    """The CLIP of open_clip's ViT-H-14, written out: GELU, and a text is read at its highest token."""

    def __init__(self, words):
        super().__init__(77)
        self.visual, self.ln_final = Vision(), torch.nn.LayerNorm(WIDTH)
        self.token_embedding = torch.nn.Embedding(words, WIDTH)
        self.text_projection = torch.nn.Parameter(torch.zeros(WIDTH, EMBEDDING))
        self.logit_scale = torch.nn.Parameter(torch.zeros(()))

    def encode_image(self, pixels):
        return self.visual(pixels)

    def encode_text(self, tokens):
        mask = torch.full((77, 77), -torch.inf, dtype=self.logit_scale.dtype).triu(1)
        x = self.ln_final(self.blocks(self.token_embedding(tokens) + self.positional_embedding, mask))
        return x[range(len(x)), tokens.argmax(1)] @ self.text_projection


def clip_of_open_clip(words):
    """The same model by open_clip itself. Beside a CPU torch torchvision may be missing: it is not needed."""
    if not find_spec("open_clip"):
        pytest.skip("open_clip is not installed")
    names = ["torchvision", *(f"torchvision.{x}" for x in ("transforms", "transforms.functional", "ops"))]
    stubs = {name: mock.MagicMock() for name in [*names, "torchvision.ops.misc"]}
    with mock.patch.dict(sys.modules, {} if find_spec("torchvision") else stubs):
        import open_clip.model
    text = dict(context_length=77, vocab_size=words, width=WIDTH, heads=HEADS, layers=DEPTH)
    vision = dict(image_size=32, patch_size=8, width=WIDTH, head_width=WIDTH // HEADS, layers=DEPTH)
    ratio = dict(mlp_ratio=INNER / WIDTH)
    return open_clip.model.CLIP(EMBEDDING, vision | ratio, text | ratio)


@pytest.fixture(params=[PlainClip, clip_of_open_clip])
def original(request, clip_folder, tmp_path):
    """A random model with open_clip's names, saved as HPS v2.1 is."""
    torch.manual_seed(4)
    model = request.param(CLIPConfig.from_pretrained(clip_folder).text_config.vocab_size)
    for name, parameter in model.named_parameters():
        scale = 1 if "ln_" in name and name.endswith("weight") else 0
        parameter.data = scale + torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.2)
    assert len(model.state_dict()) == 3 + 2 * 12 * DEPTH + 4 + 6 + 1
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    return model.eval()


def tokens_by_hand(folder, texts):
    """As open_clip's tokenizer has them: with zeros after the end."""
    vocab = CLIPTokenizerFast.from_pretrained(folder).get_vocab()
    tokens = torch.zeros(len(texts), 77, dtype=torch.long)
    for row, text in zip(tokens, texts):
        letters = [letter for word in text.split() for letter in [*word[:-1], word[-1] + "</w>"]]
        ids = [vocab[x] for x in ["<|startoftext|>", *letters[:75], "<|endoftext|>"]]
        row[: len(ids)] = torch.tensor(ids)
    return tokens


@pytest.fixture
def float64():
    """As the default, in which transformers 4 makes a mask of the lowest number that float64 has."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("eos", [None, 2])  # 2: what old CLIP repositories have, such as laion's
def test_hpsv2_has_the_features_of_open_clip(original, clip_folder, eos, float64):
    """The conversion is exact, so in float64 only rounding differs: by 6e-15 at most."""
    config = CLIPConfig.from_pretrained(clip_folder)
    config.text_config.hidden_act = config.vision_config.hidden_act = "gelu"
    config.text_config.eos_token_id = eos or config.text_config.eos_token_id
    model = CLIPModel(config).eval().double()
    model.load_state_dict(rewards.from_open_clip(original.double().state_dict()), strict=True)
    texts, pixels = [*PROMPTS, "word " * 60], torch.randn(5, 3, 32, 32)
    tokenizer = CLIPTokenizerFast.from_pretrained(clip_folder)
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        image, text = features(model.get_image_features(pixels)), features(model.get_text_features(**inputs))
        wanted = original.encode_image(pixels), original.encode_text(tokens_by_hand(clip_folder, texts))
    for got, want in zip((image, text), wanted):
        assert want.std() > 1 and torch.allclose(got, want, rtol=0, atol=1e-13)
    assert model.logit_scale.item() == original.logit_scale.item()


def padded_by_hand(image, size=32):
    """open_clip's transform for a picture that is resized by its longer side, in loops."""
    picture = pil(image)
    width, height = picture.size
    ratio = max(height / size, width / size)
    small = np.array(picture.resize((round(width / ratio), round(height / ratio)), Image.BICUBIC))
    pixels = np.zeros((size, size, 3))
    for y in range(small.shape[0]):
        for x in range(small.shape[1]):
            pixels[(size - small.shape[0]) // 2 + y, (size - small.shape[1]) // 2 + x] = small[y, x] / 255
    pixels = (pixels - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    return torch.tensor(pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("size", [(96, 33), (17, 90)])
def test_hpsv2_is_the_cosine_in_open_clip(original, clip_folder, tmp_path, size):
    images = pictures(7, *size)
    reward = partial(rewards.hpsv2, base=clip_folder, device="cpu")
    scores = reward(images, PROMPTS, str(tmp_path))
    pixels = torch.stack([padded_by_hand(image) for image in images])
    with torch.no_grad():
        image = original.double().encode_image(pixels)
        text = original.encode_text(tokens_by_hand(clip_folder, PROMPTS))
    cosine = torch.nn.functional.cosine_similarity(image, text)
    assert torch.allclose(scores.double(), cosine, rtol=0, atol=ROUNDING) and scores.std() > 0.01
    file = reward(images, PROMPTS, str(tmp_path / "HPS_v2.1_compressed.pt"), batch=3)
    assert torch.allclose(file, scores, rtol=0, atol=ROUNDING)


# ---------------------------------------------------------------- wrong folders


def test_a_model_that_is_not_one_or_lacks_something(clip_folder, tmp_path):
    long = tmp_path / ("a" * 200) / ("b" * 200)  # the cause comes after it
    (long / "config only").mkdir(parents=True)
    (long / "config only" / "config.json").write_text('{"model_type": "clip"}')
    assert "no file named" in failure(f"clipscore:{long}/config only")
    shutil.copytree(clip_folder, long / "weights")
    weights = load_file(long / "weights" / "model.safetensors")
    del weights["text_projection.weight"]
    for other in ({}, {"text_projection.weight": torch.zeros(768, 31)}):
        save_file(weights | other, long / "weights" / "model.safetensors", {"format": "pt"})
        assert "no weights for text_projection.weight" in failure(f"clipscore:{long}/weights")
    without = shutil.ignore_patterns("tokenizer*", "vocab*", "merges*")
    shutil.copytree(clip_folder, long / "words", ignore=without)
    message = failure(f"clipscore:{long}/words")
    assert "has no CLIP tokenizer" in message or transformers.__version__.startswith("4.")


# ---------------------------------------------------------------- geneval, end to end


@pytest.fixture(scope="session")
def detector_folder(tmp_path_factory):
    """A Mask2Former of 80 classes with a random head of large weights, so that some scores are high."""
    folder = tmp_path_factory.mktemp("detector")
    swin = SwinConfig(
        image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=32, dim_feedforward=32, encoder_layers=1, decoder_layers=2,
        num_attention_heads=2, num_queries=12, num_labels=80,
    )  # fmt: skip
    torch.manual_seed(2)
    model = Mask2FormerModel(config)
    for parameter in model.transformer_module.decoder.parameters():
        if parameter.dim() == 2:
            parameter.data = torch.randn_like(parameter) * 0.3
    weights = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    weights |= {"class_predictor.weight": torch.randn(81, 32) * 3, "class_predictor.bias": torch.zeros(81)}
    weights["criterion.empty_weight"] = torch.ones(81)  # transformers saves its loss as well
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config.architectures = ["Mask2FormerForUniversalSegmentation"]
    config.save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)
    return str(folder)


def detector_outputs(folder, image):
    """Class logits (Q, 81) and mask logits (Q, h, w) of one image, put together by hand."""
    weights = load_file(Path(folder) / "model.safetensors")
    model = Mask2FormerModel(Mask2FormerConfig.from_pretrained(folder)).eval()
    model.load_state_dict({name[6:]: value for name, value in weights.items() if name.startswith("model.")})
    processor = Mask2FormerImageProcessorPil.from_pretrained(folder)
    with torch.no_grad():
        pixels = processor(pil(image), return_tensors="pt")["pixel_values"]
        outputs = model(pixel_values=pixels, output_hidden_states=True)
    queries = outputs.transformer_decoder_intermediate_states[-1][:, 0]  # (Q, 32)
    return queries @ weights["class_predictor.weight"].T, outputs.masks_queries_logits[-1][0]


def naive_instances(class_logits, mask_logits, size, limit=100):
    """(class, score, box, mask) of every query and class, by the definition, in loops."""
    candidates = []
    for query in range(len(class_logits)):
        exp = np.exp(class_logits[query].double().numpy() - class_logits[query].max().item())
        candidates += [(p, query, label) for label, p in enumerate((exp / exp.sum())[:-1])]
    found = []
    for p, query, label in sorted(candidates, reverse=True)[:limit]:
        logits = torch.nn.functional.interpolate(mask_logits[query][None, None], size, mode="bilinear")
        logits = logits[0, 0].numpy()
        inside = [(y, x) for y in range(size[0]) for x in range(size[1]) if logits[y, x] > 0]
        if inside:
            score = p * np.mean([1 / (1 + np.exp(-logits[y, x])) for y, x in inside])
            ys, xs = zip(*inside)
            box = min(xs), min(ys), max(xs) + 1, max(ys) + 1
            if score > 0.3:
                found.append((rewards.COCO[label], score, box, len(inside)))
    return found


def test_instances_are_those_of_the_definition(detector_folder):
    total = 0
    for image in pictures(4):
        outputs = detector_outputs(detector_folder, image)
        found, naive = rewards.instances(*outputs, (40, 56)), naive_instances(*outputs, (40, 56))
        assert [(f.name, f.box, int(f.mask.sum())) for f in found] == [(n[0], n[2], n[3]) for n in naive]
        assert [f.score for f in found] == pytest.approx([n[1] for n in naive], abs=ROUNDING)
        total += len(found)
    assert total > 8


@needs_scipy
def test_geneval_end_to_end(clip_folder, detector_folder):
    images = pictures()
    found = [naive_instances(*detector_outputs(detector_folder, image), (40, 56)) for image in images]
    assert all(found)
    there = [things[0][0] for things in found]
    absent = next(name for name in rewards.COCO if all(name != t[0] for things in found for t in things))
    score = partial(geneval, model=detector_folder, clip=clip_folder, size=64)
    graded = partial(score, verdict=rewards.judge_graded)
    prompts = [f"a photo of a {name}" for name in there]
    assert score(images, prompts).tolist() == [1] * 7
    counts = [sum(t[0] == name for t in things) for name, things in zip(there, found)]
    assert graded(images, prompts).tolist() == [1 - abs(n - 1) for n in counts]
    assert score(images, [f"a photo of a {absent}"] * 7).tolist() == [0] * 7
    assert score(images, [f"a photo of a {absent} and a {name}" for name in there]).sum() == 0
    numbers = {2: "two", 3: "three", 4: "four"}
    sure = [sum(t[0] == name and t[1] > 0.9 for t in things) for name, things in zip(there, found)]
    prompts = [f"a photo of {numbers.get(n, 'two')} {name}s" for n, name in zip(sure, there)]
    assert score(images, prompts).tolist() == [float(n in numbers) for n in sure]
    # batches
    prompts = [f"a photo of a {name}" if n % 2 else f"a photo of a {absent}" for n, name in enumerate(there)]
    alone = [score(images[n : n + 1], prompts[n : n + 1]).item() for n in range(7)]
    assert score(images, prompts).tolist() == alone == [0, 1, 0, 1, 0, 1, 0]


@needs_scipy
def test_colours_are_clips_on_the_object_cut_out(clip_folder, detector_folder):
    model, tokenizer, processor = clip_parts(clip_folder)
    image = pictures(1, seed=3)[0]
    mask = torch.zeros(40, 56, dtype=torch.bool)
    mask[5:30, 10:40] = True
    mask[5:10, 10:20] = False
    thing = rewards.Found("car", 0.9, (10, 5, 40, 30), mask)
    array = np.array(pil(image))
    for y in range(40):
        for x in range(56):
            if not mask[y, x]:
                array[y, x] = (0x99, 0x99, 0x99)
    with torch.no_grad():
        pixels = processor(Image.fromarray(array[5:30, 10:40]), return_tensors="pt")["pixel_values"]
        cut = features(model.get_image_features(pixel_values=pixels))[0]
        scores = {}
        for colour in rewards.GENEVAL_COLOURS:
            mean = 0
            for text in (f"{colour} car", f"{colour}-colored car", f"{colour} object"):
                tokens = tokenizer(f"a photo of a {text}", return_tensors="pt")
                embedding = features(model.get_text_features(**tokens))[0]
                mean = mean + embedding / embedding.norm() / 3
            scores[colour] = (cut @ mean / mean.norm()).item()
    (coloured,) = rewards.find_colours(pil(image), [thing], *rewards.load_clip(clip_folder, "cpu"))
    assert coloured.colour == max(scores, key=scores.get)
    # and in the reward: exactly one of ten colours is right
    name = naive_instances(*detector_outputs(detector_folder, image), (40, 56))[0][0]
    prompts = [f"a photo of a {colour} {name}" for colour in rewards.GENEVAL_COLOURS]
    assert geneval(image.expand(10, -1, -1, -1), prompts, detector_folder, clip_folder, size=64).sum() == 1


@needs_scipy
def test_a_detector_of_other_classes_is_refused(detector_folder, tmp_path):
    weights = load_file(Path(detector_folder) / "model.safetensors")
    for name in ("class_predictor.weight", "class_predictor.bias"):
        weights[name] = weights[name][:8].contiguous()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    config = Mask2FormerConfig.from_pretrained(detector_folder)
    config.num_labels = 7
    config.save_pretrained(tmp_path)
    assert "has 7 classes instead of COCO's 80" in failure(f"geneval:{tmp_path}")


# ---------------------------------------------------------------- half precision, and models out of the way


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_work_in_half_precision(clip_folder, monkeypatch, dtype):
    """What happens on CUDA: the same code with half weights, on the CPU."""
    full = pickscore(pictures(), PROMPTS, clip_folder)
    rewards.LOADED.clear()
    as_half = lambda model, device: model.eval().requires_grad_(False).to(dtype)  # noqa: E731
    monkeypatch.setattr(rewards, "frozen", as_half)
    half = pickscore(pictures(), PROMPTS, clip_folder)
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    # a cosine of unit vectors: each component is rounded by up to eps / 2, which partly averages out
    assert (half - full).abs().max() < torch.finfo(dtype).eps / 2 < full.std()


@pytest.mark.parametrize("offload", [False, True])
def test_offload_moves_models_to_the_cpu_after_use(clip_folder, monkeypatch, offload):
    reward = get_reward(f"clipscore:{clip_folder}", "cpu", offload)
    reward(pictures(), PROMPTS)
    places = []
    ((module, *_),) = rewards.LOADED.values()
    monkeypatch.setattr(module, "to", lambda place: places.append(place) or module)
    reward(pictures(), PROMPTS)
    assert len(places) == 1 + offload  # to where it computes, and back
