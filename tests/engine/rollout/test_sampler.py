"""Both samplers against plain transformers: draws, logprobs, interruption, errors."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import math
import mmap
import pkgutil
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.engine.random_models import (
    EOS_TOKEN_IDS,
    LOGPROB_ATOL,
    MAX_MODEL_LEN,
    connect,
    logprobs_of,
    new_learner,
    random_completion,
)
from warpo.engine.config.samplers import SAMPLERS
from warpo.engine.errors import SamplerError, WeightMismatch
from warpo.engine.rollout.sampler import base, vllm_internals
from warpo.engine.rollout.sampler.base import (
    Interrupted,
    KvCache,
    Sampler,
    SamplingOptions,
    WeightTarget,
    check_versions,
)
from warpo.engine.rollout.sampler.vllm_sampler import VllmSampler
from warpo.engine.types import Completion

PROMPTS = [[7, 8, 9], [10, 11, 12, 13, 14, 15, 16], [20], [30, 31, 32, 33]]


def options(**changes: object) -> SamplingOptions:
    values = dict(group_size=4, temperature=1.0, max_new_tokens=24, seed=11)
    return SamplingOptions(**{**values, **changes})


def tokens(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.token_ids.tolist() for completion in group] for group in groups]


@torch.no_grad()
def greedy(learner: torch.nn.Module, prompt: list[int], max_new_tokens: int) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + max_new_tokens:
        ids.append(int(learner(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in EOS_TOKEN_IDS:
            break
    return ids[len(prompt) :]


def test_a_sampler_is_what_its_facts_say(sampler: Sampler, kind: str) -> None:
    for protocol in (Sampler, WeightTarget, KvCache):
        assert isinstance(sampler, protocol)
    for name in filter(None, (SAMPLERS[kind].opener, SAMPLERS[kind].memory)):
        assert callable(pkgutil.resolve_name(name))
    sampler.release_kv()
    if SAMPLERS[kind].has_kv_cache:
        with pytest.raises(RuntimeError, match="the KV cache is released"):
            sampler.score([[2, 3]])
    sampler.resume_kv()
    assert len(sampler.score([[2, 3]])[0]) == 1


@pytest.mark.parametrize("lag", [0, 2])
def test_samples_of_older_weights_than_the_lag_are_refused(
    monkeypatch: pytest.MonkeyPatch, lag: int
) -> None:
    monkeypatch.setattr(base, "MAX_LAG", lag)

    def of(*versions: int) -> list[list[Completion]]:
        rng = random.Random(0)
        return [[replace(random_completion(rng, 2), weight_version=v) for v in versions]]

    check_versions(of(*range(7 - lag, 8)), 8)
    for versions in ([6 - lag, 7], [8]):
        told = f"step 8 sampled with versions {versions} of the weights, and the learner has versi"
        with pytest.raises(WeightMismatch, match=re.escape(told)):
            check_versions(of(*versions), 8)


def test_greedy_is_the_argmax_of_the_model(sampler: Sampler) -> None:
    learner = new_learner("qwen2")
    groups = sampler.generate(PROMPTS, options(temperature=0, group_size=2))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        expected = greedy(learner, prompt, 24)
        assert [completion.token_ids.tolist() for completion in group] == [expected, expected]
        reference = logprobs_of(learner, prompt + expected, len(prompt))
        torch.testing.assert_close(
            torch.from_numpy(group[0].logprobs), reference, atol=LOGPROB_ATOL, rtol=0
        )


@pytest.mark.parametrize(
    ("name", "temperature"), [("qwen2", 1.0), ("qwen2", 0.7), ("qwen2", 1.5), ("gpt2", 1.0)]
)
def test_logprobs_are_those_at_the_sampling_temperature(
    build: Callable[[str, str], Sampler], kind: str, name: str, temperature: float
) -> None:
    sampler, learner = build(kind, name), new_learner(name)
    groups = sampler.generate(PROMPTS, options(temperature=temperature))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            reference = logprobs_of(
                learner, [*prompt, *completion.token_ids], len(prompt), temperature
            )
            torch.testing.assert_close(
                torch.from_numpy(completion.logprobs), reference, atol=LOGPROB_ATOL, rtol=0
            )


def test_a_step_of_more_prompt_tokens_than_vllm_takes_together(sampler: Sampler) -> None:
    """5120 of them: vLLM takes 4096 on a CPU, and would cut a prompt in two."""
    rng, learner = random.Random(0), new_learner("qwen2")
    prompts = [[rng.randrange(2, 60) for _ in range(160)] for _ in range(32)]
    for prompt, scores in zip(prompts, sampler.score(prompts), strict=True):
        torch.testing.assert_close(
            torch.tensor(scores), logprobs_of(learner, prompt), atol=LOGPROB_ATOL, rtol=0
        )
    groups = sampler.generate(prompts, options(group_size=2, max_new_tokens=4))
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            reference = logprobs_of(learner, [*prompt, *completion.token_ids], len(prompt))
            torch.testing.assert_close(
                torch.from_numpy(completion.logprobs), reference, atol=LOGPROB_ATOL, rtol=0
            )
    # Seeds decide alone: the same prompts draw the same tokens in a smaller step.
    few = sampler.generate(prompts[:2], options(group_size=2, max_new_tokens=4))
    assert tokens(few) == tokens(groups[:2])


def truncated_logprobs(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float
) -> dict[int, float]:
    """Logprobs of the tokens that top-k, then top-p keep, by definition and one token at a time."""
    probs = (logits.double() / temperature).softmax(-1).tolist()
    ordered = sorted(range(len(probs)), key=lambda token: -probs[token])
    ordered = ordered[: top_k or None]
    total, kept = sum(probs[token] for token in ordered), []
    for token in ordered:
        kept.append(token)
        if sum(probs[kept_token] for kept_token in kept) >= top_p * total:
            break
    mass = sum(probs[token] for token in kept)
    return {token: math.log(probs[token] / mass) for token in kept}


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 4, 1.0), (1.0, 0, 0.6), (1.3, 5, 0.8), (0.7, 1, 1.0), (1.0, 1000, 0.999)],
)
def test_truncated_draws_and_logprobs_are_those_of_the_kept_set(
    sampler: Sampler, temperature: float, top_k: int, top_p: float
) -> None:
    learner = new_learner("qwen2")
    drawn = options(
        group_size=8, max_new_tokens=12, temperature=temperature, top_k=top_k, top_p=top_p
    )
    seen, worst = set(), 0.0
    for prompt, group in zip(PROMPTS, sampler.generate(PROMPTS, drawn), strict=True):
        for completion in group:
            logits = learner(torch.tensor([[*prompt, *completion.token_ids]])).logits[0].detach()
            for i, token in enumerate(completion.token_ids):
                kept = truncated_logprobs(logits[len(prompt) - 1 + i], temperature, top_k, top_p)
                assert token in kept, "a token outside the kept set was drawn"
                worst = max(worst, abs(completion.logprobs[i] - kept[token]))
                seen.add((tuple(kept), token))
    assert worst < LOGPROB_ATOL
    assert top_k == 1 or len(seen) > 40


def test_draws_follow_the_distribution(sampler: Sampler) -> None:
    groups = sampler.generate([[7, 8, 9]], options(group_size=2000, max_new_tokens=1))
    counts = np.bincount([c.token_ids[0] for c in groups[0]], minlength=64)
    logits = new_learner("qwen2")(torch.tensor([[7, 8, 9]])).logits[0, -1]
    expected = 2000 * logits.softmax(-1).detach().double().numpy()
    seen = expected >= 5
    chi2 = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
    # The statistic has mean k and variance 2 k: five standard deviations above.
    assert chi2 < seen.sum() + 5 * (2 * seen.sum()) ** 0.5


def test_a_seed_fixes_the_draws(sampler: Sampler) -> None:
    first = sampler.generate(PROMPTS, options())
    assert sampler.generate(PROMPTS, options()) == first
    assert tokens(sampler.generate(PROMPTS, options(seed=12))) != tokens(first)


def test_draws_do_not_depend_on_the_batch(sampler: Sampler) -> None:
    together = tokens(sampler.generate(PROMPTS, options()))
    assert tokens(sampler.generate(PROMPTS[:1], options())) == together[:1]
    others = [[40, 41], PROMPTS[1], [42] * 30, PROMPTS[3], [50] * 9]
    mixed = tokens(sampler.generate(others, options()))
    assert [mixed[1], mixed[3]] == [together[1], together[3]]


def test_no_two_completions_share_their_draws(sampler: Sampler) -> None:
    for seed in (11, 12):
        groups = sampler.generate([[7, 8, 9]] * 4, options(seed=seed, max_new_tokens=12))
        completions = [tuple(c.token_ids.tolist()) for group in groups for c in group]
        if seed == 11:
            before = completions
    long = [c for c in before + completions if len(c) > 4]
    assert len(long) > 16
    assert len(set(long)) == len(long)


def test_sampling_leaves_the_global_generators_alone(sampler: Sampler) -> None:
    state = torch.get_rng_state()
    sampler.generate(PROMPTS, options())
    sampler.score(PROMPTS)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_completion_ends_with_the_first_eos(sampler: Sampler) -> None:
    groups = sampler.generate([[i] for i in range(10, 30)], options())
    completions = [completion for group in groups for completion in group]
    for completion in completions:
        *body, last = completion.token_ids
        assert not set(body) & set(EOS_TOKEN_IDS)
        assert completion.finished == (last in EOS_TOKEN_IDS)
        assert completion.finished or len(completion.token_ids) == 24
        assert len(completion.logprobs) == len(completion.token_ids)
    ends = {c.token_ids[-1] for c in completions if c.finished}
    assert ends == set(EOS_TOKEN_IDS)
    assert not all(c.finished for c in completions)


def test_score_is_the_models(sampler: Sampler) -> None:
    learner = new_learner("qwen2")
    longest = [2 + i % 60 for i in range(MAX_MODEL_LEN)]
    sequences = [*PROMPTS, longest, longest[:33]]
    for sequence, scores in zip(sequences, sampler.score(sequences), strict=True):
        torch.testing.assert_close(
            torch.tensor(scores), logprobs_of(learner, sequence), atol=LOGPROB_ATOL, rtol=0
        )


def test_progress_counts_completions(sampler: Sampler) -> None:
    calls: list[tuple[int, int]] = []
    sampler.generate(PROMPTS, options(), progress=lambda done, total: calls.append((done, total)))
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert len(set(done)) > 2
    assert calls[-1] == (16, 16)


def test_stop_interrupts_and_leaves_nothing_behind(sampler: Sampler) -> None:
    expected = sampler.generate(PROMPTS, options())
    for steps in (0, 1, 5):
        asked = iter([False] * steps)
        with pytest.raises(Interrupted, match="of 16 completions"):
            sampler.generate(PROMPTS, options(), stop=lambda asked=asked: next(asked, True))
        assert sampler.generate(PROMPTS, options()) == expected


def test_an_error_in_a_callback_leaves_nothing_behind(sampler: Sampler) -> None:
    expected = sampler.generate(PROMPTS, options())

    def progress(done: int, total: int) -> None:
        raise OSError("no terminal")

    with pytest.raises(OSError, match="no terminal"):
        sampler.generate(PROMPTS, options(), progress=progress)
    assert sampler.generate(PROMPTS, options()) == expected


def test_more_completions_than_one_batch(sampler: Sampler) -> None:
    prompts = [[10 + i % 50, 7] for i in range(70)]
    groups = sampler.generate(prompts, options(max_new_tokens=3))
    assert [len(group) for group in groups] == [4] * 70
    learner = new_learner("qwen2")
    for prompt, group in list(zip(prompts, groups, strict=True))[::23]:
        ids = [*prompt, *group[3].token_ids]
        torch.testing.assert_close(
            torch.from_numpy(group[3].logprobs),
            logprobs_of(learner, ids, len(prompt)),
            atol=LOGPROB_ATOL,
            rtol=0,
        )


def test_no_prompts_give_no_completions(sampler: Sampler) -> None:
    assert sampler.generate([], options()) == []
    assert sampler.score([]) == []
    assert sampler.score([[3]]) == [[]]


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([[7], []], {}, "prompt 1 is empty"),
        ([[7, 64]], {}, "prompt 0 holds ids from 7 to 64: the model's vocabulary is 0 to 63"),
        ([[7, -1]], {}, "ids from -1 to 7"),
        ([[7] * 170], {}, "170 tokens: with max_new_tokens = 24 it exceeds max_model_len = 192"),
        ([[7]], {"group_size": 0}, "group_size must be at least 1, got 0"),
        ([[7]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ([[7]], {"temperature": -1.0}, "temperature must be 0 .greedy. or 0.01 to 2.0, got -1.0"),
        ([[7]], {"temperature": 0.001}, "0.01 to 2.0, got 0.001"),
        ([[7]], {"temperature": float("nan")}, "got nan"),
        ([[7]], {"top_k": -1}, r"top_k must be 0 .off. or at least 1, got -1"),
        ([[7]], {"top_p": 0.0}, r"top_p must be above 0 and at most 1 .off., got 0.0"),
        ([[7]], {"top_p": float("nan")}, "top_p must be .* got nan"),
    ],
)
def test_what_cannot_be_sampled_is_refused(
    sampler: Sampler, prompts: list[list[int]], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sampler.generate(prompts, options(**changes))


def test_what_cannot_be_scored_is_refused(sampler: Sampler) -> None:
    with pytest.raises(ValueError, match="sequence 0 has 193 tokens"):
        sampler.score([[7] * 193])
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        sampler.score([[7], []])
    with pytest.raises(ValueError, match="sequence 0 holds ids"):
        sampler.score([[7, 70]])


def test_weights_that_are_not_finite_are_reported(sampler: Sampler) -> None:
    learner = new_learner("qwen2")
    learner.lm_head.weight.data[9, 0] = float("nan")
    connect(sampler, learner)
    with pytest.raises(RuntimeError, match="a completion of prompt 0 has logprobs .nan"):
        sampler.generate([[7, 8]], options())


def test_a_request_that_the_engine_refuses_leaves_nothing_behind(
    build: Callable[[str, str], Sampler], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = build("vllm", "qwen2")
    expected = sampler.generate(PROMPTS, options())
    engine = sampler._llm.llm_engine
    add_request, added = engine.add_request, []

    def refuse_the_third(request_id: str, *args: object) -> None:
        if len(added) == 2:
            raise ValueError("refused")
        added.append(request_id)
        add_request(request_id, *args)

    monkeypatch.setattr(engine, "add_request", refuse_the_third)
    with pytest.raises(ValueError, match="refused"):
        sampler.generate(PROMPTS, options())
    monkeypatch.undo()
    assert engine.get_num_unfinished_requests() == 0
    assert sampler.generate(PROMPTS, options()) == expected


def test_completions_of_one_prompt_share_its_blocks(build: Callable[[str, str], Sampler]) -> None:
    sampler = build("vllm", "qwen2")
    sampler.generate([[2 + i % 60 for i in range(100)]], options(group_size=2, max_new_tokens=1))
    cached = []
    step = sampler._llm.llm_engine.step
    sampler._llm.llm_engine.step = lambda: [cached.append(o) or o for o in step()]
    try:
        sampler.generate([[2 + i % 60 for i in range(100)]], options(max_new_tokens=1))
    finally:
        del sampler._llm.llm_engine.step
    assert cached[0].num_cached_tokens == 96


def resident_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the memory behind a tensor that physical pages hold, as mincore counts them."""
    storage = tensor.untyped_storage()
    start = storage.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = storage.data_ptr() + storage.nbytes() - start
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    libc = ctypes.CDLL(None)
    assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), pages) == 0
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def test_the_kv_cache_alone_is_released(build: Callable[[str, str], Sampler]) -> None:
    """vLLM's own state machine: pause, discard, wake; on a CPU its pages go back to the system."""
    sampler = build("vllm", "qwen2")
    caches = sampler._llm.llm_engine.model_executor.driver_worker.worker.model_runner.kv_caches
    num_bytes = sum(cache.untyped_storage().nbytes() for cache in caches)
    places = [cache.data_ptr() for cache in caches]
    weights = [parameter.data_ptr() for parameter in sampler.module.parameters()]
    prompt = [2 + i % 60 for i in range(100)]
    for cache in caches:
        cache.fill_(7.0)
    sampler.weights_changed(sampler.weight_version)
    before = sampler.generate([prompt], options())
    assert sum(map(resident_bytes, caches)) >= num_bytes

    sampler.release_kv()

    assert sum(map(resident_bytes, caches)) <= 2 * len(caches) * mmap.PAGESIZE
    with pytest.raises(RuntimeError, match="the KV cache is released: call resume_kv first"):
        sampler.generate([prompt], options())
    sampler.release_kv()
    sampler.resume_kv()
    sampler.check_prefixes(prompt)
    assert sampler.generate([prompt], options()) == before
    assert [cache.data_ptr() for cache in caches] == places
    assert [parameter.data_ptr() for parameter in sampler.module.parameters()] == weights


def test_what_lies_beside_the_kv_cache_is_not_released() -> None:
    memory = bytearray(b"\7" * (8 * mmap.PAGESIZE))
    first, count = 100, 5 * mmap.PAGESIZE + 500
    cache = torch.frombuffer(memory, dtype=torch.uint8, offset=first, count=count)
    assert cache.untyped_storage().nbytes() == count
    worker = SimpleNamespace(model_runner=SimpleNamespace(kv_caches=[cache]))
    vllm_internals._discard(worker, ["weights"])
    assert memory.count(7) == len(memory)
    vllm_internals._discard(worker, ["kv_cache"])
    assert memory[:first].count(7) == first
    assert memory[first + count :].count(7) == len(memory) - first - count
    assert (cache == 0).sum() >= 4 * mmap.PAGESIZE


def test_a_vllm_without_a_feature_is_refused(
    build: Callable[[str, str], Sampler], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = build("vllm", "qwen2")._llm
    vllm_internals._check_features(llm)
    monkeypatch.delattr(type(llm), "release_kv_cache_memory")
    with pytest.raises(SamplerError, match="this vLLM has no LLM.release_kv_cache_memory"):
        vllm_internals._check_features(llm)


def test_what_vllm_refuses_to_build_is_said_in_one_line(model_path: Callable[[str], str]) -> None:
    options = dict(dtype="float32", kv_cache_gib=1 / 32, eos_token_ids=EOS_TOKEN_IDS)
    with pytest.raises(
        SamplerError, match=r"vLLM cannot sample \S+qwen2: .*max_model_len"
    ) as found:
        VllmSampler(model_path("qwen2"), max_model_len=512, **options)
    assert "\n" not in str(found.value)


def test_a_sampler_that_is_collected_leaves_the_others(
    build: Callable[[str, str], Sampler], model_path: Callable[[str], str]
) -> None:
    sampler = build("vllm", "qwen2")
    options = dict(dtype="float32", kv_cache_gib=1 / 32, eos_token_ids=EOS_TOKEN_IDS)
    gc.unfreeze()
    other = VllmSampler(model_path("qwen2"), max_model_len=MAX_MODEL_LEN, **options)
    del other
    gc.unfreeze()
    gc.collect()
    assert len(sampler.score([[3, 4, 5]])[0]) == 2


def test_a_missing_vllm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install vllm .* set sampler: transformers"):
        vllm_internals.build_llm("nowhere", dtype="float32", max_model_len=8, kv_cache_gib=1)


def test_another_version_of_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = pytest.importorskip("vllm")
    monkeypatch.setattr(vllm, "__version__", "0.9.1")
    with pytest.raises(RuntimeError, match=r"vLLM 0.9.1 is installed, and warpo supports .*0\.32"):
        vllm_internals.build_llm("nowhere", dtype="float32", max_model_len=8, kv_cache_gib=1)


def test_ranks_without_a_process_group_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    with pytest.raises(RuntimeError, match="init_process_group first"):
        vllm_internals.build_llm("nowhere", dtype="float32", max_model_len=8, kv_cache_gib=1)


QUIET = """
import multiprocessing, os, random, sys
import numpy as np
import torch
from warpo.engine.rollout.sampler.base import SamplingOptions
from warpo.engine.rollout.sampler.vllm_sampler import VllmSampler

assert "vllm" not in sys.modules and "transformers" not in sys.modules
torch.set_num_threads(2)
kept = lambda: (
    random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
    torch.get_num_threads(), torch.set_num_threads, sys.excepthook,
    multiprocessing.get_start_method(allow_none=True),
    os.environ.get("LD_PRELOAD"), os.environ.get("LOCAL_WORLD_SIZE"),
)
before = kept()
sampler = VllmSampler(
    sys.argv[1], dtype="float32", max_model_len=64, kv_cache_gib=1 / 32, eos_token_ids=[1]
)
options = SamplingOptions(group_size=2, temperature=1.0, max_new_tokens=4, seed=0)
sampler.generate([[7, 8]], options)
sampler.score([[7, 8]])
assert kept() == before
"""


def test_vllm_starts_quietly_and_leaves_the_process_as_it_was(
    model_path: Callable[[str], str],
) -> None:
    pytest.importorskip("vllm")
    result = subprocess.run(
        [sys.executable, "-c", QUIET, model_path("qwen2")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.stdout, result.stderr, result.returncode) == ("", "", 0)
