"""warpo's kernels inside TRL:

from warpo.kernels.integrations import trl

trl.patch()
"""

from collections.abc import Callable

from torch import Tensor

from warpo.kernels import ops
from warpo.kernels.integrations import trl_policy as _policy  # noqa: F401
from warpo.kernels.integrations.patching import served
from warpo.kernels.integrations.trl_library import library

patch, unpatch, patched, names = library.patch, library.unpatch, library.patched, library.names


@library.replaces("trl.trainer.utils", "selective_log_softmax", "logprobs")
def selective_log_softmax(
    original: Callable,
    logits: Tensor,
    index: Tensor,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> Tensor:
    if index.shape != logits.shape[:-1] or row_mask is not None or not served(logits):
        return original(logits, index, temperature, row_mask)
    return ops.logprobs(logits, index, temperature=temperature).to(logits.dtype)
