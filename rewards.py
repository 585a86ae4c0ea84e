"""Rewards: images and their prompts go in, one score per image comes out.

Every reward is a function `(images, prompts) -> scores`:
    images:  (B, 3, H, W) float tensor in [0, 1], on any device
    prompts: list of B strings; prompts[i] belongs to images[i]
    scores:  (B,) float32 tensor on the CPU; higher is better
Some take more arguments: `model`, a repository or folder; `device`, CUDA if available; and `batch`.
`get_reward("pickscore=0.7,ocr=0.3")` builds a reward from names, which REWARDS, near the end, lists.
[FG] is Flow-GRPO (arXiv 2505.05470), [GE] is GenEval (arXiv 2310.11513).
"""

import ast
import base64
import importlib.util
import inspect
import io
import json
import os
import re
import runpy
import sys
import time
import urllib.error
import urllib.request
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial, wraps
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
import transformers  # imports each of its parts when that part is first used
from PIL import Image
from safetensors.torch import load_file


def to_pictures(images):
    """images: (B, 3, H, W) in [0, 1], on any device. Returns B PIL pictures, for models that resize them."""
    pixels = images.mul(255).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(array) for array in pixels.contiguous().cpu().numpy()]


def in_threads(function, *items, threads=None):
    """[*map(function, *items)], computed in threads: PIL lets other threads run while it resizes."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, *items))


def in_batches(score, size):
    """Makes a reward of (PIL pictures, prompts, ...) -> scores, for `batch` pictures at a time."""

    @wraps(score)
    def reward(images, prompts, *args, batch=size, **kwargs):
        parts = [slice(n, n + batch) for n in range(0, len(prompts), batch)]
        scores = [score(to_pictures(images[part]), prompts[part], *args, **kwargs) for part in parts]
        return torch.cat([torch.as_tensor(part, dtype=torch.float32, device="cpu") for part in scores])

    return reward


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
    """What load(*sources, device) returns, (module, ...): loaded once, and moved to its device."""
    device = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    key = (load.__name__, device, *sources)
    if key not in LOADED:
        LOADED[key] = load(*sources, device)
    LOADED[key][0].to(device)
    return LOADED[key]


def frozen(model, device, half=torch.float16):
    """The model for scoring: no gradients, no dropout, on its device, in half precision on CUDA."""
    cuda = torch.device(device).type == "cuda"
    return model.eval().requires_grad_(False).to(device, half if cuda else torch.float32)


def load_pretrained(kind, source, **options):
    """A model of a transformers class. ValueError if weights are missing: transformers would make them up."""
    transformers.logging.set_verbosity_error()  # its warning about missing weights becomes an error here
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = kind.from_pretrained(source, **options)
    lacking = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if lacking := lacking & dict(model.named_parameters()).keys():  # not buffers, such as a loss has
        raise ValueError(f"{source} has no weights for {min(lacking)} and {len(lacking) - 1} more")
    return model


def load_weights(source, name):
    """{key: tensor} of a file: either `source` itself, or the file `name` in a repository or folder."""
    path = Path(source) if Path(source).exists() else Path(huggingface_hub.hf_hub_download(source, name))
    path = path / name if path.is_dir() else path
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)


# -------------------------------------------------------- CLIP: pickscore, clipscore, aesthetic, hpsv2
CLIP = "openai/clip-vit-large-patch14"
PICKSCORE = "yuvalkirstain/PickScore_v1"
PROCESSORS = {PICKSCORE: "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}  # of the CLIP that it was tuned from


def load_clip(source, device):
    """A transformers CLIPModel: (model, tokenizer, image processor, logit scale)."""
    model = load_pretrained(transformers.CLIPModel, source)
    scale = model.logit_scale.exp().item()  # in full precision
    source = PROCESSORS.get(source, source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    words = model.config.text_config.vocab_size
    if not 0.9 * words <= len(tokenizer) <= words:  # transformers makes an empty one if its files are missing
        raise ValueError(f"{source} has no CLIP tokenizer: {len(tokenizer)} tokens instead of {words}")
    processor = transformers.CLIPImageProcessorPil.from_pretrained(source)
    return frozen(model, device), tokenizer, processor, scale


def embed_texts(texts, model, tokenizer):
    """Normalised CLIP embeddings (N, D) float32 of texts. A text that is too long is cut."""
    length = model.config.text_config.max_position_embeddings
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    embedding = model.get_text_features(**inputs.to(model.device)).pooler_output
    return F.normalize(embedding.float(), dim=-1)


def embed_pictures(pictures, model, processor):
    """Normalised CLIP embeddings (N, D) float32 of PIL pictures of any size."""
    pixels = in_threads(lambda picture: processor(picture, return_tensors="pt")["pixel_values"], pictures)
    embedding = model.get_image_features(torch.cat(pixels).to(model.device, model.dtype)).pooler_output
    return F.normalize(embedding.float(), dim=-1)


@partial(in_batches, size=16)
def clipscore(pictures, prompts, model=CLIP, device=None):
    """Cosine of image and prompt in CLIP, about 0.1 to 0.35 (CLIPScore, arXiv 2104.08718, unscaled)."""
    clip, tokenizer, processor, _ = loaded(load_clip, model, device=device)
    return (embed_pictures(pictures, clip, processor) * embed_texts(prompts, clip, tokenizer)).sum(1)


def pickscore(images, prompts, model=PICKSCORE, device=None, batch=16):
    """PickScore v1 (arXiv 2305.01569): scaled cosine in its CLIP-H, about 20; divided by 26 as in [FG]."""
    *_, scale = loaded(load_clip, model, device=device)
    return clipscore(images, prompts, model, device, batch=batch) * scale / 26


def load_aesthetic(source, device):
    """The aesthetic predictor, layers 0, 2, 4, 6 and 7 of 768-1024-128-64-16-1: (network,)."""
    network = torch.nn.Sequential(
        torch.nn.Linear(768, 1024), torch.nn.Dropout(0.2), torch.nn.Linear(1024, 128), torch.nn.Dropout(0.2),
        torch.nn.Linear(128, 64), torch.nn.Dropout(0.1), torch.nn.Linear(64, 16), torch.nn.Linear(16, 1),
    )  # fmt: skip
    weights = load_weights(source, "aesthetic-model.pth")
    network.load_state_dict({key.removeprefix("layers."): value for key, value in weights.items()})
    return (frozen(network, device, torch.float32),)


@partial(in_batches, size=16)
def aesthetic(pictures, prompts, model="trl-lib/ddpo-aesthetic-predictor", clip=CLIP, device=None):
    """LAION's aesthetic predictor v2 on CLIP L/14, about 1 to 10. Ignores prompts. model: also a file."""
    (network,) = loaded(load_aesthetic, model, device=device)
    clip, _, processor, _ = loaded(load_clip, clip, device=device)
    return network(embed_pictures(pictures, clip, processor))[:, 0]


def load_hpsv2(source, device):
    """HPS_v2.1_compressed.pt in open_clip's ViT-H-14: (model, image transform, tokenizer)."""
    import open_clip  # HPSv2's own package needs old versions of other packages

    weights = load_weights(source, "HPS_v2.1_compressed.pt")["state_dict"]
    # "longest", as HPSv2 does: pictures that are not square are padded, not cropped
    model, _, transform = open_clip.create_model_and_transforms("ViT-H-14", image_resize_mode="longest")
    model.load_state_dict(weights)
    return frozen(model, device), transform, open_clip.get_tokenizer("ViT-H-14")


@partial(in_batches, size=16)
def hpsv2(pictures, prompts, model="xswu/HPSv2", device=None):
    """HPS v2.1 (arXiv 2306.09341): cosine in its CLIP-H, about 0.2 to 0.35, 77 tokens. model: also a file."""
    clip, transform, tokenizer = loaded(load_hpsv2, model, device=device)
    pixels = torch.stack(in_threads(transform, pictures)).to(clip.logit_scale)
    image = clip.encode_image(pixels, normalize=True).float()
    return (image * clip.encode_text(tokenizer(prompts).to(pixels.device), normalize=True).float()).sum(1)


# -------------------------------------------------------- hpsv3, a head on Qwen2-VL [arXiv 2508.03789]
def load_hpsv3(source, base, device):
    """HPSv3.safetensors in Qwen2-VL: (model and head, tokenizer, image processor, text around a prompt)."""
    # the texts are read from the source of the authors' package, which needs transformers 4.45 to be imported
    (package,) = importlib.util.find_spec("hpsv3").submodule_search_locations
    code = ast.parse(Path(package, "dataset", "data_collator_qwen.py").read_text("utf-8"))
    texts = {n.targets[0].id: ast.literal_eval(n.value) for n in code.body if isinstance(n, ast.Assign)}
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
    of_head = [name for name in weights if name.startswith("rm_head.")]
    head.load_state_dict({name.removeprefix("rm_head."): weights.pop(name) for name in of_head})
    weights = {re.sub("^model[.]", "language_model.", name): value for name, value in weights.items()}
    model = load_pretrained(transformers.Qwen2VLModel, None, config=config, state_dict=weights)
    # all in bfloat16, as in the authors' code, which rounds the rotary embedding's frequencies too
    model = frozen(model.to(torch.bfloat16), device, torch.bfloat16)
    both = torch.nn.ModuleList([model, frozen(head, device, torch.float32)])
    processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(base)
    return both, tokenizer, processor, (texts["INSTRUCTION"], texts["prompt_with_special_token"])


@partial(in_batches, size=8)
def hpsv3(pictures, prompts, model="MizzenAI/HPSv3", base="Qwen/Qwen2-VL-7B-Instruct", device=None):
    """HPSv3, about 0 to 15, as in the package hpsv3 1.0.0: the predicted mean. model: may also be a file."""
    (model, head), tokenizer, processor, (before, after) = loaded(load_hpsv3, model, base, device=device)
    area = 256 * 28 * 28  # pixels
    inputs = processor(pictures, size={"shortest_edge": area, "longest_edge": area}, return_tensors="pt")
    texts = [{"type": "text", "text": before.format(text_prompt=prompt) + after} for prompt in prompts]
    messages = [[{"role": "user", "content": [{"type": "image"}, text]}] for text in texts]
    chats = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    sizes = inputs["image_grid_thw"].prod(1) // processor.merge_size**2  # tokens of each picture
    chats = [c.replace("<|image_pad|>", "<|image_pad|>" * n, 1) for c, n in zip(chats, sizes.tolist())]
    inputs.update(tokenizer(chats, padding=True, return_tensors="pt"))
    ids = inputs.to(model.device)["input_ids"]
    # the authors' code numbers all tokens one by one, whereas Qwen2-VL gives those of a picture three axes
    positions = torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape)
    hidden = model(**inputs, position_ids=positions, use_cache=False).last_hidden_state
    marked = ids == tokenizer.convert_tokens_to_ids("<|Reward|>")  # the last one: a prompt may contain it too
    return head(hidden[range(len(ids)), marked.cumsum(1).argmax(1)].float())[:, 0]


# -------------------------------------------------------- ocr, text in pictures [FG] section 4.1
def quoted_text(prompt):
    """The text to show: the first in double quotes. A quote after a digit, 6", opens none."""
    match = re.search(r'(?<!\d)"([^"]*)"', re.sub("[“”„]", '"', prompt))
    if not match or not match[1].strip():
        raise ValueError(f'no quoted text in {prompt[:200]!r}; write: a sign that says "OPEN"')
    return match[1]


def edit_distance(a, b):
    """Levenshtein distance: the fewest insertions, deletions and substitutions that turn string a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


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
GENEVAL_NUMBERS = dict(zip("two three four five six seven eight nine ten".split(), range(2, 11)))
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
            return [Want(other), Want(name, relation=relation)]  # the second is left of the first, say
    raise ValueError(
        f"{prompt[:200]!r} is not of GenEval; write 'a photo of two dogs', '... a red car', '... a dog and "
        "a cat', '... a red car and a blue bus' or '... a dog left of a cat', with the objects of COCO"
    )


def keep_objects(found, counting):
    """{name: [Found]} with a score over 0.3 (0.9 if counting), 16 at most per name, highest first [GE]."""
    sure = sorted((f for f in found if f.score > (0.9 if counting else 0.3)), key=lambda f: -f.score)
    return {thing.name: [other for other in sure if other.name == thing.name][:16] for thing in sure}


def relations(a, b, margin=0.1):
    """The GENEVAL_RELATIONS that hold from box a to box b: none, one or two (above and left of, say) [GE]."""
    (a_from, a_to), (b_from, b_to) = np.reshape(a, (2, 2)), np.reshape(b, (2, 2))
    offset, sizes = (a_from + a_to - b_from - b_to) / 2, abs(a_to - a_from) + abs(b_to - b_from)
    beyond = np.sign(offset) * np.maximum(abs(offset) - margin * sizes, 0)  # must be over half of the offset
    if max(abs(beyond)) < 1e-3:
        return set()
    x, y = beyond / np.hypot(*offset)
    return {r for r, holds in zip(GENEVAL_RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5)) if holds}


def judge(wants, objects):
    """GenEval's verdict on objects (keep_objects), 1.0 or 0.0, by the `count` objects of highest score."""
    for want in wants:
        things, firsts = objects.get(want.name, []), objects.get(wants[0].name, [])[: wants[0].count]
        right = len(things) == want.count if want.exact else len(things) >= want.count
        things = things[: want.count]
        right &= not want.colour or all(thing.colour == want.colour for thing in things)
        related = all(want.relation in relations(a.box, b.box) for a in things for b in firsts)
        right &= not want.relation or related
        if not right:
            return 0.0
    return 1.0


def judge_graded(wants, objects):
    """The graded reward that [FG] trains on, at most 1: the mean over parts; each Want has one or two.

    The number of objects, or of those of the colour, earns 1 - |found - wanted| / wanted, position 0 or 1.
    Colour and position earn 0 if there are too many or too few. ([FG] gives 0.75 for a wrong position only.)
    """
    parts = []
    for want in wants:
        things, firsts = objects.get(want.name, []), objects.get(wants[0].name, [])
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
        raise ValueError(f"{source} has {model.config.num_labels} classes instead of COCO's {len(COCO)}")
    processor = transformers.Mask2FormerImageProcessorPil.from_pretrained(source)
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


@partial(in_batches, size=8)
def geneval(pictures, prompts, model=DETECTOR, clip=CLIP, size=800, device=None, verdict=judge):
    """GenEval: 1.0 if the image shows the objects, number, colours and positions of its prompt, else 0.0.

    Mask2Former with Swin-S finds objects (GenEval has the same network, trained by mmdet), CLIP L/14 colours.
    size: pixels of the shorter side; 800 as in mmdet, whereas the repository's own default is 384.
    """
    detector, processor = loaded(load_detector, model, device=device)
    clip = loaded(load_clip, clip, device=device)
    options = {"size": {"shortest_edge": size, "longest_edge": size * 1333 // 800}, "return_tensors": "pt"}
    pixels = in_threads(lambda picture: processor(picture, **options)["pixel_values"], pictures)
    outputs = detector(torch.cat(pixels).to(detector.device))
    outputs = outputs.class_queries_logits, outputs.masks_queries_logits
    scores = []
    for picture, prompt, classes, masks in zip(pictures, prompts, *outputs):
        wants = parse_geneval(prompt)
        found = instances(classes, masks, picture.size[::-1])
        objects = keep_objects(found, any(want.exact for want in wants))
        for want in wants:
            things = objects.get(want.name, [])
            if want.colour and things:
                coloured = find_colours(picture, things[: want.count], *clip)
                objects[want.name] = coloured + things[want.count :]
        scores.append(verdict(wants, objects))
    return scores


# -------------------------------------------------------- vlm, a vision-language model behind a server
QUESTION = (
    'This picture was made for the text: "{prompt}". How well does it show what the text says, and how good '
    "does it look? Give one number from 0 (not at all) to 10 (perfect). Answer with a last line "
    "'Score: NUMBER', nothing after."
)


def ask_server(url, timeout, body=None):
    """The server's JSON answer to a request (a POST if there is a body)."""
    key = os.environ.get("VLM_API_KEY", "none")
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, body and json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{error}: {error.read().decode('utf-8', 'replace')}") from error


@cache
def first_model(url, timeout):
    """The name of a server's first model, asked for once per run."""
    return ask_server(f"{url}/models", timeout)["data"][0]["id"]


def read_score(answer, scale=10.0):
    """The number after "score" in the last line with one, else the only number in the answer, else None."""
    answer = re.sub(rf"\s*(?:/|out of)\s*{scale:g}\b", "", answer)
    number = r"(?<![\d.,–−-])(\d+(?:[.,]\d+)?)(?![.,]?\d|\s*[–-]\s*\d)"  # no part of a range
    marked = re.findall(rf"(?im)^.*?score(?:[^\w\n]|\([^)\n]*\)|is\b|of\b)*{number}", answer)
    values = [float(value.replace(",", ".")) for value in marked[-1:] or re.findall(number, answer)]
    return values[0] if len(values) == 1 and values[0] <= scale else None


def vlm(images, prompts, url, model=None, question=QUESTION, scale=10.0, timeout=120.0, workers=16):
    """A vision-language model's score of image and prompt, divided by scale: in [0, 1].

    url: an OpenAI-compatible server (vLLM, SGLang), as http://127.0.0.1:8000/v1; its key: VLM_API_KEY in the
    environment; model: its name there (default: the first one); question: contains {prompt}; scale: the
    highest score; timeout: seconds for an answer. If an answer has no score, the server is asked again.
    """
    url = url.rstrip("/")
    model = model or first_model(url, timeout)

    def ask(picture, prompt):
        picture.save(buffer := io.BytesIO(), "PNG")
        image = {"url": f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"}
        text = {"type": "text", "text": question.replace("{prompt}", prompt)}
        messages = [{"role": "user", "content": [{"type": "image_url", "image_url": image}, text]}]
        body = {"model": model, "messages": messages, "temperature": 0.0}
        for wait in (1, 5, 25, 0):
            try:
                answer = ask_server(f"{url}/chat/completions", timeout, body)
                if (score := read_score(answer["choices"][0]["message"]["content"] or "", scale)) is not None:
                    return score / scale
                body["temperature"] = 1.0  # for another answer
            except Exception as error:
                answer = error
            time.sleep(wait)
        raise RuntimeError(f"no score from 0 to {scale:g} for {prompt[:200]!r} from {url}, but {answer!r}")

    return torch.tensor(in_threads(ask, to_pictures(images), prompts, threads=workers))


# -------------------------------------------------------- names and weighted sums
# function: may also be FILE.py:FUNCTION; package: what it imports, and `install`: what pip installs for it;
# reads(prompt): raises ValueError for a prompt that it cannot score (an attribute of functions of your own)
Entry = namedtuple("Entry", "function package install reads", defaults=("", "", None))
REWARDS = {
    "shapes": Entry(f"{Path(__file__).resolve().parent}/tests/tiny/shapes.py:shapes"),
    "jpeg_compressibility": Entry(jpeg_compressibility),
    "jpeg_incompressibility": Entry(jpeg_incompressibility),
    "pickscore": Entry(pickscore),
    "clipscore": Entry(clipscore),
    "aesthetic": Entry(aesthetic),
    "hpsv2": Entry(hpsv2, "open_clip", "open_clip_torch"),
    "hpsv3": Entry(hpsv3, "hpsv3", "--no-deps hpsv3"),
    "ocr": Entry(ocr, "rapidocr", "rapidocr onnxruntime", quoted_text),
    "geneval": Entry(geneval, "scipy", "scipy", parse_geneval),
    "geneval_graded": Entry(partial(geneval, verdict=judge_graded), "scipy", "scipy", parse_geneval),
    "vlm": Entry(vlm),
}
GRAMMAR = f"a path cannot contain '=' or a comma; the names are {', '.join(REWARDS)}"


def stop(problem, error):
    """End the run with a problem and the exception that caused it, on one line."""
    raise SystemExit(" ".join(f"error: {problem}: {type(error).__name__}: {error}".split())) from error


class Reward:
    """(images, prompts) -> (weighted sum (B,), {name: raw scores (B,)}). offload: models rest on the CPU."""

    def __init__(self, parts, device=None, offload=False):
        self.parts, self.device, self.offload = parts, device, offload

    def load(self, prompts):
        """Check that all prompts can be read, load all models, and try them on two pictures of noise."""
        for name, (_, reads, _) in self.parts.items():
            for prompt in prompts if reads else ():
                try:
                    reads(prompt)
                except Exception as error:
                    stop(f"the reward {name} cannot read a prompt", error)
        self(self.noise(2, 512), (prompts * 2)[:2])

    def noise(self, count, size):
        return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)).to(self.device)

    @torch.no_grad()
    def __call__(self, images, prompts):
        broken = (~images.isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist()
        if broken:  # most rewards would score them as black
            raise SystemExit(f"error: the image for {prompts[broken[0]][:200]!r} is not finite")
        scored, first = {}, f"on {len(prompts)} images, the first for {prompts[0][:200]!r}"
        for name, (function, _, _) in self.parts.items():
            try:
                scores = function(images.clone(), list(prompts))  # its own copies, which it may change
                scores = torch.as_tensor(scores).detach().float().cpu()
                if scores.shape != (len(prompts),):
                    raise ValueError(f"scores of shape {tuple(scores.shape)}, and not one per image")
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                stop(f"the reward {name} failed {first}", error)
            for score, prompt in zip(scores, prompts):
                if not score.isfinite():
                    raise SystemExit(f"error: the reward {name} gave {score} for {prompt[:200]!r}")
            scored[name] = scores
            for module, *_ in LOADED.values() if self.offload else ():
                module.to("cpu")
        return sum(weight * scored[name] for name, (_, _, weight) in self.parts.items()), scored

    def self_check(self, prompts, parts, size):
        """One line per part, comparing the scores of images (parts: {name: scores}) with those of noise."""
        lines, (_, noise_parts) = [], self(self.noise(4, size), (prompts * 4)[:4])
        for name in self.parts:
            images, noise = parts[name], noise_parts[name].mean()
            result = "the images score higher" if images.mean() > noise else "the images do not score higher"
            if len(images) > 1 and images.unique().numel() == 1:
                result = "all images score the same, and equal scores teach nothing"
            lines.append(f"reward {name}: {images.mean():.4g} for images, {noise:.4g} for noise; {result}")
        return lines


run_file = cache(runpy.run_path)  # a file's names and what they are, for each file once


def find_function(name, device):
    """The function of NAME, NAME:MODEL or FILE.py:FUNCTION, with model and device set, and its `reads`."""
    kind, _, model = name.partition(":")
    function, package, install, reads = REWARDS.get(kind, Entry(name))
    if package and importlib.util.find_spec(package) is None:
        raise SystemExit(f"error: the reward {kind} needs the package {package}; run: pip install {install}")
    if isinstance(function, str):
        file, _, attribute = function.rpartition(":")
        file = Path(os.path.expanduser(file)).resolve()
        if file.suffix != ".py" or not os.path.isfile(file):
            raise SystemExit(f"error: {name!r} is no reward and no FILE.py:FUNCTION that exists; {GRAMMAR}")
        sys.path.insert(0, str(file.parent))  # it may import what is beside it
        try:
            function = run_file(str(file))[attribute]
        except Exception as error:
            stop(f"the reward {name} cannot be loaded", error)
    arguments = list(inspect.signature(function).parameters)[2:] if kind in REWARDS else []
    if model and kind in REWARDS and not arguments:
        raise SystemExit(f"error: the reward {kind} takes no model; write {kind} instead of {name}")
    given = {"device": device} if "device" in arguments else {}
    given |= {arguments[0]: os.path.expanduser(model)} if model and arguments else {}
    return partial(function, **given) if given else function, reads or getattr(function, "reads", None)


def get_reward(spec, device=None, offload=False):
    """A Reward from a name or a weighted sum, "pickscore=0.7,my_file.py:my_function=0.3". Loads no model."""
    parts = {}
    for text in spec.split(","):
        match = re.fullmatch(r"([^=]+)(?:=([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?))?", text.strip())
        weight = float(match[2] or 1) if match else 0.0
        name = match[1] if match else ""
        name = Path(name).name if ".py:" in name else name  # a file's metrics do not name its folder
        if match is None or name in parts or not 0 < abs(weight) < 1e9:
            raise SystemExit(f"error: {text!r} repeats a name, or its weight is 0 or no number; {GRAMMAR}")
        parts[name] = *find_function(match[1], device), weight
    return Reward(parts, device, offload)
