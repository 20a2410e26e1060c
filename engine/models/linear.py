"""Linear layers on a CPU of AMD in float32, by oneDNN.

PyTorch gives float32 products to MKL. oneDNN, which it brings too, is faster on AMD: 3072 tokens,
512 -> 1408 took 26 ms instead of 46 on 2 cores of an EPYC. The gradient of the weight stays with
MKL, which is as fast there or faster. On a Xeon of Intel MKL is: sampling 64 x 64 tokens from 1.7 M
weights took 672 ms of CPU time instead of 720, 32 x 64 from 21 M 2103 instead of 2169.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _onednn_is_faster() -> bool:
    """True on a processor of AMD, as Linux names its vendor, with a PyTorch that has oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text(encoding="utf-8")


ONEDNN_IS_FASTER = _onednn_is_faster()


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.custom_op("warpo::onednn_linear", mutates_args=())
def _compiled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `_onednn`, which torch.compile would take apart and not get together again."""
    return _onednn(x, weight, bias)


@_compiled.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product()(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            _product()(grad, weight.t(), None) if need_x else None,
            grad.t() @ x if need_weight else None,
            grad.sum(0) if need_bias else None,
        )


def _product() -> Callable[..., Tensor]:
    return _compiled if torch.compiler.is_compiling() else _onednn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, as torch.nn.functional.linear, within rounding."""
    float32_on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if not (float32_on_cpu and ONEDNN_IS_FASTER):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        # Only rows: a view made in a Function cannot be changed in place, as Gemma 3n does.
        return _Linear.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
    if torch.compiler.is_compiling():
        return _compiled(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
    return _onednn(x, weight, bias)


class Linear(nn.Linear):
    """A layer by `linear`; the class of a model's own layers is replaced by it."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
