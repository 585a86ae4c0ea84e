"""The packages of a year ago beside today's PyTorch: people copy files into environments that they have."""

import os
import subprocess
import sys

import pytest

from conftest import ROOT, slow

OLD = "diffusers==0.36.0 transformers==4.57.6 peft==0.18.1 accelerate==1.11.0 huggingface_hub==0.36.2"
OLD += " tokenizers==0.22.2"
NEEDED = "httpx httpcore h11 anyio sniffio idna certifi requests urllib3 charset_normalizer"
NEEDED += " importlib_metadata zipp protobuf sentencepiece"
TESTS = """
    test_sampler.py
    test_gradients.py
    test_runs.py::test_options_run_and_the_first_ratio_is_one
    test_runs.py::test_gcpo_with_chunks_of_one_is_grpo
    test_runs.py::test_lora_in_a_plain_diffusers_script_gives_the_pictures_of_the_evaluation
    test_families.py::test_half_precision_weights_and_float32_mathematics[sd3-bfloat16]
    test_families.py::test_one_iteration
    test_rewards_models.py::test_pickscore_is_the_logit_over_26
"""


@slow
def test_the_packages_of_a_year_ago(tmp_path):
    """Sampler, gradients, runs, a small SD3 in bfloat16, an iteration of each script and pickscore."""
    install = [sys.executable, *"-m pip install -q --no-deps --retries 1 --target".split(), tmp_path]
    done = subprocess.run([*install, *OLD.split(), *NEEDED.split()], capture_output=True, text=True)
    if "connection" in done.stderr.lower() or "No module named pip" in done.stderr:
        pytest.skip("no package can be installed here")
    assert done.returncode == 0, done.stderr

    def python(*options):
        env = os.environ | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run([sys.executable, *options], cwd=ROOT, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    names = "diffusers transformers peft accelerate huggingface_hub tokenizers"
    show = [f"print('{name}==' + {name}.__version__, end=' ')" for name in names.split()]
    assert python("-c", "; ".join([f"import {names.replace(' ', ', ')}", *show])).split() == OLD.split()
    options = "-q -n 0 -p no:cacheprovider --basetemp".split()
    tests = [f"tests/{test}" for test in TESTS.split()]
    printed = python("-m", "pytest", *options, tmp_path / "runs", *tests)
    assert " passed" in printed and "failed" not in printed
