"""Checks of the arguments of `adamw_publish`, of one parameter and of many."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from warpo.kernels._checks import FLOATS, check_no_grad, check_own_memory, check_tensor
from warpo.kernels._plain import ANY_FLOAT, BFLOAT16, FLOAT32, only, plain_dtypes

MOMENTS = FLOATS[:2]

Tensors = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]
"""grad, master, exp_avg, exp_avg_sq and published of a parameter."""
Lists = tuple[list[Tensor], list[Tensor | None], list[Tensor], list[Tensor], list[Tensor]]


def check_tensors(names: Sequence[str], tensors: Tensors, like: Tensor | None = None) -> None:
    """Refuse tensors of a parameter that are not as `adamw_publish` says, by their names."""
    published, exp_avg = tensors[4], tensors[2]
    check_tensor(names[4], published, FLOATS, like=like)
    check_no_grad(names[4], published)
    check_own_memory(names[4], published, "pass a tensor of its own")
    shape = published.shape
    allowed = (FLOATS, FLOATS[:1], MOMENTS, (exp_avg.dtype,))
    for name, tensor, dtypes in zip(names, tensors[:4], allowed, strict=False):
        if tensor is None:
            continue
        check_tensor(name, tensor, dtypes, like=published)
        check_no_grad(name, tensor)
        if tensor.shape != shape and tensor.shape != (published.numel(),):
            raise ValueError(
                f"{name} must be of the shape of {names[4]}, {tuple(shape)}, or flat, "
                f"({published.numel()},), got {tuple(tensor.shape)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be dense, got strides {tensor.stride()}: "
                + (f"pass {name}.contiguous()" if tensor is tensors[0] else "allocate it dense")
            )


def check_seed(name: str, tensors: Tensors, seed: int | None) -> None:
    """Refuse a seed that would have no effect, and weights that need one; `name`: of published."""
    _, master, exp_avg, _, published = tensors
    own = master is None and published.dtype != torch.float32
    if own and (seed is None or published.dtype != torch.bfloat16):
        raise ValueError(
            f"master is None, but {name} is {str(published.dtype).removeprefix('torch.')}, too "
            f"coarse to be its own master: pass master={name}.float()"
            + (", or a seed for stochastic rounding" if published.dtype == torch.bfloat16 else "")
        )
    if seed is None:
        return
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2^63), got {seed}")
    if not own and exp_avg.dtype == torch.float32:
        raise ValueError(
            f"seed = {seed} would have no effect: the moments are float32, and {name} "
            f"{'is float32' if master is None else 'has a master'}; pass seed=None"
        )


def check_numbers(
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int
) -> None:
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}")
    if step < 1:
        raise ValueError(f"step must be >= 1, the number of this step, got {step}")


def check_lengths(lists: Lists, steps: Sequence[int], seeds: Sequence[int] | None) -> None:
    count = len(lists[4])
    if not count:
        raise ValueError("published is empty: pass at least one parameter")
    names = ("grads", "masters", "exp_avgs", "exp_avg_sqs", "published", "steps", "seeds")
    for name, values in zip(names, (*lists, steps, seeds), strict=True):
        if values is not None and len(values) != count:
            raise ValueError(
                f"{name} must have an entry for each of the {count} published, got {len(values)}"
            )


def are_plain(lists: Lists, seeds: Sequence[int] | None) -> bool:
    """Whether a fast look shows that all parameters pass `check_tensors` and `check_seed`. False:
    those are to tell.
    """
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for tensors in lists for x in tensors
    ):
        return False
    if seeds is not None and not (min(seeds) >= 0 and max(seeds) < 2**63):
        return False
    masters = lists[1]
    if all(x is not None for x in masters):
        return _are_plain(lists, seeds is not None)
    both = ([i for i, x in enumerate(masters) if (x is None) == own] for own in (True, False))
    return all(
        _are_plain([[tensors[i] for i in places] for tensors in lists], seeds is not None)
        for places in both
        if places
    )


def _are_plain(lists: Sequence[list[Any]], seeded: bool) -> bool:
    """The same, of parameters that all have a master, or all have none."""
    grads, masters, exp_avgs, exp_avg_sqs, published = lists
    own = masters[0] is None
    tensors = [published, grads, exp_avgs, exp_avg_sqs]
    weights, grad, first, second, *master = plain_dtypes(*tensors, *([] if own else [masters]))
    if not only(grad, ANY_FLOAT) or first not in (FLOAT32, BFLOAT16) or first != second:
        return False
    if not own:
        held = only(weights, ANY_FLOAT) and only(master[0], FLOAT32)
        return held and (not seeded or first == BFLOAT16)
    if not seeded:
        return only(weights, FLOAT32)
    return only(weights, FLOAT32 | BFLOAT16 if first == BFLOAT16 else BFLOAT16)
