"""TRL's log-probabilities and entropies of logits, at their one place in `trl.trainer.utils` and
in the two trainers that sum them over completions.

An index outside the vocabulary gives NaN, where TRL raises on a CPU. Several indices a row are left
to TRL.

Rounding differs: of bfloat16 and float16 logits TRL rounds each step of the computation on a CPU,
where these compute in float32 and round the result. The entropy of 32000 bfloat16 logits is off by
about a fifth as much. `trl.patch(library_rounding=True)` leaves such calls to TRL, to the bit.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from warpo.kernels import ops
from warpo.kernels.integrations.serving import require, require_served
from warpo.kernels.integrations.trl._library import library

# no index is ignored: one that is not in the vocabulary is an error
NONE_IGNORED = torch.iinfo(torch.int64).min


@library.replaces("trl.trainer.utils", "selective_log_softmax", "logprobs", rounds=True)
def selective_log_softmax(
    original: Callable,
    logits: Tensor,
    index: Tensor,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> Tensor:
    """Differs: rows that are masked out may hold NaN or inf, and an empty batch is no error."""
    flags = _check(logits, index, temperature, row_mask)
    logp = ops.logprobs(
        logits, index, temperature=temperature, mask=flags, ignore_index=NONE_IGNORED
    )
    return logp.to(_result_dtype(logits))


@library.replaces("trl.trainer.utils", "entropy_from_logits", "logprobs_and_entropy", rounds=True)
def entropy_from_logits(original: Callable, logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Differs: logits of -inf count for nothing, where TRL gives NaN. `chunk_size` has no effect:
    no softmax is stored.
    """
    _require_rows(logits)
    index = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return ops.logprobs_and_entropy(logits, index).entropy.to(_result_dtype(logits))


@library.replaces(
    "trl.trainer.utils", "selective_log_softmax_and_entropy", "logprobs_and_entropy", rounds=True
)
def selective_log_softmax_and_entropy(
    original: Callable,
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Differs as the two functions above do. One pass gives both results."""
    flags = _check(logits, index, temperature, row_mask)
    logp, entropy = ops.logprobs_and_entropy(
        logits, index, temperature=temperature, mask=flags, ignore_index=NONE_IGNORED
    )
    dtype = _result_dtype(logits)
    return logp.to(dtype), (entropy if entropy_requires_grad else entropy.detach()).to(dtype)


def _check(
    logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None
) -> Tensor | None:
    """One index a row, a temperature that is a number, and a mask like the index, of which TRL
    asks whether it is 0: as bool.
    """
    require(logits.dim() > 1, "logits of one row")
    _require_rows(logits)
    require(index.shape == logits.shape[:-1], "indices that are not one per row")
    require(index.dtype == torch.int64, "indices that are not int64")
    require(index.device == logits.device, "tensors on two devices")
    is_number = isinstance(temperature, int | float) and temperature > 0
    require(is_number, "a temperature that is no number above 0")
    if row_mask is None:
        return None
    require(row_mask.shape == index.shape, "a mask of another shape")
    require(row_mask.device == logits.device, "tensors on two devices")
    return row_mask.bool()


def _require_rows(logits: Tensor) -> None:
    """Rows that need no copy."""
    require_served(logits)
    rows = 1 <= logits.dim() <= 3 and logits.shape[-1] > 0 and logits.stride(-1) == 1
    require(rows, "logits that are not dense rows")


def _result_dtype(logits: Tensor) -> torch.dtype:
    """Type of the logits; TRL's own kernel, which it takes only on CUDA, gives float32."""
    return logits.dtype if logits.device.type == "cpu" else torch.float32
