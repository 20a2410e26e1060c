"""The compiled backends `_cpu` and `_cuda`: tensors to pointers, one function an operation.

Each backend has the functions of `Backend`; arguments are checked and outputs allocated by the
caller. Per-token tensors are 2-D `[rows, steps]` with any strides, logits are `[rows, steps, V]`
with last stride 1.
With `cu_seqlens` they are `[1, tokens]`.
"""

from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

DTYPE_CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.uint8: 3,
    torch.bool: 3,
    torch.int32: 4,
    torch.int64: 5,
}


class Backend(Protocol):
    """What a backend offers. The caller allocates every output; `None` is an absent optional."""

    def logprobs_forward(
        self,
        logits: Tensor,
        targets: Tensor,
        temperature: float,
        token_temperature: Tensor | None,
        mask: Tensor | None,
        ignore_index: int,
        logprobs: Tensor,
        entropy: Tensor | None,
        stats: Tensor,
    ) -> None: ...

    def logprobs_backward(
        self,
        logits: Tensor,
        targets: Tensor,
        temperature: float,
        token_temperature: Tensor | None,
        mask: Tensor | None,
        ignore_index: int,
        entropy: Tensor | None,
        stats: Tensor,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
        grad_logits: Tensor,
    ) -> None: ...

    def gae_forward(
        self,
        rewards: Tensor,
        values: Tensor,
        last_values: Tensor | None,
        final_values: Tensor | None,
        mask: Tensor | None,
        terminated: Tensor | None,
        truncated: Tensor | None,
        last_terminated: Tensor | None,
        last_truncated: Tensor | None,
        gamma: float,
        gae_lambda: float,
        carry: bool,
        starts_at_t: bool,
        advantages: Tensor,
        returns: Tensor,
    ) -> None: ...

    def gae_backward(
        self,
        mask: Tensor | None,
        terminated: Tensor | None,
        truncated: Tensor | None,
        last_terminated: Tensor | None,
        last_truncated: Tensor | None,
        gamma: float,
        gae_lambda: float,
        carry: bool,
        starts_at_t: bool,
        grad_advantages: Tensor | None,
        grad_returns: Tensor | None,
        grad_rewards: Tensor,
        grad_values: Tensor,
        grad_last_values: Tensor | None,
        grad_final_values: Tensor | None,
    ) -> None: ...

    def policy_loss(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        ref_logprobs: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        sequence_level: bool,
        sequence_mean: bool,
        ratio_low: float,
        ratio_high: float,
        kl: int,
        kl_coef: float,
        log_ratio_limit: float,
        denominator: Tensor,
        grad_logprobs: Tensor | None,
        partials: Tensor,
        loss: Tensor,
        metrics: Tensor,
    ) -> None: ...

    def group_advantages_forward(
        self,
        rewards: Tensor,
        group_size: int,
        order: Tensor | None,
        offsets: Tensor | None,
        std_mode: int,
        leave_one_out: bool,
        eps: float,
        advantages: Tensor,
        mean: Tensor,
        std: Tensor,
        degenerate: Tensor,
    ) -> None: ...

    def group_advantages_backward(
        self,
        rewards: Tensor,
        group_size: int,
        order: Tensor | None,
        offsets: Tensor | None,
        std_mode: int,
        leave_one_out: bool,
        eps: float,
        mean: Tensor,
        std: Tensor,
        grad_advantages: Tensor,
        grad_rewards: Tensor,
    ) -> None: ...


def _view(x: Tensor | None) -> tuple[int, int, int, int] | None:
    """The C++ View of a 2-D tensor, or of the leading dimensions of a 3-D one; None if absent."""
    if x is None:
        return None
    stride = x.stride()
    return (x.data_ptr(), stride[0], stride[1], DTYPE_CODES[x.dtype])


def _vector(x: Tensor) -> tuple[int, int, int, int]:
    """View of a 1-D tensor: one row."""
    return (x.data_ptr(), 0, x.stride(0), DTYPE_CODES[x.dtype])


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _no_stream(x: Tensor) -> tuple[()]:
    return ()


def _current_stream(x: Tensor) -> tuple[int, int]:
    """What a CUDA function takes at the end: index and current stream of the device of `x`."""
    device = x.get_device()
    return (device, torch._C._cuda_getCurrentRawStream(device))


# fmt: off
class Native(Backend):
    """`Backend` by a compiled module: `warpo.kernels._cpu` or `warpo.kernels._cuda`."""

    def __init__(self, module: ModuleType) -> None:
        self._logprobs_forward = module.logprobs_forward
        self._logprobs_backward = module.logprobs_backward
        self._gae_forward = module.gae_forward
        self._gae_backward = module.gae_backward
        self._policy_loss = module.policy_loss
        self._group_advantages_forward = module.group_advantages_forward
        self._group_advantages_backward = module.group_advantages_backward
        on_cuda = module.__name__.endswith("_cuda")
        self._stream = _current_stream if on_cuda else _no_stream

    def logprobs_forward(
        self, logits, targets, temperature, token_temperature, mask, ignore_index,
        logprobs, entropy, stats,
    ) -> None:
        rows, steps, vocab = logits.shape
        self._logprobs_forward(
            rows, steps, vocab, _view(logits), _view(targets), temperature,
            _view(token_temperature), _view(mask), ignore_index,
            _view(logprobs), _view(entropy), stats.data_ptr(), *self._stream(logprobs),
        )

    def logprobs_backward(
        self, logits, targets, temperature, token_temperature, mask, ignore_index, entropy, stats,
        grad_logprobs, grad_entropy, grad_logits,
    ) -> None:
        rows, steps, vocab = logits.shape
        self._logprobs_backward(
            rows, steps, vocab, _view(logits), _view(targets), temperature,
            _view(token_temperature), _view(mask), ignore_index,
            _view(entropy), stats.data_ptr(), _view(grad_logprobs),
            _view(grad_entropy), _view(grad_logits), *self._stream(grad_logits),
        )

    def gae_forward(
        self, rewards, values, last_values, final_values, mask, terminated, truncated,
        last_terminated, last_truncated, gamma, gae_lambda, carry, starts_at_t,
        advantages, returns,
    ) -> None:
        rows, steps = rewards.shape
        self._gae_forward(
            rows, steps, _view(rewards), _view(values), _view(last_values),
            _view(final_values), _view(mask), _view(terminated), _view(truncated),
            _view(last_terminated), _view(last_truncated),
            gamma, gae_lambda, carry, starts_at_t,
            _view(advantages), _view(returns), *self._stream(advantages),
        )

    def gae_backward(
        self, mask, terminated, truncated, last_terminated, last_truncated,
        gamma, gae_lambda, carry, starts_at_t, grad_advantages, grad_returns,
        grad_rewards, grad_values, grad_last_values, grad_final_values,
    ) -> None:
        rows, steps = grad_rewards.shape
        self._gae_backward(
            rows, steps, _view(mask), _view(terminated), _view(truncated),
            _view(last_terminated), _view(last_truncated),
            gamma, gae_lambda, carry, starts_at_t,
            _view(grad_advantages), _view(grad_returns),
            _view(grad_rewards), _view(grad_values), _view(grad_last_values),
            _view(grad_final_values), *self._stream(grad_rewards),
        )

    def policy_loss(
        self, logprobs, old_logprobs, advantages, ref_logprobs, mask, cu_seqlens,
        sequence_level, sequence_mean, ratio_low, ratio_high, kl, kl_coef, log_ratio_limit,
        denominator, grad_logprobs, partials, loss, metrics,
    ) -> None:
        self._policy_loss(
            partials.shape[0], logprobs.shape[1], _view(logprobs), _view(old_logprobs),
            _view(advantages), _view(ref_logprobs), _view(mask), _pointer(cu_seqlens),
            sequence_level, sequence_mean, ratio_low, ratio_high, kl, kl_coef, log_ratio_limit,
            denominator.data_ptr(), _pointer(grad_logprobs), partials.data_ptr(),
            loss.data_ptr(), metrics.data_ptr(), *self._stream(loss),
        )

    def group_advantages_forward(
        self, rewards, group_size, order, offsets, std_mode, leave_one_out, eps,
        advantages, mean, std, degenerate,
    ) -> None:
        self._group_advantages_forward(
            mean.shape[0], _vector(rewards), group_size, _pointer(order), _pointer(offsets),
            std_mode, leave_one_out, eps, advantages.data_ptr(), mean.data_ptr(), std.data_ptr(),
            degenerate.data_ptr(), *self._stream(advantages),
        )

    def group_advantages_backward(
        self, rewards, group_size, order, offsets, std_mode, leave_one_out, eps,
        mean, std, grad_advantages, grad_rewards,
    ) -> None:
        self._group_advantages_backward(
            mean.shape[0], _vector(rewards), group_size, _pointer(order), _pointer(offsets),
            std_mode, leave_one_out, eps, mean.data_ptr(), std.data_ptr(),
            _vector(grad_advantages), grad_rewards.data_ptr(), *self._stream(grad_rewards),
        )
