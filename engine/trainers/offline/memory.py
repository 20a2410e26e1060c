"""Memory of a run from given data, predicted before a weight is read: see `memory`."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from warpo.engine.config.offline import OfflineConfig
from warpo.engine.data.examples import Example
from warpo.engine.learner.optimizer import float32_gradients
from warpo.engine.models.architectures import shape_model
from warpo.engine.models.checkpointing import checkpoint_layers
from warpo.engine.models.files import max_positions, read_config
from warpo.engine.models.model import is_packed
from warpo.engine.plan.memory import dtype_of, optimizer_bytes, peak_bytes
from warpo.engine.ranks import ONE_RANK
from warpo.engine.trainers.offline.objectives import MicroBatch, make_objective, micro_batches


def offline_peak(
    config: OfflineConfig, device: torch.device, examples: list[Example] | None = None
) -> int:
    """Bytes at the peak of an optimizer step: weights, optimizer state, gradients, activations.

    Args:
        examples: a micro-batch of these; without, one of update.token_budget tokens that are all
            learned, in sequences as long as the model takes.
    """
    hf_config, objective, fake = read_config(config.model), make_objective(config), FakeTensorMode()
    with fake:
        model = shape_model(hf_config, device, dtype_of(config.dtype), scalar=objective.scalar)
    float32_gradients(model.parameters())
    checkpoint_layers(model, config.update.activation_checkpointing)
    parameters = [*model.parameters()]
    if examples is None:
        positions = max_positions(hf_config.get_text_config()) or config.update.token_budget
        examples = _full(config, positions, reference=objective.reference)
    micro = micro_batches(
        examples, config.algorithm, config.update.token_budget, shared=is_packed(model)
    )
    faked = [_fake(part, fake, device) for part in micro[:1]]
    # From the second on, the gradients of those before are there.
    work = peak_bytes(
        lambda: objective.gradients(model, faked * 2, ONE_RANK),
        model,
        fake,
    )
    weights = sum(parameter.nbytes for parameter in parameters)
    state = optimizer_bytes(sum(parameter.numel() for parameter in parameters), config, device)
    return weights + state + work


def _full(config: OfflineConfig, positions: int, *, reference: bool) -> list[Example]:
    """Examples with a prompt of one token and two completions, one for sft, that fill the token
    budget."""
    count = 1 if config.algorithm in ("sft", "process_reward") else 2
    length = min(config.update.token_budget // count, positions)
    number = config.update.token_budget // (count * length)
    tokens = max(1, length - 1)
    ones = torch.ones(tokens)
    return [
        Example(
            prompt_ids=[row],  # no two alike, lest they be packed as one
            completions=[[2 + i] * tokens for i in range(count)],
            values=[1.0],
            ends=[tokens - 1] if config.algorithm == "process_reward" else [],
            ref_logprobs=(ones,) * count if reference else (),
        )
        for row in range(number)
    ]


def _fake(part: MicroBatch, fake: FakeTensorMode, device: torch.device) -> MicroBatch:
    def faked(record: Any) -> Any:
        made: dict[str, Any] = {}
        for field in fields(record):
            value = getattr(record, field.name)
            if isinstance(value, Tensor):
                made[field.name] = fake.from_tensor(value)
            elif is_dataclass(value):
                made[field.name] = faked(value)
        return replace(record, **made)

    with fake:
        moved: MicroBatch = faked(part).to(device)
    return moved
