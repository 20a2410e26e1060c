"""Environment of a process: how threads wait, what becomes of freed memory, how many ranks there
are. Imports nothing of torch, which reads the variables when it loads.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import MutableMapping

# How often a waiting OpenMP thread looks for work before it sleeps, 20 us by libgomp's estimate.
# With its own 300000 threads that wait starve those that work. With none, each small product of the
# sampler wakes a thread: 64 x 256 x 768 took 0.41 ms on 2 cores, against 0.21 with this and 0.28
# with one thread.
SPIN_COUNT = 2000

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of malloc.h
# From this size on memory comes from the kernel and goes back at once. By default glibc raises the
# bound to 32 MiB as it goes, and keeps what is below: 0.4 GiB were seen.
_MMAP_THRESHOLD_BYTES = 256 * 1024
_MMAP_MAX = 65536  # glibc's own


def set_thread_waiting(variables: MutableMapping[str, str] = os.environ) -> None:
    """Let OpenMP's threads spin for a moment and then sleep, unless the user has said how.

    To be called before torch loads.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(variables):
        variables["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def world_size() -> int:
    """The number of processes that torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def expand_segments(variables: MutableMapping[str, str] = os.environ) -> None:
    """Let torch's allocator on CUDA grow the segments it has, unless the user has configured it.

    Micro-batches differ in size, and in segments of fixed sizes what one leaves does not fit the
    next. vLLM leaves this off in the pool that it puts to sleep (vllm/device_allocator/cumem.py).
    To be called before torch loads.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(variables):
        variables["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def keep_freed_memory() -> None:
    """Let glibc reuse memory that was freed, as caching allocators do, instead of returning it.

    Activations and gradients on a CPU otherwise come as fresh memory in every step, and a third of
    the update's time was page faults. The price: between steps the process keeps what the largest
    phase took, and holes between pieces in use raise that; 30 to 40 MiB of 530 were seen. With 4096
    completions per step in micro-batches all of different shapes it was 190 of 790, a third of it
    oneDNN's cache of products, and level from the 13th step on.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def return_freed_memory() -> None:
    """Let glibc return large memory when it is freed, so that the resident set is what is in use:
    the opposite of `keep_freed_memory`, to measure by.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
    libc.mallopt(_M_MMAP_MAX, _MMAP_MAX)
