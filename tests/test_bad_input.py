"""Bad input is one clear line before any model is loaded, and nothing is written."""

import json
import os
from dataclasses import dataclass

import accelerate.tracking
import pytest

import common
import grpo
from conftest import SCRIPTS, here, parse, quick

# options, and a word that the line must have. {tmp} is a folder with the files that `files` makes
SHARED = [
    ("--prompts {tmp}/missing.txt", "missing.txt: No such file or directory"),
    ("--prompts {tmp}/comments.txt", "no prompts"),
    ("--prompts {tmp}/latin1.txt", "latin1.txt: not UTF-8 text"),
    ("--prompts {tmp}/binary.txt", "line 1: empty, or not text"),
    ("--prompts {tmp}/other.jsonl", 'line 2: {"text": "a red circle"}; a line must be like'),
    (f"--prompts {'long' * 100}", "File name too long"),
    ("--eval-prompts {tmp}/missing.txt", "No such file"),
    ("--model {tmp} --prompts {tmp}/good.txt", "is not a diffusers pipeline"),
    ("--model {tmp}/other --prompts {tmp}/good.txt", "StableDiffusionPipeline"),
    ("--model {tmp}/unipc --prompts {tmp}/good.txt", "UniPCMultistepScheduler"),
    ("--reward None", "--reward needs a name"),
    ("--learning-rate nan", "--learning-rate"),
    ("--guidance 0.5", "--guidance 0.5 must be at least 1"),
    ("--sde cps --noise-level 1.5", "--noise-level"),
    ("--device cuda:99", "--device"),
    ("--output {tmp}/full", "already holds a run"),
    ("--output {tmp}/good.txt", "cannot be written"),
    ("--resume {tmp}", "not a run folder"),
    ("--log-with wandb", "pip install wandb"),
]
LATER = [  # found by the script, with the model not yet loaded
    ("grpo", "--group-size 1", "group of one"),
    ("grpo", "--updates-per-iteration 7", "96 trajectories cannot be split into 7 equal updates;"),
    ("grpo", "--sde-steps 0,9", "within 0 to 8"),
    ("grpo", "--sde-steps 3,1", "--sde-steps"),
    ("grpo", "--sde-steps 3", "one step: 3,; to draw some: --sde-steps-per-iteration"),
    ("grpo", "--sde-steps-per-iteration 6", "at most 5"),
    ("grpo", "--reward nosuch", "nosuch"),
    ("grpo", f"--reward {'long' * 100}.py:f", "no FILE.py"),
    ("grpo", "--prompts {tmp}/dog.txt --model tiny", "a red dog"),
    ("gcpo", "--chunks 2,2", "add up to 5"),
    ("gcpo", "--chunks 5,x", "--chunks"),
    ("gcpo", "--sde-steps 0,2", "consecutive"),
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
    (folder / "other.jsonl").write_text('{"prompt": "a blue circle"}\n{"text": "a red circle"}\n')
    for name, pipeline, scheduler in (
        ("other", "StableDiffusionPipeline", "FlowMatchEulerDiscreteScheduler"),
        ("unipc", "StableDiffusion3Pipeline", "UniPCMultistepScheduler"),
    ):
        index = {"_class_name": pipeline, "scheduler": ["diffusers", scheduler]}
        (folder / name).mkdir()
        (folder / name / "model_index.json").write_text(json.dumps(index))
    (folder / "full").mkdir()
    (folder / "full" / "checkpoint.pt").write_text("something")
    return folder


@pytest.mark.parametrize("script, options, word", [("grpo", *case) for case in SHARED] + LATER)
def test_bad_input(script, options, word, files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setattr(common, "Policy", None)  # whoever gets so far fails
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])  # as if wandb were not installed
    before = sorted(files.rglob("*"))
    options = options.replace("{tmp}", str(files)).split()
    output = [] if {"--output", "--resume"} & set(options) else ["--output", files / "run"]
    done = here(script, *options, *output)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode and word in line and "Traceback" not in done.stderr
    assert sorted(files.rglob("*")) == before


def test_a_setting_of_a_copied_script_is_in_one_class():
    """Elsewhere it would be no option, or two. It may be off at 0."""

    @dataclass
    class UpdateArgs(grpo.UpdateArgs):
        threshold: float = 0.0  # off at 0

    @dataclass
    class Args(common.RunArgs, common.ModelArgs, grpo.RolloutArgs, UpdateArgs, common.EvaluationArgs):
        pass

    @dataclass
    class Nowhere(grpo.Args):
        threshold: float = 0.0

    @dataclass
    class Twice(Args, UpdateArgs):
        pass

    assert common.parse_args("grpo", Args, grpo.DEFAULTS, []).threshold == 0
    for wrong in (Nowhere, Twice):
        with pytest.raises(SystemExit, match=r"put the setting \w+ into exactly one of the classes"):
            common.parse_args("grpo", wrong, grpo.DEFAULTS, ["--threshold", "1"])


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

        assert sum(gcpo.parse_chunks(args, steps)) == len(steps)


@pytest.mark.parametrize("sde, level", [("flow", 0.7), ("dance", 0.3), ("cps", 0.8), ("precise", 1.5)])
def test_the_noise_level_goes_with_the_sampler(sde, level):
    """Unless it is the default sampler of the model, which has a level of its own."""
    args = parse("grpo", "--sde", sde)
    assert args.noise_level == (level if sde != parse("grpo").sde else parse("grpo").noise_level)
    assert parse("grpo", "--sde", sde, "--noise-level", "0.4").noise_level == 0.4


def test_legal_prompts_of_unusual_kinds(tmp_path):
    """CRLF, a BOM, duplicates, 10,000 characters, emoji, a prompt like a path; JSONL."""
    prompts = ["a red circle", "a red circle", "x" * 10_000, "\N{CAT FACE} été", "../../etc/passwd"]
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(["# mine", "", *prompts]).encode("utf-8"))
    lines = tmp_path / "prompts.jsonl"
    lines.write_text("".join(json.dumps({"prompt": prompt, "tag": 1}) + "\n" for prompt in prompts))
    assert common.read_prompts(str(file)) == common.read_prompts(str(lines)) == prompts
    quick("grpo", tmp_path / "run", f"--prompts {file} --reward jpeg_compressibility --iterations 1")


def test_copies_without_the_tiny_model_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "TINY", tmp_path / "tests")
    assert here("grpo").stderr.startswith("error: the tiny model is not there")


def test_prompts_from_a_pipe(tmp_path):
    """They can be read only once."""
    read, write = os.pipe()
    os.write(write, b"a red circle\ntwo blue squares\n")
    os.close(write)
    quick("grpo", tmp_path / "run", f"--iterations 1 --prompts /dev/fd/{read}")
    os.close(read)


def test_paths_are_absolute(tmp_path, monkeypatch):
    """A reward may change the working directory. A folder that is named like a reward is none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("shapes", "model"):
        os.mkdir(folder)
    for file in ("p.txt", "r.py"):
        (tmp_path / file).write_text("a red circle\n")
    for home in ("", "~/"):
        reward = f"shapes,pickscore:{home}model,{home}r.py:f=2"
        args = parse("grpo", "--prompts", f"{home}p.txt", "--output", f"{home}run", "--reward", reward)
        assert (args.prompts, args.output) == (f"{tmp_path}/p.txt", f"{tmp_path}/run")
        assert args.reward == f"shapes,pickscore:{tmp_path}/model,{tmp_path}/r.py:f=2"
