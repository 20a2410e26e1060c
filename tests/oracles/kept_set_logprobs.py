"""Log-probability in the truncated distribution that was sampled, token by token, in NumPy.

https://arxiv.org/abs/1904.09751 eq. 2 and 3: over the kept set V', P'(x) = P(x) / sum_(x' in V')
P(x'), with P the softmax of the logits at temperature T.
"""

import numpy as np


def kept_set_logprobs(
    hidden, weight, targets, kept_ids, kept_offsets, *, bias=None, temperature=1.0
):
    """(N,) for hidden (N, H), weight (V, H); 0 for a token that keeps none."""
    tokens = len(targets)
    temperature = np.broadcast_to(temperature, (tokens,))
    logp = np.zeros(tokens)
    for n in range(tokens):
        kept = kept_ids[kept_offsets[n] : kept_offsets[n + 1]]
        if len(kept) == 0:
            continue
        z = weight @ hidden[n] + (0 if bias is None else bias)
        p = np.exp(z / temperature[n] - (z / temperature[n]).max())
        p = p / p.sum()
        logp[n] = np.log(p[targets[n]] / p[kept].sum())
    return logp
