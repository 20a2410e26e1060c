"""The plan of a linear head, and the matrix products that follow from it on a GPU."""

import itertools
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.backends import DEVICE
from tests.kernels.gpu_products import Product, as_on_a_gpu
from warpo.kernels import _linear_head_plan as plans
from warpo.kernels import _linear_logprobs_operator as linear_logprobs
from warpo.kernels import _matrix_product
from warpo.kernels import _policy_loss_from_hidden as policy_loss
from warpo.kernels._arguments.denominator import DenominatorArguments
from warpo.kernels._linear_head_plan import APART, NONE, OVER, Request, plan
from warpo.kernels._policy_metrics import METRICS
from warpo.kernels.objectives import OBJECTIVES

# vocabulary and hidden size
HEADS = {
    "Qwen2.5 7B": (151936, 3584),
    "Llama-3 8B": (128256, 4096),
    "Gemma-3 4B": (262144, 2560),
    "GPT-2": (50257, 768),
}
LARGE_CARD = 4 << 30
each_logits_dtype = pytest.mark.parametrize("float32_logits", [True, False])


@st.composite
def requests(draw):
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    on_cpu = draw(st.booleans())
    return Request(
        num_tokens=draw(st.integers(0, 40000)),
        vocab=draw(st.sampled_from([1, 33, 1000, *(vocab for vocab, _ in HEADS.values())])),
        hidden_size=draw(st.sampled_from([1, 64, 4096])),
        dtype=dtype,
        logits_dtype=draw(st.sampled_from([torch.float32, dtype])),
        workspace_bytes=draw(st.integers(1, 8 << 30)),
        on_cpu=on_cpu,
        mixes=on_cpu and draw(st.booleans()),
        softcap=draw(st.booleans()),
        gradients=draw(st.sampled_from([NONE, OVER, APART])),
        kept=draw(st.booleans()),
    )


@given(requests())
def test_buffers_fit_the_workspace_and_chunks_are_whole_tiles(request):
    found = plan(request)
    assert 1 <= found.tokens <= found.block and 1 <= found.columns <= request.vocab
    logits = 0 if request.kept else found.tokens * request.logits_dtype.itemsize
    gradients = found.apart * found.block * found.gradient_dtype.itemsize
    used = found.stride * (logits + gradients)
    assert used <= request.workspace_bytes or found.block == 1
    if request.on_cpu:
        return
    assert found.stride % plans.ALIGNMENT == 0 and 0 <= found.stride - request.vocab < 8
    assert found.gradient_dtype == found.product_dtype == request.dtype
    if request.logits_dtype != request.dtype and request.gradients != NONE:
        assert found.apart
    for part, whole in ((found.tokens, found.block), (found.block, request.num_tokens)):
        assert part >= whole or part % plans.TILE == 0 or part < plans.TILE


def new_inputs(name: str, count: int, float32_logits: bool, *, workspace_bytes: int = LARGE_CARD):
    """What the operators take, without memory."""
    vocab, size = HEADS[name]
    token = torch.empty(1, count, device="meta")
    shared = {
        "hidden": torch.empty(1, count, size, dtype=torch.bfloat16, device="meta"),
        "weight": torch.empty(vocab, size, dtype=torch.bfloat16, device="meta"),
        "bias": None,
        "temperature": 1.0,
        "token_temperature": None,
        "softcap": 0.0,
        "num_valid": -1,
        "workspace_bytes": workspace_bytes,
        "float32_logits": float32_logits,
        "backend": "none",
    }
    return shared, token


def of_policy_loss(name: str, count: int, float32_logits: bool, **options) -> list[Product]:
    shared, token = new_inputs(name, count, float32_logits, **options)
    objective = OBJECTIVES["dapo"]
    inputs = policy_loss.PolicyLossFromHiddenInputs(
        **shared,
        targets=token.long(),
        valid=token.bool(),
        cu_seqlens=None,
        old_logprobs=token,
        advantages=token,
        ref_logprobs=None,
        sampler_logprobs=None,
        objective=objective.arguments,
        kl_penalty=policy_loss.kl_penalty(None, objective, None, token),
        denominator=DenominatorArguments(1.0, None),
        wanted=[True, True, False],
    )
    metrics = (token.new_empty(()), token.new_empty(len(METRICS)))
    with (
        as_on_a_gpu() as products,
        patch.object(policy_loss, "loss_of_logprobs", lambda *_: metrics),
    ):
        launch(policy_loss._forward, inputs)
    return products


def of_linear_logprobs(
    name: str, count: int, float32_logits: bool, kept: bool, overwrites: bool = True
) -> list[Product]:
    shared, token = new_inputs(name, count, float32_logits)
    inputs = linear_logprobs.LinearLogprobsInputs(
        **shared,
        targets=token[0].long(),
        mask=None,
        ignore_index=-100,
        with_entropy=True,
        cache_logits=kept,
        group_name="",
    )
    with as_on_a_gpu() as products:
        _, entropy, stats, cache = launch(linear_logprobs._forward, inputs)
        backward = linear_logprobs.LinearLogprobsBackwardInputs(
            stats=stats,
            forward=inputs,
            entropy=entropy,
            cache=cache if kept else None,
            grad_logprobs=token[0],
            grad_entropy=None,
            wanted=[True, True, False],
            overwrites=overwrites,
        )
        launch(linear_logprobs._backward, backward)
    return products


def launch(body, inputs):
    """The body of an operator, with kernels that do nothing."""

    def kernel(arguments) -> None:
        gradient = getattr(arguments, "grad_logits", None)
        if gradient is not None and gradient.dtype != arguments.forward.logits.dtype:
            assert arguments.forward.logits.dtype == torch.float32

    names = ("logprobs_forward", "logprobs_backward", "policy_loss_from_logits")
    kernels = SimpleNamespace(**dict.fromkeys(names, kernel))
    with patch("warpo.kernels.dispatch.load", lambda name: kernels):
        return body(inputs)


def all_products(name: str, count: int, float32_logits: bool) -> list[Product]:
    products = of_policy_loss(name, count, float32_logits)
    products += of_policy_loss(name, count, float32_logits, workspace_bytes=1 << 30)
    for kept, overwrites in itertools.product((False, True), (False, True)):
        products += of_linear_logprobs(name, count, float32_logits, kept, overwrites)
    return products


@each_logits_dtype
@pytest.mark.parametrize("count", [1000, 8192, 16384])
@pytest.mark.parametrize("name", HEADS)
def test_every_product_has_strides_of_whole_16_bytes(name, count, float32_logits):
    products = all_products(name, count, float32_logits)
    assert {product.size[1] for product in products} == set(HEADS[name])
    for product in products:
        assert not [stride for stride in product.strides_in_bytes() if stride % 16], product.size


def multiplications(products: list[Product]) -> int:
    return sum(rows * columns * depth for rows, columns, depth in (x.size for x in products))


@each_logits_dtype
@pytest.mark.parametrize("count", [1000, 8192, 16384, 20000])
@pytest.mark.parametrize("name", HEADS)
def test_three_products_for_the_loss_and_four_or_three_for_logprobs(name, count, float32_logits):
    vocab, size = HEADS[name]
    one = count * vocab * size
    assert multiplications(of_policy_loss(name, count, float32_logits)) == 3 * one
    assert multiplications(of_linear_logprobs(name, count, float32_logits, False)) == 4 * one
    assert multiplications(of_linear_logprobs(name, count, float32_logits, True)) == 3 * one


@pytest.mark.parametrize(
    "float32_logits, chunks, count, blocks",
    [(True, 8, 8192, 1), (True, 16, 16384, 2), (False, 1, 8192, 1)],
)
def test_one_product_a_chunk_and_two_a_block(float32_logits, chunks, count, blocks):
    """Of 8192 tokens, straight into the results; of more, the weight's through float32 sums."""
    vocab, size = HEADS["Qwen2.5 7B"]
    products = of_policy_loss("Qwen2.5 7B", count, float32_logits)
    logits = [x for x in products if x.size == (count // chunks, vocab, size)]
    of_hidden = [x for x in products if x.size == (count // blocks, size, vocab)]
    of_weight = [x for x in products if x.size == (vocab, size, count // blocks)]
    assert (len(logits), len(of_hidden), len(of_weight)) == (chunks, blocks, blocks)
    assert len(products) == chunks + 2 * blocks
    assert {x.out.dtype for x in of_hidden} == {torch.bfloat16}
    assert {x.out.dtype for x in of_weight} == {torch.bfloat16 if blocks == 1 else torch.float32}
    assert [x.addend is None for x in of_weight] == [True] + [False] * (blocks - 1)


@pytest.mark.parametrize("gib, workspace_gib", [(8, 0.5), (24, 1.5), (40, 2.5), (79, 4), (141, 4)])
def test_the_workspace_of_a_card_is_a_sixteenth_of_its_memory_at_most_4_gib(gib, workspace_gib):
    card = SimpleNamespace(total_memory=gib << 30)
    with patch("torch.cuda.get_device_properties", lambda device: card):
        found = plans.default_workspace_bytes(torch.device("cuda", 0))
        assert found == workspace_gib * 2**30

        def scaled(x):
            return x * plans.default_workspace_bytes(torch.device("cuda", 0))

        torch._dynamo.reset()
        compiled = torch.compile(scaled, fullgraph=True, backend="eager")
        assert compiled(torch.ones(())) == found


@pytest.mark.parametrize("dtype, name", _matrix_product._REDUCED.items(), ids=str)
def test_the_products_of_a_gpu_sum_in_float32_and_leave_the_setting_alone(dtype, name):
    matmul, out = torch.backends.cuda.matmul, SimpleNamespace(is_cuda=True, dtype=dtype)
    before = getattr(matmul, name)
    try:
        for setting in (True, False):
            setattr(matmul, name, setting)
            with pytest.raises(KeyError), _matrix_product.sums_in_float32(out):
                assert getattr(matmul, name) is False
                raise KeyError
            assert getattr(matmul, name) is setting
    finally:
        setattr(matmul, name, before)
    with _matrix_product.sums_in_float32(torch.empty(0, dtype=torch.float32, device=DEVICE)):
        assert getattr(matmul, name) is before
