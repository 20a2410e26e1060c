"""A 64-bit fingerprint of the bits of a tensor, in plain PyTorch: int64 arithmetic wraps."""

import torch
from torch import Tensor

# SplitMix64 as signed numbers
INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """As of an unsigned number."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(z: Tensor) -> Tensor:
    """The mixer, of int64."""
    z = (z ^ _shift_right(z, 30)) * _FACTORS[0]
    z = (z ^ _shift_right(z, 27)) * _FACTORS[1]
    return z ^ _shift_right(z, 31)


def counted(start: int | Tensor, count: int, device: torch.device) -> Tensor:
    """start + increment (i + 1) for i < count, modulo 2^64."""
    return start + torch.arange(1, count + 1, device=device) * INCREMENT


def fingerprint(tensor: Tensor) -> Tensor:
    """Sum of mix(position, word) over the words of 64 bits, modulo 2^64, as int64 []."""
    per_word = 8 // tensor.element_size()
    integer = torch.int16 if per_word == 4 else torch.int32
    bits = tensor.contiguous().view(integer).flatten()
    words = torch.nn.functional.pad(bits, (0, -len(bits) % per_word)).view(torch.int64)
    return splitmix64(counted(0, len(words), words.device) + words).sum()
