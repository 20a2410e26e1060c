"""TRL's log-probabilities and entropies of logits, at their one place in `trl.trainer.utils` and
in the two trainers that sum them over answers.

An index outside the vocabulary gives NaN, where TRL raises on a CPU. Several indices a row are left
to TRL.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from warpo.kernels import ops
from warpo.kernels.integrations.patching import as_flags, served
from warpo.kernels.integrations.trl_library import library

# no index is ignored: one that is not in the vocabulary is an error
NONE_IGNORED = torch.iinfo(torch.int64).min


@library.replaces("trl.trainer.utils", "selective_log_softmax", "logprobs")
def selective_log_softmax(
    original: Callable,
    logits: Tensor,
    index: Tensor,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> Tensor:
    """Differs: rows that are masked out may hold NaN or inf, and an empty batch is no error."""
    if not _takes(logits, index, temperature, row_mask):
        return original(logits, index, temperature, row_mask)
    logp = ops.logprobs(
        logits, index, temperature=temperature, mask=as_flags(row_mask), ignore_index=NONE_IGNORED
    )
    return logp.to(_result_dtype(logits))


@library.replaces("trl.trainer.utils", "entropy_from_logits", "logprobs_and_entropy")
def entropy_from_logits(original: Callable, logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Differs: logits of -inf count for nothing, where TRL gives NaN. `chunk_size` has no effect:
    no softmax is stored.
    """
    if not served(logits) or not _has_rows(logits):
        return original(logits, chunk_size)
    index = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return ops.logprobs_and_entropy(logits, index).entropy.to(_result_dtype(logits))


@library.replaces("trl.trainer.utils", "selective_log_softmax_and_entropy", "logprobs_and_entropy")
def selective_log_softmax_and_entropy(
    original: Callable,
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Differs as the two functions above do. One pass gives both results."""
    if not _takes(logits, index, temperature, row_mask):
        return original(logits, index, entropy_requires_grad, temperature, row_mask)
    logp, entropy = ops.logprobs_and_entropy(
        logits, index, temperature=temperature, mask=as_flags(row_mask), ignore_index=NONE_IGNORED
    )
    dtype = _result_dtype(logits)
    return logp.to(dtype), (entropy if entropy_requires_grad else entropy.detach()).to(dtype)


def _takes(logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None) -> bool:
    """Whether it is one index a row, a temperature that is a number, and a mask like the index."""
    return (
        served(logits)
        and logits.dim() > 1
        and _has_rows(logits)
        and index.shape == logits.shape[:-1]
        and index.dtype == torch.int64
        and index.device == logits.device
        and isinstance(temperature, int | float)
        and temperature > 0
        and (
            row_mask is None or (row_mask.shape == index.shape and row_mask.device == logits.device)
        )
    )


def _has_rows(logits: Tensor) -> bool:
    """Whether they are rows that need no copy."""
    return 1 <= logits.dim() <= 3 and logits.shape[-1] > 0 and logits.stride(-1) == 1


def _result_dtype(logits: Tensor) -> torch.dtype:
    """That of the logits; TRL's own kernel, which it takes on CUDA alone, gives float32."""
    return logits.dtype if logits.device.type == "cpu" else torch.float32
