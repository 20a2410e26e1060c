"""Time what it takes to make the learner's weights the sampler's, in one process with vLLM.

    python -m warpo.bench.resync --out bench/results/my-machine

A model of 135 million parameters in 272 tensors (the shape of SmolLM2-135M, random weights) is
published by alias, by packed copy, and by calling vLLM's loader: once with all tensors, and once
for each tensor, as trainers do that gather one parameter at a time. Beside them: one copy of as
many bytes in flat memory. Prints a table; writes OUT/resync.jsonl.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from warpo.engine.run.process import set_thread_waiting

SHAPE = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
# Bounds of one publish by packed copy: at most FLAT_COPY_TIMES one flat copy, and at least
# PER_TENSOR_TIMES as fast as the loader called for each tensor.
FLAT_COPY_TIMES, PER_TENSOR_TIMES = 2.0, 5.0
BUDGET_S = 1.5  # for each provider


def measure_resync(sampler_dtype: str, shape: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of provider, median, p20 and p80 in milliseconds; the providers take turns.

    Args:
        sampler_dtype: of vLLM's weights; the learner's are float32, so that bfloat16 rounds.
        shape: of a Llama model.
    """
    import torch
    import transformers

    from warpo.bench.timing import Call, measure, spread
    from warpo.engine.rollout.sampler.vllm_sampler import VllmSampler
    from warpo.engine.weights.resync import Resync

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        config = transformers.LlamaConfig(**shape)
        learner = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        learner.save_pretrained(folder)
        sampler = VllmSampler(
            folder, dtype=sampler_dtype, max_model_len=64, kv_cache_gib=1 / 64, eos_token_ids=[0]
        )
    packed = Resync(sampler.load_weights, sampler.module, learner, "copy")
    size = sum(parameter.numel() for parameter in learner.parameters())
    flat = torch.randn(size)
    flat_copy = torch.empty(size, dtype=getattr(torch, sampler_dtype))

    def tensor_by_tensor() -> None:
        for name, parameter in learner.named_parameters():
            sampler.load_weights([(name, parameter)])

    calls: dict[str, Call] = {
        "flat copy": lambda: flat_copy.copy_(flat),
        "packed copy": packed.publish,
        "load_weights, all tensors": lambda: sampler.load_weights(learner.named_parameters()),
        "load_weights, tensor by tensor": tensor_by_tensor,
    }
    with torch.no_grad():
        times = measure("cpu", calls, BUDGET_S)
    if sampler_dtype == "float32":
        alias = Resync(sampler.load_weights, sampler.module, learner, "alias")
        # What the optimizer reports with its step, so that publishing need not read the weights.
        fingerprints = alias.fingerprints()
        times |= measure("cpu", {"alias": lambda: alias.publish(fingerprints)}, BUDGET_S)
    base = statistics.median(times["flat copy"])
    return [
        {
            "provider": provider,
            "sampler_dtype": sampler_dtype,
            "parameters": size,
            "tensors": sum(1 for _ in learner.parameters()),
            **spread(runs),
            "x_flat_copy": statistics.median(runs) / base,
        }
        for provider, runs in times.items()
    ]


def goals_of(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each goal, that says whether it is met."""
    ms = {row["provider"]: row["ms"] for row in rows}
    dtype = rows[0]["sampler_dtype"]
    slower = ms["packed copy"] / ms["flat copy"]
    faster = ms["load_weights, tensor by tensor"] / ms["packed copy"]
    return [
        f"{dtype}: packed copy takes {slower:.2f} times a flat copy (goal: at most "
        f"{FLAT_COPY_TIMES:g}): {'met' if slower <= FLAT_COPY_TIMES else 'missed'}",
        f"{dtype}: packed copy is {faster:.1f} times as fast as load_weights tensor by tensor "
        f"(goal: at least {PER_TENSOR_TIMES:g}): "
        f"{'met' if faster >= PER_TENSOR_TIMES else 'missed'}",
    ]


def table_of(rows: list[dict[str, Any]]) -> str:
    from warpo.bench.environment import aligned

    lines = [["provider", "sampler", "ms", "p20 to p80", "x flat copy"]]
    lines += [
        [
            row["provider"],
            row["sampler_dtype"],
            f"{row['ms']:.4g}",
            f"{row['p20_ms']:.4g} to {row['p80_ms']:.4g}",
            f"{row['x_flat_copy']:.3g}",
        ]
        for row in rows
    ]
    return aligned(lines, 2)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m warpo.bench.resync",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results/latest"), metavar="DIR")
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    set_thread_waiting()
    from warpo.bench.environment import environment, processor

    command = ["python", "-m", "warpo.bench.resync", *words]
    common: dict[str, Any] = dict(environment(command, processor()))
    names = ("torch", "transformers", "vllm")
    common["versions"] = {name: importlib.import_module(name).__version__ for name in names}
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "resync.jsonl").open("w", encoding="utf-8") as file:
        for dtype in ("float32", "bfloat16"):
            rows = measure_resync(dtype, SHAPE)
            file.writelines(json.dumps(row | common) + "\n" for row in rows)
            file.flush()
            print(f"{table_of(rows)}\n" + "\n".join(goals_of(rows)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
