"""logprobs and entropy of logits whose vocabulary is split over the ranks of a process group.

Each rank reduces its part r of the vocabulary to m_r = max x / T, d_r = sum e^(x / T - m_r) and its
entropy H_r. With m = max_r m_r and w_r = d_r e^(m_r - m) / d, the share of the probability:

    log d   = log sum_r d_r e^(m_r - m)
    entropy = sum_r w_r (H_r - log w_r)

so four numbers per token travel, in one collective. The backward pass needs none: given m, log d
and the entropy of the whole vocabulary, the gradient of a part is that of `logprobs`.
"""

from typing import Any

import torch
from torch import Tensor, distributed

from warpo.kernels._arguments.backend import Backend
from warpo.kernels._arguments.logprobs import LogprobsArguments, LogprobsBackwardArguments
from warpo.kernels._checks import as_plain, check_unspent
from warpo.kernels._registration import check_first_order, check_transforms

_NAME = "logprobs with process_group"


class VocabParallelLogprobs(torch.autograd.Function):
    """logprobs and entropy, `[rows, steps]`, from this rank's logits `[rows, steps, V / ranks]`."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        a: LogprobsArguments,
        inplace: bool,
        kernels: Backend,
        group: distributed.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        check_transforms(_NAME, (logits,))
        logp, entropy, stats = split_forward(a, kernels, group)
        ctx.save_for_backward(logits, a.targets, a.token_temperature, a.mask, entropy, stats)
        ctx.temperature, ctx.ignore_index = a.temperature, a.ignore_index
        ctx.inplace, ctx.kernels, ctx.group, ctx.spent = inplace, kernels, group, False
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> Any:
        check_first_order(_NAME)
        check_unspent(ctx.spent)
        logits, targets, token_temperature, mask, entropy, stats = ctx.saved_tensors
        if (grad_logp is None and grad_entropy is None) or not targets.numel():
            return (None if targets.numel() else torch.zeros_like(logits),) + (None,) * 4
        ctx.spent = ctx.inplace
        grad_logits = logits.detach() if ctx.inplace else torch.empty_like(logits)
        rows, steps, vocab = logits.shape
        forward = LogprobsArguments(
            rows=rows,
            steps=steps,
            vocab=vocab,
            logits=logits.detach(),
            targets=targets,
            temperature=ctx.temperature,
            token_temperature=token_temperature,
            mask=mask,
            ignore_index=ctx.ignore_index,
            logprobs=None,
            entropy=entropy,
            stats=stats,
            partials=None,
        )
        arguments = LogprobsBackwardArguments(
            forward=forward,
            grad_logprobs=None if grad_logp is None else as_plain(grad_logp),
            grad_entropy=None if grad_entropy is None else as_plain(grad_entropy),
            grad_logits=grad_logits,
        )
        split_backward(arguments, ctx.kernels, ctx.group)
        if ctx.inplace:
            torch.autograd.graph.increment_version(grad_logits)
        return (grad_logits,) + (None,) * 4


def split_forward(
    a: LogprobsArguments, kernels: Backend, group: distributed.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, entropy and stats, `[rows, steps]`, of the whole vocabulary on every rank.

    a: with this rank's logits, targets in the whole vocabulary, and no results.
    """
    logits, targets, mask, ignore_index, vocab = (
        a.logits,
        a.targets,
        a.mask,
        a.ignore_index,
        a.vocab,
    )
    local, present = _own_targets(targets, ignore_index, vocab, group)
    logp, entropy = (logits.new_empty(targets.shape, dtype=torch.float32) for _ in range(2))
    stats = logits.new_empty((*targets.shape, 2), dtype=torch.float32)
    if logp.numel():
        local_arguments = a._replace(targets=local, logprobs=logp, entropy=entropy, stats=stats)
        kernels.logprobs_forward(local_arguments)
    ignored = targets == ignore_index
    skipped = ignored if mask is None else ignored | (mask == 0)
    chosen = logits.gather(-1, torch.where(present, local, 0)[..., None])[..., 0].float()
    parts = logits.new_empty((group.size(), *targets.shape, 4), dtype=torch.float32)
    mine = torch.stack([stats[..., 0], stats[..., 1], entropy, chosen], -1)
    distributed.all_gather(list(parts), mine, group=group)
    logp, entropy, stats = _merge(parts, targets, _scale(a), vocab)
    for result in (logp, entropy):
        result.masked_fill_(skipped, 0)
    return logp, entropy, stats


def split_backward(
    a: LogprobsBackwardArguments, kernels: Backend, group: distributed.ProcessGroup
) -> None:
    """The gradient of this rank's logits, which may be written over the logits themselves.

    a: with entropy and stats of the whole vocabulary, and targets in it.
    """
    f = a.forward
    assert f.entropy is not None and f.stats is not None
    local, present = _own_targets(f.targets, f.ignore_index, f.vocab, group)
    scale = _scale(f)
    # Where the target is another rank's, column 0 stood for it: its gradient is put right.
    first = (f.logits[..., 0].float() - f.stats[..., 0]) / scale - f.stats[..., 1]
    p = first.exp()
    first_grad = torch.zeros_like(p)
    if a.grad_logprobs is not None:
        first_grad -= a.grad_logprobs * p
    if a.grad_entropy is not None:
        term = torch.where(p == 0, 0, p * (first + f.entropy))
        first_grad -= a.grad_entropy * term
    kernels.logprobs_backward(a._replace(forward=f._replace(targets=local)))
    absent = ~present & (local != f.ignore_index)
    if f.mask is not None:
        absent &= f.mask != 0
    column = a.grad_logits[..., 0]
    column.copy_(torch.where(absent, (first_grad / scale).to(column.dtype), column))


def _scale(a: LogprobsArguments) -> float | Tensor:
    return a.temperature if a.token_temperature is None else a.token_temperature


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
