"""One row of V-trace in NumPy, from the sum of https://arxiv.org/abs/1802.01561 eq. 1:

v_s = V_s + sum_t gamma^(t - s) (prod_{s <= i < t} c_i) rho_t (r_t + gamma V_{t+1} - V_t)
"""

import numpy as np

from tests.oracles.gae import Row


def vtrace(
    logprobs, old_logprobs, rewards, values, *, gamma, rho_max, c_max, pg_rho_max, gae_lambda,
    **options,
):  # fmt: skip
    row = Row(len(rewards), **options)
    r, v = row.rewards(rewards), row.clean(values)
    ratio = np.exp(row.clean(logprobs) - row.clean(old_logprobs))
    rho, c = np.minimum(rho_max, ratio), gae_lambda * np.minimum(c_max, ratio)
    targets, advantages = v.copy(), np.zeros(row.length)
    for position, s in enumerate(row.steps):
        weight = 1.0
        for later in row.episode_from(position):
            t = row.steps[later]
            delta = rho[t] * (r[t] + gamma * row.next_value(v, later) - v[t])
            targets[s] += gamma ** (later - position) * weight * delta
            weight *= c[t]
    for position, s in enumerate(row.steps):
        ends = row.terminated[s] or row.truncated[s]
        is_last = position + 1 == len(row.steps)
        after = row.next_value(v, position)
        if not ends and not is_last:
            after = targets[row.steps[position + 1]]
        advantages[s] = min(pg_rho_max, ratio[s]) * (r[s] + gamma * after - v[s])
    return row.clean(targets), row.clean(advantages)
