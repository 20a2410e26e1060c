"""Soft actor-critic: sampling an action with its logprob, and the targets of the Q-functions."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from warpo.bench.case import Call, Case, compiled, each_backend, relative_error
from warpo.kernels import ops, reference


def squashed_gaussian_case(device: str, rows: int, columns: int) -> Case:
    """Forward and backward through actions and logprobs."""
    mean, log_std, noise, grad_actions = torch.randn(4, rows, columns, device=device)
    leaves = [mean.requires_grad_(), log_std.requires_grad_()]
    upstream = (grad_actions, torch.full((rows,), 0.2, device=device))

    def eager(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        s = log_std.clamp(-20.0, 2.0)
        u = mean + s.exp() * noise
        logprobs = -noise * noise / 2 - s - math.log(2 * math.pi) / 2
        logprobs = logprobs - 2 * (math.log(2) - u - softplus(-2 * u))
        return torch.tanh(u), logprobs.sum(1)

    def gradients(results: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(results, leaves, upstream)

    def ours(backend: str) -> tuple[Tensor, ...]:
        return gradients(ops.squashed_gaussian(mean, log_std, noise, backend=backend))

    def trained(function: Callable[..., tuple[Tensor, Tensor]]) -> Call:
        return lambda: gradients(function(mean, log_std, noise))

    def error(backend: str) -> float:
        m, s = (x.detach().double().requires_grad_() for x in leaves)
        results = reference.squashed_gaussian(m, s, noise.double())
        wanted = torch.autograd.grad(results, (m, s), [x.double() for x in upstream])
        return max(relative_error(a, b) for a, b in zip(ours(backend), wanted, strict=True))

    return Case(
        name="squashed_gaussian forward + backward",
        size=f"{rows} x {columns} float32",
        providers=each_backend(device, lambda b: lambda: ours(b))
        | {"eager": lambda: trained(eager), "compile": lambda: trained(compiled(eager))},
        error=error,
        # read mean, log_std, noise twice and the gradient; write actions and two gradients
        traffic=rows * columns * 40,
        # a small batch is all call overhead
        goals={"eager": 1.5} if device == "cpu" and rows > 1000 else {},
    )


def soft_q_targets_case(device: str, count: int) -> Case:
    rewards, q1, q2, logprobs = torch.randn(4, count, device=device)
    ends = torch.rand(count, device=device) < 0.01
    alpha = torch.tensor(0.2, device=device)
    gamma = 0.99

    def eager() -> Tensor:
        return rewards + gamma * (1 - ends.float()) * (torch.min(q1, q2) - alpha * logprobs)

    def ours(backend: str) -> Tensor:
        return ops.soft_q_targets(
            rewards, ends, q1, q2, logprobs, alpha=alpha, gamma=gamma, backend=backend
        )

    def error(backend: str) -> float:
        wanted = reference.soft_q_targets(
            rewards.double(), ends, q1.double(), q2.double(), logprobs.double(), alpha.double(),
            gamma,
        )  # fmt: skip
        return relative_error(ours(backend), wanted)

    return Case(
        name="soft_q_targets",
        size=f"{count} float32",
        providers=each_backend(device, lambda b: lambda: ours(b))
        | {"eager": lambda: eager, "compile": lambda: compiled(eager)},
        error=error,
        traffic=count * 21,  # read four floats and a flag, write a float
    )
