import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.backends import (
    BACKENDS,
    DEVICE,
    apart,
    dtypes,
    each_backend,
    examples,
    last_arguments,
    roundings,
    strided,
)
from tests.kernels.opcheck import opcheck
from tests.tolerance import (
    GRADIENT_ABSOLUTE,
    GRADIENT_RELATIVE,
    LOGPROB_ABSOLUTE,
    LOGPROB_RELATIVE,
    assert_close,
)
from warpo.kernels import _logprobs_operator as operator_module
from warpo.kernels import dispatch, ops, reference
from warpo.kernels._logprobs_operator import LogprobsInputs, logprobs_operator


@st.composite
def cases(draw, backend: str):
    """Logits as a policy's are, with everything that is legal but unusual."""
    lead = draw(st.sampled_from([(), (1,), (5,), (0,), (3, 4), (2, 1), (2, 3, 2)]))
    vocab = draw(st.sampled_from([1, 2, 7, 31, 257, 1000, 4095, 4099]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 3.0, 30.0]))
    logits = scale * torch.randn((*lead, vocab), generator=generator)
    logits += draw(st.sampled_from([0.0, 1e4 if scale > 1 else 0.0]))
    targets = torch.randint(0, vocab, lead, generator=generator)
    if draw(st.booleans()) and vocab > 2:
        closed = torch.rand(logits.shape, generator=generator) < 0.3
        closed.scatter_(-1, targets[..., None], False)
        logits = logits.masked_fill(closed, -torch.inf)
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(lead, generator=generator) < 0.6
        logits = logits.masked_fill(~mask[..., None], torch.nan)
    if draw(st.booleans()):
        ignored = torch.rand(lead, generator=generator) < 0.3
        targets = targets.masked_fill(ignored, -100)
        logits = logits.masked_fill(ignored[..., None], torch.nan)
    temperature: float | Tensor = draw(st.sampled_from([1.0, 0.7, 3.0]))
    if draw(st.booleans()):
        temperature = 0.3 + torch.rand(lead, generator=generator)
    dtype = draw(st.sampled_from(dtypes(backend)))
    layout = draw(st.sampled_from(["dense", "sliced"]))
    logits = strided(logits.to(dtype), layout if len(lead) < 3 else "dense")
    grads = [torch.randn(lead, generator=generator).to(DEVICE) for _ in range(2)]
    if draw(st.booleans()):
        grads = [torch.full((), 0.5, device=DEVICE).expand(lead) for _ in range(2)]
    place = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in (targets, temperature, mask)]
    return logits, *place, grads


def expected(logits, targets, temperature, mask, grads):
    """Values and gradient in float64."""
    exact = logits.detach().double().requires_grad_()
    if isinstance(temperature, Tensor):
        temperature = temperature.double()
    logp, entropy = reference.logprobs(exact, targets, temperature, mask)
    loss = (logp * grads[0]).sum() + (entropy * grads[1]).sum()
    loss.backward()
    return logp, entropy, exact.grad


@each_backend
def test_values_and_gradients_equal_float64(backend):
    @settings(max_examples=examples(backend, 150))
    @given(cases(backend))
    def check(case):
        logits, targets, temperature, mask, grads = case
        logp_64, entropy_64, grad_64 = expected(*case)
        logits = logits.detach().requires_grad_()
        logp, entropy = ops.logprobs_and_entropy(
            logits, targets, temperature=temperature, mask=mask, backend=backend
        )
        alone = ops.logprobs(logits, targets, temperature=temperature, mask=mask, backend=backend)
        assert torch.equal(alone, logp), "logprobs depend on whether the entropy is computed"
        assert (logp.detach() <= 0).all()
        # the largest scaled logit bounds what float32 loses before the exponential
        size = (
            logits.detach().double().nan_to_num(0, 0, 0).abs().amax().item()
            if logits.numel()
            else 0
        )
        spread = 1 + min(size, 200.0) / 10
        for name, actual, exact in (("logp", logp, logp_64), ("entropy", entropy, entropy_64)):
            assert_close(
                actual,
                exact,
                what=name,
                relative=LOGPROB_RELATIVE * spread,
                absolute=LOGPROB_ABSOLUTE * spread,
            )
        torch.autograd.backward([logp, entropy], grads)
        # h p (log p + H) cancels: relative to its larger part
        assert_close(
            logits.grad,
            grad_64,
            what="gradient",
            relative=GRADIENT_RELATIVE * spread,
            absolute=GRADIENT_ABSOLUTE * spread * 30,
        )

    check()


@each_backend
def test_a_row_alone_has_the_bits_of_the_row_in_a_batch(backend):
    vocab = 9001 if backend != "triton" or DEVICE == "cuda" else 4500
    # on a GPU also past the number of rows at which the vocabulary is split
    rows = 37 if DEVICE == "cpu" else operator_module.SPLIT_TOKENS + 37
    logits = 3 * torch.randn(rows, vocab, device=DEVICE)
    targets = torch.randint(0, vocab, (rows,), device=DEVICE)
    batch = ops.logprobs_and_entropy(logits, targets, backend=backend)
    for row in (0, 17, 36):
        alone = ops.logprobs_and_entropy(
            logits[row : row + 1], targets[row : row + 1], backend=backend
        )
        assert torch.equal(alone.logprobs[0], batch.logprobs[row])
        assert torch.equal(alone.entropy[0], batch.entropy[row])


@each_backend
@pytest.mark.parametrize("vocab", [8192, 8193, 20001])
def test_a_split_vocabulary_changes_no_bit(backend, vocab, monkeypatch):
    logits = 3 * torch.randn(3, vocab, device=DEVICE)
    logits[1, ::3] = -torch.inf
    logits[2, :9000] = -torch.inf
    targets = torch.tensor([0, 7, vocab - 1], device=DEVICE)
    results = []
    for tokens in (0, 3):
        monkeypatch.setattr(operator_module, "SPLIT_TOKENS", tokens)
        results.append(ops.logprobs_and_entropy(logits, targets, backend=backend))
    for whole, split in zip(*results, strict=True):
        assert torch.equal(whole.isnan(), split.isnan())
        assert torch.equal(whole.nan_to_num(), split.nan_to_num())


@each_backend
def test_runs_are_bit_equal(backend):
    logits = torch.randn(4, 1500, device=DEVICE, requires_grad=True)
    targets = torch.randint(0, 1500, (4,), device=DEVICE)

    def once() -> tuple[Tensor, ...]:
        logits.grad = None
        logp, entropy = ops.logprobs_and_entropy(logits, targets, backend=backend)
        (logp + entropy).sum().backward()
        return logp.detach(), entropy.detach(), logits.grad

    first = once()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@each_backend
def test_uniform_logits_give_minus_log_vocab(backend):
    result = ops.logprobs_and_entropy(
        torch.full((3, 1000), 5.5, device=DEVICE),
        torch.tensor([0, 5, 999], device=DEVICE),
        backend=backend,
    )
    assert torch.allclose(
        result.logprobs, torch.tensor(-math.log(1000.0), device=DEVICE), atol=1e-6
    )
    assert torch.allclose(result.entropy, torch.tensor(math.log(1000.0), device=DEVICE), atol=1e-5)


@each_backend
def test_a_common_offset_changes_nothing(backend):
    # a power of two and steps of 2^-4 are exact in float32 at 2^14
    logits = torch.randint(-64, 64, (4, 300), device=DEVICE) / 16
    targets = torch.randint(0, 300, (4,), device=DEVICE)
    plain = ops.logprobs_and_entropy(logits, targets, backend=backend)
    moved = ops.logprobs_and_entropy(logits + 2.0**14, targets, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(plain, moved, strict=True))


@each_backend
def test_gradient_rows_sum_to_zero(backend):
    logits = torch.randn(4, 1000, device=DEVICE, requires_grad=True)
    targets = torch.randint(0, 1000, (4,), device=DEVICE)
    result = ops.logprobs_and_entropy(logits, targets, backend=backend)
    (result.logprobs.sum() + result.entropy.sum()).backward()
    assert logits.grad.double().sum(-1).abs().max() < 1e-5


@each_backend
@pytest.mark.parametrize("target", [-1, 11, 2**40])
def test_a_target_out_of_range_poisons_its_row_alone(backend, target):
    logits = torch.randn(3, 11, device=DEVICE, requires_grad=True)
    targets = torch.tensor([0, target, 10], device=DEVICE)
    result = ops.logprobs_and_entropy(logits, targets, backend=backend)
    result.logprobs.sum().backward()
    for values in (*result, logits.grad.sum(-1)):
        assert values.isnan().tolist() == [False, True, False]
    assert logits.grad[1].isnan().all()


@each_backend
def test_rows_of_minus_infinity_or_nan_are_nan_and_a_closed_target_is_minus_infinity(backend):
    logits = torch.randn(4, 11, device=DEVICE)
    logits[0] = -torch.inf
    logits[1, 3] = torch.nan
    logits[2, 5] = -torch.inf
    logits.requires_grad_()
    targets = torch.full((4,), 5, device=DEVICE)
    logp, entropy = ops.logprobs_and_entropy(logits, targets, backend=backend)
    torch.autograd.backward([logp, entropy], [torch.ones_like(logp)] * 2)
    assert logits.grad.isnan().all(-1).tolist() == [True, True, False, False]
    assert logits.grad[2:].isfinite().all()
    assert logp.isnan().tolist() == [True, True, False, False]
    assert entropy.isnan().tolist() == [True, True, False, False]
    assert logp[2] == -torch.inf


@each_backend
def test_half_range_and_a_cold_temperature(backend):
    if torch.float16 not in dtypes(backend):
        pytest.skip("the interpreter is held to float32")
    logits = torch.tensor([[65504.0, -65504.0, 65472.0]], device=DEVICE, dtype=torch.float16)
    targets = torch.tensor([2], device=DEVICE)
    for temperature in (1.0, 0.01, 32.0):
        leaf, leaf_64 = logits.clone().requires_grad_(), logits.double().requires_grad_()
        actual = ops.logprobs(leaf, targets, temperature=temperature, backend=backend)
        exact, _ = reference.logprobs(leaf_64, targets, temperature)
        assert_close(
            actual, exact, relative=LOGPROB_RELATIVE, absolute=LOGPROB_ABSOLUTE, what="logp"
        )
        actual.sum().backward()
        exact.sum().backward()
        assert_close(
            leaf.grad, leaf_64.grad, relative=GRADIENT_RELATIVE * 10, absolute=1e-6, what="gradient"
        )


@each_backend
def test_infinities_in_masked_slots_are_not_read(backend):
    logits = torch.randn(2, 4, 40, device=DEVICE)
    targets = torch.randint(0, 40, (2, 4), device=DEVICE)
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1]], device=DEVICE, dtype=torch.bool)
    temperature = torch.ones(2, 4, device=DEVICE)
    for value in (torch.inf, -torch.inf, torch.nan):
        leaf = logits.masked_fill(~mask[..., None], value).requires_grad_()
        result = ops.logprobs_and_entropy(
            leaf,
            targets,
            mask=mask,
            temperature=temperature.masked_fill(~mask, value),
            backend=backend,
        )
        (result.logprobs + result.entropy).sum().backward()
        for x in (*result, leaf.grad.abs().sum(-1)):
            assert (x[~mask] == 0).all() and x[mask].isfinite().all()


@each_backend
def test_transposed_rows_are_a_view(backend):
    logits = torch.randn(5, 3, 50, device=DEVICE).transpose(0, 1)
    targets = torch.randint(0, 50, (3, 5), device=DEVICE)
    dense = ops.logprobs(logits.contiguous(), targets, backend=backend)
    assert torch.equal(ops.logprobs(logits, targets, backend=backend), dense)


@each_backend
def test_shifted_logits_are_a_view(backend):
    logits = torch.randn(2, 6, 50, device=DEVICE, requires_grad=True)
    targets = torch.randint(0, 50, (2, 5), device=DEVICE)
    logp = ops.logprobs(logits[:, :-1], targets, backend=backend)
    exact = torch.log_softmax(logits[:, :-1].double(), -1).gather(-1, targets[..., None])[..., 0]
    assert_close(logp, exact, relative=LOGPROB_RELATIVE, absolute=LOGPROB_ABSOLUTE, what="logp")
    logp.sum().backward()
    assert (logits.grad[:, -1] == 0).all()


@each_backend
def test_inplace_backward_overwrites_the_logits_and_refuses_a_second_backward(backend):
    logits = torch.randn(3, 40, device=DEVICE)
    targets = torch.randint(0, 40, (3,), device=DEVICE)
    plain = logits.clone().requires_grad_()
    ops.logprobs(plain, targets, backend=backend).sum().backward()
    leaf = logits.clone().requires_grad_()
    working = leaf * 1.0
    pointer = working.data_ptr()
    seen = []
    working.register_hook(lambda grad: seen.append(grad.data_ptr()))
    loss = ops.logprobs(working, targets, inplace_backward=True, backend=backend).sum()
    loss.backward(retain_graph=True)
    assert seen == [pointer]
    assert torch.equal(leaf.grad, plain.grad)
    with pytest.raises(RuntimeError, match="inplace_backward=False to go through the graph twice"):
        loss.backward()


@each_backend
@pytest.mark.parametrize("vocab", [7, 1000, 8193, 33000])
def test_a_gradient_of_16_bits_is_that_of_float32_logits_rounded(backend, vocab, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, vocab, generator=generator).to(DEVICE)
    logits[1, 2, 3], logits[1, 0, :5] = torch.nan, -torch.inf
    logits.requires_grad_()
    targets = torch.full((2, 4), 6, device=DEVICE)
    targets[0, 0] = vocab
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.bool, device=DEVICE)
    upstream = torch.randn(2, 2, 4, generator=generator).to(DEVICE)
    upstream[:, 0, 3] = 0
    seen = last_arguments(operator_module, "logprobs_backward", monkeypatch)
    results = ops.logprobs_and_entropy(logits, targets, mask=mask, backend=backend)
    torch.autograd.backward(results, list(upstream))
    (wanted,) = seen
    for dtype in roundings(backend):
        gradient = apart(wanted.grad_logits, dtype)
        dispatch.load(backend).logprobs_backward(wanted._replace(grad_logits=gradient))
        rounded = wanted.grad_logits.to(dtype)
        torch.testing.assert_close(gradient, rounded, rtol=0, atol=0, equal_nan=True)
        assert gradient._base[..., vocab:].isnan().all()
    assert rounded.isnan().any(-1).sum() == 2 and (rounded[0, 1] == 0).all()


@each_backend
def test_a_graph_can_be_walked_twice(backend):
    logits = torch.randn(3, 40, device=DEVICE, requires_grad=True)
    loss = ops.logprobs(logits, torch.tensor([1, 2, 3], device=DEVICE), backend=backend).sum()
    loss.backward(retain_graph=True)
    first = logits.grad.clone()
    loss.backward()
    assert torch.equal(logits.grad, 2 * first)


@each_backend
def test_row_offsets_pass_two_to_the_31(backend):
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip(
            "the interpreter copies the storage of 4 GiB; test_triton_compile checks the types"
        )
    # 2 rows that lie 2^31 + 64 elements apart, in pages that are never touched between them
    vocab, gap = 128, 2**31 + 64
    storage = torch.empty(gap + vocab, dtype=torch.bfloat16, device=DEVICE)
    logits = storage.as_strided((2, vocab), (gap, 1))
    logits.copy_(torch.randn(2, vocab))
    targets = torch.tensor([3, 100], device=DEVICE)
    exact = logits.double().requires_grad_()
    logp_64, _ = reference.logprobs(exact, targets)
    logits.requires_grad_()
    logp = ops.logprobs(logits, targets, inplace_backward=True, backend=backend)
    assert_close(logp, logp_64, relative=LOGPROB_RELATIVE, absolute=LOGPROB_ABSOLUTE, what="logp")
    (gradient,) = torch.autograd.grad(logp.sum(), logits)
    logp_64.sum().backward()
    assert_close(
        gradient,
        exact.grad,
        relative=GRADIENT_RELATIVE,
        absolute=GRADIENT_ABSOLUTE,
        what="gradient",
    )


@each_backend
@pytest.mark.parametrize("with_entropy", [False, True])
def test_opcheck(backend, with_entropy):
    logits = torch.randn(2, 3, 20, device=DEVICE, requires_grad=True)
    targets = torch.randint(0, 20, (2, 3), device=DEVICE)
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]], device=DEVICE, dtype=torch.bool)
    warm = torch.full((2, 3), 0.8, device=DEVICE)
    for temperature, rows in ((None, None), (warm, mask)):
        inputs = LogprobsInputs(
            logits=logits,
            targets=targets,
            temperature=0.9,
            token_temperature=temperature,
            mask=rows,
            ignore_index=-100,
            with_entropy=with_entropy,
            inplace_backward=False,
            backend=backend,
        )
        opcheck(logprobs_operator, inputs)


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_compiles_without_a_graph_break(backend):
    def loss(logits, targets, temperature):
        logp, entropy = ops.logprobs_and_entropy(
            logits * 2, targets, temperature=temperature, backend=backend
        )
        return logp.sum() + 0.1 * entropy.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for rows in (3, 5, 8):
        logits = torch.randn(rows, 33, device=DEVICE, requires_grad=True)
        targets = torch.randint(0, 33, (rows,), device=DEVICE)
        gradients = []
        for function in (loss, compiled):
            logits.grad = None
            value = function(logits, targets, 0.7)
            value.backward()
            gradients.append((value.detach(), logits.grad))
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


LOGITS, TARGETS = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((LOGITS.double(), TARGETS), {}, r"float32 \| bfloat16 \| float16, got float64"),
        ((LOGITS.t().contiguous().t(), TARGETS), {}, "last stride of logits must be 1"),
        ((LOGITS[:, :0], TARGETS), {}, "V >= 1, got \\(2, 0\\)"),
        ((LOGITS, TARGETS.short()), {}, r"targets must be int64 \| int32, got int16"),
        ((LOGITS, TARGETS[:1]), {}, "targets must be of shape \\(2,\\), got \\(1,\\)"),
        ((LOGITS, TARGETS), {"temperature": 0.0}, "temperature must be finite and > 0, got 0.0"),
        ((LOGITS, TARGETS), {"temperature": torch.ones(3)}, "must be of shape \\(2,\\)"),
        ((LOGITS, TARGETS), {"mask": torch.ones(2)}, "mask must be bool | uint8, got float32"),
        ((LOGITS, TARGETS), {"backend": "metal"}, "must be one of reference, cpu, triton, cuda"),
        ((LOGITS, TARGETS), {"backend": "cuda"}, "backend 'cuda' got tensors on 'cpu'"),
        ((LOGITS[:1].expand(2, 5), TARGETS), {"inplace_backward": True}, "must not overlap"),
        (
            (LOGITS[None, :, None].expand(2, 2, 2, 5).transpose(0, 1), TARGETS.expand(2, 2, 2)),
            {},
            "cannot be viewed as rows",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ops.logprobs(*arguments, **options)


def test_a_sharded_tensor_is_refused_with_the_way_to_gather_it(tmp_path):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    if not distributed.is_initialized():
        distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
        )
    sharded = DTensor.from_local(LOGITS, init_device_mesh("cpu", (1,)), [Replicate()])
    with pytest.raises(ValueError, match=r"logits is a DTensor.*logits.full_tensor\(\)"):
        ops.logprobs(sharded, TARGETS)
    empty = torch.zeros(0)
    empty.ds_id = 1
    with pytest.raises(ValueError, match="empty ZeRO-3 shard.*GatheredParameters"):
        ops.logprobs(empty, TARGETS)
