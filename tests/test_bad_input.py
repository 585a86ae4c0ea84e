"""Bad input is one clear line before any model is loaded, and nothing is written."""

import json
import os
import threading
from dataclasses import dataclass

import accelerate.tracking
import pytest

import common
import grpo
from conftest import SCRIPTS, here, metrics, parse, quick, small

# options, and a word that the line must have. {tmp} is a folder with the files that `files` makes
SHARED = [
    ("--prompts {tmp}/missing.txt", "missing.txt: No such file or directory"),
    ("--prompts {tmp}/comments.txt", "no prompts"),
    ("--prompts {tmp}/latin1.txt", "latin1.txt: not UTF-8 text"),
    ("--prompts {tmp}/binary.txt", "line 1: empty, or not text"),
    ("--prompts {tmp}/other.jsonl", 'line 2: {"text": "a red circle"}; a line must be like'),
    ("--prompts {tmp}/list.json", "line 1: ["),
    ("--prompts ~good.txt", "No such file"),
    (f"--prompts {'long' * 100}", "File name too long"),
    ("--prompts {tmp}", "Is a directory"),
    ("--eval-prompts {tmp}/missing.txt", "No such file"),
    ("--model {tmp} --prompts {tmp}/good.txt", "is not a diffusers pipeline"),
    ("--model {tmp}/other --prompts {tmp}/good.txt", "StableDiffusionPipeline"),
    ("--model {tmp}/unipc --prompts {tmp}/good.txt", "UniPCMultistepScheduler"),
    ("--learning-rate nan", "--learning-rate"),
    ("--reward None", "--reward needs a name"),
    ("--steps 1", "--steps"),
    ("--guidance inf", "--guidance"),
    ("--guidance 0.5", "--guidance 0.5 must be at least 1"),
    ("--noise-level 0", "--noise-level"),
    ("--sde cps --noise-level 1.5", "--noise-level"),
    ("--ema-decay 1.5", "--ema-decay"),
    ("--device cuda:99", "--device"),
    ("--output {tmp}/full", "already holds a run"),
    ("--resume {tmp}", "not a run folder"),
    ("--log-with wandb", "pip install wandb"),
]
LATER = [  # found by the script, with the model not yet loaded
    ("grpo", "--group-size 1", "group of one"),
    ("grpo", "--updates-per-iteration 7", "96 trajectories cannot be split into 7 equal updates;"),
    ("grpo", "--sde-steps 0,9", "within 0 to 8"),
    ("grpo", "--sde-steps 3,1", "--sde-steps"),
    ("grpo", "--sde-steps most", "--sde-steps"),
    ("grpo", "--sde-steps 3", "one step: 3,; to draw some: --sde-steps-per-iteration"),
    ("grpo", "--sde-steps-per-iteration 6", "at most 5"),
    ("grpo", "--reward nosuch", "nosuch"),
    ("grpo", "--reward ~nobody/r.py:f", "no FILE.py"),
    ("grpo", f"--reward {'long' * 100}.py:f", "no FILE.py"),
    ("grpo", "--prompts {tmp}/dog.txt --model tiny", "a red dog"),
    ("gcpo", "--chunks 2,2", "add up to 5"),
    ("gcpo", "--chunks 9,0", "--chunks"),
    ("gcpo", "--chunks some", "--chunks"),
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


def test_tyro_answers_a_misspelt_option_with_the_right_one():
    for option in ("--group-sise", "--grop-size"):
        done = here("grpo", option, "3")
        assert done.returncode and "--group-size" in done.stderr and "Traceback" not in done.stderr


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


def test_a_tilde_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.txt").write_text("a red circle\n")
    (tmp_path / "r.py").write_text("def f(images, prompts):\n    return images.mean((1, 2, 3))\n")
    args = parse("grpo", "--prompts", "~/p.txt", "--output", "~/out", "--reward", "~/r.py:f=2,shapes")
    assert (args.prompts, args.output) == (str(tmp_path / "p.txt"), str(tmp_path / "out"))
    assert args.reward == f"{tmp_path}/r.py:f=2,shapes"


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    done = here("grpo", *small("grpo"), "--output", tmp_path / "file")
    assert done.stderr.startswith("error: --output") and "Traceback" not in done.stderr


def test_copies_without_the_tiny_model_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "TINY", tmp_path / "tests")
    assert here("grpo").stderr.startswith("error: the tiny model is not there")


def test_a_resolution_that_does_not_fit(tmp_path):
    done = here("grpo", *small("grpo"), "--resolution", 33, "--output", tmp_path / "run")
    assert "--resolution 33 must be a multiple of" in done.stderr and not (tmp_path / "run").exists()


def test_prompts_from_a_pipe(tmp_path):
    """They can be read only once."""
    read, write = os.pipe()
    os.write(write, b"a red circle\ntwo blue squares\n")
    os.close(write)
    quick("grpo", tmp_path / "run", f"--iterations 1 --prompts /dev/fd/{read}")
    os.close(read)


def test_a_pipe_and_a_folder_named_like_a_reward(tmp_path, monkeypatch):
    """In the working directory: a pipe can be read only once, and a folder is no reward."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("prompts")
    (tmp_path / "shapes").mkdir()
    (tmp_path / "model").mkdir()
    writer = threading.Thread(target=(tmp_path / "prompts").write_text, args=["a red circle\n"])
    writer.start()
    args = parse("grpo", "--prompts", "prompts", "--model", "tiny", "--reward", "shapes,pickscore:model")
    writer.join()
    assert args.prompts == str(tmp_path / "prompts") and common.held_out_prompts(args) == ["a red circle"]
    assert args.reward == f"shapes,pickscore:{tmp_path / 'model'}"


def test_a_reward_that_changes_the_working_directory(tmp_path, monkeypatch):
    """The run and its paths are where they were asked for, and it resumes from there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "p.txt").write_text("a red circle\n")
    code = "import os\nos.chdir('elsewhere')\ndef f(images, prompts):\n    return images.mean((1, 2, 3))\n"
    (tmp_path / "r.py").write_text(code)
    options = [*small("grpo"), "--prompts", "p.txt", "--reward", "r.py:f", "--output", "run"]
    done = here("grpo", *options, "--iterations", 1)
    assert done.returncode == 0, done.stderr
    assert os.getcwd() == str(tmp_path / "elsewhere") and os.listdir() == []
    assert all(os.path.exists(path) for path in done.stdout.splitlines()[-1].split())
    assert metrics(tmp_path / "run")[-1]["iteration"] == 1
