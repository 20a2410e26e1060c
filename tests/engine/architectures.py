"""docs/architectures.md: what the learner does with each causal language model of transformers.

python -m tests.engine.architectures       writes it anew, a minute on 2 idle cores
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from tests.engine.tiny_models import MODEL_TYPES, tiny_config, tiny_model
from tests.engine.vllm_survey import RECORD
from warpo.engine.models.architectures import refusal
from warpo.engine.models.attention import ATTENTION, segments_of_any_length
from warpo.engine.models.batch import pack
from warpo.engine.models.model import attention_of, other_layers, prepare, token_logprobs
from warpo.engine.types import TokenSequence

FILE = Path(__file__).parents[2] / "docs" / "architectures.md"
TOLERANCE = 2e-5
# Beyond every window and chunk of the tiny models, which are of 8 tokens.
LONGEST = 27

HEAD = """\
# Architectures

What warpo does with each type of causal language model in transformers {version} (`model_type` in
its `config.json`). `warpo train` and `warpo check` decide by properties of the config, the class
and one forward pass of shapes, before weights are read (`engine/models/architectures.py`), so a
model of a type below may still be refused for its own settings: rotary positions that depend on the
row, quantised weights, a length beyond learned positions.

Made by `python -m tests.engine.architectures`; a test holds this file against it.

## Trained

**Rows**: packed: sequences travel in one row, without padding and what they share once. one each:
layers of state or convolution would carry what they know to the next sequence of a row, so each
has one of its own, padded, and the model's own eager attention: more memory and time.
**Against eager**: logprobs and gradients of these rows against those of the model's own eager
attention, each sequence unpadded and by itself, of a tiny random model in float32: both within
{tolerance:g}, the gradient relative to its largest entry, or within twice what eager attention
itself is from its values in float64. "not compared": no tiny model came of the common recipe.
**Reward model**: critics and reward models can be made of it. **vLLM**: alias: sampler and learner
share one copy of the weights; copy: two, and why; seen on vLLM's CPU build with a model that took
an update. "-": not tried.

**Experts** are in a layer's `gate_up_proj` (experts, 2 x width, hidden) and `down_proj` (experts,
hidden, width), expert i of the files at index i, and are saved under the names of the files.
Routers get the gradient of the algorithm's loss and no other: a config with `output_router_logits`,
which asks for an auxiliary loss, is refused, and `router_jitter_noise` is not drawn, by sampler and
learner alike. vLLM's CPU build packs their weights and is refused: `sampler: transformers`.

| type | rows | against eager | reward model | vLLM |
|---|---|---|---|---|
"""
REFUSED = """
## Refused

| type | why |
|---|---|
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Findings about a type.

    Attributes:
        reason: why it is refused; empty where it is not.
        rows: packed | one each.
        equal: whether they are what eager attention gives, in the file's words.
        scalar: whether a critic can be made of it.
    """

    model_type: str
    reason: str
    rows: str = ""
    equal: str = ""
    scalar: bool = False


def sequences() -> list[tuple[list[int], int]]:
    """Token ids and how many are the prompt; the first two share theirs and some tokens more."""
    rng = random.Random(0)
    ids = [rng.randrange(3, 64) for _ in range(50)]
    return [(ids[:LONGEST], 7), (ids[:11] + ids[40:], 7), (ids[20:34], 3)]


def difference(model: PreTrainedModel) -> float:
    """Packed rows against eager attention, the larger of logprobs and gradient; see HEAD."""
    wanted = _alone(model)
    others = other_layers(model.config, type(model))
    model.set_attn_implementation("eager" if others else ATTENTION)
    batch = pack([TokenSequence.of(ids[:n], ids[n:]) for ids, n in sequences()])
    with segments_of_any_length():  # these are short
        logprobs = token_logprobs(model, batch, 1.0).logprobs
    found = logprobs.detach(), _gradient(model, logprobs)
    model.set_attn_implementation("eager")
    return _distance(found, wanted)


def rounding(model: PreTrainedModel) -> float:
    """The same of eager attention in float32 against float64."""
    exact = copy.deepcopy(model).double()
    if exact._can_set_experts_implementation():
        exact.set_experts_implementation("eager")  # the others know no float64
    return _distance(_alone(model), _alone(exact))


def _alone(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Logprobs of the sequences one by one by the model's own attention, and their gradient."""
    rows = []
    for ids, prompt in sequences():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        logprobs = logits[0, prompt - 1 : -1].log_softmax(-1)
        rows.append(logprobs.gather(-1, torch.tensor(ids[prompt:])[:, None])[:, 0])
    logprobs = torch.cat(rows)
    return logprobs.detach(), _gradient(model, logprobs)


def _distance(
    found: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]]
) -> float:
    scale = max(g.abs().max().item() for g in wanted[1].values())
    zero = torch.zeros(())
    return max(
        (found[0] - wanted[0]).abs().max().item(),
        *(
            (found[1].get(name, zero) - wanted[1].get(name, zero)).abs().max().item() / scale
            for name in found[1].keys() | wanted[1].keys()
        ),
    )


def _gradient(model: PreTrainedModel, logprobs: Tensor) -> dict[str, Tensor]:
    weight = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(0))
    model.zero_grad(set_to_none=True)
    (logprobs * weight).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def find(model_type: str, known: Row | None = None) -> Row:
    """Find what the learner does with a tiny model of this type, or with its default config.

    Args:
        known: where given, models with a row for each sequence, which are slow, are not compared
            anew.
    """
    try:
        config = tiny_config(model_type)
    except Exception:  # the recipe does not fit, see its docstring
        try:
            config = transformers.CONFIG_MAPPING[model_type]()
        except Exception as error:
            return Row(model_type=model_type, reason=f"no config by default ({_line(error)})")
    reason = refusal(config, LONGEST)
    if reason:
        return Row(model_type=model_type, reason=reason)
    scalar = not refusal(config, LONGEST, scalar=True)
    attention = attention_of(config, MODEL_FOR_CAUSAL_LM_MAPPING)
    rows = "packed" if attention == ATTENTION else "one each"
    equal = known.equal if known and known.rows == rows == "one each" else _compare(config)
    return Row(model_type=model_type, reason="", rows=rows, equal=equal, scalar=scalar)


def read() -> dict[str, Row]:
    """The rows of the file, but for reasons."""
    found = {}
    for line in FILE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5:
            name, rows, equal, scalar, _ = cells
            found[name] = Row(
                model_type=name, reason="", rows=rows, equal=equal, scalar=scalar == "yes"
            )
    return found


def _compare(config: PretrainedConfig) -> str:
    try:
        model = tiny_model(config)
    except Exception:  # the recipe does not fit, see its docstring
        return "not compared"
    prepare(model)
    error = difference(model)
    right = error <= TOLERANCE or error <= 2 * rounding(model)
    return "right" if right else f"wrong by {error:.1e}"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


def render(rows: list[Row]) -> str:
    """The file's text."""
    return "".join(_lines(rows))


def _lines(rows: list[Row]) -> Iterator[str]:
    surveyed = json.loads(RECORD.read_text())
    yield HEAD.format(version=transformers.__version__, tolerance=TOLERANCE)
    for row in rows:
        if row.reason:
            continue
        scalar, vllm = "yes" if row.scalar else "no", surveyed.get(row.model_type, "-")
        yield f"| {row.model_type} | {row.rows} | {row.equal} | {scalar} | {vllm} |\n"
    yield REFUSED
    for row in rows:
        if row.reason:
            yield f"| {row.model_type} | {row.reason.replace('|', '/')} |\n"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(render([find(model_type) for model_type in MODEL_TYPES]))
