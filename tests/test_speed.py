"""The micro-batch that fits, compiling, text encoders in one trip, rows that need no filling."""

import json

import pytest
import torch
from torch._dynamo.utils import counters

import common
from conftest import here, make_policy, metrics, parse, quick, slow, small


@pytest.fixture
def policy(model):
    return make_policy(model("sd3"))


class Card:
    """A card of `total` bytes. A training call of n latents takes n * each, half of it with checkpointing."""

    def __init__(self, monkeypatch, policy, total, each):
        self.tried, self.reserved, self.policy, self.total, self.each = [], [], policy, total, each
        monkeypatch.setattr(policy, "training_call", self.training_call)
        monkeypatch.setattr(policy, "decode", lambda x: None)
        monkeypatch.setattr(torch, "empty", self.empty)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (total, total))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def empty(self, reserved, dtype, device):
        self.reserved.append(reserved)

    def training_call(self, rows, text):
        self.tried.append(rows)
        each = self.each / (2 if self.policy.transformer.is_gradient_checkpointing else 1)
        if self.reserved[-1] + rows * each > self.total:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize(
    "total, trajectories, random_steps, tried, rows",
    [
        (100_000, 16, 0, [16, 14, 12, 10, 9, 8], 8),  # 10,000 each, beside 16 latents of 1,024 bytes
        (100_000, 4, 0, [4], 4),  # no more than there are
        (100_000, 9, 0, [9], 9),  # a tenth stays free
        (99_000, 9, 0, [9, 8], 5),  # 9 in two calls of 5, not of 8 and 1
        (25_000, 4, 0, [4, 3, 2], 2),
        (13_000, 2, 0, [2, 1], 1),
        (100_000, 5, 4, [5, 4, 3], 3),  # 13 sets of the latents are more than a tenth of the card
    ],
)
def test_the_micro_batch_that_fits(policy, monkeypatch, total, trajectories, random_steps, tried, rows):
    card = Card(monkeypatch, policy, total, each=10_000)
    policy.fit_micro_batch(None, trajectories, random_steps)
    assert (card.tried, policy.micro_batch) == (tried, rows)
    latents = 4 * trajectories * 4 * 8 * 8  # bytes: one set of latents of 4 x 8 x 8 numbers
    assert set(card.reserved) == {max(total // 10, (1 + 3 * random_steps) * latents)}
    assert not policy.transformer.is_gradient_checkpointing


def test_if_one_latent_does_not_fit_checkpointing_goes_on(policy, monkeypatch):
    card = Card(monkeypatch, policy, 10_000, each=10_000)
    policy.fit_micro_batch(text=None, trajectories=2, random_steps=0)
    assert card.tried == [2, 1, 2, 1] and policy.micro_batch == 1
    assert policy.transformer.is_gradient_checkpointing
    Card(monkeypatch, policy, 5_000, each=10_000)
    with pytest.raises(SystemExit, match="one latent does not fit"):
        policy.fit_micro_batch(text=None, trajectories=2, random_steps=0)


def test_messages_that_mean_that_memory_ran_out():
    for message in ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory"):
        assert common.out_of_memory(RuntimeError(message))
    assert common.out_of_memory(MemoryError())
    assert not common.out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_trying_leaves_no_trace_if_memory_runs_out_halfway(policy):
    seen = []

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


def test_zero_is_one_at_a_time_on_a_cpu(tmp_path):
    assert "micro-batch: 1 latents" in quick("grpo", tmp_path / "run", "--iterations 1 --micro-batch 0")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["micro_batch"] == 0


def test_if_compiling_fails_the_run_goes_on(monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise RuntimeError("no C compiler")

    quick("grpo", tmp_path / "plain", "--iterations 1")
    with monkeypatch.context() as patch:
        patch.setattr("torch._inductor.compile_fx.compile_fx", broken)
        printed = quick("grpo", tmp_path / "run", "--iterations 1 --compile")
    torch.compiler.set_stance("default")
    assert "not compiled" in printed and "no C compiler" in printed
    assert metrics(tmp_path / "run", times=False) == metrics(tmp_path / "plain", times=False)


@slow
def test_no_new_graph_after_the_first_iteration(monkeypatch, tmp_path, capfd):
    """With evaluation, the KL's reference and hybrid evaluation on; and the first ratio is 1."""
    script, more = "gcpo", "--kl-coef 0.01 --eval-hybrid 0.5"
    torch._dynamo.reset()
    counters.clear()
    seen, original = [], common.Run.record

    def record(self, metrics):
        seen.append(counters["stats"]["unique_graphs"])
        original(self, metrics)

    monkeypatch.setattr(common.Run, "record", record)
    options = [*small(script), *more.split(), "--iterations", 3, "--eval-every", 1, "--ema-decay", "0.9"]
    done = here(script, *options, "--compile", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "not compiled" not in done.stdout and "limit" not in done.stderr + capfd.readouterr().err
    assert 0 < seen[1] <= 5 and seen[1:] == [seen[1]] * 3
    assert all(line["ratio_first_error"] in (0.0, None) for line in metrics(tmp_path / "run")[1:])


def test_text_is_encoded_for_ten_iterations_at_once(monkeypatch, tmp_path):
    """At most 64 of 10,000 prompts for the evaluation, then two per iteration."""
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {n}\n" for n in range(10_000)))
    args = parse("grpo", "--prompts", tmp_path / "prompts.txt", "--model", "tiny")
    assert len(common.held_out_prompts(args)) == 64
    calls, original = [], common.Policy.encode

    def encode(self, *batches):
        calls.append([len(prompts) for prompts in batches])
        return original(self, *batches)

    monkeypatch.setattr(common.Policy, "encode", encode)
    quick("grpo", tmp_path / "run", "--iterations 12")
    assert calls == [[2], [2] * 10, [2] * 2]  # the evaluation's prompts, ten iterations, two


def test_text_of_a_list_does_not_depend_on_the_others(policy):
    lists = [["a red circle", "two blue squares"], ["a red circle"] * 3, [f"{n} cats" for n in range(11)]]
    together = policy.encode(*lists)
    for prompts, text in zip(lists, together):
        for one, other in zip(policy.encode(prompts)[0], text):
            assert torch.equal(one, other) and len(one) == len(prompts) + 1
        alone = [policy.family.encode([prompt]) for prompt in [*prompts, ""]]
        for rows, other in zip(map(torch.cat, zip(*alone)), text):
            assert (rows - other).abs().max() < 1e-5  # float32 in other batches


def test_tempflow_fills_no_batch_of_branches_alone(monkeypatch, tmp_path):
    """Rows that go through the network: those of the trunk's micro-batches are filled, others are not."""
    rows, original = [], common.SD3.predict

    def predict(self, x, *args):
        rows.append(len(x))
        return original(self, x, *args)

    monkeypatch.setattr(common.SD3, "predict", predict)
    quick("tempflow_grpo", tmp_path / "run", "--iterations 1 --micro-batch 5 --eval-every 9")
    # float32 (6e-8): with old instructions the last bit depends on a row's place in its batch
    assert (metrics(tmp_path / "run")[1]["ratio_first_error"] or 0.0) < 1e-6
    # four trunks; 12 branches join at each step: 4, 16, 28, 40, then 48 without the trunk
    rollout = [5, 5, 5, 5, 1, *[5] * 5, 3, *[5] * 8, *[5] * 9, 3]
    assert any(rows[n : n + len(rollout)] == rollout for n in range(len(rows)))
