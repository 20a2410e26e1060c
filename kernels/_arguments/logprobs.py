"""The structs of csrc/arguments/logprobs.h, which describes the fields."""

from typing import NamedTuple

from torch import Tensor


class LogprobsArguments(NamedTuple):
    rows: int
    steps: int
    vocab: int
    logits: Tensor
    targets: Tensor
    temperature: float
    token_temperature: Tensor | None
    mask: Tensor | None
    ignore_index: int
    logprobs: Tensor | None
    entropy: Tensor | None
    stats: Tensor | None
    partials: Tensor | None


class LogprobsBackwardArguments(NamedTuple):
    forward: LogprobsArguments
    grad_logprobs: Tensor | None
    grad_entropy: Tensor | None
    grad_logits: Tensor
