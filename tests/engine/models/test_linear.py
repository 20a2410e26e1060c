"""Linear layers by oneDNN are those of PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from warpo.engine.models import linear as linear_module
from warpo.engine.models.linear import linear


@pytest.fixture(autouse=True)
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the processor is."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(linear_module, "ONEDNN_IS_FASTER", True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 300, 48), (7, 5), (2, 3, 4, 8), (0, 6)])
def test_values_and_gradients_are_those_of_pytorch(shape: tuple[int, ...], bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def leaf(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    inputs = [leaf(*shape), leaf(33, shape[-1]), *([leaf(33)] if bias else [])]
    grad = leaf(*shape[:-1], 33)

    def run(function, dtype: torch.dtype) -> list[Tensor]:
        given = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        out = function(*given)
        return [out, *torch.autograd.grad(out, given, grad.to(dtype))]

    exact, ours = run(F.linear, torch.float64), run(linear, torch.float32)
    for want, got in zip(exact, ours, strict=True):
        assert got.shape == want.shape
        assert (got - want).norm() <= 1e-6 * want.norm()


def test_rows_of_a_larger_weight() -> None:
    # as the sampler keeps query, key and value: the learner's weights are views of them
    fused = torch.randn(96, 16, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(linear(x, fused[32:64]), F.linear(x, fused[32:64]))
