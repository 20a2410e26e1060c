"""Log-probabilities over a kept set of ids, in plain PyTorch."""

import torch
from torch import Tensor

from warpo.kernels.reference.sequences import sequence_of


def kept_set_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    kept_ids: Tensor,
    kept_offsets: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """logp `[N]`: the logits of all ids, with those that a token does not keep at -inf.

    0 for a token that keeps none; NaN where the target is not kept or an id is out of range.
    """
    tokens, vocab = hidden.shape[0], weight.shape[0]
    counts = kept_offsets.diff()
    rows, of_token = sequence_of(kept_offsets, kept_ids.numel())
    rows, kept_ids = rows[of_token], kept_ids[of_token]
    inside = (kept_ids >= 0) & (kept_ids < vocab)
    kept = torch.zeros(tokens, vocab, dtype=torch.bool, device=hidden.device)
    kept[rows[inside], kept_ids[inside].long()] = True
    some = counts > 0
    z = torch.where(some[:, None], hidden, 0) @ weight.T
    if bias is not None:
        z = z + bias
    scale = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    # an empty set keeps all: its result is replaced below, its gradient stays finite
    z = torch.where(kept | ~some[:, None], z / scale, -torch.inf)
    known = (targets >= 0) & (targets < vocab)
    target = torch.where(known, targets, 0)[:, None]
    legal = known & kept.gather(1, target)[:, 0]
    legal[rows[~inside]] = False
    if isinstance(temperature, Tensor):
        legal &= (temperature > 0) & (temperature < torch.inf)
    logp = z.log_softmax(-1).gather(1, torch.where(legal[:, None], target, z.argmax(1)[:, None]))
    # a factor, which poisons the gradient too
    poison = torch.where(legal | ~some, 1.0, torch.nan).to(z.dtype)
    return torch.where(some, logp[:, 0].clamp(max=0) * poison, 0)
