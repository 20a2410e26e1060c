"""NumPy arrays as the kernels read them: dtype, strides and address."""

from typing import Any

import numpy as np
import torch

from warpo.kernels._native import DTYPE_CODES


def is_readable(array: np.ndarray) -> bool:
    """True if its strides are multiples of the element, not negative."""
    return array.flags.aligned and min(array.strides, default=0) >= 0


def floats(array: np.ndarray) -> np.ndarray:
    array = array.astype(np.float32, copy=False)
    return array if is_readable(array) else array.copy()


def flags(array: np.ndarray) -> np.ndarray:
    array = array if array.dtype in (np.bool_, np.uint8) else array != 0
    return array if is_readable(array) else array.copy()


def view(array: np.ndarray) -> Any:
    """The View of csrc/view.h of (T, N) or (T,) as [N, T], or of (N,): address, strides, dtype.
    The array is float32, bool or uint8.
    """
    size, strides = array.itemsize, array.strides
    return array.ctypes.data, strides[-1] // size, strides[0] // size, _CODES[array.dtype.type]


_CODES = {
    np.float32: DTYPE_CODES[torch.float32],
    np.bool_: DTYPE_CODES[torch.uint8],
    np.uint8: DTYPE_CODES[torch.uint8],
}
