"""Log-probability and entropy of the taken tokens from hidden states and the linear head, with no
tensor of tokens x vocabulary.

    logits  = hidden @ weight.T + bias, with a soft cap c: c tanh(logits / c)
    logp    = (logits / T)_y - logsumexp(logits / T)
    entropy = -sum_j p_j log p_j,   p = softmax(logits / T)

Backward, with G = d loss / d logits as `logprobs` gives it, times 1 - (logits / c)^2 under a cap:

    d hidden = G weight,   d weight = G.T hidden,   d bias = sum over tokens of G

Tokens go through in chunks. Where the logits of all tokens fit in workspace_bytes they are kept for
the backward pass, which writes their gradients over them, or on a GPU, where these are rounded to
the dtype of hidden, beside them: three matrix products. Otherwise the backward pass computes the
logits of a chunk anew: four.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from warpo.kernels import dispatch, reference
from warpo.kernels._linear_head import check_head
from warpo.kernels._linear_head_plan import check_chunking
from warpo.kernels._linear_logprobs_operator import LinearLogprobsInputs, linear_logprobs_operator
from warpo.kernels._logprobs import LogprobsAndEntropy
from warpo.kernels._vocab_parallel import check_group


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    num_valid: int | None = None,
    workspace_bytes: int | None = None,
    logits_dtype: str = "float32",
    cache_logits: bool | None = None,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Log-probability of each taken token under softmax(cap(hidden @ weight.T + bias) / T).

    Args:
        hidden: (..., H) float32 | bfloat16 | float16, last stride 1; the leading dimensions may be
            any view that two strides describe, so `hidden[:, :-1]` is not copied. Differentiable.
        weight: (V, H) in the dtype of hidden, last stride 1. Differentiable; its gradient is dense,
            summed in float32 over all tokens and rounded once. On a GPU, and in bfloat16 on a CPU
            with AVX512_BF16, the gradients of the logits are rounded to that dtype before.
        targets: (...) int64 | int32 in [0, V). A target outside poisons its token with NaN.
        bias: (V,) float32 | bfloat16 | float16. Differentiable.
        temperature: finite and > 0: a number, a () float32 on the device, or one float32 per token.
            Not differentiable. What is on the device is not looked at: a token whose temperature is
            not finite and > 0 gets NaN, result and gradient.
        mask: (...) bool | uint8. Where 0, the hidden state counts for nothing (it may hold NaN):
            result and gradient are 0, and the token takes no part in the matrix products.
        ignore_index: a target of this value counts as masked.
        softcap: c > 0 of c tanh(logits / c), before the temperature.
        num_valid: CUDA only: an upper bound, known to the host, of the number of tokens that count.
            Without it masked tokens are multiplied too, since to count them would stop the host. A
            bound too low leaves NaN at the tokens that it cut off. The CPU counts for itself.
        workspace_bytes: room for the chunks, by default 64 MiB on a CPU, and a sixteenth of the
            memory of a GPU, 4 GiB at most. At least one token is taken at a time.
        logits_dtype: "float32", or "input": the logits of a chunk rounded to the dtype of hidden,
            half the room, and what a head of that dtype would give.
        cache_logits: keep the logits for backward: tokens x V elements, masked ones included, for
            one matrix product less. None: where they fit in workspace_bytes.
        process_group: the vocabulary is split over its ranks in equal parts: weight and bias are
            those of this rank, hidden and targets are the same on all. Each rank gets the same
            results and the whole gradient of hidden, with a collective a chunk forward and one
            backward: hidden must not be summed over the ranks again. Eager mode only.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        (...) float32, natural log, <= 0.

    Raises:
        ValueError: a shape, dtype, stride, device or option is not as above.

    Source: online softmax, https://arxiv.org/abs/1805.02867. Memory beyond arguments and results:
    workspace_bytes and 16 bytes per token; backward, 4 V H bytes for the gradient of a weight that
    is not float32, on a GPU where the gradients of the logits of all tokens do not fit
    workspace_bytes (8192 tokens of a vocabulary of 151936 take 3.2 GB); and workspace_bytes beside
    kept logits that are not overwritten, as with a softcap, in a graph that is kept, and on a GPU
    where they are float32 and hidden is not.
    """
    return _run(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        mask=mask,
        ignore_index=ignore_index,
        softcap=softcap,
        num_valid=num_valid,
        workspace_bytes=workspace_bytes,
        logits_dtype=logits_dtype,
        with_entropy=False,
        cache_logits=cache_logits,
        process_group=process_group,
        backend=backend,
    )[0]


def linear_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    num_valid: int | None = None,
    workspace_bytes: int | None = None,
    logits_dtype: str = "float32",
    cache_logits: bool | None = None,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> LogprobsAndEntropy:
    """`linear_logprobs` and, from the same pass, the entropy of the distribution, in nats.

    Arguments and errors are those of `linear_logprobs`. Both results are differentiable.
    """
    results = _run(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        mask=mask,
        ignore_index=ignore_index,
        softcap=softcap,
        num_valid=num_valid,
        workspace_bytes=workspace_bytes,
        logits_dtype=logits_dtype,
        with_entropy=True,
        cache_logits=cache_logits,
        process_group=process_group,
        backend=backend,
    )
    return LogprobsAndEntropy(*results)


def _run(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    mask: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    num_valid: int | None,
    workspace_bytes: int | None,
    logits_dtype: str,
    with_entropy: bool,
    cache_logits: bool | None,
    process_group: ProcessGroup | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    rows, targets, temperature = check_head(
        hidden, weight, bias, targets, temperature, mask, softcap
    )
    chunking = check_chunking(hidden, num_valid, workspace_bytes, logits_dtype)
    name = dispatch.choose(hidden, backend)
    if name == "reference":
        if process_group is not None:
            raise ValueError("process_group is not supported by backend 'reference'")
        return reference.linear_logprobs(
            hidden.float(),
            weight.float(),
            targets,
            temperature,
            mask,
            ignore_index,
            bias=None if bias is None else bias.float(),
            softcap=softcap,
        )
    if process_group is not None:
        check_group(process_group)
    token_temperature = None
    if isinstance(temperature, Tensor):
        token_temperature, temperature = temperature.reshape(-1), 1.0
    inputs = LinearLogprobsInputs(
        hidden=rows,
        weight=weight,
        bias=bias,
        targets=targets.reshape(-1),
        temperature=temperature,
        token_temperature=token_temperature,
        mask=None if mask is None else mask.reshape(-1),
        ignore_index=ignore_index,
        softcap=softcap or 0.0,
        num_valid=chunking[0],
        workspace_bytes=chunking[1],
        float32_logits=chunking[2],
        with_entropy=with_entropy,
        cache_logits=_keeps_logits(cache_logits, rows, weight, bias, *chunking[1:]),
        backend=name,
        group_name="" if process_group is None else process_group.group_name,
    )
    logp, entropy = linear_logprobs_operator(inputs)
    shape = targets.shape
    return logp.view(shape), entropy.view(shape) if with_entropy else entropy


def _keeps_logits(
    asked: bool | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    workspace_bytes: int,
    float32_logits: bool,
) -> bool:
    differentiable = any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    if not (differentiable and torch.is_grad_enabled()):
        return False
    if asked is not None:
        return asked
    rows, steps, _ = hidden.shape
    itemsize = 4 if float32_logits else hidden.dtype.itemsize
    return rows * steps * weight.shape[0] * itemsize <= workspace_bytes
