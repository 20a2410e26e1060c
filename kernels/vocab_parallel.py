"""logprobs and entropy of logits whose vocabulary is split over the ranks of a process group.

Each rank reduces its part r of the vocabulary to m_r = max x / T, d_r = sum e^(x / T - m_r) and its
entropy H_r. With m = max_r m_r and w_r = d_r e^(m_r - m) / d, the share of the probability:

    log d   = log sum_r d_r e^(m_r - m)
    entropy = sum_r w_r (H_r - log w_r)

so four numbers a token travel, in one collective. The backward pass needs none: given m, log d and
the entropy of the whole vocabulary, the gradient of a part is that of `logprobs`.
"""

from typing import Any

import torch
from torch import Tensor, distributed

from warpo.kernels.checks import as_plain, check_unspent
from warpo.kernels.registration import check_first_order, check_transforms

_NAME = "logprobs with process_group"
# temperature, token_temperature, mask, ignore_index
Arguments = tuple[float, Tensor | None, Tensor | None, int]


class VocabParallelLogprobs(torch.autograd.Function):
    """logprobs and entropy, `[rows, steps]`, from this rank's logits `[rows, steps, V / ranks]`."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        arguments: Arguments,
        inplace: bool,
        backend: Any,
        group: distributed.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        check_transforms(_NAME, (logits,))
        logp, entropy, stats = split_forward(logits, targets, arguments, backend, group)
        temperature, token_temperature, mask, ignore_index = arguments
        ctx.save_for_backward(logits, targets, token_temperature, mask, entropy, stats)
        ctx.constants = (temperature, ignore_index)
        ctx.inplace, ctx.backend, ctx.group, ctx.spent = inplace, backend, group, False
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> Any:
        check_first_order(_NAME)
        check_unspent(ctx.spent)
        logits, targets, token_temperature, mask, entropy, stats = ctx.saved_tensors
        temperature, ignore_index = ctx.constants
        if (grad_logp is None and grad_entropy is None) or not targets.numel():
            return (None if targets.numel() else torch.zeros_like(logits),) + (None,) * 5
        ctx.spent = ctx.inplace
        grad_logits = logits.detach() if ctx.inplace else torch.empty_like(logits)
        grad_logp = None if grad_logp is None else as_plain(grad_logp)
        grad_entropy = None if grad_entropy is None else as_plain(grad_entropy)
        split_backward(
            logits.detach(), targets, (temperature, token_temperature, mask, ignore_index),
            entropy, stats, grad_logp, grad_entropy, grad_logits, ctx.backend, ctx.group,
        )  # fmt: skip
        if ctx.inplace:
            torch.autograd.graph.increment_version(grad_logits)
        return (grad_logits,) + (None,) * 5


def split_forward(
    logits: Tensor,
    targets: Tensor,
    arguments: Arguments,
    backend: Any,
    group: distributed.ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, entropy and stats, `[rows, steps]`, of the whole vocabulary on every rank."""
    temperature, token_temperature, mask, ignore_index = arguments
    vocab = logits.shape[-1]
    local, present = _own_targets(targets, ignore_index, vocab, group)
    logp, entropy = (logits.new_empty(targets.shape, dtype=torch.float32) for _ in range(2))
    stats = logits.new_empty((*targets.shape, 2), dtype=torch.float32)
    if logp.numel():
        backend.logprobs_forward(
            *logits.shape, logits, local, *arguments, logp, entropy, stats, None
        )
    ignored = targets == ignore_index
    skipped = ignored if mask is None else ignored | (mask == 0)
    chosen = logits.gather(-1, torch.where(present, local, 0)[..., None])[..., 0].float()
    parts = logits.new_empty((group.size(), *targets.shape, 4), dtype=torch.float32)
    mine = torch.stack([stats[..., 0], stats[..., 1], entropy, chosen], -1)
    distributed.all_gather(list(parts), mine, group=group)
    scale = temperature if token_temperature is None else token_temperature
    logp, entropy, stats = _merge(parts, targets, scale, vocab)
    for result in (logp, entropy):
        result.masked_fill_(skipped, 0)
    return logp, entropy, stats


def split_backward(
    logits: Tensor,
    targets: Tensor,
    arguments: Arguments,
    entropy: Tensor,
    stats: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logits: Tensor,
    backend: Any,
    group: distributed.ProcessGroup,
) -> None:
    """The gradient of this rank's logits into grad_logits, which may be the logits themselves."""
    temperature, token_temperature, mask, ignore_index = arguments
    local, present = _own_targets(targets, ignore_index, logits.shape[-1], group)
    scale = temperature if token_temperature is None else token_temperature
    # Where the target is another rank's, column 0 stood for it: its gradient is put right.
    first = (logits[..., 0].float() - stats[..., 0]) / scale - stats[..., 1]
    p = first.exp()
    first_grad = torch.zeros_like(p)
    if grad_logp is not None:
        first_grad -= grad_logp * p
    if grad_entropy is not None:
        term = torch.where(p == 0, 0, p * (first + entropy))
        first_grad -= grad_entropy * term
    backend.logprobs_backward(
        *logits.shape, logits, local, *arguments, None, entropy, stats, None, grad_logp,
        grad_entropy, grad_logits,
    )  # fmt: skip
    absent = ~present & (local != ignore_index)
    if mask is not None:
        absent &= mask != 0
    column = grad_logits[..., 0]
    column.copy_(torch.where(absent, (first_grad / scale).to(column.dtype), column))


def _own_targets(
    targets: Tensor, ignore_index: int, vocab: int, group: distributed.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Targets as columns of this rank's part (0 for another's), and which are its own."""
    local = targets - group.rank() * vocab
    ignored = targets == ignore_index
    present = (local >= 0) & (local < vocab) & ~ignored
    return torch.where(ignored, ignore_index, torch.where(present, local, 0)), present


def _merge(
    parts: Tensor, targets: Tensor, temperature: float | Tensor, vocab: int
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, entropy and stats of the whole vocabulary from (max, log_sum, entropy, chosen)."""
    maxima, log_sums, entropies, chosen = parts.unbind(-1)
    top = maxima.amax(0)
    # a part of nothing but -inf has no share, and no number for its sum
    empty = maxima == -torch.inf
    log_parts = torch.where(empty, -torch.inf, (maxima - top) / temperature + log_sums)
    log_sum = log_parts.logsumexp(0)
    log_share = log_parts - log_sum
    terms = log_share.exp() * (entropies - log_share)
    entropy = torch.where(empty | (log_share == -torch.inf), 0, terms).sum(0)
    owner = torch.div(targets, vocab, rounding_mode="floor")
    outside = (owner < 0) | (owner >= parts.shape[0])
    own = chosen.gather(0, torch.where(outside, 0, owner)[None])[0]
    logp = ((own - top) / temperature - log_sum).clamp(max=0)
    # an impossible row poisons its results, as does a target outside the vocabulary
    poison = torch.where(outside | (top == -torch.inf), torch.nan, 0.0)
    stats = torch.stack([top, log_sum + poison], -1)
    return logp + poison, entropy + poison, stats


def check_group(group: Any) -> None:
    """Refuse what the collective cannot serve."""
    if not isinstance(group, distributed.ProcessGroup):
        raise ValueError(
            f"process_group must be a torch.distributed.ProcessGroup, got {type(group).__name__}"
        )
    if torch.compiler.is_compiling():
        raise ValueError("process_group is not supported under torch.compile: call it outside")


def resolve_group(name: str) -> distributed.ProcessGroup | None:
    """The group of that name, by which an operator refers to it; none for the empty name."""
    if not name:
        return None
    return distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
