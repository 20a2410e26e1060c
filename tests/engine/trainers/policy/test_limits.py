"""Settings that a model or a machine cannot follow, refused when its config is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from tests.engine.random_models import COMMON
from warpo.engine.config.policy import load_config
from warpo.engine.errors import ConfigError
from warpo.engine.rollout.sampler.base import SamplingOptions
from warpo.engine.rollout.sampler.vllm_internals import CPU_BLOCK_SIZE
from warpo.engine.rollout.sampler.vllm_sampler import VllmSampler
from warpo.engine.run.log import NoLog
from warpo.engine.run.loop import Run
from warpo.engine.trainers.policy import build as building
from warpo.engine.trainers.policy.build import build
from warpo.engine.trainers.policy.limits import kv_bytes_per_token, max_positions


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["--rollout.max_model_len", "257", "--update.token_budget", "300"],
            r"rollout\.max_model_len = 257 is beyond the 256 positions of .*model: lower it",
        ),
        (["--rollout.top_k", "64"], r"rollout\.top_k = 64 has no effect: .* has 64 tokens"),
        (["--rollout.kv_cache_gib", "1e6"], r"kv_cache_gib = 1e\+06 is more than the \d+\.\d GiB"),
        (["--rollout.kv_cache_gib", "1e-5"], r"cannot hold one sequence .* takes 9\.16e-05 GiB"),
    ],
)
def test_a_setting_is_refused_before_weights_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(building, "load_model", read)
    config = load_config(folder / "config.yaml", ["--sampler", "vllm", *overrides])
    with pytest.raises(ConfigError, match=message), build(config, Run(log=NoLog())):
        pass


@pytest.mark.slow
def test_the_smallest_kv_cache_that_is_accepted_holds_a_sequence(model_path) -> None:
    text = transformers.Qwen2Config(vocab_size=64, **COMMON)
    needed = kv_bytes_per_token("float32", text) * (128 + CPU_BLOCK_SIZE) / 2**30
    options = dict(dtype="float32", max_model_len=128, eos_token_ids=[])
    sampler = VllmSampler(model_path("qwen2"), kv_cache_gib=needed, **options)
    drawn = SamplingOptions(group_size=1, temperature=1.0, max_new_tokens=125, seed=0)
    ((completion,),) = sampler.generate([[3, 4, 5]], drawn)
    assert len(completion.token_ids) == 125


@pytest.mark.parametrize(
    ("settings", "positions"),
    [
        ({"max_position_embeddings": 32}, 32),
        (
            {
                "max_position_embeddings": 32,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
            },
            128,
        ),
    ],
)
def test_positions_are_those_that_rope_is_stretched_to(settings, positions) -> None:
    assert max_positions(transformers.Qwen2Config(**settings)) == positions


def test_a_model_without_a_limit_has_none() -> None:
    assert max_positions(transformers.BloomConfig()) is None
    assert max_positions(transformers.GPT2Config(n_positions=77)) == 77
