"""Rewards: images and the prompts they were made for go in, one score each comes out.

Every reward is a function `(images, prompts) -> scores`:
    images:  (B, 3, H, W) float tensor in [0, 1], on any device
    prompts: list of B strings, prompts[i] belongs to images[i]
    scores:  (B,) float32 tensor on the CPU, higher is better
Some take more, all with defaults: `model`, a repository or a folder; `device`, CUDA if there is one; and so on.

`get_reward("shapes")` or `get_reward("pickscore=0.7,ocr=0.3")` makes one from its name; "NAME:MODEL?key=value" sets
arguments, and "my_file.py:my_function" is a reward of your own. Models are loaded at first use. [FG] is Flow-GRPO
(arXiv 2505.05470), [GE] is GenEval (arXiv 2310.11513).
"""

import base64
import http.client
import importlib.util
import inspect
import io
import itertools
import json
import os
import re
import time
import urllib.error
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import torch
import torch.nn.functional as F
from PIL import Image


class RewardError(Exception):
    """A reward that is unknown, cannot be loaded or cannot read a prompt (exit_status 2), or fails in a run (1)."""

    def __init__(self, message, exit_status=2):
        super().__init__(message)
        self.exit_status = exit_status


def to_arrays(images):
    """images: (B, 3, H, W) in [0, 1], any device. Returns (B, H, W, 3) uint8 numpy, rounded."""
    return images.mul(255).round().clamp(0, 255).to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()


def to_pictures(images):
    """images: (B, 3, H, W) in [0, 1], any device. Returns B PIL pictures, for models that do their own resizing."""
    return [Image.fromarray(array) for array in to_arrays(images)]


# ---------------------------------------------------------------- JPEG size [DDPO, arXiv 2305.13301, section 5.1]


def jpeg_incompressibility(images, prompts):
    """Size of the image as JPEG of quality 95, in kilobytes (1000 bytes). Prompts are not read. Needs no download."""
    scores = []
    for picture in to_pictures(images):
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=95)
        scores.append(buffer.tell() / 1000)
    return torch.tensor(scores, dtype=torch.float32)


def jpeg_compressibility(images, prompts):
    """Minus the size of the image as JPEG of quality 95, in kilobytes."""
    return -jpeg_incompressibility(images, prompts)


# ---------------------------------------------------------------- shapes, the verifiable reward of the tiny model

COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 0.7, 0.0), "blue": (0.0, 0.0, 1.0), "yellow": (1.0, 0.8, 0.0)}
SHAPES = ("circle", "square", "triangle")
NUMBERS = {"a": 1, "two": 2, "three": 3, "four": 4}
RELATIONS = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}  # from first to second, y down
_THING = rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_COUNT = re.compile(rf"({'|'.join(NUMBERS)}) {_THING}(s?)")
_PAIR = re.compile(rf"a {_THING} (and|{'|'.join(RELATIONS)}) a {_THING}")


def parse_scene(prompt):
    """Read a prompt of the tiny model: (objects, relation).

    objects: list of (colour, shape), one entry an object. relation: a key of RELATIONS from objects[0] to objects[1],
    or None. Raises ValueError, with what the tiny model can draw, for any other prompt.
    """
    text = " ".join(prompt.lower().split()).rstrip(".")
    if match := _COUNT.fullmatch(text):
        number, colour, shape, plural = match.groups()
        if (number == "a") != bool(plural):
            return [(colour, shape)] * NUMBERS[number], None
    if match := _PAIR.fullmatch(text):
        colour, shape, relation, other_colour, other_shape = match.groups()
        return [(colour, shape), (other_colour, other_shape)], relation if relation in RELATIONS else None
    raise ValueError(
        f"the reward shapes cannot read the prompt {prompt[:200]!r}; write 'a red circle', 'three blue squares', "
        f"'a red circle and a blue square' or 'a red circle left of a blue square', with the colours "
        f"{', '.join(COLOURS)}, the shapes {', '.join(SHAPES)}, numbers up to four, joined by 'and' or by "
        f"{', '.join(RELATIONS)}"
    )


def shape_inside(shape, dx, dy, radius):
    """Signed distance to a shape's edge, in pixels, negative inside (exact but for the outside of corners).

    dx, dy: offsets from the shape's centre, y down. The triangle points up: apex at -radius, base at 0.8 radius.
    """
    if shape == "circle":
        return torch.hypot(dx, dy) - radius
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - 0.88 * radius
    return torch.maximum(dy - 0.8 * radius, (1.8 * dx.abs() - dy - radius) / 3.24**0.5)


def _connected_components(mask):
    """mask: (N, H, W) bool -> (N, H, W) labels: 0 outside, else one positive number a 4-connected component."""
    height, width = mask.shape[-2:]
    mask = mask.float()
    label = mask * torch.arange(1, height * width + 1, dtype=torch.float32).view(height, width)
    while True:  # sweep the largest label of a component down, up, right and left until nothing changes
        before = label.clone()
        for dim, size in ((1, height), (2, width)):
            for step in (1, -1):
                for i in range(1, size) if step == 1 else range(size - 2, -1, -1):
                    line = label.select(dim, i)
                    torch.maximum(line, label.select(dim, i - step), out=line).mul_(mask.select(dim, i))
        if torch.equal(before, label):
            return label.long()


def find_objects(images, min_area=16):
    """Find the coloured shapes in pictures of 32 x 32 pixels on a light ground.

    images: (B, 3, 32, 32) in [0, 1]. Returns B lists of (colour, shape, quality, x, y): quality in [0, 1] says how well
    the blob fits the best of the three shapes (intersection over union 0.55 or less is 0, 0.8 or more is 1), x and y
    are its centroid in pixels. Blobs under min_area pixels are not counted.
    """
    ink = 1 - images.float().cpu()  # what is missing from white: an edge pixel has its object's ink, only less
    palette = 1 - torch.tensor(list(COLOURS.values()))
    cosine = torch.einsum("bchw,kc->bkhw", F.normalize(ink, dim=1), F.normalize(palette, dim=1))
    strength = torch.einsum("bchw,kc->bkhw", ink, palette) / palette.square().sum(1)[None, :, None, None]
    best = cosine.argmax(1, keepdim=True)
    mask = torch.zeros_like(cosine).scatter_(1, best, 1.0).bool() & (cosine > 0.9) & (strength > 0.5)
    mask = mask.flatten(0, 1)  # (4 B, 32, 32)
    planes = mask.flatten(1).any(1).nonzero()[:, 0]
    label = _connected_components(mask[planes])

    row, blob = [], []  # which picture and colour a blob belongs to, and its pixels
    for plane, labels in zip(planes.tolist(), label):
        values, areas = labels.unique(return_counts=True)
        for value in values[(areas >= min_area) & (values > 0)]:
            row.append(plane)
            blob.append(labels == value)
    found = [[] for _ in images]
    if not blob:
        return found

    blob = torch.stack(blob).float()  # (N, 32, 32)
    area = blob.sum((1, 2))
    axis = torch.arange(32.0)
    x = (blob.sum(1) * axis).sum(1) / area
    y = (blob.sum(2) * axis).sum(1) / area
    overlap = []
    for shape, unit_area, centre in (("circle", torch.pi, 0.0), ("square", 1.76**2, 0.0), ("triangle", 1.8, 0.2)):
        radius = (area / unit_area).sqrt()  # the template has the blob's area and centroid
        dx = axis[None, None, :] - x[:, None, None]
        dy = axis[None, :, None] - (y - centre * radius)[:, None, None]
        template = (shape_inside(shape, dx, dy, radius[:, None, None]) < 0).float()
        overlap.append((template * blob).sum((1, 2)) / torch.maximum(template, blob).sum((1, 2)))
    overlap, shape = torch.stack(overlap).max(0)
    quality = ((overlap - 0.55) / 0.25).clamp(0, 1)
    colours = list(COLOURS)
    for i, n in enumerate(row):
        thing = (colours[n % 4], SHAPES[shape[i]], quality[i].item(), x[i].item(), y[i].item())
        found[n // 4].append(thing)
    return found


def score_scene(found, objects, relation):
    """Compare what is in a picture (find_objects) with what was asked for (parse_scene): a score in [0, 1].

    Each object asked for is paired with at most one found, for the best sum. A pair earns its quality where colour and
    shape are right, 0.3 of it where only one is; the sum is divided by the larger of the two counts, so that objects
    too many cost as much as objects too few. A wrong or missing relation halves the score. The score is squared, so
    that near misses earn something and much less than a hit. More than eight objects score 0.
    """

    def credit(want, have):
        hits = (want[0] == have[0]) + (want[1] == have[1])
        return (0.0, 0.3, 1.0)[hits] * have[2]

    if not found or len(found) > 8:
        return 0.0
    best, holds = 0.0, False
    for pick in itertools.permutations(found + [None] * (len(objects) - 1), len(objects)):
        total = sum(credit(want, have) for want, have in zip(objects, pick) if have)
        total /= max(len(objects), len(found))
        hold = relation is None
        if relation is not None and all(pick):
            (ax, ay), (bx, by), (rx, ry) = pick[0][3:], pick[1][3:], RELATIONS[relation]
            hold = (bx - ax) * rx + (by - ay) * ry > 6  # pixels; objects side by side are 16 apart
        if (total * (1.0 if hold else 0.5)) > best * (1.0 if holds else 0.5):
            best, holds = total, hold
    return (best * (1.0 if holds else 0.5)) ** 2


def shapes(images, prompts):
    """How well pictures of the tiny model show what their prompts ask for, in [0, 1]: count, colour, shape, position.

    images: (B, 3, 32, 32); another size is resized. Raises ValueError where a prompt cannot be read (parse_scene).
    """
    scenes = [parse_scene(prompt) for prompt in prompts]
    if images.shape[-2:] != (32, 32):
        images = F.interpolate(images.float(), (32, 32), mode="area")
    return torch.tensor([score_scene(found, *scene) for found, scene in zip(find_objects(images), scenes)])


# ---------------------------------------------------------------- models: loaded at first use, shared by rewards

LOADED = {}  # (loader, source, device) -> (module, ...): rewards that need the same model share it


def load_once(load, source, device=None):
    """load(source, device), the first time; then what it returned: (module, ...), the module on the device."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if (load, source, device) not in LOADED:
        LOADED[load, source, device] = load(source, device)
    module, *rest = LOADED[load, source, device]
    return module.to(device), *rest


def frozen(model, device):
    """The model for scoring: no gradients, no dropout, on its device, in half precision on CUDA."""
    half = torch.device(device).type == "cuda"
    return model.eval().requires_grad_(False).to(device, torch.float16 if half else torch.float32)


def load_pretrained(kind, source, wanted):
    """A model of transformers, from a source that has all its weights.

    kind: its class; source: repository or folder; wanted: what it must be, for the error. from_pretrained alone would
    give random values to weights that the source does not have, and go on.
    """
    try:
        model, info = kind.from_pretrained(source, output_loading_info=True)
        lacking = [str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]]]
        if lacking:
            raise ValueError(f"it has no weights for {lacking[0]} and {len(lacking) - 1} more")
    except Exception as error:  # of many kinds: no such repository, no network, a cut file, another model
        raise RewardError(f"{source} cannot be loaded as {wanted}: {' '.join(str(error).split())[:300]}")
    return model


def load_processor(kind, source, wanted, **options):
    """A tokenizer or image processor of transformers from a repository or folder."""
    try:
        return kind.from_pretrained(source, **options)
    except Exception as error:
        raise RewardError(f"{source} has no {wanted}: {' '.join(str(error).split())[:300]}")


def load_clip(source, device):
    """CLIP, from a repository or folder: (model, tokenizer, image processor, logit scale).

    PickScore's repository is used with the processor of the CLIP it was tuned from, as its authors do.
    """
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = load_pretrained(CLIPModel, source, "a CLIP model (transformers' CLIPModel)")
    scale = model.logit_scale.exp().item()  # in full precision
    prepare = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K" if source == PICKSCORE else source
    tokenizer = load_processor(AutoTokenizer, prepare, "tokenizer of a CLIP model")
    words = model.config.text_config.vocab_size
    if not 0.9 * words <= len(tokenizer) <= words:  # without its files, from_pretrained makes up an empty one
        raise RewardError(f"{prepare} has no tokenizer of a CLIP model: {len(tokenizer)} tokens, not {words}")
    processor = load_processor(CLIPImageProcessorPil, prepare, "image processor of a CLIP model")
    return frozen(model, device), tokenizer, processor, scale


# ---------------------------------------------------------------- CLIP: pickscore, clipscore, aesthetic

PICKSCORE = "yuvalkirstain/PickScore_v1"
CLIP = "openai/clip-vit-large-patch14"
AESTHETIC = "trl-lib/ddpo-aesthetic-predictor"  # sac+logos+ava1-l14-linearMSE.pth of the predictor's authors
_cut = set()  # text lengths for which it was said that prompts are cut


def embed_texts(texts, model, tokenizer):
    """Normalised text embeddings (N, D) float32 of CLIP. What is longer than its text length is cut, said once."""
    length = model.config.text_config.max_position_embeddings
    longest = max(len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"])
    if longest > length and length not in _cut:
        _cut.add(length)
        warnings.warn(f"prompts of more than {length} tokens are cut for CLIP, as here of {longest}", stacklevel=2)
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt").to(model.device)
    embedding = model.get_text_features(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
    return F.normalize(embedding.pooler_output.float(), dim=-1)


def embed_pictures(pictures, model, processor):
    """Normalised image embeddings (N, D) float32 of CLIP, of PIL pictures of any size."""
    pixels = processor(pictures, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
    return F.normalize(model.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)


@torch.no_grad()
def clipscore(images, prompts, model=CLIP, batch=16, device=None):
    """Cosine of image and prompt in CLIP, in [-1, 1], about 0.1 to 0.35 (CLIPScore, arXiv 2104.08718, without its 2.5).

    model: repository or folder of a CLIP with tokenizer and image processor.
    """
    clip, tokenizer, processor, _ = load_once(load_clip, model, device)
    scores = []
    for n in range(0, len(prompts), batch):
        image = embed_pictures(to_pictures(images[n : n + batch]), clip, processor)
        text = embed_texts(prompts[n : n + batch], clip, tokenizer)
        scores.append((image * text).sum(1).cpu())  # each image with its own prompt
    return torch.cat(scores)


def pickscore(images, prompts, model=PICKSCORE, batch=16, device=None):
    """PickScore v1 (arXiv 2305.01569): logit scale times cosine in its CLIP-H, about 20; divided by 26 as [FG] does."""
    *_, scale = load_once(load_clip, model, device)
    return clipscore(images, prompts, model, batch, device) * scale / 26


def load_aesthetic(source, device):
    """The published network, linear layers and dropout only: 768 numbers of CLIP L/14 -> 1. Returns (network,)."""
    network = torch.nn.Sequential(
        torch.nn.Linear(768, 1024), torch.nn.Dropout(0.2), torch.nn.Linear(1024, 128), torch.nn.Dropout(0.2),
        torch.nn.Linear(128, 64), torch.nn.Dropout(0.1), torch.nn.Linear(64, 16), torch.nn.Linear(16, 1),
    )  # fmt: skip
    try:
        if Path(source).exists():
            file = find_aesthetic(source)
        else:
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(source, "aesthetic-model.pth"))
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights = load_file(file)
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
        network.load_state_dict({key.removeprefix("layers."): value for key, value in weights.items()})
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(
            f"{source} cannot be loaded as the aesthetic predictor's network (layers.0, 2, 4, 6 and 7 of 768-1024-128-"
            f"64-16-1): {' '.join(str(error).split())[:300]}"
        )
    return (network.eval().requires_grad_(False).to(device),)


def find_aesthetic(source):
    """The weights of the aesthetic network: source itself if it is a file, else the one such file in that folder."""
    files = [Path(source)] if Path(source).is_file() else sorted(Path(source).iterdir())
    files = [f for f in files if f.suffix in (".pth", ".pt", ".safetensors")]
    files = [f for f in files if not re.match(r"(pytorch_)?model[.-]", f.name)]  # CLIP's may lie beside it
    if len(files) != 1:
        raise RewardError(
            f"{source} has {len(files)} files .pth, .pt or .safetensors beside a model's own; the reward aesthetic "
            f"expects one, the predictor's weights (sac+logos+ava1-l14-linearMSE.pth)"
        )
    return files[0]


@torch.no_grad()
def aesthetic(images, prompts, model=AESTHETIC, clip=None, batch=16, device=None):
    """LAION's aesthetic predictor v2, about 1 to 10 (github.com/christophschuhmann/improved-aesthetic-predictor).

    A small network on the normalised image embedding of CLIP L/14; prompts are not read. model: its repository, file or
    folder. clip: repository or folder of CLIP; default: `model` where that folder has a CLIP as well, else OpenAI's.
    """
    clip = clip or (model if (Path(model) / "config.json").is_file() else CLIP)
    (network,) = load_once(load_aesthetic, model, device)
    clip, _, processor, _ = load_once(load_clip, clip, device)
    pictures = [images[n : n + batch] for n in range(0, len(images), batch)]
    return torch.cat([network(embed_pictures(to_pictures(p), clip, processor))[:, 0].cpu() for p in pictures])


# ---------------------------------------------------------------- preference models with packages of their own


def load_hpsv2(source, device):
    """HPS v2.1 in open_clip: (model, image transform, tokenizer). source: repository, checkpoint file or folder."""
    import open_clip

    try:
        file = Path(source)
        if file.is_dir():
            file = file / "HPS_v2.1_compressed.pt"
        elif not file.is_file():
            from huggingface_hub import hf_hub_download

            file = hf_hub_download(source, "HPS_v2.1_compressed.pt")
        weights = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
        # "longest", as HPSv2 does: other than square images are padded, not cropped
        model, _, transform = open_clip.create_model_and_transforms("ViT-H-14", image_resize_mode="longest")
        model.load_state_dict(weights)
    except Exception as error:
        raise RewardError(
            f"{source} cannot be loaded as HPS_v2.1_compressed.pt, a checkpoint of open_clip's ViT-H-14: "
            f"{' '.join(str(error).split())[:300]}"
        )
    return frozen(model, device), transform, open_clip.get_tokenizer("ViT-H-14")


@torch.no_grad()
def hpsv2(images, prompts, model="xswu/HPSv2", batch=16, device=None):
    """HPS v2.1 (arXiv 2306.09341): cosine of image and prompt in its CLIP-H, about 0.2 to 0.35.

    Through open_clip, from which HPSv2 is tuned: its own package pins old versions of others. Long prompts are cut at
    77 tokens.
    """
    clip, transform, tokenizer = load_once(load_hpsv2, model, device)
    weight = clip.logit_scale
    scores = []
    for n in range(0, len(prompts), batch):
        pixels = torch.stack([transform(picture) for picture in to_pictures(images[n : n + batch])]).to(weight)
        image = clip.encode_image(pixels, normalize=True)
        text = clip.encode_text(tokenizer(prompts[n : n + batch]).to(weight.device), normalize=True)
        scores.append((image.float() * text.float()).sum(1).cpu())
    return torch.cat(scores)


def load_hpsv3(source, device):
    """HPSv3 of its package: (model, inferencer)."""
    try:
        from hpsv3 import HPSv3RewardInferencer

        inferencer = HPSv3RewardInferencer(checkpoint_path=source, device=device)
    except Exception as error:
        raise RewardError(f"the package hpsv3 cannot load it: {type(error).__name__}, {' '.join(str(error).split())}")
    return inferencer.model, inferencer


@torch.no_grad()
def hpsv3(images, prompts, model=None, batch=8, device=None):
    """HPSv3 (arXiv 2508.03789), a reward of Qwen2-VL 7B, about 0 to 15: the first of its two outputs, mean and sigma.

    Through the package hpsv3, which wants a transformers of its own (4.45). model: checkpoint file.
    """
    _, inferencer = load_once(load_hpsv3, model, device)
    pictures, scores = to_pictures(images), []
    for n in range(0, len(prompts), batch):
        rewards = inferencer.reward(image_paths=pictures[n : n + batch], prompts=prompts[n : n + batch])
        scores.append(rewards[:, 0].float().cpu())
    return torch.cat(scores)


def load_imagereward(source, device):
    """ImageReward of its package: (model,)."""
    try:
        import ImageReward

        return (ImageReward.load(source, device=device).eval(),)
    except Exception as error:
        reason = f"{type(error).__name__}, {' '.join(str(error).split())}"
        raise RewardError(f"the package image-reward cannot load {source}: {reason}")


@torch.no_grad()
def imagereward(images, prompts, model="ImageReward-v1.0", device=None):
    """ImageReward (arXiv 2304.05977), about -2 to 2, mean 0 over its authors' data. Prompts are cut at 35 tokens.

    Through the package image-reward, which wants an older transformers (4). model: its name, or a checkpoint file.
    """
    (scorer,) = load_once(load_imagereward, model, device)
    return torch.tensor([scorer.score(prompt, picture) for picture, prompt in zip(to_pictures(images), prompts)])


# ---------------------------------------------------------------- ocr, text in pictures [FG] section 4.1


def quoted_text(prompt):
    """The text that a picture must show: what stands between the first two double quotes of its prompt."""
    match = re.search(r'"([^"]*)"', re.sub("[“”„]", '"', prompt))
    if not match or not match[1].strip():
        raise ValueError(f'the reward ocr finds no quoted text in {prompt[:200]!r}; write: a sign that says "OPEN"')
    return match[1]


def edit_distance(a, b):
    """Levenshtein distance: the fewest insertions, deletions and substitutions of characters that turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def text_score(read, wanted):
    """How well what was read is what was wanted, in [0, 1]: 1 - edit distance / length of the text wanted, at least 0.

    As in [FG]'s code: spaces and case do not count, and text that contains all that is wanted scores 1.
    """
    read, wanted = ("".join(text.split()).lower() for text in (read, wanted))
    distance = 0 if wanted in read else edit_distance(read, wanted)
    return 1 - min(distance, len(wanted)) / len(wanted)


def load_ocr(source, device):
    from rapidocr import RapidOCR

    # as many threads as torch takes, not all there are
    options = {"Global.log_level": "critical", "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads()}
    return torch.nn.Identity(), RapidOCR(params=options)  # it has no module to move


def ocr(images, prompts):
    """The quoted text of the prompt against the text read in the image, in [0, 1]: quoted_text, text_score.

    Read by RapidOCR (PaddleOCR's models in onnxruntime, in its package) on the CPU; [FG] reads with PaddleOCR itself.
    """
    _, reader = load_once(load_ocr, None, "cpu")
    scores = []
    for array, prompt in zip(to_arrays(images), prompts):
        lines = reader(array[:, :, ::-1]).txts or ()  # it takes BGR
        scores.append(text_score("".join(lines), quoted_text(prompt)))
    return torch.tensor(scores, dtype=torch.float32)


# ---------------------------------------------------------------- geneval, objects, counts, colours, positions [GE]

# GenEval's names of COCO's 80 classes, in COCO's order
COCO = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")
GENEVAL_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
GENEVAL_NUMBERS = dict(zip("two three four five six seven eight nine ten".split(), range(2, 11)))
GENEVAL_RELATIONS = ("left of", "right of", "above", "below")
# GenEval only adds s, or es after s: "two knifes"; people write it otherwise
_PLURALS = {name + ending: name for name in COCO for ending in ("", "s", "es")} | {
    "people": "person", "knives": "knife", "computer mice": "computer mouse",
}  # fmt: skip
_OBJECT = rf"an? (?:({'|'.join(GENEVAL_COLOURS)}) )?({'|'.join(COCO)})"
_OBJECTS = re.compile(rf"a photo of {_OBJECT}(?: (and|{'|'.join(GENEVAL_RELATIONS)}) {_OBJECT})?")
_COUNTED = re.compile(rf"a photo of ({'|'.join(GENEVAL_NUMBERS)}) ({'|'.join(_PLURALS)})")


class Want(NamedTuple):
    """What a prompt asks for: count objects of a class, of a colour, in a relation to the first Want."""

    name: str
    count: int = 1
    exact: bool = False  # more of them are wrong as well
    colour: str | None = None
    relation: str | None = None


class Found(NamedTuple):
    """An object in a picture. box: (left, top, right, bottom) in pixels; mask: (H, W) bool."""

    name: str
    score: float
    box: tuple
    mask: Any = None
    colour: str | None = None


def parse_geneval(prompt):
    """The Wants of a prompt of GenEval's six templates. Raises ValueError, with the templates, for any other prompt."""
    text = " ".join(prompt.lower().split()).rstrip(".")
    if match := _COUNTED.fullmatch(text):
        return [Want(_PLURALS[match[2]], GENEVAL_NUMBERS[match[1]], exact=True)]
    if match := _OBJECTS.fullmatch(text):
        colour, name, relation, other_colour, other = match.groups()
        if relation is None:
            return [Want(name, colour=colour)]
        if relation == "and" and bool(colour) == bool(other_colour):
            return [Want(name, colour=colour), Want(other, colour=other_colour)]
        if relation != "and" and not colour and not other_colour:
            return [Want(other), Want(name, relation=relation)]  # the first is where the second stands left of
    raise ValueError(
        f"the reward geneval cannot read the prompt {prompt[:200]!r}; write 'a photo of a dog', 'a photo of a dog and "
        f"a cat', 'a photo of two dogs', 'a photo of a red car', 'a photo of a dog left of a cat' or 'a photo of a red "
        f"car and a blue bus', with COCO's objects, the colours {', '.join(GENEVAL_COLOURS)}, numbers up to ten, and "
        f"the relations {', '.join(GENEVAL_RELATIONS)}"
    )


def box_overlap(a, b):
    """Intersection over union of two boxes, with GenEval's pixel more at every side."""

    def area(left, top, right, bottom):
        return max(right - left + 1, 0) * max(bottom - top + 1, 0)

    both = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - both
    return both / union if union else 0.0


def keep_objects(found, counting, max_overlap=1.0):
    """The objects that count, as GenEval selects them: {name: [Found], the surest first}.

    Those of a score over 0.3, or 0.9 where the prompt gives a number; at most 16 of a class; and where max_overlap is
    under 1, none that overlaps a surer one of its class by as much (GenEval's is 1).
    """
    kept = {}
    threshold = 0.9 if counting else 0.3
    for thing in sorted(found, key=lambda thing: -thing.score):
        if thing.score > threshold:
            kept.setdefault(thing.name, []).append(thing)
    for name, things in kept.items():
        kept[name] = []
        for thing in things[:16]:
            if max_overlap >= 1 or all(box_overlap(k.box, thing.box) < max_overlap for k in kept[name]):
                kept[name].append(thing)
    return kept


def relations(a, b, margin=0.1):
    """Which GENEVAL_RELATIONS hold from box a to box b: a set of none, one or two (above left, say).

    The centres must lie further apart than margin times the sum of the boxes' sizes; what is more counts in a direction
    where it is over half of the distance of the centres.
    """
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    beyond = [max(abs(o) - margin * size, 0.0) * (1 if o > 0 else -1) for o, size in zip(offset, sizes)]
    if max(map(abs, beyond)) < 1e-3:
        return set()
    x, y = (value / (offset[0] ** 2 + offset[1] ** 2) ** 0.5 for value in beyond)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, holding in holds.items() if holding}


def judge(wants, objects):
    """GenEval's verdict, 1.0 or 0.0: is everything there that was asked for? objects: of keep_objects, with colours.

    Colour and position are those of the surest `count` objects; others may be there, but for `exact`.
    """
    first = None  # the surest objects of the first Want, if all is right with them
    for n, want in enumerate(wants):
        things = objects.get(want.name, [])
        surest = things[: want.count]
        if len(things) < want.count or (want.exact and len(things) > want.count):
            return 0.0
        if want.colour and any(thing.colour != want.colour for thing in surest):
            return 0.0
        if want.relation and any(want.relation not in relations(a.box, b.box) for a in surest for b in first):
            return 0.0
        first = surest if n == 0 else first
    return 1.0


def judge_graded(wants, objects):
    """The graded reward that [FG] trains on, at most 1: the mean over parts, of which each Want has one or two.

    A count earns 1 - |found - wanted| / wanted, which falls below 0 from twice the number on; the colour 1 -
    |of the colour - wanted| / wanted, the position 1 or 0, and both 0 where the count is wrong. ([FG]'s code adds a 1
    after the 0 of a wrong position: 0.75 for it, 2/3 here.)
    """
    parts, target = [], None
    for n, want in enumerate(wants):
        things = objects.get(want.name, [])
        parts.append(1 - abs(len(things) - want.count) / want.count)
        right = len(things) == want.count
        if want.colour:
            hits = sum(thing.colour == want.colour for thing in things)
            parts.append(1 - abs(hits - want.count) / want.count if right else 0.0)
            right = right and hits == want.count
        if want.relation:
            holds = right and target and all(want.relation in relations(a.box, b.box) for a in things for b in target)
            parts.append(1.0 if holds else 0.0)
        if n == 0:
            target = things if right else None
    return sum(parts) / len(parts)


def load_detector(source, device):
    """Mask2Former of COCO's 80 classes: (model, image processor)."""
    from transformers import Mask2FormerModel, Mask2FormerPreTrainedModel
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    class Detector(Mask2FormerPreTrainedModel):
        """Mask2FormerForUniversalSegmentation without its loss, which needs scipy: pixels -> class and mask logits."""

        def __init__(self, config):
            super().__init__(config)
            self.model = Mask2FormerModel(config)
            self.class_predictor = torch.nn.Linear(config.hidden_dim, config.num_labels + 1)
            self.post_init()

        def forward(self, pixels):
            outputs = self.model(pixels, output_hidden_states=True, return_dict=True)
            classes = self.class_predictor(outputs.transformer_decoder_intermediate_states[-1].transpose(0, 1))
            return classes, outputs.masks_queries_logits[-1]  # (B, Q, 81), (B, Q, h, w)

    wanted = "a Mask2Former (transformers' Mask2FormerForUniversalSegmentation) for COCO's 80 classes"
    model = load_pretrained(Detector, source, wanted)
    if model.config.num_labels != len(COCO):
        raise RewardError(f"{source} is not {wanted}: it has {model.config.num_labels} classes")
    processor = load_processor(Mask2FormerImageProcessorPil, source, "image processor of a Mask2Former")
    # in full precision, being small (69 million): GenEval's thresholds were chosen so
    return model.eval().requires_grad_(False).to(device, torch.float32), processor


def instances(class_logits, mask_logits, size, threshold=0.3, limit=100):
    """The objects of one picture, as mmdet's Mask2Former, which GenEval uses, makes them of the network's outputs.

    class_logits: (Q, 81), the last for no object; mask_logits: (Q, h, w); size: (H, W) of the picture. Of the `limit`
    likeliest pairs of query and class, a score is the class's probability times the mean probability of the mask's
    pixels; those over the threshold are returned as Found. (mmdet resizes masks twice, here once.)
    """
    probability = class_logits.float().softmax(-1)[:, :-1]
    top, index = probability.flatten().topk(min(limit, probability.numel()))
    found = []
    for p, i in zip(top.tolist(), index.tolist()):
        if p <= threshold:  # the score is not larger
            break
        query, label = divmod(i, probability.shape[1])
        logits = F.interpolate(mask_logits[query].float()[None, None], size, mode="bilinear", align_corners=False)[0, 0]
        mask = (logits > 0).cpu()
        if p > threshold and mask.any():
            score = p * logits.sigmoid().cpu()[mask].mean().item()
            rows, columns = mask.any(1).nonzero()[:, 0].tolist(), mask.any(0).nonzero()[:, 0].tolist()
            box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            if score > threshold:
                found.append(Found(COCO[label], score, box, mask))
    return found


def find_colours(picture, things, clip, tokenizer, processor, _):
    """The colour of each Found, of one class: the likeliest of GENEVAL_COLOURS for CLIP, on the object cut out.

    The object's own pixels on grey (#999), cut to its box, against the mean embedding of three sentences a colour.
    """
    name = things[0].name
    sentences = [
        s.format(colour, name)
        for colour in GENEVAL_COLOURS
        for s in ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
    ]
    texts = embed_texts(sentences, clip, tokenizer).view(len(GENEVAL_COLOURS), 3, -1).mean(1)
    grey = Image.new("RGB", picture.size, "#999")
    cut = [Image.composite(picture, grey, Image.fromarray(t.mask.numpy())).crop(t.box) for t in things]
    best = (embed_pictures(cut, clip, processor) @ F.normalize(texts, dim=1).T).argmax(1)
    return [thing._replace(colour=GENEVAL_COLOURS[n]) for thing, n in zip(things, best.tolist())]


DETECTOR = "facebook/mask2former-swin-small-coco-instance"


@torch.no_grad()
def geneval(images, prompts, model=DETECTOR, clip=CLIP, size=800, max_overlap=1.0, batch=8, device=None, verdict=judge):
    """GenEval without mmdet: does the image show the objects, number, colours, position of its prompt? 1.0 or 0.0.

    Prompts are of GenEval's six templates (parse_geneval). Objects by Mask2Former with Swin-S, trained on COCO, of
    transformers (GenEval's is the same network, trained by mmdet); colours by CLIP L/14. model, clip: repositories or
    folders. size: pixels of the shorter side for the detector, 800 as mmdet has it, where transformers' repository says
    384. max_overlap: of two boxes of one class, over which the less sure is dropped. verdict: judge, or judge_graded.
    Raises ValueError for another prompt.
    """
    detector, processor = load_once(load_detector, model, device)
    sides = {"shortest_edge": size, "longest_edge": size * 1333 // 800}
    scores = []
    for n in range(0, len(prompts), batch):
        pictures = to_pictures(images[n : n + batch])
        pixels = processor(pictures, size=sides, return_tensors="pt")["pixel_values"].to(detector.device)
        for picture, prompt, classes, masks in zip(pictures, prompts[n : n + batch], *detector(pixels)):
            wants = parse_geneval(prompt)
            found = instances(classes, masks, picture.size[::-1])
            objects = keep_objects(found, any(want.exact for want in wants), max_overlap)
            for want in wants:
                things = objects.get(want.name, [])
                if want.colour and things:
                    coloured = find_colours(picture, things[: want.count], *load_once(load_clip, clip, device))
                    objects[want.name] = coloured + things[want.count :]
            scores.append(verdict(wants, objects))
    return torch.tensor(scores, dtype=torch.float32)


def geneval_graded(images, prompts, model=DETECTOR, clip=CLIP, size=800, max_overlap=1.0, batch=8, device=None):
    """geneval, but for a picture that is partly right a number between (judge_graded): what [FG] trains on."""
    return geneval(images, prompts, model, clip, size, max_overlap, batch, device, judge_graded)


# ---------------------------------------------------------------- vlm, a vision-language model behind a server

QUESTION = (
    'This picture was made for the text: "{prompt}". How well does it show what the text says, and how good does it '
    "look? Give one number from 0 (not at all) to 10 (perfect). Answer with a last line 'Score: NUMBER', nothing after."
)


def fetch_json(url, body, deadline):
    """POST body as JSON, or GET where it is None, and return the JSON of the answer.

    A server that is not there, fails (status 5xx, 408, 429) or answers no JSON is asked again after 0.5, 1, 2, 4, ...
    seconds, until the deadline (time.monotonic()); then, or if it refuses the request, RewardError.
    """
    local = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    opener = urllib.request.build_opener(*[urllib.request.ProxyHandler({})] * local)  # no proxy knows this machine
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('VLM_API_KEY', 'none')}"}
    wait = 0.5
    while True:
        try:
            request = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers)
            with opener.open(request, timeout=max(deadline - time.monotonic(), 0.01)) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            reason = f"status {error.code}, {error.read(200).decode(errors='replace')}"
            if error.code < 500 and error.code not in (408, 429):
                raise RewardError(f"the server at {url} refused: {reason}", 1)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = str(error) or type(error).__name__
        if time.monotonic() + wait > deadline:
            raise RewardError(f"the server at {url} gave no answer within the time-out; the last try: {reason}", 1)
        time.sleep(wait)
        wait = min(2 * wait, 8.0)


def read_score(answer, scale=10.0):
    """The score that an answer gives, in [0, scale], or None: after the word score, before / 10, or its only number."""
    number = r"(?<![\d.\-–−])(\d+(?:\.\d+)?)(?!\.?\d|\s*(?:-|–|to)\s*\d)"  # no part of a number, no end of a range
    for pattern in (rf"score\W{{0,6}}?(?:is|of)?[\s*:=]*{number}", rf"{number}\s*(?:/|out of)\s*{scale:g}\b", number):
        values = re.findall(pattern, answer, re.IGNORECASE)
        if values and (pattern != number or len(values) == 1):
            return float(values[-1]) if float(values[-1]) <= scale else None
    return None


def vlm(images, prompts, url, model=None, question=QUESTION, scale=10.0, timeout=120.0, workers=16):
    """A vision-language model's score of image and prompt, divided by scale: [0, 1].

    url: of an OpenAI-compatible server (vLLM, SGLang), as http://127.0.0.1:8000/v1. model: its name there; default: the
    first that the server lists. question: {prompt} stands for the prompt; @FILE for what is in a file. scale: the
    largest score the question allows. timeout: seconds for one image, with all tries. workers: requests at a time. An
    answer without a number is asked for again, three times in all, then it is an error. The environment variable
    VLM_API_KEY is sent as key.
    """
    url = url.rstrip("/")
    question = Path(question[1:]).read_text("utf-8") if question.startswith("@") else question
    model = model or fetch_json(f"{url}/models", None, time.monotonic() + timeout)["data"][0]["id"]

    failed = []

    def ask(picture, prompt):
        try:
            return 0.0 if failed else ask_once(picture, prompt)  # after an error, none of those that wait
        except RewardError as error:
            failed.append(error)
            raise

    def ask_once(picture, prompt):
        deadline, buffer = time.monotonic() + timeout, io.BytesIO()
        picture.save(buffer, format="PNG")
        data = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": data}}]
        content.append({"type": "text", "text": question.replace("{prompt}", prompt)})
        for temperature in (0.0, 0.5, 1.0):
            body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": temperature}
            answer = fetch_json(f"{url}/chat/completions", body, deadline)
            try:
                text = answer["choices"][0]["message"]["content"]
            except (KeyError, IndexError, TypeError):
                raise RewardError(f"the server at {url} gave no chat completion but {str(answer)[:200]}", 1)
            score = read_score(text or "", scale)
            if score is not None:
                return score / scale
        raise RewardError(
            f"the model {model} gave no score from 0 to {scale:g} for {prompt[:200]!r} but {text!r:.300}", 1
        )

    pool = ThreadPoolExecutor(workers)
    try:
        return torch.tensor(list(pool.map(ask, to_pictures(images), prompts)), dtype=torch.float32)
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------- names and sums

REWARDS = {
    "shapes": shapes,
    "jpeg_compressibility": jpeg_compressibility,
    "jpeg_incompressibility": jpeg_incompressibility,
    "pickscore": pickscore,
    "clipscore": clipscore,
    "aesthetic": aesthetic,
    "hpsv2": hpsv2,
    "hpsv3": hpsv3,
    "imagereward": imagereward,
    "ocr": ocr,
    "geneval": geneval,
    "geneval_graded": geneval_graded,
    "vlm": vlm,
}
# raise ValueError where a reward cannot read a prompt
PROMPT_CHECKS = {"shapes": parse_scene, "ocr": quoted_text, "geneval": parse_geneval, "geneval_graded": parse_geneval}
# what to import, and what to install for it
PACKAGES = {
    "ocr": (("rapidocr", "onnxruntime"), "rapidocr onnxruntime"),
    "hpsv2": (("open_clip",), "open_clip_torch"),
    "hpsv3": (("hpsv3",), "hpsv3"),
    "imagereward": (("ImageReward",), "image-reward"),
}
# which arguments name models, and a file that each must have where it is a repository
HUB_FILES = {
    "pickscore": {"model": "config.json"},
    "clipscore": {"model": "config.json"},
    "aesthetic": {"model": "aesthetic-model.pth", "clip": "config.json"},
    "geneval": {"model": "config.json", "clip": "config.json"},
    "geneval_graded": {"model": "config.json", "clip": "config.json"},
    "hpsv2": {"model": "HPS_v2.1_compressed.pt"},
}
MODEL_TYPES = {"pickscore": "clip", "clipscore": "clip", "geneval": "mask2former", "geneval_graded": "mask2former"}


class Reward:
    """A weighted sum of rewards: (images, prompts) -> (scores (B,), {name: raw scores (B,)}).

    offload: models go to the CPU after use, out of the way of what is trained.
    """

    def __init__(self, functions, weights, offload=False):
        self.functions, self.weights, self.offload = functions, weights, offload  # {name: function}, {name: weight}

    def check(self, prompts):
        """Raise RewardError for a prompt that a part cannot read, and for a repository that cannot be reached.

        Before any model is loaded, here or for training.
        """
        for name, function in self.functions.items():
            kind = re.split("[:?]", name)[0]
            for prompt in prompts if kind in PROMPT_CHECKS else []:
                try:
                    PROMPT_CHECKS[kind](prompt)
                except ValueError as error:
                    raise RewardError(str(error))
            for argument, file in HUB_FILES.get(kind, {}).items():
                check_repository(name, inspect.signature(function).parameters[argument].default, file)

    def __call__(self, images, prompts):
        broken = (~images.isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist()
        if broken:  # scorers see them as black
            raise RewardError(f"the image made for {prompts[broken[0]][:200]!r} has pixels that are not finite", 1)
        parts = {}
        for name, function in self.functions.items():
            try:
                scores = torch.as_tensor(function(images, prompts)).detach().float().cpu()
            except RewardError as error:
                raise RewardError(f"the reward {name}: {error}", error.exit_status)
            except Exception as error:  # a reward is anybody's code: whatever it raises is told with its name
                raise RewardError(
                    f"the reward {name} failed with {type(error).__name__}: {' '.join(str(error).split())[:300]}; its "
                    f"first prompt was {prompts[0][:200]!r}",
                    exit_status=1,
                )
            if scores.shape != (len(prompts),):
                raise RewardError(
                    f"the reward {name} gave scores of shape {tuple(scores.shape)} for {len(prompts)} images; it must "
                    f"give one an image; its first prompt was {prompts[0][:200]!r}",
                    exit_status=1,
                )
            if not scores.isfinite().all():
                n = (~scores.isfinite()).nonzero()[0].item()
                raise RewardError(f"the reward {name} gave {scores[n]} for {prompts[n][:200]!r}", exit_status=1)
            parts[name] = scores
        for module, *_ in LOADED.values() if self.offload else ():
            module.to("cpu")
        return sum(self.weights[name] * parts[name] for name in parts), parts

    def self_check(self, images, prompts, parts=None):
        """Score noise beside images of the model, before training; returns a line for each part that tells the means.

        images: (B, 3, H, W); parts: their scores, if they are known. Raises RewardError, with the part's name, where it
        fails or gives one score to all of them (where they are less than four, the line says so instead): from such a
        reward nothing can be learned.
        """
        few = slice(0, 4)
        noise = torch.rand(images[few].shape, generator=torch.Generator().manual_seed(0)).to(images.device)
        noise_parts = self(noise, prompts[few])[1]
        parts = parts or self(images, prompts)[1]
        lines = []
        for name in self.functions:
            image, noise = parts[name], noise_parts[name]
            a, b, n = image.mean().item(), noise.mean().item(), len(image)
            result = "the images score higher" if a > b else "noise scores higher"
            if torch.cat([image, noise]).unique().numel() == 1:
                result = f"all {n} images of the model and noise score alike: nothing can be learned from that"
                if n >= 4:
                    raise RewardError(f"the reward {name} is {a:.4g}: {result}; a prompt was {prompts[0][:200]!r}", 1)
            lines.append(f"reward {name}: {a:.4g} for images, {b:.4g} for noise; {result}")
        return lines


def get_reward(spec, device=None, offload=False):
    """A Reward from its name, or from a weighted sum such as "pickscore=0.7,ocr=0.3".

    A part is NAME, NAME:MODEL, NAME:MODEL?key=value&key=value or FILE.py:FUNCTION?key=value, and may end with =WEIGHT;
    values are URL-encoded (%2C for a comma). Tells what is wrong with names, files, folders, packages; loads no model.
    """
    functions, weights = {}, {}
    for part in spec.split(","):
        name, weight = split_weight(part.strip())
        if name in functions:
            raise RewardError(f"the reward {name} is twice in {spec!r}; name it once")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise RewardError(f"the weight {weight!r} of the reward {name} is no number; write {name}=0.5")
        if not abs(weights[name]) < float("inf"):
            raise RewardError(f"the weight of the reward {name} must be finite, not {weight}")
        functions[name] = find_function(name, spec, device)
    return Reward(functions, weights, offload)


def split_weight(part):
    """name=0.5 -> name, 0.5, at the last =; but name?key=value has none of its own: weight 1."""
    name, sign, weight = part.rpartition("=")
    if not sign or ("?" in name and "=" not in re.split("[?&]", name)[-1]):
        return part, "1"
    return name, weight


def find_function(name, spec, device):
    """The function of NAME:MODEL?key=value or FILE.py:FUNCTION?key=value, with these arguments set."""
    head, _, query = name.partition("?")
    kind, _, model = head.partition(":")
    if match := re.fullmatch(r"(.+\.py):(\w+)", head):
        function, model = own_function(*match.groups()), ""
    elif kind in REWARDS:
        function, model = REWARDS[kind], os.path.expanduser(model)
        check_packages(kind)
        check_model(kind, model)
    else:
        hint = "; a reward of your own is my_file.py:my_function" if ".py" in head else ""
        raise RewardError(f"unknown reward {kind!r} in --reward {spec!r}; known are {', '.join(REWARDS)}{hint}")
    defaults = {p.name: p.default for p in inspect.signature(function).parameters.values()}
    known = [key for key in list(defaults)[2:] if key not in ("device", "verdict")]
    options = {known[0] if known else "model": model} if model else {}
    for key, value in [*options.items(), *parse_qsl(query, keep_blank_values=True)]:
        if key not in known:
            raise RewardError(f"the reward {name} has no argument {key!r}; it has {', '.join(known) or 'none'}")
        try:
            options[key] = type(defaults[key])(value) if isinstance(defaults[key], int | float) else value
        except ValueError:
            raise RewardError(f"{key} of the reward {name} must be a number like {defaults[key]}, not {value!r}")
    question = options.get("question", "") if kind == "vlm" else ""
    if question.startswith("@") and not Path(question[1:]).is_file():
        raise RewardError(f"there is no file {question[1:]} with the question of the reward {name}")
    if "device" in defaults:
        options["device"] = device
    return partial(function, **options) if options else function


def check_packages(kind):
    """Raise RewardError where a package is not installed that the reward needs."""
    modules, install = PACKAGES.get(kind, ((), ""))
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise RewardError(f"the reward {kind} needs the package {module}; install it: pip install {install}")


def check_model(kind, model):
    """Raise RewardError where the part after the reward's name cannot be its model: what a look at a folder tells."""
    if kind == "vlm" and not model.startswith(("http://", "https://")):
        raise RewardError("the reward vlm needs the address of its server; write vlm:http://127.0.0.1:8000/v1")
    if kind == "vlm" or not model:
        return
    path = Path(model)
    if not path.exists():
        if model[0] in "./" or model.count("/") > 1:  # else it may be a repository
            raise RewardError(f"the reward {kind}: there is no folder {model}")
    elif kind == "aesthetic":
        find_aesthetic(model)
    elif kind in MODEL_TYPES:
        wanted = f"the reward {kind} needs a folder with a {MODEL_TYPES[kind]} model, as save_pretrained writes it"
        try:
            found = json.loads((path / "config.json").read_text("utf-8")).get("model_type")
        except (OSError, ValueError, AttributeError):
            raise RewardError(f"{wanted}; {model} has no config.json that can be read")
        if found != MODEL_TYPES[kind]:
            raise RewardError(f"{wanted}; the one in {model} is {found}")


def check_repository(name, source, file):
    """Raise RewardError where a reward's source is no path here, not in the cache, and no repository in reach."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if source is None or Path(source).exists():
        return
    try:
        if not isinstance(try_to_load_from_cache(source, file), str):
            HfApi().model_info(source, timeout=10)  # fails at once where a download would try again and again
    except Exception as error:  # of many kinds: not there, gated, no network
        reason = " ".join(str(error).split())[:200]
        raise RewardError(
            f"the reward {name} needs {source}, which is no folder here and cannot be fetched; check name and network, "
            f"and for a gated one accept its licence and log in with `hf auth login` ({reason})"
        )


def own_function(file, name):
    """The function of that name in a Python file."""
    if not Path(file).is_file():
        raise RewardError(f"there is no file {file} for the reward {file}:{name}")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise RewardError(f"the file {file} of the reward {file}:{name} cannot be run: {reason}")
    if not callable(getattr(module, name, None)):
        raise RewardError(f"the file {file} has no function {name}; it must be {name}(images, prompts) -> scores")
    return getattr(module, name)
