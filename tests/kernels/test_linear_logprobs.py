import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.backends import (
    BACKENDS,
    DEVICE,
    DTYPES,
    dtypes,
    each_backend,
    each_backend_slow_triton,
    examples,
)
from tests.kernels.gpu_products import as_on_a_gpu
from tests.kernels.opcheck import opcheck
from tests.oracles import linear_logprobs as oracle
from tests.tolerance import (
    GRADIENT_RELATIVE,
    HEAD_GRADIENT,
    HEAD_LOGIT_ROUNDING,
    LOGPROB_ABSOLUTE,
    LOGPROB_RELATIVE,
    ROUNDING,
    assert_close,
    assert_same_product,
    head_gradient,
)
from warpo.bench.timing import peak_bytes
from warpo.kernels import _linear_head, _linear_head_plan, ops, reference
from warpo.kernels._linear_logprobs_operator import LinearLogprobsInputs, linear_logprobs_operator
from warpo.kernels._matrix_product import own_product

WORKER = Path(__file__).with_name("linear_logprobs_worker.py")


def leaf(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(dtype or tensor.dtype).requires_grad_()


@st.composite
def cases(draw, backend: str, dtype: torch.dtype | None = None):
    """Hidden states with NaN where nobody may look, and every option."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    random = partial(torch.randn, generator=generator)
    lead = draw(st.sampled_from([(), (0,), (7,), (3, 5), (2, 9)]))
    vocab = draw(st.sampled_from([1, 2, 33, 257, 1000]))
    size = draw(st.sampled_from([1, 3, 16, 40]))
    dtype = dtype or draw(st.sampled_from(dtypes(backend)))
    hidden, weight = random(*lead, size), random(vocab, size)
    bias = random(vocab) if draw(st.booleans()) else None
    targets = torch.randint(0, vocab, lead, generator=generator)
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(lead, generator=generator) < draw(st.sampled_from([0.0, 0.6]))
        hidden = hidden.masked_fill(~mask[..., None], torch.nan)
    if draw(st.booleans()):
        ignored = torch.rand(lead, generator=generator) < 0.3
        targets = targets.masked_fill(ignored, -100)
        hidden = hidden.masked_fill(ignored[..., None], torch.inf)
    temperature: float | Tensor = draw(st.sampled_from([1.0, 0.7]))
    if draw(st.booleans()):
        temperature = (0.3 + torch.rand(lead, generator=generator)).to(DEVICE)
    options = {
        "temperature": temperature,
        "mask": None if mask is None else mask.to(DEVICE),
        "softcap": draw(st.sampled_from([None, 3.0])),
        "workspace_bytes": draw(st.sampled_from([None, 1, 20_000])),
        "cache_logits": draw(st.sampled_from([None, False, True])),
    }
    hidden = hidden.to(dtype).to(DEVICE)
    if len(lead) == 2 and draw(st.booleans()):
        # what a trainer shifts: no view of it has one stride for all tokens
        hidden = torch.cat([hidden, hidden[:, :1]], 1)[:, :-1]
    grads = [random(lead).to(DEVICE) for _ in range(2)]
    place = [x if x is None else x.to(dtype).to(DEVICE) for x in (weight, bias)]
    return hidden, *place, targets.to(DEVICE), options, grads


def exactly(hidden, weight, bias, targets, options, grads):
    """Results and gradients in float64."""
    leaves = [leaf(x, torch.float64) for x in (hidden, weight, bias)]
    temperature = options["temperature"]
    if isinstance(temperature, Tensor):
        temperature = temperature.double()
    results = reference.linear_logprobs(
        leaves[0],
        leaves[1],
        targets,
        temperature,
        options["mask"],
        bias=leaves[2],
        softcap=options["softcap"],
    )
    torch.autograd.backward(results, grads)
    return results, [None if x is None else x.grad for x in leaves]


def check_values_and_gradients(case, backend: str, gradient_absolute: float) -> None:
    """Against float64; gradient_absolute: for a gradient whose largest element is 1."""
    hidden, weight, bias, targets, options, grads = case
    wanted, wanted_grads = exactly(*case)
    leaves = [leaf(x) for x in (hidden, weight, bias)]
    arguments = (*leaves[:2], targets)
    results = ops.linear_logprobs_and_entropy(
        *arguments, bias=leaves[2], **options, backend=backend
    )
    alone = ops.linear_logprobs(*arguments, bias=leaves[2], **options, backend=backend)
    assert torch.equal(alone, results.logprobs)
    for name, actual, exact in zip(("logp", "entropy"), results, wanted, strict=True):
        assert_close(
            actual,
            exact,
            what=name,
            relative=10 * LOGPROB_RELATIVE,
            absolute=LOGPROB_ABSOLUTE + HEAD_LOGIT_ROUNDING * hidden.shape[-1],
        )
    torch.autograd.backward(results, grads)
    for name, x, exact in zip(("hidden", "weight", "bias"), leaves, wanted_grads, strict=True):
        if x is not None:
            scale = exact.abs().max().item() if exact.numel() else 0.0
            assert_close(
                x.grad,
                exact,
                what=f"gradient of {name}",
                relative=GRADIENT_RELATIVE,
                absolute=gradient_absolute * (1 + scale),
            )


@each_backend
def test_values_and_gradients_equal_float64(backend):
    @settings(max_examples=examples(backend, 60), deadline=None)
    @given(cases(backend))
    def check(case):
        check_values_and_gradients(case, backend, head_gradient(case[1]))

    check()


@pytest.mark.skipif(DEVICE != "cpu", reason="what the other tests show on a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_with_the_plan_of_a_gpu_equal_float64(dtype):
    """Gradients of the logits in the dtype of the products, in blocks of chunks."""
    # a softcap rounds them once more
    absolute = HEAD_GRADIENT + (2 * ROUNDING[dtype] if dtype != torch.float32 else 0.0)

    @settings(max_examples=60, deadline=None)
    @given(cases("cpu", dtype), st.sampled_from([1, 2, 128]), st.sampled_from([1, 3, 1024]))
    def check(case, tile, chunk):
        with as_on_a_gpu(), patch.multiple(_linear_head_plan, TILE=tile, GPU_TOKENS=chunk):
            check_values_and_gradients(case, "cpu", absolute)

    check()


def test_the_reference_equals_the_oracle():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((9, 5), (21, 5), (21,))
    )
    targets = torch.randint(0, 21, (9,), generator=generator)
    mask = torch.rand(9, generator=generator) < 0.7
    warm = 0.5 + torch.rand(9, generator=generator, dtype=torch.float64)
    for options in ({}, {"bias": bias}, {"bias": bias, "softcap": 1.5}):
        wanted = oracle.linear_logprobs(
            hidden.numpy(),
            weight.numpy(),
            targets.numpy(),
            temperature=warm.numpy(),
            mask=mask.numpy(),
            **{k: v.numpy() if k == "bias" else v for k, v in options.items()},
        )
        actual = reference.linear_logprobs(hidden, weight, targets, warm, mask, **options)
        for a, b in zip(actual, wanted, strict=True):
            torch.testing.assert_close(a, torch.from_numpy(b), rtol=1e-12, atol=1e-12)


def problem(dtype=torch.float32, tokens=64, vocab=301, size=24):
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (
        torch.randn(shape, generator=generator).to(dtype).to(DEVICE).requires_grad_()
        for shape in ((tokens, size), (vocab, size))
    )
    targets = torch.randint(0, vocab, (tokens,), generator=generator).to(DEVICE)
    return hidden, weight, targets


def new_head(hidden: Tensor, weight: Tensor, room: int) -> _linear_head.LinearHead:
    valid = torch.ones(hidden.shape[0], dtype=torch.bool, device=DEVICE)
    return _linear_head.LinearHead(
        hidden.detach()[None], weight.detach(), None, 0.0, valid, -1, room, True, gradients="over"
    )


@pytest.mark.parametrize("backend", BACKENDS[:1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_chunks_does_not_change_the_gradient_of_the_weight(backend, dtype):
    hidden, weight, targets = problem(dtype)
    gradients = {}
    for chunks in (1, 2, 8, 64):
        # room for 64 / chunks tokens, with what the plan puts aside
        bytes_per_token = 4 * 301 + 8 * 24
        room = 64 // chunks * bytes_per_token + bytes_per_token // 2
        converts = dtype != torch.float32 and own_product(weight) is None
        room = room * 8 // (6 if converts else 7) + 16
        assert len(new_head(hidden, weight, room).chunks()) == chunks
        logp = ops.linear_logprobs(hidden, weight, targets, workspace_bytes=room, backend=backend)
        gradients[chunks] = torch.autograd.grad((logp * logp.detach()).sum(), weight)[0]
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logp, _ = reference.linear_logprobs(*exact, targets)
    (wanted,) = torch.autograd.grad((logp * logp.detach()).sum(), exact[1])
    scale = wanted.abs().max().item()
    absolute = 2e-6 + head_gradient(weight) - HEAD_GRADIENT
    for gradient in gradients.values():
        assert_close(
            gradient, wanted, relative=GRADIENT_RELATIVE, absolute=absolute * scale, what="weight"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("room", [64 << 20, 20_000, 1])
def test_gradients_are_summed_in_float32_and_rounded_once(dtype, room):
    hidden, weight, _ = problem(dtype)
    # as they are in any dtype
    grad_logits = torch.randn(64, 301, device=DEVICE).bfloat16().float()
    head = new_head(hidden, weight, room)
    head.start_gradients([True, True, False])
    for start, stop in head.chunks():
        given = grad_logits[start:stop].clone()
        grad = head.grad_logits(start, stop, given)
        head.add_gradients(start, stop, None, grad.copy_(given))
    exact = [x.detach().double() for x in (grad_logits, hidden, weight)]
    for actual, wanted in zip(
        head.gradients(), (exact[0] @ exact[2], exact[0].T @ exact[1]), strict=False
    ):
        absolute = 1e-6 * wanted.abs().max().item()
        assert_close(actual.view(wanted.shape), wanted, relative=0, absolute=absolute, what="sum")


@each_backend
@pytest.mark.parametrize("num_valid", [None, 30, 64, 100])
def test_compaction_without_asking_the_device(backend, num_valid, monkeypatch):
    """What a GPU does: a stable sort and the caller's bound in place of a count."""
    compact = _linear_head._compact
    monkeypatch.setattr(
        _linear_head, "_compact", lambda valid, bound, on_cpu: compact(valid, bound, False)
    )
    hidden, weight, targets = problem()
    mask = torch.arange(64, device=DEVICE) % 7 < 3
    assert mask.sum() == 28
    wanted = reference.linear_logprobs(hidden, weight, targets, mask=mask)
    exact = torch.autograd.grad(wanted[0].sum() + wanted[1].sum(), (hidden, weight))
    working = hidden.detach().masked_fill(~mask[:, None], torch.nan).requires_grad_()
    results = ops.linear_logprobs_and_entropy(
        working,
        weight,
        targets,
        mask=mask,
        num_valid=num_valid,
        workspace_bytes=20_000,
        backend=backend,
    )
    gradients = torch.autograd.grad(results[0].sum() + results[1].sum(), (working, weight))
    for a, b in zip((*results, *gradients), (*wanted, *exact), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_bound_below_the_number_of_valid_tokens_leaves_nan(monkeypatch):
    compact = _linear_head._compact
    monkeypatch.setattr(
        _linear_head, "_compact", lambda valid, bound, on_cpu: compact(valid, bound, False)
    )
    hidden, weight, targets = problem()
    mask = torch.arange(64, device=DEVICE) % 2 == 0
    logp = ops.linear_logprobs(hidden, weight, targets, mask=mask, num_valid=30)
    assert logp.isnan().nonzero()[:, 0].tolist() == [60, 62]
    assert (logp[1::2] == 0).all()


@each_backend
def test_logits_in_the_dtype_of_the_input(backend):
    if torch.bfloat16 not in dtypes(backend):
        pytest.skip("the interpreter is held to float32")
    hidden, weight, targets = problem(torch.bfloat16)
    logits = (hidden @ weight.T).float()
    wanted = ops.logprobs(logits, targets, backend=backend)
    wanted.sum().backward()
    expected = [x.grad.double() for x in (hidden, weight)]
    hidden.grad = weight.grad = None
    logp = ops.linear_logprobs(hidden, weight, targets, logits_dtype="input", backend=backend)
    logp.sum().backward()
    torch.testing.assert_close(logp, wanted, rtol=0, atol=1e-5)
    for x, exact in zip((hidden, weight), expected, strict=True):
        # gradients of the logits are rounded to bfloat16 as well
        torch.testing.assert_close(
            x.grad.double(), exact, rtol=2**-6, atol=2**-7 * exact.abs().max().item()
        )


@each_backend
def test_a_target_out_of_range_poisons_its_token_and_what_sums_over_it(backend):
    hidden, weight, targets = problem()
    targets[3], targets[5] = 301, -100
    logp = ops.linear_logprobs(hidden, weight, targets, backend=backend)
    assert logp.isnan().nonzero()[:, 0].tolist() == [3] and logp[5] == 0
    logp.sum().backward()
    assert hidden.grad.isnan().any(1).nonzero()[:, 0].tolist() == [3]
    assert (hidden.grad[5] == 0).all() and weight.grad.isnan().all()


@each_backend_slow_triton
def test_runs_are_bit_equal_and_a_graph_can_be_walked_twice(backend):
    hidden, weight, targets = problem()
    for cache in (False, True):

        def once(cache=cache):
            logp, entropy = ops.linear_logprobs_and_entropy(
                hidden, weight, targets, cache_logits=cache, workspace_bytes=20_000, backend=backend
            )
            loss = (logp + entropy).sum()
            twice = [
                torch.autograd.grad(loss, (hidden, weight), retain_graph=again)
                for again in (True, False)
            ]
            assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))
            return logp.detach(), entropy.detach(), *twice[0]

        first = once()
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS[:1])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_logits_are_kept_where_they_fit_the_workspace(backend, softcap):
    hidden, weight, targets = problem(vocab=3001)
    room, grads, kept = 64 * 3001 * 4, {}, {}
    for cache, workspace_bytes in ((None, room), (None, room - 1), (False, room), (True, 1)):
        shapes = []

        def pack(tensor, shapes=shapes):
            shapes.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logp = ops.linear_logprobs(
                hidden,
                weight,
                targets,
                softcap=softcap,
                cache_logits=cache,
                workspace_bytes=workspace_bytes,
                backend=backend,
            )
        kept[cache, workspace_bytes] = (64, 3001) in shapes
        grads[cache, workspace_bytes] = torch.autograd.grad(logp.sum(), (hidden, weight))
    assert list(kept.values()) == [True, False, False, True]
    for others in grads.values():
        for a, b in zip(grads[None, room], others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    frozen = ops.linear_logprobs(hidden.detach(), weight.detach(), targets, backend=backend)
    assert not frozen.requires_grad


@pytest.mark.skipif(DEVICE != "cpu", reason="as the profiler counts on a CPU")
@pytest.mark.parametrize("fits", [True, False])
def test_kept_logits_are_the_workspace(fits):
    hidden, weight, targets = problem(vocab=3001)
    room = 64 * 3001 * 4 - (not fits)

    def call():
        logp = ops.linear_logprobs(hidden, weight, targets, workspace_bytes=room)
        return torch.autograd.grad(logp.sum(), (hidden, weight))

    gradients = 4 * (hidden.numel() + weight.numel())
    assert peak_bytes("cpu", call) < room + gradients + 32_000


@each_backend_slow_triton
def test_only_the_gradients_asked_for_are_computed(backend):
    hidden, weight, targets = problem()
    both = torch.autograd.grad(
        ops.linear_logprobs(hidden, weight, targets, backend=backend).sum(), (hidden, weight)
    )
    for index in range(2):
        inputs = [hidden.detach(), weight.detach()]
        inputs[index] = (hidden, weight)[index]
        logp = ops.linear_logprobs(*inputs, targets, backend=backend)
        (gradient,) = torch.autograd.grad(logp.sum(), inputs[index])
        assert_same_product(gradient, both[index], what="gradient")
        with torch.no_grad():
            plain = ops.linear_logprobs(*inputs, targets, cache_logits=True, backend=backend)
        assert_same_product(plain, logp.detach(), what="logprobs")


@pytest.mark.skipif(DEVICE != "cpu", reason="two ranks need two GPUs")
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_ranks_agree_with_the_whole_vocabulary(backend, tmp_path):
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(tmp_path / "store"), backend],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)


MEMORY = """
import resource, torch
from warpo.kernels import ops
torch.set_num_threads(2)
tokens, vocab, size = 8192, 151936, 4
hidden, weight = (torch.randn(n, size).to(torch.DTYPE) for n in (tokens, vocab))
targets = torch.randint(0, vocab, (tokens,))
def call(count):
    leaves = [x[:count].clone().requires_grad_() for x in (hidden, weight)]
    leaves[1] = weight.clone().requires_grad_()
    ops.linear_logprobs(*leaves, targets[:count], workspace_bytes=64_000_000).sum().backward()
call(4)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
call(tokens)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(DEVICE != "cpu", reason="the peak of the process is that of the CPU kernels")
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_8192_tokens_of_a_vocabulary_of_151936_take_64_mb(dtype):
    code = MEMORY.replace("DTYPE", dtype)
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    # KiB; logits of all tokens would be 4.6 GiB
    assert int(result.stdout) * 1024 < 64_000_000


@each_backend
@pytest.mark.parametrize("cache", [False, True])
def test_opcheck(backend, cache):
    hidden, weight, targets = problem(tokens=6, vocab=20, size=4)
    hidden = hidden.detach()[None].requires_grad_()
    mask = torch.tensor([1, 0, 1, 1, 1, 1], device=DEVICE, dtype=torch.bool)
    warm = torch.full((6,), 0.8, device=DEVICE)
    bias = torch.randn(20, device=DEVICE, requires_grad=True)
    # of logits that are kept, those of masked tokens are not written
    cases = [(None, None, bias)] if cache else [(None, None, None), (warm, mask, bias)]
    for temperature, flags, offset in cases:
        inputs = LinearLogprobsInputs(
            hidden=hidden,
            weight=weight,
            bias=offset,
            targets=targets,
            temperature=0.9,
            token_temperature=temperature,
            mask=flags,
            ignore_index=-100,
            softcap=3.0,
            num_valid=-1,
            workspace_bytes=2000,
            float32_logits=True,
            with_entropy=True,
            cache_logits=cache,
            backend=backend,
            group_name="",
        )
        opcheck(linear_logprobs_operator, inputs)


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_compiles_without_a_graph_break(backend):
    def loss(hidden, weight, targets):
        logp, entropy = ops.linear_logprobs_and_entropy(
            hidden * 2, weight, targets, temperature=0.7, softcap=5.0, backend=backend
        )
        return logp.sum() + 0.1 * entropy.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for tokens in (3, 5, 8):
        arguments = problem(tokens=tokens, vocab=33)
        eager, traced = (
            torch.autograd.grad(f(*arguments), arguments[:2]) for f in (loss, compiled)
        )
        assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


H, W, Y = torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((H.double(), W, Y), {}, r"hidden must be float32 \| bfloat16 \| float16, got float64"),
        ((H[:, :0], W, Y), {}, r"hidden must be \(..., H\) with H >= 1, got \(2, 0\)"),
        ((H, W.bfloat16(), Y), {}, r"one dtype.*pass hidden.to\(weight.dtype\)"),
        ((H, W[:, :3], Y), {}, r"weight must be \(V, H\) = \(V, 4\) with V >= 1, got \(5, 3\)"),
        ((H, W[:0], Y), {}, "with V >= 1"),
        ((H, W.t().contiguous().t(), Y), {}, r"last stride of weight must be 1.*contiguous"),
        ((H.t().contiguous().t(), W, Y), {}, r"last stride of hidden must be 1.*contiguous"),
        ((H, W, Y.short()), {}, r"targets must be int64 \| int32, got int16"),
        ((H, W, Y[:1]), {}, r"targets must be of shape \(2,\), got \(1,\)"),
        ((H, W, Y), {"bias": torch.zeros(4)}, r"bias must be of shape \(5,\), got \(4,\)"),
        ((H, W, Y), {"temperature": 0.0}, "temperature must be finite and > 0, got 0.0"),
        ((H, W, Y), {"temperature": torch.ones(3)}, r"temperature must be of shape \(2,\)"),
        ((H, W, Y), {"mask": torch.ones(2)}, "mask must be bool | uint8, got float32"),
        ((H, W, Y), {"softcap": 0.0}, "softcap must be > 0, got 0.0: pass None for no cap"),
        ((H, W, Y), {"workspace_bytes": 0}, "workspace_bytes must be > 0, got 0"),
        ((H, W, Y), {"num_valid": -1}, "num_valid must be >= 0, got -1"),
        ((H, W, Y), {"logits_dtype": "bf16"}, "logits_dtype must be one of float32, input"),
        ((H, W, Y), {"process_group": "tp"}, "must be a torch.distributed.ProcessGroup, got str"),
        ((H, W, Y), {"process_group": "tp", "backend": "reference"}, "not supported by backend"),
        (
            (H[None, :, None].expand(2, 2, 2, 4).transpose(0, 1), W, Y.expand(2, 2, 2)),
            {},
            "hidden.*cannot be viewed as rows",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ops.linear_logprobs(*arguments, **options)


def test_an_empty_shard_is_refused_with_the_way_to_gather_it():
    empty = torch.zeros(0)
    empty.ds_id = 1
    with pytest.raises(ValueError, match=r"weight is an empty ZeRO-3 shard.*GatheredParameters"):
        ops.linear_logprobs(H, empty, Y)
