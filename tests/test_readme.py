"""The README says what is: its commands and options exist, its example runs, it explains every logged metric."""

import re
import sys

import pytest

from conftest import ROOT, SCRIPTS, cli, here, metrics, small

README = (ROOT / "README.md").read_text("utf-8")


def test_example_with_plain_diffusers_runs(tmp_path):
    done = cli("grpo", *small("grpo"), "--iterations", "1", "--output", tmp_path / "runs" / "mine")
    assert done.returncode == 0, done.stderr
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    code = re.search(r"```python\n(import torch\n.*?)```", README, re.S).group(1)
    import subprocess

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


def test_options_named_in_the_readme_exist():
    help_text = "".join(cli(script, "--help").stdout for script in SCRIPTS)
    named = set(re.findall(r"`[^`\n]*?(--[a-z][a-z-]+)", README)) - {"--help", "--plot"}
    assert len(named) > 15
    assert not {option for option in named if option + " " not in help_text.replace(",", " ").replace("]", " ")}


def test_links_and_pictures_of_the_readme_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
