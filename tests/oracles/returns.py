"""One row of returns in NumPy, from Sutton and Barto, "Reinforcement learning", 2nd edition."""

import numpy as np

from tests.oracles.gae import Row


def discounted_returns(rewards, *, gamma, **options):
    """Eq. 3.8: G_t = sum_k gamma^k R_{t+k}, and beyond the last step its bootstrap."""
    row = Row(len(rewards), **options)
    r = row.rewards(rewards)
    none = np.zeros(row.length)
    returns = np.zeros(row.length)
    for position, t in enumerate(row.steps):
        for later in row.episode_from(position):
            returns[t] += gamma ** (later - position) * r[row.steps[later]]
        returns[t] += gamma ** (later - position + 1) * row.next_value(none, later)
    return (row.clean(returns),)


def lambda_returns(rewards, values, *, gamma, gae_lambda, **options):
    """Eq. 12.3: (1 - lambda) sum_n lambda^(n - 1) G_{t:t+n}, the rest of the weight on the return
    to the end of the episode.
    """
    row = Row(len(rewards), **options)
    r, v = row.rewards(rewards), row.clean(values)
    returns = np.zeros(row.length)
    for position, t in enumerate(row.steps):
        so_far, episode = 0.0, list(row.episode_from(position))
        for n, later in enumerate(episode):
            so_far += gamma**n * r[row.steps[later]]
            n_step = so_far + gamma ** (n + 1) * row.next_value(v, later)
            is_last = later == episode[-1]
            returns[t] += (gae_lambda**n if is_last else (1 - gae_lambda) * gae_lambda**n) * n_step
    return (row.clean(returns),)
