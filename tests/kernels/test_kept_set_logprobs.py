import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.backends import BACKENDS, DEVICE, dtypes, each_backend, examples, strided
from tests.kernels.opcheck import opcheck
from tests.oracles import kept_set_logprobs as oracle
from tests.tolerance import (
    GRADIENT_RELATIVE,
    HEAD_GRADIENT,
    HEAD_LOGIT_ROUNDING,
    LOGPROB_ABSOLUTE,
    LOGPROB_RELATIVE,
    assert_close,
)
from warpo.kernels import ops, reference
from warpo.kernels._kept_set_logprobs import KeptSetLogprobsInputs, _operator


def kept_sets(
    counts: list[int], targets: Tensor, vocab: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Distinct ids for each token, its target among them."""
    ids = []
    for count, target in zip(counts, targets.tolist(), strict=True):
        chosen = torch.randperm(vocab, generator=generator)[:count]
        if count and target not in chosen.tolist():
            chosen[torch.randint(0, count, (), generator=generator)] = target
        ids.append(chosen)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return torch.cat([*ids, torch.zeros(0, dtype=torch.int64)]), offsets


@st.composite
def cases(draw, backend: str):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens = draw(st.sampled_from([0, 1, 3, 9]))
    vocab = draw(st.sampled_from([1, 2, 40, 600]))
    size = draw(st.sampled_from([1, 3, 8, 40, 136] if backend == "triton" else [1, 8, 40, 2056]))
    dtype = draw(st.sampled_from(dtypes(backend)))
    most = min(vocab, draw(st.sampled_from([1, 5, 33, 300])))
    counts = torch.randint(0, most + 1, (tokens,), generator=generator).tolist()
    hidden = torch.randn(tokens, size, generator=generator)
    hidden[[n for n in range(tokens) if counts[n] == 0]] = torch.nan
    weight = torch.randn(vocab, size, generator=generator) / size**0.5
    bias = torch.randn(vocab, generator=generator) if draw(st.booleans()) else None
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    ids, offsets = kept_sets(counts, targets, vocab, generator)
    integers = draw(st.sampled_from([torch.int32, torch.int64]))
    temperature: float | Tensor = draw(st.sampled_from([1.0, 0.7]))
    if draw(st.booleans()):
        temperature = (0.3 + torch.rand(tokens, generator=generator)).to(DEVICE)
    layout = draw(st.sampled_from(["dense", "sliced"]))
    floats = [strided(x.to(dtype), layout) for x in (hidden, weight)]
    floats.append(None if bias is None else bias.to(dtype).to(DEVICE))
    rest = [x.to(DEVICE) for x in (targets, ids.to(integers), offsets.to(integers))]
    grads = torch.randn(tokens, generator=generator).to(DEVICE)
    if draw(st.booleans()):
        grads = torch.full((), 0.5, device=DEVICE).expand(tokens)
    return *floats, *rest, temperature, grads


@each_backend
def test_values_and_gradients_equal_float64(backend):
    @settings(max_examples=examples(backend, 80), deadline=None)
    @given(cases(backend))
    def check(case):
        *floats, targets, ids, offsets, temperature, grads = case
        leaves = [None if x is None else x.detach().requires_grad_() for x in floats]
        exact = [None if x is None else x.detach().double().requires_grad_() for x in floats]
        warm = temperature.double() if isinstance(temperature, Tensor) else temperature
        wanted = reference.kept_set_logprobs(*exact[:2], targets, ids, offsets, warm, bias=exact[2])
        logp = ops.kept_set_logprobs(
            *leaves[:2],
            targets,
            ids,
            offsets,
            bias=leaves[2],
            temperature=temperature,
            backend=backend,
        )
        assert (logp.detach() <= 0).all()
        absolute = LOGPROB_ABSOLUTE + 40 * HEAD_LOGIT_ROUNDING
        assert_close(logp, wanted, what="logp", relative=10 * LOGPROB_RELATIVE, absolute=absolute)
        logp.backward(grads)
        wanted.backward(grads.double())
        for name, x, y in zip(("hidden", "weight", "bias"), leaves, exact, strict=True):
            if x is not None:
                scale = y.grad.abs().max().item() if y.grad.numel() else 0.0
                assert_close(
                    x.grad,
                    y.grad,
                    what=f"gradient of {name}",
                    relative=GRADIENT_RELATIVE,
                    absolute=HEAD_GRADIENT * (1 + scale),
                )

    check()


def problem(tokens: int = 12, vocab: int = 50, size: int = 16, seed: int = 3):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator)
        for shape in ((tokens, size), (vocab, size), (vocab,))
    )
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    counts = torch.randint(0, 9, (tokens,), generator=generator).tolist()
    ids, offsets = kept_sets(counts, targets, vocab, generator)
    leaves = [x.to(DEVICE).requires_grad_() for x in (hidden, weight, bias)]
    return *leaves, *(x.to(DEVICE) for x in (targets, ids, offsets))


def test_the_reference_equals_the_oracle():
    hidden, weight, bias, targets, ids, offsets = (x.detach().cpu() for x in problem())
    warm = 0.5 + torch.rand(12, dtype=torch.float64)
    for offset in (None, bias.double()):
        actual = reference.kept_set_logprobs(
            hidden.double(), weight.double(), targets, ids, offsets, warm, bias=offset
        )
        wanted = oracle.kept_set_logprobs(
            hidden.double().numpy(),
            weight.double().numpy(),
            targets.numpy(),
            ids.numpy(),
            offsets.numpy(),
            bias=None if offset is None else offset.numpy(),
            temperature=warm.numpy(),
        )
        torch.testing.assert_close(actual, torch.from_numpy(wanted), rtol=1e-12, atol=1e-12)


@each_backend
def test_the_whole_vocabulary_kept_gives_the_logprobs_of_the_head(backend):
    hidden, weight, bias, targets, _, _ = problem(tokens=3)
    ids = torch.arange(50, device=DEVICE).repeat(3)
    offsets = 50 * torch.arange(4, device=DEVICE)
    kept = ops.kept_set_logprobs(
        hidden, weight, targets, ids, offsets, bias=bias, temperature=0.8, backend=backend
    )
    whole = ops.linear_logprobs(
        hidden, weight, targets, bias=bias, temperature=0.8, backend=backend
    )
    torch.testing.assert_close(kept, whole, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(x.sum(), (hidden, weight, bias)) for x in (kept, whole)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@each_backend
def test_a_single_kept_id_has_logprob_zero_and_no_gradient(backend):
    hidden, weight, bias, targets, _, _ = problem()
    logp = ops.kept_set_logprobs(
        hidden, weight, targets, targets, torch.arange(13, device=DEVICE), backend=backend
    )
    assert (logp == 0).all()
    for gradient in torch.autograd.grad(logp.sum(), (hidden, weight)):
        assert (gradient == 0).all()


@each_backend
def test_an_empty_set_masks_its_token(backend):
    hidden, weight, _, targets, ids, _ = problem(tokens=3)
    hidden = hidden.detach().clone()
    hidden[1] = torch.nan
    hidden.requires_grad_()
    ids = torch.tensor([4, 5, 6], device=DEVICE)
    targets = torch.tensor([4, -100, 6], device=DEVICE)
    offsets = torch.tensor([0, 2, 2, 3], device=DEVICE)
    logp = ops.kept_set_logprobs(hidden, weight, targets, ids, offsets, backend=backend)
    logp.backward(torch.tensor([1.0, torch.nan, 1.0], device=DEVICE))
    assert logp[1] == 0 and (hidden.grad[1] == 0).all()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
    assert (weight.grad[4] != 0).any() and (weight.grad[7:] == 0).all()


@each_backend
def test_a_target_not_kept_and_an_id_out_of_range_poison_their_token_alone(backend):
    hidden, weight, _, _, _, _ = problem(tokens=4)
    targets = torch.tensor([1, 2, 3, 4], device=DEVICE)
    ids = torch.tensor([1, 9, 9, 8, 3, 50, 4, 7], device=DEVICE)
    offsets = torch.tensor([0, 2, 4, 6, 8], device=DEVICE)
    logp = ops.kept_set_logprobs(hidden, weight, targets, ids, offsets, backend=backend)
    assert logp.isnan().tolist() == [False, True, True, False]
    logp.sum().backward()
    assert hidden.grad.isnan().all(1).tolist() == [False, True, True, False]
    poisoned = weight.grad.isnan().any(1).nonzero()[:, 0].tolist()
    assert poisoned == [3, 8, 9]
    negative = ops.kept_set_logprobs(hidden, weight, targets, ids - 2, offsets, backend=backend)
    assert negative.isnan()[0]


@each_backend
def test_runs_are_bit_equal_and_a_token_alone_has_the_bits_of_the_token_in_a_batch(backend):
    hidden, weight, bias, targets, ids, offsets = problem()

    def once():
        logp = ops.kept_set_logprobs(
            hidden, weight, targets, ids, offsets, bias=bias, backend=backend
        )
        return logp, *torch.autograd.grad(logp.sum(), (hidden, weight, bias))

    first = once()
    assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))
    for n in (0, 5, 11):
        own = ids[offsets[n] : offsets[n + 1]]
        alone = ops.kept_set_logprobs(
            hidden[n : n + 1],
            weight,
            targets[n : n + 1],
            own,
            torch.tensor([0, own.numel()], device=DEVICE),
            bias=bias,
            backend=backend,
        )
        assert torch.equal(alone[0], first[0][n])


@each_backend
def test_a_popular_id_sums_in_float32(backend):
    """bfloat16 sums of equal terms stand still at 256 of them."""
    dtype = torch.bfloat16 if torch.bfloat16 in dtypes(backend) else torch.float32
    tokens = 1000 if dtype == torch.bfloat16 else 50
    hidden = torch.ones(tokens, 8, dtype=dtype, device=DEVICE)
    weight = torch.zeros(3, 8, dtype=dtype, device=DEVICE, requires_grad=True)
    ids = torch.tensor([0, 2], device=DEVICE).repeat(tokens)
    offsets = 2 * torch.arange(tokens + 1, device=DEVICE)
    targets = torch.zeros(tokens, dtype=torch.int64, device=DEVICE)
    ops.kept_set_logprobs(hidden, weight, targets, ids, offsets, backend=backend).sum().backward()
    assert weight.grad[:, 0].tolist() == [tokens / 2, 0.0, -tokens / 2]


@each_backend
def test_only_the_gradients_asked_for_are_computed(backend):
    *leaves, targets, ids, offsets = problem()
    everything = torch.autograd.grad(
        ops.kept_set_logprobs(
            *leaves[:2], targets, ids, offsets, bias=leaves[2], backend=backend
        ).sum(),
        leaves,
    )
    for index in range(3):
        inputs = [x.detach() for x in leaves]
        inputs[index] = leaves[index]
        logp = ops.kept_set_logprobs(
            *inputs[:2], targets, ids, offsets, bias=inputs[2], backend=backend
        )
        (gradient,) = torch.autograd.grad(logp.sum(), inputs[index])
        assert torch.equal(gradient, everything[index])


@each_backend
def test_opcheck(backend):
    *leaves, targets, ids, offsets = problem(tokens=5)
    warm = torch.full((5,), 0.8, device=DEVICE)
    for bias, temperature in ((None, None), (leaves[2], warm)):
        inputs = KeptSetLogprobsInputs(
            hidden=leaves[0],
            weight=leaves[1],
            bias=bias,
            targets=targets,
            kept_ids=ids,
            kept_offsets=offsets,
            temperature=0.9,
            token_temperature=temperature,
            backend=backend,
        )
        opcheck(_operator, inputs)


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_compiles_without_a_graph_break(backend):
    def loss(hidden, weight, bias, targets, ids, offsets):
        return ops.kept_set_logprobs(
            hidden * 2, weight, targets, ids, offsets, bias=bias, temperature=0.7, backend=backend
        ).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for tokens in (3, 5, 8):
        arguments = problem(tokens=tokens)
        eager, traced = (
            torch.autograd.grad(f(*arguments), arguments[:3]) for f in (loss, compiled)
        )
        assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


H, W, Y = torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64)
IDS, OFFSETS = torch.zeros(2, dtype=torch.int64), torch.arange(3)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((H.double(), W, Y, IDS, OFFSETS), {}, r"hidden must be float32 \| bfloat16 \| float16"),
        ((H[None], W, Y[None], IDS, OFFSETS), {}, r"hidden must be \(N, H\), got \(1, 2, 4\)"),
        ((H, W.bfloat16(), Y, IDS, OFFSETS), {}, "hidden and weight must have one dtype"),
        ((H, W, Y.short(), IDS, OFFSETS), {}, r"targets must be int64 \| int32, got int16"),
        ((H, W, Y, IDS.float(), OFFSETS), {}, r"kept_ids must be int32 \| int64, got float32"),
        ((H, W, Y, IDS[None], OFFSETS), {}, r"kept_ids must be \(nnz,\), got \(1, 2\)"),
        ((H, W, Y, IDS, OFFSETS[:2]), {}, r"kept_offsets must be of shape \(3,\), got \(2,\)"),
        ((H, W, Y, torch.zeros(4).long()[::2], OFFSETS), {}, "kept_ids must be dense"),
        ((H, W, Y, IDS, OFFSETS), {"bias": torch.zeros(4)}, r"bias must be of shape \(5,\)"),
        ((H, W, Y, IDS, OFFSETS), {"temperature": -1.0}, "temperature must be finite and > 0"),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ops.kept_set_logprobs(*arguments, **options)
