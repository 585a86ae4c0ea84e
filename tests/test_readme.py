"""The README says what is: its commands and options exist, its example runs, it explains every logged metric."""

import itertools
import re
import shlex
import subprocess
import sys

import study
from conftest import ROOT, SCRIPTS, cli, here, metrics, small

import pytest

README = (ROOT / "README.md").read_text("utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
SHELL = "\n".join(text for language, text in FENCED if not language).replace(" && ", "\n")
COMMANDS = sorted(
    set(re.findall(r"^python .*\.py\b.*$", SHELL, re.M))
    | set(re.findall(r"`(python [\w/]+\.py[^`\n]*)`", re.sub(r"^```.*?^```$", "", README, flags=re.S | re.M)))
)


def test_example_with_plain_diffusers_runs(tmp_path):
    done = cli("grpo", *small("grpo"), "--iterations", "1", "--output", tmp_path / "runs" / "mine")
    assert done.returncode == 0, done.stderr
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    code = re.search(r"```python\n(import torch\n.*?)```", README, re.S).group(1)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two_red_circles.png").stat().st_size > 500


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_metric_is_explained(script, tmp_path):
    options = ["--kl-coef", "0.01", "--iterations", "1", "--output", tmp_path / "run"]
    assert here(script, *small(script), *options).returncode == 0
    explained = re.sub(r"/<name>", "/shapes", README)
    for key in metrics(tmp_path / "run")[-1]:
        assert f"`{key}`" in explained or key == "iteration" or key.startswith("ratio_first_error"), key


def option_values(command):
    """The words after `python FILE.py`, with the placeholder S of a seed filled in."""
    return ["0" if word == "S" else word for word in shlex.split(command)[2:]]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.split()[1].removesuffix(".py") in SCRIPTS])
def test_commands_with_the_scripts(command, tmp_path, monkeypatch, serve):
    """Every command line of a script, as it stands, but for sizes that take seconds."""
    script, options = command.split()[1].removesuffix(".py"), option_values(command)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.txt").write_text("a red circle\ntwo blue squares\n")
    (tmp_path / "question.txt").write_text("How well does it show {prompt}? Score: NUMBER")
    (tmp_path / "my_file.py").write_text(re.search(r"```python\n(# my_file.py\n.*?)```", README, re.S).group(1))
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
    assert len(list((tmp_path / "runs").glob("*/metrics.jsonl"))) == 1
    assert ("vlm:" in command) == bool(server.requests)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "bench.py" in c and "curves" not in c])
def test_commands_with_the_benchmarks(command):
    quick = {"model": ["--tiny", "--resolution", "64", "--device", "cpu"], "tempflow": ["--repeats", "1"]}
    options = option_values(command)
    line = [sys.executable, "tests/bench.py", *options, *quick[options[0]]]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "nan times" not in done.stdout and len(done.stdout.splitlines()) > 3


def test_every_command_is_one_of_those():
    """A command of a kind that no test runs must be added to one."""
    known = {f"{script}.py" for script in SCRIPTS} | {"tests/bench.py", "mixgrpo.py"}
    assert COMMANDS and {command.split()[1] for command in COMMANDS} <= known


def test_tables_of_results_are_those_of_the_committed_metrics():
    for title, table in study.tables().items():
        for line in table.splitlines():
            assert line in README, f"{title}: {line}\nrun python tests/bench.py curves --plot"


def test_lines_of_code_are_where_the_readme_says():
    links = re.findall(r"\[`([^`]+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) > 10
    for code, file, number in links:
        lines = (ROOT / file).read_text("utf-8").splitlines()
        now = [n for n, line in enumerate(lines, 1) if code in line]
        assert int(number) in now, f"{file}: {code} is in line {now}, the README says {number}"


def test_mathematics_is_as_github_reads_it():
    """Between single dollars markdown takes `\\,` and `\\|` apart before they are read as TeX; in a math block not."""
    prose = re.sub(r"^```.*?^```", "", README, flags=re.S | re.M)
    prose = re.sub(r"`[^`\n]*`", "", prose)
    assert prose.count("$") % 2 == 0
    for formula in re.findall(r"\$([^$]*)\$", prose):
        assert not re.search(r"\\[^a-zA-Z]|\|", formula) and formula == formula.strip(), formula


def test_options_named_in_the_readme_exist():
    help_text = "".join(cli(script, "--help").stdout for script in SCRIPTS)
    named = set(re.findall(r"`[^`\n]*?(--[a-z][a-z-]+)", README)) - {
        "--help",
        "--plot",
        "--tiny",
        "--window-every",
        "--model",
    }
    assert len(named) > 15
    assert not {option for option in named if option + " " not in help_text.replace(",", " ").replace("]", " ")}


def test_links_and_pictures_of_the_readme_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_links_within_the_readme():
    heads = re.findall(r"^#+ (.*)$", README, re.M)
    anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors
