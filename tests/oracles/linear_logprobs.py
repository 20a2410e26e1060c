"""Log-probability and entropy under a linear head, token by token, in NumPy.

The head is z = W h + b, with the soft cap c tanh(z / c) of Gemma 2 (https://arxiv.org/abs/2408.00118
section 2, "logit soft-capping"); the distribution is softmax(z / T), the entropy -sum p log p.
"""

import numpy as np


def linear_logprobs(
    hidden, weight, targets, *, bias=None, softcap=None, temperature=1.0, mask=None
):
    """(logp, entropy) for hidden (N, H), weight (V, H), targets (N,); temperature one per token or
    one number. 0 where masked.
    """
    tokens = len(targets)
    temperature = np.broadcast_to(temperature, (tokens,))
    logp, entropy = np.zeros(tokens), np.zeros(tokens)
    for n in range(tokens):
        if mask is not None and not mask[n]:
            continue
        z = weight @ hidden[n]
        if bias is not None:
            z = z + bias
        if softcap is not None:
            z = softcap * np.tanh(z / softcap)
        z = z / temperature[n]
        p = np.exp(z - z.max())
        p = p / p.sum()
        logp[n] = np.log(p[targets[n]])
        entropy[n] = -np.sum(p * np.log(p))
    return logp, entropy
