"""Whitening in NumPy: advantage normalisation of https://arxiv.org/abs/2006.05990 section 3.5, with
the variance of the textbook, sum of squared deviations over n - 1.
"""

import numpy as np


def whiten(x: np.ndarray, mask: np.ndarray, shift_mean: bool, eps: float) -> np.ndarray:
    where = np.argwhere(mask)
    valid = [float(x[tuple(i)]) for i in where]
    result = np.zeros(x.shape)
    if not valid:
        return result
    mean = sum(valid) / len(valid)
    variance = 0.0
    if len(valid) > 1:
        variance = sum((v - mean) ** 2 for v in valid) / (len(valid) - 1)
    for i, v in zip(where, valid, strict=True):
        spread = np.sqrt(variance + eps)
        result[tuple(i)] = ((v - mean) / spread if spread else 0.0) + (0.0 if shift_mean else mean)
    return result
