"""vlm in rewards.py against a real server on the loopback; ocr, for real, if RapidOCR is installed."""

import base64
import io
import itertools
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

import rewards
from rewards import get_reward, read_score, vlm


@pytest.fixture
def sleeps(monkeypatch):
    """The seconds that vlm waits, without waiting."""
    seconds = []
    monkeypatch.setattr(rewards.time, "sleep", seconds.append)
    return seconds


def content(body):
    """The picture, as array, and the text of a request."""
    picture, text = body["messages"][0]["content"]
    data = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
    return np.array(Image.open(io.BytesIO(data))), text["text"]


def grey(*levels):
    return torch.stack([torch.full((3, 12, 20), level / 255) for level in levels])


# ---------------------------------------------------------------- what it answers


def test_each_picture_is_asked_about_with_its_prompt(serve):
    def answer(body):
        picture, text = content(body)
        assert picture.shape == (12, 20, 3)
        return (
            200,
            f"It is {len(text)} letters long.\nScore: {picture[0, 0, 0] / 10 + ('twice' in text) * 5:.1f}/10",
        )

    server = serve(answer)
    scores, parts = get_reward(f"vlm:{server.url}=2")(grey(10, 20, 30), ["once", "twice", "once"])
    assert scores.tolist() == pytest.approx([2 * 0.1, 2 * 0.7, 2 * 0.3])
    assert parts[f"vlm:{server.url}"].tolist() == pytest.approx([0.1, 0.7, 0.3])
    assert {request["model"] for request in server.requests} == {"first-model"}
    assert {request["path"] for request in server.requests} == {"/v1/chat/completions"}
    server.models = 503  # asked for once
    assert vlm(grey(10), ["once"], server.url).tolist() == pytest.approx([0.1])


def test_model_question_scale_and_key_can_be_set(serve, monkeypatch):
    monkeypatch.setenv("VLM_API_KEY", "open sesame")
    server = serve(lambda body: (200, "Final Score: 4"))
    scores = vlm(grey(1), ["a dog"], server.url, model="mine", scale=5, question="Is it, say, {prompt}?")
    assert scores.tolist() == pytest.approx([0.8])
    (request,) = server.requests
    assert request["model"] == "mine" and request["key"] == "Bearer open sesame"
    assert content(request)[1] == "Is it, say, a dog?"


def test_requests_run_side_by_side(serve):
    """Eight at a time: no request is answered before eight have come in, or the barrier breaks."""
    eight = threading.Barrier(8)

    def answer(body):
        eight.wait(30)
        return 200, str(content(body)[0][0, 0, 0] % 11)

    server = serve(answer)
    scores = vlm(grey(*range(16)), ["p"] * 16, server.url, workers=8)
    assert server.most == 8 and not eight.broken
    assert scores.tolist() == pytest.approx([n % 11 / 10 for n in range(16)])


def test_a_server_that_fails_at_first_is_asked_again(serve, sleeps):
    count = itertools.count()
    answers = [(500, b"overloaded"), (200, b'{"error": "busy"}'), (200, b"<html>"), (200, "7")]
    server = serve(lambda body: answers[min(next(count), 3)])
    assert vlm(grey(1), ["p"], server.url).tolist() == pytest.approx([0.7])
    assert sleeps == [1, 5, 25] and [request["temperature"] for request in server.requests] == [0] * 4


def test_an_answer_without_a_score_is_asked_for_again_and_then_an_error(serve, sleeps):
    count = itertools.count()
    server = serve(lambda body: (200, "I like it" if next(count) < 2 else "Score: 6"))
    assert vlm(grey(1), ["p"], server.url).tolist() == pytest.approx([0.6])
    assert [request["temperature"] for request in server.requests] == [0, 1, 1]
    server = serve(lambda body: (200, "I like it"))
    with pytest.raises(SystemExit, match=r"the reward vlm:.*no score from 0 to 10 for 'a dog' .*'I like it'"):
        get_reward(f"vlm:{server.url}")(grey(1, 2), ["a dog", "a dog"])


def test_a_server_that_is_slow_refuses_or_is_not_there(serve, sleeps):
    given_up = threading.Event()
    server = serve(lambda body: (200, "5" if given_up.wait(60) else "6"))  # answers when it is too late
    with pytest.raises(RuntimeError, match="timed out"):
        vlm(grey(1), ["p"], server.url, model="m", timeout=0.2)
    given_up.set()
    server = serve(lambda body: (404, b'{"error": "no model nobody"}'))
    with pytest.raises(RuntimeError, match=r"404.*no model nobody"):
        vlm(grey(1), ["p"], server.url, model="nobody")
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        port = server.server_port  # free again below
    with pytest.raises(SystemExit, match=f"error: the reward vlm:.*{port}/v1 .*refused"):
        get_reward(f"vlm:http://127.0.0.1:{port}/v1").load(["p"])
    for spec in ("vlm", "vlm:localhost"):
        with pytest.raises(SystemExit, match=f"error: the reward {spec} .*url"):
            get_reward(spec).load(["p"])


@pytest.mark.parametrize(
    "answer,score",
    [
        ("8", 8), ("7.5", 7.5), ("0", 0), ("10", 10), ("6,5", 6.5), ("8/10", 8), ("8 out of 10", 8),
        ("I would give it a 9.", 9), ("Score: 8", 8), ("**Score:** 8.0", 8), ("Final Score: 3.5", 3.5),
        ("score (0-10): 7", 7), ("Score (0-10): 7 of 3 cats", 7), ("The score is 6", 6), ("Score: 8,5", 8.5),
        ("I see 3 cats and 2 dogs.\nScore: 4/10", 4), ("Score: 3\nno,\nScore: 5", 5),
        ("Score: 8/10 (good), earlier Score: 2", 8), ("Score: 3/10. Wait.\nFinal score: 9/10, up from 3", 9),
        ("", None), ("good", None), ("3 cats, 2 dogs", None), ("Score: 11", None), ("Score: 7-8", None),
        ("-3", None), ("100", None), ("I give 6,5 of 10", None),
    ],
)  # fmt: skip
def test_read_score(answer, score):
    assert read_score(answer) == score


# ---------------------------------------------------------------- ocr


def naive_distance(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(
        naive_distance(a[1:], b) + 1,
        naive_distance(a, b[1:]) + 1,
        naive_distance(a[1:], b[1:]) + (a[0] != b[0]),
    )


def test_edit_distance_is_that_of_the_definition():
    rng = random.Random(0)
    for _ in range(150):
        a, b = ("".join(rng.choices("abc", k=rng.randrange(6))) for _ in range(2))
        assert rewards.edit_distance(a, b) == naive_distance(a, b)
    assert rewards.edit_distance("kitten", "sitting") == 3


@pytest.mark.parametrize(
    "read,wanted,score",
    [
        ("HELLO world", "Hello World", 1), ("say hello world now", "Hello World", 1), ("", "abc", 0),
        ("abd", "abc", 2 / 3), ("xyzxyzxyz", "abc", 0), ("helo", "hello", 0.8), ("h e l l o", "hello", 1),
    ],
)  # fmt: skip
def test_text_score(read, wanted, score):
    assert rewards.text_score(read, wanted) == pytest.approx(score)


@pytest.mark.parametrize(
    "prompt,text",
    [
        ('a sign that says "Open 24" and "no"', "Open 24"),
        ("a sign, “Open”", "Open"),
        ('a 6" ruler next to a sign that says "OPEN"', "OPEN"),
        ('a sign that says "OPEN" on a 6" x 8" board', "OPEN"),
        ('a man of 5\'10" with a 55" TV that shows "24"', "24"),
        ("a sign", None), ('a "" sign', None), ('a " " sign', None), ('a "sign', None), ('a 6" board"', None),
    ],
)  # fmt: skip
def test_quoted_text(prompt, text, monkeypatch):
    if text:
        assert rewards.quoted_text(prompt) == text
        return
    monkeypatch.setattr(rewards.importlib.util, "find_spec", lambda module: True)
    with pytest.raises(SystemExit, match=r"error: the reward ocr cannot read a prompt: .*no quoted text"):
        get_reward("ocr").load(['a sign "yes"', prompt])


FONTS = [None, "DejaVuSans.ttf", "DejaVuSerif.ttf"]  # None: the one that PIL brings


def written(text, font, size):
    try:
        font = ImageFont.truetype(font, size) if font else ImageFont.load_default(size)
    except OSError:
        pytest.skip(f"the font {font} is not installed")
    picture = Image.new("RGB", (448, 128), (250, 240, 220))
    ImageDraw.Draw(picture).text((24, 30), text, (40, 20, 90), font)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


@pytest.mark.parametrize("font", FONTS)
def test_ocr_reads_text_in_pictures(font):
    pytest.importorskip("rapidocr")
    texts = ["Hello World", "OPEN", "Flow 2026"]
    images = torch.stack([written(text, font, size) for text, size in zip(texts, (28, 40, 56))])
    reward, prompts = get_reward("ocr"), [f'a sign that says "{text}"' for text in texts]
    right, wrong = reward(images, prompts)[0], reward(images[1:], prompts[:2])[0]
    assert right.min() > 0.9 and wrong.max() < 0.4
    assert reward(torch.ones(1, 3, 64, 64), prompts[:1])[0].item() == 0
