"""DAPO's soft punishment of long completions."""

from __future__ import annotations


def overlong_penalty(length: int, *, max_new_tokens: int, cache: int) -> float:
    """0 up to L = max_new_tokens - cache tokens, then (L - length) / cache, which is -1 at
    max_new_tokens.

    Args:
        length: tokens of the completion.
        cache: tokens over which the penalty grows.

    Source: DAPO, https://arxiv.org/abs/2503.14476 equation 13.
    """
    return min(0.0, max(-1.0, (max_new_tokens - cache - length) / cache))
