"""From the characters of a completion to its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# What decoding writes for bytes that are not a character.
_REPLACEMENT = "\ufffd"


def separator_ends(text: str, separator: str) -> list[int]:
    """Number of characters up to the end of each step: past every separator, and at the end.

    Text after the last separator is a step if it is not blank; a text without steps is one.
    """
    ends, start = [], 0
    while (found := text.find(separator, start)) >= 0:
        start = found + len(separator)
        ends.append(start)
    if text[start:].strip() or not ends:
        ends.append(len(text))
    return ends


def token_indices(
    decode: Callable[[list[int]], str], ids: list[int], text: str, ends: Sequence[int]
) -> list[int]:
    """Index of the token with which each of text[:end] is complete.

    That is the first i such that decode(ids[:i + 1]) starts with text[:end]. It holds for every
    tokenizer, also where a character is spread over tokens, at the price of log2(len(ids))
    decodings for each end.

    Args:
        decode: the text of some token ids; text = decode(ids).
        ends: rising, each at most len(text). 0 is the last token.
    """
    indices = []
    low = 0
    for end in ends:
        if end == 0:
            indices.append(len(ids) - 1)
            continue
        high = _first_cover(decode, ids, text[:end], low)
        indices.append(high - 1)
        # The next end may lie in the same token.
        low = high - 1
    return indices


def _first_cover(decode: Callable[[list[int]], str], ids: list[int], wanted: str, low: int) -> int:
    """Smallest count > low such that decode(ids[:count]) starts with `wanted`; low has no such."""
    if _REPLACEMENT in wanted:
        # Bytes that are not text decode differently with every token that follows.
        return next(n for n in range(low + 1, len(ids) + 1) if decode(ids[:n]).startswith(wanted))
    high = len(ids)
    while high - low > 1:
        middle = (low + high) // 2
        for count in range(middle, low, -1):
            decoded = decode(ids[:count])
            if decoded.startswith(wanted):
                high = count
                break
            # A prefix that ends within a character may have lost characters before it: Llama's
            # byte tokens become text together or not at all. One before it decides.
            if _REPLACEMENT not in decoded:
                low = middle
                break
        else:
            low = middle
    return high
