"""The aggregations of token losses, sequence by sequence: https://arxiv.org/abs/2402.03300 eq. 3
(mean of each completion), https://arxiv.org/abs/2503.14476 eq. 8 (of all tokens),
https://arxiv.org/abs/2503.20783 section 3.2 (a constant length).
"""

import numpy as np


def aggregate(
    values: list[np.ndarray],
    masks: list[np.ndarray],
    aggregation: str,
    denominator: float | None,
) -> tuple[float, list[np.ndarray]]:
    """The number, and the weight of each token in it: its gradient. A mask is of 0 and 1, or of
    weights.
    """
    if denominator is None:
        tokens = sum(mask.sum() for mask in masks)
        denominator = tokens if aggregation == "token-mean" else len(values)
    total, weights = 0.0, []
    for x, mask in zip(values, masks, strict=True):
        own = np.zeros(len(x))
        for t in np.flatnonzero(mask):
            own[t] = mask[t] / denominator if denominator else 0.0
            if aggregation == "sequence-mean-token-mean":
                own[t] /= mask.sum()
            total += own[t] * x[t]
        weights.append(own)
    return total, weights
