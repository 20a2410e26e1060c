"""verl's losses on a batch of completions, 80 % of its slots valid."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from warpo.bench.dropin.case import DropIn

SIZES = ((8, 64), (64, 512), (256, 2048))
POLICY_LOSSES = ("vanilla", "gspo", "sapo", "cispo", "dro", "reinforce")
ESTIMATORS = ("k3", "k3+")
MODES = ("token-mean", "seq-mean-token-mean")


def cases() -> list[DropIn]:
    return [
        DropIn(
            function=function,
            size=f"[{rows}, {steps}] {str(dtype).removeprefix('torch.')}{note}",
            mode=mode,
            make=partial(_make, call, rows, steps, dtype, mode != "forward"),
        )
        for rows, steps in SIZES
        for dtype in (torch.float32, torch.bfloat16)
        for function, note, call in _calls()
        for mode in ("forward", "forward + backward")
    ]


def _calls() -> Iterator[tuple[str, str, Callable]]:
    for name in POLICY_LOSSES:
        yield f"compute_policy_loss_{name}", "", _policy_loss
    for mode in MODES:
        yield "agg_loss", f" {mode}", partial(_agg_loss, mode)
    for estimator in ESTIMATORS:
        yield "kl_penalty", f" {estimator}", partial(_kl_penalty, estimator)
    yield "compute_value_loss", "", _value_loss


def _make(
    call: Callable, rows: int, steps: int, dtype: torch.dtype, backward: bool
) -> Callable[[Callable], object]:
    generator = torch.Generator().manual_seed(0)
    new, noise, other = torch.randn(3, rows, steps, generator=generator)
    mask = torch.rand(rows, steps, generator=generator) < 0.8
    leaf = (new - 2).to(dtype).requires_grad_()
    old, other = (new - 2 + 0.1 * noise).to(dtype), other.to(dtype)
    config = _config()
    weight = torch.ones((rows, steps), dtype=dtype)

    def run(function: Callable) -> object:
        leaf.grad = None
        result = call(function, leaf, old, other, mask, config)
        if backward:
            result.backward(weight if result.dim() else None)
        return result

    return run


def _config() -> object:
    from verl.workers.config import ActorConfig, PolicyLossConfig

    loss = PolicyLossConfig(dro_beta=0.1)
    return ActorConfig(
        strategy="fsdp", rollout_n=8, ppo_micro_batch_size_per_gpu=1, policy_loss=loss
    )


def _policy_loss(function, new, old, other, mask, config):
    return function(old, new, other, mask, "token-mean", config)[0]


def _agg_loss(mode, function, new, old, other, mask, config):
    return function(new, mask, mode)


def _kl_penalty(estimator, function, new, old, other, mask, config):
    return function(new, old, estimator)


def _value_loss(function, new, old, other, mask, config):
    return function(new, other, old, mask, 0.5)[0]
