"""Log-probabilities and entropies of verl from our one pass over the logits.

`logprobs_from_logits_flash_attn` and `logprobs_from_logits_torch_npu` stay as they are: the first
is one kernel, the second runs where ours do not.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from warpo.kernels import ops
from warpo.kernels._checks import as_rows
from warpo.kernels.integrations.serving import require, require_served
from warpo.kernels.integrations.verl._library import library

MODULE = "verl.utils.torch_functional"


@library.replaces(MODULE, "logprobs_from_logits", "logprobs", rounds=True)
def logprobs_from_logits(
    original: Callable, logits: Tensor, labels: Tensor, inplace_backward: bool = True
) -> Tensor:
    """As verl's: with flash-attn float32, with the gradient over the logits, else like the logits.

    Differs: a label outside the vocabulary is no error: NaN, and 0 for -100.
    """
    _require_rows(logits, labels)
    if not _has_flash_attn(original):
        return _logprobs(logits, labels)
    inplace = inplace_backward and not torch.compiler.is_compiling() and logits.is_contiguous()
    return ops.logprobs(_readable(logits), labels, inplace_backward=inplace)


@library.replaces(MODULE, "logprobs_from_logits_naive", "logprobs", rounds=True)
def logprobs_from_logits_naive(original: Callable, logits: Tensor, labels: Tensor) -> Tensor:
    """Differs: a label outside the vocabulary is no error: NaN, and 0 for -100."""
    _require_rows(logits, labels)
    return _logprobs(logits, labels)


@library.replaces(MODULE, "logprobs_from_logits_v2", "logprobs", rounds=True)
def logprobs_from_logits_v2(original: Callable, logits: Tensor, labels: Tensor) -> Tensor:
    """Differs: a label outside the vocabulary is no error: NaN, and 0 for -100."""
    _require_rows(logits, labels)
    return _logprobs(logits, labels)


@library.replaces(MODULE, "entropy_from_logits", "logprobs_and_entropy", rounds=True)
def entropy_from_logits(original: Callable, logits: Tensor) -> Tensor:
    """Differs: a logit of -inf has probability 0 and adds nothing, where verl gives NaN."""
    _require_rows(logits)
    return _entropy(logits).to(logits.dtype)


@library.replaces(MODULE, "entropy_from_logits_with_chunking", "logprobs_and_entropy", rounds=True)
def entropy_from_logits_with_chunking(
    original: Callable, logits: Tensor, chunk_size: int = 2048
) -> Tensor:
    """No chunks: the pass needs 8 bytes per row. Differs as `entropy_from_logits`."""
    require(logits.dim() == 2, "logits that are not (N, V)")
    _require_rows(logits)
    return _entropy(logits).to(torch.get_default_dtype())


def _require_rows(logits: Tensor, labels: Tensor | None = None) -> None:
    require_served(logits)
    require(logits.dim() >= 2, "logits of one row")
    if labels is not None:
        require(labels.shape == logits.shape[:-1], "labels that are not one per row of logits")
        require(labels.dtype == torch.int64, "labels that are not int64")


def _has_flash_attn(original: Callable) -> bool:
    available = original.__globals__["FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE"]
    return available and os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") != "1"


def _readable(logits: Tensor) -> Tensor:
    """The logits, copied if their strides are not those that the kernels read."""
    if logits.stride(-1) != 1:
        return logits.contiguous()
    try:
        as_rows("logits", logits, keep=1)
    except ValueError:
        return logits.contiguous()
    return logits


def _logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    return ops.logprobs(_readable(logits), labels).to(logits.dtype)


def _entropy(logits: Tensor) -> Tensor:
    any_target = logits.new_zeros((), dtype=torch.int64).expand(logits.shape[:-1])
    return ops.logprobs_and_entropy(_readable(logits), any_target).entropy
