"""Which backend runs: by the device of the tensors, by `backend=`, by the environment variable
WARPO_BACKEND.

reference  plain PyTorch, any device        cpu   C++ (always built)
triton     CUDA; CPU under TRITON_INTERPRET  cuda  CUDA C++ (built where nvcc is found)

On a GPU it is cuda where that was built. On one that its kernels do not run on, see `_cuda_images`,
it is triton, with a warning that says why.

The reference has every derivative that autograd computes; of the others only `logprobs` and
`logprobs_and_entropy` have a second one. The C++ kernels run on the OpenMP threads of torch: as
with torch itself, a process forked after they have run hangs in its first parallel call. Start
workers with "spawn" or "forkserver", or before the first call.
"""

import functools
import importlib
import importlib.util
import os
import warnings
from typing import Literal, cast, overload

import torch
from torch import Tensor

from warpo.kernels import _cuda_images
from warpo.kernels._arguments.backend import Backend, CpuBackend

BACKENDS = ("reference", "cpu", "triton", "cuda")
DEVICES = ("cpu", "cuda")
"""Those that have a backend by default."""
_REQUESTED = os.environ.get("WARPO_BACKEND", "")
_CUDA_IS_BUILT = importlib.util.find_spec("warpo.kernels._cuda") is not None


def choose(tensor: Tensor, backend: str | None) -> str:
    """Name of the backend for this tensor: `backend`, else WARPO_BACKEND, else cpu | cuda | triton
    by device.

    Raises:
        ValueError: no such backend, or it does not run on the device of the tensor.
        RuntimeError: `cuda` is asked for and its kernels do not run on this GPU.
    """
    name = backend or _REQUESTED
    if not name and tensor.is_cpu:
        return "cpu"
    if not name:
        return default(tensor.device)
    device = tensor.device.type
    if name not in BACKENDS:
        raise ValueError(
            f"backend (argument or WARPO_BACKEND) must be one of {', '.join(BACKENDS)}; "
            f"got {name!r}"
        )
    if name in ("cpu", "cuda") and device != name:
        raise ValueError(
            f"backend {name!r} got tensors on {device!r}: move them, or choose another backend"
        )
    if name == "triton" and device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend 'triton' got tensors on {device!r}: it needs a CUDA device, "
            "or TRITON_INTERPRET=1 set before Python starts, which is for tests"
        )
    if name == "cuda" and (problem := cuda_problem(tensor.device.index)):
        raise RuntimeError(f"backend 'cuda': {problem}")
    return name


def default(device: torch.device) -> str:
    """Name of the backend of a device.

    Raises:
        ValueError: it has none.
    """
    if device.type == "cpu":
        return "cpu"
    if device.type == "cuda":
        return _default_on_cuda(device.index)
    raise ValueError(
        f"no backend for device {device.type!r}: "
        "move the tensors to cpu or cuda, or pass backend='reference'"
    )


def cuda_problem(index: int | None) -> str | None:
    """Why the CUDA kernels do not run on this GPU, the current one for None, with the cure; None
    where they do, where they are not built, and where no GPU is visible."""
    return _find_cuda_problem(index)


def _default_on_cuda(index: int | None) -> str:
    return _decide_on_cuda(index)


# what torch.compiler.assume_constant_result does, which would import dynamo: asked while a graph
# is traced, these run, and the answer is a constant of the graph
cuda_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]
_default_on_cuda._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _find_cuda_problem(index: int | None) -> str | None:
    if not _CUDA_IS_BUILT or not torch.cuda.is_available():
        return None
    build = _cuda_images.Build(*importlib.import_module("warpo.kernels._cuda").build())
    major, minor = torch.cuda.get_device_capability(index)
    gpu = torch.cuda.get_device_name(index)
    return _cuda_images.problem(build, 10 * major + minor, gpu)


@functools.cache
def _decide_on_cuda(index: int | None) -> str:
    if not _CUDA_IS_BUILT:
        return "triton"
    if problem := cuda_problem(index):
        warnings.warn(f"backend 'triton' instead of 'cuda': {problem}", stacklevel=2)
        return "triton"
    return "cuda"


@overload
def load(name: Literal["cpu"]) -> CpuBackend: ...
@overload
def load(name: str) -> Backend: ...
@functools.cache
def load(name: str) -> Backend:
    """The backend itself.

    Raises:
        RuntimeError: it is not built or its package is not installed; the message says how to get
            it.
    """
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            raise RuntimeError("backend 'triton' needs the package triton: pip install triton")
        from warpo.kernels import _triton

        return _triton
    if importlib.util.find_spec(f"warpo.kernels._{name}") is None:
        cure = "with nvcc on the PATH" if name == "cuda" else "with a C++ compiler"
        raise RuntimeError(f"backend {name!r} is not built: run `pip install -e .` {cure}")
    from warpo.kernels._native import Native

    return cast(Backend, Native(importlib.import_module(f"warpo.kernels._{name}")))
