import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.backends import BACKENDS, DEVICE, dtypes, each_backend, examples, strided
from tests.tolerance import SCAN_ABSOLUTE, SCAN_RELATIVE, assert_close
from warpo.kernels import ops, reference

FLOATS = ("rewards", "values", "last_values", "final_values")


@st.composite
def cases(draw, backend: str):
    """Arguments of `gae` in any layout, with NaN wherever nothing may be read."""
    rows = draw(st.sampled_from([0, 1, 2, 7, 33]))
    steps = draw(st.sampled_from([0, 1, 2, 5, 31, 64, 129, 300]))
    time_dim = draw(st.sampled_from([-1, 0, 1]))
    shape = (steps, rows) if time_dim == 0 else (rows, steps)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    layout = draw(st.sampled_from(["dense", "sliced", "transposed"]))
    dtype = draw(st.sampled_from(dtypes(backend)))

    def numbers(shape):
        return torch.randn(shape, generator=generator).to(dtype)

    def flags(shape, share):
        chosen = torch.rand(shape, generator=generator) < share
        return chosen if draw(st.booleans()) else chosen.to(torch.uint8)

    tensors = {"rewards": numbers(shape), "values": numbers(shape)}
    if draw(st.booleans()):
        tensors["mask"] = flags(shape, draw(st.sampled_from([0.0, 0.5, 0.9])))
        for name in ("rewards", "values"):
            tensors[name] = tensors[name].masked_fill(tensors["mask"] == 0, torch.nan)
    if draw(st.booleans()):
        tensors["last_values"] = numbers((rows,))
    if draw(st.booleans()):
        tensors["terminated"] = flags(shape, 0.1)
    if draw(st.booleans()):
        tensors["truncated"] = flags(shape, 0.1)
        tensors["final_values"] = numbers(shape)
    options = {
        "time_dim": time_dim,
        "gamma": draw(st.sampled_from([1.0, 0.99, 0.5, 0.0])),
        "gae_lambda": draw(st.sampled_from([1.0, 0.95, 0.0])),
        "mask_mode": draw(st.sampled_from(["carry", "zero"])),
        "done_convention": draw(st.sampled_from(["ends_at_t", "starts_at_t"])),
    }
    if options["done_convention"] == "starts_at_t" and draw(st.booleans()):
        tensors["last_terminated"] = flags((rows,), 0.5)
        tensors["last_truncated"] = flags((rows,), 0.5)
    tensors = {name: strided(tensor, layout) for name, tensor in tensors.items()}
    upstream = [torch.randn(shape, generator=generator).to(DEVICE) for _ in range(2)]
    if draw(st.booleans()):
        upstream[1] = torch.ones((), device=DEVICE).expand(shape)
    return tensors, options, upstream


@each_backend
def test_values_and_gradients_equal_float64(backend):
    @settings(max_examples=examples(backend, 200))
    @given(cases(backend))
    def check(case):
        tensors, options, upstream = case
        mine = {name: x.detach() for name, x in tensors.items()}
        exact = {name: x.double() if name in FLOATS else x for name, x in tensors.items()}
        for group in (mine, exact):
            for name in FLOATS:
                if name in group:
                    group[name].requires_grad_()
        result = ops.gae(**mine, **options, backend=backend)
        wanted = reference.gae(**exact, **options)
        for name, a, b in zip(("advantages", "returns"), result, wanted, strict=True):
            assert a.dtype == torch.float32
            assert_close(a, b, relative=SCAN_RELATIVE, absolute=SCAN_ABSOLUTE * 10, what=name)
        torch.autograd.backward(result, upstream)
        sum((x * g).sum() for x, g in zip(wanted, upstream, strict=True)).backward()
        for name in FLOATS:
            if name in mine:
                gradient = exact[name].grad
                assert_close(
                    mine[name].grad,
                    torch.zeros_like(exact[name]) if gradient is None else gradient,
                    relative=SCAN_RELATIVE,
                    absolute=SCAN_ABSOLUTE * 10,
                    what=f"gradient of {name}",
                )

    check()


@each_backend
def test_a_long_row(backend):
    """Longer than any tile, so that the state is carried from tile to tile."""
    steps = 70_001 if not (backend == "triton" and DEVICE == "cpu") else 5_001
    rewards, values = torch.randn(2, 3, steps, device=DEVICE)
    mask = torch.rand(3, steps, device=DEVICE) < 0.7
    options = {"gamma": 1.0, "gae_lambda": 0.95, "mask": mask}
    result = ops.gae(rewards, values, **options, backend=backend)
    wanted = reference.gae(rewards.double(), values.double(), **options)
    for a, b in zip(result, wanted, strict=True):
        assert_close(a, b, relative=SCAN_RELATIVE, absolute=SCAN_ABSOLUTE * 10, what="long row")


@each_backend
def test_gamma_lambda_one_is_reward_to_go_minus_value(backend):
    rewards = torch.zeros(2, 6, device=DEVICE)
    rewards[:, -1] = 1.0
    values = torch.rand(2, 6, device=DEVICE)
    result = ops.gae(rewards, values, gamma=1.0, gae_lambda=1.0, backend=backend)
    assert torch.allclose(result.returns, torch.ones_like(values))
    assert torch.allclose(result.advantages, 1 - values)


@each_backend
def test_both_done_conventions_describe_the_same_episodes(backend):
    rewards, values = torch.randn(2, 5, 20, device=DEVICE)
    ends = torch.rand(5, 20, device=DEVICE) < 0.2
    starts = torch.cat([torch.zeros(5, 1, dtype=torch.bool, device=DEVICE), ends[:, :-1]], 1)
    last = torch.rand(5, device=DEVICE)
    options = {"gamma": 0.99, "gae_lambda": 0.95, "last_values": last, "backend": backend}
    a = ops.gae(rewards, values, terminated=ends, **options)
    b = ops.gae(
        rewards,
        values,
        terminated=starts,
        last_terminated=ends[:, -1],
        done_convention="starts_at_t",
        **options,
    )
    assert torch.equal(a.advantages, b.advantages)


@each_backend
def test_a_masked_tail_changes_nothing_in_carry_mode_and_decays_in_zero_mode(backend):
    rewards, values = torch.randn(2, 2, 8, device=DEVICE)
    short = ops.gae(rewards[:, :5], values[:, :5], gamma=0.9, gae_lambda=0.8, backend=backend)
    mask = torch.arange(8, device=DEVICE).expand(2, 8) < 5
    for mode in ("carry", "zero"):
        padded = ops.gae(
            rewards, values, gamma=0.9, gae_lambda=0.8, mask=mask, mask_mode=mode, backend=backend
        )
        assert torch.allclose(padded.advantages[:, :5], short.advantages, atol=1e-6)
        assert (padded.advantages[:, 5:] == 0).all() and (padded.returns[:, 5:] == 0).all()
    hole = torch.ones(2, 8, dtype=torch.bool, device=DEVICE)
    hole[:, 3] = False
    carry, zero = (
        ops.gae(
            rewards, values, gamma=0.9, gae_lambda=0.8, mask=hole, mask_mode=mode, backend=backend
        )
        for mode in ("carry", "zero")
    )
    assert not torch.allclose(carry.advantages[:, 2], zero.advantages[:, 2])


@each_backend
def test_a_row_alone_has_the_bits_of_the_row_in_a_batch(backend):
    rewards, values = torch.randn(2, 21, 100, device=DEVICE)
    batch = ops.gae(rewards, values, gamma=0.99, gae_lambda=0.95, backend=backend)
    for row in (0, 16, 20):
        alone = ops.gae(
            rewards[row : row + 1],
            values[row : row + 1],
            gamma=0.99,
            gae_lambda=0.95,
            backend=backend,
        )
        assert torch.equal(alone.advantages[0], batch.advantages[row])


@each_backend
def test_no_copy_is_made_of_a_time_major_input(backend):
    rewards, values = torch.randn(2, 30, 8, device=DEVICE)
    result = ops.gae(rewards, values, gamma=0.99, gae_lambda=0.95, time_dim=0, backend=backend)
    rowwise = ops.gae(rewards.t(), values.t(), gamma=0.99, gae_lambda=0.95, backend=backend)
    assert torch.equal(result.advantages, rowwise.advantages.t())
    assert result.advantages.stride() == rewards.stride()


@each_backend
def test_row_offsets_pass_two_to_the_31(backend):
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip(
            "the interpreter copies the storage of 4 GiB; test_triton_compile checks the types"
        )
    gap = 2**31 + 64
    storage = torch.empty(gap + 8, dtype=torch.bfloat16, device=DEVICE)
    far = storage.as_strided((2, 8), (gap, 1))
    far.copy_(torch.randn(2, 8))
    result = ops.gae(far, far, gamma=0.9, gae_lambda=0.9, backend=backend)
    wanted = reference.gae(far.double(), far.double(), 0.9, 0.9)
    assert_close(
        result.advantages,
        wanted.advantages,
        relative=SCAN_RELATIVE,
        absolute=SCAN_ABSOLUTE,
        what="advantages",
    )


@each_backend
def test_opcheck(backend):
    rewards, values, final = torch.randn(3, 3, 9, device=DEVICE)
    flags = torch.rand(3, 9, device=DEVICE) < 0.3
    column = torch.randn(3, 1, device=DEVICE)
    for x in (rewards, values, final, column):
        x.requires_grad_()
    ends = (flags, ~flags, None, None)
    torch.library.opcheck(
        torch.ops.warpo.gae.default,
        (rewards, values, column, final, None, *ends, 0.9, 0.9, True, False, backend),
    )
    nothing = (None,) * 4
    torch.library.opcheck(
        torch.ops.warpo.gae.default,
        (rewards, values, None, None, flags, *nothing, 0.9, 0.9, False, False, backend),
    )


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_compiles_without_a_graph_break(backend):
    def advantages(rewards, values, mask, gamma):
        return ops.gae(
            rewards * 2, values, gamma=gamma, gae_lambda=0.95, mask=mask, backend=backend
        ).advantages

    compiled = torch.compile(advantages, fullgraph=True, backend="aot_eager")
    for steps in (4, 6, 9):
        rewards, values = torch.randn(2, 3, steps, device=DEVICE)
        mask = torch.rand(3, steps, device=DEVICE) < 0.8
        arguments = (rewards, values, mask, 0.9)
        assert torch.equal(advantages(*arguments), compiled(*arguments))


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((X[0], X[0]), {}, "rewards must be 2-D"),
        ((X, X[:1]), {}, r"values must be of shape \(2, 3\), got \(1, 3\)"),
        ((X.long(), X), {}, "rewards must be float32 | bfloat16 | float16, got int64"),
        ((X, X), {"mask": X}, r"mask must be bool \| uint8, got float32: pass mask.bool\(\)"),
        ((X, X), {"mask_mode": "skip"}, "mask_mode must be one of carry, zero; got 'skip'"),
        ((X, X), {"gamma": 1.5}, r"gamma must be in \[0, 1\], got 1.5"),
        ((X, X), {"time_dim": 2}, "time_dim must be -1, 0 or 1, got 2"),
        ((X, X), {"truncated": X.bool()}, "truncated and final_values go together"),
        ((X, X), {"last_values": X[0]}, r"last_values must be of shape \(2,\), got \(3,\)"),
        ((X, X), {"time_dim": 0, "last_values": X[:, 0]}, r"last_values must be of shape \(3,\)"),
        ((X, X), {"last_terminated": X[:, 0].bool()}, "done_convention='starts_at_t' only"),
        ((X, X), {"done_convention": "t+1"}, "one of ends_at_t, starts_at_t"),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ops.gae(*arguments, **({"gamma": 0.9, "gae_lambda": 0.9} | options))
