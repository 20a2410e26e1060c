"""Which backends the kernel tests run, and how to make their inputs.

On the CPU: the C++ kernels, and Triton's under its interpreter. With WARPO_TEST_DEVICE=cuda: Triton
and CUDA on the GPU.
"""

import importlib.util
import os
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = os.environ.get("WARPO_TEST_DEVICE", "cpu")
BACKENDS = ("cpu", "triton") if DEVICE == "cpu" else ("triton", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from tests.kernels import interpreter

    interpreter.speed_up()

each_backend = pytest.mark.parametrize("backend", BACKENDS)
# For tests that keep Triton's interpreter busy for seconds.
each_backend_slow_triton = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=pytest.mark.slow) if (DEVICE, name) == ("cpu", "triton") else name
        for name in BACKENDS
    ],
)


def dtypes(backend: str) -> tuple[torch.dtype, ...]:
    """Triton's interpreter truncates where a GPU rounds, so it is held to float32 alone."""
    return (torch.float32,) if DEVICE == "cpu" and backend == "triton" else DTYPES


def roundings(backend: str) -> tuple[torch.dtype, ...]:
    """Dtypes of 16 bits to which it rounds float32."""
    return (torch.float16,) if DEVICE == "cpu" and backend == "triton" else DTYPES[1:]


def last_arguments(module: ModuleType, operation: str, monkeypatch: pytest.MonkeyPatch) -> list:
    """Fills with what a module hands to an operation of its backend, call by call."""
    load, seen = module.dispatch.load, []

    def recording(name: str) -> Any:
        kernels = load(name)

        def record(arguments: Any) -> None:
            seen.append(arguments)
            getattr(kernels, operation)(arguments)

        class Recording:
            def __getattr__(self, name: str) -> Any:
                return record if name == operation else getattr(kernels, name)

        return Recording()

    monkeypatch.setattr(module.dispatch, "load", recording)
    return seen


def apart(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Of its shape, between NaN, with rows that are further apart than they are long."""
    *lead, columns = like.shape
    wide = torch.full((*lead, columns + 8 + -columns % 8), torch.nan, dtype=dtype, device=DEVICE)
    return wide[..., :columns]


def examples(backend: str, number: int) -> int:
    """Fewer for Triton: its interpreter is slow, and on a GPU most cases compile a kernel anew."""
    return max(1, number // 10) if backend == "triton" else number


def strided(tensor: Tensor, layout: str) -> Tensor:
    """The same values on the test device: dense, sliced out of something larger, transposed."""
    tensor = tensor.to(DEVICE)
    if layout == "sliced":
        shape = [size + 3 for size in tensor.shape]
        larger = torch.full(shape, 77, dtype=tensor.dtype, device=DEVICE)
        view = larger[tuple(slice(1, 1 + size) for size in tensor.shape)]
        view.copy_(tensor)
        return view
    if layout == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    return tensor.contiguous()
