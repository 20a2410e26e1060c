"""Protocols of a sampler: to sample, to take weights, and to lend its KV cache."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from warpo.engine.config.samplers import SAMPLERS
from warpo.engine.errors import WeightMismatch
from warpo.engine.types import Completion

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from warpo.engine.config.policy import Config

MAX_LAG = 0
"""Steps of the learner that the weights of a sample may be behind."""


class Interrupted(Exception):
    """Sampling was stopped by `stop`; nothing is left running in the sampler."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingOptions:
    """Settings by which completions are drawn.

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


@runtime_checkable
class Sampler(Protocol):
    """Prompts in, token ids and logprobs out: what sampling needs.

    Attributes:
        weight_version: version of the weights, as given to `WeightTarget.weights_changed`.
    """

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


@runtime_checkable
class WeightTarget(Protocol):
    """Destination of published weights.

    Attributes:
        module: the model that samples. Its parameters are read anew by every forward pass, so
            whatever writes to them, in place, changes what is sampled.
    """

    @property
    def module(self) -> nn.Module: ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> object:
        """Copy named tensors, as a checkpoint has them, over the module's parameters."""
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


@runtime_checkable
class KvCache(Protocol):
    """Memory that sampler and learner take turns with."""

    def release_kv(self) -> None:
        """Give the KV cache's memory to the learner. The weights stay."""
        ...

    def resume_kv(self) -> None:
        """Take the memory back before sampling."""
        ...


class ColocatedSampler(Sampler, WeightTarget, KvCache, Protocol):
    """A sampler in the learner's process, which is all three."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerSettings:
    """Settings that a sampler is built from.

    Attributes:
        model_path: folder of a Hugging Face checkpoint.
        dtype: float32 | bfloat16 | float16, of the sampler's weights.
        lm_head_dtype: same | float32, in which logits are computed.
        max_model_len: most tokens of a prompt and its completion together.
        eos_token_ids: the ids that end a completion.
        kv_cache_gib: memory of the KV cache, GiB, where it holds one between calls.
        device: the device it runs on, if it has a choice.
    """

    model_path: str
    dtype: str
    lm_head_dtype: str = "same"
    max_model_len: int
    eos_token_ids: Sequence[int]
    kv_cache_gib: float
    device: torch.device


class SamplerMemory(Protocol):
    """Device memory of a sampler with a KV cache, besides its weights and that cache."""

    @property
    def most_sequences(self) -> int:
        """Sequences that it takes together at most."""
        ...

    def cache_tokens(self, tokens: int) -> int:
        """Tokens that the KV cache must hold for one sequence of this many."""
        ...

    def sampling_bytes(self, prompt_tokens: int) -> int:
        """Working memory while it samples a step of prompts of this many tokens."""
        ...

    def probe_bytes(self, tokens: int) -> int:
        """Working memory while it scores the probe's sequences of this many tokens."""
        ...

    def probe_cache_bytes(self, tokens: int) -> int:
        """Bytes of a released KV cache that probe sequences of this many tokens bring back."""
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


def open_sampler(name: str, settings: SamplerSettings) -> ColocatedSampler:
    """The sampler of that name, with the weights of the checkpoint.

    Raises:
        SamplerError: its library or the model does not allow it.
    """
    sampler: ColocatedSampler = pkgutil.resolve_name(SAMPLERS[name].opener)(settings)
    return sampler


def plan_sampler_memory(
    config: Config, hf_config: PretrainedConfig, device: torch.device
) -> SamplerMemory | None:
    """Predict the memory of the config's sampler, if it has a plan."""
    kind = SAMPLERS[config.sampler]
    if not kind.memory:
        return None
    memory: SamplerMemory = pkgutil.resolve_name(kind.memory)(config, hf_config, device)
    return memory
