"""Checks that every sampler makes before it draws, and the seeds it draws with."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np

from warpo.engine.errors import TrainingError
from warpo.engine.rollout.sampler.base import SamplingOptions
from warpo.engine.types import Completion

# vLLM raises a smaller temperature to 0.01 without an error, and the logprobs with it; a larger one
# it refuses.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0


def check_request(
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    *,
    max_model_len: int,
    vocab_size: int,
) -> None:
    """Refuse what cannot be sampled, before anything runs.

    Raises:
        ValueError: an option is out of range, a prompt is empty or holds an id outside the
            vocabulary, or prompt and completion together exceed `max_model_len`.
    """
    if options.group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {options.group_size}")
    if options.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {options.max_new_tokens}")
    if options.temperature != 0 and not MIN_TEMPERATURE <= options.temperature <= MAX_TEMPERATURE:
        raise ValueError(
            f"temperature must be 0 (greedy) or {MIN_TEMPERATURE} to {MAX_TEMPERATURE}, "
            f"got {options.temperature}"
        )
    if options.top_k < 0:
        raise ValueError(f"top_k must be 0 (off) or at least 1, got {options.top_k}")
    if not 0 < options.top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1 (off), got {options.top_p}")
    check_ids(prompts, vocab_size=vocab_size, noun="prompt")
    for index, prompt in enumerate(prompts):
        if len(prompt) + options.max_new_tokens > max_model_len:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens: with max_new_tokens = "
                f"{options.max_new_tokens} it exceeds max_model_len = {max_model_len}"
            )


def check_ids(sequences: Sequence[Sequence[int]], *, vocab_size: int, noun: str) -> None:
    """Refuse empty sequences and ids outside the vocabulary: a GPU would read past the table."""
    for index, ids in enumerate(sequences):
        if not ids:
            raise ValueError(f"{noun} {index} is empty")
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise ValueError(
                f"{noun} {index} holds ids from {min(ids)} to {max(ids)}: the model's vocabulary "
                f"is 0 to {vocab_size - 1}; is this the model's own tokenizer?"
            )


def check_lengths(sequences: Sequence[Sequence[int]], *, max_model_len: int) -> None:
    for index, ids in enumerate(sequences):
        if len(ids) > max_model_len:
            raise ValueError(
                f"sequence {index} has {len(ids)} tokens, more than max_model_len = {max_model_len}"
            )


def prompt_seed(options: SamplingOptions, prompt: int) -> int:
    """Seed of the first completion of a prompt; completion i of the group draws with this + i.

    Scrambled, because callers number their steps: seed 7's prompt 1 would otherwise repeat the
    draws of seed 8's prompt 0.
    """
    return random.Random(options.seed).getrandbits(60) + prompt * options.group_size


def check_logprobs(prompt: int, completion: Completion) -> Completion:
    """The completion, unless a logprob is NaN or infinite: the weights are, then, too."""
    if not math.isfinite(completion.logprobs.sum(dtype=np.float64)):
        first = completion.logprobs[:4].tolist()
        raise TrainingError(
            f"a completion of prompt {prompt} has logprobs {first}...: version "
            f"{completion.weight_version} of the weights is not finite, its activations overflow, "
            "or the sampler ran under autocast; lower update.lr, or check the model's own files"
        )
    return completion
