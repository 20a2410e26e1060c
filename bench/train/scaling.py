"""Growth of the learner's step in time and memory with tokens, vocabulary and group size.

    python -m warpo.bench.train.scaling AXIS RESULT.json [--quick]

The step is what `warpo train` does with given rollouts: pack, forward, GRPO loss, backward, clip,
AdamW. Nothing is sampled. Each axis changes one number of `Point` and leaves the others, and

    time = coefficient * size ** exponent

is fitted to the medians of all sizes, as a line through their logarithms. 1: twice the size takes
twice the time.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from warpo.bench.environment import aligned

if TYPE_CHECKING:
    from warpo.engine.models.step_rollouts import StepRollouts

Row = dict[str, Any]
BUDGET_S, QUICK_BUDGET_S, QUICK_POINTS = 0.5, 0.1, 3


@dataclass(frozen=True, kw_only=True)
class Point:
    """Sizes of a step."""

    vocabulary: int = 2048
    prompts: int = 2
    group_size: int = 8
    prompt_tokens: int = 128
    new_tokens: int = 64

    @property
    def tokens(self) -> int:
        """Tokens that the learner reads: each prompt once, for all of its completions."""
        return self.prompts * (self.prompt_tokens + self.group_size * self.new_tokens)


AXES: dict[str, list[Point]] = {
    "tokens": [Point(new_tokens=n) for n in (32, 64, 128, 256, 512)],
    "vocabulary": [Point(vocabulary=v, group_size=4) for v in (4096, 16384, 65536, 151936)],
    "group_size": [Point(group_size=g, prompt_tokens=256) for g in (2, 4, 8, 16, 32)],
}
# What grows, in words.
GROWS = {
    "tokens": "tokens of the step, by longer completions",
    "vocabulary": "tokens in the vocabulary",
    "group_size": "completions of each prompt",
}
# A Qwen2 whose trunk does not hide the rest.
TRUNK: dict[str, Any] = dict(
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=8,
    intermediate_size=768,
)


class Fit(NamedTuple):
    """y = coefficient * x ** exponent, and the standard error of the exponent."""

    exponent: float
    error: float
    coefficient: float


def fit(x: Sequence[float], y: Sequence[float]) -> Fit:
    """Least squares of log y against log x.

    error = sqrt(sum of squared residuals / (n - 2) / sum (log x - mean log x)^2): it grows with
    noise, and where the points lie on no power of x.

    Raises:
        ValueError: fewer than 3 points, one that is not positive, or all x are equal.
    """
    if len(x) != len(y) or len(x) < 3 or len(set(x)) < 2 or min(*x, *y) <= 0:
        raise ValueError(f"a fit takes 3 or more positive points of different x, got {x}, {y}")
    log_x, log_y = [math.log(v) for v in x], [math.log(v) for v in y]
    slope, intercept = statistics.linear_regression(log_x, log_y)
    residuals = sum((b - intercept - slope * a) ** 2 for a, b in zip(log_x, log_y, strict=True))
    mean = statistics.fmean(log_x)
    spread = sum((a - mean) ** 2 for a in log_x)
    return Fit(slope, math.sqrt(residuals / (len(x) - 2) / spread), math.exp(intercept))


def learner(vocabulary: int) -> Any:
    """A model with random weights, as `warpo train` prepares it."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from warpo.engine.models.model import ATTENTION, prepare

    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=vocabulary, tie_word_embeddings=True, **TRUNK)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=ATTENTION
    )
    prepare(model)
    return model


def rollouts_of(point: Point) -> StepRollouts:
    """Rollouts of random tokens, each as probable as the others, with random advantages."""
    import numpy as np
    import torch

    from warpo.engine.models.step_rollouts import StepRollouts
    from warpo.engine.types import TokenSequence

    rng = random.Random(0)

    def draw(count: int) -> list[int]:
        return [rng.randrange(point.vocabulary) for _ in range(count)]

    sequences, advantages = [], []
    for _ in range(point.prompts):
        prompt = draw(point.prompt_tokens)
        for _ in range(point.group_size):
            sequences.append(TokenSequence.of(prompt, draw(point.new_tokens)))
            advantages.append(torch.full((point.new_tokens,), rng.gauss(0, 1)))
    count = len(sequences)
    return StepRollouts(
        sequences=sequences,
        group_ids=np.repeat(np.arange(point.prompts), point.group_size),
        rewards=torch.zeros(count, dtype=torch.float64),
        sampler_logprobs=torch.full((count * point.new_tokens,), -math.log(point.vocabulary)),
        advantages=torch.cat(advantages),
    )


def step_of(point: Point, model: Any) -> Callable[[], object]:
    """The learner's step at this size."""
    from warpo.engine.config.algorithms import ALGORITHMS
    from warpo.engine.config.sections import UpdateSettings
    from warpo.engine.learner.minibatches import make_minibatches
    from warpo.engine.learner.schedule import make_optimizer
    from warpo.engine.learner.step import accumulate_gradients
    from warpo.kernels.objectives import Objective

    update, rollouts, grpo = UpdateSettings(), rollouts_of(point), ALGORITHMS["grpo"].objective
    assert isinstance(grpo, Objective)
    objective = dataclasses.replace(grpo, kl_coef=0.0)
    optimizer, _ = make_optimizer(list(model.named_parameters()), update, num_steps=1)

    def step() -> None:
        (minibatch,) = make_minibatches(rollouts, 1, update.token_budget, 0)
        batches = [rollouts.batch(rows) for rows in minibatch]
        accumulate_gradients(
            model, batches, objective, temperature=1.0, max_new_tokens=point.new_tokens
        )
        optimizer.step(update.max_grad_norm)

    return step


def measure_axis(axis: str, quick: bool) -> list[Row]:
    """A row for each size; the sizes take turns, so that drift of the machine bends no curve."""
    from warpo.bench.timing import measure, peak_bytes, spread

    points = AXES[axis][:QUICK_POINTS] if quick else AXES[axis]
    models = {v: learner(v) for v in dict.fromkeys(point.vocabulary for point in points)}
    steps = {
        str(number): step_of(point, models[point.vocabulary]) for number, point in enumerate(points)
    }
    times = measure("cpu", steps, QUICK_BUDGET_S if quick else BUDGET_S)
    peaks = [peak_bytes("cpu", step) for step in steps.values()]
    sizes = [getattr(point, axis) for point in points]
    time = fit(sizes, [statistics.median(runs) for runs in times.values()])
    memory = fit(sizes, peaks)
    return [
        {"axis": axis, "size": size, **dataclasses.asdict(point), "tokens": point.tokens}
        | {
            **spread(runs),
            "peak_bytes": peak,
            "time_fit": time._asdict(),
            "memory_fit": memory._asdict(),
        }
        for size, point, runs, peak in zip(sizes, points, times.values(), peaks, strict=True)
    ]


def table_of(rows: Sequence[Row]) -> str:
    """A line for each size, and the exponents of each axis in its first line."""
    lines = [
        [
            "learner's step against",
            "size",
            "tokens",
            "ms",
            "p20 to p80",
            "peak MB",
            "ms ~ size^",
            "MB ~ size^",
        ]
    ]
    seen: set[str] = set()
    for row in rows:
        first = row["axis"] not in seen
        seen.add(row["axis"])
        fits = [exponent(row[name]) if first else "" for name in ("time_fit", "memory_fit")]
        lines.append(
            [
                GROWS[row["axis"]] if first else "",
                str(row["size"]),
                str(row["tokens"]),
                f"{row['ms']:.1f}",
                f"{row['p20_ms']:.1f} to {row['p80_ms']:.1f}",
                f"{row['peak_bytes'] / 1e6:.1f}",
                *fits,
            ]
        )
    return aligned(lines, 1)


def exponent(found: Row) -> str:
    return f"{found['exponent']:.2f} +- {found['error']:.2f}"


def main() -> None:
    axis, result = sys.argv[1], Path(sys.argv[2])
    rows = measure_axis(axis, "--quick" in sys.argv)
    result.write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
