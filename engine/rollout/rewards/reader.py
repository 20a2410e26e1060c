"""What a reward model reads of prompts and completions: the policy's tokens, or texts in its own.

A reward model whose tokenizer has the policy's vocabulary reads the policy's token ids as they were
sampled. Any other reads what it would have learned from, had the completion stood in a file for
algorithm bradley_terry:

- The prompt is the text of the data, behind the special tokens that the tokenizer puts before any
  text; chat messages go through the reward model's own chat template.
- The completion is the text that the policy's tokens decode to without special tokens, tokenised
  as it goes on after the prompt.
- A completion that the policy has ended is ended with the reward model's own end of turn after
  messages, and its end-of-sequence token after text. One that was cut is not ended.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from warpo.engine.data.chat import render
from warpo.engine.data.examples import Ending
from warpo.engine.data.prompts import prompt_text
from warpo.engine.data.tokens import Encoder
from warpo.engine.errors import ConfigError, DataError, RewardError
from warpo.engine.models.files import load_tokenizer, max_positions
from warpo.engine.rollout.rewards.base import SourceContext
from warpo.engine.rollout.rewards.steps import separator_ends, token_indices
from warpo.engine.types import Completion, Prompt, TokenSequence


class Steps(NamedTuple):
    """The steps of a completion.

    Attributes:
        read: of each step the index of its last token, among those of the completion that the
            reward model reads.
        sampled: the same among those that the policy sampled.
    """

    read: list[int]
    sampled: list[int]


class Reader(Protocol):
    """Sequences that a reward model scores."""

    def sequences(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], texts: Sequence[str]
    ) -> list[TokenSequence]:
        """Each prompt with its completion.

        Args:
            texts: the text of each completion, without special tokens.

        Raises:
            RewardError: the reward model cannot read one of them.
        """
        ...

    def steps(self, prompt: Prompt, completion: Completion, text: str, separator: str) -> Steps:
        """The steps of a completion, which end with the separator; empty: each token is one."""
        ...


def open_reader(path: str, config: PretrainedConfig, context: SourceContext) -> Reader:
    """The reader of the reward model in a directory.

    Raises:
        ConfigError: its tokenizer cannot read the prompts of this run.
    """
    tokenizer = load_tokenizer(path)
    if tokenizer.get_vocab() == context.tokenizer.get_vocab():
        return SameTokens(context.tokenizer)
    try:
        return OwnTokens(path, tokenizer, context, config.get_text_config())
    except DataError as error:
        raise ConfigError(
            f"reward model {path} has another vocabulary than the policy and reads texts: {error}"
        ) from None


class SameTokens:
    """The policy's token ids, as they were sampled."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def sequences(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], texts: Sequence[str]
    ) -> list[TokenSequence]:
        """The ids of each prompt and completion."""
        return [
            TokenSequence.of(prompt.token_ids, completion.token_ids)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    def steps(self, prompt: Prompt, completion: Completion, text: str, separator: str) -> Steps:
        """Without separator, all tokens but the special ones."""
        ids = completion.token_ids.tolist()
        if separator:
            ends = separator_ends(text, separator)
            # Two separators in a token end one step.
            found = sorted(set(token_indices(_decoder(self._tokenizer), ids, text, ends)))
        else:
            special = set(self._tokenizer.all_special_ids)
            found = [i for i, token in enumerate(ids) if token not in special] or [len(ids) - 1]
        return Steps(found, found)


class OwnTokens:
    """Texts in the reward model's own tokens.

    Args:
        config: of the reward model's text part.

    Raises:
        DataError: prompts are messages and it has no chat template, or one that fails on the first
            of them; or it has no token that ends a completion.
    """

    def __init__(
        self,
        path: str,
        tokenizer: PreTrainedTokenizerBase,
        context: SourceContext,
        config: PretrainedConfig,
    ) -> None:
        self._path, self._tokenizer = path, tokenizer
        self._vocab_size, self._positions = config.vocab_size, max_positions(config)
        self._policy_tokenizer = context.tokenizer
        sample = context.prompt
        if not isinstance(sample, str):
            render(sample, tokenizer)
        self._encoder = Encoder(tokenizer, sample if isinstance(sample, str) else "")
        self._ending = Ending(Path(path), tokenizer, not isinstance(sample, str))

    def sequences(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], texts: Sequence[str]
    ) -> list[TokenSequence]:
        """Prompt and completion, each tokenised as the module says."""
        try:
            before = self._prompts(prompts)
            asked = [before[prompt.prompt_id] for prompt in prompts]
            found = self._encoder.continuations(
                [text for text, _ in asked], [ids for _, ids in asked], texts
            )
        except DataError as error:
            raise RewardError(f"reward model {self._path} cannot read a text: {error}") from None
        return [
            self._sequence(prompt, ids, self._ending(own) if completion.finished else own)
            for prompt, (_, ids), own, completion in zip(
                prompts, asked, found, completions, strict=True
            )
        ]

    def steps(self, prompt: Prompt, completion: Completion, text: str, separator: str) -> Steps:
        """A step ends with the token that its text ends in, of the reward model and the policy."""
        if not separator:
            raise RewardError(
                f"reward model {self._path} scores each of its tokens, and the policy has others: "
                "train it with a data.step_separator, or from a model with the policy's tokenizer"
            )
        try:
            prompt_ids = self._prompts([prompt])[prompt.prompt_id][1]
            encoded = self._encoder.continuation_with_ends(self._text(prompt), prompt_ids, text)
        except DataError as error:
            raise RewardError(f"reward model {self._path} cannot read a text: {error}") from None
        if not encoded.ids:
            ended = self._ending([]) if completion.finished else []
            return Steps([len(ended) - 1], [len(completion) - 1])
        last = len(encoded.ends) - 1
        # The last end among those that fall into one token.
        by_token = {
            min(bisect_left(encoded.ends, end), last): end
            for end in separator_ends(text, separator)
        }
        ids, decode = completion.token_ids.tolist(), _decoder(self._policy_tokenizer)
        return Steps([*by_token], token_indices(decode, ids, text, [*by_token.values()]))

    def _prompts(self, prompts: Sequence[Prompt]) -> dict[int, tuple[str, list[int]]]:
        """The text of each prompt and its ids without special tokens before them, by prompt_id."""
        different = {prompt.prompt_id: prompt for prompt in prompts}
        texts = [self._text(prompt) for prompt in different.values()]
        return dict(zip(different, zip(texts, self._encoder(texts), strict=True), strict=True))

    def _text(self, prompt: Prompt) -> str:
        return prompt_text(prompt.fields, self._tokenizer)

    def _sequence(self, prompt: Prompt, ids: list[int], completion: list[int]) -> TokenSequence:
        if isinstance(prompt.fields["prompt"], str):
            ids = self._encoder.with_prefix(ids)
        if not ids:
            raise RewardError(
                f"reward model {self._path}: its tokenizer makes no token of the prompt "
                f"{prompt.fields['prompt']!r:.80}"
            )
        if self._positions is not None and len(ids) + len(completion) > self._positions:
            raise RewardError(
                f"reward model {self._path} has {self._positions} positions, and prompt and "
                f"completion are {len(ids) + len(completion)} of its tokens: lower "
                "rollout.max_new_tokens, or shorten the prompts"
            )
        largest = max([*ids, *completion])
        if largest >= self._vocab_size:
            raise RewardError(
                f"reward model {self._path}: its tokenizer makes the id {largest} of a text, and "
                f"its model has {self._vocab_size} tokens: give it the tokenizer that it was "
                "trained with"
            )
        return TokenSequence.of(ids, completion)


def _decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    """Gives the text of some ids without special tokens."""
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))
