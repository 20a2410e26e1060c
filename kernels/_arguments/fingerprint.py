"""The structs of csrc/arguments/fingerprint.h, which describes the fields."""

from typing import NamedTuple

from torch import Tensor


class FingerprintArguments(NamedTuple):
    tensors: list[Tensor]
    fingerprints: Tensor
