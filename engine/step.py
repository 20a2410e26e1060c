"""One step of training: micro-batches of rollouts in, one AdamW step an optimizer step out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from warpo.engine.batch import Batch, Completion, Rollout, pack, split_by_tokens
from warpo.engine.data import Example
from warpo.engine.errors import TrainingError, WeightMismatch
from warpo.engine.model import token_logprobs
from warpo.engine.optimizer import AdamW, WeightUpdate, clip_coefficient, gradient_norm
from warpo.engine.sampler.base import Sampler
from warpo.kernels import ops
from warpo.kernels.objectives import Objective

# Sampler logprobs within this of the learner's serve as old_logprobs: they move a ratio by 0.01 %.
EQUAL_LOGPROBS = 1e-4
# As torch.optim.AdamW has by default.
WARM_START_DECAY = 0.01


def make_minibatches(
    rollouts: Sequence[Rollout], minibatches: int, token_budget: int, seed: int
) -> list[list[Batch]]:
    """The rollouts, dealt at random into minibatches, each of them packed by a token budget."""
    shuffled = list(rollouts)
    random.Random(seed).shuffle(shuffled)
    dealt = [shuffled[i::minibatches] for i in range(minibatches)]
    # Neighbours of one length waste the least in attention, which pads within a micro-batch.
    ordered = [sorted(part, key=lambda rollout: rollout.num_tokens) for part in dealt]
    return [[pack(micro) for micro in split_by_tokens(part, token_budget)] for part in ordered]


@torch.no_grad()
def score(model: nn.Module, batch: Batch, temperature: float) -> Tensor:
    """logprobs (M,) of the completion tokens of a micro-batch, without gradient."""
    return token_logprobs(model, batch, temperature).logprobs


def denominator(batches: Sequence[Batch], objective: Objective, max_new_tokens: int) -> float:
    """What the loss of an optimizer step is divided by, counted over all of its micro-batches."""
    sequences = sum(batch.advantages.numel() for batch in batches)
    if objective.aggregation == "token-mean":
        return sum(batch.targets.numel() for batch in batches)
    if objective.aggregation == "sequence-mean-token-sum-norm":
        return sequences * max_new_tokens
    return sequences


class StepResult(NamedTuple):
    """What an optimizer step reports, on the device.

    Attributes:
        metrics: the vector of `ops.policy_loss`, summed over micro-batches.
        grad_norm: L2 norm before clipping.
        update: what the step did to the weights.
    """

    metrics: Tensor
    grad_norm: Tensor
    update: WeightUpdate


def train_step(
    model: nn.Module,
    optimizer: AdamW,
    batches: Sequence[Batch],
    objective: Objective,
    *,
    temperature: float,
    max_new_tokens: int,
    max_grad_norm: float,
) -> StepResult:
    """One optimizer step over packed micro-batches.

    loss = sum over the micro-batches of sum_t w_t loss_t / denominator, where the denominator is
    that of the whole step: loss and gradient do not depend on how the rollouts are split into
    micro-batches.

    Raises:
        TrainingError: the gradient is not finite. The weights are those before the step.
    """
    metrics = accumulate_gradients(
        model, batches, objective, temperature=temperature, max_new_tokens=max_new_tokens
    )
    grad_norm, update = apply_gradients(model, optimizer, max_grad_norm)
    return StepResult(metrics, grad_norm, update)


def accumulate_gradients(
    model: nn.Module,
    batches: Sequence[Batch],
    objective: Objective,
    *,
    temperature: float,
    max_new_tokens: int,
) -> Tensor:
    """Add the gradient of one optimizer step to that of the parameters, micro-batch by micro-batch.

    Returns:
        The vector of `ops.policy_loss`, summed over the micro-batches.
    """
    total = denominator(batches, objective, max_new_tokens)
    metrics = []
    for batch in batches:
        current = token_logprobs(model, batch, temperature)
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
            denominator=total,
        )
        loss.backward()
        metrics.append(batch_metrics)
    return ops.sum_metrics(metrics)


def apply_gradients(
    model: nn.Module, optimizer: AdamW, max_grad_norm: float
) -> tuple[Tensor, WeightUpdate]:
    """Clip the gradient to an L2 norm and step; returns the norm before clipping, and the update.

    Raises:
        TrainingError: the norm is not finite. Nothing is stepped.
    """
    grad_norm = gradient_norm(model.parameters())
    if not torch.isfinite(grad_norm):
        optimizer.zero_grad(set_to_none=True)
        raise TrainingError(
            f"the gradient norm is {grad_norm.item()}: the step was not taken. Lower update.lr, "
            "or check the rewards and the model for NaN"
        )
    update = optimizer.step(clip_coefficient(grad_norm, max_grad_norm))
    optimizer.zero_grad(set_to_none=True)
    return grad_norm, update


def warm_start(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    token_budget: int,
    max_grad_norm: float,
    optimizer_state: Literal["device", "host"],
    seed: int,
    progress: Callable[[int, int], None],
) -> float:
    """Supervised fine-tuning: minimise the mean of -logp over completion tokens, lr falling
    linearly to 0.

    Returns:
        The loss of the last step, in nats a token.
    """
    device = next(model.parameters()).device
    optimizer = AdamW(
        model.named_parameters(), lr=lr, weight_decay=WARM_START_DECAY, state=optimizer_state
    )
    loss = torch.zeros(())
    for step, chosen in enumerate(_example_batches(examples, steps, batch_size, seed)):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        tokens = sum(len(rollout.completion.token_ids) for rollout in chosen)
        loss = torch.zeros((), device=device)
        for micro in split_by_tokens(chosen, token_budget):
            batch = pack(micro).to(device)
            part = -token_logprobs(model, batch, 1.0).logprobs.sum() / tokens
            part.backward()
            loss += part.detach()
        apply_gradients(model, optimizer, max_grad_norm)
        progress(step + 1, steps)
    return loss.item()


def _example_batches(
    examples: Sequence[Example], steps: int, batch_size: int, seed: int
) -> Iterator[list[Rollout]]:
    """Batches of examples in a shuffled order that comes anew with each epoch."""
    rng = random.Random(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < batch_size:
            order += rng.sample(range(len(examples)), len(examples))
        chosen, order = order[:batch_size], order[batch_size:]
        yield [as_rollout(examples[i].token_ids, examples[i].num_prompt_tokens) for i in chosen]


def as_rollout(token_ids: Sequence[int], num_prompt_tokens: int) -> Rollout:
    """Given tokens in the form of a rollout, to be scored or imitated."""
    completion = Completion(
        token_ids=list(token_ids[num_prompt_tokens:]),
        logprobs=[0.0] * (len(token_ids) - num_prompt_tokens),
        finished=True,
        weight_version=0,
    )
    return Rollout(
        prompt_ids=list(token_ids[:num_prompt_tokens]),
        completion=completion,
        reward=0.0,
        advantage=0.0,
    )


class Probe(NamedTuple):
    """What learner and sampler say of the same tokens: logprobs (M,) float32 at temperature 1, on
    the host, of every token of the sequences but their first.
    """

    learner: Tensor
    sampler: Tensor


def probe_weights(
    model: nn.Module, sampler: Sampler, sequences: Sequence[Sequence[int]], tolerance: float
) -> Probe:
    """Proof that the sampler holds the learner's weights: both score the same sequences.

    Args:
        sequences: token ids, two or more each.
        tolerance: largest |learner - sampler| logprob that is taken for rounding.

    Returns:
        The logprobs of both.

    Raises:
        WeightMismatch: it is above the tolerance, or not a number.
    """
    device = next(model.parameters()).device
    batch = pack([as_rollout(ids, 1) for ids in sequences]).to(device)
    learner = score(model, batch, 1.0).cpu()
    sampled = torch.tensor([logp for row in sampler.score(sequences) for logp in row])
    difference = (learner - sampled).abs()
    worst = int(difference.nan_to_num(torch.inf).argmax())
    if not difference[worst] <= tolerance:
        raise WeightMismatch(
            f"the sampler's weights are not the learner's (version {sampler.weight_version}): "
            f"a token has logprob {learner[worst]:.4f} with the learner and {sampled[worst]:.4f} "
            f"with the sampler; probe.tolerance is {tolerance}. Either publishing failed, or the "
            "two compute in types too different for this tolerance (rollout.dtype, dtype)"
        )
    return Probe(learner, sampled)


def with_scores(
    batch: Batch,
    model: nn.Module,
    reference: nn.Module | None,
    *,
    temperature: float,
    recompute_old: bool,
) -> Batch:
    """The micro-batch with ref_logprobs, and with old_logprobs by the learner if the sampler's
    cannot serve.
    """
    ref_logprobs = None if reference is None else score(reference, batch, temperature)
    old_logprobs = score(model, batch, temperature) if recompute_old else batch.old_logprobs
    return replace(batch, ref_logprobs=ref_logprobs, old_logprobs=old_logprobs)
