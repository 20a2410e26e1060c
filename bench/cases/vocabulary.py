"""Operations over the vocabulary."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from warpo.bench import peers
from warpo.bench.case import Call, Case, compiled, each_backend, relative_error
from warpo.kernels import ops, reference

# what the CPU kernels are held to at 1024 x 151936
_GOALS = {
    "forward": {
        "eager": 9.0, "compile": 1.4, "read": 0.6, "verl": 5.0, "trl": 15.0, "bytes a token": 16.0,
    },
    "backward": {"eager": 7.0, "compile": 4.0},
    "entropy": {"compile": 4.0, "trl": 30.0},
}  # fmt: skip
_GOALS_BFLOAT16 = {"forward": {"eager": 6.0, "compile": 1.4}, "backward": {}, "entropy": {}}


def _eager(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]


def _eager_with_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(logits, -1)
    return logp.gather(-1, targets[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


def _peaked(shape: tuple[int, ...], vocab: int, device: str, dtype: torch.dtype):
    """Logits as those of a policy: one large, that of the target, over noise."""
    logits = 2 * torch.randn(*shape, vocab, device=device, dtype=dtype)
    targets = torch.randint(0, vocab, shape, device=device)
    eight = torch.full((*shape, 1), 8.0, device=device, dtype=dtype)
    return logits.scatter_add_(-1, targets[..., None], eight), targets


def _trained(leaf: Tensor, function: Callable, *arguments: Tensor) -> Call:
    """A call that runs the function forward and backward into a fresh gradient."""

    def call() -> None:
        leaf.grad = None
        results = function(leaf, *arguments)
        total = (
            results.sum() if isinstance(results, Tensor) else results[0].sum() + results[1].sum()
        )
        total.backward()

    return call


def logprobs_cases(device: str, rows: int, vocab: int, dtype: torch.dtype) -> list[Case]:
    """logprobs, and logprobs_and_entropy; each forward, and forward with backward."""
    logits, targets = _peaked((rows,), vocab, device, dtype)
    leaf = logits.clone().requires_grad_()
    # TRL's functions take batches
    batch, batch_targets = logits.view(4, -1, vocab), targets.view(4, -1)
    batch_leaf = leaf.detach().view(4, -1, vocab).requires_grad_()
    size = f"{rows} x {vocab} {str(dtype).removeprefix('torch.')}"
    once = logits.numel() * logits.element_size()

    def ours(function: Callable, backend: str, inplace: bool = False) -> Callable:
        return lambda logits, targets: function(
            logits, targets, backend=backend, inplace_backward=inplace
        )

    def inplace(function: Callable) -> dict[str, Callable]:
        """The gradient takes the place of the logits: of a leaf of its own, which it changes."""
        own = logits.clone().requires_grad_()
        backends = each_backend(device, lambda b: _trained(own, ours(function, b, True), targets))
        return {f"{name}, in place": make for name, make in backends.items()}

    def error(backend: str) -> float:
        part = slice(0, 16)
        exact = logits[part].double().requires_grad_()
        wanted = reference.logprobs(exact, targets[part])
        sample = logits[part].clone().requires_grad_()
        actual = ops.logprobs_and_entropy(sample, targets[part], backend=backend)
        (wanted[0].sum() + wanted[1].sum()).backward()
        (actual.logprobs.sum() + actual.entropy.sum()).backward()
        errors = [relative_error(a, b) for a, b in zip(actual, wanted, strict=True)]
        return max(*errors, relative_error(sample.grad, exact.grad))

    def trl(name: str) -> Callable:
        return peers.load("trl.trainer.utils", name)

    def verl() -> Callable:
        return peers.load("verl.utils.torch_functional", "logprobs_from_logits")

    goals = _GOALS if dtype is torch.float32 else _GOALS_BFLOAT16
    return [
        Case(
            name="logprobs",
            size=size,
            providers=each_backend(
                device, lambda b: partial(ours(ops.logprobs, b), logits, targets)
            )
            | {
                "eager": lambda: partial(_eager, logits, targets),
                "compile": lambda: partial(compiled(_eager), logits, targets),
                "verl": lambda: partial(verl(), logits, targets),
                "trl": lambda: partial(trl("selective_log_softmax"), batch, batch_targets),
            },
            error=error,
            traffic=once,  # read the logits
            bound="read",
            goals=goals["forward"] if device == "cpu" else {},
            tokens=rows,
        ),
        Case(
            name="logprobs forward + backward",
            size=size,
            providers=each_backend(device, lambda b: _trained(leaf, ours(ops.logprobs, b), targets))
            | inplace(ops.logprobs)
            | {
                "eager": lambda: _trained(leaf, _eager, targets),
                "compile": lambda: _trained(leaf, compiled(_eager), targets),
                "verl": lambda: _trained(leaf, verl(), targets),
                "trl": lambda: _trained(batch_leaf, trl("selective_log_softmax"), batch_targets),
            },
            error=error,
            traffic=3 * once,  # read the logits twice, write their gradient
            goals=goals["backward"] if device == "cpu" else {},
        ),
        Case(
            name="logprobs_and_entropy forward + backward",
            size=size,
            providers=each_backend(
                device, lambda b: _trained(leaf, ours(ops.logprobs_and_entropy, b), targets)
            )
            | inplace(ops.logprobs_and_entropy)
            | {
                "eager": lambda: _trained(leaf, _eager_with_entropy, targets),
                "compile": lambda: _trained(leaf, compiled(_eager_with_entropy), targets),
                "trl": lambda: _trained(
                    batch_leaf, trl("selective_log_softmax_and_entropy"), batch_targets
                ),
            },
            error=error,
            traffic=3 * once,  # read the logits twice, write their gradient
            goals=goals["entropy"] if device == "cpu" else {},
        ),
    ]


def from_logits_case(device: str, rows: int, steps: int, vocab: int, dtype: torch.dtype) -> Case:
    """GRPO's loss and its gradient, from the logits."""
    logits, targets = _peaked((rows, steps), vocab, device, dtype)
    leaf = logits.requires_grad_()
    advantages = torch.randn(rows, device=device)
    with torch.no_grad():
        old = ops.logprobs(logits, targets) + 0.1 * torch.randn(rows, steps, device=device)
    ref = old + 0.05

    def one_read(backend: str) -> Callable:
        return lambda leaf: ops.policy_loss_from_logits(
            leaf, targets, advantages, "grpo", old_logprobs=old, ref_logprobs=ref,
            denominator=float(rows), backend=backend,
        ).loss  # fmt: skip

    def two_reads(backend: str) -> Callable:
        return lambda leaf: ops.policy_loss(
            ops.logprobs(leaf, targets, backend=backend), old, advantages, "grpo",
            ref_logprobs=ref, denominator=float(rows), backend=backend,
        ).loss  # fmt: skip

    def eager(leaf: Tensor) -> Tensor:
        logp = _eager(leaf, targets)
        ratio, difference = (logp - old).exp(), ref - logp
        surrogate = torch.min(
            ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None]
        )
        loss = 0.04 * (difference.exp() - difference - 1) - surrogate
        return loss.mean(1).sum() / rows

    def error(backend: str) -> float:
        part = slice(0, 1)
        exact = logits[part, :16].detach().double().requires_grad_()
        logp, _ = reference.logprobs(exact, targets[part, :16])
        loss, _ = reference.policy_loss(
            logp, old[part, :16].double(), advantages[part, None].double().expand_as(logp),
            ops.OBJECTIVES["grpo"], torch.tensor(1.0, dtype=torch.float64, device=device),
            ref=ref[part, :16].double(),
        )  # fmt: skip
        loss.backward()
        sample = logits[part, :16].detach().clone().requires_grad_()
        ops.policy_loss_from_logits(
            sample, targets[part, :16], advantages[part], "grpo", old_logprobs=old[part, :16],
            ref_logprobs=ref[part, :16], denominator=1.0, backend=backend,
        ).loss.backward()  # fmt: skip
        return relative_error(sample.grad, exact.grad)

    return Case(
        name="policy_loss_from_logits forward + backward",
        size=f"{rows} x {steps} x {vocab} {str(dtype).removeprefix('torch.')}",
        providers=each_backend(device, lambda b: _trained(leaf, one_read(b)))
        | {
            f"{b}, separate": make
            for b, make in each_backend(device, lambda b: _trained(leaf, two_reads(b))).items()
        }
        | {
            "eager": lambda: _trained(leaf, eager),
            "compile": lambda: _trained(leaf, compiled(eager)),
        },
        error=error,
        traffic=2 * logits.numel() * logits.element_size(),  # read the logits, write the gradient
        goals={"cpu, separate": 1.5} if device == "cpu" else {},
    )


def linear_memory_case(rows: int, hidden: int, vocab: int) -> Case:
    """linear_logprobs of a small model with a large vocabulary, for its memory: plain PyTorch would
    take 10 GB of it.
    """
    x, weight = torch.randn(rows, hidden), torch.randn(vocab, hidden)
    targets = torch.randint(0, vocab, (rows,))

    def error(backend: str) -> float:
        part = slice(0, 16)
        wanted, _ = reference.logprobs(x[part].double() @ weight.double().T, targets[part])
        return relative_error(
            ops.linear_logprobs(x[part], weight, targets[part], backend=backend), wanted
        )

    return Case(
        name="linear_logprobs",
        size=f"{rows} x {hidden} x {vocab} float32",
        providers={
            "cpu": lambda: (
                lambda: ops.linear_logprobs(x, weight, targets, workspace_bytes=64 << 20)
            ),
        },
        error=error,
        # read and write what cannot be avoided: hidden, weight, targets, logprobs
        traffic=4 * (x.numel() + weight.numel()) + 12 * rows,
        goals={"bytes a token": (64 << 20) / rows},
        tokens=rows,
    )
