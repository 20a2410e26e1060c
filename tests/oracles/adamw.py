"""AdamW and the fingerprint in NumPy and Python integers, from their papers."""

import numpy as np

MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


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


def splitmix64(z: int) -> int:
    """Figure 16 of Steele, Lea, Flood, "Fast splittable pseudorandom number generators"."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def fingerprint(bits: list[int], width: int) -> int:
    """Sum modulo 2^64 of splitmix64(gamma (j + 1) + word_j): word_j holds 64 / width elements of
    so many bits.
    """
    per_word = 64 // width
    total = 0
    for j in range(0, len(bits), per_word):
        word = sum(bit << (width * k) for k, bit in enumerate(bits[j : j + per_word]))
        total += splitmix64((GAMMA * (j // per_word + 1) + word) & MASK)
    total &= MASK
    return total - 2**64 if total >= 2**63 else total


def random_bits(seed: int, step: int, count: int) -> list[int]:
    """Of the elements of a parameter in a step: SplitMix64 from a key of seed and step on."""
    key = splitmix64(GAMMA * (seed + 1) & MASK)
    key = splitmix64((key + GAMMA * step) & MASK)
    return [splitmix64((key + GAMMA * (i + 1)) & MASK) for i in range(count)]


def round_at_random(value: np.ndarray, random: list[int]) -> np.ndarray:
    """float32 to bfloat16, as float32: up in magnitude where the 16 bits of `random`, as a share of
    2^16, reach above the part that is cut off.
    """
    bits = value.view(np.uint32).astype(np.uint64)
    up = np.array(
        [(r & 0xFFFF) >= 2**16 - int(b & 0xFFFF) for r, b in zip(random, bits, strict=True)]
    )
    return (((bits >> 16) + up) << 16).astype(np.uint32).view(np.float32)
