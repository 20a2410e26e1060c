"""Losses of per-token logprobs."""

from collections.abc import Callable

import torch
from torch import Tensor

from warpo.bench import peers
from warpo.bench.case import Call, Case, compiled, each_backend, relative_error
from warpo.kernels import ops, reference


def policy_loss_case(device: str, rows: int, steps: int) -> Case:
    """GRPO with the k3 KL: loss, gradient and metrics. Eager and compile have no metrics."""
    old = -torch.rand(rows, steps, device=device)
    logp = (old + 0.1 * torch.randn(rows, steps, device=device)).requires_grad_()
    ref = old + 0.05
    advantages = torch.randn(rows, device=device)
    mask = torch.rand(rows, steps, device=device) < 0.9

    def ours(backend: str, part: slice = slice(None)) -> Tensor:
        return ops.policy_loss(
            logp[part], old[part], advantages[part], "grpo", mask=mask[part],
            ref_logprobs=ref[part], denominator=float(rows), backend=backend,
        ).loss  # fmt: skip

    def eager(logp: Tensor) -> Tensor:
        ratio = (logp - old).exp()
        surrogate = torch.min(
            ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None]
        )
        difference = ref - logp
        loss = 0.04 * (difference.exp() - difference - 1) - surrogate
        return ((loss * mask).sum(1) / mask.sum(1)).sum() / rows

    def trained(loss) -> Call:
        def call() -> None:
            logp.grad = None
            loss().backward()

        return call

    def compile_() -> Call:
        function = compiled(eager)
        return trained(lambda: function(logp))

    def trl() -> Call:
        function, integers = peers.trl_grpo_loss(beta=0.04), mask.long()
        return trained(lambda: function(logp, old, ref, advantages, integers))

    def error(backend: str) -> float:
        part = slice(0, 4)
        (gradient,) = torch.autograd.grad(ours(backend, part), logp)
        exact = logp[part].detach().double().requires_grad_()
        loss, _ = reference.policy_loss(
            exact, old[part].double(), advantages[part, None].double().expand_as(exact),
            ops.OBJECTIVES["grpo"], torch.tensor(float(rows), dtype=torch.float64, device=device),
            mask=mask[part], ref=ref[part].double(),
        )  # fmt: skip
        loss.backward()
        return relative_error(gradient[part], exact.grad)

    return Case(
        name="policy_loss forward + backward",
        size=f"{rows} x {steps} float32",
        providers=each_backend(device, lambda b: trained(lambda: ours(b)))
        | {"eager": lambda: trained(lambda: eager(logp)), "compile": compile_, "trl": trl},
        error=error,
        # read logp, old, ref (4 bytes each), mask (1); write the gradient (4), scale it (8)
        traffic=rows * steps * 25,
        goals={"trl": 8, "compile": 1.3, "bytes a token": 16} if device == "cpu" else {},
        tokens=rows * steps,
    )


def aggregate_case(device: str, rows: int, steps: int) -> Case:
    """The mean of the valid tokens, which any loss by tokens ends with."""
    values = torch.randn(rows, steps, device=device, requires_grad=True)
    mask = torch.rand(rows, steps, device=device) < 0.9

    def eager(values: Tensor) -> Tensor:
        return torch.where(mask, values, 0).sum() / mask.sum()

    def ours(backend: str) -> Tensor:
        return ops.aggregate(values, mask=mask, backend=backend)

    def error(backend: str) -> float:
        (gradient,) = torch.autograd.grad(ours(backend), values)
        return relative_error(gradient, mask.double() / mask.sum())

    return Case(
        name="aggregate forward + backward",
        size=f"{rows} x {steps} float32",
        providers=each_backend(device, lambda b: _trained(values, lambda: ours(b)))
        | _torch_providers(eager, values),
        error=error,
        # read values (4 bytes) and mask (1); read mask, write the gradient
        traffic=rows * steps * 10,
    )


def approx_kl_case(device: str, rows: int, steps: int) -> Case:
    """k3 of each token, clamped to 10, with a gradient from above."""
    logp = (-torch.rand(rows, steps, device=device)).requires_grad_()
    ref = logp.detach() + 0.1 * torch.randn(rows, steps, device=device)
    upstream = torch.randn(rows, steps, device=device)

    def eager(logp: Tensor) -> Tensor:
        difference = ref - logp
        return (difference.exp() - difference - 1).clamp(-10, 10)

    def ours(backend: str) -> Tensor:
        return ops.approx_kl(logp, ref, limit=10.0, backend=backend)

    def error(backend: str) -> float:
        (gradient,) = torch.autograd.grad(ours(backend), logp, upstream)
        exact = logp.detach().double().requires_grad_()
        value = reference.approx_kl(exact, ref.double(), "k3", limit=10.0)
        return relative_error(gradient, torch.autograd.grad(value, exact, upstream.double())[0])

    return Case(
        name="approx_kl forward + backward",
        size=f"{rows} x {steps} float32",
        providers=each_backend(device, lambda b: _trained(logp, lambda: ours(b), upstream))
        | _torch_providers(eager, logp, upstream),
        error=error,
        # read logp and ref, write the value; read them and a gradient, write one
        traffic=rows * steps * 28,
    )


def _trained(leaf: Tensor, function: Callable[[], Tensor], upstream: Tensor | None = None) -> Call:
    def call() -> None:
        leaf.grad = None
        function().backward(upstream)

    return call


def _torch_providers(
    eager: Callable[[Tensor], Tensor], leaf: Tensor, upstream: Tensor | None = None
) -> dict[str, Callable[[], Call]]:
    def compile_() -> Call:
        function = compiled(eager)
        return _trained(leaf, lambda: function(leaf), upstream)

    return {"eager": lambda: _trained(leaf, lambda: eager(leaf), upstream), "compile": compile_}
