"""What the reverse scans over steps share: their arguments, checks and layouts.

Steps lie in `[B, T]` or `[N, T]`, in `[T, N]` with time_dim = 0, or packed in `(N,)` with
cu_seqlens. A kernel sees rows of steps: a `[T, N]` is passed transposed, without a copy.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpo.kernels._arguments.gae import GaeArguments, ScanArguments
from warpo.kernels._checks import FLOATS, check_mask, check_no_grad, check_number, check_tensor
from warpo.kernels._offsets import check_offsets, check_values

# in the order of MaskMode in csrc/arguments/gae.h
MASK_MODES = ("carry", "zero", "compact")
DONE_CONVENTIONS = ("ends_at_t", "starts_at_t")


class Steps(NamedTuple):
    """How the steps lie, which of them count and where episodes end. Names and meaning are those of
    the arguments of `gae`.
    """

    mask: Tensor | None = None
    mask_mode: str = "carry"
    cu_seqlens: Tensor | None = None
    terminated: Tensor | None = None
    truncated: Tensor | None = None
    last_values: Tensor | None = None
    final_values: Tensor | None = None
    done_convention: str = "ends_at_t"
    last_terminated: Tensor | None = None
    last_truncated: Tensor | None = None
    time_dim: int = -1


# of `ScanArguments`, which begin with them
NUM_TENSORS = 6


def check_steps(name: str, first: Tensor, steps: Steps) -> None:
    """`first`, the argument called `name`, has the shape that all per-step tensors must have."""
    check_tensor(name, first, FLOATS)
    rows = _check_layout(name, first, steps.cu_seqlens, steps.time_dim)
    check_mask("mask", steps.mask, first.shape, first)
    check_choice("mask_mode", steps.mask_mode, MASK_MODES)
    check_choice("done_convention", steps.done_convention, DONE_CONVENTIONS)
    if steps.last_values is not None:
        check_tensor("last_values", steps.last_values, FLOATS, (rows,), first)
    if steps.terminated is not None or steps.truncated is not None:
        check_mask("terminated", steps.terminated, first.shape, first)
        check_mask("truncated", steps.truncated, first.shape, first)
    if steps.final_values is not None:
        check_tensor("final_values", steps.final_values, FLOATS, first.shape, first)
    if steps.last_terminated is not None or steps.last_truncated is not None:
        if steps.done_convention != "starts_at_t":
            which = "last_truncated" if steps.last_terminated is None else "last_terminated"
            raise ValueError(f"{which} has a meaning with done_convention='starts_at_t' only")
        check_mask("last_terminated", steps.last_terminated, (rows,), first)
        check_mask("last_truncated", steps.last_truncated, (rows,), first)


def _check_layout(name: str, first: Tensor, cu_seqlens: Tensor | None, time_dim: int) -> int:
    """The number of sequences or environments."""
    shape = tuple(first.shape)
    if time_dim not in (-1, 0, 1):
        raise ValueError(f"time_dim must be -1, 0 or 1, got {time_dim}")
    if cu_seqlens is None:
        if len(shape) != 2:
            raise ValueError(
                f"{name} must be 2-D, [B, T] or [T, N], or (N,) together with cu_seqlens; "
                f"got {shape}"
            )
        return shape[1] if time_dim == 0 else shape[0]
    if len(shape) != 1:
        raise ValueError(f"with cu_seqlens {name} must be (N,), got {shape}")
    if time_dim != -1:
        raise ValueError(f"time_dim has no meaning with cu_seqlens: leave it out, got {time_dim}")
    return check_offsets("cu_seqlens", cu_seqlens, first)


def check_truncated(steps: Steps) -> None:
    """Where values bootstrap, a truncated step needs one."""
    if (steps.truncated is None) != (steps.final_values is None):
        raise ValueError(
            "truncated and final_values go together: final_values[t] is the value of the "
            "observation that a truncated step t ended with"
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_discount(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def check_log_ratio_limit(limit: float) -> None:
    check_number("log_ratio_limit", limit)
    if not 0 < limit <= 80:
        raise ValueError(
            f"log_ratio_limit must be in (0, 80], got {limit}: exp overflows float32 above 88"
        )


def check_constants(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        check_no_grad(name, tensor)


def reference_options(first: Tensor, steps: Steps) -> dict:
    """The same for `reference`, in float32."""
    check_values("cu_seqlens", steps.cu_seqlens, first.numel())
    return steps._replace(
        last_values=None if steps.last_values is None else steps.last_values.float(),
        final_values=None if steps.final_values is None else steps.final_values.float(),
    )._asdict()


def as_rows(steps: Steps, *tensors: Any) -> tuple[Any, ...]:
    """Per-step tensors, or None, as `[rows, steps]`, or `(N,)` with cu_seqlens."""
    if steps.time_dim != 0:
        return tensors
    return tuple(None if x is None else x.t() for x in tensors)


def as_given(steps: Steps, *results: Tensor) -> tuple[Tensor, ...]:
    """Results for rows in the layout of the arguments."""
    return tuple(x.t() for x in results) if steps.time_dim == 0 else results


def as_inputs(steps: Steps, gamma: float, gae_lambda: float) -> ScanArguments:
    mask, terminated, truncated = as_rows(steps, steps.mask, steps.terminated, steps.truncated)
    return ScanArguments(
        mask=mask,
        terminated=terminated,
        truncated=truncated,
        last_terminated=as_column(steps.last_terminated),
        last_truncated=as_column(steps.last_truncated),
        cu_seqlens=steps.cu_seqlens,
        gamma=gamma,
        gae_lambda=gae_lambda,
        mask_mode=MASK_MODES.index(steps.mask_mode),
        starts_at_t=steps.done_convention == "starts_at_t",
    )


def as_column(per_row: Tensor | None) -> Tensor | None:
    return None if per_row is None else per_row[:, None]


def gae_arguments(
    first: Tensor,
    steps: ScanArguments,
    *,
    rewards: Tensor | None = None,
    terminal_rewards: Tensor | None = None,
    values: Tensor | None = None,
    last_values: Tensor | None = None,
    final_values: Tensor | None = None,
    advantages: Tensor | None = None,
    returns: Tensor | None = None,
) -> GaeArguments:
    """The tensors of one backend call, whose sizes are those of `first`."""
    num_rows, num_steps = sizes(first, steps.cu_seqlens)
    return GaeArguments(
        scan=steps,
        rows=num_rows,
        steps=num_steps,
        rewards=rewards,
        terminal_rewards=terminal_rewards,
        values=values,
        last_values=last_values,
        final_values=final_values,
        advantages=advantages,
        returns=returns,
    )


def sizes(first: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """rows and steps of `Gae`."""
    if cu_seqlens is None:
        rows, steps = first.shape
        return rows, steps
    return cu_seqlens.numel() - 1, first.numel()


def is_empty(first: Tensor, cu_seqlens: Tensor | None, *results: Tensor) -> bool:
    """Whether there is nothing to launch; then the results, of steps of no sequence, are 0.

    Raises:
        ValueError: the offsets are on the CPU and malformed.
    """
    check_values("cu_seqlens", cu_seqlens, first.numel())
    if cu_seqlens is not None and cu_seqlens.numel() == 1:
        for result in results:
            result.zero_()
        return True
    return first.numel() == 0


def empty_like(first: Tensor) -> Tensor:
    """Uninitialised float32 whose fast dimension is that of `first`, dense whatever its strides
    are.
    """
    if first.dim() == 2 and first.stride(0) <= first.stride(1):
        # one call: new_empty(...).t() takes three times as long
        return first.new_empty_strided(
            first.shape, (1, max(first.shape[0], 1)), dtype=torch.float32
        )
    return first.new_empty(first.shape, dtype=torch.float32)


def nothing_like(first: Tensor) -> Tensor:
    """In place of a result that is not wanted."""
    return first.new_empty(0, dtype=torch.float32)
