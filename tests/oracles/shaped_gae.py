"""One row of KL-penalised rewards in NumPy, token by token: https://arxiv.org/abs/2203.02155 eq. 2,
with the estimators of http://joschu.net/blog/kl-approx.html; then GAE.
"""

import math

import numpy as np

from tests.oracles.gae import Row, gae

KL = {
    "k1": lambda log_r: -log_r,
    "k2": lambda log_r: log_r**2 / 2,
    "k3": lambda log_r: (math.exp(log_r) - 1) - log_r,
    "reverse_k3": lambda log_r: math.exp(log_r) * log_r - (math.exp(log_r) - 1),
}


def shaped_gae(
    logprobs, ref_logprobs, values, *, gamma, gae_lambda, kl_coef, kl_estimator, rewards=None,
    terminal_rewards=0.0, **options,
):  # fmt: skip
    row = Row(len(logprobs), **options)
    shaped = row.rewards(np.zeros(row.length) if rewards is None else rewards)
    for t in np.flatnonzero(row.valid):
        shaped[t] -= kl_coef * KL[kl_estimator](ref_logprobs[t] - logprobs[t])
    if row.valid.any():
        shaped[np.flatnonzero(row.valid)[-1]] += terminal_rewards
    if options.get("mask_mode") == "compact":
        options["mask_mode"] = "carry"  # the tail is in `shaped`
    return *gae(shaped, values, gamma=gamma, gae_lambda=gae_lambda, **options), shaped
