"""Whitening: all valid elements of a tensor brought to mean 0 and standard deviation 1.

    y_i = (x_i - mean) / s  [+ mean]        s = sqrt(variance + eps), variance divided by n - 1

Backward, with z_i = (x_i - mean) / s:

    dx_i = (g_i - mean(g) - z_i sum_j g_j z_j / (n - 1)) / s  [+ mean(g)]

The sums are taken over fixed parts, whose results are merged in their order: neither timing nor
number of threads changes a bit.

Source: advantage normalisation, https://arxiv.org/abs/2006.05990 section 3.5; moments of parts:
Chan, Golub, LeVeque, "Algorithms for computing the sample variance", eq. 2.1.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpo.kernels import dispatch, reference
from warpo.kernels._arguments.whiten import WhitenArguments, WhitenBackwardArguments
from warpo.kernels._checks import FLOATS, check_mask, check_no_grad, check_number, check_tensor
from warpo.kernels._registration import Operator

# csrc/math/tiles.h: partial results at most, and three numbers each
PARTIALS = (1024, 3)


class WhitenInputs(NamedTuple):
    x: Tensor
    mask: Tensor | None
    shift_mean: bool
    eps: float
    backend: str


class WhitenBackwardInputs(NamedTuple):
    x: Tensor
    mask: Tensor | None
    stats: Tensor
    grad_whitened: Tensor
    shift_mean: bool
    backend: str


def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    eps: float = 1e-8,
    fill_masked: bool = False,
    backend: str | None = None,
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over all valid elements, of advantages for instance.

    Every result depends on every valid element: a NaN or infinite one makes all results NaN. Where
    all are equal, or there is one, x - mean is exactly 0 and so is the result.

    Args:
        x: 1-D or 2-D float32 | bfloat16 | float16, any strides. Differentiable.
        mask: like x, bool | uint8. Masked slots are never read (they may hold NaN); the result
            and the gradient are 0 there.
        shift_mean: False adds the mean again, so that only the spread changes.
        eps: added to the unbiased variance (divided by n - 1; that of one element is 0).
        fill_masked: the result in masked slots is that of the same formula, with the mean and the
            variance of the valid elements: they are read after all, and what they hold stays in
            them. Then x must not require grad.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        float32, of the shape of x.

    Raises:
        ValueError: a shape, dtype, device or option is not as above.

    Source: https://arxiv.org/abs/2006.05990 section 3.5. Memory beyond arguments and results: 12
    KiB.
    """
    check_tensor("x", x, FLOATS)
    if x.dim() not in (1, 2):
        raise ValueError(f"x must be 1-D or 2-D, got {tuple(x.shape)}: pass x.flatten(1)")
    check_mask("mask", mask, x.shape, x)
    check_number("eps", eps)
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    if fill_masked:
        check_no_grad("x", x)
    name = dispatch.choose(x, backend)
    if name == "reference":
        return reference.whiten(
            x.float(), mask, shift_mean=shift_mean, eps=eps, fill_masked=fill_masked
        )
    whitened, stats = _dense(WhitenInputs(x, mask, shift_mean, eps, name))
    if not fill_masked or mask is None:
        return whitened
    filled = (x.float() - stats[0]).mul_(stats[1])
    return filled if shift_mean else filled.add_(stats[0])


def _dense(inputs: WhitenInputs) -> tuple[Tensor, Tensor]:
    """Through the operator in the layout that it walks fastest: one row if all is dense."""
    x, mask = inputs.x, inputs.mask
    options = inputs[2:]
    if x.is_contiguous() and (mask is None or mask.is_contiguous()):
        row = None if mask is None else mask.view(1, -1)
        whitened, stats = _operator(WhitenInputs(x.view(1, -1), row, *options))
        return whitened.view(x.shape), stats
    if x.dim() == 1:
        row = None if mask is None else mask[None]
        whitened, stats = _operator(WhitenInputs(x[None], row, *options))
        return whitened[0], stats
    if x.stride(0) < x.stride(1):
        columns = None if mask is None else mask.t()
        whitened, stats = _operator(WhitenInputs(x.t(), columns, *options))
        return whitened.t(), stats
    return _operator(inputs)


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


def _forward(inputs: WhitenInputs) -> tuple[Tensor, Tensor]:
    whitened, stats = _allocate(inputs)
    x = inputs.x
    if x.numel():
        rows, columns = x.shape
        arguments = WhitenArguments(
            rows=rows,
            columns=columns,
            x=x,
            mask=inputs.mask,
            shift_mean=inputs.shift_mean,
            eps=inputs.eps,
            partials=x.new_empty(PARTIALS, dtype=torch.float32),
            stats=stats,
            whitened=whitened,
        )
        dispatch.load(inputs.backend).whiten_forward(arguments)
    return whitened, stats


def _allocate(inputs: WhitenInputs) -> tuple[Tensor, Tensor]:
    return _empty(inputs.x), inputs.x.new_empty(3, dtype=torch.float32)


def _backward(inputs: WhitenBackwardInputs) -> Tensor:
    x = inputs.x
    grad_x = _empty(x)
    if x.numel():
        rows, columns = x.shape
        forward = WhitenArguments(
            rows=rows,
            columns=columns,
            x=x,
            mask=inputs.mask,
            shift_mean=inputs.shift_mean,
            eps=0.0,
            partials=x.new_empty(PARTIALS, dtype=torch.float32),
            stats=inputs.stats,
            whitened=None,
        )
        arguments = WhitenBackwardArguments(
            forward=forward, grad_whitened=inputs.grad_whitened, grad_x=grad_x
        )
        dispatch.load(inputs.backend).whiten_backward(arguments)
    return grad_x


def _fake_backward(inputs: WhitenBackwardInputs) -> Tensor:
    return _empty(inputs.x)


_backward_operator = Operator("whiten_backward", _backward, _fake_backward)


def _save(ctx: Any, inputs: WhitenInputs, output: tuple[Tensor, Tensor]) -> None:
    ctx.shift_mean, ctx.backend = inputs.shift_mean, inputs.backend
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs.x, inputs.mask, output[1])


def _differentiate(ctx: Any, grad_whitened: Tensor | None, *_: object) -> tuple[Tensor | None]:
    if grad_whitened is None:
        return (None,)
    x, mask, stats = ctx.saved_tensors
    inputs = WhitenBackwardInputs(
        x=x,
        mask=mask,
        stats=stats,
        grad_whitened=grad_whitened,
        shift_mean=ctx.shift_mean,
        backend=ctx.backend,
    )
    return (_backward_operator(inputs).to(x.dtype),)


_operator = Operator("whiten", _forward, _allocate, _save, _differentiate, differentiable=1)
