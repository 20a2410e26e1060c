"""An AdamW step whose weights are rounded into another tensor, in plain PyTorch."""

import torch
from torch import Tensor

from warpo.kernels.reference.fingerprint import INCREMENT, counted, fingerprint, splitmix64


def adamw_publish(
    grad: Tensor,
    master: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    published: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float | Tensor = 1.0,
    seed: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(fingerprint, number of changed elements, sum of |new - old| over master, over published)."""
    before = published.clone()
    weight = (published if master is None else master).to(_wide(published, master))
    old = weight.clone()
    m, v = (moment.to(weight.dtype).view(weight.shape) for moment in (exp_avg, exp_avg_sq))
    g = grad.to(weight.dtype).view(weight.shape) * grad_scale
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * (g * g)
    root = (v / (1 - beta2**step)).sqrt() + eps
    weight = (1 - lr * weight_decay) * weight - lr * (m / (1 - beta1**step)) / root

    random = None if seed is None else _random_bits(seed, step, weight)
    _round(m, exp_avg, random, 16)
    _round(v, exp_avg_sq, random, 32)
    if master is not None:
        master.copy_(weight)
        _round(weight, published, None, 0)
    else:
        _round(weight, published, random, 0)

    size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[published.element_size()]
    changed = (published.view(size) != before.view(size)).sum()
    difference = published.to(weight.dtype) - before.to(weight.dtype)
    return fingerprint(published), changed, (weight - old).abs().sum(), difference.abs().sum()


def _wide(published: Tensor, master: Tensor | None) -> torch.dtype:
    """What is computed in: float32, or float64 where the weights are."""
    return torch.promote_types((published if master is None else master).dtype, torch.float32)


def _random_bits(seed: int, step: int, like: Tensor) -> Tensor:
    """64 bits for each element, of seed, step and position."""
    seeds, steps = (torch.tensor(x, device=like.device) for x in (seed, step))
    key = splitmix64(splitmix64((seeds + 1) * INCREMENT) + steps * INCREMENT)
    return splitmix64(counted(key, like.numel(), like.device)).view(like.shape)


def _round(value: Tensor, out: Tensor, random: Tensor | None, shift: int) -> None:
    """To nearest, or up or down at random if `out` is bfloat16 and there are random bits."""
    value = value.view(out.shape)
    if random is None or out.dtype != torch.bfloat16:
        out.copy_(value)
        return
    value = value.float()
    up = (random.view(out.shape) >> shift) & 0xFFFF
    rounded = (value.view(torch.int32) + up.to(torch.int32)) & -0x10000
    out.copy_(torch.where(value.isfinite(), rounded.view(torch.float32), value))
