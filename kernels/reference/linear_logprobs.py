"""Log-probabilities and entropy from hidden states and a linear head, in plain PyTorch."""

import torch
from torch import Tensor

from warpo.kernels.reference.logprobs import logprobs


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(logp, entropy), each `[...]`, of the logits hidden @ weight.T + bias, capped to +-softcap.

    hidden `[..., H]`, weight `[V, H]`, bias `[V]`.
    """
    valid = targets != ignore_index
    if mask is not None:
        valid = valid & mask.bool()
    logits = torch.where(valid[..., None], hidden, 0) @ weight.T
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logprobs(logits, targets, temperature, mask, ignore_index)
