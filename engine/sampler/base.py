"""What the engine asks of a sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from warpo.engine.errors import WeightMismatch
from warpo.engine.types import Completion

MAX_LAG = 0
"""Steps of the learner that the weights of a sample may be behind."""


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


def check_versions(groups: Sequence[Sequence[Completion]], step: int) -> None:
    """Refuse completions of weights that are too old, or not yet made, for a step.

    Args:
        step: that learns from them; it begins with the weights of version step - 1.

    Raises:
        WeightMismatch: a version is outside step - 1 - MAX_LAG to step - 1.
    """
    versions = {completion.weight_version for group in groups for completion in group}
    if not versions <= set(range(step - 1 - MAX_LAG, step)):
        raise WeightMismatch(
            f"step {step} sampled with versions {sorted(versions)} of the weights, and the learner "
            f"has version {step - 1}"
        )
