"""Log-probabilities and entropy from logits, in plain PyTorch."""

import torch
from torch import Tensor


def logprobs(
    logits: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """(logp, entropy), each `[...]` for logits `[..., V]`, of the distribution softmax(logits /
    temperature).
    """
    vocab = logits.shape[-1]
    valid = targets != ignore_index
    if mask is not None:
        valid = valid & mask.bool()
    inside = (targets >= 0) & (targets < vocab)
    known = inside  # of the vocabulary
    z = torch.where(valid[..., None], logits, 0)
    if isinstance(temperature, Tensor):
        z = z / torch.where(valid, temperature, 1)[..., None]
    else:
        z = z / temperature
    # the maximum is a constant shift: it needs no gradient, and detaching it keeps ties exact
    z = z - z.detach().amax(-1, keepdim=True)
    log_total = z.logsumexp(-1)
    chosen = z.gather(-1, torch.where(valid & known, targets, 0)[..., None]).squeeze(-1)
    logp = (chosen - log_total).clamp(max=0)
    finite = torch.where(z == -torch.inf, 0, z)
    entropy = log_total - (torch.softmax(z, -1) * finite).sum(-1)
    if isinstance(temperature, Tensor):
        inside = inside & (temperature > 0) & (temperature < torch.inf)
    # a factor, which poisons the gradient too
    poison = torch.where(inside | ~valid, 1.0, torch.nan).to(z.dtype)
    return torch.where(valid, logp * poison, 0), torch.where(valid, entropy * poison, 0)
