"""One row of generalised advantage estimation in NumPy, from the definition as a sum of temporal
differences, https://arxiv.org/abs/1506.02438 eq. 11 and 16: A_t = sum_l (gamma lambda)^l
delta_{t+l}.
"""

import numpy as np


class Row:
    """The steps of one row that exist: valid ones, with mask_mode "zero" all of them."""

    def __init__(
        self, length, *, mask=None, mask_mode="carry", terminated=None, truncated=None,
        last_values=0.0, final_values=None, done_convention="ends_at_t", last_terminated=0,
        last_truncated=0,
    ) -> None:  # fmt: skip
        self.length, self.mask_mode = length, mask_mode
        self.valid = np.ones(length, bool) if mask is None else mask.astype(bool)
        self.last_value, self.final_values = last_values, final_values
        self.terminated = self._ends(terminated, last_terminated, done_convention)
        self.truncated = self._ends(truncated, last_truncated, done_convention)
        everything = mask_mode == "zero"
        self.steps = [t for t in range(length) if self.valid[t] or everything]

    def _ends(self, flags, last, done_convention):
        if flags is None:
            return np.zeros(self.length, bool)
        flags = flags.astype(bool)
        if done_convention == "starts_at_t":
            flags = np.append(flags, bool(last))[1:]
        return flags & self.valid

    def clean(self, x, absent: float = 0.0):
        return np.where(self.valid, x, absent)

    def rewards(self, given):
        found = self.clean(given)
        if self.mask_mode == "compact" and self.valid.any():
            last = np.flatnonzero(self.valid)[-1]
            found[last] += given[last + 1 :].sum()
        return found

    def next_value(self, values, position: int) -> float:
        """V of the state that step number `position` of self.steps leads to; `values` are clean."""
        t = self.steps[position]
        if self.terminated[t]:
            return 0.0
        if self.truncated[t]:
            return self.final_values[t]
        is_last = position + 1 == len(self.steps)
        return self.last_value if is_last else values[self.steps[position + 1]]

    def episode_from(self, position: int):
        """Positions from this one to the end of its episode."""
        for later in range(position, len(self.steps)):
            yield later
            if self.terminated[self.steps[later]] or self.truncated[self.steps[later]]:
                return


def gae(rewards, values, *, gamma, gae_lambda, **options):
    row = Row(len(rewards), **options)
    r, v = row.rewards(rewards), row.clean(values)
    deltas = [
        r[t] + gamma * row.next_value(v, position) - v[t] for position, t in enumerate(row.steps)
    ]
    advantages = np.zeros(row.length)
    for position, t in enumerate(row.steps):
        for later in row.episode_from(position):
            advantages[t] += (gamma * gae_lambda) ** (later - position) * deltas[later]
    advantages = row.clean(advantages)
    return advantages, row.clean(advantages + v)
