"""A linear head in chunks of tokens: logits = hidden @ weight.T + bias, capped to c tanh(logits /
c), and the gradients back through it. No tensor of tokens x vocabulary exists.

Masked and ignored tokens are compacted away before the matrix products. Gradients of weight and
bias accumulate in float32 over the tokens and are rounded once. Where products are of bfloat16 or
float16, the gradients of the logits are rounded to it for them.
"""

from typing import Any

import torch
from torch import Tensor, distributed

from warpo.kernels import _matrix_product
from warpo.kernels._checks import (
    FLOATS,
    as_int64,
    as_rows,
    as_temperature,
    check_mask,
    check_number,
    check_tensor,
)
from warpo.kernels._linear_head_plan import NONE, Request, plan


class LinearHead:
    """Logits of chunks `[start, stop)` of the compacted tokens, and the gradients through them.

    Args:
        hidden: (rows, steps, H), any strides of the leading two.
        weight: (V, H). On a GPU, products with one whose rows are no multiple of 16 bytes are slow.
        valid: (rows * steps,) bool: tokens that count.
        num_valid: upper bound of their number where the device cannot be asked, -1 if not known.
        float32_logits: logits in float32, else in the dtype of hidden.
        gradients: where those of the logits go: NONE | OVER | APART.
        kept: the logits of all tokens are kept, outside of workspace_bytes.
        float32_gradients: those of hidden, weight and bias, whatever the dtype of these.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float,
        valid: Tensor,
        num_valid: int,
        workspace_bytes: int,
        float32_logits: bool,
        *,
        gradients: str = NONE,
        kept: bool = False,
        float32_gradients: bool = False,
    ) -> None:
        self._float32_gradients = float32_gradients
        self._hidden, self._weight, self._bias, self._softcap = hidden, weight, bias, softcap
        self.vocab = weight.shape[0]
        self._on_cpu = is_on_cpu(hidden)
        self._index, self._flags = _compact(valid, num_valid, self._on_cpu)
        self.count = valid.numel() if self._index is None else self._index.numel()
        self._valid = valid
        self.logits_dtype = torch.float32 if float32_logits else hidden.dtype
        self._mixes = _matrix_product.own_product(weight) is not None
        request = Request(
            num_tokens=self.count,
            vocab=self.vocab,
            hidden_size=weight.shape[1],
            dtype=weight.dtype,
            logits_dtype=self.logits_dtype,
            workspace_bytes=workspace_bytes,
            on_cpu=self._on_cpu,
            mixes=self._mixes,
            softcap=softcap != 0,
            gradients=gradients,
            kept=kept,
        )
        self.plan = plan(request)

    def chunks(self) -> list[tuple[int, int]]:
        """Those of a block, then those of the next."""
        tokens, block, count = self.plan.tokens, self.plan.block, self.count
        return [
            (start, min(start + tokens, first + block, count))
            for first in range(0, count, block)
            for start in range(first, min(first + block, count), tokens)
        ]

    def new_buffer(self) -> Tensor:
        """Room for the logits of a chunk."""
        return self._new_rows(self.plan.tokens, self.logits_dtype)

    def _new_rows(self, tokens: int, dtype: torch.dtype) -> Tensor:
        rows = self._hidden.new_empty((tokens, self.plan.stride), dtype=dtype)
        return rows[:, : self.vocab]

    def compact(self, per_token: Tensor | None) -> Any:
        """One number per token -> (1, count): of the compacted tokens."""
        if per_token is None:
            return None
        flat = per_token.reshape(-1)
        return (flat if self._index is None else flat[self._index])[None]

    def spread(self, compacted: Tensor) -> Tensor:
        """(count,) -> one per token; 0 where it does not count, NaN where num_valid left it out."""
        if self._index is None:
            return torch.where(self._valid, compacted, 0)
        result = torch.where(self._valid, torch.nan, compacted.new_zeros(self._valid.shape))
        return result.index_copy_(0, self._index, compacted)

    def logits(self, start: int, stop: int, out: Tensor) -> Tensor:
        hidden, out = self._rows(start, stop), out[: stop - start]
        multiply = _matrix_product.multiply
        if self.plan.product_dtype == self.logits_dtype != self._weight.dtype:
            hidden = hidden.float()
            for part in self._parts():
                multiply(out[:, part], hidden, self._weight[part].float().t())
        else:
            multiply(out, hidden, self._weight.t())
        if self._bias is not None:
            out.add_(self._bias)
        if self._softcap:
            out.div_(self._softcap).tanh_().mul_(self._softcap)
        return out

    def start_gradients(
        self, wanted: list[bool], group: distributed.ProcessGroup | None = None
    ) -> None:
        """Of hidden, weight and bias, those wanted. With a group, the weight is a part of the
        vocabulary, and gradients of hidden are summed over the ranks.
        """
        with_hidden, with_weight, with_bias = wanted
        rows, steps, hidden_size = self._hidden.shape
        new = self._hidden.new_zeros if self.count == 0 else self._hidden.new_empty
        every = self.count == rows * steps and self._index is None
        new_hidden = self._hidden.new_empty if every else self._hidden.new_zeros
        self._grad_hidden = None
        if with_hidden:
            dtype = self._gradient_dtype(self._hidden)
            self._grad_hidden = new_hidden((rows * steps, hidden_size), dtype=dtype)
        self._grad_weight = self._weight_sums = None
        if with_weight:
            # to float32 sums our own products add and round in one, those of BLAS do not
            blocks = self.plan.block < self.count
            rounds = self._mixes or not (blocks or self._on_cpu)
            dtype = self._gradient_dtype(self._weight) if rounds else torch.float32
            self._grad_weight = self._weight_sums = new(self._weight.shape, dtype=dtype)
            if dtype != torch.float32 and blocks:
                self._weight_sums = new(self._weight.shape, dtype=torch.float32)
        zeros = self._hidden.new_zeros
        self._grad_bias = zeros((self.vocab,), dtype=torch.float32) if with_bias else None
        self._group, self._block = group, None
        # a product on a CPU by BLAS has float32 results
        rounds = self._mixes or not self._on_cpu or self._gradient_dtype(self._hidden).itemsize == 4
        self._in_place = self._index is None and group is None and rounds
        if self.plan.apart and any(wanted):
            self._block = self._new_rows(self.plan.block, self.plan.gradient_dtype)

    def grad_logits(self, start: int, stop: int, logits: Tensor) -> Tensor:
        """Where the gradient of the logits of a chunk goes."""
        if self._block is None:
            return logits
        first = start % self.plan.block
        return self._block[first : first + stop - start]

    def add_gradients(
        self, start: int, stop: int, logits: Tensor | None, grad_logits: Tensor
    ) -> None:
        """Overwrites grad_logits. The logits are read with a softcap only. The products are those
        of a block, with its last chunk.
        """
        if self._softcap and logits is not None:
            rows = max(1, self.plan.scratch_bytes // (8 * self.vocab))
            for grad, x in zip(grad_logits.split(rows), logits.split(rows), strict=True):
                grad.mul_(1 - (x.float() / self._softcap).square_())
        first = start // self.plan.block * self.plan.block
        if stop < min(first + self.plan.block, self.count):
            return
        if first < start:
            assert self._block is not None
            grad_logits = self._block[: stop - first]
        self._add_block(first, stop, grad_logits)

    def _add_block(self, start: int, stop: int, grad_logits: Tensor) -> None:
        hidden = self._rows(start, stop).to(self.plan.product_dtype)
        grad_hidden = self._new_grad_hidden(start, stop)
        if self._grad_bias is not None:
            self._grad_bias += grad_logits.sum(0, dtype=torch.float32)
        for part in self._parts():
            grad = grad_logits[:, part]
            grad = grad if self._mixes else grad.to(self.plan.product_dtype)
            if grad_hidden is not None:
                weight = self._weight[part].to(self.plan.product_dtype)
                addend = grad_hidden if part.start > 0 else None
                _matrix_product.multiply(grad_hidden, grad, weight, addend)
            if self._grad_weight is not None and self._weight_sums is not None:
                out = sums = self._weight_sums[part]
                if stop == self.count and self._grad_weight is not self._weight_sums:
                    out = self._grad_weight[part]
                _matrix_product.multiply(out, grad.t(), hidden, sums if start > 0 else None)
        if grad_hidden is None or self._grad_hidden is None:
            return
        if self._group is not None:
            distributed.all_reduce(grad_hidden, group=self._group)
        if self._index is not None:
            grad_hidden = grad_hidden.to(self._grad_hidden.dtype)
            self._grad_hidden.index_copy_(0, self._index[start:stop], grad_hidden)
        elif not self._in_place:
            self._grad_hidden[start:stop] = grad_hidden

    def _new_grad_hidden(self, start: int, stop: int) -> Tensor | None:
        """The result itself where products can write it."""
        result = self._grad_hidden
        if result is None or self._in_place:
            return None if result is None else result[start:stop]
        return result.new_empty((stop - start, result.shape[1]), dtype=torch.float32)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden, weight and bias, in their dtypes or float32."""
        weight, bias = self._grad_weight, self._grad_bias
        return (
            None if self._grad_hidden is None else self._grad_hidden.view(self._hidden.shape),
            None if weight is None else weight.to(self._gradient_dtype(self._weight)),
            None
            if bias is None or self._bias is None
            else bias.to(self._gradient_dtype(self._bias)),
        )

    def _gradient_dtype(self, tensor: Tensor) -> torch.dtype:
        return torch.float32 if self._float32_gradients else tensor.dtype

    def _parts(self) -> list[slice]:
        return [
            slice(start, min(start + self.plan.columns, self.vocab))
            for start in range(0, self.vocab, self.plan.columns)
        ]

    def _rows(self, start: int, stop: int) -> Tensor:
        """Hidden states of a chunk; zeros where a token does not count, as 0 * NaN is NaN."""
        rows, steps, hidden_size = self._hidden.shape
        stride_b, stride_t, _ = self._hidden.stride()
        if self._index is None and (rows == 1 or stride_b == steps * stride_t):
            result = self._hidden.as_strided((rows * steps, hidden_size), (stride_t, 1))[start:stop]
        else:
            place = self._index
            if place is None:
                place = torch.arange(rows * steps, device=self._hidden.device)
            place = place[start:stop]
            result = self._hidden[place // steps, place % steps]
        if self._flags is not None:
            result = torch.where(self._flags[start:stop, None], result, 0)
        return result


def is_on_cpu(hidden: Tensor) -> bool:
    return hidden.device.type == "cpu"


def _compact(valid: Tensor, num_valid: int, on_cpu: bool) -> tuple[Tensor | None, Tensor | None]:
    """Places of the valid tokens (None: all places), and which of these do count (None: all)."""
    if on_cpu:
        index = valid.nonzero()[:, 0]
        return (None if index.numel() == valid.numel() else index), None
    if num_valid < 0 or num_valid >= valid.numel():
        return None, valid
    # a stable sort rather than nonzero, whose size only the device knows
    index = torch.sort(valid, descending=True, stable=True).indices[:num_valid]
    return index, valid[index]


def valid_tokens(targets: Tensor, mask: Tensor | None, ignore_index: int) -> Tensor:
    """(tokens,) bool."""
    valid = targets.reshape(-1) != ignore_index
    return valid if mask is None else valid & (mask.reshape(-1) != 0)


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, float | Tensor]:
    """Refuse what no head can be; hidden as (rows, steps, H), and targets and temperature as the
    kernels take them.
    """
    check_tensor("hidden", hidden, FLOATS)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden must be (..., H) with H >= 1, got {tuple(hidden.shape)}")
    check_tensor("weight", weight, FLOATS, like=hidden)
    hidden_size = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != hidden_size or weight.shape[0] == 0:
        raise ValueError(
            f"weight must be (V, H) = (V, {hidden_size}) with V >= 1, got {tuple(weight.shape)}"
        )
    if weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden and weight must have one dtype, got {hidden.dtype} and {weight.dtype}: "
            "pass hidden.to(weight.dtype)"
        )
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.stride(-1) != 1 and hidden_size > 1:
            raise ValueError(
                f"the last stride of {name} must be 1, got strides {tensor.stride()}: "
                f"pass {name}.contiguous()"
            )
    if bias is not None:
        check_tensor("bias", bias, FLOATS, (weight.shape[0],), hidden)
    shape = hidden.shape[:-1]
    targets = as_int64("targets", targets, shape, hidden)
    check_mask("mask", mask, shape, hidden)
    temperature = as_temperature(temperature, shape, hidden)
    if softcap is not None:
        check_number("softcap", softcap)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0, got {softcap}: pass None for no cap")
    return as_rows("hidden", hidden, keep=1), targets, temperature
