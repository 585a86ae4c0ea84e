"""Rewards: images and their prompts go in, one score per image comes out.

Every reward is a function `(images, prompts) -> scores`:
    images:  (B, 3, H, W) float tensor in [0, 1], on any device
    prompts: list of B strings; prompts[i] belongs to images[i]
    scores:  (B,) float32 tensor on the CPU; higher is better
Some take more arguments: `model`, a repository or folder; `device`, CUDA if available; and `batch`.
`get_reward("pickscore=0.7,ocr=0.3")` builds a reward from names. REWARDS, near the end, lists the names.
[FG] is Flow-GRPO (arXiv 2505.05470), [GE] is GenEval (arXiv 2310.11513).
"""

import ast
import base64
import difflib
import importlib.metadata
import importlib.util
import inspect
import io
import json
import math
import os
import re
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial, update_wrapper
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
import transformers  # imports each of its parts when that part is first used
from PIL import Image
from safetensors.torch import load_file


def fail(message):
    """End the run with one line."""
    raise SystemExit("error: " + " ".join(message.split()))


def to_pictures(images):
    """images: (B, 3, H, W) in [0, 1], on any device. Returns B PIL pictures, for models that resize them."""
    pixels = images.mul(255).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(array) for array in pixels.contiguous().cpu().numpy()]


def batches(images, prompts, size):
    """Yields (PIL pictures, prompts) of `size` images at a time."""
    for n in range(0, len(prompts), size):
        yield to_pictures(images[n : n + size]), prompts[n : n + size]


# -------------------------------------------------------- JPEG size [DDPO, arXiv 2305.13301, section 5.1]
def jpeg_incompressibility(images, prompts):
    """Size of the image as a JPEG of quality 95, in kilobytes (1000 bytes). Ignores prompts; no download."""
    scores = []
    for picture in to_pictures(images):
        picture.save(buffer := io.BytesIO(), "JPEG", quality=95)
        scores.append(buffer.tell() / 1000)
    return torch.tensor(scores)


def jpeg_compressibility(images, prompts):
    """Minus the size of the image as a JPEG of quality 95, in kilobytes."""
    return -jpeg_incompressibility(images, prompts)


# -------------------------------------------------------- models: loaded once, shared by rewards
LOADED = {}  # (loader's name, device, source, ...) -> (module, ...)


def loaded(load, *sources, device=None):
    """What load(*sources, device) returns, (module, ...). It is loaded once; the module is on its device."""
    device = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    key = (load.__name__, device, *sources)
    if key not in LOADED:
        try:
            LOADED[key] = load(*sources, device)
        except (ImportError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            fail(f"cannot load {sources[0]} for a reward: {type(error).__name__}: {error}")
    LOADED[key][0].to(device)
    return LOADED[key]


def frozen(model, device, on_cuda=torch.float16):
    """The model for scoring: no gradients, no dropout, on its device; float32, or `on_cuda` on CUDA."""
    dtype = on_cuda if torch.device(device).type == "cuda" else torch.float32
    return model.eval().requires_grad_(False).to(device, dtype)


def load_pretrained(kind, source, **options):
    """A model of a transformers class. ValueError if weights are missing: transformers would make them up."""
    transformers.logging.set_verbosity_error()  # its warning about missing weights becomes an error here
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = kind.from_pretrained(source, **options)
    missing = set(info["missing_keys"])
    for key in info["mismatched_keys"]:
        missing.add(key if isinstance(key, str) else key[0])  # transformers 5 adds the shapes
    missing &= {name for name, _ in model.named_parameters()}  # not buffers, such as a loss has
    if missing:
        raise ValueError(f"it has no weights for {min(missing)} and {len(missing) - 1} more")
    return model


def load_processor(kind, source):
    """An image processor that resizes with PIL; `kind` is its class in transformers 4, named ...Pil in 5."""
    kind = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
    return kind.from_pretrained(source)


def load_weights(source, name):
    """{key: tensor} of a file: either `source` itself, or the file `name` in a repository or folder."""
    path = Path(source) if Path(source).exists() else Path(huggingface_hub.hf_hub_download(source, name))
    path = path / name if path.is_dir() else path
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)


# -------------------------------------------------------- CLIP: pickscore, clipscore, aesthetic, hpsv2
CLIP = "openai/clip-vit-large-patch14"
PICKSCORE = "yuvalkirstain/PickScore_v1"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PROCESSORS = {PICKSCORE: CLIP_H}  # the CLIP that it was tuned from


def load_clip(source, device, model=None):
    """A transformers CLIPModel, or the one given: (model, tokenizer, image processor, logit scale)."""
    model = model or load_pretrained(transformers.CLIPModel, source)
    scale = model.logit_scale.exp().item()  # in full precision
    source = PROCESSORS.get(source, source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    words = model.config.text_config.vocab_size
    if not 0.9 * words <= len(tokenizer) <= words:  # transformers makes an empty one if its files are missing
        raise ValueError(f"{source} has no CLIP tokenizer: {len(tokenizer)} tokens instead of {words}")
    return frozen(model, device), tokenizer, load_processor("CLIPImageProcessor", source), scale


def normalised(features):
    """Features (N, D), scaled to length 1, in float32."""
    if not isinstance(features, torch.Tensor):
        features = features.pooler_output  # transformers 5
    return F.normalize(features.float(), dim=-1)


def embed_texts(texts, model, tokenizer):
    """Normalised CLIP embeddings (N, D) float32 of texts. A text that is too long is cut."""
    length = model.config.text_config.max_position_embeddings
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    return normalised(model.get_text_features(**inputs.to(model.device)))


def embed_pictures(pictures, model, processor):
    """Normalised CLIP embeddings (N, D) float32 of PIL pictures of any size."""
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    return normalised(model.get_image_features(pixels.to(model.device, model.dtype)))


def clipscore(images, prompts, model=CLIP, device=None, batch=16):
    """Cosine of image and prompt in CLIP, about 0.1 to 0.35 (CLIPScore, arXiv 2104.08718, unscaled)."""
    clip, tokenizer, processor, _ = loaded(load_clip, model, device=device)
    scores = []
    for pictures, texts in batches(images, prompts, batch):
        cosine = embed_pictures(pictures, clip, processor) * embed_texts(texts, clip, tokenizer)
        scores.append(cosine.sum(1).cpu())
    return torch.cat(scores)


def pickscore(images, prompts, model=PICKSCORE, device=None, batch=16):
    """PickScore v1 (arXiv 2305.01569): scaled cosine in its CLIP-H, about 20; divided by 26 as in [FG]."""
    *_, scale = loaded(load_clip, model, device=device)
    return clipscore(images, prompts, model, device, batch) * scale / 26


def load_aesthetic(source, device):
    """The aesthetic predictor, layers 0, 2, 4, 6 and 7 of 768-1024-128-64-16-1: (network,)."""
    network = torch.nn.Sequential(
        torch.nn.Linear(768, 1024), torch.nn.Dropout(0.2), torch.nn.Linear(1024, 128), torch.nn.Dropout(0.2),
        torch.nn.Linear(128, 64), torch.nn.Dropout(0.1), torch.nn.Linear(64, 16), torch.nn.Linear(16, 1),
    )  # fmt: skip
    weights = load_weights(source, "aesthetic-model.pth")
    network.load_state_dict({key.removeprefix("layers."): value for key, value in weights.items()})
    return (frozen(network, device, torch.float32),)


def aesthetic(images, prompts, model="trl-lib/ddpo-aesthetic-predictor", clip=CLIP, device=None, batch=16):
    """LAION's aesthetic predictor v2 on CLIP L/14, about 1 to 10. Ignores prompts. model: also a file."""
    (network,) = loaded(load_aesthetic, model, device=device)
    clip, _, processor, _ = loaded(load_clip, clip, device=device)
    scores = []
    for pictures, _ in batches(images, prompts, batch):
        scores.append(network(embed_pictures(pictures, clip, processor))[:, 0].cpu())
    return torch.cat(scores)


OPEN_CLIP = (  # what to replace in the names of open_clip's weights, in this order
    ("visual.proj", "visual_projection.weight"), ("text_projection", "text_projection.weight"),
    ("visual.", "vision_model."), (".conv1.", ".embeddings.patch_embedding."), (".ln_pre", ".pre_layrnorm"),
    (".class_embedding", ".embeddings.class_embedding"), (".ln_post", ".post_layernorm"),
    (".positional_embedding", ".embeddings.position_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("token_embedding", "text_model.embeddings.token_embedding"), ("ln_final", "text_model.final_layer_norm"),
    (".transformer.resblocks", ".encoder.layers"), ("transformer.resblocks", "text_model.encoder.layers"),
    (".attn.", ".self_attn."), (".ln_", ".layer_norm"), (".c_fc.", ".fc1."), (".c_proj.", ".fc2."),
)  # fmt: skip


def from_open_clip(weights):
    """Weights of a CLIP of open_clip, with the names and shapes of transformers' CLIPModel."""
    converted = {}
    for name, value in weights.items():
        for old, new in OPEN_CLIP:
            name = name.replace(old, new)
        if "in_proj_" in name:  # queries, keys and values in one matrix
            for letter, part in zip("qkv", value.chunk(3)):
                converted[name.replace("in_proj_", f"{letter}_proj.")] = part
        else:
            converted[name] = value.T if "projection" in name else value
    return converted


def load_hpsv2(source, base, device):
    """HPS_v2.1_compressed.pt, a ViT-H-14 of open_clip, as CLIPModel: what load_clip returns."""
    config = transformers.CLIPConfig.from_pretrained(base)
    config.text_config.hidden_act = config.vision_config.hidden_act = "gelu"  # OpenAI's have quick_gelu
    weights = from_open_clip(load_weights(source, "HPS_v2.1_compressed.pt")["state_dict"])
    model = load_pretrained(transformers.CLIPModel, None, config=config, state_dict=weights)
    return load_clip(base, device, model)


def pad_to_square(picture, size):
    """The whole picture, resized, in the middle of a black square of `size` pixels per side."""
    ratio = max(picture.size) / size
    width, height = (round(side / ratio) for side in picture.size)
    square = Image.new("RGB", (size, size))
    place = (size - width) // 2, (size - height) // 2
    square.paste(picture.resize((width, height), Image.Resampling.BICUBIC), place)
    return square


def hpsv2(images, prompts, model="xswu/HPSv2", base=CLIP_H, device=None, batch=16):
    """HPS v2.1 (arXiv 2306.09341): cosine in its CLIP-H, about 0.2 to 0.35, 77 tokens. model: also a file."""
    clip, tokenizer, processor, _ = loaded(load_hpsv2, model, base, device=device)
    size, scores = clip.config.vision_config.image_size, []
    for pictures, texts in batches(images, prompts, batch):
        squares = [pad_to_square(picture, size) for picture in pictures]
        cosine = embed_pictures(squares, clip, processor) * embed_texts(texts, clip, tokenizer)
        scores.append(cosine.sum(1).cpu())
    return torch.cat(scores)


# -------------------------------------------------------- hpsv3, a head on Qwen2-VL [arXiv 2508.03789]
def load_hpsv3(source, base, device):
    """HPSv3.safetensors in Qwen2-VL: (model and head, tokenizer, image processor, text around a prompt)."""
    # the texts are read from the source of the authors' package, which needs transformers 4.45 to be imported
    package = importlib.metadata.distribution("hpsv3")
    code = package.locate_file("hpsv3/dataset/data_collator_qwen.py").read_text("utf-8")
    texts = {}
    for node in ast.parse(code).body:
        if isinstance(node, ast.Assign):
            texts[node.targets[0].id] = ast.literal_eval(node.value)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base, padding_side="right")
    tokenizer.add_tokens("<|Reward|>", special_tokens=True)
    config = transformers.AutoConfig.from_pretrained(base)
    config.text_config.vocab_size = len(tokenizer)
    head = torch.nn.Sequential(
        torch.nn.Linear(config.text_config.hidden_size, 1024), torch.nn.ReLU(), torch.nn.Dropout(0.05),
        torch.nn.Linear(1024, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2),
    )  # fmt: skip
    weights = load_weights(source, "HPSv3.safetensors")
    del weights["lm_head.weight"]  # published, but not used
    of_head, of_model = {}, {}
    for name, value in weights.items():
        if name.startswith("rm_head."):
            of_head[name.removeprefix("rm_head.")] = value
        else:
            of_model[re.sub("^model[.]", "language_model.", name)] = value
    head.load_state_dict(of_head)
    model = load_pretrained(transformers.Qwen2VLModel, None, config=config, state_dict=of_model)
    # all in bfloat16, as in the authors' code, which rounds the rotary embedding's frequencies too
    model = frozen(model.to(torch.bfloat16), device, torch.bfloat16)
    both = torch.nn.ModuleList([model, frozen(head, device, torch.float32)])
    processor = load_processor("Qwen2VLImageProcessor", base)
    return both, tokenizer, processor, (texts["INSTRUCTION"], texts["prompt_with_special_token"])


def hpsv3(images, prompts, model="MizzenAI/HPSv3", base="Qwen/Qwen2-VL-7B-Instruct", device=None, batch=8):
    """HPSv3, about 0 to 15, as in the package hpsv3 1.0.0: the predicted mean. model: may also be a file."""
    (model, head), tokenizer, processor, (before, after) = loaded(load_hpsv3, model, base, device=device)
    area, scores = 256 * 28 * 28, []  # in pixels
    for pictures, texts in batches(images, prompts, batch):
        inputs = processor(pictures, size={"shortest_edge": area, "longest_edge": area}, return_tensors="pt")
        tokens = inputs["image_grid_thw"].prod(1) // processor.merge_size**2  # of each picture
        chats = []
        for text, n in zip(texts, tokens.tolist()):
            content = [{"type": "image"}, {"type": "text", "text": before.format(text_prompt=text) + after}]
            message = {"role": "user", "content": content}
            chat = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
            chats.append(chat.replace("<|image_pad|>", "<|image_pad|>" * n, 1))
        inputs.update(tokenizer(chats, padding=True, return_tensors="pt"))
        ids = inputs.to(model.device)["input_ids"]
        # the authors' code numbers all tokens one by one; Qwen2-VL would give those of a picture three axes
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape)
        hidden = model(**inputs, position_ids=positions, use_cache=False).last_hidden_state
        marked = ids == tokenizer.convert_tokens_to_ids("<|Reward|>")
        last = [row.nonzero()[-1].item() for row in marked]  # a prompt may contain one too
        scores.append(head(hidden[range(len(ids)), last].float())[:, 0].cpu())
    return torch.cat(scores)


# -------------------------------------------------------- ocr, text in pictures [FG] section 4.1
def quoted_text(prompt):
    """The text to show: the first in double quotes. A quote after a digit, 6", opens none."""
    match = re.search(r'(?<!\d)"([^"]*)"', re.sub("[“”„]", '"', prompt))
    if not match or not match[1].strip():
        raise ValueError(f'no quoted text in {prompt[:200]!r}; write: a sign that says "OPEN"')
    return match[1]


def edit_distance(a, b):
    """Levenshtein distance: the fewest insertions, deletions and substitutions that turn string a into b."""
    above = list(range(len(b) + 1))  # distances from the beginning of a, read so far, to beginnings of b
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
        above = row
    return above[-1]


def text_score(read, wanted):
    """1 - edit distance / length of `wanted`, at least 0; 1 if `read` contains it. No spaces or case [FG]."""
    read, wanted = ("".join(text.split()).lower() for text in (read, wanted))
    distance = 0 if wanted in read else edit_distance(read, wanted)
    return 1 - min(distance, len(wanted)) / len(wanted)


@cache
def load_ocr():
    """RapidOCR: PaddleOCR's models in onnxruntime, on the CPU ([FG] uses PaddleOCR itself)."""
    from rapidocr import RapidOCR

    threads = {"EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads()}
    return RapidOCR(params={"Global.log_level": "critical"} | threads)


def ocr(images, prompts):
    """Compares what RapidOCR reads in the image with the prompt's quoted text: text_score, in [0, 1]."""
    scores = []
    for picture, prompt in zip(to_pictures(images), prompts):
        lines = load_ocr()(np.asarray(picture)[:, :, ::-1]).txts or ()  # it takes BGR
        scores.append(text_score("".join(lines), quoted_text(prompt)))
    return torch.tensor(scores)


ocr.reads = quoted_text


# -------------------------------------------------------- geneval: objects, counts, colours, positions [GE]
DETECTOR = "facebook/mask2former-swin-small-coco-instance"
COCO = (  # GenEval's names of its 80 classes, in its order
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,"
    "tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,"
    "tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,"
    "hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,computer mouse,"
    "tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,"
    "scissors,teddy bear,hair drier,toothbrush"
).split(",")
GENEVAL_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
GENEVAL_NUMBERS = dict(two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10)
GENEVAL_RELATIONS = ("left of", "right of", "above", "below")
_PLURALS = {name + ending: name for name in COCO for ending in ("", "s", "es")}  # GenEval has "two knifes"
_PLURALS |= {"people": "person", "knives": "knife", "computer mice": "computer mouse"}
_OBJECT = rf"an? (?:({'|'.join(GENEVAL_COLOURS)}) )?({'|'.join(COCO)})"
_OBJECTS = re.compile(rf"a photo of {_OBJECT}(?: (and|{'|'.join(GENEVAL_RELATIONS)}) {_OBJECT})?")
_COUNTED = re.compile(rf"a photo of ({'|'.join(GENEVAL_NUMBERS)}) ({'|'.join(_PLURALS)})")

# what a prompt asks for: `count` of a class (exact: no more), of a colour, in a relation to the first Want
Want = namedtuple("Want", "name count exact colour relation", defaults=(1, False, None, None))
# an object in a picture. box: (left, top, right, bottom) in pixels; mask: (H, W) bool
Found = namedtuple("Found", "name score box mask colour", defaults=(None, None))


def parse_geneval(prompt):
    """The Wants of a prompt from GenEval's six templates. ValueError for any other prompt."""
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
            return [Want(other), Want(name, relation=relation)]  # for example the second left of the first
    raise ValueError(
        f"{prompt[:200]!r} is not a GenEval prompt; write 'a photo of two dogs', '... a red car', '... a dog "
        "and a cat', '... a red car and a blue bus' or '... a dog left of a cat', with the objects of COCO"
    )


def keep_objects(found, counting):
    """{name: [Found]} with a score over 0.3 (0.9 if counting), 16 at most per name, highest first [GE]."""
    objects = {}
    for thing in sorted(found, key=lambda thing: -thing.score):
        if thing.score > (0.9 if counting else 0.3):
            objects.setdefault(thing.name, []).append(thing)
    return {name: things[:16] for name, things in objects.items()}


def relations(a, b, margin=0.1):
    """The GENEVAL_RELATIONS that hold from box a to box b: none, one or two (e.g. above and left of) [GE]."""
    a, b = np.array(a), np.array(b)  # left, top, right, bottom
    offset = (a[:2] + a[2:] - b[:2] - b[2:]) / 2  # from the centre of b to that of a
    sizes = (a[2:] - a[:2]) + (b[2:] - b[:2])
    beyond = np.sign(offset) * np.maximum(abs(offset) - margin * sizes, 0)  # must be over half of the offset
    if max(abs(beyond)) < 1e-3:
        return set()
    x, y = beyond / np.hypot(*offset)
    return {r for r, holds in zip(GENEVAL_RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5)) if holds}


def judge(wants, objects):
    """GenEval's verdict on objects (keep_objects), 1.0 or 0.0, by the `count` objects of highest score."""
    firsts = objects.get(wants[0].name, [])[: wants[0].count]
    for want in wants:
        things = objects.get(want.name, [])
        if len(things) < want.count or (want.exact and len(things) > want.count):
            return 0.0
        things = things[: want.count]
        if want.colour and any(thing.colour != want.colour for thing in things):
            return 0.0
        related = all(want.relation in relations(a.box, b.box) for a in things for b in firsts)
        if want.relation and not related:
            return 0.0
    return 1.0


def judge_graded(wants, objects):
    """The graded reward that [FG] trains on, at most 1: the mean over parts; each Want has one or two.

    The number of objects, or of those of the colour, earns 1 - |found - wanted| / wanted, position 0 or 1.
    Colour and position earn 0 if there are too many or too few. ([FG] gives 0.75 for a wrong position only.)
    """
    parts = []
    firsts = objects.get(wants[0].name, [])
    for want in wants:
        things = objects.get(want.name, [])
        parts.append(1 - abs(len(things) - want.count) / want.count)
        right = len(things) == want.count
        if want.colour:
            hits = sum(thing.colour == want.colour for thing in things)
            parts.append(1 - abs(hits - want.count) / want.count if right else 0.0)
        if want.relation:
            related = all(want.relation in relations(a.box, b.box) for a in things for b in firsts)
            parts.append(float(right and related and len(firsts) == wants[0].count))
    return sum(parts) / len(parts)


def load_detector(source, device):
    """A Mask2Former for COCO's 80 classes: (model, image processor)."""
    model = load_pretrained(transformers.Mask2FormerForUniversalSegmentation, source)
    if model.config.num_labels != len(COCO):
        raise ValueError(f"it has {model.config.num_labels} classes instead of COCO's {len(COCO)}")
    processor = load_processor("Mask2FormerImageProcessor", source)
    return frozen(model, device, torch.float32), processor  # GenEval's thresholds are for full precision


def instances(class_logits, mask_logits, size, threshold=0.3, limit=100):
    """The objects in a picture of size (H, W), as in mmdet's Mask2Former, which GenEval uses.

    class_logits: (Q, 81), the last for no object; mask_logits: (Q, h, w), resized once (twice in mmdet).
    """
    probability = class_logits.float().softmax(-1)[:, :-1]
    top, index = probability.flatten().topk(min(limit, probability.numel()))
    found = []
    for p, i in zip(top[top > threshold].tolist(), index.tolist()):  # p is at least the score
        query, label = divmod(i, probability.shape[1])
        logits = F.interpolate(mask_logits[query, None, None].float(), size, mode="bilinear")[0, 0].cpu()
        mask = logits > 0
        box = Image.fromarray(mask.numpy()).getbbox()  # None for an empty mask
        if box and (score := p * logits.sigmoid()[mask].mean().item()) > threshold:
            found.append(Found(COCO[label], score, box, mask))
    return found


def find_colours(picture, things, clip, tokenizer, processor, _):
    """Adds colours to things of a class: CLIP compares each, on grey (#999), with 3 sentences per colour."""
    kinds = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
    sentences = [kind.format(colour, things[0].name) for colour in GENEVAL_COLOURS for kind in kinds]
    texts = embed_texts(sentences, clip, tokenizer).view(len(GENEVAL_COLOURS), 3, -1).mean(1)
    grey = Image.new("RGB", picture.size, "#999")
    cut = [Image.composite(picture, grey, Image.fromarray(t.mask.numpy())).crop(t.box) for t in things]
    best = (embed_pictures(cut, clip, processor) @ F.normalize(texts, dim=1).T).argmax(1)
    return [thing._replace(colour=GENEVAL_COLOURS[n]) for thing, n in zip(things, best.tolist())]


def geneval(images, prompts, model=DETECTOR, clip=CLIP, size=800, device=None, batch=8, verdict=judge):
    """GenEval: 1.0 if the image shows the objects, number, colours and positions of its prompt, else 0.0.

    Mask2Former with Swin-S finds objects (GenEval has the same network, trained by mmdet), CLIP L/14 colours.
    size: pixels of the shorter side; 800 as in mmdet, whereas the repository's own default is 384.
    """
    detector, processor = loaded(load_detector, model, device=device)
    clip = loaded(load_clip, clip, device=device)
    edges = {"shortest_edge": size, "longest_edge": size * 1333 // 800}
    scores = []
    for pictures, texts in batches(images, prompts, batch):
        with ThreadPoolExecutor() as pool:  # PIL lets other threads run while it resizes
            inputs = pool.map(lambda picture: processor(picture, size=edges, return_tensors="pt"), pictures)
            pixels = torch.cat([each["pixel_values"] for each in inputs])
        outputs = detector(pixels.to(detector.device))
        outputs = outputs.class_queries_logits, outputs.masks_queries_logits
        for picture, text, class_logits, mask_logits in zip(pictures, texts, *outputs):
            wants = parse_geneval(text)
            found = instances(class_logits, mask_logits, picture.size[::-1])
            objects = keep_objects(found, any(want.exact for want in wants))
            for want in wants:
                things = objects.get(want.name, [])
                if want.colour and things:
                    coloured = find_colours(picture, things[: want.count], *clip)
                    objects[want.name] = coloured + things[want.count :]
            scores.append(verdict(wants, objects))
    return torch.tensor(scores)


geneval_graded = partial(geneval, verdict=judge_graded)  # by degrees, as [FG] trains on it
geneval.reads = geneval_graded.reads = parse_geneval


# -------------------------------------------------------- vlm, a vision-language model behind a server
QUESTION = (
    'This picture was made for the text: "{prompt}". How well does it show what the text says, and how good '
    'does it look? Answer from 0 (not at all) to 10 (perfect), as JSON: {"score": number}'
)
ANSWER = dict(type="object", properties={"score": {"type": "number"}}, required=["score"])
ANSWER["additionalProperties"] = False
FORMAT = {"type": "json_schema", "json_schema": {"name": "score", "schema": ANSWER, "strict": True}}
RETRIES = 5  # of a request that fails: about 15 seconds


def read_score(answer, scale):
    """The score from 0 to scale in a server's answer, or None: a refusal, other JSON, another number."""
    try:
        score = json.loads(answer.choices[0].message.content)["score"]
    except (AttributeError, LookupError, TypeError, ValueError):
        return None
    return score if type(score) in (int, float) and 0 <= score <= scale else None


def fill_in(scores, prompts):
    """Replace each None by the mean of its prompt's other scores (0 if none): its advantage is then 0."""
    known = {prompt: [] for prompt in prompts}
    for score, prompt in zip(scores, prompts):
        if score is not None:
            known[prompt].append(score)
    means = {prompt: sum(values) / max(len(values), 1) for prompt, values in known.items()}
    return [means[prompt] if score is None else score for score, prompt in zip(scores, prompts)]


def vlm(images, prompts, url, model=None, question=QUESTION, scale=10.0, timeout=120.0, workers=16):
    """A vision-language model's score of image and prompt, divided by scale: in [0, 1].

    url: an OpenAI-compatible server (vLLM, SGLang), as http://127.0.0.1:8000/v1; its key: VLM_API_KEY in the
    environment; model: its name there (default: the first one); question: contains {prompt}; scale: the
    highest score; timeout: seconds for an answer; workers: requests at a time. If an answer has no score, the
    server is asked once more. If that has none either, the image gets the mean of its prompt's others.
    """
    import openai

    key = os.environ.get("VLM_API_KEY", "none")
    client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=RETRIES)

    def ask(picture, prompt):
        """(score or None, the server's answer) for one picture."""
        picture.save(buffer := io.BytesIO(), "PNG")
        data = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        text = {"type": "text", "text": question.replace("{prompt}", prompt)}
        content = [{"type": "image_url", "image_url": {"url": data}}, text]
        body = {"model": model, "messages": [{"role": "user", "content": content}], "response_format": FORMAT}
        for temperature in (0.0, 1.0):
            answer = client.chat.completions.create(**body, temperature=temperature)
            score = read_score(answer, scale)
            if score is not None:
                break
        return score, answer

    try:
        with client, ThreadPoolExecutor(workers) as pool:
            model = model or client.models.list().data[0].id
            answers = list(pool.map(ask, to_pictures(images), prompts))
    except (openai.OpenAIError, json.JSONDecodeError) as error:
        fail(f"the server {url} gave no answer: {error} {error.__cause__ or ''}")
    scores = [score for score, _ in answers]
    count = scores.count(None)
    if count == len(scores):
        fail(f"no answer of {url} has a score from 0 to {scale:g}; the last one: {str(answers[-1][1])[:500]}")
    if count:
        print(f"vlm: no score for {count} of {len(scores)} images; each gets its prompt's mean of the others")
    return torch.tensor([score / scale for score in fill_in(scores, prompts)])


# -------------------------------------------------------- names and weighted sums
# A reward may have an attribute `reads`, a function that raises ValueError for a prompt that it cannot score.
INSTALL = dict(hpsv3="--no-deps hpsv3", openai="openai", rapidocr="rapidocr onnxruntime")  # module: for pip
REWARDS = dict(
    shapes=f"{Path(__file__).resolve().parent}/tests/tiny/shapes.py:shapes", pickscore=pickscore,
    jpeg_compressibility=jpeg_compressibility, jpeg_incompressibility=jpeg_incompressibility,
    clipscore=clipscore, aesthetic=aesthetic, hpsv2=hpsv2, hpsv3=hpsv3, ocr=ocr, geneval=geneval,
    geneval_graded=geneval_graded, vlm=vlm,
)  # fmt: skip
GRAMMAR = f"a path cannot contain '=' or a comma; the names are {', '.join(REWARDS)}"


class Reward:
    """(images, prompts) -> (weighted sum (B,), {name: raw scores (B,)}). offload: models rest on the CPU."""

    def __init__(self, functions, weights, device=None, offload=False):
        self.functions, self.weights = functions, weights  # {name: function}, {name: number}
        self.device, self.offload = device, offload

    def load(self, prompts):
        """Check that all prompts can be read, load all models, and try them on two pictures of noise."""
        for name, function in self.functions.items():
            if hasattr(function, "reads"):
                try:
                    for prompt in prompts:
                        function.reads(prompt)
                except ValueError as error:
                    fail(f"the reward {name} cannot read a prompt: {error}")
        self(self.noise(2, 512), (prompts * 2)[:2])

    def noise(self, count, size):
        return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)).to(self.device)

    @torch.no_grad()
    def __call__(self, images, prompts):
        for image, prompt in zip(images, prompts):
            if not image.isfinite().all():  # most rewards would score it as black
                fail(f"the image for {prompt[:200]!r} is not finite")
        parts = {name: self.score(name, images, prompts) for name in self.functions}
        return sum(self.weights[name] * scores for name, scores in parts.items()), parts

    def score(self, name, images, prompts):
        """The scores (B,) of one part."""
        which = f"{len(prompts)} images, the first for {prompts[0][:200]!r}"
        try:
            scores = self.functions[name](images.clone(), list(prompts))  # its own copies, to change
            scores = torch.as_tensor(scores).detach().float().cpu()
        except Exception as error:
            error.add_note(f"in the reward {name}, with {which}")
            if isinstance(error, ImportError) and error.name in INSTALL:
                error.add_note(f"pip install {INSTALL[error.name]}")
            raise
        if scores.shape != (len(prompts),):
            fail(f"the reward {name} gave scores of shape {tuple(scores.shape)} for {which}")
        for score, prompt in zip(scores.tolist(), prompts):
            if not math.isfinite(score):
                fail(f"the reward {name} gave {score} for {prompt[:200]!r}")
        if self.offload:
            for module, *_ in LOADED.values():
                module.to("cpu")
        return scores

    def self_check(self, prompts, parts, size):
        """Print a line per part of this reward: the scores of images (in parts) beside those of noise."""
        _, noise_parts = self(self.noise(4, size), (prompts * 4)[:4])
        for name in self.functions:
            images, noise = parts[name], noise_parts[name].mean()
            result = "the images score higher" if images.mean() > noise else "the images do not score higher"
            if len(images) > 1 and images.unique().numel() == 1:
                result = "all images score the same, and equal scores teach nothing"
            print(f"reward {name}: {images.mean():.4g} for images, {noise:.4g} for noise; {result}")


@cache
def import_file(file):
    """The module of a Python file, which can import what is beside it.

    New processes can import it too, unless it is named like another module, such as rewards.py.
    """
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # last: a file of yours named random.py must not hide Python's
    name = file.stem
    spec = importlib.util.find_spec(name) if "." not in name else None
    if spec and spec.origin == str(file):
        return importlib.import_module(name)
    name = re.sub(r"\W", "_", str(file))
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def find_in_file(name):
    """The function of FILE.py:FUNCTION."""
    file, _, attribute = name.rpartition(":")  # the last colon: C:\my_file.py has one too
    file = Path(os.path.expanduser(file)).resolve()
    if file.suffix != ".py" or not os.path.isfile(file):  # Path.is_file may raise for a long name
        similar = difflib.get_close_matches(name.partition(":")[0], REWARDS, n=1)
        if similar and file.suffix != ".py":
            fail(f"there is no reward {name!r}; did you mean {similar[0]!r}?")
        fail(f"there is no reward and no FILE.py:FUNCTION {name!r}; {GRAMMAR}")
    function = getattr(import_file(file), attribute, None)
    if not callable(function):
        fail(f"there is no function {attribute} in {file}")
    return function


def find_bundled(name, model, device):
    """The function of NAME or NAME:MODEL, with its model and device set."""
    function = REWARDS[name] if callable(REWARDS[name]) else find_in_file(REWARDS[name])
    arguments = list(inspect.signature(function).parameters)[2:]  # after images and prompts
    if model and not arguments:
        fail(f"the reward {name} takes no model; write {name} instead of {name}:{model}")
    if function is vlm and not model:
        fail("the reward vlm needs a server; write vlm:URL")
    options = {}
    if model:
        options[arguments[0]] = os.path.expanduser(model)
    if "device" in arguments:
        options["device"] = device
    return update_wrapper(partial(function, **options), function)  # which keeps its attribute `reads`


def get_reward(spec, device=None, offload=False):
    """A Reward from a name or a weighted sum, "pickscore=0.7,my_file.py:my_function=0.3". Loads no model."""
    functions, weights = {}, {}
    for part in spec.split(","):
        text, equals, number = part.strip().partition("=")
        try:
            weight = float(number) if equals else 1.0
        except ValueError:
            weight = math.nan
        if not text or not 0 < abs(weight) < 1e9:
            fail(f"{part!r} has no name, or its weight is 0 or not a number; {GRAMMAR}")
        name, _, model = text.partition(":")
        if name in REWARDS:
            function, name = find_bundled(name, model, device), text
        else:
            function, name = find_in_file(text), Path(text).name  # without the file's folder
        if name in weights:
            fail(f"two parts of the reward are named {name!r}")
        functions[name], weights[name] = function, weight
    return Reward(functions, weights, device, offload)
