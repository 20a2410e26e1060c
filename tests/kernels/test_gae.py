import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.backends import (
    BACKENDS,
    DEVICE,
    each_backend,
    each_backend_slow_triton,
    examples,
)
from tests.kernels.opcheck import opcheck
from tests.kernels.scans import (
    assert_gradients_close,
    assert_scan_close,
    every_case,
    leaves,
    on_rows,
    scan_cases,
)
from tests.oracles import gae as oracle
from warpo.kernels import ops, reference
from warpo.kernels._gae_operator import GaeInputs, gae_operator
from warpo.kernels._scan import Steps, as_inputs

GAMMAS, LAMBDAS = [1.0, 0.99, 0.5, 0.0], [1.0, 0.95, 0.0]


@each_backend
def test_values_and_gradients_equal_float64(backend):
    @settings(max_examples=examples(backend, 200))
    @given(
        scan_cases(backend, ("rewards", "values")),
        st.sampled_from(GAMMAS),
        st.sampled_from(LAMBDAS),
        st.booleans(),
    )
    def check(case, gamma, gae_lambda, is_dense):
        floats, options, shape = case
        options = options | {"gamma": gamma, "gae_lambda": gae_lambda}
        upstream = list(torch.randn(2, *shape, device=DEVICE))
        if not is_dense:
            upstream[1] = torch.ones((), device=DEVICE).expand(shape)
        mine, exact = leaves(floats)
        result = ops.gae(**mine, **options, backend=backend)
        wanted = reference.gae(**exact, **options)
        for name, a, b in zip(("advantages", "returns"), result, wanted, strict=True):
            assert_scan_close(a, b, name)
        torch.autograd.backward(result, upstream)
        sum((x * g).sum() for x, g in zip(wanted, upstream, strict=True)).backward()
        assert_gradients_close(mine, exact)

    check()


@each_backend_slow_triton
@pytest.mark.parametrize("done_convention", ["ends_at_t", "starts_at_t"])
def test_every_mask_mode_in_every_layout_equals_float64(backend, done_convention):
    options = {"gamma": 0.9, "gae_lambda": 0.9, "done_convention": done_convention}
    for floats, others, shape in every_case(("rewards", "values")):
        mine, exact = leaves(floats)
        result = ops.gae(**mine, **others, **options, backend=backend)
        wanted = reference.gae(**exact, **others, **options)
        upstream = torch.randn(2, *shape, device=DEVICE)
        for name, a, b in zip(("advantages", "returns"), result, wanted, strict=True):
            assert_scan_close(a, b, name)
        torch.autograd.backward(result, list(upstream))
        torch.autograd.backward(wanted, list(upstream.double()))
        assert_gradients_close(mine, exact)


@each_backend
@pytest.mark.parametrize("mask_mode", ["carry", "zero"])
def test_whitened_advantages(backend, mask_mode):
    rewards, values = torch.randn(2, 5, 60, device=DEVICE)
    mask = torch.rand(5, 60, device=DEVICE) < 0.6
    options = {"gamma": 0.9, "gae_lambda": 0.8, "mask": mask, "mask_mode": mask_mode}
    found = ops.gae(rewards, values, **options, whiten=True, backend=backend)
    wanted = reference.gae(rewards.double(), values.double(), **options)
    valid = wanted.advantages[mask]
    whitened = (valid - valid.mean()) / (valid.var() + 1e-8).sqrt()
    assert_scan_close(found.advantages[mask], whitened, "advantages")
    assert (found.advantages[~mask] == 0).all()
    assert_scan_close(found.returns, wanted.returns, "returns")


@each_backend_slow_triton
@pytest.mark.parametrize(
    "flags, mask_mode",
    [
        ("none", "carry"),
        ("mask", "carry"),
        ("mask", "compact"),
        ("ends", "carry"),
        ("ends", "zero"),
    ],
)
def test_a_long_row(backend, flags, mask_mode):
    """Longer than any tile, so that the state is carried from tile to tile."""
    steps = 20_001 if not (backend == "triton" and DEVICE == "cpu") else 5_001
    rewards, values, final = torch.randn(3, 3, steps, device=DEVICE)
    options: dict = {"gamma": 1.0, "gae_lambda": 0.95, "mask_mode": mask_mode}
    if flags != "none":
        options["mask"] = torch.rand(3, steps, device=DEVICE) < 0.7
        options["mask"][0, 1000:19_000] = False
        options["mask"][1, :2000] = True
    if flags == "ends":
        options["terminated"] = torch.rand(3, steps, device=DEVICE) < 0.001
        options["truncated"] = torch.rand(3, steps, device=DEVICE) < 0.001
    exact = {"final_values": final.double()} if flags == "ends" else {}
    mine = {"final_values": final} if flags == "ends" else {}
    result = ops.gae(rewards, values, **mine, **options, backend=backend)
    wanted = reference.gae(rewards.double(), values.double(), **exact, **options)
    for a, b in zip(result, wanted, strict=True):
        assert_scan_close(a, b, "long row")


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
def test_rewards_behind_the_last_valid_step_go_to_it_in_compact_mode(backend):
    rewards, values = torch.zeros(2, 3, 6, device=DEVICE)
    mask = torch.tensor([[1, 0, 1, 0, 0, 0], [1] * 6, [0] * 6], dtype=torch.uint8, device=DEVICE)
    rewards[:, -1] = 2.0
    rewards[0, 4] = 1.0
    rewards[0, 1] = torch.nan
    rewards.requires_grad_()
    result = ops.gae(
        rewards, values, gamma=0.5, gae_lambda=1.0, mask=mask, mask_mode="compact", backend=backend
    )
    assert result.returns[0].tolist() == [1.5, 0, 3, 0, 0, 0]
    assert result.returns[1].tolist() == [2 * 0.5**n for n in (5, 4, 3, 2, 1, 0)]
    assert (result.returns[2] == 0).all()
    result.returns.sum().backward()
    assert rewards.grad[0].tolist() == [1, 0, 1.5, 1.5, 1.5, 1.5]
    assert (rewards.grad[2] == 0).all()


@each_backend_slow_triton
@pytest.mark.parametrize("steps", [9, 100, pytest.param(1200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", ["time", "rows", "packed"])
def test_a_row_alone_has_the_bits_of_the_row_in_a_batch(backend, layout, steps):
    shape = (steps, 21) if layout == "rows" else (21, steps)
    rewards, values = torch.randn(2, *shape, device=DEVICE)
    mask = torch.rand(shape, device=DEVICE) < 0.8
    options = {"gamma": 0.99, "gae_lambda": 0.95, "backend": backend}
    if layout == "packed":
        bounds = torch.arange(0, 21 * steps + 1, steps, dtype=torch.int32, device=DEVICE)
        batch = ops.gae(
            rewards.flatten(), values.flatten(), mask=mask.flatten(), cu_seqlens=bounds, **options
        ).advantages.view(shape)
    else:
        time_dim = 0 if layout == "rows" else 1
        batch = ops.gae(rewards, values, mask=mask, time_dim=time_dim, **options).advantages
    for row in (0, 16, 20):
        if layout == "rows":
            one = slice(row, row + 1)
            alone = ops.gae(
                rewards[:, one], values[:, one], mask=mask[:, one], time_dim=0, **options
            ).advantages
            assert torch.equal(alone, batch[:, one])
            continue
        one = [x[row] for x in (rewards, values, mask)]
        if layout == "packed":
            alone = ops.gae(*one[:2], mask=one[2], cu_seqlens=bounds[:2], **options).advantages
        else:
            one = [x[None] for x in one]
            alone = ops.gae(*one[:2], mask=one[2], **options).advantages[0]
        assert torch.equal(alone, batch[row])


@each_backend
@pytest.mark.parametrize("masked", [True, False])
def test_a_batch_larger_than_the_caches_has_the_bits_of_its_parts(backend, masked):
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip("the interpreter takes minutes for a million steps")
    rewards, values = torch.randn(2, 514, 2048, device=DEVICE)
    mask = torch.rand(514, 2048, device=DEVICE) < 0.7 if masked else None
    options = {"gamma": 0.99, "gae_lambda": 0.95, "backend": backend}
    batch = ops.gae(rewards, values, mask=mask, **options)
    for part in (slice(0, 100), slice(100, 514)):
        some = None if mask is None else mask[part]
        found = ops.gae(rewards[part], values[part], mask=some, **options)
        assert torch.equal(found.advantages, batch.advantages[part])
        assert torch.equal(found.returns, batch.returns[part])


@each_backend
def test_runs_repeat_bit_for_bit(backend):
    # the interpreter runs one program after the other
    rows = 2 if backend == "triton" and DEVICE == "cpu" else 33
    rewards, values = torch.randn(2, rows, 1500, device=DEVICE)
    mask = torch.rand(rows, 1500, device=DEVICE) < 0.5
    options = {"gamma": 0.99, "gae_lambda": 0.95, "mask": mask, "backend": backend}
    first, second = (ops.gae(rewards, values, **options) for _ in range(2))
    assert torch.equal(first.advantages, second.advantages)
    assert torch.equal(first.returns, second.returns)


@settings(max_examples=40)
@given(scan_cases("cpu", ("rewards", "values")))
def test_the_reference_equals_the_definition_of_the_paper(case):
    floats, options, _ = case
    options = options | {"gamma": 0.9, "gae_lambda": 0.8}
    exact = {name: x.double() for name, x in floats.items()}
    found = reference.gae(**exact, **options)
    wanted = on_rows(oracle.gae, exact | options, ("rewards", "values"))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-10, atol=1e-10)


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
    assert_scan_close(result.advantages, wanted.advantages, "advantages", 1)


@each_backend
def test_opcheck(backend):
    rewards, values, final = torch.randn(3, 3, 9, device=DEVICE)
    flags = torch.rand(3, 9, device=DEVICE) < 0.3
    column = torch.randn(3, 1, device=DEVICE)
    for x in (rewards, values, final, column):
        x.requires_grad_()
    given = GaeInputs(
        rewards=rewards,
        values=values,
        last_values=column,
        final_values=final,
        steps=as_inputs(Steps(terminated=flags, truncated=~flags), 0.9, 0.9),
        returns_only=False,
        backend=backend,
    )
    opcheck(gae_operator, given)
    rewards_alone = given._replace(
        values=None,
        last_values=None,
        final_values=None,
        steps=as_inputs(Steps(mask=flags, mask_mode="zero"), 0.9, 0.9),
        returns_only=True,
    )
    opcheck(gae_operator, rewards_alone)
    bounds = torch.tensor([0, 4, 27], dtype=torch.int32, device=DEVICE)
    steps = Steps(mask=flags.flatten(), mask_mode="compact", cu_seqlens=bounds)
    packed = given._replace(
        rewards=rewards.detach().flatten().requires_grad_(),
        values=values.detach().flatten().requires_grad_(),
        last_values=None,
        final_values=None,
        steps=as_inputs(steps, 0.9, 0.9),
    )
    opcheck(gae_operator, packed)


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
BOUNDS = torch.tensor([0, 3], dtype=torch.int32)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((X[0], X[0]), {}, "rewards must be 2-D"),
        ((X, X[:1]), {}, r"values must be of shape \(2, 3\), got \(1, 3\)"),
        ((X.long(), X), {}, "rewards must be float32 | bfloat16 | float16, got int64"),
        ((X, X), {"mask": X}, r"mask must be bool \| uint8, got float32: pass mask.bool\(\)"),
        (
            (X, X),
            {"mask_mode": "skip"},
            "mask_mode must be one of carry, zero, compact; got 'skip'",
        ),
        ((X, X), {"gamma": 1.5}, r"gamma must be in \[0, 1\], got 1.5"),
        ((X, X), {"time_dim": 2}, "time_dim must be -1, 0 or 1, got 2"),
        ((X, X), {"truncated": X.bool()}, "truncated and final_values go together"),
        ((X, X), {"last_values": X[0]}, r"last_values must be of shape \(2,\), got \(3,\)"),
        ((X, X), {"time_dim": 0, "last_values": X[:, 0]}, r"last_values must be of shape \(3,\)"),
        ((X, X), {"last_terminated": X[:, 0].bool()}, "done_convention='starts_at_t' only"),
        ((X, X), {"last_truncated": X[:, 0].bool()}, "last_truncated has a meaning"),
        ((X, X), {"cu_seqlens": BOUNDS}, r"with cu_seqlens rewards must be \(N,\), got \(2, 3\)"),
        ((X[0], X[0]), {"cu_seqlens": BOUNDS.long()}, "cu_seqlens must be int32, got int64"),
        ((X[0], X[0]), {"cu_seqlens": BOUNDS[:0]}, r"cu_seqlens must be a dense \(B \+ 1,\)"),
        ((X[0], X[0]), {"cu_seqlens": BOUNDS, "time_dim": 0}, "no meaning with cu_seqlens"),
        ((X[0], X[0]), {"cu_seqlens": BOUNDS, "last_values": X[0]}, r"of shape \(1,\)"),
        ((X, X), {"done_convention": "t+1"}, "one of ends_at_t, starts_at_t"),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ops.gae(*arguments, **({"gamma": 0.9, "gae_lambda": 0.9} | options))
