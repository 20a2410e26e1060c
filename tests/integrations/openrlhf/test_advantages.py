import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.integrations.compare import compare

pytest.importorskip(
    "openrlhf", reason="OpenRLHF is not installed: make peers; then make test-integrations"
)
pytest.importorskip("ray", reason="OpenRLHF's experience maker imports ray: make peers")

from tests.integrations.openrlhf.cases import (  # noqa: E402
    DTYPES,
    LAYOUTS,
    MASK_DTYPES,
    SEEDS,
    laid_out,
    mask_of,
    pair,
)

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 20))
GAE = "RemoteExperienceMaker.get_advantages_and_returns"
RETURNS = "RemoteExperienceMaker.get_cumulative_returns"
DISCOUNTS = st.sampled_from([1.0, 0.9])


def steps(shape, dtype, layout, mask_dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    values, rewards = (
        laid_out(x.to(dtype), layout) for x in torch.randn(2, *shape, generator=generator)
    )
    mask = mask_of(shape, generator, some_empty=True)
    return values, rewards, None if mask_dtype is None else laid_out(mask.to(mask_dtype), layout)


@given(SHAPES, DTYPES, LAYOUTS, MASK_DTYPES | st.none(), DISCOUNTS, DISCOUNTS, SEEDS)
def test_gae(shape, dtype, layout, mask_dtype, gamma, gae_lambda, seed):
    """In masked slots too, which decay the trace and have advantages like others."""
    values, rewards, mask = steps(shape, dtype, layout, mask_dtype, seed)
    original, ours = pair(GAE, None)
    compare(original, ours, values, rewards, mask, gamma, gae_lambda, scale=20.0)


@given(SHAPES, DTYPES, LAYOUTS, MASK_DTYPES | st.none(), DISCOUNTS, SEEDS)
def test_returns(shape, dtype, layout, mask_dtype, gamma, seed):
    _, rewards, mask = steps(shape, dtype, layout, mask_dtype, seed)
    original, ours = pair(RETURNS, None)
    compare(original, ours, rewards, mask, gamma, scale=20.0)


def test_mixed_dtypes():
    values, rewards = torch.randn(2, 3, 5)
    original, ours = pair(GAE, None)
    compare(original, ours, values.bfloat16(), rewards, torch.ones(3, 5).long(), 1.0, 0.9)
    original, ours = pair(RETURNS, None)
    compare(original, ours, rewards.bfloat16(), torch.ones(3, 5), 0.9, scale=4.0)


def test_no_gradient_is_recorded():
    values, rewards = torch.randn(2, 3, 5, requires_grad=True)
    _, ours = pair(GAE, None)
    assert not any(x.requires_grad for x in ours(values, rewards, torch.ones(3, 5), 1.0, 0.9))


def test_masked_slots_do_not_spread():
    values, rewards = torch.randn(2, 2, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0]])
    dirty = [x.masked_fill(mask == 0, torch.nan) for x in (values, rewards)]
    original, ours = pair(GAE, None)
    assert original(*dirty, mask, 1.0, 0.9)[0].isnan().any()
    for found, wanted in zip(
        ours(*dirty, mask, 1.0, 0.9), original(values, rewards, mask, 1.0, 0.9), strict=True
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("gamma", "dtype", "weight"),
    [(1.5, torch.float32, 1), (0.9, torch.float64, 1), (0.9, torch.float32, 0.5)],
)
def test_passed_through(gamma, dtype, weight):
    """Discounts above 1, float64, and a mask of weights."""
    values, rewards = torch.randn(2, 3, 5, dtype=dtype)
    mask = torch.full((3, 5), weight)
    original, ours = pair(GAE, None)
    arguments = (values, rewards, mask, gamma, 0.9)
    assert all(map(torch.equal, ours(*arguments), original(*arguments)))
    original, ours = pair(RETURNS, None)
    assert torch.equal(ours(rewards, mask, gamma), original(rewards, mask, gamma))
