"""Targets of soft Q-functions, transition by transition, from https://arxiv.org/abs/1812.05905
eq. 2 and 3: T Q(s, a) = r + gamma V(s') with V(s') = Q(s', a') - alpha log pi(a'|s'), V = 0 after
the end, and the smaller of two Q.
"""

import numpy as np


def soft_q_targets(
    rewards: np.ndarray,
    terminated: np.ndarray,
    next_q1: np.ndarray,
    next_q2: np.ndarray,
    next_logprobs: np.ndarray,
    *,
    alpha: float,
    gamma: float,
) -> np.ndarray:
    targets = []
    for i, reward in enumerate(rewards):
        value = 0.0
        if not terminated[i]:
            value = min(next_q1[i], next_q2[i]) - alpha * next_logprobs[i]
        targets.append(reward + gamma * value)
    return np.array(targets)
