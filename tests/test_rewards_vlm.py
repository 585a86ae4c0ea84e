"""vlm in rewards.py: the openai client against a real server on the loopback; ocr, for real, by RapidOCR."""

import base64
import io
import itertools
import json
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

import common
import rewards
from rewards import get_reward, vlm

needs_openai = pytest.mark.skipif(not find_spec("openai"), reason="vlm needs openai")


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """The client asks a server that fails once more, after half a second."""
    monkeypatch.setattr(rewards, "RETRIES", 1)


def content(body):
    """The picture, as array, and the text of a request."""
    picture, text = body["messages"][0]["content"]
    data = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
    return np.array(Image.open(io.BytesIO(data))), text["text"]


def grey(*levels):
    return torch.stack([torch.full((3, 12, 20), level / 255) for level in levels])


def level(body):
    """How bright the grey picture of a request is."""
    return int(content(body)[0][0, 0, 0])


def score(number):
    return 200, json.dumps({"score": number})


# below, approx's 1e-6 of a score is for its rounding to float32, 6e-8
# ---------------------------------------------------------------- what it asks


@needs_openai
def test_each_picture_is_asked_about_with_its_prompt(serve):
    def answer(body):
        picture, text = content(body)
        assert picture.shape == (12, 20, 3)
        return score(picture[0, 0, 0] / 10 + ('"twice"' in text) * 5)

    server = serve(answer)
    scores, parts = get_reward(f"vlm:{server.url}=2")(grey(10, 20, 30), ["once", "twice", "once"])
    assert scores.tolist() == pytest.approx([2 * 0.1, 2 * 0.7, 2 * 0.3])
    assert parts[f"vlm:{server.url}"].tolist() == pytest.approx([0.1, 0.7, 0.3])
    assert {request["model"] for request in server.requests} == {"first-model"}
    assert {request["path"] for request in server.requests} == {"/v1/chat/completions"}
    assert {request["temperature"] for request in server.requests} == {0}
    for request in server.requests:
        assert request["response_format"]["type"] == "json_schema"
        schema = request["response_format"]["json_schema"]["schema"]
        assert schema["properties"] == {"score": {"type": "number"}} and schema["required"] == ["score"]


@needs_openai
def test_model_question_scale_and_key_can_be_set(serve, monkeypatch):
    monkeypatch.setenv("VLM_API_KEY", "open sesame")
    server = serve(lambda body: score(4))
    scores = vlm(grey(1), ["a dog"], server.url, model="mine", scale=5, question="Is it, say, {prompt}?")
    assert scores.tolist() == pytest.approx([0.8])
    (request,) = server.requests
    assert request["model"] == "mine" and request["key"] == "Bearer open sesame"
    assert content(request)[1] == "Is it, say, a dog?"


@needs_openai
def test_requests_run_side_by_side(serve):
    """Eight at a time: no request is answered before eight have come in, or the barrier breaks."""
    eight = threading.Barrier(8)

    def answer(body):
        eight.wait(30)
        return score(level(body) % 11)

    server = serve(answer)
    scores = vlm(grey(*range(16)), ["p"] * 16, server.url, workers=8)
    assert server.most == 8 and not eight.broken
    assert scores.tolist() == pytest.approx([n % 11 / 10 for n in range(16)])


# ---------------------------------------------------------------- answers without a score

NONE = [None, "", "I like it", "8", "[8]", '{"points": 8}', '{"score": 8', b"<html>", b'{"error": "busy"}']
NONE += [b'{"choices": []}', b'{"choices": [{"message": null}]}']
VALUES = ['"8"', "null", "true", "10.5", "-1", "NaN", "Infinity", "[8]", "1" + "0" * 5000]
NONE += [f'{{"score": {value}}}' for value in VALUES]


@needs_openai
@pytest.mark.parametrize("answer", NONE)
def test_an_answer_without_a_score_is_asked_for_once_more(answer, serve):
    count = itertools.count()
    server = serve(lambda body: score(6) if next(count) else (200, answer))
    assert vlm(grey(1), ["p"], server.url).tolist() == pytest.approx([0.6])
    assert [request["temperature"] for request in server.requests] == [0, 1]


@needs_openai
@pytest.mark.parametrize("text,value", [("0", 0), ("10", 1), ("7.25", 0.725), ("1e1", 1)])
def test_scores_within_the_scale(text, value, serve):
    server = serve(lambda body: (200, f' {{"score": {text}}}\n'))
    assert vlm(grey(1), ["p"], server.url).tolist() == pytest.approx([value])
    assert len(server.requests) == 1


@needs_openai
def test_an_image_without_a_score_gets_the_mean_of_its_prompt_and_teaches_nothing(serve, capsys):
    """Pictures of odd brightness are refused; those of a prompt with no score at all get 0."""
    server = serve(lambda body: (200, "I cannot rate this.") if level(body) % 2 else score(level(body) / 10))
    prompts = ["a", "b", "c", "a", "b", "c", "a", "b", "c"]
    scores = vlm(grey(10, 40, 71, 91, 60, 73, 40, 93, 75), prompts, server.url)
    assert scores.tolist() == pytest.approx([0.1, 0.4, 0, 0.25, 0.6, 0, 0.4, 0.5, 0])
    assert len(server.requests) == 9 + 5
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "vlm: no score for 5 of 9 images; each gets its prompt's mean of the others"
    advantage, _ = common.group_advantage(scores.view(3, 3).T)  # a row per prompt
    assert advantage[0].tolist() == pytest.approx([-1.22, 0, 1.22], abs=0.01)
    assert abs(advantage[0, 1]) < 1e-6 and abs(advantage[1, 2]) < 1e-6  # to the rounding of a mean
    assert advantage[2].tolist() == [0, 0, 0]


def test_means_are_those_of_the_other_images_of_the_prompt():
    rng = random.Random(0)
    for _ in range(50):
        prompts = [rng.choice("abc") for _ in range(12)]
        scores = [rng.choice([None, rng.random()]) for _ in prompts]
        for n, filled in enumerate(rewards.fill_in(scores, prompts)):
            others = [s for s, p in zip(scores, prompts) if p == prompts[n] and s is not None]
            wanted = sum(others) / len(others) if others else 0
            assert filled == (wanted if scores[n] is None else scores[n])


@needs_openai
def test_a_batch_without_any_score_ends_the_run(serve):
    server = serve(lambda body: (200, "I cannot rate\nthis."))
    message = f"error: no answer of {server.url} has a score from 0 to 10; the last one: .*I cannot rate"
    with pytest.raises(SystemExit, match=message) as error:
        get_reward(f"vlm:{server.url}")(grey(1, 2), ["a dog", "a cat"])
    assert "\n" not in str(error.value) and len(server.requests) == 4
    server = serve(lambda body: (200, b"<html>not this page</html>"))
    with pytest.raises(SystemExit, match=r"no answer of .*not this page"):
        vlm(grey(1), ["a dog"], server.url)


# ---------------------------------------------------------------- servers that fail


@needs_openai
@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_fails_at_first_is_asked_again(status, serve):
    count = itertools.count()
    server = serve(lambda body: score(7) if next(count) else (status, b'{"error": "overloaded"}'))
    assert vlm(grey(1), ["p"], server.url).tolist() == pytest.approx([0.7])
    assert [request["temperature"] for request in server.requests] == [0, 0]


@needs_openai
def test_a_slow_answer_is_asked_for_again_and_then_ends_the_run(serve):
    given_up, count = threading.Event(), itertools.count()
    server = serve(lambda body: score(5 if next(count) or given_up.wait(60) else 6))
    assert vlm(grey(1), ["p"], server.url, timeout=0.5).tolist() == pytest.approx([0.5])
    assert len(server.requests) == 2
    server = serve(lambda body: score(5 if given_up.wait(60) else 6))  # answers when it is too late
    with pytest.raises(SystemExit, match=f"error: the server {server.url} gave no answer: Request timed out"):
        vlm(grey(1), ["p"], server.url, timeout=0.2)
    given_up.set()


@needs_openai
def test_a_server_that_refuses_or_is_not_there(serve):
    server = serve(lambda body: (404, b'{"error": {"message": "no model nobody"}}'))
    with pytest.raises(SystemExit, match="gave no answer: Error code: 404 - no model nobody"):
        vlm(grey(1), ["p"], server.url, model="nobody")
    server.models = 401
    with pytest.raises(SystemExit, match="gave no answer: Error code: 401"):
        vlm(grey(1), ["p"], server.url)
    server = serve(lambda body: (200, b'{"choices": ['))  # cut by a proxy, for example
    with pytest.raises(SystemExit, match="gave no answer: Expecting value"):
        vlm(grey(1), ["p"], server.url)
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        port = server.server_port  # free again below
    for url in (f"http://127.0.0.1:{port}/v1", "localhost"):
        with pytest.raises(SystemExit, match=f"error: the server {url} gave no answer: Connection error"):
            get_reward(f"vlm:{url}").load(["p"])


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
    assert rewards.text_score(read, wanted) == pytest.approx(score)  # 1 - 1/3 is not 2/3 in float64


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
def test_quoted_text(prompt, text):
    if text:
        assert rewards.quoted_text(prompt) == text
        return
    with pytest.raises(SystemExit, match=r"error: the reward ocr cannot read a prompt: .*no quoted text"):
        get_reward("ocr").load(['a sign "yes"', prompt])


def written(text, size):
    picture = Image.new("RGB", (448, 128), (250, 240, 220))
    ImageDraw.Draw(picture).text((24, 30), text, (40, 20, 90), ImageFont.load_default(size))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def test_ocr_reads_text_in_pictures():
    pytest.importorskip("rapidocr")
    texts = ["Hello World", "OPEN", "Flow 2026"]
    images = torch.stack([written(text, size) for text, size in zip(texts, (28, 40, 56))])
    reward, prompts = get_reward("ocr"), [f'a sign that says "{text}"' for text in texts]
    assert reward(images, prompts)[0].min() > 0.9 and reward(images[1:2], prompts[:1])[0].item() < 0.4
    assert reward(torch.ones(1, 3, 64, 64), prompts[:1])[0].item() == 0
