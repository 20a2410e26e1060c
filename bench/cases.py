"""What is timed: each operation at the sizes of real models, beside the plain PyTorch of users.

`traffic` counts the bytes that the operation cannot avoid moving, in one commented line each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from warpo.kernels import ops, reference

Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation at one size.

    Attributes:
        make: backend name, or "eager", -> a call to time.
        error: backend name -> largest error against float64 on a part of the inputs, relative to
            the largest expected value.
        traffic: bytes that must be moved.
    """

    name: str
    size: str
    make: Callable[[str], Call]
    error: Callable[[str], float]
    traffic: int


def _relative_error(actual: Tensor | None, expected: Tensor | None) -> float:
    assert actual is not None and expected is not None
    expected = expected.detach()
    scale = expected.abs().max().clamp(min=1e-30)
    return float(((actual.double() - expected).abs().max() / scale).nan_to_num(torch.inf))


def _eager_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]


def _eager_logprobs_and_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(logits, -1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def logprobs_cases(device: str, rows: int, vocab: int, dtype: torch.dtype) -> list[Case]:
    """Forward, forward with entropy, and forward with backward."""
    # a policy's logits are peaked: a few large ones over noise
    logits = 2 * torch.randn(rows, vocab, device=device, dtype=dtype)
    targets = torch.randint(0, vocab, (rows,), device=device)
    logits.scatter_add_(1, targets[:, None], torch.full((rows, 1), 8.0, device=device, dtype=dtype))
    leaf = logits.clone().requires_grad_()
    size = f"{rows} x {vocab} {str(dtype).removeprefix('torch.')}"
    element = logits.element_size()

    def run(backend: str, entropy: bool) -> object:
        if backend == "eager":
            function = _eager_logprobs_and_entropy if entropy else _eager_logprobs
            return function(logits, targets)
        function = ops.logprobs_and_entropy if entropy else ops.logprobs
        return function(logits, targets, backend=backend)

    def train(backend: str) -> None:
        leaf.grad = None
        if backend == "eager":
            _eager_logprobs(leaf, targets).sum().backward()
        else:
            ops.logprobs(leaf, targets, backend=backend).sum().backward()

    def error(backend: str) -> float:
        part = slice(0, 16)
        exact = logits[part].double().requires_grad_()
        wanted = reference.logprobs(exact, targets[part])
        sample = logits[part].clone().requires_grad_()
        actual = ops.logprobs_and_entropy(sample, targets[part], backend=backend)
        wanted[0].sum().backward()
        actual.logprobs.sum().backward()
        errors = [_relative_error(a.detach(), b) for a, b in zip(actual, wanted, strict=True)]
        return max(*errors, _relative_error(sample.grad, exact.grad))

    once = rows * vocab * element
    return [
        # read the logits
        Case(
            name="logprobs", size=size, traffic=once, error=error,
            make=lambda b: lambda: run(b, False),
        ),
        # read the logits
        Case(
            name="logprobs_and_entropy", size=size, traffic=once, error=error,
            make=lambda b: lambda: run(b, True),
        ),
        # read the logits twice, write their gradient
        Case(
            name="logprobs forward + backward", size=size, traffic=3 * once, error=error,
            make=lambda b: lambda: train(b),
        ),
    ]  # fmt: skip


def gae_case(device: str, rows: int, steps: int, time_dim: int) -> Case:
    """Token level [B, T] with a mask, or environment level [T, N] with terminations."""
    shape = (rows, steps) if time_dim else (steps, rows)
    rewards, values = torch.randn(2, *shape, device=device)
    flags = torch.rand(shape, device=device) < (0.8 if time_dim else 0.01)
    options: dict[str, Any] = {"mask": flags} if time_dim else {"terminated": flags, "time_dim": 0}

    def error(backend: str) -> float:
        part = (slice(0, 4), slice(None)) if time_dim else (slice(None), slice(0, 4))
        cut: dict[str, Any] = {
            k: v[part] if isinstance(v, Tensor) else v for k, v in options.items()
        }
        wanted = reference.gae(rewards[part].double(), values[part].double(), 0.99, 0.95, **cut)
        actual = ops.gae(
            rewards[part], values[part], gamma=0.99, gae_lambda=0.95, backend=backend, **cut
        )
        return max(_relative_error(a, b) for a, b in zip(actual, wanted, strict=True))

    def make(backend: str) -> Call:
        if backend == "eager":
            return lambda: reference.gae(rewards, values, 0.99, 0.95, **options)
        return lambda: ops.gae(
            rewards, values, gamma=0.99, gae_lambda=0.95, backend=backend, **options
        )

    return Case(
        name="gae tokens" if time_dim else "gae environments",
        size=f"{shape[0]} x {shape[1]} float32",
        make=make,
        error=error,
        # read rewards, values (4 bytes each) and flags (1), write advantages and returns (4 each)
        traffic=rewards.numel() * 17,
    )


def policy_loss_case(device: str, rows: int, steps: int) -> Case:
    """GRPO with the k3 KL: loss, gradient and metrics. Eager computes no metrics."""
    old = -torch.rand(rows, steps, device=device)
    logp = (old + 0.1 * torch.randn(rows, steps, device=device)).requires_grad_()
    ref = old + 0.05
    advantages = torch.randn(rows, device=device)
    mask = torch.rand(rows, steps, device=device) < 0.9

    def mine(backend: str, part: slice = slice(None)) -> Tensor:
        return ops.policy_loss(
            logp[part], old[part], advantages[part], "grpo", mask=mask[part],
            ref_logprobs=ref[part], denominator=float(rows), backend=backend,
        ).loss  # fmt: skip

    def eager() -> Tensor:
        ratio = (logp - old).exp()
        surrogate = torch.min(
            ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None]
        )
        difference = ref - logp
        loss = 0.04 * (difference.exp() - difference - 1) - surrogate
        return ((loss * mask).sum(1) / mask.sum(1)).sum() / rows

    def make(backend: str) -> Call:
        def train() -> None:
            logp.grad = None
            (eager() if backend == "eager" else mine(backend)).backward()

        return train

    def error(backend: str) -> float:
        part = slice(0, 4)
        (gradient,) = torch.autograd.grad(mine(backend, part), logp)
        exact = logp[part].detach().double().requires_grad_()
        loss, _ = reference.policy_loss(
            exact, old[part].double(), advantages[part, None].double().expand_as(exact),
            ops.OBJECTIVES["grpo"], torch.tensor(float(rows), dtype=torch.float64, device=device),
            mask=mask[part], ref=ref[part].double(),
        )  # fmt: skip
        loss.backward()
        return _relative_error(gradient[part], exact.grad)

    return Case(
        name="policy_loss forward + backward",
        size=f"{rows} x {steps} float32",
        make=make,
        error=error,
        # read logp, old, ref (4 bytes each), mask (1); write the gradient (4), scale it (8)
        traffic=rows * steps * 25,
    )


def group_advantages_case(device: str, groups: int, group_size: int) -> Case:
    rewards = torch.randn(groups * group_size, device=device)

    def eager() -> Tensor:
        table = rewards.view(groups, group_size)
        return (table - table.mean(1, keepdim=True)) / (table.std(1, keepdim=True) + 1e-6)

    def make(backend: str) -> Call:
        if backend == "eager":
            return eager
        return lambda: ops.group_advantages(rewards, group_size, backend=backend)

    def error(backend: str) -> float:
        count = 4 * group_size
        ids = torch.arange(count, device=device) // group_size
        wanted = reference.group_advantages(rewards[:count].double(), ids, 4)[0]
        actual = ops.group_advantages(rewards, group_size, backend=backend)
        return _relative_error(actual.advantages[:count], wanted)

    return Case(
        name="group_advantages",
        size=f"{groups} x {group_size} float32",
        make=make,
        error=error,
        # read the rewards, write the advantages
        traffic=rewards.numel() * 8,
    )


def cases(device: str) -> list[Callable[[], list[Case]]]:
    """What is timed on a device; each entry allocates its inputs when called."""
    if device == "cpu":
        return [
            lambda: logprobs_cases("cpu", 1024, 151936, torch.float32),
            lambda: logprobs_cases("cpu", 1024, 151936, torch.bfloat16),
            lambda: [gae_case("cpu", 512, 4096, -1), gae_case("cpu", 4096, 128, 0)],
            lambda: [policy_loss_case("cpu", 256, 2048), group_advantages_case("cpu", 1024, 16)],
        ]
    return [
        lambda: logprobs_cases(device, 8192, 151936, torch.bfloat16),
        lambda: logprobs_cases(device, 4096, 151936, torch.float32),
        lambda: logprobs_cases(device, 8192, 32001, torch.bfloat16),
        lambda: [gae_case(device, 256, 8192, -1), gae_case(device, 4096, 128, 0)],
        lambda: [policy_loss_case(device, 16, 2048), policy_loss_case(device, 256, 8192)],
        lambda: [group_advantages_case(device, 1024, 16)],
    ]
