"""The structs of csrc/arguments/gae.h, which describes the fields."""

from typing import NamedTuple

from torch import Tensor


class ScanArguments(NamedTuple):
    mask: Tensor | None
    terminated: Tensor | None
    truncated: Tensor | None
    last_terminated: Tensor | None
    last_truncated: Tensor | None
    cu_seqlens: Tensor | None
    gamma: float
    gae_lambda: float
    mask_mode: int
    starts_at_t: bool


class GaeArguments(NamedTuple):
    scan: ScanArguments
    rows: int
    steps: int
    rewards: Tensor | None
    terminal_rewards: Tensor | None
    values: Tensor | None
    last_values: Tensor | None
    final_values: Tensor | None
    advantages: Tensor | None
    returns: Tensor | None


class GaeBackwardArguments(NamedTuple):
    forward: GaeArguments
    grad_advantages: Tensor | None
    grad_returns: Tensor | None
    grad_rewards: Tensor | None
    grad_values: Tensor | None
    grad_last_values: Tensor | None
    grad_final_values: Tensor | None


class ShapedGaeArguments(NamedTuple):
    gae: GaeArguments
    logprobs: Tensor
    ref_logprobs: Tensor
    kl: int
    kl_coef: float
    adaptive_kl_coef: Tensor | None
    entropy_coef: float
    log_ratio_limit: float
    shaped_rewards: Tensor | None


class VtraceArguments(NamedTuple):
    gae: GaeArguments
    logprobs: Tensor
    old_logprobs: Tensor
    rho_max: float
    c_max: float
    pg_rho_max: float
    log_ratio_limit: float
    weighs_advantages: bool
