"""Rewards from a checkpoint: a reward model, or a process reward model, in the engine's process.

Both read the token ids that the policy wrote. A process reward model scores each step of a
completion at the last token of its text. Steps end with a newline, or with the text that the
attribute `step_separator` of the checkpoint's config.json holds, and the last one with the text of
the completion. With an empty separator each token is a step, but for special ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from warpo.engine.errors import ConfigError, RewardError
from warpo.engine.models.batch import order_by_length, pack
from warpo.engine.models.files import load_tokenizer, read_config
from warpo.engine.models.scalar import load_scalar_model, token_scores
from warpo.engine.rollout.rewards.base import SourceContext
from warpo.engine.rollout.rewards.scores import Scored
from warpo.engine.rollout.rewards.steps import separator_ends, token_indices
from warpo.engine.types import Completion, Prompt, TokenSequence, TokenSteps


class RewardModel:
    """The checkpoint of a reward model in a directory, without gradient: its score at the last
    token of prompt + completion.

    Raises:
        ConfigError: the checkpoint is not one of a classifier with one label, or was trained with
            another vocabulary than the policy's.
    """

    def __init__(self, path: str, context: SourceContext) -> None:
        config = read_config(path)
        if not any("Classification" in name for name in config.architectures or ()):
            found = ", ".join(config.architectures or ["nothing"])
            raise ConfigError(
                f"{path} is not a reward model but {found}: "
                "train one with algorithm: bradley_terry, k_wise or process_reward"
            )
        _check_vocabulary(path, context.tokenizer)
        self._path = path
        self._tokenizer = context.tokenizer
        self._token_budget = context.token_budget
        self._device = context.device
        self._separator = getattr(config, "step_separator", "\n")
        model = load_scalar_model(path, context.dtype, context.device)
        self._model = model.requires_grad_(False).eval()

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], texts: Sequence[str]
    ) -> Scored:
        """The score at the last token of each prompt + completion."""
        last = [[len(completion) - 1] for completion in completions]
        return Scored(scores=[row[0] for row in self._scores(prompts, completions, last)])

    def close(self) -> None:
        """Give the memory of the weights back."""
        del self._model

    @torch.no_grad()
    def _scores(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        indices: Sequence[Sequence[int]],
    ) -> list[list[float]]:
        """Scores at the given tokens of each completion, in packed micro-batches."""
        sequences = [
            TokenSequence.of(prompt.token_ids, completion.token_ids, prompt.prompt_id)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        scores: list[list[float]] = [[] for _ in sequences]
        for rows in order_by_length(sequences, self._token_budget):
            batch = pack([sequences[row] for row in rows]).to(self._device)
            places = [
                batch.gather_index[number, sequences[row].prompt_length + index]
                for number, row in enumerate(rows)
                for index in indices[row]
            ]
            found = iter(token_scores(self._model, batch, torch.stack(places)).tolist())
            for row in rows:
                scores[row] = list(itertools.islice(found, len(indices[row])))
        self._check_finite(scores)
        return scores

    def _check_finite(self, scores: list[list[float]]) -> None:
        for i, row in enumerate(scores):
            if not all(map(math.isfinite, row)):
                raise RewardError(f"reward model {self._path} gave {row} for completion {i}")


class ProcessRewardModel(RewardModel):
    """A reward model that scores each step of a completion, at the last token of its text."""

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], texts: Sequence[str]
    ) -> Scored:
        """(token, score) of each step of each completion."""
        indices = [
            self._step_tokens(completion.token_ids.tolist(), text)
            for completion, text in zip(completions, texts, strict=True)
        ]
        scores = self._scores(prompts, completions, indices)
        steps: list[TokenSteps] = [
            list(zip(*pair, strict=True)) for pair in zip(indices, scores, strict=True)
        ]
        return Scored(scores=steps)

    def _step_tokens(self, ids: list[int], text: str) -> list[int]:
        if not self._separator:
            special = set(self._tokenizer.all_special_ids)
            return [i for i, token in enumerate(ids) if token not in special] or [len(ids) - 1]
        ends = separator_ends(text, self._separator)
        # Two separators in a token end one step.
        return sorted(set(token_indices(self._decode, ids, text, ends)))

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def _check_vocabulary(path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    ours, theirs = tokenizer.get_vocab(), load_tokenizer(path).get_vocab()
    if ours == theirs:
        return
    different = sorted(ours.items() ^ theirs.items(), key=lambda pair: pair[1])
    raise ConfigError(
        f"reward model {path} has another vocabulary than the policy ({len(theirs)} and "
        f"{len(ours)} tokens, different at {different[0][0]!r}): it reads the policy's token ids; "
        "train it from a model with the policy's tokenizer, or serve it by HTTP"
    )
