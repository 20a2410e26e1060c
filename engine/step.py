"""What one optimizer step is made of: rollouts into micro-batches, their scores, the gradient of
their loss, a step of AdamW.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from warpo.engine.batch import Batch, Completion, Rollout, pack, split, split_by_tokens
from warpo.engine.errors import TrainingError
from warpo.engine.model import token_logprobs, token_logprobs_and_values
from warpo.engine.optimizer import AdamW, WeightUpdate, clip_coefficient, gradient_norm
from warpo.kernels import ops
from warpo.kernels.objectives import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from warpo.engine.critic import Critic

# Sampler logprobs within this of the learner's serve as old_logprobs: they move a ratio by 0.01 %.
EQUAL_LOGPROBS = 1e-4


def make_minibatches(
    rollouts: Sequence[Rollout], minibatches: int, token_budget: int, seed: int
) -> list[list[Batch]]:
    """The rollouts, dealt at random into minibatches, each of them packed by a token budget."""
    shuffled = list(rollouts)
    random.Random(seed).shuffle(shuffled)
    dealt = [shuffled[i::minibatches] for i in range(min(minibatches, len(shuffled)))]
    # Neighbours of one length waste the least in attention, which pads within a micro-batch.
    ordered = [sorted(part, key=lambda rollout: rollout.num_tokens) for part in dealt]
    return [[pack(micro) for micro in split_by_tokens(part, token_budget)] for part in ordered]


@torch.no_grad()
def score(model: nn.Module, batch: Batch, temperature: float) -> Tensor:
    """logprobs (M,) of the completion tokens of a micro-batch, without gradient."""
    return token_logprobs(model, batch, temperature).logprobs


def denominator(batches: Sequence[Batch], objective: Objective, max_new_tokens: int) -> float:
    """What the loss of an optimizer step is divided by, counted over all of its micro-batches."""
    sequences = sum(batch.num_sequences for batch in batches)
    if objective.aggregation == "token-mean":
        return sum(batch.targets.numel() for batch in batches)
    if objective.aggregation == "sequence-mean-token-sum-norm":
        return sequences * max_new_tokens
    return sequences


class StepResult(NamedTuple):
    """What an optimizer step reports, on the device; None where it has no such part.

    Attributes:
        policy: the vector of `ops.policy_loss`, summed over micro-batches.
        pairs: that of `ops.preference_loss`.
        values: that of `ops.value_loss`.
        pretraining: the supervised loss, times its coefficient.
        grad_norm: L2 norm of the policy's gradient before clipping.
        update: what the step did to the policy's weights.
    """

    policy: Tensor | None = None
    pairs: Tensor | None = None
    values: Tensor | None = None
    pretraining: Tensor | None = None
    grad_norm: Tensor | None = None
    update: WeightUpdate | None = None


def accumulate_gradients(
    model: nn.Module,
    batches: Sequence[Batch],
    objective: Objective,
    *,
    temperature: float,
    max_new_tokens: int,
    kl_coef: float | None = None,
    critic: Critic | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Add the gradient of one optimizer step to that of the parameters, micro-batch by micro-batch.

    loss = sum over the micro-batches of sum_t w_t loss_t / denominator, where the denominator is
    that of the whole step: loss and gradient do not depend on how the rollouts are split into
    micro-batches.

    Args:
        kl_coef: in place of the objective's.
        critic: one that shares the model's trunk: its loss is added, times its coef.

    Returns:
        The vector of `ops.policy_loss`, summed over the micro-batches; that of `ops.value_loss`.
    """
    total = denominator(batches, objective, max_new_tokens)
    num_tokens = sum(batch.targets.numel() for batch in batches)
    metrics, value_metrics = [], []
    for batch in batches:
        if critic is None:
            current = token_logprobs(model, batch, temperature)
        else:
            head = critic.value_head
            current, values = token_logprobs_and_values(model, head, batch, temperature)
        assert batch.advantages is not None
        loss, batch_metrics = ops.policy_loss(
            current.logprobs,
            batch.old_logprobs,
            batch.advantages,
            objective,
            cu_seqlens=batch.completion_cu_seqlens,
            ref_logprobs=batch.ref_logprobs,
            sampler_logprobs=batch.sampler_logprobs,
            # for the metrics alone it needs no gradient
            entropy=current.entropy if objective.entropy_coef else current.entropy.detach(),
            kl_coef=kl_coef,
            denominator=total,
        )
        if critic is not None:
            value_loss, batch_values = critic.loss(values, batch, num_tokens)
            loss = loss + critic.coef * value_loss
            value_metrics.append(batch_values)
        loss.backward()
        metrics.append(batch_metrics)
    return ops.sum_metrics(metrics), (
        ops.merge_value_metrics(value_metrics) if value_metrics else None
    )


def apply_gradients(
    optimizer: AdamW, max_grad_norm: float, setting: str = "update.lr"
) -> tuple[Tensor, WeightUpdate]:
    """Clip the gradient to an L2 norm and step; returns the norm before clipping, and the update.

    Args:
        setting: what the error proposes to lower.

    Raises:
        TrainingError: the norm is not finite. Nothing is stepped.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = gradient_norm(parameters)
    if not torch.isfinite(grad_norm):
        optimizer.zero_grad(set_to_none=True)
        raise TrainingError(
            f"the gradient norm is {grad_norm.item()}: the step was not taken. Lower {setting}, "
            "or check the rewards and the model for NaN"
        )
    update = optimizer.step(clip_coefficient(grad_norm, max_grad_norm))
    optimizer.zero_grad(set_to_none=True)
    return grad_norm, update


def as_rollout(token_ids: Sequence[int], num_prompt_tokens: int) -> Rollout:
    """Given tokens in the form of a rollout, to be scored or imitated."""
    completion = Completion(
        token_ids=list(token_ids[num_prompt_tokens:]),
        logprobs=[0.0] * (len(token_ids) - num_prompt_tokens),
        finished=True,
        weight_version=0,
    )
    return Rollout(prompt_ids=list(token_ids[:num_prompt_tokens]), completion=completion)


def with_scores(
    batch: Batch,
    model: nn.Module,
    reference: nn.Module | None,
    critic: Critic | None = None,
    *,
    temperature: float,
    recompute_old: bool,
) -> Batch:
    """The micro-batch with ref_logprobs, with values, and with old_logprobs by the learner if the
    sampler's cannot serve.
    """
    return replace(
        batch,
        ref_logprobs=None if reference is None else score(reference, batch, temperature),
        old_logprobs=score(model, batch, temperature) if recompute_old else batch.old_logprobs,
        values=None if critic is None else critic.values(batch, temperature),
    )


def score_rollouts(
    rollouts: Sequence[Rollout],
    model: nn.Module,
    reference: nn.Module | None,
    critic: Critic | None,
    *,
    temperature: float,
    token_budget: int,
    recompute_old: bool,
) -> list[Rollout]:
    """The rollouts with what `with_scores` gives; as they are where it would give nothing."""
    if reference is None and critic is None and not recompute_old:
        return list(rollouts)
    device = next(model.parameters()).device
    scored: dict[int, Rollout] = {}
    for micro in scoring_order(rollouts, token_budget):
        chosen = [rollouts[i] for i in micro]
        batch = with_scores(
            pack(chosen).to(device), model, reference, critic,
            temperature=temperature, recompute_old=recompute_old,
        )  # fmt: skip
        names = ["old_logprobs"] if recompute_old else []
        names += ["ref_logprobs"] if reference is not None else []
        names += ["values"] if critic is not None else []
        parts = {name: split(getattr(batch, name), chosen) for name in names}
        for place, index in enumerate(micro):
            own: dict[str, Any] = {name: part[place] for name, part in parts.items()}
            scored[index] = replace(rollouts[index], **own)
    return [scored[index] for index in range(len(rollouts))]


def scoring_order(rollouts: Sequence[Rollout], token_budget: int) -> list[list[int]]:
    """Places of the rollouts of each micro-batch that is scored: neighbours of one length."""
    order = sorted(range(len(rollouts)), key=lambda i: rollouts[i].num_tokens)
    remaining = iter(order)
    micro_batches = split_by_tokens([rollouts[i] for i in order], token_budget)
    return [list(islice(remaining, len(micro))) for micro in micro_batches]


def tokens_scored(rollouts: Sequence[Rollout], token_budget: int) -> int:
    """Tokens that a forward pass over the rollouts reads, each prompt once a micro-batch."""
    total = sum(len(rollout.completion.token_ids) for rollout in rollouts)
    for micro in scoring_order(rollouts, token_budget):
        total += sum(map(len, {tuple(rollouts[i].prompt_ids) for i in micro}))
    return total


def loss_and_gradient(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> Tensor:
    """The mean -logprob of the tokens of sequences, and the L2 norm of its gradient with respect
    to the embedded inputs, (2,) float32: both are finite where the model can be trained on. No
    memory is taken for the gradients of weights.
    """
    batch = pack([as_rollout(ids, 1) for ids in sequences]).to(next(model.parameters()).device)
    embedded: list[Tensor] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: embedded.append(output)
    )
    try:
        loss = -token_logprobs(model, batch, 1.0).logprobs.mean()
    finally:
        hook.remove()
    (gradient,) = torch.autograd.grad(loss, embedded[0])
    return torch.stack([loss.detach(), gradient.float().norm()])
