"""AdamW on float32 master weights that writes the rounded weights where the sampler reads them.

    g = grad_scale * grad
    m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
    w = (1 - lr weight_decay) w - lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)
    published = w rounded to its dtype, to nearest, ties to even

One pass over memory also gives what a check of the weights needs: the fingerprint of the published
bits, how many of them changed, and the size of the step before and after rounding. With bfloat16
most steps of a small learning rate are below half a unit in the last place: they move the master
weights and leave the published ones as they are.

Source: https://arxiv.org/abs/1711.05101 algorithm 2, with lr as the schedule, as in
torch.optim.AdamW.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from warpo.kernels import dispatch, reference
from warpo.kernels.checks import FLOATS, check_no_grad, check_own_memory, check_tensor
from warpo.kernels.fingerprint import PARTIALS, rows_of
from warpo.kernels.registration import Operator

FLOAT32 = FLOATS[:1]


class AdamwPublish(NamedTuple):
    fingerprint: Tensor
    changed: Tensor
    master_update: Tensor
    published_update: Tensor


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
    backend: str | None = None,
) -> AdamwPublish:
    """One optimizer step of one parameter; changes master, exp_avg, exp_avg_sq and published.

    A NaN or infinite gradient makes its weight NaN, as in torch.optim.AdamW: check the gradient
    norm before the step. The tensors must not overlap. Not differentiable.

    Args:
        grad: float32 | bfloat16 | float16, dense, of the shape of published or flat. Only read.
        master: float32 weights, dense, of the shape of published or flat. None: published, which
            must be float32, is its own master.
        exp_avg, exp_avg_sq: float32, dense, of the shape of published or flat: the moments, 0
            before the first step.
        published: bfloat16 | float16 | float32: dense, or rows of any stride whose last dimension
            is dense. With a master its old values are read for the counts only.
        lr: learning rate.
        beta1, beta2: decay of the moments, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled: w is multiplied with 1 - lr weight_decay.
        step: number of this step, 1 for the first.
        grad_scale: what grad is multiplied with: a number, or a float32 scalar tensor on the
            device, as a clip coefficient is.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        fingerprint: () int64: that of published after the step, see `fingerprint`.
        changed: () int64: elements of published whose bits the step changed.
        master_update, published_update: () float32: sum of |new - old| over all elements, before
            and after rounding. 1 - published_update / master_update of all parameters together is
            the share of the step that rounding has lost.
        All on the device.

    Raises:
        ValueError: a shape, dtype, device, layout or option is not as above.

    Source: https://arxiv.org/abs/1711.05101 algorithm 2. Memory beyond arguments and results: 24
    KiB.
    """
    _check(grad, master, exp_avg, exp_avg_sq, published, grad_scale)
    _check_numbers(lr, beta1, beta2, eps, weight_decay, step)
    rows = rows_of("published", published)
    name = dispatch.choose(published, backend)
    if name == "reference":
        return AdamwPublish(
            *reference.adamw_publish(
                grad, master, exp_avg, exp_avg_sq, published, lr=lr, beta1=beta1, beta2=beta2,
                eps=eps, weight_decay=weight_decay, step=step, grad_scale=grad_scale,
            )
        )  # fmt: skip
    is_number = not isinstance(grad_scale, Tensor)
    counts, updates = _operator(
        grad.view(-1), master, exp_avg, exp_avg_sq, rows,
        1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1**step),
        1 / math.sqrt(1 - beta2**step), eps, grad_scale if is_number else 1.0,
        None if is_number else grad_scale, name,
    )  # fmt: skip
    return AdamwPublish(*counts.unbind(), *updates.unbind())


def _check(
    grad: Tensor,
    master: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    published: Tensor,
    grad_scale: float | Tensor,
) -> None:
    check_tensor("published", published, FLOATS)
    check_no_grad("published", published)
    check_own_memory("published", published, "pass a tensor of its own")
    if master is None and published.dtype != torch.float32:
        raise ValueError(
            f"master is None, but published is {str(published.dtype).removeprefix('torch.')}, too "
            "coarse to be its own master: pass master=published.float()"
        )
    shape = published.shape
    for name, tensor, dtypes in (
        ("grad", grad, FLOATS),
        ("master", master, FLOAT32),
        ("exp_avg", exp_avg, FLOAT32),
        ("exp_avg_sq", exp_avg_sq, FLOAT32),
    ):
        if tensor is None:
            continue
        check_tensor(name, tensor, dtypes, like=published)
        check_no_grad(name, tensor)
        if tensor.shape != shape and tensor.shape != (published.numel(),):
            raise ValueError(
                f"{name} must be of the shape of published, {tuple(shape)}, or flat, "
                f"({published.numel()},), got {tuple(tensor.shape)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be dense, got strides {tensor.stride()}: "
                + (f"pass {name}.contiguous()" if name == "grad" else "allocate it dense")
            )
    if isinstance(grad_scale, Tensor):
        check_tensor("grad_scale", grad_scale, (torch.float32,), (), published)


def _check_numbers(
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


def _update(
    grad: Tensor,
    master: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    published: Tensor,
    decay: float,
    grad_weight: float,
    beta2: float,
    square_weight: float,
    step_size: float,
    root_scale: float,
    eps: float,
    grad_scale: float,
    grad_scale_factor: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if published.numel() == 0:
        return exp_avg.new_zeros(2, dtype=torch.int64), exp_avg.new_zeros(2)
    counts, updates = _fake_update(grad, master, exp_avg)
    dispatch.load(backend).adamw_publish(
        *published.shape, grad, master, exp_avg, exp_avg_sq, published, decay, grad_weight,
        beta2, square_weight, step_size, root_scale, eps, grad_scale, grad_scale_factor,
        exp_avg.new_empty(2 * PARTIALS, dtype=torch.int64), exp_avg.new_empty(2 * PARTIALS),
        counts, updates,
    )  # fmt: skip
    return counts, updates


def _fake_update(grad, master, exp_avg, *_):
    return exp_avg.new_empty(2, dtype=torch.int64), exp_avg.new_empty(2)


_operator = Operator(
    "adamw_publish",
    _update,
    _fake_update,
    mutates=("master", "exp_avg", "exp_avg_sq", "published"),
)
