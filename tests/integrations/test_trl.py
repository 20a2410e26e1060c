import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.integrations.compare import compare

pytest.importorskip("trl", reason="TRL is not installed: make peers; then make test-integrations")
from trl.trainer import utils  # noqa: E402

from warpo.kernels.integrations import trl  # noqa: E402


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 70)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    temperature=st.sampled_from([1.0, 0.7]),
    seed=st.integers(0, 99),
)
def test_selective_log_softmax(shape, dtype, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(shape, generator=generator).to(dtype)
    index = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    original = utils.selective_log_softmax
    with trl.patch(only=["selective_log_softmax"]):
        ours = utils.selective_log_softmax
    compare(original, ours, logits, index, temperature, differentiable=[0], scale=20.0)
