"""The reward `shapes`: how well a picture of the tiny model shows what its prompt asks for, told by its
pixels.

It is loaded as any reward of one's own is (FILE.py:FUNCTION). `shapes.reads` says which prompts it can read.
"""

import itertools
import re

import torch
import torch.nn.functional as F

COLOURS = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 0.7, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 0.8, 0.0),
}
SHAPES = ("circle", "square", "triangle")
NUMBERS = {"a": 1, "two": 2, "three": 3, "four": 4}
RELATIONS = {
    "left of": (1, 0),
    "right of": (-1, 0),
    "above": (0, 1),
    "below": (0, -1),
}  # from first to second, y down
_THING = rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_COUNT = re.compile(rf"({'|'.join(NUMBERS)}) {_THING}(s?)")
_PAIR = re.compile(rf"a {_THING} (and|{'|'.join(RELATIONS)}) a {_THING}")


def parse_scene(prompt):
    """Read a prompt of the tiny model: (objects, relation).

    objects: list of (colour, shape), one entry an object. relation: a key of RELATIONS from objects[0] to
    objects[1], or None. Raises ValueError, with what the tiny model can draw, for any other prompt.
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
        f"it cannot read the prompt {prompt[:200]!r}; write 'a red circle', 'three blue squares', "
        f"'a red circle and a blue square' or 'a red circle left of a blue square', with the colours "
        f"{', '.join(COLOURS)}, the shapes {', '.join(SHAPES)}, numbers up to four, joined by 'and' or by "
        f"{', '.join(RELATIONS)}"
    )


def shape_inside(shape, dx, dy, radius):
    """Signed distance to a shape's edge, in pixels, negative inside (exact but for the outside of corners).

    dx, dy: offsets from the shape's centre, y down. The triangle points up: apex at -radius, base at 0.8
    radius.
    """
    if shape == "circle":
        return torch.hypot(dx, dy) - radius
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - 0.88 * radius
    return torch.maximum(dy - 0.8 * radius, (1.8 * dx.abs() - dy - radius) / 3.24**0.5)


def _connected_components(mask):
    """mask:

    (N, H, W) bool -> (N, H, W) labels: 0 outside, else one positive number a 4-connected component.
    """
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

    images: (B, 3, 32, 32) in [0, 1]; another size is resized. Returns B lists of (colour, shape, quality, x,
    y): quality in [0, 1] says how well the blob fits the best of the three shapes (intersection over union
    0.55 or less is 0, 0.8 or more is 1), x and y are its centroid in pixels. Blobs under min_area pixels are
    not counted.
    """
    images = images.float().cpu()
    if images.shape[-2:] != (32, 32):
        images = F.interpolate(images, (32, 32), mode="area")
    ink = 1 - images  # what is missing from white: an edge pixel has its object's ink, only less
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
    for shape, unit_area, centre in (
        ("circle", torch.pi, 0.0),
        ("square", 1.76**2, 0.0),
        ("triangle", 1.8, 0.2),
    ):
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

    Each object asked for is paired with at most one found, for the best sum. A pair earns its quality where
    colour and shape are right, 0.3 of it where only one is; the sum is divided by the larger of the two
    counts, so that objects too many cost as much as objects too few. A wrong or missing relation halves the
    score. The score is squared, so that near misses earn something and much less than a hit. More than eight
    objects score 0.
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
    """How well pictures of the tiny model show what their prompts ask for, in [0, 1]: count, colour, shape,
    position.

    images: (B, 3, 32, 32) or another size. Raises ValueError where a prompt cannot be read (parse_scene).
    """
    scenes = [parse_scene(prompt) for prompt in prompts]
    return torch.tensor([score_scene(found, *scene) for found, scene in zip(find_objects(images), scenes)])


shapes.reads = parse_scene
