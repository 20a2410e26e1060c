"""Sequences of padded or packed tokens: checks and arguments that the losses share."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from warpo.kernels._arguments.denominator import DenominatorArguments
from warpo.kernels._checks import FLOATS, check_no_grad, check_tensor
from warpo.kernels._offsets import (
    check_offsets,
    check_values,
    first_and_last,
    is_malformed,
    sequence_of_tokens,
    valid_tokens,
)
from warpo.kernels._registration import keeps_graph
from warpo.kernels._symbolic import as_scalar, is_constant
from warpo.kernels.objectives import AGGREGATIONS

# a count comes as an integer
_REALS = (*FLOATS, torch.float64, torch.int64, torch.int32)


def check_sequences(
    name: str, tensor: Tensor, cu_seqlens: Tensor | None, cu_name: str = "cu_seqlens"
) -> int:
    """Number of sequences of a tensor that must be (B, T), or (N,) packed with cu_seqlens."""
    shape = tuple(tensor.shape)
    if cu_seqlens is None:
        if len(shape) != 2:
            raise ValueError(f"{name} must be (B, T), or (N,) together with {cu_name}, got {shape}")
        return shape[0]
    if len(shape) != 1:
        raise ValueError(f"with {cu_name} {name} must be (N,), got {shape}")
    return check_offsets(cu_name, cu_seqlens, tensor)


def as_denominator(denominator: float | Tensor, like: Tensor) -> DenominatorArguments:
    """Checked; a tensor is float32 and on the device of `like`."""
    if isinstance(denominator, Tensor):
        check_tensor("denominator", denominator, _REALS, (), like)
        check_no_grad("denominator", denominator)
        if denominator.dtype != torch.float32:
            denominator = denominator.float()
        return DenominatorArguments(0.0, denominator)
    if not denominator >= 0:
        raise ValueError(f"denominator must be >= 0, got {denominator}")
    # a symbolic one would be a constant as an argument of the operator
    if not isinstance(denominator, (int, float)) or (
        is_dynamo_compiling() and not is_constant(denominator)
    ):
        return DenominatorArguments(0.0, as_scalar(denominator, like))
    return DenominatorArguments(float(denominator), None)


def number_or_tensor(denominator: DenominatorArguments) -> float | Tensor:
    """As a public function takes it."""
    return denominator.number if denominator.tensor is None else denominator.tensor


def denominator_tensor(denominator: DenominatorArguments, like: Tensor) -> Tensor:
    """() float32, as the reference takes it."""
    if denominator.tensor is not None:
        return denominator.tensor
    return as_scalar(denominator.number, like)


def check_aggregation(aggregation: str, denominator: float | Tensor | None) -> None:
    """One of AGGREGATIONS, with a denominator where it has no default."""
    if aggregation not in AGGREGATIONS:
        raise ValueError(
            f"aggregation must be one of {', '.join(AGGREGATIONS)}; got {aggregation!r}"
        )
    if denominator is None and aggregation == "sequence-mean-token-sum-norm":
        raise ValueError(
            "aggregation 'sequence-mean-token-sum-norm' needs "
            "denominator = sequences x a constant length"
        )


def count_denominator(
    denominator: float | Tensor | None,
    aggregation: str,
    like: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    sequences: int,
) -> DenominatorArguments:
    """What an aggregation divides by: the count in this call if it is not given."""
    check_aggregation(aggregation, denominator)
    if denominator is not None:
        return as_denominator(denominator, like)
    if aggregation != "token-mean":
        return as_denominator(sequences, like)
    return _count_tokens(like, mask, cu_seqlens)


def _count_tokens(
    like: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> DenominatorArguments:
    """The valid tokens, of which those of no sequence are none."""
    first, last = 0, like.numel()
    if cu_seqlens is not None:
        known = first_and_last(cu_seqlens)
        if known is not None:
            first, last = known
        elif mask is None:
            return DenominatorArguments(0.0, (cu_seqlens[-1] - cu_seqlens[0]).float())
        else:
            mask = valid_tokens(mask, cu_seqlens, last)
    if mask is None:
        return as_denominator(max(last - first, 0), like)
    if (first, last) != (0, like.numel()):
        mask = mask[first:last]
    # half the time of a sum, and exact past 2^24 tokens
    return DenominatorArguments(0.0, mask.count_nonzero().float())


def empty_results(
    denominator: DenominatorArguments, like: Tensor, metrics: int
) -> tuple[Tensor, Tensor]:
    """Loss () and metrics, float32, on the device of `like`."""
    if denominator.tensor is not None:  # half the time of those with a dtype
        return torch.empty_like(denominator.tensor), denominator.tensor.new_empty(metrics)
    row = like.new_empty(metrics, dtype=torch.float32)
    return row.new_empty(()), row


def empty_float32(like: Tensor) -> Tensor:
    """Contiguous, of its shape and device: half the time of `new_empty` with shape and dtype."""
    return torch.empty_like(like, dtype=torch.float32, memory_format=torch.contiguous_format)


def scaled(gradient: Tensor, grad_loss: Tensor) -> Tensor:
    """The product, in eager mode. By 1 it takes no pass on a CPU, where to look at the factor costs
    little: the saved gradient itself, unless the graph is kept for another backward pass.
    """
    if grad_loss.is_cpu and grad_loss.item() == 1.0 and not keeps_graph():
        return gradient
    return gradient * grad_loss


def of_sequences(
    advantages: Tensor, valid: Tensor, cu_seqlens: Tensor | None, sequence_mean: bool
) -> tuple[Tensor, Tensor | None]:
    """What is one per sequence, for each token: the advantage, and the number of valid tokens.

    Advantages are NaN, and with them all gradients, where malformed offsets are on a GPU.

    Raises:
        ValueError: they are on the CPU.
    """
    checked = check_values("cu_seqlens", cu_seqlens, valid.shape[-1])
    if cu_seqlens is None:
        if advantages.dim() == 1:
            advantages = advantages[:, None].expand(valid.shape)
        if not sequence_mean:
            return advantages, None
        return advantages, valid.sum(1, keepdim=True, dtype=torch.float32).expand(valid.shape)
    per_token = advantages.shape == valid.shape
    if per_token and not sequence_mean and checked:
        return advantages, None
    tokens, sequences = valid.shape[0], cu_seqlens.numel() - 1
    if sequences == 0:
        return valid.new_zeros(tokens, dtype=torch.float32), None
    sequence = sequence_of_tokens(cu_seqlens, tokens)
    if not per_token:
        advantages = advantages[sequence]
    if not checked:
        advantages = torch.where(is_malformed(cu_seqlens, tokens), torch.nan, advantages)
    if not sequence_mean:
        return advantages, None
    before = torch.cat([valid.new_zeros(1, dtype=torch.int64), valid.cumsum(0)])
    ends = before[cu_seqlens.long().clamp(0, tokens)]
    return advantages, ends.diff()[sequence].float()


def spread_packed(sequences: int, cu_seqlens: Tensor | None, *tensors: Tensor | None) -> list:
    """Packed rows [1, N] as the kernels want them: every sequence sees the one row, stride 0."""
    if cu_seqlens is None:
        return list(tensors)
    return [None if x is None else x.expand(sequences, x.shape[1]) for x in tensors]


def merge_moments(metrics: Sequence[Tensor], count: int, first_moment: int) -> Tensor:
    """Metrics vectors of several micro-batches as one: sums, and from column `first_moment` on
    pairs of mean and sum of squared differences from it over the count in column `count`.
    """
    stacked = torch.stack(list(metrics))
    total = stacked.sum(0)
    weight = stacked[:, count, None] / total[count].clamp(min=1)
    mean, m2 = stacked[:, first_moment::2], stacked[:, first_moment + 1 :: 2]
    merged = (weight * mean).sum(0)
    spread = (stacked[:, count, None] * (mean - merged).square()).sum(0)
    total[first_moment::2] = merged
    total[first_moment + 1 :: 2] = m2.sum(0) + spread
    return total
