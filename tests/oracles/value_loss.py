"""PPO2's clipped value loss, token by token in float64, from https://arxiv.org/abs/2005.12729
section 3: L = max((V - V_targ)^2, (clip(V, V_old - eps, V_old + eps) - V_targ)^2), here times 1/2.
"""

import numpy as np


def value_loss(
    values: list[np.ndarray],
    old_values: list[np.ndarray],
    returns: list[np.ndarray],
    masks: list[np.ndarray],
    *,
    clip_range: float | None,
    huber_delta: float | None,
    aggregation: str,
    denominator: float,
) -> tuple[float, list[np.ndarray], dict[str, float]]:
    """(loss, gradient of every sequence, what `value_metrics` returns but for the loss)."""

    def error_loss(x: float) -> float:
        if huber_delta is not None and abs(x) > huber_delta:
            return huber_delta * (abs(x) - huber_delta / 2)
        return x**2 / 2

    def slope(x: float) -> float:
        return x if huber_delta is None else float(np.clip(x, -huber_delta, huber_delta))

    loss, clipped_tokens, gradients = 0.0, 0, []
    for v, old, target, mask in zip(values, old_values, returns, masks, strict=True):
        gradient = np.zeros(len(v))
        tokens = int(mask.sum())
        for t in np.flatnonzero(mask):
            weight = 1 / denominator
            if aggregation == "sequence-mean-token-mean":
                weight /= tokens
            unclipped = error_loss(v[t] - target[t])
            near = v[t]
            if clip_range is not None:
                near = np.clip(v[t], old[t] - clip_range, old[t] + clip_range)
            clipped = error_loss(near - target[t])
            loss += weight * max(unclipped, clipped)
            clipped_tokens += clipped > unclipped
            # max has the gradient of its larger argument; that of a clipped value is 0
            if unclipped > clipped or near == v[t]:
                gradient[t] = weight * slope(v[t] - target[t])
            elif unclipped == clipped:
                gradient[t] = weight * slope(v[t] - target[t]) / 2
        gradients.append(gradient)
    kept_values = np.concatenate([v[m] for v, m in zip(values, masks, strict=True)])
    kept = np.concatenate([r[m] for r, m in zip(returns, masks, strict=True)])
    some, varies = len(kept) > 0, len(kept) > 0 and np.var(kept) > 0
    metrics = {
        "value/clip_frac": clipped_tokens / max(len(kept), 1),
        "value/explained_variance": 1 - np.var(kept - kept_values) / np.var(kept) if varies else 0,
        "value/mean": np.mean(kept_values) if some else 0.0,
        "return/mean": np.mean(kept) if some else 0.0,
    }
    return loss, gradients, metrics
