"""The structs of csrc/arguments/kept_set_logprobs.h, which describes the fields."""

from typing import NamedTuple

from torch import Tensor


class KeptSetLogprobsArguments(NamedTuple):
    tokens: int
    vocab: int
    hidden_size: int
    num_kept: int
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    kept_ids: Tensor
    kept_offsets: Tensor
    temperature: float
    token_temperature: Tensor | None
    logprobs: Tensor | None
    kept_logits: Tensor
    stats: Tensor


class KeptSetLogprobsBackwardArguments(NamedTuple):
    forward: KeptSetLogprobsArguments
    grad_logprobs: Tensor
    grad_hidden: Tensor | None
    grad_logits: Tensor


class KeptSetWeightGradientArguments(NamedTuple):
    vocab: int
    hidden_size: int
    hidden: Tensor
    order: Tensor
    tokens: Tensor
    offsets: Tensor
    grad_logits: Tensor
    grad_weight: Tensor | None
    grad_bias: Tensor | None
