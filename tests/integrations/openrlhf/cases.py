"""Shared by the tests of OpenRLHF's replacements: the two functions, and inputs."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from warpo.kernels.integrations.openrlhf import library
from warpo.kernels.integrations.patching import wrap

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SEEDS = st.integers(0, 999)
MASK_DTYPES = st.sampled_from([torch.bool, torch.int64, torch.float32])
LAYOUTS = st.sampled_from(["dense", "transposed", "sliced"])


def pair(name: str, *bound: Any) -> tuple[Callable, Callable]:
    """The library's function and ours; for a method, of that object."""
    replacement = library.replacements[name]
    original = replacement.current()
    return tuple(functools.partial(f, *bound) for f in (original, wrap(replacement, original)))


def without_none(function: Callable) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        return [x for x in function(*args, **kwargs) if x is not None]

    return run


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in other strides."""
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":
        return torch.cat([x, x], dim=1)[:, : x.shape[1]]
    return x


def mask_of(shape: tuple[int, int], generator: torch.Generator, some_empty: bool) -> Tensor:
    """At least one valid token; rows may be without one."""
    mask = torch.rand(shape, generator=generator) < 0.7
    if some_empty:
        mask[torch.rand(shape[0], generator=generator) < 0.4] = False
    mask[0, 0] = True
    return mask
