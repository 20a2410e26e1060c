"""AdamW and the fingerprint in NumPy and Python integers, from their papers."""

import numpy as np

MASK = 2**64 - 1


def adamw(
    weight: np.ndarray, grads: list[np.ndarray], lr: float, beta1: float, beta2: float,
    eps: float, weight_decay: float,
) -> np.ndarray:  # fmt: skip
    """https://arxiv.org/abs/1711.05101 algorithm 2, with alpha = 1, eta_t = lr, lambda = decay,
    and with lambda multiplied with lr, as in torch.optim.AdamW.
    """
    m, v = np.zeros_like(weight), np.zeros_like(weight)
    for t, g in enumerate(grads, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        weight = weight - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * weight)
    return weight


def fingerprint(bits: list[int]) -> int:
    """Sum modulo 2^64 of SplitMix64 at gamma (i + 1) + bits_i: figures 14 and 16 of Steele, Lea,
    Flood, "Fast splittable pseudorandom number generators".
    """
    total = 0
    for i, element in enumerate(bits):
        z = (0x9E3779B97F4A7C15 * (i + 1) + element) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        total = (total + (z ^ (z >> 31))) & MASK
    return total - 2**64 if total >= 2**63 else total
