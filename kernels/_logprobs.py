"""Log-probability of each taken token, and the entropy of its distribution, from logits.

With z = logits / T, m = max_j z_j, d = sum_j e^(z_j - m), w = sum_j e^(z_j - m) (z_j - m) and
target y:

    logp    = (z_y - m) - log d                    min with 0
    entropy = log d - w / d

Backward, with p_j = e^(z_j - m) / d, upstream g for logp and h for the entropy:

    d logits_j = (g (1[j = y] - p_j) - h p_j (log p_j + entropy)) / T

One read of the logits and one exponential per element give both results: online softmax,
https://arxiv.org/abs/1805.02867 algorithm 3. Saved for backward: max_j logits_j and log d, 8 bytes
per token.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from warpo.kernels import dispatch, reference
from warpo.kernels._checks import (
    FLOATS,
    as_int64,
    as_rows,
    as_temperature,
    check_mask,
    check_own_memory,
    check_tensor,
)
from warpo.kernels._logprobs_operator import (
    LogprobsInputs,
    logprobs_arguments,
    logprobs_operator,
)
from warpo.kernels._vocab_parallel import VocabParallelLogprobs, check_group


class LogprobsAndEntropy(NamedTuple):
    logprobs: Tensor
    entropy: Tensor


def logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Log-probability of each taken token: logp = (logits / T)[y] - logsumexp(logits / T).

    Args:
        logits: (..., V) float32 | bfloat16 | float16, last stride 1; the leading dimensions may be
            any view that two strides describe, so `logits[:, :-1]` is not copied. -inf is legal.
            Differentiable.
        targets: (...) int64 | int32 in [0, V); int32 is converted, 8 bytes per token. A target
            outside poisons its row with NaN; nothing is synchronised to find out.
        temperature: finite and > 0: a number, a () float32 on the device, or one float32 per token.
            Not differentiable. What is on the device is not looked at: a token whose temperature is
            not finite and > 0 gets NaN, result and gradient.
        mask: (...) bool | uint8. Where 0, the logits are not read (they may hold NaN), the result
            is 0 and the gradient 0.
        ignore_index: a target of this value counts as masked.
        inplace_backward: write the gradient over the logits, which saves their size in memory. The
            logits are then gone: a second backward raises, and so does the backward of whatever
            else has saved them. Eager mode only.
        process_group: the vocabulary is split over its ranks in equal parts: logits are those of
            this rank, (..., V / ranks), in the order of the ranks; targets index the whole
            vocabulary. Every rank gets the same results. Four numbers per token travel. Eager mode
            only.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        (...) float32, natural log, <= 0. Differentiable twice and more often (create_graph=True),
            then in plain PyTorch, with temporaries of the size of the logits.

    Raises:
        ValueError: a shape, dtype, stride, device or option is not as above.
        RuntimeError: forward mode or a transform of torch.func, which are not computed; a second
            derivative with inplace_backward or process_group.

    Source: https://arxiv.org/abs/1805.02867. Memory beyond the arguments: 12 bytes per token
    forward; the size of the logits backward, nothing with inplace_backward.
    """
    return _run(
        logits,
        targets,
        temperature,
        mask=mask,
        ignore_index=ignore_index,
        with_entropy=False,
        inplace_backward=inplace_backward,
        process_group=process_group,
        backend=backend,
    )[0]


def logprobs_and_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> LogprobsAndEntropy:
    """`logprobs` and, from the same pass, the entropy H = -sum_j p_j log p_j of softmax(logits /
    T).

    Arguments and errors are those of `logprobs`. Both results are differentiable.

    Returns:
        logprobs: (...) float32, natural log, <= 0.
        entropy: (...) float32, nats, >= 0 up to rounding. 0 where masked, NaN where the target is
            out of range.
    """
    results = _run(
        logits,
        targets,
        temperature,
        mask=mask,
        ignore_index=ignore_index,
        with_entropy=True,
        inplace_backward=inplace_backward,
        process_group=process_group,
        backend=backend,
    )
    return LogprobsAndEntropy(*results)


def _run(
    logits: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    *,
    mask: Tensor | None,
    ignore_index: int,
    with_entropy: bool,
    inplace_backward: bool,
    process_group: ProcessGroup | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    shape, targets, temperature = check_logits(logits, targets, temperature, mask)
    name = dispatch.choose(logits, backend)
    if name == "reference":
        if inplace_backward or process_group is not None:
            raise ValueError(
                "inplace_backward and process_group are not supported by backend 'reference'"
            )
        logp, entropy = reference.logprobs(logits.float(), targets, temperature, mask, ignore_index)
        return logp, entropy
    if inplace_backward:
        check_inplace(logits)
    token_temperature = None
    if isinstance(temperature, Tensor):
        token_temperature, temperature = as_rows("temperature", temperature), 1.0
    inputs = LogprobsInputs(
        logits=as_rows("logits", logits, keep=1),
        targets=as_rows("targets", targets),
        temperature=temperature,
        token_temperature=token_temperature,
        mask=None if mask is None else as_rows("mask", mask),
        ignore_index=ignore_index,
        with_entropy=with_entropy,
        inplace_backward=inplace_backward,
        backend=name,
    )
    if process_group is not None:
        check_group(process_group)
        logp, entropy = VocabParallelLogprobs.apply(
            inputs.logits,
            logprobs_arguments(inputs),
            inplace_backward,
            dispatch.load(name),
            process_group,
        )
        return logp.view(shape), entropy.view(shape)
    logp, entropy, _ = logprobs_operator(inputs)
    return logp.view(shape), entropy.view(shape) if with_entropy else entropy


def check_logits(
    logits: Tensor, targets: Tensor, temperature: float | Tensor, mask: Tensor | None
) -> tuple[torch.Size, Tensor, float | Tensor]:
    """Shape of a result, and targets and temperature as the kernels take them."""
    check_tensor("logits", logits, FLOATS)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be (..., V) with V >= 1, got {tuple(logits.shape)}")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(
            f"the last stride of logits must be 1, got strides {logits.stride()}: "
            "pass logits.contiguous()"
        )
    shape = logits.shape[:-1]
    targets = as_int64("targets", targets, shape, logits)
    check_mask("mask", mask, shape, logits)
    return shape, targets, as_temperature(temperature, shape, logits)


def check_inplace(logits: Tensor) -> None:
    if torch.compiler.is_compiling():
        raise ValueError(
            "inplace_backward is not supported under torch.compile: leave it False there"
        )
    check_own_memory("logits", logits, "pass logits.contiguous() or inplace_backward=False")
