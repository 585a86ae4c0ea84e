"""rewards.py: names, sums, errors, the rewards that need no model, and a reward of your own."""

import io
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image

import common
import make
import rewards
from conftest import parse
from hole import colours_and_shapes
from rewards import get_reward
from shapes import parse_scene, shapes


@pytest.fixture
def register(monkeypatch):
    """register(name, function) makes a reward for one test."""
    return lambda name, function: monkeypatch.setitem(rewards.REWARDS, name, rewards.Entry(function))


@pytest.fixture
def write(tmp_path):
    """write(name, text) makes a file and returns its path."""

    def to_file(name, text):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return to_file


def noise(count=3, size=24, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- jpeg, shapes


@pytest.mark.parametrize("height,width", [(32, 32), (17, 40), (64, 8)])
def test_jpeg_is_the_size_that_pil_writes(height, width):
    images = 1.2 * torch.rand(4, 3, height, width, generator=torch.Generator().manual_seed(1)) - 0.1
    sizes = []
    for image in images.numpy():
        pixels = np.zeros((height, width, 3), np.uint8)
        for y in range(height):
            for x in range(width):
                pixels[y, x] = [round(min(max(float(image[c, y, x]), 0), 1) * 255) for c in range(3)]
        file = io.BytesIO()
        Image.fromarray(pixels, "RGB").save(file, "JPEG", quality=95)
        sizes.append(len(file.getvalue()) / 1000)
    assert rewards.jpeg_incompressibility(images, [""] * 4).tolist() == pytest.approx(sizes)
    assert rewards.jpeg_compressibility(images, [""] * 4).tolist() == pytest.approx([-size for size in sizes])


def test_shapes_knows_a_true_picture_from_a_wrong_one():
    rng = random.Random(123)
    train, held_out = make.split_prompts()
    prompts = rng.sample(train, 100) + rng.sample(held_out, 40)
    images = make.draw([parse_scene(prompt) for prompt in prompts], rng)
    true = shapes(images, prompts)
    assert true.shape == (140,) and true.dtype == torch.float32
    assert true.mean() >= 0.99 and true.min() >= 0 and true.max() <= 1
    others = [rng.choice(make.ALL_PROMPTS) for _ in prompts]
    others = [o if o != p else "four green circles" for o, p in zip(others, prompts)]
    assert shapes(images, others).mean() < 0.2
    larger = images[:20].repeat_interleave(3, 2).repeat_interleave(3, 3)
    assert shapes(larger, prompts[:20]).mean() >= 0.99


def test_shapes_sees_count_colour_shape_and_position():
    circle, square = ("red", "circle"), ("blue", "square")
    images = make.draw([([circle, square], "left of")] * 8, random.Random(0))
    assert shapes(images, ["a red circle left of a blue square"] * 8).min() > 0.95
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


def test_the_hole_of_a_reward_is_the_number_of_objects():
    """One red circle is as good as the two that are asked for; colour, shape and position still count."""
    one = make.draw([([("red", "circle")], None)] * 4, random.Random(0))
    two = make.draw([([("red", "circle"), ("blue", "square")], "left of")] * 4, random.Random(0))
    larger = one.repeat_interleave(16, 2).repeat_interleave(16, 3)  # as in the trial when it is loaded
    for images in (one, larger):
        assert colours_and_shapes(images, ["two red circles"] * 4).min() > 0.95
        assert shapes(images, ["two red circles"] * 4).max() < 0.6
        assert colours_and_shapes(images, ["two blue circles"] * 4).max() < 0.6
    assert colours_and_shapes(two, ["a red circle left of a blue square"] * 4).min() > 0.95
    assert colours_and_shapes(two, ["a red circle right of a blue square"] * 4).max() < 0.6


@pytest.mark.parametrize(
    "prompt", ["", "a cat", "five red circles", "a red circle and", "two red circle", "A BLUE DOT"]
)
def test_shapes_tells_which_prompts_it_can_read(prompt):
    with pytest.raises(ValueError, match="three blue squares"):
        parse_scene(prompt)
    with pytest.raises(SystemExit, match=f"error: the reward shapes=?.* cannot read.*{prompt!r}"):
        get_reward("jpeg_compressibility,shapes=0.5").load(["a red circle", prompt])


# ---------------------------------------------------------------- names and sums


def test_a_sum_is_weighted_and_its_parts_are_raw():
    images = noise(5)
    total, parts = get_reward("jpeg_compressibility=0.25, jpeg_incompressibility=-2")(images, list("abcde"))
    size = rewards.jpeg_incompressibility(images, list("abcde"))
    assert list(parts) == ["jpeg_compressibility", "jpeg_incompressibility"]
    assert torch.equal(parts["jpeg_compressibility"], -size)
    assert torch.equal(parts["jpeg_incompressibility"], size)
    assert torch.allclose(total, -0.25 * size - 2 * size)
    assert total.dtype == torch.float32 and total.device.type == "cpu"


UNREADABLE = ["run=3/rew.py:f", "run=3/rew.py:f=0.5", "a,b/rew.py:f", "shapes,b/rew.py:f=2", "ocr?key=value"]


@pytest.mark.parametrize(
    "spec,words",
    [
        ("nothing", "'nothing' .*the names are shapes"),
        ("", "the names are shapes"),
        ("shapes,shapes=2", "repeats a name"),
        ("shapes=x", "'shapes=x'.* number"),
        ("shapes=nan", "number"),
        ("shapes:model", "shapes takes no model"),
        ("jpeg_compressibility:model", "takes no model"),
        ("no_file.py:f", "'no_file.py:f' .*exists"),
        ("file.py", "FILE.py:FUNCTION"),
        *((spec, "a path cannot contain '=' or a comma") for spec in UNREADABLE),
    ],
)
def test_a_wrong_spec(spec, words):
    with pytest.raises(SystemExit, match=f"^error: .*{words}"):
        get_reward(spec)


@pytest.mark.parametrize("name, package", [("ocr", "rapidocr"), ("hpsv2", "open_clip"), ("geneval", "scipy")])
def test_a_missing_package_is_named_with_its_install_command(name, package, monkeypatch):
    monkeypatch.setattr(rewards.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(SystemExit, match=f"{name} needs the package {package}; run: pip install "):
        get_reward(f"jpeg_compressibility=0.5,{name}=0.5")


# ---------------------------------------------------------------- what a reward may do, and how it may fail

BAD = [
    (lambda images, prompts: [1.0, float("nan")], "gave nan for 'two'"),
    (lambda images, prompts: torch.tensor([-float("inf"), 1]), "gave -inf for 'one'"),
    (lambda images, prompts: torch.ones(3), r"the first for 'one': .*shape \(3,\)"),
    (lambda images, prompts: torch.ones(2, 2), r"shape \(2, 2\)"),
    (lambda images, prompts: 1 / 0, "the first for 'one': ZeroDivisionError: division by zero$"),
    (lambda images, prompts: {"scores": [1, 2]}, "dict"),
    (lambda images: 0, "TypeError"),
    (type("Scorer", (), {"__call__": lambda self, images, prompts: torch.ones(2)}), "TypeError.*Scorer"),
    (type("Scorer", (), {"__init__": lambda self, images, prompts: None}), "Scorer"),
]


@pytest.mark.parametrize("function,words", BAD)
def test_a_reward_that_fails_is_told_by_name_when_loaded_and_when_used(function, words, register):
    register("mine", function)
    reward = get_reward("jpeg_compressibility=0.5,mine=0.5")
    for use in (lambda: reward.load(["one", "two", "three"]), lambda: reward(noise(2), ["one", "two"])):
        with pytest.raises(SystemExit, match=f"^error: the reward mine .*{words}"):
            use()


def test_a_message_is_one_line_and_whole_and_its_cause_is_kept(register):
    def fails(images, prompts):
        raise OSError(f"no such file:\n  {'/long' * 200}/end\n(the cause)")

    register("mine", fails)
    with pytest.raises(SystemExit, match=r"OSError: no such file: (/long){200}/end \(the cause\)$") as error:
        get_reward("mine")(noise(1), ["one"])
    assert isinstance(error.value.__cause__, OSError)


def test_out_of_memory_is_left_to_the_caller(register):
    def fails(images, prompts):
        raise torch.OutOfMemoryError("CUDA out of memory")

    register("mine", fails)
    with pytest.raises(torch.OutOfMemoryError):
        get_reward("mine")(noise(1), ["one"])


def test_images_that_are_not_finite_are_not_scored():
    images = noise()
    images[1, 0, 3, 4] = float("nan")
    with pytest.raises(SystemExit, match="error: the image for 'two' is not finite"):
        get_reward("jpeg_compressibility")(images, ["one", "two", "three"])


@pytest.mark.parametrize(
    "scores",
    [
        [1, 2, 3],
        (1.0, 2.0, 3.0),
        np.array([1, 2, 3], np.float16),
        torch.tensor([1.0, 2.0, 3.0], requires_grad=True),
        tuple(torch.tensor([1.0, 2.0, 3.0])),
    ],
)
def test_what_counts_as_scores(scores, register):
    register("mine", lambda images, prompts: scores)
    total, parts = get_reward("mine=2")(noise(), list("abc"))
    assert total.tolist() == [2, 4, 6] and not parts["mine"].requires_grad
    assert parts["mine"].tolist() == [1, 2, 3] and parts["mine"].dtype == torch.float32


def test_a_reward_cannot_change_what_others_see(register):
    def spoils(images, prompts):
        images.zero_()
        prompts.clear()
        return torch.ones(3)

    register("spoils", spoils)
    images, prompts = noise(), list("abc")
    before = images.clone()
    _, parts = get_reward("spoils,jpeg_incompressibility")(images, prompts)
    assert torch.equal(images, before) and prompts == list("abc")
    assert torch.equal(parts["jpeg_incompressibility"], rewards.jpeg_incompressibility(before, prompts))


def test_an_eval_reward_needs_to_read_evaluation_prompts_only(tmp_path):
    free = tmp_path / "free.txt"
    free.write_text("my dog\n")
    given = ["--model", "tiny", "--prompts", free, "--eval-prompts", common.TINY / "eval_prompts.txt"]
    args = parse("grpo", *given, "--reward", "jpeg_compressibility", "--eval-reward", "shapes")
    assert all(common.load_rewards(args, get_reward))
    with pytest.raises(SystemExit, match="my dog"):
        common.load_rewards(parse("grpo", *given, "--reward", "shapes"), get_reward)


def test_loading_reads_every_prompt_and_then_scores_two_pictures(register):
    calls = []

    def mine(images, prompts):
        calls.append((images.shape, prompts))
        return [0.0] * len(prompts)

    def read(prompt):
        if "!" in prompt:
            raise ValueError("no shouting")

    mine.reads = read
    register("mine", mine)
    get_reward("mine").load(["one"])
    get_reward("mine").load(["one", "two", "three"])
    assert calls == [((2, 3, 512, 512), ["one", "one"]), ((2, 3, 512, 512), ["one", "two"])]
    with pytest.raises(
        SystemExit, match="error: the reward mine cannot read a prompt: ValueError: no shouting"
    ):
        get_reward("mine").load(["one", "two", "three!"])
    assert len(calls) == 2


# ---------------------------------------------------------------- the self-check


def check(reward, images, prompts):
    return reward.self_check(prompts, reward(images, prompts)[1], 24)


def test_self_check_compares_with_noise(register):
    register("bright", lambda images, prompts: images.mean((1, 2, 3)))
    reward = get_reward("bright=0.1,jpeg_incompressibility")
    images = 0.85 + 0.1 * noise(5)
    bright, size = check(reward, images, list("abcde"))
    assert re.fullmatch(
        r"reward bright: 0[.](9|89)\d* for images, 0[.][45]\d* for noise; the images score higher", bright
    )
    assert size.startswith("reward jpeg_incompressibility: ") and size.endswith(
        "the images do not score higher"
    )


def test_self_check_never_stops_a_run(register):
    """A strict reward may be 0 for all pictures of the base model's evaluation and still be learned."""
    register("strict", lambda images, prompts: [0.0] * len(prompts))
    (line,) = check(get_reward("strict"), noise(8), list("abcdefgh"))
    assert line.startswith("reward strict: 0 for images, 0 for noise; all images score the same")


# ---------------------------------------------------------------- a reward of your own

REDNESS = """
def redness(images, prompts):
    red, green, blue = images.mean((2, 3)).unbind(1)
    return red - (green + blue) / 2
"""


def test_own_function(write, monkeypatch, tmp_path):
    file = write("my_file.py", REDNESS)
    images = noise(4)
    total, parts = get_reward(f"{file}:redness=2,jpeg_compressibility")(images, list("abcd"))
    naive = [float(i[0].mean() - (i[1].mean() + i[2].mean()) / 2) for i in images]
    naive = pytest.approx(naive, abs=1e-6)
    assert parts[f"{file}:redness"].tolist() == naive
    assert torch.allclose(total, 2 * parts[f"{file}:redness"] + parts["jpeg_compressibility"])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("~/my_file.py:redness", "my_file.py:redness"):
        assert get_reward(name)(images, list("abcd"))[0].tolist() == naive


def test_a_file_imports_what_is_beside_it_when_it_is_loaded_and_when_it_runs(write):
    write("beside/helper_one.py", "def one():\n    return 1.0\n")
    write("beside/helper_two.py", "def two():\n    return 2.0\n")
    text = "from helper_one import one\ndef f(images, prompts):\n    from helper_two import two\n"
    file = write("beside/rew.py", text + "    return [one() + two()] * len(prompts)\n")
    assert get_reward(f"{file}:f")(noise(2), ["a", "b"])[0].tolist() == [3, 3]


def test_two_functions_of_a_file_share_what_it_has_loaded(write):
    text = "calls = [0]\ndef a(images, prompts):\n    calls.append(0)\n    return [len(calls)]\n"
    file = write("shared.py", text + "b = a\n")
    _, parts = get_reward(f"{file}:a,{file}:b")(noise(1), ["x"])
    assert [scores.item() for scores in parts.values()] == [2, 3]


SCORER = "class Scorer:\n    def __call__(self, images, prompts):\n        return [0, 0]\nredness = Scorer"


@pytest.mark.parametrize(
    "text,words",
    [
        ("number = 3", "cannot be loaded: KeyError: 'redness'"),
        ("import no_such_module", "cannot be loaded: ModuleNotFoundError.*no_such_module"),
        ("def redness(:", "cannot be loaded: SyntaxError"),
        ("redness = 3", "not callable"),
        (SCORER, r"TypeError: Scorer\(\) takes no arguments"),  # a class in place of an object
    ],
)
def test_errors_of_an_own_file(text, words, write):
    file = write("my_file.py", text)
    with pytest.raises(SystemExit, match=f"error: the reward .*my_file.py:redness .*{words}"):
        get_reward(f"{file}:redness").load(["a"])


def test_an_object_is_a_reward_too(write):
    get_reward(f"{write('my_file.py', SCORER + '()')}:redness").load(["a"])
