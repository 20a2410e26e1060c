"""Off-policy sequence masking: of sequences that the policy has moved away from, tokens with a
negative advantage have no surrogate.

    M_t = 0 if A_t < 0 and 1/|o| sum_u (log mu(o_u) - log pi(o_u)) > limit, else 1

mu being the policy that drew the sequence. DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, section
on off-policy sequence masking. Each surrogate is proportional to the advantage of its token, so 0
in place of the advantage is M.
"""

import math

import torch
from torch import Tensor

from warpo.kernels._offsets import in_a_sequence, sequence_of_tokens
from warpo.kernels.objectives import Objective


def masks_sequences(objective: Objective, old_logprobs: Tensor | None) -> bool:
    """True if a token may lose its surrogate: with ratios of exactly 1 the KL is 0."""
    moves = old_logprobs is not None or objective.correction != "none"
    return moves and objective.sequence_mask < math.inf


@torch.no_grad()
def mask_sequences(
    objective: Objective,
    logprobs: Tensor,
    old_logprobs: Tensor,
    sampler_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """The advantages, 0 where M is. Padded (B, T) or packed (N,), with advantages a token or a
    sequence.
    """
    drawn = old_logprobs if objective.correction == "none" else sampler_logprobs
    assert drawn is not None
    # float64: in whatever order a device adds, the comparison comes out the same
    difference = drawn.double() - logprobs.double()
    valid = torch.ones_like(difference, dtype=torch.bool) if mask is None else mask != 0
    per_token = advantages.shape == logprobs.shape
    if cu_seqlens is None:
        total = torch.where(valid, difference, 0).sum(1)
        moved = total > objective.sequence_mask * valid.sum(1)
        moved = moved[:, None] if per_token else moved
    else:
        tokens, sequences = logprobs.shape[0], cu_seqlens.numel() - 1
        if sequences == 0:
            return advantages
        valid = valid & in_a_sequence(cu_seqlens, tokens)
        sequence = sequence_of_tokens(cu_seqlens, tokens)
        sums = difference.new_zeros(2, sequences)
        terms = torch.stack([torch.where(valid, difference, 0), valid.double()])
        total, count = sums.index_add(1, sequence, terms)
        moved = total > objective.sequence_mask * count
        moved = moved[sequence] if per_token else moved
    return torch.where(moved & (advantages < 0), 0, advantages)
