"""torch.compile compiles once for a number, once more when it changes, and then never again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.kernels.backends import DEVICE
from warpo.kernels import ops
from warpo.kernels.objectives import get_objective

VALUES = (0.25, 0.5, 0.75, 0.125, 0.375)
X = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
Y = torch.arange(8, device=DEVICE).view(2, 4)
L, A = -X[..., 0].abs(), X[..., 1]
OBJECTIVES = [get_objective("dapo").replace(clip_low=x, clip_high=2 * x) for x in VALUES]
CALLS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "temperature": lambda x, t: ops.logprobs(x, Y, temperature=t),
    "kl_coef": lambda x, t: (
        ops.policy_loss(x[..., 0], L, A, "grpo", ref_logprobs=2 * L, kl_coef=t).loss
    ),
    "clip": lambda x, objective: ops.policy_loss(x[..., 0], L, A, objective).loss,
    "denominator": lambda x, t: ops.policy_loss(x[..., 0], L, A, "dapo", denominator=t).loss,
    "gamma, gae_lambda": lambda x, t: ops.gae(x[..., 0], A, gamma=t, gae_lambda=t).advantages,
}


@pytest.mark.skipif(DEVICE != "cpu", reason="what is compiled does not depend on the device")
@pytest.mark.parametrize("name", CALLS)
def test_another_number_compiles_no_other_graph(name):
    call = CALLS[name]

    def gradient(function: Callable[[Tensor, Any], Tensor], value: Any) -> list[Tensor]:
        x = X.clone().requires_grad_()
        result = function(x, value)
        return [result.detach(), torch.autograd.grad(result.sum(), x)[0]]

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for value in OBJECTIVES if name == "clip" else VALUES:
        torch.testing.assert_close(gradient(compiled, value), gradient(call, value))
    assert counter.frame_count <= 2
