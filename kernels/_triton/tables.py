"""Lists of tensors for a kernel: a table of addresses and numbers on the device, a row a tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor


def send(
    rows: Sequence[Sequence[float]], dtype: torch.dtype, operation: str, like: Tensor
) -> Tensor:
    """The rows on the device of `like`: copied in the order of the stream, the host does not wait.

    Raises:
        RuntimeError: the stream is captured. A replay would read the host's memory again, which
            holds something else by then.
    """
    if not like.is_cuda:
        return torch.tensor(rows, dtype=dtype)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{operation}: the backend 'triton' sends a table of addresses, which a CUDA graph "
            "cannot capture: use backend='cuda'"
        )
    table = torch.tensor(rows, dtype=dtype, pin_memory=True)
    return table.to(like.device, non_blocking=True)
