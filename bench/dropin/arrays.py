"""The functions of `integrations.arrays` beside the loops of single-file PPO that they replace."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from warpo.bench.dropin.case import DropIn
from warpo.kernels.integrations import arrays

CLIP_COEF = 0.2
SIZES = ((128, 4), (128, 8), (512, 4096))
MINIBATCHES = (64, 256, 2048, 65536)


def gae_loop(
    rewards: Any,
    values: Any,
    dones: Any,
    next_value: Any,
    next_done: Any,
    gamma: float,
    gae_lambda: float,
) -> tuple[Any, Any]:
    like: Callable = torch.zeros_like if isinstance(rewards, Tensor) else np.zeros_like
    advantages, last, steps = like(rewards), 0, len(rewards)
    for t in reversed(range(steps)):
        alive = 1.0 - (next_done if t == steps - 1 else dones[t + 1])
        after = next_value if t == steps - 1 else values[t + 1]
        delta = rewards[t] + gamma * after * alive - values[t]
        advantages[t] = last = delta + gamma * gae_lambda * alive * last
    return advantages, advantages + values


def clipped_policy_loss(
    newlogprob: Tensor, oldlogprob: Tensor, advantages: Tensor, clip_coef: float
) -> tuple[Tensor, Tensor]:
    logratio = newlogprob - oldlogprob
    ratio = logratio.exp()
    with torch.no_grad():
        approx_kl = ((ratio - 1) - logratio).mean()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return torch.max(unclipped, clipped).mean(), approx_kl


def clipped_value_loss(
    newvalue: Tensor, values: Tensor, returns: Tensor, clip_coef: float
) -> Tensor:
    unclipped = (newvalue - returns) ** 2
    clipped = (values + (newvalue - values).clamp(-clip_coef, clip_coef) - returns) ** 2
    return 0.5 * torch.max(unclipped, clipped).mean()


SIDES: dict[str, tuple[Callable, Callable]] = {
    "gae": (gae_loop, arrays.gae),
    "policy_loss": (clipped_policy_loss, arrays.policy_loss),
    "value_loss": (clipped_value_loss, arrays.value_loss),
}
"""The loop and ours."""


def cases() -> list[DropIn]:
    gae = [
        DropIn(
            function="gae",
            size=f"{steps} x {envs}, {kind} float32",
            mode="forward",
            make=_make_gae(steps, envs, kind),
        )
        for steps, envs in SIZES
        for kind in ("NumPy", "torch")
    ]
    losses = [
        DropIn(
            function=function,
            size=f"{size}, float32",
            mode="forward + backward",
            make=_make_loss(size),
        )
        for function in ("policy_loss", "value_loss")
        for size in MINIBATCHES
    ]
    return gae + losses


def _make_gae(steps: int, envs: int, kind: str) -> Callable[[], Callable[[Callable], object]]:
    def make() -> Callable[[Callable], object]:
        rng = np.random.default_rng(0)
        rewards, values = rng.normal(size=(2, steps, envs)).astype(np.float32)
        dones = (rng.random((steps, envs)) < 0.01).astype(np.float32)
        found: list[Any] = [rewards, values, dones, values[0].copy(), dones[0].copy()]
        if kind == "torch":
            found = [torch.from_numpy(x) for x in found]
        return lambda function: function(*found, 0.99, 0.95)

    return make


def _make_loss(size: int) -> Callable[[], Callable[[Callable], object]]:
    def make() -> Callable[[Callable], object]:
        generator = torch.Generator().manual_seed(0)
        old, noise, other = (torch.randn(size, generator=generator) for _ in range(3))
        new = (old + 0.1 * noise).requires_grad_()

        def call(function: Callable) -> object:
            found = function(new, old, other, CLIP_COEF)
            return torch.autograd.grad(found if isinstance(found, Tensor) else found[0], new)

        return call

    return make
