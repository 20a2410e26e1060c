import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.backends import BACKENDS, DEVICE, dtypes, each_backend, examples, strided
from tests.kernels.opcheck import opcheck
from tests.oracles.group_advantages import leave_one_out_std
from tests.tolerance import SUM_RELATIVE, assert_close
from warpo.kernels import ops, reference
from warpo.kernels._group_advantages import GroupAdvantagesInputs, _operator


@st.composite
def cases(draw, backend: str):
    """Rewards of equal or unequal groups: continuous, few-valued, all equal, far from zero; NaN
    where masked.
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes(backend)))
    size = draw(st.sampled_from([1, 2, 3, 8, 70, 300]))
    groups = draw(st.sampled_from([0, 1, 2, 9]))
    count = size * groups
    kind = draw(st.sampled_from(["normal", "binary", "equal", "far"]))
    rewards = torch.randn(count, generator=generator)
    if kind == "binary":
        rewards = (rewards > 1).float()
    elif kind == "equal":
        rewards = torch.full((count,), 0.1)
    elif kind == "far":
        rewards = rewards + 100
    options = {
        "std": draw(st.sampled_from(["none", "sample", "population", "leave_one_out"])),
        "baseline": draw(st.sampled_from(["mean", "leave_one_out", "length_weighted"])),
        "eps": draw(st.sampled_from([1e-6, 1e-4])),
    }
    ids = None
    if draw(st.booleans()):
        groups += draw(st.sampled_from([0, 2]))
        if groups:
            ids = torch.randint(0, groups, (count,), generator=generator).to(DEVICE)
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(count, generator=generator) < 0.7
        rewards, mask = rewards.masked_fill(~mask, torch.nan), mask.to(DEVICE)
    rewards = strided(rewards.to(dtype), draw(st.sampled_from(["dense", "sliced"])))
    if options["baseline"] == "length_weighted":
        lengths = torch.randint(1, 4000, (count,), generator=generator)
        kind = draw(st.sampled_from([torch.int64, torch.int32, torch.float32]))
        options["lengths"] = strided(lengths.to(kind), "sliced")
        if options["std"] == "leave_one_out":
            options["std"] = "none"
    return rewards, size, ids, groups, mask, options


@each_backend
def test_values_and_gradients_equal_float64(backend):
    @settings(max_examples=examples(backend, 200))
    @given(cases(backend))
    def check(case):
        rewards, size, ids, groups, mask, options = case
        rewards = rewards.detach().requires_grad_()
        exact = rewards.detach().double().requires_grad_()
        where = {"group_size": size} if ids is None else {"group_ids": ids, "num_groups": groups}
        result = ops.group_advantages(rewards, **where, mask=mask, **options, backend=backend)
        if ids is None:
            ids = torch.arange(rewards.numel(), device=DEVICE) // size
        if mask is not None:
            ids = torch.where(mask, ids, groups)
        if "lengths" in options:
            options = options | {"lengths": options["lengths"].double()}
        wanted = reference.group_advantages(exact, ids, groups, **options)
        # rewards near 100 keep 1e-5 of their spread in float32
        for name, a, b in zip(("advantages", "mean", "std"), result, wanted, strict=False):
            assert_close(a, b, relative=SUM_RELATIVE, absolute=5e-5, what=name)
        assert result.num_degenerate.dtype == torch.int32
        assert int(result.num_degenerate) == int(wanted[3])
        upstream = torch.linspace(-1, 1, rewards.numel(), device=DEVICE)
        result.advantages.backward(upstream)
        if wanted[0].requires_grad:
            wanted[0].backward(upstream.double())
        gradient = torch.zeros_like(exact) if exact.grad is None else exact.grad
        scale = gradient.abs().max().item() if gradient.numel() else 0
        assert_close(
            rewards.grad, gradient, relative=1e-4, absolute=1e-4 * (1 + scale), what="gradient"
        )

    check()


@each_backend
@pytest.mark.parametrize("std", ["none", "sample", "population", "leave_one_out"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_groups_without_a_difference_are_exactly_zero_and_counted(backend, std, baseline):
    # 0.1 summed seven times and divided by seven is not 0.1
    rewards = torch.tensor([0.1] * 7 + [5.0] * 7 + [1.0] * 6 + [0.0], device=DEVICE)
    result = ops.group_advantages(rewards, 7, std=std, baseline=baseline, backend=backend)
    assert (result.advantages[:14] == 0).all() and (result.advantages[14:] != 0).all()
    assert result.mean[0] == rewards[0] and (result.std[:2] == 0).all()
    assert int(result.num_degenerate) == 2
    single = ops.group_advantages(rewards, 1, std=std, baseline=baseline, backend=backend)
    assert (single.advantages == 0).all() and int(single.num_degenerate) == 21


@each_backend
def test_leave_one_out_is_the_mean_of_the_others(backend):
    rewards = torch.tensor([1.0, 0.0, 0.0, 3.0], device=DEVICE)
    result = ops.group_advantages(rewards, 4, std="none", baseline="leave_one_out", backend=backend)
    others = (rewards.sum() - rewards) / 3
    assert torch.allclose(result.advantages, rewards - others)


@each_backend
def test_the_length_weighted_baseline_is_that_of_opo(backend):
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0], device=DEVICE, requires_grad=True)
    lengths = torch.tensor([30, 10, 20, 5, 5, 7], device=DEVICE)
    options = {"std": "none", "baseline": "length_weighted", "backend": backend}
    result = ops.group_advantages(rewards, 3, lengths=lengths, **options)
    assert torch.allclose(result.advantages[:3], torch.tensor([0.5, -0.5, -0.5], device=DEVICE))
    assert (result.advantages[3:] == 0).all() and result.num_degenerate == 1
    assert torch.allclose(result.mean, torch.tensor([1 / 3, 1.0], device=DEVICE))
    result.advantages[0].backward()
    wanted = torch.tensor([0.5, -1 / 6, -1 / 3, 0, 0, 0], device=DEVICE)
    assert torch.allclose(rewards.grad, wanted)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_leave_one_out_std_equals_the_oracle(backend, baseline):
    # of the first the others are equal, of the last few are an outlier's others; 0.35 is no float
    groups = [[1.0, 0.0, 0.0, 0.0], [0.35] * 4, [0.35, 0.35, 0.35, 0.0], [1e4, 0.0, 0.1, 0.3]]
    rewards = torch.tensor(groups, device=DEVICE)
    result = ops.group_advantages(
        rewards.flatten(), 4, std="leave_one_out", baseline=baseline, backend=backend
    )
    of_others = baseline == "leave_one_out"
    wanted = [leave_one_out_std(row.double().cpu().numpy(), of_others) for row in rewards]
    assert_close(
        result.advantages,
        torch.tensor(wanted).flatten(),
        relative=SUM_RELATIVE,
        absolute=1e-7,
        what="advantages",
    )
    if of_others:
        assert result.advantages[0] == 1 and result.advantages[11] == -rewards[2, 0]
    assert torch.allclose(result.std, rewards.std(1))
    # of two completions each has one other, which has no std
    pair = ops.group_advantages(rewards[0, :2], 2, std="leave_one_out", backend=backend)
    assert pair.advantages.tolist() == [0.5, -0.5]


@pytest.mark.parametrize("std", ["none", "sample", "leave_one_out"])
@pytest.mark.parametrize("by", ["mask", "mask of ids", "ids"])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_an_excluded_completion_is_as_if_it_were_not_there(backend, by, std):
    rewards = torch.tensor([1.0, 0.0, torch.nan, 3.0, 2.0, 2.0, torch.nan, -torch.inf, 5.0, 1.0])
    counts = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 1, 0], device=DEVICE, dtype=torch.uint8)
    ids = torch.arange(10, device=DEVICE) // 5
    rewards = rewards.to(DEVICE).requires_grad_()
    where = {"group_size": 5, "mask": counts}
    if by != "mask":
        where = {"group_ids": ids, "num_groups": 2, "mask": counts.bool()}
    if by == "ids":
        outside = torch.tensor([-1, 2], device=DEVICE).repeat(5)
        where = {"group_ids": torch.where(counts.bool(), ids, outside), "num_groups": 2}
    options = {"std": std, "baseline": "leave_one_out", "backend": backend}
    result = ops.group_advantages(rewards, **where, **options)
    kept = counts.bool()
    alone = rewards.detach()[kept].requires_grad_()
    wanted = ops.group_advantages(alone, group_ids=ids[kept], num_groups=2, **options)
    assert torch.equal(result.advantages[kept], wanted.advantages)
    assert (result.advantages[~kept] == 0).all()
    assert torch.equal(result.mean, wanted.mean) and torch.equal(result.std, wanted.std)
    assert result.num_degenerate == wanted.num_degenerate == 0
    upstream = torch.linspace(-1, 1, 10, device=DEVICE)
    result.advantages.backward(upstream)
    wanted.advantages.backward(upstream[kept])
    assert torch.equal(rewards.grad[kept], alone.grad) and (rewards.grad[~kept] == 0).all()


@each_backend
def test_a_group_without_a_completion_that_counts_is_not_degenerate(backend):
    rewards = torch.tensor([torch.nan, torch.nan, 1.0, 1.0], device=DEVICE)
    result = ops.group_advantages(rewards, 2, mask=~rewards.isnan(), backend=backend)
    assert result.advantages.tolist() == [0.0] * 4 and result.num_degenerate == 1
    assert result.mean.tolist() == [0.0, 1.0] and result.std.tolist() == [0.0, 0.0]


@each_backend
def test_a_nan_stays_in_its_group(backend):
    rewards = torch.tensor([1.0, 0.0, torch.nan, 1.0, 0.0, 2.0], device=DEVICE)
    advantages = ops.group_advantages(rewards, 2, backend=backend).advantages
    assert advantages.isnan().tolist() == [False, False, True, True, False, False]


@each_backend
def test_an_id_out_of_range_belongs_to_no_group(backend):
    ids = torch.tensor([0, 0, 5, -1], device=DEVICE)
    result = ops.group_advantages(
        torch.tensor([1.0, 0.0, 9.0, 9.0], device=DEVICE),
        group_ids=ids,
        num_groups=1,
        backend=backend,
    )
    assert (result.advantages[2:] == 0).all() and result.mean.tolist() == [0.5]


@each_backend
def test_a_common_offset_of_the_rewards_costs_no_digits(backend):
    """Differences of 0.25 to 2 on top of a million are exact in float32; their mean is not."""
    differences = torch.tensor([0.0, 0.25, 1.0, 2.0, 0.5, 0.75, 1.5], device=DEVICE)
    options = {"group_size": 7, "eps": 1e-6, "backend": backend}
    upstream = torch.linspace(-1, 1, 7, device=DEVICE)
    found = []
    for offset in (0.0, 2.0**20):
        rewards = (differences + offset).requires_grad_()
        result = ops.group_advantages(rewards, **options)
        result.advantages.backward(upstream)
        found.append((result.advantages.detach(), result.std, rewards.grad))
    for plain, moved in zip(*found, strict=True):
        torch.testing.assert_close(moved, plain, rtol=1e-6, atol=1e-6)


@each_backend
def test_order_of_groups_does_not_matter(backend):
    rewards = torch.randn(24, device=DEVICE)
    ids = torch.arange(24, device=DEVICE) // 8
    shuffled = torch.randperm(24).to(DEVICE)
    plain = ops.group_advantages(rewards, 8, backend=backend)
    mixed = ops.group_advantages(
        rewards[shuffled], group_ids=ids[shuffled], num_groups=3, backend=backend
    )
    assert torch.allclose(mixed.advantages, plain.advantages[shuffled], atol=1e-5)


@each_backend
def test_opcheck(backend):
    rewards = torch.randn(12, device=DEVICE, requires_grad=True)
    order = torch.randperm(12).to(DEVICE)
    offsets = torch.tensor([0, 5, 12], device=DEVICE)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    of_size = GroupAdvantagesInputs(
        rewards=rewards,
        lengths=None,
        group_size=4,
        num_groups=3,
        order=None,
        offsets=None,
        std_mode=1,
        leave_one_out=True,
        eps=1e-6,
        backend=backend,
    )
    by_id = of_size._replace(group_size=0, num_groups=2, order=order, offsets=offsets)
    weighted = of_size._replace(lengths=torch.rand(12, device=DEVICE), leave_one_out=False)
    for inputs in (of_size, by_id, weighted):
        opcheck(_operator, inputs, test_utils=checks)


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_compiles_without_a_graph_break(backend):
    def advantages(rewards):
        return ops.group_advantages(rewards * 2, 4, backend=backend).advantages

    compiled = torch.compile(advantages, fullgraph=True, backend="aot_eager")
    for groups in (2, 3, 5):
        rewards = torch.randn(4 * groups, device=DEVICE, requires_grad=True)
        assert torch.equal(advantages(rewards), compiled(rewards))
        (gradient,) = torch.autograd.grad(compiled(rewards)[0], rewards)
        (wanted,) = torch.autograd.grad(advantages(rewards)[0], rewards)
        assert torch.equal(gradient, wanted)


def test_mean_and_std_refuse_a_gradient():
    rewards = torch.randn(8, device=DEVICE, requires_grad=True)
    with pytest.raises(
        RuntimeError, match="mean and std of group_advantages are not differentiable"
    ):
        ops.group_advantages(rewards, 4).mean.sum().backward()


R, IDS = torch.zeros(6), torch.zeros(6, dtype=torch.int64)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((R, 4), {}, "group_size must divide the number of rewards, 6, got 4"),
        ((R, 0), {}, "group_size must divide"),
        ((R,), {}, "give either group_size or group_ids with num_groups"),
        ((R, 3), {"group_ids": IDS, "num_groups": 1}, "give either group_size or group_ids"),
        ((R,), {"group_ids": IDS}, "group_ids needs num_groups >= 0, got None"),
        ((R, 3), {"num_groups": 2}, "num_groups goes with group_ids"),
        ((R,), {"group_ids": IDS[:3], "num_groups": 1}, r"group_ids must be of shape \(6,\)"),
        (
            (R, 3),
            {"std": "unbiased"},
            "std must be one of none, sample, population, leave_one_out; got 'unbiased'",
        ),
        ((R, 3), {"baseline": "median"}, "baseline must be one of mean, leave_one_out, length_w"),
        ((R, 3), {"baseline": "length_weighted"}, "lengths go with baseline='length_weighted'"),
        ((R, 3), {"lengths": IDS}, "lengths go with baseline='length_weighted' only, got 'mean'"),
        (
            (R, 3),
            {"baseline": "length_weighted", "lengths": IDS[:3]},
            r"lengths must be of shape \(6,\), got \(3,\)",
        ),
        (
            (R, 3),
            {"baseline": "length_weighted", "lengths": IDS, "std": "leave_one_out"},
            "std='leave_one_out' goes with baseline='mean' or 'leave_one_out'",
        ),
        ((R, 3), {"eps": -1.0}, "eps must be >= 0"),
        ((R[None], 3), {}, r"rewards must be \(B,\), got \(1, 6\)"),
        ((R.long(), 3), {}, "rewards must be float32"),
        ((R, 3), {"mask": R}, r"mask must be bool \| uint8, got float32: pass mask.bool\(\)"),
        ((R, 3), {"mask": R[:3].bool()}, r"mask must be of shape \(6,\), got \(3,\)"),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ops.group_advantages(*arguments, **options)
