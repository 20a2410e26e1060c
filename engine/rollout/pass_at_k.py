"""pass@k: the probability that one of k completions of a prompt is correct."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb


def pass_at_k(correct: Sequence[int], samples: int, k: int) -> float:
    """Mean over prompts of 1 - C(n - c, k) / C(n, k), without bias for the pass@k of the model.

    Args:
        correct: c of each prompt, how many of its n = `samples` completions are correct.
        k: 1 to n.

    Source: Chen et al., https://arxiv.org/abs/2107.03374 equation 1.
    """
    draws = comb(samples, k)
    return sum(1 - comb(samples - c, k) / draws for c in correct) / len(correct)


def powers_of_two(samples: int) -> list[int]:
    """1, 2, 4, ... below `samples`, and `samples`."""
    return [*(1 << i for i in range(samples.bit_length()) if 1 << i < samples), samples]
