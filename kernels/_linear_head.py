"""A linear head in chunks of tokens: logits = hidden @ weight.T + bias, capped to c tanh(logits /
c), and the gradients back through it. No tensor of tokens x vocabulary exists.

Masked and ignored tokens are compacted away before the matrix products. The products are those of
torch (BLAS), or our own on a CPU that has the instructions: of float32 with AVX-512, of bfloat16
with AVX512_BF16, both with float32 sums; gradients of weight and bias accumulate in float32 over
the chunks and are rounded once. Where products are of bfloat16 or float16, the gradients of the
logits are rounded to it for them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

from warpo.kernels import dispatch
from warpo.kernels._arguments.matrix_product import MatrixProductArguments
from warpo.kernels._checks import (
    FLOATS,
    as_int64,
    as_rows,
    as_temperature,
    check_mask,
    check_number,
    check_tensor,
)

# 64 MiB hold 96 tokens of a vocabulary of 151936 in float32: enough for a CPU's matrix
# product. A GPU wants a thousand tokens or more, since every chunk reads and writes the whole
# float32 gradient of the weight once.
CPU_WORKSPACE_BYTES = 64 << 20
CUDA_WORKSPACE_BYTES = 1 << 30


class LinearHead:
    """Logits of chunks `[start, stop)` of the compacted tokens, and the gradients through them.

    Args:
        hidden: (rows, steps, H), any strides of the leading two.
        weight: (V, H).
        valid: (rows * steps,) bool: tokens that count.
        num_valid: upper bound of their number where the device cannot be asked, -1 if not known.
        float32_logits: logits in float32, else in the dtype of hidden.
        gradient_buffer: the gradient of the logits is not written over the logits.
        kept: the logits of all chunks are kept, so a chunk may take all of workspace_bytes.
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
        gradient_buffer: bool = False,
        kept: bool = False,
        float32_gradients: bool = False,
    ) -> None:
        self._float32_gradients = float32_gradients
        self._hidden, self._weight, self._bias, self.softcap = hidden, weight, bias, softcap
        self.vocab = weight.shape[0]
        self.on_cpu = hidden.device.type == "cpu"
        self._index, self._flags = _compact(valid, num_valid, self.on_cpu)
        self.count = valid.numel() if self._index is None else self._index.numel()
        self._valid = valid
        self.logits_dtype = torch.float32 if float32_logits else hidden.dtype
        self._mixes = own_product(weight) is not None
        # BLAS of a CPU sums in the dtype of its operands, that of a GPU in float32
        self._product_dtype = weight.dtype if self._mixes or not self.on_cpu else torch.float32
        self._plan(workspace_bytes, gradient_buffer, kept)

    def _plan(self, workspace_bytes: int, gradient_buffer: bool, kept: bool) -> None:
        """Tokens of a chunk, and the columns of it that are converted at a time."""
        low = self._weight.dtype != torch.float32 and not self._mixes
        converts = low and (self.on_cpu or self.logits_dtype != self._weight.dtype)
        hidden_size = self._weight.shape[1]
        # what is left is for converted parts, and for the copies that BLAS makes of its operands
        share = workspace_bytes // 8 * (6 if converts or self.softcap else 7)
        per_token = self.vocab * self.logits_dtype.itemsize * (1 + gradient_buffer)
        room = workspace_bytes // per_token if kept else share // (per_token + 8 * hidden_size)
        tokens = max(1, min(room, self.count))
        chunks = -(-self.count // tokens)
        self._tokens = max(1, -(-self.count // max(1, chunks)))
        self._columns = self.vocab
        if converts or self.softcap:
            per_column = 12 * self._tokens + 4 * hidden_size * (low and self.on_cpu)
            self._columns = max(1, min((workspace_bytes - share) // per_column, self.vocab))
        self._low_on_cpu = low and self.on_cpu

    def chunks(self) -> list[tuple[int, int]]:
        return [
            (start, min(start + self._tokens, self.count))
            for start in range(0, self.count, self._tokens)
        ]

    def new_buffer(self) -> Tensor:
        """Room for the logits of a chunk."""
        return self._hidden.new_empty((self._tokens, self.vocab), dtype=self.logits_dtype)

    def compact(self, per_token: Tensor | None) -> Any:
        """One number a token -> (1, count): of the compacted tokens."""
        if per_token is None:
            return None
        flat = per_token.reshape(-1)
        return (flat if self._index is None else flat[self._index])[None]

    def spread(self, compacted: Tensor) -> Tensor:
        """(count,) -> one a token; 0 where it does not count, NaN where num_valid left it out."""
        if self._index is None:
            return torch.where(self._valid, compacted, 0)
        result = torch.where(self._valid, torch.nan, compacted.new_zeros(self._valid.shape))
        return result.index_copy_(0, self._index, compacted)

    def logits(self, start: int, stop: int, out: Tensor) -> Tensor:
        hidden, out = self._rows(start, stop), out[: stop - start]
        if self._low_on_cpu and self.logits_dtype == torch.float32:
            hidden = hidden.float()
            for part in self._parts():
                _multiply(out[:, part], hidden, self._weight[part].float().t())
        else:
            _multiply(out, hidden, self._weight.t())
        if self._bias is not None:
            out.add_(self._bias)
        if self.softcap:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
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
            dtype = self._gradient_dtype(self._weight) if self._mixes else torch.float32
            self._grad_weight = self._weight_sums = new(self._weight.shape, dtype=dtype)
            if dtype != torch.float32 and self._tokens < self.count:
                self._weight_sums = new(self._weight.shape, dtype=torch.float32)
        zeros = self._hidden.new_zeros
        self._grad_bias = zeros((self.vocab,), dtype=torch.float32) if with_bias else None
        self._group = group

    def add_gradients(
        self, start: int, stop: int, logits: Tensor | None, grad_logits: Tensor
    ) -> None:
        """Overwrites grad_logits. The logits are read with a softcap only."""
        hidden = self._rows(start, stop).to(self._product_dtype)
        grad_hidden = None
        if self._grad_hidden is not None:
            grad_hidden = hidden.new_empty(hidden.shape, dtype=torch.float32)
        for part in self._parts():
            grad = grad_logits[:, part]
            if self.softcap and logits is not None:
                grad.mul_(1 - (logits[:, part].float() / self.softcap).square_())
            if self._grad_bias is not None:
                self._grad_bias[part] += grad.sum(0, dtype=torch.float32)
            grad = grad if self._mixes else grad.to(self._product_dtype)
            if grad_hidden is not None:
                weight = self._weight[part].to(self._product_dtype)
                _multiply(grad_hidden, grad, weight, grad_hidden if part.start > 0 else None)
            if self._grad_weight is not None and self._weight_sums is not None:
                sums = self._weight_sums[part]
                out = self._grad_weight[part] if stop == self.count else sums
                _multiply(out, grad.t(), hidden, sums if start > 0 else None)
        if grad_hidden is None or self._grad_hidden is None:
            return
        if self._group is not None:
            distributed.all_reduce(grad_hidden, group=self._group)
        if self._index is None:
            self._grad_hidden[start:stop] = grad_hidden
        else:
            self._grad_hidden.index_copy_(
                0, self._index[start:stop], grad_hidden.to(self._grad_hidden.dtype)
            )

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
            slice(start, min(start + self._columns, self.vocab))
            for start in range(0, self.vocab, self._columns)
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


OWN_PRODUCTS = {torch.float32: "float32_product", torch.bfloat16: "bfloat16_product"}


def own_product(b: Tensor) -> Callable[[MatrixProductArguments], None] | None:
    """Ours of a matrix in float32 or the dtype of b with b: of processors that have it."""
    if not b.is_cpu or b.dtype not in OWN_PRODUCTS:
        return None
    return getattr(dispatch.load("cpu"), OWN_PRODUCTS[b.dtype], None)


def _multiply(out: Tensor, a: Tensor, b: Tensor, addend: Tensor | None = None) -> None:
    """out = a @ b, or addend + a @ b, summed in float32 whatever the dtype of a."""
    product = own_product(b)
    if product is not None:
        rows, columns = out.shape
        product(
            MatrixProductArguments(
                rows=rows, columns=columns, depth=a.shape[1], a=a, b=b, addend=addend, out=out
            )
        )
    elif out.dtype == a.dtype:
        if addend is not None:
            torch.addmm(addend, a, b, out=out)
        else:
            torch.mm(a, b, out=out)
    elif addend is not None:
        torch.addmm(addend, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


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


def check_chunking(
    hidden: Tensor, num_valid: int | None, workspace_bytes: int | None, logits_dtype: str
) -> tuple[int, int, bool]:
    """num_valid or -1, the bytes, whether the logits are float32."""
    if logits_dtype not in ("float32", "input"):
        raise ValueError(f"logits_dtype must be one of float32, input; got {logits_dtype!r}")
    if workspace_bytes is None:
        cuda = hidden.device.type == "cuda"
        workspace_bytes = CUDA_WORKSPACE_BYTES if cuda else CPU_WORKSPACE_BYTES
    if workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes must be > 0, got {workspace_bytes}")
    if num_valid is not None and num_valid < 0:
        raise ValueError(f"num_valid must be >= 0, got {num_valid}")
    return -1 if num_valid is None else num_valid, workspace_bytes, logits_dtype == "float32"
