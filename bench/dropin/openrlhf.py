"""Sizes at which OpenRLHF's functions are timed beside ours."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from openrlhf.models import loss as losses
from torch import Tensor

from warpo.bench.dropin.case import DropIn

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
LOGITS = ((8, 64, 512), (4, 256, 32000), (4, 256, 151936))
TOKENS = ((8, 64), (256, 2048))
STEPS = ((8, 64), (512, 4096))
PAIRS = (8, 256)
FORWARD, BOTH = "forward", "forward + backward"
GAE = "RemoteExperienceMaker.get_advantages_and_returns"
RETURNS = "RemoteExperienceMaker.get_cumulative_returns"

POLICY_LOSSES: dict[str, dict[str, Any]] = {
    "ppo": {},
    "ppo by sequence": {"token_level_loss": False},
    "dual clip": {"dual_clip": 3.0},
    "gspo": {"policy_loss_type": "gspo"},
    "ppo, correction by token": {"is_correction_level": "token"},
    "ppo, correction by sequence": {"is_correction_level": "seq"},
    "ppo, binary KL by sequence": {
        "is_correction_level": "seq",
        "is_correction_gating": "binary_kl",
        "is_correction_threshold": (-1.0, 0.1),
    },
}
DPO_LOSSES: dict[str, dict[str, Any]] = {
    "": {},
    ", smoothing": {"label_smoothing": 0.1},
    ", ipo": {"ipo": True},
}

# what is called with the function and with the inputs, of which the first ones are differentiable
Call = Callable[..., Any]
Inputs = Callable[[], Sequence[Any]]


def cases() -> list[DropIn]:
    found = []
    for name, dtype in DTYPES.items():
        found += [*_logits(name, dtype), *_tokens(name, dtype), *_pairs(name, dtype)]
        found += _steps(name, dtype)
    return found


def _case(function: str, size: str, call: Call, inputs: Inputs, gradients: int) -> list[DropIn]:
    def make(backward: bool) -> Callable[[Callable], object]:
        torch.manual_seed(0)
        values = [
            x.requires_grad_() if backward and i < gradients else x for i, x in enumerate(inputs())
        ]
        leaves = values[: gradients if backward else 0]

        def run(timed: Callable) -> object:
            results = call(timed, *values)
            first: Tensor = results[0] if isinstance(results, tuple) else results
            for leaf in leaves:
                leaf.grad = None
            if backward:
                first.backward(None if first.dim() == 0 else torch.ones_like(first))
            return results

        return run

    modes = (FORWARD, BOTH) if gradients else (FORWARD,)
    return [
        DropIn(function=function, size=size, mode=mode, make=functools.partial(make, mode == BOTH))
        for mode in modes
    ]


def _logits(name: str, dtype: torch.dtype) -> Iterator[DropIn]:
    for shape in LOGITS:
        size = f"{shape[0]} x {shape[1]} x {shape[2]} {name}"

        def inputs(shape: tuple[int, ...] = shape) -> Sequence[Any]:
            return 3 * torch.randn(shape).to(dtype), torch.randint(0, shape[-1], shape[:-1])

        yield from _case("log_probs_from_logits", size, lambda f, *x: f(*x), inputs, 1)
        yield from _case("compute_entropy", size, lambda f, x, _: f(x), inputs, 1)
        loss = losses.GPTLMLoss()
        yield from _case("GPTLMLoss.forward", size, lambda f, *x, m=loss: f(m, *x), inputs, 1)


def _tokens(name: str, dtype: torch.dtype) -> Iterator[DropIn]:
    for shape in TOKENS:
        size = f"{shape[0]} x {shape[1]} {name}"

        def inputs(shape: tuple[int, int] = shape) -> Sequence[Any]:
            logp = -torch.rand(shape)
            old, rollout = logp + 0.1 * torch.randn(2, *shape)
            rows = [x.to(dtype) for x in (logp, old, torch.randn(shape), rollout)]
            return *rows[:3], _mask(shape), rows[3]

        value = losses.ValueLoss(clip_eps=0.2)
        yield from _case(
            "ValueLoss.forward", f"{size}, clip", lambda f, *x, m=value: f(m, *x[:4]), inputs, 1
        )
        for kind, options in POLICY_LOSSES.items():
            policy = losses.PolicyLoss(**options)
            yield from _case(
                "PolicyLoss.forward", f"{size}, {kind}", lambda f, *x, m=policy: f(m, *x), inputs, 1
            )
        for kind, unbiased in (("k2", False), ("k3", False), ("k1", True), ("k3", True)):
            yield from _case(
                "compute_approx_kl",
                f"{size}, {kind}{', unbiased' if unbiased else ''}",
                lambda f, *x, k=kind, u=unbiased: f(x[0], x[1], x[4], k, u),
                inputs,
                1,
            )


def _pairs(name: str, dtype: torch.dtype) -> Iterator[DropIn]:
    for pairs, (kind, options) in itertools.product(PAIRS, DPO_LOSSES.items()):
        dpo = losses.DPOLoss(0.1, **options)
        yield from _case(
            "DPOLoss.forward",
            f"{pairs} pairs {name}{kind}",
            lambda f, *x, m=dpo: f(m, *x),
            functools.partial(_random, 4, pairs, dtype),
            2,
        )
    for pairs in PAIRS:
        yield from _case(
            "LogExpLoss.forward",
            f"{pairs} pairs {name}",
            lambda f, *x: f(None, *x),
            functools.partial(_random, 2, pairs, dtype),
            2,
        )


def _steps(name: str, dtype: torch.dtype) -> Iterator[DropIn]:
    for shape in STEPS:
        size = f"{shape[0]} x {shape[1]} {name}"

        def inputs(shape: tuple[int, int] = shape) -> Sequence[Any]:
            return *(x.to(dtype) for x in torch.randn(2, *shape)), _mask(shape)

        yield from _case(GAE, size, lambda f, *x: f(None, *x, 1.0, 0.95), inputs, 0)
        yield from _case(RETURNS, size, lambda f, _, *x: f(None, *x, 1.0), inputs, 0)


def _random(count: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    return list(torch.randn(count, size).to(dtype))


def _mask(shape: tuple[int, int]) -> Tensor:
    """int64 as the library has it, of responses of half the length and more."""
    lengths = torch.randint(shape[1] // 2, shape[1], (shape[0], 1))
    return (torch.arange(shape[1]) < lengths).long()
