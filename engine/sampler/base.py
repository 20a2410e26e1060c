"""What the engine asks of a sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

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
    """

    group_size: int
    temperature: float
    max_new_tokens: int
    seed: int


class Sampler(Protocol):
    """Prompts in, token ids and logprobs out.

    Attributes:
        module: the model that samples. Its parameters are read anew by every forward pass, so
            whatever writes to them, in place, changes what is sampled.
        weight_version: of the weights, as `weights_changed` was told.
    """

    weight_version: int

    @property
    def module(self) -> nn.Module: ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> object:
        """Copy named tensors, as a checkpoint has them, over the module's parameters."""
        ...

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

    def weights_changed(self, version: int) -> None:
        """Forget what was computed with the weights before, and count the new ones."""
        ...

    def check_prefixes(self, sequence: Sequence[int]) -> None:
        """Prove that nothing computed with older weights is attended to any more.

        Args:
            sequence: token ids that were sampled, or scored, before `weights_changed`, which
                nothing has been asked since.

        Raises:
            WeightMismatch: a part of the sequence is still in the prefix cache.
        """
        ...

    def release_kv(self) -> None:
        """Give the KV cache's memory to the learner. The weights stay."""
        ...

    def resume_kv(self) -> None:
        """Take the memory back before sampling."""
        ...
