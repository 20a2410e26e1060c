"""Tanh-squashed Gaussian actions, row by row, from https://arxiv.org/abs/1801.01290 appendix C
eq. 21: log pi(a|s) = log mu(u|s) - sum log(1 - tanh^2(u_i)), where mu is a Gaussian of diagonal
covariance.
"""

import numpy as np

STEP = 1e-30  # of the complex-step derivative f'(x) = Im f(x + ih) / h, which subtracts nothing


def _row(
    mean: np.ndarray, log_std: np.ndarray, noise: np.ndarray
) -> tuple[np.ndarray, np.complex128]:
    std = np.exp(log_std)
    u = mean + std * noise
    density = np.exp(-((u - mean) ** 2) / (2 * std**2)) / (std * np.sqrt(2 * np.pi))
    return np.tanh(u), np.sum(np.log(density) - np.log(1 - np.tanh(u) ** 2))


def squashed_gaussian(
    mean: np.ndarray,
    log_std: np.ndarray,
    noise: np.ndarray,
    grad_actions: np.ndarray,
    grad_logprobs: np.ndarray,
    *,
    log_std_min: float,
    log_std_max: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(actions, logprobs, gradient of mean, gradient of log_std)."""
    actions, logprobs = np.empty_like(mean), np.empty(len(mean))
    gradients = np.zeros((2, *mean.shape))
    for b in range(len(mean)):
        clamped = np.clip(log_std[b], log_std_min, log_std_max)
        row, logprob = _row(mean[b], clamped, noise[b])
        actions[b], logprobs[b] = row.real, logprob.real
        for i in range(mean.shape[1]):
            step = np.zeros(mean.shape[1], complex)
            step[i] = 1j * STEP
            for which, (m, s) in enumerate([(mean[b] + step, clamped), (mean[b], clamped + step)]):
                row, logprob = _row(m, s, noise[b])
                change = (grad_actions[b] * row.imag).sum() + grad_logprobs[b] * logprob.imag
                gradients[which, b, i] = change / STEP
    gradients[1][(log_std < log_std_min) | (log_std > log_std_max)] = 0
    return actions, logprobs, gradients[0], gradients[1]
