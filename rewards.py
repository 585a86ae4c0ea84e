"""Rewards: images and the prompts they were made for go in, one score each comes out.

Every reward is a function `(images, prompts) -> scores`:
    images:  (B, 3, H, W) float tensor in [0, 1], on any device
    prompts: list of B strings, prompts[i] belongs to images[i]
    scores:  (B,) float32 tensor on the CPU, higher is better
Some take more, all with defaults: `model`, repository or folder; `device`, CUDA if there is one; `batch`; and so on.

`get_reward("shapes")` or `get_reward("pickscore=0.7,ocr=0.3")` makes one from its name; "NAME:MODEL?key=value" sets
arguments, and "my_file.py:my_function" is a reward of your own. REWARDS, below, is the table of all. [FG] is Flow-GRPO
(arXiv 2505.05470), [GE] is GenEval (arXiv 2310.11513).
"""

import ast
import base64
import contextlib
import importlib.util
import inspect
import io
import os
import re
import runpy
import time
import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial, wraps
from pathlib import Path
from urllib.parse import parse_qsl

import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
import transformers  # as huggingface_hub, it imports a part of it where that is first used
from PIL import Image
from safetensors.torch import load_file


class RewardError(Exception):
    """A reward that is unknown, cannot be loaded or cannot read a prompt (exit_status 2), or fails in a run (1)."""

    def __init__(self, message, exit_status=2):
        super().__init__(message)
        self.exit_status = exit_status


@contextlib.contextmanager
def told(problem):
    """Whatever is raised within becomes a RewardError of status 2: the problem, and the reason in one line."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError | OSError | RewardError) else f"{type(error).__name__}: "
        raise RewardError(f"{problem}: {kind}{' '.join(str(error).split())[:300]}")


def to_pictures(images):
    """images: (B, 3, H, W) in [0, 1], any device. Returns B PIL pictures, for models that do their own resizing."""
    arrays = images.mul(255).round().clamp(0, 255).to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in arrays]


def in_batches(score):
    """Decorates a function (PIL pictures, prompts, ...) -> scores: now a reward, it gets at most `batch` at a time."""

    @wraps(score)
    def reward(*args, **kwargs):
        given = inspect.signature(score).bind(*args, **kwargs)
        given.apply_defaults()
        images, prompts, *more = given.args
        parts = [slice(n, n + given.arguments["batch"]) for n in range(0, len(prompts), given.arguments["batch"])]
        scores = [score(to_pictures(images[part]), prompts[part], *more) for part in parts]
        return torch.cat([torch.as_tensor(part, dtype=torch.float32, device="cpu") for part in scores])

    return reward


# ---------------------------------------------------------------- JPEG size [DDPO, arXiv 2305.13301, section 5.1]
def jpeg_incompressibility(images, prompts):
    """Size of the image as JPEG of quality 95, in kilobytes (1000 bytes). Prompts are not read. Needs no download."""
    scores = []
    for picture in to_pictures(images):
        picture.save(buffer := io.BytesIO(), "JPEG", quality=95)
        scores.append(buffer.tell() / 1000)
    return torch.tensor(scores)


def jpeg_compressibility(images, prompts):
    """Minus the size of the image as JPEG of quality 95, in kilobytes."""
    return -jpeg_incompressibility(images, prompts)


# ---------------------------------------------------------------- models: loaded once, shared by rewards
LOADED = {}  # (loader's name, device, source, ...) -> (module, ...): rewards that need the same model share it


def loader(load):
    """Decorates (source, ..., device) -> (module, ...): it loads once, or tells what its docstring begins with."""

    @wraps(load)
    def load_once(*sources, device=None):
        device = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        key = (load.__name__, device, *sources)
        if key not in LOADED:
            with told(f"{' with '.join(sources) or 'it'} cannot be loaded as {load.__doc__.split(':')[0]}"):
                LOADED[key] = load(*sources, device)
        module, *rest = LOADED[key]
        return module.to(device), *rest

    return load_once


def frozen(model, device, half=torch.float16):
    """The model for scoring: no gradients, no dropout, on its device, in half precision on CUDA."""
    dtype = half if torch.device(device).type == "cuda" else torch.float32
    return model.eval().requires_grad_(False).to(device, dtype)


def load_pretrained(kind, source, **options):
    """A model of a class of transformers. ValueError where the source lacks weights: they would be made up."""
    transformers.logging.set_verbosity_error()  # what it lacks is told here
    model, info = kind.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    lacking = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if lacking:
        raise ValueError(f"it has no weights for {lacking[0]} and {len(lacking) - 1} more")
    return model


def load_weights(source, name):
    """{key: tensor} of a file: `source`, or `name` in a repository or folder, or a folder's only other weights."""
    path = Path(source) if Path(source).exists() else Path(huggingface_hub.hf_hub_download(source, name))
    if path.is_dir():
        own = re.compile(r"(?!(pytorch_)?model[.-]).*[.](pth|pt|safetensors)")  # not those of a model beside it
        files = [path / name] if (path / name).is_file() else [f for f in path.iterdir() if own.fullmatch(f.name)]
        if len(files) != 1:
            raise ValueError(f"it has {len(files)} files .pth, .pt or .safetensors beside a model's own, not one")
        path = files[0]
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)


# ---------------------------------------------------------------- CLIP: pickscore, clipscore, aesthetic, hpsv2
PICKSCORE = "yuvalkirstain/PickScore_v1"
PROCESSORS = {PICKSCORE: "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}  # the CLIP it was tuned from, as its authors do
CLIP = "openai/clip-vit-large-patch14"
# sac+logos+ava1-l14-linearMSE.pth of github.com/christophschuhmann/improved-aesthetic-predictor
AESTHETIC = "trl-lib/ddpo-aesthetic-predictor"
_cut = set()  # text lengths for which it was said that prompts are cut


@loader
def load_clip(source, device):
    """a CLIP model (transformers' CLIPModel): (model, tokenizer, image processor, logit scale)"""
    model = load_pretrained(transformers.CLIPModel, source)
    scale = model.logit_scale.exp().item()  # in full precision
    prepare = PROCESSORS.get(source, source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(prepare)
    words = model.config.text_config.vocab_size
    if not 0.9 * words <= len(tokenizer) <= words:  # without its files, from_pretrained makes up an empty one
        raise ValueError(f"{prepare} has no tokenizer of a CLIP model: {len(tokenizer)} tokens, not {words}")
    return frozen(model, device), tokenizer, transformers.CLIPImageProcessorPil.from_pretrained(prepare), scale


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


@in_batches
def clipscore(pictures, prompts, model=CLIP, batch=16, device=None):
    """Cosine of image and prompt in CLIP, about 0.1 to 0.35 (CLIPScore, arXiv 2104.08718, without its 2.5)."""
    clip, tokenizer, processor, _ = load_clip(model, device=device)
    return (embed_pictures(pictures, clip, processor) * embed_texts(prompts, clip, tokenizer)).sum(1)


def pickscore(images, prompts, model=PICKSCORE, batch=16, device=None):
    """PickScore v1 (arXiv 2305.01569): logit scale times cosine in its CLIP-H, about 20; divided by 26 as [FG] does."""
    *_, scale = load_clip(model, device=device)
    return clipscore(images, prompts, model, batch, device) * scale / 26


@loader
def load_aesthetic(source, device):
    """the aesthetic predictor (layers.0, 2, 4, 6 and 7 of 768-1024-128-64-16-1): (network,)"""
    network = torch.nn.Sequential(
        torch.nn.Linear(768, 1024), torch.nn.Dropout(0.2), torch.nn.Linear(1024, 128), torch.nn.Dropout(0.2),
        torch.nn.Linear(128, 64), torch.nn.Dropout(0.1), torch.nn.Linear(64, 16), torch.nn.Linear(16, 1),
    )  # fmt: skip
    weights = load_weights(source, "aesthetic-model.pth")
    network.load_state_dict({key.removeprefix("layers."): value for key, value in weights.items()})
    return (frozen(network, device, torch.float32),)


@in_batches
def aesthetic(pictures, prompts, model=AESTHETIC, clip=CLIP, batch=16, device=None):
    """LAION's aesthetic predictor v2, about 1 to 10, on CLIP L/14. Prompts are not read. model: also a file."""
    (network,) = load_aesthetic(model, device=device)
    clip, _, processor, _ = load_clip(clip, device=device)
    return network(embed_pictures(pictures, clip, processor))[:, 0]


@loader
def load_hpsv2(source, device):
    """HPS_v2.1_compressed.pt, of open_clip's ViT-H-14: (model, image transform, tokenizer)"""
    import open_clip  # from which HPSv2 is tuned; its own package pins old versions of others

    weights = load_weights(source, "HPS_v2.1_compressed.pt")["state_dict"]
    # "longest", as HPSv2 does: other than square images are padded, not cropped
    model, _, transform = open_clip.create_model_and_transforms("ViT-H-14", image_resize_mode="longest")
    model.load_state_dict(weights)
    return frozen(model, device), transform, open_clip.get_tokenizer("ViT-H-14")


@in_batches
def hpsv2(pictures, prompts, model="xswu/HPSv2", batch=16, device=None):
    """HPS v2.1 (arXiv 2306.09341): cosine in its CLIP-H, about 0.2 to 0.35. It reads 77 tokens. model: also a file."""
    clip, transform, tokenizer = load_hpsv2(model, device=device)
    pixels = torch.stack([transform(picture) for picture in pictures]).to(clip.logit_scale)
    image = clip.encode_image(pixels, normalize=True).float()
    return (image * clip.encode_text(tokenizer(prompts).to(pixels.device), normalize=True).float()).sum(1)


# ---------------------------------------------------------------- hpsv3, a head on Qwen2-VL [arXiv 2508.03789]
@loader
def load_hpsv3(source, base, device):
    """HPSv3.safetensors and the rest of Qwen2-VL: (model and head, tokenizer, image processor, text around a prompt)"""
    # the text, from the source of its authors' package, which cannot be imported here: it needs transformers 4.45
    (package,) = importlib.util.find_spec("hpsv3").submodule_search_locations
    code = ast.parse((Path(package) / "dataset" / "data_collator_qwen.py").read_text("utf-8"))
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
    del weights["lm_head.weight"]  # it must be there, and is of no use
    head.load_state_dict({name[8:]: weights.pop(name) for name in list(weights) if name.startswith("rm_head.")})
    weights = {re.sub("^model[.]", "language_model.", name): value for name, value in weights.items()}
    model = load_pretrained(transformers.Qwen2VLModel, None, config=config, state_dict=weights)
    if more := weights.keys() - model.state_dict().keys():
        raise ValueError(f"it has weights too many: {min(more)} and {len(more) - 1} more")
    # all in bfloat16, as its authors have it: the rotary embedding's frequencies are rounded with the weights
    model = frozen(model.to(torch.bfloat16), device, torch.bfloat16)
    both = torch.nn.ModuleList([model, frozen(head, device, torch.float32)])
    processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(base)
    return both, tokenizer, processor, (texts["INSTRUCTION"], texts["prompt_with_special_token"])


@in_batches
def hpsv3(pictures, prompts, model="MizzenAI/HPSv3", base="Qwen/Qwen2-VL-7B-Instruct", batch=8, device=None):
    """HPSv3, about 0 to 15, as the package hpsv3 1.0.0 computes it: the mean, not sigma. model: also a file."""
    (model, head), tokenizer, processor, (before, after) = load_hpsv3(model, base, device=device)
    area = {"shortest_edge": 256 * 28 * 28, "longest_edge": 256 * 28 * 28}  # pixels
    inputs = processor(pictures, size=area, return_tensors="pt")
    contents = [[{"type": "image"}, {"type": "text", "text": before.format(text_prompt=p) + after}] for p in prompts]
    messages = [[{"role": "user", "content": content}] for content in contents]
    chats = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    sizes = inputs["image_grid_thw"].prod(1) // processor.merge_size**2  # tokens of each picture
    chats = [c.replace("<|image_pad|>", "<|image_pad|>" * n, 1) for c, n in zip(chats, sizes.tolist())]
    inputs.update(tokenizer(chats, padding=True, return_tensors="pt"))
    ids = inputs.to(model.device)["input_ids"]
    # positions count the tokens of a picture one by one, as its authors' code does, not in Qwen2-VL's three axes
    positions = torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape)
    hidden = model(**inputs, position_ids=positions, use_cache=False).last_hidden_state
    mark = ids == tokenizer.convert_tokens_to_ids("<|Reward|>")  # where the last is: a prompt may have the word
    return head(hidden[range(len(ids)), mark.cumsum(1).argmax(1)].float())[:, 0]


# ---------------------------------------------------------------- ocr, text in pictures [FG] section 4.1
def quoted_text(prompt):
    """The text that a picture must show: what stands between the first two double quotes of its prompt."""
    match = re.search(r'"([^"]*)"', re.sub("[“”„]", '"', prompt))
    if not match or not match[1].strip():
        raise ValueError(f'it finds no quoted text in {prompt[:200]!r}; write: a sign that says "OPEN"')
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
    """1 - edit distance / length of what is wanted, at least 0; 1 if it was read. Spaces and case do not count [FG]."""
    read, wanted = ("".join(text.split()).lower() for text in (read, wanted))
    distance = 0 if wanted in read else edit_distance(read, wanted)
    return 1 - min(distance, len(wanted)) / len(wanted)


@loader
def load_ocr(device):
    """RapidOCR: (no module, reader)"""
    from rapidocr import RapidOCR  # PaddleOCR's models in onnxruntime, on the CPU; [FG] has PaddleOCR itself

    threads = {"EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads()}  # not all there are
    return torch.nn.Identity(), RapidOCR(params={"Global.log_level": "critical"} | threads)


def ocr(images, prompts):
    """The quoted text of the prompt against what RapidOCR reads in the image, in [0, 1]: quoted_text, text_score."""
    _, reader = load_ocr(device="cpu")
    lines = [reader(np.asarray(picture)[:, :, ::-1]).txts or () for picture in to_pictures(images)]  # it takes BGR
    return torch.tensor([text_score("".join(read), quoted_text(prompt)) for read, prompt in zip(lines, prompts)])


# ---------------------------------------------------------------- geneval, objects, counts, colours, positions [GE]
COCO = (  # GenEval's names of its 80 classes, in its order
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
DETECTOR = "facebook/mask2former-swin-small-coco-instance"

# what a prompt asks for: `count` of a class (exact: not more), of a colour, in a relation to the first Want
Want = namedtuple("Want", "name count exact colour relation", defaults=(1, False, None, None))
# an object in a picture. box: (left, top, right, bottom) in pixels; mask: (H, W) bool
Found = namedtuple("Found", "name score box mask colour", defaults=(None, None))


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
        f"it cannot read the prompt {prompt[:200]!r}; write 'a photo of a dog', '... a dog and a cat', '...a red car', "
        f"'... a dog left of a cat', '... a red car and a blue bus' or 'a photo of two dogs', with COCO's objects, the "
        f"colours {', '.join(GENEVAL_COLOURS)}, numbers up to ten, and the relations {', '.join(GENEVAL_RELATIONS)}"
    )


def keep_objects(found, counting):
    """{name: [Found]} that count for GenEval, the surest first: over 0.3, or 0.9 if counting, at most 16 of a name."""
    sure = sorted((f for f in found if f.score > (0.9 if counting else 0.3)), key=lambda f: -f.score)
    return {thing.name: [other for other in sure if other.name == thing.name][:16] for thing in sure}


def relations(a, b, margin=0.1):
    """Which GENEVAL_RELATIONS hold from box a to box b, none, one or two (above left, say). What the centres are apart
    more than margin times the sum of the boxes' sizes counts, in a direction where it is over half of their distance.
    """
    (a_from, a_to), (b_from, b_to) = np.reshape(a, (2, 2)), np.reshape(b, (2, 2))
    offset, sizes = (a_from + a_to - b_from - b_to) / 2, abs(a_to - a_from) + abs(b_to - b_from)
    beyond = np.sign(offset) * np.maximum(abs(offset) - margin * sizes, 0)
    if max(abs(beyond)) < 1e-3:
        return set()
    x, y = beyond / np.hypot(*offset)
    return {r for r, holds in zip(GENEVAL_RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5)) if holds}


def judge(wants, objects):
    """GenEval's verdict on objects (keep_objects), 1.0 or 0.0: colour and position are those of the surest `count`."""
    for want in wants:
        things, firsts = objects.get(want.name, []), objects.get(wants[0].name, [])[: wants[0].count]
        surest = things[: want.count]
        right = len(things) == want.count if want.exact else len(things) >= want.count
        right &= not want.colour or all(thing.colour == want.colour for thing in surest)
        right &= not want.relation or all(want.relation in relations(a.box, b.box) for a in surest for b in firsts)
        if not right:
            return 0.0
    return 1.0


def judge_graded(wants, objects):
    """The graded reward that [FG] trains on, at most 1: the mean over parts, of which each Want has one or two.

    A count, or a colour's, earns 1 - |found - wanted| / wanted, below 0 from twice the number on; a position 1 or 0;
    colour and position 0 where the count is wrong. ([FG]'s code gives 0.75 for a wrong position, 2/3 here.)
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
            right = right and len(firsts) == wants[0].count
            parts.append(float(right and all(want.relation in relations(a.box, b.box) for a in things for b in firsts)))
    return sum(parts) / len(parts)


@loader
def load_detector(source, device):
    """a Mask2Former (transformers' Mask2FormerForUniversalSegmentation) for COCO's 80 classes: (model, processor)"""

    class Detector(transformers.Mask2FormerPreTrainedModel):
        """Mask2FormerForUniversalSegmentation without its loss, which needs scipy: pixels -> class and mask logits."""

        def __init__(self, config):
            super().__init__(config)
            self.model = transformers.Mask2FormerModel(config)
            self.class_predictor = torch.nn.Linear(config.hidden_dim, config.num_labels + 1)
            self.post_init()

        def forward(self, pixels):
            outputs = self.model(pixels, output_hidden_states=True, return_dict=True)
            classes = self.class_predictor(outputs.transformer_decoder_intermediate_states[-1].transpose(0, 1))
            return classes, outputs.masks_queries_logits[-1]  # (B, Q, 81), (B, Q, h, w)

    model = load_pretrained(Detector, source)
    if model.config.num_labels != len(COCO):
        raise ValueError(f"it has {model.config.num_labels} classes")
    # in full precision, being small (69 million): GenEval's thresholds were chosen so
    return frozen(model, device, torch.float32), transformers.Mask2FormerImageProcessorPil.from_pretrained(source)


def instances(class_logits, mask_logits, size, threshold=0.3, limit=100):
    """The objects of one picture, as mmdet's Mask2Former, which GenEval uses, makes them of the network's outputs.

    class_logits: (Q, 81), the last for none; mask_logits: (Q, h, w); size: (H, W) of the picture. A score is a class's
    probability times the mean probability of the mask's pixels. (mmdet resizes masks twice, here once.)
    """
    probability = class_logits.float().softmax(-1)[:, :-1]
    top, index = probability.flatten().topk(min(limit, probability.numel()))
    found = []
    for p, i in zip(top[top > threshold].tolist(), index.tolist()):  # the score is not larger
        query, label = divmod(i, probability.shape[1])
        logits = F.interpolate(mask_logits[query].float()[None, None], size, mode="bilinear", align_corners=False)[0, 0]
        mask = (logits > 0).cpu()
        if mask.any() and (score := p * logits.sigmoid().cpu()[mask].mean().item()) > threshold:
            rows, columns = mask.any(1).nonzero()[:, 0].tolist(), mask.any(0).nonzero()[:, 0].tolist()
            found.append(Found(COCO[label], score, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1), mask))
    return found


def find_colours(picture, things, clip, tokenizer, processor, _):
    """The things, of one class, with colours: CLIP's for the pixels on grey (#999), by the mean of three sentences."""
    name, kinds = things[0].name, ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
    sentences = [kind.format(colour, name) for colour in GENEVAL_COLOURS for kind in kinds]
    texts = embed_texts(sentences, clip, tokenizer).view(len(GENEVAL_COLOURS), 3, -1).mean(1)
    grey = Image.new("RGB", picture.size, "#999")
    cut = [Image.composite(picture, grey, Image.fromarray(t.mask.numpy())).crop(t.box) for t in things]
    best = (embed_pictures(cut, clip, processor) @ F.normalize(texts, dim=1).T).argmax(1)
    return [thing._replace(colour=GENEVAL_COLOURS[n]) for thing, n in zip(things, best.tolist())]


@in_batches
def geneval(pictures, prompts, model=DETECTOR, clip=CLIP, size=800, batch=8, device=None, verdict=judge):
    """GenEval without mmdet: does the image show the objects, number, colours, position of its prompt? 1.0 or 0.0.

    Objects by transformers' Mask2Former with Swin-S, of COCO (GenEval's is the same network, trained by mmdet); colours
    by CLIP L/14. size: pixels of the shorter side, 800 as in mmdet, where transformers' repository says 384.
    """
    detector, processor = load_detector(model, device=device)
    sides = {"shortest_edge": size, "longest_edge": size * 1333 // 800}
    pixels = processor(pictures, size=sides, return_tensors="pt")["pixel_values"].to(detector.device)
    scores = []
    for picture, prompt, classes, masks in zip(pictures, prompts, *detector(pixels)):
        wants = parse_geneval(prompt)
        found = instances(classes, masks, picture.size[::-1])
        objects = keep_objects(found, any(want.exact for want in wants))
        for want in wants:
            things = objects.get(want.name, [])
            if want.colour and things:
                coloured = find_colours(picture, things[: want.count], *load_clip(clip, device=device))
                objects[want.name] = coloured + things[want.count :]
        scores.append(verdict(wants, objects))
    return scores


# ---------------------------------------------------------------- vlm, a vision-language model behind a server
QUESTION = (
    'This picture was made for the text: "{prompt}". How well does it show what the text says, and how good does it '
    "look? Give one number from 0 (not at all) to 10 (perfect). Answer with a last line 'Score: NUMBER', nothing after."
)


def ask_server(url, deadline, request):
    """What request(seconds left) gives; asked again, ever less often, until the deadline, unless the server refuses."""
    wait = 0.5
    while True:
        try:
            return request(max(deadline - time.monotonic(), 0.01))
        except Exception as error:  # it is not there, fails, or answers no JSON
            response, reason = getattr(error, "response", None), str(error) or type(error).__name__
        if response is not None and response.status_code < 500 and response.status_code not in (408, 429):
            raise RewardError(f"the server at {url} refused: status {response.status_code}, {response.text[:200]}", 1)
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
    first that it lists. question: {prompt} stands for the prompt; @FILE for what is in a file. scale: the largest score
    there is. timeout: seconds for one image, with all tries, which are three for an answer without a number. workers:
    requests at a time. The environment variable VLM_API_KEY is sent as key.
    """
    url, key = url.rstrip("/"), os.environ.get("VLM_API_KEY", "none")
    question = Path(question[1:]).read_text("utf-8") if question.startswith("@") else question

    def first_model(seconds):
        headers = {"Authorization": f"Bearer {key}"}
        answer = huggingface_hub.get_session().get(f"{url}/models", headers=headers, timeout=seconds)
        return answer.raise_for_status().json()["data"][0]["id"]

    def chat(messages, temperature, seconds):
        client = huggingface_hub.InferenceClient(base_url=url, api_key=key, timeout=seconds)
        return client.chat_completion(messages, model=model, temperature=temperature)

    def ask(picture, prompt):
        deadline = time.monotonic() + timeout
        picture.save(buffer := io.BytesIO(), "PNG")
        image = {"url": f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"}
        text = {"type": "text", "text": question.replace("{prompt}", prompt)}
        messages = [{"role": "user", "content": [{"type": "image_url", "image_url": image}, text]}]
        try:
            for temperature in (0.0, 0.5, 1.0):
                answer = ask_server(url, deadline, partial(chat, messages, temperature))
                if not answer.choices:
                    raise RewardError(f"the server at {url} gave no chat completion but {str(answer)[:200]}", 1)
                text = answer.choices[0].message.content or ""
                if (score := read_score(text, scale)) is not None:
                    return score / scale
            raise RewardError(f"{model} gave no score from 0 to {scale:g} for {prompt[:200]!r} but {text!r:.300}", 1)
        except Exception:
            pool.shutdown(wait=False, cancel_futures=True)  # none of those that wait
            raise

    model = model or ask_server(url, time.monotonic() + timeout, first_model)
    pool = ThreadPoolExecutor(workers)
    try:
        return torch.tensor(list(pool.map(ask, to_pictures(images), prompts)), dtype=torch.float32)
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------- the table of rewards, names and sums
# loads: {loader of a model: {argument with a source: file that it has if it is a repository}}; gigabytes: on CUDA;
# package: what must be there: what pip installs for it; reads: reads(prompt) raises ValueError where it cannot
Entry = namedtuple("Entry", "function loads gigabytes package reads", defaults=({}, 0.0, "", None))
_CLIP, _CLIP_TOO = {load_clip: {"model": "config.json"}}, {load_clip: {"clip": "config.json"}}
_GENEVAL = {load_detector: {"model": "config.json"}} | _CLIP_TOO, 1.2, "", parse_geneval
_HPSV3 = {load_hpsv3: {"model": "HPSv3.safetensors", "base": "config.json"}}
REWARDS = {  # a row that is text is the place of a function, as that of a reward of one's own
    "shapes": f"{Path(__file__).resolve().parent}/tests/tiny/shapes.py:shapes",
    "jpeg_compressibility": Entry(jpeg_compressibility),
    "jpeg_incompressibility": Entry(jpeg_incompressibility),
    "pickscore": Entry(pickscore, _CLIP, 2.0),
    "clipscore": Entry(clipscore, _CLIP, 0.9),
    "aesthetic": Entry(aesthetic, {load_aesthetic: {"model": "aesthetic-model.pth"}} | _CLIP_TOO, 0.9),
    "hpsv2": Entry(hpsv2, {load_hpsv2: {"model": "HPS_v2.1_compressed.pt"}}, 2.0, "open_clip: open_clip_torch"),
    "hpsv3": Entry(hpsv3, _HPSV3, 15.5, "hpsv3: --no-deps hpsv3"),
    "ocr": Entry(ocr, {load_ocr: {}}, 0.0, "rapidocr: rapidocr onnxruntime", quoted_text),
    "geneval": Entry(geneval, *_GENEVAL),
    "geneval_graded": Entry(partial(geneval, verdict=judge_graded), *_GENEVAL),  # partly right: between
    "vlm": Entry(vlm),
}
Part = namedtuple("Part", "entry function arguments weight")  # of a sum: the function has its arguments set


class Reward:
    """A weighted sum: (images, prompts) -> (scores (B,), {name: raw scores (B,)}). offload: models rest on the CPU."""

    def __init__(self, parts, device=None, offload=False):
        self.parts, self.device, self.offload = parts, device, offload

    def models(self):
        """Yields (name of a part, loader, [(source, file in it), ...]) for every model."""
        for name, part in self.parts.items():
            for load, files in part.entry.loads.items():
                yield name, load, [(part.arguments[argument], file) for argument, file in files.items()]

    def check(self, prompts):
        """RewardError for a prompt that a part cannot read, and for a repository out of reach. Loads nothing."""
        for name, part in self.parts.items():
            with told(f"the reward {name}"):
                for prompt in prompts if part.entry.reads else []:
                    part.entry.reads(prompt)
        for name, _, files in self.models():
            others = [(PROCESSORS[source], "preprocessor_config.json") for source, _ in files if source in PROCESSORS]
            for source, file in files + others:
                here = Path(source).exists()
                if not here and (source[0] in "./" or source.count("/") > 1):
                    raise RewardError(f"the reward {name}: there is no folder {source}")
                hint = "check name and network, and for a gated one accept its licence and log in with `hf auth login`"
                with told(f"the reward {name} needs {source}, which is no folder here and cannot be fetched; {hint}"):
                    if not here and not isinstance(huggingface_hub.try_to_load_from_cache(source, file), str):
                        huggingface_hub.HfApi().model_info(source, timeout=10)  # a download would try again and again

    def load(self):
        """Load all models that are not loaded yet; RewardError for one that cannot be. Needs no images."""
        for name, load, files in self.models():
            with told(f"the reward {name}"):
                load(*[source for source, _ in files], device=self.device)
            self.put_away()

    def put_away(self):
        for module, *_ in LOADED.values() if self.offload else ():
            module.to("cpu")

    def __call__(self, images, prompts):
        broken = (~images.isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist()
        if broken:  # scorers see them as black
            raise RewardError(f"the image made for {prompts[broken[0]][:200]!r} has pixels that are not finite", 1)
        scored, first = {}, f"its first prompt was {prompts[0][:200]!r}"
        for name, part in self.parts.items():
            try:
                scores = torch.as_tensor(part.function(images, prompts)).detach().float().cpu()
            except RewardError as error:
                raise RewardError(f"the reward {name}: {error}", error.exit_status)
            except Exception as error:  # a reward is anybody's code: whatever it raises is told with its name
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                raise RewardError(f"the reward {name} failed with {reason}; {first}", 1)
            if scores.shape != (len(prompts),):
                got = f"scores of shape {tuple(scores.shape)} for {len(prompts)} images"
                raise RewardError(f"the reward {name} gave {got}; it must give one an image; {first}", 1)
            for score, prompt in zip(scores, prompts):
                if not score.isfinite():
                    raise RewardError(f"the reward {name} gave {score} for {prompt[:200]!r}", 1)
            scored[name] = scores
        self.put_away()
        return sum(part.weight * scored[name] for name, part in self.parts.items()), scored

    def self_check(self, images, prompts, parts=None):
        """A line for each part: its means over images (of scores `parts`, if known) and noise. RewardError if alike."""
        noise = torch.rand(images[:4].shape, generator=torch.Generator().manual_seed(0))
        noise_parts = self(noise.to(images.device), prompts[:4])[1]
        parts = parts or self(images, prompts)[1]
        lines = []
        for name in self.parts:
            image, noise = parts[name], noise_parts[name]
            a, b, n = image.mean().item(), noise.mean().item(), len(image)
            result = "the images score higher" if a > b else "noise scores higher"
            if torch.cat([image, noise]).unique().numel() == 1:
                result = f"all {n} images of the model and noise score alike: nothing can be learned from that"
                if n >= 4:  # fewer may be alike by chance
                    raise RewardError(f"the reward {name} is {a:.4g}: {result}; a prompt was {prompts[0][:200]!r}", 1)
            lines.append(f"reward {name}: {a:.4g} for images, {b:.4g} for noise; {result}")
        return lines


def get_reward(spec, device=None, offload=False):
    """A Reward from its name, or from a weighted sum such as "pickscore=0.7,ocr=0.3". It loads no model.

    A part is NAME, NAME:MODEL, NAME:MODEL?key=value&key=value or FILE.py:FUNCTION?key=value, and may end with =WEIGHT;
    values are URL-encoded (%2C for a comma). RewardError for what is wrong with names, files and packages.
    """
    parts = {}
    for text in spec.split(","):
        name, sign, weight = text.strip().rpartition("=")
        if not sign or ("?" in name and "=" not in re.split("[?&]", name)[-1]):  # name?key=value has no weight
            name, weight = text.strip(), "1"
        if name in parts:
            raise RewardError(f"the reward {name} is twice in {spec!r}; name it once")
        with told(f"the weight of the reward {name} is to be a finite number, as in {name}=0.5"):
            weight = float(weight)
            round(weight)  # raises for what is not finite
        parts[name] = Part(*find_function(name, spec, device), weight)
    return Reward(parts, device, offload)


def find_function(name, spec, device):
    """NAME:MODEL?key=value or FILE.py:FUNCTION?key=value: its Entry, function with arguments set, and all arguments."""
    head, _, query = name.partition("?")
    kind, _, model = head.partition(":")
    entry = REWARDS.get(kind, head)
    if isinstance(entry, str) and (match := re.fullmatch(r"(.+\.py):(\w+)", entry)):
        file, function = match.groups()
        model = "" if entry == head else model
        if not Path(file).is_file():
            raise RewardError(f"there is no file {file} for the reward {name}")
        with told(f"the file {file} of the reward {name} cannot be run"):
            own = runpy.run_path(file).get(function)
        if not callable(own):
            raise RewardError(f"the file {file} has no function {function}(images, prompts) -> scores")
        entry = Entry(own, reads=getattr(own, "reads", None))  # an attribute of it, if it cannot read all prompts
    if isinstance(entry, str):
        known = f"known are {', '.join(REWARDS)}; a reward of your own is my_file.py:my_function"
        raise RewardError(f"unknown reward {kind!r} in --reward {spec!r}; {known}")
    package, _, install = entry.package.partition(": ")
    if package and importlib.util.find_spec(package) is None:
        raise RewardError(f"the reward {kind} needs the package {package}; install it: pip install {install}")
    arguments = {p.name: p.default for p in inspect.signature(entry.function).parameters.values()}
    known = [key for key in list(arguments)[2:] if key not in ("device", "verdict")]
    given = {"device": device} if "device" in arguments else {}
    options = [(known[0] if known else "model", os.path.expanduser(model))] if model else []
    for key, value in [*options, *parse_qsl(query, keep_blank_values=True)]:
        if key not in known:
            raise RewardError(f"the reward {name} has no argument {key!r}; it has {', '.join(known) or 'none'}")
        with told(f"{key} of the reward {name} must be a number like {arguments[key]}"):
            given[key] = type(arguments[key])(value) if isinstance(arguments[key], int | float) else value
    if kind == "aesthetic" and "clip" not in given and Path(given.get("model", ""), "config.json").is_file():
        given["clip"] = given["model"]  # where the folder has a CLIP as well, that one
    if kind == "vlm" and not model.startswith(("http://", "https://")):
        raise RewardError("the reward vlm needs the address of its server; write vlm:http://127.0.0.1:8000/v1")
    if kind == "vlm" and huggingface_hub.is_offline_mode():
        raise RewardError("HF_HUB_OFFLINE keeps huggingface_hub from asking the server of the reward vlm; unset it")
    if kind == "vlm" and (file := given.get("question", "")).startswith("@") and not Path(file[1:]).is_file():
        raise RewardError(f"there is no file {file[1:]} with the question of the reward {name}")
    return entry, partial(entry.function, **given), arguments | given
