"""Which backend runs: by the device of the tensors, by `backend=`, by the environment variable
WARPO_BACKEND.

reference  plain PyTorch, any device        cpu   C++ (always built)
triton     CUDA; CPU under TRITON_INTERPRET  cuda  CUDA C++ (built where nvcc is found)

The reference has every derivative that autograd computes; of the others only `logprobs` and
`logprobs_and_entropy` have a second one. The C++ kernels run on the OpenMP threads of torch: as
with torch itself, a process forked after they have run hangs in its first parallel call. Start
workers with "spawn" or "forkserver", or before the first call.
"""

import functools
import importlib
import importlib.util
import os
from typing import Literal, cast, overload

from torch import Tensor

from warpo.kernels._arguments.backend import Backend, CpuBackend

BACKENDS = ("reference", "cpu", "triton", "cuda")
DEVICES = ("cpu", "cuda")
"""Those that have a backend by default."""
_REQUESTED = os.environ.get("WARPO_BACKEND", "")
_CUDA_DEFAULT = "cuda" if importlib.util.find_spec("warpo.kernels._cuda") else "triton"


def choose(tensor: Tensor, backend: str | None) -> str:
    """Name of the backend for this tensor: `backend`, else WARPO_BACKEND, else cpu | cuda | triton
    by device.

    Raises:
        ValueError: no such backend, or it does not run on the device of the tensor.
    """
    name = backend or _REQUESTED
    if not name and tensor.is_cpu:
        return "cpu"
    device = tensor.device.type
    if not name:
        return default(device)
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
    return name


def default(device: str) -> str:
    """Name of the backend of a type of device.

    Raises:
        ValueError: it has none.
    """
    if device == "cpu":
        return "cpu"
    if device == "cuda":
        return _CUDA_DEFAULT
    raise ValueError(
        f"no backend for device {device!r}: "
        "move the tensors to cpu or cuda, or pass backend='reference'"
    )


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
