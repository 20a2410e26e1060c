"""What is timed: each operation at the sizes of real models, beside what users run instead."""

from collections.abc import Callable

import torch

from warpo.bench.case import Case
from warpo.bench.cases.control import soft_q_targets_case, squashed_gaussian_case
from warpo.bench.cases.groups import group_advantages_case
from warpo.bench.cases.losses import aggregate_case, approx_kl_case, policy_loss_case
from warpo.bench.cases.scans import gae_case, one_row_case
from warpo.bench.cases.vocabulary import (
    from_logits_case,
    linear_memory_case,
    logprobs_cases,
)


def cases(device: str) -> list[Callable[[], list[Case]]]:
    """What is timed on a device; each entry allocates its inputs when called."""
    if device == "cpu":
        return [
            lambda: logprobs_cases("cpu", 1024, 151936, torch.float32),
            lambda: logprobs_cases("cpu", 1024, 151936, torch.bfloat16),
            lambda: [from_logits_case("cpu", 4, 256, 151936, torch.float32)],
            lambda: [linear_memory_case(8192, 64, 151936)],
            lambda: [gae_case("cpu", 512, 4096, -1), gae_case("cpu", 4096, 128, 0)],
            lambda: [one_row_case(2048, 3.0), one_row_case(32768, 40.0)],
            lambda: [policy_loss_case("cpu", 256, 2048), group_advantages_case("cpu", 1024, 16)],
            lambda: [aggregate_case("cpu", 8, 64), aggregate_case("cpu", 256, 2048)],
            lambda: [approx_kl_case("cpu", 8, 64), approx_kl_case("cpu", 256, 2048)],
            lambda: [
                squashed_gaussian_case("cpu", 256, 6),
                squashed_gaussian_case("cpu", 4096, 17),
            ],
            lambda: [soft_q_targets_case("cpu", 256), soft_q_targets_case("cpu", 65536)],
        ]
    return [
        lambda: logprobs_cases(device, 8192, 151936, torch.bfloat16),
        lambda: logprobs_cases(device, 4096, 151936, torch.float32),
        lambda: logprobs_cases(device, 8192, 32001, torch.bfloat16),
        lambda: [from_logits_case(device, 8, 1024, 151936, torch.bfloat16)],
        lambda: [gae_case(device, 256, 8192, -1), gae_case(device, 4096, 128, 0)],
        lambda: [gae_case(device, 128, 4096, 0)],
        lambda: [policy_loss_case(device, 16, 2048), policy_loss_case(device, 256, 8192)],
        lambda: [aggregate_case(device, 8, 64), aggregate_case(device, 256, 8192)],
        lambda: [approx_kl_case(device, 8, 64), approx_kl_case(device, 256, 8192)],
        lambda: [group_advantages_case(device, 1024, 16)],
        lambda: [squashed_gaussian_case(device, 256, 6), squashed_gaussian_case(device, 65536, 17)],
        lambda: [soft_q_targets_case(device, 256), soft_q_targets_case(device, 65536)],
    ]
