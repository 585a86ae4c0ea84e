"""rewards.py: names, sums, errors, the rewards that need no model, and a reward of one's own."""

import io
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tiny")]
import make  # noqa: E402
import rewards  # noqa: E402
from rewards import RewardError, get_reward  # noqa: E402
from shapes import parse_scene, shapes  # noqa: E402


@pytest.fixture
def register(monkeypatch):
    """register(name, function) makes a reward for one test."""
    return lambda name, function: monkeypatch.setitem(rewards.REWARDS, name, rewards.Entry(function))


def noise(count=3, size=24, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- jpeg, shapes


@pytest.mark.parametrize("height,width", [(32, 32), (17, 40), (64, 8)])
def test_jpeg_is_the_size_that_pil_writes(height, width):
    images = torch.rand(4, 3, height, width, generator=torch.Generator().manual_seed(1))
    sizes = []
    for image in images.numpy():
        pixels = np.zeros((height, width, 3), np.uint8)
        for y in range(height):
            for x in range(width):
                pixels[y, x] = [round(float(image[c, y, x]) * 255) for c in range(3)]
        file = io.BytesIO()
        Image.fromarray(pixels, "RGB").save(file, "JPEG", quality=95)
        sizes.append(len(file.getvalue()) / 1000)
    assert rewards.jpeg_incompressibility(images, [""] * 4).tolist() == pytest.approx(sizes)
    assert rewards.jpeg_compressibility(images, [""] * 4).tolist() == pytest.approx([-size for size in sizes])


def test_jpeg_takes_values_outside_the_range_as_the_nearest():
    images = torch.stack([torch.full((3, 16, 16), 1.7), torch.ones(3, 16, 16), torch.full((3, 16, 16), -0.4)])
    scores = rewards.jpeg_incompressibility(images, [""] * 3)
    assert scores[0] == scores[1] and scores.isfinite().all()


def test_shapes_knows_a_true_picture_from_a_wrong_one():
    rng = random.Random(123)
    train, held_out = make.split_prompts()
    prompts = rng.sample(train, 100) + rng.sample(held_out, 40)
    images = make.draw([parse_scene(prompt) for prompt in prompts], rng)
    true = shapes(images, prompts)
    assert true.shape == (140,) and true.dtype == torch.float32
    assert true.mean() >= 0.99
    others = [rng.choice(make.ALL_PROMPTS) for _ in prompts]
    others = [o if o != p else "four green circles" for o, p in zip(others, prompts)]
    assert shapes(images, others).mean() < 0.2
    assert true.min() >= 0 and true.max() <= 1


def test_shapes_of_pictures_of_another_size():
    rng = random.Random(5)
    prompts = rng.sample(make.ALL_PROMPTS, 20)
    images = make.draw([parse_scene(prompt) for prompt in prompts], rng)
    larger = images.repeat_interleave(3, 2).repeat_interleave(3, 3)
    assert shapes(larger, prompts).mean() >= 0.99


def test_shapes_sees_count_colour_shape_and_position():
    circle, square = ("red", "circle"), ("blue", "square")
    images = make.draw([([circle, square], "left of")] * 8, random.Random(0))
    right = shapes(images, ["a red circle left of a blue square"] * 8)
    assert right.min() > 0.95
    for wrong in [
        "a red circle right of a blue square",
        "a blue circle left of a red square",
        "a red square left of a blue circle",
        "a red circle",
        "two red circles",
        "a yellow triangle",
    ]:
        assert shapes(images, [wrong] * 8).max() < 0.6, wrong
    assert shapes(torch.rand(4, 3, 32, 32), ["a red circle"] * 4).max() < 0.3
    assert shapes(torch.ones(4, 3, 32, 32), ["a red circle"] * 4).max() == 0


@pytest.mark.parametrize(
    "prompt", ["", "a cat", "five red circles", "a red circle and", "two red circle", "A BLUE DOT"]
)
def test_shapes_says_which_prompts_it_can_read(prompt):
    with pytest.raises(ValueError, match="three blue squares"):
        parse_scene(prompt)
    with pytest.raises(RewardError, match="cannot read the prompt") as error:
        get_reward("jpeg_compressibility,shapes=0.5").check(["a red circle", prompt])
    assert error.value.exit_status == 2


# ---------------------------------------------------------------- names and sums


def test_a_sum_is_weighted_and_its_parts_are_raw():
    images = noise(5)
    total, parts = get_reward("jpeg_compressibility=0.25, jpeg_incompressibility=-2")(images, list("abcde"))
    size = rewards.jpeg_incompressibility(images, list("abcde"))
    assert list(parts) == ["jpeg_compressibility", "jpeg_incompressibility"]
    assert torch.equal(parts["jpeg_compressibility"], -size) and torch.equal(parts["jpeg_incompressibility"], size)
    assert torch.allclose(total, -0.25 * size - 2 * size)


@pytest.mark.parametrize(
    "part,name,weight",
    [
        ("shapes", "shapes", "1"),
        ("shapes=0.5", "shapes", "0.5"),
        ("clipscore:some/folder=2=0.5", "clipscore:some/folder=2", "0.5"),
        ("vlm:http://127.0.0.1:8000/v1", "vlm:http://127.0.0.1:8000/v1", "1"),
        ("vlm:http://h/v1?model=q", "vlm:http://h/v1?model=q", "1"),
        ("vlm:http://h/v1?timeout=9", "vlm:http://h/v1?timeout=9", "1"),
        ("vlm:http://h/v1?model=q&timeout=9=0.3", "vlm:http://h/v1?model=q&timeout=9", "0.3"),
        ("my_file.py:f=-1", "my_file.py:f", "-1"),
    ],
)
def test_where_a_name_ends_and_its_weight_begins(part, name, weight, monkeypatch):
    monkeypatch.setattr(rewards, "find_function", lambda *arguments: (None, None, None))
    assert {name: part.weight for name, part in get_reward(part).parts.items()} == {name: float(weight)}


@pytest.mark.parametrize(
    "spec,told",
    [
        ("nothing", "unknown reward 'nothing'.*known are shapes"),
        ("shapes,shapes=2", "twice"),
        ("shapes=x", "is to be a finite number"),
        ("shapes=nan", "finite"),
        ("shapes=inf", "finite"),
        ("", "unknown reward"),
        ("shapes:model", "has no argument"),
        ("clipscore?pages=3", "no argument 'pages'; it has model, batch"),
        ("clipscore?batch=many", "must be a number"),
        ("vlm", "vlm:http"),
        ("vlm:localhost", "vlm:http"),
        ("vlm:http://h/v1?question=@no_file.txt", "no file no_file.txt with the question"),
        ("no_file.py:f", "no file no_file.py"),
        ("file.py", "my_file.py:my_function"),
    ],
)
def test_what_is_wrong_with_a_name_is_told(spec, told):
    with pytest.raises(RewardError, match=told) as error:
        get_reward(spec)
    assert error.value.exit_status == 2


@pytest.mark.parametrize(
    "spec", ["clipscore:/no/such/folder", "geneval?clip=./none", "hpsv2:a/b/c", "aesthetic:../none"]
)
def test_a_folder_that_is_not_there(spec, monkeypatch):
    monkeypatch.setattr(rewards.importlib.util, "find_spec", lambda module: True)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda source, file: "file")
    with pytest.raises(RewardError, match=f"there is no folder {re.split('[:=]', spec)[1]}") as error:
        get_reward(spec).check(["a photo of a dog"])
    assert error.value.exit_status == 2


@pytest.mark.parametrize(
    "name,package,install",
    [
        ("ocr", "rapidocr", "pip install rapidocr onnxruntime"),
        ("hpsv2", "open_clip", "pip install open_clip_torch"),
        ("hpsv3", "hpsv3", "pip install --no-deps hpsv3"),
    ],
)
def test_a_missing_package_is_named_with_its_install_command(name, package, install, monkeypatch):
    monkeypatch.setattr(rewards.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(RewardError, match=f"{name} needs the package {package}.*{install}") as error:
        get_reward(f"shapes=0.5,{name}=0.5")
    assert error.value.exit_status == 2


@pytest.mark.parametrize(
    "function,told",
    [
        (lambda images, prompts: torch.tensor([1.0, float("nan"), 2.0]), "gave nan for 'two'"),
        (lambda images, prompts: torch.tensor([1.0, 2.0, -float("inf")]), "gave -inf for 'three'"),
        (lambda images, prompts: torch.ones(2), r"shape \(2,\) for 3 images.*'one'"),
        (lambda images, prompts: torch.ones(3, 3), r"shape \(3, 3\) for 3 images"),
        (lambda images, prompts: torch.ones(3, 1), r"shape \(3, 1\) for 3 images"),
        (lambda images, prompts: 1 / 0, "failed with ZeroDivisionError: division by zero.*'one'"),
        (lambda images, prompts: None, "failed with"),
        (lambda images: 0, "failed with TypeError"),
    ],
)
def test_a_reward_that_fails_stops_with_its_name_and_prompt(function, told, register):
    register("mine", function)
    with pytest.raises(RewardError, match=f"the reward mine.*{told}") as error:
        get_reward("jpeg_compressibility=0.5,mine=0.5")(noise(), ["one", "two", "three"])
    assert error.value.exit_status == 1


def test_images_that_are_not_finite_are_not_scored():
    images = noise()
    images[1, 0, 3, 4] = float("nan")
    with pytest.raises(RewardError, match="image made for 'two' has pixels that are not finite") as error:
        get_reward("jpeg_compressibility")(images, ["one", "two", "three"])
    assert error.value.exit_status == 1


def test_lists_and_other_dtypes_are_scores_too(register):
    register("mine", lambda images, prompts: [1, 2, 3])
    register("half", lambda images, prompts: torch.ones(3, dtype=torch.float16, requires_grad=True))
    total, parts = get_reward("mine,half")(noise(), list("abc"))
    assert total.tolist() == [2, 3, 4] and all(p.dtype == torch.float32 for p in parts.values())
    assert not total.requires_grad


# ---------------------------------------------------------------- the self-check


def test_self_check_says_which_scored_higher(register):
    register("bright", lambda images, prompts: images.mean((1, 2, 3)))
    images = torch.full((5, 3, 8, 8), 0.9)
    bright, size = get_reward("bright=0.1,jpeg_incompressibility").self_check(images, list("abcde"))
    assert re.match(r"reward bright: 0.9 for images, 0\.[45]\d+ for noise; the images score higher", bright)
    assert size.startswith("reward jpeg_incompressibility: ") and size.endswith("noise scores higher")


def test_self_check_uses_the_scores_that_are_known(register):
    calls = []
    register("mine", lambda images, prompts: calls.append(len(prompts)) or images.mean((1, 2, 3)))
    reward, images = get_reward("mine"), noise(9)
    reward.self_check(images, ["p"] * 9, reward(images, ["p"] * 9)[1])
    assert sum(calls) < 2 * 9


def test_self_check_refuses_what_is_constant_or_fails(register):
    register("zeros", lambda images, prompts: torch.zeros(len(prompts)))
    with pytest.raises(RewardError, match=r"the reward zeros is 0.*nothing can be learned") as error:
        get_reward("jpeg_compressibility,zeros").self_check(noise(4), list("abcd"))
    assert error.value.exit_status == 1
    (line,) = get_reward("zeros").self_check(noise(1), ["a"])  # of one picture that may be chance
    assert "nothing can be learned" in line
    register("fails", lambda images, prompts: 1 / 0)
    with pytest.raises(RewardError, match="the reward fails failed"):
        get_reward("fails").self_check(noise(4), list("abcd"))


# ---------------------------------------------------------------- a reward of one's own

REDNESS = """import torch

def redness(images, prompts):
    red, green, blue = images.mean((2, 3)).unbind(1)
    return red - (green + blue) / 2
"""


def test_own_function(tmp_path):
    file = tmp_path / "my_file.py"
    file.write_text(REDNESS)
    images = noise(4)
    total, parts = get_reward(f"{file}:redness=2")(images, list("abcd"))
    naive = [float(i[0].mean() - (i[1].mean() + i[2].mean()) / 2) for i in images]
    assert parts[f"{file}:redness"].tolist() == pytest.approx(naive, abs=1e-6)
    assert total.tolist() == pytest.approx([2 * n for n in naive], abs=1e-6)
    parts = get_reward(f"{file}:redness,jpeg_compressibility").parts
    assert {name: part.weight for name, part in parts.items()} == {f"{file}:redness": 1, "jpeg_compressibility": 1}


def test_arguments_of_an_own_function_can_be_set(tmp_path):
    file = tmp_path / "my_file.py"
    file.write_text(
        "def f(images, prompts, bonus=0.0, word=''):\n    return [bonus + len(p) + len(word) for p in prompts]\n"
    )
    total, _ = get_reward(f"{file}:f?bonus=1.5&word=a%2Cb%3D=2")(noise(2), ["x", "xyz"])
    assert total.tolist() == [2 * (1.5 + 1 + 4), 2 * (1.5 + 3 + 4)]


def test_own_function_errors(tmp_path):
    file = tmp_path / "my_file.py"
    file.write_text("number = 3\n")
    with pytest.raises(RewardError, match="has no function redness"):
        get_reward(f"{file}:redness")
    with pytest.raises(RewardError, match="has no function number"):
        get_reward(f"{file}:number")
    file.write_text("import no_such_module\n")
    with pytest.raises(RewardError, match=r"cannot be run: ModuleNotFoundError.*no_such_module"):
        get_reward(f"{file}:redness")
    file.write_text("def redness(:\n")
    with pytest.raises(RewardError, match="cannot be run: SyntaxError"):
        get_reward(f"{file}:redness")
