"""Proof that the gradient of an optimizer step does not depend on how its rollouts are laid out.

The same rollouts are laid out in four ways:

    accumulation 1   one packed micro-batch
    accumulation n   micro-batches of one rollout each
    packed           a few micro-batches, filled by a token budget
    padded           a (B, T) batch with a mask, by transformers' own attention and logits

The first three are `step.accumulate_gradients`, which training runs. The last shares with it the
parameters and the kernels of logprobs and loss, and nothing else: not the packing, not the
attention, not the logits' choice, not the denominator. Each is compared with the first, over all
parameters:

    || g - g_1 ||_2 / || g_1 ||_2  <=  1e-6

Logits, logprobs, losses and their gradients are float32, as in training. The model's own products
are taken in float64, because in float32 they alone can exceed the bound: a product of other rows is
summed in another order, which moves logits by about 1e-6, and ratios with them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from warpo.engine import step
from warpo.engine.batch import Batch, Rollout, pack, split_by_tokens
from warpo.engine.model import load_model
from warpo.kernels import ops
from warpo.kernels.objectives import Objective

BOUND = 1e-6
LAYOUTS = ("accumulation n", "packed", "padded")

# What is kept of the model: all that mixes tokens is there in the first layer.
MAX_LAYERS, MAX_VOCABULARY = 2, 1024
# Standard deviation, nats, of what is between old and new policy, and between sampler and old
# policy: enough that rows clip, mask and truncate some tokens and leave others.
NOISE = 0.3
PACKED_MICRO_BATCHES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """Relative L2 distance of a layout's gradient from that of one micro-batch.

    Attributes:
        objective: the name of the objective.
        layout: one of LAYOUTS.
        relative: || g - g_1 || / || g_1 ||; not a number where g_1 is 0 or not finite.
    """

    objective: str
    layout: str
    relative: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sample:
    """A rollout and what the step knows of its completion's M tokens, each (M,) float32."""

    rollout: Rollout
    sampler_logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor


def load_cut_model(
    path: str,
    rollouts: Sequence[Rollout],
    device: torch.device,
    dtype: torch.dtype = torch.float64,
) -> tuple[PreTrainedModel, list[Rollout]]:
    """A part of a model that any machine holds and that takes seconds, and rollouts in its tokens.

    Returns:
        The first MAX_LAYERS layers, with MAX_VOCABULARY tokens, in `dtype` up to the logits, which
        are float32, the widest type of the kernels.
    """
    model = load_model(path, "float32", torch.device("cpu"))
    layers = getattr(model.get_decoder(), "layers", None)
    if isinstance(layers, nn.ModuleList):
        del layers[MAX_LAYERS:]
    number = _cut_vocabulary(model, rollouts)
    model.get_output_embeddings().register_forward_hook(lambda _module, _args, out: out.float())
    renumbered = [
        replace(
            rollout,
            prompt_ids=[number[token] for token in rollout.prompt_ids],
            completion=replace(
                rollout.completion,
                token_ids=[number[token] for token in rollout.completion.token_ids],
            ),
        )
        for rollout in rollouts
    ]
    return nn.Module.to(model, device, dtype), renumbered


def _cut_vocabulary(model: PreTrainedModel, rollouts: Sequence[Rollout]) -> dict[int, int]:
    """Keep the tokens of the rollouts and some more; returns their new numbers."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    used = {token for r in rollouts for token in r.prompt_ids + r.completion.token_ids}
    others = (token for token in range(embedding.num_embeddings) if token not in used)
    kept = sorted({*used, *islice(others, max(0, MAX_VOCABULARY - len(used)))})
    tied = head.weight is embedding.weight
    embedding.weight = nn.Parameter(embedding.weight.detach()[kept])
    embedding.padding_idx = None
    head.weight = embedding.weight if tied else nn.Parameter(head.weight.detach()[kept])
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias.detach()[kept])
    return {token: number for number, token in enumerate(kept)}


def divergences(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    objectives: Mapping[str, Objective],
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Divergence]:
    """How far the gradients of an optimizer step are apart between layouts, objective by objective.

    Advantages are drawn from N(0, 1). old_logprobs are the model's plus noise, sampler_logprobs and
    ref_logprobs are these plus noise.

    Args:
        model: with warpo's packed attention; its gradients are cleared.
        rollouts: two or more.
        objectives: by name.
        max_new_tokens: the constant length of "sequence-mean-token-sum-norm".

    Returns:
        One for each objective and layout.
    """
    samples = _samples(model, rollouts, temperature, seed)
    device = next(model.parameters()).device
    layouts = {
        name: [_packed(micro).to(device) for micro in micros]
        for name, micros in _micro_batches(samples).items()
    }
    padded = _Padded(samples, device)
    results = []
    for done, (name, objective) in enumerate(objectives.items()):
        progress(done, len(objectives))
        options: dict[str, Any] = dict(temperature=temperature, max_new_tokens=max_new_tokens)
        whole = _gradient(
            model, step.accumulate_gradients, layouts["accumulation 1"], objective, **options
        )
        for layout in LAYOUTS:
            gradient = (
                _gradient(model, padded.backward, objective, **options)
                if layout == "padded"
                else _gradient(
                    model, step.accumulate_gradients, layouts[layout], objective, **options
                )
            )
            results.append(
                Divergence(objective=name, layout=layout, relative=_relative(gradient, whole))
            )
    return results


def _samples(
    model: PreTrainedModel, rollouts: Sequence[Rollout], temperature: float, seed: int
) -> list[_Sample]:
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for rollout in rollouts:
        batch = pack([rollout]).to(next(model.parameters()).device)
        current = step.score(model, batch, temperature).cpu()
        noise = NOISE * torch.randn(3, len(current), generator=generator)
        advantages = torch.randn((), generator=generator).expand(len(current))
        old = current + noise[0]
        samples.append(
            _Sample(
                rollout=replace(rollout, advantages=advantages),
                sampler_logprobs=old + noise[1],
                old_logprobs=old,
                ref_logprobs=old + noise[2],
            )
        )
    return samples


def _micro_batches(samples: Sequence[_Sample]) -> dict[str, list[list[_Sample]]]:
    lengths = [sample.rollout.num_tokens for sample in samples]
    budget = max(*lengths, -(-sum(lengths) // PACKED_MICRO_BATCHES))
    order = iter(random.Random(0).sample(samples, len(samples)))
    return {
        "accumulation 1": [list(samples)],
        "accumulation n": [[sample] for sample in samples],
        "packed": [
            [next(order) for _ in micro]
            for micro in split_by_tokens([s.rollout for s in samples], budget)
        ],
    }


def _packed(samples: Sequence[_Sample]) -> Batch:
    return replace(
        pack([sample.rollout for sample in samples]),
        sampler_logprobs=torch.cat([sample.sampler_logprobs for sample in samples]),
        old_logprobs=torch.cat([sample.old_logprobs for sample in samples]),
        ref_logprobs=torch.cat([sample.ref_logprobs for sample in samples]),
    )


class _Padded:
    """The (B, T) batch, padded on the right."""

    def __init__(self, samples: Sequence[_Sample], device: torch.device) -> None:
        rollouts = [sample.rollout for sample in samples]
        shape = (len(samples), max(rollout.num_tokens for rollout in rollouts))
        self._ids = torch.zeros(shape, dtype=torch.int64, device=device)
        self._attended = torch.zeros(shape, dtype=torch.int64, device=device)
        self._mask = torch.zeros(shape, dtype=torch.bool, device=device)
        self._old, self._ref, self._sampled = torch.zeros(3, *shape, device=device)
        self._advantages = torch.stack(
            [r.advantages[0] for r in rollouts if r.advantages is not None]
        ).to(device)
        for row, (sample, rollout) in enumerate(zip(samples, rollouts, strict=True)):
            ids = torch.tensor(rollout.prompt_ids + rollout.completion.token_ids)
            completion = slice(len(rollout.prompt_ids), len(ids))
            self._ids[row, : len(ids)] = ids
            self._attended[row, : len(ids)] = 1
            self._mask[row, completion] = True
            self._old[row, completion] = sample.old_logprobs
            self._ref[row, completion] = sample.ref_logprobs
            self._sampled[row, completion] = sample.sampler_logprobs

    def backward(
        self,
        model: PreTrainedModel,
        objective: Objective,
        *,
        temperature: float,
        max_new_tokens: int,
    ) -> None:
        with _plain_attention(model):
            output = model(input_ids=self._ids, attention_mask=self._attended, use_cache=False)
        logprobs = ops.logprobs(
            output.logits[:, :-1],
            self._ids[:, 1:],
            temperature=temperature,
            mask=self._mask[:, 1:],
        )
        constant = objective.aggregation == "sequence-mean-token-sum-norm"
        ops.policy_loss(
            logprobs,
            self._old[:, 1:],
            self._advantages,
            objective,
            mask=self._mask[:, 1:],
            ref_logprobs=self._ref[:, 1:],
            sampler_logprobs=self._sampled[:, 1:],
            denominator=float(len(self._ids) * max_new_tokens) if constant else None,
        ).loss.backward()


@contextmanager
def _plain_attention(model: PreTrainedModel) -> Any:
    packed = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(packed)


def _gradient(
    model: PreTrainedModel, backward: Callable[..., object], *args: Any, **options: Any
) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    backward(model, *args, **options)
    gradient = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return gradient


def _relative(gradient: Sequence[Tensor], whole: Sequence[Tensor]) -> float:
    if len(gradient) != len(whole):
        return float("nan")
    # in float64: the sum of squares would add its own rounding
    distance = sum((a - b).double().square().sum() for a, b in zip(gradient, whole, strict=True))
    norm = sum(b.double().square().sum() for b in whole)
    return float((distance / norm).sqrt()) if norm else float("nan")
