"""The micro-batch that fits, compiling, text encoders in one trip, rows that need no filling."""

import pytest
import torch
from torch._dynamo.utils import counters

import common
import small_pipelines
from conftest import here, metrics, parse, quick, slow, small


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3") / "model"
    small_pipelines.save(folder, "sd3")
    return folder


def make_policy(folder, **settings):
    options = dict(device="cpu", micro_batch=2, lora_rank=2, lora_alpha=4.0)
    return common.Policy(common.load_pipeline(str(folder), "float32", 16), 16, **options | settings)


class Card:
    """A card of `total` bytes: a training call of n latents takes fixed + n * each, half of it with
    checkpointing.

    hidden: what the calls take from 3 latents on beyond the line, as fragmentation would.
    """

    def __init__(self, monkeypatch, policy, total, fixed, each, hidden=0):
        self.tried, self.peak, self.policy = [], 0, policy
        self.total, self.fixed, self.each, self.hidden = total, fixed, each, hidden
        monkeypatch.setattr(policy, "training_call", self.training_call)
        monkeypatch.setattr(policy, "decode", lambda x: None)
        for name, value in {
            "reset_peak_memory_stats": lambda: None,
            "max_memory_allocated": lambda: self.peak,
            "mem_get_info": lambda: (total, total),
            "memory_reserved": lambda: 0,
            "empty_cache": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def takes(self, rows):
        each = self.each / (2 if self.policy.transformer.is_gradient_checkpointing else 1)
        return self.fixed + rows * each + (self.hidden if rows > 2 else 0)

    def training_call(self, rows, text):
        self.tried.append(rows)
        self.peak = self.takes(rows)
        if self.peak > self.total:
            raise RuntimeError("CUDA error: out of memory")


@pytest.mark.parametrize(
    "total, hidden, most, size",
    [
        (100, 0, 1000, 8),  # 95 - 10 - 3 held: 82 is 8 of 10 each
        (100, 0, 15, 8),  # 15 latents in two calls of 8
        (100, 0, 9, 5),  # 9 in two of 5, not of 8 and 1
        (100, 0, 4, 4),
        (100, 25, 1000, 6),  # 8 run out of memory: 6 are a quarter less
        (35, 0, 1000, 2),
        (24, 0, 1000, 1),
    ],
)
def test_the_micro_batch_that_fits(folder, monkeypatch, total, hidden, most, size):
    policy = make_policy(folder)
    card = Card(monkeypatch, policy, total, fixed=10, each=10, hidden=hidden)
    policy.fit_micro_batch(text=None, held=3, most=most)
    assert policy.micro_batch == size
    assert card.takes(size) <= total and not policy.transformer.is_gradient_checkpointing


def test_if_one_latent_does_not_fit_checkpointing_goes_on(folder, monkeypatch, capsys):
    policy = make_policy(folder)
    Card(monkeypatch, policy, 18, fixed=10, each=10)
    policy.fit_micro_batch(text=None, held=0, most=8)
    assert policy.micro_batch == 1 and policy.transformer.is_gradient_checkpointing
    assert "checkpointing is on" in capsys.readouterr().out
    other = make_policy(folder)
    Card(monkeypatch, other, 12, fixed=10, each=10)
    with pytest.raises(SystemExit, match="out of memory with one latent"):
        other.fit_micro_batch(text=None, held=0, most=8)


def test_trying_leaves_no_trace_if_memory_runs_out_halfway(folder, monkeypatch):
    policy, seen = make_policy(folder), []

    def half(gradient):
        seen.extend(p.grad.abs().max().item() for p in policy.parameters)
        raise torch.OutOfMemoryError("CUDA out of memory")

    text = policy.encode(["a red circle"])[0]
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.add_(0.1)
    # the last block's gradients are there when the first block's input asks for its own
    block = policy.transformer.transformer_blocks[1]
    block.register_forward_pre_hook(
        lambda module, args, kwargs: kwargs["hidden_states"].register_hook(half) and None, with_kwargs=True
    )
    with pytest.raises(torch.OutOfMemoryError):
        policy.training_call(2, text)
    assert max(seen) > 0 and policy.velocity_evals == 0
    assert not any(parameter.grad.any() for parameter in policy.parameters)


def test_zero_means_the_models_own_on_a_cpu(tmp_path):
    assert parse("grpo", "--micro-batch", "0").micro_batch == 48
    assert parse("grpo", "--micro-batch", "5").micro_batch == 5
    assert not parse("grpo").compile and parse("grpo", "--compile").compile


def test_if_compiling_fails_the_run_goes_on(monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise RuntimeError("no C compiler")

    quick("grpo", tmp_path / "plain", "--iterations 1")
    with monkeypatch.context() as patch:
        patch.setattr("torch._inductor.compile_fx.compile_fx", broken)
        printed = quick("grpo", tmp_path / "run", "--iterations 1 --compile")
    assert "not compiled" in printed and "no C compiler" in printed
    assert metrics(tmp_path / "run", times=False) == metrics(tmp_path / "plain", times=False)


@slow
def test_no_new_graph_after_the_first_iteration(monkeypatch, tmp_path, capfd):
    """With evaluation, the KL's reference and hybrid evaluation on; and the first ratio is 1."""
    script, more = "gcpo", "--kl-coef 0.01 --eval-hybrid 0.5"
    torch._dynamo.reset()
    counters.clear()
    seen, original = [], common.Run.save

    def save(self, iteration, metrics):
        seen.append(counters["stats"]["unique_graphs"])
        original(self, iteration, metrics)

    monkeypatch.setattr(common.Run, "save", save)
    options = [*small(script), *more.split(), "--iterations", 3, "--eval-every", 1, "--ema-decay", "0.9"]
    done = here(script, *options, "--compile", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "not compiled" not in done.stdout and "limit" not in done.stderr + capfd.readouterr().err
    assert 0 < seen[1] <= 5 and seen[1:] == [seen[1]] * 3
    assert all(line["ratio_first_error"] in (0.0, None) for line in metrics(tmp_path / "run")[1:])


def test_text_is_encoded_for_ten_iterations_at_once_and_equals_one_by_one(monkeypatch, tmp_path):
    calls, original = [], common.Policy.encode

    def encode(self, *batches):
        calls.append(len(batches))
        return original(self, *batches)

    monkeypatch.setattr(common.Policy, "encode", encode)
    quick("grpo", tmp_path / "run", "--iterations 12")
    assert calls == [1, 10, 2]  # the evaluation's prompts, ten iterations, two


def test_text_of_a_list_does_not_depend_on_the_others(folder):
    policy = make_policy(folder)
    lists = [["a red circle", "two blue squares"], ["a red circle"] * 3, [f"{n} cats" for n in range(11)]]
    together = policy.encode(*lists)
    for prompts, text in zip(lists, together):
        for one, other in zip(policy.encode(prompts)[0], text):
            assert torch.equal(one, other) and len(one) == len(prompts) + 1


def test_tempflow_fills_no_batch_of_branches_alone(folder, monkeypatch, tmp_path):
    """Rows that go through the network: those of the trunk's micro-batches are filled, others are not."""
    rows, original = [], common.SD3.predict

    def predict(self, x, *args):
        rows.append(len(x))
        return original(self, x, *args)

    monkeypatch.setattr(common.SD3, "predict", predict)
    quick("tempflow_grpo", tmp_path / "run", "--iterations 1 --micro-batch 5 --eval-every 9")
    assert metrics(tmp_path / "run")[1]["ratio_first_error"] in (0.0, None)
    # four trunks; 12 branches join at each step: 4, 16, 28, 40, then 48 without the trunk
    rollout = [5, 5, 5, 5, 1, *[5] * 5, 3, *[5] * 8, *[5] * 9, 3]
    assert any(rows[n : n + len(rollout)] == rollout for n in range(len(rows)))


def test_dtype_is_looked_up_once(folder, monkeypatch):
    policy = make_policy(folder)
    kind = type(policy.transformer)
    monkeypatch.setattr(kind, "dtype", property(lambda self: pytest.fail("looked up")))
    text = policy.encode(["a red circle"])[0]
    policy.velocity(torch.zeros(2, *policy.shape), 0.5, text, torch.zeros(2, dtype=torch.long))
