"""Log-probability and entropy of softmax(logits / T), token by token, in NumPy.

The definitions: p_j = e^(z_j / T) / sum_k e^(z_k / T), logp = log p_y, H = -sum p log p; gradients
d log p_y / d z_j = (1[j = y] - p_j) / T and d H / d z_j = -p_j (log p_j + H) / T.
"""

import numpy as np


def logprobs(logits, targets, temperature=1.0):
    """(logp, entropy, d logp / d logits, d entropy / d logits) for logits (N, V), targets (N,)."""
    tokens, vocab = logits.shape
    temperature = np.broadcast_to(temperature, (tokens,))
    logp, entropy = np.zeros(tokens), np.zeros(tokens)
    of_logp, of_entropy = np.zeros((tokens, vocab)), np.zeros((tokens, vocab))
    for n in range(tokens):
        z = logits[n] / temperature[n]
        p = np.exp(z - z.max())
        p = p / p.sum()
        # p log p is 0 at p = 0
        log_p = np.log(np.where(p == 0, 1, p))
        logp[n] = log_p[targets[n]]
        entropy[n] = -np.sum(p * log_p)
        of_logp[n] = (np.arange(vocab) == targets[n]) - p
        of_entropy[n] = -p * (log_p + entropy[n])
        of_logp[n] /= temperature[n]
        of_entropy[n] /= temperature[n]
    return logp, entropy, of_logp, of_entropy
