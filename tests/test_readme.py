"""The README says what is: its commands and options exist, its examples run, its code stands in the files."""

import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import common
import grpo
import study
from conftest import ROOT, SCRIPTS, cli, here, metrics, small

import pytest

README = (ROOT / "README.md").read_text("utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
SHELL = "\n".join(text for language, text in FENCED if not language).replace(" && ", "\n")
COMMANDS = sorted(
    set(re.findall(r"^(?:python|torchrun) .*\.py\b.*$", SHELL, re.M))
    | set(re.findall(r"`(python [\w/]+\.py[^`\n]*)`", re.sub(r"^```.*?^```$", "", README, flags=re.S | re.M)))
)
OWN = [c for c in COMMANDS if c.startswith("python ") and c.split()[1].removesuffix(".py") in SCRIPTS]


def python_block(first_line):
    return next(text for language, text in FENCED if language == "python" and text.startswith(first_line))


def test_example_with_plain_diffusers_runs(tmp_path):
    done = cli("grpo", *small("grpo"), "--iterations", "1", "--output", tmp_path / "runs" / "mine")
    assert done.returncode == 0, done.stderr
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    command = [sys.executable, "-c", python_block("import torch\n")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two_red_circles.png").stat().st_size > 500


def test_quoted_code_stands_in_its_file():
    quotes = [text for language, text in FENCED if language == "python" and re.match(r"# \w+\.py, ", text)]
    assert len(quotes) == 4
    for quote in quotes:
        head, *lines = quote.splitlines()
        source = [
            line.strip() for line in (ROOT / re.match(r"# (\w+\.py)", head).group(1)).read_text("utf-8").splitlines()
        ]
        assert len(lines) >= 3 and not [line for line in lines if line not in source]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_metric_is_explained(script, tmp_path):
    options = ["--kl-coef", "0.01", "--iterations", "1", "--output", tmp_path / "run"]
    assert here(script, *small(script), *options).returncode == 0
    explained = re.sub(r"/<name>", "/shapes", README)
    for key in metrics(tmp_path / "run")[-1]:
        assert f"`{key}`" in explained or key == "iteration", key


def test_the_terminal_shows_what_the_readme_shows(tmp_path):
    shown = next(text for language, text in FENCED if language == "text").splitlines()
    done = cli("grpo", *small("grpo"), "--iterations", "1", "--output", tmp_path / "run")
    kinds = [re.sub(r"[\d.,]+", "0", line).split()[:1] for line in done.stdout.splitlines()]
    for line in shown:
        assert line == "..." or re.sub(r"[\d.,]+", "0", line).split()[:1] in kinds, line


@pytest.mark.parametrize("command", OWN)
def test_commands_with_the_scripts(command, tmp_path, monkeypatch, serve):
    """Every command line of a script, as it stands, but for sizes that take seconds."""
    script, options = command.split()[1].removesuffix(".py"), shlex.split(command)[2:]
    monkeypatch.chdir(tmp_path)
    Path("data.txt").write_text("a red circle\ntwo blue squares\n")
    Path("my_file.py").write_text(python_block("# my_file.py\n"))
    if "--help" in options:
        assert cli(script, *options).stdout.startswith("usage")
        return
    scores = itertools.cycle("12345")
    server = serve(lambda request: (200, f"Score: {next(scores)}"))
    options = [option.replace("http://127.0.0.1:8000/v1", server.url) for option in options]
    quick = [*small(script), "--iterations", "1"]
    if "--resume" in options:
        folder = options[options.index("--resume") + 1]
        assert here(script, *quick, "--output", folder).returncode == 0
        options, quick = options[:2], ["--iterations", "2"]
    done = here(script, *options, *quick)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("runs/*/metrics.jsonl"))) == 1
    assert ("vlm:" in command) == bool(server.requests)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("torchrun")])
def test_commands_for_eight_gpus_divide(command, tmp_path, monkeypatch):
    """Their options exist, and their batches divide among eight processes; the models cannot be had here."""
    count, script, *options = shlex.split(command)[2:]
    module = __import__(script.removesuffix(".py"))
    given = common.read_command_line(module.Args, module.DEFAULTS, options)
    settings = module.DEFAULTS["flux" if "FLUX" in command else "sd3"] | given
    monkeypatch.setattr(common, "PROCESSES", int(count))
    args = module.Args(**settings)
    each = args.seeds_per_prompt if script == "tempflow_grpo.py" else args.group_size
    assert common.split_batch(args, each) == settings["prompts_per_iteration"] * each // int(count)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "bench.py" in c and "curves" not in c])
def test_commands_with_the_benchmarks(command):
    quick = {"model": ["--tiny", "--resolution", "64", "--device", "cpu"], "plan": []}
    quick |= {"tempflow": ["--repeats", "1"], "processes": ["--repeats", "2"]}
    small = "--resolution 32 --prompts-per-iteration 2 --group-size 4 --branches 2 --steps 4 --sde-steps 0,1,2"
    quick["iteration"] = [*small.split(), "--tiny", "--device", "cpu"]
    options = shlex.split(command)[2:]
    line = [sys.executable, "tests/bench.py", *options, *quick[options[0]]]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "nan times" not in done.stdout and len(done.stdout.splitlines()) > 3


def test_every_command_is_one_of_those():
    """A command of a kind that no test runs must be added to one."""
    known = {f"{script}.py" for script in SCRIPTS} | {"tests/bench.py", "tests/drawing.py", "mixgrpo.py"}
    assert COMMANDS and {re.search(r"\S+\.py", command).group(0) for command in COMMANDS} <= known


def test_table_of_results_is_that_of_the_committed_metrics():
    for line in study.tables()["main"].splitlines():
        assert line in README, f"{line}\nrun python tests/bench.py curves --plot"
    page = (ROOT / "tests/curves/README.md").read_text("utf-8")
    bullets = re.search(r"^## Results.*?\n(- .*?)\n\n## ", README, re.M | re.S).group(1)
    told = re.findall(r"[+-]?0\.\d{3}(?: ± 0\.\d{3})?", bullets)
    assert len(told) > 8 and all(number in page for number in told), [n for n in told if n not in page]


def test_counted_lines():
    """The table of what to read: lines of a file, and lines that differ."""
    found = dict(re.findall(r"^\| \[`(\w+\.py)`\]\(\w+\.py\) \| (\d+) \|", README, re.M))
    assert len(found) == 3
    for file, lines in found.items():
        assert len((ROOT / file).read_text("utf-8").splitlines()) == int(lines), file
    for other, lines in re.findall(r"^\| `diff grpo.py (\w+\.py)` \| (\d+) changed", README, re.M):
        diff = subprocess.run(["diff", "grpo.py", other], cwd=ROOT, capture_output=True, text=True).stdout
        assert sum(line[0] in "<>" for line in diff.splitlines()) == int(lines), other


def test_mathematics_is_as_github_reads_it():
    """Between single dollars markdown takes `\\,` and `\\|` apart before they are read as TeX; in a math block not."""
    prose = re.sub(r"^```.*?^```", "", README, flags=re.S | re.M)
    prose = re.sub(r"`[^`\n]*`", "", prose)
    assert prose.count("$") % 2 == 0
    for formula in re.findall(r"\$([^$]*)\$", prose):
        assert not re.search(r"\\[^a-zA-Z]|\|", formula) and formula == formula.strip(), formula


def test_options_named_in_the_readme_exist():
    help_text = "".join(cli(script, "--help").stdout for script in SCRIPTS) + (ROOT / "tests/bench.py").read_text(
        "utf-8"
    )
    elsewhere = {"--help", "--plot", "--nproc-per-node", "--window-every", "--no-deps", "--shutdown-timeout"}
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", README)) - elsewhere
    assert len(named) > 15 and not {option for option in named if option not in help_text}


def test_links_and_pictures_of_the_readme_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    heads = re.findall(r"^#+ (.*)$", README, re.M)
    anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


def test_the_readme_is_short_and_complete():
    assert len(README.splitlines()) <= 350 and "@?@" not in README


def test_worked_example_of_a_step():
    """What the README asks a reader to work out: sigma 0.5 to 0.4, a = 0.7, x = 1, v = 2."""
    import torch

    sigmas = torch.tensor([1.0, 0.5, 0.4, 0.0], dtype=torch.float64)
    s = common.noise_scale(sigmas, "flow", 0.7)[1]
    mean, std = grpo.sde_mean_std(torch.ones(1, 1, 1, 1).double(), torch.full((1, 1, 1, 1), 2.0).double(), 0.5, 0.4, s)
    shown = re.search(r"mean ([\d.]+\d) and std ([\d.]+\d)", README)
    assert float(shown.group(1)) == pytest.approx(mean.item(), abs=5e-4)
    assert float(shown.group(2)) == pytest.approx(std.item(), abs=5e-4)
