"""What the engine asks of a sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from warpo.engine.batch import Completion


class Interrupted(Exception):
    """Sampling was stopped by `stop`; nothing is left running in the sampler."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingOptions:
    """How completions are drawn.

    Attributes:
        group_size: completions of each prompt.
        temperature: 0 is greedy.
        max_new_tokens: length limit of a completion.
        seed: fixes every draw, whatever the batch looks like and whatever was sampled before.
        top_k: draw among the k most probable tokens (and those that tie with the last); 0: all.
        top_p: draw among the most probable tokens, of those that top_k kept, whose mass reaches
            top_p first, in (0, 1]; 1: all. Logprobs are normalised over what is kept.
    """

    group_size: int
    temperature: float
    max_new_tokens: int
    seed: int
    top_k: int = 0
    top_p: float = 1.0


class Sampler(Protocol):
    """Prompts in, token ids and logprobs out; weights written in place by `publish`."""

    weight_version: int

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        options: SamplingOptions,
        stop: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[list[Completion]]:
        """`group_size` completions of each prompt, in the order of the prompts.

        Raises:
            Interrupted: `stop` returned True; it is asked between decoding steps.
        """
        ...

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability (temperature 1) of token 1, 2, ... of each sequence given those before
        it.
        """
        ...

    def publish(self, model: torch.nn.Module) -> int:
        """Write the learner's parameters into the sampler's, forget cached prefixes, count a
        version.

        Returns:
            Bytes copied.
        """
        ...

    def release_kv(self) -> None:
        """Give the KV cache's memory to the learner. The weights stay."""
        ...

    def resume_kv(self) -> None:
        """Take the memory back before sampling."""
        ...
