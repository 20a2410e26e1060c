"""The reverse-time recursion of `gae` and `vtrace`, in plain PyTorch, one step at a time."""

import torch
from torch import Tensor

from warpo.kernels.reference.sequences import sequence_of


def recursion(
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    gae_lambda: float,
    weights: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    mask: Tensor | None = None,
    mask_mode: str = "carry",
    cu_seqlens: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    last_values: Tensor | None = None,
    final_values: Tensor | None = None,
    done_convention: str = "ends_at_t",
    last_terminated: Tensor | None = None,
    last_truncated: Tensor | None = None,
    time_dim: int = -1,
) -> tuple[Tensor, Tensor]:
    """(x, q) with x_t = rho_t (r_t + gamma V' - V_t) + gamma lambda c_t x' and
    q_t = pg_t (r_t + gamma (V' + x') - V_t), for weights = (rho, c, pg), or all 1.
    """
    if weights is None:
        weights = (torch.ones_like(values),) * 3
    if cu_seqlens is not None:
        steps = (mask, terminated, truncated, final_values)
        lasts = (last_values, last_terminated, last_truncated)
        x, q = torch.zeros_like(rewards), torch.zeros_like(rewards)
        for b, span in enumerate(spans(cu_seqlens)):
            valid, ended, cut, final = (None if y is None else y[span][None] for y in steps)
            last, last_ended, last_cut = (None if y is None else y[b, None] for y in lasts)
            rho, c, pg = (y[span][None] for y in weights)
            row_x, row_q = recursion(
                rewards[span][None], values[span][None], gamma, gae_lambda, (rho, c, pg),
                mask=valid, mask_mode=mask_mode, terminated=ended, truncated=cut,
                last_values=last, final_values=final, done_convention=done_convention,
                last_terminated=last_ended, last_truncated=last_cut,
            )  # fmt: skip
            x = torch.cat([x[: span.start], row_x[0], x[span.stop :]])
            q = torch.cat([q[: span.start], row_q[0], q[span.stop :]])
        return x, q
    rewards, values, rho, c, pg = (x.movedim(time_dim, -1) for x in (rewards, values, *weights))

    def ends(flags: Tensor | None, last: Tensor | None) -> Tensor:
        if flags is None:
            return torch.zeros_like(rewards, dtype=torch.bool)
        flags = flags.movedim(time_dim, -1).bool()
        if done_convention == "ends_at_t":
            return flags
        tail = torch.zeros_like(flags[..., :1]) if last is None else last.bool()[..., None]
        return torch.cat([flags[..., 1:], tail], -1)[..., : flags.shape[-1]]

    terminal, cut = ends(terminated, last_terminated), ends(truncated, last_truncated)
    valid = torch.ones_like(terminal) if mask is None else mask.movedim(time_dim, -1).bool()
    final = None if final_values is None else final_values.movedim(time_dim, -1)
    if mask_mode == "compact":
        rewards = move_tail(rewards, valid)
    zero = values.new_zeros(values.shape[:-1])
    next_value = zero if last_values is None else last_values
    next_x = zero
    xs: list[Tensor] = []
    qs: list[Tensor] = []
    for t in reversed(range(rewards.shape[-1])):
        keep, term = valid[..., t], terminal[..., t]
        value = torch.where(keep, values[..., t], 0)
        reward = torch.where(keep, rewards[..., t], 0)
        bootstrap = next_value
        if final is not None:
            bootstrap = torch.where(cut[..., t] & keep, final[..., t], bootstrap)
        bootstrap = torch.where(term & keep, 0, bootstrap)
        trace = torch.where((term | cut[..., t]) & keep, 0, next_x)
        delta = reward + gamma * bootstrap - value
        x = rho[..., t] * delta
        x = x + gamma * gae_lambda * c[..., t] * trace
        q = pg[..., t] * (delta + gamma * trace)
        xs.append(torch.where(keep, x, 0))
        qs.append(torch.where(keep, q, 0))
        if mask_mode == "zero":
            next_value, next_x = value, x
        else:
            next_value = torch.where(keep, value, next_value)
            next_x = torch.where(keep, x, next_x)
    x, q = (torch.stack(y[::-1], -1) if y else torch.zeros_like(rewards) for y in (xs, qs))
    return x.movedim(-1, time_dim), q.movedim(-1, time_dim)


def valid_steps(like: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """bool, of the shape of `like`: not masked, and of a sequence."""
    valid = torch.ones_like(like, dtype=torch.bool) if mask is None else mask.bool()
    return valid if cu_seqlens is None else valid & sequence_of(cu_seqlens, like.numel())[1]


def spans(cu_seqlens: Tensor) -> list[slice]:
    """The steps of each sequence."""
    bounds = cu_seqlens.tolist()
    return [slice(*pair) for pair in zip(bounds[:-1], bounds[1:], strict=True)]


def move_tail(rewards: Tensor, valid: Tensor) -> Tensor:
    """Rewards behind the last valid step of each row added to the reward of that step."""
    behind = _valid_from(valid) == 0
    tail = torch.where(behind, rewards, 0).sum(-1, keepdim=True)
    return add_to_last(rewards, tail, valid)


def add_to_last(rewards: Tensor, extra: float | Tensor, valid: Tensor) -> Tensor:
    """`extra` added at the last valid step of each row; nowhere in a row without one."""
    return torch.where(valid & (_valid_from(valid) == 1), rewards + extra, rewards)


def _valid_from(valid: Tensor) -> Tensor:
    """Number of valid steps from each one on."""
    return valid.flip(-1).long().cumsum(-1).flip(-1)
