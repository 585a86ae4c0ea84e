"""Bad input is one clear line before any model is loaded, and nothing is written."""

import json
import sys

import pytest

import common
from conftest import SCRIPTS, cli, here, metrics, parse, small

# options, and a word that the line must have. {tmp} is a folder with the files that `files` makes
SHARED = [
    ("--prompts {tmp}/missing.txt", "cannot be read"),
    ("--prompts {tmp}/comments.txt", "no prompts"),
    ("--prompts {tmp}/latin1.txt", "cannot be read"),
    ("--prompts {tmp}/binary.txt", "NUL"),
    ("--prompts {tmp}/other.jsonl", '\'prompt\' {"text": "a red circle"}'),
    ("--prompts {tmp}/list.json", "cannot be read"),
    ("--prompts ~good.txt", "cannot be read"),
    (f"--prompts {'long' * 100}", "cannot be read"),
    ("--eval-prompts {tmp}/missing.txt", "cannot be read"),
    ("--model {tmp} --prompts {tmp}/good.txt", "is not a diffusers pipeline"),
    ("--model {tmp}/other --prompts {tmp}/good.txt", "StableDiffusionPipeline"),
    ("--model {tmp}/unipc --prompts {tmp}/good.txt", "UniPCMultistepScheduler"),
    ("--learning-rate nan", "--learning-rate"),
    ("--steps 1", "--steps"),
    ("--guidance inf", "--guidance"),
    ("--noise-level 0", "--noise-level"),
    ("--sde cps --noise-level 1.5", "--noise-level"),
    ("--ema-decay 1.5", "--ema-decay"),
    ("--device cuda:99", "--device"),
    ("--output {tmp}/full", "already exists"),
    ("--output {tmp}/good.txt", "already exists"),
    ("--resume {tmp}", "not a run folder"),
    ("--wandb mine", "pip install wandb"),
]
LATER = [  # found by the script, with the model not yet loaded
    ("grpo", "--group-size 1", "group of one"),
    ("grpo", "--updates-per-iteration 7", "cannot divide"),
    ("grpo", "--sde-steps 0,9", "within 0 to 8"),
    ("grpo", "--sde-steps 3,1", "--sde-steps"),
    ("grpo", "--sde-steps most", "--sde-steps"),
    ("grpo", "--resolution 33", "--resolution"),
    ("grpo", "--reward nosuch", "nosuch"),
    ("grpo", "--reward ~nobody/r.py:f", "no FILE.py"),
    ("grpo", f"--reward {'long' * 100}.py:f", "no FILE.py"),
    ("grpo", "--prompts {tmp}/dog.txt --model tiny", "a red dog"),
    ("gcpo", "--chunks 2,2", "add up to 5"),
    ("gcpo", "--chunks 9,0", "--chunks"),
    ("gcpo", "--chunks some", "--chunks"),
    ("gcpo", "--sde-steps 3", "consecutive"),
    ("gcpo", "--sde-steps 0,2", "consecutive"),
    ("gcpo", "--eval-hybrid 1.5", "--eval-hybrid"),
    ("tempflow_grpo", "--branches 1", "group of one"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "comments.txt").write_text("# one\n\n  \n# two\n")
    (folder / "latin1.txt").write_bytes("un carré rouge\n".encode("latin-1"))
    (folder / "binary.txt").write_bytes(bytes(range(0, 128)) * 10)
    (folder / "dog.txt").write_text("a red circle\na red dog\n")
    (folder / "good.txt").write_text("a red circle\n")
    (folder / "list.json").write_text('[\n"a red circle"\n]\n')
    (folder / "other.jsonl").write_text('{"prompt": "a blue circle"}\n{"text": "a red circle"}\n')
    for name, pipeline, scheduler in (
        ("other", "StableDiffusionPipeline", "FlowMatchEulerDiscreteScheduler"),
        ("unipc", "StableDiffusion3Pipeline", "UniPCMultistepScheduler"),
    ):
        index = {"_class_name": pipeline, "scheduler": ["diffusers", scheduler]}
        (folder / name).mkdir()
        (folder / name / "model_index.json").write_text(json.dumps(index))
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("something")
    return folder


@pytest.mark.parametrize("script, options, word", [("grpo", *case) for case in SHARED] + LATER)
def test_bad_input(script, options, word, files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setattr(common, "Policy", None)  # whoever gets so far fails
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    before = sorted(files.rglob("*"))
    options = options.replace("{tmp}", str(files)).split()
    output = [] if {"--output", "--resume"} & set(options) else ["--output", files / "run"]
    done = here(script, *options, *output)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode and word in line and "Traceback" not in done.stderr
    assert sorted(files.rglob("*")) == before


def test_tyro_answers_a_misspelt_option_with_the_right_one():
    for option in ("--group-sise", "--grop-size"):
        done = cli("grpo", option, "3")
        assert done.returncode == 2 and "--group-size" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("options", ["--steps 8", "--steps 3", "--sde-steps all", "--sde-steps 2,3"])
def test_steps_can_be_changed_alone(script, options):
    args = parse(script, *options.split())
    steps, drawn = common.parse_sde_steps(args)
    assert 1 <= drawn <= len(steps) < args.steps
    if args.sde_steps == "all":
        assert steps == [*range(args.steps - 1)] and drawn == len(steps)
    if script == "gcpo":
        import gcpo

        assert sum(gcpo.parse_chunks(args, steps, drawn)) == len(steps)


@pytest.mark.parametrize("sde, level", [("flow", 0.7), ("dance", 0.3), ("cps", 0.8), ("precise", 1.5)])
def test_the_noise_level_goes_with_the_sampler(sde, level):
    """Unless it is the default sampler of the model, which has a level of its own."""
    args = parse("grpo", "--sde", sde)
    assert args.noise_level == (level if sde != parse("grpo").sde else parse("grpo").noise_level)
    assert parse("grpo", "--sde", sde, "--noise-level", "0.4").noise_level == 0.4


def test_legal_prompts_of_unusual_kinds(tmp_path):
    """CRLF, a BOM, duplicates, 10,000 characters, emoji; a prompt that looks like a path stays a prompt;
    JSONL.
    """
    prompts = ["a red circle", "a red circle", "x" * 10_000, "\N{CAT FACE} été", "../../etc/passwd"]
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(["# mine", "", *prompts]).encode("utf-8"))
    lines = tmp_path / "prompts.jsonl"
    lines.write_text("".join(json.dumps({"prompt": prompt, "tag": 1}) + "\n" for prompt in prompts))
    assert common.read_prompts(str(file)) == common.read_prompts(str(lines)) == prompts
    options = ["--prompts", file, "--reward", "jpeg_compressibility", "--iterations", "1"]
    done = here("grpo", *small("grpo"), *options, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "run")[-1]["iteration"] == 1
    assert "cuts 3 of 5 prompts after 10 tokens" in done.stdout  # the long one and those of unknown words


def test_a_tilde_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.txt").write_text("a red circle\n")
    (tmp_path / "r.py").write_text("def f(images, prompts):\n    return images.mean((1, 2, 3))\n")
    args = parse("grpo", "--prompts", "~/p.txt", "--output", "~/out", "--reward", "~/r.py:f=2,shapes")
    assert (args.prompts, args.output) == (str(tmp_path / "p.txt"), str(tmp_path / "out"))
    assert args.reward == f"{tmp_path}/r.py:f=2,shapes"
