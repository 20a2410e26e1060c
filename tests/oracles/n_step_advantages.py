"""One row of advantages of n steps in NumPy, https://arxiv.org/abs/1506.02438 eq. 14: rewards, and
the value of the state that the last of them leads to.
"""

import numpy as np

from tests.oracles.gae import Row


def n_step_advantages(rewards, values, *, n, gamma, **options):
    row = Row(len(rewards), **options)
    r, v = row.rewards(rewards), row.clean(values)
    advantages = np.zeros(row.length)
    for position, t in enumerate(row.steps):
        taken = row.steps[position : position + n]
        total = sum(gamma**distance * r[later] for distance, later in enumerate(taken))
        last = position + len(taken) - 1
        advantages[t] = total + gamma ** len(taken) * row.next_value(v, last) - v[t]
    advantages = row.clean(advantages)
    return advantages, row.clean(advantages + v)
