"""What the README says is true: its commands parse, its code is in the files, its numbers are in the data."""

import ast
import builtins
import inspect
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common
import gcpo
import grpo
import small_pipelines
import study
import tempflow_grpo
from conftest import ROOT, SCRIPTS, here, metrics, parse, quick, small

MODULES = {"common": common, "grpo": grpo, "gcpo": gcpo, "tempflow_grpo": tempflow_grpo}
README = (ROOT / "README.md").read_text("utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.S | re.M)
SHELL = "".join(text for language, text in FENCED if not language)
INLINE = re.findall(r"`((?:python|torchrun) [^`\n]*\.py[^`\n]*)`", PROSE)
COMMANDS = sorted({*re.findall(r"^(?:python|torchrun) .*\.py\b.*$", SHELL, re.M), *INLINE})


class FluxPolicy:
    """What `sample` and `transition_logp` need of a policy, for a FluxPipeline. Copy it.

    Latents are packed: (images, tokens, channels). Guidance is an input of the network. The timestep is
    sigma. Give `scheduler.set_timesteps` the sigmas 1, 1 - 1/T, ..., 1/T and `mu`: `scheduler.sigmas` then
    ends with the 0 that `sample` needs.
    """

    def __init__(self, pipe, height, width, guidance=3.5, micro_batch=4):  # in tokens of 2 x 2 latents
        self.pipe, self.guidance, self.micro_batch = pipe, guidance, micro_batch
        self.image_ids = pipe._prepare_latent_image_ids(1, height, width, pipe.device, pipe.dtype)

    def velocity(self, x, sigma, text, prompt_index):  # x: (B, tokens, channels)
        embeds, pooled = (rows[prompt_index] for rows in text)
        sigma, guidance = torch.as_tensor(sigma).expand(len(x)), torch.full((len(x),), self.guidance)
        dtype, text_ids = self.pipe.dtype, x.new_zeros(embeds.shape[1], 3)
        inputs = x.to(dtype), embeds, pooled, sigma.to(x.device, dtype), self.image_ids, text_ids
        return self.pipe.transformer(*inputs, guidance.to(x.device), return_dict=False)[0].float()

    def velocity_batched(self, x, sigma, text, prompt_index, pad_first=None):
        parts = zip(x.split(self.micro_batch), prompt_index.split(self.micro_batch))
        return torch.cat([self.velocity(part, sigma, text, rows) for part, rows in parts])


def python_block(first_line):
    return next(text for language, text in FENCED if language == "python" and text.startswith(first_line))


def rows_under(heading):
    """The cells of all table rows of a section, without the rows of dashes."""
    head = rf"^(?:#+ {heading}|<details><summary>{heading}</summary>)\n"
    section = re.search(head + r"(.*?)(?=^#|^<details>|\Z)", README, re.M | re.S).group(1)
    rows = [[cell.strip() for cell in row[1:-1].split("|")] for row in re.findall(r"^\|.*\|$", section, re.M)]
    return [row for row in rows if set("".join(row)) - set("- ")]


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A folder with the files that the commands name, where no hub can be asked what a model is."""
    monkeypatch.chdir(tmp_path)
    for name in ("data.txt", "eval.txt", "two.txt"):
        Path(name).write_text("a red circle\ntwo blue squares\n")
    Path("my_file.py").write_text(python_block("# my_file.py\n"))
    original, pipelines = common.model_index, {"FLUX.2": "Flux2KleinPipeline", "FLUX.1": "FluxPipeline"}

    def model_index(model):
        found = [pipeline for part, pipeline in pipelines.items() if part in model]
        return {"_class_name": found[0]} if found else original(model)

    monkeypatch.setattr(common, "model_index", model_index)


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.split()[1].removesuffix(".py") in SCRIPTS])
def test_a_command_parses(command, user):
    script, options = command.split()[1].removesuffix(".py"), shlex.split(command)[2:]
    if "--resume" in options:
        folder = options[options.index("--resume") + 1]
        assert here(script, *small(script), "--iterations", "1", "--output", folder).returncode == 0
    assert parse(script, *options).script == script


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("torchrun")])
def test_a_command_for_several_gpus_divides(command, user, monkeypatch):
    _, _, count, script, *options = shlex.split(command)
    args = parse(script.removesuffix(".py"), *options)
    settings = args.__dict__ | {"group": 2}
    each = settings.get("seeds_per_prompt") or settings["group_size"]
    several = SimpleNamespace(num_processes=int(count), process_index=0, is_main_process=True)
    monkeypatch.setattr(common, "PartialState", lambda: several)
    assert common.split_batch(args, each, 2) == args.prompts_per_iteration * each // int(count)


def test_the_rewards_of_a_user_run(user):
    command = next(c for c in COMMANDS if "my_file.py" in c)
    script, options = command.split()[1].removesuffix(".py"), shlex.split(command)[2:]
    options += ["--output", "run", "--iterations", "1", *small(script)]
    done = here(script, *options)
    assert done.returncode == 0, done.stderr
    assert {"eval/shapes", "reward_std/jpeg_compressibility"} <= metrics("run")[-1].keys()


def test_options_named_in_the_readme_exist():
    fields = {name for script in SCRIPTS for name in MODULES[script].Args.__dataclass_fields__}
    options = {f"--{name.replace('_', '-')}" for name in fields} | {"--no-compile", "--help"}
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", README))
    assert len(named) > 25
    assert named - options == {"--nproc-per-node", "--no-deps", "--window-every"}  # of mixgrpo.py


# ---------------------------------------------------------------- code


def test_example_with_plain_diffusers_runs(tmp_path, monkeypatch):
    quick("grpo", tmp_path / "runs" / "mine", "--iterations 1")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    exec(python_block("import torch\n").replace("lora/150", "lora/1"), {})
    assert Path("two_red_circles.png").stat().st_size > 500


def test_quoted_code_is_in_its_file():
    """Line after line, without the docstrings."""
    quotes = [text for language, text in FENCED if language == "python"]
    quotes = [part for text in quotes for part in re.split(r"^# (?=\w+\.py\n)", text, flags=re.M)[1:]]
    quotes = [part.partition("\n")[::2] for part in quotes if not part.startswith("my_file.py")]
    assert {file for file, _ in quotes} == {f"{name}.py" for name in MODULES}
    for file, quote in quotes:
        source = re.sub(r'^ +"""[A-Z].*?"""\n', "", (ROOT / file).read_text("utf-8"), flags=re.S | re.M)
        lines = [[line.strip() for line in text.strip().splitlines()] for text in (quote, source)]
        assert "\n".join(lines[0]) in "\n".join(lines[1]), quote


def globals_of(function):
    """The names that a function takes from its file."""
    function = inspect.unwrap(function)
    loaded = {n.id for n in ast.walk(ast.parse(inspect.getsource(function))) if isinstance(n, ast.Name)}
    own = {name for name in loaded if name in function.__globals__ and not hasattr(builtins, name)}
    return own - {function.__name__, "torch", "math"}


def test_what_a_copied_function_takes_along():
    for names, file, with_it in rows_under("Copy a function into your project")[1:]:
        module = MODULES[file.strip("`").removesuffix(".py")]
        names, with_it = (set(re.findall(r"`(\w+)`", cell)) for cell in (names, with_it))
        needed, todo = set(), [*names]
        while todo:
            function = getattr(module, todo.pop(), None)
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                new = {"progress" if n == "common" else n for n in globals_of(function)} - needed - names
                needed, todo = needed | new, [*todo, *new]
        policy = {"policy"} if "sample" in names else set()
        assert (needed - names) | policy == with_it - names or needed | policy == with_it, (names, needed)


def test_a_policy_for_a_flux_pipeline():
    """FluxPolicy is the family in common.py; a rollout with it and training agree."""
    torch.manual_seed(0)
    pipe = small_pipelines.flux()
    for part in (pipe.text_encoder, pipe.text_encoder_2, pipe.transformer):
        part.eval().requires_grad_(False)
    for weight in pipe.transformer.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=1.0 / weight[0].numel() ** 0.5)
    prompts, T = ["a cat", "a dog"], 5
    mine, text, index = FluxPolicy(pipe, 4, 4), pipe.encode_prompt(prompts, None)[:2], torch.arange(2)
    policy = common.Policy(pipe, 16, guidance=3.5, micro_batch=4, device="cpu")
    pipe.scheduler.set_timesteps(sigmas=[1 - n / T for n in range(T)], mu=policy.family.shift(16, T))
    sigmas = pipe.scheduler.sigmas
    assert torch.equal(sigmas, policy.sigmas(T)) and sigmas[-1] == 0

    def pack(x):
        return pipe._pack_latents(x, *x.shape)

    x = torch.randn(2, *policy.shape)
    (own,) = policy.encode(prompts)
    with torch.no_grad():
        got, want = mine.velocity(pack(x), 0.7, text, index), pack(policy.velocity(x, 0.7, own, index))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)  # float32, in batches of 2 and 4
        s = common.noise_scale(sigmas, "flow", 0.9)
        noise = [torch.randn(2, 16, 16), *torch.randn(2, 2, 3, 16, 16)]
        images, rollout = tempflow_grpo.sample(mine, text, index, noise, sigmas, s, "flow", [0, 1])
        steps = torch.tensor([0, 1])
        again, _, _ = tempflow_grpo.transition_logp(mine, rollout, steps, index)
    assert images.shape == (12, 16, 16)
    torch.testing.assert_close(again, rollout.logp[steps, index], atol=1e-6, rtol=0)  # as above


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_metric_is_explained(script, tmp_path):
    quick(script, tmp_path / "run", "--kl-coef 0.01 --iterations 1")
    explained = re.sub(r"/<name>", "/shapes", README)
    for key in metrics(tmp_path / "run")[-1]:
        assert f"`{key}`" in explained or key == "iteration", key


# ---------------------------------------------------------------- numbers


def test_claims_are_those_of_the_study():
    """The table is made of the committed runs, and every interval in the text is on the study's page."""
    page = (ROOT / "tests/curves/README.md").read_text("utf-8")
    assert f"\n{study.readme_table(study.load())}\n\n" in README
    section = re.search(r"^## Results.*?\n(.*?)(?=^## )", README, re.M | re.S).group(1)
    intervals = re.findall(r"[+-]?0\.\d{3} ± 0\.\d{3}", section)
    assert intervals and all(interval in page for interval in intervals)


def test_ends_of_the_quick_start_are_those_of_the_committed_runs():
    runs = study.load()
    for command, _, mean, ends in rows_under("On a CPU.*?")[1:]:
        name = study.DEFAULT[command.split()[1].removesuffix(".py`")]
        last = [runs[name, seed][-1]["eval_reward"] for seed in range(8)]
        assert mean == f"{sum(last) / 8:.3f}" and ends == f"{min(last):.3f}, {max(last):.3f}", command


def test_worked_example_of_a_step():
    """What the docstring of sde_mean_std gives to check one's own sampler by."""
    sigmas = torch.tensor([1.0, 0.5, 0.4, 0.0], dtype=torch.float64)
    s, one = common.noise_scale(sigmas, "flow", 0.7)[1], torch.ones(1, 1, 1, 1).double()
    mean, std = common.sde_mean_std(one, 2 * one, 0.5, 0.4, s, "flow")
    shown = re.search(r"mean ([\d.]+\d) and std ([\d.]+\d)", common.sde_mean_std.__doc__)
    # three digits are shown
    assert float(shown.group(1)) == pytest.approx(mean.item(), abs=5e-4)
    assert float(shown.group(2)) == pytest.approx(std.item(), abs=5e-4)


def test_worked_example_of_chunks():
    found = re.search(r"`(\[[\d., ]+\])` and `--chunk-max (\d)`.*?: sizes ([\d, ]+)\.", README)
    curve, chunk_max, sizes = found.groups()
    got = gcpo.adaptive_chunks(torch.tensor(ast.literal_eval(curve)), int(chunk_max))
    assert got == [int(size) for size in sizes.split(", ")]


# ---------------------------------------------------------------- the page


def test_links_and_pictures_of_the_readme_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    for file in re.findall(r"`([\w/]+\.(?:py|md|txt|png))`", PROSE):
        assert (ROOT / file).exists() or file in ("data.txt", "eval.txt"), file
    heads = re.findall(r"^#+ (.*)$", README, re.M)
    anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors
