"""A 64-bit fingerprint of the bits of a tensor, in plain PyTorch: int64 arithmetic wraps."""

import torch
from torch import Tensor

# SplitMix64 as signed numbers
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """As of an unsigned number."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def fingerprint(tensor: Tensor) -> Tensor:
    """Sum of mix(position, bits) over the elements, modulo 2^64, as int64 []."""
    if tensor.element_size() == 2:
        bits = tensor.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF
    else:
        bits = tensor.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    position = torch.arange(1, bits.numel() + 1, device=bits.device)
    z = position * _INCREMENT + bits.flatten()
    z = (z ^ _shift_right(z, 30)) * _FACTORS[0]
    z = (z ^ _shift_right(z, 27)) * _FACTORS[1]
    return (z ^ _shift_right(z, 31)).sum()
