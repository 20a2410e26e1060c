"""verl's advantages: tokens for the scans, and completions of prompts for the groups, which
verl names by strings.
"""

import uuid
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch

from warpo.bench.dropin.case import DropIn

TOKENS = ((8, 64), (256, 2048), (512, 4096))
COMPLETIONS = ((4, 8, 64), (64, 16, 16), (64, 16, 1024))
SCANS = (
    "masked_whiten",
    "compute_gae_advantage_return",
    "compute_reinforce_plus_plus_outcome_advantage",
)
GROUPS = (
    "compute_grpo_outcome_advantage",
    "compute_grpo_vectorized_outcome_advantage",
    "compute_reinforce_plus_plus_baseline_outcome_advantage",
    "compute_rloo_outcome_advantage",
    "compute_rloo_vectorized_outcome_advantage",
    "compute_opo_outcome_advantage",
    "compute_gpg_outcome_advantage",
)


def cases() -> list[DropIn]:
    scans = [_scan(name, shape) for name in SCANS for shape in TOKENS]
    return scans + [_group(name, shape) for name in GROUPS for shape in COMPLETIONS]


def _tokens(rows: int, steps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards, values and verl's mask of responses of all lengths."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn((2, rows, steps), generator=generator)
    lengths = torch.randint(1, steps + 1, (rows, 1), generator=generator)
    return rewards, values, (torch.arange(steps) < lengths).long()


def _scan(name: str, shape: tuple[int, int]) -> DropIn:
    def make() -> Callable[[Callable], object]:
        rewards, values, mask = _tokens(*shape)
        if name == "masked_whiten":
            return lambda function: function(values, mask)
        if name == "compute_gae_advantage_return":
            return lambda function: function(rewards, values, mask, 1.0, 0.95)
        return lambda function: function(rewards, mask, SimpleNamespace(gamma=1.0))

    return DropIn(function=name, size=f"{list(shape)} float32", mode="forward", make=make)


def _group(name: str, shape: tuple[int, int, int]) -> DropIn:
    prompts, completions, steps = shape

    def make() -> Callable[[Callable], object]:
        rewards, _, mask = _tokens(prompts * completions, steps)
        names = [str(uuid.uuid5(uuid.NAMESPACE_OID, str(i))) for i in range(prompts)]
        index = np.repeat(np.array(names, dtype=object), completions)
        return lambda function: function(rewards, mask, index)

    size = f"{prompts} prompts x {completions}, {steps} tokens, float32"
    return DropIn(function=name, size=size, mode="forward", make=make)
