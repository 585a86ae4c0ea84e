"""rewards.py: names, sums, errors, the rewards that need no model, and a reward of your own."""

import io
import multiprocessing
import random
import re
import sys
import traceback

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
    return lambda name, function: monkeypatch.setitem(rewards.REWARDS, name, function)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(name, text) makes a file and returns its path. sys.path is put back after the test."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def to_file(name, text):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return to_file


def failure(function, *arguments):
    """What Python prints about the exception of a call, with traceback and notes."""
    with pytest.raises(Exception) as error:
        function(*arguments)
    return "".join(traceback.format_exception(error.value))


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
    assert torch.equal(rewards.jpeg_incompressibility(images, [""] * 4), torch.tensor(sizes))
    assert torch.equal(rewards.jpeg_compressibility(images, [""] * 4), -torch.tensor(sizes))


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
    assert torch.allclose(total, -2.25 * size, rtol=1e-6)  # three roundings of float32, 6e-8 each
    assert total.dtype == torch.float32 and total.device.type == "cpu"


@pytest.mark.parametrize(
    "spec,words",
    [
        ("nothing", "there is no reward .*'nothing'.*the names are shapes"),
        ("pickscor", "there is no reward 'pickscor'; did you mean 'pickscore'[?]$"),
        ("", "the names are shapes"),
        ("shapes,shapes=2", "two parts of the reward are named 'shapes'"),
        ("shapes=x", "'shapes=x'.* number"),
        ("shapes=nan", "number"),
        ("shapes:model", "shapes takes no model"),
        ("no_file.py:f", "no FILE.py:FUNCTION 'no_file.py:f'"),
        ("vlm", "vlm needs a server; write vlm:URL"),
        ("file.py", "FILE.py:FUNCTION"),
        ("run=3/rew.py:f=0.5", "a path cannot contain '=' or a comma"),
    ],
)
def test_a_wrong_spec(spec, words):
    with pytest.raises(SystemExit, match=f"^error: .*{words}"):
        get_reward(spec)


MISSING = [("ocr", "rapidocr", "rapidocr onnxruntime"), ("vlm:http://127.0.0.1:1", "openai", "openai")]


@pytest.mark.parametrize("name,package,install", MISSING)
def test_a_missing_package_is_told_with_its_install_command(name, package, install, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    rewards.load_ocr.cache_clear()
    told = failure(get_reward(name), noise(1), ['a sign that says "one"'])
    assert "ModuleNotFoundError" in told and told.endswith(f"\npip install {install}\n")


def test_the_package_of_hpsv3_is_told_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(sys, "path", [])  # where it may be installed
    told = failure(get_reward("hpsv3"), noise(1), ["one"])
    assert "PackageNotFoundError" in told and told.endswith("\npip install --no-deps hpsv3\n")


# ---------------------------------------------------------------- what a reward may do, and how it may fail

BAD = [
    (lambda images, prompts: [1.0, float("nan")], "gave nan for 'two'$"),
    (lambda images, prompts: torch.tensor([-float("inf"), 1]), "gave -inf for 'one'$"),
    (lambda images, prompts: torch.ones(3), r"shape \(3,\) for 2 images, the first for 'one'$"),
]
RAISES = [
    (lambda images, prompts: 1 / 0, "ZeroDivisionError"),
    (lambda images, prompts: {"scores": [1, 2]}, "dict"),
    (lambda images: 0, "TypeError"),
    (type("Scorer", (), {"__call__": lambda self, images, prompts: torch.ones(2)}), "TypeError: Scorer"),
    (lambda images, prompts: torch.ones(10**14), "DefaultCPUAllocator"),  # common.py looks for this word
]


def uses(function, register):
    """The two ways in which a reward is called."""
    register("mine", function)
    reward = get_reward("jpeg_compressibility=0.5,mine=0.5")
    return lambda: reward.load(["one", "two", "three"]), lambda: reward(noise(2), ["one", "two"])


@pytest.mark.parametrize("function,words", BAD)
def test_scores_that_are_none_are_told_in_one_line_when_loaded_and_when_used(function, words, register):
    for use in uses(function, register):
        with pytest.raises(SystemExit, match=f"^error: the reward mine .*{words}"):
            use()


@pytest.mark.parametrize("function,words", RAISES)
def test_an_exception_keeps_its_traceback_and_names_reward_and_prompt(function, words, register):
    for use in uses(function, register):
        told = failure(use)
        assert words in told and told.endswith("\nin the reward mine, with 2 images, the first for 'one'\n")


def test_images_that_are_not_finite_are_not_scored():
    images = noise()
    images[1, 0, 3, 4] = float("nan")
    with pytest.raises(SystemExit, match="error: the image for 'two' is not finite"):
        get_reward("jpeg_compressibility")(images, ["one", "two", "three"])


@pytest.mark.parametrize(
    "scores",
    [
        [1, 2, 3],
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
    with pytest.raises(SystemExit, match="error: the reward mine cannot read a prompt: no shouting"):
        get_reward("mine").load(["one", "two", "three!"])
    assert len(calls) == 2


# ---------------------------------------------------------------- the self-check


def test_self_check_compares_with_noise(register, capsys):
    """A strict reward may be 0 for all pictures of the base model's evaluation and still be learned."""
    register("bright", lambda images, prompts: images.mean((1, 2, 3)))
    register("strict", lambda images, prompts: [0.0] * len(prompts))
    reward, prompts = get_reward("bright=0.1,jpeg_incompressibility,strict"), list("abcde")
    reward.self_check(prompts, reward(0.85 + 0.1 * noise(5), prompts)[1], 24)
    bright, size, strict = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"reward bright: 0[.](9|89)\d* for images, 0[.][45]\d* for noise; the images score higher", bright
    )
    assert size.startswith("reward jpeg_inc") and size.endswith("the images do not score higher")
    assert strict.startswith("reward strict: 0 for images, 0 for noise; all images score the same")


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
    naive = pytest.approx(naive, abs=1e-6)  # float32 means of 576 numbers up to 1: some 1e-7
    assert parts["my_file.py:redness"].tolist() == naive  # named without its folder
    assert torch.allclose(total, 2 * parts["my_file.py:redness"] + parts["jpeg_compressibility"])
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


POOL = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from helper_{method} import half

def double(x):
    return 2 * x

def f(images, prompts):
    with ProcessPoolExecutor(1, multiprocessing.get_context("{method}")) as pool:
        return list(pool.map(double, range(len(prompts)))) + list(pool.map(half, []))
"""


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_a_file_may_use_a_process_pool(method, write):
    """Its functions are found by another process, which may be a new Python."""
    write(f"pool/helper_{method}.py", "def half(x):\n    return x / 2\n")
    file = write(f"pool/pool_{method}.py", POOL.format(method=method))
    assert get_reward(f"{file}:f")(noise(3), ["a", "b", "c"])[0].tolist() == [0, 2, 4]
    assert sys.modules[f"pool_{method}"].f.__module__ == f"pool_{method}"


@pytest.mark.parametrize("name", ["rewards", "random", "a.b"])
def test_a_file_may_have_any_name(name, write):
    before = sys.modules.get(name)
    text = "import rewards, random\ndef f(images, prompts):\n    return [7.0]\n"
    total, parts = get_reward(f"{write(f'{name}.py', text)}:f")(noise(1), ["x"])
    assert total.item() == 7 and list(parts) == [f"{name}.py:f"]
    assert before is None or sys.modules[name] is before
    assert rewards is sys.modules["rewards"]


def test_files_of_one_name_and_functions_of_one_file(write):
    text = "calls = []\ndef {0}(images, prompts):\n    calls.append(0)\n    return [len(calls)]\n{0}2 = {0}\n"
    one, two, three = (write(f"{name}/score.py", text.format(name)) for name in "fgh")
    _, parts = get_reward(f"{one}:f,{two}:g,{two}:g2")(noise(1), ["x"])
    assert [scores.item() for scores in parts.values()] == [1, 1, 2]  # those of a file share what it holds
    three.write_text(text.format("f"))
    with pytest.raises(SystemExit, match=r"two parts of the reward are named 'score\.py:f'"):
        get_reward(f"{one}:f,{three}:f")


def test_the_function_is_after_the_last_colon(write, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write("C:\\x\\my.py", "def f(images, prompts):\n    return [5.0]\n")  # a path of Windows, a name here
    assert get_reward("C:\\x\\my.py:f=2")(noise(1), ["x"])[0].item() == 10


@pytest.mark.parametrize("text", ["number = 3", "redness = 3"])
def test_a_file_without_the_function(text, write):
    with pytest.raises(SystemExit, match="error: there is no function redness in /"):
        get_reward(f"{write('my_file.py', text)}:redness")


def test_an_object_is_a_reward_too(write):
    text = "class Scorer:\n    def __call__(self, images, prompts):\n        return [0, 0]\nscorer = Scorer()"
    get_reward(f"{write('my_file.py', text)}:scorer").load(["a"])
