import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.backends import BACKENDS, DEVICE, dtypes, each_backend, examples, strided
from tests.kernels.opcheck import opcheck
from tests.oracles.process_advantages import process_advantages as oracle
from tests.tolerance import SUM_RELATIVE, assert_close
from warpo.kernels import ops, reference
from warpo.kernels._process_advantages import ProcessAdvantagesInputs, _operator


@st.composite
def cases(draw, backend: str):
    """Outputs of 0 to 9, or of hundreds of steps, dense or packed, in groups by size or by id."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size, groups = draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from([0, 1, 3]))
    outputs, most = size * groups, draw(st.sampled_from([3, 9, 300]))
    tokens = draw(st.sampled_from([1, 40, 400]))
    packed, by_id = draw(st.booleans()), draw(st.booleans())
    counts = torch.randint(0, most + 1, (outputs,), generator=generator)
    lengths = torch.full((outputs,), tokens)
    if packed:
        lengths = torch.randint(0, tokens + 1, (outputs,), generator=generator)
    counts[lengths == 0] = 0
    ends = [
        torch.randint(0, max(int(n), 1), (int(k),), generator=generator).sort().values
        for n, k in zip(lengths, counts, strict=True)
    ]
    rewards = torch.randn(int(counts.sum()), generator=generator)
    kind = draw(st.sampled_from(["normal", "binary", "equal", "far"]))
    if kind == "binary":
        rewards = (rewards > 1).float()
    elif kind == "equal":
        rewards = torch.full_like(rewards, 0.1)
    elif kind == "far":
        rewards = rewards + 20
    rewards = rewards.to(draw(st.sampled_from(dtypes(backend))))
    index = draw(st.sampled_from([torch.int32, torch.int64]))
    zero = torch.zeros(1, dtype=torch.int64)
    arguments = {
        "step_rewards": strided(rewards, draw(st.sampled_from(["dense", "sliced"]))),
        "step_offsets": torch.cat([zero, counts.cumsum(0)]).to(DEVICE, index),
        "step_ends": torch.cat([zero[:0], *ends]).to(DEVICE, index),
        "num_tokens": tokens,
    }
    if packed:
        gap = draw(st.sampled_from([0, 3]))
        cu_seqlens = torch.cat([zero, lengths.cumsum(0)]).to(DEVICE, torch.int32) + gap
        arguments |= {"num_tokens": int(lengths.sum()) + 2 * gap, "cu_seqlens": cu_seqlens}
    if by_id:
        groups += 1
        ids = torch.randint(0, groups, (outputs,), generator=generator).to(DEVICE)
        where = {"group_ids": ids, "num_groups": groups}
    else:
        ids = torch.arange(outputs, device=DEVICE) // size
        where = {"group_size": size}
    options = {
        "std": draw(st.sampled_from(["none", "sample", "population"])),
        "eps": draw(st.sampled_from([1e-6, 1e-4])),
    }
    return arguments, where, ids, groups, options


@each_backend
def test_values_equal_float64(backend):
    @settings(max_examples=examples(backend, 150))
    @given(cases(backend))
    def check(case):
        arguments, where, ids, groups, options = case
        result = ops.process_advantages(**arguments, **where, **options, backend=backend)
        exact = arguments | {"step_rewards": arguments["step_rewards"].double()}
        wanted = reference.process_advantages(**exact, group_ids=ids, num_groups=groups, **options)
        steps = arguments["step_offsets"].diff().max().item() if ids.numel() else 0
        # a sum of that many normalised rewards; near 20 they keep 2e-6 of their spread
        absolute = 1e-5 * (1 + steps)
        assert_close(
            result.advantages,
            wanted[0],
            relative=SUM_RELATIVE,
            absolute=absolute,
            what="advantages",
        )
        for name, a, b in zip(("mean", "std"), result[1:3], wanted[1:3], strict=True):
            assert_close(a, b, relative=SUM_RELATIVE, absolute=2e-5, what=name)
        assert int(result.num_degenerate) == int(wanted[3])

    check()


@pytest.mark.parametrize("std, correction", [("sample", 1), ("population", 0)])
def test_the_reference_equals_the_oracle(std, correction):
    rewards = [
        [[0.1, 0.9], [0.5], [0.2, 0.3, 0.4]],
        [[1.0], [1.0, 1.0], []],
        [[-1.0, 2.0], [], [3]],
    ]
    ends = [[[1, 4], [2], [0, 3, 3]], [[4], [0, 1], []], [[0, 2], [], [4]]]
    lengths = [[5, 5, 5]] * 3
    wanted = oracle(rewards, ends, lengths, correction, 1e-6)
    flat = [output for question in rewards for output in question]
    counts = torch.tensor([0] + [len(output) for output in flat])
    actual = reference.process_advantages(
        torch.tensor(sum(flat, []), dtype=torch.float64),
        counts.cumsum(0),
        torch.tensor([e for question in ends for output in question for e in output]),
        5,
        torch.arange(9) // 3,
        3,
        std=std,
    )
    expected = torch.stack([torch.from_numpy(row) for row in wanted])
    assert_close(actual[0], expected, relative=1e-12, absolute=1e-12, what="advantages")
    assert int(actual[3]) == 1


@each_backend
def test_one_step_an_output_is_outcome_supervision(backend):
    rewards = torch.randn(12, device=DEVICE)
    offsets = torch.arange(13, device=DEVICE)
    ends = torch.randint(0, 30, (12,)).to(DEVICE)
    result = ops.process_advantages(rewards, offsets, ends, 30, 4, backend=backend)
    outcome = ops.group_advantages(rewards, 4, backend=backend)
    inside = torch.arange(30, device=DEVICE) <= ends[:, None]
    expected = torch.where(inside, outcome.advantages[:, None], 0.0)
    assert torch.allclose(result.advantages, expected, atol=1e-5)
    assert torch.allclose(result.std, outcome.std, atol=1e-6)


@each_backend
@pytest.mark.parametrize("std", ["none", "sample", "population"])
def test_groups_without_a_difference_are_exactly_zero_and_counted(backend, std):
    # two groups of equal rewards, one of unequal ones, one without steps
    rewards = torch.tensor([0.1] * 7 + [5.0] + [1.0, 2.0], device=DEVICE)
    offsets = torch.tensor([0, 3, 7, 8, 8, 9, 10, 10, 10], device=DEVICE)
    ends = torch.tensor([0, 2, 4, 1, 2, 3, 4, 0, 2, 3], device=DEVICE)
    result = ops.process_advantages(rewards, offsets, ends, 5, 2, std=std, backend=backend)
    assert (result.advantages[[0, 1, 2, 3, 6, 7]] == 0).all()
    assert (result.advantages[4, :3] != 0).all() and (result.advantages[4, 3:] == 0).all()
    assert int(result.num_degenerate) == 2
    assert result.mean[0] == rewards[0] and result.mean[3] == 0
    assert (result.std[[0, 1, 3]] == 0).all()


@each_backend
def test_a_nan_stays_in_its_group(backend):
    rewards = torch.tensor([1.0, torch.nan, 0.0, 2.0], device=DEVICE)
    offsets, ends = torch.arange(5, device=DEVICE), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    advantages = ops.process_advantages(rewards, offsets, ends, 2, 2, backend=backend).advantages
    assert advantages[:2, 0].isnan().all() and (advantages[:, 1] == 0).all()
    assert advantages[2:].isfinite().all()


@pytest.mark.parametrize("by", ["ids", "mask", "mask of ids"])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_an_excluded_output_is_as_if_it_were_not_there(backend, by):
    rewards = torch.tensor([1.0, torch.nan, torch.inf, 0.0, torch.nan, 5.0], device=DEVICE)
    offsets = torch.tensor([0, 1, 3, 4, 5, 6, 6], device=DEVICE)
    ends = torch.ones(6, dtype=torch.int64, device=DEVICE)
    counts = torch.tensor([1, 0, 1, 0, 0, 0], device=DEVICE).bool()
    ids = torch.tensor([0, 0, 0, 1, 1, 1], device=DEVICE)
    where = {"group_size": 3, "mask": counts}
    if by == "mask of ids":
        where = {"group_ids": ids, "num_groups": 2, "mask": counts.to(torch.uint8)}
    if by == "ids":
        outside = torch.tensor([-1, 2], device=DEVICE).repeat(3)
        where = {"group_ids": torch.where(counts, ids, outside), "num_groups": 2}
    result = ops.process_advantages(rewards, offsets, ends, 3, **where, backend=backend)
    assert (result.advantages[~counts] == 0).all() and result.mean.tolist() == [0.5, 0.0]
    assert torch.allclose(result.std, torch.tensor([0.5**0.5, 0.0], device=DEVICE))
    wanted = torch.tensor([0.5**0.5] * 2 + [0.0], device=DEVICE)
    assert torch.allclose(result.advantages[0], wanted)
    assert torch.allclose(result.advantages[2], -wanted)
    assert int(result.num_degenerate) == 0


@each_backend
def test_a_group_alone_has_the_same_bits(backend):
    rewards = torch.randn(40, device=DEVICE)
    offsets = torch.tensor([0, 7, 9, 20, 40], device=DEVICE)
    ends = torch.cat([torch.arange(n) for n in (7, 2, 11, 20)]).to(DEVICE)
    both = ops.process_advantages(rewards, offsets, ends, 25, 2, backend=backend)
    alone = ops.process_advantages(rewards[9:], offsets[2:] - 9, ends[9:], 25, 2, backend=backend)
    assert torch.equal(both.advantages[2:], alone.advantages)


@each_backend
@pytest.mark.parametrize(
    "ends, message",
    [
        ([0, 1, -1, 1], r"step_ends\[2\] = -1 is outside the 3 tokens of output 1"),
        ([0, 1, 1, 3], r"step_ends\[3\] = 3 is outside the 3 tokens of output 1"),
        ([0, 1, 2, 1], r"step_ends\[3\] = 1 is less than step_ends\[2\] = 2"),
    ],
)
def test_ends_outside_the_output_or_descending(backend, ends, message):
    rewards = torch.tensor([1.0, 2.0, 4.0, 5.0], device=DEVICE)
    offsets, ends = torch.tensor([0, 2, 4], device=DEVICE), torch.tensor(ends, device=DEVICE)
    if DEVICE == "cuda":
        advantages = ops.process_advantages(rewards, offsets, ends, 3, 1, backend=backend)[0]
        assert advantages.isnan().all(1).tolist() == [False, True]
        return
    with pytest.raises(ValueError, match=message):
        ops.process_advantages(rewards, offsets, ends, 3, 1, backend=backend)


REWARDS = torch.zeros(6)
OFFSETS = torch.tensor([0, 3, 6])
ENDS = torch.arange(6)


@each_backend
def test_opcheck(backend):
    rewards, offsets, ends = REWARDS.to(DEVICE), OFFSETS.to(DEVICE), ENDS.to(DEVICE)
    inputs = ProcessAdvantagesInputs(
        step_rewards=rewards,
        step_offsets=offsets,
        step_ends=ends,
        num_tokens=8,
        cu_seqlens=None,
        group_size=2,
        num_groups=1,
        group_ids=None,
        order=None,
        offsets=None,
        std_mode=1,
        eps=1e-6,
        backend=backend,
    )
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(_operator, inputs, test_utils=utils)


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_compiles_without_a_graph_break(backend):
    def advantages(rewards, offsets, ends):
        return ops.process_advantages(rewards * 2, offsets, ends, 7, 1, backend=backend).advantages

    compiled = torch.compile(advantages, fullgraph=True, backend="aot_eager")
    for steps in (2, 3, 7):
        rewards = torch.randn(2 * steps, device=DEVICE)
        offsets = torch.tensor([0, steps, 2 * steps], device=DEVICE)
        ends = torch.arange(steps).repeat(2).to(DEVICE)
        arguments = (rewards, offsets, ends)
        assert torch.equal(advantages(*arguments), compiled(*arguments))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"step_rewards": REWARDS[None]}, r"step_rewards must be \(S,\), got \(1, 6\)"),
        ({"step_rewards": REWARDS.long()}, "step_rewards must be float32"),
        (
            {"step_rewards": REWARDS.clone().requires_grad_()},
            r"constant of the operation: pass step_rewards.detach\(\)",
        ),
        ({"step_offsets": OFFSETS[:0]}, r"step_offsets must be \(B \+ 1,\), got \(0,\)"),
        ({"step_offsets": OFFSETS.float()}, "step_offsets must be int32 | int64"),
        ({"step_ends": ENDS[:3]}, r"step_ends must be of shape \(6,\), got \(3,\)"),
        ({"num_tokens": -1}, "num_tokens must be >= 0, got -1"),
        ({"cu_seqlens": OFFSETS}, "cu_seqlens must be int32, got int64"),
        (
            {"cu_seqlens": torch.zeros(6, dtype=torch.int32)[::2]},
            r"cu_seqlens must be dense: pass cu_seqlens.contiguous\(\)",
        ),
        ({"group_size": 4}, "group_size must divide the number of outputs, 2, got 4"),
        ({"group_size": None}, "give either group_size or group_ids with num_groups"),
        ({"num_groups": 2}, "num_groups goes with group_ids"),
        (
            {"group_size": None, "group_ids": torch.zeros(2, dtype=torch.int64)},
            "group_ids needs num_groups >= 0, got None",
        ),
        ({"std": "leave_one_out"}, "std must be one of none, sample, population; got 'leave_one"),
        ({"mask": torch.ones(3).bool()}, r"mask must be of shape \(2,\), got \(3,\)"),
        ({"eps": -1.0}, "eps must be >= 0"),
    ],
)
def test_bad_arguments_are_named(changed, message):
    arguments = {
        "step_rewards": REWARDS,
        "step_offsets": OFFSETS,
        "step_ends": ENDS,
        "num_tokens": 6,
        "group_size": 2,
    }
    with pytest.raises(ValueError, match=message):
        ops.process_advantages(**(arguments | changed))
