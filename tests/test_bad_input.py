"""Bad input, through the command line itself: one line on standard error, status 2, nothing written."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from conftest import ROOT, cli, errors, metrics, small

import pytest

# options; what the line must say. {tmp} is a folder with the files that `files` makes
SHARED = [
    ("--prompts {tmp}/missing.txt", "cannot be read"),
    ("--prompts {tmp}/empty.txt", "has no prompts"),
    ("--prompts {tmp}/comments.txt", "has no prompts"),
    ("--prompts {tmp}", "cannot be read"),
    ("--prompts {tmp}/latin1.txt", "is not UTF-8"),
    ("--prompts {tmp}/utf16.txt", "is not UTF-8"),
    ("--prompts {tmp}/binary.txt", "NUL"),
    ("--prompts {tmp}/dog.txt", "a red dog"),
    ("--prompts {tmp}/emoji.txt --model tiny", "cannot read the prompt"),
    ("--eval-prompts {tmp}/missing.txt", "cannot be read"),
    ("--model {tmp} --prompts {tmp}/good.txt", "is no diffusers pipeline"),
    ("--model {tmp}/other --prompts {tmp}/good.txt", "this code knows"),
    ("--model ../../nowhere/at/all --prompts {tmp}/good.txt", "is no diffusers pipeline"),
    ("--reward nosuch", "nosuch"),
    ("--reward shapes=much", "much"),
    ("--reward shapes,shapes", "shapes"),
    ("--reward {tmp}/nothing.py:score", "nothing.py"),
    ("--frobnicate 3", "frobnicate"),
    ("--learning-rate nan", "--learning-rate"),
    ("--learning-rate -1", "--learning-rate"),
    ("--learning-rate much", "much"),
    ("--steps 1", "--steps"),
    ("--steps 1000000000000", "--steps"),
    ("--prompts-per-iteration 0", "--prompts-per-iteration"),
    ("--micro-batch -3", "--micro-batch"),
    ("--guidance inf", "--guidance"),
    ("--noise-level 0", "--noise-level"),
    ("--resolution 33", "--resolution"),
    ("--resolution 64", "--resolution"),
    ("--sde euler", "euler"),
    ("--dtype int8", "int8"),
    ("--device cuda:99", "--device"),
    ("--ema-decay 1", "--ema-decay"),
    ("--updates-per-iteration 7", "do not divide"),
    ("--output {tmp}/full", "in the way"),
    ("--output {tmp}/good.txt", "in the way"),
    ("--resume {tmp}", "is no run that"),
    ("--resume {tmp}/missing", "is no run that"),
    ("--sde-steps 10", "is neither all, early"),
    ("--sde-steps 0,9", "within 0 to 8"),
    ("--sde-steps 3,1", "--sde-steps"),
    ("--sde-steps most", "--sde-steps"),
    ("--wandb mine", "wandb"),
]
OWN = {
    "grpo": [("--group-size 1", "--group-size"), ("--group-size two", "two")],
    "gcpo": [
        ("--group-size 1", "--group-size"),
        ("--chunks 2,2", "must add up to 5"),
        ("--chunks 2,3 --sde-steps all", "must add up to 9"),
        ("--chunks 9,0", "from 1 on"),
        ("--chunks=-1,10", "from 1 on"),
        ("--chunks some", "neither adaptive nor a list"),
        ("--chunks 2,,7", "neither adaptive nor a list"),
        ("--sde-steps 3", "must be consecutive"),
        ("--sde-steps 0,2", "must be consecutive"),
        ("--sde-steps 2,3,4 --chunks 2,2", "must add up to 3"),
        ("--chunk-fraction 0", "--chunk-fraction"),
        ("--chunk-fraction 2", "--chunk-fraction"),
        ("--chunk-max 0", "--chunk-max"),
        ("--eval-hybrid 1.5", "--eval-hybrid"),
    ],
    "tempflow_grpo": [
        ("--branches 1", "--branches"),
        ("--seeds-per-prompt 0", "--seeds-per-prompt"),
        ("--group image", "image"),
        ("--weighting some", "some"),
    ],
}
# all of the shared ones with one script, every third with the others: the code is the same
CASES = [("grpo", *case) for case in SHARED + OWN["grpo"]]
CASES += [(s, *case) for n, s in enumerate(("gcpo", "tempflow_grpo")) for case in SHARED[n::3] + OWN[s]]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "empty.txt").write_text("\n\n  \n")
    (folder / "comments.txt").write_text("# one\n# two\n")
    (folder / "latin1.txt").write_bytes("un carré rouge\n".encode("latin-1"))
    (folder / "utf16.txt").write_bytes("a red circle\n".encode("utf-16"))
    (folder / "binary.txt").write_bytes(bytes(range(0, 128)) * 10)
    (folder / "dog.txt").write_text("a red circle\na red dog\n")
    (folder / "emoji.txt").write_text("a red circle \N{CAT FACE}\n", encoding="utf-8")
    (folder / "good.txt").write_text("a red circle\n")
    (folder / "other").mkdir()
    (folder / "other" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("something")
    return folder


def test_bad_input(files):
    assert len(CASES) >= 60
    before = sorted(files.rglob("*"))

    def run(case):
        script, options, _ = case
        options = [part.replace("{tmp}", str(files)) for part in options.split()]
        output = [] if {"--output", "--resume"} & set(options) else ["--output", str(files / "run")]
        command = [sys.executable, str(ROOT / f"{script}.py"), *options, *output]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=files)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(run, CASES))
    wrong = []
    for (script, options, says), process in zip(CASES, done):
        lines = errors(process.stderr)
        fine = process.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0]
        if not fine:
            wrong.append((script, options, process.returncode, process.stderr[-400:]))
    assert not wrong
    assert sorted(files.rglob("*")) == before


def test_prompts_that_are_unusual_and_legal(tmp_path):
    """CRLF, a BOM, duplicates, 10,000 characters, emoji; a prompt that looks like a path stays a prompt."""
    prompts = ["a red circle", "a red circle", "x" * 10_000, "\N{CAT FACE} été", "../../etc/passwd", "/tmp/x.png"]
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(["# mine", "", *prompts]).encode("utf-8"))
    options = ["--prompts", file, "--reward", "jpeg_compressibility", "--iterations", "2", "--output", tmp_path / "run"]
    done = cli("grpo", *small("grpo"), *options)
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "run")[-1]["iteration"] == 2
    assert {path.name for path in (tmp_path / "run" / "samples").iterdir()} == {
        "0.png",
        "2.png",
        "compare.png",
        "progress.png",
        "steps.png",
    }


def test_one_prompt_only(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("two blue squares")
    done = cli("grpo", *small("grpo"), "--prompts", file, "--iterations", "1", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
