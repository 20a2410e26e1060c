"""Policy loss from hidden states and the linear head: the gradients are computed with the loss, in
three matrix products, with no tensor of tokens x vocabulary.

    loss = policy_loss(logp, ...),   logp as of `linear_logprobs`

Where the coefficient of a token follows from its own logits (`policy_loss_from_logits` says where
that is), a chunk of tokens goes through once: its logits, d loss / d logits over them from one
read, d hidden and d weight. Elsewhere the logprobs of all tokens come first, by `linear_logprobs`:
three products where the logits fit in workspace_bytes, else four.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpo.kernels import dispatch
from warpo.kernels._arguments.denominator import DenominatorArguments
from warpo.kernels._arguments.logprobs import LogprobsArguments
from warpo.kernels._arguments.objective import ObjectiveArguments
from warpo.kernels._arguments.policy_loss import KlPenaltyArguments
from warpo.kernels._arguments.policy_loss_from_logits import PolicyLossFromLogitsArguments
from warpo.kernels._checks import is_fake
from warpo.kernels._linear_head import LinearHead, check_head, valid_tokens
from warpo.kernels._linear_head_plan import APART, NONE, OVER, check_chunking
from warpo.kernels._linear_logprobs import linear_logprobs_and_entropy
from warpo.kernels._logprobs_operator import NO_INDEX, workspace
from warpo.kernels._offsets import in_a_sequence
from warpo.kernels._policy_loss import check_correction, check_tokens, kl_penalty, policy_loss
from warpo.kernels._policy_loss_from_logits import count_reads, loss_of_logprobs, scale_gradient
from warpo.kernels._policy_metrics import METRICS
from warpo.kernels._registration import Operator, keeps_graph
from warpo.kernels._sequences import count_denominator, number_or_tensor, of_sequences
from warpo.kernels.objectives import Objective, get_objective


class PolicyLossFromHiddenInputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    temperature: float
    token_temperature: Tensor | None
    softcap: float
    num_valid: int
    workspace_bytes: int
    float32_logits: bool
    valid: Tensor
    cu_seqlens: Tensor | None
    old_logprobs: Tensor | None
    advantages: Tensor
    ref_logprobs: Tensor | None
    sampler_logprobs: Tensor | None
    objective: ObjectiveArguments
    kl_penalty: KlPenaltyArguments
    denominator: DenominatorArguments
    wanted: list[bool]
    backend: str


class PolicyLossFromHidden(NamedTuple):
    loss: Tensor
    metrics: Tensor
    logprobs: Tensor
    entropy: Tensor


def policy_loss_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    objective: str | Objective,
    *,
    old_logprobs: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    ref_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    kl_coef: float | Tensor | None = None,
    denominator: float | Tensor | None = None,
    num_valid: int | None = None,
    workspace_bytes: int | None = None,
    logits_dtype: str = "float32",
    backend: str | None = None,
) -> PolicyLossFromHidden:
    """Loss of a batch of sequences under an objective, from hidden states and the linear head.

    Args:
        hidden: (B, T, H) padded, or (N, H) packed with cu_seqlens. As in `linear_logprobs`.
            Differentiable.
        weight: (V, H) in the dtype of hidden. Differentiable.
        targets: (B, T) or (N,) int64 | int32, the taken tokens.
        advantages: like targets, or one per sequence: (B,).
        objective: name of a row ("grpo", "dapo", ...) or an `Objective`.
        old_logprobs: like targets: of the policy when the step began. None: this policy is that
            one, in the first update on its own samples, and the ratio is exactly 1.
        bias: (V,) float32 | bfloat16 | float16. Differentiable.
        temperature, softcap: of the logits, as in `linear_logprobs`.
        mask: like targets. Masked tokens take no part in the matrix products.
        cu_seqlens: as in `policy_loss`. Tokens of no sequence count as masked.
        ignore_index: a target of this value counts as masked.
        ref_logprobs, sampler_logprobs, kl_coef, denominator: as in `policy_loss`.
        num_valid, workspace_bytes, logits_dtype: as in `linear_logprobs`.
        backend: reference | cpu | triton | cuda; chosen by device if not given.

    Returns:
        loss: () float32, differentiable with respect to hidden, weight and bias.
        metrics: (16,) float32 in the order of METRICS, the entropy among them.
        logprobs, entropy: like targets, float32, of all tokens; constants.

    Raises:
        ValueError: a shape, dtype, stride, device or option is not as above.

    Source: the row of the objective. Memory beyond arguments and results: workspace_bytes; 4 V H
    bytes for the gradient of a weight that is not float32, on a GPU only where the gradients of the
    logits of all tokens do not fit workspace_bytes (8192 tokens of a vocabulary of 151936 take 3.2
    GB); and from the loss to its backward the gradients.
    """
    objective = get_objective(objective)
    rows, targets, temperature = check_head(
        hidden, weight, bias, targets, temperature, mask, softcap
    )
    chunking = check_chunking(hidden, num_valid, workspace_bytes, logits_dtype)
    stand_in = hidden.new_empty((), dtype=torch.float32).expand(targets.shape)
    old = stand_in if old_logprobs is None else old_logprobs
    num_sequences = check_tokens(
        stand_in, old, advantages, mask, cu_seqlens, ref_logprobs, sampler_logprobs, None
    )
    term = kl_penalty(kl_coef, objective, ref_logprobs, stand_in)
    check_correction(objective, sampler_logprobs)
    valid = valid_tokens(targets, mask, ignore_index).view(targets.shape)
    if cu_seqlens is not None:
        valid = valid & in_a_sequence(cu_seqlens, targets.shape[0])
    scale = count_denominator(
        denominator, objective.aggregation, stand_in, valid, None, num_sequences
    )
    name = dispatch.choose(hidden, backend)
    per_token = advantages.shape == targets.shape
    if name == "reference" or count_reads(objective, term, old_logprobs, per_token) == 2:
        logp, entropy = linear_logprobs_and_entropy(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            mask=valid,
            softcap=softcap,
            num_valid=num_valid,
            workspace_bytes=workspace_bytes,
            logits_dtype=logits_dtype,
            backend=name,
        )
        if objective.entropy_coef == 0:
            entropy = entropy.detach()
        loss, metrics = policy_loss(
            logp,
            old_logprobs,
            advantages,
            objective,
            mask=valid,
            cu_seqlens=cu_seqlens,
            ref_logprobs=ref_logprobs,
            sampler_logprobs=sampler_logprobs,
            entropy=entropy,
            kl_coef=kl_coef,
            denominator=number_or_tensor(scale),
            backend=name,
        )
        return PolicyLossFromHidden(loss, metrics, logp.detach(), entropy.detach())
    recording = torch.is_grad_enabled()
    wanted = [recording and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    token_temperature = None
    if isinstance(temperature, Tensor):
        token_temperature, temperature = temperature, 1.0
    inputs = PolicyLossFromHiddenInputs(
        hidden=rows,
        weight=weight,
        bias=bias,
        targets=targets,
        temperature=temperature,
        token_temperature=token_temperature,
        softcap=softcap or 0.0,
        num_valid=chunking[0],
        workspace_bytes=chunking[1],
        float32_logits=chunking[2],
        valid=valid,
        cu_seqlens=cu_seqlens,
        old_logprobs=old_logprobs,
        advantages=advantages,
        ref_logprobs=ref_logprobs if term.kl else None,
        sampler_logprobs=sampler_logprobs if objective.correction != "none" else None,
        objective=objective.arguments,
        kl_penalty=term,
        denominator=scale,
        wanted=wanted,
        backend=name,
    )
    loss, metrics, logp, entropy, _, _, _ = _operator(inputs)
    return PolicyLossFromHidden(loss, metrics, logp, entropy)


def _forward(
    inputs: PolicyLossFromHiddenInputs,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics, logprobs and entropy of every token, gradients of hidden, weight, bias."""
    hidden, shape = inputs.hidden, inputs.targets.shape
    gradients = NONE
    if any(inputs.wanted):
        gradients = APART if inputs.softcap else OVER
    head = LinearHead(
        hidden,
        inputs.weight,
        inputs.bias,
        inputs.softcap,
        inputs.valid.reshape(-1),
        inputs.num_valid,
        inputs.workspace_bytes,
        inputs.float32_logits,
        gradients=gradients,
    )
    logp, entropy = _chunks(head, inputs)
    logp, entropy = logp.view(shape), entropy.view(shape)
    loss, metrics = loss_of_logprobs(inputs, logp, entropy)
    of_hidden, of_weight, of_bias = (
        hidden.new_empty((0,)) if gradient is None else gradient for gradient in head.gradients()
    )
    return loss, metrics, logp, entropy, of_hidden, of_weight, of_bias


class _Tokens(NamedTuple):
    """What is one per token, (1, count) of the compacted tokens or of a chunk of them."""

    targets: Tensor
    token_temperature: Tensor | None
    valid: Tensor
    old_logprobs: Tensor | None
    advantages: Tensor
    ref_logprobs: Tensor | None
    sampler_logprobs: Tensor | None
    valid_tokens: Tensor | None
    logprobs: Tensor
    entropy: Tensor

    def part(self, start: int, stop: int) -> "_Tokens":
        if stop - start == self.targets.shape[1]:
            return self
        return _Tokens._make([None if x is None else x[:, start:stop] for x in self])


def _compact(head: LinearHead, inputs: PolicyLossFromHiddenInputs) -> _Tokens:
    advantages, valid_tokens = of_sequences(
        inputs.advantages, inputs.valid, inputs.cu_seqlens, inputs.objective.sequence_mean
    )
    logp, entropy = inputs.hidden.new_empty((2, 1, head.count), dtype=torch.float32)
    return _Tokens(
        targets=head.compact(inputs.targets),
        token_temperature=head.compact(inputs.token_temperature),
        valid=head.compact(inputs.valid),
        old_logprobs=head.compact(inputs.old_logprobs),
        advantages=head.compact(advantages),
        ref_logprobs=head.compact(inputs.ref_logprobs),
        sampler_logprobs=head.compact(inputs.sampler_logprobs),
        valid_tokens=head.compact(valid_tokens),
        logprobs=logp,
        entropy=entropy,
    )


def _chunks(head: LinearHead, inputs: PolicyLossFromHiddenInputs) -> tuple[Tensor, Tensor]:
    """logprobs and entropy of every token; the gradients stay in the head."""
    wanted = any(inputs.wanted)
    kernels = dispatch.load(inputs.backend)
    head.start_gradients(inputs.wanted)
    every = _compact(head, inputs)
    buffer = head.new_buffer()
    for start, stop in head.chunks():
        tokens = every.part(start, stop)
        logits = head.logits(start, stop, buffer)
        if not wanted:
            stats = logits.new_empty((1, stop - start, 2), dtype=torch.float32)
            partials = workspace(logits[None])
            kernels.logprobs_forward(
                _logprobs_arguments(inputs, tokens, logits[None], stats, partials)
            )
            continue
        forward = _logprobs_arguments(inputs, tokens, logits[None])
        grad_logits = head.grad_logits(start, stop, logits)
        kernels.policy_loss_from_logits(_arguments(inputs, tokens, forward, grad_logits[None]))
        head.add_gradients(start, stop, logits, grad_logits)
    return head.spread(every.logprobs[0]), head.spread(every.entropy[0])


def _logprobs_arguments(
    inputs: PolicyLossFromHiddenInputs,
    tokens: _Tokens,
    logits: Tensor,
    stats: Tensor | None = None,
    partials: Tensor | None = None,
) -> LogprobsArguments:
    rows, steps, vocab = logits.shape
    return LogprobsArguments(
        rows=rows,
        steps=steps,
        vocab=vocab,
        logits=logits,
        targets=tokens.targets,
        temperature=inputs.temperature,
        token_temperature=tokens.token_temperature,
        mask=tokens.valid,
        ignore_index=NO_INDEX,
        logprobs=tokens.logprobs,
        entropy=tokens.entropy,
        stats=stats,
        partials=partials,
    )


def _arguments(
    inputs: PolicyLossFromHiddenInputs,
    tokens: _Tokens,
    forward: LogprobsArguments,
    grad_logits: Tensor,
) -> PolicyLossFromLogitsArguments:
    return PolicyLossFromLogitsArguments(
        objective=inputs.objective,
        kl_penalty=inputs.kl_penalty,
        forward=forward,
        sequences=1,
        cu_seqlens=None,
        old_logprobs=tokens.old_logprobs,
        advantages=tokens.advantages,
        ref_logprobs=tokens.ref_logprobs,
        sampler_logprobs=tokens.sampler_logprobs,
        valid_tokens=tokens.valid_tokens,
        denominator=inputs.denominator,
        grad_logits=grad_logits,
    )


def _fake_forward(inputs: PolicyLossFromHiddenInputs) -> tuple[Tensor, ...]:
    hidden, tokens = inputs.hidden, inputs.targets.shape
    differentiable = zip((hidden, inputs.weight, inputs.bias), inputs.wanted, strict=True)
    return (
        *[hidden.new_empty(x, dtype=torch.float32) for x in ((), (len(METRICS),), tokens, tokens)],
        *[
            torch.empty_like(x, memory_format=torch.contiguous_format)
            if want and x is not None
            else hidden.new_empty((0,))
            for x, want in differentiable
        ],
    )


def _save(ctx: Any, inputs: PolicyLossFromHiddenInputs, output: tuple[Tensor, ...]) -> None:
    ctx.wanted, ctx.backend = inputs.wanted, inputs.backend
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[4:])


def _differentiate(ctx: Any, grad_loss: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None, None, None)
    # a scalar of shape () would be rounded to the dtype of the gradient, this one is not
    factor, saved = grad_loss.view(1), ctx.saved_tensors
    over = is_fake(factor) and not keeps_graph()  # as in eager mode, whose memory is planned
    results = [x.detach() if over else torch.empty_like(x) for x in saved]
    scaled = [torch.mul(x, factor, out=out) for x, out in zip(saved, results, strict=True)]
    return tuple(x if want else None for x, want in zip(scaled, ctx.wanted, strict=True))


def _differentiate_eager(ctx: Any, grad_loss: Tensor | None, *_: object) -> Any:
    """Where the graph is kept, of copies: on its last walk the gradients are scaled in place."""
    if grad_loss is None:
        return (None, None, None)
    kept = keeps_graph()
    gradients = [x.detach().clone() if kept else x.detach() for x in ctx.saved_tensors]
    for gradient in gradients:
        if gradient.numel():
            scale_gradient(gradient.view(1, -1, gradient.shape[-1]), grad_loss, ctx.backend)
    return tuple(x if want else None for x, want in zip(gradients, ctx.wanted, strict=True))


_operator = Operator(
    "policy_loss_from_hidden",
    _forward,
    _fake_forward,
    _save,
    _differentiate,
    differentiable=3,
    differentiate_eager=_differentiate_eager,
)
