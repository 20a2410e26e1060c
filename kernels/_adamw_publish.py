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

With a seed, bfloat16 moments, and bfloat16 weights that have no master, are rounded
stochastically: x between the neighbours a < b in magnitude becomes b with probability
(x - a) / (b - a), so its expectation is x and a step far below the last place counts.

    published | m | v = the upper 16 of the 32 bits of (x + r),  r the bits 0-15 | 16-31 | 32-47 of
    mix(mix(mix(c (seed + 1)) + c step) + c (i + 1)),  c = 0x9e3779b97f4a7c15

i is the position in row-major order and mix that of `fingerprint`: the same numbers on every
backend, for any number of threads. Source: Gupta et al., "Deep learning with limited numerical
precision", https://arxiv.org/abs/1502.02551 section 3.

Measured after 1000 steps of a 32-128-1 network on a regression task (lr 1e-3, beta2 0.999, batches
of 256, mean of 5 seeds): distance of the weights from those of float32 AdamW, as a share of the way
that these have gone, and the loss above theirs. Bytes are those of weight, master and moments.

    weights            master    moments            bytes  distance  loss
    float32            -         float32               12       0 %   0 %
    float32            -         bfloat16, seed         8     1.1 %   0.0 %
    float32            -         bfloat16, nearest      8     5.5 %   3.4 %
    bfloat16           float32   float32               14     0.2 %   0.0 %
    bfloat16           float32   bfloat16, seed        10     1.1 %   0.0 %
    bfloat16           float32   bfloat16, nearest     10     5.5 %   3.4 %
    bfloat16, seed     -         float32               10    13.3 %   0.1 %
    bfloat16, seed     -         bfloat16, seed         6    13.3 %   0.1 %
    bfloat16, nearest  -         bfloat16, nearest      6      66 %    53 %  (refused)
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from warpo.kernels import dispatch, reference
from warpo.kernels._arguments.adamw_publish import AdamwPublishArguments
from warpo.kernels._checks import FLOATS, check_no_grad, check_own_memory, check_tensor
from warpo.kernels._fingerprint import PARTIALS, rows_of
from warpo.kernels._registration import Operator

FLOAT32 = FLOATS[:1]
MOMENTS = FLOATS[:2]


class AdamwPublishInputs(NamedTuple):
    grad: Tensor
    master: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    published: Tensor
    decay: float
    grad_weight: float
    beta2: float
    square_weight: float
    step_size: float
    root_scale: float
    eps: float
    grad_scale: float
    grad_scale_factor: Tensor | None
    seed: int | None
    step: int
    backend: str


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
    seed: int | None = None,
    backend: str | None = None,
) -> AdamwPublish:
    """One optimizer step of one parameter; changes master, exp_avg, exp_avg_sq and published.

    A NaN or infinite gradient makes its weight NaN, as in torch.optim.AdamW: check the gradient
    norm before the step. The tensors must not overlap. Not differentiable.

    Args:
        grad: float32 | bfloat16 | float16, dense, of the shape of published or flat. Only read.
        master: float32 weights, dense, of the shape of published or flat. None: published is its
            own master: float32, or bfloat16 with a seed.
        exp_avg, exp_avg_sq: float32 | bfloat16, both alike, dense, of the shape of published or
            flat: the moments, 0 before the first step. They are updated in float32 and rounded.
        published: bfloat16 | float16 | float32: dense, or rows of any stride whose last dimension
            is dense. With a master its old values are read for the counts only.
        lr: learning rate.
        beta1, beta2: decay of the moments, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled: w is multiplied with 1 - lr weight_decay.
        step: number of this step, 1 for the first.
        grad_scale: what grad is multiplied with: a number, or a float32 scalar tensor on the
            device, as a clip coefficient is.
        seed: in [0, 2^63): round bfloat16 moments, and a bfloat16 published without a master,
            stochastically, with random numbers of seed, step and position. Each parameter needs a
            seed of its own. None: to nearest, ties to even. A bfloat16 exp_avg_sq then stays where
            it is once (1 - beta2) |g^2 / v - 1| < 2^-9, which for beta2 = 0.999 is most of the
            time.
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
    _check_seed(master, exp_avg, published, seed)
    _check_numbers(lr, beta1, beta2, eps, weight_decay, step)
    rows = rows_of("published", published)
    name = dispatch.choose(published, backend)
    if name == "reference":
        return AdamwPublish(
            *reference.adamw_publish(
                grad,
                master,
                exp_avg,
                exp_avg_sq,
                published,
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                eps=eps,
                weight_decay=weight_decay,
                step=step,
                grad_scale=grad_scale,
                seed=seed,
            )
        )
    inputs = AdamwPublishInputs(
        grad=grad,
        master=master,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        published=rows,
        decay=1 - lr * weight_decay,
        grad_weight=1 - beta1,
        beta2=beta2,
        square_weight=1 - beta2,
        step_size=lr / (1 - beta1**step),
        root_scale=1 / math.sqrt(1 - beta2**step),
        eps=eps,
        grad_scale=1.0 if isinstance(grad_scale, Tensor) else grad_scale,
        grad_scale_factor=grad_scale if isinstance(grad_scale, Tensor) else None,
        seed=seed,
        step=step,
        backend=name,
    )
    counts, updates = _operator(inputs)
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
    shape = published.shape
    for name, tensor, dtypes in (
        ("grad", grad, FLOATS),
        ("master", master, FLOAT32),
        ("exp_avg", exp_avg, MOMENTS),
        ("exp_avg_sq", exp_avg_sq, (exp_avg.dtype,)),
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


def _check_seed(
    master: Tensor | None, exp_avg: Tensor, published: Tensor, seed: int | None
) -> None:
    own = master is None and published.dtype != torch.float32
    if own and (seed is None or published.dtype != torch.bfloat16):
        raise ValueError(
            f"master is None, but published is {str(published.dtype).removeprefix('torch.')}, too "
            "coarse to be its own master: pass master=published.float()"
            + (", or a seed for stochastic rounding" if published.dtype == torch.bfloat16 else "")
        )
    if seed is None:
        return
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2^63), got {seed}")
    if not own and exp_avg.dtype == torch.float32:
        raise ValueError(
            f"seed = {seed} would have no effect: the moments are float32, and published "
            f"{'is float32' if master is None else 'has a master'}; pass seed=None"
        )


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


def _update(inputs: AdamwPublishInputs) -> tuple[Tensor, Tensor]:
    counts, updates = _allocate(inputs)
    if inputs.published.numel() == 0:
        return counts.zero_(), updates.zero_()
    rows, columns = inputs.published.shape
    arguments = AdamwPublishArguments(
        rows=rows,
        columns=columns,
        grad=inputs.grad,
        master=inputs.master,
        exp_avg=inputs.exp_avg,
        exp_avg_sq=inputs.exp_avg_sq,
        published=inputs.published,
        decay=inputs.decay,
        grad_weight=inputs.grad_weight,
        beta2=inputs.beta2,
        square_weight=inputs.square_weight,
        step_size=inputs.step_size,
        root_scale=inputs.root_scale,
        eps=inputs.eps,
        grad_scale=inputs.grad_scale,
        grad_scale_factor=inputs.grad_scale_factor,
        stochastic=inputs.seed is not None,
        seed=inputs.seed or 0,
        step=inputs.step,
        partial_counts=counts.new_empty(2 * PARTIALS),
        partial_updates=updates.new_empty(2 * PARTIALS),
        counts=counts,
        updates=updates,
    )
    dispatch.load(inputs.backend).adamw_publish(arguments)
    return counts, updates


def _allocate(inputs: AdamwPublishInputs) -> tuple[Tensor, Tensor]:
    grad = inputs.grad
    return grad.new_empty(2, dtype=torch.int64), grad.new_empty(2, dtype=torch.float32)


_operator = Operator(
    "adamw_publish",
    _update,
    _allocate,
    mutates=("master", "exp_avg", "exp_avg_sq", "published"),
)
