"""Sampling with transformers only, where vLLM is not installed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor, nn

from warpo.engine.models.architectures import plain_attention
from warpo.engine.models.files import load_weights, read_config
from warpo.engine.models.model import set_lm_head_dtype
from warpo.engine.rollout.sampler.base import (
    ColocatedSampler,
    Interrupted,
    SamplerSettings,
    SamplingOptions,
)
from warpo.engine.rollout.sampler.requests import (
    check_ids,
    check_lengths,
    check_logprobs,
    check_request,
    prompt_seed,
)
from warpo.engine.types import Completion


def open_sampler(settings: SamplerSettings) -> ColocatedSampler:
    """`TransformersSampler` as the config has it."""
    return TransformersSampler(
        settings.model_path,
        dtype=settings.dtype,
        lm_head_dtype=settings.lm_head_dtype,
        max_model_len=settings.max_model_len,
        eos_token_ids=settings.eos_token_ids,
        device=settings.device,
    )


@dataclass(kw_only=True, slots=True)
class _Row:
    """A completion being sampled."""

    generator: torch.Generator
    length: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """The logits (B, V), -inf outside the set that `SamplingOptions` describes."""
    if 0 < top_k < logits.shape[-1]:
        last = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < last, -torch.inf)
    if top_p < 1:
        ordered, ids = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        # The mass before a token, so that the most probable one always stays.
        dropped = probs.cumsum(-1) - probs >= top_p
        logits = logits.masked_fill(dropped.scatter(-1, ids, dropped), -torch.inf)
    return logits


class TransformersSampler:
    """Samples with `transformers` and a KV cache, in batches of whole groups.

    Each completion draws from its own generator, so it does not depend on its batch but for
    float rounding. At temperature 0 logprobs are those of temperature 1.

    Args:
        model_path: folder of a Hugging Face checkpoint.
        dtype: float32 | bfloat16 | float16, of the sampler's weights.
        lm_head_dtype: same | float32, in which logits are computed.
        max_model_len: most tokens of a prompt and its completion together.
        eos_token_ids: the ids that end a completion.
        device: where the copy of the model lives.
        batch_size: completions decoded together, rounded to whole groups.
        score_tokens: padded tokens of one forward pass of `score`; its logits take this times
            the vocabulary.
    """

    def __init__(
        self,
        model_path: str,
        *,
        dtype: str,
        lm_head_dtype: str = "same",
        max_model_len: int,
        eos_token_ids: Sequence[int],
        device: torch.device | str = "cpu",
        batch_size: int = 256,
        score_tokens: int = 4096,
    ) -> None:
        self.weight_version = 0
        self._max_model_len = max_model_len
        self._batch_size = batch_size
        self._score_tokens = score_tokens
        attention = plain_attention(read_config(model_path))
        model = load_weights(
            transformers.AutoModelForCausalLM,
            model_path,
            dtype=dtype,
            attn_implementation=attention,
        )
        set_lm_head_dtype(model, lm_head_dtype)
        self._device = torch.device(device)
        nn.Module.to(model, self._device)
        self.module: transformers.PreTrainedModel = model.eval().requires_grad_(False)
        self._vocab_size: int = model.config.get_text_config().vocab_size
        self._eos = torch.tensor(list(eos_token_ids), dtype=torch.int64, device=device)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        options: SamplingOptions,
        stop: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[list[Completion]]:
        """`group_size` completions of each prompt, in the order of the prompts.

        Raises:
            Interrupted: `stop` returned True.
            ValueError: a prompt or an option cannot be sampled.
            RuntimeError: the weights are not finite.
        """
        check_request(
            prompts, options, max_model_len=self._max_model_len, vocab_size=self._vocab_size
        )
        per_batch = max(1, self._batch_size // options.group_size)
        total = len(prompts) * options.group_size
        groups: list[list[Completion]] = []
        for start in range(0, len(prompts), per_batch):
            batch = prompts[start : start + per_batch]
            done = start * options.group_size
            rows = [
                _Row(generator=self._generator(prompt_seed(options, index) + i), length=len(prompt))
                for index, prompt in enumerate(batch, start)
                for i in range(options.group_size)
            ]
            for finished in self._decode(batch, rows, options):
                if stop():
                    raise Interrupted(f"stopped with {done} of {total} completions sampled")
                done += finished
                progress(done, total)
            groups += [
                [self._completion(start + i, row) for row in rows[g : g + options.group_size]]
                for i, g in enumerate(range(0, len(rows), options.group_size))
            ]
        return groups

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self._device).manual_seed(seed)

    def _completion(self, prompt: int, row: _Row) -> Completion:
        completion = Completion.of(
            row.token_ids,
            row.logprobs,
            finished=row.finished,
            weight_version=self.weight_version,
        )
        return check_logprobs(prompt, completion)

    @torch.inference_mode()
    def _decode(
        self, prompts: Sequence[Sequence[int]], rows: list[_Row], options: SamplingOptions
    ) -> Iterator[int]:
        """Fill the rows, a token per step; yields before the first step and after each one how many
        rows it finished."""
        yield 0
        group = len(rows) // len(prompts)
        ids, mask = self._left_padded(prompts)
        cache = transformers.DynamicCache(config=self.module.config)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = self._forward(ids, mask, positions, cache)
        cache.batch_repeat_interleave(group)
        logits, mask = logits.repeat_interleave(group, 0), mask.repeat_interleave(group, 0)
        for step in range(1, options.max_new_tokens + 1):
            tokens, logprobs = self._draw(logits, options, rows)
            ended = torch.isin(tokens, self._eos)
            for row, token, logprob, end in zip(
                rows, tokens.tolist(), logprobs.tolist(), ended.tolist(), strict=True
            ):
                row.token_ids.append(token)
                row.logprobs.append(logprob)
                row.finished = end
            alive = (~ended).nonzero().squeeze(-1)
            finished = len(rows) - len(alive)
            if len(alive) == 0 or step == options.max_new_tokens:
                yield len(rows)
                return
            if finished:
                rows = [rows[i] for i in alive.tolist()]
                tokens, mask = tokens[alive], mask[alive]
                cache.batch_select_indices(alive)
            yield finished
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            logits = self._forward(tokens[:, None], mask, mask.sum(-1, keepdim=True) - 1, cache)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: object) -> Tensor:
        output = self.module(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def _left_padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Ids (P, L) and mask (P, L) int64; the last column holds every prompt's last token."""
        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        return ids.to(self._device), mask.to(self._device)

    def _draw(
        self, logits: Tensor, options: SamplingOptions, rows: Sequence[_Row]
    ) -> tuple[Tensor, Tensor]:
        """One token of each row and its logprob: argmax of p / e, e exponential, is a draw of p."""
        if options.temperature == 0:
            logprobs = logits.log_softmax(-1)
            tokens = logits.argmax(-1)
        else:
            kept = truncate(logits / options.temperature, options.top_k, options.top_p)
            logprobs = kept.log_softmax(-1)
            noise = torch.empty_like(logprobs)
            for row, out in zip(rows, noise, strict=True):
                out.exponential_(generator=row.generator)
            tokens = (logprobs - noise.log()).argmax(-1)
        return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability (temperature 1) of token 1, 2, ... of each sequence given those before.

        Raises:
            ValueError: a sequence is empty or longer than `max_model_len`.
        """
        check_ids(sequences, vocab_size=self._vocab_size, noun="sequence")
        check_lengths(sequences, max_model_len=self._max_model_len)
        scores: list[list[float]] = []
        for batch in self._score_batches(sequences):
            width = max(len(sequence) for sequence in batch)
            # Padded on the right, where no earlier token sees it.
            ids = torch.tensor([list(s) + [0] * (width - len(s)) for s in batch])
            ids = ids.to(self._device)
            logits = self.module(input_ids=ids, use_cache=False).logits[:, :-1].float()
            taken = logits.gather(-1, ids[:, 1:, None]).squeeze(-1) - logits.logsumexp(-1)
            scores += [row[: len(s) - 1] for row, s in zip(taken.tolist(), batch, strict=True)]
        return scores

    def _score_batches(self, sequences: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
        batch: list[Sequence[int]] = []
        for sequence in sequences:
            width = max(len(s) for s in [*batch, sequence])
            if batch and (len(batch) + 1) * width > self._score_tokens:
                yield batch
                batch = []
            batch.append(sequence)
        if batch:
            yield batch

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy named tensors over the parameters of their names."""
        own = dict(self.module.named_parameters())
        for name, weight in weights:
            own[name].copy_(weight)

    def weights_changed(self, version: int) -> None:
        """Count the new weights; nothing computed with the old ones outlives `generate`."""
        self.weight_version = version

    def check_prefixes(self, sequence: Sequence[int]) -> None:
        """Nothing: there is no prefix cache."""

    def release_kv(self) -> None:
        """Nothing: the KV cache lives only inside `generate`."""

    def resume_kv(self) -> None:
        """Nothing: the KV cache lives only inside `generate`."""
