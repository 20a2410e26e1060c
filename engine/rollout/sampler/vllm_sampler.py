"""vLLM in the learner's process. On a machine with no GPU: its CPU build, the same engine.

What touches vLLM's inside is in `vllm_internals`; here are requests and phases. vLLM is imported
when a `VllmSampler` is built, not with this module.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from warpo.engine.errors import WeightMismatch
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
from warpo.engine.rollout.sampler.vllm_internals import (
    abort_requests,
    build_llm,
    can_release_kv,
    count_cached_blocks,
    torch_generators_kept,
)
from warpo.engine.types import Completion

logger = logging.getLogger(__name__)


def open_sampler(settings: SamplerSettings) -> ColocatedSampler:
    """`VllmSampler` as the config has it."""
    return VllmSampler(
        settings.model_path,
        dtype=settings.dtype,
        lm_head_dtype=settings.lm_head_dtype,
        max_model_len=settings.max_model_len,
        kv_cache_gib=settings.kv_cache_gib,
        eos_token_ids=settings.eos_token_ids,
    )


class VllmSampler:
    """Samples with an in-process vLLM that reads its weights where others may write them.

    Every request carries its own seed, so sampling draws nothing from the global generators.
    At temperature 0 logprobs are those of temperature 1.

    Args:
        model_path: folder of a Hugging Face checkpoint.
        dtype: float32 | bfloat16 | float16, of the sampler's weights.
        lm_head_dtype: same | float32, in which logits are computed.
        max_model_len: most tokens of a prompt and its completion together.
        kv_cache_gib: memory of the KV cache, GiB.
        eos_token_ids: the ids that end a completion.

    Raises:
        SamplerError: vLLM is missing or of an unsupported version; several ranks and no process
            group; the model cannot be published to (quantised; mixture of experts on a CPU).
    """

    def __init__(
        self,
        model_path: str,
        *,
        dtype: str,
        lm_head_dtype: str = "same",
        max_model_len: int,
        kv_cache_gib: float,
        eos_token_ids: Sequence[int],
    ) -> None:
        vllm, self._llm = build_llm(
            model_path,
            dtype=dtype,
            lm_head_dtype=lm_head_dtype,
            max_model_len=max_model_len,
            kv_cache_gib=kv_cache_gib,
        )
        from vllm.sampling_params import RequestOutputKind

        config = self._llm.llm_engine.model_config
        self.module: nn.Module = self._llm.apply_model(lambda module: module)[0]
        self.weights_changed(0)
        self._max_model_len = max_model_len
        self._vocab_size = config.get_vocab_size()
        self._eos_token_ids = list(eos_token_ids)
        self._sampling_params = vllm.SamplingParams
        self._final_only = RequestOutputKind.FINAL_ONLY
        self._kv_released = False
        self._can_release_kv = can_release_kv()
        if not self._can_release_kv:
            logger.warning(
                "vLLM %s cannot release only its KV cache on this platform: %g GiB stay taken "
                "during updates",
                vllm.__version__,
                kv_cache_gib,
            )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        options: SamplingOptions,
        stop: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[list[Completion]]:
        """`group_size` completions of each prompt, in the order of the prompts.

        Raises:
            Interrupted: `stop` returned True; the requests left are aborted.
            ValueError: a prompt or an option cannot be sampled.
            RuntimeError: the KV cache is released, or the weights are not finite.
        """
        check_request(
            prompts, options, max_model_len=self._max_model_len, vocab_size=self._vocab_size
        )
        # vLLM refuses several greedy completions of one prompt: they are all the same one.
        copies = options.group_size if options.temperature == 0 else 1
        requests = [
            (
                prompt,
                self._sampling_params(
                    n=options.group_size // copies,
                    # Child i of a request draws with seed + i.
                    seed=prompt_seed(options, index),
                    temperature=options.temperature,
                    top_k=options.top_k,
                    top_p=options.top_p,
                    max_tokens=options.max_new_tokens,
                    logprobs=0,
                    stop_token_ids=self._eos_token_ids,
                    # The ids above are all that ends a completion, whatever the checkpoint says.
                    ignore_eos=True,
                    detokenize=False,
                    output_kind=self._final_only,
                ),
            )
            for index, prompt in enumerate(prompts)
        ]
        total = len(prompts) * options.group_size
        outputs = self._run(requests, stop, lambda done: progress(done * copies, total))
        return [
            [
                check_logprobs(index, self._completion(sample))
                for sample in output.outputs
                for _ in range(copies)
            ]
            for index, output in enumerate(outputs)
        ]

    def _completion(self, sample: Any) -> Completion:
        token_ids = list(sample.token_ids)
        if sample.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a completion with {sample.finish_reason!r}")
        return Completion.of(
            token_ids,
            [at[token].logprob for at, token in zip(sample.logprobs, token_ids, strict=True)],
            finished=sample.finish_reason == "stop",
            weight_version=self._version_of(sample),
        )

    def _version_of(self, sample: Any) -> int:
        """The version that vLLM noted next to the tokens; one for the whole completion."""
        versions = {span.version for span in sample.weight_versions}
        if versions != {str(self.weight_version)}:
            raise WeightMismatch(
                f"a completion was sampled by versions {sorted(versions)} of the weights, and the "
                f"sampler holds version {self.weight_version}"
            )
        return self.weight_version

    def _run(
        self,
        requests: Sequence[tuple[Sequence[int], Any]],
        stop: Callable[[], bool] = lambda: False,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[Any]:
        """Step the engine until every request has its output; leave none behind."""
        if self._kv_released:
            raise RuntimeError("the KV cache is released: call resume_kv first")
        engine = self._llm.llm_engine
        outputs: dict[str, Any] = {}
        try:
            for index, (prompt, params) in enumerate(requests):
                engine.add_request(str(index), {"prompt_token_ids": list(prompt)}, params)
            total = engine.get_num_unfinished_requests()
            while engine.has_unfinished_requests():
                if stop():
                    done = total - engine.get_num_unfinished_requests()
                    raise Interrupted(f"stopped with {done} of {total} completions sampled")
                # The CPU build draws from the global generator before it reads a request's own.
                with torch_generators_kept():
                    finished = engine.step()
                outputs.update((output.request_id, output) for output in finished)
                progress(total - engine.get_num_unfinished_requests())
        finally:
            abort_requests(self._llm)
        return [outputs[str(index)] for index in range(len(requests))]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability (temperature 1) of token 1, 2, ... of each sequence given those before.

        Raises:
            ValueError: a sequence is empty or longer than `max_model_len`.
        """
        check_ids(sequences, vocab_size=self._vocab_size, noun="sequence")
        check_lengths(sequences, max_model_len=self._max_model_len)
        # vLLM always samples a token. Asked for the logprob of the last id there, a sequence of
        # max_model_len tokens leaves room for it.
        requests = [
            (
                sequence[:-1],
                self._sampling_params(
                    seed=0,
                    temperature=1.0,
                    max_tokens=1,
                    prompt_logprobs=0,
                    logprob_token_ids=[sequence[-1]],
                    detokenize=False,
                    output_kind=self._final_only,
                ),
            )
            for sequence in sequences
            if len(sequence) > 1
        ]
        outputs = iter(self._run(requests))
        return [
            self._scores(sequence, next(outputs)) if len(sequence) > 1 else []
            for sequence in sequences
        ]

    def _scores(self, sequence: Sequence[int], output: Any) -> list[float]:
        # vLLM's first entry is None: nothing comes before token 0.
        steps = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
        return [at[token].logprob for at, token in zip(steps, sequence[1:], strict=True)]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> object:
        """vLLM's own loader: it fuses, pads and renames."""
        module: Any = self.module
        return module.load_weights(weights)

    def weights_changed(self, version: int) -> None:
        """Forget cached prefixes, and label what is sampled from now on with the version.

        Raises:
            RuntimeError: vLLM did not let go of its cached prefixes, as requests are running.
            WeightMismatch: it says that it did, and has some.
        """
        if not self._llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM kept its prefix cache, whose keys and values are those of the old weights: "
                "requests are still running"
            )
        if kept := count_cached_blocks(self._llm):
            raise WeightMismatch(
                f"vLLM keeps {kept} blocks in its prefix cache, which version {version} of the "
                "weights has not computed: their keys and values are those of older weights"
            )
        self._llm.update_weight_version(str(version))
        self.weight_version = version

    def check_prefixes(self, sequence: Sequence[int]) -> None:
        """Prove that nothing computed with older weights is attended to any more.

        Raises:
            WeightMismatch: a part of the sequence is still in the prefix cache.
        """
        params = self._sampling_params(
            temperature=0.0, max_tokens=1, detokenize=False, output_kind=self._final_only
        )
        (output,) = self._run([(sequence[: self._max_model_len - 1], params)])
        if output.num_cached_tokens:
            raise WeightMismatch(
                f"vLLM found {output.num_cached_tokens} of {len(sequence)} tokens in its prefix "
                f"cache, which version {self.weight_version} of the weights has not computed: "
                "their keys and values are those of older weights"
            )

    def release_kv(self) -> None:
        """Give the KV cache's memory to the learner; the weights stay where they are."""
        if self._can_release_kv and not self._kv_released:
            self._llm.sleep(level=0)
            self._llm.release_kv_cache_memory()
            self._kv_released = True

    def resume_kv(self) -> None:
        """Take the memory back before sampling."""
        if self._kv_released:
            if not self._llm.wake_up(["kv_cache"]):
                raise RuntimeError("vLLM did not wake up: other parts of it are asleep")
            self._kv_released = False
