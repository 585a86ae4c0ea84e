"""geneval in rewards.py: the parser on generated prompts, the judges on made-up detections."""

import itertools
import random

import pytest

import rewards
from rewards import COCO, GENEVAL_COLOURS, Found, judge, judge_graded, keep_objects, parse_geneval, relations

# ---------------------------------------------------------------- the parser


def article(name):
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def plural(name):  # as GenEval's generator has it
    return name + ("es" if name[-1] == "s" else "s")


def generated_prompts(seed=43, count=100):
    """(prompt, its Wants): all 80 single objects, `count` prompts of each of GenEval's other templates."""
    rng = random.Random(seed)
    colourable = [name for name in COCO if name != "person"]
    for name in COCO:
        yield f"a photo of {article(name)}", [(name, 1, False, None, None)]
    for _ in range(count):
        a, b = rng.sample(COCO, 2)
        wants = [(a, 1, False, None, None), (b, 1, False, None, None)]
        yield f"a photo of {article(a)} and {article(b)}", wants
        n, name = rng.choice([(2, "two"), (3, "three"), (4, "four")]), rng.choice(COCO)
        yield f"a photo of {n[1]} {plural(name)}", [(name, n[0], True, None, None)]
        name, colour = rng.choice(colourable), rng.choice(GENEVAL_COLOURS)
        yield f"a photo of {article(colour)} {name}", [(name, 1, False, colour, None)]
        a, b = rng.sample(COCO, 2)
        relation = rng.choice(["left of", "right of", "above", "below"])
        prompt = f"a photo of {article(a)} {relation} {article(b)}"
        yield prompt, [(b, 1, False, None, None), (a, 1, False, None, relation)]
        (a, b), (c, d) = rng.sample(colourable, 2), rng.sample(GENEVAL_COLOURS, 2)
        prompt = f"a photo of {article(c)} {a} and {article(d)} {b}"
        yield prompt, [(a, 1, False, c, None), (b, 1, False, d, None)]


def test_the_parser_reads_what_the_six_templates_make():
    prompts = list(generated_prompts(count=400))
    assert len(prompts) == 80 + 5 * 400
    for prompt, wants in prompts:
        assert [tuple(want) for want in parse_geneval(prompt)] == wants, prompt


def names(prompt):
    return [want.name for want in parse_geneval(prompt)]


def test_the_parser_reads_every_name_in_every_place():
    assert len(COCO) == len(set(COCO)) == 80
    for name, other in zip(COCO, COCO[1:] + COCO[:1]):
        assert parse_geneval(f"a photo of three {plural(name)}")[0][:2] == (name, 3)
        assert names(f"a photo of {article(name)} and {article(other)}") == [name, other]
        assert names(f"a photo of {article(name)} below {article(other)}") == [other, name]
        for colour in GENEVAL_COLOURS:
            assert parse_geneval(f"a photo of {article(colour)} {name}") == [(name, 1, False, colour, None)]


def test_the_parser_takes_english_plurals_capitals_and_a_full_stop():
    for text, name in [("people", "person"), ("sheep", "sheep"), ("knives", "knife"), ("benches", "bench")]:
        assert parse_geneval(f"A photo of  two {text}.")[0] == (name, 2, True, None, None)
    assert parse_geneval("a photo of an orange") == [("orange", 1, False, None, None)]
    assert parse_geneval("a photo of an orange orange") == [("orange", 1, False, "orange", None)]


@pytest.mark.parametrize(
    "prompt",
    [
        "", "a dog", "a photo of a unicorn", "a photo of two", "a photo of zero dogs",
        "a photo of a dog near a cat", "a photo of a red dog and a cat",
        "a photo of a red dog left of a blue cat", "a photo of a dog and a cat and a cow",
    ],
)  # fmt: skip
def test_other_prompts_are_refused_with_the_templates(prompt):
    with pytest.raises(ValueError, match="a photo of two dogs"):
        parse_geneval(prompt)
    for name in ("geneval", "geneval_graded"):
        with pytest.raises(SystemExit, match=f"error: the reward {name} cannot read.*{prompt!r}"):
            rewards.get_reward(name).load(["a photo of a dog", prompt])


# ---------------------------------------------------------------- relations


def naive_relations(a, b):
    """GenEval's rule for one pair of boxes, written out per axis."""
    holds = set()
    centre_a, centre_b = (((x[0] + x[2]) / 2, (x[1] + x[3]) / 2) for x in (a, b))
    distance = ((centre_a[0] - centre_b[0]) ** 2 + (centre_a[1] - centre_b[1]) ** 2) ** 0.5
    for axis, (less, more) in enumerate([("left of", "right of"), ("above", "below")]):
        margin = 0.1 * ((a[axis + 2] - a[axis]) + (b[axis + 2] - b[axis]))
        gap = abs(centre_a[axis] - centre_b[axis]) - margin
        if distance and gap >= 1e-3 and gap > 0.5 * distance:
            holds.add(less if centre_a[axis] < centre_b[axis] else more)
    return holds


def test_relations_of_random_boxes():
    rng = random.Random(0)
    seen = set()
    for _ in range(3000):
        (ax, bx), (ay, by) = ([rng.uniform(0, 80) for _ in range(2)] for _ in range(2))
        a = (ax, ay, ax + rng.uniform(1, 60), ay + rng.uniform(1, 60))
        b = (bx, by, bx + rng.uniform(1, 60), by + rng.uniform(1, 60))
        assert relations(a, b) == naive_relations(a, b)
        seen.add(frozenset(relations(a, b)))
    assert len(seen) == 9  # none, four, four pairs


def test_relations_by_hand():
    box = (40, 40, 60, 60)
    assert relations((0, 0, 20, 20), box) == {"left of", "above"}
    assert relations(box, box) == set()
    assert relations((42, 40, 62, 60), box) == set()  # 2 apart, of margin 0.1 * (20 + 20) = 4
    assert relations((44, 40, 64, 60), box) == set()  # just at the margin
    assert relations((50, 40, 70, 60), box) == {"right of"}  # 6 beyond it, of 10
    assert relations((47, 40, 67, 60), box) == set()  # 3 beyond it, of 7: under half


# ---------------------------------------------------------------- what counts as found


def thing(name, score=0.95, box=(0, 0, 10, 10), colour=None):
    return Found(name, score, box, None, colour)


@pytest.mark.parametrize(
    "counting,kept", [(False, {"dog": [0.31], "cat": [0.91, 0.9]}), (True, {"cat": [0.91]})]
)
def test_scores_must_be_over_the_threshold(counting, kept):
    found = [thing("dog", 0.3), thing("dog", 0.31), thing("cat", 0.9), thing("cat", 0.91), thing("cow", 0.05)]
    objects = keep_objects(found, counting)
    assert {name: [t.score for t in things] for name, things in objects.items()} == kept


def test_at_most_16_of_a_class_and_the_highest_scores_first():
    scores = [0.31 + n / 100 for n in range(30)]
    random.Random(0).shuffle(scores)
    kept = keep_objects([thing("dog", score) for score in scores], counting=False)["dog"]
    assert [t.score for t in kept] == sorted(scores, reverse=True)[:16]


def test_overlaps_count_and_ties_keep_their_order():
    boxes = [(0, 0, 99, 99), (0, 0, 99, 98), (0, 0, 99, 99), (200, 0, 299, 99)]
    assert [t.box for t in keep_objects([thing("dog", 0.95, box) for box in boxes], True)["dog"]] == boxes


# ---------------------------------------------------------------- the judges

LEFT, RIGHT = (0, 40, 20, 60), (80, 40, 100, 60)


def verdicts(prompt, *found):
    wants = parse_geneval(prompt)
    objects = keep_objects(found, any(want.exact for want in wants))
    return judge(wants, objects), pytest.approx(judge_graded(wants, objects))  # sums of thirds, in float64


@pytest.mark.parametrize(
    "found,one,two",  # verdicts on "a dog", and on "a dog and a cat"
    [
        ([("dog",)], (1, 1), (0, 0.5)),
        ([("dog",), ("cat",)], (1, 1), (1, 1)),
        ([("dog", 0.31), ("cat", 0.32)], (1, 1), (1, 1)),
        ([("dog",), ("dog",)], (1, 0), (0, 0)),  # enough for GenEval, not the number asked for
        ([("cat",)], (0, 0), (0, 0.5)),
        ([("dog", 0.3)], (0, 0), (0, 0)),
        ([], (0, 0), (0, 0)),
        ([("dog",)] * 4, (1, -2), (0, -1)),
    ],
)
def test_one_and_two_objects(found, one, two):
    found = [thing(*each) for each in found]
    assert verdicts("a photo of a dog", *found) == one
    assert verdicts("a photo of a dog and a cat", *found) == two


@pytest.mark.parametrize(
    "there,strict,graded", [(0, 0, 0), (1, 0, 1 / 3), (2, 0, 2 / 3), (3, 1, 1), (4, 0, 2 / 3), (7, 0, -1 / 3)]
)
def test_counting(there, strict, graded):
    found = [thing("dog", 0.91 + n / 1000) for n in range(there)]
    assert verdicts("a photo of three dogs", *found) == (strict, graded)
    found += [thing("dog", 0.9), thing("cat")]  # not counted
    assert verdicts("a photo of three dogs", *found) == (strict, graded)


def test_colours():
    prompt = "a photo of a red car"
    assert verdicts(prompt, thing("car", colour="red")) == (1, 1)
    assert verdicts(prompt, thing("car", colour="blue")) == (0, 0.5)
    assert verdicts(prompt, thing("car", 0.9, colour="red"), thing("car", 0.8, colour="blue")) == (1, 0)
    assert verdicts(prompt, thing("car", 0.8, colour="red"), thing("car", 0.9, colour="blue")) == (0, 0)
    assert verdicts(prompt, thing("bus", colour="red")) == (0, 0)


def test_position():
    prompt = "a photo of a dog left of a cat"
    assert verdicts(prompt, thing("dog", box=LEFT), thing("cat", box=RIGHT)) == (1, 1)
    assert verdicts(prompt, thing("dog", box=RIGHT), thing("cat", box=LEFT)) == (0, 2 / 3)
    assert verdicts(prompt, thing("dog", box=LEFT), thing("cat", box=LEFT)) == (0, 2 / 3)
    assert verdicts(prompt, thing("dog", box=LEFT)) == (0, 1 / 3)
    assert verdicts(prompt, thing("cat", box=RIGHT)) == (0, 1 / 3)
    # the surest dog counts, for GenEval
    dogs = thing("dog", 0.9, LEFT), thing("dog", 0.8, RIGHT)
    assert verdicts(prompt, *dogs, thing("cat", box=(40, 40, 60, 60))) == (1, 1 / 3)
    dogs = thing("dog", 0.8, LEFT), thing("dog", 0.9, RIGHT)
    assert verdicts(prompt, *dogs, thing("cat", box=(40, 40, 60, 60))) == (0, 1 / 3)


def test_position_of_every_relation():
    centre = (40, 40, 60, 60)
    at = {"left of": LEFT, "right of": RIGHT, "above": (40, 0, 60, 20), "below": (40, 80, 60, 100)}
    for asked, there in itertools.product(at, at):
        found = thing("dog", box=at[there]), thing("cat", box=centre)
        assert verdicts(f"a photo of a dog {asked} a cat", *found)[0] == (asked == there)


def test_colour_attribution():
    prompt = "a photo of a red car and a blue bus"
    for car, bus in itertools.product(["red", "blue"], repeat=2):
        right = (car == "red") + (bus == "blue")
        found = thing("car", colour=car), thing("bus", colour=bus)
        assert verdicts(prompt, *found) == (right == 2, (2 + right) / 4)
    assert verdicts(prompt, thing("car", colour="red")) == (0, 0.5)
    assert verdicts(prompt) == (0, 0)
