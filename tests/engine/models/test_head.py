"""The fused head gives what the logits give, and is taken where the logits are its result only."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.engine.random_models import CONFIGS, new_learner
from warpo.engine.learner.step import accumulate_gradients
from warpo.engine.models import head as heads
from warpo.engine.models.architectures import shape_model
from warpo.engine.models.batch import Batch, pack
from warpo.engine.models.model import predict, set_lm_head_dtype, token_logprobs
from warpo.engine.models.score import score
from warpo.engine.plan import memory
from warpo.engine.types import TokenSequence
from warpo.kernels import dispatch, ops
from warpo.kernels._linear_head_plan import CPU_WORKSPACE_BYTES
from warpo.kernels.objectives import OBJECTIVES, Objective


def batch() -> Batch:
    return pack([TokenSequence.of([1, 2, 3], rest) for rest in ([4, 5, 6, 7], [4, 8], [9])])


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the fused operations that are called."""
    calls: list[str] = []

    def counted(name):
        original = getattr(ops, name)

        def count(*args, **options):
            calls.append(name)
            return original(*args, **options)

        monkeypatch.setattr(ops, name, count)

    counted("linear_logprobs_and_entropy")
    counted("policy_loss_from_hidden")
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


def test_a_float32_head_of_bfloat16_weights_is_fused_at_any_size(fused, monkeypatch):
    model = new_learner("qwen2").bfloat16()
    set_lm_head_dtype(model, "float32")
    found = token_logprobs(model, batch(), 1.0).logprobs
    assert len(fused) == 1
    monkeypatch.setattr(heads, "_widens", lambda head: False)
    wanted = token_logprobs(model, batch(), 1.0).logprobs
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert len(fused) == 1


def test_values_come_with_a_fused_head(fused, monkeypatch):
    model, value_head = new_learner("qwen2"), nn.Linear(128, 1, bias=False)
    wanted = predict(model, batch(), value_head)[1]
    monkeypatch.setattr(heads, "LOGITS_BYTES", 0)
    predictions, found = predict(model, batch(), value_head)
    assert found.equal(wanted) and isinstance(predictions, heads.FromHidden)


def step_batches(model: nn.Module) -> list[Batch]:
    """Micro-batches of 7, 4 and 13 tokens: ratios on both sides of their bounds."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for completions in ([[4, 5, 6, 7], [4, 8], [9]], [[4, 60, 61, 62]], [[5, 6] * 6, [11]]):
        packed = pack([TokenSequence.of([1, 2, 3], rest) for rest in completions])
        near = score(model, packed, 0.7)
        names = ("old_logprobs", "sampler_logprobs", "ref_logprobs", "advantages")
        noise = torch.randn(len(names), packed.num_trained, generator=generator)
        columns = {name: near + 0.3 * x for name, x in zip(names, noise, strict=True)}
        columns["advantages"] = noise[-1]
        made.append(replace(packed, **columns, token_index=torch.arange(packed.num_trained)))
    return made


def step_of(model: nn.Module, batches: list[Batch], objective: Objective, **options: Any) -> Any:
    """The gradient of an optimizer step, and its report."""
    model.zero_grad(set_to_none=True)
    options = dict(temperature=0.7, max_new_tokens=16) | options
    report = accumulate_gradients(model, batches, objective, **options)
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double(), report


@pytest.mark.parametrize("old", ["given", "none"])
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_a_fused_policy_loss_has_the_gradient_of_logits(fused, monkeypatch, name, old):
    """With a KL and an entropy bonus, in micro-batches of several sizes."""
    model = new_learner("qwen2")
    objective = OBJECTIVES[name].replace(kl_coef=0.05, entropy_coef=0.01)
    batches = step_batches(model)
    if old == "none":
        batches = [replace(batch, old_logprobs=None) for batch in batches]
    wanted, report = step_of(model, batches, objective)
    assert not fused and wanted.norm() > 0
    monkeypatch.setattr(heads, "LOGITS_BYTES", 0)
    found, fused_report = step_of(model, batches, objective)
    assert fused.count("policy_loss_from_hidden") == len(batches)
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()
    torch.testing.assert_close(fused_report.policy, report.policy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reader", ["penalized", "right", "causal"])
def test_logprobs_that_others_read_are_made_before_the_loss(fused, monkeypatch, reader):
    model, objective = new_learner("qwen2"), OBJECTIVES["dapo"]
    batches = step_batches(model)
    options = {}
    if reader == "penalized":
        batches = [replace(b, penalized=b.advantages > 0) for b in batches]
        options = {"penalty_coef": 0.5}
    elif reader == "right":
        batches = [replace(b, right=b.advantages > 0) for b in batches]
        options = {"right_nll_coef": 0.5}
    else:
        objective, options = OBJECTIVES["off_policy_causal"], {"causal_gamma": 0.9}
    wanted, _ = step_of(model, batches, objective, **options)
    monkeypatch.setattr(heads, "LOGITS_BYTES", 0)
    found, _ = step_of(model, batches, objective, **options)
    assert fused == ["linear_logprobs_and_entropy"] * len(batches)
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize(
    ("head_class", "bound"), [(nn.Linear, 2.0**-7), (heads.Float32Head, 2.0**-8)]
)
def test_gradients_of_a_bfloat16_head_against_float64(head_class, bound):
    """Of 96 tokens, 64 -> 512, within `bound` of their norm, and twice the error of logits."""
    torch.manual_seed(0)
    head = nn.Linear(64, 512).bfloat16()
    head.__class__ = head_class
    hidden = torch.randn(96, 64).bfloat16().mul_(3).requires_grad_()
    targets, advantages = torch.randint(512, (96,)), torch.randn(96)
    given = {"cu_seqlens": torch.tensor([0, 40, 96], dtype=torch.int32), "temperature": 0.7}

    def errors(loss):
        inputs = (hidden, head.weight, head.bias)
        gradients = torch.autograd.grad(loss, inputs)
        return [
            ((g.double() - w).norm() / w.norm()).item()
            for g, w in zip(gradients, wanted, strict=True)
        ]

    exact = [x.detach().double().requires_grad_() for x in (hidden, head.weight, head.bias)]
    logits = (exact[0] @ exact[1].T + exact[2]) / 0.7
    logprobs = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    # the ratio of a policy that has not moved is 1, its derivative that of the logprob
    wanted = torch.autograd.grad(-(logprobs * advantages).mean(), exact)
    objective = OBJECTIVES["dapo"]
    fused = heads.FromHidden(hidden, head).policy_loss(targets, advantages, objective, **given)
    made = heads.FromLogits(head(hidden)).policy_loss(targets, advantages, objective, **given)
    found, plain = errors(fused.loss), errors(made.loss)
    assert max(found) <= bound
    assert all(a <= 2 * b + 2.0**-9 for a, b in zip(found, plain, strict=True)), (found, plain)


@pytest.mark.parametrize("in_place", [False, True])
def test_logits_that_a_model_changes_are_made(fused, monkeypatch, in_place):
    model = new_learner("qwen2")
    original = model.forward

    def capped(*args, **options):
        output = original(*args, **options)
        output.logits = output.logits.mul_(0.5) if in_place else output.logits.div(2).tanh()
        return output

    model.forward = capped
    assert not predict(model, batch())[0].owned
    compare(model, monkeypatch, 0.0)
    assert not fused


def test_a_head_with_a_hook_makes_its_logits(fused, monkeypatch):
    model = new_learner("qwen2")
    model.get_output_embeddings().register_forward_hook(lambda _module, _args, out: out * 2)
    assert not predict(model, batch())[0].owned
    compare(model, monkeypatch, 0.0)
    assert not fused


@pytest.mark.parametrize("lm_head_dtype", ["same", "float32"])
@pytest.mark.parametrize("loss", ["logprobs", "policy_loss"])
def test_gradients_are_written_over_logits_of_the_head_itself(monkeypatch, lm_head_dtype, loss):
    model, (packed, *_) = new_learner("qwen2"), step_batches(new_learner("qwen2"))
    set_lm_head_dtype(model, lm_head_dtype)
    given = {"temperature": 0.7, "cu_seqlens": packed.cu_seqlens}

    def gradient() -> tuple[torch.Tensor, heads.FromLogits]:
        predictions, _ = predict(model, packed)
        if loss == "logprobs":
            result = predictions.logprobs(packed.targets, 0.7).logprobs @ packed.advantages
        else:
            options = (packed.targets, packed.advantages, OBJECTIVES["dapo"])
            result = predictions.policy_loss(*options, **given).loss
        model.zero_grad(set_to_none=True)
        result.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()]), predictions

    found, predictions = gradient()
    # rows of a softmax's gradient sum to 0
    assert predictions.owned and predictions.logits.sum(1).abs().max() < 1e-5
    monkeypatch.setattr(heads, "_is_result", lambda *_: False)
    wanted, predictions = gradient()
    assert not predictions.owned and predictions.logits.sum(1).abs().max() > 1
    assert torch.equal(found, wanted)


def test_the_backend_reference_keeps_the_logits(monkeypatch):
    model = new_learner("qwen2")
    wanted, _ = step_of(model, step_batches(model), OBJECTIVES["grpo"])
    monkeypatch.setattr(dispatch, "_REQUESTED", "reference")
    found, _ = step_of(model, step_batches(model), OBJECTIVES["grpo"])
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("objective", ["dapo", "gspo"])
def test_an_update_takes_the_logits_once(objective):
    """Those of 4k tokens are made, 128 MiB, and become their gradient."""
    added, weight = planned_for_vocabulary(8192, sequences=4, objective=objective)
    logits = 4 * 4 * 1024 * 8192
    assert 0.9 * logits <= added <= logits + 2.1 * weight


@pytest.mark.parametrize("objective", ["dapo", "gspo"])
@pytest.mark.parametrize("vocab_size", [32768, 151936])
def test_an_update_of_16k_tokens_takes_no_tokens_x_vocabulary(vocab_size, objective):
    """The plan of one micro-batch, float32: what a vocabulary adds is the gradient of its weight,
    held twice while it is added up, and the workspace.
    """
    added, weight = planned_for_vocabulary(vocab_size, sequences=16, objective=objective)
    assert added <= CPU_WORKSPACE_BYTES + 2.1 * weight


def planned_for_vocabulary(vocab_size: int, *, sequences: int, objective: str) -> tuple[int, int]:
    """Bytes that a vocabulary adds to the plan of an update of 1024 tokens per sequence over one of
    64 tokens, and those of its weight.
    """
    peaks = []
    for size in (64, vocab_size):
        config = CONFIGS["qwen2"]()
        config.vocab_size = size
        with FakeTensorMode() as fake:
            model = shape_model(config, torch.device("cpu"))
        shape = memory.Shape(sequences=sequences, prompt_tokens=8, completion_tokens=1024)
        planned = memory._fake_batch(shape, model, fake)
        step = partial(
            accumulate_gradients,
            model,
            [planned],
            OBJECTIVES[objective],
            temperature=1.0,
            max_new_tokens=1024,
        )
        peaks.append(memory.peak_bytes(step, model, fake))
    return peaks[1] - peaks[0], 4 * vocab_size * config.hidden_size
