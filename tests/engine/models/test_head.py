"""The fused head gives what the logits give, and is taken where the logits are its result only."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.engine.random_models import CONFIGS, new_learner
from warpo.engine.learner.step import accumulate_gradients
from warpo.engine.models import head as heads
from warpo.engine.models.architectures import shape_model
from warpo.engine.models.batch import Batch, pack
from warpo.engine.models.model import (
    set_lm_head_dtype,
    token_logprobs,
    token_logprobs_and_values,
)
from warpo.engine.plan import memory
from warpo.engine.types import TokenSequence
from warpo.kernels import ops
from warpo.kernels._linear_head_plan import CPU_WORKSPACE_BYTES
from warpo.kernels.objectives import OBJECTIVES


def batch() -> Batch:
    return pack([TokenSequence.of([1, 2, 3], rest) for rest in ([4, 5, 6, 7], [4, 8], [9])])


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every head is large; the targets of the calls of the fused operation."""
    calls: list[torch.Tensor] = []
    original = ops.linear_logprobs_and_entropy

    def count(hidden, weight, targets, **options):
        calls.append(targets)
        return original(hidden, weight, targets, **options)

    monkeypatch.setattr(ops, "linear_logprobs_and_entropy", count)
    return calls


def results(model: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """logprobs and entropy, and the gradient of a function of both."""
    found = token_logprobs(model, batch(), 0.7)
    model.zero_grad(set_to_none=True)
    weights = torch.arange(1.0, 1 + found.logprobs.numel())
    (found.logprobs @ weights + found.entropy @ weights.cos()).backward()
    gradients = [p.grad.float() for p in model.parameters() if p.grad is not None]
    return [found.logprobs.detach(), found.entropy.detach()], gradients


def compare(model: nn.Module, monkeypatch: pytest.MonkeyPatch, bound: float) -> None:
    wanted, gradients = results(model)
    monkeypatch.setattr(heads, "LOGITS_BYTES", 0)
    found, others = results(model)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=bound * b.abs().max().item())
    norm = torch.stack([g.norm() for g in gradients]).norm()
    distance = torch.stack([(a - b).norm() for a, b in zip(others, gradients, strict=True)]).norm()
    assert distance <= bound * norm


def test_a_fused_head_has_the_logprobs_and_gradients_of_logits(fused, monkeypatch):
    compare(new_learner("qwen2"), monkeypatch, 1e-6)
    assert len(fused) == 1


def test_a_float32_head_is_fused_by_bfloat16_operands(fused, monkeypatch):
    model = new_learner("qwen2").bfloat16()
    set_lm_head_dtype(model, "float32")
    wanted = token_logprobs(model, batch(), 1.0).logprobs
    monkeypatch.setattr(heads, "LOGITS_BYTES", 0)
    found = token_logprobs(model, batch(), 1.0).logprobs
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert len(fused) == 1


def test_values_come_with_a_fused_head(fused, monkeypatch):
    model, value_head = new_learner("qwen2"), nn.Linear(128, 1, bias=False)
    wanted = token_logprobs_and_values(model, value_head, batch(), 1.0)
    monkeypatch.setattr(heads, "LOGITS_BYTES", 0)
    found = token_logprobs_and_values(model, value_head, batch(), 1.0)
    torch.testing.assert_close(found[0].logprobs, wanted[0].logprobs)
    assert found[1].equal(wanted[1]) and len(fused) == 1


@pytest.mark.parametrize("in_place", [False, True])
def test_logits_that_a_model_changes_are_made(fused, monkeypatch, in_place):
    model = new_learner("qwen2")
    original = model.forward

    def capped(*args, **options):
        output = original(*args, **options)
        output.logits = output.logits.mul_(0.5) if in_place else output.logits.div(2).tanh()
        return output

    model.forward = capped
    compare(model, monkeypatch, 0.0)
    assert not fused


def test_a_head_with_a_hook_makes_its_logits(fused, monkeypatch):
    model = new_learner("qwen2")
    model.get_output_embeddings().register_forward_hook(lambda _module, _args, out: out * 2)
    compare(model, monkeypatch, 0.0)
    assert not fused


@pytest.mark.parametrize("vocab_size", [32768, 151936])
def test_an_update_of_16k_tokens_takes_no_tokens_x_vocabulary(vocab_size):
    """The plan of one micro-batch, float32: what a vocabulary adds is the gradient of its weight,
    held twice while it is added up, and the workspace.
    """
    peaks = []
    for size in (64, vocab_size):
        config = CONFIGS["qwen2"]()
        config.vocab_size = size
        with FakeTensorMode() as fake:
            model = shape_model(config, torch.device("cpu"))
        shape = memory.Shape(sequences=16, prompt_tokens=8, completion_tokens=1024)
        planned = memory._fake_batch(shape, model, fake)
        options = dict(temperature=1.0, max_new_tokens=1024)
        peaks.append(
            memory.peak_bytes(
                lambda model=model, planned=planned, options=options: accumulate_gradients(
                    model, [planned], OBJECTIVES["dapo"], **options
                ),
                model,
                fake,
            )
        )
    weight = 4 * vocab_size * config.hidden_size
    added = peaks[1] - peaks[0]
    assert added <= CPU_WORKSPACE_BYTES + 2.1 * weight
