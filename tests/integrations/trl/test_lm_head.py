"""TRL's fused language-model head."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.integrations.compare import compare

pytest.importorskip("trl", reason="TRL is not installed: make peers; then make test-integrations")
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS, ChunkedLogProbFunction  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

from warpo.kernels.integrations import trl  # noqa: E402

NAMES = ["ChunkedLogProbFunction.forward", "ChunkedLogProbFunction.backward"]


THEIRS = {name: vars(ChunkedLogProbFunction)[name.partition(".")[2]] for name in NAMES}
with trl.patch(only=NAMES):
    OURS = {name: vars(ChunkedLogProbFunction)[name.partition(".")[2]] for name in NAMES}


def function_of(forward_is_ours, backward_is_ours):
    """`apply` of the function with either half ours."""
    members = {
        name.partition(".")[2]: (OURS if ours else THEIRS)[name]
        for name, ours in zip(NAMES, (forward_is_ours, backward_is_ours), strict=True)
    }
    apply = type("Function", (torch.autograd.Function,), members).apply
    return lambda *arguments: [x for x in apply(*arguments) if x is not None]


def head(tokens, hidden_size, vocab, dtype, seed, with_bias=True):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    bias = normal(vocab) if with_bias else None
    return normal(tokens, hidden_size), normal(vocab, hidden_size), bias, targets


@given(
    sizes=st.tuples(st.integers(0, 9), st.integers(1, 20), st.integers(2, 70)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    with_bias=st.booleans(),
    temperature=st.sampled_from([1.0, 0.7]),
    softcap=st.sampled_from([None, 5.0]),
    scale=st.sampled_from([1.0, 0.5]),
    outputs=st.sets(st.sampled_from(OPTIONAL_OUTPUTS)),
    halves=st.sampled_from([(True, True), (True, False), (False, True)]),
    seed=st.integers(0, 99),
)
def test_fused_head(sizes, dtype, with_bias, temperature, softcap, scale, outputs, halves, seed):
    arguments = head(*sizes, dtype, seed, with_bias)
    # TRL's result of a bool is of rounded logits: compared apart
    outputs = tuple(sorted(outputs - {"is_top1"}))
    differentiable = [0, 1, 2] if with_bias else [0, 1]
    # a gradient sums products of both signs, of logits' gradients up to 10 and of the other factor
    gradient_scale = 20.0 if dtype == torch.float32 else 0.0
    numbers = (temperature, 32, softcap, scale, outputs)
    compare(
        function_of(False, False),
        function_of(*halves),
        *arguments,
        *numbers,
        differentiable=differentiable,
        scale=40.0,
        gradient_scale=gradient_scale,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_1_is_the_first_of_equal_logits(dtype):
    hidden, weight, _, targets = head(64, 8, 30, dtype, 0, with_bias=False)
    weight[15:] = weight[:15]
    options = (1.0, 32, None, 1.0, ("is_top1",))
    with torch.no_grad():
        targets[::2] = (hidden @ weight.T)[::2].max(-1).indices
        targets[::4] = (targets[::4] + 15) % 30
        wanted = function_of(False, False)(hidden, weight, None, targets, *options)[1]
        found = function_of(True, True)(hidden, weight, None, targets, *options)[1]
    assert found.dtype == torch.bool and wanted.any() and torch.equal(found, wanted)


@pytest.mark.parametrize("outputs", [(), ("entropy",)])
def test_tokens_without_gradient_take_no_part(outputs):
    hidden, weight, _, targets = head(6, 8, 30, torch.float32, 0, with_bias=False)
    dirty = hidden.clone()
    dirty[4:] = torch.nan
    gradients = []
    for states in (dirty, hidden):
        leaves = states.clone().requires_grad_(), weight.clone().requires_grad_()
        results = function_of(True, True)(*leaves, None, targets, 1.0, 32, None, 1.0, outputs)
        sum(x[:4].sum() for x in results).backward()
        gradients.append([x.grad for x in leaves])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("halves", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("softcap", "with_bias"), [(None, False), (5.0, True)])
def test_autocast(halves, states, weights, softcap, with_bias):
    """TRL's default is bfloat16 over weights of float32."""
    hidden, weight, bias, targets = head(40, 24, 300, torch.float32, 0, with_bias)
    hidden, weight = hidden.to(states), weight.to(weights)
    differentiable = [0, 1, 2] if with_bias else [0, 1]

    def run(function):
        def call(*arguments):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return function(*arguments)

        return call

    def exact(hidden, weight, bias, targets, *_):
        def rounded(x):
            return x + (x.bfloat16().double() - x).detach()

        logits = rounded(hidden) @ rounded(weight).T
        if with_bias:
            logits = logits + rounded(bias)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logp = (logits / 0.7).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        return [logp.gather(-1, targets[:, None])[:, 0], entropy]

    # 1 of 256 of the terms of a gradient, which are products with rounded gradients of logits
    numbers = (0.7, 32, softcap, 1.0, ("entropy",))
    compare(
        run(function_of(False, False)),
        run(function_of(*halves)),
        *(hidden, weight, bias, targets, *numbers),
        differentiable=differentiable,
        scale=40.0,
        gradient_scale=2e4 if torch.float32 in (states, weights) or with_bias else 20.0,
        exact_original=exact,
    )


def test_what_is_left_to_trl():
    hidden, weight, _, targets = head(6, 8, 30, torch.float32, 0, with_bias=False)
    for states, matrix, scale in (
        (hidden.double(), weight.double(), 1.0),
        (hidden, weight, -1.0),
    ):
        options = (None, targets, 1.0, 32, None, scale, OPTIONAL_OUTPUTS)
        found = function_of(True, True)(states, matrix, *options)
        wanted = function_of(False, False)(states, matrix, *options)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_a_model_with_a_fused_head():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config)
    add_fused_lm_head(model, temperature=0.8, outputs=("log_probs", *OPTIONAL_OUTPUTS))
    ids = torch.randint(0, 50, (3, 7))
    labels = ids.masked_fill(torch.arange(7) < 3, -100)
    found = []
    for names in ([], NAMES):
        model.zero_grad()
        with trl.patch(only=names):
            outputs = model(input_ids=ids, labels=labels, fused_lm_head=True)
            (outputs.loss + outputs.entropy.sum()).backward()
        tensors = {name: x.detach() for name, x in outputs.items()}
        found.append(tensors | {n: p.grad.clone() for n, p in model.named_parameters()})
    torch.testing.assert_close(found[1], found[0])
