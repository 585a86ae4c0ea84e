"""vlm in rewards.py, against a real HTTP server on the loopback; ocr, for real, where RapidOCR is installed."""

import base64
import io
import itertools
import random
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rewards
from rewards import RewardError, get_reward, read_score


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
        return 200, f"It is {len(text)} letters long.\nScore: {picture[0, 0, 0] / 10 + ('twice' in text) * 5:.1f}/10"

    server = serve(answer)
    scores, parts = get_reward(f"vlm:{server.url}=2")(grey(10, 20, 30), ["once", "twice", "once"])
    assert scores.tolist() == pytest.approx([2 * 0.1, 2 * 0.7, 2 * 0.3])
    assert parts[f"vlm:{server.url}"].tolist() == pytest.approx([0.1, 0.7, 0.3])
    assert {request["model"] for request in server.requests} == {"first-model"}
    assert {request["path"] for request in server.requests} == {"/v1/chat/completions"}


def test_model_question_and_scale_can_be_set(serve, monkeypatch, tmp_path):
    monkeypatch.setenv("VLM_API_KEY", "open sesame")
    server = serve(lambda body: (200, "Final Score: 4"))
    spec = f"vlm:{server.url}?model=mine&scale=5&question=Is+it%2C+say%2C+%7Bprompt%7D%3F=0.5"
    total, _ = get_reward(spec)(grey(1), ["a dog"])
    assert total.tolist() == pytest.approx([0.5 * 0.8])
    (request,) = server.requests
    assert request["model"] == "mine" and request["key"] == "Bearer open sesame"
    assert content(request)[1] == "Is it, say, a dog?"
    (tmp_path / "question.txt").write_text("Rate {prompt}, please.")
    get_reward(f"vlm:{server.url}?question=@{tmp_path}/question.txt")(grey(1), ["a cat"])
    assert content(server.requests[1])[1] == "Rate a cat, please."


def test_requests_run_side_by_side(serve):
    """Eight at a time: no request is answered before eight have come in, or the barrier breaks."""
    eight = threading.Barrier(8)

    def answer(body):
        eight.wait(30)
        return 200, str(content(body)[0][0, 0, 0] % 11)

    server = serve(answer)
    scores, _ = get_reward(f"vlm:{server.url}?workers=8")(grey(*range(16)), ["p"] * 16)
    assert server.most == 8 and not eight.broken
    assert scores.tolist() == pytest.approx([n % 11 / 10 for n in range(16)])


def test_a_server_that_fails_at_first_is_asked_again(serve):
    count = itertools.count()
    answers = [(500, b"overloaded"), (429, b"{}"), (200, b"<html>"), (200, "7")]
    server = serve(lambda body: answers[min(next(count), 3)])
    scores, _ = get_reward(f"vlm:{server.url}")(grey(1), ["p"])
    assert scores.tolist() == pytest.approx([0.7]) and len(server.requests) == 4


def test_an_answer_without_a_number_is_asked_for_again_and_then_an_error(serve):
    count = itertools.count()
    server = serve(lambda body: (200, "I like it" if next(count) < 2 else "Score: 6"))
    assert get_reward(f"vlm:{server.url}")(grey(1), ["p"])[0].tolist() == pytest.approx([0.6])
    assert [request["temperature"] for request in server.requests] == [0, 0.5, 1]
    server = serve(lambda body: (200, "I like it"))
    with pytest.raises(
        RewardError, match=r"the reward vlm:.*no score from 0 to 10 for 'a dog' but 'I like it'"
    ) as error:
        get_reward(f"vlm:{server.url}")(grey(1, 2), ["a dog", "a dog"])
    assert error.value.exit_status == 1


def test_a_slow_server_is_waited_for_within_the_time_out(serve):
    server = serve(lambda body: (time.sleep(0.6), (200, "5"))[1])
    assert get_reward(f"vlm:{server.url}?timeout=30")(grey(1), ["p"])[0].tolist() == pytest.approx([0.5])
    given_up = threading.Event()
    server = serve(lambda body: (200, "5" if given_up.wait(60) else "6"))  # answers when it is too late
    with pytest.raises(RewardError, match=r"no answer within the time-out.*timed out") as error:
        get_reward(f"vlm:{server.url}?timeout=1&model=m")(grey(1, 2), ["p", "p"])
    given_up.set()
    assert error.value.exit_status == 1 and len(server.requests) <= 2  # none is asked twice


class Clock:
    """In place of the module time, for one thread: who sleeps moves it on."""

    def __init__(self):
        self.sleeps = []

    def monotonic(self):
        return sum(self.sleeps)

    def sleep(self, seconds):
        self.sleeps.append(seconds)


def test_a_server_that_never_comes_up_is_an_error_within_the_time_out(monkeypatch):
    """It is asked again at ever longer intervals while the time-out lasts; of 40 pictures, only about the first."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        port = server.server_port  # free again below
    monkeypatch.setattr(rewards, "time", clock := Clock())
    with pytest.raises(RewardError, match=rf"the server at http://127.0.0.1:{port}/v1.*time-out.*refused") as error:
        get_reward(f"vlm:http://127.0.0.1:{port}/v1?timeout=20&model=m&workers=1")(grey(*range(40)), ["p"] * 40)
    assert error.value.exit_status == 1 and clock.sleeps == [0.5, 1, 2, 4, 8]  # the next would end after 23.5


def test_a_request_that_is_refused_is_not_repeated(serve):
    server = serve(lambda body: (404, b'{"error": "no model nobody"}'))
    with pytest.raises(RewardError, match=r"refused: status 404.*no model nobody"):
        get_reward(f"vlm:{server.url}?model=nobody")(grey(1), ["p"])
    assert len(server.requests) == 1
    server = serve(lambda body: (200, b'{"choices": []}'))
    with pytest.raises(RewardError, match="no chat completion"):
        get_reward(f"vlm:{server.url}")(grey(1), ["p"])


@pytest.mark.parametrize(
    "answer,score",
    [
        ("8", 8), ("7.5", 7.5), ("0", 0), ("10", 10), ("Score: 8", 8), ("**Score:** 8.0", 8), ("Final Score: 3.5", 3.5),
        ("score (0-10): 7", 7), ("8/10", 8), ("8 out of 10", 8), ("I see 3 cats and 2 dogs.\nScore: 4/10", 4),
        ("I would give it a 9.", 9), ("The score is 6", 6), ("Score: 3\nno,\nScore: 5", 5),
        ("", None), ("good", None), ("3 cats, 2 dogs", None), ("Score: 11", None), ("-3", None), ("100", None),
    ],
)  # fmt: skip
def test_read_score(answer, score):
    assert read_score(answer) == score


# ---------------------------------------------------------------- ocr


def naive_distance(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(
        naive_distance(a[1:], b) + 1, naive_distance(a, b[1:]) + 1, naive_distance(a[1:], b[1:]) + (a[0] != b[0])
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


def test_quoted_text(monkeypatch):
    assert rewards.quoted_text('a sign that says "Open 24" and "no"') == "Open 24"
    assert rewards.quoted_text("a sign, “Open”") == "Open"
    monkeypatch.setattr(rewards.importlib.util, "find_spec", lambda module: True)
    for prompt in ("a sign", 'a "" sign', 'a " " sign', 'a "sign'):
        with pytest.raises(RewardError, match="finds no quoted text"):
            get_reward("ocr").check(['a sign "yes"', prompt])


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
    print(font, right.tolist(), wrong.tolist())
    assert right.min() > 0.9 and wrong.max() < 0.4
    assert reward(torch.ones(1, 3, 64, 64), prompts[:1])[0].item() == 0
