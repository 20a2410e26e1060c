"""Proof that the gradient of an optimizer step does not depend on how its rollouts are laid out.

The same rollouts, some of which begin with the same sampled tokens, are laid out in five ways:

    accumulation 1   one packed micro-batch, the trie of all
    segments         the same, by the attention of a CPU's long rows where these are short ones
    accumulation n   micro-batches of one rollout each
    packed           a few micro-batches, filled by a token budget
    alone            each rollout in a row of its own, by the model's own eager attention

The first four are `accumulate_gradients`, which training runs. The last shares with it the
parameters and the kernels of logprobs and loss, and nothing else: not the packing, not the
attention, not the logits' choice, not the denominator. Each is compared with the first, over all
parameters:

    || g - g_1 ||_2 / || g_1 ||_2  <=  1e-6, and 1e-5 of the last

Logits, logprobs, losses and their gradients are float32, as in training. The model's own products
are taken in float64, because in float32 they can exceed the bound by themselves: a product of other
rows is summed in another order, which moves logits by about 1e-6, and ratios with them.
transformers' eager attention still takes its softmax in float32, hence the larger
bound of the last.

In the dtype that is trained the model's rounding hides what accumulation adds, 2e-3 in bfloat16. So
there one micro-batch stands against itself, REPEATS times over: each adds the same gradient, by a
power of two smaller, and what differs is the accumulation's alone: 8e-3 if sums were bfloat16.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from warpo.engine.learner.optimizer import float32_gradients
from warpo.engine.learner.step import accumulate_gradients
from warpo.engine.models.attention import segments_of_any_length
from warpo.engine.models.batch import pack
from warpo.engine.models.micro_batches import TokenCount, split_by_tokens
from warpo.engine.models.model import load_model
from warpo.engine.models.score import device_of, score
from warpo.engine.models.step_rollouts import StepRollouts
from warpo.engine.types import ReportProgress, TokenSequence
from warpo.kernels import ops
from warpo.kernels.objectives import Objective

# Each layout and its bound.
LAYOUTS = {"segments": 1e-6, "accumulation n": 1e-6, "packed": 1e-6, "alone": 1e-5}

# A power of two, and the bound of what they add up to.
REPEATS, REPEATED_BOUND = 16, 1e-6

# Kept of the model: at most this many layers, and one of each kind.
MAX_LAYERS, MAX_VOCABULARY = 2, 1024
# Standard deviation, nats, of the difference between old and new policy, and between sampler and
# old policy: enough that rows clip, mask and truncate some tokens and leave others.
NOISE = 0.3
PACKED_MICRO_BATCHES = 3
_NOISY_COLUMNS = ("advantages", "old_logprobs", "sampler_logprobs", "ref_logprobs")


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


def load_cut_model(
    path: str,
    sequences: Sequence[TokenSequence],
    device: torch.device,
    dtype: torch.dtype = torch.float64,
) -> tuple[PreTrainedModel, list[TokenSequence]]:
    """A part of a model that any machine holds and that takes seconds, and sequences in its tokens.

    Returns:
        The first MAX_LAYERS layers and the first of each kind, with MAX_VOCABULARY tokens, in
        `dtype` up to the logits, which are float32, the widest type of the kernels.
    """
    model = load_model(path, "float32", torch.device("cpu"))
    _cut_layers(model)
    number = _cut_vocabulary(model, sequences)
    model.get_output_embeddings().register_forward_hook(lambda _module, _args, out: out.float())
    if dtype == torch.float64 and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # grouped products know no float64
    renumbered = [replace(x, token_ids=number[x.token_ids]) for x in sequences]
    return nn.Module.to(model, device, dtype), renumbered


def _cut_layers(model: PreTrainedModel) -> None:
    decoder: Any = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return
    kinds = list(getattr(decoder.config, "layer_types", None) or [""] * len(layers))
    kept = sorted({*range(min(MAX_LAYERS, len(layers))), *map(kinds.index, kinds)})
    decoder.layers = nn.ModuleList(layers[i] for i in kept)
    if kinds[0]:
        # a model looks its masks and rotary angles up by the place of a layer
        decoder.config.layer_types = [kinds[i] for i in kept]


def _cut_vocabulary(model: PreTrainedModel, sequences: Sequence[TokenSequence]) -> np.ndarray:
    """Keep the tokens of the sequences and some more; returns the new number of each that stays."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    used = {token for sequence in sequences for token in sequence.token_ids.tolist()}
    others = (token for token in range(embedding.num_embeddings) if token not in used)
    kept = sorted({*used, *islice(others, max(0, MAX_VOCABULARY - len(used)))})
    tied = head.weight is embedding.weight
    embedding.weight = nn.Parameter(embedding.weight.detach()[kept])
    embedding.padding_idx = None
    head.weight = embedding.weight if tied else nn.Parameter(head.weight.detach()[kept])
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias.detach()[kept])
    numbers = np.zeros(max(kept) + 1, np.int64)
    numbers[kept] = np.arange(len(kept))
    return numbers


def divergences(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    objectives: Mapping[str, Objective],
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int = 0,
    progress: ReportProgress = lambda done, total: None,
) -> list[Divergence]:
    """Measure how far gradients of an optimizer step differ between layouts, for each objective.

    Advantages are drawn from N(0, 1). old_logprobs are the model's plus noise, sampler_logprobs and
    ref_logprobs are these plus noise.

    Args:
        model: with warpo's packed attention; its gradients are cleared.
        sequences: two or more; some that begin like the first are added.
        objectives: by name.
        max_new_tokens: the constant length of "sequence-mean-token-sum-norm".

    Returns:
        One for each objective and layout.
    """
    sequences = with_branches(sequences)
    rollouts = _noisy_rollouts(model, sequences, temperature, seed)
    layouts = {
        name: [rollouts.batch(rows) for rows in micro_batches]
        for name, micro_batches in _micro_batches(sequences).items()
    }
    options: dict[str, Any] = dict(temperature=temperature, max_new_tokens=max_new_tokens)
    results = []
    for done, (name, objective) in enumerate(objectives.items()):
        progress(done, len(objectives))
        gradients = {
            layout: _gradient(model, accumulate_gradients, batches, objective, **options)
            for layout, batches in layouts.items()
        }
        with segments_of_any_length():
            gradients["segments"] = _gradient(
                model, accumulate_gradients, layouts["accumulation 1"], objective, **options
            )
        gradients["alone"] = _gradient(model, _backward_alone, rollouts, objective, **options)
        for layout in LAYOUTS:
            relative = _relative(gradients[layout], gradients["accumulation 1"])
            results.append(Divergence(objective=name, layout=layout, relative=relative))
    return results


def repeated_divergence(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    objective: Objective,
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int = 0,
) -> float:
    """Relative L2 distance of the gradient of one micro-batch, REPEATS times over, from its own."""
    float32_gradients(model.parameters())
    batch = _noisy_rollouts(model, sequences, temperature, seed).batch(range(len(sequences)))
    options: dict[str, Any] = dict(temperature=temperature, max_new_tokens=max_new_tokens)
    repeated = _gradient(model, accumulate_gradients, [batch] * REPEATS, objective, **options)
    return _relative(
        repeated, _gradient(model, accumulate_gradients, [batch], objective, **options)
    )


def with_branches(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """The sequences, the first one again, and another that leaves it amid its trained tokens: then
    sampled tokens are shared too, and a token predicts several targets.
    """
    first = sequences[0]
    start, stop = first.trained_spans[0]
    place, ids = (start + stop) // 2, first.token_ids.copy()
    others = ids[ids != ids[place]]
    ids[place] = others[0] if len(others) else ids[place]
    return [*sequences, first, replace(first, token_ids=ids)]


def _noisy_rollouts(
    model: PreTrainedModel, sequences: Sequence[TokenSequence], temperature: float, seed: int
) -> StepRollouts:
    generator, device = torch.Generator().manual_seed(seed), device_of(model)
    columns: dict[str, list[Tensor]] = {name: [] for name in _NOISY_COLUMNS}
    for sequence in sequences:
        current = score(model, pack([sequence]).to(device), temperature).cpu()
        noise = NOISE * torch.randn(3, len(current), generator=generator)
        old = current + noise[0]
        columns["advantages"].append(torch.randn((), generator=generator).expand(len(current)))
        columns["old_logprobs"].append(old)
        columns["sampler_logprobs"].append(old + noise[1])
        columns["ref_logprobs"].append(old + noise[2])
    joined: dict[str, Any] = {name: torch.cat(parts) for name, parts in columns.items()}
    return StepRollouts(
        sequences=list(sequences),
        group_ids=np.arange(len(sequences)),
        rewards=torch.zeros(len(sequences), dtype=torch.float64),
        **joined,
    ).to(device)


def _micro_batches(sequences: Sequence[TokenSequence]) -> dict[str, list[list[int]]]:
    """The rows of each micro-batch of a layout."""
    lengths, count = [sequence.num_tokens for sequence in sequences], len(sequences)
    tokens = TokenCount().with_items(sequences).read
    budget = max(*lengths, -(-tokens // PACKED_MICRO_BATCHES))
    order = iter(random.Random(0).sample(range(count), count))
    return {
        "accumulation 1": [list(range(count))],
        "accumulation n": [[row] for row in range(count)],
        "packed": [[next(order) for _ in micro] for micro in split_by_tokens(sequences, budget)],
    }


def _backward_alone(
    model: PreTrainedModel,
    rollouts: StepRollouts,
    objective: Objective,
    *,
    temperature: float,
    max_new_tokens: int,
) -> None:
    """The gradient by transformers' forward passes, and one loss over a padded (B, T) batch."""
    device = device_of(model)
    logprobs, masks = [], []
    with eager_attention(model):
        for sequence in rollouts.sequences:
            ids = torch.from_numpy(sequence.token_ids)[None].to(device)
            logits = model(input_ids=ids, use_cache=False).logits
            logprobs.append(ops.logprobs(logits[0, :-1], ids[0, 1:], temperature=temperature))
            first = sequence.prompt_length - 1
            masks.append(torch.arange(ids.shape[1] - 1, device=device) >= first)
    mask = pad_sequence(masks, batch_first=True)

    def padded(column: Tensor | None) -> Tensor:
        """(B, T) of the completions' tokens, 0 elsewhere."""
        assert column is not None
        return torch.zeros(mask.shape, device=device).masked_scatter(mask, column)

    assert rollouts.advantages is not None
    constant = objective.aggregation == "sequence-mean-token-sum-norm"
    ops.policy_loss(
        pad_sequence(logprobs, batch_first=True),
        padded(rollouts.old_logprobs),
        rollouts.advantages[rollouts.cu_seqlens[:-1].long()],
        objective,
        mask=mask,
        ref_logprobs=padded(rollouts.ref_logprobs),
        sampler_logprobs=padded(rollouts.sampler_logprobs),
        denominator=float(len(rollouts) * max_new_tokens) if constant else None,
    ).loss.backward()


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model with the attention of its own code, in which every option of it is computed."""
    packed = model.config._attn_implementation
    model.set_attn_implementation("eager")
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
