"""One row of off-policy returns in NumPy, as the sum over later rewards of Precup, Sutton and Singh,
"Eligibility traces for off-policy policy evaluation", 2000, section 3, for the step itself given:

G_t = sum_{u >= t} gamma^(u - t) (prod_{t < v <= u} w_v) r_u
"""

import numpy as np

from tests.oracles.gae import Row


def off_policy_returns(rewards, logprobs, old_logprobs, *, gamma, **options):
    row = Row(len(rewards), **options)
    r = row.rewards(rewards)
    ratio = np.exp(row.clean(logprobs) - row.clean(old_logprobs))
    returns = np.zeros(row.length)
    for position, t in enumerate(row.steps):
        later = row.steps[position:]
        weights = np.cumprod([1.0, *gamma * ratio[later[1:]]])
        returns[t] = (weights * r[later]).sum() + gamma * weights[-1] * row.last_value
    return (row.clean(returns),)
