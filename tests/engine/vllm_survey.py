"""Survey of the tiny models that real vLLM samples for the learner: a process and a minute each.

    python -m tests.engine.vllm_survey [TYPE ...]       writes tests/engine/vllm_survey.json

`tests/engine/test_architectures.py` makes docs/architectures.md of it.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

RECORD = Path(__file__).with_suffix(".json")
TYPES = [
    "qwen2",
    "qwen3",
    "llama",
    "mistral",
    "gemma2",
    "olmo2",
    "smollm3",
    "gpt_neox",
    "gemma3_text",
    "granite",
    "gpt2",
    "phi3",
    "olmo3",
    "phi",
    "starcoder2",
    "seed_oss",
    "helium",
    "arcee",
    "gemma",
    "cohere",
    "cohere2",
    "exaone4",
    "ernie4_5",
    "opt",
    "glm4",
    "glm",
    "olmo",
    "ministral",
    "hunyuan_v1_dense",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
    "minicpm3",
    "gemma4_text",
    "apertus",
    "nanochat",
]
# Float32, other kernels and other batches: 2e-6 to 9e-6 was seen, minicpm3's products are larger.
ATOL = 2e-5


def survey(model_type: str) -> str:
    """alias; copy and why; or what stands in the way, of a model that takes a step."""
    import torch

    from tests.engine.random_models import publish
    from tests.engine.tiny_models import tiny_config, tiny_model
    from warpo.engine.models.model import load_model, token_logprobs
    from warpo.engine.models.score import pack_scored, score
    from warpo.engine.rollout.sampler.vllm_sampler import VllmSampler
    from warpo.engine.weights.resync import Resync

    rng = random.Random(0)
    sequences = [[rng.randrange(3, 64) for _ in range(length)] for length in (20, 31, 9)]
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(tiny_config(model_type)).save_pretrained(folder)
        learner = load_model(folder, "float32", torch.device("cpu"))
        batch = pack_scored(learner, sequences)
        sampler = VllmSampler(
            folder, dtype="float32", max_model_len=64, kv_cache_gib=1 / 32, eos_token_ids=[1]
        )
    resync = Resync(sampler.load_weights, sampler.module, learner, "auto")
    worst = 0.0
    for _ in range(2):
        publish(resync, sampler)
        sampled = torch.tensor([logp for row in sampler.score(sequences) for logp in row])
        worst = max(worst, (sampled - score(learner, batch, 1.0)).abs().max().item())
        token_logprobs(learner, batch, 1.0).logprobs.sum().backward()
        with torch.no_grad():
            for parameter in learner.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad / (parameter.grad.norm() + 1e-6)
                    parameter.grad = None
    if worst > ATOL:
        return f"vLLM computes another function (logprobs differ by {worst:.1e})"
    return resync.mode if not resync.reason else f"{resync.mode}: {resync.reason}"


def in_process(model_type: str) -> str:
    """The same in a process of its own, whose failure is a finding."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.engine.vllm_survey", "--one", model_type],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if result.returncode:
        errors = re.findall(r"^[\w.]*(?:Error|Mismatch|Exception): (.*)$", result.stderr, re.M)
        text = re.sub(r"/\S*/tmp\w+ ", "", errors[-1] if errors else "no error is named")
        return f"refused: {text[:160]}"
    return result.stdout.splitlines()[-1]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(survey(sys.argv[2]))
        sys.exit()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for name in sys.argv[1:] or TYPES:
        record[name] = in_process(name)
        print(name, record[name], flush=True)
        RECORD.write_text(json.dumps(dict(sorted(record.items())), indent=1) + "\n")
