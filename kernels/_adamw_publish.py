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
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpo.kernels import dispatch, reference
from warpo.kernels._adamw_checks import (
    are_plain,
    check_lengths,
    check_numbers,
    check_seed,
    check_tensors,
)
from warpo.kernels._arguments.adamw_publish import AdamwPublishArguments, AdamwTensorArguments
from warpo.kernels._checks import check_tensor
from warpo.kernels._fingerprint import rows_of
from warpo.kernels._registration import Operator

# csrc/math/tiles.h: partial results of a tensor at most
PARTIALS = 1024


class AdamwPublishInputs(NamedTuple):
    """Lists with an entry a tensor, but for `masters`: those that there are, at `master_places`,
    which is -1 for a tensor without.
    """

    grads: list[Tensor]
    masters: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    published: list[Tensor]
    master_places: list[int]
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_scale: float
    grad_scale_factor: Tensor | None
    stochastic: bool
    seeds: list[int]
    steps: list[int]
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
    KiB; with Triton 96 bytes more, and no capture into a CUDA graph.
    """
    tensors = (grad, master, exp_avg, exp_avg_sq, published)
    check_tensors(("grad", "master", "exp_avg", "exp_avg_sq", "published"), tensors)
    check_seed("published", tensors, seed)
    rows = rows_of("published", published)
    check_numbers(lr, beta1, beta2, eps, weight_decay, step)
    scale, factor = _scales(grad_scale, published)
    counts, updates = _run(
        AdamwPublishInputs(
            grads=[grad],
            masters=[] if master is None else [master],
            exp_avgs=[exp_avg],
            exp_avg_sqs=[exp_avg_sq],
            published=[rows],
            master_places=[-1 if master is None else 0],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            grad_scale=scale,
            grad_scale_factor=factor,
            stochastic=seed is not None,
            seeds=[seed or 0],
            steps=[step],
            backend=dispatch.choose(published, backend),
        )
    )
    return AdamwPublish(*counts.squeeze(1).unbind(), *updates.squeeze(1).unbind())


def adamw_publish_foreach(
    grads: Sequence[Tensor],
    masters: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    published: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    steps: Sequence[int],
    grad_scale: float | Tensor = 1.0,
    seeds: Sequence[int] | None = None,
    backend: str | None = None,
) -> AdamwPublish:
    """One optimizer step of many parameters: `adamw_publish` of each, bit for bit, in a few
    launches for all of them.

    Args:
        grads, masters, exp_avgs, exp_avg_sqs, published: an entry for each parameter, at least
            one, as `adamw_publish` takes it, all on one device; dtypes may differ.
        steps: for each parameter the number of its step.
        seeds: for each parameter a seed of its own; None: round to nearest.
        lr, beta1, beta2, eps, weight_decay, grad_scale, backend: as in `adamw_publish`, of all.

    Returns:
        As `adamw_publish`, each (parameters,).

    Raises:
        ValueError: as `adamw_publish`, with the place of the parameter; or a list has another
            length than published.

    Memory beyond arguments and results: at most 24 KiB a parameter; with Triton 96 bytes more, and
    no capture into a CUDA graph.
    """
    lists = (list(grads), list(masters), list(exp_avgs), list(exp_avg_sqs), list(published))
    steps = list(steps)
    check_lengths(lists, steps, seeds)
    check_numbers(lr, beta1, beta2, eps, weight_decay, min(steps))
    if not are_plain(lists, seeds):
        names = ("grads", "masters", "exp_avgs", "exp_avg_sqs", "published")
        for i, tensors in enumerate(zip(*lists, strict=True)):
            check_tensors([f"{x}[{i}]" for x in names], tensors, like=published[0])
            check_seed(f"published[{i}]", tensors, None if seeds is None else seeds[i])
            lists[4][i] = rows_of(f"published[{i}]", published[i])
    scale, factor = _scales(grad_scale, published[0])
    held = [x for x in lists[1] if x is not None]
    places = range(len(held)) if len(held) == len(steps) else _places(lists[1])
    counts, updates = _run(
        AdamwPublishInputs(
            grads=lists[0],
            masters=held,
            exp_avgs=lists[2],
            exp_avg_sqs=lists[3],
            published=lists[4],
            master_places=list(places),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            grad_scale=scale,
            grad_scale_factor=factor,
            stochastic=seeds is not None,
            seeds=[0] * len(steps) if seeds is None else list(seeds),
            steps=steps,
            backend=dispatch.choose(published[0], backend),
        )
    )
    return AdamwPublish(*counts.unbind(), *updates.unbind())


def _scales(grad_scale: float | Tensor, like: Tensor) -> tuple[float, Tensor | None]:
    """The part of grad_scale that is a number, and the one on the device."""
    if not isinstance(grad_scale, Tensor):
        return grad_scale, None
    check_tensor("grad_scale", grad_scale, (torch.float32,), (), like)
    return 1.0, grad_scale


def _places(masters: Sequence[Tensor | None]) -> list[int]:
    places, count = [], 0
    for master in masters:
        places.append(-1 if master is None else count)
        count += master is not None
    return places


def _run(inputs: AdamwPublishInputs) -> tuple[Tensor, Tensor]:
    return _reference(inputs) if inputs.backend == "reference" else _operator(inputs)


def _by_parameter(inputs: AdamwPublishInputs) -> Iterator[tuple[Any, ...]]:
    """grad, master, exp_avg, exp_avg_sq, published, seed and step of each."""
    masters = [inputs.masters[place] if place >= 0 else None for place in inputs.master_places]
    moments = inputs.exp_avgs, inputs.exp_avg_sqs
    numbers = inputs.seeds, inputs.steps
    return zip(inputs.grads, masters, *moments, inputs.published, *numbers, strict=True)


def _reference(inputs: AdamwPublishInputs) -> tuple[Tensor, Tensor]:
    scale = inputs.grad_scale if inputs.grad_scale_factor is None else inputs.grad_scale_factor
    results = [
        reference.adamw_publish(
            *tensors,
            lr=inputs.lr,
            beta1=inputs.beta1,
            beta2=inputs.beta2,
            eps=inputs.eps,
            weight_decay=inputs.weight_decay,
            step=step,
            grad_scale=scale,
            seed=seed if inputs.stochastic else None,
        )
        for *tensors, seed, step in _by_parameter(inputs)
    ]
    stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
    return torch.stack(stacked[:2]), torch.stack(stacked[2:])


def _update(inputs: AdamwPublishInputs) -> tuple[Tensor, Tensor]:
    counts, updates = _allocate(inputs)
    # most parameters have taken as many steps
    sizes = {step: inputs.lr / (1 - inputs.beta1**step) for step in set(inputs.steps)}
    scales = {step: 1 / math.sqrt(1 - inputs.beta2**step) for step in sizes}
    tensors = [
        AdamwTensorArguments(
            published=published,
            grad=grad,
            master=master,
            exp_avg=exp_avg,
            exp_avg_sq=exp_avg_sq,
            step_size=sizes[step],
            root_scale=scales[step],
            seed=seed,
            step=step,
        )
        for grad, master, exp_avg, exp_avg_sq, published, seed, step in _by_parameter(inputs)
    ]
    partials = 2 * PARTIALS * len(inputs.steps)
    arguments = AdamwPublishArguments(
        tensors=tensors,
        decay=1 - inputs.lr * inputs.weight_decay,
        grad_weight=1 - inputs.beta1,
        beta2=inputs.beta2,
        square_weight=1 - inputs.beta2,
        eps=inputs.eps,
        grad_scale=inputs.grad_scale,
        grad_scale_factor=inputs.grad_scale_factor,
        stochastic=inputs.stochastic,
        partial_counts=counts.new_empty(partials),
        partial_updates=updates.new_empty(partials),
        counts=counts,
        updates=updates,
    )
    dispatch.load(inputs.backend).adamw_publish(arguments)
    return counts, updates


def _allocate(inputs: AdamwPublishInputs) -> tuple[Tensor, Tensor]:
    like, shape = inputs.grads[0], (2, len(inputs.grads))
    return like.new_empty(shape, dtype=torch.int64), like.new_empty(shape, dtype=torch.float32)


_operator = Operator(
    "adamw_publish",
    _update,
    _allocate,
    mutates=("masters", "exp_avgs", "exp_avg_sqs", "published"),
)
