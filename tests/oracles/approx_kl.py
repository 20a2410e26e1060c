"""Estimators of the KL, token by token: http://joschu.net/blog/kl-approx.html, with r = p / q for
samples of q: k1 = -log r, k2 = (log r)^2 / 2, k3 = (r - 1) - log r, reverse_k3 = r log r - (r - 1).
"""

import numpy as np


def approx_kl(
    logprobs: np.ndarray, refs: np.ndarray, estimator: str, limit: float
) -> tuple[np.ndarray, np.ndarray]:
    """The value, and its derivative with respect to logprobs."""
    log_r = refs - logprobs
    r_less_1 = np.expm1(log_r)
    value, slope = {
        "k1": (-log_r, np.ones_like(log_r)),
        "k2": (log_r**2 / 2, -log_r),
        "k3": (r_less_1 - log_r, -r_less_1),
        "reverse_k3": (np.exp(log_r) * log_r - r_less_1, -np.exp(log_r) * log_r),
    }[estimator]
    return np.clip(value, -limit, limit), np.where(np.abs(value) > limit, 0.0, slope)
